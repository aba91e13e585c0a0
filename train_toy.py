"""Gaussian -> swiss roll in 2-D by energy-guided entropic OT, cost |x-y|^2/2, scored against discrete OT.

    pi_f(y|x) = exp((f(y) - |x-y|^2/2) / eps) / Z(x)           sampled by Langevin with Metropolis, and by jumps
    ascend      E_Q f(y) - E_P E_{pi_f(.|x)} f(y)              Algorithm 1 of Mokrov et al., ICLR 2024

    python train_toy.py --eps 0.001      16 s on two CPU cores, 9 s of them training, 0.9 GiB; 85 s the first time,
                                         when the references are solved (eps 0.1: 34 s, 1.4 GiB)
    python train_toy.py --smoke          the same path in seconds

Writes beside itself (or under --out) toy_eps0.001_seed0.pt, which --resume carries on from, and the figure (.png).  The
discrete references are kept beside the script (where that is read-only, under --out) as train_toy_reference_*.npz.

The scores, each an error of the learned plan over that of a second discrete solve on 4 000 fresh samples (the floor):
    cond_ratio      sliced W2^2 of pi(.|x), mean over 64 test x, the learned one taken exactly from f on a grid
    cond_ratio_all  the same over 256 test x: errors sit at the few x near a discontinuity, and 64 can miss them
    sampled_ratio   the same by samples: a few jumps and Langevin steps from y = x, against the reference's
    bary_ratio      squared error of E[y|x], from the grid
    marg_ratio      W2^2 of transported sources to Q, over that of two samples of Q
The learned plan is compared with both references and averaged: one reference alone has a sampling error of about a
factor of two.
"""
import common  # first, so that Ctrl-C during the slow imports below ends without a traceback

import hashlib
import itertools
import math
import os
import time

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import ot
import torch
from matplotlib.collections import LineCollection

args = common.arguments(__doc__, __file__, eps=0.1)
device = args.device
start_time = time.perf_counter()

# ---------------------------------------------------------------------------------------------- constants
EPS = args.eps
SEED = args.seed
STEPS = 700              # Adam steps: from 500 on the scores stand still
BATCH = 256              # chains moved per step
TARGETS = 512            # target samples per step: the positives, and the centres of the jumps
CHAINS = 2 ** 15         # persistent chains, one source each: few would make P itself a small sample
TARGET_SET = 2 ** 17     # target samples to draw from
WIDTH, DEPTH = 256, 3    # three hidden layers reach in 1 000 steps what two need 2 000 for
SHARPNESS = 3.0          # 1/width of the first layer's ramps at the start; the roll's own thickness is 1/16
SCALE = 5.0 * max(1.0, EPS)  # f = SCALE * net: f is of the order of the cost, beyond eps 1 of eps log q
LR, BETAS = 3e-3, (0.9, 0.99)  # of Adam; falls to 0 by a cosine, else the quality swings tenfold between checkpoints
WARMUP = 100             # steps
EMA_DECAY = 0.998        # of the weights, per step
N_LANGEVIN = 1           # Langevin steps of a chain per training step; jumps do the mixing
ETA, ACCEPT = EPS / 20, 0.75  # first Langevin step, and the accepted fraction it is then led to
SIGMA = min(max(math.sqrt(EPS), 0.02), 0.06)  # of the jumps: the narrower of the plan and the roll's thickness
N_WIDE_PROPOSALS, SIGMA_WIDE = 64, 0.3  # wide jumps let chains find spurious modes of f outside the support of Q
SAMPLE_JUMPS, SAMPLE_LANGEVIN = 4, 2  # the sampler's run from y = x at test time: jumps, then Langevin steps
REFERENCE_N, REFERENCE_SEED = 4000, 0
SCORED_X, TEST_Y, DIRECTIONS = 64, 1000, 25  # test sources, samples of each conditional, projections
TEST_X = 256             # sources of cond_ratio_all
MARGINAL_N, MARGINAL_SETS = 1000, 3  # samples of a set, sets: one pair's distance varies by 40 % with the draw
if args.smoke:
    STEPS, BATCH, TARGETS, CHAINS, TARGET_SET, WIDTH, REFERENCE_N = 30, 32, 64, 256, 1024, 32, 200
    TEST_X, DIRECTIONS, SCORED_X, TEST_Y, MARGINAL_N = 16, 8, 8, 64, 100
