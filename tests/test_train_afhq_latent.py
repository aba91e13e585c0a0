"""train_afhq_latent.py: the sampler against quadrature, the chains, the scores; photographs and options to refuse."""
import errno
import io
import math
import os
import shutil
import signal
import struct
import warnings
import zlib

import numpy as np
import ot
import pytest
import torch
from PIL import Image

from conftest import final, here, refuses, signal_at, smoke, whole, written

import stylegan2

@pytest.fixture
def afhq():
    return whole("afhq_cat_eps1_seed0_smoke")[2]


def afhq_layout(folder, save, n=12):
    """AFHQ's layout with n images of train/cat, and save(path) as one of them."""
    for k in range(n):
        path = folder / ("val" if k > 9 else "train") / "cat" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 48), (20 * k, 0, 255)).save(path)
    save(folder / "train" / "cat" / "5x.jpg")


def truncated(path):
    jpeg = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(jpeg, "jpeg")
    path.write_bytes(jpeg.getvalue()[:600])


@pytest.fixture
def any_generator(monkeypatch):
    """Any --generator is a random one."""
    G = stylegan2.random_generator(8, 8, 16, channel_base=32, channel_max=8, num_layers=1, conv_clamp=None)
    monkeypatch.setattr(stylegan2, "load_generator", lambda path: G)


@pytest.fixture
def refused(tmp_path, any_generator):
    """Checks that a run on tmp_path/data ends with one sentence that holds these words, and leaves nothing behind."""
    def check(*words, generator=__file__, source="cat"):
        with warnings.catch_warnings(record=True) as seen:
            output, _ = here("train_afhq_latent.py", "--data", tmp_path / "data", "--generator", generator,
                             "--source", source, "--out", tmp_path / "out", code=2)
        assert not seen and not [f for f in written(tmp_path / "out") if not f.endswith(".lock")], output
        refuses(output, *words)

    return check


def test_bad_data_and_generators(tmp_path, refused):
    refused(str(tmp_path / "nowhere.pkl"), "download", "afhqdog.pkl", "--generator", generator=tmp_path / "nowhere.pkl")
    refused(str(tmp_path / "data"), "AFHQ", "--data")
    (tmp_path / "data").mkdir()
    refused("holds 0 images", "AFHQ")
    afhq_layout(tmp_path / "data", lambda path: path.write_text("not an image"))
    refused("5x.jpg", "not a usable image", "replace or delete")
    truncated(tmp_path / "data" / "train" / "cat" / "5x.jpg")
    refused("5x.jpg", "not a usable image")
    refused("holds 0 images of wild", "train/wild", "--source", source="wild")


@pytest.mark.parametrize("kind", ["uint16.png", "float32.tif", "int32.tif"])
def test_images_of_more_than_8_bits_are_refused(kind, tmp_path, refused):
    """PIL would clip all their pixels to white or to black."""
    deep = Image.fromarray(np.linspace(0, 1 if "float" in kind else 30000, 32 * 32).reshape(32, 32).astype(kind[:-4]))
    afhq_layout(tmp_path / "data", lambda path: deep.save(path.parent / kind))
    refused(kind, "not 8 bits per channel", "replace or delete")


@pytest.mark.parametrize("side", [8000, 10_000, 50_000])  # PIL allows the first, warns of the second, refuses the third
def test_images_of_too_many_pixels_are_refused(side, tmp_path, refused):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">2I5B", side, side, 1, 0, 0, 0, 0))  # 1 bit, grey
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    afhq_layout(tmp_path / "data", lambda path: (path.parent / "bomb.png").write_bytes(bomb))
    refused("bomb.png", " pixels", "replace or delete")


