"""Images: the lister, reader to golden pixels, network, walk and Tweedie's step in closed form, scores."""
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image

import images
from conftest import refuses

RED, BLACK, WHITE = (255, 0, 0), (0, 0, 0), (255, 255, 255)


def refused(capsys, words, call, *args):
    """The call ends with one sentence that names these words."""
    with pytest.raises(SystemExit) as end:
        call(*args)
    assert end.value.code == 2
    refuses(capsys.readouterr().err, *words)


# ------------------------------------------------------------------------------------------------ the lister

def test_find_lists_images_and_says_what_it_leaves_out(tmp_path, capsys):
    for name in ("b.JPG", "a.png", "c.Webp", "._a.png", ".DS_Store", "t.csv", "u.csv", "no", "__MACOSX/a.png", "e.ps"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.symlink("missing", tmp_path / "d.png")
    os.mkfifo(tmp_path / "e.png")
    os.symlink("a.png", tmp_path / "f.png")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "g.png").touch()
    assert images.find(tmp_path) == ["a.png", "b.JPG", "c.Webp", "f.png"]
    said = capsys.readouterr().out
    assert all(words in said for words in ("2 .csv", "2 hidden", "1 .ps", "1 without an ending",
                                           "2 broken links or pipes", "1 subfolders")), said


def test_find_looks_into_subfolders_where_the_top_has_no_image(tmp_path, capsys):
    for name in ("cat/b.png", "cat/deep/a.png", ".git/c.png", "dog/a.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    assert images.find(tmp_path) == [os.path.join("cat", "b.png"), os.path.join("cat", "deep", "a.png"),
                                     os.path.join("dog", "a.png")]
    assert "1 .txt" in capsys.readouterr().out


def test_folders_without_images_are_one_sentence(tmp_path, capsys):
    refused(capsys, ["missing", "No such file"], images.find, tmp_path / "missing")
    (tmp_path / "a.csv").touch()
    refused(capsys, ["holds no images", "1 .csv"], images.find, tmp_path)


# ------------------------------------------------------------------------------------------------ the reader

def picture(mode="RGB", corner=WHITE, rest=BLACK):
    """40 wide and 20 high, of one colour but for the pixel at the top left."""
    image = Image.new(mode, (40, 20), rest)
    image.putpixel((0, 0), corner)
    return image


def exif(orientation):
    tags = Image.Exif()
    tags[0x112] = orientation
    return tags


def deep(kind, scale):
    return Image.fromarray((np.arange(20 * 40).reshape(20, 40) * scale).astype(kind))


def saved(path, image, **more):
    image.save(path, **more)
    return images.open_image(path)


@pytest.mark.parametrize("turn, size, at", [(1, (40, 20), (0, 0)), (2, (40, 20), (39, 0)), (3, (40, 20), (39, 19)),
                                            (6, (20, 40), (19, 0)), (8, (20, 40), (0, 39))])
def test_images_are_turned_as_their_exif_says(tmp_path, turn, size, at):
    image = saved(tmp_path / "a.png", picture(), exif=exif(turn))
    assert image.size == size and image.getpixel(at) == WHITE and np.asarray(image).sum() == 3 * 255


def test_broken_exif_is_no_broken_image(tmp_path):
    assert saved(tmp_path / "a.jpg", picture(rest=WHITE), exif=b"Exif\0\0garbage").getpixel((9, 9)) == WHITE


@pytest.mark.parametrize("background, shade", [("white", (255, 127, 127)), ("black", (128, 0, 0)),
                                               ((0, 0, 255), (128, 0, 127))])
def test_transparency_is_laid_on_the_background(tmp_path, background, shade):
    for name, image in (("a.png", Image.new("RGBA", (9, 9), (*RED, 128))),
                        ("b.png", Image.new("RGBA", (9, 9), (*RED, 0))), ("c.gif", None)):
        if name == "c.gif":  # a palette whose first colour is transparent
            image = Image.new("P", (9, 9), 0)
            image.putpalette([9, 9, 9] + [255, 0, 0])
            image.putpixel((4, 4), 1)
            image.save(tmp_path / name, transparency=0)
        else:
            image.save(tmp_path / name)
    first, second, third = (images.open_image(tmp_path / name, background) for name in ("a.png", "b.png", "c.gif"))
    assert np.abs(np.subtract(first.getpixel((4, 4)), shade)).max() <= 1
    nothing = {"white": WHITE, "black": BLACK}.get(background, background)
    assert second.getpixel((4, 4)) == third.getpixel((0, 0)) == nothing and third.getpixel((4, 4)) == RED


