"""AFHQ cats (or wild animals) -> dogs at 512x512: energy-guided entropic OT into the latent space of a dog generator.

    source x    photographs, their central square averaged down to SIDE x SIDE, in [0,1]
    target z    N(0, I_512), latents of the StyleGAN2-ADA generator G; there is no encoder
    cost        c(x,z) = AREA |G(z) - x|^2/2 at SIDE; AREA = (512/SIDE)^2, so that eps means the same at every SIDE
    f(z)        scale net(sqrt(512) z/|z|) - eps |z|^2/2, so that pi_f(z|x) ~ N(z; 0, I) exp((scale net - c)/eps) is a
                probability law from the start; G sees only the direction of z, and net needs no more
    ascend      E_Q f(z) - E_P E_{pi_f(.|x)} f(z)              Algorithm 1 of Mokrov et al., ICLR 2024

    python train_afhq_latent.py --source cat --data afhq --generator afhqdog.pkl     a night on a GTX 1080 Ti
    python train_afhq_latent.py --check      the same code on a generator of random weights in 32 dimensions, against
                                             discrete OT: 8 minutes on one CPU core, 5 of them training, 1.6 GiB
    python train_afhq_latent.py --smoke      the same path in seconds

--data: AFHQ as the stargan-v2 project released it (v1: train/cat/*.jpg, val/cat/...; v2: test/cat/...), or any folder
of images, of which every tenth is then held out.  --generator: afhqdog.pkl of NVIDIA's StyleGAN2-ADA-PyTorch release.
Writes beside itself (or under --out) afhq_cat_eps1_seed0.pt, which --resume carries on from, and a figure (.png), each
row a source and five translations.  --translate DIR also writes the held-out images' translations, for eval_fid.py.

Not yet run on the official files.  By count a step is 19.7 TFLOP: 8 000 steps and the scores take 10.8 h at 4.4 TFLOP/s
(40 % of a GTX 1080 Ti) and 5 GB.  The paper's run took four A100s and some 2 700 Langevin steps per source, at 512x512.
Here a source gets some 200, and the cost sees G stopped at SIDE, with its colours matched.  In return chains start from
a discrete plan, Metropolis' test allows longer steps, and chains jump between latents whose images are kept.

The scores, of translations of the held-out images:
    cost               mean c; independent_cost: with latents drawn regardless of x
    latent_...         var, square and ks: 1, 1 and exact_ks if the latents are N(0, I)
    discrete_cost      mean c of POT's entropic plan between these images and as many latents; assigned_cost: of the
                       cheapest pairing
    zero_...           the same with nothing learned, net = 0 (--check, --smoke)
"""
import common  # first, so that Ctrl-C during the slow imports below ends without a traceback

import hashlib
import math
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import ot
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy.optimize import linear_sum_assignment

import stylegan2

beside = os.path.dirname(os.path.abspath(__file__))
args = common.arguments(
    __doc__, __file__, eps=1.0,
    source=dict(default="cat", help="cat or wild: the folder under DATA/train and DATA/val (default cat)"),
    data=dict(default=os.path.join(beside, "afhq"), help="folder of the images (default: afhq beside the script)"),
    generator=dict(default=os.path.join(beside, "afhqdog.pkl"), help="default: afhqdog.pkl beside the script"),
    translate=dict(metavar="DIR", help="also write the held-out images' translations there, as PNG"),
    check=dict(action="store_true", help="a made-up problem in 32 dimensions, scored against discrete OT"))
device, start_time = args.device, time.perf_counter()
torch.backends.cudnn.allow_tf32 = False  # TF32 would blur the cost by more than Metropolis' test can bear
warnings.filterwarnings("ignore", module="PIL")  # of transparency, which is dropped here, and of size, see MAX_PIXELS

