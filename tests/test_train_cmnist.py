"""train_cmnist.py: the base's plan and its draws against closed forms, the sampler, what f sees, divergences."""
import copy
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import common
import digits
from conftest import HERE, final, here, refuses, smoke, whole, written

NAME = "cmnist_eps0.1_seed0_smoke"


@pytest.fixture
def cmnist():
    return whole(NAME)[2]


@pytest.fixture
def small_base(cmnist, monkeypatch):
    """The base of blobs of 4 x 4 pixels, in float64, and its script's globals."""
    torch.manual_seed(0)
    g = cmnist["translate"].__globals__
    for k, v in dict(EPS=0.3, NOISE=0.2, RANK=5, ETA=0.002, HUES=12).items():
        monkeypatch.setitem(g, k, v)
    x, y = ((torch.rand(500, 6) @ torch.rand(6, 16) / 4).view(-1, 1, 4, 4) for _ in range(2))
    return g["Hues"](x, y).double(), g, x.double(), y.double()


def test_base_has_the_plan_it_says(small_base):
    """(f(y) - |x-y|^2/2) / eps is, up to a constant of x, the log density of the mixture that draw samples."""
    f, g, grey_x, _ = small_base
    x = digits.colorize(grey_x[:4].float(), torch.tensor([0.03, 0.2, 0.47, 0.9])).double()
    eye, k = torch.eye(48, dtype=torch.float64).view(48, 3, 4, 4), torch.arange(12)
    S = torch.stack([f.times(eye, torch.full((48,), i), 1).flatten(1) for i in k])
    root = torch.stack([f.times(eye, torch.full((48,), i), 0.5).flatten(1) for i in k])
    assert torch.allclose(S, S.mT) and torch.allclose(root @ root, S, atol=1e-6)
    r = (f.along[:, :, None] * (f.r @ f.basis.T)[:, None]).flatten(1)
    z = (x + 1).flatten(1)
    log_w = f.log_a + (torch.einsum("bi,kij,bj->bk", z, S, z) / 2 + z @ r.T) / 0.3
    mean = r + torch.einsum("kij,bj->bki", S, z)
    y = mean[:, 3][:, None] + torch.randn(4, 20, 48, dtype=torch.float64) / 2
    law = torch.distributions.MultivariateNormal(mean[:, None], 0.3 * S)
    log_density = (log_w.log_softmax(1)[:, None] + law.log_prob(y[:, :, None])).logsumexp(2)
    images = y.view(80, 3, 4, 4) - 1
    log_p = (f(images) - common.quadratic_cost(x.repeat_interleave(20, 0), images)).view(4, 20) / 0.3
    assert (log_p - log_density).std(1).max() < 1e-3 and log_p.std(1).min() > 1

    w, n = log_w.softmax(1), 20000
    for i in range(2):
        drawn = f.draw(x[i:i + 1].expand(n, -1, -1, -1)).flatten(1) + 1
        expected = w[i] @ mean[i]
        within = 0.3 * S.diagonal(dim1=1, dim2=2).sum(1)
        variance = (w[i] * (within + (mean[i] - expected).square().sum(1))).sum()
        assert (drawn.mean(0) - expected).abs().max() < 5 * (variance / n).sqrt()
        assert drawn.var(0).sum().item() == pytest.approx(variance.item(), rel=0.02)


def test_base_carries_the_gaussians_and_each_colour_its_share(small_base):
    """T S0 T + eps T = S1 in the basis of the first colour, s^2 s0 + eps s = s1 in single directions."""
    f, g, grey_x, grey_y = small_base
    x, y = (2 * grey.flatten(1) for grey in (grey_x, grey_y))
    c = digits.rgb_of((torch.arange(12, dtype=torch.float64) + 0.5) / 12)
    edge = torch.nn.functional.normalize(digits.rgb_of((torch.arange(12) + 0.6) / 12).double() - c)
    square, ahead = c.square().sum(1), ((edge * c).sum(1) ** 2 / c.square().sum(1))
    S0, S1 = (square[0] * torch.cov((v @ f.basis).T, correction=0) + n * torch.eye(5)
              + ahead[0] / 16 * (v @ f.basis).T @ (v @ f.basis) / 500 for v, n in ((x, 1e-4), (y, 0.04)))
    T = f.S[0, :5].diag()
    assert torch.allclose(T @ S0 @ T + 0.3 * T, S1, atol=2e-3 * S1.max().item())
    outside = [(v.square().sum() - (v @ f.basis).square().sum()) / 500 / 11 for v in (x, y)]
    for s, s0, s1 in ((f.S[:, 5], square * outside[0] + 1e-4, square * outside[1] + 0.04),
                      (f.S[:, 7], torch.tensor(1e-4), torch.tensor(0.04))):
        assert torch.allclose(s ** 2 * s0 + 0.3 * s, s1.double(), rtol=1e-3)
    # the mean 2 in a colour of the base goes to the mean 3 in that colour
    at = (f.along * square.sqrt()[:, None])[:, :, None] * x.mean(0)
    moved = (f.along[:, :, None] * (f.r @ f.basis.T)[:, None] + f.times(at, torch.arange(12), 1)).flatten(1)
    wanted = ((f.along * square.sqrt()[:, None])[:, :, None] * y.mean(0)).flatten(1)
    assert (moved - wanted).norm(dim=1).max() < 0.02 * wanted.norm(dim=1).min()
    many = digits.colorize(grey_x.float().repeat(40, 1, 1, 1)).double() + 1
    share = (f.quadratic(many, f.S, f.r) + f.log_a).softmax(1).mean(0)
    assert share.sub(1 / 12).abs().max() < 0.01


