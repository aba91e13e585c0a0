"""What surrounds a loop keeps its promises: stops, kills, full disks, damaged files, several processes."""
import contextlib
import io
import math
import os
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import at_step, checkpoint, command, final, here, refuses, same, written

import common
import run as room

SHORT = """
import torch
import common
from run import Run, arguments

args = arguments("doc", __file__, default_eps=0.1)
torch.set_num_threads(1)
f, f_avg = common.MLP(2, 8, 1), common.MLP(2, 8, 1)
opt = torch.optim.Adam(f.parameters(), fused=True)
bank = common.Bank(torch.randn(64, 2), torch.randn(64, 2), eta=torch.tensor(0.01))
parts = {"f": f, "f_avg": f_avg, "opt": opt, "bank": bank}
run = Run(args, f"{args.out}/short_seed{args.seed}.pt", parts, 30, 10, {"EPS": args.eps, "SEED": args.seed})
for step in run:
    rows = bank.rows(64)
    bank.y[rows], _, accepted = common.langevin(f, bank.x[rows], bank.y[rows], 0.1, bank.eta, 1)
    bank.eta *= torch.exp(0.03 * (accepted.mean() - 0.75))
    gap = common.train_step(f, opt, torch.randn(64, 2), bank.y[rows])
    common.update_ema(f_avg, f, step, decay=0.9)
    if run.due():
        run.log({"gap": 1e3}, gap=gap, accept=accepted.mean())
print(f"final steps {run.step}")
"""

CONSOLES = "head has ended", "full disk", "closed"


@pytest.fixture
def short(tmp_path):
    """short(*options, code=0) -> output of a script of milliseconds around Run; it writes short_seed0.pt."""
    script = tmp_path / "script" / "train_short.py"
    script.parent.mkdir()
    script.write_text(SHORT)

    def call(*options, code=0):
        return here(str(script), "--device", "cpu", "--out", tmp_path, *options, code=code)[0]

    call.script, call.path = script, tmp_path / "short_seed0.pt"
    return call


@pytest.fixture
def impatient(monkeypatch):
    """Every step is saved, as if 30 seconds had passed."""
    due = room.Run.due

    def late(self):
        self.saved = -math.inf
        return due(self)

    monkeypatch.setattr(room.Run, "due", late)


def leave(code):
    raise SystemExit(code)


def steps_kept(folder):
    """{file name: step} of all checkpoints."""
    names = [name for name in os.listdir(folder) if name.endswith((".pt", ".pt.old"))]
    return {name: torch.load(folder / name, weights_only=True)["step"] for name in names}


# ------------------------------------------------------------------------------------------------ the command line

@pytest.mark.parametrize("bad", [["--eps", "0"], ["--eps", "nan"], ["--eps", "inf"], ["--eps", "x"], ["--eps", "1e300"],
                                 ["--device", "hpu"], ["--device", "meta"], ["--device", "cuda:99"], ["--device", ""],
                                 ["--out", ""], ["--out", os.path.join(__file__, "x")], ["--out", __file__],
                                 ["--out=--"], ["--seed", "-1"], ["--seed", "1.5"], ["--seed", str(2 ** 63)],
                                 ["--sede", "1"], ["--data", ""]])
def test_bad_command_lines(bad, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_toy.py", *bad])
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, getattr(sys, stream))  # to be put back: the script wraps them
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        room.arguments("doc", __file__, default_eps=0.1, data=dict(default="x"))
    signal.signal(signal.SIGINT, handler)
    assert end.value.code == 2
    name = bad[0].split("=")[0]
    sensible = {"--eps": "1e-06 to 1e+06", "--seed": "from 0 to 9.2"}.get(name, "")
    named = {"--sede": "unrecognized", "--out": "folder" if bad[1:] and bad[1] else "--out"}.get(name, name)
    refuses(capsys.readouterr().err, named, sensible)


def test_a_console_of_ascii_and_paths_beyond_it(tmp_path, monkeypatch):
    """In a folder whose name is no valid UTF-8, with a letter that ASCII lacks."""
    folder = os.fsdecode(os.fsencode(str(tmp_path)) + "/größe".encode() + b"\xff")
    console = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stderr", console)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # both are wrapped
    monkeypatch.setattr(sys, "argv", ["train_toy.py", "--out", folder, "--resume"])
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        room.Run(room.arguments("doc", __file__), f"{folder}/absent.pt", {}, 1, 1, {})
    signal.signal(signal.SIGINT, handler)
    assert end.value.code == 2
    refuses(console.buffer.getvalue().decode("ascii"), "no checkpoint", "gr\\xf6\\xdfe\\udcff/absent.pt")


