"""Coloured digits, 2 -> 3, unpaired, by energy-guided entropic OT: pixels in [-1,1], cost |x-y|^2/2, the colour stays.

    pi_f(y|x) = exp((f(y) - |x-y|^2/2) / eps) / Z(x)           sampled by Langevin, one persistent chain per source image
    ascend      E_Q f(y) - E_P E_{pi_f(.|x)} f(y)              Algorithm 1 of Mokrov et al., ICLR 2024
    f = the exact potential of the Gaussian problem with the same means and covariances + ResNet

    python train_cmnist.py --eps 0.1     25 minutes on one CPU core, 1.1 GiB; by count 43 TFLOP, minutes on any GPU.  Then every
                                         test 2 is translated, 0.2 s a translation on that core.  MNIST is downloaded to
                                         data/ beside the script if it is not there
    python train_cmnist.py --smoke       the same path in seconds, on drawn digits unless --data has real ones

Writes beside itself (or under --out) cmnist_eps0.1.pt, which --resume carries on from, the figure cmnist_eps0.1.png and
cmnist_eps0.1_pairs.pt = {"x": (N,3,32,32), "y": (N,M,3,32,32)}: every test 2 and M translations of it.

The Gaussian part knows from the first step that the background is black and which pixels go together; the net learns
what is not Gaussian.  Real digits carry noise of deviation NOISE, so that f is smooth and chains mix.  A translation is
ROUNDS Langevin steps from the source image, then COOLING steps in which the noise falls to 0: these take out the grain, which
relaxes in about 2 NOISE^2 / ETA steps, 4 to 10, but of what varies slowly, such as slant and shape, little: it keeps 95 % of
the translations' deviation in the data's main directions at eps 0.01, 87 % at 0.1, 88 % at 1.

The log's cost and hue_err are the bank's, whose grain adds 3072 NOISE^2 / 2 to the cost: 61, or 15 at eps 0.01.
Scores of the translations of test 2s, in the last line: those of common.digit_scores (cost, hue_err, spread, shape, blur,
off_colour), and
    ot_cost     cost of exact discrete OT from them to as many real test 3s: with few of them, few colours to choose from
    slow_hot    deviation over the translations of one x in the MAIN first directions of the data, where chains are slow,
                before cooling, less the grain; slow_cold: after
"""
import math
import os
import time

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torchvision.datasets import MNIST

import common

beside = os.path.dirname(os.path.abspath(__file__))
args = common.arguments(__doc__, __file__, eps=0.1, data=dict(default=os.path.join(beside, "data"), metavar="FOLDER",
                                                              help="with MNIST in torchvision's layout, or where to download it to (default %(default)s)"))
stop = common.Stop()
torch.set_flush_denormal(True)

# ---------------------------------------------------------------------------------------------- constants
EPS = args.eps
SEED = args.seed
SOURCE_DIGIT, TARGET_DIGIT = 2, 3
STEPS = 2400             # Adam steps
BATCH = 64               # chains moved per step, and real digits per step
N_LANGEVIN = 10          # Langevin steps of a chain per training step
NOISE = min(0.2, math.sqrt(EPS))  # deviation, on real digits: what the plan itself scatters; more would have to be made from details of x
ETA = min(NOISE ** 2 / 2, 0.2 * EPS)  # Langevin step: resolves the noise and, at small eps, the narrowest directions; 0.4 eps diverged at 0.01
BOX = 3.0                # pixels stay within +-BOX: where f has become too steep for the step, it learns so instead of losing the chain
RESTART = 0.03           # share of the chains per step restarted at y = x in a new colour: they live 330 steps, as at test time
RANK = 128               # directions in pixel space whose covariances the Gaussian part knows; the others share one variance
WIDTH, DEPTH = 32, 0     # of the ResNet: with residual blocks (16 or 24 wide) it learned less in the same two minutes
SCALE = EPS / ETA        # of the net; (f - c)/eps then moves a chain by grad net / 2 per Langevin step
LR, BETAS = 1e-3, (0.0, 0.99)  # of Adam; falls to 0 by a cosine
WARMUP = 50              # steps
AVERAGE = 0.995          # of the weights, per step
ROUNDS, COOLING = 300, 60  # Langevin steps of a translation
PER_IMAGE = 4            # translations of each test image
MAIN = 20                # directions in which slow_hot and slow_cold look
SHOWN = 8                # rows of the figure
TEST_SEED = 1            # of the test images' colours
if args.smoke:
    STEPS, BATCH, N_LANGEVIN, RANK, WIDTH, ROUNDS, COOLING, PER_IMAGE, SHOWN = 12, 8, 2, 8, 4, 4, 3, 2, 3
