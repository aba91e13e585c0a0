"""Discrete plans against a long Sinkhorn, distances by hand."""
import math

import numpy as np
import ot
import pytest
import torch

import truth


def samples(n, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, generator=generator).double(), shift + truth.swiss_roll(n, generator).double()


def test_swiss_roll_has_its_moments():
    y = truth.swiss_roll(200_000, torch.Generator().manual_seed(0))
    assert y.mean(0).tolist() == pytest.approx([2 / 8, 2 / (3 * math.pi) / 8], abs=0.01)
    assert y.square().sum(1).mean().item() == pytest.approx((9.75 * math.pi ** 2 + 0.5) / 64, rel=0.01)


# ------------------------------------------------------------------------------------------------ discrete plans

@pytest.mark.parametrize("eps", [1.0, 0.02])
def test_solve_against_a_long_sinkhorn(eps):
    x, y = samples(120)
    found, g, error = truth.solve(torch.cdist(x, y).square() / 2, eps)
    weight = np.full(len(x), 1 / len(x))
    plan = ot.sinkhorn(weight, weight, (torch.cdist(x, y).square() / 2).numpy(), eps, method="sinkhorn_log",
                       numItermax=20_000, stopThr=1e-9)
    exact = torch.from_numpy(plan) * len(x)
    assert error < 1e-4 and g.dtype == torch.float64 and (found * len(x) - exact).abs().sum(1).mean() < 1e-3
    assert (truth.conditional(x, y, g, eps) - exact).abs().sum(1).mean() < 1e-3  # of 2 at the most
    new = torch.tensor([[0.3, -1.0]])  # beyond the sample: by the definition
    by_hand = (g - g.max() - (new - y).square().sum(1) / 2).div(eps).exp()
    assert torch.allclose(truth.conditional(new, y, g, eps)[0], by_hand / by_hand.sum())


def test_a_solve_in_closed_form():
    """Of two pairs, crossed at cost c, the plan is [[a, 1/2 - a], [1/2 - a, a]], a = 1/2 / (1 + e^(-c/eps))."""
    cost = torch.tensor([[0.0, 3.0], [3.0, 0.0]]).double()
    plan, _, error = truth.solve(cost, 1.0)
    assert (plan * cost).sum().item() == pytest.approx(3 / (1 + math.exp(3)), rel=1e-3) and error < 1e-4


def test_the_solution_solves_schroedinger_s_system():
    """At the optimum each potential is the soft transform of the other, so both marginals hold; here the second's."""
    x, y = samples(120)
    cost = torch.cdist(x, y).square() / 2
    _, g, _ = truth.solve(cost, 0.1)
    soft = lambda potential, cost: -0.1 * (((potential - cost) / 0.1).logsumexp(1) - math.log(120))
    assert torch.allclose(soft(soft(g, cost), cost.T), g, atol=1e-4)


def test_references_are_of_fresh_samples_and_kept(tmp_path, capsys):
    """The potential of two kept references: of the samples that the laws draw from the seed, by solve."""
    shifted = lambda n, generator: normal(n, generator) + 3
    normal = lambda n, generator: torch.randn(n, 2, generator=generator)
    y, g = truth.reference(normal, truth.swiss_roll, 40, 0.1, 0, tmp_path)
    x, targets = samples(40)
    assert torch.equal(y, targets) and torch.equal(g, truth.solve(torch.cdist(x, y).square() / 2, 0.1)[1])
    assert capsys.readouterr().out.count("solving") == 1
    for kept, new in zip(truth.reference(normal, truth.swiss_roll, 40, 0.1, 0, tmp_path), (y, g)):
        assert torch.equal(kept, new) and "solving" not in capsys.readouterr().out
    for law, eps, seed in ((shifted, 0.1, 0), (normal, 0.2, 0), (normal, 0.1, 1)):  # each in a file of its own
        assert not torch.equal(truth.reference(law, truth.swiss_roll, 40, eps, seed, tmp_path)[1], g)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_solve_that_has_not_converged_or_cannot_be_kept_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(truth, "solve", lambda cost, eps: (cost, torch.zeros(len(cost)).double(), math.nan))
    truth.reference(truth.swiss_roll, truth.swiss_roll, 40, 0.1, 0, tmp_path / "missing")
    output = capsys.readouterr().out
    assert "warning: not converged" in output and "warning: cannot write" in output


# ------------------------------------------------------------------------------------------------ distances

def test_quantiles_of_weighted_points_and_sliced_w2():
    directions = truth.directions_2d(4)
    points = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [5.0, 5.0]])
    weights = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.5, 0.0]]).double()  # the third is seen by none
    q = truth.quantiles(weights, points, 4, directions)
    assert q.shape == (2, 4, 4)
    assert q[:, :, 0].tolist() == [[-1, -1, -1, 2], [-1, -1, 2, 2]]
    assert torch.allclose(q[:, :, 2], torch.zeros(2, 4), atol=1e-6)  # the second coordinate, 0 in all
    x, _ = samples(400)
    uniform = torch.full((1, 400), 1 / 400).double()
    a, b = (truth.quantiles(uniform, x + torch.tensor(shift), 300, directions) for shift in ([0.0, 0.0], [3.0, 4.0]))
    between = 25 / 2  # |shift . u|^2 over half a turn
    assert truth.sliced_w2_and_floor(a, [a, b]) == pytest.approx((between / 2, between), rel=1e-4)


def test_map_ratio_by_hand():
    x, near, far = torch.randn(30, 2), torch.tensor([0.1, 0.0]), torch.tensor([0.0, 0.3])
    means = x + near, x - far
    assert truth.map_ratio(x + near, means) == pytest.approx(0.5, rel=1e-4)  # a reference itself: error 0 and the floor
    assert truth.map_ratio(x + (near - far) / 2, means) == pytest.approx(0.25, rel=1e-4)  # their middle


def test_w2_of_shifted_samples_and_its_ratio():
    x, _ = samples(50)
    shuffled = x.flip(0)
    assert truth.w2(x, shuffled + torch.tensor([3.0, 4.0])) == pytest.approx(25)  # a shift is optimal for |x-y|^2
    e = torch.tensor([1.0, 0.0])
    assert truth.w2_ratio([shuffled + 2 * e], [x, x + e]) == pytest.approx((4 + 1) / 2)


def test_the_distance_of_gaussians_by_hand():
    def to(cloud, mean, S):
        return truth.gaussian_w2(cloud.mean(0), torch.cov(cloud.T, correction=0), mean, S)

    corners = torch.tensor([[1.0, 1.0], [1, -1], [-1, 1], [-1, -1]]).double()  # mean 0, covariance I
    eye, no = torch.eye(2).double(), torch.zeros(2).double()
    assert to(corners, no, eye) == pytest.approx(0, abs=1e-10)
    assert to(corners + torch.tensor([0.3, 0.4]), no, eye) == pytest.approx(0.25)
    long = torch.diag(torch.tensor([4.0, 1.0])).double()
    assert to(corners, no, long) == pytest.approx(1)  # (2 - 1)^2
    turn = torch.tensor([[math.cos(0.5), -math.sin(0.5)], [math.sin(0.5), math.cos(0.5)]]).double()
    wide, S = corners * torch.tensor([2.0, 1.0]), turn @ long @ turn.T
    fidelity = math.sqrt((long @ S).trace() + 2 * 4)  # 2 x 2: sqrt(tr P + 2 sqrt(det P))
    assert to(wide, no, S) == pytest.approx(10 - 2 * fidelity)
