"""Unpaired translation between two folders of images by energy-guided entropic OT: pixels in [-1,1], cost |x-y|^2/2.

    pi_f(y|x) = exp((f(y) - |x-y|^2/2) / eps) / Z(x)        sampled by Langevin
    ascend      E_Q f(y) - E_P E_{pi_f(.|x)} f(y)           Algorithm 1 of Mokrov et al., ICLR 2024
    f = base + net: Gaussians, whose plan is known in closed form, and a network

    python train_images.py DIR                     DIR holds trainA, trainB (and testA, testB): CycleGAN's layout
    python train_images.py A B                     two folders; a tenth of each is held out
    python train_images.py A B --side 64           pixels: 32 (8 minutes on one CPU core), 64 (20 minutes) or 128
    python train_images.py A B --eps 0.3           temperature of the plan: more varied, further from the source
    python train_images.py A B --resume --translate NEW    a finished run: translates every file of NEW
    python train_images.py --smoke                 the same path in seconds, on made-up images

Any format that PIL reads; the central square of each image is averaged down to the side.  Grey if all images are.
Writes beside itself (or under --out) images_A_to_B_32_eps0.1_seed0_HASH.pt, which --resume carries on from, a figure
(.png), the scores during the training (_curves.png), _pairs.pt = {"x": (N,C,S,S), "y": (N,M,C,S,S)}: held-out sources
and M translations of each, _real.pt: held-out targets, for eval_fid.py, and NEW_translated/NAME.png.

The base leaves ghosts of the source behind; the net learns what targets look like, at every resolution.  As with the
digits, targets get noise of deviation NOISE, or f would become too steep for the chains to mix; decay of the weights
keeps it smooth.  A chain starts from an exact draw of the base's plan, lives for LIFE visits of N_LANGEVIN steps and
ends.  A translation does the same, and then takes the mean of the image under the noise (Tweedie's formula).

Now and then training sources are translated and scored against targets held out for this alone (every VALIDATION-th):
see images.translation_scores.  The weights that score best are kept; a training that runs off goes back to them, at
half the rate: whatever happens there is a plan, if only the base's.  The last line scores the translations of the test
sources; `control base` those of the base alone, `control retrieval` training targets paired with the sources by
discrete OT: a score that a control reaches too is no evidence.
"""
import hashlib
import math
import os
import time

import torch
from PIL import Image, ImageColor, ImageDraw
from scipy.optimize import linear_sum_assignment
from torch import nn

import common
import images
from mixture import gaussian_map
from run import Run, WORLD, arguments, constants_of, fail, make_folder, number

args = arguments(
    __doc__, __file__, eps=0.1, folders=dict(nargs="*", metavar="DIR or A B", help="folders of images"),
    side=dict(type=int, choices=(32, 64, 128), default=32, help="pixels (default 32)"),
    background=dict(type=ImageColor.getrgb, default=(255, 255, 255), metavar="COLOUR",
                    help="under transparent images (default white)"),
    swap=dict(action="store_true", help="from B to A"),
    translate=dict(metavar="NEW", help="also translate this folder of images, into NEW_translated"),
    copies=dict(type=number(1, 100, int), default=1, help="translations of each image of NEW (default 1)"))
device, start_time = args.device, time.perf_counter()
if WORLD > 1:
    fail("images train in one process: start train_images.py with python, not with torchrun")
if args.smoke and args.folders or len(args.folders) not in ((0,) if args.smoke else (1, 2)):
    fail("name one folder that holds trainA and trainB, or two folders of images, A B; or --smoke without any")