@pytest.mark.parametrize("name, image, expected", [
    ("a.jpg", picture("CMYK", (0, 255, 255, 0), (0, 255, 255, 0)), RED),
    ("a.png", picture("1", 0, 1), WHITE),
    ("a.PNG", picture("L", 0, 77), (77, 77, 77)),
    ("b.png", picture("LA", (0, 255), (77, 255)), (77, 77, 77)),
    ("a.bmp", picture(corner=BLACK, rest=RED), RED),
    ("b.Tif", picture("RGB", BLACK, RED), RED)])
def test_modes_and_endings(tmp_path, name, image, expected):
    assert np.abs(np.subtract(saved(tmp_path / name, image).getpixel((20, 10)), expected)).max() <= 1


def test_palettes_and_films(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, BLACK)]
    assert saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:]).getpixel((5, 5)) == RED
    assert saved(tmp_path / "a.png", picture("RGB", BLACK, RED).quantize(8)).getpixel((20, 10)) == RED


@pytest.mark.parametrize("name, kind, scale", [("a.png", np.uint16, 65535 / 799), ("b.tif", np.int32, 65535 / 799),
                                               ("c.tif", np.float32, 1 / 799), ("d.tif", np.float32, 255 / 799)])
def test_more_than_8_bits_are_scaled_by_what_the_type_holds(tmp_path, name, kind, scale):
    levels = np.asarray(saved(tmp_path / name, deep(kind, scale)))
    assert np.abs(levels - (np.arange(800) * 255 / 799).reshape(20, 40, 1)).max() <= 0.52
    assert images.open_image(tmp_path / name).mode == "RGB"


def test_a_dark_16_bit_image_stays_dark(tmp_path):
    assert saved(tmp_path / "a.png", deep(np.uint16, 2)).getextrema()[0] == (0, round(799 * 2 / 257))


def test_reader_cuts_the_central_square_and_averages_boxes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    boxes = pixels[:, 8:32].reshape(8, 3, 8, 3, 3).mean((1, 3))
    read = images.read(tmp_path, ["a.png"], 8)
    assert read.shape == (1, 3, 8, 8) and read.dtype == torch.uint8
    assert np.abs(read[0].permute(1, 2, 0).numpy() - boxes).max() < 1  # it rounds twice
    assert images.read(tmp_path, ["a.png"], 64).shape == (1, 3, 64, 64)


def test_broken_files_are_named(tmp_path, capsys, monkeypatch):
    for k in range(4):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{k}.png")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "2.png").write_text("no image")
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(tmp_path / "4.tif")
    refused(capsys, ["3 unusable", "1.png (", "2.png (cannot identify", "4.tif (levels from nan"],
            images.read, tmp_path, images.find(tmp_path), 8)
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    refused(capsys, ["2 unusable", "40x40"], images.read, tmp_path, ["0.png", "3.png"], 8)


# ------------------------------------------------------------------------------------------------ two sets

def fill(folder, n, mode="RGB", first=0):
    folder.mkdir(parents=True)
    for k in range(n):
        shade = 3 * (k + first)
        Image.new(mode, (9, 9), shade if mode == "L" else (shade, 0, 9)).save(folder / f"{k:03d}.png")


def test_pairs_of_folders(tmp_path, capsys, monkeypatch):
    for part, n in (("trainA", 12), ("trainB", 30), ("testA", 2), ("testB", 3)):
        fill(tmp_path / "d" / part, n)
    parts = images.read_pair([tmp_path / "d"], 4)
    assert [len(p) for p in parts] == [12, 30, 2, 3] and parts[0].shape[1:] == (3, 4, 4)
    assert torch.equal(parts[1][:, 0, 0, 0], torch.arange(30) * 3 / 127.5 - 1)
    fill(tmp_path / "A", 30, "L")
    fill(tmp_path / "B", 20, "L", first=40)
    capsys.readouterr()
    x, y, test_x, test_y = images.read_pair([tmp_path / "A", tmp_path / "B"], 4)
    assert [len(p) for p in (x, y, test_x, test_y)] == [27, 18, 3, 2] and x.shape[1:] == (1, 4, 4)  # grey
    assert torch.equal(test_x[:, 0, 0, 0], torch.tensor([0, 30, 60]) / 127.5 - 1)
    said = capsys.readouterr().out
    assert "only 27 images" in said and "only 18 images" in said
    refused(capsys, ["are the same"], images.read_pair, [tmp_path / "A", tmp_path / "A" / ".." / "A"], 4)
    refused(capsys, ["no folders trainA and trainB"], images.read_pair, [tmp_path / "A"], 4)
    monkeypatch.setattr(images, "MEMORY", 12 * 4 ** 2 * 15)  # 15 images
    assert [len(p) for p in images.read_pair([tmp_path / "d"], 4)] == [12, 15, 2, 3]
    assert "one in 2 of 30 images is used" in capsys.readouterr().out
    monkeypatch.undo()
    fill(tmp_path / "C", 9)
    refused(capsys, ["C leaves 8 images"], images.read_pair, [tmp_path / "C", tmp_path / "A"], 4)


