"""The toy: its jumps are exact, its scores those of known plans, its files as it says."""
import math

import pytest
import torch
from conftest import checkpoint, final, whole, written
from test_common import Bimodal, joint_statistics

import common
import truth

NAME = "toy_eps0.1_seed0_smoke"


@pytest.fixture(scope="module")
def toy():
    """The globals of a tiny run."""
    return whole(NAME)[2]


WIDTHS = torch.tensor([0.3, 0.1, 0.3, 1, 1, 0.7, 0.2])[:, None]
CENTRES = {
    "few, far off": lambda f: (torch.randn(3, 2), torch.full((3, 1), 0.5)),
    "many": lambda f: (f.m[torch.randint(2, (64,))] + 0.3 * torch.randn(64, 2), torch.full((64, 1), 0.2)),
    "of several widths": lambda f: (torch.cat([f.m[[0, 1, 1]], torch.randn(4, 2)]), WIDTHS),
}


@pytest.mark.parametrize("name", CENTRES)
def test_a_jump_leaves_the_exact_joint_law_unchanged(toy, name):
    torch.manual_seed(0)
    f, n = Bimodal(), 200
    statistics = []
    for _ in range(200):  # blocks with jumps of their own: chains that share proposals are not independent
        x = torch.randn(n, 2)
        y = f.exact(x)
        for _ in range(6):
            y, _ = toy["jump"](f, x, y, *CENTRES[name](f), f.eps)
        statistics.append(joint_statistics(x, y))
    x = torch.randn(400_000, 2)
    exact = joint_statistics(x, f.exact(x))
    statistics = torch.stack(statistics)
    error = statistics.std(0) / len(statistics) ** 0.5
    assert ((statistics.mean(0) - exact).abs() < 4.5 * error + 0.003).all(), (statistics.mean(0), exact, error)
    assert error.max() < 0.015


def test_jumps_equalise_modes_that_langevin_cannot_connect(toy):
    torch.manual_seed(0)
    f = Bimodal(m=((-1.0, 0.0), (1.0, 0.0)), s=0.05)
    x = 0.2 * torch.randn(4000, 2)
    start = torch.tensor([-1.0, 0.0]).repeat(len(x), 1)
    stuck = common.langevin(f, x, start, f.eps, 0.002, 100)[0]
    assert (stuck[:, 0] > 0).float().mean() < 0.01
    y, masses = start, []
    for step in range(120):
        y, log_p, _ = common.langevin(f, x, y, f.eps, 0.002, 1)
        y, moved = toy["jump"](f, x, y, f.m[torch.randint(2, (64,))], torch.full((64, 1), 0.05), f.eps, log_p)
        masses.append((y[:, 0] > 0).float().mean().item())
    exact = (f.exact(x.repeat(20, 1))[:, 0] > 0).float().mean().item()
    assert sum(masses[20:]) / 100 == pytest.approx(exact, abs=0.015) and moved > 0.5


def test_the_proposals_density_and_the_term_drawn_of_it(toy):
    torch.manual_seed(0)
    centres, point = torch.randn(7, 2), torch.tensor([[0.3, -0.2]])
    terms = -(point - centres).square().sum(1) / (2 * WIDTHS[:, 0] ** 2) - 2 * WIDTHS[:, 0].log()
    log_q, j = toy["log_mixture"](point.expand(100_000, 2), centres, WIDTHS)
    assert torch.allclose(log_q, terms.logsumexp(0), atol=1e-4)  # whichever term was drawn
    assert torch.allclose(torch.bincount(j.squeeze(1), minlength=7) / len(j), terms.softmax(0), atol=0.007)


def test_scores_of_a_reference_itself_are_half(toy):
    """With a reference in place of the learned plan its error is 0 against itself and the floor against the other."""
    assert toy["bary_ratio"](*toy["references"][0]) == pytest.approx(0.5)
    for q in toy["exact"]:
        w2, floor = truth.sliced_w2_and_floor(q, toy["exact"])
        assert w2 == pytest.approx(floor / 2) and floor > 0


def test_what_a_run_writes(toy):
    folder, output, _ = whole(NAME)
    names = written(folder)
    assert {f"{NAME}.pt", f"{NAME}.png"} <= names
    assert sum(name.startswith("reference_eps0.1_") and name.endswith(".npz") for name in names) == len(names) - 2 == 2
    numbers = final(output)
    assert all(map(math.isfinite, numbers.values()))
    assert numbers["cond_ratio"] == pytest.approx(numbers["cond_w2"] / numbers["cond_floor"], rel=0.01)
    state = checkpoint(folder, NAME)
    assert state["step"] == toy["STEPS"] == state["constants"]["STEPS"]
    f = common.MLP(2, toy["WIDTH"], toy["DEPTH"], toy["SCALE"])
    f.load_state_dict(state["f_avg"])
    grid, learned, _ = toy["learned_on_a_grid"](0.5)
    assert torch.allclose(f(grid), learned, atol=1e-5)
