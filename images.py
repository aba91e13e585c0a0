"""Folders of images in and out, the pyramid network, short walks, scores and panels of translations: what the scripts
that translate images share.  Images are (n, C, H, W): bytes as read, floats in [-1,1] from there on; C is 3 or 1."""
import collections
import contextlib
import math
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy.optimize import linear_sum_assignment
from torch import nn

import common
from run import fail, make_folder, reason_of, save_figure, write_aside

MAX_PIXELS = 50_000_000  # of one image: a file of kilobytes can unpack to gigabytes, and several are read at once
NO_PICTURES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # PIL only knows their names, or runs them
READERS, MEMORY = 8, 2 ** 30  # threads; bytes that a set's pixels may take as floats
FEW = 500                # images to train with: fewer the network learns by heart
Image.MAX_IMAGE_PIXELS = None  # PIL's bound only warns at first; MAX_PIXELS is lower and refuses
warnings.filterwarnings("ignore", module="PIL")  # of metadata and palettes that are odd, yet read


# ------------------------------------------------------------------------------------------------ files in

def find(folder):
    """-> the images in a folder, names relative to it, sorted: those at its top, or, where it has none, those in its
    subfolders.  An image is a file with an ending that PIL reads, and not hidden.  Prints what it leaves out."""
    refuse = lambda error: fail(f"the folder {folder} cannot be read ({error.strerror}): name one that holds images")
    kinds = Image.registered_extensions()  # by their endings
    endings = {ending for ending, kind in kinds.items() if kind in Image.OPEN and kind not in NO_PICTURES}
    folder, names, out = os.fspath(folder), [], collections.Counter()
    for path, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for file in files:
            at, ending = os.path.join(path, file), os.path.splitext(file)[1].lower()
            why = ("hidden" if file.startswith(".") else (ending or "without an ending") if ending not in endings else
                   "" if os.path.isfile(at) else "broken links or pipes")  # to open a pipe is to wait for its writer
            if why:
                out[why] += 1
            else:
                names.append(os.path.relpath(at, folder))
        if path == folder and names:
            out["subfolders, as there are images beside them"] += len(folders)
            break
    left_out = ", ".join(f"{count} {what}" for what, count in sorted(out.items()) if count)
    if not names:
        fail(f"the folder {folder} holds no images{f' ({left_out})' * bool(left_out)}: name one that does")
    if left_out:
        print(f"{folder}: ignored {sum(out.values())} files or folders: {left_out}")
    return sorted(names)


