"""A checkpoint larger than the memory that it may take: `python -m minglm.bench.large FOLDER`.

Writes one in the shape of GLM-4.5-Air (fewer layers, random weights, over 20 GB) and generates from it, mapped.

Every token prints its time, the bytes of experts that had to be read anew, and the process's memory by the system's own
count, the most that it was while the token was computed.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from tqdm.std import tqdm

from minglm.api import Model, load
from minglm.config import PRESETS, Config
from minglm.formats.memory import in_bytes
from minglm.formats.storage import as_storage
from minglm.formats.tensors import write_tensors
from minglm.look.reading import residency_of
from minglm.look.tables import table
from minglm.model.ops import Array
from minglm.model.params import is_norm, shapes, walk, walk_stacked

LAYERS = 5  # of Air's 46: one dense, four with 128 experts; 21.8 GB
MEMORY = 5.0  # GB of the files that may stay in memory
PROMPT, NEW = 12, 24  # tokens
EXPERTS = 64  # of one projection in a file
POOL = 1 << 26  # random numbers, of which every matrix takes a piece


class Token(NamedTuple):
    seconds: float
    read: int  # bytes of experts that were not in memory
    resident: int  # bytes of this process's memory at most, meanwhile


def air(layers: int) -> Config:
    return PRESETS["GLM-4.5-Air"].replace(num_hidden_layers=layers, num_nextn_predict_layers=0, eos_token_id=())


def write_folder(folder: Path, config: Config, seed: int = 0) -> None:
    """Random bfloat16 weights in files of about a gigabyte. Every matrix is a piece of one pool of random numbers and
    begins somewhere else in it, so no two are equal."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pool = rng.standard_normal(POOL, np.float32).astype(ml_dtypes.bfloat16)
    weight_map: dict[str, str] = {}
    with tqdm(total=sum(sizes(config)), unit="B", unit_scale=True, disable=None) as bar:
        for file, names in groupby(walk(shapes(config)), lambda named: _file(named[0])):
            tensors = {name: _weight(name, wanted.shape, pool, rng) for name, wanted in names}
            write_tensors(folder / file, tensors)
            weight_map.update(dict.fromkeys(tensors, file))
            bar.update(sum(array.nbytes for array in tensors.values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(config.to_json())  # the last: now it is whole


def sizes(config: Config) -> tuple[int, int]:
    """Bytes of the routed experts, and of all other weights."""
    storage = as_storage("bfloat16")
    named = [(name, storage.bytes_of(name, array.shape)) for name, array in walk_stacked(shapes(config))]
    experts = sum(size for name, size in named if "*" in name)
    return experts, sum(size for _, size in named) - experts


def check(folder: Path, config: Config, memory: float, new: int) -> None:
    """Raises ValueError before anything is written: for a bound that one token needs more than, for tokens that make no
    median, and if the disk has not the room."""
    experts, rest = sizes(config)
    layers = config.num_hidden_layers - config.first_k_dense_replace
    least = rest + experts // layers * config.num_experts_per_tok // config.n_routed_experts
    if not least <= memory < float("inf"):
        raise ValueError(
            f"--memory {memory / 1e9:g} GB must be a number, and not less than one token needs: {in_bytes(rest)} for "
            f"all but the routed experts, {in_bytes(least - rest)} for those of one layer; give at least "
            f"{in_bytes(least, up=True)}"
        )
    most = config.max_position_embeddings - PROMPT
    if not 2 <= new <= most:
        raise ValueError(f"--tokens {new} must lie between 2 and {most:,}")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if not (folder / "config.json").exists() and experts + rest > free:
        raise ValueError(f"{folder} would take {in_bytes(experts + rest)}, {in_bytes(free)} are free there")


def _file(name: str) -> str:
    parts = name.split(".")
    experts = f"-{int(parts[5]) // EXPERTS}" if ".experts." in name else ""
    return f"model-{parts[2] if '.layers.' in name else parts[-2]}{experts}-{parts[-2]}.safetensors"


def _weight(name: str, shape: tuple[int, ...], pool: Array, rng: np.random.Generator) -> Array:
    if is_norm(name):
        return np.ones(shape, ml_dtypes.bfloat16)
    if len(shape) == 1:
        return np.zeros(shape, np.float32 if name.endswith("correction_bias") else ml_dtypes.bfloat16)
    size = int(np.prod(shape))
    start = int(rng.integers(0, len(pool) - min(size, len(pool) // 2)))
    piece = np.resize(pool[start:], size) if size > len(pool) - start else pool[start : start + size]
    scale = ml_dtypes.bfloat16(2.0 ** round(np.log2(shape[1] ** -0.5)))
    return (piece * scale).reshape(shape)


def run(model: Model, prompt: Sequence[int], new: int) -> Iterator[Token]:
    """Generate; the first of these is the whole prompt's."""
    residency = residency_of(model.params)
    assert residency is not None  # it was mapped, and has experts
    before = residency.read
    with _most_resident() as most:
        for step in model.steps(list(prompt), new):
            yield Token(step.seconds, residency.read - before, most())
            before = residency.read


@contextmanager
def _most_resident() -> Iterator[Callable[[], int]]:
    """A function that tells the most memory since it was called last, looked up every few milliseconds."""
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], resident())

    def most() -> int:
        found, peak[0] = max(peak[0], resident()), 0
        return found

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        stop.set()
        watcher.join()


def resident() -> int:
    """Bytes of this process in memory, mapped files included. Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def forget(folder: Path) -> None:
    """Ask the system to drop what it has of these files, so that the next run reads the disk."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _prepared(folder: Path, layers: int, memory: float, new: int) -> Config:
    """The config of the folder, which is written if it is not there."""
    if (folder / "config.json").exists():
        config = Config.load(folder)
        if config.num_hidden_layers == config.first_k_dense_replace:
            raise ValueError(f"{folder} has no layer with experts; give another folder")
        check(folder, config, memory, new)
        return config
    most = PRESETS["GLM-4.5-Air"].num_hidden_layers
    if not 2 <= layers <= most:
        raise ValueError(f"--layers {layers} must lie between 2 (the first is dense, it has no experts) and {most}")
    config = air(layers)
    check(folder, config, memory, new)
    print(f"writing {in_bytes(sum(sizes(config)))} to {folder}", flush=True)
    write_folder(folder, config)
    return config


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", type=Path, help=f"where the weights lie; written if they are not there: 21.7 GB with {LAYERS} layers"
    )
    parser.add_argument("--layers", type=int, default=LAYERS, help="of a folder to be written (default %(default)s)")
    parser.add_argument("--memory", type=float, default=MEMORY, help="GB (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=NEW, help="default %(default)s")
    given = parser.parse_args(arguments)
    if not sys.platform.startswith("linux"):
        raise SystemExit("reads /proc: runs on Linux")
    try:
        config = _prepared(given.folder, given.layers, given.memory * 1e9, given.tokens)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    size = sum(path.stat().st_size for path in given.folder.glob("*.safetensors"))
    counts = config.count_parameters()
    print(f"{counts.total:,} parameters, {size / 1e9:.1f} GB; a token needs {counts.active:,} of them")
    rows = []
    for name in ("cold", "warm"):
        if name == "cold":
            forget(given.folder)
        model = load(given.folder, mode="mmap", memory=given.memory * 1e9)
        prompt = np.random.default_rng(1).integers(0, config.vocab_size, PROMPT).tolist()
        tokens = []
        for token in run(model, prompt, given.tokens):
            tokens.append(token)
            print(f"{name} {len(tokens):3}: {token.seconds:6.2f} s, {token.read / 1e9:5.2f} GB read, "
                  f"{token.resident / 1e9:.2f} GB resident", flush=True)  # fmt: skip
        later = tokens[1:]
        rows.append((
            name, f"{1 / statistics.median(t.seconds for t in later):.2f}",
            f"{statistics.mean(t.read for t in later) / 1e9:.2f}", f"{counts.active * 2 / 1e9:.2f}",
            f"{max(t.resident for t in tokens) / 1e9:.2f}",
        ))  # fmt: skip
    print(table(rows, ("files", "tokens / s", "GB of experts read / token", "GB active", "GB resident at most")))


if __name__ == "__main__":
    main()
