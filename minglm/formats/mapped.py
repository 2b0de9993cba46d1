"""Experts that stay in their files: views of mapped bytes, of which only what is looked at is read, and a bound on how
much of it stays in memory.

The system reads a page of a mapped file when somebody looks at it, and keeps it as long as it likes. A process's share
of that counts as its memory (resident set). `Residency` gives pages back once there are more than a budget allows,
those of the experts that were used longest ago first. What was given back is read again when it is needed.
"""

import mmap
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from minglm.model.ops import Array


class Span(NamedTuple):
    """Part of a mapped file."""

    map: mmap.mmap
    start: int
    stop: int

    def release(self) -> None:
        """Give back the pages that lie wholly within."""
        page = mmap.PAGESIZE
        start, stop = -(-self.start // page) * page, self.stop // page * page
        if start < stop and hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED, start, stop - start)


class Residency:
    """Which experts are in memory, as far as we have looked at them, and what may stay."""

    def __init__(self, budget: int | None = None):
        """`budget`: bytes of experts that may stay; None: as many as the system likes."""
        self.budget, self.resident, self.read = budget, 0, 0  # bytes; `read`: looked at anew since the beginning
        self._spans: OrderedDict[tuple[int, int], tuple[Span, ...]] = OrderedDict()  # by stack and expert, oldest first

    def use(self, stack: "ExpertStack", experts: Iterable[int]) -> None:
        """These experts of a stack have just been read."""
        for e in experts:
            key, spans = (id(stack.home), int(e)), stack.home.spans[int(e)]
            if key in self._spans:
                self._spans.move_to_end(key)
                continue
            self._spans[key] = spans
            size = sum(span.stop - span.start for span in spans)
            self.resident, self.read = self.resident + size, self.read + size
        while self.budget is not None and self.resident > self.budget and len(self._spans) > 1:  # the last is in use
            _, spans = self._spans.popitem(last=False)
            for span in spans:
                span.release()
                self.resident -= span.stop - span.start


class ExpertStack(Sequence[Any]):
    """One projection of all experts of a layer, [E, out, in], each where its file has it: what takes the place of the
    stacked array in `minglm.model.params.Experts`."""

    ndim = 3

    def __init__(self, views: Sequence[Any], home: "Home", dtype: Any = None):
        """`dtype`: give each as numbers of this dtype; else as it is stored."""
        self._views, self.home, self._as = views, home, dtype

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, e: Any) -> Any:
        if self._as is None:
            return self._views[e]
        self.home.residency.use(self, [e])
        return self._views[e].astype(self._as)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self._views), *self._views[0].shape)

    @property
    def dtype(self) -> Any:
        return self._views[0].dtype if self._as is None else np.dtype(self._as)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        return sum(view.nbytes for view in self._views)

    def astype(self, dtype: Any, copy: bool = True) -> "ExpertStack":
        """The same experts, each widened when it is asked for. `copy` is there because arrays have it."""
        return ExpertStack(self._views, self.home, dtype)

    def used(self, indices: Array) -> None:
        """Tell that a kernel has read these experts, all three projections of each."""
        self.home.residency.use(self, np.unique(indices))


class Home(NamedTuple):
    """What the three projections of a layer share."""

    residency: Residency
    spans: list[tuple[Span, ...]]  # of each expert, all its tensors
