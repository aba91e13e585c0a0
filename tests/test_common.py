"""The method against closed forms, quadrature and exact laws."""
import ast
import math
import os
import re
import runpy
import shutil
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import HERE, RUNS, final, here, whole

import common


def flat(y):
    """f = 0."""
    return 0 * y.flatten(1).sum(1)


def quadratic(y):
    return y.square().sum(1) / 2


class Bimodal:
    """f(y) = eps log sum_k a_k exp(-|y - m_k|^2 / (2 s^2)), for which pi_f(.|x) is a Gaussian mixture known exactly."""

    def __init__(self, eps=0.3, m=((-1.0, 0.0), (1.0, 0.5)), a=(0.3, 0.7), s=0.3):
        self.eps, self.m, self.log_a, self.s2 = eps, torch.tensor(m), torch.tensor(a).log(), s * s

    def __call__(self, y):
        return self.eps * torch.logsumexp(self.log_a - torch.cdist(y, self.m).square() / (2 * self.s2), 1)

    def exact(self, x):
        """y ~ pi_f(.|x)."""
        mode_weights = (self.log_a - torch.cdist(x, self.m).square() / (2 * (self.s2 + self.eps))).softmax(1)
        k = torch.multinomial(mode_weights, 1).squeeze(1)
        mean = (self.m[k] * self.eps + x * self.s2) / (self.s2 + self.eps)
        return mean + (self.s2 * self.eps / (self.s2 + self.eps)) ** 0.5 * torch.randn_like(x)


# ------------------------------------------------------------------------------------------------ in another project

def test_common_imports_torch_only_and_does_nothing_on_import():
    """No signal handler, hook, environment variable, random number, thread: a project that copies it keeps its own."""
    with open(os.path.join(HERE, "common.py"), encoding="utf-8") as file:
        tree = ast.parse(file.read())
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"math", "torch", "torch.nn.functional"}

    def state():
        return (signal.getsignal(2), signal.getsignal(15), sys.excepthook, sys.stdout, dict(os.environ),
                torch.get_rng_state().sum().item(), torch.get_num_threads(), threading.active_count(),
                torch.is_grad_enabled(), torch.get_default_dtype())

    before = state()
    runpy.run_path(os.path.join(HERE, "common.py"))
    assert state() == before


def test_readme_example_copies_into_another_project(tmp_path, monkeypatch):
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        block = re.search(r"<!-- tested: train_toy.py -->\n```python\n(.*?)```", file.read(), re.S).group(1)
    rooms = "common", "run", "truth"
    for room in rooms:
        shutil.copy(os.path.join(HERE, f"{room}.py"), tmp_path)
    with open(os.path.join(HERE, "train_toy.py"), encoding="utf-8") as file:
        script = file.read()
    start = script.index("def source(")
    (tmp_path / "train_mine.py").write_text(script[:start] + block + "\n\n" + script[script.index("# ----", start):])
    for name, module in list(sys.modules.items()):
        if os.path.dirname(getattr(module, "__file__", None) or "") == HERE:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if os.path.abspath(path) != HERE)])
    output, _ = here(tmp_path / "train_mine.py", "--smoke", "--device", "cpu", "--out", tmp_path)
    assert all(os.path.dirname(sys.modules.pop(room).__file__) == str(tmp_path) for room in rooms)
    assert final(output)["cond_floor"] > 0 and len(block.strip().splitlines()) <= 5


def test_readme_loads_a_finished_plan_in_a_notebook(tmp_path, monkeypatch):
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        block = re.search(r"<!-- tested: load -->\n```python\n(.*?)```", file.read(), re.S).group(1)
    assert len(block.strip().splitlines()) <= 6
    name = next(name for name in RUNS if name.startswith("points"))
    shutil.copy(whole(name)[0] / f"{name}.pt", tmp_path / re.search(r'mixture.load\("(.*?)"\)', block).group(1))
    np.save(tmp_path / "NEW.npy", np.random.default_rng(0).normal(size=(2000, 2)))
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(block, found)
    x, y, mean, half_way = (torch.as_tensor(found[key]) for key in ("x", "y", "mean", "half_way"))
    assert (y - mean).mean(0).abs().max() < 4 * (y - mean).std() / 2000 ** 0.5  # y ~ pi(.|x) has this mean
    noise = half_way - (x + y) / 2  # N(0, eps/4) beside the middle of each pair
    assert noise.var().item() == pytest.approx(found["plan"].eps / 4, rel=0.1)