# ------------------------------------------------------------------------------------------------ runs that are stopped

def test_killed_in_the_middle_of_a_save_loses_nothing(tmp_path, monkeypatch, short, impatient):
    def kill_in_write(n):
        """From now on this process ends in the middle of the n-th write of a checkpoint; the first one is a try."""
        save, calls = torch.save, [0]

        def half(state, file):
            calls[0] += 1
            return save(state, file) if calls[0] < n else (file.write(b"half a checkpoint"), leave(9))

        patch.setattr(torch, "save", half)

    with monkeypatch.context() as patch:
        kill_in_write(6)
        short(code=9)
    assert steps_kept(tmp_path) == {"short_seed0.pt": 4} and (tmp_path / "short_seed0.pt.tmp").exists()
    assert final(short("--resume"))["steps"] == 30
    with monkeypatch.context() as patch:
        kill_in_write(2)  # a fresh start, before it has anything of its own
        short(code=9)
    assert steps_kept(tmp_path) == {"short_seed0.pt": 30}
    assert final(short())["steps"] == 30
    assert steps_kept(tmp_path) == {"short_seed0.pt": 30, "short_seed0.pt.old": 30}
    assert not (tmp_path / "short_seed0.pt.tmp").exists()


def test_killed_at_any_step_and_resumed_is_the_uninterrupted_run_to_the_bit(tmp_path, monkeypatch, short, impatient):
    short()
    uninterrupted = checkpoint(tmp_path, "short_seed0")
    for step in (2, 3, 11, 30):
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda: leave(9))
            short(code=9)
        assert short("--resume").count("final") == 1
        assert same(checkpoint(tmp_path, "short_seed0"), uninterrupted)


def test_fresh_starts_killed_at_once_do_not_replace_a_finished_run(tmp_path, monkeypatch, short):
    short()
    finished = short.path.read_bytes()
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: leave(9))
        for _ in range(2):
            short(code=9)
    assert short.path.read_bytes() == finished and steps_kept(tmp_path) == {"short_seed0.pt": 30}
    assert final(short("--resume"))["steps"] == 30 and short.path.read_bytes() == finished  # nothing is written again
    assert short().count("kept the earlier checkpoint") == 1
    assert (tmp_path / "short_seed0.pt.old").read_bytes() == finished


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(tmp_path, monkeypatch, short, number):
    at_step(monkeypatch, 5, lambda: [os.kill(os.getpid(), number) for _ in range(2)])
    short(code=128 + number)
    assert steps_kept(tmp_path) == {}


def test_a_request_to_stop_is_never_unasked(monkeypatch, tmp_path, short):
    """It may arrive while the processes agree on what was asked before."""
    agreed, calls = room.agreed, [0]

    def slow(*numbers):
        calls[0] += 1
        before = agreed(*numbers)
        if calls[0] == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return before

    monkeypatch.setattr(room, "agreed", slow)
    short()
    assert steps_kept(tmp_path) == {"short_seed0.pt": 8}


@pytest.fixture(scope="module", autouse=True)
def consoles(tmp_path_factory):
    """{what becomes of its console: a process of the short script, the folder that it writes to}, all at once and
    beside the first tests, since imports take seconds."""
    wait_at_12 = """
import signal, run
due = run.Run.due
def interrupted(self):
    if self.step == 12:
        sys.stdin.read()
        signal.raise_signal(signal.SIGINT)
    return due(self)
run.Run.due = interrupted"""
    started = {}
    for console in CONSOLES:
        folder = tmp_path_factory.mktemp("console")
        (folder / "train_short.py").write_text(SHORT)
        with open("/dev/full", "w") as full:
            process = subprocess.Popen(
                command(folder / "train_short.py", "--out", folder / "out", prelude=wait_at_12), stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if console == "head has ended" else full, text=True, stderr=subprocess.PIPE,
                preexec_fn=lambda: console == "closed" and os.close(1))
        started[console] = process, folder / "out"
    yield started
    for process, _ in started.values():
        process.kill()


