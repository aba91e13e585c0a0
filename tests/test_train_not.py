"""train_not.py: the losses and the inverse against closed forms, the scores by hand, a divergence."""
import math
import os
import re

import pytest
import torch
from PIL import Image

import common
import images
from conftest import checkpoint, final, here, refuses, smoke, whole, written
from run import Run


@pytest.fixture
def toy_globals():
    """The toy script's globals, to be changed by monkeypatch.setitem; its functions read them."""
    torch.manual_seed(0)
    return whole("not_moons_strong_convex1_seed0_smoke")[2]["transport"].__globals__


def test_not_diverging_is_said_and_the_good_checkpoint_kept(tmp_path, monkeypatch):
    update_ema, calls = common.update_ema, [0]

    def poisoned(average, net, *a, **more):
        calls[0] += 1
        if calls[0] == 6:
            next(net.parameters()).data.fill_(float("nan"))
        return update_ema(average, net, *a, **more)

    monkeypatch.setattr(common, "update_ema", poisoned)
    due = Run.due

    def late(self):
        self.saved = -60.0  # as if the last save were long ago: it saves at each step
        return due(self)

    monkeypatch.setattr(Run, "due", late)
    name = "not_moons_strong_convex1_seed0_smoke"
    refuses(smoke(name, tmp_path, code=2)[0], "diverged", "step 6", "checkpoint is kept", "T_STEPS")
    kept = checkpoint(tmp_path, name)
    assert kept["step"] == 5 and all(v.isfinite().all() for part in ("nets", "averages") for v in kept[part].values())


@pytest.mark.parametrize("bad", [["--cost", "x"], ["--convex", "-1"], ["--convex", "nan"], ["--convex", "inf"],
                                 ["--convex", "1e300"], ["--convex", "much"], ["--data-set", "mnist"], ["--eps", "1"],
                                 ["--data-set", "moons", "roll"], ["--data-set", ".", ".", "."], ["--data", "."],
                                 ["--side", "64"], ["--data", ".", "--data-set", "."], ["--side", "33"]])
def test_not_bad_command_lines(bad, tmp_path):
    refuses(here("train_not.py", "--out", tmp_path, *bad, code=2)[0], "unrecognized" if bad[0] == "--eps" else bad[0])


