"""Frechet Inception distance (FID) between two sets of images (Heusel et al., NeurIPS 2017), as pytorch-fid defines it.

    FID = |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)       m, S: mean and covariance of the Inception features

    python eval_fid.py A B                   prints the FID of A and B, each one of
        folder       of 8-bit images of any size and mode (not its subfolders), made RGB without alpha or EXIF rotation
        images.pt    (N, 3 or 1, H, W), uint8 or floats in [-1, 1], these clipped and rounded to 8 bits as a PNG would
        pairs.pt     {"x": (N, ...), "y": (N, M, 3, H, W)}: the N*M translations y; x is unused
        stats.npz    mu (D,) and sigma (D, D), made by --save or by pytorch-fid
    python eval_fid.py A [B] --save A.npz    writes the statistics of A as well, or only them

The first run downloads the weights, 91 MiB, into torch's hub folder; --weights FILE takes a copy fetched elsewhere.
An image is 11.4 GFLOP: 2 to 3 images/s on one CPU core beside other jobs, 1.6 GiB, 97 to 99 % of the time in the network.
Few images make the FID too large, by tr S / n in the mean term and more in the rest: compare only FIDs of equal n.
"""
import argparse
import hashlib
import math
import os
import socket
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.models import inception
from torchvision.transforms.functional import to_tensor

import common

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d"  # the first digits of the file's
SIDE = 299           # pixels, what the network was trained on
RESIZE = f"bilinear to {SIDE}x{SIDE} without antialiasing"
LAYER = "pool3 of the FID Inception 2015-12-05"
DIM = 2048           # features
ENDINGS = (".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
BATCH = 32           # images
AHEAD = 2            # batches read while the network works
LOG_EVERY = 10.0     # seconds


# ---------------------------------------------------------------------------------------------- network
# torchvision's Inception with the pooling of the TensorFlow graph that every published FID rests on: averages leave the
# padding out, and the last block takes the maximum.

def mean_pool(h):
    return F.avg_pool2d(h, 3, stride=1, padding=1, count_include_pad=False)


def chain(h, *layers):
    for layer in layers:
        h = layer(h)
    return h


class A(inception.InceptionA):
    def forward(self, h):
        return torch.cat([self.branch1x1(h), chain(h, self.branch5x5_1, self.branch5x5_2),
                          chain(h, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3), self.branch_pool(mean_pool(h))], 1)


class C(inception.InceptionC):
    def forward(self, h):
        double = self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3, self.branch7x7dbl_4, self.branch7x7dbl_5
        return torch.cat([self.branch1x1(h), chain(h, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3), chain(h, *double),
                          self.branch_pool(mean_pool(h))], 1)


class E(inception.InceptionE):
    def forward(self, h):
        pooled = mean_pool(h) if h.shape[1] == 1280 else F.max_pool2d(h, 3, stride=1, padding=1)  # Mixed_7b, Mixed_7c
        single, double = self.branch3x3_1(h), chain(h, self.branch3x3dbl_1, self.branch3x3dbl_2)
        return torch.cat([self.branch1x1(h), self.branch3x3_2a(single), self.branch3x3_2b(single), self.branch3x3dbl_3a(double),
                          self.branch3x3dbl_3b(double), self.branch_pool(pooled)], 1)


def build_network():
    """(B, 3, 299, 299) in [-1, 1] -> class scores (B, 1008), or features (B, 2048) once its fc is Identity()."""
    blocks = [inception.BasicConv2d, A, inception.InceptionB, C, inception.InceptionD, E, inception.InceptionAux]
    return inception.Inception3(1008, aux_logits=False, init_weights=False, inception_blocks=blocks).eval()


def load_network(own, device):
    """-> images (B, 3, 299, 299) in [-1, 1] to features (B, 2048), by the weights in the file `own`, or else by the
    published ones, downloaded once; and the name of these features."""
    path = own or os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(URL))
    if not os.path.exists(path):
        if own:
            common.fail(f"--weights {path} does not exist: leave it out to download the file, or name it")
        print(f"downloading {URL} to {path}, once", flush=True)
        socket.setdefaulttimeout(20)  # seconds of silence: torch would wait for ever
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(URL, path, SHA256, progress=False)  # aside, checked, then renamed
        except Exception as error:  # no network, no space, no permission, cut short: each has its own
            common.fail(f"cannot download the Inception weights ({error}): fetch {URL} elsewhere, and name the file with --weights")
    try:
        with open(path, "rb") as file:
            sha = hashlib.sha256(file.read()).hexdigest()[:len(SHA256)]
        state = torch.load(path, map_location="cpu", weights_only=True)
        net = build_network()
        net.load_state_dict(state)
        assert own or sha == SHA256
    except Exception:  # foreign pickle, another network, cut short, altered, a folder, no permission
        common.fail(f"{path} cannot be read as the FID Inception weights: replace it by {URL}, or delete it to download them")
    if sha != SHA256:
        print(f"warning: {path} is not the published file (its SHA-256 begins {sha}, not {SHA256}): what follows is no FID", flush=True)
    net.fc = torch.nn.Identity()
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format  # half as fast again on a CPU
    return net.to(device, memory_format=layout), f"{LAYER}, weights {sha}"


