"""mixture.py, ascent.py: closed forms against quadrature, dense matrices, discrete OT; the fit ascends to its end."""
import math

import numpy as np
import ot
import pytest
import torch

import ascent
import images
import mixture
from ascent import MeanLogSum, anneal, gain_of, gaussian_plan
from common import quadratic_cost
from mixture import MainPlan, Mixture, Plan, forms, gaussian_map, log_sum, noise_shares


# ------------------------------------------------------------------------------------------------ closed forms

def test_the_gaussian_map_against_a_long_discrete_solve():
    """Both laws as weights on a fine grid, where sums are integrals to many digits, and Sinkhorn to convergence."""
    eps = 1.0
    T = gaussian_map(torch.eye(2).double(), 2 * torch.eye(2).double(), 1e9)
    assert torch.allclose(1e9 * T, 2 * torch.eye(2).double(), rtol=1e-6)  # no cancellation: T tends to S1/eps
    S0, S1 = torch.tensor([[1.0, 0.5], [0.5, 0.7]]).double(), torch.tensor([[0.6, -0.3], [-0.3, 1.1]]).double()
    T = gaussian_map(S0, S1, eps)
    plan = torch.cat([torch.cat([S0, S0 @ T], 1), torch.cat([(S0 @ T).T, S1], 1)])
    grid = torch.cartesian_prod(*[torch.linspace(-5, 5, 39, dtype=torch.float64)] * 2)
    p, q = ((-(grid @ torch.linalg.inv(S) * grid).sum(1) / 2).softmax(0) for S in (S0, S1))
    p, q = ((w + 1e-300) / (w + 1e-300).sum() for w in (p, q))
    discrete = ot.sinkhorn(p, q, torch.cdist(grid, grid).square() / 2, eps, method="sinkhorn_log",
                           numItermax=200, stopThr=1e-9)
    pairs = torch.cat([grid.repeat_interleave(len(grid), 0), grid.repeat(len(grid), 1)], 1)
    assert torch.allclose((pairs * discrete.reshape(-1, 1)).T @ pairs, plan, atol=1e-4)
    i = (grid - torch.tensor([0.8, -0.5])).norm(dim=1).argmin()
    x, conditional = grid[i], discrete[i] / discrete[i].sum()
    assert torch.allclose(conditional @ grid, T @ x, atol=1e-4)
    spread = grid - conditional @ grid
    assert torch.allclose((spread * conditional[:, None]).T @ spread, eps * T, atol=1e-4)


def test_the_share_of_noise_is_that_of_the_gaussian_plan():
    torch.manual_seed(0)
    S0, S1 = (torch.cov(torch.randn(4, 9).double()) for _ in range(2))
    share, eps_of = noise_shares(S0, S1)
    for eps in (1e-3, 0.3, 50.0):
        assert share(eps) == pytest.approx((eps * gaussian_map(S0, S1, eps).trace() / S1.trace()).item())
        assert eps_of(share(eps)) == pytest.approx(eps, rel=1e-6)
    assert share(1e-9) < 1e-6 and share(1e9) > 1 - 1e-6
    one = noise_shares(torch.ones(1, 1).double(), torch.ones(1, 1).double())[0]
    assert one(1.0) == pytest.approx((math.sqrt(5) - 1) / 2)  # T^2 + T = 1


def mixture_1d(eps=0.5):
    """Three components in 1-D: S is 0.3, 1 and 0.6."""
    plan = Mixture(1, 3, 1, eps)
    plan.load_state_dict({"log_a": torch.tensor([0.2, 0.5, 0.3]).log(), "r": torch.tensor([[-2.0], [0.5], [2.5]]) / 2,
                          "d": torch.tensor([[0.2], [0.9], [0.1]]) / 4, "R": torch.tensor([[2.0]]),
                          "U": torch.tensor([0.1, 0.1, 0.5]).sqrt().view(3, 1, 1) / 2,
                          "inverse": torch.tensor([[0.5]])})
    return plan


