"""AFHQ cats (or wild animals) -> dogs at 512x512: energy-guided entropic OT into the latent space of a dog generator.

    source x    photographs, their central square averaged down to side SIDE, in [0,1]
    target z    N(0, I_512), latents of the StyleGAN2-ADA generator G;  no encoder anywhere
    cost        c(x,z) = AREA |G(z) - x|^2/2 over pixels and colours at SIDE; AREA = (512/SIDE)^2 keeps the meaning of eps
    f(z)        -eps |z|^2/2 + net(sqrt(512) z/|z|):  pi_f(z|x) ~ N(z; 0, I) exp((net - c(x,z)) / eps), proper from the start;
                G sees only the direction of z, so the best net does too, and |z| has its law for nothing
    ascend      E_Q f(z) - E_P E_{pi_f(.|x)} f(z)              Algorithm 1 of Mokrov et al., ICLR 2024

    python train_afhq_latent.py --source cat --data afhq --generator afhqdog.pkl     overnight on a GTX 1080 Ti class card
    python train_afhq_latent.py --check      the same code on a generator of random weights, 32 dimensions, against discrete OT:
                                             8 minutes on one CPU core, 5 of them training, 1.6 GiB
    python train_afhq_latent.py --smoke      the same path in seconds

--data: AFHQ as released by the stargan-v2 project (v1: train/cat/*.jpg, val/cat/...; v2: test/cat/...), or any folder of
images, of which every tenth is then held out.  --generator: afhqdog.pkl of NVIDIA's StyleGAN2-ADA-PyTorch release, folder
"pretrained".  Both are looked for beside this script.  The images are decoded once, to a cache of bytes beside them.

Writes beside itself (or under --out) afhq_cat_eps1.pt, which --resume carries on from, and the figure afhq_cat_eps1.png;
--translate DIR also writes the held-out images' translations at full size, for eval_fid.py (of a finished run: with --resume).

By count, not yet run on the official files: a step is 19.7 TFLOP, so 8 000 steps and the scores 10.8 h at 4.4 TFLOP/s (40 %
of a GTX 1080 Ti) and 5 GB.  Given up against the original (1 100 steps of 128 chains, K = 100, at 512, four A100s, that is
2 700 Langevin steps per source): the cost sees SIDE = 128 through G stopped there, its colours matched; a source gets some
200 Langevin steps.  In return chains start from a discrete plan instead of noise, move with Metropolis' test at a step that
adapts, and jump within a pool of latents whose images are kept.

    latent_var, latent_square, latent_ks   of the translations of held-out images; 1, 1 and exact_ks were they N(0, I)
    cost, discrete_cost, assigned_cost     of the translations, of POT's entropic plan between the same images and as many
                                           fresh latents, and of the best pairing of these
    zero_...                               the same with nothing learned, net = 0 (--check)
"""
import hashlib
import math
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import ot
import torch
from torch import nn
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment

import common
import stylegan2

beside = os.path.dirname(os.path.abspath(__file__))
args = common.arguments(
    __doc__, __file__, eps=1.0, source=dict(default="cat", help="cat or wild: the folder under DATA/train and DATA/val (default cat)"),
    data=dict(default=os.path.join(beside, "afhq"), help="folder of the images (default: afhq beside the script); unused by --check and --smoke"),
    generator=dict(default=os.path.join(beside, "afhqdog.pkl"), help="of the targets (default: afhqdog.pkl beside the script); unused by --check and --smoke"),
    translate=dict(metavar="DIR", help="also write the held-out images' translations there, as PNG"),
    check=dict(action="store_true", help="a problem made up in 32 dimensions, scored against discrete OT"))
stop = common.Stop()
torch.set_flush_denormal(True)
torch.backends.cudnn.allow_tf32 = False  # for the same reason as no fp16 below

