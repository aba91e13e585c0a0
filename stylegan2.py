"""StyleGAN2-ADA generators in plain torch: read an official .pkl without running anything in it, and differentiate.

    G = load_generator("afhqdog.pkl")           # from NVIDIA's StyleGAN2-ADA-PyTorch release, folder "pretrained"
    images = G(z)                               # z (N, z_dim) ~ N(0, I) -> (N, 3, R, R), about [-1, 1], not clipped
    ws = G.mapping(z)                           # (N, num_ws, w_dim), one w per layer; equal unless truncated by layer
    small = G.synthesis(ws, resolution=128)     # the skip image at 128, at the cost of the blocks up to 128

Mapping: z / rms(z), then fully connected layers with sqrt(2) lrelu.  Synthesis starts from a constant 4x4 x:

    conv        s = affine(w);   y_o = d_o * sum_i W_oi * (s_i x_i),   d_o = (sum_i s_i^2 |W_oi|^2 + 1e-8)^(-1/2)
                x <- clamp(sqrt(2) lrelu(y + noise + bias)), twice per resolution
                the first of the two doubles the resolution: transposed convolution, then a 4x4 blur
    skip        image <- upsample(image) + clamp(1x1 conv of s x / sqrt(C) + bias), once per resolution

Scaling x before and y after one shared convolution equals a convolution with one kernel per sample.  That one would be
slow (grouped), and its backward pass would need the gradient of the kernels, half as much work again.  Weights are
constants: gradients flow to ws and z, once (no double backward).  For its backward pass a layer keeps one tensor, its
output, which is the next layer's input too.

Official 512x512 sizes, forward and backward to z, one CPU thread that does 50 to 80 GFLOP/s in matrix products:
    stop at                 64      128     256     512
    GFLOP forward           32      61      91      120         per image; backward as many again
    seconds per image       1.1     2.2     3.2     5.8         plain autograd: 4.0 and 8.2 s at 256 and 512
    MiB over the weights    140     220     420     750         plain autograd: 400 and 1 340 MiB at 128 and 512
Reading an official-size file (372 MB): 0.9 s, 0.5 GB at its peak.
Imports torch and the standard library only: copies into another project as one file.
"""
import io
import math
import os
import pickletools
import struct
from typing import NamedTuple

import torch
from torch import nn
import torch.nn.functional as F

SQRT2 = math.sqrt(2)
MAX_OPCODES = 400_000    # an official file has about 60 000, storages included; bounds what a hostile one can build
MAX_MODULES = 1000       # G_ema of 1024x1024 has 73


# ------------------------------------------------------------------------------------------------ the generator

def _constant(*shape):
    return nn.Parameter(torch.empty(shape), requires_grad=False)


class Linear(nn.Module):
    """x @ (gain weight)^T + lr bias, gain = lr / sqrt(fan in): (N, fan_in) -> (N, fan_out)."""

    def __init__(self, fan_in, fan_out, lr=1.0, activation="linear"):
        super().__init__()
        self.weight, self.bias = _constant(fan_out, fan_in), _constant(fan_out)
        self.lr, self.gain = lr, lr / math.sqrt(fan_in)
        self.official = dict(class_name="FullyConnectedLayer", activation=activation, weight_gain=self.gain,
                             bias_gain=lr)

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight.T, beta=self.lr, alpha=self.gain)


class Mapping(nn.Module):
    """z (N, z_dim) -> ws (N, num_ws, w_dim)."""

    def __init__(self, z_dim, w_dim, num_ws, num_layers):
        super().__init__()
        self.num_ws, self.num_layers = num_ws, num_layers
        self.register_buffer("w_avg", torch.empty(w_dim))
        for i in range(num_layers):
            setattr(self, f"fc{i}", Linear(w_dim if i else z_dim, w_dim, 0.01, "lrelu"))
        self.official = dict(class_name="MappingNetwork", num_layers=num_layers, num_ws=num_ws)

    def forward(self, z, truncation_psi=1, truncation_cutoff=None):
        """truncation_psi < 1 pulls w towards the mean w_avg, in the first truncation_cutoff layers or in all."""
        x = z.to(self.w_avg.dtype)
        x = x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for i in range(self.num_layers):
            x = SQRT2 * F.leaky_relu(getattr(self, f"fc{i}")(x), 0.2)
        ws = x[:, None].expand(-1, self.num_ws, -1)
        if truncation_psi == 1:
            return ws
        cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
        return torch.cat([self.w_avg.lerp(ws[:, :cutoff], truncation_psi), ws[:, cutoff:]], 1)