def conditional_1d(f, eps, x, ticks=torch.linspace(-15, 15, 6001, dtype=torch.float64)):
    """log Z, mean and variance of exp((f(y) - |x-y|^2/2)/eps) at each x (T,), by quadrature."""
    log_p = (f(ticks.float()[:, None]).double() - (x.double()[:, None] - ticks).square() / 2) / eps
    weights, spacing = log_p.softmax(1), ticks[1] - ticks[0]
    mean = weights @ ticks
    return log_p.logsumexp(1) + spacing.log(), mean, weights @ ticks.square() - mean ** 2


def test_a_mixture_s_plan_is_its_closed_form():
    torch.manual_seed(0)
    plan, x = mixture_1d(), torch.tensor([-2.0, -0.3, 0.0, 1.7])
    log_z, mean, variance = conditional_1d(plan, plan.eps, x)
    assert torch.allclose(plan.log_z(x[:, None]).double(), log_z, atol=1e-4)
    assert torch.allclose(plan.mean(x[:, None])[:, 0].double(), mean, atol=1e-4)
    y = plan.sample(x[:, None].repeat_interleave(200_000, 0)).view(4, -1).double()
    assert torch.allclose(y.mean(1), mean, atol=0.015) and torch.allclose(y.var(1), variance, atol=0.03)
    ticks = torch.linspace(-15, 15, 6001)[:, None]
    assert plan.log_density(x[:1, None].expand(6001, 1), ticks).exp().sum().item() * 0.005 == pytest.approx(1, abs=1e-4)
    x, y = torch.randn(1000, 1), torch.randn(1000, 1)
    by_quadrature = plan(y).mean() - plan.eps * conditional_1d(plan, plan.eps, x[:, 0])[0].mean()
    assert plan.objective(x, y).item() == pytest.approx(by_quadrature.item(), abs=1e-4)


def random_mixture(dim, components, rank, eps):
    plan = Mixture(dim, components, rank, eps)
    plan.turn(torch.eye(dim).double() + 0.3 * torch.randn(dim, dim).tril().double())
    plan.r, plan.U = torch.randn(components, dim), 0.5 * torch.randn(components, dim, rank)
    plan.d, plan.log_a = torch.rand(components, dim) + 0.3, torch.randn(components)
    return plan


@pytest.mark.parametrize("rank", [0, 2, 4])
def test_low_rank_plus_diagonal_against_dense_matrices(rank, monkeypatch):
    torch.manual_seed(0)
    plan, x, y = random_mixture(4, 3, rank, 0.7), torch.randn(9, 4), torch.randn(9, 4)
    S = plan.R @ (torch.diag_embed(plan.d) + plan.U @ plan.U.mT) @ plan.R.T
    r = plan.r @ plan.R.T
    by_hand = torch.stack([a + torch.distributions.MultivariateNormal(m, 0.7 * C).log_prob(y)
                           for a, m, C in zip(plan.log_a, r, S)], 1)
    assert torch.allclose(plan.log_v(y), by_hand, atol=1e-3)
    inner = torch.einsum("bd,kde,be->bk", x, S, x) + 2 * x @ r.T
    assert torch.allclose(plan.log_w(x), plan.log_a + inner / 1.4, atol=1e-3)
    means = r + torch.einsum("kde,be->bkd", S, x)
    assert torch.allclose(plan.mean(x), (plan.log_w(x).softmax(1)[..., None] * means).sum(1), atol=1e-4)
    alone = Mixture(4, 1, rank, 0.7)
    alone.load_state_dict({k: v[1:2] if len(v) == 3 else v for k, v in plan.state_dict().items()})
    sampled = alone.sample(x[:1].expand(200_000, 4))
    assert torch.allclose(sampled.mean(0), means[0, 1], atol=0.02)
    assert torch.allclose(torch.cov(sampled.T), 0.7 * S[1], atol=0.03 * S[1].max())
    draws = []
    for gathered in (2 ** 22, -1):  # all x at once, or one after the other
        monkeypatch.setattr(mixture, "GATHERED", gathered)
        torch.manual_seed(0)
        draws.append(plan.sample(x))
    assert torch.allclose(*draws, atol=1e-5)


