"""pairs.py: the known plans are plans, the scores by hand, the table through the user's door."""
import os
import subprocess
import sys

import pytest
import torch

import truth
from conftest import here


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The script's globals, and what it printed, of its smoke run, which starts train_points.py in this process."""
    def in_process(argv, cwd):
        assert argv[0] == sys.executable
        patch.chdir(cwd)
        here(*argv[1:])
        return subprocess.CompletedProcess(argv, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", in_process)
        output, values = here("pairs.py", "--smoke", "--device", "cpu", "--out", tmp_path_factory.mktemp("pairs"))
    return {**values, "output": output}


@pytest.mark.parametrize("components, eps", [(1, 0.3), (5, 0.3)])
def test_known_plans_are_plans(pairs, components, eps):
    """Known's conditional sends P to a Q for which Sinkhorn's condition holds: f does not depend on x."""
    torch.manual_seed(0)
    known = pairs["Known"](2, eps, components)
    x, y = known.source(4), known.target(6)
    w, m = known.given(x)
    d = y[None, :, None] - m[:, None]  # (x, y, k, D)
    inverse = torch.linalg.inv(known.C)
    log_p = torch.logsumexp(w.log()[:, None] - torch.einsum("xykd,kde,xyke->xyk", d, inverse, d) / 2
                            + torch.linalg.slogdet(inverse)[1] / 2, 2)
    f_less_z = log_p + torch.cdist(x, y).square() / (2 * eps)  # (f(y) - eps log Z(x)) / eps
    mixed = f_less_z - f_less_z[:1] - f_less_z[:, :1] + f_less_z[:1, :1]
    assert mixed.abs().max() < 1e-8


def test_exact_answers_have_the_floor_and_wrong_ones_do_not(pairs):
    torch.manual_seed(0)
    known = pairs["Known"](3, 0.5, 5)
    x = known.source(20)
    exact = known.draw(x, 500)
    right, wrong = known.scores(x, exact), known.scores(x, exact + 1)
    assert right["cond_uvp"] == pytest.approx(right["cond_floor"], rel=0.3)
    assert wrong["cond_uvp"] == pytest.approx(100 * 3 / known.target(20_000).var(0).sum().item(), rel=0.15)


def test_answers_in_one_dimension_are_scored(pairs):
    torch.manual_seed(0)
    known = pairs["Known"](1, 0.5, 1)
    x = known.source(20)
    off = known.draw(x, 500) + 1
    assert known.scores(x, off)["cond_uvp"] == pytest.approx(100 / known.target(20_000).var(0).sum().item(), rel=0.15)


@pytest.mark.parametrize("law", [truth.swiss_roll, truth.knot])
def test_another_discrete_plan_of_independent_parts_scores_about_one(pairs, law):
    torch.manual_seed(3)
    dim = 2 * law(1).shape[1]
    known = pairs["Parts"](dim, 0.3, law)
    x, y = known.source(5), known.target(1)
    assert torch.allclose(known.of_each(y).square().sum(), y.square().sum())  # one rotation
    a, b = torch.randn(200, dim // 2).double(), law(200).double()
    _, g, _ = truth.solve(torch.cdist(a, b).square() / 2, 0.3)
    weights = truth.conditional(known.of_each(x).flatten(0, 1), b, g, 0.3)
    of_each = b[torch.multinomial(weights, 400, replacement=True)].view(2, 5, 400, -1)
    answer = torch.cat([*of_each], 2) @ known.rotation.T
    assert 0.3 < known.scores(x, answer)["cond_ratio"] < 3
    assert known.scores(x, answer + 1)["cond_ratio"] > 10


def test_cells_are_alike_from_draw_to_draw_and_move_from_day_to_day(pairs):
    cells = pairs["Cells"](6, 8000)  # so 800 rows are behind the floor
    x = cells.source(800)
    right, stayed = (cells.scores(x, torch.stack([half_way, y], 1)[:, None])
                     for half_way, y in ((cells.day(800, 0.5), cells.target(800)), (x, x)))
    assert abs(right["energy_ratio"] - 1) < 5 * right["error"]
    assert stayed["energy_ratio"] > 10
    assert abs(right["between"]) < stayed["between"] / 5
    deviations = cells.source(4000).std(0)
    assert deviations[0] > 2.5 * deviations[5]  # they fall over the columns, by 6^0.75
    away = (cells.source(20_000) - cells.source(4000).mean(0)).abs().amax(0) / deviations
    assert away.max() > 6  # heavy tails


def test_the_table_goes_through_the_user_s_door(pairs):
    lines = [line.split() for line in pairs["output"].splitlines() if line.startswith("final pair")]
    assert [line[2] for line in lines] == ["gauss", "rolls", "cells", "cells"]  # these two of one fit
    scores = [dict(zip(line[11::2], map(float, line[12::2]))) for line in lines]
    assert scores[0]["cond_uvp"] < 5 and scores[1]["cond_ratio"] < 9 and scores[2]["energy_ratio"] < 4
    assert scores[2]["discrete_energy_ratio"] == scores[3]["discrete_energy_ratio"] != scores[3]["energy_ratio"]
    for folder in (name for name in os.listdir(pairs["args"].out) if name.startswith("pair_")):
        held = os.listdir(os.path.join(pairs["args"].out, folder))
        assert {"X.npy", "Y.npy", "NEW.npy"} < set(held)
        assert sum(name.endswith("_mapped.npy") for name in held) == (2 if "cells" in folder else 1)
