"""Coloured digits 2 -> 3, unpaired, by energy-guided entropic OT: pixels in [-1,1], cost |x-y|^2/2, the colour stays.

    pi_f(y|x) = exp((f(y) - |x-y|^2/2) / eps) / Z(x)        sampled by Langevin, one persistent chain per source image
    ascend      E_Q f(y) - E_P E_{pi_f(.|x)} f(y)           Algorithm 1 of Mokrov et al., ICLR 2024
    f = base + net: a mixture of one Gaussian per colour, whose plan is known in closed form, and a network

    python train_cmnist.py --eps 0.1    9 minutes on one CPU core, 1.1 GiB (23 TFLOP: minutes on any GPU), then 0.02 s
                                        a translation.  Downloads MNIST to data/ beside the script if it is not there
    python train_cmnist.py --smoke      the same path in seconds, on synthetic digits unless --data has real ones
    python train_cmnist.py --resume --translate FOLDER     also translates the images of a folder, after a finished run

Writes beside itself (or under --out) cmnist_eps0.1_seed0.pt, which --resume carries on from, the figure (.png) and
_pairs.pt = {"x": (N,3,32,32), "y": (N,M,3,32,32)}: every test 2 and M translations of it.

A digit g in the colour c is the image 2 g c - 1: brightness times colour, a matrix of rank one.  The base knows that
from the first step: each of its Gaussians has the covariance of grey digits along its own colour, and little more than
pixel noise in all other directions.  It leaves ghosts of the 2 behind.  The net learns the shape.  It sees the
brightness along the image's own colour, one channel for three.  Its heads read every resolution, the finest too:
sharp edges are learned there.  Its second output keeps as many y in every hue as there are x.

Real digits get noise of deviation NOISE: without it Q is so thin that f would become too steep for the chains to mix.
NOISE^2 stays well below eps, or the plan's own scatter could be taken for the noise, and a 2 for a digit of any
colour.  Samples y of the learned plan have that noise too.  A translation starts from an exact draw of the base's
plan, takes SAMPLE_STEPS Langevin steps, half as long as those of the training (f is rough there at full length), and
ends with the mean of the image y0 under the noise, given y = y0 + noise and x (Tweedie):

    E[y0|y,x] = y + NOISE^2 grad_y log pi_f(y|x)

Two things keep f smooth and fair.  Its weights decay: else they grow severalfold, a step of Adam moves f ever more, and
it ends rough or runs off.  Chains start from 2s bent a little: f is learned only where chains go, and without this the
2s of the training became 3s more often than others did (99 against 94 % at eps 0.01).

--translate: any image format, size and mode, one digit on black in a colour of full saturation.  It is laid on black
where it is transparent, and its brightness is that of its brightest channel, up to 1.  Then it is made as MNIST was:
cut to what is lit, shrunk or enlarged to 20 pixels, put with its centre of mass into the middle of 32x32, and painted
in the hue of its summed colour.  A grey one becomes red.  FOLDER_translated gets TRANSLATIONS files of each and a
figure.

In the log, cost and hue_err are those of the chains; their noise adds 3072 NOISE^2 / 2 to the cost.  The last line
scores the translations of the test 2s: see digits.digit_scores.  The lines `control` give the same scores to the base
alone, nothing learned, and to the nearest training 3 painted in the 2's own hue: what one of them reaches too proves
nothing.
"""
import common  # first, so that Ctrl-C during the slow imports below ends without a traceback

import math
import os
import time

import torch
import torch.nn.functional as F
from torch import nn

import digits

args = common.arguments(
    __doc__, __file__, eps=0.1, data=digits.DATA_OPTION,
    translate=dict(metavar="FOLDER", help="also translate its images, into FOLDER_translated"))
device = args.device
start_time = time.perf_counter()