LOG_EVERY = max(1, STEPS // 15)
CONSTANTS = common.constants_of(globals())

name = os.path.join(args.out, f"toy_eps{EPS:g}_seed{SEED}" + "_smoke" * args.smoke)


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
    weights, and the marginal error, L1.  Float64 tensors, because numpy's exp and products crawl on denormals.

    tau is far above POT's default, which is below n: from a warm start POT would rebuild the whole kernel each step."""
    weight = torch.full((len(x),), 1 / len(x), dtype=torch.float64)
    cost = torch.cdist(x, y).square() / 2
    shift = eps * math.log(len(x))  # POT's potentials carry the weights, ours do not
    plan, log = ot.bregman.sinkhorn_stabilized(
        weight, weight, cost, eps, numItermax=steps, tau=1e9, stopThr=1e-4 / len(x) ** 0.5, log=True, warn=False,
        warmstart=warm and tuple(w - shift for w in warm), print_period=100 if steps > 100 else 50)
    return log["alpha"] + shift, log["beta"] + shift, (plan.sum(0) - weight).abs().sum().item()


def solve_reference(x, y, seed):
    """Discrete EOT between samples x, y (n, 2): -> potential g (n,) float64 at the y.

    eps is halved down from 1, on a quarter of the samples while it is coarse: there a step costs a sixteenth."""
    start, few, warm = time.perf_counter(), len(x) // 4, None
    for halving in range(math.ceil(-math.log2(min(EPS, 1.0))) + 1):
        eps = max(EPS, 0.5 ** halving)
        n = few if eps > 8 * EPS else len(x)
        if warm and len(warm[0]) < n:
            a = soft_transform(warm[1], x, y[:few], eps)
            warm = a, soft_transform(a, y, x, eps)
        a, b, error = sinkhorn(x[:n], y[:n], eps, 100 if eps > EPS else 1500, warm)
        warm = a, b
    print(f"reference {seed}: {len(x)} samples, marginal error {error:.1e} (L1), {time.perf_counter() - start:.0f} s")
    if not error < 0.01:
        print(f"warning: the discrete solve has not converged at eps {EPS:g}; its scores mean little")
    return b


def reference(seed):
    """Targets y (n, 2) and potential g (n,), both float64, of a solve on fresh samples: kept in a file whose name holds
    a hash of those samples, so that a copy of this script with other data finds no stale one."""
    generator = torch.Generator().manual_seed(seed)
    x, y = source(REFERENCE_N, generator).double(), target(REFERENCE_N, generator).double()
    key = hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes() + repr(EPS).encode()).hexdigest()[:12]
    beside, script = os.path.split(os.path.abspath(__file__))
    file_name = f"{os.path.splitext(script)[0]}_reference_eps{EPS:g}_{key}{'_smoke' * args.smoke}.npz"
    for folder in (args.out,) if args.smoke else (beside, args.out):
        path = os.path.join(folder, file_name)
        try:
            with np.load(path) as kept:
                g = torch.from_numpy(kept["g"])
            if g.dtype == torch.float64 and g.shape == (len(y),) and g.isfinite().all():
                return y, g
            print(f"{path} is damaged: solving again")
        except FileNotFoundError:
            pass
        except Exception:  # numpy has one for each way to be damaged
            print(f"{path} cannot be read: solving again")
        problem = common.write_aside(path, lambda file: None)  # is there room, and permission?  Asked before solving
        if not problem:
            os.remove(path)
            break
    if problem:
        common.fail(f"{problem}: free some space, or name a folder you can write to with --out")
    print(f"solving a discrete reference at eps {EPS:g} (once; kept as {path})")
    g = solve_reference(x, y, seed)
    problem = common.write_aside(path, lambda file: np.savez(file, g=g.numpy()))
    if problem:
        print(f"warning: {problem}: this reference will be solved again")
    return y, g