@pytest.mark.parametrize("console", CONSOLES)
def test_a_console_that_takes_no_more_costs_only_its_lines(console, consoles):
    """`| head -1` closes the pipe, as the Ctrl-C does that a `| tee log` does not outlive; then comes that Ctrl-C."""
    process, out = consoles[console]
    if process.stdout:
        assert process.stdout.readline().startswith("step ")
        process.stdout.close()
    process.stdin.close()
    errors = process.stderr.read()
    if console == "full disk":
        assert errors.count("\n") == 1 and "lines are lost (No space left on device)" in errors
        errors = ""
    assert process.wait(60) == 0 and not errors, errors
    assert steps_kept(out) == {"short_seed0.pt": 12}


@pytest.mark.parametrize("ending", ["by the log", "by a signal"])
def test_divergence_is_said_and_the_good_checkpoint_kept(tmp_path, monkeypatch, ending, short, impatient):
    train_step, calls = common.train_step, [0]

    def poisoned(f, *a):
        calls[0] += 1
        if calls[0] == 11:
            next(f.parameters()).data.fill_(float("nan"))
            if ending == "by a signal":
                os.kill(os.getpid(), signal.SIGINT)
        return train_step(f, *a)

    monkeypatch.setattr(common, "train_step", poisoned)
    refuses(short(code=2), "diverged", "last good checkpoint")
    kept = checkpoint(tmp_path, "short_seed0")
    assert kept["step"] == 10 and all(v.isfinite().all() for v in kept["f"].values())


def test_a_run_with_a_fallback_goes_on_after_divergence_and_saves_nothing(tmp_path, short, monkeypatch):
    short.script.write_text(SHORT.replace("args.seed})", "args.seed}, fallback='the mixture is used')")
                            .replace("gap=gap,", "gap=gap if step < 20 else 1e9,"))
    output = short()
    assert "diverged: gap is 1e+09 at step 20: the mixture is used" in output and "final steps 20" in output
    assert steps_kept(tmp_path) == {}
    short.script.write_text(short.script.read_text().replace("1e9", "1.0"))
    agreed = room.agreed  # of another process
    monkeypatch.setattr(room, "agreed", lambda *numbers: [1] if numbers == (False,) else agreed(*numbers))
    assert "diverged: another process at step 10: the mixture is used" in short()


# ------------------------------------------------------------------------------------------------ files in the way

def test_a_second_run_into_the_same_files_is_refused_while_the_first_lives(tmp_path, short):
    ready, locked = os.pipe()
    first = os.fork()  # a process without the seconds that imports take
    if not first:
        held = room.lock(short.path)
        os.write(locked, b"!" * bool(held))
        signal.pause()
    try:
        assert os.read(ready, 1) == b"!"
        for options in ((), ("--resume",)):
            refuses(short(*options, code=2), "another run", str(short.path))
        assert final(short("--seed", "1"))["steps"] == 30  # other files
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    short()  # the lock died with its owner
    assert steps_kept(tmp_path) == {"short_seed0.pt": 30, "short_seed1.pt": 30}


@contextlib.contextmanager
def disk_of(n):
    """No file can grow beyond n bytes."""
    handler, (soft, hard) = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, short):
    with disk_of(1000):
        refuses(short(code=2), "cannot write", "free some space", "--out")
    assert written(tmp_path) == {"script"}
    short()
    before = short.path.read_bytes()
    with disk_of(1000):
        refuses(short(code=2), "cannot write", "File too large", "untouched")
    assert short.path.read_bytes() == before and written(tmp_path) == {"script", "short_seed0.pt"}


def test_a_disk_full_at_the_figure_costs_the_figure_only(tmp_path, short):
    short()
    short.script.write_text(SHORT + """
import matplotlib.pyplot as plt
from run import save_figure
plt.imshow(torch.rand(300, 300))
save_figure(plt.gcf(), f"{args.out}/short.png")
""")
    with disk_of(os.path.getsize(short.path) + 1000):
        output = here(str(short.script), "--device", "cpu", "--out", tmp_path, draw=True)[0]
    assert "warning: cannot write" in output and "--resume draws it again" in output and "final " in output
    assert written(tmp_path) == {"script", "short_seed0.pt", "short_seed0.pt.old"}


@pytest.mark.parametrize("what", ["a folder", "a folder as .tmp", "a link as .tmp", "a link as .lock", "a long name"])
def test_what_is_in_the_way_is_one_sentence_and_left_alone(what, tmp_path, short):
    other = tmp_path / "other"
    other.write_text("precious")
    harmless = what.startswith("a link")
    if what == "a long name":
        short.script.write_text(SHORT.replace("short_seed", "n" * 260))
    elif what == "a folder":
        short.path.mkdir()
    elif what == "a folder as .tmp":
        (tmp_path / "short_seed0.pt.tmp").mkdir()
    else:
        (tmp_path / f"short_seed0.pt{what.split()[-1]}").symlink_to(other)
    output = short(code=0 if harmless else 2)
    if not harmless:
        refuses(output, "cannot write", "--out")
        assert "free some space" not in output
    assert other.read_text() == "precious"