def test_the_gradient_at_once_is_that_of_autograd():
    torch.manual_seed(0)
    plan, z = random_mixture(4, 3, 2, 0.7), torch.randn(300, 4)
    plan.U.requires_grad_(), plan.d.requires_grad_(), plan.r.requires_grad_()
    for weights in (plan.of_x(), plan.of_y()):
        one, two = MeanLogSum.apply(z, *weights), forms(z, *weights).logsumexp(1).mean()
        assert one.item() == pytest.approx(two.item(), rel=1e-5)
        grads = [torch.autograd.grad(value, (plan.U, plan.d, plan.r), retain_graph=True) for value in (one, two)]
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads))


# ------------------------------------------------------------------------------------------------ in main directions

def gaussians(rank, eps=0.1):
    """-> MainPlan of two sets of tiny images and its closed form in pixel space: S0, S1 (with the noise), means."""
    torch.manual_seed(0)
    noise = 0.1
    x, y = (torch.randn(400, 12) @ torch.randn(12, 12) / 3 + torch.randn(12) for _ in range(2))
    base = MainPlan(x.view(-1, 3, 2, 2), y.view(-1, 3, 2, 2), eps, rank, (0.01 ** 2, noise ** 2), (5e-7 / eps, None))
    S0, S1 = (s.double().T.cov(correction=0) + n ** 2 * torch.eye(12) for s, n in ((x, 0.01), (y, noise)))
    return base, S0, S1, x.double().mean(0), y.double().mean(0)


def test_main_plan_is_the_plan_between_gaussians_in_pixel_space_with_noise():
    eps = 0.1
    base, S0, S1, m0, m1 = gaussians(12, eps)
    T = gaussian_map(S0, S1, eps)
    x = torch.randn(2, 3, 2, 2)
    draws = base.draw(x.repeat_interleave(20000, 0)).flatten(1).double().view(2, 20000, 12)
    expected = m1 + (x.flatten(1).double() - m0) @ T
    scale = (eps * T.diagonal()).sqrt()
    assert ((draws.mean(1) - expected).abs() / scale).max() < 0.03  # four standard errors
    assert torch.allclose(base.map(x).flatten(1).double(), expected, atol=1e-4)
    covariance = draws[0].T.cov()
    assert ((covariance - eps * T).abs() / scale.outer(scale)).max() < 0.04
    # so the law of y over Gaussian x is N(m1, S1): T S0 T + eps T = S1
    assert torch.allclose(T @ S0 @ T + eps * T, S1, atol=1e-8)


def test_main_plan_f_is_the_log_density_of_its_draws():
    """exp((f(y) - |x-y|^2/2)/eps) is proportional to the density that draw follows: at 40 points, for two x."""
    eps = 0.1
    base, S0, S1, m0, m1 = gaussians(12, eps)
    T = gaussian_map(S0, S1, eps)
    for x in torch.randn(2, 1, 3, 2, 2):
        y = base.draw(x.expand(40, -1, -1, -1))
        log_p = (base(y) - (y - x).square().flatten(1).sum(1) / 2).double() / eps
        away = y.flatten(1).double() - (m1 + (x.flatten(1).double() - m0) @ T)
        exact = -((away @ torch.linalg.inv(T)) * away).sum(1) / (2 * eps)
        assert (log_p - exact - (log_p - exact).mean()).abs().max() < 0.02


def test_main_plan_along_a_mixture_s_plan():
    """f(y, along) too is the log density of its draws: the mixture's along V times the Gaussian's outside."""
    eps, unit = 0.1, 1.7
    base = gaussians(5, eps)[0]
    two = Mixture(5, 2, 0, eps / unit ** 2)
    two.d.copy_(0.3 + torch.rand(2, 5))
    two.r.copy_(torch.randn(2, 5))
    along = Plan(two, torch.randn(5).double(), torch.randn(5).double(), unit)
    for x in torch.randn(2, 1, 3, 2, 2):
        y = base.draw(x.expand(40, -1, -1, -1), along)
        log_p = (base(y, along) - (y - x).square().flatten(1).sum(1) / 2).double() / eps
        (p_x, o_x), (p, o) = base.parts(x[None]), base.parts(y)
        away = (o - base.r_o - base.S_o * o_x).square().sum(1).double() / (2 * eps * base.S_o)
        exact = along.log_density(p_x.expand(40, -1), p) - away
        assert (log_p - exact - (log_p - exact).mean()).abs().max() < 0.01
        assert away.mean().item() == pytest.approx(3.5, abs=1)  # half of 7 directions
    many = base.parts(base.draw(x.expand(20000, -1, -1, -1), along))[0]
    assert torch.allclose(many.mean(0).double(), along.mean(p_x)[0], atol=0.02)