class _ModulatedConv(torch.autograd.Function):
    """out = clamp(lrelu(d * conv(s x) + bias + noise)).  x (N, I, H, W), s (N, I), d (N, O), weight (O, I, 3, 3),
    bias (O,), noise (H, W), (N, 1, H, W) or None, blur (4, 4) where the resolution doubles, else None.  x may be
    float16 while s and d are float32.

    By hand, because autograd would keep five tensors of this size instead of one, and pass over them twice as often."""

    @staticmethod
    def forward(ctx, x, s, d, weight, bias, noise, blur, clamp):
        y = x * s.to(x.dtype)[:, :, None, None]
        if blur is None:
            y = F.conv2d(y, weight, padding=1)
        else:
            y = _blur(F.conv_transpose2d(y, weight.transpose(0, 1), stride=2), blur, 1)
        y.mul_(d.to(x.dtype)[:, :, None, None]).add_(bias[:, None, None])
        if noise is not None:
            y.add_(noise)
        F.leaky_relu_(y, 0.2)
        if clamp is not None:
            y.clamp_(-clamp, clamp)
        ctx.save_for_backward(x, s, d, weight, bias, noise, blur, y)
        ctx.clamp = clamp
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, s, d, weight, bias, noise, blur, y = ctx.saved_tensors
        exact = s.dtype  # of the sums over pixels
        # With a = d conv + bias + noise and y = clamp(lrelu(a)): grad_a a = grad_y y and d conv = a - bias - noise.
        # So the gradient to d needs y alone, and conv is not kept.
        if ctx.clamp is not None:
            grad = torch.ops.aten.hardtanh_backward(grad, y, -ctx.clamp, ctx.clamp)
        buffer = grad * y  # written over below: fresh memory costs a CPU more than the arithmetic
        by_d = buffer.sum((2, 3), dtype=exact)
        grad = torch.ops.aten.leaky_relu_backward(grad, y, 0.2, True)
        by_d -= bias.to(exact) * grad.sum((2, 3), dtype=exact)
        if noise is not None:
            by_d -= torch.mul(grad, noise, out=buffer).sum((2, 3), dtype=exact)
        grad.mul_(d.to(x.dtype)[:, :, None, None])
        if blur is None:
            grad = F.conv_transpose2d(grad, weight, padding=1)
        else:
            grad = F.conv2d(_blur(grad, blur, 2), weight.transpose(0, 1), stride=2)
        by_s = (grad * x).sum((2, 3), dtype=exact)
        by_x = grad.mul_(s.to(x.dtype)[:, :, None, None]) if ctx.needs_input_grad[0] else None
        return by_x, by_s, by_d / d, None, None, None, None, None


def _blur(x, blur, padding):
    return F.conv2d(x, blur.expand(x.shape[1], 1, 4, 4), padding=padding, groups=x.shape[1])


class Layer(nn.Module):
    """One modulated 3x3 convolution: x (N, fan_in, r, r), w (N, w_dim) -> (N, fan_out, R, R), R = 2r if up else r."""

    def __init__(self, fan_in, fan_out, w_dim, resolution, up):
        super().__init__()
        self.weight, self.noise_strength, self.bias = _constant(fan_out, fan_in, 3, 3), _constant(), _constant(fan_out)
        self.register_buffer("noise_const", torch.empty(resolution, resolution))
        self.affine = Linear(w_dim, fan_in)
        blur = torch.tensor([1.0, 3.0, 3.0, 1.0], device="cpu")
        self.register_buffer("blur", blur.outer(blur) / 16 if up else None, persistent=False)
        self.clamp = None
        self.official = dict(class_name="SynthesisLayer", resolution=resolution, up=2 if up else 1, use_noise=True,
                             activation="lrelu", padding=1, act_gain=SQRT2)

    def forward(self, x, w, noise_mode):
        s, weight = self.affine(w), self.weight
        if x.dtype == torch.float16:  # keep products in range; both factors cancel in d
            weight = weight / (weight.abs().amax((1, 2, 3), keepdim=True) * math.sqrt(weight[0].numel()))
            s = s / s.detach().abs().amax(1, keepdim=True)
        d = SQRT2 * (s.square() @ torch.linalg.vector_norm(weight, dim=(2, 3)).square().T + 1e-8).rsqrt()
        noise = self.noise_const
        if noise_mode == "random":
            noise = torch.randn(len(w), 1, *noise.shape, dtype=noise.dtype, device=w.device)
        noise = None if noise_mode == "none" else (SQRT2 * self.noise_strength * noise).to(x.dtype)
        blur = None if self.blur is None else self.blur.to(x.dtype)
        bias = (SQRT2 * self.bias).to(x.dtype)
        return _ModulatedConv.apply(x, s, d, weight.to(x.dtype), bias, noise, blur, self.clamp)


