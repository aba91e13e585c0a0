"""Neural OT, the min-max method to compare against (Korotin et al., ICLR 2023), with a convexity regulariser and its inverse map.

    sup_f inf_T  E_Q f(y) + E_P [ C(x, T(x,.)) - E_z f(T(x,z)) ]              two networks: the map T and the potential f
    strong       C = |x - T(x)|^2/2                                           T is deterministic
    weak         C = E_z |x - T(x,z)|^2/2 - Var_z T(x,z)/2                    z ~ N(0, I); Var the trace of the covariance
    convex       psi(y) = |y|^2/2 - f(y) ought to be convex.  The loss of f gets, times --convex, the mean over pairs y1, y2
                 of ReLU(psi(t y1 + (1-t) y2) - t psi(y1) - (1-t) psi(y2)), t ~ U(0, 1)
    inverse      strong: y -> grad psi(y) = y - grad f(y), for T(x) minimises |x-y|^2/2 - f(y) over y.  It wants a smooth f,
                 and where T tears a psi that bridges the tear, so --convex far above the published 0.01: round_trip of
                 seeds 0, 1, 2 is 0.088, 0.012, 0.022 at 0 and 0.0029, 0.0034, 0.0029 at 1; with ReLU (seed 0) 0.74 and 0.039

    python train_not.py                       40 s on one CPU core, 30 s of them training, 1 GiB
    python train_not.py --cost weak           65 s, 50 s of them training
    python train_not.py --data-set cmnist     12 minutes on one CPU core, 1 GiB; is_target 0.93 by a digit classifier
    python train_not.py --smoke               the same path in seconds

Data sets: moons (or toy) and roll, N(0, I) to two moons or to the swiss roll of train_toy.py, and cmnist, the digits of
train_cmnist.py.  Writes beside itself (or under --out) not_moons_strong_convex1.pt, which --resume carries on from, the figure
(.png) and for the digits _pairs.pt = {"x": (N,3,32,32), "y": (N,M,3,32,32)}: every test 2 and M translations of it.

Scores in 2-D, in the last line; a ratio is an error over the same between two discrete solves or samples:
    map_ratio       mean |T(x) - m(x)|^2 (weak: E_z T), m(x) the mean of POT's exact plan at x, a sample of the solve; the floor
                    is that of two solves that share x
    marg_ratio      W2^2 of T's push-forward of P to Q
    jensen          mean violation of convexity by psi on held-out pairs of Q, and the share of pairs violated
    round_trip      strong: mean |x - grad psi(T(x))|^2; _median over x: a map torn in two has its error at the tear
    inv_ratio       strong: mean |grad psi(y) - m(y)|^2, m now of plans that share y
    inv_marg_ratio  strong: W2^2 of grad psi's push-forward of Q to P
"""
import math
import os
import time

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import ot
import torch
import torch.nn.functional as F
from matplotlib.collections import LineCollection
from scipy.optimize import linear_sum_assignment
from torch import nn
from torchvision.datasets import MNIST

import common


def weight(text):
    if not (math.isfinite(float(text)) and float(text) >= 0):
        raise ValueError
    return float(text)


weight.__name__ = "number from 0 up"  # as argparse's error names it
beside = os.path.dirname(os.path.abspath(__file__))
args = common.arguments(__doc__, __file__, cost=dict(choices=("strong", "weak"), default="strong", help="(default strong)"),
                        convex=dict(type=weight, default=1.0, help="weight of the regulariser, 0 for none (default %(default)s)"),
                        data=dict(default=os.path.join(beside, "data"), metavar="FOLDER",
                                  help="with MNIST in torchvision's layout, or where to download it to (default %(default)s)"),
                        **{"data-set": dict(choices=("toy", "moons", "roll", "cmnist"), default="moons", help="toy is moons (default moons)")})
stop = common.Stop()
torch.set_flush_denormal(True)