def test_net_sees_brightness_alike_in_every_colour(cmnist):
    """Of a digit in any colour its grey pixels; of a noisy one the same whatever the order of the channels.  So f sets
    no colour apart from another but by |c|^2, which is 1 for red and 2 for yellow."""
    torch.manual_seed(0)
    f, grey = cmnist["f"], digits.synthetic_digits(3, 35, torch.Generator().manual_seed(0))
    y = digits.colorize(grey, (torch.arange(35) % 7 + 0.4) / 7)
    light = (2 * grey - 1)[:, :, 4:-4, 4:-4]
    assert (f.seen(y)[0] - light).abs().max() < 0.03  # the hue is an angle, see test_colours
    pure = digits.colorize(grey[:2], torch.tensor([0, 1 / 6]))
    assert torch.allclose(f.seen(pure)[1], torch.tensor([1.0, 2.0]), atol=1e-4)
    y = y + 0.1 * torch.randn_like(y)
    f = copy.deepcopy(f)
    for head in f.net.readouts:
        torch.nn.init.normal_(head.weight)
    learned = f(y) - f.base(y)
    for order in ([1, 2, 0], [0, 2, 1]):
        for seen, other in zip(f.seen(y[:, order]), f.seen(y)):
            assert torch.allclose(seen, other, atol=1e-4)
        assert torch.allclose(f(y[:, order]) - f.base(y[:, order]), learned, atol=1e-2, rtol=1e-3)
    g = f.seen.__globals__
    for hue, square in ((0, 1.0), (1 / 6, 2.0)):
        y = digits.colorize(grey, torch.tensor([hue]).expand(35))
        shape, tint = f.net(f.seen(y)[0]).unbind(1)
        expected = g["SCALE"] * (shape + g["TINT"] * (square - 1.5) * tint)
        assert torch.allclose(f(y) - f.base(y), expected, atol=1e-2, rtol=1e-3) and expected.std() > 1


def test_translations_of_a_gaussian_are_its_mean_and_less_than_its_width(cmnist, monkeypatch):
    """f = -k|y|^2/2: the chain's law is N(x/(1+k), eps/(1+k)) at a step where plain Langevin's is wider by 43 %; then
    y + NOISE^2 grad log pi shrinks it by 1 - NOISE^2 (1+k)/eps."""
    torch.manual_seed(0)
    g, eps, k = cmnist["translate"].__globals__, 0.1, 2.0
    monkeypatch.setattr(g["base"], "draw", lambda x: x)
    for key, v in dict(EPS=eps, ETA=0.08, NOISE=0.1, SAMPLE_STEPS=40, BATCH=5).items():
        monkeypatch.setitem(g, key, v)
    y = g["translate"](lambda y: -k * y.flatten(1).square().sum(1) / 2, torch.full((10, 3, 32, 32), 0.6), 2)
    assert y.shape == (10, 2, 3, 32, 32) and y.mean().item() == pytest.approx(0.2, abs=0.01)
    assert y.std().item() == pytest.approx(0.7 * (eps / (1 + k)) ** 0.5, rel=0.03)


