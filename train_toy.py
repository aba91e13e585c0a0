"""Gaussian -> swiss roll in 2-D by energy-guided entropic OT, cost |x-y|^2/2, scored against discrete OT.

    pi_f(y|x) = exp((f(y) - |x-y|^2/2) / eps) / Z(x)           sampled by Langevin with Metropolis, and by jumps
    ascend      E_Q f(y) - E_P E_{pi_f(.|x)} f(y)              Algorithm 1 of Mokrov et al., ICLR 2024

    python train_toy.py --eps 0.001      90 s on two CPU cores, 40 s of them training, 0.9 GiB; three minutes the first time,
                                         when the discrete references are solved (eps 0.1: two minutes, 1.4 GiB)
    python train_toy.py --smoke          the same path in seconds

Writes beside itself (or under --out) toy_eps0.001.pt, which --resume carries on from, and the figure toy_eps0.001.png;
the discrete references it is scored against are kept beside it as toy_reference_eps0.001.npz.

The scores, each an error of the learned plan over that of a second discrete solve on 4 000 fresh samples (the floor):
    cond_ratio      sliced W2^2 of pi(.|x), mean over 64 test x, the learned one taken exactly from f on a grid
    cond_ratio_all  the same over 256 test x: errors sit at the few x near a discontinuity, and 64 can miss them
    sampled_ratio   the same by samples, the sampler's in ROUNDS jumps and Langevin steps from y = x against the reference's
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
STEPS = 2000             # Adam steps; a tenth of them is within a few per cent of the scores
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
EXPLORE, WIDE = 64, 0.3   # jumps also to this many source samples, this widely: no mass of f where Q has none goes unseen
STRATIFIED = True        # batches spread evenly over source and target: five times less noise in the levels
RESTART = 0.0            # share of a batch restarted from N(0, I) per step; jumps thaw frozen chains without the bias of it
ROUNDS = 20              # of one Langevin step and one jump: the sampler's run from y = x at test time
REFERENCE_N, REFERENCE_SEED = 4000, 0
SCORED_X, TEST_Y, DIRECTIONS = 64, 1000, 50  # test sources, samples of each conditional, projections
TEST_X = 256             # sources of cond_ratio_all: few near the plan's discontinuities carry most of any error, 64 can miss them
MARGINAL_N = 2000        # samples for the marginal score
if args.smoke:
    STEPS, BATCH, TARGETS, CHAINS, TARGET_SET, WIDTH = 30, 32, 64, 256, 1024, 32
    REFERENCE_N, TEST_X, DIRECTIONS, SCORED_X, TEST_Y, MARGINAL_N, ROUNDS = 200, 16, 8, 8, 64, 100, 5
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
                                               warmstart=warm and tuple(w - shift for w in warm), print_period=100 if steps > 100 else 50, log=True, warn=False)
    return log["alpha"] + shift, log["beta"] + shift, (plan.sum(0) - weight).abs().sum().item()


def solve_reference(seed):
    """Discrete EOT between REFERENCE_N fresh samples each of P and Q: -> targets y (n, 2), potential g (n,) float64.

    eps is halved down from 1, on a quarter of the samples while it is coarse: there a step costs a sixteenth."""
    generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
    x, y = source(REFERENCE_N, generator).double(), target(REFERENCE_N, generator).double()
    few, warm = REFERENCE_N // 4, None
    for halving in range(math.ceil(-math.log2(min(EPS, 1.0))) + 1):
        eps = max(EPS, 0.5 ** halving)
        n = few if eps > 8 * EPS else REFERENCE_N
        if warm and len(warm[0]) < n:
            a = soft_transform(warm[1], x, y[:few], eps)
            warm = a, soft_transform(a, y, x, eps)
        a, b, error = sinkhorn(x[:n], y[:n], eps, 100 if eps > EPS else 1500, warm)
        warm = a, b
    print(f"reference {seed}: {REFERENCE_N} samples, marginal error {error:.1e} (L1), {time.perf_counter() - start:.0f} s", flush=True)
    if not error < 0.01:
        print(f"warning: the discrete solve has not converged at eps {EPS:g}; its scores mean little", flush=True)
    return y, b


def load_references():
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


def bary_ratio(points, n=TEST_X):
    """Squared error of E[y|x], mean over the first n test x and both references, over that between the references."""
    mean = conditional(test_x[:n], points, potential_on(points)) @ points.double()
    error = sum((mean - m[:n]).square().sum() for m in reference_means) / 2
    return (error / (reference_means[0] - reference_means[1])[:n].square().sum()).item()


def sample(f, x, rounds, block):
    """The sampler at test time: chains from y = x.  Those of a block share the proposals of their jumps, so that their
    y are not independent: a small block for a faithful marginal, a large one for speed where x repeats across blocks."""
    out = []
    for x in x.to(device).split(block):
        y = x
        for _ in range(rounds):
            if JUMP:
                y, _ = common.jump(f, x, y, centres(target_batch()), widths, EPS)
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
start = torch.randn_like(sources) if RESTART else sources  # y = x is nearest the plan at small eps
bank = common.Bank(sources, start).to(device)
eta = torch.tensor(ETA, device=device)
widths = torch.tensor([SIGMA] * TARGETS + [WIDE] * EXPLORE, device=device)  # of the jumps


def target_batch():
    return target_set[common.stratified_rows(TARGET_SET, TARGETS, device)]


def centres(y_pos):
    return torch.cat([y_pos, bank.x[bank.rows(EXPLORE)]])


def move(f, x, y):
    """N_LANGEVIN Langevin steps -> y, its log_p where at hand, accepted fraction."""
    if METROPOLIS:
        return common.mala(f, x, y, EPS, eta, N_LANGEVIN)
    return common.langevin(f, x, y, EPS, eta, N_LANGEVIN), None, torch.ones((), device=device)


references = load_references()
weights = [conditional(test_x, y, g) for y, g in references]
reference_means = [w @ y for w, (y, _) in zip(weights, references)]
coarse, _ = grid(min(max(0.8 * math.sqrt(EPS), 0.008), 0.05))

parts = {"f": f, "f_avg": f_avg, "opt": opt, "bank": bank}
jumped = torch.zeros((), device=device)
state = common.begin(checkpoint, parts, CONSTANTS, args.resume)
if args.resume:
    eta.copy_(state["eta"])
step, progress = state["step"], common.Progress(STEPS, state["step"], state["seconds"], device)


def save():
    common.save(checkpoint, parts, step=step, seconds=progress.seconds, eta=eta.cpu(), constants=CONSTANTS, code=open(__file__, encoding="utf-8").read())


save()  # a full disk or a folder without permission shows now, not in an hour
stop.armed, last = True, step == STEPS
while not last:
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
        y_neg, jumped = common.jump(f, x, y_neg, centres(y_pos), widths, EPS, log_p)
    bank.y[rows] = y_neg
    gap = common.train_step(f, opt, y_pos, y_neg)
    common.average_weights(f_avg, f, AVERAGE, step)

    last, due = step == STEPS or bool(stop), progress.save_due()  # asked once: nothing is saved unchecked
    if due or last or step % LOG_EVERY == 0:
        largest = torch.cat([p.detach().flatten() for p in f.parameters()]).abs().max()
        now = dict(zip(("gap", "y", "eta", "accept", "jump", "weight"),
                       torch.stack([gap, y_neg.norm(dim=1).mean(), eta, accepted, jumped, largest]).tolist()))  # the only sync
        common.stop_if_diverged(1e3, gap=now["gap"] / SCALE, y=now["y"], weight=now.pop("weight"))
        progress.line(step, **now, bary_ratio=bary_ratio(coarse, SCORED_X))
    if due:
        save()
train_s = progress.seconds
save()

# ---------------------------------------------------------------------------------------------- scores and figure

fine, sides = grid(min(max(math.sqrt(EPS) / 2, 0.004), 0.02))
f_fine = potential_on(fine)
learned = torch.cat([quantiles(fine, conditional(x, fine, f_fine)) for x in test_x.split(16)])
exact = [quantiles(y, w) for (y, _), w in zip(references, weights)]


def cond(n):
    """Sliced W2^2 of the learned conditionals to both references', mean, and that between them, over the first n test x."""
    return sum(sliced(learned[:n], q[:n]) for q in exact) / 2, sliced(exact[0][:n], exact[1][:n])


