"""Neural OT, the min-max method to compare against (Korotin et al., ICLR 2023), with a convexity regulariser.

    sup_f inf_T  E_Q f(y) + E_P [ C(x, T(x,.)) - E_z f(T(x,z)) ]         two networks: the map T and the potential f
    strong       C = |x - T(x)|^2/2                                      T is deterministic
    weak         C = E_z |x - T(x,z)|^2/2 - Var_z T(x,z)/2               z ~ N(0, I); Var the trace of the covariance
    convex       psi(y) = |y|^2/2 - f(y) ought to be convex: the loss of f gets, times --convex, the mean over pairs
                 y1, y2 and t ~ U(0, 1) of ReLU(psi(t y1 + (1-t) y2) - t psi(y1) - (1-t) psi(y2))
    inverse      strong: y -> grad psi(y) = y - grad f(y), because T(x) minimises |x-y|^2/2 - f(y) over y.  It needs a
                 smooth f, and a psi that is right in the gaps of Q too: hence --convex 1, not the published 0.01

    python train_not.py                       40 s on one CPU core, 30 s of them training, 1 GiB
    python train_not.py --cost weak           65 s, 50 s of them training
    python train_not.py --data-set cmnist     12 minutes on one CPU core, 1 GiB
    python train_not.py --smoke               the same path in seconds

Data sets: from N(0, I) to two moons or to the swiss roll of train_toy.py, or the digits of train_cmnist.py.  Writes
beside itself (or under --out) not_moons_strong_convex1_seed0.pt, which --resume carries on from, the figure (.png) and,
of digits, _pairs.pt = {"x": (N,3,32,32), "y": (N,M,3,32,32)}: every test 2 and M translations of it.

The last line's scores in 2-D (of digits: see digits.digit_scores); a ratio is an error over that of discrete solves:
    map_ratio       mean |T(x) - m(x)|^2 (weak: E_z T), m(x) the mean of POT's exact plan at x, a sample of the solve;
                    over map_floor, that of two solves that share x
    marg_ratio      W2^2 from the distribution of T(x) to Q, over that between two samples of Q
    jensen          mean violation of convexity by psi over held-out pairs of Q; violated: the share of pairs
    round_trip      strong: mean |x - grad psi(T(x))|^2; _median over x: of a torn map the error sits at the tear
    inv_ratio, inv_marg_ratio    strong: the same as map_ratio and marg_ratio for grad psi, from Q to P
"""
import common  # first, so that Ctrl-C during the slow imports below ends without a traceback

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
from torch import nn

import digits

args = common.arguments(
    __doc__, __file__, data=digits.DATA_OPTION,
    cost=dict(choices=("strong", "weak"), default="strong", help="(default strong)"),
    convex=dict(type=common.number(0, 1e6), default=1.0, help="weight of the regulariser (default %(default)s)"),
    **{"data-set": dict(choices=("moons", "roll", "cmnist"), default="moons", help="(default moons)")})
if common.started_by_torchrun():
    common.fail("Neural OT trains in one process: start train_not.py with python, not with torchrun")
device = args.device
start_time = time.perf_counter()

