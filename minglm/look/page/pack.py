"""Arrays for a page: packed by groups, compressed, and written as text that the page unpacks when it is needed."""

import base64
import zlib
from typing import Any

import numpy as np

from minglm.model.ops import Array


class Packer:
    """Collects arrays; `add` returns what the page needs to find one again."""

    def __init__(self) -> None:
        self.groups: dict[str, list[bytes]] = {}
        self.sizes: dict[str, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes so far, not compressed."""
        return sum(self.sizes.values())

    def add(self, group: str, array: Array, narrow: bool = False) -> dict[str, Any]:
        """Whole numbers as int32, others as float32; `narrow`: as bfloat16, cut to its upper half if that loses
        nothing, and rounded otherwise."""
        kind, raw = _encoded(np.ascontiguousarray(array), narrow)
        start = self.sizes.get(group, 0)
        padded = raw + bytes(-len(raw) % 4)
        self.groups.setdefault(group, []).append(padded)
        self.sizes[group] = start + len(padded)
        return {"group": group, "at": start, "kind": kind, "shape": list(array.shape)}

    def scripts(self) -> str:
        """One element for each group."""
        return "\n".join(
            f'<script type="text/plain" id="group-{group}">{_text(parts)}</script>'
            for group, parts in self.groups.items()
        )


def _text(parts: list[bytes]) -> str:
    return base64.b64encode(zlib.compress(b"".join(parts), 6)).decode("ascii")


def _encoded(array: Array, narrow: bool) -> tuple[str, bytes]:
    if array.dtype.kind in "iub":
        return "i4", array.astype("<i4").tobytes()
    with np.errstate(over="ignore"):  # float64 beyond float32 is ∞ here
        values = array.astype("<f4")
    if not narrow:
        return "f4", values.tobytes()
    bits = values.view("<u4").astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to the nearest, ties to even
    rounded[np.isnan(values)] = 0x7FC0
    return "b2", rounded.astype("<u2").tobytes()
