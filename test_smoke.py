"""The check before a long run: every script's --smoke, stopped half-way, and its --resume.

    python -m pytest -q test_smoke.py        or        python test_smoke.py
    python test_smoke.py --gpu               how well four scripts use the GPU (without one: the CPU), in minutes

No network, no data, under 40 seconds on two CPU cores.  test_exact.py holds every other test."""
import contextlib
import functools
import gc
import io
import math
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import types

import matplotlib.pyplot as plt
import numpy as np
import ot
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import common
import digits

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


# ------------------------------------------------------------------------------------------------ inside the loop

class Enough(BaseException):
    """Ends a script in its loop."""


def in_loop(visit, script, *options, **constants):
    """Run a script with these constants changed.  Its loop runs the steps that the generator visit(run, values) yields,
    values being the script's globals; nothing is logged or scored -> what visit returned."""
    returned, constants_of = [], common.constants_of

    def steps(run):
        values = sys._getframe(1).f_globals
        returned.append((yield from visit(run, values)))
        raise Enough

    def changed(values):
        assert constants.keys() <= values.keys()
        values.update(constants)
        return constants_of(values)

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as out:
        patch.setattr(common.Run, "steps", steps)
        patch.setattr(common.Run, "due", lambda run: False)
        patch.setattr(common, "constants_of", changed)
        with pytest.raises(Enough):
            here(script, "--out", out, *options)
    return returned[0]


def to_meta(values):
    """Move all networks, tensors and optimisers among a script's globals to torch's meta device.  It holds no numbers:
    an operation with a tensor left on the CPU raises there, and so does anything that waits for a number."""
    moved = {}
    for value in values.values():
        if isinstance(value, torch.nn.Module):
            before = list(value.parameters())
            moved |= zip(map(id, before), value.to("meta").parameters())
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            values[name] = value.to("meta")
        if isinstance(value, torch.optim.Optimizer):
            for group in value.param_groups:
                group |= {"params": [moved[id(p)] for p in group["params"]], "fused": False}
    values["device"] = torch.device("meta")