class ToRGB(nn.Module):
    """x (N, fan_in, R, R), w (N, w_dim) -> (N, channels, R, R) in the dtype of w: a 1x1 convolution, modulated only."""

    def __init__(self, fan_in, channels, w_dim):
        super().__init__()
        self.weight, self.bias = _constant(channels, fan_in, 1, 1), _constant(channels)
        self.affine = Linear(w_dim, fan_in)
        self.clamp = None
        self.official = dict(class_name="ToRGBLayer", weight_gain=1 / math.sqrt(fan_in))

    def forward(self, x, w):
        s = self.affine(w) / math.sqrt(x.shape[1])
        kernel = (self.weight.flatten(1) * s[:, None]).to(x.dtype)  # (N, channels, fan_in)
        image = (kernel @ x.flatten(2)).to(w.dtype).unflatten(2, x.shape[2:]) + self.bias[:, None, None]
        return image if self.clamp is None else image.clamp(-self.clamp, self.clamp)


class Block(nn.Module):
    """One resolution: x, image and ws (N, slots, w_dim) -> x, image at `resolution`."""

    def __init__(self, fan_in, fan_out, w_dim, resolution, channels):
        super().__init__()
        if fan_in:
            self.conv0 = Layer(fan_in, fan_out, w_dim, resolution, up=True)
        else:
            self.const = _constant(fan_out, 4, 4)
        self.conv1 = Layer(fan_out, fan_out, w_dim, resolution, up=False)
        self.torgb = ToRGB(fan_out, channels, w_dim)
        self.official = dict(class_name="SynthesisBlock", resolution=resolution, in_channels=fan_in,
                             architecture="skip")

    def forward(self, x, image, ws, noise_mode):
        if x is not None:
            x = self.conv0(x, ws[:, 0], noise_mode)
        else:
            x = self.const.expand(len(ws), -1, -1, -1)
        x = self.conv1(x, ws[:, -2], noise_mode)
        if image is None:
            return x, self.torgb(x, ws[:, -1])
        # zeros between, then [1,3,3,1] x [1,3,3,1] / 16: bilinear interpolation, but of an image with a border of zeros
        image = F.interpolate(F.pad(image, (1, 1, 1, 1)), scale_factor=2.0, mode="bilinear")[:, :, 2:-2, 2:-2]
        return x, image + self.torgb(x, ws[:, -1])


