"""Coloured digits, for train_cmnist.py and train_not.py: data, colours, scores of translations, figure."""
import common

import math
import os
import socket

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torchvision.datasets import MNIST

DATA_OPTION = dict(default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "data"), metavar="FOLDER",
                   help="with MNIST in torchvision's layout, or where to download it to (default %(default)s)")

MAX_PIXELS = 50_000_000  # of one image: a file of kilobytes can unpack to gigabytes


# ------------------------------------------------------------------------------------------------ data

def load_digits(root, digit, train, synthetic=False):
    """All images of one digit: (n, 1, 32, 32) in [0,1], from MNIST in the folder root, in torchvision's layout.
    Where there is none they are downloaded, or, if `synthetic`, made up: 40 to train with, 6 to test."""
    raw = os.path.join(root, "MNIST", "raw")
    if synthetic and not os.path.exists(os.path.join(raw, "train-images-idx3-ubyte")):
        return synthetic_digits(digit, 40 if train else 6, torch.Generator().manual_seed(2 * digit + train))
    socket.setdefaulttimeout(30)  # seconds: without it a network that drops packets hangs a download for ever
    try:
        with common.in_turn():
            mnist = MNIST(root, train=train, download=True)
        grey = mnist.data[torch.as_tensor(mnist.targets) == digit]
    except Exception as error:  # no network, half a file, no permission: torchvision has an exception for each
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        common.fail(f"no digits under {root} ({reason}): put MNIST's files into {raw}, delete broken ones, or name a "
                    f"folder with --data (a network is needed to download them)")
    if len(grey) < 2:
        common.fail(f"{root} holds {len(grey)} images of the digit {digit}: put the whole of MNIST there, or name "
                    f"another folder with --data")
    if grey.shape[1:] != (28, 28) or (grey == grey[0]).all():
        what = "all alike" if grey.shape[1:] == (28, 28) else "of {} x {} pixels, not 28 x 28".format(*grey.shape[1:])
        common.fail(f"{root} is not MNIST, its images of the digit {digit} are {what}: name another folder with --data")
    return F.pad(grey[:, None].float() / 255, (2, 2, 2, 2))


def load_task(root, source, target, synthetic, generator, device):
    """-> grey digits to train with, source and target (n, 1, 32, 32), and coloured ones to test with (n, 3, 32, 32)."""
    grey = [load_digits(root, digit, train, synthetic).to(device) for train in (True, False)
            for digit in (source, target)]
    return *grey[:2], *(colorize(g, generator=generator) for g in grey[2:])


def synthetic_digits(digit, n, generator):
    """2s or 3s made up for tests without data, (n, 1, 32, 32) in [0,1]: strokes of a pen, of random size, slant, place
    and thickness."""
    t = torch.linspace(0, 1, 30)[:, None]

    def arc(middle, start, end):
        angle = torch.deg2rad(start + (end - start) * t)  # clockwise, y points down
        return torch.cat([angle.cos() / 2, middle + angle.sin() / 2], 1)

    if digit == 3:
        pen = torch.cat([arc(-0.5, -150, 90), arc(0.5, -90, 150)])
    else:
        corner = torch.tensor([[0.45, -0.3], [-0.5, 1.0], [0.6, 1.0]])
        pen = torch.cat([arc(-0.5, -180, 20), corner[0].lerp(corner[1], t), corner[1].lerp(corner[2], t)])
    size, slant, ink, right, down = torch.rand(5, n, 1, generator=generator)
    size = 6 + 3 * size
    at = torch.stack([15 + 2 * right + size * (pen[:, 0] - (slant - 0.3) * pen[:, 1]),
                      15 + 2 * down + size * pen[:, 1]], 2)
    pixels = torch.cartesian_prod(torch.arange(32.0), torch.arange(32.0)).flip(1)
    nearest = torch.stack([torch.cdist(pixels, points).amin(1) for points in at])
    return (1.3 + ink - nearest).clamp(0, 1).view(n, 1, 32, 32)


