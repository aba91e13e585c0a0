"""Energy-guided entropic optimal transport: what every script here shares.  Imports torch and the standard library only.

One potential f is learned; there is no second network and no min-max game (Mokrov et al., ICLR 2024, Algorithm 1):

    pi_f(y|x) = exp((f(y) - c(x,y)) / eps) / Z(f,x)             the plan, sampled by Langevin; Z is never needed
    ascend      E_Q f(y) - E_P E_{pi_f(.|x)} f(y)               right gradient, meaningless value

    x source (B, ...)    y target (B, ...)    f potential, large = likely    c(x,y) cost, |x-y|^2/2 unless given
    eps > 0 temperature of the plan           eta Langevin step              log_p = (f(y) - c(x,y)) / eps  (B,)
"""
import argparse
import math
import os
import signal
import socket
import sys
import time

import torch
from torch import nn
import torch.nn.functional as F


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
    def place(self, y, sharpness):
        """Start the first layer's ramps, each about 1/sharpness wide, at random samples y (N, dim) of the target:
        torch's own start has ramps about 1 wide, too coarse for a target with structure at a twentieth of that."""
        first = self.hidden[0]
        first.weight.normal_(0, sharpness)
        at = y[torch.randint(len(y), (len(first.weight),), device=y.device)]
        first.bias.copy_(-(first.weight * at).sum(1))