def folders(path, varied=True):
    """A and B: 40 and 30 images of 40 x 32 pixels, each a colour over black; without `varied` those of A are alike."""
    torch.manual_seed(0)
    for name, n in (("A", 40), ("B", 30)):
        (path / name).mkdir()
        colours = torch.randint(256, (n if varied or name == "B" else 1, 1, 1, 3), dtype=torch.uint8)
        for k, pixels in enumerate(colours.repeat(n // len(colours), 32, 40, 1).numpy()):
            pixels[16:] = 0
            Image.fromarray(pixels).save(path / name / f"{k}.png")
    return path / "A", path / "B"


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory):
    """A smoke run on two folders, weak cost: where it writes, output, globals."""
    path = tmp_path_factory.mktemp("folders")
    options = "--smoke", "--out", path / "out", "--cost", "weak", "--data-set", *folders(path)
    return path / "out", *here("train_not.py", *options, draw=True)


def test_folders_of_images(folder_run):
    out, output, values = folder_run
    scores, name = final(output), os.path.basename(values["name"])
    assert re.fullmatch("not_A_to_B_32_[0-9a-f]{8}_weak_convex0_seed0_smoke", name)
    assert written(out) == {f"{name}{end}" for end in (".pt", ".png", "_curves.png", "_pairs.pt")}
    assert [len(values[part]) for part in ("sources", "targets", "test_x", "test_real")] == [36, 27, 4, 3]
    x, y = torch.load(out / f"{name}_pairs.pt", weights_only=True).values()
    assert y.shape == (4, 4, 3, 32, 32) and y.abs().max() <= 1 and "round_trip" not in scores
    expected = images.translation_scores(x, y, values["test_real"], values["targets"])
    assert all(scores[k] == pytest.approx(v, rel=1e-3, abs=1e-6) for k, v in expected.items())
    assert (y[:, 0] - values["start"].map(x).clamp(-1, 1)).abs().max() < 0.5  # twelve steps from there
    kept = checkpoint(out, name)["state"]
    for what, curve in zip(values["CURVES"], kept["curves"].T.tolist()):  # logged at each step
        assert list(map(float, re.findall(rf"^step.*?  {what} (\S+)", output, re.M))) == pytest.approx(curve, rel=1e-3)
    early = kept["early"]  # of steps 1 and 4
    assert 0 < (early[1] - early[0]).abs().max() < 0.5
    refuses(here("train_not.py", "--data-set", out, out, "--out", out, code=2)[0], "same")


def test_a_collapse_is_said_and_ends_the_run(tmp_path):
    """Sources that are all alike are mapped to images that are all alike."""
    options = "--smoke", "--out", tmp_path / "out", "--data-set", *folders(tmp_path, varied=False)
    refuses(here("train_not.py", *options, code=2)[0], "diverged", "collapse", "step 1")
    assert not [name for name in written(tmp_path / "out") if name.endswith(".pt")]


def test_two_moons_have_their_moments(toy_globals):
    y = toy_globals["moons"](400_000).double()
    cross = 0.125 - 1 / math.pi  # E (cos a - 1/2)(sin a - 1/4), a uniform on half a turn; the moons mirror each other
    second = 1.69 * torch.tensor([[0.7525, cross], [cross, 0.565 - 1 / math.pi]], dtype=torch.float64)
    assert y.mean(0).abs().max() < 0.01 and torch.allclose(y.T @ y / len(y), second, atol=0.01)
    upper = (y / 1.3 + torch.tensor([0.5, 0.25])).norm(dim=1)  # of the moon around (0, 0)
    assert ((upper - 1).abs() < 0.25).double().mean() > 0.5


def test_gaussian_to_gaussian_map_is_learned_to_its_known_affine_form(toy_globals, monkeypatch):
    """N(0, I) to N(m, A^2), A symmetric: T(x) = m + A x, grad psi(y) = A^-1 (y - m)."""
    for k, v in dict(WIDTH=32, BATCH=128, CONVEX=1.0).items():
        monkeypatch.setitem(toy_globals, k, v)
    A, m = torch.tensor([[1.4, 0.3], [0.3, 0.7]]), torch.tensor([0.6, -0.4])
    (T, f), averages = ((toy_globals["map_network"](), common.MLP(2, 32, 2, 10.0)) for _ in range(2))
    opt_T, opt_f = (torch.optim.Adam(net.parameters(), betas=(0.0, 0.99), fused=True) for net in (T, f))
    sources, targets = common.kd_order(torch.randn(2 ** 14, 2)), common.kd_order(torch.randn(2 ** 14, 2)) @ A + m
    steps = 200
    for step in range(1, steps + 1):
        for opt in (opt_T, opt_f):
            opt.param_groups[0]["lr"] = 5e-3 * (1 + math.cos(math.pi * step / steps)) / 2
        for _ in range(3):
            toy_globals["descend"](opt_T, toy_globals["T_loss"](T, f, toy_globals["batch"](sources)))
        with torch.no_grad():
            made = toy_globals["transport"](T, toy_globals["batch"](sources))[:, 0]
        toy_globals["descend"](opt_f, toy_globals["f_loss"](f, toy_globals["batch"](targets), made)[0])
        for average, net in zip(averages, (T, f)):
            common.update_ema(average, net, step, decay=0.99)
    x = torch.randn(2000, 2)
    with torch.no_grad():
        y = toy_globals["transport"](averages[0], x)[:, 0]
    error, moved = (y - (x @ A + m)).square().sum(1).mean(), (x - (x @ A + m)).square().sum(1).mean()
    back = (toy_globals["inverse"](averages[1], x @ A + m) - x).square().sum(1).mean()
    assert error < 0.03 * moved and back < 0.1 * moved, (error, back, moved)


@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])
def test_violation_of_a_quadratic_psi_is_its_closed_form(toy_globals, shape):
    """psi = -k|y|^2/2 lies k t (1-t) |y1-y2|^2/2 above its chord; a convex or affine psi nowhere."""
    y1, y2, t = torch.randn(500, *shape), torch.randn(500, *shape), torch.rand(500)
    square = lambda y: y.square().flatten(1).sum(1) / 2
    for k in (0.5, 2.0):
        found = toy_globals["violation"](lambda y: (1 + k) * square(y), y1, y2, t)
        assert torch.allclose(found, k * t * (1 - t) * square(y1 - y2), atol=1e-3)
    for k in (-3.0, 0.0):
        assert toy_globals["violation"](lambda y: k * square(y), y1, y2, t).max() == 0
    assert toy_globals["violation"](lambda y: square(y) + y.flatten(1).sum(1), y1, y2, t).max() < 1e-4