# ---------------------------------------------------------------------------------------------- images
# A set of images is {"items": a list or tensor, "read": of an item, (3, H, W) in [0, 1], or what is wrong with it}.

def open_folder(path, skip):
    def read(name, whole=True):
        try:
            with Image.open(os.path.join(path, name)) as image:
                if image.mode[0] in "IF":  # PIL would clip them to white
                    return f"{name} (not 8 bits per channel)"
                return to_tensor(image.convert("RGB")) if whole else None
        except Exception as error:  # PIL has one for each way to be broken
            return f"{name} ({error})"

    names = sorted(n for n in os.listdir(path) if n.lower().endswith(ENDINGS) and not n.startswith("."))
    if not names:
        common.fail(f"{path} has no images of its own ({' '.join(ENDINGS)}; subfolders are not searched): name a folder that has")
    with ThreadPoolExecutor(8) as pool:  # headers only: most of what is wrong shows now, not after minutes
        wrong = list(pool.map(lambda name: read(name, whole=False), names))
    report([w for w in wrong if w], path, skip)
    return {"items": [n for n, w in zip(names, wrong) if not w], "read": read}


def report(wrong, path, skip):
    if wrong and not skip:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        common.fail(f"{path} has unusable images, {', '.join(wrong[:5])}{more}: mend or remove them, or leave them out with --skip-broken")
    for sentence in wrong:
        print(f"skipped in {path}: {sentence}", flush=True)


def enough(path, images):
    if len(images) < 2:
        common.fail(f"{path} has {len(images)} usable image{'s' * (len(images) != 1)}: a covariance takes at least two, name a larger set")


def open_pt(path):
    try:
        images = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # foreign pickle, cut short, text file: torch has an exception for each
        common.fail(f"{path} is not a readable .pt file of tensors: write it with torch.save")
    images = images.get("y") if isinstance(images, dict) else images
    shape = tuple(getattr(images, "shape", ()))
    if len(shape) not in (4, 5) or shape[-3] not in (1, 3) or not images.numel():
        common.fail(f"{path} holds {shape or 'no y'}: it should hold images (N, 3, H, W), or pairs with translations y (N, M, 3, H, W)")
    images = images.flatten(0, -4)
    if images.dtype != torch.uint8:
        low, high = (v.item() for v in images.aminmax())
        if not (images.is_floating_point() and -2 < low < 0 < high < 2):  # nan too; a sampler may overshoot, but [0, 1] is foreign
            common.fail(f"{path} holds {images.dtype} pixels from {low:g} to {high:g}: store them as uint8, or as floats that span [-1, 1]")

    def read(image):
        image = image if image.dtype == torch.uint8 else ((image.float() + 1) * 127.5).clamp(0, 255).round()
        return image.expand(3, -1, -1) / 255

    return {"items": images, "read": read}


