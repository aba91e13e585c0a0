"""Unpaired translation between two folders of images by energy-guided entropic OT: pixels in [-1,1], cost |x-y|^2/2.

    pi_f(y|x) = exp((f(y) - |x-y|^2/2) / eps) / Z(x)        sampled by Langevin
    ascend      E_Q f(y) - E_P E_{pi_f(.|x)} f(y)           Algorithm 1 of Mokrov et al., ICLR 2024
    f = base + net: Gaussians, whose plan is known in closed form, and a network; chains start from a mixture's plan

    python train_images.py DIR                     DIR holds trainA, trainB (and testA, testB): CycleGAN's layout
    python train_images.py A B                     two folders; a tenth of each is held out
    python train_images.py A B --side 64           pixels: 32 (4 minutes of one core), 64 (10) or 128 (30, 5 GiB)
    python train_images.py A B --eps 0.3           temperature of the plan: more varied, further from the source
    python train_images.py A B --steps 3600        four times as long: clearer where images are of many kinds
    python train_images.py A B --resume --translate NEW    a finished run: translates every file of NEW
    python train_images.py --smoke                 the same path in seconds, on made-up images

Any format that PIL reads; central squares, averaged down to the side, grey if all images are.  Writes beside itself (or
under --out) images_A_to_B_32_eps0.07_seed0_HASH.pt, which --resume carries on from, a figure (.png), the scores' curves
(_curves.png) and, for eval_fid.py, _real.pt and _pairs.pt, "x": (N,C,S,S), "y": (N,M,C,S,S); NEW_translated beside NEW.

A chain starts from an exact draw of a mixture's plan in the base's main directions (ascent.py, half a minute): kinds of
targets are shared out there, which Langevin steps would not do.  The net learns, at every resolution, to undo what that
leaves: blends of targets, ghosts of the source.  A step moves one in GROUPS of the chains, drawn anew: the same ones
would oscillate, and f with them.  After LIFE rounds of GROUPS steps chains end; one in GROUPS is spared once.

Weights are scored on images held out for this alone: so few tell divergence, not which of two good scores is better.
Of weights whose scores noise cannot tell from the best the last are kept.  A training that diverges goes back to these
at half the rate: there always is a plan, if only the base's.  The last line scores translations of test sources;
`control mixture` is the start alone, `control retrieval` training targets paired by discrete OT: a score that these
reach too is no evidence.  `longer` takes LONGER times as many steps: if f is right, its translations are as good.
"""
import contextlib
import hashlib
import math
import os
import time

import torch
from PIL import Image, ImageColor, ImageDraw
from scipy.optimize import linear_sum_assignment

import ascent
import common
import images
from mixture import MainPlan, load
from run import Run, WORLD, arguments, constants_of, fail, make_folder, number

args = arguments(
    __doc__, __file__, default_eps=0.07, folders=dict(nargs="*", metavar="DIR or A B", help="folders of images"),
    side=dict(type=int, choices=(32, 64, 128), default=32, help="pixels (default 32)"),
    background=dict(type=ImageColor.getrgb, default=(255,) * 3, help="under transparent images (default white)"),
    steps=dict(type=number(100, 10 ** 6, int), help="of the training (default 900; at 128 pixels 800)"),
    swap=dict(action="store_true", help="from B to A"),
    translate=dict(metavar="NEW", help="also translate this folder of images, into NEW_translated"),
    copies=dict(type=number(1, 100, int), help="translations of each image of NEW (default 1)"))
device, start_time = args.device, time.perf_counter()
if WORLD > 1:
    fail("images train in one process: start train_images.py with python, not with torchrun")
if args.smoke and args.folders or len(args.folders) not in ((0,) if args.smoke else (1, 2)):
    fail("name one folder that holds trainA and trainB, or two folders of images, A B; or --smoke without any")
if args.copies and not args.translate:
    fail("--copies is for --translate NEW: name a folder to translate")