def test_f_loss_is_the_gap_and_the_mean_violation(toy_globals, monkeypatch):
    n, f = 40_000, lambda y: 1.5 * y.square().sum(1)  # psi = -|y|^2
    y_real, y_made = torch.randn(n, 2), 2 * torch.randn(n, 2)
    monkeypatch.setitem(toy_globals, "BATCH", n)
    monkeypatch.setitem(toy_globals, "CONVEX", 2.0)
    expected = 2.0 * 2 * 5 / 6  # the violation is k t (1-t) |y1-y2|^2 / 2: k = 2, E t (1-t) = 1/6, E |y1-y2|^2 / 2 = 5
    for noise in (0.0, 0.3):  # the same on both ends and between: no other violation
        monkeypatch.setitem(toy_globals, "NOISE", noise)
        loss, gap = toy_globals["f_loss"](f, y_real, y_made)
        assert gap.item() == pytest.approx(1.5 * (2 - 8), rel=0.03)
        assert (loss + gap).item() == pytest.approx(expected, rel=0.04)
    monkeypatch.setitem(toy_globals, "CONVEX", 0.0)
    loss, gap = toy_globals["f_loss"](f, y_real, y_made)
    assert loss == -gap


def test_inverse_of_a_known_potential(toy_globals):
    A, b, y = torch.tensor([[0.4, 0.1], [0.1, -0.5]]), torch.tensor([1.0, -2.0]), torch.randn(50, 2)
    f = lambda y: ((y @ A) * y).sum(1) / 2 + y @ b
    assert torch.allclose(toy_globals["inverse"](f, y), y - y @ A - b, atol=1e-5)
    x = torch.randn(50, 2)  # T(x) minimises |x-y|^2/2 - f(y), so that grad psi(T(x)) = x
    assert torch.allclose(toy_globals["inverse"](f, (x + b) @ torch.linalg.inv(torch.eye(2) - A)), x, atol=1e-5)


def test_costs_of_known_maps(toy_globals, monkeypatch):
    """y = x + a + s z: strong |a|^2/2 for s = 0; weak |a|^2/2 whatever s, from two z: the variance is unbiased."""
    a = torch.tensor([0.5, -1.0])
    x = torch.randn(100_000, 2)
    monkeypatch.setitem(toy_globals, "Z", 0)
    y = toy_globals["transport"](lambda x: a.expand(len(x), 2), x)
    assert y.shape == (len(x), 1, 2) and toy_globals["cost_of"](x, y).item() == pytest.approx(0.625, rel=1e-4)
    monkeypatch.setitem(toy_globals, "Z", 2)
    y = toy_globals["transport"](lambda xz: a + 0.8 * xz[:, 2:], x, 2)
    assert toy_globals["cost_of"](x, y).item() == pytest.approx(0.625 + 0.64, rel=0.01)
    monkeypatch.setitem(toy_globals, "WEAK", True)
    assert toy_globals["cost_of"](x, y).item() == pytest.approx(0.625, rel=0.02)
    same_seed = [toy_globals["transport"](lambda xz: xz[:, 2:], x[:9], 3, torch.Generator().manual_seed(5))
                 for _ in range(2)]
    assert torch.equal(*same_seed)