def batches(items, read, device):
    """What read found wrong, and the others as (<= BATCH, 3, 299, 299) in [-1, 1], made ready before they are needed."""
    def prepared(item):
        image = read(item)
        return image if isinstance(image, str) else 2 * F.interpolate(image[None], (SIDE, SIDE), mode="bilinear", align_corners=False) - 1

    def batch(start):
        made = list(readers.map(prepared, items[start:start + BATCH]))
        images = torch.cat([torch.empty(0, 3, SIDE, SIDE)] + [m for m in made if not isinstance(m, str)])
        return [m for m in made if isinstance(m, str)], images.pin_memory() if device.type == "cuda" else images

    torch.get_num_threads()  # settles this thread's count for good: without it, the next line would lower it too
    alone = {"initializer": torch.set_num_threads, "initargs": (1,)}  # core for each: the rest is the network's
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), **alone) as readers, ThreadPoolExecutor(1, **alone) as stacker:
        starts = list(range(0, len(items), BATCH))
        ready = deque(stacker.submit(batch, start) for start in starts[:AHEAD])
        for k in range(len(starts)):
            yield ready.popleft().result()
            ready.extend(stacker.submit(batch, start) for start in starts[k + AHEAD:k + AHEAD + 1])


@torch.inference_mode()
def features(net, path, items, read, skip, device, later=0):
    """(n, 2048) of a set, in order, on the CPU.  later: images of the next set, counted in the time left."""
    begun = shown = time.perf_counter()
    rows, done, busy = [], 0, 0.0
    for wrong, images in batches(items, read, device):
        report(wrong, path, skip)
        start = time.perf_counter()
        rows.append(net(images.to(device, non_blocking=True)).cpu())  # .cpu() waits for the network
        now = time.perf_counter()
        busy, done, total = busy + now - start, done + len(wrong) + len(images), now - begun
        if done == len(items) or len(rows) == 1 or now - shown > LOG_EVERY:
            shown = now
            print(f"{path}  {done}/{len(items)} images  {done / total:.1f} images/s  {100 * busy / total:.0f} % in the network  "
                  f"{common.peak_mib(device):.0f} MiB  {common.clock((len(items) - done + later) * total / done)} left", flush=True)
    rows = torch.cat(rows)
    enough(path, rows)
    if not rows.isfinite().all():
        common.fail("the features are not finite: these weights are not those of the FID Inception")
    return rows


# ---------------------------------------------------------------------------------------------- statistics
# Of a set: {"mu": (D,), "sigma": (D, D), "n": how many images, nan if unknown}, float64.

def statistics(x):
    """Mean and covariance (over n - 1) of features (n, D)."""
    mu = x.mean(0, dtype=torch.float64)
    return {"mu": mu, "sigma": sum(d.T @ d for d in (part - mu for part in x.split(4096))) / (len(x) - 1), "n": len(x)}


def root(sigma):
    """R (D, rank) with R R^T = sigma."""
    values, vectors = torch.linalg.eigh(sigma)
    real = values > len(sigma) * torch.finfo(sigma.dtype).eps * values[-1]  # the rest is rounding, whose root is not small
    return vectors[:, real] * values[real].sqrt()


def frechet(a, b):
    """Squared Frechet distance of the Gaussians with statistics a and b, exact where a covariance is singular too.

    tr (S_a S_b)^(1/2) sums the roots of the eigenvalues of the symmetric R_a^T S_b R_a = G G^T, G = R_a^T R_b: those are the
    singular values of G, and taken as such they keep the digits that squaring loses (at rank 299 of 2048 the FID of a set
    to itself is 2e-12 by them and -3e-5 by the eigenvalues)."""
    trace = torch.linalg.svdvals(root(a["sigma"]).T @ root(b["sigma"])).sum()
    return max(0.0, ((a["mu"] - b["mu"]).square().sum() + a["sigma"].trace() + b["sigma"].trace() - 2 * trace).item())


def open_npz(path):
    try:
        with np.load(path) as kept:
            stats = {key: torch.from_numpy(kept[key].astype(np.float64)) for key in ("mu", "sigma")}
            stats.update({key: str(kept[key]) if key in kept else "unknown" for key in ("resize", "layer")})
            stats.update(n=float(kept["n"]) if "n" in kept else math.nan, dim=len(stats["mu"]))
        mu, sigma = stats["mu"], stats["sigma"]
        noise = 1e-4 * sigma.diagonal().abs().max() + 1e-300  # what a float32 file may lack in symmetry and sign
        assert sigma.shape == mu.shape * 2 and mu.isfinite().all() and (sigma - sigma.T).abs().max() <= noise
        torch.linalg.cholesky(sigma + noise * torch.eye(len(mu)))
    except Exception:  # foreign archive, pickle inside, cut short, no covariance: each has its own
        common.fail(f"{path} does not hold a mean mu (D,) and a covariance sigma (D, D): make it with --save")
    return stats


