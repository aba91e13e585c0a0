"""The checks to make before a long run: every script's --smoke, then the mathematics of common.py against closed forms.

    python -m pytest -q test_smoke.py        or        python test_smoke.py

No network, no data, under three minutes on two CPU cores."""
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import common

HERE = os.path.dirname(os.path.abspath(__file__))
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def run(script, *options, cwd, code=0, prelude=None, folder=HERE):
    """Run a script as a user does, from the folder cwd; -> its output.  prelude: Python to run first in the process."""
    path = os.path.join(folder, script)
    if prelude:
        prelude = f"import sys, runpy; sys.path.insert(0, {folder!r}); sys.argv = {[path, *options]!r}\n{prelude}\nrunpy.run_path({path!r}, run_name='__main__')"
    command = [sys.executable, "-c", prelude] if prelude else [sys.executable, path, *options]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=150)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


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

@pytest.mark.parametrize("device", DEVICES)
def test_toy_smoke_then_resume(tmp_path, device):
    options = ("--smoke", "--out", str(tmp_path / "out"), "--device", device)
    first = final(run("train_toy.py", *options, cwd=tmp_path))
    assert all(math.isfinite(v) for v in first.values())
    names = {"toy_eps0.1_smoke.pt", "toy_eps0.1_smoke.png", "toy_reference_eps0.1_smoke.npz"}
    assert set(os.listdir(tmp_path / "out")) == names  # nothing beside them, no .tmp left
    again = final(run("train_toy.py", *options, "--resume", cwd=tmp_path))  # nothing left to train: scores only
    assert again["cond_w2"] == pytest.approx(first["cond_w2"], rel=1e-3)
    assert again["train_s"] <= first["train_s"] + 0.5


@pytest.mark.parametrize("eps", ["0.001", "5"])
def test_toy_smoke_at_other_eps(tmp_path, eps):
    assert final(run("train_toy.py", "--smoke", "--eps", eps, "--out", str(tmp_path), cwd=tmp_path))["eps"] == float(eps)


SIGNAL_AT_12 = """
import common, os, signal
calls, step = [0], common.train_step
def train_step(*a):
    calls[0] += 1
    if calls[0] == 12: os.kill(os.getpid(), signal.{})
    return step(*a)
common.train_step = train_step
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted smoke run."""
    folder = tmp_path_factory.mktemp("whole")
    run("train_toy.py", "--smoke", "--device", "cpu", "--out", str(folder), cwd=folder)
    return folder


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(tmp_path, name, whole):
    halves = str(tmp_path / "halves")
    output = run("train_toy.py", "--smoke", "--device", "cpu", "--out", halves, cwd=tmp_path, prelude=SIGNAL_AT_12.format(name))
    assert "step     12/30" in output and "step     13/30" not in output and final(output)["eps"] == 0.1
    run("train_toy.py", "--smoke", "--device", "cpu", "--out", halves, "--resume", cwd=tmp_path)
    a, b = (torch.load(f"{d}/toy_eps0.1_smoke.pt", weights_only=True) for d in (whole, halves))
    assert a["step"] == 30 and {"f", "f_avg", "opt", "bank", "rng", "eta"} < set(a)
    assert same(a, b)


def test_killed_in_the_middle_of_a_save_loses_nothing(tmp_path):
    kill = """
import os, torch
whole, calls = torch.save, [0]
def save(state, path):
    calls[0] += 1
    if calls[0] < 2: return whole(state, path)
    open(path, "wb").write(b"half a checkpoint")
    os._exit(9)
torch.save = save
"""
    options = ("--smoke", "--device", "cpu", "--out", str(tmp_path))
    run("train_toy.py", *options, cwd=tmp_path, code=9, prelude=kill)
    assert torch.load(tmp_path / "toy_eps0.1_smoke.pt", weights_only=True)["step"] == 0
    assert final(run("train_toy.py", *options, "--resume", cwd=tmp_path))["eps"] == 0.1
    assert torch.load(tmp_path / "toy_eps0.1_smoke.pt", weights_only=True)["step"] == 30


def test_divergence_is_said_and_the_good_checkpoint_kept(tmp_path):
    poison = """
import common, torch
calls, step = [0], common.train_step
def train_step(f, *a):
    calls[0] += 1
    if calls[0] == 11: next(f.parameters()).data.fill_(float("nan"))
    return step(f, *a)
common.train_step = train_step
"""
    refuses(run("train_toy.py", "--smoke", "--out", str(tmp_path), cwd=tmp_path, code=2, prelude=poison), "diverged", "--resume")
    kept = torch.load(tmp_path / "toy_eps0.1_smoke.pt", weights_only=True)
    assert kept["step"] < 11 and all(v.isfinite().all() for v in kept["f"].values())


