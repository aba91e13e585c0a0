"""train_afhq_latent.py: the sampler against quadrature, chains, scores; files, folders and options to refuse."""
import errno
import itertools
import math
import os
import shutil
import signal
import sys

import numpy as np
import ot
import pytest
import torch
from PIL import Image

from conftest import final, here, random_generator, refuses, signal_at, smoke, whole, written
from test_run import ends, processes

import images
import run as run_room
import stylegan2

NAME = "afhq_cat_eps1_seed0_smoke"


@pytest.fixture
def afhq():
    return whole(NAME)[2]


@pytest.fixture
def any_generator(monkeypatch):
    """Any --generator is this one."""
    G = random_generator(8, 8, 16, channel_base=32, channel_max=8, num_layers=1, conv_clamp=None)
    monkeypatch.setattr(stylegan2, "load_generator", lambda path, label=None: G)
    return G


def pictures(folder, *names):
    """PNG images of so many shades, 40 x 48."""
    for k, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 48), (20 * k, 0, 255)).save(path)
    return folder


def like_afhq(folder):
    return pictures(folder, *(f"train/{kind}/{k}.png" for kind in ("cat", "wild") for k in range(3)), "val/cat/9.png")


def earlier_run(tmp_path):
    return shutil.copytree(whole(NAME)[0], tmp_path / "run", ignore=shutil.ignore_patterns("*.lock"))


def refused(out, *options, words):
    """The run ends with one sentence that holds these words, and leaves nothing behind."""
    output, _ = here("train_afhq_latent.py", "--out", out, *options, code=2)
    refuses(output, *words)
    assert not os.path.isdir(out) or not [path for path in out.rglob("*") if path.is_file() and path.suffix != ".lock"]


# ------------------------------------------------------------------------------------------------ options

def test_every_combination_of_options(tmp_path, any_generator, monkeypatch):
    """One that has no meaning is refused; any other gets as far as to its images."""
    monkeypatch.setattr(images, "find", lambda folder: sys.exit(0))
    monkeypatch.setattr(run_room, "in_turn", lambda: sys.exit(0))  # around the making of images
    own = {"--data": like_afhq(tmp_path / "data"), "--generator": "own.pkl", "--source": "wild", "--class": 1}
    options = ["--smoke", "--check", *own]
    for n in range(len(options) + 1):
        for given in itertools.combinations(options, n):
            line = [word for option in given for word in (option, own.get(option)) if word is not None]
            makes, has = {"--smoke", "--check"} & set(given), set(own) & set(given)
            if len(makes) + bool(has) > 1:
                refused(tmp_path / "out", *line, words=["--check and --smoke", "--data", "--class"])
            elif not makes and "--data" not in given:
                refused(tmp_path / "out", *line, words=["no folder", "afhq", "--data"])
            else:
                here("train_afhq_latent.py", "--out", tmp_path / "out", *line)


@pytest.mark.parametrize("option", ["--data", "--generator", "--source", "--translate", "--class"])
def test_empty_values(option, tmp_path):
    refused(tmp_path / "out", option, "", words=[option])


def test_the_level_of_the_folder(tmp_path, any_generator, monkeypatch):
    """All animals are never taken for one: too high, too low, and one folder of images, which has no --source."""
    monkeypatch.setattr(images, "read", lambda *a: sys.exit(0))
    data = like_afhq(tmp_path / "up" / "afhq")
    for folder, source, words in (
            (data, "", ()), (data, "wild", ()), (data / "train" / "cat", "", ()),
            (data.parent, "", ("3 folders", "--data", "above train")), (data / "train", "", ("2 folders", "--data")),
            (data.parent, "cat", ("no train/cat", "--source")), (data / "train" / "cat", "cat", ("no train/cat",)),
            (data, "dog", ("no folder dog", "cat or wild", "--source")), (data, "../cat", ("no folder ../cat",)),
            (data / "train" / "cat" / "1.png", "", ("no folder", "--data")), (tmp_path / "none", "", ("no folder",))):
        options = ["--data", folder, *["--source", source][:2 * bool(source)]]
        if words:
            refused(tmp_path / "out", *options, words=words)
        else:
            here("train_afhq_latent.py", "--out", tmp_path / "out", *options)


