"""Frechet Inception distance (FID) of two sets of images (Heusel et al., NeurIPS 2017), as pytorch-fid computes it.

    FID = |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)       m, S: mean and covariance of Inception features

    python eval_fid.py A B                   prints the FID of A and B, each one of
        folder       of 8-bit images of any size and mode (not its subfolders), read as RGB without alpha or EXIF turn
        images.pt    (N, 3 or 1, H, W), uint8, or floats in [-1, 1], which are clipped and rounded as in a PNG
        pairs.pt     {"x": (N, ...), "y": (N, M, 3, H, W)}: the N*M translations y; x is unused
        stats.npz    mu (D,) and sigma (D, D), made by --save or by pytorch-fid
    python eval_fid.py A [B] --save A.npz    writes the statistics of A as well, or only them

The first run downloads the weights, 91 MiB, into torch's hub folder; --weights FILE takes a copy fetched elsewhere.
An image is 11.4 GFLOP: 2 to 3 images/s on one CPU core, 1.6 GiB.  Few images make the FID too large: compare equal n.
"""
import common  # before the imports that take seconds: with it, Ctrl-C ends them without a traceback
import argparse
import hashlib
import math
import os
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch.nn import AvgPool2d, MaxPool2d
from torch.nn.functional import interpolate
from torchvision.models import inception
from torchvision.transforms.functional import to_tensor

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d"      # the first digits of the file's
SIDE = 299               # pixels, the image size that the network was trained on
DIM = 2048               # features
ENDINGS = (".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_PIXELS = 50_000_000  # of one image: a file of kilobytes can unpack to gigabytes, and up to 8 are read at once
BATCH = 32               # images
AHEAD = 64               # images read while the network works on a batch
LOG_EVERY = 10.0         # seconds
Image.MAX_IMAGE_PIXELS = None  # PIL's bound only warns at first; MAX_PIXELS is lower and refuses


# ---------------------------------------------------------------------------------------------- network
# torchvision's Inception with the pooling of the TensorFlow graph that all published FIDs rest on: averages leave out
# the padding, and the last block takes the maximum.

def change_pooling(block, pool):
    """Let the pooling branch of a block begin with pool(input of the block), in place of what torchvision pooled."""
    inputs = []
    block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    block.branch_pool.register_forward_pre_hook(lambda *_: pool(inputs.pop()))


def build_network():
    """(B, 3, 299, 299) in [-1, 1] -> class scores (B, 1008), or features (B, 2048) once its fc is Identity()."""
    net = inception.Inception3(1008, aux_logits=False, init_weights=False).eval()
    mean_pool = AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    for name, block in net.named_children():
        if hasattr(block, "branch_pool"):
            change_pooling(block, MaxPool2d(3, stride=1, padding=1) if name == "Mixed_7c" else mean_pool)
    return net


def download(path):
    print(f"downloading {URL} to {path}, once")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with urllib.request.urlopen(URL, timeout=20) as reply:  # seconds of silence
            content = reply.read()
        altered = not hashlib.sha256(content).hexdigest().startswith(SHA256)
        problem = "its SHA-256 is wrong" if altered else common.write_aside(path, lambda file: file.write(content))
    except Exception as error:  # no network, no permission, cut short: each has its own
        problem = error
    if problem:
        common.fail(f"cannot download the Inception weights ({problem}): fetch {URL}, and name the file with --weights")


def load_network(weights, device):
    """-> the network from images (B, 3, 299, 299) in [-1, 1] to features (B, 2048), and the name of these features.
    weights: a file to use in place of the published one, or None."""
    path = weights or os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(URL))
    if not os.path.exists(path) and not weights:
        download(path)
    if not os.path.isfile(path):  # to open a named pipe would be to wait for its writer
        common.fail(f"--weights {path} is no file: leave it out to download the weights")
    try:
        with open(path, "rb") as file:
            sha = hashlib.sha256(file.read()).hexdigest()[:len(SHA256)]
            if sha != SHA256 and not weights:
                raise ValueError
            file.seek(0)
            net = build_network()
            net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception:  # altered, cut short, foreign pickle, another network, no permission
        common.fail(f"{path} cannot be read as the FID Inception weights: delete it to download them, or get {URL}")
    if sha != SHA256:
        print(f"warning: {path} is not the published file (SHA-256 {sha}, not {SHA256}): what follows is no FID")
    net.fc = torch.nn.Identity()
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format  # 1.5 times as fast on a CPU
    return net.to(device, memory_format=layout), f"pool3 of the FID Inception 2015-12-05, weights {sha}"