def test_main_plan_outside_its_directions_is_isotropic_and_keeps_the_mean():
    base, S0, S1, m0, m1 = gaussians(5)
    V = base.V.double()
    assert torch.allclose(V.T @ V, torch.eye(5).double(), atol=1e-5)
    rest = torch.eye(12).double() - V @ V.T
    s0, s1 = ((rest @ S @ rest).trace() / 7 for S in (S0, S1))
    single = gaussian_map(s0.view(1, 1), s1.view(1, 1), 0.1).item()
    assert base.S_o.item() == pytest.approx(single, rel=1e-4)
    at_mean = base.draw(m0.float().view(1, 3, 2, 2).expand(20000, -1, -1, -1)).flatten(1).double()
    assert (at_mean.mean(0) - m1).abs().max() < 0.02
    o = at_mean @ rest
    assert o.var(0).sum().item() == pytest.approx(0.1 * single * 7, rel=0.03)


@pytest.mark.parametrize("rank", [5, 12])
def test_gradient_of_the_main_plan(rank):
    """y - V S^-1 (p - r) - (o - r_o)/S_o."""
    base = gaussians(rank)[0]
    y = torch.randn(6, 3, 2, 2, requires_grad=True)
    p, o = base.parts(y.detach())
    by_hand = p @ base.V.T + o - ((p - base.r) / base.S) @ base.V.T
    by_hand -= (o - base.r_o) @ (torch.eye(12) - base.V @ base.V.T) / base.S_o
    gradient, = torch.autograd.grad(base(y).sum(), y)
    assert torch.allclose(gradient.flatten(1), by_hand, rtol=1e-3, atol=2e-3 * by_hand.abs().max().item())


def test_main_plan_at_eps_0_is_the_optimal_map_between_gaussians():
    """x gets the mean and covariance of y by a symmetric matrix, and T(x) minimises |x-y|^2/2 - f(y)."""
    torch.manual_seed(0)
    x, y = ((torch.randn(500, 4) @ torch.randn(4, 4) + torch.randn(4)).view(-1, 1, 2, 2) for _ in range(2))
    start = MainPlan(x, y, 1e-6, 4, (1e-4, 1e-4), (1e-3, 1e3), outside=False, correction=1)
    made = start.map(x)
    assert torch.allclose(made.mean(0), y.mean(0), atol=1e-3)
    assert torch.allclose(start.V.T @ start.V, torch.eye(4), atol=1e-5)  # S along V: a symmetric matrix
    assert torch.allclose(torch.cov(made.flatten(1).T), torch.cov(y.flatten(1).T), atol=1e-2)
    made.requires_grad_(True)
    slope, = torch.autograd.grad((quadratic_cost(x, made) - start(made)).sum(), made)
    assert slope.abs().max() < 1e-2 and start.S.min() > 0
    start = MainPlan(x, y, 1e-6, 2, (1e-4, 1e-4), (0.9, 1.1), outside=False)
    moves = (start.map(x) - x).flatten(1)
    assert torch.allclose(moves, moves @ start.V @ start.V.T, atol=1e-5)  # outside V it is the identity
    assert start.S.min() >= 0.899 and start.S.max() <= 1.101


# ------------------------------------------------------------------------------------------------ the fit

def test_log_sum_is_logsumexp_and_softmax():
    terms = 100 * torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    log_of_sum, share = log_sum(terms)
    assert torch.allclose(log_of_sum, terms.logsumexp(1, keepdim=True)) and torch.allclose(share, terms.softmax(1))


