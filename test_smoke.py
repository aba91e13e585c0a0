"""The check before a long run: every script's --smoke, stopped half-way, and its --resume.

    python -m pytest -q test_smoke.py        or        python test_smoke.py

No network, no data, under 40 seconds on two CPU cores.  test_exact.py holds every other test."""
import contextlib
import functools
import io
import math
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile

import matplotlib.pyplot as plt
import numpy as np
import ot
import pytest
import torch
from PIL import Image

import common

HERE = os.path.dirname(os.path.abspath(__file__))
KEPT = tempfile.TemporaryDirectory(prefix="smoke_runs_")  # removed as the process ends

# the smoke runs, by the name of their checkpoint: script, options; {out}: the folder of the run, {none}: an absent one
RUNS = {
    "toy_eps0.1_seed0_smoke": ("train_toy.py",),
    "points_mixture_dim2_eps1_seed0_smoke": ("train_points.py",),
    "cmnist_eps0.1_seed0_smoke": ("train_cmnist.py", "--data", "{none}"),
    "not_moons_strong_convex1_seed0_smoke": ("train_not.py",),
    "not_roll_weak_convex0_seed0_smoke": ("train_not.py", "--cost", "weak", "--convex", "0", "--data-set", "roll"),
    "not_cmnist_strong_convex1_seed0_smoke": ("train_not.py", "--data-set", "cmnist", "--data", "{none}"),
    "not_cmnist_weak_convex1_seed0_smoke": ("train_not.py", "--cost", "weak", "--data-set", "cmnist",
                                            "--data", "{none}"),
    "afhq_cat_eps1_seed0_smoke": ("train_afhq_latent.py", "--translate", "{out}/translated"),
}


# ------------------------------------------------------------------------------------------------ helpers

def command(script, *options, prelude="", folder=HERE):
    """A script's command line for subprocess.  prelude: Python to run first in the process."""
    argv = [os.path.join(folder, script), *map(str, options)]
    if not prelude:
        return [sys.executable, *argv]
    head = f"import sys, runpy; sys.path.insert(0, {str(folder)!r}); sys.argv = {argv!r}"
    return [sys.executable, "-c", f"{head}\n{prelude}\nrunpy.run_path(sys.argv[0], run_name='__main__')"]


def run(script, *options, cwd, code=0, folder=HERE):
    """Run a script as a user does, from the folder cwd -> its output."""
    argv = command(script, *options, folder=folder)
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=150)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def here(script, *options, code=0):
    """The same in this process, without the seconds that imports take -> its output and globals (None if it failed)."""
    handlers, argv = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}, sys.argv
    ended, values, output = 0, None, io.StringIO()
    try:
        sys.argv = [*map(str, (script, *options))]
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            values = runpy.run_path(os.path.join(HERE, script), run_name="__main__")
    except SystemExit as end:
        ended = end.code or 0
    finally:
        sys.argv = argv
        plt.close("all")
        torch.set_flush_denormal(False)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert ended == code, output.getvalue()
    return output.getvalue(), values


def smoke(name, out, *more, code=0):
    """One of RUNS into the folder out, in this process -> its output and globals."""
    script, *options = (option.format(out=out, none=os.path.join(KEPT.name, "none")) for option in RUNS[name])
    return here(script, "--smoke", "--device", "cpu", "--out", out, *options, *more, code=code)


@functools.cache  # one run each for this file and test_exact.py
def whole(name):
    """An uninterrupted run: its folder, output and globals."""
    folder = pathlib.Path(KEPT.name, name)
    return folder, *smoke(name, folder)


def checkpoint(folder, name):
    return torch.load(os.path.join(folder, f"{name}.pt"), weights_only=True)


def written(folder):
    """Names of the files in a folder, but for the locks, which are held until this process ends."""
    return {name for name in os.listdir(folder) if not name.endswith(".lock")}


def signal_at(monkeypatch, step, number):
    """From now on this process gets the signal as it trains that step."""
    due = common.Run.due

    def interrupted(self, *a):
        if self.step == step:
            os.kill(os.getpid(), number)
        return due(self, *a)

    monkeypatch.setattr(common.Run, "due", interrupted)


def final(output):
    """The `final` line as {key: number}."""
    words = [line for line in output.splitlines() if line.startswith("final ")][-1].split()[1:]
    return {k: float(v) for k, v in zip(words[::2], words[1::2])}


def refuses(output, *words):
    """One sentence, and it names these words."""
    sentences = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1 and all(w in sentences[0] for w in words), output