# ---------------------------------------------------------------------------------------------- images
# A set of images is {"items": file names or pixels, "read": item -> (3, H, W) in [0, 1] or words on what is wrong}.

def report(problems, path, skip):
    if problems and not skip:
        common.fail(f"{path} has {len(problems)} unusable, {', '.join(problems[:5])}{' ...' * (len(problems) > 5)}: "
                    "mend or remove them, or leave them out with --skip-broken")
    for problem in problems:
        print(f"skipped in {path}: {problem}")


def check_count(path, n):
    if n < 2:
        common.fail(f"{path} has {n} usable images of its own: a covariance takes at least two, name a larger set")


def open_folder(path, skip):
    def read(name, only_header=False):
        file = os.path.join(path, name)
        if not os.path.isfile(file):  # to open a named pipe is to wait for its writer
            return f"{name} (not a file)"
        try:
            with Image.open(file) as image:
                if image.mode[0] in "IF":  # PIL would clip them to white
                    return f"{name} (not 8 bits per channel)"
                if math.prod(image.size) > MAX_PIXELS:
                    return f"{name} ({image.width}x{image.height}, over {MAX_PIXELS} pixels)"
                return None if only_header else to_tensor(image.convert("RGB"))
        except Exception as error:  # PIL has one for each way to be broken
            return f"{name} ({error})"

    names = sorted(name for name in os.listdir(path) if name.lower().endswith(ENDINGS) and not name.startswith("."))
    problems = {name: read(name, only_header=True) for name in names}  # most show now, not in an hour
    report(list(filter(None, problems.values())), path, skip)
    names = [name for name in names if not problems[name]]
    check_count(path, len(names))
    return {"items": names, "read": read}


def open_pt(path, file):
    def refuse(found):
        common.fail(f"{path} holds {found}: it should hold images (N, 3, H, W), or pairs with translations y "
                    "(N, M, 3, H, W), in a dense tensor of uint8 or of floats that span [-1, 1]")

    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # foreign pickle, cut short, text file: torch has an exception for each
        common.fail(f"{path} is not a readable .pt file of tensors: write it with torch.save")
    images = loaded.get("y") if isinstance(loaded, dict) else loaded
    shape = tuple(images.shape) if isinstance(images, torch.Tensor) else ()
    if len(shape) not in (4, 5) or shape[-3] not in (1, 3) or not images.numel():
        refuse(shape or "no y")
    if images.dtype not in DTYPES or images.layout is not torch.strided or images.device.type != "cpu":
        refuse(f"{images.dtype} pixels, {images.layout}, device {images.device}")
    images = images.flatten(0, -4)
    if images.dtype != torch.uint8:
        low, high = (bound.item() for bound in images.aminmax())
        if not -2 < low < 0 < high < 2:  # a sampler may overshoot, but [0, 1] is another convention; nan fails too
            refuse(f"pixels from {low:g} to {high:g}")
    check_count(path, len(images))

    def read(image):
        levels = image if image.dtype == torch.uint8 else ((image.float() + 1) * 127.5).clamp(0, 255).round()
        return levels.expand(3, -1, -1) / 255

    return {"items": images, "read": read}


def batches(items, read):
    """In parts of BATCH: what is wrong with some images, and the others as (<= BATCH, 3, 299, 299) in [-1, 1].
    Threads prepare the next ones while the network works."""
    def prepare(item):
        image = read(item)
        return image if isinstance(image, str) else 2 * interpolate(image[None], (SIDE, SIDE), mode="bilinear") - 1

    torch.get_num_threads()  # fixes the number of this thread, which the initializer would lower as well
    with ThreadPoolExecutor(8, initializer=torch.set_num_threads, initargs=(1,)) as readers:
        waiting = [readers.submit(prepare, item) for item in items[:AHEAD]]
        for first in range(0, len(items), BATCH):
            waiting += [readers.submit(prepare, item) for item in items[first + AHEAD:first + AHEAD + BATCH]]
            prepared = [waiting.pop(0).result() for _ in items[first:first + BATCH]]
            images = [p for p in prepared if not isinstance(p, str)]
            yield [p for p in prepared if isinstance(p, str)], torch.cat([torch.empty(0, 3, SIDE, SIDE)] + images)


