"""How weights are kept, in memory and on disk: the dtypes, and what each tensor becomes in them."""

import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from minglm.formats.smallfloats import KINDS, SmallFloats, is_small, shapes_of

DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class Storage(NamedTuple):
    """A way to keep a whole model: large matrices as small floats of a kind, or nothing so, and the rest."""

    small: str | None
    rest: np.dtype

    @property
    def name(self) -> str:
        return self.small or self.rest.name

    def empty(self, name: str, shape: tuple[int, ...]) -> Any:
        """Room for a tensor, which may be a stack of experts."""
        if self.small and is_small(name, self.small):
            return SmallFloats.empty(self.small, shape)
        return np.empty(shape, stored_dtype(name, self.rest))

    def bytes_of(self, name: str, shape: tuple[int, ...]) -> int:
        if self.small and is_small(name, self.small):
            codes, scales = (math.prod(part) for part in shapes_of(self.small, shape))
            return codes + scales * (1 if self.small == "mxfp4" else 4)
        return math.prod(shape) * stored_dtype(name, self.rest).itemsize


def as_storage(dtype: Any) -> Storage:
    """From a name: one of `DTYPES`, or "fp8", "fp8-block", "mxfp4" (and bfloat16 for what is never small). Raises
    ValueError for others."""
    if isinstance(dtype, str) and dtype in KINDS:
        return Storage(dtype, DTYPES["bfloat16"])
    try:
        name = dtype if dtype is None or isinstance(dtype, str) else np.dtype(dtype).name
    except (TypeError, ValueError, SyntaxError):  # NumPy parses what it is given
        name = dtype
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"dtype {name!r} cannot hold weights here; take one of {', '.join([*DTYPES, *KINDS])}")
    return Storage(None, DTYPES[name])


def as_dtype(dtype: Any) -> np.dtype:
    """One of `DTYPES`, from its name or anything NumPy takes for it. Raises ValueError for others."""
    storage = as_storage(dtype)
    if storage.small:
        raise ValueError(f"dtype {dtype!r} cannot be computed in; take one of {', '.join(DTYPES)}")
    return storage.rest


def stored_dtype(name: str, dtype: np.dtype) -> np.dtype:
    """The dtype a tensor is kept in: the selection bias never below float32.

    Trained biases lie close together; bfloat16 would merge most of them and send tokens to other experts.
    """
    return np.promote_types(dtype, np.float32) if name.endswith("e_score_correction_bias") else dtype


def cast(name: str, array: Any, storage: Storage) -> Any:
    """A tensor as it is kept. Raises ValueError for finite numbers that are too large for it."""
    if storage.small and is_small(name, storage.small):
        if isinstance(array, SmallFloats) and array.kind == storage.small:
            return array
        try:
            return SmallFloats.of(storage.small, array.astype(np.float32, copy=False))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    kind = stored_dtype(name, storage.rest)
    with np.errstate(over="ignore"):
        stored = array.astype(kind, copy=False)
    if isinstance(array, SmallFloats):
        return stored
    if stored.dtype.itemsize < array.dtype.itemsize and (np.isfinite(array) & ~np.isfinite(stored)).any():
        raise ValueError(f"{name} holds numbers too large for {kind.name}; take bfloat16 or float32")
    return stored