LOG_EVERY = max(1, STEPS // 80)

device = args.device
begun = time.perf_counter()
name = f"cmnist_eps{EPS:g}" + "_smoke" * args.smoke
checkpoint, figure, pairs = (os.path.join(args.out, name + end) for end in (".pt", ".png", "_pairs.pt"))


# ---------------------------------------------------------------------------------------------- data

def load(digit, train):
    return common.digits(MNIST, args.data, digit, train, drawn=args.smoke).to(device)


grey, real = load(SOURCE_DIGIT, True), load(TARGET_DIGIT, True)
test_generator = torch.Generator().manual_seed(TEST_SEED)
test_x, test_real = (common.paint(load(digit, False), generator=test_generator) for digit in (SOURCE_DIGIT, TARGET_DIGIT))
BATCH, RANK = min(BATCH, len(grey)), min(RANK, len(grey) + len(real))
CONSTANTS = common.constants_of(globals())


# ---------------------------------------------------------------------------------------------- potential

class Gaussian(nn.Module):
    """The exact potential of entropic OT between Gaussians with the means and covariances of samples x, y (n, D):

        f(y) = |y|^2/2 - (y - m1)^T T^-1 (y - m1)/2 - y^T m0,    pi_f(.|x) = N(m1 + T (x - m0), eps T)

    T from common.gaussian_map.  Covariances are full in the RANK main directions of x and y together,
    a multiple of the identity in the rest, plus NOISE^2 for y."""

    def __init__(self, x, y):
        super().__init__()
        m0, m1 = x.mean(0), y.mean(0)
        basis = torch.svd_lowrank(torch.cat([x - m0, y - m1]), RANK, niter=3)[2]
        (S0, rest0), (S1, rest1) = self.covariance(x - m0, basis, 0.01), self.covariance(y - m1, basis, NOISE)
        rest = 2 * rest1 / ((4 * rest0 * rest1 + EPS ** 2) ** 0.5 + EPS)  # T outside the basis
        values, vectors = torch.linalg.eigh(common.gaussian_map(S0, S1, EPS))
        excess = (vectors * (1 / values.clamp_min(ETA / (2 * EPS)) - 1 / rest)) @ vectors.T  # narrower, Langevin's step would explode
        for name, value in (("m0", m0), ("m1", m1), ("basis", basis), ("rest", torch.tensor(rest)), ("excess", excess)):
            self.register_buffer(name, value.float())

    @staticmethod
    def covariance(x, basis, noise):
        """Of centred samples x (n, D) + noise: in the basis (RANK, RANK), and the variance of each other direction."""
        inside = (x @ basis).double()
        rest = (x.double().square().sum() - inside.square().sum()) / len(x) / (x.shape[1] - RANK)
        return inside.T @ inside / len(x) + noise ** 2 * torch.eye(RANK, dtype=torch.float64, device=x.device), rest.item() + noise ** 2

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


def walk(f, x, y, steps, heat=1.0):
    """Langevin steps that cannot leave the box."""
    for _ in range(steps):
        y = common.langevin(f, x, y, EPS, ETA, 1, heat=heat).clamp_(-BOX, BOX)
    return y


def translate(f, x):
    """-> translations of x (n, 3, 32, 32) hot, that is with the grain of NOISE, and cooled; ROUNDS + COOLING evaluations."""
    hot, cold, said = [], [], time.perf_counter()
    for x_part in x.split(4 * BATCH):
        y = walk(f, x_part, x_part, ROUNDS)
        hot.append(y)
        for k in range(1, COOLING + 1):
            y = walk(f, x_part, y, 1, heat=max(0.0, 1 - k / (0.8 * COOLING)))
        cold.append(y)
        if time.perf_counter() - said > 30:
            print(f"translated {sum(map(len, cold))}/{len(x)}", flush=True)
            said = time.perf_counter()
    return torch.cat(hot), torch.cat(cold)


# ---------------------------------------------------------------------------------------------- training

x = common.paint(grey)
gaussian = Gaussian(*(torch.cat([common.paint(digit).flatten(1) for _ in range(4)]) for digit in (grey, real))).to(device)  # four colours each
f, f_avg = (Potential(gaussian).to(device) for _ in range(2))
f_avg.load_state_dict(f.state_dict())
opt = torch.optim.Adam(f.parameters(), lr=LR, betas=BETAS, fused=True)
bank = common.Bank(x, x)
per_image = f.net.flops + 4 * 3072 * RANK  # of one forward pass
per_step = BATCH * per_image * (2 * N_LANGEVIN + 3 * 2)
print(f"{len(grey)} sources, {len(real)} targets, {len(test_x)} test images; {per_step / 1e9:.1f} GFLOP a step: {STEPS * per_step / 1e12 / 60:.2g} minutes "
      f"for all steps on a card that reaches 1 TFLOP/s (an eighth of a GTX 1080)", flush=True)

parts = {"f": f, "f_avg": f_avg, "opt": opt, "bank": bank}
state = common.begin(checkpoint, parts, CONSTANTS, args.resume)
step, progress = state["step"], common.Progress(STEPS, state["step"], state["seconds"], device)


def save():
    common.save(checkpoint, parts, step=step, seconds=progress.seconds, constants=CONSTANTS, code=open(__file__, encoding="utf-8").read())


save()  # a full disk or a folder without permission shows now, not in an hour
stop.armed, last = True, step == STEPS
while not last:
    step += 1
    opt.param_groups[0]["lr"] = common.warm_cosine(LR, step, WARMUP, STEPS)
    rows = bank.rows(BATCH)
    fresh = torch.rand(BATCH, 1, 1, 1, device=device) < RESTART
    x = torch.where(fresh, common.paint(grey[rows]), bank.x[rows])
    y = walk(f, x, torch.where(fresh, x, bank.y[rows]), N_LANGEVIN)
    bank.x[rows], bank.y[rows] = x, y
    y_pos = common.paint(real[torch.randint(len(real), (BATCH,), device=device)])
    gap = common.train_step(f, opt, y_pos + NOISE * torch.randn_like(y_pos), y)
    common.average_weights(f_avg, f, AVERAGE, step)

    last, due = step == STEPS or bool(stop), progress.save_due()  # asked once: nothing is saved unchecked
    if due or last or step % LOG_EVERY == 0:
        values = {"gap": gap, "cost": common.quadratic_cost(bank.x, bank.y).mean(), "hue_err": common.hue_error(bank.x, bank.y).median(),
                  "square": y.square().mean(), "real_square": y_pos.square().mean() + NOISE ** 2,
                  "weight": torch.cat([p.detach().flatten() for p in f.parameters()]).abs().max()}
        now = dict(zip(values, torch.stack(list(values.values())).tolist()))  # the only sync
        common.stop_if_diverged(100, square=now["square"], weight=now.pop("weight"))
        common.stop_if_diverged(1e5, gap=now["gap"])  # of some 100 at the start
        progress.line(step, **now)
    if due:
        save()
train_s = progress.seconds
save()

# ---------------------------------------------------------------------------------------------- scores and figure

hot, y = (part.unflatten(0, (len(test_x), PER_IMAGE)) for part in translate(f_avg, test_x.repeat_interleave(PER_IMAGE, 0)))
y = y.clamp(-1, 1)
n = min(len(test_x), len(test_real))
matrix = torch.cdist(test_x[:n].flatten(1), test_real[:n].flatten(1)).square().cpu() / 2
ot_cost = matrix[linear_sum_assignment(matrix.numpy())].mean().item()


def slow(y, grain=0.0):
    main = (y.flatten(2) @ gaussian.basis[:, :MAIN]).var(1)
    return (main - grain ** 2).sum(1).mean().clamp_min(0).sqrt().item()


scores = common.digit_scores(test_x, y, test_real)
scores |= {"ot_cost": ot_cost, "cost_ratio": scores["cost"] / ot_cost, "slow_hot": slow(hot, NOISE), "slow_cold": slow(y)}
common.save_pairs(pairs, test_x, y)

shown = test_x[::math.ceil(len(test_x) / SHOWN)]
more = translate(f_avg, shown.repeat_interleave(6, 0))[1].unflatten(0, (len(shown), 6))
some = torch.linspace(0, len(bank.x) - 1, 2 * len(shown)).long()
fig, axes = plt.subplots(1, 3, figsize=(13, 7.4), layout="constrained", width_ratios=[7, 4, 2])
chains, digit = torch.stack([bank.x[some], bank.y[some]], 1).flatten(0, 1), f"{TARGET_DIGIT}s"
for axis, picture, title in ((axes[0], common.tiled(torch.cat([shown[:, None], more], 1).flatten(0, 1), 7), "test source, and six translations of it"),
                             (axes[1], common.tiled(chains, 4), "two chains of the bank\na row: x, y with its grain"),
                             (axes[2], common.tiled(test_real[:2 * len(shown)], 2), f"real test {digit}")):
    axis.imshow(picture.numpy())
    axis.set_title(title)
    axis.axis("off")
fig.suptitle(f"Coloured {SOURCE_DIGIT}s to {digit}, eps = {EPS:g}: cost {scores['cost']:.0f} (discrete OT {ot_cost:.0f}), hue error {scores['hue_err']:.1f} degrees, "
             f"spread {scores['spread']:.3f}, {step} steps, {train_s:.0f} s")
common.draw(fig, figure)
print(f"wrote {figure}, {pairs} and {checkpoint}")

rate, busy = common.matmul_rate(device), per_step * step / max(train_s, 1e-9)
print(f"arithmetic {per_step / 1e9:.1f} GFLOP a step, {busy / 1e9:.0f} GFLOP/s: {100 * busy / rate:.0f} % of the {rate / 1e9:.0f} GFLOP/s "
      f"of a float32 matrix product here")
print(f"final eps {EPS:g} " + " ".join(f"{k} {v:.4g}" for k, v in scores.items()) +
      f" steps {step} train_s {train_s:.1f} total_s {time.perf_counter() - begun:.1f}")