# ---------------------------------------------------------------------------------------------- constants
EPS = args.eps
SEED = args.seed
SOURCE_DIGIT, TARGET_DIGIT = 2, 3
STEPS = 3600             # AdamW steps
BATCH = 64               # chains moved per step, and real digits per step
N_LANGEVIN = 5           # Langevin steps of a chain per training step; with 2 f ran away from the chains
NOISE = min(0.16, 0.5 * math.sqrt(EPS))  # added to real digits
ETA = NOISE ** 2 / 2     # Langevin step; at twice that chains exploded now and then
BOX = 3.0                # pixels are clipped to +-BOX
AT_WALL = 0.05           # share of clipped pixels that counts as divergence; healthy runs stay below 0.0002
SCALE = EPS / NOISE ** 2  # of the net
WIDEST_GAP = 300 + 300 * EPS  # mean of 100 steps, in size; counts as divergence.  Healthy: 15 + 30 EPS, few digits 160
RESTARTS = 2             # chains of the batch that start afresh in a new colour: one lives for 160 Langevin steps
HUES = 48                # Gaussians of the base
RANK = 128               # grey images whose variance it knows one by one
CROP = 4                 # pixels at each border that the net does not see; 0.03 % of the light is there
WIDTHS = 8, 24, 48, 128  # channels of the net at 24, 12, 6 and 3 pixels
HIDDEN = 256             # units after the last
TINT = 2.0               # of its second output, beside its first
LR = 2.4e-3 if EPS < 0.3 else 8e-4  # of AdamW, falls to 0 by a cosine; more lowers is_target at eps 1
BETAS = 0.0, 0.99
DECAY = 0.8 if EPS > 0.03 else 1.0  # of the weights, times LR, per step: else they grow, f gets rough and runs off
BEND = 0.06              # of the sources: without it more of the training 2s become 3s than of others
WARMUP = 50              # steps
EMA_DECAY = 0.995        # of the weights, per step
SAMPLE_STEPS = 60        # of a translation; after many more y drifts, as f is learned from chains that live for 160
TRANSLATIONS = 4         # of each test image
SHOWN = 8                # rows of the figure
TEST_SEED = 1            # of the test images' colours
if args.smoke:
    STEPS, BATCH, N_LANGEVIN, RANK, WIDTHS, HIDDEN, SAMPLE_STEPS = 12, 8, 2, 8, (4, 4, 8, 8), 8, 4
    TRANSLATIONS, SHOWN = 2, 3
