"""What small floats gain in decoding: `python -m minglm.bench.small` on random weights of a shape of `shapes.py`.

Decoding reads each weight that takes part once, so what a dtype can gain is the ratio of the bytes. Models take turns
in one process; each round gives one ratio to bfloat16, and the median of the rounds counts.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from typing import NamedTuple

from minglm.api import Model
from minglm.bench.shapes import SHAPES, quick_params
from minglm.config import Config
from minglm.formats.storage import Storage, as_storage
from minglm.look.tables import table
from minglm.model.params import shapes, walk_stacked

KINDS = ("bfloat16", "fp8", "fp8-block", "mxfp4")
PROMPT, NEW, ROUNDS = 8, 48, 7
HEADER = ("dtype", "MB / token", "tokens / s", "gain by bytes", "gain measured", "of what bytes allow, %")


class SmallRow(NamedTuple):
    """One dtype. `bound`: bfloat16's bytes over its own; `gain`: its speed over bfloat16's."""

    dtype: str
    bytes: int
    speed: float  # tokens per second
    bound: float
    gain: float

    @property
    def share(self) -> float:
        """Of the gain that the bytes allow."""
        return (self.gain - 1) / (self.bound - 1) if self.bound > 1 else 1.0


def token_bytes(config: Config, storage: Storage) -> int:
    """Weights that one token reads: all but the embedding, of which it needs a row, and the experts not picked."""
    total = 0
    for name, array in walk_stacked(shapes(config)):
        if name == "model.embed_tokens.weight" and not config.tie_word_embeddings:
            continue
        picked = (config.num_experts_per_tok, *array.shape[1:]) if "*" in name else array.shape
        total += storage.bytes_of(name, picked)
    return total


def compare(config: Config, rounds: int = ROUNDS, threads: int | None = None) -> list[SmallRow]:
    """A row for each of `KINDS`."""
    wide = Model(config, quick_params(config, "bfloat16"), name="bfloat16")
    models = [wide, *(wide.astype(kind) for kind in KINDS[1:])]
    prompt = [i % config.vocab_size for i in range(3, 3 + PROMPT)]
    speeds: list[list[float]] = []
    for number in range(rounds + 1):  # the first compiles
        found = [m.generate(prompt, NEW, end_ids=(), threads=threads).stats.tokens_per_second for m in models]
        if number:
            speeds.append(found)
    sizes = [token_bytes(config, as_storage(kind)) for kind in KINDS]
    return [
        SmallRow(
            kind,
            sizes[i],
            statistics.median(found[i] for found in speeds),
            sizes[0] / sizes[i],
            statistics.median(found[i] / found[0] for found in speeds),
        )
        for i, kind in enumerate(KINDS)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="M", choices=[*SHAPES], help="default %(default)s: 2 GB of bfloat16")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args(arguments)
    rows = compare(SHAPES[given.shape].config, given.rounds, given.threads)
    cells = [
        (r.dtype, f"{r.bytes / 1e6:,.0f}", f"{r.speed:,.1f}", f"{r.bound:.2f}", f"{r.gain:.2f}",
         f"{100 * r.share:.0f}" if math.isfinite(r.share) else "")
        for r in rows
    ]  # fmt: skip
    print(table(cells, HEADER))
    return 0


if __name__ == "__main__":
    sys.exit(main())
