"""AFHQ cats (or wild animals) -> dogs at 512x512: energy-guided entropic OT into the latent space of a dog generator.

    source x    photographs, their central square averaged down to SIDE x SIDE, in [0,1]
    target z    N(0, I_512), latents of the StyleGAN2-ADA generator G; there is no encoder
    cost        c(x,z) = AREA |G(z) - x|^2/2 at SIDE; AREA = (512/SIDE)^2, so that eps means the same at every SIDE
    f(z)        scale net(sqrt(512) z/|z|) - eps |z|^2/2, so that pi_f(z|x) ~ N(z; 0, I) exp((scale net - c)/eps) is a
                probability law from the start; G sees only the direction of z, and net needs no more
    ascend      E_Q f(z) - E_P E_{pi_f(.|x)} f(z)              Algorithm 1 of Mokrov et al., ICLR 2024
    sample      a chain starts hot at a latent of a pool, cools to eps by Hamiltonian Monte Carlo, and ends at age LIFE.
                Chains for new images do just what chains in training do, so that they too get the law N(0, I)

    python train_afhq_latent.py --source cat --data afhq --generator afhqdog.pkl     by count 19 h on a GTX 1080 Ti
    python train_afhq_latent.py --check      the same code on a made-up generator of shapes, against discrete OT: 7
                                             minutes on one CPU core, 2.6 GiB; --eps 0.001: c/eps as in the real run
    python train_afhq_latent.py --smoke      the same path in seconds

--data: AFHQ as the stargan-v2 project released it (v1: train/cat/*.jpg, val/cat/...; v2: test/cat/...), or any folder
of images, of which every tenth is then held out.  --generator: afhqdog.pkl of NVIDIA's StyleGAN2-ADA-PyTorch release.
Writes beside itself (or under --out) afhq_cat_eps1_seed0.pt, which --resume carries on from, and a figure (.png), each
row a source and five translations.  --translate DIR also writes the held-out images' translations, for eval_fid.py.

Not yet run on the official files.  By count a step is 109 TFLOP: 2 500 steps and the scores take 19 h at 4.4 TFLOP/s
(40 % of a GTX 1080 Ti) or 2.5 h at 33 (40 % of an RTX 4090), and 5 GB.  What the log of --check --eps 0.001 says, to
know in the first ten minutes that it works: accept 0.55 to 0.8; cost, of chains that end, a tenth of "at its best" by
step 16, rising to a half; ks 0.35 at step 40, 0.17 at 110, 0.06 at 230; gap within 5; max_param below 0.6.

Scores, of translations of the held-out images: cost, mean c; latent_var, _square and _ks: 1, 1 and exact_ks for
N(0, I); zero_...: with nothing learned, net = 0 (--check, --smoke).  Mean c of POT's entropic plan between these images
and as many latents (discrete_cost), of the cheapest pairing (assigned_cost), of unrelated latents (independent_cost).
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
STEPS = 2500             # Adam steps
NEW, LIFE, COOL = 8, 16, 8  # chains started per step; trajectories of a chain; of these, those while it cools to EPS
HOT = 0.05               # temperature of the start, over the mean least cost between a source and the pool
LEAP, ETA, ACCEPT = 6, 0.15, 0.7  # steps of a trajectory, their size at HOT at first, the accepted share it is led to
CHUNK = 32               # latents that G takes at once: bounds the memory
POOL = 2048              # latents whose images are kept: chains start from them
WIDTH, DEPTH = 512, 3    # of net
SCALE = 0.05             # of net, over the spread between latents of their mean cost: what net has to make up for
LR, BETAS, WARMUP = 3e-4, (0.9, 0.99), 50  # of Adam; rises in WARMUP steps, then falls to 0 by a cosine
EMA_DECAY, ENDED = 0.999, 1024  # of the weights, per step; chains that ended last, on whose latents the log has ks
PER_IMAGE = 4            # translations of each held-out image
MAX_PIXELS = 50_000_000  # of one image: a file of kilobytes can unpack to gigabytes, and several are read at once
HIDDEN, HELD_OUT = 8192, 2000  # images of the made-up problem, to learn from and held out
if args.check:
    SIDE, STEPS, NEW, CHUNK, WIDTH, PER_IMAGE = 16, 4000, 8, 128, 256, 1
if args.smoke:
    SIDE, STEPS, LIFE, COOL, LEAP, CHUNK, WIDTH, POOL, ENDED = 16, 12, 4, 2, 2, 16, 16, 32, 8
    HIDDEN, HELD_OUT = 24, 6
CONSTANTS = common.constants_of(globals())

made_up = args.check or args.smoke
name = f"afhq_{'check' if args.check else args.source}_eps{EPS:g}_seed{SEED}{'_smoke' * args.smoke}"
name = os.path.join(args.out, name)


def write_png(path, image):
    """Write an image (3, H, W), about [0,1] -> None, or in words what went wrong."""
    data = (255 * image).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return common.write_aside(path, lambda file: Image.fromarray(data).save(file, "png"))


# --------------------------------------------------------------------------------------- only for --check and --smoke

@torch.no_grad()
def make_up(folder, hidden, held_out):
    """-> the generator.  Writes images of it, with noise, as PNG files in AFHQ's layout, so many to learn from and so
    many held out.  Their latents are Gaussian, but shifted by about 0.8 and scaled by 0.5 to 2 along every axis."""
    G, generator = stylegan2.Shapes(), torch.Generator().manual_seed(0)
    if (args.resume or common.ranks()[0]) and os.path.isdir(folder):
        return G
    for split in ("train", "val"):
        common.make_folder(os.path.join(folder, split, args.source))
    shift = 0.8 * torch.randn(32, generator=generator)
    z = torch.randn(hidden + held_out, 32, generator=generator) * torch.linspace(-0.7, 0.7, 32).exp() + shift
    x = torch.cat([(G(part) + 1) / 2 for part in z.split(256)])
    for k, image in enumerate(x + 0.05 * torch.randn(x.shape, generator=generator)):
        path = os.path.join(folder, "train" if k < hidden else "val", args.source, f"{k:05d}.png")
        if problem := write_png(path, image):
            common.fail(f"{problem}: free some space or name another --out")
    return G


# ---------------------------------------------------------------------------------------------- generator

if made_up:
    args.data = f"{name}_data"
    with common.in_turn():
        G = make_up(args.data, HIDDEN, HELD_OUT)
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


def decode(path, side=None):
    """A file's central square, averaged down: (side, side, 3) bytes, SIDE by default."""
    try:
        with Image.open(path) as image:  # reads the header only
            if image.mode[0] in "IF":
                raise ValueError("not 8 bits per channel")  # PIL would clip them to white or black
            if math.prod(image.size) > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height}, over {MAX_PIXELS} pixels")
            return np.array(ImageOps.fit(image.convert("RGB"), 2 * [side or SIDE], Image.Resampling.BOX))
    except Exception as error:  # PIL has one for each way to be broken
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise ValueError(f"{path} is not a usable image ({reason}): replace or delete it") from None


