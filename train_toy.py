"""Gaussian -> swiss roll in 2-D by energy-guided entropic OT, cost |x-y|^2/2, scored against discrete OT.

    pi_f(y|x) = exp((f(y) - |x-y|^2/2) / eps) / Z(x)           sampled by Langevin with Metropolis, and by jumps
    ascend      E_Q f(y) - E_P E_{pi_f(.|x)} f(y)              Algorithm 1 of Mokrov et al., ICLR 2024

    python train_toy.py --eps 0.001      COST_LINE
    python train_toy.py --smoke          the same path in seconds

Writes beside itself (or under --out) toy_eps0.001.pt, which --resume carries on from, and the figure toy_eps0.001.png;
the discrete references it is scored against are kept beside it as toy_reference_eps0.001.npz.

The scores, each an error of the learned plan over that of a second discrete solve on 4 000 fresh samples (the floor):
    cond_ratio      sliced W2^2 of pi(.|x), mean over test x, the learned one taken exactly from f on a grid
    sampled_ratio   the same, samples delivered by the sampler in 2 ROUNDS steps from y = x against samples of the reference
    bary_ratio      squared error of E[y|x], from the grid
    marg_ratio      W2^2 of transported sources to Q, over that of two samples of Q
The learned plan is compared with both references and averaged: one alone is right or wrong by a factor of two by luck.
"""
import math
import os
import time

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import ot
import torch

import common

args = common.arguments(__doc__, __file__, eps=0.1)
stop = common.Stop()
torch.set_flush_denormal(True)  # CPU matrix products crawl on the denormals of far-away Gaussian weights

# ---------------------------------------------------------------------------------------------- constants
EPS = args.eps
SEED = args.seed
STEPS = 3400             # Adam steps; the quality still grows with more
BATCH = 256              # chains moved per step
TARGETS = 512            # target samples per step: the positives, and the centres of the jumps
CHAINS = 2 ** 15         # bank of persistent chains, one source each; its finite size is an error of a sample that large
TARGET_SET = 2 ** 17     # target samples to draw from
WIDTH, DEPTH = 256, 3    # three hidden layers reach in 1 000 steps what two need 2 000 for
SHARPNESS = 3.0          # 1/width of the first layer's ramps at the start; the roll's own thickness is 1/16
SCALE = 5.0 * max(1.0, EPS)  # f = SCALE * net: f is of the order of the cost, beyond eps 1 of eps times the log-density of Q
LR, BETAS = 3e-3, (0.9, 0.99)  # of Adam; falls to 0 by a cosine, else the quality swings tenfold between checkpoints
LR_FALLS = True
WARMUP = 100             # steps
AVERAGE = 0.998          # of the weights, per step
N_LANGEVIN = 1           # Langevin steps of a chain per training step; jumps do the mixing
ETA = EPS / 20           # first Langevin step
METROPOLIS = True        # accept/reject, with the step then led to ACCEPT
ACCEPT = 0.75
JUMP = True              # without it the levels of f on separate arms drift: Langevin never crosses between them
SIGMA = min(max(math.sqrt(EPS), 0.02), 0.06)  # of the jumps: the narrower of the plan and the roll's thickness
STRATIFIED = True        # batches spread evenly over source and target: five times less noise in the levels
RESTART = 0.0            # share of a batch restarted from N(0, I) per step; jumps thaw frozen chains without the bias of it
ROUNDS = 30              # of one Langevin step and one jump: the sampler's run from y = x at test time
REFERENCE_N, REFERENCE_SEED = 4000, 0
TEST_X, TEST_Y, DIRECTIONS = 128, 1000, 50  # test sources, samples of each conditional, projections
MARGINAL_N = 2000        # samples for the marginal score
if args.smoke:
    STEPS, BATCH, TARGETS, CHAINS, TARGET_SET, WIDTH = 30, 32, 64, 256, 1024, 32
    REFERENCE_N, TEST_X, TEST_Y, DIRECTIONS, MARGINAL_N, ROUNDS = 200, 8, 64, 8, 100, 5