class ResNet(nn.Module):
    """f(y) = scale * net(y) for images (B, channels, side, side), side a multiple of 8 -> (B,).

    Three halvings by convolution, each with `depth` residual blocks behind it, and a linear layer that knows where in the
    image it looks.  No batch statistics: those would let one chain's score depend on the other chains."""

    def __init__(self, side=32, channels=3, width=32, depth=1, scale=1.0):
        super().__init__()
        widths = [channels, width, 2 * width, 4 * width]
        self.halve = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in zip(widths, widths[1:]))
        self.blocks = nn.ModuleList(nn.Sequential(*(Block(b) for _ in range(depth))) for b in widths[1:])
        self.last = nn.Linear(widths[-1] * (side // 8) ** 2, 1)
        self.scale = scale
        pixels = [(side >> k) ** 2 for k in (1, 2, 3)]
        self.flops = 2 * sum(p * m.weight.numel() for p, halve, blocks in zip(pixels, self.halve, self.blocks)
                             for m in (halve, *blocks.modules()) if isinstance(m, nn.Conv2d))  # of one forward pass of one image

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
        nn.init.zeros_(self.conv2.weight)  # each block starts as the identity: without normalisation, depth must not amplify

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


def langevin(f, x, y, eps, eta, n_steps, cost=quadratic_cost, heat=1.0):
    """n_steps of  y <- y + eta/(2 eps) grad_y[f(y) - c(x,y)] + sqrt(eta heat) N(0, I)  (Algorithm 1): -> y (B, ...).

    With f = 0 its law tends to N(x, eps/(1 - eta/(4 eps))): biased in eta, and it explodes for eta >= 4 eps.
    heat < 1 is a lower temperature than the plan's; 0 goes uphill without noise."""
    for _ in range(n_steps):
        _, grad = log_p_and_grad(f, x, y, eps, cost)
        y = y.detach() + eta / 2 * grad + (eta * heat) ** 0.5 * torch.randn_like(y)
    return y


def mala(f, x, y, eps, eta, n_steps, cost=quadratic_cost, root=None):
    """Langevin steps with Metropolis' accept/reject: exact for any eta, and no chain can blow up.

    eta a float, 0-dim, or per chain, (B, 1) for y (B, D): drawn at random, no chain in a narrow place is refused for ever.
    root (D, D), for y (B, D): step in u = root^-1 y, root root^T about the covariance of pi_f(.|x), and with noise eta (1 - eta/4), which
    makes the proposal reversible, hence always accepted, where that law is Gaussian of that covariance; eta <= 2, about 1.
    -> y (B, ...), its log_p (B,), the accepted fraction (0-dim tensor, on the device: reading it waits for it).
    Watch that fraction: where it tends to 0 the chains are frozen and f runs away from them."""
    flat = (len(y),) + (1,) * (y.dim() - 1)
    variance = eta if root is None else eta * (1 - eta / 4)
    log_p, grad = log_p_and_grad(f, x, y, eps, cost)
    grad = grad if root is None else grad @ root
    accepted = 0.0
    for _ in range(n_steps):
        noise = torch.randn_like(y)
        step = eta / 2 * grad + variance ** 0.5 * noise
        new = y + (step if root is None else step @ root.T)
        new_log_p, new_grad = log_p_and_grad(f, x, new, eps, cost)
        new_grad = new_grad if root is None else new_grad @ root
        back = ((step + eta / 2 * new_grad).square() / (2 * variance)).flatten(1).sum(1)  # -log q(y|new); q(new|y) is noise
        log_ratio = new_log_p - log_p - back + noise.square().flatten(1).sum(1) / 2
        take = torch.rand_like(log_p).log() < log_ratio  # nan compares False: a broken proposal is refused
        y, grad = torch.where(take.view(flat), new, y), torch.where(take.view(flat), new_grad, grad)
        log_p = torch.where(take, new_log_p, log_p)
        accepted = accepted + take.float().mean() / n_steps
    return y, log_p, accepted


@torch.no_grad()
def jump(f, x, y, centres, sigma, eps, log_p=None):
    """One exact long move per chain, quadratic cost: what Langevin cannot do between separate modes of pi_f(.|x).

    One proposal z_j ~ N(c_j, sigma_j^2) around each of M centres, shared by all chains, weighs
    w_j = exp(log_p(z_j)) / q(z_j), q = mean_j N(c_j, sigma_j^2).  A chain's own y stands in for the proposal of one c_J,
    J drawn in proportion to N(y; c_J, sigma_J^2), and the next y is drawn from the M candidates by weight.  That leaves
    pi_f(.|x) unchanged for any centres (Metropolis with all proposals: Tjelmeland 2004; iterated SIR: Andrieu et al. 2018).
    Let most c_j be target samples, sigma_j about the finest structure; some wide ones keep q from vanishing at a stray y,
    whose weight would else be so large that it never leaves.

    x, y (B, D), centres (M, D) independent of y, sigma a float or (M,), log_p (B,) if at hand
    -> y (B, D), moved fraction (0-dim tensor).  Costs M evaluations of f for all B chains together and three softmaxes."""
    log_p = (f(y) - quadratic_cost(x, y)) / eps if log_p is None else log_p
    sigma = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).expand(len(centres))[:, None]
    z = centres + sigma * torch.randn_like(centres)
    log_q_z, _ = _log_mixture(z, centres, sigma, torch.arange(len(z), device=z.device)[:, None])
    log_q_y, j = _log_mixture(y, centres, sigma)
    log_w = torch.addmm((f(z) - z.square().sum(1) / 2) / eps - log_q_z, x / eps, z.T)
    log_w.scatter_(1, j, (log_p + x.square().sum(1) / (2 * eps) - log_q_y)[:, None])  # |x|^2 is left out of every weight
    k = _draw(log_w.softmax(1))
    return torch.where(k == j, y, z[k.squeeze(1)]), (k != j).float().mean()


def _log_mixture(points, centres, sigma, j=None):
    """log sum_j N(point; centre_j, sigma_j^2), up to a constant: (B, D), (M, D), (M, 1) -> (B,), and j (B, 1), drawn in
    proportion to those terms unless given.

    Read off as term_j - log share_j: a softmax is ten times faster than exp on a CPU, which crawls where it underflows."""
    precision = sigma ** -2
    constant = -(precision * centres.square()).sum(1) / 2 - centres.shape[1] * sigma.log().squeeze(1)
    log_terms = torch.addmm(constant, torch.cat([points, points.square().sum(1, keepdim=True)], 1),
                            torch.cat([precision * centres, -precision / 2], 1).T)
    share = log_terms.softmax(1)
    j = _draw(share) if j is None else j
    return (log_terms.gather(1, j) - share.gather(1, j).log()).squeeze(1), j


def _draw(p):
    """One index per row of p (B, M), drawn by its weights: (B, 1).  Ten times faster than torch.multinomial on a CPU."""
    cdf = p.cumsum(1)
    u = torch.rand(len(p), 1, device=p.device) * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True).clamp(max=p.shape[1] - 1)