# ---------------------------------------------------------------------------------------------- constants
COST, CONVEX, DATA_SET, SEED = args.cost, args.convex, args.data_set, args.seed
DIGITS, WEAK = DATA_SET == "cmnist", COST == "weak"
STEPS = 2000             # of f; published 10 000
T_STEPS = 4              # of T per step of f; published 10
BATCH = 128              # samples of P and of Q per step; published 64
COPIES = 4 if WEAK else 1  # y of each x: a variance needs two
Z = 2 * WEAK             # dimension of z; for images its channels
WIDTH = 100              # of the two hidden layers, as published
SHARPNESS = 1.5          # 1/width of the ramps in f's first layer at the start; torch's own are too broad for long
SCALE = 10.0             # f = SCALE * net: with Adam, how much faster f learns than T, which must follow f
LR, BETAS = 3e-3, (0.0, 0.99)  # of both; falls to 0 by a cosine.  No momentum: a min-max game swings with it
WARMUP = 100             # steps
EMA_DECAY = 0.998        # of both networks' weights, per step
NOISE, N_GRADS = 0.0, 1  # f sees y + NOISE N(0, I); grad psi is the mean of N_GRADS gradients, each with its own noise
SOURCES = 2 ** 17        # samples to draw from, spread evenly over each batch
REFERENCE_N, REFERENCE_SEED = 500 if WEAK else 2000, 1  # samples of the discrete solves
WEAK_STEPS = 100         # of POT's weak solver, which is slow
TEST_Z = 500             # samples of z in E_z T(x,z)
if DIGITS:
    STEPS, T_STEPS, WARMUP, EMA_DECAY = 1600, 3, 50, 0.99
    BATCH, COPIES = (16, 2) if WEAK else (32, 1)  # as many images for either cost
    LR, Z = 5e-4, 1 * WEAK
    WIDTH, F_WIDTH, BLOCKS = 16, 32, 2  # channels of the UNet at 32 x 32 and of the ResNet; residual blocks at 8 x 8
    NOISE, N_GRADS = 0.2, 16  # E f(y + noise) is a smooth potential of y, so that the problem is still the same
    TRANSLATIONS, SHOWN = 4 if WEAK else 1, 8  # of each test image; rows of the figure
if args.smoke:
    STEPS, T_STEPS, BATCH, WIDTH, F_WIDTH, SHOWN, N_GRADS = 12, 2, 8, 8, 4, 3, 2
    SOURCES, REFERENCE_N, WEAK_STEPS, TEST_Z = 256, 40, 3, 10