def test_full_disk(tmp_path):
    full = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    refuses(run("train_toy.py", "--smoke", "--out", str(tmp_path), cwd=tmp_path, code=2, prelude=full), "cannot write", "--out")
    assert not [f for f in os.listdir(tmp_path) if f.endswith(".tmp") or f.endswith(".pt")]


def test_unusable_checkpoints(tmp_path):
    options, path = ("--smoke", "--resume", "--out", str(tmp_path)), tmp_path / "toy_eps0.1_smoke.pt"
    refuses(run("train_toy.py", *options, cwd=tmp_path, code=2), "no checkpoint", "without --resume")
    path.write_text("not a checkpoint")
    refuses(run("train_toy.py", *options, cwd=tmp_path, code=2), "not a readable checkpoint", str(path))
    foreign = b"cos\nsystem\n(S'touch " + str(tmp_path).encode() + b"/executed'\ntR."
    path.write_bytes(foreign)
    refuses(run("train_toy.py", *options, cwd=tmp_path, code=2), "not a readable checkpoint")
    assert path.read_bytes() == foreign and not (tmp_path / "executed").exists()


def test_load_refuses_other_constants_and_other_networks(tmp_path, capsys):
    path, f = str(tmp_path / "a.pt"), common.MLP(2, 8, 1)
    common.save(path, {"f": f}, constants={"LR": 0.1, "SEED": 0}, step=3)
    assert common.load(path, {"f": common.MLP(2, 8, 1)}, {"LR": 0.1, "SEED": 0})["step"] == 3
    for constants, part, words in (({"LR": 0.2, "SEED": 0}, f, "LR was 0.1, is 0.2"), ({"LR": 0.1, "SEED": 0}, common.MLP(2, 9, 1), "does not fit")):
        with pytest.raises(SystemExit) as end:
            common.load(path, {"f": part}, constants)
        assert end.value.code == 2
        refuses(capsys.readouterr().err, words)


@pytest.mark.parametrize("bad", [["--eps", "0"], ["--eps", "-1"], ["--eps", "nan"], ["--eps", "inf"], ["--eps", "x"], ["--device", "gpu7"],
                                 ["--device", "cuda:99"], ["--out", os.path.join(__file__, "x")], ["--seed", "-1"], ["--sede", "1"]])
