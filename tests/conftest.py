"""What the tests share: running scripts, reading what they print and write, stepping into their loops."""
import contextlib
import functools
import io
import os
import pathlib
import runpy
import signal
import sys
import tempfile

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if HERE not in sys.path:
    sys.path.insert(0, HERE)

import run as run_room
import stylegan2

KEPT = tempfile.TemporaryDirectory(prefix="smoke_runs_")  # removed as the process ends

# the smoke runs, by the name of their checkpoint: script, options; {out}: the folder of the run, {none}: an absent one
RUNS = {
    "toy_eps0.1_seed0_smoke": ("train_toy.py",),
    "points_smoke_eps0.0897_seed0_smoke": ("train_points.py",),
    "cmnist_eps0.1_seed0_smoke": ("train_cmnist.py", "--data", "{none}"),
    "images_*_seed0_*": ("train_images.py",),  # its name ends with a hash of the images
    "not_moons_strong_convex1_seed0_smoke": ("train_not.py",),
    "not_roll_weak_convex0_seed0_smoke": ("train_not.py", "--cost", "weak", "--convex", "0", "--data-set", "roll"),
    "not_cmnist_strong_convex1_seed0_smoke": ("train_not.py", "--data-set", "cmnist", "--data", "{none}"),
    "not_cmnist_weak_convex1_seed0_smoke": ("train_not.py", "--cost", "weak", "--data-set", "cmnist",
                                            "--data", "{none}"),
    "afhq_cat_eps1_seed0_smoke": ("train_afhq_latent.py", "--translate", "{out}/translated"),
}


# ------------------------------------------------------------------------------------------------ running scripts

NO_COMPILER = """
import types, torch
class Nothing(types.ModuleType):  # whatever is asked of it leaves its argument as it is
    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return self
    def __call__(self, f=None, *_, **__):
        return f
torch._dynamo = sys.modules['torch._dynamo'] = Nothing('torch._dynamo')"""


def command(script, *options, prelude=""):
    """A script's command line for subprocess.  prelude: Python to run first in the process.  It gets no compiler: torch
    would import its own as the first optimiser is made, as long as itself, and no script uses it."""
    head = f"import sys, runpy; sys.path.insert(0, {HERE!r}); sys.argv = {[*map(str, (script, *options))]!r}"
    return [sys.executable, "-c",
            f"{head}\n{NO_COMPILER}\n{prelude}\nrunpy.run_path(sys.argv[0], run_name='__main__')"]


def here(script, *options, code=0, draw=False):
    """Run a script as a user does, but in this process, without the seconds that imports take -> its output and globals
    (None if it failed).  A figure takes as long as a small run: it is an empty file or, if draw, one without layout."""
    handlers, argv = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}, sys.argv
    ended, values, output, threads = 0, None, io.StringIO(), torch.get_num_threads()
    savefig = Figure.savefig

    def save(figure, file, **_):
        figure.set_layout_engine("none")
        savefig(figure, file, dpi=50)

    try:
        Figure.savefig = save if draw else lambda *_, **__: None
        sys.argv = [*map(str, (script, *options))]
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            values = runpy.run_path(os.path.join(HERE, script), run_name="__main__")
    except SystemExit as end:
        ended = end.code or 0
    finally:
        sys.argv, Figure.savefig = argv, savefig
        plt.close("all")
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert ended == code, output.getvalue()
    return output.getvalue(), values


def smoke(name, out, *more, code=0, draw=False):
    """One of RUNS into the folder out, in this process -> its output and globals."""
    script, *options = (option.format(out=out, none=os.path.join(KEPT.name, "none")) for option in RUNS[name])
    return here(script, "--smoke", "--device", "cpu", "--out", out, *options, *more, code=code, draw=draw)


@functools.cache  # one run each for all tests
def whole(name):
    """An uninterrupted run, its figures drawn: its folder, output and globals."""
    folder = pathlib.Path(KEPT.name, name.replace("*", ""))
    return folder, *smoke(name, folder, draw=True)


# ------------------------------------------------------------------------------------------------ what they leave

def checkpoint(folder, name):
    path, = (path for path in pathlib.Path(folder).glob(f"{name}.pt") if not path.stem.endswith(("_pairs", "_real")))
    return torch.load(path, weights_only=True)


def written(folder):
    """Names of the files in a folder, but for the locks, which are held until their process ends."""
    return {name for name in os.listdir(folder) if not name.endswith(".lock")}


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
    return a == b or a != a and b != b  # nan


# ------------------------------------------------------------------------------------------------ inside the loop

def at_step(monkeypatch, step, do):
    """From now on do() is called as a run in this process ends that step."""
    due = run_room.Run.due

    def extended(self):
        if self.step == step:
            do()
        return due(self)

    monkeypatch.setattr(run_room.Run, "due", extended)


def signal_at(monkeypatch, step, number):
    """From now on this process gets the signal as it trains that step."""
    at_step(monkeypatch, step, lambda: os.kill(os.getpid(), number))


class Enough(BaseException):
    """Ends a script in its loop."""


def in_loop(visit, script, *options, **constants):
    """Run a script with these constants changed.  Its loop runs the steps that the generator visit(run, values) yields,
    values being the script's globals; nothing is logged or scored -> what visit returned."""
    returned, constants_of = [], run_room.constants_of

    def steps(run):
        values = sys._getframe(1).f_globals
        returned.append((yield from visit(run, values)))
        raise Enough

    def changed(values):
        assert constants.keys() <= values.keys()
        values.update(constants)
        return constants_of(values)

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as out:
        patch.setattr(run_room.Run, "__iter__", steps)
        patch.setattr(run_room.Run, "due", lambda run: False)
        patch.setattr(run_room, "constants_of", changed)
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


def random_generator(z_dim=512, w_dim=512, resolution=512, channel_base=32768, channel_max=512, num_layers=8,
                     img_channels=3, conv_clamp=256, seed=0):
    """A generator as StyleGAN2 initialises it, on the CPU: for tests, where no file is at hand."""
    generator = torch.Generator().manual_seed(seed)
    widths = [min(channel_base // (4 << i), channel_max) for i in range(resolution.bit_length() - 2)]
    G = stylegan2.Generator(z_dim, w_dim, widths, num_layers, img_channels)
    for name, t in G.state_dict().items():
        if name.endswith(("weight", "const")):
            t.normal_(0, 100 if name.startswith("mapping") else 1, generator=generator)
        else:
            t.fill_(1 if name.endswith("affine.bias") else 0)
    for module in G.modules():
        if hasattr(module, "clamp"):
            module.clamp = conv_clamp
    return G
