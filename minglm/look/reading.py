"""How much of a mapped checkpoint has been read, shown while somebody waits for it."""

import sys
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

from minglm.formats.mapped import ExpertStack, Residency
from minglm.model.params import Moe, Params

EVERY = 0.5  # seconds
T = TypeVar("T")


def show_reading(steps: Iterable[T], params: Params) -> Iterator[T]:
    """The same steps. Until the first one comes, which may take minutes, the terminal shows how many bytes of experts
    were read; nothing for weights in memory, or where nobody watches."""
    residency = residency_of(params)
    if residency is None or not sys.stderr.isatty():
        yield from steps
        return
    stop = threading.Event()

    def show() -> None:
        while not stop.wait(EVERY):
            read = f"{residency.read / 1e9:,.2f} GB of experts read (other weights are not counted)"
            print(f"\r{read}", end="", file=sys.stderr, flush=True)
        print("\r\033[K", end="", file=sys.stderr, flush=True)

    watcher = threading.Thread(target=show, daemon=True)
    watcher.start()
    try:
        for step in steps:
            stop.set()
            watcher.join()
            yield step
    finally:
        stop.set()


def residency_of(params: Params) -> Residency | None:
    """What is known of the memory that mapped experts take; None for weights in memory."""
    for layer in params.layers:
        if isinstance(layer.mlp, Moe) and isinstance(layer.mlp.experts.gate_proj, ExpertStack):
            return layer.mlp.experts.gate_proj.home.residency
    return None