LOG_EVERY = max(1, STEPS // 80)

name = os.path.join(args.out, f"cmnist_eps{EPS:g}_seed{SEED}" + "_smoke" * args.smoke)


# ---------------------------------------------------------------------------------------------- data

folder = digits.load_folder(args.translate) if args.translate else None  # bad images are said before the training
grey_sources, grey_targets, test_x, test_real = digits.load_task(
    args.data, SOURCE_DIGIT, TARGET_DIGIT, args.smoke, torch.Generator().manual_seed(TEST_SEED), device)
BATCH, RANK = min(BATCH, len(grey_sources)), min(RANK, len(grey_sources) + len(grey_targets))
CONSTANTS = common.constants_of(globals())


# ---------------------------------------------------------------------------------------------- potential

class Hues(nn.Module):
    """A mixture potential (Korotin et al., ICLR 2024) of one Gaussian for each of HUES colours c_k; y is the image + 1:

        v(y) = sum_k a_k N(y; r_k, EPS S_k)        f(y) = |y|^2/2 + EPS log v(y)
        pi_f(.|x) = sum_k w_k(x) N(r_k + S_k x, EPS S_k),   w_k(x) ~ a_k exp((x.S_k x + 2 r_k.x) / (2 EPS))

    S_k is diagonal.  Along c_k, in the RANK main directions of the grey digits and outside them, and along the colour
    circle times the mean digit, it is the S of the exact plan between Gaussians with the variances of x and y there;
    NOISE^2 is added to those of y, 0.01^2 to those of x.  In all other directions there is nothing but that noise.
    a_k: such that each colour gets as many x as it has y."""

    def __init__(self, grey_x, grey_y):
        super().__init__()
        x, y = 2 * grey_x.flatten(1).double(), 2 * grey_y.flatten(1).double()
        basis = torch.linalg.svd(torch.cat([x, y]), full_matrices=False)[2][:RANK].T
        means, squares = [g.mean(0) @ basis for g in (x, y)], [basis.T @ (g.T @ g) @ basis / len(g) for g in (x, y)]
        outside = [(g.square().sum() - (g @ basis).square().sum()) / len(g) / (x.shape[1] - RANK) for g in (x, y)]
        noises = 0.01 ** 2, NOISE ** 2

        # the colours: unit vectors along c_k and, across it, along the hexagon; its edges have length 1
        hue = (torch.arange(HUES, dtype=torch.float64, device=x.device) + 0.5) / HUES
        c, edge = digits.rgb_of(hue), F.normalize(digits.rgb_of(hue + 1e-3) - digits.rgb_of(hue - 1e-3))
        length, along = c.norm(dim=1), F.normalize(c)
        ahead = (edge * along).sum(1)
        across = F.normalize(edge - ahead[:, None] * along)
        stretch = (3 / HUES) ** 2  # variance of a colour within its 6 / HUES of the hexagon; neighbours overlap

        def full(k):  # S_k in the basis, along c_k
            moved = [length[k] ** 2 * (M - m.outer(m)) + ahead[k] ** 2 * stretch * M for m, M in zip(means, squares)]
            return common.gaussian_map(*(M + n * torch.eye(RANK).to(M) for M, n in zip(moved, noises)), EPS)

        def single(factor, variances):  # S in one direction
            s0, s1 = (factor * v + n for v, n in zip(variances, noises))
            return 2 * s1 / ((4 * s0 * s1 + EPS ** 2) ** 0.5 + EPS)

        turn = torch.linalg.eigh(full(0))[1]  # the S_k have nearly the same main directions; from here on exactly
        digit = F.normalize(means[1], dim=0)
        S = torch.cat([torch.stack([((full(k) @ turn) * turn).sum(0) for k in range(HUES)]),
                       single(length ** 2, outside)[:, None],
                       single((1 - ahead ** 2) * stretch, [digit @ M @ digit for M in squares])[:, None],
                       single(torch.zeros_like(length), outside)[:, None]], 1).clamp_min(ETA / (2 * EPS))
        basis, means, digit = basis @ turn, [m @ turn for m in means], digit @ turn
        r = length[:, None] * (means[1] - S[:, :RANK] * means[0])  # along c_k, in the basis
        for key, value in dict(basis=basis, digit=digit, along=along, across=across, S=S, r=r).items():
            self.register_buffer(key, value.float())
        log_scale = S[:, :RANK + 2].log().sum(1) + (x.shape[1] - RANK - 1) * S[:, RANK].log()
        log_v0 = -log_scale / 2 - (r.square() / S[:, :RANK]).sum(1) / (2 * EPS)
        self.register_buffer("quadratic_v", self.weights(-1 / S, r / S[:, :RANK]).float())
        self.register_buffer("quadratic_w", self.weights(S, r).float())
        log_w, log_a = self.features(in_many_colours(grey_x) + 1) @ self.quadratic_w, torch.zeros(HUES, device=x.device)
        for _ in range(200):
            log_a = log_a - ((log_w + log_a).softmax(1).mean(0) * HUES).clamp_min(1e-30).log()
        self.register_buffer("log_a", log_a)
        self.register_buffer("log_v0", (log_v0 + log_a).float())

    def weights(self, M, linear):
        """(features, HUES): M_k[-1] |y|^2 is left out of  (y.M_k y / 2 + linear_k.y) / EPS, M (HUES, RANK + 3)."""
        inside, outside, edge, rest = M.split([RANK, 1, 1, 1], 1)
        along, across = (v[:, :, None, None] * v[:, None, :, None] for v in (self.along.double(), self.across.double()))
        square = along * torch.cat([inside - outside, 0 * edge, outside - rest], 1)[:, None, None]
        square = square + across * torch.cat([0 * inside, edge - rest, 0 * rest], 1)[:, None, None]
        linear = self.along.double()[:, :, None] * linear[:, None]
        return torch.cat([square.flatten(1) / 2, linear.flatten(1)], 1).T / EPS

    def features(self, y):
        """Products of two channels and channels, in the basis: (B, 3, H, W) -> (B, 9 (RANK + 2) + 3 RANK)."""
        y = y.flatten(2)
        inside = y @ self.basis
        terms = torch.cat([inside, (inside @ self.digit)[:, :, None]], 2)
        products = torch.cat([terms[:, :, None] * terms[:, None], (y @ y.mT)[..., None]], 3)
        return torch.cat([products.flatten(1), inside.flatten(1)], 1)

    def forward(self, y):
        """f(y): (B, 3, H, W) -> (B,)."""
        y = y + 1
        log_v = self.features(y) @ self.quadratic_v + self.log_v0
        return (1 - 1 / self.S[0, -1]) * y.square().flatten(1).sum(1) / 2 + EPS * log_v.logsumexp(1)

    def times(self, y, k, power):
        """S_k^power y: (B, 3, H, W), (B,) -> the same."""
        inside, outside, edge, rest = (self.S[k] ** power).split([RANK, 1, 1, 1], 1)
        along, across, flat = self.along[k][:, :, None], self.across[k][:, :, None], y.flatten(2)
        light, shift = (along * flat).sum(1), (across * flat).sum(1) @ self.basis @ self.digit
        own = (outside - rest) * light + ((inside - outside) * (light @ self.basis)) @ self.basis.T
        turned = (edge - rest) * shift[:, None] * (self.basis @ self.digit)
        return (rest[:, None] * flat + along * own[:, None] + across * turned[:, None]).view_as(y)

    @torch.no_grad()
    def draw(self, x):
        """y ~ pi_f(.|x), exactly: (B, 3, H, W) -> the same."""
        k = common.sample_index((self.features(x + 1) @ self.quadratic_w + self.log_a).softmax(1)).squeeze(1)
        mean = (self.along[k][:, :, None] * (self.r[k] @ self.basis.T)[:, None]).view_as(x) + self.times(x + 1, k, 1)
        return mean + math.sqrt(EPS) * self.times(torch.randn_like(x), k, 0.5) - 1


class Net(nn.Module):
    """Two outputs, each a sum of one head at each of four resolutions: (B, 1, side, side) -> (B, 2).  0 at the start.
    The heads are linear.  One more at the coarsest has a hidden layer: it tells whole digits from mere strokes."""

    def __init__(self, side):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(1, WIDTHS[0], 3, 1, 1)])
        self.convs.extend(nn.Conv2d(a, b, 4, 2, 1) for a, b in zip(WIDTHS, WIDTHS[1:]))
        sides = [side >> k for k in range(len(WIDTHS))]
        sizes = [width * s ** 2 for width, s in zip(WIDTHS, sides)]
        self.heads = nn.ModuleList(nn.Linear(size, 2) for size in sizes)
        self.hidden = nn.Linear(sizes[-1], HIDDEN)
        self.heads.append(nn.Linear(HIDDEN, 2))
        for head in self.heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.flops = 2 * (sum(s ** 2 * conv.weight.numel() for s, conv in zip(sides, self.convs))
                          + self.hidden.weight.numel())  # of one forward pass

    def forward(self, y):
        y, f = y.contiguous(memory_format=torch.channels_last), 0.0  # faster in it on a CPU
        for conv, head in zip(self.convs, self.heads):
            y = F.silu(conv(y))
            f = f + head(y.flatten(1))
        return f + self.heads[-1](F.silu(self.hidden(y.flatten(1))))