# ------------------------------------------------------------------------------------------------ potentials

def test_potentials():
    torch.manual_seed(0)
    f = common.MLP(2, 8, 2, scale=3.0)
    assert f(torch.randn(5, 2)).shape == (5,)
    f.init_first_layer_at(torch.full((10, 2), 2.0), 4.0)
    assert f.hidden[0](torch.full((1, 2), 2.0)).abs().max() < 1e-5  # every unit is centred on the samples
    g, y = common.ResNet(width=8, depth=2), torch.randn(4, 3, 32, 32)
    assert g(y).shape == (4,) and torch.allclose(g(y)[:1], g(y[:1]), atol=1e-6)  # no score depends on the other chains
    grad = common.log_p_and_grad(g, y, y, 0.1)[1]
    h, v = 1e-2, torch.randn_like(y)
    slope = (g(y + h * v) - g(y - h * v)) / (2 * h) / 0.1
    assert torch.allclose((grad * v).flatten(1).sum(1), slope, rtol=0.02, atol=2e-3)


# ------------------------------------------------------------------------------------------------ the Langevin loop

def unadjusted(*args, **options):
    return common.langevin(*args, **options, metropolis=False)


def test_plain_langevin_with_f_zero_has_its_stationary_law_and_explodes_at_4_eps():
    torch.manual_seed(0)
    eps, eta, x = 0.1, 0.2, torch.full((40_000, 1), 1.5)
    y, log_p, accepted = unadjusted(flat, x, x, eps, eta, 100)
    assert y.mean().item() == pytest.approx(1.5, abs=4 * (eps / 2e4) ** 0.5)
    assert y.var().item() == pytest.approx(eps / (1 - eta / (4 * eps)), rel=0.03)  # twice eps: the bias at this step
    assert torch.allclose(accepted, torch.ones(len(x)), atol=1e-5)
    assert torch.allclose(log_p, -common.quadratic_cost(x, y) / eps, atol=1e-5)
    assert unadjusted(flat, x[:9], x[:9], eps, 4.2 * eps, 400)[0].abs().max() > 1e3


def test_plain_langevin_with_a_quadratic_potential_and_with_another_cost():
    torch.manual_seed(0)
    eps, eta, k, x = 0.2, 0.05, 3.0, torch.full((40_000, 1), 2.0)
    y = unadjusted(lambda y: -k * quadratic(y), x, x, eps, eta, 200)[0]
    r = eta * (1 + k) / (2 * eps)
    assert y.mean().item() == pytest.approx(2.0 / (1 + k), abs=0.01)
    assert y.var().item() == pytest.approx(eta / (r * (2 - r)), rel=0.03)
    y = unadjusted(flat, x, x, eps, eta, 200, cost=lambda x, y: 4 * common.quadratic_cost(x, y))[0]
    assert y.var().item() == pytest.approx(eta / (r * (2 - r)), rel=0.03)  # curvature 4 again, now all from c
    assert y.mean().item() == pytest.approx(2.0, abs=0.01)


def test_metropolis_removes_the_bias_of_the_step():
    torch.manual_seed(0)
    eps, x = 0.1, torch.full((40_000, 1), 1.5)
    y, log_p, accepted = common.langevin(flat, x, x, eps, 0.2, 60)
    assert y.var().item() == pytest.approx(eps, rel=0.03)  # plain Langevin gives 2 eps at this step
    assert torch.allclose(log_p, -common.quadratic_cost(x, y) / eps, atol=1e-5) and 0.3 < accepted.mean() < 0.9
    assert common.langevin(flat, x[:9], x[:9], eps, 4.2 * eps, 400)[0].abs().max() < 10  # and no chain blows up


