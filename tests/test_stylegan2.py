"""stylegan2.py: the numbers of NVIDIA's own generator, and files that must be refused without being run."""
import collections
import gzip
import io
import json
import math
import os
import pickle
import pickletools
import random
import sys
import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import HERE, random_generator

import stylegan2

SHARED = os.path.join(os.path.dirname(HERE), "shared", "stylegan2")

TRIPWIRE = "raise RuntimeError('executed')"  # in place of the source text that NVIDIA's loader runs
BLUR = torch.tensor([[1.0, 3, 3, 1], [3, 9, 9, 3], [3, 9, 9, 3], [1, 3, 3, 1]]) / 64


class Reduced:
    """Pickles as function(*args)."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


@pytest.fixture
def official(monkeypatch):
    """-> persistent(tensors by name, edit): objects that pickle in the official layout; edit(name, meta) spoils it."""
    def reconstruct(meta): pass
    class EasyDict(dict): pass
    for value, name, module in ((reconstruct, "_reconstruct_persistent_obj", "torch_utils.persistence"),
                                (EasyDict, "EasyDict", "dnnlib.util")):
        value.__module__, value.__name__, value.__qualname__ = module, name, name
        monkeypatch.setitem(sys.modules, module.split(".")[0], types.ModuleType(module.split(".")[0]))
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        setattr(sys.modules[module], name, value)
    kinds = {"synthesis": "SynthesisNetwork", "mapping": "MappingNetwork", "fc": "FullyConnectedLayer",
             "embed": "FullyConnectedLayer",
             "affine": "FullyConnectedLayer", "b": "SynthesisBlock", "conv": "SynthesisLayer",
             "torgb": "ToRGBLayer", "": "Generator"}

    def persistent(tensors, edit=lambda name, meta: None, name="", clamp=256, **sizes):
        own = {k[len(name):].lstrip("."): t for k, t in tensors.items() if not name or k.startswith(name + ".")}
        children = dict.fromkeys(k.split(".")[0] for k in own if "." in k)
        kind = kinds[name.split(".")[-1].rstrip("0123456789")]
        leaves = {k: t for k, t in own.items() if "." not in k}
        buffers = {k: leaves.pop(k) for k in ("w_avg", "noise_const") if k in leaves}
        if kind in ("SynthesisLayer", "SynthesisBlock"):
            buffers.update(resample_filter=BLUR)
        state = dict(sizes, training=False, _non_persistent_buffers_set=set(),
                     _buffers=collections.OrderedDict(buffers),
                     _parameters={k: torch.nn.Parameter(t, requires_grad=False) for k, t in leaves.items()},
                     _modules={k: persistent(tensors, edit, f"{name}.{k}".lstrip("."), clamp) for k in children},
                     _init_kwargs={"synthesis_kwargs": EasyDict(channel_max=16)})
        if kind in ("SynthesisLayer", "ToRGBLayer"):
            state.update(conv_clamp=clamp)
        if kind == "SynthesisBlock":
            state.update(architecture="skip", img_channels=3, is_last=False)
        meta = dict(type="class", version=6, module_src=TRIPWIRE, class_name=kind, state=state)
        edit(name, meta)
        return Reduced(reconstruct, meta)

    return persistent


def tensors_of(G):
    """The golden fill: tensor k of the sorted names, element i: S sin(0.7 i + 0.011 i^2 + 1.3 k) + O."""
    filled = {}
    for k, (name, like) in enumerate(sorted(G.state_dict().items())):
        i = torch.arange(like.numel(), dtype=torch.float64)
        scale = (140 if name.endswith("weight") else 20) if name.startswith("mapping.fc") else 1
        fill = scale * torch.sin(0.7 * i + 0.011 * i * i + 1.3 * k) + name.endswith("affine.bias")
        filled[name] = fill.view(like.shape).float()
    return filled


def write_generator(path, G_ema, protocol=3):
    with open(path, "wb") as file:
        parts = {"training_set_kwargs": None, "G": None, "D": None, "G_ema": G_ema, "augment_pipe": None}
        pickle.dump(parts, file, protocol)
    return str(path)


# for its shapes: its weights are written over
GOLDEN_G = random_generator(16, 16, 32, channel_base=256, channel_max=16, num_layers=3)
SIZES = dict(z_dim=16, c_dim=0, w_dim=16, img_resolution=32, img_channels=3, num_ws=8)
Z = torch.cos(0.3 * torch.arange(16, dtype=torch.float64) + torch.arange(2.0)[:, None])
PIXELS = [(0, 0, 0, 0), (0, 0, 15, 16), (0, 1, 7, 19), (0, 2, 20, 27), (1, 0, 5, 23), (1, 1, 22, 6), (1, 2, 31, 31)]
IMAGES = {  # mean, standard deviation, min, max and these pixels, of NVIDIA's own code in float64
    "psi 1": (-4.286035, 6.176219, -19.10019, 6.61679,
        [-10.30296, -15.80315, -1.976171, 3.803489, -14.89609, -2.919354, 1.545621]),
    "psi 0.7": (-4.237798, 6.323572, -18.60899, 7.127817,
        [-10.85726, -15.88444, -2.479096, 4.548037, -15.30063, -3.060544, 1.485965]),
    "cutoff": (-4.336797, 6.268508, -19.0198, 6.756815,
        [-10.42012, -15.95145, -2.117941, 3.976499, -14.80746, -2.81815, 1.503137]),
    "w+": (-4.483267, 6.28553, -19.93862, 6.924378,
        [-9.985817, -16.24441, -2.050501, 3.327871, -14.61837, -3.365355, 1.564344]),
    "none": (-4.09301, 5.884787, -14.47904, 4.302935,
        [-7.738234, -13.89144, -3.361853, 1.829571, -12.59343, -3.535415, 1.069376]),
    "clamp": (-1.498623, 2.823838, -5.968215, 3.399422,
        [-3.085327, -5.335245, -0.8628231, 2.393959, -5.564339, -0.8468441, 1.732672])}
W = {1: [-0.1272633, -0.1315599, -0.0347856, -0.1483324, 0.7649752, 0.0968951, -0.0462900, -0.1433072,
         0.0624277, 0.2312003, 1.0185607, 0.4580360, 1.0840165, -0.0192113, -0.1706454, 1.4521106],  # of z[1]
     0.7: [0.2104787, 0.1454531, 0.0295886, -0.2667872, 0.2426856, -0.1832066, -0.0832673, 0.0865984,
           0.3435344, 0.3589698, 0.6557349, 0.0501994, 0.4962941, -0.0405776, 0.1167431, 1.2978080]}
# of mean(G(z)^2)
GRAD = [[5.7195053, -1.5003666, 8.3485594, -13.520618, 2.2741955, 5.5403229, -5.0594954, -2.4255905,
         -0.48462275, 9.9022305, 1.6795949, -8.5034288, -0.97797676, 0.41667215, 11.593416, -2.884496],
        [2.2735129, 9.3651664, 12.1683, -0.572969, -4.123111, 6.2566718, -4.2493832, -0.77733928,
         4.8102675, 10.108245, -5.7993637, -2.8749009, -5.4582501, 1.206714, -2.4930598, 4.0261726]]


def check_golden(G, small_clamp, tolerance, device="cpu", **how):
    G, small_clamp, z = G.to(device), small_clamp.to(device), Z.float().to(device)
    for psi, w in W.items():
        assert (G.mapping(z, truncation_psi=psi)[1].cpu() - torch.tensor(w)).abs().max() < 2e-6
    per_layer = G.mapping(z) * (1 + 0.1 * torch.arange(8.0, device=device))[:, None]
    images = {"psi 1": G(z, **how), "psi 0.7": G(z, truncation_psi=0.7, **how), "none": G(z, noise_mode="none", **how),
              "cutoff": G.synthesis(G.mapping(z, truncation_psi=0.7, truncation_cutoff=3), **how),
              "w+": G.synthesis(per_layer, **how), "clamp": small_clamp(z, **how)}
    for name, (mean, std, low, high, pixels) in IMAGES.items():
        image = images[name].double().cpu()
        found = [image.mean(), image.std(correction=0), image.min(), image.max()] + [image[i] for i in PIXELS]
        error = max(abs(a.item() - b) for a, b in zip(found, [mean, std, low, high] + pixels)) / max(-low, high)
        assert error < tolerance, (name, error)
    z.requires_grad_()
    grad, = torch.autograd.grad(G(z, **how).square().mean(), z)
    assert (grad.cpu() - torch.tensor(GRAD)).abs().max() / 13.5 < 10 * tolerance


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_official_layout_gives_the_golden_numbers(tmp_path, official, protocol):
    tensors = tensors_of(GOLDEN_G)
    name = "synthesis.b32.conv0.weight"  # as --nhwc training stores it
    stored = {**tensors, name: tensors[name].contiguous(memory_format=torch.channels_last)}
    G, small_clamp = (stylegan2.load_generator(write_generator(
        tmp_path / "g.pkl", official(stored, clamp=clamp, **SIZES), protocol)) for clamp in (256, 1.5))
    assert (G.z_dim, G.w_dim, G.num_ws, G.img_resolution, G.img_channels) == (16, 16, 8, 32, 3)
    assert all(torch.equal(G.state_dict()[k], t) for k, t in tensors.items())
    assert not any(p.requires_grad for p in G.parameters())
    if protocol == 3:
        check_golden(G, small_clamp, 2e-6)
        if torch.cuda.is_available():
            torch.backends.cudnn.allow_tf32 = False  # else convolutions are rounded to ten bits on Ampere and later
            check_golden(G, small_clamp, 2e-5, "cuda")


@pytest.mark.skipif(not os.path.isdir(SHARED), reason="needs the official generator's numbers")
def test_every_number_of_the_official_generator():
    """A file that NVIDIA's classes wrote, and what their code makes of it in float64."""
    G, z = stylegan2.load_generator(os.path.join(SHARED, "fixture_golden.pkl")), Z.float().requires_grad_()
    with open(os.path.join(SHARED, "golden.json")) as file:
        golden = json.load(file)
    cutoff = G.synthesis(G.mapping(z, truncation_psi=0.7, truncation_cutoff=3))
    per_layer = G.synthesis(G.mapping(z) * (1 + 0.1 * torch.arange(8.0))[:, None])
    images = {"1": G(z), "0.7": G(z, truncation_psi=0.7), "0.7_cutoff3": cutoff, "1_wplus": per_layer,
              "1_noise_none": G(z, noise_mode="none")}
    pairs = []  # ours, theirs, the largest of their kind
    for name, image in images.items():
        image, theirs = image.detach().double(), golden["float64"][name]["img"]
        largest = max(-theirs["min"], theirs["max"])
        for ours, key in ((image.mean(), "mean"), (image.std(correction=0), "std_population"), (image.min(), "min"),
                          (image.max(), "max")):
            pairs.append((ours, theirs[key], largest))
        for ours, theirs_mean in zip(image.mean((2, 3)).flatten(), sum(theirs["mean_per_image_channel"], [])):
            pairs.append((ours, theirs_mean, largest))
        for index, value in theirs["pixels"]:
            pairs.append((image[tuple(index)], value, largest))
    grad, = torch.autograd.grad(G(z).square().mean(), z)
    theirs = torch.tensor(golden["float64_gradient"]["grad_z"])
    pairs += [(ours, value, 10 * theirs.abs().max().item()) for ours, value in zip(grad.flatten(), theirs.flatten())]
    assert len(pairs) > 195
    assert max(abs(float(ours) - float(value)) / largest for ours, value, largest in pairs) < 2e-6