class Potential(nn.Module):
    """f = base + SCALE (n_1 + TINT (|c|^2 - 1.5) n_2), n the net's outputs, c the image's own colour: (B, 3, 32, 32) ->
    (B,).  |c|^2 is 1 for red, green and blue, 2 for yellow, cyan and magenta: all that sets one colour apart from
    another, by symmetry.  A digit takes more light there, and without n_2 the y would leave those hues."""

    def __init__(self, base, mean_digit):
        super().__init__()
        self.base, self.net = base, Net(mean_digit.shape[-1] - 2 * CROP)
        self.register_buffer("where", mean_digit)  # (1, 32, 32): the hue is that of the light there

    def seen(self, y):
        """Brightness along the image's own colour c, -1 to 1, and |c|^2: (B, 3, 32, 32) -> (B, 1, 24, 24), (B,)."""
        c = digits.rgb_of(digits.hue_of((y + 1) * self.where))
        square = c.square().sum(1)
        light = ((y + 1) * (c / square[:, None])[:, :, None, None]).sum(1, keepdim=True) - 1
        return light[:, :, CROP:-CROP, CROP:-CROP], square

    def forward(self, y):
        light, square = self.seen(y)
        shape, tint = self.net(light).unbind(1)
        return self.base(y) + SCALE * (shape + TINT * (square - 1.5) * tint)