# ---------------------------------------------------------------------------------------------- constants
EPS, SEED, SIDE = args.eps, args.seed, args.side
STEPS = args.steps or {32: 900, 64: 900, 128: 800}[SIDE]  # of AdamW, at most
WIDTHS = {32: (12, 36, 72, 144), 64: (8, 24, 48, 96, 144), 128: (8, 16, 32, 64, 128, 160)}[SIDE]  # channels
HIDDEN = 256             # units after the last
BATCH, N_LANGEVIN = 64, 5  # chains moved per step, and targets; Langevin steps of each
GROUPS, LIFE, YOUNG = 3, 16, 4  # sets of BATCH chains; rounds of GROUPS steps that a chain lives, that f ignores it
WALK, LAST, LONGER = 50, 10, 4  # Langevin steps of a translation; last y averaged; factor of `longer`
NOISE = min(0.16, 0.5 * math.sqrt(EPS))  # deviation of what is added to targets, as with the digits
ETA, BOX, SCALE = NOISE ** 2 / 2, 3.0, EPS / NOISE ** 2  # Langevin step; pixels stay in +-BOX; of the net
AT_WALL, WIDEST_GAP = 0.05, 3000.0  # share of clipped pixels, mean of 100 gaps that count as divergence
RANK, PRIOR = 128, 0.02  # main directions, whose covariances the base knows; weight of the diagonals in them
FITTED = 6000            # images of a set, at most, that the mixture is fitted to: half a minute
LR, WARMUP = {32: 3e-3, 64: 1.6e-3, 128: 1e-3}[SIDE], 50  # of AdamW; rises in WARMUP steps, then falls to 0 by a cosine
BETAS, DECAY = (0.0, 0.9), 0.8  # one bad gradient slows ten steps (0.99: hundreds); decay of weights, per LR and step
AVERAGED = 4             # weights are a mean over about the last of so many parts of the steps: f swings as it learns
SCORES, SCORED, VALIDATION = 9, 100, 20  # times that weights are scored, on so many translations, by every 20th target
DOUBT, DRAWS = 3.0, 20   # scores within so many deviations of noise are equal (the best of 9 has luck); its draws
TRIES, COLLAPSED, GRAINY = 4, 0.7, 1.25  # restarts after divergence, at half the rate; spread, nearest that warn
TRANSLATIONS, SHOWN, EARLY = 2, 8, (0.1, 0.3)  # of each test image; rows of the figure; parts of STEPS also shown
if args.smoke:
    BATCH, N_LANGEVIN, GROUPS, LIFE, YOUNG, WALK, RANK, WIDTHS, HIDDEN = 8, 2, 2, 4, 1, 4, 8, (4, 4, 8, 8), 8
    STEPS, SCORES, SCORED, SHOWN = args.steps or 12, 3, 4, 3