def test_gradient_is_that_of_the_image_in_float64():
    G = random_generator(6, 5, 8, channel_base=32, channel_max=4, num_layers=2, conv_clamp=1.0, seed=1)
    G.double()
    for name, t in tensors_of(G).items():
        G.state_dict()[name].copy_(t)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    direction = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda z: (G(z) * direction).sum(), z)


def test_stopping_early_gives_the_smaller_generator():
    small = random_generator(16, 16, 8, channel_base=256, channel_max=16, num_layers=3)
    small.load_state_dict({k: GOLDEN_G.state_dict()[k] for k in small.state_dict()})
    image = GOLDEN_G(Z.float(), resolution=8)
    assert image.shape == (2, 3, 8, 8) and torch.equal(image, small(Z.float()))
    for wrong in (dict(resolution=12), dict(noise_mode="constant")):
        with pytest.raises(ValueError):
            GOLDEN_G(Z.float(), **wrong)


def test_the_cost_is_what_the_head_of_the_file_says():
    with torch.device("meta"):
        G = stylegan2.Generator(512, 512, [512] * 5 + [256, 128, 64], 8)
        for resolution, gflop in ((64, 32), (128, 61), (256, 91), (512, 120)):
            with FlopCounterMode(display=False) as counter:
                G.synthesis(torch.empty(1, 16, 512), resolution=resolution)
            assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, abs=1)