def read_image(path):
    """One digit in colour on black, any format, size and mode: (1, 3, 32, 32) in [-1,1], made as MNIST was.

    Laid on black where it is transparent; cut to what is lit; 20 pixels on its longer side; its centre of mass in the
    middle.  Brightness is that of the brightest channel, up to 1, painted in the hue of the summed colour; grey becomes
    red."""
    try:
        with Image.open(path) as image:  # reads the header only
            if math.prod(image.size) > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height}, over {MAX_PIXELS} pixels")
            if image.mode[0] in "IF":  # more than 8 bits, which PIL would clip
                grey = np.asarray(image, dtype=np.float32)
                image = Image.fromarray((255 * grey.clip(0) / max(grey.max(), 1e-6)).astype(np.uint8))
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA")).convert("RGB")
        colour = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        light = colour.amax(1, keepdim=True)
        if light.max() < 0.3:
            raise ValueError("nothing in it is lit")
        if torch.cat([light[..., 0], light[..., -1], light[..., 0, :], light[..., -1, :]], 2).mean() > 0.5:
            raise ValueError("its background is not black")
    except Exception as error:  # PIL has one for each way to be broken
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        common.fail(f"{path} is not a digit on black ({reason}): replace it or take it out of the folder")
    lit = (light[0, 0] > 0.2 * light.max()).nonzero()
    (top, left), (bottom, right) = lit.amin(0).tolist(), (lit.amax(0) + 1).tolist()
    scale = 20 / max(bottom - top, right - left)
    size = [max(1, round(scale * side)) for side in (bottom - top, right - left)]
    digit = (light / light.max())[..., top:bottom, left:right]
    digit = F.interpolate(digit, size, mode="bilinear", antialias=True).clamp(0, 1)
    at = [((digit[0, 0].sum(1 - k) @ torch.arange(n).float()) / digit.sum()).round().long().item()
          for k, n in enumerate(size)]
    down, across = (min(max(16 - a, 0), 32 - n) for a, n in zip(at, size))
    grey = F.pad(digit, (across, 32 - size[1] - across, down, 32 - size[0] - down))
    return colorize(grey, hue_of(colour))


def load_folder(folder):
    """-> names of all files in a folder, images (n, 3, 32, 32): see read_image."""
    try:
        names = sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name)))
    except OSError as error:
        common.fail(f"no folder {folder} ({error.strerror}): name one that holds images of digits")
    if not names:
        common.fail(f"the folder {folder} holds no files: put images of digits there, coloured on black")
    return names, torch.cat([read_image(os.path.join(folder, name)) for name in names])


# ------------------------------------------------------------------------------------------------ colours

def rgb_of(hue):
    """Full-saturation colours of hues (n,), in turns: (n, 3) in [0,1]."""
    primaries = torch.arange(3, device=hue.device) / 3  # red, green, blue, in turns; made there: a copy would wait
    away = (hue[:, None] - primaries + 0.5) % 1 - 0.5
    return (2 - 6 * away.abs()).clamp(0, 1)


def colorize(grey, hue=None, generator=None):
    """Digits (n, 1, H, W) in [0,1] in the full-saturation colours hue (n,), in turns (0 red, 1/3 green), drawn
    uniformly unless given: (n, 3, H, W) in [-1,1]."""
    if hue is None:
        device = generator.device if generator else grey.device
        hue = torch.rand(len(grey), generator=generator, device=device).to(grey.device)
    return 2 * grey * rgb_of(hue)[:, :, None, None] - 1


def hue_of(y):
    """Hue of the summed colour of images (n, 3, H, W): (n,) in turns, in [0, 1)."""
    red, green, blue = y.sum((2, 3)).unbind(1)
    return torch.atan2(3 ** 0.5 * (green - blue), 2 * red - green - blue) / (2 * math.pi) % 1


def hue_error(x, y):
    """Angle between the hues of images x and y (n, 3, H, W): (n,) in degrees, 0 to 180."""
    return 360 * ((hue_of(x) - hue_of(y) + 0.5) % 1 - 0.5).abs()


# ------------------------------------------------------------------------------------------------ scores

def off_colour(y):
    """Root mean square of what no single colour explains in images y (n, 3, H, W), brightness from 0 to 1: 0-dim.
    0 for digits from colorize; grain, a veil or two colours in one digit raise it."""
    light, colour = (y.clamp(-1, 1) + 1) / 2, rgb_of(hue_of(y))[:, :, None, None]
    strength = (light * colour).sum(1, keepdim=True) / colour.square().sum(1, keepdim=True)
    return (light - strength * colour).square().sum(1).mean().sqrt()


def brightness(y):
    """Of the brightest channel, in [0,1], of images (n, 3, H, W): (n, H W)."""
    return (y.amax(1).flatten(1) + 1) / 2


def blur(y):
    """Share of half-lit (0.3 to 0.8) among the lit pixels of images (n, 3, H, W)."""
    light = brightness(y)
    return ((light > 0.3) & (light < 0.8)).sum().item() / (light > 0.3).sum().clamp_min(1).item()


