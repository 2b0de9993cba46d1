"""Where each weight of a model stands in the files, in whichever layout, and reading it into its place."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minglm.formats.mapped import Span
from minglm.formats.smallfloats import GROUP, NAN_SCALE, SmallFloats, shapes_of
from minglm.formats.storage import Storage
from minglm.formats.tensors import DTYPES, FLOATS, TensorFile
from minglm.model.ops import Array

Files = Mapping[str, TensorFile]  # tensor name -> the file that holds it
SCALES = ("F32", "BF16", "F16")  # what scales of fp8 weights may be stored in


class Source(NamedTuple):
    """One weight: a tensor, or codes and scales."""

    kind: str | None  # of small floats
    files: Files
    names: tuple[str, ...]

    def storage(self, wanted: Storage) -> Storage:
        """How to keep it if the model is to be kept so: fp8 codes that are there already stay as they are."""
        both = wanted.small and wanted.small.startswith("fp8") and self.kind and self.kind.startswith("fp8")
        return wanted._replace(small=self.kind) if both else wanted

    def read(self) -> Any:
        arrays = [self.files[name].read(name) for name in self.names]
        return arrays[0] if self.kind is None else _small(self.kind, *arrays)

    def view(self) -> Any:
        """The same in the file's own bytes (but for scales that are not stored as they are used)."""
        arrays = [self.files[name].view(name) for name in self.names]
        return arrays[0] if self.kind is None else _small(self.kind, *arrays)

    def spans(self) -> Iterator[Span]:
        """Where it stands."""
        for name in self.names:
            yield self.files[name].span(name)

    def fill(self, out: Any) -> bool:
        """Write the weight into an array or `SmallFloats` of its shape; whether all of it is finite. Numbers that are
        not stay what they are in an array, and are an error in small floats."""
        found = self.read()
        if isinstance(out, SmallFloats):
            same = isinstance(found, SmallFloats) and found.kind == out.kind
            small = found if same else SmallFloats.of(out.kind, found.astype(np.float32))
            out.codes[...], out.scales[...] = small.codes, small.scales
            return not (out.scales == NAN_SCALE).any() if out.kind == "mxfp4" else _is_finite_fp8(out)
        out[...] = found.astype(out.dtype) if isinstance(found, SmallFloats) else found
        return bool(np.isfinite(out).all())


def _small(kind: str, codes: Array, scales: Array) -> SmallFloats:
    if kind == "mxfp4":
        return SmallFloats(kind, codes, scales)
    return SmallFloats(kind, codes.view(np.uint8), scales.astype(np.float32, copy=False))


def _is_finite_fp8(weight: SmallFloats) -> bool:
    """e4m3fn has no infinity, and NaN is all bits but the sign."""
    return bool(np.isfinite(weight.scales).all() and not ((weight.codes & 0x7F) == 0x7F).any())


# -- finding -----------------------------------------------------------------------------------------------------


def find_sources(files: Files, expected: Mapping[str, tuple[int, ...]], folder: Path) -> dict[str, Source]:
    """The source of each expected weight, name -> shape. Raises ValueError with one list of everything that is missing,
    unexpected, or of another shape or dtype."""
    sources, problems = match(files, expected)
    if problems:
        listing = "\n  ".join(problems)
        raise ValueError(
            f"{folder}: {len(problems)} tensors do not fit config.json; "
            f"compare its sizes and num_nextn_predict_layers with the files:\n  {listing}"
        )
    return sources


def match(files: Files, expected: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Source], list[str]]:
    """The sources, and a line for each tensor that does not fit."""
    sources = {name: _source(files, name, shape) for name, shape in expected.items()}
    used = {name for source in sources.values() for name in source.names}
    problems = [problem for name, shape in expected.items() for problem in _problems(sources[name], shape)]
    for name, file in files.items():
        shape = file.entries[name].shape
        if name not in used and 0 not in shape:  # transformers writes empty tensors where there are no shared experts
            problems.append(f"unexpected: {name} {list(shape)}")
    return sources, problems


def _source(files: Files, name: str, shape: tuple[int, ...]) -> Source:
    if len(shape) != 2:
        return Source(None, files, (name,))
    stem = name.removesuffix("weight")
    packed, scale, inverse = f"{stem}weight_packed", f"{stem}weight_scale", f"{stem}weight_scale_inv"
    if packed in files and name not in files:
        return Source("mxfp4", files, (packed, scale))
    if name in files and files[name].entries[name].dtype == "F8_E4M3":
        return Source("fp8-block", files, (name, inverse)) if inverse in files else Source("fp8", files, (name, scale))
    return Source(None, files, (name,))


def _problems(source: Source, shape: tuple[int, ...]) -> Iterator[str]:
    if source.kind is None:
        wanted = [(shape, tuple(FLOATS))]
    elif source.kind == "mxfp4" and shape[-1] % GROUP:
        yield f"wrong shape: {source.names[0]} stands for {list(shape)}, whose rows are no multiple of {GROUP} long"
        return
    else:
        codes, scales = shapes_of(source.kind, shape)
        small = source.kind == "mxfp4"
        wanted = [(codes, ("U8",) if small else ("F8_E4M3",)), (scales, ("U8",) if small else SCALES)]
    for name, (right, kinds) in zip(source.names, wanted, strict=True):
        if name not in source.files:
            other = f" (or weight_scale_inv {list(shapes_of('fp8-block', shape)[1])})" if "weight_scale" in name else ""
            yield f"missing: {name} {list(right)}{other if source.kind == 'fp8' else ''}"
            continue
        entry = source.files[name].entries[name]
        if entry.shape != right:
            yield f"wrong shape: {name} is {list(entry.shape)}, wanted {list(right)}"
        elif entry.dtype not in kinds:
            yield f"wrong dtype: {name} is {entry.dtype}, wanted one of {', '.join(sorted(kinds))}"


assert set(SCALES) <= DTYPES.keys()


def some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