def open_image(path, background="white"):
    """Any image file as PIL's RGB of 8 bits, upright as its EXIF says, laid on `background` where it is transparent;
    of a film the first frame.  More than 8 bits are scaled by what the type holds, floats from 0 to 1 or to 255.
    Raises ValueError with what is wrong, in words."""
    try:
        with Image.open(path) as image:  # reads the header only
            if math.prod(image.size) > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height}, over {MAX_PIXELS} pixels")
            image.load()
            with contextlib.suppress(Exception):  # EXIF that is broken says nothing
                image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # PIL would clip them to white
                grey = np.asarray(image).astype(np.float64)
                most = 65535 if image.mode[0] == "I" else 1 if grey.max() <= 1 else 255
                if not (grey.min() >= 0 and grey.max() <= most):  # nan too
                    raise ValueError(f"levels from {grey.min():g} to {grey.max():g}, not from 0 to {most}")
                image = Image.fromarray((255 / most * grey).round().astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
            return image.convert("RGB")
    except Exception as error:  # PIL has one for each way to be broken
        raise ValueError(reason_of(error).replace(str(path), "file")[:100]) from None


def read(folder, names, side, background="white"):
    """The central squares of images in a folder, averaged over boxes down to side (or smoothly enlarged): bytes
    (n, 3, side, side).  Broken files are named in one sentence."""
    def one(name):
        try:
            image = open_image(os.path.join(folder, name), background)
        except ValueError as error:
            return f"{name} ({error})"
        method = Image.Resampling.BOX if min(image.size) >= side else Image.Resampling.BICUBIC
        return np.array(ImageOps.fit(image, (side, side), method))

    with ThreadPoolExecutor(READERS) as threads:
        found = list(threads.map(one, names))
    if problems := [words for words in found if isinstance(words, str)]:
        fail(f"{folder} has {len(problems)} unusable files, {', '.join(problems[:5])}{' ...' * (len(problems) > 5)}: "
             "mend them or take them out")
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


def read_pair(paths, side, background="white"):
    """Two sets to translate between: [a folder with trainA, trainB and maybe testA, testB], or [A, B]; without test
    folders every tenth image is held out.  -> x, y, test_x, test_y, floats in [-1,1], grey if all of them are."""
    folders = paths
    if len(paths) == 1:
        folders = [os.path.join(paths[0], part) for part in ("trainA", "trainB", "testA", "testB")]
        if not all(map(os.path.isdir, folders[:2])):
            fail(f"{paths[0]} holds no folders trainA and trainB: make them, or name two folders of images, A B")
        folders = folders if all(map(os.path.isdir, folders[2:])) else folders[:2]
    if len({os.path.realpath(folder) for folder in folders}) < len(folders):
        fail("the two folders are the same: name the sources first, then the targets")
    names, most = [find(folder) for folder in folders], MEMORY // (12 * side ** 2)
    sets = [read(folder, some[::-(-len(some) // most)], side, background) for folder, some in zip(folders, names)]
    if len(sets) == 2:
        sets = [s[torch.arange(len(s)) % 10 > 0] for s in sets] + [s[::10] for s in sets]
    for folder, some, seen, held_out in zip(folders, names, sets, sets[2:]):
        if len(some) > most:
            print(f"{folder}: one in {-(-len(some) // most)} of {len(some)} images is used: memory holds no more")
        if len(seen) < 10 or len(held_out) < 2:
            fail(f"{folder} leaves {len(seen)} images to train with and {len(held_out)} to test: put more there")
        if len(seen) < FEW:
            print(f"warning: {folder} has only {len(seen)} images to train with: under {FEW}, translations are worse")
    grey = all((pixels == pixels[:, :1]).all() for pixels in sets)
    return [(pixels[:, :1] if grey else pixels) / 127.5 - 1 for pixels in sets]


# ------------------------------------------------------------------------------------------------ files out

def out_folder(folder, suffix="_translated"):
    """FOLDER + suffix, made now: what would keep its files from being written must show before the training."""
    path, long_name = os.path.abspath(folder) + suffix, "0" * 220
    make_folder(path)
    problem = write_aside(os.path.join(path, long_name), lambda file: file.write(b" "), False, "name another folder")
    return fail(problem.replace(long_name, "")) if problem else path


def write_folder(path, names, y):
    """Write translations of images so named: NAME.png, or NAME_1.png ... for M > 1.  y yields (M, C, H, W) for each."""
    stems = [os.path.splitext(name)[0] for name in names]
    twice = {stem for stem, count in collections.Counter(map(str.lower, stems)).items() if count > 1}
    stems = [name if stem.lower() in twice else stem for name, stem in zip(names, stems)]  # a.jpg beside a.png
    for stem, copies in zip(stems, y):
        make_folder(os.path.dirname(os.path.join(path, stem)))
        pixels = (127.5 * (copies.clamp(-1, 1) + 1)).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu()
        for k, image in enumerate(map(Image.fromarray, pixels.numpy()), 1):
            file_name = os.path.join(path, stem + f"_{k}" * (len(pixels) > 1) + ".png")
            if problem := write_aside(file_name, lambda file: image.save(file, "png"), remedy="name another folder"):
                fail(f"{problem}; then --resume with --translate writes them again")
    print(f"wrote {len(pixels)} translations of each of {len(names)} images into {path}")


def save_pairs(path, x, y):
    """Write {"x": (N, ...), "y": (N, M, ...)}; a full disk must not cost the run its last line."""
    problem = write_aside(path, lambda file: torch.save({"x": x.cpu(), "y": y.cpu()}, file))
    print(f"warning: {problem}; then --resume writes it again" if problem else f"wrote {path}")


def tiled(images, columns):
    """Images (n, C, H, W) in [-1,1] as one picture, grey lines between: (rows, columns, 3) in [0,1], on the CPU."""
    images = F.pad((images.clamp(-1, 1).cpu().expand(-1, 3, -1, -1) + 1) / 2, (1, 1, 1, 1), value=0.3)
    rows = images[:len(images) // columns * columns].split(columns)
    return torch.cat([torch.cat(list(row), 2) for row in rows], 1).permute(1, 2, 0)


def save_panels(path, title, *panels):
    """Write a figure of panels side by side, each (images (n, C, H, W), columns, its title)."""
    w = [columns for _, columns, _ in panels]
    fig, axes = plt.subplots(1, len(w), figsize=(sum(w), 7.4), layout="constrained", width_ratios=w, squeeze=False)
    for axis, (images, columns, panel_title) in zip(axes[0], panels):
        axis.imshow(tiled(images, columns).numpy())
        axis.set_title(panel_title)
        axis.axis("off")
    fig.suptitle(title)
    save_figure(fig, path)


def save_curves(path, steps, curves):
    """Write a small plot for each curve {name: values}, over the steps."""
    fig, axes = plt.subplots(1, len(curves), figsize=(2.6 * len(curves), 2.4), layout="constrained", squeeze=False)
    for axis, (what, values) in zip(axes[0], curves.items()):
        axis.plot(steps, values, ".-", linewidth=0.8)
        axis.set(title=what, xlabel="step")
    save_figure(fig, path)


# ------------------------------------------------------------------------------------------------ network and sampler

class Pyramid(nn.Module):
    """`outputs` numbers, each a sum of one linear head at each of len(widths) resolutions, every one half the last:
    (B, channels, side, side) -> (B, outputs).  0 at the start.  Sharp edges are learned by the finest heads.  One more
    at the coarsest has a hidden layer: it tells whole shapes from mere strokes."""

    def __init__(self, side, channels, widths, hidden, outputs=1):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(channels, widths[0], 3, 1, 1)])
        self.convs.extend(nn.Conv2d(a, b, 4, 2, 1) for a, b in zip(widths, widths[1:]))
        sizes = [width * (side >> k) ** 2 for k, width in enumerate(widths)]
        self.readouts = nn.ModuleList(common.zeroed(nn.Linear(size, outputs)) for size in sizes)
        self.hidden = nn.Linear(sizes[-1], hidden)
        self.readouts.append(common.zeroed(nn.Linear(hidden, outputs)))

    def forward(self, y):
        y, f = y.contiguous(memory_format=torch.channels_last), 0.0  # faster in it on a CPU
        for conv, head in zip(self.convs, self.readouts):
            y = F.silu(conv(y))
            f = f + head(y.permute(0, 2, 3, 1).flatten(1))  # by pixel, then channel: no copy
        return f + self.readouts[-1](F.silu(self.hidden(y.flatten(1))))


def walk(f, x, y, eps, eta, steps, box, watch=lambda y, grad: None):
    """Langevin steps in +-box, watch(y, grad log pi_f(y|x)) before each.  Consecutive steps share half of their noise
    (Leimkuhler & Matthews 2013): exact for Gaussians, whose variance is 1/7 too large without, at eta = half of it."""
    noise = torch.randn_like(y)
    for _ in range(steps):
        _, grad = common.log_p_and_grad(f, x, y, eps)
        watch(y, grad)
        old, noise = noise, torch.randn_like(y)
        y = (y + eta / 2 * grad + math.sqrt(eta) * (old + noise) / 2).clamp(-box, box)
    return y


def translate(f, draw, x, n, eps, noise, eta, steps, box, part=256, last=1):
    """n translations of each x: (N, C, H, W) -> (N, n, C, H, W).  A walk from draw(x), then the mean of y0, y = y0 +
    noise N(0, I), y ~ pi_f(.|x), by Tweedie's formula: y + noise^2 grad_y log pi_f(y|x), averaged over the `last` y."""
    done, last_print = [], time.perf_counter()
    for some in x.repeat_interleave(n, 0).split(part):
        clean = collections.deque(maxlen=last)
        watch = lambda y, grad: clean.append(y + noise ** 2 * grad)
        y = walk(f, some, draw(some), eps, eta, steps, box, watch)
        watch(y, common.log_p_and_grad(f, some, y, eps)[1])
        done.append(torch.stack([*clean]).mean(0).clamp(-1, 1))
        if time.perf_counter() - last_print > 30:
            print(f"translated {sum(map(len, done))}/{n * len(x)}")
            last_print = time.perf_counter()
    return torch.cat(done).unflatten(0, (-1, n))


# ------------------------------------------------------------------------------------------------ scores

def energy_distance(a, b):
    """2 E|a-b| - E|a-a'| - E|b-b'| of independent samples (n, D), (m, D): 0 in the mean where their laws are equal."""
    within = sum(torch.cdist(c, c).sum() / (len(c) * (len(c) - 1)) for c in (a, b))
    return (2 * torch.cdist(a, b).mean() - within).item()


def exact_ot_cost(x, y):
    """Of the best pairing of as many images x with as many y, cost |x-y|^2/2, mean over pairs."""
    n = min(len(x), len(y))
    cost = torch.cdist(x[:n].flatten(1), y[:n].flatten(1)).square().cpu() / 2
    return cost[linear_sum_assignment(cost.numpy())].mean().item()


def translation_scores(x, y, real, seen):
    """Scores of M translations y (N, M, C, H, W) of x (N, C, H, W), by targets held out, real, and trained with, seen:

    energy      energy distance of y to real over that of x: 0 for the same law, 1 for y = x
    detail      the same of what a 4 x 4 average leaves
    nearest     mean distance to the nearest image of seen, over that of real: 0 for copies, above 1 for blots and grain
    sharp       mean squared gradient over that of real: below 1 for blur, above for grain
    cost_ratio  cost, mean |x-y|^2/2, over exact_ot_cost(x, real)
    diversity   mean distance between two y of one x over that between two real ones; 0 for M = 1
    spread      mean standard deviation of a pixel of y over that of real: far below 1 where y has collapsed"""
    every, ones, scores = y.flatten(0, 1), y.unbind(1), {}
    gradient = lambda y: sum(y.diff(dim=k).square().mean() for k in (2, 3))
    coarse = lambda y: F.interpolate(F.avg_pool2d(y, 4), scale_factor=4, mode="bilinear", align_corners=False)
    for what, view in (("energy", lambda y: y.flatten(1)), ("detail", lambda y: (y - coarse(y)).flatten(1))):
        away = sum(energy_distance(view(one), view(real)) for one in ones)  # the y of one x are not independent
        scores[what] = away / len(ones) / energy_distance(view(x), view(real))
    nearest = [torch.cdist(z.flatten(1), seen.flatten(1)).amin(1).mean() for z in (every, real)]
    cost = common.quadratic_cost(x.repeat_interleave(len(ones), 0), every).mean().item()
    apart = sum((a - b).flatten(1).norm(dim=1).mean() for a, b in zip(ones, ones[1:])) / max(1, len(ones) - 1)
    ratios = {"nearest": nearest[0] / nearest[1], "sharp": gradient(every) / gradient(real), "diversity": apart /
              torch.pdist(real.flatten(1)).mean(), "spread": every.std(0).mean() / real.std(0).mean()}
    scores |= {what: float(ratio) for what, ratio in ratios.items()}
    return scores | {"cost": cost, "cost_ratio": cost / exact_ot_cost(x, real)}