LOG_EVERY = max(1, STEPS // 15)
CONSTANTS = common.constants_of(globals())

device = args.device
name = f"toy_eps{EPS:g}" + "_smoke" * args.smoke
checkpoint, figure = (os.path.join(args.out, name + end) for end in (".pt", ".png"))
begun = time.perf_counter()


# ---------------------------------------------------------------------------------------------- data

def source(n, generator=None):
    """P = N(0, I): (n, 2)."""
    return torch.randn(n, 2, generator=generator)


def target(n, generator=None):
    """Q, the swiss roll's plane (0, 2) with noise 0.5, divided by 8: (n, 2)."""
    t = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=generator))
    return (torch.stack([t * t.cos(), t * t.sin()], 1) + 0.5 * torch.randn(n, 2, generator=generator)) / 8


# ---------------------------------------------------------------------------------------------- discrete references

def soft_transform(potential, here, there, eps):
    """-eps log mean_j exp((potential_j - |here_i - there_j|^2/2) / eps): (n,), (m, 2), (n, 2) -> (m,)."""
    rows = [torch.logsumexp((potential - torch.cdist(h, there).square() / 2) / eps, 1) for h in here.split(500)]
    return -eps * (torch.cat(rows) - math.log(len(there)))


def sinkhorn(x, y, eps, steps, warm=None):
    """POT's stabilised Sinkhorn to a marginal error of 1e-4 or `steps`: -> potentials (n,), (n,), relative to uniform
    weights, and the marginal error, L1.  tau far above POT's default, which is below n: from a warm start it would
    rebuild the whole kernel at every step.  Float64 tensors, because numpy's exp and products crawl on denormals."""
    weight = torch.full((len(x),), 1 / len(x), dtype=torch.float64)
    cost = torch.cdist(x, y).square() / 2
    shift = eps * math.log(len(x))  # POT's potentials carry the weights, ours do not
    plan, log = ot.bregman.sinkhorn_stabilized(weight, weight, cost, eps, numItermax=steps, tau=1e9, stopThr=1e-4 / len(x) ** 0.5,
                                               warmstart=warm and tuple(w - shift for w in warm), print_period=50, log=True, warn=False)
    return log["alpha"] + shift, log["beta"] + shift, (plan.sum(0) - weight).abs().sum().item()


def solve_reference(seed):
    """Discrete EOT between REFERENCE_N fresh samples each of P and Q: -> targets y (n, 2), potential g (n,) float64.

    eps is halved down from 1 on a quarter of the samples, where a step costs a sixteenth, then extended to all."""
    generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
    x, y = source(REFERENCE_N, generator).double(), target(REFERENCE_N, generator).double()
    few, warm = REFERENCE_N // 4, None
    for halving in range(math.ceil(-math.log2(min(EPS, 1.0))) + 1):
        eps = max(EPS, 0.5 ** halving)
        a, b, _ = sinkhorn(x[:few], y[:few], eps, 100 if eps > EPS else 400, warm)
        warm = a, b
    a = soft_transform(b, x, y[:few], EPS)
    a, b, error = sinkhorn(x, y, EPS, 1500, (a, soft_transform(a, y, x, EPS)))
    print(f"reference {seed}: {REFERENCE_N} samples, marginal error {error:.1e} (L1), {time.perf_counter() - start:.0f} s", flush=True)
    if not error < 0.01:
        print(f"warning: the discrete solve has not converged at eps {EPS:g}; its scores mean little", flush=True)
    return y, b