@torch.no_grad()
def swap(x, y, eps, cost=quadratic_cost):
    """Pair the chains at random and exchange y_i, y_j with probability min(1, exp(-[increase of the summed cost]/eps)).

    Exact (f and Z cancel) and free of f: it mends a bank whose y are right together but paired with the wrong x.
    x, y (B, ...) -> y (B, ...), exchanged fraction (0-dim tensor)."""
    i, j = torch.randperm(len(y), device=y.device)[:len(y) // 2 * 2].view(2, -1)
    increase = cost(x[i], y[j]) + cost(x[j], y[i]) - cost(x[i], y[i]) - cost(x[j], y[j])
    take = torch.rand_like(increase).log() < -increase / eps
    y = y.clone()
    y[i[take]], y[j[take]] = y[j[take]], y[i[take]]
    return y, take.float().mean()


# ------------------------------------------------------------------------------------------------ training

def proxy_loss(f, y_pos, y_neg):
    """E_{pi_f} f - E_Q f (0-dim), y_pos ~ Q, y_neg ~ pi_f: minus the gap.  Its gradient is that of -L(f) (Algorithm 1);
    its value is near 0 all along and must never be read as convergence."""
    out = f(torch.cat([y_pos, y_neg]))  # one pass: half the launches, and small batches use the cores better
    return out[len(y_pos):].mean() - out[:len(y_pos)].mean()


def train_step(f, opt, y_pos, y_neg):
    """One step of ascent on L(f): -> the gap E_Q f - E_{pi_f} f (0-dim tensor, on the device)."""
    loss = proxy_loss(f, y_pos, y_neg)
    opt.zero_grad(set_to_none=True)
    loss.backward()
    opt.step()
    return -loss.detach()


@torch.no_grad()
def average_weights(f_avg, f, decay, step):
    """f_avg <- decay f_avg + (1 - decay) f; the first steps forget the random start sooner."""
    torch._foreach_lerp_(list(f_avg.parameters()), list(f.parameters()), 1 - min(decay, step / (step + 10)))


def stratified_rows(n_rows, n, device=None):
    """n of n_rows row numbers, one from each of n equal stretches, each row equally likely: (n,) int64."""
    u = torch.rand(n, dtype=torch.float64, device=device)
    return ((torch.arange(n, device=device) + u) * (n_rows / n)).long().clamp_(max=n_rows - 1)


def kd_order(points):
    """points (2^k, D) reordered so that every stretch of 2^j rows is a cell of a k-d tree: (2^k, D).

    Then stratified_rows draws batches spread like the data themselves: every row as likely as before, but the share of
    each region no longer fluctuates from batch to batch, which is what the levels of f are learned from."""
    if len(points) & (len(points) - 1):
        raise ValueError(f"kd_order needs a power of two of points, not {len(points)}")
    cells, axis = points[None], 0
    while cells.shape[1] > 1:
        order = cells[:, :, axis % points.shape[1]].argsort(dim=1, stable=True)
        cells = cells.gather(1, order[..., None].expand_as(cells)).view(2 * len(cells), -1, points.shape[1])
        axis += 1
    return cells.squeeze(1)


def warm_cosine(lr, step, warmup, steps):
    """Learning rate at this step, from 1: up to lr in `warmup` steps, down to 0 at the last by a cosine."""
    return lr * min(1.0, step / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


class Bank(nn.Module):
    """Persistent chains: sources x and their current y, both (N, ...), as buffers that move and save with it."""

    def __init__(self, x, y):
        super().__init__()
        self.register_buffer("x", x.clone())
        self.register_buffer("y", y.clone())

    def rows(self, n):
        return stratified_rows(len(self.x), n, self.x.device)


# ------------------------------------------------------------------------------------------------ Gaussians

def root_of(S):
    """Symmetric square root."""
    values, vectors = torch.linalg.eigh(S)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def gaussian_map(S0, S1, eps):
    """T (D, D) of the entropic plan between N(m0, S0) and N(m1, S1), pi(.|x) = N(m1 + T (x - m0), eps T): Janati et al. 2020."""
    r = root_of(S0)
    values, vectors = torch.linalg.eigh(r @ S1 @ r)
    half = torch.linalg.inv(r) @ vectors
    return half * (2 * values / (torch.hypot(2 * values.sqrt(), torch.full_like(values, eps)) + eps)) @ half.T  # as (R - eps I)/2 it cancels


# ------------------------------------------------------------------------------------------------ coloured digits

def digits(dataset, root, digit, train, drawn=False):
    """All images of one digit: (n, 1, 32, 32) in [0,1], from torchvision.datasets.MNIST, or a class like it, in the folder root.
    Where there is none they are downloaded, or, if `drawn`, made up: 40 to train with, 6 to test."""
    if drawn and not os.path.exists(os.path.join(root, dataset.__name__, "raw", "train-images-idx3-ubyte")):
        return drawn_digits(digit, 40 if train else 6, torch.Generator().manual_seed(2 * digit + train))
    socket.setdefaulttimeout(30)  # seconds: without it a network that drops packets hangs a download for ever
    try:
        data = dataset(root, train=train, download=True)
        grey = F.pad(data.data[torch.as_tensor(data.targets) == digit][:, None].float() / 255, (2, 2, 2, 2))
    except Exception as error:  # no network, half a file, no permission: torchvision has an exception for each
        fail(f"no digits under {root} ({(str(error).splitlines() or [type(error).__name__])[0][:100]}): put MNIST's files into "
             f"{os.path.join(root, dataset.__name__, 'raw')}, delete broken ones, or name a folder with --data (a network is needed to download them)")
    if len(grey) < 2:
        fail(f"{root} holds {len(grey)} images of the digit {digit}: put the whole of MNIST there, or name another folder with --data")
    return grey


def drawn_digits(digit, n, generator):
    """Made-up 2s or 3s, for tests without data: pen strokes of random size, slant, place and thickness, (n, 1, 32, 32) in [0,1]."""
    t = torch.linspace(0, 1, 30)[:, None]

    def arc(middle, start, end):
        angle = torch.deg2rad(start + (end - start) * t)  # clockwise, y points down
        return torch.cat([angle.cos() / 2, middle + angle.sin() / 2], 1)

    if digit == 3:
        pen = torch.cat([arc(-0.5, -150, 90), arc(0.5, -90, 150)])
    else:
        corner = torch.tensor([[0.45, -0.3], [-0.5, 1.0], [0.6, 1.0]])
        pen = torch.cat([arc(-0.5, -180, 20), corner[0].lerp(corner[1], t), corner[1].lerp(corner[2], t)])
    size, slant, ink, *place = torch.rand(5, n, 1, generator=generator)
    size = 6 + 3 * size
    at = torch.stack([15 + 2 * place[0] + size * (pen[:, 0] - (slant - 0.3) * pen[:, 1]), 15 + 2 * place[1] + size * pen[:, 1]], 2)
    pixels = torch.cartesian_prod(torch.arange(32.0), torch.arange(32.0)).flip(1)
    nearest = torch.stack([torch.cdist(pixels, points).amin(1) for points in at])
    return (1.3 + ink - nearest).clamp(0, 1).view(n, 1, 32, 32)


def paint(grey, hue=None, generator=None):
    """Digits (n, 1, H, W) in [0,1] in the full-saturation colours hue (n,), in turns (0 red, 1/3 green), drawn uniformly
    unless given: (n, 3, H, W) in [-1,1]."""
    if hue is None:
        hue = torch.rand(len(grey), generator=generator, device=generator.device if generator else grey.device).to(grey.device)
    return 2 * grey * _colours(hue)[:, :, None, None] - 1


def _colours(hue):
    away = (hue[:, None] - torch.tensor([0, 1 / 3, 2 / 3], device=hue.device) + 0.5) % 1 - 0.5  # from red, green, blue, in turns
    return (2 - 6 * away.abs()).clamp(0, 1)


def hue_of(y):
    """Hue of the summed colour of images (n, 3, H, W): (n,) in turns, in [0, 1)."""
    red, green, blue = y.sum((2, 3)).unbind(1)
    return torch.atan2(3 ** 0.5 * (green - blue), 2 * red - green - blue) / (2 * math.pi) % 1


def hue_error(x, y):
    """Angle between the hues of images x and y (n, 3, H, W): (n,) in degrees, 0 to 180."""
    return 360 * ((hue_of(x) - hue_of(y) + 0.5) % 1 - 0.5).abs()


def off_colour(y):
    """Root mean square of what no single colour explains in images y (n, 3, H, W), of a brightness from 0 to 1: 0-dim tensor.
    0 for painted digits; grain, a veil or two colours in one digit raise it."""
    light, colour = (y.clamp(-1, 1) + 1) / 2, _colours(hue_of(y))[:, :, None, None]
    strength = (light * colour).sum(1, keepdim=True) / colour.square().sum(1, keepdim=True)
    return (light - strength * colour).square().sum(1).mean().sqrt()


def _brightness(y):
    return (y.amax(1).flatten(1) + 1) / 2


def _blur(y):
    light = _brightness(y)
    return ((light > 0.3) & (light < 0.8)).sum().item() / (light > 0.3).sum().clamp_min(1).item()


def energy_distance(a, b):
    """2 E|a-b| - E|a-a'| - E|b-b'| of independent samples (n, D), (m, D): a float, 0 in the mean where their laws are equal."""
    within = sum(torch.cdist(c, c).sum() / (len(c) * (len(c) - 1)) for c in (a, b))
    return (2 * torch.cdist(a, b).mean() - within).item()


def digit_scores(x, y, real):
    """Scores of M translations y (N, M, 3, H, W) of digits x (N, 3, H, W) against real targets (n, 3, H, W), held out:

    cost        mean |x-y|^2/2                  hue_err   median hue_error          off_colour   as above, of y
    spread      mean over x and pixels of the deviation over the translations of one x; 0 for M = 1
    shape       energy distance between brightness of y and of real, over that between x and real: 0 for the same law, 1 for
                doing nothing; unlike a digit classifier it forgives neither blur nor ghosts
    blur        share of half-lit (0.3 to 0.8) among lit pixels; real_blur: of real"""
    pairs = x.repeat_interleave(y.shape[1], 0), y.flatten(0, 1)
    light = _brightness(real)
    shape = sum(energy_distance(_brightness(one), light) for one in y.unbind(1)) / y.shape[1]  # y of one x are not independent
    return {"cost": quadratic_cost(*pairs).mean().item(), "hue_err": hue_error(*pairs).median().item(),
            "spread": y.std(1).mean().item() if y.shape[1] > 1 else 0.0, "shape": shape / energy_distance(_brightness(x), light),
            "blur": _blur(pairs[1]), "real_blur": _blur(real), "off_colour": off_colour(pairs[1]).item()}


def save_pairs(path, x, y):
    """Write {"x": (N, ...), "y": (N, M, ...)}; a full disk must not cost the run its last line."""
    problem = _write(path, {"x": x.cpu(), "y": y.cpu()})
    if problem:
        print(f"warning: {problem}: free some space, then --resume writes it again", flush=True)


def tiled(images, columns):
    """Images (n, 3, H, W) in [-1,1] as one picture, grey lines between: (rows, columns, 3) in [0,1], on the CPU."""
    images = F.pad((images.clamp(-1, 1).cpu() + 1) / 2, (1, 1, 1, 1), value=0.3)
    return torch.cat([torch.cat(list(row), 2) for row in images[:len(images) // columns * columns].split(columns)], 1).permute(1, 2, 0)


# ------------------------------------------------------------------------------------------------ the run around it

def fail(sentence):
    """End with one sentence on stderr and exit code 2."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _positive(text):
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError
    return value


def arguments(doc, script, eps=None, **more):
    """Command line shared by the scripts -> namespace with eps, smoke, resume, out, device (torch.device), seed.

    eps: its default, None for a script that has no temperature.  more: extra options, name = dict of argparse keywords."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(message.replace("_positive", "positive number") + " (-h lists the options)")
    if eps is not None:
        parser.add_argument("--eps", type=_positive, default=eps, help="temperature of the plan, > 0 (default %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="the same path, tiny: seconds, files named *_smoke")
    parser.add_argument("--resume", action="store_true", help="carry on from this script's checkpoint")
    parser.add_argument("--out", default=os.path.dirname(os.path.abspath(script)), help="folder for what is written (default: beside the script)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU that works, else the CPU)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random in training (default 0)")
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    args = parser.parse_args()
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as error:
        fail(f"--out {args.out} cannot be made ({error.strerror}): name a folder you can write to")
    args.device = _device(args.device)
    if not 0 <= args.seed < 2 ** 63:
        fail(f"--seed {args.seed} is not a whole number from 0 to 2^63 - 1: choose one")
    torch.manual_seed(args.seed)
    return args


def _device(name):
    try:
        device = torch.device("cuda" if name == "auto" else name)
        torch.ones(2, device=device).exp().sum().item()  # a GPU may be listed and yet too old (or new) for this torch
        return device
    except (RuntimeError, AssertionError) as error:
        if name != "auto":
            fail(f"--device {name} does not work here ({str(error).splitlines()[0]}): leave it out or say --device cpu")
        if torch.cuda.is_available():
            print(f"this torch cannot use the GPU ({str(error).splitlines()[0]}), so on the CPU; README: GTX notes", flush=True)
        return torch.device("cpu")


class Stop:
    """Turns SIGINT and SIGTERM into `if stop:` at the next step, once there is something to save (stop.armed = True).
    A second signal ends the process at once; so does the first one before that, with exit code 0."""

    def __init__(self):
        self.asked = self.armed = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def __bool__(self):
        return self.asked

    def _ask(self, number, frame):
        if not self.armed:
            print("stopped before the first step: nothing to save", flush=True)
            raise SystemExit(0)
        if self.asked:
            raise SystemExit(128 + number)
        self.asked = True
        print("stopping: saves, then scores what there is; once more to end at once", flush=True)


def save(path, parts, **values):
    """Write {name: part.state_dict()}, the generators' states and values to `path` aside, then rename: a kill at any
    moment leaves the old checkpoint or the new one, whole.  Tensors and builtins only, so weights_only=True loads it."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state["rng"] = [torch.get_rng_state()] + (torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])
    problem = _write(path, {**state, **values})
    if problem:
        fail(f"{problem}: free some space or choose another --out; an earlier checkpoint there is untouched")


def _write(path, state):
    """torch.save aside, then rename -> None, or what went wrong, with nothing left behind."""
    try:
        torch.save(state, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its zip writer
        if os.path.exists(f"{path}.tmp"):
            os.remove(f"{path}.tmp")
        return f"cannot write {path} ({str(error).splitlines()[0]})"


def load(path, parts, constants):
    """Fill `parts` and the generators from `path`; -> the dict of values saved with them.  Refuses, by a sentence, a
    file that is missing, broken or foreign, and one made with other constants (then it would not be a continuation)."""
    if not os.path.exists(path):
        fail(f"no checkpoint {path} to resume: run without --resume first, or name its folder with --out")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        made_with = state["constants"]
    except Exception:  # foreign pickle, truncated zip, text file, no permission: torch has an exception for each
        fail(f"{path} is not a readable checkpoint of this script: move it away and start without --resume")
    other = [f"{k} was {made_with.get(k)}, is {v}" for k, v in constants.items() if made_with.get(k) != v]
    if other:
        fail(f"{path} was made with other constants ({'; '.join(other)}): restore them, or start without --resume")
    try:
        for name, part in parts.items():
            part.load_state_dict(state.pop(name))
        torch.set_rng_state(state["rng"][0])
        if torch.cuda.is_available() and len(state["rng"]) == 1 + torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["rng"][1:])
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        fail(f"{path} does not fit this script ({str(error).splitlines()[0]}): move it away and start without --resume")
    return state


def begin(path, parts, constants, resume):
    """Where a run starts: with resume from `load`, else at step 0 with an earlier checkpoint kept -> values saved, at least step and seconds."""
    if resume:
        return load(path, parts, constants)
    keep_old(path)
    return {"step": 0, "seconds": 0.0}


def keep_old(path):
    """A fresh run beside an earlier one's checkpoint: rename that one to *.old instead of losing it."""
    if os.path.exists(path):
        try:
            os.replace(path, f"{path}.old")
        except OSError as error:
            fail(f"cannot rename {path} ({error.strerror}): name a folder you can write to with --out")
        print(f"kept the earlier checkpoint as {path}.old (--resume would have carried it on)", flush=True)


def draw(fig, path):
    """Write a matplotlib figure; a full disk must not cost the run its last line."""
    try:
        fig.savefig(path, dpi=150)
    except OSError as error:
        print(f"warning: cannot write {path} ({error.strerror}): free some space, then --resume draws it again", flush=True)


def constants_of(module):
    """A script's UPPER_CASE numbers, strings and tuples, given globals(): what a checkpoint must agree with to be resumed."""
    return {k: v for k, v in module.items() if k.isupper() and isinstance(v, (bool, int, float, str, tuple))}


class Progress:
    """Counts training seconds over all resumes and prints the log line that tells life from death."""

    def __init__(self, total, step=0, seconds=0.0, device=torch.device("cpu")):
        self.total, self.device, self.first, self.before = total, device, step, seconds
        self.start = self.saved = time.perf_counter()

    @property
    def seconds(self):
        return self.before + time.perf_counter() - self.start

    def save_due(self, every=30.0):
        """True once in `every` seconds."""
        due = time.perf_counter() - self.saved > every
        self.saved = time.perf_counter() if due else self.saved
        return due

    def line(self, step, **values):
        """Print step/total, values (floats), ms/step, peak memory, time left."""
        ms = 1e3 * (time.perf_counter() - self.start) / max(step - self.first, 1)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        print(f"step {step:6d}/{self.total}  {shown}  {ms:.1f} ms/step  {peak_mib(self.device):.0f} MiB  "
              f"{clock(ms / 1e3 * (self.total - step))} left", flush=True)


def stop_if_diverged(limit, advice="Lower LR or the Langevin step, or take more Langevin steps per training step", **values):
    """End the run, before anything is saved over, if a value (a float) is not finite or beyond +-limit."""
    for name, value in values.items():
        if not abs(value) < limit:  # nan too
            fail(f"diverged: {name} is {value:.4g}.  {advice}, and start afresh; "
                 f"the last good checkpoint is kept, --resume with the same constants goes on from it")


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
    a, done = torch.randn(n, n, device=device), 0
    b = a @ a
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            torch.mm(a, a, out=b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done += 4
    return 2 * n ** 3 * done / (time.perf_counter() - start)