def energy_distance(a, b):
    """2 E|a-b| - E|a-a'| - E|b-b'| of independent samples (n, D), (m, D): 0 in the mean where their laws are equal."""
    within = sum(torch.cdist(c, c).sum() / (len(c) * (len(c) - 1)) for c in (a, b))
    return (2 * torch.cdist(a, b).mean() - within).item()


def exact_ot_cost(x, y):
    """Of the best pairing of as many images x with as many y, cost |x-y|^2/2, mean over pairs."""
    n = min(len(x), len(y))
    cost = torch.cdist(x[:n].flatten(1), y[:n].flatten(1)).square().cpu() / 2
    return cost[linear_sum_assignment(cost.numpy())].mean().item()


def digit_scores(x, y, real):
    """Scores of M translations y (N, M, 3, H, W) of digits x (N, 3, H, W) against real targets (n, 3, H, W), held out:

    cost        mean |x-y|^2/2
    hue_err     median hue_error
    spread      deviation over the translations of one x, mean over x and pixels; 0 for M = 1
    shape       energy distance between the brightness of y and of real, over that between x and real: 0 for the same
                law, 1 for y = x.  Unlike a digit classifier it forgives neither blur nor ghosts
    blur        share of half-lit among lit pixels; real_blur: of real
    off_colour  as above, of y
    ot_cost     exact_ot_cost(x, real); where there are few real digits it has few colours to choose from
    cost_ratio  cost / ot_cost"""
    pairs = x.repeat_interleave(y.shape[1], 0), y.flatten(0, 1)
    light = brightness(real)
    shape = sum(energy_distance(brightness(one), light) for one in y.unbind(1))  # the y of one x are not independent
    cost, ot_cost = common.quadratic_cost(*pairs).mean().item(), exact_ot_cost(x, real)
    return {"cost": cost, "hue_err": hue_error(*pairs).median().item(),
            "spread": y.std(1).mean().item() if y.shape[1] > 1 else 0.0,
            "shape": shape / y.shape[1] / energy_distance(brightness(x), light),
            "blur": blur(pairs[1]), "real_blur": blur(real), "off_colour": off_colour(pairs[1]).item(),
            "ot_cost": ot_cost, "cost_ratio": cost / ot_cost}


# ------------------------------------------------------------------------------------------------ files

def save_pairs(path, x, y):
    """Write {"x": (N, ...), "y": (N, M, ...)}; a full disk must not cost the run its last line."""
    problem = common.write_aside(path, lambda file: torch.save({"x": x.cpu(), "y": y.cpu()}, file))
    if problem:
        print(f"warning: {problem}: free some space, then --resume writes it again")


def save_folder(folder, names, x, y):
    """Write translations y (N, M, 3, 32, 32) of the images x of a folder, and a figure, into FOLDER_translated."""
    folder = os.path.normpath(folder) + "_translated"
    common.make_folder(folder)
    for name, images in zip(names, (127.5 * (y + 1)).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()):
        for k, image in enumerate(images, 1):
            path = os.path.join(folder, f"{name}_{k}.png")
            problem = common.write_aside(path, lambda file: Image.fromarray(image).save(file, "png"))
            if problem:
                common.fail(f"{problem}: free some space, then --resume with --translate writes them again")
    images = torch.cat([x[:, None].to(y), y], 1)[:24]
    save_panels(os.path.join(folder, "figure.png"), "", (images.flatten(0, 1), images.shape[1], "x, and translations"))
    print(f"wrote {y.shape[1]} translations of each of {len(names)} images, and a figure, into {folder}")


def tiled(images, columns):
    """Images (n, 3, H, W) in [-1,1] as one picture, grey lines between: (rows, columns, 3) in [0,1], on the CPU."""
    images = F.pad((images.clamp(-1, 1).cpu() + 1) / 2, (1, 1, 1, 1), value=0.3)
    rows = images[:len(images) // columns * columns].split(columns)
    return torch.cat([torch.cat(list(row), 2) for row in rows], 1).permute(1, 2, 0)


def save_panels(path, title, *panels):
    """Write a figure of panels side by side, each (images (n, 3, H, W), columns, its title)."""
    widths = [columns for _, columns, _ in panels]
    fig, axes = plt.subplots(1, len(panels), figsize=(sum(widths), 7.4), layout="constrained", width_ratios=widths,
                             squeeze=False)
    for axis, (images, columns, panel_title) in zip(axes[0], panels):
        axis.imshow(tiled(images, columns).numpy())
        axis.set_title(panel_title)
        axis.axis("off")
    fig.suptitle(title)
    common.save_figure(fig, path)