def test_langevin_leaves_the_network_alone():
    f, x = common.MLP(2, 8, 2), torch.randn(16, 2)
    before = [p.clone() for p in f.parameters()]
    for metropolis in (True, False):
        y, _, _ = common.langevin(f, x, x, 0.1, 0.01, 3, metropolis=metropolis)
        assert not y.requires_grad and y.grad_fn is None and torch.isfinite(y).all()
    assert all(p.grad is None and p.requires_grad and torch.equal(p, w) for p, w in zip(f.parameters(), before))


def test_with_the_covariance_s_root_a_narrow_gaussian_is_reached_in_a_few_long_steps():
    torch.manual_seed(0)
    eps, x = 0.5, torch.tensor([[1.0, -2.0]]).expand(20_000, -1)
    H = torch.tensor([[90.0, 9.0], [9.0, 2.0]])  # f = -y H y / 2: pi_f(.|x) = N((I + H)^-1 x, eps (I + H)^-1)
    S = eps * torch.linalg.inv(torch.eye(2) + H)
    y, _, accepted = common.langevin(lambda y: -((y @ H) * y).sum(1) / 2, x, x + 5, eps, 1.0, 40,
                                     precond=torch.linalg.cholesky(S))
    assert 0.6 < accepted.mean() < 0.95 and S.diag()[1] > 30 * S.diag()[0]
    assert torch.allclose(y.mean(0), S @ x[0] / eps, atol=0.015) and torch.allclose(y.T.cov(), S, atol=0.01)


def joint_statistics(x, y):
    right = (y[:, 0] > 0).float()
    return torch.stack([right.mean(), (right * x[:, 0]).mean(), y[:, 1].mean(), (x * y).sum(1).mean(),
                        y.square().sum(1).mean()])


@pytest.mark.parametrize("how", ["plain", "preconditioned"])
def test_a_step_leaves_the_exact_joint_law_unchanged(how):
    torch.manual_seed(0)
    f, x = Bimodal(), torch.randn(40_000, 2)
    before = y = f.exact(x)
    for _ in range(6):
        eta = 0.08 if how == "plain" else 1.5 * torch.rand(len(y), 1)  # one step for each chain
        precond = None if how == "plain" else torch.tensor([[0.4, 0.0], [0.2, 0.3]])
        y, _, accepted = common.langevin(f, x, y, f.eps, eta, 2, precond=precond)
    large = torch.randn(400_000, 2)
    truth = joint_statistics(large, f.exact(large))
    assert (joint_statistics(x, y) - truth).abs().max() < 0.025 and 0.3 < accepted.mean() < 0.95
    assert (y - before).norm(dim=1).median() > 0.1  # and they did move


def test_sample_index_draws_in_proportion():
    torch.manual_seed(0)
    weights = torch.tensor([[1.0, 0.0, 3.0], [0.0, 5.0, 0.0]])
    drawn = common.sample_index(weights.repeat(20_000, 1)).view(-1, 2)
    assert (drawn[:, 1] == 1).all() and not (drawn[:, 0] == 1).any()
    assert (drawn[:, 0] == 2).float().mean().item() == pytest.approx(0.75, abs=0.015)