def test_one_component_is_the_gaussian_plan():
    torch.manual_seed(0)
    x, y, eps = torch.randn(5000, 3) @ torch.randn(3, 3), torch.randn(5000, 3) @ torch.randn(3, 3) + 2, 0.3
    plan = gaussian_plan(x, y, eps)
    S0, S1 = (torch.cov(z.T.double(), correction=0) for z in (x, y))
    T = gaussian_map(S0, S1, eps)
    assert torch.allclose(T @ S0 @ T + eps * T, S1, atol=1e-8)
    assert torch.allclose((plan.R @ plan.R.T).double(), T, rtol=1e-2, atol=1e-3)  # the prior is 3 of 5 000 rows
    m0, m1 = x.mean(0), y.mean(0)
    assert torch.allclose(plan.mean(m0[None])[0], m1, atol=1e-3)
    alone = plan.kept()
    ascent.ascend(plan, x, y, (x, y), 0.0, 20)
    for name, value in plan.kept().items():  # stationary: the ascent leaves it, but for the prior
        assert torch.allclose(value, alone[name], atol=0.02)


def test_a_mixture_is_fitted_to_the_plan_it_came_from():
    torch.manual_seed(0)
    true, x = mixture_1d(), torch.randn(40_000, 1)
    y = true.sample(x)
    (plan, of_one, clear), = anneal(x[4000:], y[4000:], (x[:4000], y[:4000]), [true.eps], sizes=(3,))
    assert clear and gain_of(plan, of_one, x, y)[0] > 0.1
    assert plan.objective(x, y).item() == pytest.approx(true.objective(x, y).item(), abs=2e-3)
    points = torch.tensor([-1.5, 0.0, 1.5])
    for found, exact in zip(conditional_1d(plan, plan.eps, points)[1:], conditional_1d(true, true.eps, points)[1:]):
        assert torch.allclose(found, exact, atol=0.05)


def cell_like(n, dim=5, seed=0):
    """Unequal clusters with heavy tails, which move, grow and shrink from X to Y."""
    rng = np.random.default_rng(seed)
    centre, shift = 3 * rng.standard_normal((6, dim)), rng.standard_normal((6, dim))

    def day(share, time):
        k = rng.choice(6, n, p=share)
        return centre[k] + time * shift[k] + 0.5 * rng.standard_normal((n, dim)) / np.sqrt(rng.chisquare(5, (n, 1)) / 5)

    return [torch.tensor(day(rng.dirichlet(np.full(6, 0.6)), t)).float() for t in (0, 1)]


def test_the_objective_never_falls_over_a_stage_and_masses_agree(monkeypatch):
    torch.manual_seed(0)
    x, y = cell_like(500)
    x, y = x - x.mean(0), y - y.mean(0)
    stages, ascend = [], ascent.ascend

    def watched(self, x, y, *rest):
        before = self.objective(x, y).item()
        ascend(self, x, y, *rest)
        stages.append((self.eps, before, self.objective(x, y).item()))

    monkeypatch.setattr(ascent, "ascend", watched)
    (plan, of_one, _), (small, *_) = anneal(x[100:], y[100:], (x[:100], y[:100]), [0.3, 0.03], sizes=(5,))
    assert len(stages) >= 5 and all(after >= before - 1e-3 * abs(before) for _, before, after in stages)
    for found in (plan, small):
        w, v = found.log_w(x[100:]).softmax(1).mean(0), found.log_v(y[100:]).softmax(1).mean(0)
        assert (w - v).abs().sum() < 0.01
    assert plan.eps == pytest.approx(0.3) and small.eps == pytest.approx(0.03)
    assert gain_of(plan, of_one, x, y)[0] > 0.5
    pushed = small.sample(x)
    assert 2 * torch.cdist(pushed, y).mean() - torch.cdist(pushed, pushed).mean() - torch.cdist(y, y).mean() < 0.06


def test_mixtures_are_clearly_better_of_clusters_not_of_gaussians():
    torch.manual_seed(0)
    x, y = torch.randn(2000, 3), torch.randn(2000, 3) * torch.tensor([0.5, 1.0, 2.0])
    for sets, clear, tried in (((x, y), False, {5}), (cell_like(1000, dim=3), True, {5, 16})):
        near, rest, seen = *zip(*((z[:-800], z[-800:]) for z in sets)), set()
        assert [more for *_, more in anneal(*rest, near, [1.0, 0.5], lambda p, *_: seen.add(len(p.r)))] == [clear] * 2
        assert seen == tried  # 800 rows carry 16 components