def test_not_scores_by_hand(toy_globals, monkeypatch):
    monkeypatch.setitem(toy_globals, "WEAK_STEPS", 300)
    x, near, far = torch.randn(30, 2), torch.tensor([0.1, 0.0]), torch.tensor([0.0, 0.3])
    order = torch.randperm(30)
    means = toy_globals["discrete"](x, [x[order] + near, x[order] - far])  # common shifts are optimal
    assert torch.allclose(means[0], x + near, atol=1e-5) and torch.allclose(means[1], x - far, atol=1e-5)
    targets = [torch.cat([x + s, x - s]) for s in (near, 5 * far)]  # E[y|x] = x has barycentric cost 0
    monkeypatch.setitem(toy_globals, "WEAK", True)
    means = toy_globals["discrete"](x, targets)
    assert all((m - n).square().sum(1).mean() < 0.01 for m, n in (*zip(means, (x, x)), means))


def test_descend_moves_one_network_in_any_layout(monkeypatch):
    """Fused Adam reads gradients in the weights' own layout; a gradient of other strides would be scrambled."""
    values = whole("not_cmnist_strong_convex1_seed0_smoke")[2]
    torch.manual_seed(0)
    monkeypatch.setitem(values["noisy"].__globals__, "NOISE", 0.0)
    x, first = torch.rand(5, 3, 32, 32) * 2 - 1, values["Translator"]()
    assert torch.allclose(values["transport"](first, x)[:, 0], values["start"].map(x), atol=1e-5)  # linear at the start
    for p in first.parameters():
        p.data += 0.05 * torch.randn_like(p)
    f, results = values["Potential"](), []
    for layout in (torch.channels_last, torch.contiguous_format):
        T = values["Translator"]()
        T.load_state_dict(first.state_dict())
        T.to(memory_format=layout)
        f.to(memory_format=layout)
        frozen = [p.clone() for p in f.parameters()]
        opt = torch.optim.Adam(T.parameters(), lr=1e-3, fused=True)
        for _ in range(2):
            values["descend"](opt, values["T_loss"](T, f, x))
        assert all(map(torch.equal, frozen, f.parameters())) and all(p.grad is None for p in f.parameters())
        results.append(torch.cat([p.detach().flatten() for p in T.parameters()]))
    moved = (results[0] - torch.cat([p.detach().flatten() for p in first.parameters()])).abs().max()
    assert moved > 1e-3  # a few weights may differ: where gradients vanish, Adam magnifies round-off
    assert ((results[0] - results[1]).abs() > 1e-4).double().mean() < 0.02


@pytest.mark.parametrize("name", ["not_moons_strong_convex1_seed0_smoke", "not_roll_weak_convex0_seed0_smoke",
                                  "not_cmnist_strong_convex1_seed0_smoke", "not_cmnist_weak_convex1_seed0_smoke"])
def test_what_a_run_scores_and_writes(name):
    folder, output, values = whole(name)
    scores, digits, weak = final(output), "cmnist" in name, "weak" in name
    assert scores["steps"] == 12 and {"convex", "jensen", "violated", "params", "train_s"} < set(scores)
    if not digits:  # the log scores as the last line does
        last = re.findall(r"  map_ratio (\S+)", output)[-1]
        assert float(last) == pytest.approx(scores["map_ratio"], rel=1e-3)
        apart = (values["map_means"][0] - values["map_means"][1]).square().sum(1).mean().item()
        assert scores["map_floor"] == pytest.approx(apart, rel=1e-3)
    assert ("round_trip" in scores) != weak and ("inv_ratio" in scores) == (not digits and not weak)
    assert written(folder) == {name + end for end in (".pt", ".png", "_curves.png", "_pairs.pt")[:4 if digits else 3]}
    if digits:
        x, y = torch.load(folder / f"{name}_pairs.pt", weights_only=True).values()
        assert x.shape == (6, 3, 32, 32) and y.shape == (6, 4 if weak else 1, 3, 32, 32) and y.abs().max() <= 1
        assert scores["cost"] == pytest.approx((y - x[:, None]).square().sum((2, 3, 4)).mean().item() / 2, rel=1e-3)
        assert scores["spread"] == pytest.approx(y.var(1).sqrt().mean().item() if weak else 0, rel=1e-3)