def test_a_class_conditional_generator_draws_the_chosen_class(tmp_path, official):
    """Against the mapping as it is written in FORMAT.md, 5.1, in float64."""
    tensors = tensors_of(GOLDEN_G)
    i = torch.arange(16 * 32.0)
    tensors["mapping.fc0.weight"] = (140 * torch.sin(0.3 * i + 0.02 * i * i)).view(16, 32)
    tensors["mapping.embed.weight"], tensors["mapping.embed.bias"] = torch.cos(i[:80]).view(16, 5), 0.1 * i[:16]
    path = write_generator(tmp_path / "g.pkl", official(tensors, **{**SIZES, "c_dim": 5}))
    unit = lambda x: x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()
    weight = lambda name: tensors[f"mapping.{name}.weight"].double()
    bias = lambda name: tensors[f"mapping.{name}.bias"].double()
    for label in (0, 3):
        y = torch.eye(5).double()[[label]] @ (weight("embed") / math.sqrt(5)).T + bias("embed")
        x = torch.cat([unit(Z), unit(y).expand(2, -1)], 1)
        for name in ("fc0", "fc1", "fc2"):
            x = x @ (weight(name) * (0.01 / math.sqrt(x.shape[1]))).T + bias(name) * 0.01
            x = math.sqrt(2) * torch.nn.functional.leaky_relu(x, 0.2)
        G = stylegan2.load_generator(path, label)
        assert G.z_dim == 16 and (G.mapping(Z.float())[:, 0] - x).abs().max() < 5e-6
    for label in (None, 5, -1):
        with pytest.raises(stylegan2.BadFile, match="class-conditional, with 5 classes.*0 to 4, with --class"):
            stylegan2.load_generator(path, label)
    path = write_generator(tmp_path / "g.pkl", official(tensors_of(GOLDEN_G), **SIZES))
    with pytest.raises(stylegan2.BadFile, match="no classes.*leave out the class"):
        stylegan2.load_generator(path, 0)