# ---------------------------------------------------------------------------------------------- constants
COST, CONVEX, SEED = args.cost, args.convex, args.seed
DATA = "moons" if args.data_set == "toy" else args.data_set
DIGITS, WEAK = DATA == "cmnist", COST == "weak"
STEPS = 2000             # of f; published 10 000
T_STEPS = 4              # of T per step of f; published 10
BATCH = 128              # samples of P and of Q per step, published 64
COPIES = 4 if WEAK else 1  # y of each x: the variance needs two
Z = 2 * WEAK             # dimension of z; channels for images
WIDTH = 100              # of the two hidden layers, as published
SMOOTH_T, SMOOTH_F = False, True  # SiLU, else ReLU as published: f is then piecewise linear and grad psi jumps, but T must tear
SHARPNESS = 1.5          # 1/width of SiLU's ramps in the first layer at the start, placed at samples; torch's own start stays blunt for long
SCALE = 10.0             # f = SCALE net: with Adam the learning rate of f over that of T, which must follow f
LR, BETAS = 3e-3, (0.0, 0.99)  # of both; falls to 0 by a cosine.  No momentum: a min-max game swings with it
WARMUP = 100             # steps
AVERAGE = 0.998          # of both networks' weights, per step
MIXED = True             # pairs of the regulariser from Q and T's output together, so that mid-points are where T is; else from Q
NOISE = 0.0              # deviation, see below
DRAWS = 1                # of the noise, averaged in grad psi
SOURCES = 2 ** 17        # samples to draw from, spread evenly over each batch
REFERENCE_N = 500 if WEAK else 2000  # POT's weak solver is slow
REFERENCE_SEED = 1
WEAK_ROUNDS = 100        # of POT's weak solver
TEST_Z = 500             # draws of z in E_z T(x,z)
if DIGITS:
    STEPS, T_STEPS, WARMUP, AVERAGE = 1600, 3, 50, 0.99
    BATCH, COPIES = (16, 2) if WEAK else (32, 1)  # as many images for either cost
    LR, Z = 5e-4, 1 * WEAK
    WIDTH, F_WIDTH, BLOCKS = 16, 32, 2  # channels of the UNet at 32 x 32 and of the ResNet, residual blocks at 8 x 8
    NOISE, DRAWS = 0.2, 16  # f sees images + noise, real and made: a potential of the class E f(y + noise), smooth, so the problem is the same
    SOURCE_DIGIT, TARGET_DIGIT, SHOWN = 2, 3, 8  # rows of the figure
if args.smoke:
    STEPS, T_STEPS, BATCH, WIDTH, F_WIDTH, SOURCES, REFERENCE_N, WEAK_ROUNDS, TEST_Z, DRAWS, SHOWN = 12, 2, 8, 8, 4, 256, 40, 3, 10, 2, 3
LOG_EVERY = max(1, STEPS // (60 if DIGITS else 15))

device = args.device
begun = time.perf_counter()
name = f"not_{DATA}_{COST}_convex{CONVEX:g}" + "_smoke" * args.smoke
checkpoint, figure, pairs = (os.path.join(args.out, name + end) for end in (".pt", ".png", "_pairs.pt"))


# ---------------------------------------------------------------------------------------------- data

def normal(n, generator=None):
    """P = N(0, I): (n, 2)."""
    return torch.randn(n, 2, generator=generator)


def moons(n, generator=None):
    """Half circles of radius 1 around (0, 0) upwards and (1, 0.5) downwards, noise 0.05, centred, times 1.3: (n, 2)."""
    angle = math.pi * torch.rand(n, generator=generator)
    side = torch.where(torch.rand(n, generator=generator) < 0.5, 1.0, -1.0)
    y = torch.stack([side * (angle.cos() - 0.5), side * (angle.sin() - 0.25)], 1)
    return 1.3 * (y + 0.05 * torch.randn(n, 2, generator=generator))


def roll(n, generator=None):
    """The swiss roll of train_toy.py: (n, 2)."""
    t = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=generator))
    return (torch.stack([t * t.cos(), t * t.sin()], 1) + 0.5 * torch.randn(n, 2, generator=generator)) / 8


def load(digit, train):
    return common.digits(MNIST, args.data, digit, train, drawn=args.smoke).to(device)


def batch(data):
    """BATCH samples spread evenly over the data set, digits in new colours."""
    rows = data[common.stratified_rows(len(data), BATCH, device)]
    return common.paint(rows) if DIGITS else rows


test_generator = torch.Generator().manual_seed(REFERENCE_SEED)
if DIGITS:
    sources, targets = load(SOURCE_DIGIT, True), load(TARGET_DIGIT, True)
    test_x, test_real = (common.paint(load(digit, False), generator=test_generator) for digit in (SOURCE_DIGIT, TARGET_DIGIT))
    BATCH = min(BATCH, len(sources), len(targets))
else:
    target = {"moons": moons, "roll": roll}[DATA]
    sources, targets = (common.kd_order(draw(SOURCES)).to(device) for draw in (normal, target))
CONSTANTS = common.constants_of(globals())