def test_names_tell_inputs_apart(tmp_path, any_generator, monkeypatch):
    monkeypatch.setattr(images, "read", lambda *a: sys.exit(os.path.basename(sys._getframe(1).f_globals["name"])))
    data = like_afhq(tmp_path / "data")
    for options, name in ((("--data", data), "afhq_cat"), (("--data", data, "--source", "wild"), "afhq_wild"),
                          (("--data", data / "train" / "wild"), "afhq_wild"),
                          (("--data", data, "--generator", "x/ffhq.pkl"), "afhq_cat_to_ffhq"),
                          (("--data", data, "--class", 3), "afhq_cat_to_afhqdog_class3")):
        here("train_afhq_latent.py", "--out", tmp_path / "out", *options, code=f"{name}_eps1_seed0")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_what_keeps_translations_from_being_written_shows_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "find", None)  # not even the images are looked for
    (tmp_path / "file").write_text("")
    deep = os.path.join(tmp_path, *["y" * 200] * 19)
    for folder, words in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "in", "Not a directory"),
                          (tmp_path / ("x" * 300), "too long"), (f"{deep}/{'z' * (4000 - len(deep))}", "too long"),
                          ("/proc/self", "cannot write /proc/self/ (")):
        refused(tmp_path / "out", "--smoke", "--translate", folder, words=[str(folder), words])


# ------------------------------------------------------------------------------------------------ files

def test_bad_generators(tmp_path, any_generator, monkeypatch):
    data = ["--data", like_afhq(tmp_path / "data")]
    any_generator.img_channels = 1
    refused(tmp_path / "out", *data, words=["1 channels", "colour images", "--generator"])
    monkeypatch.undo()
    bad = tmp_path / "bad.pkl"
    refused(tmp_path / "out", *data, "--generator", bad, words=[str(bad), "download afhqdog.pkl", "--generator"])
    bad.write_bytes(b"cos\nsystem\n(X" + len(f"touch {bad}x").to_bytes(4, "little") + f"touch {bad}x".encode() + b"tR.")
    refused(tmp_path / "out", *data, "--generator", bad, words=[str(bad), "'os system'", "nothing in it was run"])
    assert not os.path.exists(f"{bad}x")


def test_bad_images(tmp_path, any_generator):
    data = pictures(tmp_path / "data", "1.png")
    refused(tmp_path / "out", "--data", data, words=["0 images to train with", str(data)])
    pictures(data, *(f"{k}.png" for k in range(5)))
    (data / "5x.jpg").write_text("not an image")
    refused(tmp_path / "out", "--data", data, words=["5x.jpg", str(data)])


def test_other_images_or_another_generator_do_not_carry_a_run_on(tmp_path, monkeypatch):
    folder = earlier_run(tmp_path)
    with monkeypatch.context() as patch:
        start = torch.Tensor.normal_
        patch.setattr(torch.Tensor, "normal_", lambda t, *a, **more: start(t, *a, **more).mul_(2))
        refuses(smoke(NAME, folder, "--resume", code=2)[0], "GENERATOR was", "without --resume")
    Image.new("RGB", (32, 32)).save(folder / f"{NAME}_data" / "train" / "cat" / "00003.png")
    refuses(smoke(NAME, folder, "--resume", code=2)[0], "IMAGES was", "without --resume")


def test_what_a_run_writes():
    folder, output, values = whole(NAME)
    assert written(folder) == {f"{NAME}.pt", f"{NAME}.png", f"{NAME}_data", "translated"}
    found = sorted(os.listdir(folder / "translated"))
    assert len(found) == 6 * values["PER_IMAGE"] and found[0] == "00000_00024_1.png"
    x, y = values["photographs"](values["test_rows"]), values["render"](values["translations"])
    assert final(output)["cost"] == pytest.approx(values["AREA"] * (x - y).square().sum(1).mean().item() / 2, rel=1e-3)
    exact = ot.emd2([], [], values["matrix"].numpy())
    assert final(output)["assigned_cost"] == pytest.approx(exact, rel=1e-3) and "discrete_cost" in final(output)
    with Image.open(folder / f"{NAME}.png") as picture:
        assert picture.size == (6 * 258, 6 * 258)  # six sources, each with five translations, and lines


