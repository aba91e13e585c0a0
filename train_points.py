"""Entropic OT between any two sets of points, in any dimension, cost |x-y|^2/2 in the data's own units.

    pi_f(y|x) = exp((f(y) - |x-y|^2/2) / eps) / Z(x)     f the better of two by the dual objective on held-out points:
    mixture     a Gaussian mixture's potential, whose plan is known in closed form; fitted in seconds, without sampling;
                with ever more components, until held-out points stop gaining
    net         the potential of one Gaussian + a network, which ascends E_Q f(y) - E_P E_{pi_f(.|x)} f(y) by Langevin
                chains at several temperatures.  These exchange their y (replica exchange), and so cross between modes.
                Tried where the mixture asks for NET_FROM components or more

    python train_points.py X.npy Y.npy       rows are samples, (n, D) and (m, D): .npy, .pt (a tensor) or .csv
    python train_points.py X.npy Y.npy --eps 0.1 --map NEW.npy --per-x 100    also y ~ pi(.|x) for the rows of NEW
    python train_points.py X.npy Y.npy --resume --map NEW.npy                 of a finished run: no training
    python train_points.py X.npy Y.npy --map NEW.npy --time 0.5               the Schroedinger bridge at that time
    python train_points.py --pair mixture --dim 16 --eps 1                    a known plan: gauss, mixture or rolls
    python train_points.py --table                                            all of them
    python train_points.py --smoke                                            the same path in seconds

Nothing needs scaling: both sets are centred, which leaves the plan as it is, and divided by one number; the net sees y
in the target's principal axes.  eps is in units of the cost; without --eps it is EPS_SHARE of the mean cost between
independent pairs of the centred sets.  A tenth of both sets is held out.  Writes beside itself (or under --out)
points_X_Y_eps0.1_seed0.pt, which --resume carries on from, the figure (.png), and _mapped.npy, (k, 100, D).

The last line, on held-out points; a floor is the same between two halves of the held-out target:
    energy, sw2     energy distance (Szekely & Rizzo) and sliced W2^2 of the pushed source to the target; _4x: from
                    chains four times as long, which must agree (of a mixture's plan, from other samples)
    cost            E |x-y|^2/2 of the plan
    objective       E_Q f - eps E_P log Z by its value, in units of the cost; gain: over that of one Gaussian
    net, effective  1 where the net was the better one; the effective share of the draws behind its objective
and on a known plan (--pair), of PAIR_X sources with PAIR_Y samples each, beside the floor of as many exact samples:
    cond_uvp        mixture, gauss: 100 BW2(y given x, exact) / (Var Q / 2), per cent: Gushchin et al., NeurIPS 2023
    plan_uvp        gauss: the same of the joint law of (x, y)
    cond_ratio      rolls: sliced W2^2 per plane to a discrete plan, over that between two of them (train_toy.py)
"""
import common  # first, so that Ctrl-C during the slow imports below ends without a traceback

import csv
import hashlib
import math
import os
import signal
import subprocess
import sys
import time

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import ot
import torch
from matplotlib.collections import LineCollection
from torch import nn

args = common.arguments(
    __doc__, __file__, eps=0,
    files=dict(nargs="*", metavar="X Y", help="the two sets: .npy, .pt or .csv, rows are samples"),
    pair=dict(choices=("gauss", "mixture", "rolls"), help="a made-up pair with a known plan, instead of files"),
    dim=dict(type=common.number(1, 1024, int), default=2, help="of the pair (default 2)"),
    map=dict(metavar="NEW", help="file of further x to draw y for"),
    time=dict(type=common.number(0, 1), default=1.0, help="of the bridge, from 0, x, to 1, y (default 1)"),
    table=dict(action="store_true", help="all known pairs, a process for each; goes on with --resume"),
    **{"per-x": dict(type=common.number(1, 10 ** 6, int), default=1, help="y for each x of NEW (default 1)")})
device = args.device
start_time = time.perf_counter()