@torch.inference_mode()
def features(net, path, items, read, skip, device, later=0):
    """(n, 2048) of a set, in order, on the CPU.  later: images of the next set, counted in the time left."""
    start_time = shown_time = time.perf_counter()
    rows, done = [], 0
    for problems, images in batches(items, read):
        report(problems, path, skip)
        rows.append(net(images.to(device)).cpu())
        done += len(problems) + len(images)
        now = time.perf_counter()
        if done == len(items) or len(rows) == 1 or now - shown_time > LOG_EVERY:
            shown_time, rate = now, done / (now - start_time)
            print(f"{path}  {done}/{len(items)} images  {rate:.1f} images/s  {common.peak_mib(device):.0f} MiB  "
                  f"{common.clock((len(items) - done + later) / rate)} left")
    x = torch.cat(rows)
    check_count(path, len(x))
    if not x.isfinite().all():
        common.fail("the features are not finite: these weights are not those of the FID Inception")
    return x


# ---------------------------------------------------------------------------------------------- statistics
# Of a set: {"mu": (D,), "sigma": (D, D), "n": how many images, nan if unknown, "resize", "layer"}, float64.

def statistics(x):
    """Mean and covariance (over n - 1) of features (n, D)."""
    mu = x.mean(0, dtype=torch.float64)
    return {"mu": mu, "sigma": sum(d.T @ d for d in (part - mu for part in x.split(4096))) / (len(x) - 1), "n": len(x)}


def factor(sigma):
    """R (D, rank) with R R^T = sigma."""
    values, vectors = torch.linalg.eigh(sigma)
    positive = values > len(sigma) * torch.finfo(sigma.dtype).eps * values[-1]  # below: rounding, with a large root
    return vectors[:, positive] * values[positive].sqrt()


def frechet(a, b):
    """Squared Frechet distance of the Gaussians with statistics a and b, exact where a covariance is singular too.
    tr (S_a S_b)^(1/2) sums the singular values of R_a^T R_b.  Those are the roots of the eigenvalues of R_a^T S_b R_a,
    which would lose digits: at rank 299 of 2048 the FID of a set to itself is 2e-12, by eigenvalues -3e-5."""
    trace = torch.linalg.svdvals(factor(a["sigma"]).T @ factor(b["sigma"])).sum()
    value = ((a["mu"] - b["mu"]).square().sum() + a["sigma"].trace() + b["sigma"].trace() - 2 * trace).item()
    return 0.0 if value < 0 else value  # rounding; nan stays nan


def open_npz(path, file):
    try:
        with np.load(file) as archive:
            mu, sigma = (torch.from_numpy(archive[key].astype(np.float64)) for key in ("mu", "sigma"))
            stats = {key: str(archive[key]) if key in archive else "unknown" for key in ("resize", "layer")}
            stats.update(mu=mu, sigma=sigma, dim=len(mu), n=float(archive["n"]) if "n" in archive else math.nan)
        tolerance = 1e-4 * sigma.diagonal().abs().max() + 1e-300  # a float32 file is not quite symmetric or positive
        size = mu.square().sum() + sigma.square().sum()  # numbers that overflow here have no FID
        if sigma.shape != mu.shape * 2 or not size.isfinite() or (sigma - sigma.T).abs().max() > tolerance:
            raise ValueError
        torch.linalg.cholesky(sigma + tolerance * torch.eye(len(mu)))
    except Exception:  # foreign archive, pickle inside, cut short, no covariance: each has its own
        common.fail(f"{path} does not hold a mean mu (D,) and a covariance sigma (D, D): make it with --save")
    return stats


def save_npz(path, stats):
    kept = {key: stats[key] for key in ("mu", "sigma", "n", "resize", "layer")}
    problem = common.write_aside(path, lambda file: np.savez(file, **kept))
    if problem:
        common.fail(f"--save: {problem}: free some space or name another file")
    print(f"wrote {path}")