# ---------------------------------------------------------------------------------------------- sampler

def walk(f, x, y, steps, eta):
    """Langevin steps that cannot leave the box.  A step's noise is the mean of its own and the last one's (Leimkuhler &
    Matthews 2013): exact for Gaussians, which independent noise makes a seventh wider."""
    noise = torch.randn_like(y)
    for _ in range(steps):
        _, grad = common.log_p_and_grad(f, x, y, EPS)
        old, noise = noise, torch.randn_like(y)
        y = (y + eta / 2 * grad + math.sqrt(eta) * (old + noise) / 2).clamp(-BOX, BOX)
    return y


def translate(f, x, n):
    """n translations of each x, without noise: (N, 3, 32, 32) -> (N, n, 3, 32, 32)."""
    done, last_print = [], time.perf_counter()
    for part in x.repeat_interleave(n, 0).split(4 * BATCH):
        y = walk(f, part, base.draw(part), SAMPLE_STEPS, ETA / 2)
        done.append((y + NOISE ** 2 * common.log_p_and_grad(f, part, y, EPS)[1]).clamp(-1, 1))
        if time.perf_counter() - last_print > 30:
            print(f"translated {sum(map(len, done))}/{n * len(x)}")
            last_print = time.perf_counter()
    return torch.cat(done).unflatten(0, (-1, n))


# ---------------------------------------------------------------------------------------------- training

def bent(grey):
    """Digits turned, sheared and stretched by a random matrix, 1 + BEND N(0, 1): (n, 1, 32, 32) -> the same."""
    if not len(grey):  # the share of one among many processes: affine_grid refuses none
        return grey
    matrix = torch.eye(2, 3, device=grey.device).repeat(len(grey), 1, 1)
    matrix[:, :, :2] += BEND * torch.randn(len(grey), 2, 2, device=grey.device)
    return F.grid_sample(grey, F.affine_grid(matrix, grey.shape, align_corners=False), align_corners=False)


def in_many_colours(grey):
    return torch.cat([digits.colorize(grey) for _ in range(8)])


base = Hues(grey_sources, grey_targets).to(device)
f, f_avg = (Potential(base, grey_targets.mean(0)).to(device) for _ in range(2))
f_avg.load_state_dict(f.state_dict())
opt = torch.optim.AdamW(f.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)
first_x = digits.colorize(grey_sources)
bank = common.Bank(first_x, base.draw(first_x), gap=torch.zeros((), device=device))
flops = BATCH * (f.net.flops + 12 * 1024 * RANK) * (2 * N_LANGEVIN + 3 * 2)  # of a training step
print(f"{len(grey_sources)} sources, {len(grey_targets)} targets, {len(test_x)} test images; "
      f"{STEPS * flops / 1e12:.2g} TFLOP in all, so many seconds where 1 TFLOP/s is reached (an eighth of a GTX 1080)")