# ---------------------------------------------------------------------------------------------- constants
# In the standardised data, whose variance is 1 per dimension.
SEED = args.seed
EPS_SHARE = 0.05         # of the mean cost between independent pairs: eps, unless given
HELD_OUT = 10            # one in so many rows
COMPONENTS = (1, 5, 20, 100, 400)  # of the mixture, tried in this order until held-out rows stop gaining
FIT_STEPS, FIT_PATIENCE, FIT_ROWS = 60, 10, 20_000  # of a fit; steps without gain that end it; rows per step
NET_FROM = 100           # components: where held-out rows ask for as many, the net is tried too
STEPS = 2500             # AdamW steps of the net
BATCH, TARGETS = 512, 1024  # chains moved per step, each a ladder of temperatures, and target samples
CHAINS = 4096            # sources with persistent chains
REFRESH = 0.01           # share of a batch given a new source per step
TOP = 1.0                # hottest temperature: that of the data
WIDTH, DEPTH = 32, 3     # of each head of the net
SHARPNESS = 3.0          # 1/width of the first layer's ramps at the start
N_LANGEVIN, ACCEPT = 2, 0.7  # Langevin steps between exchanges, and the accepted fraction they are led to
LR, BETAS = 2e-3, (0.0, 0.99)  # of AdamW, no momentum: it would swing against the chains; falls to 0 by a cosine
DECAY = 0.3              # of the weights, times LR, per step: keeps heads that found nothing small
WARMUP, EMA_DECAY = 100, 0.998
PATIENCE = 0.25          # share of STEPS without gain after which the net is given up
SAMPLE_STEPS = 50        # of N_LANGEVIN Langevin steps and an exchange: a chain at test time, from the Gaussian plan
GAIN_X, GAIN_DRAWS, GAIN_STEPS = 64, 16, 50  # sources, draws, annealing steps of the net's gain
TRUSTED = 0.05           # least effective share of those draws
SCORED, SPLITS, DIRECTIONS = 1000, 10, 100  # most points in a distance, its random halves, projections
PAIR_ROWS, PAIR_SEED = 2 ** 17, 1  # rows of a made-up set, seed of its parameters
PAIR_X, PAIR_Y = 200, 1000
TABLE = {"mixture": ((2, 16, 64, 128), (0.1, 1.0, 10.0)), "gauss": ((2, 16, 64, 128), (0.1, 1.0, 10.0)),
         "rolls": ((2, 4, 8, 16), (0.1,))}  # dimensions and eps of each pair
if args.smoke:
    FIT_STEPS, STEPS, BATCH, TARGETS, CHAINS, WIDTH, WARMUP, SAMPLE_STEPS = 5, 20, 32, 64, 64, 8, 5, 5
    COMPONENTS, NET_FROM, GAIN_X, GAIN_DRAWS, GAIN_STEPS, SCORED, SPLITS = (1, 3), 3, 8, 4, 5, 100, 2
    PAIR_ROWS, PAIR_X, PAIR_Y, TABLE = 2000, 4, 100, {"gauss": ((2,), (1.0,)), "rolls": ((2,), (0.1,))}
