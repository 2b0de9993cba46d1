"""safetensors files: their tensors as views of the mapped file, and writing one so that it is whole on the disk.

A file is 8 bytes that say how long the header is, a JSON header (name -> dtype, shape, where it begins and ends), then
the numbers. The library checks it; the views are ours, because the library copies, and cannot give NumPy 8-bit floats.
"""

import functools
import json
import mmap
import os
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minglm.formats.mapped import Span
from minglm.model.ops import Array

FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
DTYPES = {**FLOATS, "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "U8": np.dtype(np.uint8)}


class Entry(NamedTuple):
    """What a header says of a tensor."""

    dtype: str  # as written there
    shape: tuple[int, ...]
    start: int  # in the file
    stop: int


class TensorFile:
    """One open file."""

    def __init__(self, path: Path):
        """Raises ValueError for a file that is damaged or no safetensors file."""
        self.path = path
        try:
            with safe_open(path, framework="np") as checked:
                names = set(checked.keys())
            self._file = open(path, "rb")  # open as long as the object is in use
            size = int.from_bytes(self._file.read(8), "little")
            header = json.loads(self._file.read(size))
            self.entries = {name: _entry(header[name], 8 + size) for name in names}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: cannot read it: {error}; damaged or cut short? Copy it again") from error

    def read(self, name: str) -> Array:
        """The tensor, a copy. Its dtype must be one of `DTYPES`. Raises OSError if the file has become shorter."""
        kind, shape, start, stop = self.entries[name]
        self._file.seek(start)
        data = self._file.read(stop - start)
        if len(data) < stop - start:
            raise OSError(f"{self.path} has become shorter")
        return np.frombuffer(data, DTYPES[kind]).reshape(shape)

    def view(self, name: str) -> Array:
        """The tensor, read-only, in the file's own bytes: nothing is read before somebody looks at it."""
        kind, shape, start, stop = self.entries[name]
        return np.frombuffer(memoryview(self.map)[start:stop], DTYPES[kind]).reshape(shape)

    def span(self, name: str) -> Span:
        """Where the tensor stands in the mapped file."""
        _, _, start, stop = self.entries[name]
        return Span(self.map, start, stop)

    @functools.cached_property
    def map(self) -> mmap.mmap:
        return mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    def close(self) -> None:
        """No more reading; views stay."""
        self._file.close()


def _entry(said: Any, begin: int) -> Entry:
    start, stop = said["data_offsets"]
    return Entry(said["dtype"], tuple(said["shape"]), begin + start, begin + stop)


def write_tensors(path: Path, tensors: dict[str, Array]) -> None:
    """One safetensors file, on the disk when this returns. Raises OSError if it cannot be written."""
    try:  # "format" is the layout's name, transformers looks for it; a second entry would change places at random
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path.parent}: the weights could not be written, what was there still is: {error}") from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors 0.8 lets nobody but the owner read its files
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays hold the same bytes in the same order, whatever their shapes and dtypes."""
    return np.array_equal(_bytes(a), _bytes(b))


def _bytes(a: Array) -> Array:
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8)