class Synthesis(nn.Module):
    """ws (N, num_ws, w_dim) -> images (N, channels, resolution, resolution)."""

    def __init__(self, w_dim, widths, channels):
        super().__init__()
        self.resolutions = [4 << i for i in range(len(widths))]
        for resolution, fan_in, fan_out in zip(self.resolutions, [0] + widths, widths):
            setattr(self, f"b{resolution}", Block(fan_in, fan_out, w_dim, resolution, channels))
        self.official = dict(class_name="SynthesisNetwork", num_ws=2 * len(widths))

    def forward(self, ws, noise_mode="const", resolution=None, fp16=None):
        """noise_mode const, none or random; resolution: stop there (default: the last).

        fp16: half precision for the last four resolutions; the image changes by 1e-3.  It is used only where the file
        clamps the activations, which keeps them in range.  Default: on GPUs of compute capability 7 and up.  Not on GTX
        16xx, known for nan in it, nor on GTX 10xx, which is no faster in it.  Gradients too end at 65504: differentiate
        a cost, not a cost over a small eps."""
        resolution = resolution or self.resolutions[-1]
        if noise_mode not in ("const", "none", "random") or resolution not in self.resolutions:
            raise ValueError(f"noise_mode {noise_mode!r} not const, none or random, or resolution {resolution!r} "
                             f"not in {self.resolutions}")
        fp16 = _good_at_fp16(ws.device) if fp16 is None else fp16
        x = image = None
        for i, r in enumerate(self.resolutions[:self.resolutions.index(resolution) + 1]):
            block = getattr(self, f"b{r}")
            if fp16 and r >= max(8, self.resolutions[-1] // 8) and block.conv1.clamp is not None:
                x = x.half()
            ws_of_block = ws[:, max(0, 2 * i - 1):2 * i + 2]  # its last one is the next block's first
            x, image = block(x, image, ws_of_block, noise_mode)
        return image


def _good_at_fp16(device):
    return (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
            and "GTX 16" not in torch.cuda.get_device_name(device))


class Generator(nn.Module):
    """z (N, z_dim) -> images (N, img_channels, img_resolution, img_resolution).  widths: channels at 4, 8, 16, ..."""

    def __init__(self, z_dim, w_dim, widths, num_layers, img_channels=3):
        super().__init__()
        self.z_dim, self.w_dim, self.img_channels = z_dim, w_dim, img_channels
        self.img_resolution, self.num_ws = 2 << len(widths), 2 * len(widths)
        self.synthesis = Synthesis(w_dim, widths, img_channels)
        self.mapping = Mapping(z_dim, w_dim, self.num_ws, num_layers)
        self.official = dict(class_name="Generator", c_dim=0, num_ws=self.num_ws, img_resolution=self.img_resolution)

    def forward(self, z, truncation_psi=1, noise_mode="const", truncation_cutoff=None, resolution=None, fp16=None):
        return self.synthesis(self.mapping(z, truncation_psi, truncation_cutoff), noise_mode, resolution, fp16)

    def flops(self, resolution=None):
        """Floating-point operations (a multiply-add is two) of one image forward; backward to z takes as many again."""
        total = 0
        for name, module in self.named_modules():
            at = int(name.split(".")[1][1:]) if name.startswith("synthesis.b") else 4
            if at <= (resolution or self.img_resolution) and hasattr(module, "weight"):
                up = getattr(module, "blur", None) is not None
                pixels = 1 if isinstance(module, Linear) else (at // 2) ** 2 if up else at ** 2
                total += 2 * pixels * module.weight.numel() + (32 * at ** 2 * len(module.bias) if up else 0)
        return total


def random_generator(z_dim=512, w_dim=512, resolution=512, channel_base=32768, channel_max=512, num_layers=8,
                     img_channels=3, conv_clamp=256, seed=0):
    """A generator as StyleGAN2 initialises it, on the CPU: for tests and smoke runs, where no file is at hand."""
    generator = torch.Generator().manual_seed(seed)
    widths = [min(channel_base // (4 << i), channel_max) for i in range(resolution.bit_length() - 2)]
    G = Generator(z_dim, w_dim, widths, num_layers, img_channels)
    for name, t in G.state_dict().items():
        if name.endswith(("weight", "const")):
            t.normal_(0, 100 if name.startswith("mapping") else 1, generator=generator)
        else:
            t.fill_(1 if name.endswith("affine.bias") else 0)
    for module in G.modules():
        if hasattr(module, "clamp"):
            module.clamp = conv_clamp
    return G


class Shapes(nn.Module):
    """In a generator's place, for checks that are to be seen: a square and a disc before a shaded background,
    z (N, 32) -> (N, 3, resolution, resolution), about [-1, 1].  A random mapping network turns the direction of z into
    33 numbers of about N(0, 1) each, and the image shows them all."""
    z_dim, img_resolution = 32, 32

    def __init__(self):
        super().__init__()
        self.mapping = random_generator(32, 64, 4, 4, 1, num_layers=2).mapping
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("read", 1.2 * torch.linalg.qr(torch.randn(64, 33, generator=generator))[0])
        self.mapping.w_avg.copy_(self.mapping(torch.randn(4096, 32, generator=generator))[:, 0].mean(0))

    def forward(self, z, resolution=32, fp16=None):
        shades, *shapes = ((self.mapping(z)[:, 0] - self.mapping.w_avg) @ self.read)[..., None].split((15, 9, 9), 1)
        at = torch.linspace(-1, 1, 2 * resolution + 1, device=z.device)[1::2]
        v, u = (grid.flatten() for grid in torch.meshgrid(at, at, indexing="ij"))
        image = 0.15 * shades.view(-1, 3, 5) @ torch.stack([torch.ones_like(u), u, v, u * v, u * u - v * v])
        for distance, numbers in zip((lambda x, y: torch.maximum(x.abs(), y.abs()), torch.hypot), shapes):
            x, y, size, colour, shade = numbers.split((1, 1, 1, 3, 3), 1)
            x, y = u - 0.35 * x, v - 0.35 * y
            inside = 0.4 * (0.3 * size).exp() - distance(x, y)  # (N, 1, pixels)
            image = image.lerp(0.8 * (0.8 * colour).tanh() + 0.7 * shade * x, (inside / 0.05).sigmoid())
        return image.unflatten(2, (resolution, resolution))


# ------------------------------------------------------------------------------------------------ the file

class BadFile(ValueError):
    """Not a generator this file can use; str() is one sentence, with the remedy."""


class _Module(NamedTuple):
    class_name: str
    state: dict


class _Tensor(NamedTuple):
    storage: memoryview  # float32, whole; decoded only if wanted: G and D of the file never are
    offset: int
    size: tuple
    stride: tuple


class _Reader:
    """A pickle machine that cannot act.

    Of the opcodes it knows only those that push plain data.  Of the globals it knows only those of an official file, as
    names for the methods below, which check what they are given and return plain data.  It does not recurse, so no file
    is too deep.  Its memo is a dict, so no index is too large.  Dict keys and set items are str: no hash goes deep."""

    LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES",
                "SHORT_BINBYTES"}
    FIXED = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
             "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
    TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "STACK_GLOBAL": 2, "REDUCE": 2,
             "NEWOBJ": 2, "BUILD": 1, "STOP": 1}
    FILLS = {"APPEND": list, "APPENDS": list, "SETITEM": dict, "SETITEMS": dict, "ADDITEMS": set}

    def __init__(self, size):
        self.opcodes_left, self.bytes_left, self.float64 = MAX_OPCODES, 4 * size, object()
        self.inner = {"torch FloatStorage": "float32"}
        self.outer = {"torch_utils.persistence _reconstruct_persistent_obj": self.module,
                      "torch._utils _rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
                      "torch._utils _rebuild_tensor_v2": self.tensor,
                      "torch.storage _load_from_bytes": self.storage,
                      "collections OrderedDict": lambda: {}, "dnnlib.util EasyDict": lambda: {},
                      "builtins set": self.set, "__builtin__ set": self.set, "_codecs encode": self.encode,
                      "numpy dtype": self.dtype, "numpy.core.multiarray scalar": self.scalar,
                      "numpy._core.multiarray scalar": self.scalar}

    def read(self, stream, names):
        """The next pickle of a stream -> its value.  names: the globals it may use."""
        stack, marks, memo = [], [], {}
        for code, value, _ in pickletools.genops(stream):
            self.opcodes_left -= 1
            _require(self.opcodes_left >= 0, "it has too many parts")
            op = code.name
            if op in self.TAKES or op in ("TUPLE", "APPENDS", "SETITEMS", "ADDITEMS"):
                start = len(stack) - self.TAKES[op] if op in self.TAKES else marks.pop()
                items = stack[start:]
                del stack[start:]
            if op in self.LITERALS:
                stack.append(value)
            elif op in self.FIXED:
                stack.append(self.FIXED[op]())
            elif op == "MARK":
                marks.append(len(stack))
            elif op in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
                memo[len(memo) if value is None else value] = stack[-1]
            elif op in ("BINGET", "LONG_BINGET"):
                stack.append(memo[value])
            elif op.startswith("TUPLE"):
                stack.append(tuple(items))
            elif op in self.FILLS:
                kind = self.FILLS[op]
                _require(type(stack[-1]) is kind, "it fills something that is no list, dict or set")
                keys = {list: [], dict: items[::2], set: items}[kind]
                _require(all(type(key) is str for key in keys), "it has keys that are no names")
                fill = {list: list.extend, dict: dict.update, set: set.update}[kind]
                fill(stack[-1], zip(keys, items[1::2]) if kind is dict else items)
            elif op in ("GLOBAL", "STACK_GLOBAL"):
                _require(op == "GLOBAL" or type(items[0]) is type(items[1]) is str, "it has a global without a name")
                name = value if op == "GLOBAL" else " ".join(items)
                _require(name in names, f"it asks for {name[:60]!r}")
                stack.append(names[name])
            elif op in ("REDUCE", "NEWOBJ"):
                # the only callables on the stack are those of names
                _require(callable(items[0]) and type(items[1]) is tuple, "it calls what is no function")
                stack.append(items[0](*items[1]))
            elif op == "BUILD":  # the byte order of the one numpy dtype
                _require(stack[-1] is self.float64 and type(items[0]) is tuple and items[0][1:2] == ("<",),
                         "it sets the state of an object")
            elif op == "STOP":
                return items[0]
            else:  # BINPERSID leaves the tuple that names a storage where it is
                _require(op in ("PROTO", "FRAME") or (op == "BINPERSID" and names is self.inner),
                         f"it uses the opcode {op}")

    def spend(self, n):
        """What one opcode can repeat on data that is in the file once: in all, no more than four times the file."""
        self.bytes_left -= n
        _require(self.bytes_left >= 0, "it uses its parts too often")

    def module(self, meta):
        _require(meta["type"] == "class" and meta["version"] == 6, "it has another version of the layout")
        _require(type(meta["class_name"]) is str and type(meta["state"]) is dict,
                 "it has a module without name or state")
        return _Module(meta["class_name"], meta["state"])

    def storage(self, blob):
        """What torch.save wrote before torch 1.6: five pickles, a count, the raw numbers.  -> memoryview of float32"""
        stream = io.BytesIO(blob)
        magic, version, system, named, keys = [self.read(stream, self.inner) for _ in range(5)]
        word, dtype, key, place, count, view = named
        _require(magic == 0x1950A86A20F9469CFC6C and version == 1001 and system["little_endian"] is True and
                 (word, dtype, view) == ("storage", "float32", None) and type(key) is str and keys == [key],
                 "a storage of it is foreign")
        self.spend(stream.tell())
        numbers = memoryview(blob)[stream.tell():]
        _require(type(count) is int and numbers[:8] == struct.pack("<q", count) and len(numbers) == 8 + 4 * count,
                 "a storage of it has another size than it says")
        return numbers[8:].cast("f")

    def tensor(self, storage, offset, size, stride, requires_grad, hooks):
        _require(type(storage) is memoryview and type(size) is type(stride) is tuple, "a tensor of it has no storage")
        _require(len(size) == len(stride) <= 4 and all(type(n) is int and n >= 0 for n in (offset, *stride)) and
                 all(type(n) is int and n > 0 for n in size), "a tensor of it has an impossible shape")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride))
        _require(math.prod(size) <= len(storage) and last < len(storage), "a tensor of it reaches beyond its storage")
        return _Tensor(storage, offset, size, stride)

    def set(self, items):
        _require(type(items) is list and all(type(item) is str for item in items),
                 "it has a set of other things than names")
        self.spend(len(items))
        return set(items)

    def encode(self, text, codec):
        _require(type(text) is str and codec == "latin1", "it encodes text in another way")
        self.spend(len(text))
        return text.encode("latin1")

    def dtype(self, *values):
        _require(values == ("f8", False, True), "it has a number of another type")
        return self.float64

    def scalar(self, dtype, raw):
        _require(dtype is self.float64, "it has a number of another type")
        return struct.unpack("<d", raw)[0]