# ---------------------------------------------------------------------------------------------- scores

test_generator = torch.Generator().manual_seed(REFERENCE_SEED + 2)
test_x = source(TEST_X, test_generator)
near_rows = torch.cat([rows[test_x[rows, 1].argsort()] for rows in test_x[:, 0].argsort().split(16)])  # of test_x
angles = math.pi * torch.arange(DIRECTIONS) / DIRECTIONS
directions = torch.stack([angles.cos(), angles.sin()])  # (2, DIRECTIONS)
quantile_levels = (torch.arange(TEST_Y) + 0.5) / TEST_Y


def conditional(x, points, potential):
    """Weights of exp((potential - |x - point|^2/2) / EPS) at every x: (T, 2), (P, 2), (P,) -> (T, P), rows sum to 1."""
    x, points = x.double(), points.double()
    return ((x @ points.T - points.square().sum(1) / 2 + potential.double()) / EPS).softmax(1)


def quantiles(points, potential):
    """Projections' quantiles of the conditionals of all test x: (P, 2), (P,) -> (TEST_X, TEST_Y, DIRECTIONS)."""
    out = torch.empty(TEST_X, TEST_Y, DIRECTIONS)
    for rows in near_rows.split(8):  # neighbours, whose conditionals leave out most points
        weights = conditional(test_x[rows], points, potential)
        seen = weights.amax(0) > 1e-7
        weights, seen_points = weights[:, seen], points[seen].float()
        for k, u in enumerate(directions.T):
            value, order = (seen_points @ u).sort()
            cdf = weights[:, order].cumsum(1)
            index = torch.searchsorted(cdf, (quantile_levels * cdf[:, -1:]).contiguous())
            out[rows, :, k] = value[index.clamp_(max=len(value) - 1)]
    return out


def sample_from(points, weights, n):
    """n samples of each of T weighted clouds: (P, 2), (T, P) -> (T, n, 2)."""
    return points.float()[torch.multinomial(weights, n, replacement=True, generator=test_generator)]


def sliced_w2(a, b):
    """Mean sliced W2^2 of T pairs of clouds, given their projections' quantiles (T, L, DIRECTIONS)."""
    return (a - b).square().mean().item()


def sorted_projections(samples):
    return (samples @ directions).sort(1).values


def w2(a, b):
    """Exact W2^2 between two samples of one size (POT)."""
    return ot.emd2([], [], ot.dist(a.double().numpy(), b.double().numpy()), numItermax=10 ** 6)


def grid(spacing):
    """Squares of `spacing` over the target's bounding box: points (P, 2), and how many along each axis."""
    low, high = target_set.amin(0).cpu() - 0.1, target_set.amax(0).cpu() + 0.1
    sides = [torch.arange(a, b, spacing) for a, b in zip(low.tolist(), high.tolist())]
    return torch.cartesian_prod(*sides), [len(s) for s in sides]


@torch.no_grad()
def potential_on(points):
    return torch.cat([f_avg(p.to(device)).cpu() for p in points.split(20_000)])


def bary_ratio(points, n):
    """Squared error of E[y|x], mean over the first n test x and both references, over that between the references."""
    mean = conditional(test_x[:n], points, potential_on(points)) @ points.double()
    error = sum((mean - m[:n]).square().sum() for m in reference_means) / 2
    return (error / (reference_means[0] - reference_means[1])[:n].square().sum()).item()


# ---------------------------------------------------------------------------------------------- the sampler