def same(a, b):
    """Bit-equality of nested checkpoints, the clock aside."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ------------------------------------------------------------------------------------------------ every script

@pytest.mark.parametrize("name", RUNS)
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(name, tmp_path, monkeypatch):
    folder, output, _ = whole(name)
    uninterrupted = checkpoint(folder, name)
    assert all(math.isfinite(v) for v in final(output).values())
    monkeypatch.setattr(common, "save_figure", lambda fig, path: None)  # the seconds go there
    with monkeypatch.context() as patch:
        signal_at(patch, 5, signal.SIGTERM if name.startswith("points") else signal.SIGINT)
        output, _ = smoke(name, tmp_path)
    assert "step      5/" in output and "step      6/" not in output and "final " in output
    assert checkpoint(tmp_path, name)["step"] == 5
    output, _ = smoke(name, tmp_path, "--resume")
    resumed, last = checkpoint(tmp_path, name), uninterrupted["step"]
    assert "step      5/" not in output and f"step {last:6d}/{last}" in output and same(resumed, uninterrupted)
    assert HERE not in str(resumed["constants"])  # a moved folder resumes too
    with open(os.path.join(HERE, RUNS[name][0]), encoding="utf-8") as file:
        assert resumed["code"] == file.read()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", RUNS)
def test_on_the_gpu(name, tmp_path):
    assert all(math.isfinite(v) for v in final(smoke(name, tmp_path, "--device", "cuda")[0]).values())


def test_from_the_shell_in_another_folder(tmp_path):
    output = run("train_toy.py", "--smoke", "--device", "cpu", "--out", "out", cwd=tmp_path)
    folder, here_output, _ = whole("toy_eps0.1_seed0_smoke")
    assert os.listdir(tmp_path) == ["out"] and not [f for f in os.listdir(tmp_path / "out") if f.endswith(".lock")]
    scores, others = (final(text) for text in (output, here_output))
    assert {k for k in scores if scores[k] != others[k]} <= {"train_s", "total_s"}


# ------------------------------------------------------------------------------------------------ what each one writes

def test_toy(tmp_path):
    name = "toy_eps0.1_seed0_smoke"
    folder, output, _ = whole(name)
    references = {path for path in written(folder) if path.startswith("train_toy_reference_eps0.1_")}
    assert len(references) == 2 and written(folder) == {f"{name}.pt", f"{name}.png"} | references
    again = final(smoke(name, folder, "--resume")[0])  # only scores are left
    assert again["cond_w2"] == pytest.approx(final(output)["cond_w2"], rel=1e-3)
    assert again["train_s"] <= final(output)["train_s"] + 0.5
    for eps in (0.001, 5):
        assert final(smoke(name, tmp_path, "--eps", eps)[0])["eps"] == eps


def pairs_of(folder, name):
    pairs = torch.load(folder / f"{name}_pairs.pt", weights_only=True)
    assert pairs["x"].shape == (6, 3, 32, 32) and pairs["y"].abs().max() <= 1
    return pairs["x"], pairs["y"]


def exact_cost(x, y):
    """Of discrete OT between two sets of images, cost |x-y|^2/2, by POT."""
    return ot.emd2([], [], ot.dist(x.flatten(1).double().numpy(), y.flatten(1).double().numpy())) / 2


def test_cmnist():
    name = "cmnist_eps0.1_seed0_smoke"
    folder, output, values = whole(name)
    assert written(folder) == {f"{name}.pt", f"{name}.png", f"{name}_pairs.pt"}
    scores, (x, y) = final(output), pairs_of(folder, name)
    assert y.shape == (6, values["TRANSLATIONS"], 3, 32, 32)
    assert scores["cost"] == pytest.approx((y - x[:, None]).square().sum((2, 3, 4)).mean().item() / 2, rel=1e-3)
    assert scores["spread"] == pytest.approx((y[:, 0] - y[:, 1]).abs().mean().item() / 2 ** 0.5, rel=1e-3)  # of two
    assert scores["ot_cost"] == pytest.approx(exact_cost(x, values["test_real"]), rel=1e-3)


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("not_")])
def test_not(name):
    folder, output, values = whole(name)
    scores, digits, weak = final(output), "cmnist" in name, "weak" in name
    assert scores["steps"] == 12 and {"convex", "jensen", "violated", "params", "train_s"} < set(scores)
    assert ("round_trip" in scores) != weak and ("inv_ratio" in scores) == (not digits and not weak)
    assert written(folder) == {name + end for end in (".pt", ".png", "_pairs.pt")[:3 if digits else 2]}
    if digits:
        x, y = pairs_of(folder, name)
        assert y.shape == (6, 4 if weak else 1, 3, 32, 32)
        assert scores["cost"] == pytest.approx((y - x[:, None]).square().sum((2, 3, 4)).mean().item() / 2, rel=1e-3)
        assert scores["spread"] == pytest.approx(y.var(1).sqrt().mean().item() if weak else 0, rel=1e-3)
        exact = exact_cost(x, values["test_real"])
        assert scores["ot_cost"] == pytest.approx(exact, rel=1e-3)
        assert scores["cost_ratio"] == pytest.approx(scores["cost"] / exact, rel=2e-3)


def test_afhq():
    name = "afhq_cat_eps1_seed0_smoke"
    folder, output, values = whole(name)
    assert written(folder) == {f"{name}.pt", f"{name}.png", f"{name}_data", "translated"}
    pictures = sorted(os.listdir(folder / "translated"))
    assert len(pictures) == 6 * values["PER_IMAGE"] and pictures[0] == "00000_00024_0.png"
    z, shown = values["translations"][:1], np.asarray(Image.open(folder / "translated" / pictures[0])) / 255.0
    assert np.abs(shown - values["full_images"](z)[0].clamp(0, 1).permute(1, 2, 0).numpy()).max() < 0.51 / 255
    x, y = values["photographs"](values["test_rows"]), values["images"](values["translations"])
    assert final(output)["cost"] == pytest.approx(values["AREA"] * (x - y).square().sum(1).mean().item() / 2, rel=1e-3)
    exact = ot.emd2([], [], values["matrix"].numpy())
    assert final(output)["assigned_cost"] == pytest.approx(exact, rel=1e-3) and "discrete_cost" in final(output)
    with Image.open(folder / f"{name}.png") as picture:
        assert picture.size == (6 * 256, 6 * 256)  # six sources, each with five translations


if __name__ == "__main__":
    raise SystemExit(pytest.main(["-q", __file__, *sys.argv[1:]]))