def test_the_checkpoint_holds_the_code_that_ran(monkeypatch, short):
    at_step(monkeypatch, 5, lambda: short.script.write_text("raise RuntimeError('another script')"))
    assert final(short())["steps"] == 30
    assert torch.load(short.path, weights_only=True)["code"] == SHORT


# ------------------------------------------------------------------------------------------------ damaged checkpoints

def put(*keys_and_value):
    *keys, last, value = keys_and_value

    def edit(state):
        for key in keys:
            state = state[key]
        state[last] = value

    return edit


DAMAGES = {  # what is done to the dict in a good checkpoint
    "shape of f": put("f", "last.weight", torch.zeros(1, 9)), "no optimiser": lambda state: state.pop("opt"),
    "bank that is none": put("bank", [torch.zeros(8)]), "rng of floats": put("rng", [torch.zeros(5056)]),
    "constants text": put("constants", "EPS"), "other constants": put("constants", "EPS", 0.2)}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused_and_left_alone(damage, short):
    short()
    state = torch.load(short.path, weights_only=True)
    DAMAGES[damage](state)
    torch.save(state, short.path)
    content = short.path.read_bytes()
    refuses(short("--resume", code=2), str(short.path), "start without --resume",
            "EPS was 0.2, is 0.1" if damage == "other constants" else "")
    assert short.path.read_bytes() == content


def test_files_that_are_no_checkpoint_are_refused_and_never_run(tmp_path, short):
    refuses(short("--resume", code=2), "no checkpoint", "without --resume")
    short()
    good = short.path.read_bytes()
    foreign = b"cos\nsystem\n(S'touch " + str(tmp_path).encode() + b"/executed'\ntR."
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("archive/data.pkl", foreign)
        file.writestr("archive/version", "3")
    for content in (b"", b"not a checkpoint", foreign, zipped.getvalue(), good[:3000], good[:-1]):
        short.path.write_bytes(content)
        refuses(short("--resume", code=2), str(short.path), "start without --resume")
        assert short.path.read_bytes() == content
    assert not (tmp_path / "executed").exists()


def test_one_flipped_bit_is_refused_or_without_any_effect(tmp_path, short, monkeypatch, capsys):
    """Refused where a checksum guards the byte; elsewhere, as in the dates of a zip, what is read must be the same."""
    script_globals = here(str(short.script), "--device", "cpu", "--out", tmp_path)[1]
    good, one_run, generator = short.path.read_bytes(), script_globals["run"], random.Random(0)
    guarded = set()
    with zipfile.ZipFile(io.BytesIO(good)) as file:
        for member in file.infolist():
            lengths = struct.unpack("<HH", good[member.header_offset + 26:member.header_offset + 30])
            first = member.header_offset + 30 + sum(lengths)  # of the name, of padding
            guarded |= set(range(first, first + member.compress_size))
    rest = sorted(set(range(len(good))) - guarded)
    flips = [(k, generator.randrange(8)) for k in generator.sample(sorted(guarded), 40) + generator.sample(rest, 40)]
    flips += [(entry.start() + 38, 4) for entry in re.finditer(b"PK\x01\x02", good)]  # calls it a folder
    expected = torch.load(io.BytesIO(good), weights_only=True)
    for k, bit in flips:
        content = bytearray(good)
        content[k] ^= 1 << bit
        short.path.write_bytes(content)
        try:
            one_run.load()
            assert k not in guarded
            state = {name: part.state_dict() for name, part in one_run.parts.items()}
            assert all(same(state[name], expected[name]) for name in state) and one_run.step == 30
        except SystemExit:
            refuses(capsys.readouterr().err, "cannot be carried on")


# ------------------------------------------------------------------------------------------------ several processes