def target_batch():
    return target_set[common.stratified_rows(TARGET_SET, TARGETS, device)]


def jump(f, x, y, y_pos, log_p=None):
    """To one of many proposals around the target samples y_pos and, wide, around some sources -> y, moved fraction."""
    centres = torch.cat([y_pos, bank.x[common.stratified_rows(CHAINS, N_WIDE_PROPOSALS, device)]])
    return common.jump(f, x, y, centres, proposal_sigma, EPS, log_p)


def sample_plan(f, x, block):
    """y ~ pi_f(.|x), chains from y = x.  Those of a block share the proposals of their jumps, so their y are dependent:
    a small block gives a faithful marginal; a large one is fast, and right if an x has its copies in other blocks."""
    out = []
    for x_part in x.to(device).split(block):
        y = x_part
        for _ in range(SAMPLE_JUMPS):
            y, _ = jump(f, x_part, y, target_batch())
        y, _, _ = common.mala(f, x_part, y, EPS, bank.eta, SAMPLE_LANGEVIN)
        out.append(y.cpu())
    return torch.cat(out)


# ---------------------------------------------------------------------------------------------- training

target_set = common.kd_order(target(TARGET_SET)).to(device)  # batches spread over it evenly: less noise in f's levels
sources = common.kd_order(source(CHAINS))
f = common.MLP(2, WIDTH, DEPTH, SCALE).to(device)
f.init_first_layer_at(target_set, SHARPNESS)
f_avg = common.MLP(2, WIDTH, DEPTH, SCALE).to(device)
f_avg.load_state_dict(f.state_dict())
opt = torch.optim.Adam(f.parameters(), lr=LR, betas=BETAS, fused=True)
bank = common.Bank(sources, sources, eta=torch.tensor(ETA)).to(device)  # y = x is nearest the plan at small eps
proposal_sigma = torch.tensor([SIGMA] * TARGETS + [SIGMA_WIDE] * N_WIDE_PROPOSALS, device=device)

with common.in_turn():
    references = [reference(REFERENCE_SEED + k) for k in (0, 1)]
weights = [conditional(test_x, y, g) for y, g in references]
reference_means = [w @ y for w, (y, _) in zip(weights, references)]
coarse, _ = grid(min(max(0.8 * math.sqrt(EPS), 0.008), 0.05))

run = common.Run(args, name + ".pt", {"f": f, "f_avg": f_avg, "opt": opt, "bank": bank}, STEPS, LOG_EVERY, CONSTANTS)
for step in run.steps():
    opt.param_groups[0]["lr"] = common.warm_cosine(LR, step, WARMUP, STEPS)
    rows, y_pos = bank.rows(BATCH), target_batch()
    x = bank.x[rows]
    y, log_p, accepted = common.mala(f, x, bank.y[rows], EPS, bank.eta, N_LANGEVIN)
    bank.eta *= torch.exp(0.03 * (accepted.mean() - ACCEPT))
    bank.y[rows], jumped = jump(f, x, y, y_pos, log_p)
    gap = common.train_step(f, opt, y_pos, bank.y[rows])
    common.update_ema(f_avg, f, EMA_DECAY, step)
    if run.due():
        run.log({"gap": 1e3 * SCALE, "y": 1e3, "max_param": 1e3}, gap=gap, y=bank.y[rows].norm(dim=1).mean(),
                eta=bank.eta, accept=accepted.mean(), jump=jumped, max_param=common.max_param(f),
                bary_ratio=bary_ratio(coarse, SCORED_X))

# ---------------------------------------------------------------------------------------------- scores and figure

fine, sides = grid(min(max(math.sqrt(EPS) / 2, 0.004), 0.02))
f_fine = potential_on(fine)
learned, *exact = (quantiles(points, potential) for points, potential in ((fine, f_fine), *references))


def cond_w2_and_floor(n):
    """Sliced W2^2 of the learned conditionals to both references', mean, and between these, over the first n test x."""
    return sum(sliced_w2(learned[:n], q[:n]) for q in exact) / 2, sliced_w2(exact[0][:n], exact[1][:n])


