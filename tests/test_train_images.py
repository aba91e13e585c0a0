"""Images: the base's narrowest direction, the chains, a known translation, resumes."""
import math
import os
import shutil
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import conftest
import images
from conftest import checkpoint, final, here, in_loop, refuses, same


def command(out, *options):
    return "train_images.py", "--smoke", "--device", "cpu", "--out", out, *options


@pytest.fixture
def whole():
    """A smoke run: its folder, output, globals, and the name of its files."""
    out, output, values = conftest.whole("images_*_seed0_*")
    return types.SimpleNamespace(out=out, output=output, values=values, name=os.path.basename(values["name"]))


def edited(tmp_path, **constants):
    """A copy of the script with other constants."""
    source = open(os.path.join(os.path.dirname(images.__file__), "train_images.py"), encoding="utf-8").read()
    lines, derived = "\n".join(f"{name} = {value}" for name, value in constants.items()), "LOG_EVERY, SCORE_EVERY ="
    (tmp_path / "train_images.py").write_text(source.replace(derived, f"{lines}\n{derived}"))
    return tmp_path / "train_images.py"


# ------------------------------------------------------------------------------------------------ the base

def test_no_direction_is_too_narrow_for_the_step(whole):
    """A Langevin step is stable where the variance EPS S is above ETA/4."""
    v = whole.values
    assert v["base"].S.min() > 0.999 * v["ETA"] / (2 * v["EPS"])
    assert v["base"].S_o >= 0.999 * v["ETA"] / (2 * v["EPS"])


# ------------------------------------------------------------------------------------------------ the chains

