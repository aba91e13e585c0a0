"""Coloured digits 2 -> 3, unpaired, by energy-guided entropic OT: pixels in [-1,1], cost |x-y|^2/2, the colour stays.

    pi_f(y|x) = exp((f(y) - |x-y|^2/2) / eps) / Z(x)        sampled by Langevin, one persistent chain per source image
    ascend      E_Q f(y) - E_P E_{pi_f(.|x)} f(y)           Algorithm 1 of Mokrov et al., ICLR 2024
    f = the exact potential of the Gaussian problem with the same means and covariances + ResNet

    python train_cmnist.py --eps 0.1    27 minutes on one CPU core, 1.1 GiB (43 TFLOP: minutes on any GPU), then 0.2 s
                                        a translation.  Downloads MNIST to data/ beside the script if it is not there
    python train_cmnist.py --smoke      the same path in seconds, on synthetic digits unless --data has real ones

Writes beside itself (or under --out) cmnist_eps0.1_seed0.pt, which --resume carries on from, the figure (.png) and
_pairs.pt = {"x": (N,3,32,32), "y": (N,M,3,32,32)}: every test 2 and M translations of it.

The Gaussian part knows from the first step that the background is black and which pixels go together; the net learns
what is not Gaussian.  Real digits get noise of deviation NOISE: without it Q is so thin that f would become too steep
for the chains to mix.  Samples of the learned plan have that noise too, so a translation ends by removing it:
SAMPLE_STEPS Langevin steps from the source image, then ANNEAL_STEPS in which the sampler's noise falls to 0.  Pixel
noise relaxes in about 2 NOISE^2 / ETA steps, 4 to 10, and is gone after these.  What varies slowly, such as slant and
shape, mostly stays: in the data's main directions translations keep 95 % of their deviation at eps 0.01, 87 % at 0.1,
88 % at 1.

In the log, cost and hue_err are those of the chains; their noise adds 3072 NOISE^2 / 2 to the cost, 61, or 15 at eps
0.01.  The last line scores the translations of the test 2s: see digits.digit_scores, and
    slow_hot    deviation over the translations of one x in the data's first MAIN_DIRECTIONS, where chains are slow,
                before annealing, less the noise's share; slow_cold: after
"""
import common  # first, so that Ctrl-C during the slow imports below ends without a traceback

import math
import os
import time

import torch
from torch import nn

import digits

args = common.arguments(__doc__, __file__, eps=0.1, data=digits.DATA_OPTION)
device = args.device
start_time = time.perf_counter()

# ---------------------------------------------------------------------------------------------- constants
EPS = args.eps
SEED = args.seed
SOURCE_DIGIT, TARGET_DIGIT = 2, 3
STEPS = 2400             # Adam steps
BATCH = 64               # chains moved per step, and real digits per step
N_LANGEVIN = 10          # Langevin steps of a chain per training step
NOISE = min(0.2, math.sqrt(EPS))  # added to real digits; the plan scatters by sqrt(EPS), more is not decodable from x
ETA = min(NOISE ** 2 / 2, 0.2 * EPS)  # Langevin step, fine enough for the noise and the plan; 0.4 EPS diverged at 0.01
BOX = 3.0                # pixels are clipped to +-BOX: a chain thrown out where f is too steep stays, and flattens f
AT_WALL = 0.05           # share of clipped pixels that counts as divergence; healthy runs stay below 0.0002
RESTART = 0.03           # share of chains restarted per step, at y = x in a new colour: 330 Langevin steps, as at test
RANK = 128               # pixel-space directions whose covariance the Gaussian part knows; the rest share one variance
WIDTH, DEPTH = 32, 0     # of the ResNet: with residual blocks (16 or 24 wide) it learned less in the same two minutes
SCALE = EPS / ETA        # of the net: a Langevin step then moves a chain by grad net / 2, whatever EPS
LR, BETAS = 1e-3, (0.0, 0.99)  # of Adam; falls to 0 by a cosine
WARMUP = 50              # steps
EMA_DECAY = 0.995        # of the weights, per step
SAMPLE_STEPS, ANNEAL_STEPS = 300, 60  # Langevin steps of a translation
TRANSLATIONS = 4         # of each test image
MAIN_DIRECTIONS = 20     # of the data, for slow_hot and slow_cold
SHOWN = 8                # rows of the figure
TEST_SEED = 1            # of the test images' colours
if args.smoke:
    STEPS, BATCH, N_LANGEVIN, RANK, WIDTH, SAMPLE_STEPS, ANNEAL_STEPS, TRANSLATIONS, SHOWN = 12, 8, 2, 8, 4, 4, 3, 2, 3