SAME_STEP = """
import os
import sys
import torch
import common
from run import RANK, WORLD, distributed, share_out

torch.set_num_threads(1)
if WORLD > 1:
    distributed.init_process_group("gloo")
torch.manual_seed(0)
f, bank = common.MLP(2, 8, 2), common.Bank(torch.randn(16, 2), torch.randn(16, 2))
opt = torch.optim.Adam(f.parameters(), lr=0.01)
share_out({"f": f, "bank": bank, "opt": opt}, 0, 0)
torch.manual_seed(0)
for step in range(3):
    y_pos, noise, uniform = torch.randn(32, 2), torch.randn(16, 2), torch.rand(16)
    rows = bank.rows(16)  # as many as there are: all of this process's chains, in their order
    torch.randn_like, torch.rand_like = lambda y: noise[rows], lambda log_p: uniform[rows]
    y, _, _ = common.langevin(f, bank.x[rows], bank.y[rows], 0.5, 0.2, 1)
    bank.y[rows] = y
    common.train_step(f, opt, y_pos.chunk(WORLD)[RANK], y)
    torch.manual_seed(step)  # bank.rows drew fewer numbers where there are two
others = [bank.y.clone() for _ in range(WORLD)]
for rank, y in enumerate(others if WORLD > 1 else ()):
    distributed.broadcast(y, rank)
y = torch.cat([y[bank.slice_of(rank)] for rank, y in enumerate(others)])
torch.save([*f.parameters(), y], f"{sys.argv[1]}{RANK}.pt")
if RANK:
    os.kill(os.getpid(), 9)
if WORLD > 1:
    common.train_step(f, opt, y_pos, y)
"""


def processes(script, n, *options):
    """Start n processes of a script as torchrun does, without its seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [subprocess.Popen(command(script, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(n)]


def ends(started):
    """-> exit codes, stdouts and stderrs of processes, which must end by themselves."""
    outputs = [process.communicate(timeout=90) for process in started]
    return [process.returncode for process in started], *zip(*outputs)


def test_two_processes_with_half_the_batch_take_the_step_of_one_and_end_together(tmp_path, monkeypatch):
    script = tmp_path / "same_step.py"
    script.write_text(SAME_STEP)
    started = processes(script, 2, tmp_path / "two")
    for name in ("randn_like", "rand_like"):
        monkeypatch.setattr(torch, name, getattr(torch, name))  # the script puts its own there
    here(str(script), tmp_path / "one")
    codes, _, errors = ends(started)
    assert codes == [2, -signal.SIGKILL], errors
    refuses(errors[0], "another process", "--resume")
    one, *two = (torch.load(tmp_path / name, weights_only=True) for name in ("one0.pt", "two0.pt", "two1.pt"))
    assert same(*two)  # to the bit, of both processes
    assert max((a - b).abs().max() for a, b in zip(one, two[0])) < 1e-6


def test_the_first_of_two_processes_saves_after_the_loop_alone(tmp_path):
    """As train_points does, whose mixtures learn from more rows at last; of several eps no net is tried."""
    options = "--smoke", "--eps", "0.3,0.1", "--device", "cpu", "--out", tmp_path
    codes, outputs, errors = ends(processes("train_points.py", 2, *options))
    assert codes == [0, 0] and not any(errors), errors
    assert outputs[0].count("final dim 2") == 2 and "final" not in outputs[1]
    assert checkpoint(tmp_path, "points_smoke_eps0.3_0.1_seed0_smoke")["state"]["whole"] == 1


def test_stopped_and_killed_processes_end_together_and_any_number_goes_on(tmp_path, short):
    def wait_for_step(process, step):
        for line in process.stdout:
            if line.startswith(f"step {step:6d}/"):
                return
        raise AssertionError(process.communicate()[1])

    script = tmp_path / "script" / "train_slow.py"
    script.write_text(SHORT.replace("rows = bank.rows(64)", "import time; time.sleep(0.1); rows = bank.rows(64)"))
    started = processes(script, 2, "--device", "cpu", "--out", tmp_path)
    wait_for_step(started[0], 10)
    for process in started:  # Ctrl-C
        process.send_signal(signal.SIGINT)
    codes, outputs, errors = ends(started)
    assert codes == [0, 0] and errors == ("", "") and "final" not in outputs[0], (codes, outputs, errors)
    assert "stopped and saved" in outputs[0]
    step = checkpoint(tmp_path, "short_seed0")["step"]
    assert 10 <= step < 20
    before = checkpoint(tmp_path, "short_seed0")["bank"]["y"]
    started = processes(script, 2, "--device", "cpu", "--out", tmp_path, "--resume")
    wait_for_step(started[0], 20)
    started[1].kill()
    codes, _, errors = ends(started)
    assert codes == [2, -signal.SIGKILL]
    refuses(errors[0], "another process", "--resume")
    assert same(checkpoint(tmp_path, "short_seed0")["bank"]["y"], before)
    assert "final steps 30" in short("--resume")  # by one process
