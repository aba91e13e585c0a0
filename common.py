"""Energy-guided entropic optimal transport: what the scripts here share.  Imports torch and the standard library only.

One potential f is learned; there is no second network and no min-max game (Mokrov et al., ICLR 2024, Algorithm 1):

    pi_f(y|x) = exp((f(y) - c(x,y)) / eps) / Z(f,x)             the plan, sampled by Langevin; Z is never needed
    ascend      E_Q f(y) - E_P E_{pi_f(.|x)} f(y)               right gradient, meaningless value

    x source (B, ...)    y target (B, ...)    f potential, large = likely    c(x,y) cost, |x-y|^2/2 unless given
    eps > 0 temperature of the plan           eta Langevin step              log_p = (f(y) - c(x,y)) / eps  (B,)
"""
import os
import signal
import sys
import threading

# A script beside this file that is stopped during its imports, which take seconds, ends without a traceback.
# pick_device, which every script calls, gives Ctrl-C its meaning back.  In another project nothing changes.
started = os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or "")
OURS = os.path.dirname(started) == os.path.dirname(os.path.abspath(__file__))
if OURS and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import atexit
import contextlib
import datetime
import math
import time
import zipfile
import zlib

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # CPU threads spin for ms by default: ten times slower on busy cores

import torch
from torch import distributed, nn
import torch.nn.functional as F

sys.excepthook = lambda kind, *rest: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)


# ------------------------------------------------------------------------------------------------ potentials

class MLP(nn.Module):
    """f(y) = scale * net(y), `depth` hidden layers of `width`, SiLU: (B, dim) -> (B,).

    SiLU and not LeakyReLU because the sampler follows grad f: a kink in f is a jump in the drift.
    With Adam, `scale` is in effect the learning rate of f in units of the cost."""

    def __init__(self, dim, width=256, depth=3, scale=1.0):
        super().__init__()
        sizes = [dim] + [width] * depth
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        self.last = nn.Linear(width, 1)
        self.scale = scale
        self.flops = 2 * sum(m.weight.numel() for m in (*self.hidden, self.last))  # of one forward pass of one sample

    def forward(self, y):
        for layer in self.hidden:
            y = F.silu(layer(y))
        return self.scale * self.last(y).squeeze(1)

    @torch.no_grad()
    def init_first_layer_at(self, y, sharpness):
        """Start the first layer's ramps, each about 1/sharpness wide, at random samples y (N, dim) of the target.

        torch's own start has ramps about 1 wide: too coarse for a target with structure at a twentieth of that."""
        first = self.hidden[0]
        first.weight.normal_(0, sharpness)
        at = y[torch.randint(len(y), (len(first.weight),), device=y.device)]
        first.bias.copy_(-(first.weight * at).sum(1))