# ------------------------------------------------------------------------------------------------ files to refuse

TINY = random_generator(4, 4, 8, channel_base=32, channel_max=4, num_layers=2)
LAYOUT = dict(z_dim=4, c_dim=0, w_dim=4, img_resolution=8, img_channels=3, num_ws=4)


def in_state(key, value, at="mapping.fc1"):
    return lambda name, meta: meta["state"].update({key: value}) if name == at else None


def in_table(table, key, value, at="mapping.fc1"):
    return lambda name, meta: meta["state"][table].update({key: value}) if name == at else None


def bias(storage, offset=0, size=(4,), stride=(1,)):
    storage = Reduced(torch.storage._load_from_bytes, storage) if isinstance(storage, bytes) else storage
    tensor = Reduced(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})
    return in_table("_parameters", "bias", tensor)


def inner_pickles(blob):
    """Where the five pickles of a storage begin, and where the last one ends."""
    cuts = [0]
    for _ in range(5):
        stream = io.BytesIO(blob[cuts[-1]:])
        collections.deque(pickletools.genops(stream), 0)
        cuts.append(cuts[-1] + stream.tell())
    return cuts


def refused(path, contents):
    """-> those of [(words, bytes)] that load, or whose refusal lacks the words or is no single sentence."""
    wrong = []
    for words, content in contents:
        open(path, "wb").write(content)
        try:
            wrong.append((words, stylegan2.load_generator(path)))
        except stylegan2.BadFile as error:
            if words not in str(error) or not str(error).startswith(path) or "\n" in str(error):
                wrong.append((words, str(error)))
    return wrong