# ---------------------------------------------------------------------------------------------- constants
EPS = args.eps
SEED = args.seed
SIDE = 128               # of the images the cost sees: half the arithmetic of 512, a quarter of its memory
STEPS = 8000             # Adam steps
BATCH = 32               # chains moved per step
N_LANGEVIN = 4           # Langevin steps of a chain per training step; one more evaluation starts them
ETA, ACCEPT = 6e-5, 0.6  # first Langevin step, the original's; led from there to this accepted fraction
POOL, JUMPS = 2048, 512  # latents with their images kept at hand, and how many of them a chain may jump to per step
RESTART = 0.05           # share of the chains per step that must jump: where chains freeze, f still learns the law of starts
WIDTH, DEPTH = 512, 3
SCALE = 0.05             # of net, in units of the spread over latents of their mean cost, which is what net has to undo
LR, BETAS = 5e-4, (0.9, 0.99)  # of Adam; falls to 0 by a cosine
WARMUP = 50              # steps
AVERAGE = 0.998          # of the weights, per step
ROUNDS = 10              # of N_LANGEVIN steps and a jump: a translation, from the pool
PER_IMAGE = 4            # translations of each held-out image
HIDDEN, HELD_OUT, NOISE = 0, 0, 0.0  # of the made-up problems: training and held-out images, pixel noise
if args.check:
    SIDE, STEPS, BATCH, N_LANGEVIN, ETA, WIDTH = 32, 800, 128, 2, 0.02, 256
    PER_IMAGE, HIDDEN, HELD_OUT, NOISE = 1, 4096, 2000, 0.05
if args.smoke:
    SIDE, STEPS, BATCH, N_LANGEVIN, ETA, WIDTH, POOL, JUMPS, ROUNDS, HIDDEN, HELD_OUT, NOISE = 16, 12, 8, 1, 0.02, 16, 32, 16, 2, 24, 6, 0.05