def test_translations_keep_their_names(tmp_path, capsys):
    y = torch.linspace(-1.5, 1.5, 4 * 2 * 3 * 4).view(4, 2, 3, 2, 2)
    images.write_folder(str(tmp_path), ["a.jpg", "a.png", "sub/b.webp", "c.tif"], y)
    names = ["a.jpg_1", "a.jpg_2", "a.png_1", "a.png_2", "sub/b_1", "sub/b_2", "c_1", "c_2"]
    for name, image in zip(names, y.flatten(0, 1)):
        levels = (image.clamp(-1, 1) + 1) * 127.5
        assert np.abs(np.asarray(Image.open(tmp_path / f"{name}.png")) - levels.permute(1, 2, 0).numpy()).max() <= 0.51
    images.write_folder(str(tmp_path), ["d.jpg"], y[:1, :1, :1])
    assert Image.open(tmp_path / "d.png").size == (2, 2)
    (tmp_path / "new_translated").touch()
    refused(capsys, ["new_translated", "cannot be made"], images.out_folder, tmp_path / "new")


# ------------------------------------------------------------------------------------------------ network and sampler

def test_pyramid_is_0_at_the_start_and_then_the_sum_of_its_heads():
    net, y = images.Pyramid(8, 3, (4, 6, 8), 5, outputs=2), torch.randn(7, 3, 8, 8)
    assert net(y).shape == (7, 2) and not net(y).any()
    with torch.no_grad():
        weights = [torch.randn_like(head.weight) for head in net.readouts]
        assert [weight.shape for weight in weights] == [(2, 4 * 64), (2, 6 * 16), (2, 8 * 4), (2, 5)]
        total = 0
        for head, weight in zip(net.readouts, weights):  # one by one, then all together
            head.weight.copy_(weight)
            total = total + net(y)
            head.weight.zero_()
        for head, weight in zip(net.readouts, weights):
            head.weight.copy_(weight)
        assert torch.allclose(net(y), total, atol=1e-4)
    y.requires_grad_(True)
    net(y).sum().backward()
    assert y.grad.abs().flatten(1).amin(1).min() > 0  # every pixel is seen


def test_walk_is_exact_for_gaussians_and_stays_in_the_box():
    eps, curvature = 0.5, 3.0  # f = -3 |y|^2/2: pi(.|x) = N(x/4, eps/4); independent noise would make it eta/8 wider
    f = lambda y: -curvature * y.square().flatten(1).sum(1) / 2
    torch.manual_seed(0)
    x = torch.full((4000, 1, 2, 2), 2.0)
    y = images.walk(f, x, x, eps, eta=0.1, steps=60, box=3.0)
    assert y.mean().item() == pytest.approx(0.5, abs=0.01)
    assert y.var().item() == pytest.approx(eps / 4, rel=0.03)
    y = images.walk(f, x, x, eps, eta=50.0, steps=3, box=3.0)  # a step that explodes
    assert y.abs().max() == 3.0