def save(path, stats):
    try:
        with open(f"{path}.tmp", "wb") as file:
            np.savez(file, **{key: stats[key] for key in ("mu", "sigma", "n", "resize", "layer")})
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        if os.path.exists(f"{path}.tmp"):
            os.remove(f"{path}.tmp")
        common.fail(f"--save {path} cannot be written ({error.strerror}): free some space or name another file")
    print(f"wrote {path}", flush=True)


# ---------------------------------------------------------------------------------------------- the run

def open_set(path, skip):
    """Statistics or images, and in the first seconds a sentence on whatever is wrong with them."""
    try:
        if os.path.isdir(path):
            images = open_folder(path, skip)
        else:
            open(path, "rb").close()
            if path.endswith(".npz"):
                return open_npz(path)
            if not path.endswith(".pt"):
                common.fail(f"{path} is neither a folder of images nor a .pt or .npz file: name one")
            images = open_pt(path)
    except OSError as error:
        common.fail(f"{path} cannot be read ({error.strerror}): name a folder of images, a .pt or an .npz")
    enough(path, images["items"])
    return images


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: common.fail(message + " (-h lists the options)")
    parser.add_argument("sets", metavar="A B", nargs="+", help="folders, .pt or .npz files; B may be left out with --save")
    parser.add_argument("--save", metavar="FILE.npz", help="write the statistics of A there")
    parser.add_argument("--weights", metavar="FILE", help="the Inception weights, if not to be downloaded")
    parser.add_argument("--skip-broken", action="store_true", help="leave out unusable images, naming them, instead of ending there")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU that works, else the CPU)")
    args = parser.parse_args()
    begun, paths, device = time.perf_counter(), args.sets, common._device(args.device)
    torch.backends.cudnn.allow_tf32 = False  # float32 throughout: TF32 would move the features by 1e-3
    torch.backends.cudnn.benchmark = True
    if len(paths) != 2 and not (len(paths) == 1 and args.save):
        common.fail("name two sets A and B, or one and --save FILE.npz (-h lists the options)")
    if args.save and (os.path.exists(args.save) or not args.save.endswith(".npz")):
        common.fail(f"--save {args.save} {'exists' if os.path.exists(args.save) else 'does not end in .npz'}: name another file")
    if args.save and not os.access(os.path.dirname(os.path.abspath(args.save)), os.W_OK):  # shows now, not in an hour
        common.fail(f"--save {args.save} is not in a folder you can write to: name another")

    sets = [open_set(path, args.skip_broken) for path in paths]
    counts = [len(s.get("items", ())) for s in sets]
    if any(counts):
        net, layer = load_network(args.weights, device)
        sets = [{"dim": DIM, "resize": RESIZE, "layer": layer, **s} for s in sets]
    for key in ("dim", "resize", "layer"):
        a, b = sets[0][key], sets[-1][key]
        if a != b and "unknown" not in (a, b):
            common.fail(f"A and B differ in {key} ({a}, {b}), and have no distance: make both with this script")

    for k, (path, s) in enumerate(zip(paths, sets)):
        if counts[k]:
            s.update(statistics(features(net, path, s["items"], s["read"], args.skip_broken, device, later=sum(counts[k + 1:]))))
        print(f"{'AB'[k]} {path}: n {s['n']:.0f}  resize {s['resize']}  features {s['layer']}, {s['dim']}-d", flush=True)
        if not s["n"] >= DIM:  # nan too
            few = "unknown" if math.isnan(s["n"]) else f"below {DIM}"
            print(f"warning: n is {few}: few images make the FID too large, here by about tr S / n = {s['sigma'].trace() / s['n']:.3g} "
                  f"in |m_a - m_b|^2 and by more in the rest; compare it only with FIDs of equal n", flush=True)
        if k == 0 and args.save:
            save(args.save, s)
    numbers = "".join(f" n_{'ab'[k]} {s['n']:.0f}" for k, s in enumerate(sets))
    print(f"final{f' fid {frechet(*sets):.6g}' if len(sets) == 2 else ''}{numbers} total_s {time.perf_counter() - begun:.1f}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped: nothing to keep but what --save has written")