# ---------------------------------------------------------------------------------------------- constants
EPS, SEED = args.eps, args.seed
SIDE = 128               # of the images the cost sees: half the arithmetic of 512, a quarter of its memory
STEPS = 8000             # Adam steps
BATCH = 32               # chains moved per step
N_LANGEVIN = 4           # Langevin steps of a chain per training step; starting them costs one more evaluation of G
ETA, ACCEPT = 6e-5, 0.6  # first Langevin step (the paper's), and the accepted fraction it is then led to
POOL, CANDIDATES = 2048, 512  # latents whose images are kept, and how many of them a training step offers for jumps
RESTART = 0.05           # share of the chains per step that must jump: f still gets samples where chains freeze
WIDTH, DEPTH = 512, 3    # of net
SCALE = 0.05             # of net, over the spread between latents of their mean cost: what net has to make up for
LR, BETAS, WARMUP = 5e-4, (0.9, 0.99), 50  # of Adam; rises in WARMUP steps, then falls to 0 by a cosine
EMA_DECAY = 0.998        # of the weights, per step
SAMPLE_STEPS = 10        # of N_LANGEVIN Langevin steps and a jump each: a translation, from the best of the pool
PER_IMAGE = 4            # translations of each held-out image
MAX_PIXELS = 50_000_000  # of one image: a file of kilobytes can unpack to gigabytes, and several are read at once
HIDDEN, HELD_OUT, NOISE = 0, 0, 0.0  # of the made-up problem: training and held-out images, pixel noise
if args.check:
    SIDE, STEPS, BATCH, N_LANGEVIN, ETA, WIDTH = 32, 800, 128, 2, 0.02, 256
    PER_IMAGE, HIDDEN, HELD_OUT, NOISE = 1, 4096, 2000, 0.05
if args.smoke:
    SIDE, STEPS, BATCH, N_LANGEVIN, ETA, WIDTH, POOL, CANDIDATES, SAMPLE_STEPS = 16, 12, 8, 1, 0.02, 16, 32, 16, 2
    HIDDEN, HELD_OUT, NOISE = 24, 6, 0.05
LOG_EVERY = max(1, STEPS // (200 if STEPS > 5000 else 12))
CONSTANTS = common.constants_of(globals())

made_up = args.check or args.smoke
name = f"afhq_{'check' if args.check else args.source}_eps{EPS:g}_seed{SEED}{'_smoke' * args.smoke}"
name = os.path.join(args.out, name)


def make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        common.fail(f"the folder {path} cannot be made ({error.strerror}): name one that you can write to")


def write_png(path, image):
    """Write an image (3, H, W), about [0,1] -> None, or in words what went wrong."""
    data = (255 * image).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return common.write_aside(path, lambda file: Image.fromarray(data).save(file, "png"))


# ---------------------------------------------------------------------------------------------- the made-up problem

@torch.no_grad()
def make_up(folder):
    """Only for --check and --smoke -> a generator of random weights, 32 dimensions, 32x32, pixels 0.5 +- 0.16.
    Writes images of it, with noise, as PNG files in AFHQ's layout.  Their latents are Gaussian, but shifted by about
    0.8 and scaled by 0.5 to 2 along every axis."""
    G = stylegan2.random_generator(32, 32, 32, channel_base=256, channel_max=16, num_layers=2, conv_clamp=None)
    for module in G.modules():
        if isinstance(module, stylegan2.ToRGB):
            module.weight.mul_(0.25)
    if args.resume and os.path.isdir(folder):
        return G
    for split in ("train", "val"):
        make_folder(os.path.join(folder, split, args.source))
    generator = torch.Generator().manual_seed(0)
    shift = 0.8 * torch.randn(32, generator=generator)
    z = torch.randn(HIDDEN + HELD_OUT, 32, generator=generator) * torch.linspace(-0.7, 0.7, 32).exp() + shift
    for i, part in enumerate(z.split(256)):
        x = (G(part) + 1) / 2
        for k, image in enumerate(x + NOISE * torch.randn(x.shape, generator=generator), 256 * i):
            path = os.path.join(folder, "train" if k < HIDDEN else "val", args.source, f"{k:05d}.png")
            problem = write_png(path, image)
            if problem:
                common.fail(f"{problem}: free some space or name another --out")
    return G


# ---------------------------------------------------------------------------------------------- generator

if made_up:
    args.data = f"{name}_data"
    G = make_up(args.data)
elif not os.path.isfile(args.generator):
    common.fail(f"no generator {args.generator}: download afhqdog.pkl of NVIDIA's StyleGAN2-ADA-PyTorch release "
                f"(folder pretrained) to there, or name where it is with --generator")
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
    """G(z) at its own resolution R: (n, D) -> (n, 3, R, R) on the CPU, about [0,1]."""
    return torch.cat([(G(part) + 1).cpu() / 2 for part in z.to(device).split(8)])


# ---------------------------------------------------------------------------------------------- photographs

def images_in(*folders):
    """Every image file under args.data/folders, sorted.  Pipes and broken links are none: opening a pipe can hang."""
    endings = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
    walk = os.walk(os.path.join(args.data, *folders))
    paths = [os.path.join(folder, file) for folder, _, files in walk for file in files]
    return sorted(path for path in paths if path.lower().endswith(endings) and os.path.isfile(path))


def list_images():
    """-> files of the sources, files held out."""
    if os.path.isdir(os.path.join(args.data, "train")):
        train, val, test = (images_in(split, args.source) for split in ("train", "val", "test"))
        held_out = val or test
    else:
        train, held_out = images_in(), []
    if not held_out:
        train, held_out = [path for i, path in enumerate(train) if i % 10], train[::10]
    if len(train) < 2:
        common.fail(f"{args.data} holds {len(train) + len(held_out)} images of {args.source}, too few: unpack AFHQ "
                    f"there (train/{args.source}/*.jpg), or name another --source, or any folder of images with --data")
    return train, held_out


def decode(path):
    """A file's central square, averaged down: (SIDE, SIDE, 3) bytes."""
    try:
        with Image.open(path) as image:  # reads the header only
            if image.mode[0] in "IF":
                raise ValueError("not 8 bits per channel")  # PIL would clip them to white or black
            if math.prod(image.size) > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height}, over {MAX_PIXELS} pixels")
            return np.array(ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.BOX))
    except Exception as error:  # PIL has one for each way to be broken
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise ValueError(f"{path} is not a usable image ({reason}): replace or delete it") from None