class NoUploads(torch.overrides.TorchFunctionMode):
    """Refuses what comes to a device from the host: on a GPU each such copy waits."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), getattr(function, "__name__", "")
        if name in ("tensor", "as_tensor", "to", "copy_") and out.device.type != "cpu":
            source = args[-1] if name == "copy_" else args[0]
            assert isinstance(source, torch.Tensor) and source.device == out.device, f"copied in a step: {source}"
        return out


@pytest.mark.parametrize("name", RUNS)
def test_a_step_never_leaves_the_device_nor_waits_for_it(name, monkeypatch):
    def visit(run, values):
        to_meta(values)
        with NoUploads():
            yield 1  # the share of the digits' restarts is none in this step,
            yield 3  # and one in this
        return [p for opt in run.parts.values() if isinstance(opt, torch.optim.Optimizer)
                for group in opt.param_groups for p in group["params"]]

    script, *options = (option.format(out=KEPT.name, none=os.path.join(KEPT.name, "none")) for option in RUNS[name])
    monkeypatch.setattr(common, "ranks", lambda: (1, 3))  # and takes a share of its batch as well as the whole
    monkeypatch.setattr(common, "average_gradients", lambda f: None)
    monkeypatch.setattr(common, "in_turn", contextlib.nullcontext)
    no_scores = {"LOG_EVERY": 10 ** 9} if script == "train_points.py" else {}  # at logged steps, where they may wait
    stepped = in_loop(visit, script, "--smoke", "--device", "cpu", *options, **no_scores)
    assert stepped and all(p.is_meta and p.grad.is_meta for p in stepped)


class SameDraws(torch.overrides.TorchFunctionMode):
    """Random numbers come from the CPU's generator, whatever the device."""

    def __torch_function__(self, draw, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(draw, "__name__", "")
        if name in ("rand", "randn", "randint", "randperm"):
            return draw(*args, **{**kwargs, "device": "cpu"}).to(kwargs.get("device") or "cpu")
        if name in ("rand_like", "randn_like"):
            return draw(args[0].detach().cpu(), **kwargs).to(args[0].device)
        if args and name in ("normal_", "uniform_", "exponential_") and not kwargs.get("generator"):
            return args[0].copy_(draw(torch.empty_like(args[0], device="cpu"), *args[1:], **kwargs))
        if name == "multinomial":
            return draw(args[0].cpu(), *args[1:], **kwargs).to(args[0].device)
        return draw(*args, **kwargs)


class Counter(TorchDispatchMode):
    """Counts operations that compute, about a kernel each on a GPU, and the FLOPs of matrix products and convolutions.
    (FlopCounterMode's hooks do not bear autograd.grad.)"""
    operations = flops = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out, count = operation(*args, **(kwargs or {})), flop_registry.get(operation._overloadpacket)
        self.operations += not operation.is_view
        self.flops += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


def first_gradients(run, values):
    """visit of in_loop: one step -> its gradients (P,) and its chains (N,), on the CPU."""
    yield 1
    grads = [p.grad for p in run.parts["opt"].param_groups[0]["params"]]
    return [torch.cat([t.detach().flatten().double().cpu() for t in part]) for part in (grads, [run.parts["bank"].y])]


def measured(warm, steps):
    """-> visit of in_loop: {figure: number} of a step, after `warm` of them."""
    def visit(run, values):
        device, numbers = run.device, iter(range(1, 10 ** 6))
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        for _ in range(warm):
            yield next(numbers)
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            yield next(numbers)
        wait()
        seconds = (time.perf_counter() - start) / steps
        with Counter() as counter:
            yield next(numbers)
        kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
        with torch.profiler.profile(activities=kinds) as profile:
            yield next(numbers)
            wait()
        calls = {event.key: event.count for event in profile.key_averages()}
        return {"ms": 1e3 * seconds, "GFLOP": counter.flops / 1e9, "peak_MiB": common.peak_mib(device),
                "percent": 100 * counter.flops / seconds / common.matmul_rate(device),
                "operations": counter.operations,
                "launches": sum(n for key, n in calls.items() if "LaunchKernel" in key or "GraphLaunch" in key),
                "waits": sum(n for key, n in calls.items() if "StreamSync" in key or "EventSync" in key)}
    return visit


def replayed(warm, steps):
    """visit of in_loop: seconds of a step that a CUDA graph replays, the learning rate as it was when captured."""
    def visit(run, values):
        for opt in run.parts.values():
            for group in opt.param_groups if isinstance(opt, torch.optim.Optimizer) else ():
                group["capturable"] = True
        numbers, side = iter(range(1, 10 ** 6)), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm):
                yield next(numbers)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            yield next(numbers)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            graph.replay()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps
    return visit


GPU_CHECK = {  # script, options, constants that only shorten what comes before the loop
    "toy": (("train_toy.py",), dict(REFERENCE_N=50)),
    "points": (("train_points.py", "--pair", "rolls", "--dim", "8", "--eps", "0.1"), dict(COMPONENTS=(1,), NET_FROM=1)),
    "digits": (("train_cmnist.py",), {}),
    "latents": (("train_afhq_latent.py", "--check"), dict(HIDDEN=256, HELD_OUT=20)),
}