(cond_w2, cond_floor), (all_w2, all_floor) = cond_w2_and_floor(SCORED_X), cond_w2_and_floor(TEST_X)

clouds = [sorted_projections(sample_from(y, w[:SCORED_X], TEST_Y)) for (y, _), w in zip(references, weights)]
chains = sample_plan(f_avg, test_x[:SCORED_X].repeat(TEST_Y, 1), 4 * TARGETS)
chains = chains.view(TEST_Y, SCORED_X, 2).transpose(0, 1)
sampled_ratio = sum(sliced_w2(sorted_projections(chains), c) for c in clouds) / 2 / sliced_w2(*clouds)

marginal_x = source(MARGINAL_SETS * MARGINAL_N, test_generator)
pushed = sample_plan(f_avg, marginal_x, TARGETS // 4)
fresh = target(MARGINAL_SETS * MARGINAL_N, test_generator).split(MARGINAL_N)
marg_ratio = (np.mean([w2(a, b) for a in pushed.split(MARGINAL_N) for b in fresh])
              / np.mean([w2(a, b) for a, b in itertools.combinations(fresh, 2)]))

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
lines = torch.stack([marginal_x, pushed], 1)[:300].numpy()
axes[0, 2].add_collection(LineCollection(lines, colors="0.6", linewidths=0.4))
axes[0, 2].scatter(*marginal_x[:300].T, s=4, c="tab:blue", label="x")
axes[0, 2].scatter(*pushed[:300].T, s=4, c="tab:red", label="y")
axes[0, 2].legend(loc="upper right")
axes[0, 2].set(title="300 pairs of the learned plan", **limits)
reference_clouds = sample_from(references[0][0], weights[0][shown], 400)
learned_title = f"learned plan, sampled (cond_ratio {cond_w2 / cond_floor:.2f})"
for axis, per_x, title in ((axes[1, 0], chains[shown, :400], learned_title),
                           (axes[1, 1], reference_clouds, f"discrete plan, n = {REFERENCE_N}, the same x")):
    axis.scatter(*fresh[0].T, s=2, c="0.88")
    for k, cloud in enumerate(per_x):
        axis.scatter(*cloud.T, s=3, c=f"C{k}")
        axis.scatter(*test_x[shown[k]], s=110, c=f"C{k}", marker="*", edgecolors="k")
    axis.set(title=title, **limits)
lowest = f_fine.sort().values[len(f_fine) // 5]
picture = axes[1, 2].imshow(f_fine.view(sides).T, origin="lower", cmap="magma", vmin=lowest,
                            extent=(fine[0, 0], fine[-1, 0], fine[0, 1], fine[-1, 1]))
fig.colorbar(picture, ax=axes[1, 2], shrink=0.85, extend="min")
axes[1, 2].set(title="learned potential f", **limits)
fig.suptitle(f"Gaussian to swiss roll, eps = {EPS:g}, {run.step} steps, {run.seconds:.0f} s")
common.save_figure(fig, name + ".png")
print(f"wrote {name}.png and {name}.pt")

run.report_rate(f.flops * (2 * BATCH * (N_LANGEVIN + 1) + TARGETS + N_WIDE_PROPOSALS + 3 * (TARGETS + BATCH)))
print(f"final eps {EPS:g} cond_w2 {cond_w2:.3g} cond_floor {cond_floor:.3g} cond_ratio {cond_w2 / cond_floor:.3f} "
      f"sampled_ratio {sampled_ratio:.3f} bary_ratio {bary_ratio(fine, SCORED_X):.3f} marg_ratio {marg_ratio:.3f} "
      f"cond_ratio_all {all_w2 / all_floor:.3f} train_s {run.seconds:.1f} "
      f"total_s {time.perf_counter() - start_time:.1f}")