def test_two_processes_carry_on_what_one_has_done(tmp_path):
    """A finished run: what each process is must not count among the constants that a checkpoint is compared with."""
    shutil.copytree(whole(NAME)[0], tmp_path / "out")
    codes, outputs, errors = ends(processes("train_afhq_latent.py", 2, "--smoke", "--device", "cpu", "--resume", "--out",
                                            tmp_path / "out"))
    assert codes == [0, 0] and "final eps 1 " in outputs[0] and "final" not in outputs[1], errors


def test_trains_on_files_and_names_every_translation(tmp_path, any_generator, monkeypatch):
    """Sources whose names differ in their ending or case only, or are long."""
    names = "a.png", "a.jpg", "A.png", "b c.png", "e" * 200 + ".png"
    pictures(tmp_path / "data", *(f"{split}/cat/{name}" for split in ("train", "val") for name in names))
    signal_at(monkeypatch, 1, signal.SIGINT)
    constants_of = run_room.constants_of
    smaller = dict(POOL=64, LIFE=4, COOL=2)
    monkeypatch.setattr(run_room, "constants_of", lambda values: values.update(smaller) or constants_of(values))
    output, values = here("train_afhq_latent.py", "--data", tmp_path / "data", "--generator", "afhqdog.pkl",
                          "--device", "cpu", "--out", tmp_path / "out", "--translate", tmp_path / "dogs")
    (folder, held_out), copies = values["held_out"], values["PER_IMAGE"]
    assert "step      1/2500" in output and len(values["train"][1]) == len(held_out) == len(names)
    expected = {f"{k:05d}_{name[:-4][:50]}_{copy}.png" for k, name in enumerate(held_out) for copy in (1, 2, 3, 4)}
    assert set(os.listdir(tmp_path / "dogs")) == expected
    for number, name in enumerate(held_out):
        path = tmp_path / "dogs" / f"{number:05d}_{name[:-4][:50]}_1.png"
        shown = values["full_images"](values["translations"][number * copies][None])[0].clamp(0, 1).permute(1, 2, 0)
        assert np.abs(np.asarray(Image.open(path)) / 255.0 - shown.numpy()).max() < 0.51 / 255


def test_a_full_disk_leaves_whole_pictures(tmp_path, monkeypatch):
    folder = earlier_run(tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}

    def full(image, file, filename):
        file.write(b"half a picture")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(Image.SAVE, "PNG", full)
    output, _ = smoke(NAME, folder, "--resume", code=2)
    assert f"warning: cannot write {folder}/{NAME}.png" in output
    refuses(output, "translated", "No space left", "--resume with --translate")
    assert before == {path: path.read_bytes() for path in folder.rglob("*.png")} and not list(folder.rglob("*.tmp"))
    output, _ = smoke(NAME, tmp_path / "fresh", code=2)
    refuses(output, f"{NAME}_data", "No space left", "--out")
    assert not [path for path in (tmp_path / "fresh").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_images_to_train_with_and_held_out(afhq):
    """As the shared reader gives them, the ones to train with first."""
    rows = [images.read(*part, afhq["SIDE"]) for part in (afhq["train"], afhq["held_out"])]
    assert torch.equal(afhq["pixels"], torch.cat(rows)) and list(map(len, rows)) == [24, 6]
    x = afhq["photographs"](torch.tensor([25]))
    assert torch.allclose(x, rows[1][1].flatten()[None] / 255 - afhq["pool_mean"])


# ------------------------------------------------------------------------------------------------ mathematics

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
    for k, v in dict(EPS=eps, AREA=area, render=lambda z: unit(z) @ A.T, LEAP=4).items():
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
