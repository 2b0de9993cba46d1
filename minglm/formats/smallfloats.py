"""Weights of 8 and 4 bits: FP8 (e4m3fn) and MXFP4 (e2m1 with a power of two for each block of 32).

A float of 8 bits has sixteen steps from one power of two to the next but one; what makes it fit a matrix is a *scale*
for each row, block or group: weight = code · scale. Three layouts are known, as releases and engines have them:

| kind        | codes                            | scales                                               |
|-------------|----------------------------------|------------------------------------------------------|
| fp8         | e4m3fn [out, in]                 | float32 [out, 1]: largest of the row / 448           |
| fp8-block   | e4m3fn [out, in]                 | float32 [⌈out/128⌉, ⌈in/128⌉]: largest of the block / 448 |
| mxfp4       | two e2m1 in a byte [out, in / 2] | one byte [out, in / 32]: the power of two, plus 127  |

Sources: OCP Microscaling Formats 1.0; compressed-tensors' formats `float-quantized` and `mxfp4-pack-quantized`;
DeepSeek-V3's `weight_scale_inv`.
"""

import re
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from minglm.config import Config
from minglm.model.ops import Array
from minglm.model.params import shapes, walk_stacked

FP8, FP4 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float4_e2m1fn)
LARGEST_FP8, LARGEST_FP4 = 448.0, 6.0
BLOCK = 128  # rows and columns of fp8-block
GROUP = 32  # numbers that share a scale in mxfp4
NAN_SCALE = 255  # of e8m0, which has neither sign nor infinity
KINDS = ("fp8", "fp8-block", "mxfp4")

_LINEAR = r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|(experts\.[\d*]+|shared_experts)\.(gate|up|down)_proj)"
_SMALL = {
    "fp8": re.compile(rf".*\.{_LINEAR}\.weight"),
    "fp8-block": re.compile(rf".*\.{_LINEAR}\.weight"),
    "mxfp4": re.compile(r".*\.mlp\.experts\.[\d*]+\.(gate|up|down)_proj\.weight"),
}


def is_small(name: str, kind: str) -> bool:
    """Whether the tensor of this name has few bits in a checkpoint of this kind. Embedding, head, norms, biases, the
    router and `eh_proj` never have, nor in mxfp4 anything but the routed experts."""
    return kind in _SMALL and bool(_SMALL[kind].fullmatch(name))