LOG_EVERY = max(1, STEPS // 20)


# ---------------------------------------------------------------------------------------------- the table

def finished_cells(path):
    """{(pair, dim, eps): {key: number}} of the whole lines in a table's file."""
    cells = {}
    if os.path.isfile(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for words in (line.split() for line in file if line.endswith("\n")):
                try:
                    cell = dict(zip(words[1::2], map(float, words[2::2])))
                    if words[0] in TABLE and "total_s" in cell:
                        cells[words[0], int(cell["dim"]), cell["eps"]] = cell
                except (ValueError, IndexError, KeyError):  # a damaged line: its cell is run again
                    pass
    return cells


def run_table():
    """Runs the cells that the table's file lacks, each in a process of its own, and prints the table."""
    ending, asked, cell = f"_seed{SEED}" + "_smoke" * args.smoke, [], None
    path = os.path.join(args.out, f"points_table{ending}.txt")
    common.lock(path)
    if os.path.exists(path) and not args.resume:
        os.replace(path, path + ".old")

    def ask(number, frame):
        asked.append(number)
        if cell:
            cell.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    for pair, (dims, epses) in TABLE.items():
        for dim, eps in ((dim, eps) for dim in dims for eps in epses):
            if (pair, dim, eps) in finished_cells(path) or asked:
                continue
            checkpoint = os.path.join(args.out, f"points_{pair}_dim{dim}_eps{eps:g}{ending}.pt")
            begun = args.resume and os.path.isfile(checkpoint)
            options = {"pair": pair, "dim": dim, "eps": eps, "seed": SEED, "out": args.out, "device": device}
            command = [sys.executable, os.path.abspath(__file__), *(f"--{k}={v}" for k, v in options.items())]
            command += ["--smoke"] * args.smoke + ["--resume"] * begun
            cell = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
            if asked:  # between the test above and the start
                cell.send_signal(asked[-1])
            for line in cell.stdout:
                print(line, end="")
                if line.startswith("final ") and " finished 1 " in line:
                    try:
                        with open(path, "a", encoding="utf-8") as file:
                            file.write(f"\n{pair} {line[6:]}")  # a line that a kill cut short is ended first
                    except OSError as error:
                        common.fail(f"cannot write {path} ({error.strerror}): free some space or name another --out")
            if cell.wait() and not asked:
                common.fail(f"the cell {pair}, dim {dim}, eps {eps:g} failed: see above, then --table --resume goes on")
    cells = finished_cells(path)
    keys = {"mixture": ("cond_uvp", "cond_floor"), "gauss": ("plan_uvp", "plan_floor"), "rolls": ("cond_ratio", None)}
    for (pair, dim, eps), row in sorted(cells.items()):
        key, floor = keys[pair]
        exact = f"(exact samples {row[floor]:.4f})" if floor else ""
        print(f"{pair:8s} dim {dim:4d} eps {eps:<5g} {key} {row[key]:.4f} {exact:24s} "
              f"{'net' if row['net'] else 'mixture of %d' % row['components']}, {row['total_s']:.0f} s")
    if asked:
        print("stopped: --table --resume goes on from here")
    asked_for = sum(len(dims) * len(epses) for dims, epses in TABLE.values())
    print(f"final cells {len(cells)} of {asked_for} total_s {time.perf_counter() - start_time:.1f}")


if args.table:
    run_table()
    raise SystemExit(0)


# ---------------------------------------------------------------------------------------------- data

def read_rows(path, columns=None):
    """The rows of a file as float64 (n, D), or a sentence on what is wrong with it."""
    if not os.path.isfile(path):
        common.fail(f"no file {path}: name a .npy, .pt or .csv file whose rows are samples")
    kind = os.path.splitext(path)[1].lower()
    if kind == ".csv":
        rows = read_csv(path)
    else:
        try:
            if kind == ".npy":
                rows = np.load(path, allow_pickle=False)[...]  # of an .npz, which has another name: an error
            else:
                rows = torch.load(path, map_location="cpu", weights_only=True).detach().numpy()
        except Exception:  # foreign, truncated, a pickle, no tensor, a type that numpy lacks: each has its own
            common.fail(f"{path} holds no plain array of numbers (pickles are never loaded): use numpy.save")
    if rows.dtype.kind not in "fiu" or rows.ndim != 2 or not rows.size:
        common.fail(f"{path} holds {rows.dtype} of shape {rows.shape}: real numbers (n, D) are needed, a row a sample")
    rows = rows.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(bad):
        common.fail(f"{path} has entries that are not finite in {len(bad)} rows, as {bad[:5].tolist()}: drop them")
    if columns and rows.shape[1] != columns:
        common.fail(f"{path} has {rows.shape[1]} columns, not {columns}: all files need the same")
    return torch.from_numpy(rows)


def read_csv(path):
    rows = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for line, cells in enumerate(csv.reader(file), 1):
                if not cells:  # an empty line, as at the end
                    continue
                try:
                    rows.append([float(cell) for cell in cells])
                except ValueError:
                    if rows or line > 1:  # one header line may stand first
                        common.fail(f"{path} line {line} holds text, {','.join(cells)[:40]!r}: "
                                    f"numbers only, after at most one header line")
                if rows and len(rows[-1]) != len(rows[0]):
                    common.fail(f"{path} line {line} has {len(rows[-1])} columns, not {len(rows[0])}: mend that line")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        common.fail(f"{path} cannot be read as text ({error}): name a .csv of numbers")
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(rows[0]) if rows else 0)


def read_files():
    if len(args.files) != 2:
        common.fail(f"{len(args.files)} files: name two, X and Y, or a made-up --pair")
    X = read_rows(args.files[0])
    Y = read_rows(args.files[1], X.shape[1])
    for path, rows in zip(args.files, (X, Y)):
        if len(rows) < 50:
            common.fail(f"{path} has {len(rows)} rows: at least 50 are needed to learn from and to hold some out")
    return X, Y, "_".join(os.path.splitext(os.path.basename(path))[0] for path in args.files)


# ---------------------------------------------------------------------------------------------- pairs with a known plan

class Known:
    """A made-up pair and its plan, pi(.|x) = sum_k w_k(x) N(m_k(x), C_k), from a seed of its own."""

    def __init__(self, dim, eps, components):
        self.dim, self.eps, self.generator = dim, eps, torch.Generator().manual_seed(PAIR_SEED)
        if components == 1:  # N(0, S0) -> N(0, S1), deviations from 1/2 to 2 along random axes
            F0, F1 = (self.rotation(1)[0] * 2 ** torch.linspace(-1, 1, dim, dtype=torch.float64) for _ in range(2))
            self.root0, T = F0, common.gaussian_map(F0 @ F0.T, F1 @ F1.T, eps)
            self.slope, self.shift, self.C = T[None], torch.zeros(1, dim, dtype=torch.float64), eps * T[None]
            self.joint = torch.cat([torch.cat([F0 @ F0.T, F0 @ F0.T @ T], 1), torch.cat([T @ F0 @ F0.T, F1 @ F1.T], 1)])
        else:  # N(0, I) -> Q, the y of pi(y|x) ~ N(y; x, eps I) sum_k N(y; mu_k, Sig_k) (Gushchin et al., NeurIPS 2023)
            mu = 5 * nn.functional.normalize(self.normal(components, dim), dim=1)
            spread = 4 ** (torch.rand(components, 1, dim, generator=self.generator).double() - 0.5)
            rotation, eye = self.rotation(components), torch.eye(dim, dtype=torch.float64)
            Sig = rotation * spread @ rotation.mT
            self.root0, self.C = eye, torch.linalg.inv(eye / eps + torch.linalg.inv(Sig))
            self.slope, self.shift = self.C / eps, (self.C @ torch.linalg.solve(Sig, mu[..., None])).squeeze(2)
            self.seen = mu, torch.linalg.inv(torch.linalg.cholesky(Sig + eps * eye))  # w_k: N(x; mu_k, Sig_k + eps I)
        self.root = torch.linalg.cholesky(self.C)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def rotation(self, n):
        return torch.linalg.qr(self.normal(n, self.dim, self.dim))[0]

    def source(self, n):
        return torch.randn(n, self.dim, dtype=torch.float64) @ self.root0.T

    def weights(self, x):
        if len(self.C) == 1:
            return torch.ones(len(x), 1, dtype=torch.float64)
        mu, inverse = self.seen
        z = torch.einsum("kde,nke->nkd", inverse, x[:, None] - mu)
        return (inverse.diagonal(dim1=1, dim2=2).log().sum(1) - z.square().sum(2) / 2).softmax(1)

    def sample(self, x):
        """Exact y ~ pi(.|x): (n, D) -> (n, D)."""
        k, y = torch.multinomial(self.weights(x), 1).squeeze(1), torch.empty_like(x)
        for j in range(len(self.C)):
            rows = k == j
            y[rows] = self.shift[j] + x[rows] @ self.slope[j].T + torch.randn_like(x[rows]) @ self.root[j].T
        return y

    def target(self, n):
        return torch.cat([self.sample(self.source(min(n, 8192))) for _ in range(-(-n // 8192))])[:n]

    def scores(self, sampler):
        """sampler: x (n, D), how many -> y (n, how many, D)."""
        x = self.source(PAIR_X)
        w, m = self.weights(x), self.shift + torch.einsum("kde,ne->nkd", self.slope, x)
        mean = (w[..., None] * m).sum(1)
        away = m - mean[:, None]
        covariance = torch.einsum("nk,kde->nde", w, self.C) + torch.einsum("nk,nkd,nke->nde", w, away, away)
        variance = self.target(20_000).var(0).sum().item()
        exact = self.sample(x.repeat_interleave(PAIR_Y, 0)).view(PAIR_X, PAIR_Y, -1)
        scores = {key: 100 * sum(map(bw2, clouds, mean, covariance)) / PAIR_X / variance
                  for key, clouds in (("cond_uvp", sampler(x, PAIR_Y)), ("cond_floor", exact))}
        if len(self.C) == 1:
            x, zero = self.source(100_000), torch.zeros(2 * self.dim, dtype=torch.float64)
            for key, y in (("plan_uvp", sampler(x, 1)[:, 0]), ("plan_floor", self.sample(x))):
                scores[key] = 100 * bw2(torch.cat([x, y], 1), zero, self.joint) / self.joint.trace().item()
        return scores


def root_of(S):
    """Symmetric square root."""
    values, vectors = torch.linalg.eigh(S)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def bw2(samples, mean, S):
    """|mean - m|^2 + tr (S + C - 2 (S^1/2 C S^1/2)^1/2), the Bures-Wasserstein distance squared; m and C are those of
    samples (n, D).  The last trace sums singular values of a product of roots: near 0, a root loses half the digits."""
    away = samples - samples.mean(0)
    cross = torch.linalg.svdvals(root_of(away.T @ away / len(samples)) @ root_of(S)).sum()
    return ((samples.mean(0) - mean).square().sum() + away.square().sum() / len(samples) + S.trace() - 2 * cross).item()


class Rolls:
    """N(0, I) -> independent swiss rolls of train_toy.py, one in every two dimensions, turned by one rotation.  Neither
    cost nor source sees it, so the plan is the product of 2-D plans, for which two discrete solves stand."""

    def __init__(self, dim, eps, n=4000):
        if dim % 2 or eps < 0.05:
            common.fail("--pair rolls takes an even --dim, and --eps from 0.05 up, where its discrete solves converge")
        self.dim, self.eps, self.n = dim, eps, 200 if args.smoke else n
        generator = torch.Generator().manual_seed(PAIR_SEED)
        self.rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]

    def source(self, n):
        return torch.randn(n, self.dim, dtype=torch.float64)

    def roll(self, n):
        t = 1.5 * math.pi * (1 + 2 * torch.rand(n, dtype=torch.float64))
        return (torch.stack([t * t.cos(), t * t.sin()], 1) + 0.5 * torch.randn(n, 2, dtype=torch.float64)) / 8

    def target(self, n):
        return torch.cat([self.roll(n) for _ in range(self.dim // 2)], 1) @ self.rotation.T

    def reference(self, x, directions, seed):
        """A discrete plan's y given each x (planes, T, 2): quantiles of projections (planes, T, PAIR_Y, directions)."""
        torch.manual_seed(seed)
        a, b, weight = torch.randn(self.n, 2, dtype=torch.float64), self.roll(self.n), np.full(self.n, 1 / self.n)
        cost = torch.cdist(a, b).square().numpy() / 2
        _, log = ot.sinkhorn(weight, weight, cost, self.eps, numItermax=3000, stopThr=1e-7, log=True)
        weights = ((x @ b.T - b.square().sum(1) / 2) / self.eps + torch.from_numpy(log["v"]).log()).softmax(2)
        levels, columns = (torch.arange(PAIR_Y, dtype=torch.float64) + 0.5) / PAIR_Y, []
        for u in directions.T:
            value, order = (b @ u).sort()
            cdf = weights[:, :, order].cumsum(2)
            columns.append(value[torch.searchsorted(cdf, levels * cdf[:, :, -1:]).clamp(max=self.n - 1)])
        return torch.stack(columns, 3)

    def scores(self, sampler, x_count=64):
        x = self.source(x_count)
        angles = math.pi * torch.arange(50, dtype=torch.float64) / 50
        directions = torch.stack([angles.cos(), angles.sin()])
        y = (sampler(x, PAIR_Y) @ self.rotation).view(x_count, PAIR_Y, -1, 2).permute(2, 0, 1, 3)
        learned = (y @ directions).sort(2).values  # (planes, T, PAIR_Y, directions)
        planes = (x @ self.rotation).view(x_count, -1, 2).transpose(0, 1)
        references = [self.reference(planes, directions, seed) for seed in (0, 1)]
        error = sum((learned - q).square().mean() for q in references) / 2
        return {"cond_ratio": (error / (references[0] - references[1]).square().mean()).item()}


# ---------------------------------------------------------------------------------------------- standardised data

if args.files and args.pair:
    common.fail(f"--pair {args.pair} and files: name one or the other")
if args.files:
    pair, (X, Y, label) = None, read_files()
else:
    kind, dim, pair_eps = args.pair or ("mixture" if args.smoke else ""), args.dim, args.eps or 1.0
    if not kind:
        common.fail("name two files, X and Y, or a made-up --pair (-h lists the options)")
    pair = Rolls(dim, pair_eps) if kind == "rolls" else Known(dim, pair_eps, 5 if kind == "mixture" else 1)
    X, Y, label, args.eps = pair.source(PAIR_ROWS), pair.target(PAIR_ROWS), f"{kind}_dim{dim}", pair_eps
new_x = read_rows(args.map, X.shape[1]) if args.map else None

DIM = X.shape[1]
center_x, center_y = X.mean(0), Y.mean(0)  # moving a set adds to the cost what depends on x or y alone
mean_cost = ((X - center_x).square().sum(1).mean() + (Y - center_y).square().sum(1).mean()).item() / 2
UNIT = math.sqrt(mean_cost / DIM)  # one number for both sets, since the cost compares them
if not 1e-30 < mean_cost < 1e30:
    common.fail(f"the mean centred cost is {mean_cost:.3g}: there is nothing to transport if all rows are equal; "
                f"if not, choose a unit in which it is nearer to 1")
if not 1e-4 * mean_cost <= (args.eps or mean_cost) <= 1e3 * mean_cost:
    common.fail(f"--eps {args.eps:g} would mean nothing on these data, whose mean centred cost is {mean_cost:.3g}: "
                f"choose from {1e-4 * mean_cost:.2g} to {1e3 * mean_cost:.2g}, as a rule {EPS_SHARE * mean_cost:.2g}")
eps_given = args.eps or float(f"{EPS_SHARE * mean_cost:.3g}")
EPS = eps_given / UNIT ** 2
print(f"{label}: {len(X)} sources, {len(Y)} targets, {DIM} columns; mean cost of centred independent pairs "
      f"{mean_cost:.4g}, eps {eps_given:g}" + f" ({EPS_SHARE:g} of it; --eps sets another)" * (not args.eps))
DATA = hashlib.sha256(X.numpy().tobytes() + Y.numpy().tobytes()).hexdigest()[:16]


def standard(rows, center):
    return ((rows - center) / UNIT).float().to(device)


def split(rows, center):
    """-> rows to train on, held-out rows."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))
    return [standard(rows[o], center) for o in (order[len(rows) // HELD_OUT:], order[:len(rows) // HELD_OUT])]


(x_train, x_held), (y_train, y_held) = split(X, center_x), split(Y, center_y)
RUNGS = 1 + math.ceil(1.1 * math.sqrt(DIM) * math.log10(max(TOP / EPS, 1.0)))  # temperatures: 0.3 to 0.5 are exchanged
HEADS = max(8, min(2 * DIM, 16), DIM // 2)  # of the net: their axes cover the space, twice over in few dimensions
SCALE = 5.0 * max(1.0, EPS)  # of the net: of the order of the cost, beyond eps 1 of eps log q
CONSTANTS = common.constants_of(globals())
name = os.path.join(args.out, f"points_{label}_eps{eps_given:g}_seed{SEED}" + "_smoke" * args.smoke)


def batch(rows, n):
    return rows if n >= len(rows) else rows[torch.randint(len(rows), (n,), device=device)]


# ---------------------------------------------------------------------------------------------- the mixture

def gain_of(new, old):
    """What held-out rows gain in the dual objective from mixture new over old, and its standard error."""
    on_y, on_x = new(y_held) - old(y_held), EPS * (new.log_z(x_held) - old.log_z(x_held))
    return (on_y.mean() - on_x.mean()).item(), (on_y.var() / len(on_y) + on_x.var() / len(on_x)).sqrt().item()


def fit_mixtures():
    """-> the Gaussian plan, of one component, and the largest mixture before held-out rows stop gaining."""
    fitted, n = [], min(len(x_train), len(y_train))
    for components in COMPONENTS:
        new, best = common.Mixture(DIM, components, EPS).to(device), (-math.inf, None, 0)
        rows = FIT_ROWS if components > 1 else n
        for step in new.fit(lambda: batch(x_train, rows), lambda: batch(y_train, rows), FIT_STEPS * (components > 1),
                            memory=1.0 if rows >= n else 0.1, prior=DIM / n):
            value = new.objective(x_held[:5000], y_held[:5000]).item()
            if value > best[0]:
                best = value, {k: v.clone() for k, v in new.state_dict().items()}, step
            if step - best[2] >= FIT_PATIENCE:
                break
        new.load_state_dict(best[1])
        gain, error = gain_of(new, fitted[-1]) if fitted else (0.0, 0.0)
        print(f"mixture of {components}: objective on held-out rows {UNIT ** 2 * best[0]:.4f}, "
              f"gain {UNIT ** 2 * gain:.2g} +- {UNIT ** 2 * error:.2g}, {time.perf_counter() - start_time:.0f} s")
        tried.append(best[0])
        if fitted and not gain > 2 * error:
            break
        fitted.append(new)
    return fitted[0], fitted[-1]


def kept_components():
    """How many the checkpoint to resume has; 1 where it cannot be read, of which common.Run then says why."""
    try:
        return min(len(common.read_checkpoint(name + ".pt")["mixture"]["log_a"]), COMPONENTS[-1])
    except Exception:
        return 1


tried = []  # objective on held-out rows of each mixture, for the figure
if args.resume:
    base, mixture = (common.Mixture(DIM, components, EPS).to(device) for components in (1, kept_components()))
else:
    base, mixture = fit_mixtures()
K = len(mixture.r)


# ---------------------------------------------------------------------------------------------- the net

class Net(nn.Module):
    """What f has beyond the Gaussian plan's potential: (B, D) -> (B,), 0 at the start."""

    def __init__(self):
        super().__init__()
        covariance = torch.cov(y_train.T.double()).reshape(DIM, DIM).cpu()  # the same signs below on every device
        values, vectors = torch.linalg.eigh(covariance)
        deviations = values.clamp_min(1e-4 * values[-1]).sqrt()
        axes = (vectors / deviations).float()  # no direction is stretched by more than 100
        self.register_buffer("axes", axes.to(device))
        self.heads = common.Heads(DIM, HEADS, WIDTH, DEPTH, SCALE)
        self.heads.init_first_layer_at(batch(y_train, 4096) @ self.axes, SHARPNESS)
        nn.init.zeros_(self.heads.last)

    def forward(self, y):
        return self.heads(y @ self.axes)


def mcmc_step(net, x, y):
    """N_LANGEVIN steps and an exchange of chains y (B, RUNGS, D) for x (B, D) -> y, accepted, exchanged fractions."""
    eps, eta = ladder.repeat(len(x)), bank.eta.repeat(len(x))[:, None]  # of each chain
    flat, log_p, accepted = common.mala(lambda y: base(y) + net(y), x.repeat_interleave(RUNGS, 0), y.flatten(0, 1),
                                        eps, eta, N_LANGEVIN, precond=precond())
    y, exchanged = common.exchange(flat.view(y.shape), log_p.view(len(x), RUNGS), ladder)
    return y, accepted.view(len(x), RUNGS).mean(0), exchanged


def precond():
    return base.root[0]  # eps S is the Gaussian plan's covariance of y given x


def start_chains(x):
    return base.sample(x.repeat_interleave(RUNGS, 0)).view(len(x), RUNGS, DIM)


def sample_plan(x, per_x=1, steps=SAMPLE_STEPS, chains=None):
    """y ~ pi_f(.|x): (n, D) -> (n, per_x, D), from `chains` chains for each x (default per_x), several y from each."""
    if not use_net:
        return mixture.sample(x.repeat_interleave(per_x, 0)).view(len(x), per_x, DIM)
    chains, out = min(chains or per_x, per_x), []
    part = 512 if device.type == "cpu" else 8192  # with 2 048 a CPU spent a third of its time on fresh memory
    for x_part in x.repeat_interleave(chains, 0).split(part):
        y = start_chains(x_part)
        for _ in range(steps):
            y, _, _ = mcmc_step(net_best, x_part, y)
        snapshots = [y[:, 0]]
        while len(snapshots) * chains < per_x:
            for _ in range(max(1, steps // 10)):
                y, _, _ = mcmc_step(net_best, x_part, y)
            snapshots.append(y[:, 0])
        out.append(torch.stack(snapshots, 1))
    return torch.cat(out).view(len(x), -1, DIM)[:, :per_x]


@torch.no_grad()
def net_gain(net, steps=GAIN_STEPS):
    """What held-out rows gain in the dual objective from the net -> gain, standard error, effective share of draws."""
    on_y = net(y_held[:5000])
    log_z, effective = common.log_z_ratio(base, net, x_held[:GAIN_X], GAIN_DRAWS, steps, bank.eta[0], precond())
    error = (on_y.var() / len(on_y) + EPS ** 2 * log_z.var() / len(log_z)).sqrt()
    return on_y.mean() - EPS * log_z.mean(), error, effective


ladder = EPS * (max(TOP / EPS, 1.0) ** (torch.arange(RUNGS, device=device) / max(RUNGS - 1, 1)))
net, net_avg, net_best = (Net().to(device) for _ in range(3))
for copy in (net_avg, net_best):
    copy.load_state_dict(net.state_dict())
opt = torch.optim.AdamW(net.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)
chains_x = batch(x_train, CHAINS)
zero = torch.zeros(())
bank = common.Bank(chains_x, start_chains(chains_x), eta=ladder / 20, best=zero, best_step=zero, gain=zero, error=zero,
                   effective=zero + 1, history=torch.zeros(STEPS // LOG_EVERY, 2),
                   tried=torch.tensor(tried + [0.0] * (len(COMPONENTS) - len(tried)))).to(device)

parts = {"base": base, "mixture": mixture, "net": net, "net_avg": net_avg, "net_best": net_best, "opt": opt,
         "bank": bank}
saturated = K < NET_FROM  # few components were enough: no net is trained
run = common.Run(args, name + ".pt", parts, 0 if saturated else STEPS, LOG_EVERY, CONSTANTS, "lower LR or raise DECAY")


def given_up():
    return run.step - bank.best_step > PATIENCE * STEPS and bank.effective > TRUSTED


run.total = run.step if given_up() else run.total
for step in run.steps():
    opt.param_groups[0]["lr"] = common.warm_cosine(LR, step, WARMUP, STEPS)
    rows = bank.rows(min(BATCH, len(bank.x)))
    new = x_train[torch.randint(len(x_train), (len(rows),), device=device)]
    fresh = torch.rand(len(rows), 1, device=device) < REFRESH
    x = torch.where(fresh, new, bank.x[rows])
    y, accepted, exchanged = mcmc_step(net, x, torch.where(fresh[..., None], start_chains(new), bank.y[rows]))
    bank.x[rows], bank.y[rows] = x, y
    bank.eta *= torch.exp(0.03 * N_LANGEVIN * (accepted - ACCEPT))
    gap = common.train_step(net, opt, batch(y_train, common.share(TARGETS)), y[:, 0])
    common.update_ema(net_avg, net, EMA_DECAY, step)
    if step % LOG_EVERY == 0:  # keep the net that held-out rows gain most from; of two they can't tell apart the later
        bank.gain, bank.error, bank.effective = net_gain(net_avg)
        bank.history[step // LOG_EVERY - 1] = torch.stack([bank.gain + base.objective(x_held, y_held), bank.effective])
        if bank.gain > bank.best - bank.error or not bank.effective > TRUSTED:
            net_best.load_state_dict(net_avg.state_dict())
            bank.best, bank.best_step = torch.maximum(bank.best, bank.gain), zero.to(device) + step
        run.total = step if given_up() else run.total
    if run.due():
        run.log({"gap": 1e3 * SCALE, "y": 1e3, "max_param": 1e3}, gap=gap, y=y[:, 0].norm(dim=1).mean(),
                accept=accepted.mean(), exchange=exchanged.sum() / max(RUNGS - 1, 1), max_param=common.max_param(net),
                gain=UNIT ** 2 * bank.gain, effective=bank.effective)

gain, error, effective = net_gain(net_best, 4 * GAIN_STEPS) if run.step else (zero, zero, zero)
of_mixture, mixture_error = gain_of(mixture, base)
use_net = bool(effective > TRUSTED and gain - of_mixture > 2 * math.hypot(error, mixture_error))

# ---------------------------------------------------------------------------------------------- scores

torch.manual_seed(SEED)  # mapping, too, is the same after --resume


def data_units(y):
    """Standardised y (..., D) on any device -> the data's own units, float64 on the CPU."""
    return y.double().cpu() * UNIT + center_y


if args.map:
    mapped = data_units(sample_plan(standard(new_x, center_x), args.per_x))
    bridge = new_x[:, None].lerp(mapped, args.time)
    bridge += math.sqrt(eps_given * args.time * (1 - args.time)) * torch.randn_like(bridge)
    problem = common.write_aside(name + "_mapped.npy", lambda file: np.save(file, bridge.numpy()))
    if problem:
        common.fail(f"{problem}: free some space, then --resume --map {args.map} again")
    print(f"wrote {name}_mapped.npy, {tuple(bridge.shape)}")


def distances(a, b):
    """Energy distance and sliced W2^2 between samples of one size (n, D), pairs of a point with itself included."""
    energy = 2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()
    directions = nn.functional.normalize(torch.randn(a.shape[1], DIRECTIONS, device=a.device), dim=0)
    return torch.stack([energy, ((a @ directions).sort(0).values - (b @ directions).sort(0).values).square().mean()])


def distances_to_target(y):
    """Of the pushed source y (n, D) to random halves of the held-out target, mean, and between these halves."""
    size, to_halves, floor = min(len(y), len(y_held) // 2, SCORED), [], []
    for _ in range(SPLITS):
        one, other = y_held[torch.randperm(len(y_held), device=device)[:2 * size]].chunk(2)
        pushed = y[torch.randperm(len(y), device=device)[:size]]
        to_halves.append((distances(pushed, one) + distances(pushed, other)) / 2)
        floor.append(distances(one, other))
    return torch.stack(to_halves).mean(0), torch.stack(floor).mean(0)


test_x = x_held[:SCORED]
pushed = sample_plan(test_x)[:, 0]
(energy, sw2), (energy_floor, sw2_floor) = distances_to_target(pushed)
(energy_4x, sw2_4x), _ = distances_to_target(sample_plan(test_x, steps=4 * SAMPLE_STEPS)[:, 0])
cost = UNIT ** 2 * common.quadratic_cost(test_x, pushed).mean() + (center_x - center_y).square().sum() / 2
scores = {"energy": UNIT * energy, "energy_4x": UNIT * energy_4x, "energy_floor": UNIT * energy_floor,
          "energy_ratio": energy / energy_floor, "sw2": UNIT ** 2 * sw2, "sw2_4x": UNIT ** 2 * sw2_4x,
          "sw2_floor": UNIT ** 2 * sw2_floor, "cost": cost}
value = base.objective(x_held, y_held) + gain if use_net else mixture.objective(x_held, y_held)
scores |= {"objective": UNIT ** 2 * value, "gain": UNIT ** 2 * (value - base.objective(x_held, y_held)),
           "effective": effective if use_net else 1.0, "net": use_net}
scores = {k: float(v) for k, v in scores.items()}
if use_net and abs(scores["energy_4x"] - scores["energy"]) > 0.5 * scores["energy_floor"]:
    print("warning: chains of SAMPLE_STEPS have not converged (energy against energy_4x): raise it, and --resume")
if pair:
    chains_each = 32 if kind == "rolls" else None
    scores |= pair.scores(lambda x, n: data_units(sample_plan(standard(x, center_x), n, chains=chains_each)))

# ---------------------------------------------------------------------------------------------- figure

fig, axes = plt.subplots(1, 4, figsize=(19, 4.8), layout="constrained")
view = torch.linalg.eigh(torch.cov(Y.T).reshape(DIM, DIM)).eigenvectors[:, [-1, -min(2, DIM)]]  # target's widest axes
shown_x, shown_y, target = ((test_x.double().cpu() * UNIT + center_x)[:1000] @ view, data_units(pushed)[:1000] @ view,
                            data_units(y_held)[:1000] @ view)
for z, color, what in ((shown_x, "tab:blue", "source x"), (target, "0.6", "target"), (shown_y, "tab:red", "pushed y")):
    axes[0].scatter(*z.T, s=3, c=color, label=what)
axes[0].legend()
axes[0].set(title=f"held-out points (energy distance {scores['energy_ratio']:.2f} times the floor)",
            xlabel="target's two widest axes")
axes[1].add_collection(LineCollection(torch.stack([shown_x, shown_y], 1)[:200].numpy(), colors="0.6", linewidths=0.4))
for z, color in ((shown_x, "tab:blue"), (shown_y, "tab:red")):
    axes[1].scatter(*z[:200].T, s=4, c=color)
axes[1].set(title="pairs of the learned plan")
axes[2].scatter(*target.T, s=3, c="0.85")
for k, cloud in enumerate(data_units(sample_plan(test_x[:6], 200)) @ view):
    axes[2].scatter(*cloud.T, s=4, c=f"C{k}")
    axes[2].scatter(*shown_x[k], s=110, c=f"C{k}", marker="*", edgecolors="k")
axes[2].set(title="y of six x (stars)")
seen = bank.history[:, 1] > 0
steps = LOG_EVERY * torch.arange(1, len(seen) + 1)
if seen.any():
    for k, (what, plan) in enumerate(((f"mixture of {K}", mixture), ("one Gaussian", base))):
        axes[3].axhline(UNIT ** 2 * plan.objective(x_held, y_held).item(), c=f"C{k}", label=what)
    axes[3].plot(steps[seen.cpu()], UNIT ** 2 * bank.history[seen, 0].cpu(), "o-", c="C2", label="Gaussian + net")
    axes[3].legend()
else:
    count = int((bank.tried != 0).sum())
    axes[3].semilogx(COMPONENTS[:count], UNIT ** 2 * bank.tried[:count].cpu(), "o-")
    axes[3].axvline(K, c="0.7", ls=":")
axes[3].set(title="dual objective on held-out points",
            xlabel="steps of the net" if seen.any() else "components (chosen: dotted)")
plan = "the net" if use_net else f"a mixture of {K}"
shown_label = label.encode(errors="replace").decode()  # file names may hold any bytes
fig.suptitle(f"{shown_label}, {DIM} dimensions, eps = {eps_given:g}: plan of {plan}, "
             f"cost {scores['cost']:.4g}, {run.step} steps, {run.seconds:.0f} s", parse_math=False)
common.save_figure(fig, name + ".png")
print(f"wrote {name}.png and {name}.pt")
print(f"final eps {eps_given:g} dim {DIM} seed {SEED} components {K} " +
      " ".join(f"{k} {v:.4g}" for k, v in scores.items()) +
      f" steps {run.step} finished {int(run.step == run.total)} train_s {run.seconds:.1f} "
      f"total_s {time.perf_counter() - start_time:.1f}")