train, held_out = list_images()
if args.translate:
    make_folder(args.translate)
print(f"decoding {len(train)} sources and {len(held_out)} held-out images")
with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
    try:
        pixels = torch.from_numpy(np.stack(list(threads.map(decode, train + held_out))))  # (n, SIDE, SIDE, 3)
    except ValueError as error:
        common.fail(str(error))
CONSTANTS["IMAGES"] = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16]  # resumed with these only


# ---------------------------------------------------------------------------------------------- cost

@torch.no_grad()
def match_colours(n=64):
    """Fit on n latents the affine map (4, 3) from the colours of G stopped at SIDE to those of its whole image averaged
    down to SIDE: what G's later blocks add.  Prints how much of the latter it explains."""
    z = torch.randn(n, D, generator=torch.Generator().manual_seed(1)).to(device)
    early = torch.cat([G(part, resolution=SIDE, fp16=False).cpu() for part in z.split(8)])
    early = F.pad(early.permute(0, 2, 3, 1).reshape(-1, 3).double(), (0, 1), value=1.0)
    whole = F.interpolate(full_images(z), size=(SIDE, SIDE), mode="area").permute(0, 2, 3, 1).reshape(-1, 3).double()
    colours = torch.linalg.lstsq(early, whole).solution
    explained = 1 - (whole - early @ colours).square().sum() / (whole - whole.mean(0)).square().sum()
    print(f"the generator's image at {SIDE} explains {100 * explained:.1f} % of its {G.img_resolution} averaged down")
    return colours.float().to(device)


def images(z):
    """G(z) as the cost sees it: (n, D) -> (n, 3 SIDE SIDE), in [0,1] less pool_mean."""
    image = torch.cat([G(part, resolution=SIDE, fp16=False) for part in z.split(BATCH)])  # fp16 is too coarse, as TF32
    image = torch.einsum("oc,bohw->bchw", colours[:3], image) + colours[3, :, None, None]
    return image.flatten(1) - pool_mean


def photographs(rows):
    """Row numbers of pixels -> images (n, 3 SIDE SIDE), in [0,1] less pool_mean."""
    return pixels[rows.cpu()].to(device).permute(0, 3, 1, 2).flatten(1).float() / 255 - pool_mean


def cost(x, z):
    """c of pairs: (B, 3 SIDE SIDE), (B, D) -> (B,)."""
    return AREA / 2 * (images(z) - x).square().sum(1)


def costs(x, image):
    """c of each with each: x (n, 3 SIDE SIDE), images of latents (m, 3 SIDE SIDE) -> (n, m); one matrix product."""
    half = x.square().sum(1)[:, None] / 2 + image.square().sum(1) / 2
    return AREA * torch.addmm(half, x, image.T, alpha=-1)


colours, pool_mean = match_colours(), 0.0
pool = torch.randn(POOL, D, generator=torch.Generator().manual_seed(SEED)).to(device)
pool_images = images(pool)
pool_mean = pool_images.mean(0)  # taken off every image from here on: less cancels in the matrix product of costs()
pool_images -= pool_mean


# ---------------------------------------------------------------------------------------------- potential and sampler