def test_the_best_of_the_starts_goes_on_and_wide_stages_are_longer(monkeypatch):
    """S_k of full rank: with three times FULL_COLUMNS columns a stage takes three times the steps."""
    torch.manual_seed(0)
    for dim, rows, times in ((48, 8000, 3), (48, 1000, 1), (8, 8000, 1)):  # 1 000 rows carry no full rank of 48
        x, y = torch.randn(rows, dim), torch.randn(rows, dim) + 4 * torch.eye(5, dim)[torch.randint(5, (rows,))]
        starts, climbed, whole = [], [], ascent.start
        monkeypatch.setattr(ascent, "start", lambda *rest: starts.append(whole(*rest)) or starts[-1])
        monkeypatch.setattr(ascent, "ascend", lambda plan, *rest: climbed.append((plan.kept(), rest[-1])))
        monkeypatch.setattr(ascent, "settle", lambda *rest: None)
        (plan, *_), = anneal(x, y, (x[:99], y[:99]), [1.0], sizes=(5,), steps=(7, 2, 5))
        values = [start.objective(x, y).item() for start in starts]
        assert len(values) == 5 and max(values) - min(values) > 1e-3  # k-means had more luck in some than in others
        best = starts[values.index(max(values))]
        assert climbed[0][1] == 7 and torch.equal(climbed[0][0]["U"], best.U)  # cool leaves U
        assert climbed[-1][1] == max(2 * times, 5)
        assert {steps for _, steps in climbed[1:-1]} == {2 * times}
        monkeypatch.undo()


def test_the_last_steps_learn_from_the_rows_that_chose_too():
    torch.manual_seed(0)
    x, y = cell_like(600, dim=3)
    (plan, *_), = anneal(x[200:], y[200:], (x[:200], y[:200]), [1.0], sizes=(5,))
    masses = lambda: (plan.log_w(x).softmax(1).mean(0) - plan.log_v(y).softmax(1).mean(0)).abs().sum().item()
    before, value = masses(), plan.objective(x, y)
    ascent.finish(plan, x, y)
    assert masses() < 1e-3 < 1e-2 < before and plan.objective(x, y) > value + 0.01


@pytest.mark.parametrize("climb", [lambda *rows: ascent.ascend(*rows, 0.0, 100), ascent.settle])
def test_the_fit_ends_where_the_gradient_is_zero(climb):
    """By autograd of the objective as it is written, each parameter in its own scale."""
    torch.manual_seed(0)
    x, y = cell_like(400, dim=2)
    x, y = x - x.mean(0), y - y.mean(0)
    plan = Mixture(2, 4, 2, 2.0)
    ascent.start(plan, x, y, 0.01)
    sizes = []
    for _ in range(5):
        state = plan.kept()
        for name in ("log_a", "r", "d", "U"):
            setattr(plan, name, state[name].requires_grad_())
        (plan.objective(x, y) / plan.eps).backward()
        scales = 1.0, (plan.eps * plan.d).sqrt(), plan.d, plan.d.sqrt()[..., None]
        grads = [getattr(plan, name).grad for name in ("log_a", "r", "d", "U")]
        sizes.append(max((scale * grad).abs().max().item() for scale, grad in zip(scales, grads)))
        for name in ("log_a", "r", "d", "U"):
            setattr(plan, name, getattr(plan, name).detach())
        climb(plan, x, y, (x, y))
    assert sizes[-1] < 1e-3 < 0.1 < sizes[0]


def test_a_large_prior_leaves_the_plan_within_the_parts():
    """The prior is least where S_k is I in the basis, whatever its diagonal and U share of it."""
    torch.manual_seed(0)
    x, y = cell_like(400, dim=3)
    plan = Mixture(3, 4, 2, 2.0)
    ascent.start(plan, x, y, 0.01)
    away = []
    for prior in (0.0, 0.3, 1000.0):
        plan.d, plan.U = torch.full((4, 3), 0.5), 0.4 * torch.randn(4, 3, 2)
        for _ in range(3):
            ascent.ascend(plan, x, y, (x, y), prior, 100)
        S = plan.d.diag_embed() + plan.U @ plan.U.mT
        assert torch.allclose(plan.log_det()[0], torch.logdet(S), atol=1e-4)
        away.append((S - torch.eye(3)).abs().max().item())
    assert away[2] < 0.02 < away[1] < away[0]