def gpu_check(device, warm, steps, *more, names=tuple(GPU_CHECK)):
    """Print a table of what a step of each script costs -> {name: its figures}.  "differs": the largest difference of
    one step's gradients and chains from those on the CPU, of the same random numbers, over the largest of them."""
    table = {}

    def in_script(visit, name, device):
        (script, *options), constants = GPU_CHECK[name]
        gc.collect()  # of the script before, which the peak must not count
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(digits, "load_digits", lambda root, digit, train, *_: digits.synthetic_digits(
                digit, 256 if train else 6, torch.Generator().manual_seed(2 * digit + train)))
            return in_loop(visit, script, *options, "--device", device, *more, **constants)

    for name in names:
        table[name] = in_script(measured(warm, steps), name, device)
        with SameDraws():
            ours, cpu = (in_script(first_gradients, name, d) for d in (device, "cpu"))
        table[name]["differs"] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, cpu))
        head, row = " | ".join(table[name]), " | ".join(f"{value:.4g}" for value in table[name].values())
        print(*[f"| a step of | {head} |", "|---" * (1 + len(table[name])) + "|"] * (len(table) == 1),
              f"| {name} | {row} |", sep="\n", flush=True)
    for name in names if device == "cuda" else ():  # last: a capture that fails may leave the card's state broken
        try:
            ms = 1e3 * in_script(replayed(warm, steps), name, device)
            print(f"{name} as a CUDA graph: {ms:.3g} ms, {table[name]['ms'] / ms:.1f} times as fast", flush=True)
        except (Exception, pytest.fail.Exception) as error:
            print(f"{name} as a CUDA graph: no ({str(error).strip().splitlines()[:1]})", flush=True)
    return table


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
    controls = {f"{name}_control_base.pt", f"{name}_control_nearest.pt"}
    assert written(folder) == {f"{name}.pt", f"{name}.png", f"{name}_pairs.pt"} | controls
    scores, (x, y) = final(output), pairs_of(folder, name)
    assert y.shape == (6, values["TRANSLATIONS"], 3, 32, 32)
    painted = torch.load(folder / f"{name}_control_nearest.pt", weights_only=True)["y"]  # a 3 of the training set
    light = painted.amax((1, 2)).flatten(1) / 2 + 0.5
    assert torch.cdist(light, values["grey_targets"].flatten(1)).amin(1).max() < 0.02
    assert "control base cost" in output and "control nearest cost" in output
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


def test_the_counter_takes_views_for_free():
    with Counter() as counter:
        (torch.ones(3, 4) @ torch.ones(4, 5)).T.exp_()
    assert (counter.operations, counter.flops) == (4, 2 * 3 * 4 * 5)  # two ones, a product, an exponential


def test_gpu_check(capsys):
    table = gpu_check("cpu", 0, 2, "--smoke")
    assert all(row["differs"] == 0 for row in table.values()) and len(capsys.readouterr().out.splitlines()) == 6
    forward = 2 * (2 * 32 + 2 * 32 * 32 + 32)  # of one y; a gradient in y costs as much again, one in the weights too
    mixtures = 2 * 128 * 128 * 3 + 2 * 32 * 128 * 3 + 2 * 32 * 128 * 2  # 32 chains, 64 + 64 proposals
    mala, jump, learn = 2 * 32 * 2 * forward, 128 * forward + mixtures, 96 * 3 * forward - 96 * 2 * 2 * 32
    assert table["toy"]["GFLOP"] == (mala + jump + learn) / 1e9


def test_the_graph_holds_one_whole_step(monkeypatch):
    """With stand-ins for a card's graph and streams: warm steps, one captured, and the rest replayed."""
    run_of = {"captured": [], "replayed": 0}

    class Graph:
        def replay(self):
            run_of["replayed"] += 1

    @contextlib.contextmanager
    def capture(graph):
        before = seen["opt"].state_dict()["state"][0]["step"].item()
        yield
        run_of["captured"].append(seen["opt"].state_dict()["state"][0]["step"].item() - before)

    seen, stream = {}, types.SimpleNamespace(wait_stream=lambda other: None)
    for name, value in dict(Stream=lambda: stream, current_stream=lambda: stream, CUDAGraph=Graph, graph=capture,
                            stream=lambda s: contextlib.nullcontext(), synchronize=lambda: None).items():
        monkeypatch.setattr(torch.cuda, name, value)

    def visit(run, values):
        seen.update(run.parts)
        return (yield from replayed(3, 7)(run, values))

    assert in_loop(visit, "train_toy.py", "--smoke", "--device", "cpu") >= 0
    assert seen["opt"].param_groups[0]["capturable"] and run_of == {"captured": [1.0], "replayed": 7}


if __name__ == "__main__":
    if "--gpu" in sys.argv:
        card = "cuda" if torch.cuda.is_available() else "cpu"
        print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if card == 'cuda' else 'no GPU'}")
        raise SystemExit(gpu_check(card, 20, 100) and None)
    raise SystemExit(pytest.main(["-q", __file__, *sys.argv[1:]]))