CURVES = "energy", "detail", "nearest", "sharp", "spread"  # in the log and drawn
LOG_EVERY, SCORE_EVERY = max(1, STEPS // 60), max(1, STEPS // SCORES)


# ---------------------------------------------------------------------------------------------- data

def make_up(folder, n, disc, seed):
    """Fill a folder with n made-up images: squares, or discs, of random place, size and colour, on white."""
    make_folder(folder)
    draws = torch.rand(n, 6, generator=torch.Generator().manual_seed(seed)).tolist()
    for k, (size, *corner, red, green, blue) in enumerate(draws):
        size, picture = 40 + 32 * size, Image.new("RGB", (128, 128), "white")
        corner = [8 + (112 - size) * at for at in corner]
        draw = getattr(ImageDraw.Draw(picture), "ellipse" if disc else "rectangle")
        draw([*corner, *(at + size for at in corner)], tuple(round(200 * c) for c in (red, green, blue)))
        picture.save(os.path.join(folder, f"{k:02d}.png"))


if args.smoke:
    args.folders = [os.path.join(args.out, "images_smoke_data")]
    for k, (part, n) in enumerate((("trainA", 60), ("trainB", 60), ("testA", 6), ("testB", 6))):
        make_up(os.path.join(args.folders[0], part), n, k % 2, k)
if args.translate:  # read now: what is wrong must show before the training
    new_names, new_folder = images.find(args.translate), images.out_folder(args.translate)
    new = images.read(args.translate, new_names, SIDE, args.background) / 127.5 - 1
x, y, test_x, test_real = (s.to(device) for s in images.read_pair(args.folders, SIDE, args.background))
x, y, test_x, test_real = (y, x, test_real, test_x) if args.swap else (x, y, test_x, test_real)
VALIDATION = min(VALIDATION, len(y) // 3)  # at least three of few images
valid, y = y[::VALIDATION].clone(), y[torch.arange(len(y), device=device) % VALIDATION > 0]
IMAGES = hashlib.sha256(repr([s.sum((2, 3), dtype=torch.float64).tolist() for s in (x, y)]).encode()).hexdigest()[:16]
CHANNELS, RANK = x.shape[1], min(RANK, (len(x) + len(y)) // 2)
CONSTANTS = constants_of(globals())  # a run is resumed with the same images only
title = "_to_".join(os.path.basename(os.path.abspath(folder)) for folder in args.folders) + "_swapped" * args.swap
name = os.path.join(args.out, f"images_{title}_{SIDE}_eps{EPS:g}_seed{SEED}_{IMAGES[:4]}")


# ---------------------------------------------------------------------------------------------- base, chains, scores

# no variance EPS S is below ETA/2, or Langevin steps would run away
base = MainPlan(x, y, EPS, RANK, (0.01 ** 2, NOISE ** 2), (ETA / (2 * EPS), None), PRIOR).requires_grad_(False)
x, y = (common.kd_order(base.parts(s)[0][:, -8:], s, 8) for s in (x, y))


def fitted():
    """A mixture's plan along the base's main directions, or one Gaussian's, where images are few or that is better."""
    with contextlib.suppress(Exception):  # a damaged or foreign checkpoint: Run says below what is wrong with it
        if args.resume and (plan := load(f"{name}.pt").to(device)).center_x.shape == base.r.shape:
            return plan
    most = BATCH if args.resume else FITTED  # few, at once, where Run will refuse
    p, q = (base.parts(s[::-(-len(s) // most)])[0] for s in (x, y))
    return ascent.fit(p, q + NOISE * torch.randn_like(q), EPS, say=lambda m, how, _: print(len(m.r), "components", how))


clusters = fitted()
start, draw = (lambda y: base(y, clusters)), (lambda x: base.draw(x, clusters))  # f, draws of that plan
potential = lambda net: lambda y: base(y) + SCALE * net(y).squeeze(1)  # f: (B, C, H, W) -> (B,)
some = x[::math.ceil(len(x) / SCORED)]  # whose translations are scored


def newborn(first, n):
    """Sources and first y of n chains, numbered from `first` on; consecutive ones have sources far apart."""
    rows = (0.6180339887 * torch.arange(first, first + n, dtype=torch.float64, device=device) % 1 * len(x)).long()
    return x[rows], draw(x[rows])


def translated(f, x, n, longer=1):
    """n translations of each x, by longer times WALK steps (0: draws of the start); the same ones at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return images.translate(f, draw, x, n, EPS, NOISE, ETA, longer * WALK, BOX, last=LAST)


def score(z, seen=y):
    """-> the CURVES of translations z of some training sources, against targets held out."""
    scores = images.translation_scores(some, z[:, None], valid, seen)
    if scores["spread"] < COLLAPSED:
        print(f"warning: the translations are only {scores['spread']:.2f} times as varied as real images: a collapse")
    return torch.tensor([scores[what] for what in CURVES], device=device).nan_to_num(1e3)  # nan, of a run-off


def total(scores):
    """What weights are chosen by, the less the better, of (..., len(CURVES))."""
    energy, detail, nearest = scores.unbind(-1)[:3]
    return energy.relu() + detail.relu() + 0.1 * (nearest - 1).abs()  # below 0: noise


def noise_of_total():
    """Standard deviation of total where random targets of one half stand for translations; `seen` is the other."""
    draws, n = torch.Generator().manual_seed(SEED), torch.arange(len(some), device=device)
    halves = [torch.randperm(len(y), generator=draws).to(device).chunk(2) for _ in range(DRAWS)]
    return torch.stack([total(score(y[a[n % len(a)]], y[b])) for a, b in halves]).std()  # few targets: with repeats


# ---------------------------------------------------------------------------------------------- training

net, net_avg, best = (images.Pyramid(SIDE, CHANNELS, WIDTHS, HIDDEN).to(device) for _ in range(3))
for other in (net_avg, best):
    other.requires_grad_(False).load_state_dict(net.state_dict())
f, opt = potential(net), torch.optim.AdamW(net.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)
zero, shown = torch.zeros((), device=device), test_x[::math.ceil(len(test_x) / SHOWN)]
bank = common.Bank(*newborn(0, GROUPS * BATCH))
state = common.State(gap=zero, rate=zero + 1, noise=zero, early=torch.stack([shown] * 2), ended=zero, best_step=zero,
                     scores=zero.new_full((STEPS // SCORE_EVERY + 2, len(CURVES)), math.inf))
print(f"{len(x)} sources, {len(y)} targets, {len(valid)} to choose by; to test: {len(test_x)}, {len(test_real)}")

parts = dict(base=base, plans=torch.nn.ModuleList([clusters]), net=net, net_avg=net_avg, best=best, opt=opt)
run = Run(args, f"{name}.pt", {**parts, "bank": bank, "state": state}, STEPS, LOG_EVERY, CONSTANTS)
if not args.resume:
    state.scores[0], state.noise = score(translated(base, some, 1)[:, 0]), noise_of_total()
run.steps, rate = run.step if state.ended else STEPS, state.rate.item()
for step in run:
    opt.param_groups[0]["lr"] = rate * common.warm_cosine(LR, step, WARMUP, STEPS)
    (turn, group), born = divmod(step, GROUPS), BATCH // LIFE
    rows = bank.rows(BATCH).roll(-(1 + turn) * born)  # one of any GROUPS neighbours, the oldest first
    rows[-born:] += group - rows[-born:] % GROUPS  # those whose turn it is, one after the other
    x_now, y_now = bank.x[rows], bank.y[rows]
    if group != turn // LIFE % GROUPS:  # else spared
        x_now[-born:], y_now[-born:] = newborn(GROUPS * BATCH + step * born, born)
    y_now = images.walk(f, x_now, y_now, EPS, ETA, N_LANGEVIN, BOX)
    bank.x[rows], bank.y[rows] = x_now, y_now
    y_pos = y[common.stratified_rows(len(y), BATCH, device)]
    gap = common.train_step(f, opt, y_pos + NOISE * torch.randn_like(y_pos), y_now[:BATCH - YOUNG * born])
    state.gap += 0.01 * (gap - state.gap)
    common.update_ema(net_avg, net, step, AVERAGED)
    due, at_wall = run.due() or step == 2, (y_now.abs() == BOX).float().mean()  # 2: the time left shows at once
    ran_off = due and not (state.gap.abs() < WIDEST_GAP and at_wall < AT_WALL)  # nan too
    if ran_off:
        state.rate /= 2
        rate = state.rate.item()
        print(f"warning: the training ran off at step {step}: back to the best weights, the rate times {state.rate:g}")
        for other in (net, net_avg):
            other.load_state_dict(best.state_dict())
        opt.state.clear()
        bank.x[:], bank.y[:] = newborn(step, len(bank.x))
        state.gap, at_wall = 0 * state.rate, 0 * at_wall
        state.ended += state.rate < 0.5 ** TRIES
    if step % SCORE_EVERY == 0 or step == STEPS:
        k = -(-step // SCORE_EVERY)
        state.scores[k] = score(translated(potential(net_avg), some, 1)[:, 0])
        totals = total(state.scores[:k + 1])
        if totals[k] <= totals.min() + DOUBT * state.noise and not ran_off:
            best.load_state_dict(net_avg.state_dict())
            state.best_step.fill_(step)
    if step in (marks := [round(part * STEPS) for part in EARLY]):
        state.early[marks.index(step)] = translated(potential(net_avg), shown, 1)[:, 0]
    if due and state.ended:
        run.steps = min(step + 1, STEPS)  # the last one is logged, and saved
    if due:
        run.log({}, gap=state.gap, at_wall=at_wall, cost=common.quadratic_cost(bank.x, bank.y).mean(),
                square=bank.y.square().mean(), real_square=y.square().mean() + NOISE ** 2,
                max_param=common.max_param(net), **dict(zip(CURVES, state.scores[step // SCORE_EVERY])))

# ---------------------------------------------------------------------------------------------- results

def report(what, x, y_made):
    """Print the scores of translations of test sources."""
    print(what, " ".join(f"{k} {v:.4g}" for k, v in images.translation_scores(x, y_made, test_real, y).items()))


f = potential(best)
z = translated(f, test_x, TRANSLATIONS)
images.save_pairs(f"{name}_pairs.pt", test_x, z)
images.save_pairs(f"{name}_real.pt", test_x, test_real[:, None])
pool = y[common.stratified_rows(len(y), len(test_x), device)]
rows, columns = linear_sum_assignment(torch.cdist(test_x.flatten(1), pool.flatten(1)).square().cpu().numpy())
report("control mixture", test_x, translated(start, test_x, 1, 0))
report("control retrieval", test_x[rows], pool[columns][:, None])
report("longer", test_x, translated(f, test_x, 1, LONGER))
if args.translate:
    new = (new.mean(1, keepdim=True) if CHANNELS == 1 else new).to(device)
    images.write_folder(new_folder, new_names, translated(f, new, args.copies or 1))

four, columns = translated(f, shown, 4), {"source": shown, "mixture": translated(start, shown, 1, 0)[:, 0]}
columns |= {f"at {100 * part:.0f} %": early for part, early in zip(EARLY, state.early)}
nearest = y[torch.cdist(four[:, 0].flatten(1), y.flatten(1)).argmin(1)]
columns |= {"four translations": four.flatten(0, 1), "nearest\nto the first": nearest, "real": test_real[:len(shown)]}
images.save_panels(f"{name}.png", f"{os.path.basename(name)}, {run.step} steps, {run.seconds:.0f} s",
                   *((column, max(1, len(column) // len(shown)), what) for what, column in columns.items()))
done = state.scores[:, 0].isfinite().cpu()
steps = (torch.arange(len(done)) * SCORE_EVERY).clamp(max=run.step)
images.save_curves(f"{name}_curves.png", steps[done], dict(zip(CURVES, state.scores.cpu()[done].T)))
print(f"wrote {name}.pt")
if GRAINY < state.scores[-(-run.step // SCORE_EVERY), 2] < 1e3:  # inf: not scored yet
    print(f"warning: translations are farther from the training targets than real ones are: try --steps {4 * STEPS}")
report(f"final eps {EPS:g} steps {run.step} best_step {state.best_step.item():.0f} train_s {run.seconds:.1f} "
       f"total_s {time.perf_counter() - start_time:.1f}", test_x, z)