LOG_EVERY = max(1, STEPS // 80)

name = os.path.join(args.out, f"cmnist_eps{EPS:g}_seed{SEED}" + "_smoke" * args.smoke)


# ---------------------------------------------------------------------------------------------- data

grey_sources, grey_targets, test_x, test_real = digits.load_task(
    args.data, SOURCE_DIGIT, TARGET_DIGIT, args.smoke, torch.Generator().manual_seed(TEST_SEED), device)
BATCH, RANK = min(BATCH, len(grey_sources)), min(RANK, len(grey_sources) + len(grey_targets))
CONSTANTS = common.constants_of(globals())


# ---------------------------------------------------------------------------------------------- potential

class Gaussian(nn.Module):
    """The exact potential of entropic OT between Gaussians with the means and covariances of samples x, y (n, D):

        f(y) = |y|^2/2 - (y - m1)^T T^-1 (y - m1)/2 - y^T m0,    pi_f(.|x) = N(m1 + T (x - m0), eps T)

    T from common.gaussian_map.  Covariances are full in the RANK main directions of x and y together, a multiple of the
    identity in the rest.  NOISE^2 is added to that of y, 0.01^2 to that of x, which must be invertible."""

    def __init__(self, x, y):
        super().__init__()
        m0, m1 = x.mean(0), y.mean(0)
        basis = torch.svd_lowrank(torch.cat([x - m0, y - m1]), RANK, niter=3)[2]
        (S0, rest0), (S1, rest1) = self.covariance(x - m0, basis, 0.01), self.covariance(y - m1, basis, NOISE)
        rest = 2 * rest1 / ((4 * rest0 * rest1 + EPS ** 2) ** 0.5 + EPS)  # T outside the basis
        values, vectors = torch.linalg.eigh(common.gaussian_map(S0, S1, EPS))
        values = values.clamp_min(ETA / (2 * EPS))  # in directions narrower than that Langevin's step would explode
        excess = (vectors * (1 / values - 1 / rest)) @ vectors.T  # of T^-1, inside the basis
        for key, value in dict(m0=m0, m1=m1, basis=basis, rest=torch.tensor(rest), excess=excess).items():
            self.register_buffer(key, value.float())

    @staticmethod
    def covariance(centred, basis, noise):
        """Of centred samples (n, D) + noise: in the basis (RANK, RANK), and the variance of each other direction."""
        inside = (centred @ basis).double()
        outside = centred.double().square().sum() - inside.square().sum()
        identity = torch.eye(RANK, dtype=torch.float64, device=centred.device)
        variance = outside / len(centred) / (centred.shape[1] - RANK)
        return inside.T @ inside / len(centred) + noise ** 2 * identity, variance.item() + noise ** 2

    def forward(self, y):
        y = y.flatten(1)
        d = y - self.m1
        u = d @ self.basis
        return (y.square().sum(1) - d.square().sum(1) / self.rest - ((u @ self.excess) * u).sum(1)) / 2 - y @ self.m0


class Potential(nn.Module):
    """f = gaussian + SCALE * ResNet: (B, 3, 32, 32) -> (B,)."""

    def __init__(self, gaussian):
        super().__init__()
        self.gaussian = gaussian
        self.net = common.ResNet(32, 3, WIDTH, DEPTH, SCALE)

    def forward(self, y):
        return self.gaussian(y) + self.net(y)


# ---------------------------------------------------------------------------------------------- sampler

def mcmc_step(f, x, y, temperature=1.0):
    """One Langevin step that cannot leave the box."""
    return common.langevin(f, x, y, EPS, ETA, 1, temperature=temperature).clamp_(-BOX, BOX)


def translate(f, x):
    """-> translations of x (n, 3, 32, 32) before and after annealing, hot and cold (n, 3, 32, 32)."""
    hot, cold, last_print = [], [], time.perf_counter()
    for x_part in x.split(4 * BATCH):
        y = x_part
        for _ in range(SAMPLE_STEPS):
            y = mcmc_step(f, x_part, y)
        hot.append(y)
        for k in range(1, ANNEAL_STEPS + 1):
            y = mcmc_step(f, x_part, y, max(0.0, 1 - k / (0.8 * ANNEAL_STEPS)))
        cold.append(y)
        if time.perf_counter() - last_print > 30:
            print(f"translated {sum(map(len, cold))}/{len(x)}")
            last_print = time.perf_counter()
    return torch.cat(hot), torch.cat(cold)


# ---------------------------------------------------------------------------------------------- training

def in_four_colours(grey):
    return torch.cat([digits.colorize(grey).flatten(1) for _ in range(4)])


first_x = digits.colorize(grey_sources)
gaussian = Gaussian(in_four_colours(grey_sources), in_four_colours(grey_targets)).to(device)
f, f_avg = (Potential(gaussian).to(device) for _ in range(2))
f_avg.load_state_dict(f.state_dict())
opt = torch.optim.Adam(f.parameters(), lr=LR, betas=BETAS, fused=True)
bank = common.Bank(first_x, first_x)
flops = BATCH * (f.net.flops + 4 * 3072 * RANK) * (2 * N_LANGEVIN + 3 * 2)  # of a training step
print(f"{len(grey_sources)} sources, {len(grey_targets)} targets, {len(test_x)} test images; "
      f"{STEPS * flops / 1e12:.2g} TFLOP in all, so many seconds where 1 TFLOP/s is reached (an eighth of a GTX 1080)")

run = common.Run(args, name + ".pt", {"f": f, "f_avg": f_avg, "opt": opt, "bank": bank}, STEPS, LOG_EVERY, CONSTANTS,
                 "lower ETA or LR")
for step in run.steps():
    opt.param_groups[0]["lr"] = common.warm_cosine(LR, step, WARMUP, STEPS)
    rows = bank.rows(BATCH)
    restart = torch.rand(BATCH, 1, 1, 1, device=device) < RESTART
    x = torch.where(restart, digits.colorize(grey_sources[rows]), bank.x[rows])
    y = torch.where(restart, x, bank.y[rows])
    for _ in range(N_LANGEVIN):
        y = mcmc_step(f, x, y)
    bank.x[rows], bank.y[rows] = x, y
    y_pos = digits.colorize(grey_targets[torch.randint(len(grey_targets), (BATCH,), device=device)])
    gap = common.train_step(f, opt, y_pos + NOISE * torch.randn_like(y_pos), y)
    common.update_ema(f_avg, f, EMA_DECAY, step)
    if run.due():
        run.log({"gap": 1e5, "at_wall": AT_WALL, "max_param": 100}, gap=gap,
                cost=common.quadratic_cost(bank.x, bank.y).mean(), hue_err=digits.hue_error(bank.x, bank.y).median(),
                square=y.square().mean(), real_square=y_pos.square().mean() + NOISE ** 2,
                at_wall=(y.abs() == BOX).float().mean(), max_param=common.max_param(f))

# ---------------------------------------------------------------------------------------------- scores and figure

def slow_deviation(y, noise=0.0):
    """Over the translations y (N, M, ...) of one x, in the main directions, less that of the noise."""
    variance = (y.flatten(2) @ gaussian.basis[:, :MAIN_DIRECTIONS]).var(1)
    return (variance - noise ** 2).sum(1).mean().clamp_min(0).sqrt().item()


hot, cold = (y.unflatten(0, (-1, TRANSLATIONS)) for y in translate(f_avg, test_x.repeat_interleave(TRANSLATIONS, 0)))
cold = cold.clamp(-1, 1)
scores = digits.digit_scores(test_x, cold, test_real)
scores |= {"slow_hot": slow_deviation(hot, NOISE), "slow_cold": slow_deviation(cold)}
digits.save_pairs(f"{name}_pairs.pt", test_x, cold)

shown = test_x[::math.ceil(len(test_x) / SHOWN)]
_, six = translate(f_avg, shown.repeat_interleave(6, 0))
rows = torch.linspace(0, len(bank.x) - 1, 2 * len(shown)).long()
title = (f"Coloured {SOURCE_DIGIT}s to {TARGET_DIGIT}s, eps = {EPS:g}: cost {scores['cost']:.0f} (discrete OT "
         f"{scores['ot_cost']:.0f}), hue error {scores['hue_err']:.1f} degrees, spread {scores['spread']:.3f}, "
         f"{run.step} steps, {run.seconds:.0f} s")
translated = torch.cat([shown[:, None], six.unflatten(0, (-1, 6))], 1).flatten(0, 1)
chains = torch.stack([bank.x[rows], bank.y[rows]], 1).flatten(0, 1)
digits.save_panels(name + ".png", title, (translated, 7, "test source, and six translations of it"),
                   (chains, 4, "two chains of the bank\na row: x, y with its noise"),
                   (test_real[:2 * len(shown)], 2, f"real test {TARGET_DIGIT}s"))
print(f"wrote {name}.png, {name}_pairs.pt and {name}.pt")

run.report_rate(flops)
print(f"final eps {EPS:g} " + " ".join(f"{k} {v:.4g}" for k, v in scores.items()) +
      f" steps {run.step} train_s {run.seconds:.1f} total_s {time.perf_counter() - start_time:.1f}")