run = common.Run(args, name + ".pt", {"f": f, "f_avg": f_avg, "opt": opt, "bank": bank}, STEPS, LOG_EVERY, CONSTANTS,
                 "lower ETA or LR, or raise DECAY")
for step in run.steps():
    opt.param_groups[0]["lr"] = common.warm_cosine(LR, step, WARMUP, STEPS)
    rows = bank.rows(BATCH)
    x, y = bank.x[rows], bank.y[rows]
    fresh = common.stratified_rows(len(rows), common.share(RESTARTS, step), device)
    x[fresh] = digits.colorize(bent(grey_sources[rows[fresh]]))
    y[fresh] = base.draw(x[fresh])
    y = walk(f, x, y, N_LANGEVIN, ETA)
    bank.x[rows], bank.y[rows] = x, y
    y_pos = digits.colorize(grey_targets[torch.randint(len(grey_targets), (len(rows),), device=device)])
    gap = common.train_step(f, opt, y_pos + NOISE * torch.randn_like(y_pos), y)
    bank.gap += 0.01 * (gap - bank.gap)
    common.update_ema(f_avg, f, EMA_DECAY, step)
    if run.due():
        run.log({"at_wall": AT_WALL, "mean_gap": WIDEST_GAP, "max_param": 100},
                at_wall=(y.abs() == BOX).float().mean(), gap=gap, mean_gap=bank.gap,
                cost=common.quadratic_cost(bank.x, bank.y).mean(),
                hue_err=digits.hue_error(bank.x, bank.y).median(), square=y.square().mean(),
                real_square=y_pos.square().mean() + NOISE ** 2, max_param=common.max_param(f.net))

# ---------------------------------------------------------------------------------------------- scores and figure

def words(scores):
    return " ".join(f"{k} {v:.4g}" for k, v in scores.items())


y = translate(f_avg, test_x, TRANSLATIONS)
scores = digits.digit_scores(test_x, y, test_real)
digits.save_pairs(f"{name}_pairs.pt", test_x, y)
nearest = torch.cdist(digits.brightness(test_x), grey_targets.flatten(1)).argmin(1)
painted = digits.colorize(grey_targets[nearest], digits.hue_of(test_x))
controls = {"base": translate(base, test_x, TRANSLATIONS), "nearest": painted[:, None]}
for what, control in controls.items():
    print(f"control {what} {words(digits.digit_scores(test_x, control, test_real))}")
    digits.save_pairs(f"{name}_control_{what}.pt", test_x, control)

shown = test_x[::math.ceil(len(test_x) / SHOWN)]
six = translate(f_avg, shown, 6)
rows = torch.linspace(0, len(bank.x) - 1, 2 * len(shown)).long()
title = (f"Coloured {SOURCE_DIGIT}s to {TARGET_DIGIT}s, eps = {EPS:g}: cost {scores['cost']:.0f} (discrete OT "
         f"{scores['ot_cost']:.0f}), hue error {scores['hue_err']:.1f} degrees, spread {scores['spread']:.3f}, "
         f"{run.step} steps, {run.seconds:.0f} s")
chains = torch.stack([bank.x[rows], bank.y[rows]], 1).flatten(0, 1)
digits.save_panels(name + ".png", title,
                   (torch.cat([shown[:, None], six], 1).flatten(0, 1), 7, "test source, and six translations of it"),
                   (chains, 4, "two chains of the bank\na row: x, y with its noise"),
                   (test_real[:2 * len(shown)], 2, f"real test {TARGET_DIGIT}s"))
print(f"wrote {name}.png, {name}_pairs.pt and {name}.pt")
if folder:
    digits.save_folder(args.translate, *folder, translate(f_avg, folder[1].to(device), TRANSLATIONS))

run.report_rate(flops)
print(f"final eps {EPS:g} {words(scores)} steps {run.step} train_s {run.seconds:.1f} "
      f"total_s {time.perf_counter() - start_time:.1f}")