LOG_EVERY = max(1, STEPS // (60 if DIGITS else 15))

name = os.path.join(args.out, f"not_{DATA_SET}_{COST}_convex{CONVEX:g}_seed{SEED}" + "_smoke" * args.smoke)


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


def batch(data):
    """BATCH samples spread evenly over the data set, digits in new colours."""
    rows = data[common.stratified_rows(len(data), BATCH, device)]
    return digits.colorize(rows) if DIGITS else rows


test_generator = torch.Generator().manual_seed(REFERENCE_SEED)
if DIGITS:
    sources, targets, test_x, test_real = digits.load_task(args.data, 2, 3, args.smoke, test_generator, device)
    BATCH = min(BATCH, len(sources), len(targets))
else:
    target = {"moons": moons, "roll": roll}[DATA_SET]
    sources, targets = (common.kd_order(law(SOURCES)).to(device) for law in (normal, target))
CONSTANTS = common.constants_of(globals())


# ---------------------------------------------------------------------------------------------- networks and losses

def map_network():
    """T's network in 2-D, (B, 2 + Z) -> (B, 2).  ReLU as published: a smooth one cannot tear P apart."""
    return nn.Sequential(nn.Linear(2 + Z, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))


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
    z = torch.randn(len(x), Z, *x.shape[2:], generator=generator, device=generator.device if generator else device)
    return (x + T(torch.cat([x, z.to(device)], 1))).unflatten(0, (-1, copies))


def cost_of(x, y):
    """C(x, T(x,.)), mean over x, its variance unbiased: (B, ...), (B, copies, ...) -> 0-dim."""
    variance = y.flatten(2).var(1).sum(1) if WEAK else 0.0
    return ((y - x[:, None]).square().flatten(2).sum(2).mean(1) / 2 - variance / 2).mean()


def noisy(y):
    return y + NOISE * torch.randn_like(y) if NOISE else y


def T_loss(T, f, x):
    y = transport(T, x)
    return cost_of(x, y) - f(noisy(y.flatten(0, 1))).mean()


def violation(f, y1, y2, t):
    """ReLU(psi(t y1 + (1-t) y2) - t psi(y1) - (1-t) psi(y2)), psi(y) = |y|^2/2 - f(y): (B, ...) twice, (B,) -> (B,)."""
    y = torch.cat([y2.lerp(y1, t.view(-1, *[1] * (y1.dim() - 1))), y1, y2])
    psi_between, psi1, psi2 = (y.square().flatten(1).sum(1) / 2 - f(y)).chunk(3)
    return F.relu(psi_between - t * psi1 - (1 - t) * psi2)


def f_loss(f, y_real, y_made):
    """-> loss, gap E_Q f - E_P E_z f(T)."""
    out = f(noisy(torch.cat([y_real, y_made])))
    gap = out[:len(y_real)].mean() - out[len(y_real):].mean()
    if not CONVEX:
        return -gap, gap
    pool = torch.cat([y_real, y_made])  # made ones too: psi must also be convex between Q and where T still is
    rows = torch.randperm(len(pool), device=pool.device)[:2 * min(BATCH, len(pool) // 2)]
    y1, y2 = pool[rows].chunk(2)
    noise = noisy(torch.zeros_like(y1))  # one for y1 and y2: the term linear in y that it adds to psi violates nothing
    t = torch.rand(len(y1), device=pool.device)
    return -gap + CONVEX * violation(f, y1 + noise, y2 + noise, t).mean(), gap


def descend(opt, loss):
    """One Adam step on opt's own parameters; those of the other network get no gradient."""
    opt.zero_grad()
    # not autograd.grad: fused Adam takes for granted that gradients have the weights' strides, and its need not
    loss.backward(inputs=opt.param_groups[0]["params"])
    opt.step()


def inverse(f, y):
    """grad psi(y) = y - grad f(y): (B, ...) -> (B, ...)."""
    y = y.detach().requires_grad_(True)
    with torch.enable_grad():
        grads = [torch.autograd.grad(f(noisy(y)).sum(), y)[0] for _ in range(N_GRADS)]
    return (y - sum(grads) / N_GRADS).detach()


# ---------------------------------------------------------------------------------------------- scores

def w2(a, b):
    """Exact W2^2 between two samples of one size (POT)."""
    return ot.emd2([], [], ot.dist(a.double().cpu().numpy(), b.double().cpu().numpy()), numItermax=10 ** 6)


def mean_square(a, b):
    return (a - b).square().flatten(1).sum(1).mean().item()


def discrete(x, ys):
    """POT's plans from x to two samples ys: -> the means of y at each x [(n, 2)], and mean |m - m'|^2 of these two."""
    means = []
    for y in ys:
        a, b = x.double().numpy(), y.double().numpy()
        plan = (ot.weak_optimal_transport(a, b, numItermax=WEAK_STEPS) if WEAK else
                ot.emd([], [], ot.dist(a, b), numItermax=10 ** 6))
        means.append((len(x) * torch.from_numpy(plan) @ y.double()).float())
    return means, mean_square(*means)


def error_ratio(y, means, floor):
    """Mean squared error of y against two discrete solutions, mean, over that between them."""
    return sum(mean_square(y, m) for m in means) / 2 / floor


def mean_map(x):
    """E_z T(x,z), the same z at every call: (n, ...) -> (n, ...)."""
    generator = torch.Generator().manual_seed(REFERENCE_SEED)
    parts = x.split(100 if WEAK else 1000)
    return torch.cat([transport(T_avg, part, TEST_Z if WEAK else 1, generator).mean(1) for part in parts])


def convexity(pool, n):
    """Mean violation, in units of the cost, and share of violated pairs among n random pairs of held-out targets."""
    y1, y2 = (pool[torch.randint(len(pool), (n,), generator=test_generator)].to(device) for _ in range(2))
    noise = noisy(torch.zeros_like(y1))
    v = violation(f_avg, y1 + noise, y2 + noise, torch.rand(n, generator=test_generator).to(device))
    return {"jensen": v.mean().item(), "violated": (v > 0).float().mean().item()}


# ---------------------------------------------------------------------------------------------- training

T, T_avg = (UNet() if DIGITS else map_network() for _ in range(2))
f, f_avg = (common.ResNet(32, 3, F_WIDTH, 0, SCALE) if DIGITS else common.MLP(2, WIDTH, 2, SCALE) for _ in range(2))
for net, trained in ((T, True), (T_avg, False), (f, True), (f_avg, False)):
    net.to(device, memory_format=torch.channels_last).requires_grad_(trained)
if not DIGITS:
    torch.randn(SOURCES, Z, device=device)  # unused: without it later random numbers, and so the weak results, change
    f.init_first_layer_at(targets, SHARPNESS)
T_avg.load_state_dict(T.state_dict())
f_avg.load_state_dict(f.state_dict())
opt_T, opt_f = (torch.optim.Adam(net.parameters(), lr=LR, betas=BETAS, fused=True) for net in (T, f))
params = sum(p.numel() for net in (T, f) for p in net.parameters())
if not DIGITS:
    p_fresh, q_fresh = ([law(REFERENCE_N, test_generator) for _ in range(2)] for law in (normal, target))
    test_x = p_fresh[0]
    map_means, map_floor = discrete(test_x, q_fresh)
    inv_reference = None if WEAK else discrete(q_fresh[0], p_fresh)
print(f"{DATA_SET}, cost {COST}, convex {CONVEX:g}: two networks of {params} parameters together, after "
      f"{time.perf_counter() - start_time:.0f} s for data and references")

parts = {"T": T, "f": f, "T_avg": T_avg, "f_avg": f_avg, "opt_T": opt_T, "opt_f": opt_f}
run = common.Run(args, name + ".pt", parts, STEPS, LOG_EVERY, CONSTANTS, "lower LR or take more T_STEPS")
for step in run.steps():
    for opt in (opt_T, opt_f):
        opt.param_groups[0]["lr"] = common.warm_cosine(LR, step, WARMUP, STEPS)
    for _ in range(T_STEPS):
        descend(opt_T, T_loss(T, f, batch(sources)))
    x, y_real = batch(sources), batch(targets)
    with torch.no_grad():
        y = transport(T, x)
    loss_f, gap = f_loss(f, y_real, y.flatten(0, 1))
    descend(opt_f, loss_f)
    common.update_ema(T_avg, T, EMA_DECAY, step)
    common.update_ema(f_avg, f, EMA_DECAY, step)
    if run.due():
        if DIGITS:
            truth = {"hue_err": digits.hue_error(x, y[:, 0]).median(), "off_colour": digits.off_colour(y[:, 0])}
        else:
            mapped = mean_map(test_x[:100].to(device)).cpu()
            truth = {"map_ratio": error_ratio(mapped, [m[:100] for m in map_means], map_floor)}
        run.log({"gap": 1e3 * SCALE, "y": 1e3, "max_param": 1e3}, gap=gap, convex=loss_f + gap, cost=cost_of(x, y),
                y=y.square().mean().sqrt(), real=y_real.square().mean().sqrt(), max_param=common.max_param(f, T),
                **truth)

# ---------------------------------------------------------------------------------------------- scores and figure

def draw_pairs(axis, x, y, what, n=300):
    axis.add_collection(LineCollection(torch.stack([x, y], 1)[:n].numpy(), colors="0.6", linewidths=0.4))
    axis.scatter(*x[:n].T, s=4, c="tab:blue", label="x")
    axis.scatter(*y[:n].T, s=4, c="tab:red", label="y")
    axis.legend(loc="upper right")
    axis.set(title=what, **limits)


title = f"Neural OT, {DATA_SET}, {COST} cost, convexity weight {CONVEX:g}, {run.step} steps, {run.seconds:.0f} s"
if DIGITS:
    y = torch.cat([transport(T_avg, part, TRANSLATIONS).clamp(-1, 1) for part in test_x.split(100)])
    scores = digits.digit_scores(test_x, y, test_real) | convexity(test_real.cpu(), 1000)
    digits.save_pairs(f"{name}_pairs.pt", test_x, y)
    rows = torch.linspace(0, len(test_x) - 1, SHOWN * (1 if WEAK else 4)).long()
    panels = [(torch.cat([test_x[:, None], y], 1)[rows].flatten(0, 1), 5 if WEAK else 8,
               "test sources, and right of each " + ("four translations" if WEAK else "its translation"))]
    if not WEAK:
        scores["round_trip"] = mean_square(test_x, inverse(f_avg, y[:, 0]))
        some = test_real[:2 * SHOWN]
        panels.append((torch.stack([some, inverse(f_avg, some)], 1).flatten(0, 1), 4,
                       "real test 3s, and right of\neach its inverse grad psi"))
    panels.append((test_real[-2 * SHOWN:], 2, "real test 3s"))
    title += f"\ncost {scores['cost']:.0f} (exact {scores['ot_cost']:.0f}), hue error {scores['hue_err']:.1f} degrees"
    digits.save_panels(name + ".png", title, *panels)
else:
    x = test_x.to(device)
    mapped = mean_map(x)
    pushed = transport(T_avg, x, 1, test_generator)[:, 0].cpu()
    marg_ratio = sum(w2(pushed, q) for q in q_fresh) / 2 / w2(*q_fresh)
    scores = {"map_ratio": error_ratio(mapped.cpu(), map_means, map_floor), "map_floor": map_floor,
              "marg_ratio": marg_ratio, **convexity(torch.cat(q_fresh), 4000)}
    if not WEAK:
        back = [inverse(f_avg, q.to(device)).cpu() for q in q_fresh]
        returned = (x - inverse(f_avg, mapped)).square().sum(1)
        scores |= {"round_trip": returned.mean().item(), "round_trip_median": returned.median().item(),
                   "inv_ratio": error_ratio(back[0], *inv_reference),
                   "inv_marg_ratio": sum(map(w2, back, p_fresh)) / 2 / w2(*p_fresh)}
    fig, axes = plt.subplots(2, 3, figsize=(13, 8.4), layout="constrained")
    limits = dict(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    hue = torch.atan2(test_x[:, 1], test_x[:, 0])
    axes[0, 1].scatter(*q_fresh[0].T, s=3, c="0.7")
    for axis, points, what in ((axes[0, 0], test_x, "source x ~ P (colour: angle)"),
                               (axes[0, 1], pushed, f"transport of the same x (marg_ratio {marg_ratio:.2f})")):
        axis.scatter(*points.T, s=3, c=hue, cmap="hsv")
        axis.set(title=what, **limits)
    draw_pairs(axes[0, 2], test_x, mapped.cpu(), f"x to {'E ' * WEAK}T (map_ratio {scores['map_ratio']:.2f})")
    draw_pairs(axes[1, 2], test_x, map_means[0], f"discrete OT, n = {REFERENCE_N}, of the same x" + ": E[y | x]" * WEAK)
    draw_pairs(axes[1, 0], *((test_x, pushed, "x to T(x, z), one z each") if WEAK else
                             (back[0], q_fresh[0], f"y to grad $\\psi(y)$ (round_trip {scores['round_trip']:.3f})")))
    ticks = torch.linspace(-3, 3, 200)
    points = torch.cartesian_prod(ticks, ticks)
    psi = (points.square().sum(1) / 2 - f_avg(points.to(device)).cpu()).view(200, 200)
    picture = axes[1, 1].contourf(ticks, ticks, (psi - psi.min()).sqrt().T, 30, cmap="magma")
    fig.colorbar(picture, ax=axes[1, 1], shrink=0.85)
    axes[1, 1].scatter(*q_fresh[0][:500].T, s=1, c="w")
    axes[1, 1].set(title=f"root of $\\psi$ ({100 * scores['violated']:.1f} % of pairs violate convexity)", **limits)
    fig.suptitle(title)
    common.save_figure(fig, name + ".png")
print(f"wrote {name}.png, {f'{name}_pairs.pt, ' * DIGITS}{name}.pt; data set {DATA_SET}, cost {COST}")
print(f"final convex {CONVEX:g} " + " ".join(f"{k} {v:.4g}" for k, v in scores.items()) +
      f" params {params} steps {run.step} train_s {run.seconds:.1f} total_s {time.perf_counter() - start_time:.1f}")