def test_bad_command_lines(bad, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_toy.py", *bad])
    with pytest.raises(SystemExit) as end:
        common.arguments("doc", __file__, eps=0.1)
    assert end.value.code == 2
    refuses(capsys.readouterr().err, bad[0] if bad[0] != "--sede" else "unrecognized")


def test_bad_eps_from_the_shell(tmp_path):
    refuses(run("train_toy.py", "--eps", "nan", cwd=tmp_path, code=2), "--eps", "positive number")


def test_readme_example_copies_into_another_project(tmp_path):
    readme = open(os.path.join(HERE, "README.md")).read()
    block = re.search(r"<!-- tested -->\n```python\n(.*?)```", readme, re.S).group(1)
    assert len(block.strip().splitlines()) <= 5
    shutil.copy(os.path.join(HERE, "common.py"), tmp_path)
    script = open(os.path.join(HERE, "train_toy.py")).read()
    start, end = script.index("def source("), script.index("# ----", script.index("def source("))
    (tmp_path / "train_mine.py").write_text(script[:start] + block + "\n\n" + script[end:])
    assert final(run("train_mine.py", "--smoke", "--out", str(tmp_path), cwd=tmp_path, folder=str(tmp_path)))["cond_floor"] > 0


# ------------------------------------------------------------------------------------------------ the mathematics

def flat(y):
    """f = 0."""
    return 0 * y.flatten(1).sum(1)


class Mixture:
    """f(y) = eps log sum_k a_k exp(-|y - m_k|^2 / (2 s^2)), for which pi_f(.|x) is a Gaussian mixture known exactly."""

    def __init__(self, eps, m, a, s):
        self.eps, self.m, self.log_a, self.s2 = eps, torch.tensor(m), torch.tensor(a).log(), s * s
        self.var = self.s2 * eps / (self.s2 + eps)

    def __call__(self, y):
        return self.eps * torch.logsumexp(self.log_a - torch.cdist(y, self.m).square() / (2 * self.s2), 1)

    def mode_weights(self, x):
        return (self.log_a - torch.cdist(x, self.m).square() / (2 * (self.s2 + self.eps))).softmax(1)

    def mean(self, x, k):
        return (self.m[k] * self.eps + x * self.s2) / (self.s2 + self.eps)

    def exact(self, x):
        k = torch.multinomial(self.mode_weights(x), 1).squeeze(1)
        return self.mean(x, k) + self.var ** 0.5 * torch.randn_like(x)


def bimodal():
    return Mixture(0.3, [[-1.0, 0.0], [1.0, 0.5]], [0.3, 0.7], 0.3)


def test_langevin_with_f_zero_has_its_stationary_law_and_explodes_at_4_eps():
    torch.manual_seed(0)
    eps, eta, x = 0.1, 0.2, torch.full((40_000, 1), 1.5)
    y = common.langevin(flat, x, x, eps, eta, 100)
    assert y.mean().item() == pytest.approx(1.5, abs=4 * (eps / 2e4) ** 0.5)
    assert y.var().item() == pytest.approx(eps / (1 - eta / (4 * eps)), rel=0.03)  # twice eps: the bias at this step
    assert common.langevin(flat, x[:9], x[:9], eps, 4.2 * eps, 400).abs().max() > 1e3


def test_langevin_with_a_quadratic_potential_and_with_another_cost():
    torch.manual_seed(0)
    eps, eta, k, x = 0.2, 0.05, 3.0, torch.full((40_000, 1), 2.0)
    y = common.langevin(lambda y: -k * quadratic(y), x, x, eps, eta, 200)
    r = eta * (1 + k) / (2 * eps)
    assert y.mean().item() == pytest.approx(2.0 / (1 + k), abs=0.01)
    assert y.var().item() == pytest.approx(eta / (r * (2 - r)), rel=0.03)
    y = common.langevin(flat, x, x, eps, eta, 200, cost=lambda x, y: 4 * common.quadratic_cost(x, y))
    assert y.var().item() == pytest.approx(eta / (r * (2 - r)), rel=0.03)  # curvature 4 again, now all from c
    assert y.mean().item() == pytest.approx(2.0, abs=0.01)


def quadratic(y):
    return y.square().sum(1) / 2


def test_samplers_leave_the_network_alone():
    f, x = common.MLP(2, 8, 2), torch.randn(16, 2)
    weights = [p.clone() for p in f.parameters()]
    for y in (common.langevin(f, x, x, 0.1, 0.01, 3), common.mala(f, x, x, 0.1, 0.01, 3)[0], common.jump(f, x, x, x + 1, 0.1, 0.1)[0]):
        assert not y.requires_grad and y.grad_fn is None and torch.isfinite(y).all()
    assert all(p.grad is None and p.requires_grad and torch.equal(p, w) for p, w in zip(f.parameters(), weights))


def test_metropolis_removes_the_bias_of_the_step():
    torch.manual_seed(0)
    eps, x = 0.1, torch.full((40_000, 1), 1.5)
    y, log_p, accepted = common.mala(flat, x, x, eps, 0.2, 60)
    assert y.var().item() == pytest.approx(eps, rel=0.03)  # plain Langevin gives 2 eps at this step
    assert torch.allclose(log_p, -common.quadratic_cost(x, y) / eps, atol=1e-5) and 0.3 < accepted < 0.9


MOVES = {
    "mala": lambda f, x, y: common.mala(f, x, y, f.eps, 0.08, 2)[0],
    "jump, few centres far off": lambda f, x, y: common.jump(f, x, y, torch.randn(3, 2), 0.5, f.eps)[0],
    "jump, many centres": lambda f, x, y: common.jump(f, x, y, f.m[torch.randint(2, (64,))] + 0.3 * torch.randn(64, 2), 0.2, f.eps)[0],
    "jump, widths that differ": lambda f, x, y: common.jump(f, x, y, torch.cat([f.m[[0, 1, 1]], torch.randn(4, 2)]), torch.tensor([0.3, 0.1, 0.3, 1, 1, 0.7, 0.2]), f.eps)[0],
    "swap": lambda f, x, y: common.swap(x, y, f.eps)[0],
}


@pytest.mark.parametrize("name", MOVES)
def test_every_move_leaves_the_exact_joint_law_unchanged(name):
    torch.manual_seed(0)
    f, n = bimodal(), 200
    statistics = []
    for _ in range(200):  # blocks with jumps of their own: chains that share proposals are not independent
        x = torch.randn(n, 2)
        y = f.exact(x)
        for _ in range(6):
            y = MOVES[name](f, x, y)
        right = (y[:, 0] > 0).float()
        statistics.append(torch.stack([right.mean(), (right * x[:, 0]).mean(), y[:, 1].mean(), (x * y).sum(1).mean(), y.square().sum(1).mean()]))
    x = torch.randn(400_000, 2)
    y, right = f.exact(x), None
    right = (y[:, 0] > 0).float()
    truth = torch.stack([right.mean(), (right * x[:, 0]).mean(), y[:, 1].mean(), (x * y).sum(1).mean(), y.square().sum(1).mean()])
    statistics = torch.stack(statistics)
    error = statistics.std(0) / len(statistics) ** 0.5
    assert ((statistics.mean(0) - truth).abs() < 4.5 * error + 0.003).all(), (statistics.mean(0), truth, error)
    assert error.max() < 0.015


def test_jumps_equalise_modes_that_langevin_cannot_connect():
    torch.manual_seed(0)
    f = Mixture(0.3, [[-1.0, 0.0], [1.0, 0.0]], [0.3, 0.7], 0.05)
    x = 0.2 * torch.randn(4000, 2)
    start = torch.tensor([-1.0, 0.0]).repeat(len(x), 1)
    stuck = common.mala(f, x, start, f.eps, 0.002, 100)[0]
    assert (stuck[:, 0] > 0).float().mean() < 0.01
    y, masses = start, []
    for step in range(120):
        y = common.mala(f, x, y, f.eps, 0.002, 1)[0]
        y, moved = common.jump(f, x, y, f.m[torch.randint(2, (64,))], 0.05, f.eps)
        masses.append((y[:, 0] > 0).float().mean().item())
    assert sum(masses[20:]) / 100 == pytest.approx(f.mode_weights(x)[:, 1].mean().item(), abs=0.015) and moved > 0.5


def test_swaps_correct_a_wrong_pairing():
    torch.manual_seed(0)
    eps, x = 0.5, torch.randn(2000, 1)
    right = x + eps ** 0.5 * torch.randn_like(x)  # f = 0
    y = right[torch.randperm(len(x))]
    wrong_cost = common.quadratic_cost(x, y).mean().item()
    for _ in range(1500):
        y, _ = common.swap(x, y, eps)
    independent = (x.square().mean() + y.square().mean()) / 2 - x.mean() * y.mean()
    assert wrong_cost == pytest.approx(independent.item(), abs=0.15)
    assert common.quadratic_cost(x, y).mean().item() == pytest.approx(common.quadratic_cost(x, right).mean().item(), abs=0.03)
    assert torch.equal(y.sort(0).values, right.sort(0).values)


def test_proxy_gradient_is_the_gradient_of_L():
    """L(f) = -eps E_P log Z(f,x) + E_Q f in one dimension, Z by quadrature, against the proxy on exact conditional quantiles."""
    torch.manual_seed(0)
    eps, f = 0.2, common.MLP(1, 16, 2).double()
    x, y_pos = torch.tensor([[-1.0], [0.3], [0.8]]).double(), torch.tensor([[0.5], [1.5]]).double()
    grid = torch.linspace(-6, 6, 8001).double()[:, None]
    log_density = (f(grid) - (x - grid.T).square() / 2) / eps
    L = -eps * (log_density.logsumexp(1) + math.log(12 / 8000)).mean() + f(y_pos).mean()
    exact = torch.autograd.grad(L, list(f.parameters()))
    cdf = log_density.detach().softmax(1).cumsum(1)
    level = (torch.arange(4000).double() + 0.5) / 4000
    y_neg = torch.cat([grid[torch.searchsorted(c, level)] for c in cdf])
    proxy = torch.autograd.grad(-common.proxy_loss(f, y_pos, y_neg), list(f.parameters()))
    for a, b in zip(exact[:-1], proxy[:-1]):  # the last, a constant added to f, has gradient 0 in both
        assert (a - b).abs().max() < 2e-3 * a.abs().max(), (a, b)
    assert exact[-1].abs().max() < 1e-9 and proxy[-1].abs().max() < 1e-9


def test_a_one_dimensional_problem_is_learned_to_its_known_plan():
    """N(0, 1) -> N(1, 1/4): the plan is Gaussian, E[y|x] = 1 + C x, Var[y|x] = 1/4 - C^2, C = (sqrt(4/4 + eps^2) - eps)/2."""
    torch.manual_seed(0)
    eps = 0.5
    C = (math.sqrt(1 + eps * eps) - eps) / 2
    f, f_avg = common.MLP(1, 64, 2), common.MLP(1, 64, 2)
    opt = torch.optim.Adam(f.parameters(), lr=5e-3, betas=(0.9, 0.99))
    target, source = common.kd_order(1 + 0.5 * torch.randn(2 ** 15, 1)), common.kd_order(torch.randn(2 ** 13, 1))
    bank, steps = common.Bank(source, source), 500
    for step in range(1, steps + 1):
        opt.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        rows, y_pos = bank.rows(256), target[common.stratified_rows(len(target), 256)]
        x, y, log_p = bank.x[rows], *common.mala(f, bank.x[rows], bank.y[rows], eps, 0.2, 2)[:2]
        bank.y[rows], _ = common.jump(f, x, y, y_pos, 0.2, eps, log_p)
        common.train_step(f, opt, y_pos, bank.y[rows])
        common.average_weights(f_avg, f, 0.98, step)
    x, grid = torch.tensor([[-1.5], [0.0], [1.5]]), torch.linspace(-4, 5, 2001)[:, None]
    p = ((f_avg(grid) - (x - grid.T).square() / 2) / eps).softmax(1).detach()
    mean = (p @ grid).squeeze(1)
    variance = (p * (grid.T - mean[:, None]).square()).sum(1)
    assert mean.tolist() == pytest.approx((1 + C * x.squeeze(1)).tolist(), abs=0.03)
    assert variance.tolist() == pytest.approx([0.25 - C * C] * 3, rel=0.08)


def test_stratified_rows_are_uniform_and_quieter():
    torch.manual_seed(0)
    counts = torch.bincount(torch.cat([common.stratified_rows(10, 4) for _ in range(20_000)]), minlength=10)
    assert (counts / 8000 - 1).abs().max() < 0.06
    points = torch.randn(4096, 2)
    ordered = common.kd_order(points)
    assert torch.equal(ordered[:, 0].sort().values, points[:, 0].sort().values)
    assert ordered[:2048, 0].max() <= ordered[2048:, 0].min() and ordered[:1024, 1].max() <= ordered[1024:2048, 1].min()
    quiet = torch.stack([ordered[common.stratified_rows(4096, 256)].mean(0) for _ in range(400)]).var(0)
    assert (quiet < 0.1 / 256).all()  # independent draws: 1/256
    with pytest.raises(ValueError):
        common.kd_order(points[:1000])


def test_average_weights_is_the_exponential_mean():
    a, b = common.MLP(1, 2, 1), common.MLP(1, 2, 1)
    start, new = (next(m.parameters()).detach().clone() for m in (a, b))
    for _ in range(5):
        common.average_weights(a, b, 0.9, 10_000)
    assert torch.allclose(next(a.parameters()), 0.9 ** 5 * start + (1 - 0.9 ** 5) * new, atol=1e-6)


def test_potentials():
    torch.manual_seed(0)
    f = common.MLP(2, 8, 2, scale=3.0)
    assert f.flops == 2 * (2 * 8 + 8 * 8 + 8) and f(torch.randn(5, 2)).shape == (5,)
    f.place(torch.full((10, 2), 2.0), 4.0)
    assert f.hidden[0](torch.full((1, 2), 2.0)).abs().max() < 1e-5  # every ramp is centred on the samples
    g, y = common.ResNet(width=8), torch.randn(4, 3, 32, 32)
    assert g(y).shape == (4,) and torch.allclose(g(y)[:1], g(y[:1]), atol=1e-6)  # no score depends on the other chains
    grad = common.log_p_and_grad(g, y, y, 0.1)[1]
    h, v = 1e-2, torch.randn_like(y)
    slope = (g(y + h * v) - g(y - h * v)) / (2 * h) / 0.1
    assert torch.allclose((grad * v).flatten(1).sum(1), slope, rtol=0.02, atol=2e-3)


if __name__ == "__main__":
    raise SystemExit(pytest.main(["-q", __file__, *sys.argv[1:]]))