BLOB = torch.zeros(4).__reduce_ex__(2)[1][0].__reduce__()[1][0]  # of a storage
DAMAGED = "cut short, damaged, or of another program"


def test_poisoned_and_foreign_files_are_refused_by_one_sentence_and_nothing_is_run(tmp_path, official):
    trip, state, blob, cuts = tmp_path / "tripwire", TINY.state_dict(), BLOB, inner_pickles(BLOB)
    mkdir, code = Reduced(os.mkdir, str(trip)), f"import os; os.mkdir({str(trip)!r})"
    path = b"\x8c" + bytes([len(str(trip))]) + str(trip).encode()
    bomb, zipped = pickle.dumps(mkdir, 2), io.BytesIO()
    torch.save(torch.zeros(4), zipped)
    shared = Reduced(torch.storage._load_from_bytes, torch.zeros(50_000).__reduce_ex__(2)[1][0].__reduce__()[1][0])
    shared = Reduced(torch._utils._rebuild_tensor_v2, shared, 0, (4, 4, 3, 3), (36, 9, 3, 1), False, {})

    edits = [  # what the sentence must say, and what is done to a file that would load
        ("'posix mkdir'", in_state("x", mkdir)), ("exec'", in_state("x", Reduced(exec, code))),
        ("eval'", in_state("x", Reduced(eval, code), "")),
        ("getattr'", in_state("x", Reduced(getattr, "", "join"))),
        ("'torch.nn.modules.linear Linear'", in_state("x", torch.nn.Linear(1, 1))),
        ("Counter'", in_state("x", collections.Counter())),
        *[("'posix mkdir'", bias(blob[:a] + bomb + blob[b:])) for a, b in zip(cuts, cuts[1:])],
        (DAMAGED, bias(zipped.getvalue())),
        ("another size", bias(blob + b"1234")), ("another size", bias(blob[:-4])),
        (DAMAGED, bias("1" * 16)), (DAMAGED, bias(blob, 0, (4,), (1, 1))), (DAMAGED, bias(blob, 0.0)),
        *[("beyond", bias(blob, offset, (4,), (step,))) for offset, step in (
            (1, 1), (-1, 1), (0, 2), (3, -1), (2 ** 63 - 1, 1), (2 ** 64, 1), (0, 10 ** 12), (0, 2 ** 62))],
        ("another shape", bias(blob, 0, [4])), ("another shape", bias(blob, 0, (5,))),
        ("another shape", bias(blob, 0, (2 ** 31, 2 ** 31), (0, 0))), ("another shape", bias(blob, 0, (0,))),
        ("share storages", lambda name, meta: meta["state"]["_parameters"].update(weight=shared)
         if "conv" in name and "affine" not in name else None),
        ("DoubleStorage", in_table("_parameters", "bias", torch.zeros(4, dtype=torch.float64))),
        ("not finite", in_table("_parameters", "bias", torch.full((4,), math.nan))),
        ("bias is missing", in_table("_parameters", "bias", None)),
        (DAMAGED, in_table("_parameters", "bias", [1.0])),
        ("extra is unknown", in_table("_parameters", "extra", torch.zeros(1))),
        ("another shape", in_state("z_dim", 5, "")),
        (DAMAGED, in_table("_modules", "input", {}, "synthesis")),
        ("it has no mapping", in_state("_modules", {}, "mapping")),
        ("another version", lambda name, meta: meta.update(version=7)),
        ("class_name", lambda name, meta: meta.update(class_name="Discriminator")),
        ("activation of mapping.fc1", in_state("activation", "relu")), ("bias_gain", in_state("bias_gain", 0.02)),
        (DAMAGED, in_state("z_dim", 2 ** 62, "")), (DAMAGED, in_state("img_resolution", 16, "")),
        ("architecture", in_state("architecture", "resnet", "synthesis.b4")),
        ("conv_clamp", in_state("conv_clamp", -1.0, "synthesis.b4.conv1")),
        (DAMAGED, lambda name, meta: meta["state"].pop("conv_clamp", 0)),
        (DAMAGED, lambda name, meta: meta["state"].pop("w_dim", 0))]
    good = open(write_generator(tmp_path / "good.pkl", official(state, **LAYOUT), 4), "rb").read()
    edited = []
    for k, (words, edit) in enumerate(edits):
        path_of_it = write_generator(tmp_path / "edited.pkl", official(state, edit, **LAYOUT), 2 + k % 3)
        edited.append((words, open(path_of_it, "rb").read()))
    opcodes = [(DAMAGED, code) for code in (b"(NNo.", b"\x82\x01.", b"})R.", b"]]\x93.", b"N]a.", b"}}b.",
                                            b"cdnnlib.util\nEasyDict\nN}X\x08\0\0\0__code__Ns\x86b.")]
    opcodes += [("no G_ema", code) for code in (b"Pa\n.", b"]2.", b"cdnnlib.util\nEasyDict\n)}\x92.", b"NQ.", b"}.")]
    files = edited + opcodes + [
        ("'posix mkdir'", b"cposix\nmkdir\n" + path + b"\x85R."), ("'posix mkdir'", b"(" + path + b"iposix\nmkdir\n."),
        ("something follows", good + b"\n"),
        *[(DAMAGED, good[:n]) for n in (0, 1, 1000, len(good) // 2, len(good) - 1)],
        # what users take for such a file
        ("zip archive", zipped.getvalue()), ("gunzip", gzip.compress(good)), ("web page", b"<!DOCTYPE html><html>"),
        ("git lfs pull", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 364000000\n"),
        ("legacy.py", b"\x80\x03cdnnlib.tflib.network\nNetwork\n)\x81."),
        ("StyleGAN3", good.replace(TRIPWIRE.encode(), b"class SynthesisInput:".ljust(len(TRIPWIRE))))]
    wrong = refused(str(tmp_path / "bad.pkl"), files)
    assert not wrong and not trip.exists()
    with pytest.raises(stylegan2.BadFile, match="there is none.*download afhqdog.pkl"):
        stylegan2.load_generator(str(tmp_path / "none.pkl"))
    os.mkfifo(tmp_path / "pipe.pkl")  # to open it is to wait for a writer
    with pytest.raises(stylegan2.BadFile, match="there is none"):
        stylegan2.load_generator(str(tmp_path / "pipe.pkl"))
    assert stylegan2.load_generator(str(tmp_path / "good.pkl")).num_ws == 4  # what they were all made from does load
    pickle.loads(bomb)
    assert trip.exists()  # and the poison was poison


def test_any_byte_may_be_wrong(tmp_path, official):
    good = open(write_generator(tmp_path / "good.pkl", official(TINY.state_dict(), **LAYOUT), 3), "rb").read()
    draw, path = random.Random(0), str(tmp_path / "bad.pkl")
    for _ in range(60):
        content = bytearray(good)
        for _ in range(draw.choice((1, 3))):
            content[draw.randrange(len(good))] = draw.randrange(256)
        open(path, "wb").write(content)
        try:
            assert stylegan2.load_generator(path).num_ws == 4  # the byte was one of a number
        except stylegan2.BadFile as error:
            assert str(error).startswith(path)