class Heads(nn.Module):
    """f(y) = scale * sum_h net_h(W_h y), each net_h an MLP of two inputs: (B, dim) -> (B,).

    Potentials of independent parts of y add up, and W, which starts as random rotations, learns where the parts are."""

    def __init__(self, dim, heads, width=32, depth=3, scale=1.0, inputs=2):
        super().__init__()
        rotations = [torch.linalg.qr(torch.randn(dim, dim))[0] for _ in range(-(-heads * inputs // dim))]
        self.W = nn.Parameter(torch.cat(rotations)[:heads * inputs])
        self.scale, sizes = scale, [inputs] + [width] * depth
        layers = list(zip(sizes, sizes[1:]))

        def uniform(*shape, fan_in):
            return torch.empty(heads, *shape).uniform_(-1, 1) / fan_in ** 0.5

        self.weights = nn.ParameterList(uniform(a, b, fan_in=a) for a, b in layers)
        self.biases = nn.ParameterList(uniform(1, b, fan_in=a) for a, b in layers)
        self.last = nn.Parameter(uniform(width, 1, fan_in=heads * width))
        self.flops = 2 * sum(w.numel() for w in (self.W, *self.weights, self.last))  # of one forward pass of one sample

    def forward(self, y):
        h = (y @ self.W.T).view(len(y), len(self.last), -1).transpose(0, 1)  # (heads, B, inputs)
        for weight, bias in zip(self.weights, self.biases):
            h = F.silu(torch.baddbmm(bias, h, weight))
        return self.scale * (h @ self.last).sum(0).squeeze(1)

    @torch.no_grad()
    def init_first_layer_at(self, y, sharpness):
        """As that of MLP, for each head."""
        first, bias = self.weights[0].normal_(0, sharpness), self.biases[0]
        at = y[torch.randint(len(y), (len(first), first.shape[2]), device=y.device)]  # (heads, width, dim)
        at = torch.einsum("hwd,hid->hiw", at, self.W.view(len(first), -1, y.shape[1]))
        bias.copy_(-(first * at).sum(1, keepdim=True))


class ResNet(nn.Module):
    """f(y) = scale * net(y) for images (B, channels, side, side), side a multiple of 8 -> (B,).

    Three strided convolutions, `depth` residual blocks after each, then a linear layer over all positions: f may depend
    on where in the image something is.  No batch norm: one chain's score must not depend on the other chains."""

    def __init__(self, side=32, channels=3, width=32, depth=1, scale=1.0):
        super().__init__()
        widths = [channels, width, 2 * width, 4 * width]
        self.halve = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in zip(widths, widths[1:]))
        self.blocks = nn.ModuleList(nn.Sequential(*(Block(b) for _ in range(depth))) for b in widths[1:])
        self.last = nn.Linear(widths[-1] * (side // 8) ** 2, 1)
        self.scale = scale
        stages = zip([(side >> k) ** 2 for k in (1, 2, 3)], self.halve, self.blocks)
        self.flops = 2 * sum(pixels * m.weight.numel() for pixels, halve, blocks in stages  # of one forward pass
                             for m in (halve, *blocks.modules()) if isinstance(m, nn.Conv2d))

    def forward(self, y):
        y = y.contiguous(memory_format=torch.channels_last)  # convolutions are up to twice as fast in it on a CPU
        for halve, blocks in zip(self.halve, self.blocks):
            y = F.silu(blocks(halve(y)))
        return self.scale * self.last(y.flatten(1)).squeeze(1)


class Block(nn.Module):
    """Residual block of two 3x3 convolutions: (B, width, H, W) -> the same."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.conv2.weight)  # starts as the identity: without batch norm, depth must not amplify

    def forward(self, h):
        return h + self.conv2(F.silu(self.conv1(F.silu(h))))


# ------------------------------------------------------------------------------------------------ samplers
# All leave f's parameters and their .grad untouched, keep no graph, and return tensors that carry no gradient.

def quadratic_cost(x, y):
    """|x-y|^2/2 over all but the first dimension: (B, ...), (B, ...) -> (B,)."""
    return (y - x).square().flatten(1).sum(1) / 2


def log_p_and_grad(f, x, y, eps, cost=quadratic_cost):
    """log_p = (f(y) - c(x,y))/eps (B,), up to log Z(f,x), and its gradient in y (B, ...)."""
    with torch.enable_grad():
        y = y.detach().requires_grad_(True)
        log_p = (f(y) - cost(x, y)) / eps
        grad, = torch.autograd.grad(log_p.sum(), y)
    return log_p.detach(), grad


def langevin(f, x, y, eps, eta, n_steps, cost=quadratic_cost, temperature=1.0):
    """n_steps of  y <- y + eta/(2 eps) grad_y[f(y) - c(x,y)] + sqrt(eta temperature) N(0, I)  (Algorithm 1).

    -> y (B, ...).  With f = 0 its law tends to N(x, eps/(1 - eta/(4 eps))): biased in eta, exploding for eta >= 4 eps.
    temperature < 1 samples a narrower law than the plan; 0 is gradient ascent without noise."""
    for _ in range(n_steps):
        _, grad = log_p_and_grad(f, x, y, eps, cost)
        y = y.detach() + eta / 2 * grad + (eta * temperature) ** 0.5 * torch.randn_like(y)
    return y


def mala(f, x, y, eps, eta, n_steps, cost=quadratic_cost, precond=None):
    """Langevin steps with Metropolis' accept/reject: exact for any eta, and no chain can blow up.

    eps      a float, or one temperature per chain (B,)
    eta      a float, a 0-dim tensor, or one step per chain, (B, 1) for y (B, D)
    precond  (D, D): steps are taken in precond^-1 y, where the law should be about equally wide in all directions
    -> y (B, ...), its log_p (B,), the accepted fraction of each chain's steps (B,).
    Watch that fraction: where it tends to 0 the chains are frozen, and f runs away from them."""
    flat = (len(y),) + (1,) * (y.dim() - 1)
    log_p, grad = log_p_and_grad(f, x, y, eps, cost)
    grad = grad if precond is None else grad @ precond
    accepted = torch.zeros_like(log_p)
    for _ in range(n_steps):
        noise = torch.randn_like(y)
        step = eta / 2 * grad + eta ** 0.5 * noise
        new = y + (step if precond is None else step @ precond.T)
        new_log_p, new_grad = log_p_and_grad(f, x, new, eps, cost)
        new_grad = new_grad if precond is None else new_grad @ precond
        back = ((step + eta / 2 * new_grad).square() / (2 * eta)).flatten(1).sum(1)  # -log q(y|new)
        log_ratio = new_log_p - log_p - back + noise.square().flatten(1).sum(1) / 2  # the last term: -log q(new|y)
        take = torch.rand_like(log_p).log() < log_ratio  # nan compares False: a broken proposal is refused
        y, grad = torch.where(take.view(flat), new, y), torch.where(take.view(flat), new_grad, grad)
        log_p = torch.where(take, new_log_p, log_p)
        accepted += take / n_steps
    return y, log_p, accepted


@torch.no_grad()
def exchange(y, log_p, ladder):
    """Replica exchange: each x has one chain at every temperature of the ladder; neighbours swap their y with
    probability min(1, exp((1/eps_r - 1/eps_s) (E_s - E_r))), E = f(y) - c(x,y) = eps log_p.  Exact, and f is not
    evaluated.  Hot chains cross between modes; cold ones receive what they found.

    y (B, R, D), log_p (B, R), ladder (R,) rising from eps -> y, exchanged fraction of each pair (R-1,)."""
    energy = log_p * ladder
    swapped = torch.zeros(len(ladder) - 1, device=y.device)
    order = torch.arange(len(ladder), device=y.device).repeat(len(y), 1)
    for first in (0, 1):  # pairs (0, 1), (2, 3), ..., then (1, 2), (3, 4), ...
        for r in range(first, len(ladder) - 1, 2):
            low, high = order[:, r].clone(), order[:, r + 1].clone()
            gain = energy.gather(1, high[:, None]) - energy.gather(1, low[:, None])
            take = torch.rand(len(y), device=y.device).log() < (1 / ladder[r] - 1 / ladder[r + 1]) * gain.squeeze(1)
            order[:, r], order[:, r + 1] = torch.where(take, high, low), torch.where(take, low, high)
            swapped[r] = take.float().mean()
    return y.gather(1, order[..., None].expand_as(y)), swapped


def log_z_ratio(base, net, x, draws, steps, eta, precond=None):
    """log Z(base + net, x) - log Z(base, x) for a Mixture base, by annealed importance sampling (Neal 2001): chains
    start as exact samples of base's plan, and net is switched on in `steps` equal parts, a MALA step after each.

    x (n, D) -> (n,), the bias of order 1/draws taken off; and the effective share of the draws (0-dim): where it is
    small, the estimate means little."""
    y, x_all, log_w = base.sample(x.repeat_interleave(draws, 0)), x.repeat_interleave(draws, 0), 0.0
    for step in range(1, steps + 1):
        with torch.no_grad():
            log_w = log_w + net(y) / (base.eps * steps)
        if step < steps:
            y, _, _ = mala(lambda y: base(y) + step / steps * net(y), x_all, y, base.eps, eta, 1, precond=precond)
    log_w = log_w.view(len(x), draws)
    halves = (log_w[:, ::2].logsumexp(1) + log_w[:, 1::2].logsumexp(1)) / 2 - math.log(draws / 2)
    effective = 1 / (log_w.softmax(1).square().sum(1) * draws)
    return 2 * (log_w.logsumexp(1) - math.log(draws)) - halves, effective.mean()


@torch.no_grad()
def jump(f, x, y, centres, sigma, eps, log_p=None):
    """One exact long move per chain, quadratic cost: what Langevin cannot do between separate modes of pi_f(.|x).

    One proposal z_j ~ N(c_j, sigma_j^2) around each of M centres, shared by all chains, has the weight
    w_j = exp(log_p(z_j)) / q(z_j), q = mean_j N(c_j, sigma_j^2).  A chain's own y stands in for the proposal of one
    c_J, J drawn in proportion to N(y; c_J, sigma_J^2), and the next y is drawn from the M candidates by weight.  That
    leaves pi_f(.|x) unchanged for any centres (Tjelmeland 2004; iterated SIR: Andrieu et al. 2018).
    Let most c_j be target samples, with sigma_j about the finest structure.  Add some wide ones: where q vanishes, the
    weight of a stray y is so large that the chain never leaves it.

    x, y (B, D), centres (M, D) independent of y, sigma a float or (M,), log_p (B,) if at hand
    -> y (B, D), moved fraction (0-dim tensor).  Costs M evaluations of f, for all B chains together."""
    log_p = (f(y) - quadratic_cost(x, y)) / eps if log_p is None else log_p
    sigma = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).expand(len(centres))[:, None]
    z = centres + sigma * torch.randn_like(centres)
    log_q_z, _ = _log_mixture(z, centres, sigma, torch.arange(len(z), device=z.device)[:, None])
    log_q_y, j = _log_mixture(y, centres, sigma)
    log_w = torch.addmm((f(z) - z.square().sum(1) / 2) / eps - log_q_z, x / eps, z.T)
    log_w.scatter_(1, j, (log_p + x.square().sum(1) / (2 * eps) - log_q_y)[:, None])  # |x|^2: left out above
    k = sample_index(log_w.softmax(1))
    return torch.where(k == j, y, z[k.squeeze(1)]), (k != j).float().mean()


def _log_mixture(points, centres, sigma, j=None):
    """log sum_j N(point; centre_j, sigma_j^2), up to a constant: (B, D), (M, D), (M, 1) -> (B,), and j (B, 1), drawn in
    proportion to those terms unless given.

    Computed as term_j - log share_j: on a CPU softmax is ten times faster than exp, which crawls on underflow."""
    precision = sigma ** -2
    constant = -(precision * centres.square()).sum(1) / 2 - centres.shape[1] * sigma.log().squeeze(1)
    log_terms = torch.addmm(constant, torch.cat([points, points.square().sum(1, keepdim=True)], 1),
                            torch.cat([precision * centres, -precision / 2], 1).T)
    share = log_terms.softmax(1)
    j = sample_index(share) if j is None else j
    return (log_terms.gather(1, j) - share.gather(1, j).log()).squeeze(1), j


def sample_index(p):
    """One index per row of p (B, M), drawn by its weights: (B, 1).  Ten times faster than torch.multinomial there."""
    cdf = p.cumsum(1)
    u = torch.rand(len(p), 1, device=p.device) * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True).clamp(max=p.shape[1] - 1)


# ------------------------------------------------------------------------------------------------ training

def proxy_loss(f, y_pos, y_neg):
    """E_{pi_f} f - E_Q f (0-dim), y_pos ~ Q, y_neg ~ pi_f: minus the gap.  Its gradient is that of -L(f) (Algorithm 1).
    Its value stays near 0 and must never be read as convergence."""
    out = f(torch.cat([y_pos, y_neg]))  # one pass: half the launches, and small batches use the cores better
    return out[len(y_pos):].mean() - out[:len(y_pos)].mean()


def train_step(f, opt, y_pos, y_neg):
    """One step of ascent on L(f): -> the gap E_Q f - E_{pi_f} f (0-dim tensor, on the device).  Under torchrun the
    samples are this process's share, the step is that of all processes' samples together."""
    loss = proxy_loss(f, y_pos, y_neg)
    opt.zero_grad(set_to_none=True)
    loss.backward()
    average_gradients(f)
    opt.step()
    return -loss.detach()


@torch.no_grad()
def update_ema(f_avg, f, decay, step):
    """f_avg <- decay f_avg + (1 - decay) f; smaller decay in the first steps, to forget the random start sooner."""
    torch._foreach_lerp_(list(f_avg.parameters()), list(f.parameters()), 1 - min(decay, step / (step + 10)))


def warm_cosine(lr, step, warmup, steps):
    """Learning rate at this step, from 1: up to lr in `warmup` steps, down to 0 at the last by a cosine."""
    return lr * min(1.0, step / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def max_param(*nets):
    """Largest absolute parameter (0-dim tensor): grows long before a run that diverges shows it elsewhere."""
    return torch.cat([p.detach().flatten() for net in nets for p in net.parameters()]).abs().max()


def stratified_rows(n_rows, n, device=None):
    """n of n_rows row numbers, one from each of n equal stretches, each row equally likely: (n,) int64."""
    u = torch.rand(n, dtype=torch.float64, device=device)
    return ((torch.arange(n, device=device) + u) * (n_rows / max(n, 1))).long().clamp_(max=n_rows - 1)


def kd_order(points):
    """points (2^k, D) reordered so that every stretch of 2^j rows is a cell of a k-d tree: (2^k, D).

    Then stratified_rows draws batches spread like the data: every row is as likely as before, but the share of each
    region no longer fluctuates from batch to batch.  Those shares are what the levels of f are learned from."""
    if len(points) & (len(points) - 1):
        raise ValueError(f"kd_order needs a power of two of points, not {len(points)}")
    cells, axis = points[None], 0
    while cells.shape[1] > 1:
        order = cells[:, :, axis % points.shape[1]].argsort(dim=1, stable=True)
        cells = cells.gather(1, order[..., None].expand_as(cells)).view(2 * len(cells), -1, points.shape[1])
        axis += 1
    return cells.squeeze(1)


class Bank(nn.Module):
    """Persistent chains, sources x and their current y, both (N, ...), and the sampler's own state, such as its step
    eta: buffers, which move to a device and are saved with it."""

    def __init__(self, x, y, **sampler):
        super().__init__()
        for name, value in {"x": x, "y": y, **sampler}.items():
            self.register_buffer(name, value.clone())

    def stretch(self, rank):
        """First and last + 1 of the chains that are this rank's."""
        return (len(self.x) * k // ranks()[1] for k in (rank, rank + 1))

    def rows(self, n):
        """Row numbers of this process's share of n chains, spread evenly over its own: (n,) int64."""
        low, high = self.stretch(ranks()[0])
        return low + stratified_rows(high - low, min(share(n), high - low), self.x.device)

    def gather(self):
        """Bring all ranks' chains to all."""
        for rank in range(ranks()[1]):
            low, high = self.stretch(rank)
            for chains in (self.x, self.y):
                distributed.broadcast(chains[low:high], rank)


# ------------------------------------------------------------------------------------------------ several processes
# torchrun --nproc_per_node=N train_cmnist.py: every process has its stretch of the chains and its random stream, takes
# its share of each batch, and gradients are averaged, so that a step is that of one process with the whole batch (where
# N divides it; else shares are rounded up).  Each leads its own Langevin step; the first one's is saved.
together = False

def ranks():
    """This process's number and how many train together: (0, 1) unless torchrun started it, and after the training."""
    return (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)


def share(n, step=None):
    """How many of a step's n samples are drawn by this process: n / N rounded up, or, given the number of the step, now
    up and now down, exact over the steps."""
    world = ranks()[1]
    return -(-n // world) if step is None else n * step // world - n * (step - 1) // world


@contextlib.contextmanager
def other_ranks():
    """Around every call that waits for the other processes: where one of them has ended, end with a sentence."""
    try:
        yield
    except RuntimeError as error:
        fail(f"another process of this run has ended ({str(error).splitlines()[0][:100]}): the last checkpoint is "
             f"kept, and --resume carries it on, with any number of processes")


@contextlib.contextmanager
def in_turn():
    """Around what writes files that every process reads: the first process does it, then the others."""
    rank, world = ranks()
    if rank:
        agreed([0])
    yield
    if world > 1 and not rank:
        agreed([0])


def agreed(numbers):
    """The largest that any process says, of each of some whole numbers: a list.  Waits for all processes."""
    numbers = torch.tensor(numbers)  # on the CPU: no wait for a GPU
    with other_ranks():
        distributed.all_reduce(numbers, distributed.ReduceOp.MAX)
    return numbers.tolist()


@torch.no_grad()
def average_gradients(f):
    """Replace f's gradients by their mean over all processes, in one message."""
    if ranks()[1] > 1:
        grads = [p.grad for p in f.parameters() if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        with other_ranks():
            distributed.all_reduce(flat)
        for grad, total in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(total.view_as(grad) / ranks()[1])


def started_by_torchrun():
    return {"LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys() and int(os.environ.get("WORLD_SIZE", 1)) > 1


def join_ranks(device):
    """Join the other processes that torchrun has started; only the first one goes on printing."""
    global together
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=datetime.timedelta(hours=1))  # the first may be downloading
    together = True
    if ranks()[0]:
        sys.stdout = Console(open(os.devnull, "w"))


def leave_ranks(device):
    """After the training: the first process goes on alone, the others end here."""
    global together
    agreed([0])  # none leaves while another still receives chains
    if ranks()[0]:
        time.sleep(3)  # the first process closes the connection: both at once can hang, in torch 2.4
        os._exit(0)  # an orderly exit with a connection that the other side has closed can abort
    together = False
    if device.type == "cpu":  # in the end of GPUs' connections all processes would have to take part
        distributed.destroy_process_group()


def first_to_speak():
    """Whether no other process of this run has said why it ended: one sentence is enough."""
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])  # of a store that torchrun itself keeps
        store = distributed.TCPStore(*address, is_master=False, timeout=datetime.timedelta(seconds=5))
        return store.add("said", 1) == 1
    except RuntimeError:
        return True


# ------------------------------------------------------------------------------------------------ a plan in closed form

def gaussian_map(S0, S1, eps):
    """T (..., D, D) of the entropic plan between N(m0, S0) and N(m1, S1), pi(.|x) = N(m1 + T (x - m0), eps T) (Janati
    et al. 2020), in a form that does not cancel at large eps.  It solves T S0 T + eps T = S1."""
    values, vectors = torch.linalg.eigh(S0)
    root = values.clamp_min(1e-9 * values.amax(-1, keepdim=True)).sqrt().unsqueeze(-2)
    r, inverse = (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT
    values, vectors = torch.linalg.eigh(r @ S1 @ r)
    values, half = values.clamp_min(0), inverse @ vectors
    T_values = 2 * values / (torch.hypot(2 * values.sqrt(), torch.full_like(values, eps)) + eps)
    return half * T_values.unsqueeze(-2) @ half.mT


def moments(z, weights):
    """Means over a sample z (n, D) of w_k, w_k z, w_k z z^T, weights (n, K): [(K,), (K, D), (K, D, D)], float64."""
    sums, rows = [0.0] * 3, max(1, min(256, 2 ** 20 // (weights.shape[1] * z.shape[1])))  # parts that fit the cache
    for part, w in zip(z.split(rows), weights.split(rows)):
        new = w.sum(0), w.T @ part, (w.T[:, None] * part.T) @ part
        sums = [a + b.double() for a, b in zip(sums, new)]  # many terms in float32 would lose digits
    return [a / len(z) for a in sums]


def squared_norms(y, A, shift):
    """|A_k y - shift_k|^2: (B, D), (K, D, D), (K, D) -> (B, K).  In parts that fit the cache: ten times faster."""
    A, shift = A.permute(1, 2, 0).contiguous(), shift.T[:, None]  # (D, D, K), (D, 1, K): sums over the first are fast
    parts = y.split(max(64, 2 ** 20 // A[0].numel()))
    return torch.cat([torch.baddbmm(shift, part.expand(len(A), -1, -1), A, beta=-1).square().sum(0) for part in parts])


def widened(S, second):
    """Covariances S (..., D, D), those that float32 left without full rank widened by what it can tell: equal points,
    constant columns and values of a grid are no error.  second: E z z^T, of which S is what the mean leaves."""
    least = 4e-6 * torch.linalg.matrix_norm(second)[..., None, None] + 1e-12
    least = least * torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    return S + 2 * least * (torch.linalg.cholesky_ex(S - least)[1] > 0)[..., None, None]


def centred(moments, prior):
    """moments -> mass (K,), mean (K, D), covariance (K, D, D).  A covariance is shrunk to the pooled one as by a share
    `prior` of the sample in more points, and that one to its diagonal: defined for few points, or none, too."""
    mass = moments[0].clamp_min(1e-9)
    mean = moments[1] / mass[:, None]
    second = moments[2] / mass[:, None, None]
    S = second - mean[:, :, None] * mean[:, None]
    pooled = widened((mass[:, None, None] * S).sum(0) / mass.sum(), moments[2].sum(0) / mass.sum())
    pooled = pooled.lerp(pooled.diag().diag(), prior / (1 + prior))
    return mass, mean, widened(S.lerp(pooled.expand_as(S), (prior / (mass + prior))[:, None, None]), second)


class Mixture(nn.Module):
    """A potential whose plan is known in closed form (Korotin et al., ICLR 2024); quadratic cost, full covariances:

        v(y) = sum_k a_k N(y; r_k, eps S_k)          f(y) = |y|^2/2 + eps log v(y)
        pi_f(.|x) = sum_k w_k(x) N(r_k + S_k x, eps S_k),   w_k(x) ~ a_k exp((x.S_k x + 2 r_k.x) / (2 eps))

    One component with S = gaussian_map is the exact plan between Gaussians.  fit needs no sampling."""

    def __init__(self, dim, components, eps):
        super().__init__()
        self.eps, eye = eps, torch.eye(dim).repeat(components, 1, 1)
        zero = torch.zeros(components)
        state = {"log_a": zero, "share": zero, "r": eye[:, 0] * 0, "S": eye, "root": eye, "inverse": eye}
        for name, value in state.items():
            self.register_buffer(name, value.clone())  # share: of y in each; root root^T = S, inverse = root^-1

    def forward(self, y):
        """f(y): (B, D) -> (B,)."""
        return y.square().sum(1) / 2 + self.eps * self.log_v(y).logsumexp(1)

    def log_v(self, y):
        """log a_k N(y; r_k, eps S_k): (B, D) -> (B, K).  Its softmax is how likely y came from each component."""
        squares = squared_norms(y, self.inverse, (self.inverse @ self.r[..., None]).squeeze(2))
        log_scale = (self.inverse.diagonal(dim1=1, dim2=2) / math.sqrt(2 * math.pi * self.eps)).log().sum(1)
        return self.log_a + log_scale - squares / (2 * self.eps)

    def log_w(self, x):
        """log a_k exp((x.S_k x + 2 r_k.x) / (2 eps)): (B, D) -> (B, K).  Its softmax is w_k(x)."""
        return self.log_a + (squared_norms(x, self.root.mT, 0 * self.r) / 2 + x @ self.r.T) / self.eps

    def log_z(self, x):
        """log of the integral over y of exp((f(y) - |x-y|^2/2) / eps): (B, D) -> (B,)."""
        return self.log_w(x).logsumexp(1) - x.square().sum(1) / (2 * self.eps)

    def objective(self, x, y):
        """The dual objective E_Q f - eps E_P log Z by its value (0-dim), exact for samples x (n, D), y (m, D)."""
        return self(y).mean() - self.eps * self.log_z(x).mean()

    @torch.no_grad()
    def sample(self, x):
        """y ~ pi_f(.|x), independent: (B, D) -> (B, D)."""
        out = []
        for x in x.split(max(1, 2 ** 23 // self.r.numel())):  # all components of every x: bounds the memory
            gumbel = -torch.empty(len(x), len(self.r), device=x.device).exponential_().log()
            k = (self.log_w(x) + gumbel).argmax(1)  # drawn in proportion to w_k(x)
            noise = math.sqrt(self.eps) * torch.randn_like(x)
            per_k = torch.einsum("kde,be->bkd", self.S, x) + torch.einsum("kde,be->bkd", self.root, noise)
            out.append(self.r[k] + per_k[torch.arange(len(x), device=x.device), k])
        return torch.cat(out)

    @torch.no_grad()
    def fit(self, source, target, steps, memory=1.0, prior=0.0):
        """Fit by fixed point: each component is the Gaussian plan between its part of P and its part of Q, and a_k is
        moved until both parts have the same mass.  There the objective's gradient is 0.  Every step is a valid plan.

        source(), target(): samples (n, D), (m, D), the same or fresh ones at each call; memory: weight of the newest
        ones in the running moments; prior: see `centred`.  Yields after each step: the caller may keep the best."""
        x, y, total = source(), target(), None
        K, weights = len(self.r), [torch.ones(len(z), 1, device=z.device) for z in (x, y)]
        single = Mixture(x.shape[1], 1, self.eps).to(x.device) if K > 1 else self
        if K > 1:  # parts of Q by k-means; parts of P by where the plan of one component sends them
            list(single.fit(lambda: x, lambda: y, 0, prior=prior))
            centres = k_means(y[:5000], K)
            weights = [F.one_hot(torch.cdist(z, centres).argmin(1), K).to(x.dtype) for z in (single.sample(x), y)]
        for step in range(steps + 1):
            if step:
                x, y = source(), target()
                weights = self.log_w(x).softmax(1), self.log_v(y).softmax(1)
            new = [*moments(x, weights[0]), *moments(y, weights[1])]
            total = [a.lerp(b, max(memory, 1 / step)) for a, b in zip(total, new)] if step > 1 else new
            (p, mean_x, P), (q, mean_y, Q) = centred(total[:3], prior), centred(total[3:], prior)
            S = gaussian_map(P, Q, self.eps)
            r = mean_y - (S @ mean_x[..., None]).squeeze(2)
            if step:
                log_a = self.log_a.double() + (new[3].clamp_min(1e-9) / new[0].clamp_min(1e-9)).log()
            else:  # w_k, on average over a component's part of P, as with one component
                second = P + mean_x[:, :, None] * mean_x[:, None]
                old_S, old_r = (S, r) if K == 1 else (single.S.double(), single.r.double())
                log_a = q.log() - ((second * (S - old_S)).sum((1, 2)) / 2 + (mean_x * (r - old_r)).sum(1)) / self.eps
            root = torch.linalg.cholesky((S + S.mT) / 2)
            state = {"log_a": log_a - log_a.logsumexp(0), "share": q / q.sum(), "r": r, "S": S, "root": root,
                     "inverse": torch.linalg.inv(root)}
            for name, value in state.items():
                getattr(self, name).copy_(value)
            yield step


def k_means(y, k, steps=20):
    """Centres (k, D) of y (n, D): k-means++, then `steps` of Lloyd's."""
    centres = y[torch.randint(len(y), (1,), device=y.device)]
    while len(centres) < k:
        far = torch.cdist(y, centres).amin(1).square() + 1e-30
        centres = torch.cat([centres, y[torch.multinomial(far, 1)]])
    for _ in range(steps):
        near = F.one_hot(torch.cdist(y, centres).argmin(1), k).to(y.dtype)
        centres = torch.where(near.sum(0)[:, None] > 0, near.T @ y / near.sum(0).clamp_min(1)[:, None], centres)
    return centres


# ------------------------------------------------------------------------------------------------ the run around it

def fail(sentence):
    """End with one sentence on stderr and exit code 2."""
    if not started_by_torchrun() or first_to_speak():
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    if together:
        os._exit(2)  # see leave_ranks
    raise SystemExit(2)


class Console:
    """stdout or stderr that loses lines rather than end the run: when its pipe is closed (| head, or a tee that
    the same Ctrl-C killed), its disk full, or its encoding without a letter.  Flushes by itself.  lost: why lines are
    missing that somebody wanted, else empty."""

    def __init__(self, stream):
        self.stream, self.lost = stream, ""
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # takes what is still buffered, at exit too
            if not isinstance(error, BrokenPipeError):
                self.lost = error.strerror
                if self is sys.stdout:
                    print(f"warning: all further lines are lost ({self.lost}); the run goes on", file=sys.stderr)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def number(low, high, kind=float):
    """argparse type: a float or int from low to high; nan is refused."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value

    parse.__name__ = f"{'whole ' * (kind is int)}number from {low:g} to {high:g}"  # as argparse's error calls it
    return parse


def arguments(doc, script, eps=None, **more):
    """Command line shared by the scripts; seeds torch -> namespace with eps, smoke, resume, out, device (torch.device),
    seed, and code: the script's text, read now, since a checkpoint must hold the code that ran.

    eps: its default, 0 if the data decide, None for a script without one.  more: name = dict of argparse keywords."""
    sys.stdout, sys.stderr = (stream and Console(stream) for stream in (sys.stdout, sys.stderr))  # None where closed
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (-h lists the options)")
    if eps is not None:
        allowed = number(1e-6, 1e6) if eps else number(1e-300, 1e300)  # in units of the data
        parser.add_argument("--eps", type=allowed, default=eps, help=f"of the plan (default {eps or 'from the data'})")
    parser.add_argument("--smoke", action="store_true", help="the same path, tiny: seconds, files named *_smoke")
    parser.add_argument("--resume", action="store_true", help="carry on from this script's checkpoint")
    parser.add_argument("--out", default=os.path.dirname(os.path.abspath(script)),
                        help="folder for what is written (default: beside the script)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU that works, else CPU)")
    parser.add_argument("--seed", type=number(0, 2 ** 63 - 1, int), default=0, help="of the training (default 0)")
    for name, options in more.items():
        parser.add_argument(name if "nargs" in options else f"--{name}", **options)  # with nargs: without dashes
    args = parser.parse_args()
    make_folder(args.out, "--out")
    args.device = pick_device(args.device)
    if started_by_torchrun():
        join_ranks(args.device)
    with open(script, encoding="utf-8") as file:
        args.code = file.read()
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)  # CPU matrix products crawl on denormals, such as weights of far-away Gaussians
    return args


def pick_device(name):
    """"auto" or a torch device's name -> torch.device that has been seen to compute."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL and OURS:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        card = f"cuda:{os.environ['LOCAL_RANK']}" if started_by_torchrun() else "cuda"  # one for each process
        device = torch.device(card if name == "auto" or name.startswith("cuda") and started_by_torchrun() else name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        torch.ones(2, device=device).exp().sum().item()  # a GPU may be listed and yet too old (or new) for this torch
        return device
    except Exception as error:  # a different one for each kind of device
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    if name != "auto":
        fail(f"--device {name} does not work here ({reason}): leave it out or say --device cpu")
    if started_by_torchrun() and 0 < torch.cuda.device_count() <= int(os.environ["LOCAL_RANK"]):
        fail(f"{card} does not work ({reason}): --nproc_per_node may be {torch.cuda.device_count()} at most here")
    if torch.cuda.is_available():
        print(f"this torch cannot use the GPU ({reason}), so on the CPU; README: GTX cards", flush=True)
    return torch.device("cpu")


def make_folder(path, called="the folder"):
    """Make a folder with all above it, if it is not there."""
    try:
        os.makedirs(path, exist_ok=True)
    except (OSError, TypeError) as error:  # of --out=-- argparse makes a list
        reason = getattr(error, "strerror", "no name")
        fail(f"{called} {path} cannot be made ({reason}): name a folder that you can write to")


def write_aside(path, write, before_rename=lambda: None):
    """write(file) to path.tmp, then rename: a kill at any moment leaves the old file or the new one, whole.
    -> None, or in words what went wrong, with nothing left behind."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            write(file)
        before_rename()
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its zip writer
        if os.path.isfile(f"{path}.tmp"):
            os.remove(f"{path}.tmp")
        return f"cannot write {path} ({str(error).splitlines()[0]})"


def save_figure(fig, path):
    """Write a matplotlib figure; a full disk must not cost the run its last line."""
    problem = write_aside(path, lambda file: fig.savefig(file, dpi=150))
    if problem:
        print(f"warning: {problem}: free some space, then --resume draws it again", flush=True)


def constants_of(module):
    """A script's UPPER_CASE numbers, strings and tuples, given globals(): what a resumed run must share."""
    return {k: v for k, v in module.items() if k.isupper() and isinstance(v, (bool, int, float, str, tuple))}


def lock(path):
    """Hold path.lock for as long as this process lives: two runs into the same files would end with each other's."""
    try:
        import fcntl
        file = open(f"{path}.lock", "w")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it however the process ends
    except BlockingIOError:
        fail(f"another run is writing {path}: wait for its end, or name another folder with --out")
    except (ImportError, OSError):  # Windows, a file system without locks; a forbidden folder shows at the first save
        return
    atexit.register(lambda: os.path.exists(file.name) and os.remove(file.name))


def read_checkpoint(path):
    """-> the dict saved there; an exception of some kind where the file is damaged or foreign."""
    with open(path, "rb") as file:
        archive = zipfile.ZipFile(file)
        damaged = archive.testzip() or any(member.external_attr for member in archive.infolist())
        if damaged:  # torch.load looks at neither
            raise ValueError("it is damaged")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def tensors_in(state, name=""):
    """{name: tensor} of all in nested dicts and lists."""
    if isinstance(state, torch.Tensor):
        return {name: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {k: t for key, value in items for k, t in tensors_in(value, f"{name}.{key}").items()}


def load_part(part, saved, started):
    """load_state_dict of a module or Adam, after a look at every tensor: torch itself takes moments of any shape and
    ends in a segmentation fault at the next step.  An optimiser keeps its own options, the learning rate too."""
    want = part.state_dict()
    if isinstance(part, torch.optim.Optimizer):
        params = [p for group in part.param_groups for p in group["params"]] if started else []
        saved = {**want, "state": saved["state"]}
        want = {"state": {i: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for i, p in enumerate(params)}}
    saved_kinds, kinds = ({k: (t.shape, t.dtype, t.layout) for k, t in tensors_in(s).items()} for s in (saved, want))
    if saved_kinds != kinds:
        raise ValueError("a tensor is missing, or of another shape or type")
    if not all(t.isfinite().all() for t in tensors_in(saved).values()):
        raise ValueError("it holds numbers that are not finite")
    part.load_state_dict(saved)


class Run:
    """What surrounds a training loop: counts, resumes, saves, logs and stops.  Never sees f, the loss or the optimiser.

        run = common.Run(args, path, {"f": f, "opt": opt, "bank": bank}, STEPS, LOG_EVERY, CONSTANTS)
        for step in run.steps():
            ...
            if run.due():
                run.log({"gap": 1e3}, gap=gap, eta=bank.eta)

    parts: all that changes, modules and Adam optimisers.  constants: a dict, what a resumed run must share.
    run.due() is asked once a step.  SIGINT or SIGTERM ends the loop after the step; a second one ends the process.
    Under torchrun the first process saves and goes on after the loop, where the others end."""

    def __init__(self, args, path, parts, total, log_every, constants, advice="lower LR or the sampler's step"):
        self.path, self.parts, self.total, self.log_every, self.constants = path, parts, total, log_every, constants
        self.device, self.code, self.advice, self.fresh = args.device, args.code, advice, not args.resume
        self.step, self.before, self.asked, self.last, self.saving = 0, 0.0, False, False, False
        self.seed, (self.rank, self.world) = args.seed, ranks()
        if any(isinstance(part, Bank) and len(part.x) < self.world for part in parts.values()):
            fail(f"{self.world} processes are more than there are chains: start fewer")
        if not self.rank:
            lock(path)
        if args.resume:
            self.load()
        self.first, self.start, self.end = self.step, time.perf_counter(), None

    def load(self):
        """Fill the parts and the generators from the checkpoint, or say in a sentence why it can't be carried on."""
        if not os.path.isfile(self.path):
            fail(f"no checkpoint {self.path} to resume: run without --resume first, or name its folder with --out"
                 + f"; {self.path}.old is an earlier one" * os.path.isfile(f"{self.path}.old"))
        try:
            state = read_checkpoint(self.path)
            saved = state["constants"]
            other = [f"{k} was {saved.get(k)}, is {v}" for k, v in self.constants.items() if saved.get(k) != v]
            if other:
                raise ValueError(f"it was made with other constants: {', '.join(other)}")
            self.step, self.before = state["step"], state["seconds"]
            if not (type(self.step) is int and 0 <= self.step <= self.total
                    and type(self.before) is float and 0 <= self.before < math.inf):
                raise ValueError(f"step {self.step} of {self.total}, {self.before} seconds")
            for name, part in self.parts.items():
                load_part(part, state[name], self.step > 0)
            torch.set_rng_state(state["rng"][0])
            if self.device.type == "cuda" and len(state["rng"]) > 1:
                torch.cuda.set_rng_state(state["rng"][1], self.device)
        except Exception as error:  # torch has one for each way to be damaged or foreign
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            fail(f"{self.path} is no checkpoint that this run could carry on ({reason[:300]}): "
                 f"move it away, or start without --resume")

    def save(self):
        """Write all state: tensors and builtins only, so that weights_only=True loads it."""
        if self.world > 1:
            with other_ranks():
                for bank in (part for part in self.parts.values() if isinstance(part, Bank)):
                    bank.gather()
        if self.rank:
            return
        cuda = self.device.type == "cuda"
        generators = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(self.device)] if cuda else [])
        state = {"step": self.step, "seconds": self.seconds, "rng": generators, "constants": self.constants,
                 "code": self.code, **{name: part.state_dict() for name, part in self.parts.items()}}
        problem = write_aside(self.path, lambda file: torch.save(state, file), self.keep_old)
        if problem:
            fail(f"{problem}: free some space or choose another --out; an earlier checkpoint there is untouched")

    def keep_old(self):
        """At a fresh run's first save: an earlier checkpoint becomes *.old, unless the *.old there got further."""
        steps = {}
        for path in (self.path, f"{self.path}.old") if self.fresh else ():
            try:
                steps[path] = int(read_checkpoint(path)["step"])
            except Exception:  # absent, damaged or foreign
                steps[path] = -1
        self.fresh = False
        if steps and os.path.isfile(self.path) and steps[self.path] >= steps[f"{self.path}.old"]:
            os.replace(self.path, f"{self.path}.old")
            print(f"kept the earlier checkpoint as {self.path}.old (--resume would have carried it on)", flush=True)

    def ask(self, number, frame):
        if self.asked and self.world == 1:  # torchrun may send one Ctrl-C twice, and ends what lives 30 s longer
            raise SystemExit(128 + number)
        self.asked = True

    def steps(self):
        """Yield the number of each step left, from 1.  Saves before the first, after the last and where due() says."""
        if self.world > 1:
            self.part_ways()
        self.save()  # a full disk or a folder without permission shows now, not in an hour
        before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        self.start = self.saved = time.perf_counter()
        while self.step < self.total and not self.last:
            self.step += 1
            yield self.step
            if self.saving:
                self.save()
                self.saved = time.perf_counter()
        self.end = time.perf_counter()
        for number, handler in before.items():  # all is saved: from here on a signal ends the process at once
            signal.signal(number, handler)
        if self.world > 1:
            leave_ranks(self.device)
            if self.asked:  # torchrun would kill the scores of a run that was told to stop
                print(f"stopped at step {self.step}, saved: --resume goes on")
                raise SystemExit(0)

    def part_ways(self):
        """From the same state, the first process's, to a random stream for each."""
        shapes = zlib.crc32(repr([t.shape for part in self.parts.values()
                                  for t in tensors_in(part.state_dict()).values()]).encode())
        if agreed([shapes, -shapes]) != [shapes, -shapes]:
            fail("the processes have come to networks or mixtures of different sizes: use cards of one kind")
        with other_ranks():
            for part in self.parts.values():
                for tensor in part.state_dict().values() if isinstance(part, nn.Module) else ():
                    whole = tensor.contiguous()
                    distributed.broadcast(whole, 0)
                    tensor.copy_(whole)
        if self.rank:
            torch.manual_seed((self.seed + 2 ** 32 * (self.rank + self.world * self.step)) % 2 ** 63)

    def agree(self, late):
        """Of all processes: stop if one was told to; the first one's clock and total decide the rest."""
        asked, late, self.total = agreed([int(self.asked), *((0, 0) if self.rank else (int(late), self.total))])
        self.asked = bool(asked)
        return bool(late)

    def due(self, every=30.0):
        """Whether to log this step: each log_every-th, the last, and where a save, one in `every` seconds, follows.
        Decided here once, so that nothing is saved which log has not checked."""
        late = time.perf_counter() - self.saved > every
        late = self.agree(late) if self.world > 1 else late
        self.last = self.step == self.total or self.asked
        self.saving = self.last or late
        if self.asked and self.world == 1:
            print("stopping: saves, then scores what there is; once more to end at once", flush=True)
        return self.saving or self.step % self.log_every == 0

    @property
    def seconds(self):
        """Of training, over all resumes; stands still once it has ended."""
        return self.before + (self.end or time.perf_counter()) - self.start

    def log(self, limits, **values):
        """Print step/total, values (floats or 0-dim tensors), ms/step, peak memory, time left.  Ends the run, before it
        saves over the last good checkpoint, where a value is not finite or one of limits is exceeded in size."""
        numbers = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in values.values()])
        values = dict(zip(values, numbers.detach().tolist()))  # the only wait for the device
        for name, value in values.items():
            if not abs(value) < limits.get(name, math.inf):  # nan too
                fail(f"diverged: {name} is {value:.4g} at step {self.step}; the last good checkpoint is kept.  "
                     f"Resume it, or {self.advice} and start afresh")
        ms = 1e3 * (time.perf_counter() - self.start) / max(self.step - self.first, 1)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        print(f"step {self.step:6d}/{self.total}  {shown}  {ms:.1f} ms/step  {peak_mib(self.device):.0f} MiB  "
              f"{clock(ms / 1e3 * (self.total - self.step))} left", flush=True)

    def report_rate(self, flops):
        """Print how fast the training steps were, at `flops` of network arithmetic each, against a matrix product."""
        reached, rate = flops * self.step / max(self.seconds, 1e-9), matmul_rate(self.device)
        print(f"network arithmetic {flops / 1e9:.2f} GFLOP a step, {reached / 1e9:.0f} GFLOP/s: "
              f"{100 * reached / rate:.0f} % of the {rate / 1e9:.0f} GFLOP/s of a float32 matrix product", flush=True)


def peak_mib(device):
    """Peak memory of this process so far, MiB: on the GPU the allocator's, on the CPU the whole process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def matmul_rate(device, n=1024, seconds=0.3):
    """This machine's float32 matrix-product rate in FLOP/s: what a training step is to be compared with."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    a, done = torch.randn(n, n, device=device), 0
    b = a @ a
    wait()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            torch.mm(a, a, out=b)
        wait()
        done += 4
    return 2 * n ** 3 * done / (time.perf_counter() - start)