def test_trains_on_files_and_names_every_translation(tmp_path, any_generator, monkeypatch):
    """Sources whose names differ in their folder or ending only; a pipe among them, which must not be waited for."""
    names = "a.png", "a.jpg", "b/a.png", "b_c/d.png", "b/c_d.png", "b/c/d.png", "e" * 200 + ".png"
    for k, path in enumerate(tmp_path / "data" / split / "cat" / name for split in ("train", "val") for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 48), (20 * k, 0, 255)).save(path)
    os.mkfifo(tmp_path / "data" / "train" / "cat" / "pipe.png")
    signal_at(monkeypatch, 1, signal.SIGINT)
    output, values = here("train_afhq_latent.py", "--data", tmp_path / "data", "--generator", __file__,
                          "--device", "cpu", "--out", tmp_path / "out", "--translate", tmp_path / "dogs")
    assert "step      1/2500" in output and len(values["train"]) == len(values["held_out"]) == len(names)
    pictures = sorted(os.listdir(tmp_path / "dogs"))
    assert len(pictures) == len(names) * values["PER_IMAGE"]
    for number, path in enumerate(values["held_out"]):
        stem = os.path.splitext(os.path.basename(path))[0][:50]
        of_this = pictures[number * values["PER_IMAGE"]:(number + 1) * values["PER_IMAGE"]]
        assert all(file[5:].startswith(f"_{stem}_") for file in of_this), (path, of_this)
        z = values["translations"][number * values["PER_IMAGE"]][None]
        shown = np.asarray(Image.open(tmp_path / "dogs" / of_this[0])) / 255.0
        assert np.abs(shown - values["full_images"](z)[0].clamp(0, 1).permute(1, 2, 0).numpy()).max() < 0.51 / 255


