"""What is in a checkpoint's folder, from config.json and the headers of its files: no weight is read."""

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from minglm.config import Config
from minglm.formats.checkpoint import expected_of, open_files, shapes_by_name
from minglm.formats.smallfloats import KINDS
from minglm.formats.sources import Files, Source, match
from minglm.formats.storage import DTYPES, as_storage
from minglm.formats.tensors import TensorFile
from minglm.look.describe import architecture, in_bytes, parameters
from minglm.look.tables import table
from minglm.model.params import Params, walk_stacked

MODES = (*DTYPES, *KINDS)
SHOWN = 20  # problems that are listed one by one


def describe_folder(folder: Path, tensors: bool = False) -> str:
    """Sizes, files, dtypes, what is missing or unexpected, and how much memory each way to load it takes; with
    `tensors` every tensor too. Raises ValueError for files that cannot be read at all."""
    with open_files(folder) as files, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        config, wanted = expected_of(folder, files)
        sources, problems = match(files, shapes_by_name(wanted))
        parts = [
            f"{folder}",
            table(architecture(config), ("size", "letter", "value")),
            table(_counts(config, files), ("what", "value")),
            table(_dtypes(files), ("stored as", "tensors", "bytes")),
            "Memory that the weights take, by how they are loaded:\n\n"
            + table(_modes(config, wanted, sources, complete=not problems), ("load(…)", "bytes")),
            _fit(problems),
            *(str(warning.message) for warning in warned),
        ]
        if tensors:
            parts.append("\n".join(_line(name, files[name]) for name in _in_order(sources, files)))
    return "\n\n".join(parts)


def small_kind(folder: Path) -> str | None:
    """The kind of the small floats in which a folder's matrices are stored; None for wider numbers."""
    with open_files(folder) as files, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever loads it is told
        _, wanted = expected_of(folder, files)
        sources, _ = match(files, shapes_by_name(wanted))
        return next((source.kind for source in sources.values() if source.kind), None)


def _in_order(sources: dict[str, Source], files: Files) -> Iterator[str]:
    """The files' tensors in the order of `minglm.walk`, then those that the model does not know."""
    known = [name for source in sources.values() for name in source.names if name in files]
    yield from known
    yield from sorted(files.keys() - set(known))


def _line(name: str, file: TensorFile) -> str:
    return f"{name:70s} {file.entries[name].dtype:8s} {list(file.entries[name].shape)}"


def _counts(config: Config, files: Files) -> list[tuple[str, str]]:
    return [
        *parameters(config),
        ("key/value cache per token", f"{in_bytes(config.kv_bytes_per_token(4))} (float32)"),
        ("files", f"{len({id(file) for file in files.values()})}"),
    ]


def _dtypes(files: Files) -> list[tuple[str, str, str]]:
    tensors, size = Counter[str](), Counter[str]()
    for name, file in files.items():
        kind, _, start, stop = file.entries[name]
        tensors[kind] += 1
        size[kind] += stop - start
    return [(kind, f"{tensors[kind]:,}", in_bytes(size[kind])) for kind in sorted(size, key=lambda k: -size[k])]


def _modes(config: Config, wanted: Params, sources: dict[str, Source], complete: bool) -> Iterator[tuple[str, str]]:
    for mode in MODES:
        if mode == "mxfp4" and (config.hidden_size % 32 or config.moe_intermediate_size % 32):
            continue
        storage = as_storage(mode)
        size = sum(storage.bytes_of(name, array.shape) for name, array in walk_stacked(wanted))
        yield f"dtype={mode!r}", in_bytes(size)
    if complete:
        expert, rest = 0, 0
        for name, source in sources.items():
            size = sum(span.stop - span.start for span in source.spans())
            routed = ".mlp.experts." in name
            rest += 0 if routed else size
            expert = max(expert, size) if routed else expert
        least = rest + 3 * expert * config.num_experts_per_tok
        yield "mode='mmap', memory=", f"{in_bytes(least, up=True)} or more"


def _fit(problems: list[str]) -> str:
    if not problems:
        return "Every tensor that config.json asks for is there, and nothing else."
    more = f"\n  … and {len(problems) - SHOWN:,} more" if len(problems) > SHOWN else ""
    return f"{len(problems):,} tensors do not fit config.json:\n  " + "\n  ".join(problems[:SHOWN]) + more