def test_translations_end_with_the_mean_under_the_noise():
    """x given, y0 ~ N(m, v), y = y0 + noise: E[y0|y] = m + v/(v + noise^2) (y - m)."""
    eps, noise, v, m = 0.1, 0.3, 0.05, 0.2
    S = (v + noise ** 2) / eps  # pi(.|x) = N(m, eps S)
    f = lambda y: (y.square() / 2 - (y - m).square() / (2 * S)).flatten(1).sum(1)
    x, y = torch.zeros(5, 1, 3, 3), m + 0.3 * torch.randn(5, 1, 3, 3)
    made = images.translate(f, lambda x: y, x, 1, eps, noise, eta=0.0, steps=0, box=9.0)[:, 0]
    assert torch.allclose(made, m + v / (v + noise ** 2) * (y - m), atol=1e-5)
    torch.manual_seed(0)
    x, V, eta = torch.zeros(4000, 1, 3, 3), v + noise ** 2, v + noise ** 2  # y follows an AR(1): it halves in a step,
    half, first = 0.5, 0.5 * V + eta / 4  # and the noise that two steps share adds to the covariance of neighbours
    made = images.translate(f, torch.zeros_like, x, 1, eps, noise, eta, steps=30, box=9.0, last=4)
    expected = (4 * V + 2 * (3 * first + 2 * first * half + first * half ** 2)) / 16  # of a mean of four
    assert made.mean().item() == pytest.approx(m, abs=0.003)
    assert made.var().item() == pytest.approx((v / V) ** 2 * expected, rel=0.03)


def test_translate_gives_each_source_its_own_translations():
    f = lambda y: -1e3 * y.square().flatten(1).sum(1) / 2  # y = x/1001
    x = torch.arange(5.0).view(5, 1, 1, 1) * 100
    y = images.translate(f, lambda x: x, x, 3, eps=0.1, noise=0.0, eta=1e-4, steps=40, box=1e3, part=4)
    assert y.shape == (5, 3, 1, 1, 1)
    assert (y - (x / 1001)[:, None]).abs().max() < 0.06


# ------------------------------------------------------------------------------------------------ scores

def test_energy_distance_in_closed_form():
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [5.0]])
    assert images.energy_distance(a, b) == pytest.approx(2 * (3 + 5 + 2 + 4) / 4 - 1 - 2)
    torch.manual_seed(0)
    a, b = torch.randn(2, 4000, 1)
    assert abs(images.energy_distance(a, b)) < 2e-3
    expected = 2 * (2 * math.exp(-1 / 4) / math.sqrt(math.pi) + math.erf(0.5)) - 4 / math.sqrt(math.pi)
    assert images.energy_distance(a, b + 1) == pytest.approx(expected, abs=0.03)  # E|N(1, 2)| by its folded normal


def test_exact_ot_cost_is_that_of_the_best_pairing():
    x = torch.randn(6, 3, 2, 2)
    assert images.exact_ot_cost(x, x[torch.randperm(6)] + 1) == pytest.approx(12 / 2, rel=1e-4)  # a shift is optimal


def test_scores_of_what_is_known():
    torch.manual_seed(0)
    real, seen = torch.randn(300, 3, 8, 8), torch.randn(400, 3, 8, 8)
    x = 0.5 * torch.randn(300, 3, 8, 8) + 1
    same = images.translation_scores(x, x[:, None], real, seen)
    assert same["energy"] == pytest.approx(1) and same["detail"] == pytest.approx(1) and same["cost"] == 0
    assert same["spread"] == pytest.approx(0.5, rel=0.02) and same["sharp"] == pytest.approx(0.25, rel=0.05)
    copies = images.translation_scores(x, seen[:300, None], real, seen)
    assert copies["nearest"] < 1e-3 and abs(copies["energy"]) < 0.01 and copies["diversity"] == 0
    fresh = torch.randn(300, 2, 3, 8, 8)
    good = images.translation_scores(x, fresh, real, seen)
    assert abs(good["energy"]) < 0.01 and abs(good["detail"]) < 0.05
    for what in ("nearest", "sharp", "diversity", "spread"):
        assert good[what] == pytest.approx(1, rel=0.02), what
    assert good["cost_ratio"] * images.exact_ot_cost(x, real) == pytest.approx(good["cost"])
    assert good["cost"] == pytest.approx(192 * (1 + 0.25 + 1) / 2, rel=0.02)
    mean = images.translation_scores(x, torch.zeros(300, 1, 3, 8, 8) + 0.1 * fresh[:, :1], real, seen)
    assert mean["spread"] == pytest.approx(0.1, rel=0.02) and mean["energy"] > 0.2


def test_tiles_are_where_they_belong():
    y = torch.arange(4.0).view(4, 1, 1, 1) / 2 - 1
    picture = images.tiled(y.expand(-1, 1, 2, 2), 2)
    assert picture.shape == (8, 8, 3)
    assert [picture[i, j, 0].item() for i in (1, 5) for j in (1, 5)] == [0, 0.25, 0.5, 0.75]
    assert picture[0].unique().tolist() == pytest.approx([0.3])
