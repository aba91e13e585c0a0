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

import numpy as np
import ot
import pytest
import torch
from PIL import Image

import common



HERE = os.path.dirname(os.path.abspath(__file__))
KEPT = tempfile.TemporaryDirectory(prefix="smoke_runs_")  # removed as the process ends


def run(script, *options, cwd, code=0, prelude=None, folder=HERE):
    """Run a script as a user does, from the folder cwd; -> its output.  prelude: Python to run first in the process."""
    path = os.path.join(folder, script)
    if prelude:
        prelude = "\n".join([f"import sys, runpy; sys.path.insert(0, {folder!r}); sys.argv = {[path, *options]!r}",
                             prelude, f"runpy.run_path({path!r}, run_name='__main__')"])
    command = [sys.executable, "-c", prelude] if prelude else [sys.executable, path, *options]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=150)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def here(script, *options, code=0):
    """The same in this process, without the seconds that imports take -> its output and globals (None if it failed)."""
    handlers, argv = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}, sys.argv
    ended, values, output = 0, None, io.StringIO()
    try:
        sys.argv = [script, *map(str, options)]
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            values = runpy.run_path(os.path.join(HERE, script), run_name="__main__")
    except SystemExit as end:
        ended = end.code or 0
    finally:
        sys.argv = argv
        torch.set_flush_denormal(False)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert ended == code, output.getvalue()
    return output.getvalue(), values


def signal_at(monkeypatch, step, number):
    """From now on this process gets the signal as it trains that step."""
    train_step, calls = common.train_step, [0]

    def interrupted(*a):
        calls[0] += 1
        if calls[0] == step:
            os.kill(os.getpid(), number)
        return train_step(*a)

    monkeypatch.setattr(common, "train_step", interrupted)


def new_folder(name):
    """For a run that test_exact.py's tests look at too: its fixture is cached, so that both files share one run."""
    folder = pathlib.Path(KEPT.name, name)
    folder.mkdir()
    return folder


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


# ------------------------------------------------------------------------------------------------ the scripts

@pytest.fixture(scope="session")
@functools.cache
def whole():
    """The folder of an uninterrupted smoke run, from another working directory; its output."""
    folder = new_folder("whole")
    return folder, run("train_toy.py", "--smoke", "--device", "cpu", "--out", str(folder), cwd=folder)


def test_toy_smoke_then_resume(whole):
    folder, output = whole
    first = final(output)
    assert all(math.isfinite(v) for v in first.values())
    names = {"toy_eps0.1_smoke.pt", "toy_eps0.1_smoke.png", "toy_reference_eps0.1_smoke.npz"}
    assert set(os.listdir(folder)) == names  # nothing beside them, no .tmp left
    again, _ = here("train_toy.py", "--smoke", "--device", "cpu", "--out", folder, "--resume")  # only scores are left
    again = final(again)
    assert again["cond_w2"] == pytest.approx(first["cond_w2"], rel=1e-3)
    assert again["train_s"] <= first["train_s"] + 0.5