def test_a_full_disk_leaves_whole_pictures(tmp_path, monkeypatch):
    name = "afhq_cat_eps1_seed0_smoke"
    folder = tmp_path / "run"
    shutil.copytree(whole(name)[0], folder, ignore=shutil.ignore_patterns("*.lock"))
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}

    def full(image, file, filename):
        file.write(b"half a picture")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(Image.SAVE, "PNG", full)
    output, _ = smoke(name, folder, "--resume", code=2)
    assert f"warning: cannot write {folder}/{name}.png" in output
    refuses(output, "translated", "No space left", "--resume with --translate")
    assert before == {path: path.read_bytes() for path in folder.rglob("*.png")} and not list(folder.rglob("*.tmp"))
    output, _ = smoke(name, tmp_path / "fresh", code=2)
    refuses(output, f"{name}_data", "No space left", "--out")
    assert not [path for path in (tmp_path / "fresh").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_other_data_are_refused(tmp_path):
    name = "afhq_cat_eps1_seed0_smoke"
    smoke(name, tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / f"{name}_data" / "train" / "cat" / "00003.png")
    output, _ = smoke(name, tmp_path, "--resume", code=2)  # not the data it was trained on
    refuses(output, "IMAGES was", "without --resume")


def test_foreign_generator(tmp_path):
    (tmp_path / "bad.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path).encode() + b"/executed'\ntR.")
    output, _ = here("train_afhq_latent.py", "--generator", tmp_path / "bad.pkl", "--data", tmp_path, "--out", tmp_path,
                     code=2)
    refuses(output, "bad.pkl")
    assert not (tmp_path / "executed").exists()


def test_images_of_every_kind(tmp_path, afhq, monkeypatch):
    """Grey, alpha, palette and oblong images: exactly the averages of the central square."""
    decode, args, side, folder = afhq["decode"], afhq["args"], afhq["SIDE"], tmp_path / "any" / "deep"
    folder.mkdir(parents=True)
    blocks = np.random.default_rng(0).integers(0, 256, (side, side, 4), dtype=np.uint8)
    fine = blocks.repeat(3, 0).repeat(3, 1).astype(float)
    fine[::3, ::3] += 3 * (fine[::3, ::3] < 250) - 3 * (fine[::3, ::3] >= 250)  # moves every average by +-1/3
    fine = np.pad(fine.astype(np.uint8), ((0, 0), (9, 9), (0, 0)), constant_values=99)  # oblong: the margins must go
    for mode, expected in (("RGB", blocks[..., :3]), ("RGBA", blocks[..., :3]), ("L", blocks[..., :1].repeat(3, 2))):
        Image.fromarray(fine[..., 0] if mode == "L" else fine[..., :len(mode)]).save(folder / f"{mode}.png")
        got = decode(folder / f"{mode}.png")
        assert got.dtype == np.uint8 and got.shape == (side, side, 3) and (got == expected).all(), mode
    Image.fromarray(fine[..., :3].transpose(1, 0, 2)).save(folder / "upright.png")
    assert (decode(folder / "upright.png") == blocks[..., :3].transpose(1, 0, 2)).all()
    Image.fromarray(fine[..., 0]).convert("P").save(folder / "P.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (decode(folder / "P.png") == decode(folder / "L.png")).all()
    files = afhq["train"] + afhq["held_out"]
    assert len(afhq["pixels"]) == len(files) == 30
    assert all((afhq["pixels"][k].numpy() == decode(file)).all() for k, file in enumerate(files))

    monkeypatch.setattr(args, "data", str(tmp_path / "any"))
    train, held_out = afhq["list_images"]()
    names = [os.path.basename(p) for p in held_out + train]
    assert names == ["L.png", "P.png", "RGB.png", "RGBA.png", "upright.png"]  # every tenth is held out


def test_latent_sampler_on_a_circle(afhq, monkeypatch):
    """G(z) = A z/|z| in two dimensions and a potential of the direction: pi_f(.|x) by quadrature over the angle, |z|^2
    exponential.  Trajectories from a wrong start, and from the exact law, at two temperatures side by side."""
    torch.manual_seed(0)
    g = afhq["normality_stats"].__globals__
    eps, area, n = 0.3, 4.0, 20_000
    A, x = torch.tensor([[0.9, 0.2], [0.0, 0.5]]), torch.tensor([0.4, -0.2])
    unit = lambda z: z / z.norm(dim=1, keepdim=True)
    learned = lambda z: 0.3 * unit(z)[:, 0] * unit(z)[:, 1]
    f = lambda z: learned(z) - eps * z.square().sum(1) / 2
    for k, v in dict(EPS=eps, AREA=area, images=lambda z: unit(z) @ A.T, LEAP=4).items():
        monkeypatch.setitem(g, k, v)
    angle = torch.linspace(0, 2 * math.pi, 4001)[:-1]
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    value = learned(circle) - area * (circle @ A.T - x).square().sum(1) / 2
    temperature = torch.tensor([eps, 1.5]).repeat_interleave(n)
    features = lambda u: torch.stack([u[:, 0], u[:, 1], u[:, 0] * u[:, 1], u[:, 0].square()], 1)
    truth = torch.stack([(value / t).softmax(0) @ features(circle) for t in (eps, 1.5)])
    draw = torch.cat([torch.multinomial((value / t).softmax(0), n, replacement=True) for t in (eps, 1.5)])
    length = torch.randn(2 * n, 2).norm(dim=1, keepdim=True)
    for z, steps in ((torch.tensor([[2.0, 2.0]]).repeat(2 * n, 1), 25), (circle[draw] * length, 3)):
        for _ in range(steps):
            z, accepted = g["trajectory"](f, x.expand(2 * n, -1), z, temperature, 0.5 * temperature.sqrt())
        found = features(unit(z)).unflatten(0, (2, n)).mean(1)
        assert (found - truth).abs().max() < 4.5 * 0.7 / n ** 0.5, (steps, found, truth)
        assert z.square().sum(1).mean() == pytest.approx(2, abs=4.5 * 2 / (2 * n) ** 0.5)
        assert 0.6 < accepted.mean() < 0.999
    z = torch.randn(5, 2)
    assert torch.allclose(g["costs"](x.expand(2, -1), unit(z) @ A.T)[1], g["cost"](x.expand(5, -1), z), atol=1e-5)
    assert torch.allclose(g["cost"](x.expand(5, -1), z), area * (unit(z) @ A.T - x).square().sum(1) / 2, atol=1e-5)


def test_chains_start_cool_and_end(afhq, monkeypatch):
    """Starts are drawn from the pool by exp((net - c)/hot); a chain has the source that its age and lane say, a
    temperature that falls to EPS, and after LIFE trajectories it is among the ended."""
    torch.manual_seed(0)
    f, n, pool = afhq["f"], 20_000, afhq["pool"]
    x = afhq["photographs"](torch.zeros(n, dtype=torch.int64))
    net = f.scale * f.net(pool * (32 / pool.square().sum(1)).sqrt()[:, None])
    p = ((net - afhq["costs"](x[:1], afhq["pool_images"])[0]) / afhq["hot"]).softmax(0).detach()
    found = torch.cat([(afhq["start"](f, part)[:, None] == pool).all(2).float().sum(0)[None] for part in x.split(500)])
    assert ((found.sum(0) / n - p).abs() < 4.5 * (p / n).sqrt() + 1e-4).all() and found.sum() == n

    t, life, cool, new = afhq["temperatures"], afhq["LIFE"], afhq["COOL"], afhq["NEW"]
    assert t[0].item() == pytest.approx(afhq["hot"]) and (t[cool:] == afhq["EPS"]).all() and (t[:cool].diff() < 0).all()
    bank, order = afhq["bank"], afhq["order"]
    lane, age = torch.arange(new)[:, None], torch.arange(life)
    sources = order[(new * (afhq["STEPS"] - age) + lane) % len(order)]
    assert torch.equal(bank.x.flatten(0, 1), afhq["photographs"](sources.flatten()))
    assert bank.ended.abs().sum(1).min() > 0 and not (bank.ended[:, None] == bank.y.flatten(0, 1)).all(2).any()


def test_scores_against_closed_forms(afhq):
    torch.manual_seed(0)
    z = torch.randn(4000, 6)
    exact, off = afhq["normality_stats"](z), afhq["normality_stats"](torch.cat([1.1 * z[:, :5], z[:, 5:] + 0.5], 1))
    assert exact["ks"] < 2.5 / 4000 ** 0.5 and abs(exact["var"] - 1) < 0.03
    assert off["ks"].item() == pytest.approx(math.erf(0.25 / math.sqrt(2)), abs=0.02)  # Phi(1/4) - Phi(-1/4)
    assert off["var"].item() == pytest.approx((5 * 1.21 + 1) / 6, abs=0.03)
    assert off["square"].item() == pytest.approx((5 * 1.21 + 1.25) / 6, abs=0.03)
    c = 3.0  # of the crossed pairs: the plan [[a, 1/2-a], [1/2-a, a]] has a = 1/2 / (1 + e^(-c/eps)), here with eps = 1
    cost, error = afhq["discrete_plan_cost"](torch.tensor([[0.0, c], [c, 0.0]]).double())
    assert cost == pytest.approx(c / (1 + math.exp(c)), rel=1e-3) and error < 1e-5


def test_potential_and_colours(afhq, monkeypatch):
    """The net sees the direction only: along a ray f is -eps r^2/2 plus a constant.  A generator's own image needs no
    correction of its colours."""
    f = afhq["f"]
    z = torch.randn(7, 32)
    assert torch.allclose(f(2 * z) - f(z), -1.5 * z.square().sum(1), atol=1e-3)
    monkeypatch.setitem(afhq["normality_stats"].__globals__, "SIDE", 32)
    identity = torch.cat([torch.eye(3) / 2, torch.full((1, 3), 0.5)])
    assert torch.allclose(afhq["match_colours"](8).cpu(), identity, atol=1e-4)


def test_shapes_show_every_direction_of_the_latent(afhq):
    """The image depends on all of z but its length, and at 16 pixels it is that at 32 averaged, but for the edges."""
    G, z = afhq["Shapes"](), torch.randn(20, 32, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(G(3 * z), G(z), atol=1e-5)
    error = torch.nn.functional.avg_pool2d(G(z), 2) - G(z, resolution=16)
    assert error.square().mean() < 0.01 * G(z).var()
    for one in z:
        jacobian = torch.func.jacfwd(lambda z: G(z[None]).flatten())(one)
        _, values, axes = torch.linalg.svd(jacobian, full_matrices=False)
        assert values[-1] < 1e-5 * values[0] < 0.1 * values[-2], values
        assert abs(axes[-1] @ one).item() == pytest.approx(one.norm().item(), rel=1e-3)