def _require(good, why):
    if not good:
        raise BadFile(why)


def load_generator(path):
    """G_ema of an official StyleGAN2-ADA-PyTorch .pkl: float32, on the CPU, weights without gradients; or BadFile."""
    try:
        with open(path, "rb") as file:
            return _build(file, os.path.getsize(path))
    except OSError as error:
        raise BadFile(f"cannot read {path} ({error.strerror}): name a network .pkl of NVIDIA's StyleGAN2-ADA-PyTorch "
                      "release, as afhqdog.pkl") from None
    except BadFile as error:
        why = error
    except Exception as error:  # where a malformed file trips a step of the checks themselves
        why = f"it is cut short or malformed, {type(error).__name__}"
    raise BadFile(f"{path} is not a StyleGAN2-ADA-PyTorch generator ({' '.join(str(why).split())}): nothing in it "
                  "was run; get afhqdog.pkl of that release again")


def _build(file, length):
    _require(file.read(2) != b"PK", "it is a zip, as torch.save writes them")
    file.seek(0)
    reader = _Reader(length)
    top = reader.read(file, reader.outer)
    _require(file.tell() == length, "something follows its end")
    _require(type(top) is dict and type(top.get("G_ema")) is _Module, "it holds no G_ema")
    modules, tensors, pending = {}, {}, [("", top["G_ema"])]
    while pending:
        name, module = pending.pop()
        modules[name] = module
        tables = [module.state[key] for key in ("_parameters", "_buffers", "_modules")]
        _require(len(modules) <= MAX_MODULES and all(len(table) < 100 for table in tables), "it has too many modules")
        _require(all(len(key) < 100 for table in tables for key in table), "it has a name that is too long")
        prefix = name and name + "."
        for table in tables[:2]:
            tensors.update((prefix + key, tensor) for key, tensor in table.items() if tensor is not None)
        pending += [(prefix + key, child) for key, child in tables[2].items()]
        _require(all(type(child) is _Module for _, child in pending), "it has a module that is none")
    _require("synthesis.input" not in modules, "it is a StyleGAN3 file")
    _require(all(type(tensor) is _Tensor for tensor in tensors.values()), "it has a tensor that is none")

    sizes = [modules[""].state[key] for key in ("z_dim", "w_dim", "img_channels", "img_resolution")]
    num_layers = sum(name.startswith("mapping.fc") and name.endswith(".weight") for name in tensors)
    _require(all(type(n) is int and 0 < n <= 65536 for n in (*sizes, num_layers)), "its sizes are impossible")
    z_dim, w_dim, img_channels, resolution = sizes
    firsts = [tensors.get(f"synthesis.b{4 << i}.conv1.bias") for i in range(resolution.bit_length() - 2)]
    with torch.device("meta"):  # shapes only
        G = Generator(z_dim, w_dim, [tensor.size[0] if tensor else 1 for tensor in firsts], num_layers, img_channels)
    blurs = {name for name in tensors if name.endswith("resample_filter")}
    shapes = {name: tuple(tensor.shape) for name, tensor in G.state_dict().items()}
    for name in sorted(shapes.keys() ^ (tensors.keys() - blurs)):
        raise BadFile(f"{name[:60]} is {'missing' if name in shapes else 'unknown'}")
    for name, shape in shapes.items():
        _require(tensors[name].size == shape, f"{name} has another shape than {shape}")
    _require(sum(tensor.storage.nbytes for tensor in tensors.values()) <= length, "its tensors share storages")
    dense = {name: torch.frombuffer(bytearray(tensor.storage), dtype=torch.float32)
             .as_strided(tensor.size, tensor.stride, tensor.offset).contiguous() for name, tensor in tensors.items()}
    blur = torch.tensor([1.0, 3.0, 3.0, 1.0])
    for name, tensor in dense.items():
        _require(bool(tensor.isfinite().all()), f"{name} is not finite")
        _require(name not in blurs or torch.equal(tensor, blur.outer(blur) / 64), f"{name} is not that of [1,3,3,1]")
    G.load_state_dict({name: dense[name] for name in shapes}, assign=True)

    for name, module in G.named_modules():
        class_name, state = modules[name]
        for key, value in module.official.items():
            found = class_name if key == "class_name" else state.get(key, value)
            same = math.isclose(found, value, rel_tol=1e-6) if type(found) is type(value) is float else found == value
            _require(same, f"{key} of {name or 'G_ema'} is not {value}")
        if hasattr(module, "clamp"):
            clamp = state["conv_clamp"]
            _require(clamp is None or type(clamp) in (int, float) and 0 < clamp < math.inf,
                     f"conv_clamp of {name} is impossible")
            module.clamp = clamp
    return G