@pytest.mark.parametrize("n, world", [(64, 1), (64, 2), (10, 3)])
def test_processes_share_chains_and_batch(n, world):
    bank, seen = common.Bank(torch.zeros(n), torch.zeros(n)), []
    for rank in range(world):
        bank.rank, bank.world = rank, world
        rows = torch.cat([bank.rows(7) for _ in range(200)])
        assert len(rows) == 200 * -(-7 // world)
        seen.append(set(rows.tolist()))
        assert seen[-1] == set(range(n)[bank.slice_of(rank)])
    assert set.union(*seen) == set(range(n)) and sum(map(len, seen)) == n  # all rows, each of one process


# ------------------------------------------------------------------------------------------------ the training step

def test_proxy_gradient_is_the_gradient_of_L():
    """L(f) = -eps E_P log Z(f,x) + E_Q f in one dimension, Z by quadrature; the proxy's y_neg are exact quantiles."""
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
    """N(0, 1) -> N(1, 1/4): E[y|x] = 1 + C x, Var[y|x] = 1/4 - C^2, C = (sqrt(4/4 + eps^2) - eps)/2."""
    torch.manual_seed(0)
    eps = 0.5
    C = (math.sqrt(1 + eps * eps) - eps) / 2
    f, f_avg = common.MLP(1, 64, 2), common.MLP(1, 64, 2)
    opt = torch.optim.Adam(f.parameters(), lr=5e-3, betas=(0.9, 0.99))
    target, source = common.kd_order(1 + 0.5 * torch.randn(2 ** 15, 1)), common.kd_order(torch.randn(2 ** 13, 1))
    bank, steps = common.Bank(source, source), 500
    for step in range(1, steps + 1):
        opt.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        rows, y_pos = bank.rows(512), target[common.stratified_rows(len(target), 512)]
        bank.y[rows], _, _ = common.langevin(f, bank.x[rows], bank.y[rows], eps, 0.3, 2)
        common.train_step(f, opt, y_pos, bank.y[rows])
        common.update_ema(f_avg, f, step, decay=0.98)
    x, grid = torch.tensor([[-1.5], [0.0], [1.5]]), torch.linspace(-4, 5, 2001)[:, None]
    p = ((f_avg(grid) - (x - grid.T).square() / 2) / eps).softmax(1).detach()
    mean = (p @ grid).squeeze(1)
    variance = (p * (grid.T - mean[:, None]).square()).sum(1)
    assert mean.tolist() == pytest.approx((1 + C * x.squeeze(1)).tolist(), abs=0.03)
    assert variance.tolist() == pytest.approx([0.25 - C * C] * 3, rel=0.08)


def test_update_ema_is_the_exponential_mean_and_the_rate_a_warm_cosine():
    a, b = common.MLP(1, 2, 1), common.MLP(1, 2, 1)
    start, new = (next(m.parameters()).detach().clone() for m in (a, b))
    for _ in range(5):
        common.update_ema(a, b, 10_000, decay=0.9)
    assert torch.allclose(next(a.parameters()), 0.9 ** 5 * start + (1 - 0.9 ** 5) * new, atol=1e-6)
    for step in range(1, 41):  # of the t-th of n nets 4 (t+1) (t+2) (t+3) / ((n+1) (n+2) (n+3) (n+4))
        torch.nn.init.constant_(next(b.parameters()), step)
        common.update_ema(a, b, step, 4)
    weights = [4 * math.prod(range(t + 1, t + 4)) / math.prod(range(41, 45)) for t in range(1, 41)]
    assert next(a.parameters()).mean().item() == pytest.approx(sum(w * t for t, w in enumerate(weights, 1)), abs=1e-3)
    assert common.max_param(a, b) == max(p.abs().max() for net in (a, b) for p in net.parameters())
    assert common.warm_cosine(2.0, 5, 10, 10 ** 9) == pytest.approx(1) and common.warm_cosine(2.0, 50, 10, 100) == 1
    assert common.warm_cosine(2.0, 100, 10, 100) == 0


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
    points = torch.rand(1001, 2)
    ordered = common.kd_order(points, torch.arange(1001), levels=2)  # of any number; rows that belong to them
    assert torch.equal(ordered.sort().values, torch.arange(1001))
    for cell in points[ordered].tensor_split([251, 501, 751]):  # the quarters of the square
        assert (cell.amax(0) - cell.amin(0)).max() < 0.6


def test_every_function_runs_where_tensors_hold_no_numbers():
    """On torch's meta device a tensor left on the CPU raises, and so does all that waits for a number."""
    def numbers(*shape):
        return torch.empty(shape, device="meta")

    f, other, resnet = (m.to("meta") for m in (common.MLP(2, 8, 2), common.MLP(2, 8, 2), common.ResNet(32, 3, 4, 1)))
    x, y, eta, opt = numbers(16, 2), numbers(16, 2), numbers(), torch.optim.Adam(f.parameters())
    f.init_first_layer_at(y, 3.0)
    common.update_ema(other, f, 5)
    results = [f(y), resnet(numbers(4, 3, 32, 32)), *unadjusted(f, x, y, 0.1, 0.01, 2),
               *common.langevin(f, x, y, 0.1, eta, 2, precond=numbers(2, 2)), common.train_step(f, opt, y, x),
               common.max_param(f), common.stratified_rows(16, 4, "meta"), common.kd_order(x),
               common.sample_index(x.square()), common.Bank(x, y).rows(4)]
    assert all(result.is_meta for result in results)