# ---------------------------------------------------------------------------------------------- the run

def open_set(path, skip):
    """Statistics or images, and in the first seconds a sentence on whatever is wrong with them."""
    try:
        if os.path.isdir(path):
            return open_folder(path, skip)
        if os.path.exists(path) and not (os.path.isfile(path) and path.endswith((".pt", ".npz"))):
            common.fail(f"{path} is neither a folder of images nor a .pt or .npz file: name one")
        with open(path, "rb") as file:
            return open_npz(path, file) if path.endswith(".npz") else open_pt(path, file)
    except OSError as error:
        common.fail(f"{path} cannot be read ({error.strerror}): name a folder of images, a .pt or an .npz")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: common.fail(message + " (-h lists the options)")
    parser.add_argument("paths", metavar="A B", nargs="+", help="folders, .pt or .npz; B may be left out with --save")
    parser.add_argument("--save", metavar="FILE.npz", help="write the statistics of A there")
    parser.add_argument("--weights", metavar="FILE", help="the Inception weights, if not to be downloaded")
    parser.add_argument("--skip-broken", action="store_true", help="name unusable images and leave them out")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU that works, else CPU)")
    args = parser.parse_args()
    args.device = common.pick_device(args.device)
    if len(args.paths) != 2 and not (len(args.paths) == 1 and args.save):
        common.fail("name two sets A and B, or one and --save FILE.npz (-h lists the options)")
    if args.save:  # problems that would else show in an hour
        writable = os.access(os.path.dirname(os.path.abspath(args.save)), os.W_OK)
        if not writable or not args.save.endswith(".npz") or any(map(os.path.lexists, (args.save, f"{args.save}.tmp"))):
            common.fail(f"--save {args.save} should end in .npz, be in a folder you can write to, and not exist yet "
                        "(nor with .tmp behind): name another file")
    return args


def main():
    start_time = time.perf_counter()
    sys.stdout, sys.stderr = common.Console(sys.stdout), common.Console(sys.stderr)
    args = arguments()
    torch.backends.cudnn.allow_tf32 = False  # TF32 would move the features by 1e-3
    sets = [open_set(path, args.skip_broken) for path in args.paths]
    counts = [len(s.get("items", ())) for s in sets]
    if any(counts):
        net, layer = load_network(args.weights, args.device)
        resize = f"bilinear to {SIDE}x{SIDE} without antialiasing"
        sets = [{"dim": DIM, "resize": resize, "layer": layer, **s} for s in sets]
    for key in ("dim", "resize", "layer"):
        found = {s[key] for s in sets} - {"unknown"}
        if len(found) > 1:
            common.fail(f"A and B differ in {key} {found}, and have no distance: make both with this script")
    for k, (path, s) in enumerate(zip(args.paths, sets)):
        if counts[k]:
            x = features(net, path, s["items"], s["read"], args.skip_broken, args.device, later=sum(counts[k + 1:]))
            s.update(statistics(x))
        n = s["n"]
        print(f"{'AB'[k]} {path}: n {n:.0f}  resize {s['resize']}  features {s['layer']}, {s['dim']}-d")
        if not n >= DIM:  # nan too
            print(f"warning: n is {'unknown' if math.isnan(n) else f'below {DIM}'}: the FID is too large, by tr S / n "
                  f"= {s['sigma'].trace() / n:.3g} in |m_a - m_b|^2 and by more in the rest; compare at equal n only")
        if k == 0 and args.save:
            save_npz(args.save, s)
    fid = frechet(*sets) if len(sets) == 2 else 0.0
    if not math.isfinite(fid):
        common.fail("the FID is not finite: A or B has statistics that are too large, make them again with --save")
    numbers = [f"fid {fid:.6g}"] * (len(sets) == 2) + [f"n_{'ab'[k]} {s['n']:.0f}" for k, s in enumerate(sets)]
    print(f"final {' '.join(numbers)} total_s {time.perf_counter() - start_time:.1f}")
    if sys.stdout.lost:
        common.fail(f"the result could not be printed ({sys.stdout.lost}): free some space")


if __name__ == "__main__":
    main()