def test_balance_equals_masses_and_ascends():
    torch.manual_seed(0)
    x, y = cell_like(500)
    x, y = x - x.mean(0), y - y.mean(0)
    plan = Mixture(5, 6, 2, 0.5)
    ascent.start(plan, x, y, 0.01)
    plan.log_a += torch.randn(6)
    before = plan.objective(x, y)
    ascent.balance(plan, x, y, steps=60)
    assert plan.objective(x, y) > before
    assert (plan.log_w(x).softmax(1).mean(0) - plan.log_v(y).softmax(1).mean(0)).abs().sum() < 2e-3


def test_of_many_rows_the_fit_comes_near_to_the_exact_plan():
    """pi(y|x) ~ N(y; x, eps I) sum_k N(y; mu_k, Sig_k) is exact for its own y (Gushchin et al., 2023).  What the fit
    gains over one Gaussian on fresh rows is most of what is to be gained."""
    torch.manual_seed(0)
    eps, dim, n = 0.1, 16, 40_000
    mu = 5 * torch.nn.functional.normalize(torch.randn(5, dim), dim=1)
    turn = torch.linalg.qr(torch.randn(5, dim, dim))[0]
    Sig = turn * 4 ** (torch.rand(5, 1, dim) - 0.5) @ turn.mT
    at_x = torch.distributions.MultivariateNormal(mu, Sig + eps * torch.eye(dim))
    C = torch.linalg.inv(torch.eye(dim) / eps + torch.linalg.inv(Sig))

    def rows(n):
        x = torch.randn(n, dim)
        k = at_x.log_prob(x[:, None]).softmax(1).multinomial(1).squeeze(1)
        mean = torch.einsum("nde,ne->nd", C[k], x / eps + torch.linalg.solve(Sig, mu[..., None]).squeeze(2)[k])
        return x, torch.distributions.MultivariateNormal(mean, C[k]).sample()

    def exact(x, y):
        log_v = torch.distributions.MultivariateNormal(mu, Sig).log_prob(y[:, None]).logsumexp(1)
        log_z = at_x.log_prob(x[:, None]).logsumexp(1) + dim / 2 * math.log(2 * math.pi * eps)
        return eps * (log_v.mean() - log_z.mean())

    near, fresh = rows(4000), rows(20_000)
    (found, of_one, _), = anneal(*rows(n), near, [eps], sizes=(5,))
    share = (found.objective(*fresh) - of_one.objective(*fresh)) / (exact(*fresh) - of_one.objective(*fresh))
    assert 0.8 < share < 1.01


# ------------------------------------------------------------------------------------------------ in the data's units

def test_a_plan_in_any_unit_is_the_same():
    x, y = (z.double() for z in cell_like(400, dim=3))
    lines = []
    for unit, shift in ((1.0, 0.0), (1e3, 7e3)):
        torch.manual_seed(0)
        plan = ascent.fit(unit * x + shift, unit * y + shift, eps=0.3 * unit ** 2)
        assert isinstance(plan, Plan) and plan.eps == pytest.approx(0.3 * unit ** 2)
        at = unit * x[:5] + shift
        lines.append(((plan.mean(at) - shift) / unit, plan.log_density(at, unit * y[:5] + shift) + 3 * math.log(unit)))
        noise = mixture.bridge(at.repeat(9000, 1), at.repeat(9000, 1), 0.25, plan.eps) - at.repeat(9000, 1)
        assert noise.var().item() == pytest.approx(0.25 * 0.75 * plan.eps, rel=0.02)
    for a, b in zip(*lines):
        assert torch.allclose(a, b, rtol=1e-2, atol=2e-2)
    x, y = x[:60], y[:60]  # so few have one Gaussian's plan, at once
    share = noise_shares(torch.cov(x.T), torch.cov(y.T))[0]
    assert share(ascent.fit(x, y, share=0.3).eps) == pytest.approx(0.3, rel=1e-3)