def references():
    """The two solves, from the file kept beside the script if it is there and of this size and seed."""
    folder = args.out if args.smoke else os.path.dirname(os.path.abspath(__file__))
    path = os.path.join(folder, f"toy_reference_eps{EPS:g}{'_smoke' * args.smoke}.npz")
    made_with = np.array([REFERENCE_N, REFERENCE_SEED, EPS])
    try:
        with np.load(path) as kept:
            if np.array_equal(kept["made_with"], made_with):
                return [(torch.from_numpy(kept[f"y{k}"]), torch.from_numpy(kept[f"g{k}"])) for k in (0, 1)]
        print(f"{path} has another size or seed: solving again", flush=True)
    except FileNotFoundError:
        print(f"solving two discrete references at eps {EPS:g} (once; kept as {path})", flush=True)
    except Exception:
        print(f"{path} cannot be read: solving again", flush=True)
    solved = [solve_reference(REFERENCE_SEED + k) for k in (0, 1)]
    try:
        with open(path + ".tmp", "wb") as file:
            np.savez(file, made_with=made_with, **{f"y{k}": y for k, (y, _) in enumerate(solved)}, **{f"g{k}": g for k, (_, g) in enumerate(solved)})
        os.replace(path + ".tmp", path)
    except OSError as error:
        common.fail(f"cannot write {path} ({error.strerror}): free some space, or copy the script and common.py to a folder you can write to")
    return solved


# ---------------------------------------------------------------------------------------------- scores

test_generator = torch.Generator().manual_seed(REFERENCE_SEED + 2)
test_x = source(TEST_X, test_generator)
angles = math.pi * torch.arange(DIRECTIONS) / DIRECTIONS
directions = torch.stack([angles.cos(), angles.sin()])  # (2, DIRECTIONS)
levels = (torch.arange(TEST_Y) + 0.5) / TEST_Y


def conditional(x, points, potential):
    """Weights of exp((potential - |x - point|^2/2) / EPS) at every x: (T, 2), (P, 2), (P,) -> (T, P), rows sum to 1."""
    x, points = x.double(), points.double()
    return ((x @ points.T - points.square().sum(1) / 2 + potential.double()) / EPS).softmax(1)


def quantiles(points, weights):
    """Projections' quantiles of T weighted clouds on the same points: (P, 2), (T, P) -> (T, TEST_Y, DIRECTIONS)."""
    columns = []
    for u in directions.T:
        value, order = (points.float() @ u).sort()
        cdf = weights[:, order].cumsum(1)
        index = torch.searchsorted(cdf, (levels * cdf[:, -1:]).to(cdf.dtype).contiguous()).clamp_(max=len(value) - 1)
        columns.append(value[index])
    return torch.stack(columns, 2)


def draw(points, weights, n):
    """n samples of each of T weighted clouds: (P, 2), (T, P) -> (T, n, 2)."""
    return points.float()[torch.multinomial(weights, n, replacement=True, generator=test_generator)]


def sliced(a, b):
    """Mean sliced W2^2 of T pairs of clouds, given their projections' quantiles (T, L, DIRECTIONS)."""
    return (a - b).square().mean().item()


def sorted_projections(samples):
    return (samples @ directions).sort(1).values


def grid(spacing):
    """(points (P, 2), side): squares of `spacing` over the target's bounding box."""
    low, high = target_set.amin(0).cpu() - 0.1, target_set.amax(0).cpu() + 0.1
    sides = [torch.arange(a, b, spacing) for a, b in zip(low.tolist(), high.tolist())]
    return torch.cartesian_prod(*sides), [len(s) for s in sides]


@torch.no_grad()
def potential_on(points):
    return torch.cat([f_avg(p.to(device)).cpu() for p in points.split(20_000)])


def bary_error(points):
    """Squared error of E[y|x] against both references, mean."""
    mean = conditional(test_x, points, potential_on(points)) @ points.double()
    return sum((mean - m).square().sum(1).mean().item() for m in reference_means) / 2


def sample(f, x, rounds):
    """The sampler at test time: chains from y = x, each block of them with target samples of its own to jump to."""
    out = []
    for x in x.to(device).split(4 * TARGETS):
        y = x
        for _ in range(rounds):
            if JUMP:
                y, _ = common.jump(f, x, y, target_batch(), SIGMA, EPS)
            y = move(f, x, y)[0]
        out.append(y.cpu())
    return torch.cat(out)


