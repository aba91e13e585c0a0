"""The check before a long run: every script's --smoke, stopped half-way, and its --resume; a step without the device.

    python -m pytest -q test_smoke.py        or        python test_smoke.py
    python test_smoke.py --gpu               how well three scripts use the GPU (without one: the CPU), in minutes

No network, no data, under 40 seconds on two CPU cores.  tests/ holds all other tests, a file for each room."""
import gc
import math
import os
import signal
import sys
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests"))
from conftest import HERE, KEPT, RUNS, NoUploads, checkpoint, final, in_loop, same, signal_at, smoke, to_meta, whole

import digits
import run as run_room


# ------------------------------------------------------------------------------------------------ every script

@pytest.mark.parametrize("name", RUNS)
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(name, tmp_path, monkeypatch):
    folder, output, _ = whole(name)
    uninterrupted = checkpoint(folder, name)
    assert all(math.isfinite(v) for v in final(output).values())
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
    monkeypatch.setattr(run_room, "share", lambda n, step=None: n // 3 if step is None else step // 3)
    no_scores = {"LOG_EVERY": 10 ** 9} if script == "train_points.py" else {}  # at logged steps, where they may wait
    stepped = in_loop(visit, script, "--smoke", "--device", "cpu", *options, **no_scores)
    assert stepped and all(p.is_meta and p.grad.is_meta for p in stepped)


# ------------------------------------------------------------------------------------------------ how fast

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


def clock(device):
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def first_gradients(run, values):
    """visit of in_loop: one step -> its gradients (P,) and its chains (N,), on the CPU."""
    yield 1
    grads = [p.grad for p in run.parts["opt"].param_groups[0]["params"]]
    return [torch.cat([t.detach().flatten().double().cpu() for t in part]) for part in (grads, [run.parts["bank"].y])]


def measured(warm, steps):
    """-> visit of in_loop: {figure: number} of a step, after `warm` of them."""
    def visit(run, values):
        device, numbers = run.args.device, iter(range(1, 10 ** 6))
        for _ in range(warm):
            yield next(numbers)
        start = clock(device)
        for _ in range(steps):
            yield next(numbers)
        seconds = (clock(device) - start) / steps
        with Counter() as counter:
            yield next(numbers)
        kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
        with torch.profiler.profile(activities=kinds) as profile:
            yield next(numbers)
            clock(device)
        calls = {event.key: event.count for event in profile.key_averages()}
        a, start = torch.randn(1024, 1024, device=device), clock(device)
        for _ in range(10):
            a @ a
        rate = 10 * 2 * 1024 ** 3 / (clock(device) - start)  # of a float32 matrix product, FLOP/s
        return {"ms": 1e3 * seconds, "GFLOP": counter.flops / 1e9, "peak_MiB": run_room.peak_mib(device),
                "percent": 100 * counter.flops / seconds / rate, "operations": counter.operations,
                "launches": sum(n for key, n in calls.items() if "LaunchKernel" in key),
                "waits": sum(n for key, n in calls.items() if "StreamSync" in key or "EventSync" in key)}
    return visit


GPU_CHECK = {  # script, options, constants that only shorten what comes before the loop
    "toy": (("train_toy.py",), dict(REFERENCE_N=50)),
    "digits": (("train_cmnist.py",), {}),
    "latents": (("train_afhq_latent.py", "--check"), dict(HIDDEN=256, HELD_OUT=20)),
}


def gpu_check(device, warm, steps, *more):
    """Print a table of what a step of each script costs -> {name: its figures}.  "differs": the largest difference of
    one step's gradients and chains from those on the CPU, of the same random numbers, over the largest of them."""
    table = {}

    def in_script(visit, name, device):
        (script, *options), constants = GPU_CHECK[name]
        if device == "cuda":
            gc.collect()  # of the script before, which the peak must not count
            torch.cuda.reset_peak_memory_stats()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(digits, "load_digits", lambda root, digit, train, *_: digits.synthetic_digits(
                digit, 256 if train else 6, torch.Generator().manual_seed(2 * digit + train)))
            return in_loop(visit, script, *options, "--device", device, *more, **constants)

    for name in GPU_CHECK:
        table[name] = in_script(measured(warm, steps), name, device)
        with SameDraws():
            ours, cpu = (in_script(first_gradients, name, d) for d in (device, "cpu"))
        table[name]["differs"] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, cpu))
        head, row = " | ".join(table[name]), " | ".join(f"{value:.4g}" for value in table[name].values())
        print(*[f"| a step of | {head} |", "|---" * (1 + len(table[name])) + "|"] * (len(table) == 1),
              f"| {name} | {row} |", sep="\n", flush=True)
    return table


def test_gpu_check(capsys, monkeypatch):
    monkeypatch.delitem(GPU_CHECK, "latents")  # its seconds are spent in data
    table = gpu_check("cpu", 0, 2, "--smoke")
    assert all(row["differs"] == 0 for row in table.values()) and len(capsys.readouterr().out.splitlines()) == 2 + 2
    forward = 2 * (2 * 32 + 2 * 32 * 32 + 32)  # of one y; a gradient in y costs as much again, one in the weights too
    mixtures = 2 * 128 * 128 * 3 + 2 * 32 * 128 * 3 + 2 * 32 * 128 * 2  # 32 chains, 64 + 64 proposals
    mala, jump, learn = 2 * 32 * 2 * forward, 128 * forward + mixtures, 96 * 3 * forward - 96 * 2 * 2 * 32
    assert table["toy"]["GFLOP"] == (mala + jump + learn) / 1e9


if __name__ == "__main__":
    if "--gpu" in sys.argv:
        card = "cuda" if torch.cuda.is_available() else "cpu"
        print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if card == 'cuda' else 'no GPU'}")
        raise SystemExit(gpu_check(card, 20, 100) and None)
    raise SystemExit(pytest.main(["-q", __file__, *sys.argv[1:]]))