train, held_out = list_images()
if args.translate:
    common.make_folder(args.translate)
print(f"decoding {len(train)} sources and {len(held_out)} held-out images")
with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
    try:
        pixels = torch.from_numpy(np.stack(list(threads.map(decode, train + held_out)))).to(device)
    except ValueError as error:
        common.fail(str(error))
CONSTANTS["IMAGES"] = hashlib.sha256(pixels.cpu().numpy().tobytes()).hexdigest()[:16]  # resumed with these only


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
    image = torch.cat([G(part, resolution=SIDE, fp16=False) for part in z.split(CHUNK)])  # fp16 is too coarse, as TF32
    image = torch.einsum("oc,bohw->bchw", colours[:3], image) + colours[3, :, None, None]
    return image.flatten(1) - pool_mean


def photographs(rows):
    """Row numbers of pixels -> images (n, 3 SIDE SIDE), in [0,1] less pool_mean."""
    return pixels[rows].permute(0, 3, 1, 2).flatten(1).float() / 255 - pool_mean


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
to_pool = costs(photographs(slice(0, len(train), 1 + len(train) // 512)), pool_images)
hot = max(EPS, HOT * to_pool.amin(1).mean().item())
temperatures = EPS * (hot / EPS) ** (1 - torch.arange(LIFE, device=device) / COOL).clamp(min=0)  # of chains, by age
print(f"cost {to_pool.mean():.4g} in the pool, {to_pool.amin(1).mean():.4g} at its best; chains start at {hot:.3g}")


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
def start(f, x):
    """Chains for x (B, 3 SIDE SIDE): to each a latent of the pool, drawn by its weight at the hot temperature."""
    log_w = (f(pool) + EPS * pool.square().sum(1) / 2 - costs(x, pool_images)) / hot
    return pool[(log_w - torch.empty_like(log_w).exponential_().log()).argmax(1)]  # a draw by weight (Gumbel)


@torch.no_grad()
def trajectory(f, x, z, temperature, eta):
    """Hamiltonian Monte Carlo on N(z; 0, I) exp((scale net - c)/temperature), which at EPS is pi_f(.|x): LEAP leapfrog
    steps per chain, then Metropolis' test, exact for any eta.  In narrow valleys momentum gets as far in n steps as
    Langevin in n^2.  The length of z, which G does not see, is drawn afresh.  -> z (B, D), accepted (B,)."""
    f_hot = lambda z: f(z) + (EPS - temperature) * z.square().sum(1) / 2
    log_p, grad = common.log_p_and_grad(f_hot, x, z, temperature, cost)
    momentum, new, eta = torch.randn_like(z), z, eta[:, None]
    log_ratio = momentum.square().sum(1) / 2 - log_p
    for _ in range(LEAP):
        momentum = momentum + eta / 2 * grad
        new = new + eta * momentum
        log_p, grad = common.log_p_and_grad(f_hot, x, new, temperature, cost)
        momentum = momentum + eta / 2 * grad
    log_ratio += log_p - momentum.square().sum(1) / 2
    taken = torch.rand_like(log_p).log() < log_ratio  # nan compares False: a broken proposal is refused
    z = torch.where(taken[:, None], new, z)
    return z * (torch.randn_like(z).norm(dim=1) / z.norm(dim=1))[:, None], taken.float()


@torch.no_grad()
def translate(f, rows):
    """For the photographs in these rows, by what chains do in training -> z ~ pi_f(.|x) (n, D), their mean cost."""
    out = []
    for i, part in enumerate(rows.split(CHUNK)):
        if i % 8 == 7:
            print(f"translated {i * CHUNK}/{len(rows)}  {common.peak_mib(device):.0f} MiB")
        x = photographs(part)
        z = start(f, x)
        for age in range(LIFE):
            z, _ = trajectory(f, x, z, temperatures[age].expand(len(z)), bank.eta[age].expand(len(z)))
        out.append(torch.cat([z, cost(x, z)[:, None]], 1))
    return torch.cat(out)[:, :-1], torch.cat(out)[:, -1].mean().item()


# ---------------------------------------------------------------------------------------------- scores

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

f, f_avg = (Potential(SCALE * to_pool.mean(0).std()).to(device) for _ in range(2))
f_avg.load_state_dict(f.state_dict())
opt = torch.optim.Adam(f.net.parameters(), lr=LR, betas=BETAS)
order = torch.randperm(len(train), device=device)  # of the sources: in turn, so that none is seen more than another
# NEW lanes of chains, LIFE in each, by age: in a step all grow older by one trajectory, one starts and one ends
bank = common.Bank(torch.zeros(NEW, LIFE, 3 * SIDE ** 2), torch.zeros(NEW, LIFE, D), ended=torch.zeros(ENDED, D),
                   eta=ETA * (temperatures / hot).sqrt()).to(device)

run = common.Run(args, f"{name}.pt", {"f": f, "f_avg": f_avg, "opt": opt, "bank": bank}, STEPS, STEPS // 12, CONSTANTS)
if not args.resume:
    bank.x[:] = photographs(common.stratified_rows(len(train), NEW * LIFE, device)).unflatten(0, (NEW, LIFE))
    bank.y[:] = start(f, bank.x.flatten(0, 1)).unflatten(0, (NEW, LIFE))
for step in run.steps():
    opt.param_groups[0]["lr"] = common.warm_cosine(LR, step, WARMUP, STEPS)
    lanes = bank.rows(NEW)
    x, z = photographs(order[(NEW * step + lanes) % len(order)]), bank.y[lanes]
    bank.ended = torch.cat([z[:, -1], bank.ended[:-len(lanes)]])
    z = torch.cat([start(f, x)[:, None], z[:, :-1]], 1).flatten(0, 1)
    x = torch.cat([x[:, None], bank.x[lanes, :-1]], 1).flatten(0, 1)
    chains = x, z, temperatures.repeat(len(lanes)), bank.eta.repeat(len(lanes))
    parts = zip(*(values.split(CHUNK) for values in chains))
    z, accepted = (torch.cat(values).unflatten(0, (-1, LIFE)) for values in zip(*(trajectory(f, *p) for p in parts)))
    x, accepted = x.unflatten(0, (-1, LIFE)), accepted.mean(0)
    bank.x[lanes], bank.y[lanes] = x, z
    bank.eta *= torch.exp(0.03 * (accepted - ACCEPT))
    gap = common.train_step(f, opt, torch.randn(2 * len(chains[0]), D, device=device), z[:, COOL:].flatten(0, 1))
    common.update_ema(f_avg, f, EMA_DECAY, step)
    if run.due():
        run.log({"gap": 1e3, "max_param": 1e3}, gap=gap / f.scale, **normality_stats(bank.ended[:len(lanes) * step]),
                cost=cost(x[:, -1], z[:, -1]).mean(), accept=accepted.mean(), eta_hot=bank.eta[0],
                eta_cold=bank.eta[-1], max_param=common.max_param(f.net))


# ---------------------------------------------------------------------------------------------- results

test_rows = torch.arange(len(train), len(train) + len(held_out), device=device).repeat_interleave(PER_IMAGE)
translations, mean_cost = translate(f_avg, test_rows)
scores = {"cost": mean_cost, **{f"latent_{k}": v.item() for k, v in normality_stats(translations).items()}}
scored = test_rows[torch.randperm(len(test_rows), device=device)[:2000]]
matrix = costs(photographs(scored), images(torch.randn(len(scored), D, device=device))).double().cpu()
scores["discrete_cost"], marginal_error = discrete_plan_cost(matrix)
if marginal_error > 0.01:
    print(f"warning: the discrete entropic plan has not converged (marginal error {marginal_error:.2g})")
scores["assigned_cost"] = matrix[linear_sum_assignment(matrix)].mean().item()
scores["independent_cost"] = matrix.mean().item()
scores["exact_ks"] = normality_stats(torch.randn_like(translations))["ks"].item()

if made_up:  # the same sampler with nothing learned
    untrained, scores["zero_cost"] = translate(Potential(0.0).to(device), test_rows)
    scores |= {f"zero_{k}": v.item() for k, v in normality_stats(untrained).items()}

shown = test_rows.unique()[::math.ceil(len(held_out) / 6)]
sources = torch.from_numpy(np.stack([decode(held_out[k - len(train)], 256) for k in shown])).permute(0, 3, 1, 2) / 255
columns = full_images(translate(f_avg, shown.repeat_interleave(5))[0]).unflatten(0, (len(shown), 5)).unbind(1)
columns = [F.interpolate(column, size=(256, 256), mode="area") for column in (sources, *columns)]
problem = write_png(f"{name}.png", torch.cat([torch.cat(list(column), 1) for column in columns], 2))
print(f"warning: {problem}: free some space, then --resume" if problem else f"wrote {name}.png and {name}.pt")

for i, z in enumerate(translations.split(1) if args.translate else ()):
    number, copy = divmod(i, PER_IMAGE)
    stem = os.path.splitext(os.path.basename(held_out[number]))[0][:50]  # the number keeps a.jpg and a.png apart
    if problem := write_png(os.path.join(args.translate, f"{number:05d}_{stem}_{copy}.png"), full_images(z)[0]):
        common.fail(f"{problem}: free some space, then --resume with --translate again")

print(f"final eps {EPS:g} " + " ".join(f"{k} {v:.4g}" for k, v in scores.items()) + f" train_s {run.seconds:.1f}",
      f"total_s {time.perf_counter() - start_time:.1f} peak_mib {common.peak_mib(device):.0f}")