class Potential(torch.nn.Module):
    """f(z) = scale net(sqrt(D) z/|z|) - EPS |z|^2/2: (B, D) -> (B,)."""

    def __init__(self, scale):
        super().__init__()
        self.net = common.MLP(D, WIDTH, DEPTH)
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, z):
        square = z.square().sum(1)
        return self.scale * self.net(z * (D / square).sqrt()[:, None]) - EPS * square / 2


@torch.no_grad()
def jump(f, x, z, log_p, candidates):
    """One long move per chain: to one of these rows of the pool, or none, since the chain's own z is among the choices.
    A choice has the weight pi_f(z_j|x) / N(z_j; 0, I), as in iterated sampling importance resampling: exact for fresh
    z_j ~ N(0, I).  A pool that stays the same pulls chains towards its own sample, less the larger it is.
    log_p (B,): that of z as mala returns it; -inf forces a chain to leave.  -> z (B, D), moved fraction."""
    others = pool[candidates]
    log_w = (f(others) - costs(x, pool_images[candidates])) / EPS + others.square().sum(1) / 2
    log_w = torch.cat([log_w, (log_p + z.square().sum(1) / 2)[:, None]], 1)
    k = (log_w - torch.empty_like(log_w).exponential_().log()).argmax(1, keepdim=True)  # a draw by weight (Gumbel)
    moved = k < len(candidates)
    return torch.where(moved, others[k.squeeze(1).clamp(max=len(candidates) - 1)], z), moved.float().mean()


def step_chains(f, x, z, candidates, leave=0.0):
    """N_LANGEVIN Langevin steps, then a jump, which a share `leave` of the chains must take.
    -> z (B, D), fraction that jumped, accepted fraction of the Langevin steps."""
    z, log_p, accepted = common.mala(f, x, z, EPS, bank.eta, N_LANGEVIN, cost)
    log_p = torch.where(torch.rand_like(log_p) < leave, -torch.inf, log_p)
    return *jump(f, x, z, log_p, candidates), accepted.mean()


@torch.no_grad()
def translate(f, rows):
    """For the photographs in these rows, by chains that start in the pool -> z ~ pi_f(.|x) (n, D), their mean cost."""
    out, total, everything = [], 0.0, torch.arange(POOL, device=device)
    for i, part in enumerate(rows.split(BATCH)):
        if i % 8 == 7:
            print(f"translated {i * BATCH}/{len(rows)}  {common.peak_mib(device):.0f} MiB")
        x = photographs(part)
        nowhere, never = torch.zeros(len(x), D, device=device), torch.full((len(x),), -torch.inf, device=device)
        z, _ = jump(f, x, nowhere, never, everything)
        for _ in range(SAMPLE_STEPS):
            z, _, _ = step_chains(f, x, z, everything)
        out.append(z)
        total += cost(x, z).sum()
    return torch.cat(out), total.item() / len(rows)


# ---------------------------------------------------------------------------------------------- scores

def assigned(cost_matrix):
    """The pairing of least total cost: row i gets column [i] of this."""
    return torch.from_numpy(linear_sum_assignment(cost_matrix.cpu().numpy())[1])


def discrete_plan_cost(cost_matrix):
    """Cost of the discrete entropic plan at EPS (POT, eps halved down to it), and its marginal error, L1."""
    weight = torch.full((len(cost_matrix),), 1 / len(cost_matrix), dtype=torch.float64)
    warm, eps = None, cost_matrix.max().item()
    while True:
        eps = max(eps / 2, EPS)
        plan, log = ot.bregman.sinkhorn_stabilized(
            weight, weight, cost_matrix, eps, numItermax=50 if eps > EPS else 1000, tau=1e9, stopThr=1e-6,
            warmstart=warm, log=True, warn=False)
        warm = log["alpha"], log["beta"]
        if eps == EPS:
            return (plan * cost_matrix).sum().item(), (plan.sum(0) - weight).abs().sum().item()


def normality_stats(z):
    """How far latents (n, D) are from N(0, I): their variance and mean square, each 1 there, and the largest
    Kolmogorov-Smirnov distance of a coordinate, there about 1.5 / sqrt(n)."""
    cdf, level = torch.special.ndtr(z.sort(0).values), torch.arange(len(z) + 1, device=z.device)[:, None] / len(z)
    ks = torch.maximum((cdf - level[:-1]).abs(), (cdf - level[1:]).abs()).amax()
    return {"var": z.var(0).mean(), "square": z.square().mean(), "ks": ks}


# ---------------------------------------------------------------------------------------------- training