class SmallFloats:
    """A matrix [out, in], or a stack of them [E, out, in], as codes and scales.

    As far as the model needs, it is like the array that it stands for: shape, `len`, one matrix of a stack by its
    number, and `astype`, which gives the weights as numbers.
    """

    def __init__(self, kind: str, codes: Array, scales: Array):
        """`codes` uint8, `scales` float32 or for mxfp4 uint8; shapes as in the table above."""
        self.kind, self.codes, self.scales = kind, codes, scales

    @classmethod
    def empty(cls, kind: str, shape: tuple[int, ...]) -> "SmallFloats":
        codes, scales = shapes_of(kind, shape)
        return cls(kind, np.empty(codes, np.uint8), np.empty(scales, np.uint8 if kind == "mxfp4" else np.float32))

    @classmethod
    def of(cls, kind: str, weight: Array) -> "SmallFloats":
        """Round a weight, row, block or group by itself. Raises ValueError for NaN, infinity, and sizes that do not
        divide into groups."""
        check_shape(kind, weight.shape)
        if not np.isfinite(weight).all():
            raise ValueError(f"{kind} cannot hold NaN or infinity")
        return cls(kind, *(_to_mxfp4(weight) if kind == "mxfp4" else _to_fp8(weight, kind)))

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.codes.shape[-1] * (2 if self.kind == "mxfp4" else 1))

    @property
    def dtype(self) -> np.dtype:
        return FP4 if self.kind == "mxfp4" else FP8

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, e: int) -> "SmallFloats":
        if self.ndim < 3 or not isinstance(e, int | np.integer):
            raise TypeError(f"{self!r} holds codes and scales; .astype(np.float32) makes the array that can be indexed")
        return SmallFloats(self.kind, self.codes[e], self.scales[e])

    def astype(self, dtype: Any, copy: bool = True) -> Array:
        """The weights as numbers. `copy` is there because arrays have it; this is always a new array."""
        if self.kind != "mxfp4":
            return (self.codes.view(FP8).astype(np.float32) * spread(self.scales, self.shape)).astype(dtype)
        codes = np.stack([self.codes & 15, self.codes >> 4], axis=-1).view(FP4)  # the low half comes first
        groups = codes.reshape(*self.scales.shape, GROUP).astype(np.float32)
        with np.errstate(over="ignore"):
            powers = np.ldexp(np.float32(1), self.scales[..., None].astype(np.int32) - 127)
        powers[self.scales == NAN_SCALE] = np.nan
        return (groups * powers).reshape(self.shape).astype(dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        raise TypeError(f"{self!r} holds codes and scales; .astype(np.float32) makes an array of it")

    def __repr__(self) -> str:
        return f"SmallFloats({self.kind}, {list(self.shape)})"


def shapes_of(kind: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of codes and scales for weights of this shape."""
    *stack, out, inputs = shape
    if kind == "mxfp4":
        return (*stack, out, inputs // 2), (*stack, out, inputs // GROUP)
    if kind == "fp8-block":
        return shape, (*stack, -(-out // BLOCK), -(-inputs // BLOCK))
    return shape, (*stack, out, 1)


def check_shape(kind: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError for a weight that cannot be of this kind."""
    if kind not in KINDS:
        raise ValueError(f"no small float {kind!r}; there are {', '.join(KINDS)}")
    if kind == "mxfp4" and shape[-1] % GROUP:
        raise ValueError(
            f"mxfp4 wants rows of a multiple of {GROUP} numbers, this weight is {list(shape)}; take fp8, or sizes "
            f"that divide by {GROUP}"
        )


def spread(scales: Array, shape: tuple[int, ...]) -> Array:  # [.., R, C] -> [.., out or 1, in or 1]
    """The scale of each number, or of each row where it has one."""
    if scales.shape[-2:] == (shape[-2], 1):
        return scales
    rows, columns = np.arange(shape[-2]) // BLOCK, np.arange(shape[-1]) // BLOCK
    return scales[..., rows[:, None], columns]


def _to_fp8(weight: Array, kind: str) -> tuple[Array, Array]:
    weight = np.asarray(weight, np.float32)
    largest = np.abs(weight).max(axis=-1, keepdims=True) if kind == "fp8" else _largest_of_blocks(weight)
    scales = np.maximum(largest / np.float32(LARGEST_FP8), np.finfo(np.float32).tiny)  # a row of zeros needs one, too
    codes = np.clip(weight / spread(scales, weight.shape), -LARGEST_FP8, LARGEST_FP8)  # beyond it, rounding gives NaN
    return codes.astype(FP8).view(np.uint8), scales


def _largest_of_blocks(weight: Array) -> Array:
    *stack, out, inputs = weight.shape
    padded = np.zeros((*stack, -(-out // BLOCK) * BLOCK, -(-inputs // BLOCK) * BLOCK), np.float32)
    padded[..., :out, :inputs] = np.abs(weight)
    return padded.reshape(*stack, padded.shape[-2] // BLOCK, BLOCK, padded.shape[-1] // BLOCK, BLOCK).max(axis=(-3, -1))


def _to_mxfp4(weight: Array) -> tuple[Array, Array]:
    """Of the two powers of two that could serve a group, the smaller cuts its largest number off at 6, the larger
    rounds all others more coarsely. The one with the smaller squared error is taken."""
    groups = np.asarray(weight, np.float32).reshape(*weight.shape[:-1], -1, GROUP)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    power = np.where(largest > 0, np.frexp(largest)[1] - 3, -127)  # largest / 2 ** power lies in [4, 8)
    power = np.clip(power, -127, 126)
    scaled = np.ldexp(groups, -power)
    halved, cut = (scaled / 2).astype(FP4), scaled.clip(-LARGEST_FP4, LARGEST_FP4).astype(FP4)
    errors = [np.square(c.astype(np.float32) * f - scaled).sum(-1, keepdims=True) for c, f in ((cut, 1), (halved, 2))]
    larger = (errors[1] < errors[0]) & (power < 125)  # beyond, the largest float32 would become infinity
    codes = np.where(larger, halved.view(np.uint8), cut.view(np.uint8)).reshape(*weight.shape[:-1], -1, 2)
    return codes[..., 0] | codes[..., 1] << 4, (power + larger + 127)[..., 0].astype(np.uint8)


# -- on disk -----------------------------------------------------------------------------------------------------


def disk_tensors(name: str, weight: SmallFloats) -> Iterator[tuple[str, Array]]:
    """The two tensors that stand for a weight `….weight` in a file."""
    stem = name.removesuffix("weight")
    if weight.kind == "mxfp4":
        yield f"{stem}weight_packed", weight.codes
    else:
        yield name, weight.codes.view(FP8)
    yield f"{stem}{'weight_scale_inv' if weight.kind == 'fp8-block' else 'weight_scale'}", weight.scales


def quantization_config(kind: str, config: Config) -> dict[str, Any]:
    """What config.json says of it, for transformers, vLLM and SGLang. The list of what is not quantised names whole
    modules, as the FP8 releases of GLM-4.5 do."""
    if kind == "fp8-block":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": _not_small(kind, config),
        }
    bits: dict[str, Any] = {"type": "float", "symmetric": True, "dynamic": False}
    if kind == "fp8":
        weights = {"num_bits": 8, "strategy": "channel", **bits}
        inputs = {"num_bits": 8, "strategy": "token", **bits, "dynamic": True}
    else:
        weights, inputs = {"num_bits": 4, "strategy": "group", "group_size": GROUP, **bits}, None
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if kind == "fp8" else "mxfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        "ignore": _not_small(kind, config),
    }


def check_quantization(found: Any) -> None:
    """Tensors' names and dtypes say how they are stored, but not how long blocks and groups are. Raises ValueError for
    a `quantization_config` of config.json with others than ours."""
    if found is None:
        return
    if not isinstance(found, dict):
        raise ValueError(f"quantization_config is {found!r}, wanted an object")
    groups = found.get("config_groups") or {}
    weights = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    for part in [found, *(w for w in weights if isinstance(w, dict))]:
        for field, known in (
            ("weight_block_size", [BLOCK] * 2),
            ("block_structure", [BLOCK] * 2),
            ("group_size", GROUP),
        ):
            if part.get(field) not in (None, known):
                raise ValueError(f"quantization_config has {field} {part[field]!r}; {known} can be read here")


def _not_small(kind: str, config: Config) -> list[str]:
    """The modules with a matrix that stays as it is."""
    matrices = [name for name, array in walk_stacked(shapes(config)) if array.ndim > 1 and "*" not in name]
    return [name.removesuffix(".weight") for name in matrices if not is_small(name, kind)]