def test_sources_are_bent_by_the_matrix_drawn(cmnist, monkeypatch):
    """A Gaussian blob of covariance s^2 I seen through the matrix A has the covariance s^2 (A^T A)^-1."""
    centred = torch.arange(32.0) - 15.5
    r2 = centred[:, None].square() + centred.square()
    blob = (-r2 / (2 * 4.0 ** 2)).exp().expand(20, 1, 32, 32)
    torch.manual_seed(0)
    bent = cmnist["bent"](blob)[:, 0].double()
    torch.manual_seed(0)
    A = torch.eye(2) + cmnist["BEND"] * torch.randn(20, 2, 2)
    points = torch.cartesian_prod(centred, centred).flip(1).double()  # x, then y, as affine_grid has them
    light = bent.flatten(1) / bent.sum((1, 2))[:, None]
    covariance = torch.einsum("np,pi,pj->nij", light, points, points)
    expected = (4.0 ** 2 + 1 / 6) * torch.linalg.inv(A.mT @ A).double()  # interpolation widens a little
    assert (covariance - expected).abs().max() < 0.4 and expected.sub(16 * torch.eye(2)).abs().max() > 2
    monkeypatch.setitem(cmnist["bent"].__globals__, "BEND", 0.0)
    assert torch.allclose(cmnist["bent"](blob), blob, atol=1e-5)


def test_a_gap_that_stays_wide_is_a_divergence(tmp_path, monkeypatch):
    """One spike is not: the mean over 100 steps, 5000 (1 - 0.99^k) here, crosses 300 + 300 eps at the seventh."""
    monkeypatch.setattr(common, "train_step", lambda f, opt, y_pos, y_neg: torch.tensor(5000.0))
    output = smoke(NAME, tmp_path, code=2)[0]
    assert f"mean_gap is {5000 * (1 - 0.99 ** 7):.4g} at step 7" in output


def test_chains_thrown_at_the_wall_are_a_divergence(tmp_path):
    """The box clips them, so that no size of y shows it."""
    with open(os.path.join(HERE, "train_cmnist.py")) as file:
        text, changes = re.subn("^ETA = .*", "ETA = 50 * EPS", file.read(), flags=re.M)
    script = tmp_path / "train_cmnist.py"
    script.write_text(text)
    options = ("--smoke", "--data", tmp_path / "none", "--out", tmp_path)
    refuses(here(script, *options, code=2)[0], "diverged", "at_wall", "lower ETA")
    assert changes == 1 and not (tmp_path / f"{NAME}.pt").exists()


def test_translates_a_folder(tmp_path):
    folder, _, values = whole(NAME)
    shutil.copy(folder / f"{NAME}.pt", tmp_path)
    (tmp_path / "mine").mkdir()
    grey = digits.synthetic_digits(2, 2, torch.Generator().manual_seed(3))
    for k, image in enumerate(digits.colorize(grey, torch.tensor([0.2, 0.7]))):
        Image.fromarray((127.5 * (image + 1)).byte().permute(1, 2, 0).numpy()).save(tmp_path / "mine" / f"{k}.png")
    output, _ = here("train_cmnist.py", "--smoke", "--resume", "--data", tmp_path / "none", "--out", tmp_path,
                     "--translate", tmp_path / "mine")
    made = tmp_path / "mine_translated"
    n = values["TRANSLATIONS"]
    assert f"{n} translations of each of 2 images" in output
    assert {p.name for p in made.iterdir()} == {f"{k}_{i}.png" for k in (0, 1) for i in range(1, n + 1)} | {
        "figure.png"}
    for k, hue in enumerate((0.2, 0.7)):
        y = torch.from_numpy(np.array(Image.open(made / f"{k}_1.png"))).permute(2, 0, 1)[None] / 127.5 - 1
        assert y.shape == (1, 3, 32, 32) and abs(digits.hue_of(y).item() - hue) < 0.05  # the colour stays


def test_what_a_run_scores_and_writes(cmnist):
    folder, output, values = whole(NAME)
    endings = (".pt", ".png", "_pairs.pt", "_control_base.pt", "_control_nearest.pt")
    assert written(folder) == {NAME + end for end in endings}
    scores, (x, y) = final(output), torch.load(folder / f"{NAME}_pairs.pt", weights_only=True).values()
    assert x.shape == (6, 3, 32, 32) and y.shape == (6, values["TRANSLATIONS"], 3, 32, 32) and y.abs().max() <= 1
    painted = torch.load(folder / f"{NAME}_control_nearest.pt", weights_only=True)["y"]  # a 3 of the training set
    light = painted.amax((1, 2)).flatten(1) / 2 + 0.5
    assert torch.cdist(light, values["grey_targets"].flatten(1)).amin(1).max() < 0.02
    assert "control base cost" in output and "control nearest cost" in output
    assert scores["cost"] == pytest.approx((y - x[:, None]).square().sum((2, 3, 4)).mean().item() / 2, rel=1e-3)
    assert scores["spread"] == pytest.approx((y[:, 0] - y[:, 1]).abs().mean().item() / 2 ** 0.5, rel=1e-3)  # of two