spread = costs(photographs(torch.arange(0, len(train), 1 + len(train) // 512)), pool_images).mean(0).std()
f, f_avg = (Potential(SCALE * spread).to(device) for _ in range(2))
f_avg.load_state_dict(f.state_dict())
opt = torch.optim.Adam(f.net.parameters(), lr=LR, betas=BETAS)
row_numbers = torch.arange(len(train))  # the chains' sources: their images stay in pixels
bank = common.Bank(row_numbers, torch.randn(len(train), D), eta=torch.tensor(ETA * min(EPS, 1.0))).to(device)

run = common.Run(args, f"{name}.pt", {"f": f, "f_avg": f_avg, "opt": opt, "bank": bank}, STEPS, LOG_EVERY, CONSTANTS)
if not args.resume:  # pair sources and latents at the least cost: a discrete plan, whose latents have the law Q
    for rows in bank.x.split(POOL):
        bank.y[rows] = bank.y[rows][assigned(costs(photographs(rows), images(bank.y[rows]))).to(device)]
for step in run.steps():
    opt.param_groups[0]["lr"] = common.warm_cosine(LR, step, WARMUP, STEPS)
    rows, candidates = bank.rows(BATCH), torch.randperm(POOL, device=device)[:CANDIDATES]
    z, jumped, accepted = step_chains(f, photographs(rows), bank.y[rows], candidates, RESTART)
    bank.y[rows] = z
    bank.eta *= torch.exp(0.03 * (accepted - ACCEPT))
    gap = common.train_step(f, opt, torch.randn(2 * BATCH, D, device=device), z)
    common.update_ema(f_avg, f, EMA_DECAY, step)
    if run.due():
        run.log({"gap": 1e3, "square": 1e3, "max_param": 1e3}, gap=gap / f.scale, **normality_stats(bank.y),
                eta=bank.eta, accept=accepted, jump=jumped, max_param=common.max_param(f.net))


# ---------------------------------------------------------------------------------------------- results

test_rows = torch.arange(len(train), len(train) + len(held_out)).repeat_interleave(PER_IMAGE)
translations, mean_cost = translate(f_avg, test_rows)
scores = {"cost": mean_cost, **{f"latent_{k}": v.item() for k, v in normality_stats(translations).items()}}

scored = test_rows[torch.randperm(len(test_rows))[:2000]]
matrix = costs(photographs(scored), images(torch.randn(len(scored), D, device=device))).double().cpu()
scores["discrete_cost"], marginal_error = discrete_plan_cost(matrix)
if marginal_error > 0.01:
    print(f"warning: the discrete entropic plan has not converged (marginal error {marginal_error:.2g})")
scores["assigned_cost"] = matrix[torch.arange(len(matrix)), assigned(matrix)].mean().item()
scores["independent_cost"] = matrix.mean().item()
scores["exact_ks"] = normality_stats(torch.randn_like(translations))["ks"].item()

if made_up:  # the same sampler with nothing learned
    untrained, mean_cost = translate(Potential(0.0).to(device), test_rows)
    scores |= {"zero_cost": mean_cost, **{f"zero_{k}": v.item() for k, v in normality_stats(untrained).items()}}

shown = test_rows.unique()[::math.ceil(len(held_out) / 6)]
sources = (photographs(shown) + pool_mean).cpu().unflatten(1, (3, SIDE, SIDE))
columns = full_images(translate(f_avg, shown.repeat_interleave(5))[0]).unflatten(0, (len(shown), 5)).unbind(1)
columns = [F.interpolate(column, size=(256, 256), mode="area") for column in (sources, *columns)]
problem = write_png(f"{name}.png", torch.cat([torch.cat(list(column), 1) for column in columns], 2))
print(f"warning: {problem}: free some space, then --resume" if problem else f"wrote {name}.png and {name}.pt")

for i, z in enumerate(translations.split(1) if args.translate else ()):
    number, copy = divmod(i, PER_IMAGE)
    stem = os.path.splitext(os.path.basename(held_out[number]))[0][:50]  # the number keeps a.jpg and a.png apart
    problem = write_png(os.path.join(args.translate, f"{number:05d}_{stem}_{copy}.png"), full_images(z)[0])
    if problem:
        common.fail(f"{problem}: free some space, then --resume with --translate again")

print(f"final eps {EPS:g} " + " ".join(f"{k} {v:.4g}" for k, v in scores.items()) + f" train_s {run.seconds:.1f}",
      f"total_s {time.perf_counter() - start_time:.1f} peak_mib {common.peak_mib(device):.0f}")
