"""FID: the distance against closed forms and pytorch-fid's own numbers; sets of every kind, good and bad."""
import collections
import hashlib
import io
import math
import os
import signal
import struct
import sys
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import eval_fid
from conftest import final, refuses

# by pytorch-fid, of the weights and images below
GOLDEN_FID, GOLDEN_MU = 183.693358, [1.454227, 2.556207, 0.0, 1.441436]


@pytest.fixture
def fid(monkeypatch, capsys, tmp_path):
    """eval_fid.py in this process, in the folder tmp_path, without network: fid(*options, code=0) -> its output."""
    def no_network(*a, **k):
        raise OSError("no network")

    def call(*options, code=0):
        monkeypatch.setattr(sys, "argv", ["eval_fid.py", "--device", "cpu", *map(str, options)])
        for stream in ("stdout", "stderr"):
            monkeypatch.setattr(sys, stream, getattr(sys, stream))  # main wraps them: put back at the end
        try:
            eval_fid.main()
            ended = 0
        except SystemExit as end:
            ended = end.code
        output = "".join(capsys.readouterr())
        assert ended == code, output
        return output

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(signal, "signal", lambda *a: None)
    monkeypatch.chdir(tmp_path)
    return call


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of seeded weights that carry the signal through all layers, laid out like the published one."""
    torch.manual_seed(0)
    state = {k: v for k, v in eval_fid.build_network().state_dict().items() if "num_batches" not in k}  # it has none
    for name, v in state.items():
        u = torch.rand(v.shape) - 0.5
        near_one = name.endswith(("bn.weight", "var"))
        v.copy_(u * (24 / v[0].numel()) ** 0.5 if v.dim() == 4 else 1 + 0.4 * u if near_one else 0.2 * u)
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def picture(k, height, width):
    """(3, height, width) uint8, stripes that differ with k."""
    i, j, c = torch.meshgrid(*map(torch.arange, (height, width, 3)), indexing="ij")
    return (((k + 3) * i * (c + 1) + (2 * k + 5) * j * (3 - c)) % 256).to(torch.uint8).permute(2, 0, 1)


def write_picture(path, pixels, mode="RGB"):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).convert(mode).save(path)


def gaussian(mu, sigma, **more):
    return {"mu": torch.tensor(mu, dtype=torch.float64), "sigma": torch.as_tensor(sigma, dtype=torch.float64), **more}


def frechet(a, b):
    return eval_fid.gaussian_w2(a["mu"], a["sigma"], b["mu"], b["sigma"])


def random_covariance(dim, rank):
    x = torch.randn(dim, rank, dtype=torch.float64) * torch.logspace(1, -4, dim, dtype=torch.float64)[:, None]
    return x @ x.T / rank


def test_fid_has_its_closed_forms():
    a, b = gaussian([1.0, 2.0], [[2.0, 0.5], [0.5, 1.0]]), gaussian([0.0, 4.0], [[1.0, -0.7], [-0.7, 3.0]])
    product = a["sigma"] @ b["sigma"]  # 2 x 2: tr sqrt(P) = sqrt(tr P + 2 sqrt(det P))
    exact = 5 + 3 + 4 - 2 * math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    assert frechet(a, b) == pytest.approx(exact, rel=1e-12) == frechet(b, a)
    turn = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    # commuting covariances, the first one singular
    p, q = torch.linspace(0, 3, 40, dtype=torch.float64), torch.linspace(2, 1, 40, dtype=torch.float64)
    a, b = gaussian([0.0] * 40, turn * p @ turn.T), gaussian([0.1] * 40, turn * q @ turn.T)
    assert frechet(a, b) == pytest.approx(0.4 + (p.sqrt() - q.sqrt()).square().sum().item(), rel=1e-9)


def test_fid_is_exact_where_covariances_are_singular():
    torch.manual_seed(0)
    u, v = torch.randn(2, 300, dtype=torch.float64)
    a, b = gaussian([0.0] * 300, torch.outer(u, u)), gaussian([0.0] * 300, torch.outer(v, v))
    assert frechet(a, b) == pytest.approx((u @ u + v @ v - 2 * (u @ v).abs()).item(), rel=1e-10)
    some = [gaussian([0.0] * 300, random_covariance(300, rank)) for rank in (20, 60, 900)]
    assert max(frechet(s, s) for s in some) < 1e-10
    for s, t in ((some[0], some[1]), (some[0], some[2])):
        assert frechet(s, t) == pytest.approx(frechet(t, s), rel=1e-10)
    point = gaussian([0.0] * 300, torch.zeros(300, 300))
    assert frechet(point, some[2]) == pytest.approx(some[2]["sigma"].trace().item(), rel=1e-12)
    assert frechet(point, point) == 0
    x = torch.randn(5000, 8) * torch.arange(8) + 100
    s = eval_fid.statistics(x)
    assert np.allclose(s["mu"], x.double().mean(0))
    assert np.allclose(s["sigma"], np.cov(x.double().numpy(), rowvar=False), rtol=1e-9)


def test_fid_of_saved_statistics(fid):
    np.savez("a.npz", mu=np.zeros(3), sigma=np.diag([4.0, 1.0, 0.0]))  # as pytorch-fid writes them
    np.savez("b.npz", mu=np.ones(3), sigma=np.diag([1.0, 1.0, 9.0]), n=3000, resize="box", layer="pool3")
    output = fid("a.npz", "b.npz")
    numbers = final(output)
    assert numbers["fid"] == pytest.approx(3 + 1 + 0 + 9) and math.isnan(numbers["n_a"]) and numbers["n_b"] == 3000
    assert "resize box  features pool3" in output and "n is unknown" in output
    np.savez("e.npz", mu=np.ones(3), sigma=np.zeros((3, 3)), n=2)  # of two equal images
    assert final(fid("e.npz", "b.npz"))["fid"] == pytest.approx(1 + 1 + 9)
    output = fid("b.npz", "b.npz")
    assert final(output)["fid"] < 1e-6 and "warning: " not in output
    np.savez("few.npz", mu=np.ones(3), sigma=np.diag([1.0, 1.0, 9.0]), n=100)
    assert "n is below 2048" in (output := fid("few.npz", "b.npz")) and "0.11 in |m_a - m_b|^2" in output
    np.savez("c.npz", mu=np.ones(3), sigma=np.eye(3), n=3000, resize="lanczos", layer="pool3")
    refuses(fid("b.npz", "c.npz", code=2), "resize", "box", "lanczos")
    np.savez("d.npz", mu=np.ones(2), sigma=np.eye(2))
    refuses(fid("b.npz", "d.npz", code=2), "dim", "3", "2")


def test_fid_of_images_is_that_of_pytorch_fid(fid, weights, tmp_path):
    files = ("RGB", "a.png"), ("L", "b.png"), ("RGBA", "c.PNG"), ("P", "d.png"), ("CMYK", "e.tif")
    for k, (mode, name) in enumerate(files):
        write_picture(tmp_path / "A" / name, picture(k, 40 + 9 * k, 300 - 60 * k), mode)
    y = torch.stack([picture(k, 32, 32) for k in range(4)]).view(2, 2, 3, 32, 32)
    torch.save({"x": torch.zeros(2, 3, 32, 32), "y": y / 127.5 - 1}, "pairs.pt")
    (tmp_path / "A" / "notes.txt").write_text("not an image, and not named like one")
    (tmp_path / "A" / "text.png").write_text("not an image")
    png = (tmp_path / "A" / "a.png").read_bytes()
    (tmp_path / "A" / "half.png").write_bytes(png[:len(png) // 2])  # its header is good
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save("A/deep.png")
    refuses(fid("A", "pairs.pt", "--weights", weights, code=2), "text.png", "deep.png", "--skip-broken")

    output = fid("A", "pairs.pt", "--weights", weights, "--skip-broken", "--save", "A.npz")
    assert all(f"skipped in A: {name}" in output for name in ("text.png", "deep.png", "half.png"))
    assert all(words in output for words in ("not the published file", "bilinear", "pool3", "2048-d"))
    assert output.count("n is below 2048") == 2 and "ignored 1 files or folders: 1 .txt" in output
    numbers = final(output)
    assert (numbers["n_a"], numbers["n_b"]) == (5, 4)
    assert numbers["fid"] == pytest.approx(GOLDEN_FID, rel=1e-4)
    with np.load("A.npz") as kept:
        assert kept["mu"].shape == (2048,) and kept["n"] == 5
        assert kept["mu"][:4] == pytest.approx(GOLDEN_MU, abs=1e-5)
    refuses(fid("pairs.pt", "--save", "A.npz", code=2), "--save A.npz", "not exist yet")


def test_features_do_not_depend_on_batch_size_or_format(weights, tmp_path, monkeypatch):
    pictures = torch.stack([picture(k, 48, 31) for k in range(3)])
    for k, p in enumerate(pictures):
        write_picture(tmp_path / "f" / f"{k}.png", p)
    torch.save(pictures, tmp_path / "u.pt")
    torch.save((pictures / 127.5 - 1).half().float() * 1.0001, tmp_path / "f.pt")  # is rounded and clipped as in a PNG
    sets = [eval_fid.open_set(str(tmp_path / name), skip=False, upright=False) for name in ("f", "u.pt", "f.pt")]
    one, *others = [[s["read"](item) for item in s["items"]] for s in sets]
    assert all(torch.equal(a, b) for other in others for a, b in zip(one, other))

    cpu = torch.device("cpu")
    monkeypatch.setattr(eval_fid, "SIDE", 139)  # a fifth of the time
    net, _ = eval_fid.load_network(str(weights), cpu)
    together = eval_fid.features(net, "u.pt", **sets[1], skip=False, device=cpu)
    monkeypatch.setattr(eval_fid, "BATCH", 2)
    apart = eval_fid.features(net, "f", **sets[0], skip=False, device=cpu)
    assert together.shape == (3, 2048) and torch.allclose(together, apart, atol=1e-5) and together.std(0).mean() > 0.01


def test_pixels_are_as_pytorch_fid_takes_them_unless_upright(fid, tmp_path):
    turned, clear = picture(0, 6, 4), torch.cat([picture(1, 6, 4), torch.zeros(1, 6, 4, dtype=torch.uint8)])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    (tmp_path / "A").mkdir()
    Image.fromarray(turned.permute(1, 2, 0).numpy()).save("A/turned.png", exif=exif)
    Image.fromarray(clear.permute(1, 2, 0).numpy()).save("A/clear.png")
    plain, upright = ({name: (255 * s["read"](name)).round().byte() for name in s["items"]}
                      for s in (eval_fid.open_set("A", skip=False, upright=u) for u in (False, True)))
    assert torch.equal(plain["turned.png"], turned) and torch.equal(plain["clear.png"], clear[:3])
    assert torch.equal(upright["turned.png"], turned.rot90(-1, (1, 2))) and (upright["clear.png"] == 255).all()
    Image.fromarray(np.full((9, 9), 257 * 40, np.uint16)).save("A/deep.png")
    refuses(fid("A", "A", code=2), "deep.png", "--upright")
    s = eval_fid.open_set("A", skip=False, upright=True)
    assert torch.allclose(s["read"]("deep.png"), torch.full((3, 9, 9), 40 / 255))


def png_bomb(width, height):
    """A black-and-white PNG of kilobytes that unpacks to this many pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    lines = zlib.compress(bytes((width // 8 + 1) * min(height, 1000)))  # a sentence must come before they run out
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def deflated(name, size):
    """A zip archive of a few bytes whose directory says that its one member unpacks to this size."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, b"")
        archive.infolist()[0].file_size = size
    return held.getvalue()


FLOATS = torch.linspace(-1, 1, 384).view(2, 3, 8, 8)
with warnings.catch_warnings():  # quantised tensors are deprecated, but their files stay
    warnings.simplefilter("ignore")
    QUANTISED = torch._empty_affine_quantized((2, 3, 8, 8), scale=0.01, zero_point=0, dtype=torch.qint8)
BAD_SETS = {
    "missing": (None, "neither"),
    "empty": ({}, "holds no images"),
    "single": ({"a.png": picture(0, 8, 8)}, "1 usable images"),
    "broken": ({"a.png": picture(0, 8, 8), "b.png": b"?", "c.jpg": b""}, "b.png", "c.jpg", "--skip-broken"),
    "notes.txt": (b"?", "neither"),
    "text.pt": (b"?", "not readable"),
    "foreign.pt": (b"cos\nsystem\n(S'touch executed'\ntR.", "not readable"),
    "model.pt": ({"f": torch.zeros(3)}, "no tensor y", "(N, 3, H, W)"),
    "list.pt": ([1, 2], "no tensor y"),
    "flat.pt": (torch.zeros(5, 3), "(5, 3)"),
    "four.pt": (torch.zeros(5, 4, 8, 8), "(5, 4, 8, 8)"),
    "none.pt": (torch.zeros(0, 3, 8, 8), "(0, 3, 8, 8)"),
    "one.pt": (picture(0, 8, 8)[None], "1 usable images"),
    "unit.pt": (picture(0, 8, 8)[None] / 255, "from 0 to", "[-1, 1]"),
    "large.pt": (picture(0, 8, 8)[None] - 100.0, "from -100 to"),
    "nan.pt": (torch.full((2, 3, 8, 8), math.nan), "nan"),
    "int.pt": (picture(0, 8, 8)[None].long(), "int64", "dense tensor of uint8"),
    "complex.pt": (FLOATS.to(torch.complex64), "complex64"),
    "float8.pt": (FLOATS.to(torch.float8_e4m3fn), "float8"),
    "sparse.pt": (FLOATS.to_sparse(), "sparse_coo"),
    "meta.pt": (FLOATS.to("meta"), "on meta"),
    "quantised.pt": (QUANTISED, "qint8"),
    "text.npz": (b"?", "mean mu", "finite numbers"),
    "foreign.npz": ({"mu": np.zeros(2)}, "mean mu"),
    "pickle.npz": ({"mu": np.zeros(2), "sigma": np.array([{}, {}])}, "mean mu"),
    "complex.npz": ({"mu": np.zeros(2), "sigma": np.eye(2) + 1j}, "finite numbers"),
    "words.npz": ({"mu": np.array(["0", "0"]), "sigma": np.eye(2)}, "finite numbers"),
    "dates.npz": ({"mu": np.array(["2024-01-01"], "M8[D]"), "sigma": np.eye(1)}, "finite numbers"),
    "n.npz": ({"mu": np.zeros(2), "sigma": np.eye(2), "n": 0}, "n >= 2 images"),
    "shape.npz": ({"mu": np.zeros(2), "sigma": np.eye(3)}, "covariance sigma"),
    "none.npz": ({"mu": np.zeros(0), "sigma": np.eye(0)}, "covariance sigma"),
    "nan.npz": ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "covariance sigma"),
    "skew.npz": ({"mu": np.zeros(2), "sigma": np.array([[1, 0.5], [0, 1]])}, "covariance sigma"),
    "negative.npz": ({"mu": np.zeros(2), "sigma": np.diag([1, -0.5])}, "covariance sigma"),
    "huge.npz": ({"mu": np.full(2, 1e200), "sigma": np.eye(2)}, "covariance sigma"),
    "huger.npz": ({"mu": np.zeros(2), "sigma": 1e200 * np.eye(2)}, "covariance sigma"),
    "expanded.pt": (picture(0, 8, 8).expand(10 ** 9, -1, -1, -1), "(1000000000, 3, 8, 8)"),
    "hole.pt": ("hole", "10.0 GiB", "over 8"),
    "bomb.pt": (deflated("data", 2 ** 33 + 1), "8.0 GiB, over 8"),
    "bomb.npz": (deflated("sigma.npy", 2 ** 30 + 1), "1.0 GiB, over 1"),
    "fifo.pt": ("fifo", "neither"),
    "fifo.npz": ("fifo", "neither"),
    "fifo": ("fifo", "neither"),
    "pipes": ({"a.png": "fifo", "b.png": picture(0, 8, 8)}, "1 usable images"),
    "bomb": ({"a.png": png_bomb(40_000, 40_000), "b.png": png_bomb(8000, 8000)}, "40000x40000", "8000x8000", "pixels"),
}


def write_set(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "fifo":
        os.mkfifo(path)
    elif content == "hole":  # takes no space, and reads as zeros
        with open(path, "wb") as file:
            file.truncate(10 * 2 ** 30)
    elif path.suffix == ".png":
        write_picture(path, content)
    elif path.suffix == ".npz":
        np.savez(path, **content)
    else:
        torch.save(content, path)


@pytest.mark.parametrize("name", BAD_SETS)
def test_bad_sets_are_said_before_any_download(fid, name, tmp_path):
    held, *words = BAD_SETS[name]
    if isinstance(held, dict) and "." not in name:
        (tmp_path / name).mkdir()
        for file, content in held.items():
            write_set(tmp_path / name / file, content)
    elif held is not None:
        write_set(tmp_path / name, held)
    torch.save(torch.stack([picture(k, 8, 8) for k in range(2)]), "good.pt")
    refuses(fid("good.pt", name, code=2), name, *words)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "hub").exists()


@pytest.mark.parametrize("options, words", [
    ([], "required"), (["good.pt"], "two sets"), (["good.pt"] * 3, "two sets"),
    (["good.pt", "good.pt", "--sede"], "--sede"),
    (["good.pt", "--save", "x.pt"], "end in .npz"), (["good.pt", "--save", "missing/x.npz"], "No such file"),
    (["good.pt", "--save", "aside.npz"], "Is a directory"), (["good.pt", "--save", f"{'a' * 250}.npz"], "too long"),
    (["good.pt", "--save", "good.npz"], "not exist yet"), (["good.pt", "good.pt", "--save", ""], "end in .npz"),
    (["good.npz", "good.npz", "--weights", "resnet.pth"], "--weights is for images"),
    (["good.pt", "good.npz", "--skip-broken"], "--skip-broken"), (["", "good.pt"], "neither"),
    (["good.pt", "good.pt", "--weights", ""], "--weights"),
    (["good.pt", "good.pt", "--device", "gpu7"], "--device gpu7"),
    (["good.pt", "good.pt", "--weights", "missing.pth"], "missing.pth (no file)"),
    (["good.pt", "good.pt", "--weights", "fifo.pth"], "fifo.pth (no file)"),
    (["good.pt", "good.pt", "--weights", "good.pt"], "in good.pt ("),
    (["good.pt", "good.pt", "--weights", "resnet.pth"], "in resnet.pth ("),
    (["good.pt", "good.pt"], "no network")])
def test_bad_command_lines_and_weights(fid, options, words, tmp_path):
    torch.save(torch.stack([picture(k, 8, 8) for k in range(2)]), "good.pt")
    torch.save({"conv1.weight": torch.zeros(2)}, "resnet.pth")
    np.savez("good.npz", mu=np.zeros(2), sigma=np.eye(2))
    os.mkfifo("fifo.pth")
    os.mkdir("aside.npz.tmp")
    refuses(fid(*options, code=2), words)
    assert not list((tmp_path / "hub").rglob("*.*"))  # no half of a download left as a whole


def test_weights_are_downloaded_once_and_checked(fid, monkeypatch, tmp_path):
    small = lambda: torch.nn.Sequential(collections.OrderedDict(  # a network of milliseconds in Inception's place
        pool=torch.nn.AdaptiveAvgPool2d(4), flat=torch.nn.Flatten(), fc=torch.nn.Linear(48, 9)))
    monkeypatch.setattr(eval_fid, "build_network", small)
    weights = tmp_path / "w.pth"
    torch.save(small().state_dict(), weights)
    monkeypatch.setattr(eval_fid, "URL", weights.as_uri())
    torch.save(torch.stack([picture(k, 8, 8) for k in range(2)]), "good.pt")
    refuses(fid("good.pt", "--save", "a.npz", code=2), "invalid hash", "--weights")  # as half a file has
    assert not list((tmp_path / "hub").rglob("*.*"))
    monkeypatch.setattr(eval_fid, "SHA256", hashlib.sha256(weights.read_bytes()).hexdigest()[:8])
    first = fid("good.pt", "--save", "a.npz")
    assert "downloading" in first and "not the published" not in first and final(first)["n_a"] == 2
    second = fid("good.pt", "--save", "b.npz")
    assert "downloading" not in second
    assert np.array_equal(np.load("a.npz")["sigma"], np.load("b.npz")["sigma"])  # deterministic
    monkeypatch.setattr(eval_fid, "SHA256", "0" * 8)  # now it is a network of the right shapes, but not the published
    refuses(fid("good.pt", "--save", "c.npz", code=2), "delete it to download")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_fid_that_is_not_finite_is_an_error(fid, monkeypatch, value):
    np.savez("good.npz", mu=np.zeros(2), sigma=np.eye(2))
    monkeypatch.setattr(eval_fid, "gaussian_w2", lambda *_: value)
    refuses(fid("good.npz", "good.npz", code=2), "FID is not finite")


def test_nan_in_statistics_is_no_distance_of_zero():
    assert math.isnan(frechet(gaussian([math.nan, 0.0], torch.eye(2)), gaussian([0.0, 0.0], torch.eye(2))))


def test_a_console_that_takes_no_more_costs_only_its_lines(fid, monkeypatch):
    np.savez("good.npz", mu=np.zeros(2), sigma=np.eye(2), n=3000)
    for name, code in (("closed.npz", 0), ("full.npz", 2)):
        reading_end, writing_end = os.pipe()
        os.close(reading_end)
        with os.fdopen(writing_end, "w") if code == 0 else open("/dev/full", "w") as console:
            monkeypatch.setattr(sys, "stdout", console)
            output = fid("good.npz", "--save", name, code=code)
        assert np.load(name)["n"] == 3000
    refuses(output, "could not be printed", "its disk full")  # the last line is all that it is run for