# ---------------------------------------------------------------------------------------------- training

target_set = target(TARGET_SET)
sources = source(CHAINS)
if STRATIFIED:
    target_set, sources = common.kd_order(target_set), common.kd_order(sources)
target_set = target_set.to(device)
f = common.MLP(2, WIDTH, DEPTH, SCALE).to(device)
f.place(target_set, SHARPNESS)
f_avg = common.MLP(2, WIDTH, DEPTH, SCALE).to(device)
f_avg.load_state_dict(f.state_dict())
opt = torch.optim.Adam(f.parameters(), lr=LR, betas=BETAS, fused=True)
bank = common.Bank(sources, sources).to(device)  # y = x: the start that is nearest the plan at small eps
eta = torch.tensor(ETA, device=device)


def target_batch():
    return target_set[common.stratified_rows(TARGET_SET, TARGETS, device)]


def move(f, x, y):
    """N_LANGEVIN Langevin steps -> y, its log_p where at hand, accepted fraction."""
    if METROPOLIS:
        return common.mala(f, x, y, EPS, eta, N_LANGEVIN)
    return common.langevin(f, x, y, EPS, eta, N_LANGEVIN), None, torch.ones((), device=device)


references = references()
(y0, g0), (y1, g1) = references
weights = [conditional(test_x, y, g) for y, g in references]
reference_means = [w @ y for w, (y, _) in zip(weights, references)]
bary_floor = (reference_means[0] - reference_means[1]).square().sum(1).mean().item()
coarse, _ = grid(min(0.05, 0.8 * math.sqrt(EPS)) if EPS > 1e-4 else 0.01)

parts = {"f": f, "f_avg": f_avg, "opt": opt, "bank": bank}
step, seconds = 0, 0.0
if args.resume:
    state = common.load(checkpoint, parts, CONSTANTS)
    step, seconds = state["step"], state["seconds"]
    eta.copy_(state["eta"])
else:
    common.keep_old(checkpoint)
progress = common.Progress(STEPS, step, seconds, device)


def save():
    common.save(checkpoint, parts, step=step, seconds=progress.seconds, eta=eta.cpu(), constants=CONSTANTS, code=open(__file__).read())


save()  # a full disk or a folder without permission shows now, not in an hour
stop.armed = True
while step < STEPS and not stop:
    step += 1
    lr = LR * min(1.0, step / WARMUP) * (0.5 * (1 + math.cos(math.pi * step / STEPS)) if LR_FALLS else 1.0)
    for group in opt.param_groups:
        group["lr"] = lr
    rows = bank.rows(BATCH)
    x, y = bank.x[rows], bank.y[rows]
    if RESTART:
        y = torch.where(torch.rand(BATCH, 1, device=device) < RESTART, torch.randn_like(y), y)
    y_pos = target_batch()

    y_neg, log_p, accepted = move(f, x, y)
    if METROPOLIS:
        eta *= torch.exp(0.03 * (accepted - ACCEPT))
    if JUMP:
        y_neg, jumped = common.jump(f, x, y_neg, y_pos, SIGMA, EPS, log_p)
    bank.y[rows] = y_neg
    gap = common.train_step(f, opt, y_pos, y_neg)
    common.average_weights(f_avg, f, AVERAGE, step)

    if step % LOG_EVERY == 0 or step == STEPS:
        size = y_neg.norm(dim=1).mean()
        gap_now, size_now, eta_now, accepted_now = torch.stack([gap, size, eta, accepted]).tolist()  # the only sync
        trouble = common.diverged(1e3, gap=gap_now / SCALE, mean_y=size_now)
        if trouble:
            common.fail(trouble)
        progress.line(step, gap=gap_now, y=size_now, bary_ratio=bary_error(coarse) / bary_floor, accept=accepted_now,
                      jump=jumped.item() if JUMP else 0.0, eta=eta_now)
    if progress.save_due():
        save()
train_s = progress.seconds
save()
