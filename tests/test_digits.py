"""digits.py: readers of MNIST and of folders, colours, scores by hand."""
import colorsys
import os
import runpy

import numpy as np
import pytest
import torch
import torchvision.datasets.mnist as mnist
from PIL import Image

import digits
from conftest import HERE, final, here, refuses


def write_mnist(root, images, labels, train, cut=0):
    """As torchvision keeps MNIST: (n, height, width) and (n,) bytes."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    part = "train" if train else "t10k"
    header = b"".join(v.to_bytes(4, "big") for v in (0x803, *images.shape))
    (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes()[:images.size - cut])
    header = (0x801).to_bytes(4, "big") + len(labels).to_bytes(4, "big")
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


def test_a_folder_of_images_of_every_kind(tmp_path, monkeypatch):
    """A digit saved in any size and mode comes back as MNIST has it, in its own hue."""
    grey = digits.synthetic_digits(2, 1, torch.Generator().manual_seed(3))
    rows, columns = (grey[0, 0].amax(1 - k).nonzero().squeeze(1) for k in (0, 1))
    scale = 20 / max(rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1)
    pixels = (255 * (digits.colorize(grey, torch.tensor([0.6])) + 1) / 2).round().byte()[0].permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    clear = Image.merge("RGBA", (*Image.new("RGB", (32, 32), "white").split(), image.getchannel("B")))
    white = Image.fromarray(pixels[:, :, 2])
    kinds = {"a.png": image, "b.bmp": image.resize((256, 256), Image.Resampling.BICUBIC), "c.gif": image.quantize(64),
             "d.jpg": image.resize((96, 96), Image.Resampling.BICUBIC), "e.png": clear, "f.png": white,
             "g.tif": Image.fromarray(pixels[:, :, 2].astype(np.uint16) * 257), "h.png": white.convert("LA"),
             "i.png": Image.fromarray(np.pad(pixels, ((50, 3), (0, 90), (0, 0))))}
    for name, kind in kinds.items():
        kind.save(tmp_path / name)
    names, x = digits.load_folder(tmp_path)
    assert names == list(kinds) and x.shape == (9, 3, 32, 32)
    bright = digits.brightness(x).view(9, 32, 32)
    centre = (bright.sum(1) @ torch.arange(32.0) / bright.sum((1, 2)), bright.sum(2) @ torch.arange(32.0) /
              bright.sum((1, 2)))
    assert all((c - 16).abs().max() < 0.75 for c in centre)
    assert all(19 <= max((b > 0.1).any(k).sum() for k in (0, 1)) <= 21 for b in bright)
    assert (bright.sum((1, 2)) / grey.sum() / scale ** 2 - 1).abs().max() < 0.08
    assert (bright - bright[0]).square().sum((1, 2)).max() < 0.05 * bright[0].square().sum()  # blurred, JPEG
    hue = digits.hue_of(x)
    assert (hue[[0, 1, 2, 3, 8]] - hue[0]).abs().max() < 0.01 and hue[0] == pytest.approx(0.6, abs=0.01)
    assert hue[4:8].abs().max() < 0.01  # grey becomes red
    again = digits.read_image(tmp_path / "a.png")
    Image.fromarray((127.5 * (again[0] + 1)).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "again.png")
    assert (digits.read_image(tmp_path / "again.png") - again).abs().max() < 0.2  # nothing is left to do


def test_the_crop_follows_the_share_of_the_light():
    """In digits.digit_box; a 2 of 300 pixels in a photograph of 1000, in which single pixels are brighter than it."""
    two = digits.synthetic_digits(2, 1, torch.Generator().manual_seed(3))
    photograph = torch.zeros(1000, 1000)
    photograph[200:520, 300:620] = torch.nn.functional.interpolate(two, (320, 320), mode="bilinear")[0, 0] * 0.6
    clean = digits.digit_box(photograph)
    photograph[torch.randint(1000, (40,), generator=torch.Generator().manual_seed(0)),
               torch.randint(1000, (40,), generator=torch.Generator().manual_seed(1))] = 1.0
    (top, bottom), _ = clean
    assert bottom - top > 140 and np.abs(np.subtract(digits.digit_box(photograph), clean)).max() < 5


def test_two_digits_are_refused_side_by_side_and_one_in_pieces_is_not():
    two = digits.synthetic_digits(2, 1, torch.Generator().manual_seed(3))[0, 0]
    top, bottom = digits.digit_box(two)[0]
    apart, touching = torch.cat([two, two], 1), two.repeat(1, 3)
    touching[(top + bottom) // 2] = 1.0
    for both in (apart, touching):
        with pytest.raises(ValueError, match="two digits"):
            digits.digit_box(both)
    broken = two.clone()
    broken[(top + bottom) // 2 - 1:(top + bottom) // 2 + 1] = 0  # above and below
    assert digits.digit_box(broken)[0] == (top, bottom)


def test_bad_folders_are_one_sentence(tmp_path):
    def refused(*words):
        options = "--smoke", "--data", tmp_path / "none", "--out", tmp_path / "out", "--translate", tmp_path / "mine"
        refuses(here("train_cmnist.py", *options, code=2)[0], *words)

    refused("mine", "cannot be read")
    (tmp_path / "mine").mkdir()
    refused("holds no images")
    bad = tmp_path / "mine" / "bad.png"
    bad.write_text("no image")
    refused("bad.png", "not a digit on black")
    for shade, words in ((0, "nothing in it is lit"), (255, "background is not black")):
        Image.new("RGB", (40, 30), (shade,) * 3).save(bad)
        refused("bad.png", words)
    two = digits.colorize(digits.synthetic_digits(2, 2, torch.Generator().manual_seed(3)))
    for k, image in enumerate((torch.cat([two[0], two[1]], 2), two[0])):
        Image.fromarray((127.5 * (image + 1)).byte().permute(1, 2, 0).numpy()).save(bad.with_name(f"{k}.png"))
    Image.new("1", (10000, 6000)).save(bad)
    refused("2 images", "bad.png (10000x6000", "0.png (it shows two digits side by side)")
    bad.unlink()
    bad.with_name("0.png").unlink()
    (tmp_path / "mine_translated").write_text("a file where the translations would go")
    refused("mine_translated")
    assert not (tmp_path / "out" / "cmnist_eps0.1_seed0_smoke.pt").exists()  # said before the training


def test_digit_scores_by_hand():
    torch.manual_seed(0)
    y = torch.full((5, 2, 3, 4, 4), -1.0)
    y[:, :, 1, 0], y[:, 0, 1, 1], y[:, :, 1, 2] = 1.0, 0.0, -0.8  # lit, half lit in one of two, dark
    x = -torch.ones(5, 3, 4, 4)
    x[:, 0, 0] = torch.linspace(0, 1, 5)[:, None]
    scores = digits.digit_scores(x, y, y[:, 0])
    assert scores["blur"] == pytest.approx(1 / 3) and scores["real_blur"] == pytest.approx(1 / 2)
    assert scores["spread"] == pytest.approx(4 / 48 / 2 ** 0.5) and scores["hue_err"] == pytest.approx(120, abs=0.1)
    assert scores["cost"] == pytest.approx((y - x[:, None]).square().sum((2, 3, 4)).mean().item() / 2)
    assert digits.digit_scores(x, x[:, None], x + 1)["shape"] == pytest.approx(1)  # nothing done


def test_reads_real_files_and_refuses_bad_ones(tmp_path, monkeypatch):
    labels = np.arange(30, dtype=np.uint8) % 10
    made = [digits.synthetic_digits(2 + k % 2, 1, torch.Generator().manual_seed(k)) for k in range(30)]
    images = (255 * torch.cat(made)[:, 0, 2:30, 2:30]).byte().numpy()
    for train in (True, False):
        write_mnist(tmp_path, images, labels, train)
    grey = digits.load_digits(str(tmp_path), 3, False)
    assert grey.shape == (3, 1, 32, 32) and grey[:, :, :2].sum() == 0
    assert torch.equal(grey[1, 0, 2:30, 2:30], torch.from_numpy(images[13]) / 255)
    output, values = here("train_cmnist.py", "--smoke", "--data", tmp_path, "--out", tmp_path)
    assert final(output)["steps"] == 12 and len(values["grey_sources"]) == 3
    options = ("train_cmnist.py", "--smoke", "--data", tmp_path, "--out", tmp_path)
    write_mnist(tmp_path, images, labels, True, cut=5000)
    refuses(here(*options, code=2)[0], "no digits", "--data")
    write_mnist(tmp_path, images[:10] * 0, labels[:10], True)
    refuses(here(*options, code=2)[0], "1 images of the digit 2")
    for bad, words in ((images[:, :20], "20 x 28 pixels"), (images[:, ::2, ::2], "14 x 14 pixels"),
                       (np.pad(images, ((0, 0), (2, 2), (2, 2))), "32 x 32 pixels"), (images * 0, "all alike")):
        write_mnist(tmp_path, bad, labels, True)
        refuses(here(*options, code=2)[0], "not MNIST", "digit 2", words, "--data")
    refuses(here("train_not.py", "--data-set", "cmnist", *options[1:], code=2)[0], "not MNIST", "all alike", "--data")

    def offline(*a, **k):
        raise OSError("Name or service not known")

    monkeypatch.setattr(mnist, "download_and_extract_archive", offline)
    for script in ("train_cmnist.py",), ("train_not.py", "--data-set", "cmnist"):
        output, _ = here(*script, "--data", tmp_path / "absent", "--out", tmp_path, code=2)
        refuses(output, "no digits", "network", "--data")
    assert (tmp_path / "absent").exists()  # torchvision makes the folder, which must not pass for data
    assert len(digits.load_digits(str(tmp_path / "absent"), 3, True, synthetic=True)) == 40


def test_colours():
    hue = torch.arange(60) / 60 + 1 / 240
    x = digits.colorize(digits.synthetic_digits(3, 60, torch.Generator().manual_seed(0)), hue)
    solid = digits.colorize(torch.ones(60, 1, 2, 2), hue)[:, :, 0, 0] / 2 + 0.5
    assert torch.allclose(solid, torch.tensor([colorsys.hsv_to_rgb(h, 1, 1) for h in hue.tolist()]), atol=1e-5)
    around = (digits.hue_of(x) - hue + 0.5) % 1 - 0.5
    assert around.abs().max() < 1.2 / 360  # the angle in the colour plane against HSV's hexagon
    assert digits.hue_error(x, x).max() == 0 and digits.off_colour(x) < 0.02
    third = digits.colorize(torch.ones(1, 1, 9, 9), hue[:1] + 1 / 3)
    assert digits.hue_error(x[:1], third).item() == pytest.approx(120, abs=0.1)
    two = -torch.ones(1, 3, 2, 2)
    two[0, 0, 0], two[0, 1, 1] = 1.0, 1.0  # half red, half green: yellow explains half of either
    assert digits.off_colour(two).item() == pytest.approx(0.5 ** 0.5, rel=1e-4)
    judge = os.path.join(HERE, "..", "shared", "tools", "judge_digits.py")
    if os.path.exists(judge):
        judge = runpy.run_path(judge)
        grey = digits.synthetic_digits(2, 60, torch.Generator().manual_seed(0))
        assert torch.allclose(judge["colour"](grey, hue), digits.colorize(grey, hue), atol=1e-5)


def test_synthetic_digits_are_twos_and_threes():
    """A 3 is open to the left below its middle where a 2 has its stroke; a 2 ends in a line to the right."""
    two, three = (digits.synthetic_digits(d, 200, torch.Generator().manual_seed(0)).squeeze(1) for d in (2, 3))
    assert 0.05 < two.mean() < 0.25 and 0.05 < three.mean() < 0.25 and two.amax() == 1
    assert two[:, :2].sum() == 0 and three[:, :2].sum() == 0  # nothing touches the edge above
    def right_minus_left(y):
        rows = y[:, 17:22]
        return (rows[:, :, 16:].sum() - rows[:, :, :16].sum()).item() / len(y)
    assert right_minus_left(three) > 5 and right_minus_left(two) < -2