# ---------------------------------------------------------------------------------------------- constants
EPS, SEED, SIDE = args.eps, args.seed, args.side
STEPS = {32: 1500, 64: 1000, 128: 1000}[SIDE]  # AdamW steps, at most
BATCH = 64               # chains moved per step, and targets per step
N_LANGEVIN = 5           # Langevin steps of a chain per training step
GROUPS, LIFE = 3, 16     # batches of chains, in turn; visits after which a chain ends
YOUNG = 4                # visits of a chain before f learns from it: it still carries the base's faults
NOISE = min(0.16, 0.5 * math.sqrt(EPS))  # added to targets
ETA = NOISE ** 2 / 2     # Langevin step
BOX = 3.0                # pixels are clipped to +-BOX
AT_WALL = 0.05           # share of clipped pixels that counts as divergence
WIDEST_GAP = 3000.0      # mean of 100 steps, in size; counts as divergence
SCALE = EPS / NOISE ** 2  # of the net
RANK = 128               # directions whose covariance the base knows
PRIOR = 0.02             # share of its diagonal in each covariance
WIDTHS = (12, 36, 72, 144) + (144,) * int(math.log2(SIDE // 32))  # channels of the net at SIDE, SIDE/2 ... 4 pixels
HIDDEN = 256             # units after the last
LR, WARMUP = 1.6e-3, 50  # of AdamW; rises in WARMUP steps, then falls to 0 by a cosine
BETAS, DECAY = (0.0, 0.99), 0.8  # decay of the weights, times LR, per step
EMA_DECAY = 0.995        # of the weights, per step
SCORES = 10              # times that the weights are scored in STEPS
SCORED = 100             # sources translated each time
VALIDATION = 20          # every 20th target is held out for it
PATIENCE = 4             # scores without a better one, after which the training ends
COLLAPSED = 0.7          # spread of the translations over that of real images; below, the log warns
TRIES = 4                # of a training that runs off, each at half the rate, before it ends with what it has
EARLY = 0.1, 0.3         # parts of STEPS after which the figure's sources are translated too
TRANSLATIONS = 2         # of each test image
SHOWN = 8                # rows of the figure
if args.smoke:
    STEPS, BATCH, N_LANGEVIN, GROUPS, LIFE, YOUNG, RANK, WIDTHS, HIDDEN = 12, 8, 2, 2, 4, 1, 8, (4, 4, 8, 8), 8
    SCORES, SCORED, TRANSLATIONS, SHOWN = 3, 4, 2, 3
CURVES = "energy", "detail", "nearest", "sharp", "spread"  # drawn
LOG_EVERY, SCORE_EVERY = max(1, STEPS // 60), max(1, STEPS // SCORES)
RESTARTS = BATCH // LIFE  # chains of a batch that start afresh at each visit
SAMPLE_STEPS = LIFE * N_LANGEVIN  # of a translation: it does what a chain does in training


# ---------------------------------------------------------------------------------------------- data

def make_up(folder, n, disc, seed):
    """Fill a folder with n made-up images: squares, or discs, of random place, size and colour, on white."""
    make_folder(folder)
    draws = torch.rand(n, 6, generator=torch.Generator().manual_seed(seed)).tolist()
    for k, (size, left, top, *colour) in enumerate(draws):
        size = 40 + 32 * size
        left, top = (8 + (112 - size) * at for at in (left, top))
        picture = Image.new("RGB", (128, 128), "white")
        draw = getattr(ImageDraw.Draw(picture), "ellipse" if disc else "rectangle")
        draw((left, top, left + size, top + size), tuple(round(200 * c) for c in colour))
        picture.save(os.path.join(folder, f"{k:02d}.png"))


if args.smoke:
    args.folders = [os.path.join(args.out, "images_smoke_data")]
    for k, (part, n) in enumerate((("trainA", 60), ("trainB", 60), ("testA", 6), ("testB", 6))):
        make_up(os.path.join(args.folders[0], part), n, k % 2, k)
if args.translate:  # read now: what is wrong must show before the training
    new_names, new_folder = images.find(args.translate), images.out_folder(args.translate)
    new = images.read(args.translate, new_names, SIDE, args.background) / 127.5 - 1
x, y, test_x, test_real = (s.to(device) for s in images.read_pair(args.folders, SIDE, args.background))
if args.swap:
    x, y, test_x, test_real = y, x, test_real, test_x
valid, y = y[::VALIDATION], y[torch.arange(len(y), device=device) % VALIDATION > 0]
IMAGES = hashlib.sha256(b"".join(s.cpu().numpy().tobytes() for s in (x, y))).hexdigest()[:16]  # resumed with these only
CHANNELS, RANK = x.shape[1], min(RANK, (len(x) + len(y)) // 2)
CONSTANTS = constants_of(globals())
name = "_to_".join(os.path.basename(os.path.abspath(folder)) for folder in args.folders) + "_swapped" * args.swap
name = os.path.join(args.out, f"images_{name}_{SIDE}_eps{EPS:g}_seed{SEED}_{IMAGES[:4]}")


# ---------------------------------------------------------------------------------------------- potential

class Base(nn.Module):
    """The entropic plan between Gaussians with the means and covariances of both sets: full in the RANK main directions
    of both, isotropic outside them.  V: those directions, turned so that S is diagonal; with the mean of all images
    taken off, p is what is along V, o what is not:

        f(y) = |y|^2/2 - sum (p - r)^2/(2 S) - |o - r_o|^2/(2 S_o)
        pi_f(.|x) = N(r + S p_x, EPS S) along V, N(r_o + S_o o_x, EPS S_o) outside

    NOISE^2 is added to the variances of y, 0.01^2 to those of x.  No variance EPS S is below ETA/2, or Langevin steps
    would run away."""

    def __init__(self, x, y):
        super().__init__()
        x, y = x.flatten(1), y.flatten(1)
        mean, shift = (x.mean(0) + y.mean(0)) / 2, (y.mean(0) - x.mean(0)) / 2
        away, noises = (x - x.mean(0), y - y.mean(0)), (0.01 ** 2, NOISE ** 2)
        rows = torch.cat([*away, 2 * len(x) ** 0.5 * shift[None]])  # the shift too is a main direction
        V = torch.svd_lowrank(rows, q=min(RANK + 20, *rows.shape), niter=3)[2][:, :RANK]
        along = [a @ V for a in away]
        P, Q = (p.T.double() @ p.double() / len(p) for p in along)
        P, Q = (C.lerp(C.diag().diag(), PRIOR) + n * torch.eye(RANK).to(C) for C, n in zip((P, Q), noises))
        s0, s1 = ((a.square().sum() - p.square().sum()) / len(a) / max(1, len(V) - RANK) + n
                  for a, p, n in zip(away, along, noises))
        S, turn = torch.linalg.eigh(gaussian_map(P, Q, EPS))
        V, S = (V @ turn.float()).contiguous(), S.float().clamp_min(ETA / (2 * EPS))
        S_o = (2 * s1 / ((4 * s0 * s1 + EPS ** 2) ** 0.5 + EPS)).clamp_min(ETA / (2 * EPS))
        r, r_o = (1 + S) * (shift @ V), (1 + S_o) * (shift - shift @ V @ V.T)  # the means of x and y are -+ shift
        for key, value in dict(mean=mean, V=V, S=S, S_o=S_o, r=r, r_o=r_o).items():
            self.register_buffer(key, value)

    def parts(self, y):
        """-> p (B, RANK), o (B, C H W)."""
        y = y.flatten(1) - self.mean
        p = y @ self.V
        return p, y - p @ self.V.T

    def forward(self, y):
        """f(y): (B, C, H, W) -> (B,)."""
        p, o = self.parts(y)
        away = ((p - self.r).square() / self.S).sum(1) + (o - self.r_o).square().sum(1) / self.S_o
        return (p.square().sum(1) + o.square().sum(1) - away) / 2

    @torch.no_grad()
    def draw(self, x):
        """y ~ pi_f(.|x), exactly: (B, C, H, W) -> the same."""
        p, o = self.parts(x)
        noise = math.sqrt(EPS) * torch.randn_like(o)
        along = noise @ self.V
        p = self.r + self.S * p + self.S.sqrt() * along
        o = self.r_o + self.S_o * o + self.S_o.sqrt() * (noise - along @ self.V.T)
        return (self.mean + p @ self.V.T + o).view_as(x)


class Potential(nn.Module):
    """f = base + SCALE net: (B, C, H, W) -> (B,)."""

    def __init__(self, base):
        super().__init__()
        self.base, self.net = base, images.Pyramid(SIDE, CHANNELS, WIDTHS, HIDDEN)

    def forward(self, y):
        return self.base(y) + SCALE * self.net(y).squeeze(1)


# ---------------------------------------------------------------------------------------------- sampler and scores

def spread_order(points):
    """Row numbers of points (n, D) such that every stretch of rows lies together: halved at the median of each
    coordinate in turn.  A row from each of BATCH stretches makes a batch that is like the data, not by chance."""
    cells = [torch.arange(len(points), device=points.device)]
    for values in points.T:
        cells = [half for cell in cells for half in cell[values[cell].argsort(stable=True)].tensor_split(2)]
    return torch.cat(cells)


def newborn(first, n):
    """Sources and first y of n chains, numbered from `first` on; consecutive ones have sources far apart."""
    part = 0.6180339887 * torch.arange(first, first + n, dtype=torch.float64, device=device) % 1
    rows = (part * len(x)).long()
    return x[rows], base.draw(x[rows])


def translated(f, x, n):
    """n translations of each x; the same ones at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return images.translate(f, base.draw, x, n, EPS, NOISE, ETA, SAMPLE_STEPS, BOX)


def score(f, x, n, real):
    scores = images.translation_scores(x, translated(f, x, n), real, y)
    if scores["spread"] < COLLAPSED:
        print(f"warning: the translations are only {scores['spread']:.2f} times as varied as real images: a collapse")
    return scores


# ---------------------------------------------------------------------------------------------- training

base = Base(x, y).requires_grad_(False)
x, y = (s[spread_order(base.parts(s)[0][:, :8])] for s in (x, y))
f, f_avg, best = (Potential(base).to(device) for _ in range(3))
for net in (f_avg, best):
    net.requires_grad_(False).load_state_dict(f.state_dict())
opt = torch.optim.AdamW(f.net.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)
few = x[::max(1, len(x) // SCORED)]
shown = test_x[::math.ceil(len(test_x) / SHOWN)]
zero = torch.zeros(())
bank = common.Bank(*newborn(0, GROUPS * BATCH), gap=zero, rate=zero + 1, ended=zero, best_step=zero,
                   scores=torch.full((SCORES + 2, len(CURVES)), math.inf), early=torch.stack([shown, shown])).to(device)
print(f"{len(x)} sources, {len(y)} targets and {len(valid)} to choose by, {len(test_x)} and {len(test_real)} to test, "
      f"{CHANNELS} x {SIDE} x {SIDE}")

run = Run(args, f"{name}.pt", {"f": f, "f_avg": f_avg, "best": best, "opt": opt, "bank": bank}, STEPS, LOG_EVERY,
          CONSTANTS)
if bank.ended:
    run.steps = run.step
if run.step == 0:
    bank.scores[0] = torch.tensor([score(base, few, 1, valid)[what] for what in CURVES])
for step in run:
    opt.param_groups[0]["lr"] = bank.rate.item() * common.warm_cosine(LR, step, WARMUP, STEPS)
    visit, group = divmod(step, GROUPS)
    rows = slice(group * BATCH, (group + 1) * BATCH)
    age = (visit - torch.arange(BATCH, device=device) // RESTARTS) % LIFE
    x_now, y_now = bank.x[rows], bank.y[rows]  # views
    x_now[age == 0], y_now[age == 0] = newborn(GROUPS * BATCH + step * RESTARTS, RESTARTS)
    y_now[:] = images.walk(f, x_now, y_now, EPS, ETA, N_LANGEVIN, BOX)
    y_pos = y[common.stratified_rows(len(y), BATCH, device)]
    gap = common.train_step(f, opt, y_pos + NOISE * torch.randn_like(y_pos), y_now[age >= YOUNG])
    bank.gap += 0.01 * (gap - bank.gap)
    common.update_ema(f_avg, f, EMA_DECAY, step)
    at_wall = (y_now.abs() == BOX).float().mean()
    if not (bank.gap.abs() < WIDEST_GAP and at_wall < AT_WALL):  # nan too
        bank.rate /= 2
        print(f"warning: the training ran off at step {step}: back to the best weights, the rate times {bank.rate:g}")
        for net in (f, f_avg):
            net.load_state_dict(best.state_dict())
        opt.state.clear()
        bank.x[:], bank.y[:] = newborn(step, len(bank.x))
        bank.gap, at_wall = 0 * bank.rate, 0 * at_wall
        bank.ended += bank.rate < 0.5 ** TRIES
    if step % SCORE_EVERY == 0 or step == STEPS:
        k = -(-step // SCORE_EVERY)
        scores = score(f_avg, few, 1, valid)
        bank.scores[k] = torch.tensor([scores[what] for what in CURVES])
        energy, detail, nearest = bank.scores[:k + 1, :3].T
        order = (energy + detail + 0.1 * (nearest - 1).abs()).argsort()
        if order[0] == k:
            best.load_state_dict(f_avg.state_dict())
            bank.best_step.fill_(step)
        bank.ended += k - order[0] >= PATIENCE
    for k, part in enumerate(EARLY):
        if step == round(part * STEPS):
            bank.early[k] = translated(f_avg, shown, 1)[:, 0]
    if bank.ended:
        run.steps = step
    if run.due():
        run.log({}, gap=bank.gap, at_wall=at_wall, cost=common.quadratic_cost(bank.x, bank.y).mean(),
                square=bank.y.square().mean(), real_square=y.square().mean() + NOISE ** 2,
                max_param=common.max_param(f.net), **dict(zip(CURVES, bank.scores[step // SCORE_EVERY])))

# ---------------------------------------------------------------------------------------------- results

def words(scores):
    return " ".join(f"{k} {v:.4g}" for k, v in scores.items())


z = translated(best, test_x, TRANSLATIONS)
scores = images.translation_scores(test_x, z, test_real, y)
images.save_pairs(f"{name}_pairs.pt", test_x, z)
images.save_pairs(f"{name}_real.pt", test_x, test_real[:, None])
pool = y[common.stratified_rows(len(y), len(test_x), device)]
rows, columns = linear_sum_assignment(torch.cdist(test_x.flatten(1), pool.flatten(1)).square().cpu().numpy())
for what, some, control in (("base", test_x, translated(base, test_x, 1)),
                            ("retrieval", test_x[rows], pool[columns][:, None])):
    print(f"control {what} {words(images.translation_scores(some, control, test_real, y))}")

ones = translated(best, shown, 4)
nearest = y[torch.cdist(ones[:, 0].flatten(1), y.flatten(1)).argmin(1)]
title = (f"{' to '.join(map(os.path.basename, args.folders))}, eps = {EPS:g}: energy {scores['energy']:.3f}, detail "
         f"{scores['detail']:.3f}, nearest {scores['nearest']:.2f}, {run.step} steps, {run.seconds:.0f} s")
images.save_panels(f"{name}.png", title, (shown, 1, "source"), (translated(base, shown, 1)[:, 0], 1, "base"),
                   *((early, 1, f"at {100 * part:.0f} %") for early, part in zip(bank.early, EARLY)),
                   (ones.flatten(0, 1), 4, "four translations"), (nearest, 1, "nearest\nto the first"),
                   (test_real[:len(shown)], 1, "real"))
done = bank.scores[:, 0].isfinite().cpu()
steps = (torch.arange(len(done)) * SCORE_EVERY).clamp(max=run.step)
images.save_curves(f"{name}_curves.png", steps[done], dict(zip(CURVES, bank.scores.cpu()[done].T)))
if args.translate:
    new = (new.mean(1, keepdim=True) if CHANNELS == 1 else new).to(device)
    images.write_folder(new_folder, new_names, translated(best, new, args.copies))
print(f"wrote {name}.pt, .png, _curves.png, _pairs.pt, _real.pt")
print(f"final eps {EPS:g} {words(scores)} steps {run.step} best_step {bank.best_step.item():.0f} "
      f"train_s {run.seconds:.1f} total_s {time.perf_counter() - start_time:.1f}")