(cond_w2, cond_floor), (all_w2, all_floor) = cond(SCORED_X), cond(TEST_X)

clouds = [sorted_projections(draw(y, w[:SCORED_X], TEST_Y)) for (y, _), w in zip(references, weights)]
chains = sample(f_avg, test_x[:SCORED_X].repeat(TEST_Y, 1), ROUNDS, 4 * TARGETS).view(TEST_Y, SCORED_X, 2).transpose(0, 1)
sampled_floor = sliced(*clouds)
sampled_w2 = sum(sliced(sorted_projections(chains), c) for c in clouds) / 2


def w2(a, b):
    """Exact W2^2 between two samples of one size (POT)."""
    return ot.emd2([], [], ot.dist(a.double().numpy(), b.double().numpy()), numItermax=10 ** 6)


marginal_x = source(MARGINAL_N, test_generator)
pushed, *fresh = sample(f_avg, marginal_x, ROUNDS, TARGETS // 4), target(MARGINAL_N, test_generator), target(MARGINAL_N, test_generator)
marg_ratio = (w2(pushed, fresh[0]) + w2(pushed, fresh[1])) / 2 / w2(*fresh)

angle = torch.atan2(test_x[:SCORED_X, 1], test_x[:SCORED_X, 0])
shown = angle.argsort()[SCORED_X // 12::SCORED_X // 6][:6]  # all around
fig, axes = plt.subplots(2, 3, figsize=(13, 8.4), layout="constrained")
limits = dict(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
hue = torch.atan2(marginal_x[:, 1], marginal_x[:, 0])
axes[0, 0].scatter(*marginal_x.T, s=3, c=hue, cmap="hsv")
axes[0, 0].set(title="source x ~ P (colour: angle)", **limits)
axes[0, 1].scatter(*fresh[0].T, s=3, c="0.7", label="target Q")
axes[0, 1].scatter(*pushed.T, s=3, c=hue, cmap="hsv", label="y ~ $\\pi_f(y|x)$")
axes[0, 1].set(title=f"learned transport of the same x (marg_ratio {marg_ratio:.2f})", **limits)
for x, y in zip(marginal_x[:300], pushed[:300]):
    axes[0, 2].plot(*torch.stack([x, y]).T, c="0.6", lw=0.4)
axes[0, 2].scatter(*marginal_x[:300].T, s=4, c="tab:blue", label="x")
axes[0, 2].scatter(*pushed[:300].T, s=4, c="tab:red", label="y")
axes[0, 2].legend(loc="upper right")
axes[0, 2].set(title="300 pairs of the learned plan", **limits)
reference_clouds = draw(references[0][0], weights[0][shown], 400)
for axis, per_x, title in ((axes[1, 0], chains[shown, :400], f"learned plan, sampled (cond_ratio {cond_w2 / cond_floor:.2f})"),
                           (axes[1, 1], reference_clouds, f"discrete plan, n = {REFERENCE_N}, the same x")):
    axis.scatter(*fresh[0].T, s=2, c="0.88")
    for k in range(len(per_x)):
        axis.scatter(*per_x[k].T, s=3, c=f"C{k}")
        axis.scatter(*test_x[shown[k]], s=110, c=f"C{k}", marker="*", edgecolors="k")
    axis.set(title=title, **limits)
picture = axes[1, 2].imshow(f_fine.view(sides).T, origin="lower", extent=(fine[0, 0], fine[-1, 0], fine[0, 1], fine[-1, 1]), cmap="magma", vmin=f_fine.sort().values[len(f_fine) // 5])
fig.colorbar(picture, ax=axes[1, 2], shrink=0.85, extend="min")
axes[1, 2].set(title="learned potential f", **limits)
fig.suptitle(f"Gaussian to swiss roll, eps = {EPS:g}, {step} steps, {train_s:.0f} s")
common.draw(fig, figure)
print(f"wrote {figure} and {checkpoint}")

per_step = f.flops * (2 * BATCH * (N_LANGEVIN + METROPOLIS) + (TARGETS + EXPLORE) * JUMP + 3 * (TARGETS + BATCH))
rate, busy = common.matmul_rate(device), per_step * step / max(train_s, 1e-9)
print(f"network arithmetic {per_step / 1e9:.2f} GFLOP a step, {busy / 1e9:.0f} GFLOP/s: {100 * busy / rate:.0f} % of the {rate / 1e9:.0f} GFLOP/s "
      f"of a float32 matrix product here")
print(f"final eps {EPS:g} cond_w2 {cond_w2:.3g} cond_floor {cond_floor:.3g} cond_ratio {cond_w2 / cond_floor:.3f} sampled_ratio {sampled_w2 / sampled_floor:.3f} "
      f"bary_ratio {bary_ratio(fine, SCORED_X):.3f} marg_ratio {marg_ratio:.3f} cond_ratio_all {all_w2 / all_floor:.3f} train_s {train_s:.1f} total_s {time.perf_counter() - begun:.1f}")
