"""How many bytes a token stands for: vocabularies compared on text that they were not learnt from.

Command: python -m minglm.evaluate.compression [--tasks N] [--save FILE]
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm.std import tqdm

from minglm.data.documents import balanced_sample, documents
from minglm.data.heldout import heldout_documents
from minglm.data.items import Item
from minglm.data.tasks import TASKS, heldout_items, make_train, plain
from minglm.look.tables import markdown_table
from minglm.text.tokenizer import Tokenizer, train_tokenizer

VOCAB_SIZES = (512, 1024, 2048, 4096, 8192)
EXAMPLE = "3847"
# Article 1 of the Universal Declaration of Human Rights: a language that the training text does not have.
CHINESE = "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。"


class Row(NamedTuple):
    """One vocabulary. Of a plain byte model, every count is that of the bytes alone: no tags."""

    vocab_size: int
    digits: int  # most digits in a token
    number_tokens: int  # ids of the vocabulary that stand for two digits or more
    parameters: int  # of embedding and head
    example: str
    bytes_per_token: dict[str, float]  # by kind of text


def compression_table(
    training: Iterable[str],
    samples: Mapping[str, Sequence[str]],
    vocab_sizes: Sequence[int],
    digits: Sequence[int] = (1, 3),
    hidden_size: int = 192,
) -> list[Row]:
    """A row per vocabulary learnt from `training`, measured on `samples`; first, a plain byte model's."""
    texts = list(training)
    rows = [Row(256, 1, 0, 2 * 256 * hidden_size, "|".join(EXAMPLE), dict.fromkeys(samples, 1.0))]
    kinds = [(most, size) for most in digits for size in vocab_sizes]
    for most, size in tqdm(kinds, desc="vocabularies", unit="vocabulary", disable=None):
        tokenizer = train_tokenizer(texts, size, most)
        example = "|".join(tokenizer.token(i) for i in tokenizer.encode(EXAMPLE))
        measured = {name: bytes_per_token(tokenizer, sample) for name, sample in samples.items()}
        rows.append(Row(size, most, number_tokens(tokenizer), 2 * size * hidden_size, example, measured))
    return rows


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """UTF-8 bytes of the texts over tokens, each text encoded by itself. ValueError if there is no text."""
    sizes = [(len(text.encode()), len(tokenizer.encode(text, special=False))) for text in texts]
    size, tokens = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0)
    if not tokens:
        raise ValueError("bytes per token need some text")
    return size / tokens


def number_tokens(tokenizer: Tokenizer) -> int:
    """How many ids stand for two digits or more, and nothing else."""
    found = (tokenizer.token_bytes(i) for i in range(len(tokenizer)))
    return sum(len(token) > 1 and token.isdigit() for token in found)


def training_text(items: int = 2000) -> list[str]:
    """What a tokenizer is learnt from: as much code as prose, and `items` items of each task, in both forms."""
    rng = np.random.default_rng(0)
    made = [make_train(task, rng) for task in TASKS.values() for _ in range(items)]
    return [document.text for document in balanced_sample(documents())] + _texts(made)


def _texts(items: Iterable[Item]) -> list[str]:
    """Each item direct and worked."""
    return ["".join(plain(item, thinking)) for item in items for thinking in (False, True)]


def heldout_samples() -> dict[str, list[str]]:
    """Text that no tokenizer is learnt from: code, prose, the tasks' items, number words apart; and Chinese."""
    items = {task.name: _texts(heldout_items(task, 100, seed=0)) for task in TASKS.values()}
    words = items.pop("number_words")
    return {
        **{domain: [d.text for d in heldout_documents(domain)] for domain in ("code", "prose")},
        "tasks": [text for texts in items.values() for text in texts],
        "number words": words,
        "Chinese": [CHINESE],
    }


def markdown(rows: list[Row]) -> str:
    """The table for docs/tokenizer.md."""
    names = list(rows[0].bytes_per_token)
    head = ["vocabulary", "digits", *names, "number tokens", EXAMPLE, "embedding + head"]
    lines = []
    for row in rows:
        measured = [f"{row.bytes_per_token[name]:.2f}" for name in names]
        size = f"{row.vocab_size:,}" if row.vocab_size > 256 else "256 (bytes)"
        example = row.example.replace("|", "·")  # a bar would end the table's cell
        lines.append([size, str(row.digits), *measured, f"{row.number_tokens:,}", example, f"{row.parameters:,}"])
    return markdown_table(lines, head)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table for this machine's training text, and write it to a file if one is named."""
    parser = argparse.ArgumentParser(prog="python -m minglm.evaluate.compression", description=main.__doc__)
    parser.add_argument("--tasks", type=int, default=2000, metavar="N", help="learn from N items of each task (2000)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the table here too")
    options = parser.parse_args(arguments)
    training = training_text(options.tasks)
    print(f"learning from {sum(len(text.encode()) for text in training) / 1e6:.1f} MB …", file=sys.stderr)
    table = markdown(compression_table(training, heldout_samples(), VOCAB_SIZES))
    print(table, end="")
    if options.save:
        options.save.write_text(table, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