LOG_EVERY = max(1, STEPS // (200 if STEPS > 5000 else 12))
CONSTANTS = common.constants_of(globals())

device = args.device
begun = time.perf_counter()
name = f"afhq_{'check' if args.check else args.source}_eps{EPS:g}" + "_smoke" * args.smoke
checkpoint, figure = (os.path.join(args.out, name + end) for end in (".pt", ".png"))


# ---------------------------------------------------------------------------------------------- generator

def made_up_generator():
    """Random weights, 32 dimensions, 32x32, pixels 0.5 +- 0.16."""
    G = stylegan2.random_generator(32, 32, 32, channel_base=256, channel_max=16, num_layers=2, conv_clamp=None)
    for module in G.modules():
        if isinstance(module, stylegan2.ToRGB):
            module.weight.mul_(0.25)
    return G


def hidden(n, generator):
    """Latents of the made-up sources: Gaussian, but shifted by about 0.8 and scaled by 0.5 to 2 along every axis: (n, 32)."""
    shift = 0.8 * torch.randn(32, generator=generator)
    return torch.randn(n, 32, generator=generator) * torch.linspace(-0.7, 0.7, 32).exp() + shift


@torch.no_grad()
def make_up(folder, G):
    """Write G(z) + noise, for hidden z, as PNG files in the official layout: train/cat, val/cat."""
    generator = torch.Generator().manual_seed(0)
    z = hidden(HIDDEN + HELD_OUT, generator)
    for i, z in enumerate(z.split(256)):
        x = (G(z) + 1) / 2
        x = (255 * (x + NOISE * torch.randn(x.shape, generator=generator))).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
        for k, image in enumerate(x.numpy(), 256 * i):
            path = os.path.join(folder, "train" if k < HIDDEN else "val", args.source, f"{k:05d}.png")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Image.fromarray(image).save(path, compress_level=1)


if args.smoke or args.check:
    G, args.data = made_up_generator(), os.path.join(args.out, name + "_data")
    if not (args.resume and os.path.isdir(args.data)):
        try:
            make_up(args.data, G)
        except OSError as error:
            common.fail(f"cannot write the made-up images to {args.data} ({error.strerror}): free some space or name another --out")
elif not os.path.isfile(args.generator):
    common.fail(f"no generator {args.generator}: download afhqdog.pkl of NVIDIA's StyleGAN2-ADA-PyTorch release (folder pretrained) "
                f"to there, or name where it is with --generator")
else:
    try:
        G = stylegan2.load_generator(args.generator)
    except stylegan2.BadFile as error:
        common.fail(str(error))
G, SIDE = G.to(device), min(SIDE, G.img_resolution)
D, AREA = G.z_dim, (G.img_resolution / SIDE) ** 2
CONSTANTS["GENERATOR"] = hashlib.sha256(G.mapping.fc0.weight.cpu().numpy().tobytes()).hexdigest()[:16]


@torch.no_grad()
def full_images(z):
    """(n, D) -> (n, 3, R, R) on the CPU, about [0,1]."""
    return torch.cat([(G(part) + 1).cpu() / 2 for part in z.to(device).split(8)])


@torch.no_grad()
def match_colours(n=64):
    """G stopped at SIDE lacks what its later blocks add: the best affine map (4, 3) of its colours to those of the whole
    image averaged down to SIDE, on n latents; prints how much of that image it then explains."""
    z = torch.randn(n, D, generator=torch.Generator().manual_seed(1)).to(device)
    part = torch.cat([G(p, resolution=SIDE, fp16=False).cpu() for p in z.split(8)]).permute(0, 2, 3, 1).reshape(-1, 3).double()
    part = torch.cat([part, torch.ones(len(part), 1)], 1)
    whole = F.interpolate(full_images(z), size=(SIDE, SIDE), mode="area").permute(0, 2, 3, 1).reshape(-1, 3).double()
    colours = torch.linalg.lstsq(part, whole).solution
    left = (whole - part @ colours).square().sum() / (whole - whole.mean(0)).square().sum()
    print(f"the generator's image at {SIDE} explains {100 * (1 - left):.1f} % of its {G.img_resolution} averaged down to {SIDE}", flush=True)
    return colours.float().to(device)


# ---------------------------------------------------------------------------------------------- data

def images_in(folder):
    """Every image file under folder, sorted."""
    endings = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
    return sorted(os.path.join(at, file) for at, _, files in os.walk(folder) for file in files
                  if file.lower().endswith(endings) and os.path.isfile(os.path.join(at, file)))  # not a broken link


def list_images():
    """-> files of the sources, files held out."""
    advice = (f"unpack AFHQ (stargan-v2 project) so that {os.path.join(args.data, 'train', args.source)} exists, "
              f"or name any folder of images with --data")
    if not os.path.isdir(args.data):
        common.fail(f"no folder {args.data}: {advice}")
    if not os.path.isdir(os.path.join(args.data, "train")):
        train, held_out = images_in(args.data), []
    elif os.path.isdir(os.path.join(args.data, "train", args.source)):
        train, *rest = (images_in(os.path.join(args.data, split, args.source)) for split in ("train", "val", "test"))
        held_out = rest[0] or rest[1]
    else:
        there = sorted(os.listdir(os.path.join(args.data, "train")))
        common.fail(f"{os.path.join(args.data, 'train')} has no folder {args.source}, only {', '.join(there[:9])}: name one of them with --source")
    train, held_out = (train, held_out) if held_out else ([t for i, t in enumerate(train) if i % 10], train[::10])
    if len(train) < 2:
        common.fail(f"{args.data} holds {len(train) + len(held_out)} images of {args.source}, too few: {advice}")
    return train, held_out


def decode(path):
    """The central square, averaged down to SIDE x SIDE x 3 bytes."""
    try:
        with Image.open(path) as image, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on palettes with transparency
            (w, h), image = image.size, image.convert("RGB")
        s = min(w, h)
        box = ((w - s) // 2, (h - s) // 2, (w - s) // 2 + s, (h - s) // 2 + s)
        return image.resize((SIDE, SIDE), Image.Resampling.BOX, box).tobytes()
    except Exception as error:  # PIL has many
        raise ValueError(f"{path} is not a readable image ({str(error).splitlines()[0][:100]}): replace or delete it") from None


def decoded(files):
    """All images as bytes (n, SIDE, SIDE, 3) in a memory-mapped cache beside the data (or in --out), made anew where its
    first 64 bytes do not fit the files' names, sizes and times, or its length their number."""
    stat = [(os.path.relpath(f, args.data), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]
    CONSTANTS["IMAGES"] = hashlib.sha256(repr([s[:2] for s in stat]).encode()).hexdigest()[:16]  # a copy has other times
    digest, size = hashlib.sha256(repr((SIDE, stat)).encode()).hexdigest().encode(), len(files) * SIDE * SIDE * 3
    folder = next((d for d in (args.data, args.out) if os.access(d, os.W_OK)), args.out)
    path, start = os.path.join(folder, f"{args.source}_{SIDE}.cache"), time.perf_counter()
    try:
        with open(path, "rb") as file:
            fits = file.read(64) == digest and os.path.getsize(path) == 64 + size
        print(f"{'using' if fits else 'does not fit the data, making anew'} {path}", flush=True)
    except OSError:
        fits = False
    if not fits:
        threads = ThreadPoolExecutor(os.cpu_count())
        try:
            with open(path + ".tmp", "wb") as file:
                file.write(digest)
                for i in range(0, len(files), 1024):
                    for image in threads.map(decode, files[i:i + 1024]):
                        file.write(image)
                    done, spent = min(i + 1024, len(files)), time.perf_counter() - start
                    print(f"decoded {done}/{len(files)} images  {common.clock(spent / done * (len(files) - done))} left", flush=True)
            os.replace(path + ".tmp", path)
        except (ValueError, OSError) as error:
            threads.shutdown(cancel_futures=True)
            if os.path.exists(path + ".tmp"):
                os.remove(path + ".tmp")
            common.fail(f"cannot write {path} ({error.strerror}): free some space" if isinstance(error, OSError) else str(error))
    return np.memmap(path, np.uint8, "r", 64, (len(files), SIDE, SIDE, 3))


def load(rows):
    """Row numbers -> images (n, 3 SIDE SIDE), in [0,1] less the pool's mean."""
    x = torch.from_numpy(cache[rows.cpu().numpy()]).to(device)
    return x.permute(0, 3, 1, 2).flatten(1).float() / 255 - pool_mean


# ---------------------------------------------------------------------------------------------- plan and potential

class Potential(nn.Module):
    """f(z) = -EPS |z|^2/2 + net(z sqrt(D)/|z|): (B, D) -> (B,)."""

    def __init__(self, spread):
        super().__init__()
        self.net = common.MLP(D, WIDTH, DEPTH)
        self.register_buffer("scale", torch.tensor(float(spread)))

    def forward(self, z):
        square = z.square().sum(1)
        return self.scale * self.net(z * (D / square).sqrt()[:, None]) - EPS * square / 2


def images(z):
    """G(z) as the cost sees it: (B, D) -> (B, 3 SIDE SIDE), in [0,1] less the pool's mean."""
    image = G(z, resolution=SIDE, fp16=False)  # Metropolis compares costs near 10^4 to within 1
    return (torch.einsum("oc,bohw->bchw", colours[:3], image) + colours[3, :, None, None]).flatten(1) - pool_mean


def cost(x, z):
    return AREA / 2 * (images(z) - x).square().sum(1)


def costs(x, image):
    """Every c: x (n, 3 SIDE SIDE), images of latents (m, 3 SIDE SIDE) -> (n, m); one matrix product."""
    half = x.square().sum(1)[:, None] / 2 + image.square().sum(1) / 2
    return AREA * torch.addmm(half, x, image.T, alpha=-1)


@torch.no_grad()
def in_batches(function, z):
    return torch.cat([function(part) for part in z.split(BATCH)])


@torch.no_grad()
def jump(f, x, z, log_p, rows):
    """One long move per chain to one of these rows of the pool, drawn in proportion to pi_f(z_j|x) / N(z_j; 0, I), the chain's
    own z among them.  Exact for fresh z_j ~ N(0, I); a pool that stays pulls chains to its own sample, less the larger it is.
    log_p (B,): of z, -inf to make it leave.  -> z, moved fraction."""
    other = pool[rows]
    log_w = (f(other) - costs(x, pool_images[rows])) / EPS + other.square().sum(1) / 2
    log_w = torch.cat([log_w, (log_p + z.square().sum(1) / 2)[:, None]], 1)
    k = (log_w - torch.empty_like(log_w).exponential_().log()).argmax(1, keepdim=True)  # Gumbel's way to draw
    moved = k < len(rows)
    return torch.where(moved, other[k.squeeze(1).clamp(max=len(rows) - 1)], z), moved.float().mean()


def step_chains(f, x, z, rows, leave=0.0):
    """N_LANGEVIN steps and a jump to one of these rows of the pool -> z, accepted and moved fractions."""
    z, log_p, accepted = common.mala(f, x, z, EPS, eta, N_LANGEVIN, cost)
    log_p = torch.where(torch.rand_like(log_p) < leave, -torch.inf, log_p)
    return *jump(f, x, z, log_p, rows), accepted


def translate(f, rows):
    """Translations of the images of these row numbers, as a user gets them: the best of the pool, then ROUNDS: (n, D)."""
    out, everything, said = [], torch.arange(POOL, device=device), time.perf_counter()
    for done, part in enumerate(rows.split(BATCH)):
        if time.perf_counter() - said > 30:
            print(f"translated {done * BATCH}/{len(rows)}  {common.peak_mib(device):.0f} MiB", flush=True)
            said = time.perf_counter()
        x = load(part)
        z = jump(f, x, torch.zeros(len(x), D, device=device), torch.full((len(x),), -torch.inf, device=device), everything)[0]
        for _ in range(ROUNDS):
            z = step_chains(f, x, z, everything)[0]
        out.append(z)
    return torch.cat(out)


def assigned(cost_matrix):
    """The pairing of least total cost: row i gets column [i] of this."""
    return torch.from_numpy(linear_sum_assignment(cost_matrix.cpu().numpy())[1])


def law(z):
    """How far latents (n, D) are from N(0, I): their variance and mean square (1), largest Kolmogorov-Smirnov distance of a
    coordinate (of n exact ones: about 1.5 / sqrt(n))."""
    cdf, level = torch.special.ndtr(z.sort(0).values), torch.arange(len(z) + 1, device=z.device)[:, None] / len(z)
    ks = torch.maximum((cdf - level[:-1]).abs(), (cdf - level[1:]).abs()).amax()
    return {"var": z.var(0).mean(), "square": z.square().mean(), "ks": ks}


def discrete_cost(cost_matrix):
    """Cost of the discrete entropic plan at EPS (POT, eps halved down from the largest cost), its marginal error, L1."""
    weight, warm, eps = torch.full((len(cost_matrix),), 1 / len(cost_matrix), dtype=torch.float64), None, cost_matrix.max().item()
    while True:
        eps = max(eps / 2, EPS)
        plan, log = ot.bregman.sinkhorn_stabilized(weight, weight, cost_matrix, eps, numItermax=50 if eps > EPS else 1000, tau=1e9,
                                                   stopThr=1e-6, warmstart=warm, log=True, warn=False)
        warm = log["alpha"], log["beta"]
        if eps == EPS:
            return (plan * cost_matrix).sum().item(), (plan.sum(0) - weight).abs().sum().item()


# ---------------------------------------------------------------------------------------------- training

train, held_out = list_images()
if args.translate:
    try:
        os.makedirs(args.translate, exist_ok=True)
    except OSError as error:
        common.fail(f"--translate {args.translate} cannot be made ({error.strerror}): name a folder you can write to")
cache = decoded(train + held_out)
test_rows = torch.arange(len(train), len(train) + len(held_out)).repeat_interleave(PER_IMAGE)
per_step = 2 * G.flops(SIDE) * BATCH * (N_LANGEVIN + 1)
print(f"{len(train)} sources, {len(held_out)} held out; {per_step / 1e9:.1f} GFLOP of the generator a step: {STEPS * per_step / 4.4e12 / 3600:.2g} h "
      f"for all steps on a card that reaches 4.4 TFLOP/s (40 % of a GTX 1080 Ti)", flush=True)

colours, pool_mean = match_colours(), 0.0
pool = torch.randn(POOL, D, generator=torch.Generator().manual_seed(SEED)).to(device)
pool_images = in_batches(images, pool)
pool_mean = pool_images.mean(0)
pool_images -= pool_mean
spread = costs(load(torch.arange(0, len(train), 1 + len(train) // 512)), pool_images).mean(0).std()
f, f_avg = (Potential(SCALE * spread).to(device) for _ in range(2))
f_avg.load_state_dict(f.state_dict())
opt = torch.optim.Adam(f.net.parameters(), lr=LR, betas=BETAS)
bank = common.Bank(torch.arange(len(train)), torch.randn(len(train), D)).to(device)  # row numbers: the images stay on disk
eta = torch.tensor(ETA * min(EPS, 1.0), device=device)

parts = {"f": f, "f_avg": f_avg, "opt": opt, "bank": bank}
state = common.begin(checkpoint, parts, CONSTANTS, args.resume)
if args.resume:
    eta.copy_(state["eta"])
else:
    for rows in bank.x.split(POOL):  # the discrete plan with as many latents: chains start with the law Q as a whole
        bank.y[rows] = bank.y[rows][assigned(costs(load(rows), in_batches(images, bank.y[rows]))).to(device)]
step, progress = state["step"], common.Progress(STEPS, state["step"], state["seconds"], device)


def save():
    code = open(__file__, encoding="utf-8").read()
    common.save(checkpoint, parts, step=step, seconds=progress.seconds, eta=eta.cpu(), constants=CONSTANTS, code=code)


save()  # a full disk or a folder without permission shows now, not in an hour
stop.armed, last = True, step == STEPS
while not last:
    step += 1
    opt.param_groups[0]["lr"] = common.warm_cosine(LR, step, WARMUP, STEPS)
    rows = bank.rows(BATCH)
    z, jumped, accepted = step_chains(f, load(rows), bank.y[rows], torch.randperm(POOL, device=device)[:JUMPS], RESTART)
    bank.y[rows] = z
    eta *= torch.exp(0.03 * (accepted - ACCEPT))
    gap = common.train_step(f, opt, torch.randn(2 * BATCH, D, device=device), z)
    common.average_weights(f_avg, f, AVERAGE, step)

    last, due = step == STEPS or bool(stop), progress.save_due()  # asked once: nothing is saved unchecked
    if due or last or step % LOG_EVERY == 0:
        weight = torch.cat([p.detach().flatten() for p in f.net.parameters()]).abs().max()
        values = {"gap": gap / f.scale, **law(bank.y), "eta": eta, "accept": accepted, "jump": jumped, "weight": weight}
        now = dict(zip(values, torch.stack([v.float() for v in values.values()]).tolist()))  # the only sync but for the rows that load reads
        common.stop_if_diverged(1e3, gap=now["gap"], square=now["square"], weight=now.pop("weight"))
        progress.line(step, **now)
    if due:
        save()
train_s = progress.seconds
save()

# ---------------------------------------------------------------------------------------------- scores and figure

z = translate(f_avg, test_rows)


@torch.no_grad()
def mean_cost(rows, z):
    return (sum(cost(load(r), part).sum() for r, part in zip(rows.split(BATCH), z.split(BATCH))) / len(z)).item()


scores = {"cost": mean_cost(test_rows, z), **{f"latent_{k}": v.item() for k, v in law(z).items()}}
scored = test_rows[torch.randperm(len(test_rows))[:2000]]
fresh = torch.randn(len(scored), D, device=device)
matrix = costs(load(scored), in_batches(images, fresh)).double().cpu()
scores["discrete_cost"], error = discrete_cost(matrix)
if error > 0.01:
    print(f"warning: the discrete entropic plan has not converged (marginal error {error:.2g}); assigned_cost bounds its cost from below", flush=True)
scores |= {"assigned_cost": matrix[torch.arange(len(matrix)), assigned(matrix)].mean().item(), "independent_cost": matrix.mean().item(),
           "exact_ks": law(torch.randn_like(z))["ks"].item()}
if args.check or args.smoke:  # the same sampler with nothing learned
    zero = Potential(0.0).to(device)
    z_zero = translate(zero, test_rows)
    scores |= {"zero_cost": mean_cost(test_rows, z_zero), **{f"zero_{k}": v.item() for k, v in law(z_zero).items()}}

shown = test_rows.unique()[::math.ceil(len(held_out) / 6)]
tiles = full_images(translate(f_avg, shown.repeat_interleave(5))).unflatten(0, (len(shown), 5))
sources = F.interpolate((load(shown) + pool_mean).cpu().unflatten(1, (3, SIDE, SIDE)), size=tiles.shape[-2:])
tiles = torch.cat([sources[:, None], tiles], 1).clamp(0, 1)
fig, axes = plt.subplots(2, math.ceil(len(shown) / 2), figsize=(16, 5.6), layout="constrained", squeeze=False)
for axis in axes.flat:
    axis.axis("off")
for axis, row in zip(axes.flat, tiles):
    axis.imshow(torch.cat([torch.cat(list(row[i:i + 3]), 2) for i in (0, 3)], 1).permute(1, 2, 0))
    axis.set_title("source (top left) and translations", fontsize=9)
fig.suptitle(f"{name}: cost {scores['cost']:.4g} (discrete plan {scores['discrete_cost']:.4g}), latents' variance {scores['latent_var']:.3f}, "
             f"largest KS {scores['latent_ks']:.3f} (exact {scores['exact_ks']:.3f})")
common.draw(fig, figure)
print(f"wrote {figure} and {checkpoint}")
if args.translate:
    try:
        for i, (row, latent) in enumerate(zip(test_rows.tolist(), z.split(1))):
            stem = os.path.splitext(os.path.relpath(held_out[row - len(train)], args.data))[0].replace(os.sep, "_")
            image = (full_images(latent)[0] * 255).round().clamp(0, 255).byte().permute(1, 2, 0)
            Image.fromarray(image.numpy()).save(os.path.join(args.translate, f"{stem}_{i % PER_IMAGE}.png"))
    except OSError as error:
        common.fail(f"cannot write to {args.translate} ({error.strerror}): free some space, then --resume with --translate again")
    print(f"wrote {len(z)} translations to {args.translate}")
print(f"final eps {EPS:g} " + " ".join(f"{k} {v:.4g}" for k, v in scores.items()) +
      f" train_s {train_s:.1f} total_s {time.perf_counter() - begun:.1f} peak_mib {common.peak_mib(device):.0f}")