@pytest.mark.parametrize("eps", ["0.001", "5"])
def test_toy_smoke_at_other_eps(tmp_path, eps):
    assert final(here("train_toy.py", "--smoke", "--eps", eps, "--out", tmp_path)[0])["eps"] == float(eps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("script", ["train_toy.py", "train_gauss.py", "train_cmnist.py", "train_not.py",
                                    "train_afhq_latent.py"])
def test_smoke_on_the_gpu(tmp_path, script):
    output, _ = here(script, "--smoke", "--device", "cuda", "--out", tmp_path)
    assert all(math.isfinite(v) for v in final(output).values())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(tmp_path, number, whole, monkeypatch):
    options = ("--smoke", "--device", "cpu", "--out", tmp_path)
    signal_at(monkeypatch, 12, number)
    output, _ = here("train_toy.py", *options)
    assert "step     12/30" in output and "step     13/30" not in output and final(output)["eps"] == 0.1
    here("train_toy.py", *options, "--resume")
    a, b = (torch.load(f"{d}/toy_eps0.1_smoke.pt", weights_only=True) for d in (whole[0], tmp_path))
    assert a["step"] == 30 and {"f", "f_avg", "opt", "bank", "rng", "eta"} < set(a)
    assert same(a, b)


# ------------------------------------------------------------------------------------------------ train_gauss.py

@pytest.fixture(scope="session")
@functools.cache
def gauss():
    """The folder of a whole smoke run, its output and globals."""
    folder = new_folder("gauss")
    return folder, *here("train_gauss.py", "--smoke", "--device", "cpu", "--dim", "3", "--out", folder)


def test_gauss_stopped_and_resumed_equals_uninterrupted_to_the_bit(tmp_path, gauss, monkeypatch):
    folder, output, _ = gauss
    assert final(output)["dim"] == 3 and all(math.isfinite(v) for v in final(output).values())
    assert set(os.listdir(folder)) == {"gauss_dim3_eps1_seed0_smoke.pt", "gauss_dim3_eps1_seed0_smoke.png"}
    options = ("--smoke", "--device", "cpu", "--dim", "3", "--out", tmp_path)
    signal_at(monkeypatch, 12, signal.SIGTERM)
    output, _ = here("train_gauss.py", *options)
    assert "step     12/30" in output and "step     13/30" not in output
    here("train_gauss.py", *options, "--resume")
    a, b = (torch.load(f"{d}/gauss_dim3_eps1_seed0_smoke.pt", weights_only=True) for d in (folder, tmp_path))
    assert a["step"] == 30 and same(a, b)


def test_gauss_table_goes_on_per_cell(tmp_path):
    done = ("final dim 2 eps 1 plan_uvp 0.5 plan_floor 0.1 target_uvp 1 target_floor 1 cond_uvp 1 cond_floor 1 steps 30"
            " train_s 7 total_s 9\n")
    half = done.replace("dim 2", "dim 3")[:40]  # killed while writing
    (tmp_path / "gauss_table_seed0_smoke.txt").write_text(done + half)
    output = run("train_gauss.py", "--smoke", "--table", "--resume", "--out", str(tmp_path), cwd=tmp_path)
    assert "final dim 3 " in output and "final dim 2 " not in output  # 2 is not run again
    assert "0.5000 (0.1000) 7 s" in output
    assert final(output)["cells"] == 2 and (tmp_path / "gauss_table_seed0_smoke.png").exists()
    lines = (tmp_path / "gauss_table_seed0_smoke.txt").read_text()
    assert lines.startswith(done) and lines.count("final") == len(lines.splitlines()) == 3  # half spoiled nothing


# ------------------------------------------------------------------------------------------------ train_cmnist.py

@pytest.fixture(scope="session")
@functools.cache
def cmnist():
    """The folder of a whole smoke run on synthetic digits, its output and globals."""
    folder = new_folder("cmnist")
    options = ("--smoke", "--device", "cpu", "--data", folder / "none", "--out", folder / "whole")
    return folder, *here("train_cmnist.py", *options)


def exact_cost(x, y):
    """Of discrete OT between two sets of images, cost |x-y|^2/2, by POT."""
    return ot.emd2([], [], ot.dist(x.flatten(1).double().numpy(), y.flatten(1).double().numpy())) / 2


def test_cmnist_smoke_stops_and_resumes_to_the_bit(tmp_path, monkeypatch, cmnist):
    folder, output, values = cmnist
    scores, name = final(output), "cmnist_eps0.1_seed0_smoke"
    assert all(math.isfinite(v) for v in scores.values())
    written = {f for f in os.listdir(folder / "whole") if not f.endswith(".lock")}  # held by this process to its end
    assert written == {f"{name}.pt", f"{name}.png", f"{name}_pairs.pt"}
    pairs = torch.load(folder / "whole" / f"{name}_pairs.pt", weights_only=True)
    x, y = pairs["x"], pairs["y"]
    assert x.shape == (6, 3, 32, 32) and y.shape == (6, values["TRANSLATIONS"], 3, 32, 32) and y.abs().max() <= 1
    assert scores["cost"] == pytest.approx((y - x[:, None]).square().sum((2, 3, 4)).mean().item() / 2, rel=1e-3)
    assert scores["spread"] == pytest.approx((y[:, 0] - y[:, 1]).abs().mean().item() / 2 ** 0.5, rel=1e-3)  # of two
    assert scores["ot_cost"] == pytest.approx(exact_cost(x, values["test_real"]), rel=1e-3)

    signal_at(monkeypatch, 5, signal.SIGINT)
    options = ("train_cmnist.py", "--smoke", "--device", "cpu", "--data", folder / "none", "--out", tmp_path)
    output, _ = here(*options)
    assert "step      5/12" in output and "step      6/12" not in output and "final " in output
    monkeypatch.undo()
    here(*options, "--resume")
    whole, halves = (torch.load(f / f"{name}.pt", weights_only=True) for f in (folder / "whole", tmp_path))
    assert whole["step"] == 12 and same(whole, halves)
    assert HERE not in str(whole["constants"])  # a moved folder resumes too


# ------------------------------------------------------------------------------------------------ train_not.py

def stop_at(monkeypatch, step):
    """From now on this process gets SIGINT as it trains that step: two networks are averaged per step."""
    update_ema, calls = common.update_ema, [0]

    def interrupted(*a):
        calls[0] += 1
        if calls[0] == 2 * step:
            os.kill(os.getpid(), signal.SIGINT)
        return update_ema(*a)

    monkeypatch.setattr(common, "update_ema", interrupted)


KINDS = {"not_moons_strong_convex1_seed0_smoke": (),
         "not_roll_weak_convex0_seed0_smoke": ("--cost", "weak", "--convex", "0", "--data-set", "roll"),
         "not_cmnist_strong_convex1_seed0_smoke": ("--data-set", "cmnist"),
         "not_cmnist_weak_convex1_seed0_smoke": ("--data-set", "cmnist", "--cost", "weak")}


@pytest.fixture(scope="session")
@functools.cache
def neural():
    """{name: (options, folder, output, globals) of a whole smoke run}"""
    folder, runs = new_folder("not"), {}
    for name, kind in KINDS.items():
        options = ("train_not.py", "--smoke", "--device", "cpu", "--data", folder / "none", *kind)
        runs[name] = options, folder, *here(*options, "--out", folder)
    return runs


@pytest.mark.parametrize("name", KINDS)
def test_not_smoke_stops_and_resumes_to_the_bit(name, neural, tmp_path, monkeypatch):
    options, folder, output, values = neural[name]
    scores, digits, weak = final(output), "cmnist" in name, "weak" in name
    assert all(math.isfinite(v) for v in scores.values()) and scores["steps"] == 12
    assert {"convex", "jensen", "violated", "params", "train_s"} < set(scores)
    assert ("round_trip" in scores) != weak and ("inv_ratio" in scores) == (not digits and not weak)
    ends = (".pt", ".png", "_pairs.pt")[:3 if digits else 2]
    written = {f for f in os.listdir(folder) if f.startswith(name) and not f.endswith(".lock")}
    assert written == {name + end for end in ends}
    if digits:
        pairs = torch.load(folder / f"{name}_pairs.pt", weights_only=True)
        x, y = pairs["x"], pairs["y"]
        assert x.shape == (6, 3, 32, 32) and y.shape == (6, 4 if weak else 1, 3, 32, 32) and y.abs().max() <= 1
        assert scores["cost"] == pytest.approx((y - x[:, None]).square().sum((2, 3, 4)).mean().item() / 2, rel=1e-3)
        assert scores["spread"] == pytest.approx(y.var(1).sqrt().mean().item() if weak else 0, rel=1e-3)
        exact = exact_cost(x, values["test_real"])
        assert scores["ot_cost"] == pytest.approx(exact, rel=1e-3)
        assert scores["cost_ratio"] == pytest.approx(scores["cost"] / exact, rel=2e-3)

    stop_at(monkeypatch, 5)
    monkeypatch.setattr(common, "save_figure", lambda fig, path: None)  # the seconds go there
    output, _ = here(*options, "--out", tmp_path)
    assert "step      5/12" in output and "step      6/12" not in output and final(output)["steps"] == 5
    monkeypatch.undo()
    monkeypatch.setattr(common, "save_figure", lambda fig, path: None)
    here(*options, "--out", tmp_path, "--resume")
    whole, halves = (torch.load(f / f"{name}.pt", weights_only=True) for f in (folder, tmp_path))
    assert whole["step"] == 12 and same(whole, halves)


# ------------------------------------------------------------------------------------------------ train_afhq_latent.py

@pytest.fixture(scope="session")
@functools.cache
def afhq():
    """The folder of a whole smoke run, its output and globals."""
    folder = new_folder("afhq")
    options = ("--smoke", "--device", "cpu", "--out", folder / "whole", "--translate", folder / "dogs")
    return folder, *here("train_afhq_latent.py", *options)


def test_afhq_smoke_translates_stops_and_resumes_to_the_bit(tmp_path, monkeypatch, afhq):
    folder, output, values = afhq
    scores = final(output)
    assert all(math.isfinite(v) for v in scores.values())
    name = "afhq_cat_eps1_smoke"
    assert set(os.listdir(folder / "whole")) == {f"{name}.pt", f"{name}.png", f"{name}_data"}
    pictures = sorted(os.listdir(folder / "dogs"))
    assert len(pictures) == 6 * values["PER_IMAGE"] and pictures[0] == "val_cat_00024_0.png"
    z, shown = values["z"][:1], np.asarray(Image.open(folder / "dogs" / pictures[0])) / 255.0
    assert np.abs(shown - values["full_images"](z)[0].clamp(0, 1).permute(1, 2, 0).numpy()).max() < 0.51 / 255
    assert scores["cost"] == pytest.approx(values["mean_cost"](values["test_rows"], values["z"]), rel=1e-3)

    signal_at(monkeypatch, 5, signal.SIGINT)
    options = ("train_afhq_latent.py", "--smoke", "--device", "cpu", "--out", tmp_path / "halves")
    output, _ = here(*options)
    assert "step      5/12" in output and "step      6/12" not in output and "final " in output
    assert torch.load(tmp_path / "halves" / "afhq_cat_eps1_smoke.pt", weights_only=True)["step"] == 5
    constants = torch.load(tmp_path / "halves" / "afhq_cat_eps1_smoke.pt", weights_only=True)["constants"]
    assert HERE not in str(constants)  # a moved folder resumes too
    assert "using " in here(*options, "--resume")[0]  # the cache
    a, b = (torch.load(d / f"{name}.pt", weights_only=True) for d in (folder / "whole", tmp_path / "halves"))
    assert a["step"] == 12 and {"f", "f_avg", "opt", "bank", "rng", "eta"} < set(a) and same(a, b)

    data = tmp_path / "halves" / "afhq_cat_eps1_smoke_data"
    Image.new("RGB", (32, 32)).save(data / "train" / "cat" / "00003.png")
    output, _ = here(*options, "--resume", code=2)  # not the data it was trained on
    refuses(output, "IMAGES was", "without --resume")
    assert "does not fit the data" in output


if __name__ == "__main__":
    raise SystemExit(pytest.main(["-q", __file__, *sys.argv[1:]]))