# ---------------------------------------------------------------------------------------------- networks and losses

class Net(nn.Module):
    """scale * net(x), two hidden layers: (B, dim) -> (B, out), for out 1 (B,)."""

    def __init__(self, dim, out, smooth, scale=1.0):
        super().__init__()
        self.activation = F.silu if smooth else F.relu
        self.hidden = nn.ModuleList([nn.Linear(dim, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.last = nn.Linear(WIDTH, out)
        self.scale = scale

    def forward(self, x):
        for layer in self.hidden:
            x = self.activation(layer(x))
        return self.scale * self.last(x).squeeze(1)

    place = common.MLP.place


class UNet(nn.Module):
    """(B, 3 + Z, 32, 32) -> (B, 3, 32, 32), 0 at the start: two halvings, BLOCKS residual blocks at 8 x 8, and back."""

    def __init__(self):
        super().__init__()
        w = WIDTH
        self.enter, self.leave = nn.Conv2d(3 + Z, w, 3, padding=1), nn.Conv2d(w, 3, 3, padding=1)
        self.down = nn.ModuleList([nn.Conv2d(w, 2 * w, 4, 2, 1), nn.Conv2d(2 * w, 4 * w, 4, 2, 1)])
        self.blocks = nn.Sequential(*(common.Block(4 * w) for _ in range(BLOCKS)))
        self.up = nn.ModuleList([nn.ConvTranspose2d(4 * w, 2 * w, 4, 2, 1), nn.ConvTranspose2d(2 * w, w, 4, 2, 1)])
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x):
        whole = self.enter(x.contiguous(memory_format=torch.channels_last))  # twice as fast in it on a CPU
        half = self.down[0](F.silu(whole))
        quarter = self.blocks(self.down[1](F.silu(half)))
        half = half + self.up[0](F.silu(quarter))
        return self.leave(F.silu(whole + self.up[1](F.silu(half))))


def transport(T, x, copies=COPIES, generator=None):
    """T(x, z) = x + net(x, z) for `copies` z of each x: (B, ...) -> (B, copies, ...)."""
    x = x.repeat_interleave(copies, 0)
    z = torch.randn(len(x), Z, *x.shape[2:], generator=generator, device=generator.device if generator else device).to(device)
    return (x + T(torch.cat([x, z], 1))).unflatten(0, (-1, copies))


def cost_of(x, y):
    """C(x, T(x,.)), mean over x, its variance unbiased: (B, ...), (B, copies, ...) -> 0-dim."""
    spread = y.flatten(2).var(1).sum(1) if WEAK else 0.0
    return ((y - x[:, None]).square().flatten(2).sum(2).mean(1) / 2 - spread / 2).mean()


def noisy(y):
    return y + NOISE * torch.randn_like(y) if NOISE else y


def T_loss(T, f, x):
    y = transport(T, x)
    return cost_of(x, y) - f(noisy(y.flatten(0, 1))).mean()


def violation(f, y1, y2, t):
    """ReLU(psi(t y1 + (1-t) y2) - t psi(y1) - (1-t) psi(y2)), psi(y) = |y|^2/2 - f(y): (B, ...), (B, ...), (B,) -> (B,)."""
    y = torch.cat([y2.lerp(y1, t.view(-1, *[1] * (y1.dim() - 1))), y1, y2])
    middle, one, two = (y.square().flatten(1).sum(1) / 2 - f(y)).chunk(3)
    return F.relu(middle - t * one - (1 - t) * two)


def f_loss(f, y_real, y_made):
    """-> loss, gap E_Q f - E_P E_z f(T)."""
    out = f(noisy(torch.cat([y_real, y_made])))
    gap = out[:len(y_real)].mean() - out[len(y_real):].mean()
    if not CONVEX:
        return -gap, gap
    pool = torch.cat([y_real, y_made]) if MIXED else y_real
    rows = torch.randperm(len(pool), device=pool.device)[:2 * min(BATCH, len(pool) // 2)]
    y1, y2 = pool[rows].chunk(2)
    noise = noisy(torch.zeros_like(y1))  # of both ends and the point between: the linear term it adds to |y|^2/2 is no violation
    return -gap + CONVEX * violation(f, y1 + noise, y2 + noise, torch.rand(len(y1), device=pool.device)).mean(), gap


def descend(opt, loss):
    """One Adam step on opt's own parameters; those of the other network get no gradient."""
    opt.zero_grad()
    loss.backward(inputs=opt.param_groups[0]["params"])  # not autograd.grad: its strides may not be the weights', which fused Adam takes for granted
    opt.step()


def inverse(f, y):
    """grad psi(y) = y - grad f(y): (B, ...) -> (B, ...)."""
    y = y.detach().requires_grad_(True)
    with torch.enable_grad():
        grads = [torch.autograd.grad(f(noisy(y)).sum(), y)[0] for _ in range(DRAWS)]
    return (y - sum(grads) / DRAWS).detach()


# ---------------------------------------------------------------------------------------------- discrete references in 2-D

def w2(a, b):
    """Exact W2^2 between two samples of one size (POT)."""
    return ot.emd2([], [], ot.dist(a.double().cpu().numpy(), b.double().cpu().numpy()), numItermax=10 ** 6)


def discrete(x, ys, weak):
    """POT's plans from x to each sample of ys: -> the mean of y under each at each x [(n, 2)], mean squared distance between the two."""
    means = []
    for y in ys:
        a, b = x.double().numpy(), y.double().numpy()
        plan = ot.weak_optimal_transport(a, b, numItermax=WEAK_ROUNDS) if weak else ot.emd([], [], ot.dist(a, b), numItermax=10 ** 6)
        means.append((len(x) * torch.from_numpy(plan) @ y.double()).float())
    return means, mean_square(means[0], means[1])


def mean_square(a, b):
    return (a - b).square().flatten(1).sum(1).mean().item()


def error_ratio(y, means, floor):
    """Mean squared error of y against two discrete solutions, mean, over that between them."""
    return sum(mean_square(y, m) for m in means) / 2 / floor


@torch.no_grad()
def mean_map(x):
    """E_z T(x,z), the same z at every call: (n, ...) -> (n, ...)."""
    generator = torch.Generator().manual_seed(REFERENCE_SEED)
    return torch.cat([transport(T_avg, part, TEST_Z if WEAK else 1, generator).mean(1) for part in x.split(100 if WEAK else 1000)])


# ---------------------------------------------------------------------------------------------- training

layout = {"memory_format": torch.channels_last if DIGITS else torch.preserve_format}
T, T_avg = ((UNet() if DIGITS else Net(2 + Z, 2, SMOOTH_T)).to(device, **layout) for _ in range(2))
f, f_avg = ((common.ResNet(32, 3, F_WIDTH, 0, SCALE) if DIGITS else Net(2, 1, SMOOTH_F, SCALE)).to(device, **layout) for _ in range(2))
if not DIGITS:
    for net, smooth, at in ((T, SMOOTH_T, torch.cat([sources, torch.randn(SOURCES, Z, device=device)], 1)), (f, SMOOTH_F, targets)):
        if smooth:
            net.place(at, SHARPNESS)
T_avg.load_state_dict(T.state_dict())
f_avg.load_state_dict(f.state_dict())
opt_T, opt_f = (torch.optim.Adam(net.parameters(), lr=LR, betas=BETAS, fused=True) for net in (T, f))
params = sum(p.numel() for net in (T, f) for p in net.parameters())
print(f"{DATA}, cost {COST}, convex {CONVEX:g}: two networks of {params} parameters together", flush=True)
if not DIGITS:
    p_fresh, q_fresh = ([draw(REFERENCE_N, test_generator) for _ in range(2)] for draw in (normal, target))
    test_x = p_fresh[0]
    map_reference = discrete(test_x, q_fresh, WEAK)
    inv_reference = None if WEAK else discrete(q_fresh[0], p_fresh, False)
    print(f"discrete references on {REFERENCE_N} samples: {time.perf_counter() - begun:.0f} s", flush=True)

parts = {"T": T, "f": f, "T_avg": T_avg, "f_avg": f_avg, "opt_T": opt_T, "opt_f": opt_f}
state = common.begin(checkpoint, parts, CONSTANTS, args.resume)
step, progress = state["step"], common.Progress(STEPS, state["step"], state["seconds"], device)


def save():
    common.save(checkpoint, parts, step=step, seconds=progress.seconds, constants=CONSTANTS, code=open(__file__, encoding="utf-8").read())


def quality():
    """What the log line says of the averaged map, against ground truth."""
    x = test_x[:100].to(device)
    y = mean_map(x)
    if DIGITS:
        return {"off_colour": common.off_colour(y).item(), "hue_err": common.hue_error(x, y).median().item()}
    means = [m[:100] for m in map_reference[0]]
    return {"map_ratio": error_ratio(y.cpu(), means, mean_square(*means))}


save()  # a full disk or a folder without permission shows now, not in an hour
stop.armed, last = True, step == STEPS
while not last:
    step += 1
    for opt in (opt_T, opt_f):
        opt.param_groups[0]["lr"] = common.warm_cosine(LR, step, WARMUP, STEPS)
    for _ in range(T_STEPS):
        descend(opt_T, T_loss(T, f, batch(sources)))
    x, y_real = batch(sources), batch(targets)
    with torch.no_grad():
        y = transport(T, x)
    loss_f, gap = f_loss(f, y_real, y.flatten(0, 1))
    descend(opt_f, loss_f)
    common.average_weights(T_avg, T, AVERAGE, step)
    common.average_weights(f_avg, f, AVERAGE, step)

    last, due = step == STEPS or bool(stop), progress.save_due()  # asked once: nothing is saved unchecked
    if due or last or step % LOG_EVERY == 0:
        values = {"gap": gap, "convex": loss_f + gap, "cost": cost_of(x, y), "y": y.square().mean().sqrt(), "real": y_real.square().mean().sqrt(),
                  "weight": torch.cat([p.flatten() for net in (T, f) for p in net.parameters()]).abs().max()}
        now = dict(zip(values, torch.stack([v.detach() for v in values.values()]).tolist()))
        common.stop_if_diverged(1e3, "Lower LR or take more T_STEPS", gap=now["gap"] / SCALE, y=now["y"], weight=now.pop("weight"))
        progress.line(step, **now, **quality())
    if due:
        save()
train_s = progress.seconds
save()

# ---------------------------------------------------------------------------------------------- scores and figure


def convexity(pool, n):
    """Mean violation, in units of the cost, and share of violated pairs among n random pairs of held-out targets."""
    ends = [pool[torch.randint(len(pool), (n,), generator=test_generator)].to(device) for _ in range(2)]
    noise = noisy(torch.zeros_like(ends[0]))
    with torch.no_grad():
        v = violation(f_avg, ends[0] + noise, ends[1] + noise, torch.rand(n, generator=test_generator).to(device))
    return {"jensen": v.mean().item(), "violated": (v > 0).float().mean().item()}


def lines(axis, x, y, title, n=300):
    axis.add_collection(LineCollection(torch.stack([x, y], 1)[:n].numpy(), colors="0.6", linewidths=0.4))
    axis.scatter(*x[:n].T, s=4, c="tab:blue", label="x")
    axis.scatter(*y[:n].T, s=4, c="tab:red", label="y")
    axis.legend(loc="upper right")
    axis.set(title=title, **limits)


if not DIGITS:
    (means, floor), x = map_reference, test_x.to(device)
    mapped = mean_map(x)
    with torch.no_grad():
        pushed = transport(T_avg, x, 1, test_generator)[:, 0].cpu()
    marg_ratio = sum(w2(pushed, q) for q in q_fresh) / 2 / w2(*q_fresh)
    scores = {"map_ratio": error_ratio(mapped.cpu(), means, floor), "map_floor": floor, "marg_ratio": marg_ratio, **convexity(torch.cat(q_fresh), 4000)}
    if not WEAK:
        back, returned = [inverse(f_avg, q.to(device)).cpu() for q in q_fresh], (x - inverse(f_avg, mapped)).square().sum(1)
        scores |= {"round_trip": returned.mean().item(), "round_trip_median": returned.median().item(),
                   "inv_ratio": error_ratio(back[0], *inv_reference), "inv_marg_ratio": sum(map(w2, back, p_fresh)) / 2 / w2(*p_fresh)}
    fig, axes = plt.subplots(2, 3, figsize=(13, 8.4), layout="constrained")
    limits = dict(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    hue = torch.atan2(test_x[:, 1], test_x[:, 0])
    what = "T(x, z)" if WEAK else "T(x)"
    axes[0, 1].scatter(*q_fresh[0].T, s=3, c="0.7")
    for axis, points, title in ((axes[0, 0], test_x, "source x ~ P (colour: angle)"),
                                (axes[0, 1], pushed, f"{what} of the same x (marg_ratio {marg_ratio:.2f})")):
        axis.scatter(*points.T, s=3, c=hue, cmap="hsv")
        axis.set(title=title, **limits)
    lines(axes[0, 2], test_x, mapped.cpu(), f"x to {'E ' * WEAK}{what} (map_ratio {scores['map_ratio']:.2f})")
    lines(axes[1, 2], test_x, means[0], f"discrete OT, n = {REFERENCE_N}, of the same x" + ": E[y | x]" * WEAK)
    if WEAK:
        shown = hue.argsort()[REFERENCE_N // 12::REFERENCE_N // 6][:6]  # all around
        with torch.no_grad():
            clouds = transport(T_avg, x[shown], 300, test_generator).cpu()
        axes[1, 0].scatter(*q_fresh[0].T, s=2, c="0.85")
        for k in range(6):
            axes[1, 0].scatter(*clouds[k].T, s=3, c=f"C{k}")
            axes[1, 0].scatter(*test_x[shown[k]], s=110, c=f"C{k}", marker="*", edgecolors="k")
        axes[1, 0].set(title="T(x, z) of six x (stars), 300 z each", **limits)
    else:
        lines(axes[1, 0], back[0], q_fresh[0], f"y to grad $\\psi(y)$, the inverse (round_trip {scores['round_trip']:.3f})")
    ticks = torch.linspace(-3, 3, 200)
    with torch.no_grad():
        points = torch.cartesian_prod(ticks, ticks)
        psi = (points.square().sum(1) / 2 - f_avg(points.to(device)).cpu()).view(200, 200)
    picture = axes[1, 1].contourf(ticks, ticks, (psi - psi.min()).sqrt().T, 30, cmap="magma")
    fig.colorbar(picture, ax=axes[1, 1], shrink=0.85)
    axes[1, 1].scatter(*q_fresh[0][:500].T, s=1, c="w")
    axes[1, 1].set(title=f"root of $\\psi$ ({100 * scores['violated']:.1f} % of pairs violate convexity)", **limits)
else:
    per_image = 4 if WEAK else 1
    with torch.no_grad():
        y = torch.cat([transport(T_avg, part, per_image).clamp(-1, 1) for part in test_x.split(100)])
    n = min(len(test_x), len(test_real))
    matrix = torch.cdist(test_x[:n].flatten(1), test_real[:n].flatten(1)).square().cpu() / 2
    ot_cost = matrix[linear_sum_assignment(matrix.numpy())].mean().item()
    scores = common.digit_scores(test_x, y, test_real)
    cost, scores = scores["cost"], scores | {"ot_cost": ot_cost, "cost_ratio": scores["cost"] / ot_cost, **convexity(test_real.cpu(), 1000)}
    if not WEAK:
        scores["round_trip"] = mean_square(test_x, inverse(f_avg, y[:, 0]))
    common.save_pairs(pairs, test_x, y)
    count = SHOWN * (1 if WEAK else 4)
    shown = test_x[torch.linspace(0, len(test_x) - 1, count).long()]
    with torch.no_grad():
        made = torch.cat([shown[:, None], transport(T_avg, shown, 6 if WEAK else 1)], 1).flatten(0, 1)
    columns, title = (7, "test source, and six translations of it") if WEAK else (8, "test sources, and right of each its translation")
    panels = [(common.tiled(made, columns), columns, title)]
    if not WEAK:
        some = test_real[:2 * SHOWN]
        back = torch.stack([some, inverse(f_avg, some)], 1).flatten(0, 1)
        panels.append((common.tiled(back, 4), 4, f"real test {TARGET_DIGIT}s, and right of\neach its inverse grad psi"))
    panels.append((common.tiled(test_real[-2 * SHOWN:], 2), 2, f"real test {TARGET_DIGIT}s"))
    fig, axes = plt.subplots(1, len(panels), figsize=(sum(p[1] for p in panels), 7.4), layout="constrained", width_ratios=[p[1] for p in panels])
    for axis, (picture, _, title) in zip(axes, panels):
        axis.imshow(picture.numpy())
        axis.set_title(title)
        axis.axis("off")
found = f":\ncost {cost:.0f} (discrete OT {ot_cost:.0f}), hue error {scores['hue_err']:.1f} degrees" if DIGITS else ""
fig.suptitle(f"Neural OT, {DATA}, {COST} cost, convexity weight {CONVEX:g}{found}, {step} steps, {train_s:.0f} s")
common.draw(fig, figure)
print(f"wrote {figure}, {pairs + ', ' if DIGITS else ''}{checkpoint}; data set {DATA}, cost {COST}")
print(f"final convex {CONVEX:g} " + " ".join(f"{k} {v:.4g}" for k, v in scores.items()) +
      f" params {params} steps {step} train_s {train_s:.1f} total_s {time.perf_counter() - begun:.1f}")