def test_at_its_turn_one_chain_in_groups_lives_on_and_the_young_teach_nothing():
    steps = 150

    def births(run, v):
        ages = []

        def learn(f, opt, y_pos, y_neg):
            ages.append(len(ages) + 1 - y_neg[:, 0, 0, 0])
            return torch.zeros(())

        def newborn(first, n):  # y is the step of its birth
            born = (first - v["GROUPS"] * v["BATCH"]) // n
            return tuple(torch.full((n, *v["x"].shape[1:]), float(born)) for _ in range(2))

        walk, train_step, v["newborn"] = v["images"].walk, v["common"].train_step, newborn
        v["images"].walk, v["common"].train_step, v["bank"].y[:] = (lambda f, x, y, *_, **more: y), learn, 0
        try:
            yield from range(1, steps)
        finally:
            v["images"].walk, v["common"].train_step = walk, train_step
        return torch.stack(ages[steps // 3:]), v["GROUPS"], v["LIFE"], v["YOUNG"], v["BATCH"]

    options = "--smoke", "--device", "cpu"
    ages, groups, life, young, batch = in_loop(births, "train_images.py", *options, SCORE_EVERY=10 ** 6)
    assert ages.shape[1] == batch * (life - young) // life and ages.min() == (young - 1) * groups + 1
    older = (ages > life * groups).float().mean().item()  # of `groups` turns to end a chain is spared one
    assert ages.max() <= 2 * life * groups and older == pytest.approx(1 / groups, abs=0.08)


# ------------------------------------------------------------------------------------------------ whole runs

def test_smoke_writes_what_it_says(whole):
    files = {f"{whole.name}{end}" for end in (".pt", ".png", "_curves.png", "_pairs.pt", "_real.pt")}
    assert files < set(os.listdir(whole.out))
    pairs, real = (torch.load(whole.out / f"{whole.name}{end}.pt") for end in ("_pairs", "_real"))
    assert pairs["x"].shape == (6, 3, 32, 32) and pairs["y"].shape == (6, 2, 3, 32, 32) and pairs["y"].abs().max() <= 1
    test_b = images.read(whole.out / "images_smoke_data" / "testB", [f"{k:02d}.png" for k in range(6)], 32)
    assert torch.equal(real["y"][:, 0], test_b / 127.5 - 1)
    scores = images.translation_scores(pairs["x"], pairs["y"], real["y"][:, 0], whole.values["y"])
    for key, value in scores.items():
        assert final(whole.output)[key] == pytest.approx(value, rel=1e-3), key
    assert all(f"\n{what} energy" in whole.output for what in ("control mixture", "control retrieval", "longer"))


def test_a_finished_run_translates_as_it_did(whole, tmp_path):
    shutil.copytree(whole.out, tmp_path, dirs_exist_ok=True)
    new = tmp_path / "new"
    shutil.copytree(tmp_path / "images_smoke_data" / "testA", new)
    output, values = here(*command(tmp_path, "--resume", "--translate", new))
    assert final(output) == pytest.approx(final(whole.output) | {k: final(output)[k] for k in ("train_s", "total_s")})
    y = torch.load(whole.out / f"{whole.name}_pairs.pt")["y"]
    output, _ = here(*command(tmp_path, "--resume", "--translate", new, "--copies", "2"))  # once more
    for k in range(6):
        for copy in (1, 2):
            made = np.asarray(Image.open(tmp_path / "new_translated" / f"{k:02d}_{copy}.png")).transpose(2, 0, 1)
            assert np.array_equal(made, ((y[k, copy - 1] + 1) * 127.5).round().byte().numpy())
    assert (tmp_path / "new_translated" / "05.png").exists()
    assert same(checkpoint(tmp_path, whole.name), checkpoint(whole.out, whole.name))


def test_the_last_of_the_weights_that_noise_cannot_tell_from_the_best_are_kept(whole, monkeypatch):
    v = whole.values
    assert v["total"](torch.tensor([[-0.1, 0.2, 0.9, 1.0, 1.0], [0.1, -0.2, 1.3, 1.0, 1.0]])).tolist() == \
        pytest.approx([0.21, 0.13])
    totals = v["total"](v["state"].scores)[:v["SCORES"] + 1].tolist()
    good = [k for k, value in enumerate(totals) if value <= min(totals[:k + 1]) + 3 * v["state"].noise.item()]
    assert final(whole.output)["best_step"] == good[-1] * v["SCORE_EVERY"]
    assert (v["score"](v["some"] * math.nan) == 1e3).all()  # worse than any, and the log goes on
    assert ("try --steps 48" in whole.output) == (v["state"].scores[v["SCORES"], 2] > 1.25)  # nearest
    torch.manual_seed(1)  # its definition, over other draws
    halves = [torch.randperm(len(v["y"])).chunk(2) for _ in range(100)]
    scores = torch.stack([v["score"](v["y"][a[:len(v["some"])]], v["y"][b]) for a, b in halves])
    assert v["state"].noise.item() == pytest.approx(v["total"](scores).std().item(), rel=0.5)  # 20 draws: to a sixth
    assert scores[:, 2].mean() == pytest.approx(1, abs=0.2)  # nearest: real ones are no copies of those seen
    monkeypatch.setitem(v["noise_of_total"].__globals__, "y", v["y"][:3])  # fewer targets than sources
    assert v["noise_of_total"]().isfinite()


def test_a_training_that_runs_off_ends_with_a_plan(tmp_path):
    script = edited(tmp_path, LR=1e30, WARMUP=1, TRIES=1)
    output, v = here(script, "--smoke", "--device", "cpu", "--out", tmp_path)
    assert "ran off at step" in output and "rate times 0.25" in output
    end = final(output)
    assert end["best_step"] == 0 and end["steps"] < v["STEPS"]
    assert torch.equal(v["z"], v["translated"](v["base"], v["test_x"], 2))
    again = final(here(script, "--smoke", "--device", "cpu", "--out", tmp_path, "--resume")[0])  # it stays ended
    assert again == end | {k: again[k] for k in ("train_s", "total_s")}


def looks(y):
    """Of images with one shape on white, (n, 3, 32, 32): its centre (n, 2) in pixels, its colour (n, 3), its area."""
    ink = (1 - y).amax(1)
    inside = (ink > ink.amax((1, 2), keepdim=True) / 2).float()
    area, ticks = inside.sum((1, 2)), torch.arange(32.0)
    centre = torch.stack([inside.sum(1) @ ticks, inside.sum(2) @ ticks], 1) / area[:, None]
    return centre, (y * inside[:, None]).sum((2, 3)) / area[:, None], area


def test_squares_become_discs_in_their_place_and_colour(tmp_path, whole):
    for k, (part, n) in enumerate((("trainA", 200), ("trainB", 200), ("testA", 20), ("testB", 3))):
        whole.values["make_up"](str(tmp_path / "shapes" / part), n, k % 2, k)
    script = edited(tmp_path, STEPS=20, WIDTHS=(4, 8, 8, 8), HIDDEN=8, BATCH=16, SCORES=1, SCORED=20, RANK=64,
                    GRAINY=0.1)  # of nearest, about 1
    output, v = here(script, "--device", "cpu", "--out", tmp_path, tmp_path / "shapes")
    assert "warning: translations are farther" in output and "try --steps 80" in output
    centre, colour, area = looks(v["test_x"])
    for copy in v["z"].unbind(1):
        new_centre, new_colour, new_area = looks(copy)
        assert (new_centre - centre).norm(dim=1).mean() < 0.7  # pixels; of unrelated shapes 8
        assert (new_colour - colour).abs().mean() < 0.2  # of unrelated shapes 0.5
        assert 0.75 < (new_area / area).mean() < 0.95  # of a disc in a square pi/4


def test_kinds_are_shared_out_by_a_mixture_which_a_resumed_run_keeps(tmp_path):
    """Squares anywhere become discs in the nearest of four corners, from the first draw on; a Gaussian would blend."""
    rng = np.random.default_rng(0)
    for k, (part, n) in enumerate((("trainA", 400), ("trainB", 400), ("testA", 20), ("testB", 3))):
        os.makedirs(tmp_path / "kinds" / part)
        for j in range(n):
            left, top = (2 + 16 * (j % 2), 2 + 16 * (j // 2 % 2)) if k % 2 else rng.integers(0, 21, 2)
            picture = Image.new("RGB", (32, 32), "white")
            draw = getattr(ImageDraw.Draw(picture), "ellipse" if k % 2 else "rectangle")
            draw([left, top, left + 11, top + 11], tuple(rng.integers(0, 99, 3)))
            picture.save(tmp_path / "kinds" / part / f"{j:03d}.png")
    script = edited(tmp_path, STEPS=2, WIDTHS=(4, 4, 4, 4), HIDDEN=4, BATCH=16, SCORES=1, SCORED=20, RANK=64)
    options = script, "--device", "cpu", "--out", tmp_path, tmp_path / "kinds"
    _, v = here(*options)
    assert len(v["clusters"].mixture.r) > 1
    x = v["test_x"]
    at, drawn, blend = (looks(y.clamp(-1, 1))[0] - 15.5 for y in (x, v["draw"](x), v["base"].draw(x)))
    assert (drawn.abs() - 8).abs().max() < 0.5 and (blend.abs() - 8).abs().max() > 2  # pixels from a corner's disc
    assert (drawn.sign() == at.sign()).float().mean() > 0.8
    _, again = here(*options, "--resume")
    assert torch.equal(again["z"], v["z"]) and torch.equal(again["clusters"].mixture.r, v["clusters"].mixture.r)


def test_bad_folders_are_one_sentence(tmp_path):
    refuses(here("train_images.py", "--out", tmp_path, code=2)[0], "name one folder")
    refuses(here("train_images.py", "--out", tmp_path, "a", "b", "c", code=2)[0], "name one folder")
    refuses(here("train_images.py", "--out", tmp_path, tmp_path / "a", tmp_path / "b", code=2)[0], "No such file")
    refuses(here("train_images.py", "--out", tmp_path, "a", "--background", "whitish", code=2)[0], "background")
