"""Checkpoints: folders in the Hugging Face layout, config.json beside one or several safetensors files.

Reading is strict: every tensor that the config asks for must be there with its shape, and nothing else. Saving never
destroys what was there before the new files are complete.
"""

import hashlib
import json
import os
import re
import uuid
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError

from minglm.config import Config
from minglm.formats.mapped import ExpertStack, Home, Residency
from minglm.formats.memory import check_memory, in_bytes, sizes_by_mode
from minglm.formats.smallfloats import SmallFloats, check_quantization, disk_tensors, is_small, quantization_config
from minglm.formats.sources import Files, Source, find_sources, some
from minglm.formats.storage import Storage, as_storage, cast
from minglm.formats.tensors import TensorFile, same_bits, write_tensors
from minglm.model.ops import Array
from minglm.model.params import Params, build, shapes, walk, walk_stacked

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MARK = "[0-9a-f]" * 8  # in the names of temporary files


# -- reading -----------------------------------------------------------------------------------------------------


def load_checkpoint(folder: str | Path, dtype: Any = "float32") -> tuple[Config, Params]:
    """Read a folder. `dtype` is how the weights are kept in memory; see `storage.as_storage`.

    Three layouts of the multi-token-prediction layers are known: with their own embedding and head (GLM-4.5), without
    (GLM-4.6 and later: the main ones serve), and no such layer at all, whatever the config says.

    Raises ValueError with one list of everything that is missing, unexpected or of another shape or kind.
    """
    folder, storage = Path(folder), as_storage(dtype)
    with open_folder(folder) as (config, wanted, sources):
        count = sum(array.size for _, array in walk_stacked(wanted))
        check_memory(
            f"{folder}: {count:,} parameters: {sizes_by_mode(count)}",
            sum(storage.bytes_of(name, array.shape) for name, array in walk_stacked(wanted)),
            "take a smaller model, or mode='mmap'"
            if storage.rest.itemsize == 2
            else "load with dtype='bfloat16', 'fp8' or 'mxfp4', a smaller model, or mode='mmap'",
        )
        not_finite: list[str] = []

        def read(name: str, shape: tuple[int, ...]) -> Any:
            first = sources[name.replace("*", "0")]
            out = first.storage(storage).empty(name, shape)
            for part, disk_name in _disk_parts(name, out):
                if not sources[disk_name].fill(part):
                    not_finite.append(disk_name)
            return out

        try:
            params = build(config, read, _own_ends(wanted))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder}: cannot read the weights: {error}; copy the files again") from error
    if not_finite:
        warnings.warn(f"{folder}: NaN or infinity in {some(not_finite)}", stacklevel=2)
    return config, params


def map_checkpoint(folder: str | Path, memory: int | None = None) -> tuple[Config, Params]:
    """The same without reading: every weight is a view of the files, as it is stored there.

    `memory` bounds the bytes of the files that stay in memory; see `minglm.formats.mapped`. Raises ValueError if all
    but the routed experts, which every token needs, and the experts that a token picks in one layer take more.
    """
    folder = Path(folder)
    with open_folder(folder) as (config, wanted, sources):
        rest = sum(
            span.stop - span.start for name, s in sources.items() for span in s.spans() if ".mlp.experts." not in name
        )
        one = sum(span.stop - span.start for s in _one_expert(config, sources) for span in s.spans())
        least = rest + one * config.num_experts_per_tok
        if memory is not None and memory < least:
            raise ValueError(
                f"memory = {in_bytes(memory)} is less than one token of {folder} needs: {in_bytes(rest)} for all but "
                f"the routed experts, {in_bytes(least - rest)} for those of one layer; give at least "
                f"{in_bytes(least, up=True)} ({least} bytes)"
            )
        residency = Residency(None if memory is None else memory - least)  # what a layer reads comes on top
        homes: dict[str, Home] = {}

        def view(name: str, shape: tuple[int, ...]) -> Any:
            if "*" not in name:
                source = sources[name]
                if source.kind and not is_small(name, source.kind):  # the FP8 releases' MTP head
                    return source.read().astype(ml_dtypes.bfloat16)
                return source.view()
            layer = name.partition(".mlp.")[0]
            if layer not in homes:
                parts = ("gate_proj", "up_proj", "down_proj")
                spans = [
                    tuple(span for part in parts for span in sources[f"{layer}.mlp.experts.{e}.{part}.weight"].spans())
                    for e in range(shape[0])
                ]
                homes[layer] = Home(residency, spans)
            return ExpertStack([sources[name.replace("*", str(e))].view() for e in range(shape[0])], homes[layer])

        return config, build(config, view, _own_ends(wanted))


def _one_expert(config: Config, sources: dict[str, Source]) -> list[Source]:
    return [s for name, s in sources.items() if f"layers.{config.first_k_dense_replace}.mlp.experts.0." in name]


def _own_ends(wanted: Params) -> bool:
    return any(mtp.embed_tokens is not None for mtp in wanted.mtp)


@contextmanager
def open_folder(folder: Path) -> Iterator[tuple[Config, Params, dict[str, Source]]]:
    """The config, the shapes of what it asks for, and where each tensor of it stands. Raises ValueError for a folder
    that does not fit together."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a checkpoint is a folder with config.json and *.safetensors")
    with open_files(folder) as found:
        config, wanted = expected_of(folder, found)
        yield config, wanted, find_sources(found, shapes_by_name(wanted), folder)


def expected_of(folder: Path, found: Files) -> tuple[Config, Params]:
    """The config, but for MTP layers that the files lack, and the shapes of what it asks for."""
    config, own_ends = _mtp_layout(_config_of(folder), found.keys(), folder)
    _check_count(config, len(found), folder)
    try:
        check_quantization(config.extra.get("quantization_config"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    return config, shapes(config, own_ends)


def shapes_by_name(wanted: Params) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in walk(wanted)}


def _config_of(folder: Path) -> Config:
    """config.json, or the one that a save left beside it when it was killed between its last two renames."""
    weights = folder / (_SINGLE if (folder / _SINGLE).exists() else _INDEX)
    for path in folder.glob(f"config-{_MARK}.tmp"):
        if path == _waiting_config(weights):
            with suppress(ValueError):  # cut off itself, or just renamed by a save that is still running
                return Config.load(path)
    return Config.load(folder)


def _waiting_config(weights: Path) -> Path:
    """Where the config that belongs to these weights waits until it may take the old one's place."""
    with open(weights, "rb") as file:
        return weights.parent / f"config-{hashlib.file_digest(file, 'sha256').hexdigest()[:8]}.tmp"


def _disk_parts(name: str, array: Array) -> Iterator[tuple[Array, str]]:
    """The tensors on disk that make up one array in memory: one per expert of a stack, otherwise the array itself."""
    if "*" not in name:
        yield array, name
        return
    for e in range(len(array)):
        yield array[e], name.replace("*", str(e))


def _mtp_layout(config: Config, names: Any, folder: Path) -> tuple[Config, bool]:
    """Which of the three layouts the names show: the config to use, and whether MTP layers own embedding and head."""
    L = config.num_hidden_layers
    numbers = {int(m[1]) for name in names if (m := re.match(r"model\.layers\.(\d+)\.", name))}
    if config.num_nextn_predict_layers and not any(n >= L for n in numbers):
        warnings.warn(
            f"{folder}: config.json names {config.num_nextn_predict_layers} multi-token-prediction layer(s), the "
            "weights have none; loaded without",
            stacklevel=3,
        )
        config = config.replace(num_nextn_predict_layers=0)
    own = re.compile(r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight")
    return config, any(own.fullmatch(name) for name in names)


@contextmanager
def open_files(folder: Path) -> Iterator[dict[str, TensorFile]]:
    """Tensor name -> the open file that holds it: of several, the one that the index names."""
    found: dict[str, TensorFile] = {}
    with ExitStack() as files:
        if (folder / _SINGLE).exists():
            file = files.enter_context(closing(TensorFile(folder / _SINGLE)))
            yield dict.fromkeys(file.entries, file)
            return
        index = _index_of(folder)
        for path in _shards(folder, index):
            file = files.enter_context(closing(TensorFile(path)))
            found.update((name, file) for name in file.entries if index.get(name, path.name) == path.name)
        absent = [f"{name} in {file}" for name, file in index.items() if name not in found]
        if absent:
            raise ValueError(f"{folder}: {_INDEX} names {some(absent)}, which is not there; copy the files again")
        yield found


def _index_of(folder: Path) -> dict[str, str]:
    """Tensor name -> name of the file in the same folder."""
    index = folder / _INDEX
    if not index.exists():
        raise ValueError(f"{folder}: neither {_SINGLE} nor {_INDEX} is there; is this the folder of a model?")
    try:
        return {name: Path(file).name for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise ValueError(f"{index}: wanted a JSON object with a 'weight_map' of tensor to file names") from error


def _shards(folder: Path, index: dict[str, str]) -> list[Path]:
    paths = [folder / name for name in sorted(set(index.values()))]
    try:
        missing = [path.name for path in paths if not path.exists()]
    except OSError as error:  # a name longer than a name may be
        raise ValueError(f"{folder}: {_INDEX} names files that cannot be: {error}") from error
    if missing:
        raise ValueError(f"{folder}: {some(missing)} named in {_INDEX} but not there; copy the rest of the files")
    return paths


def _check_count(config: Config, found: int, folder: Path) -> None:
    """Before every name is written out: a config with sizes from a dream must not take forever to be refused."""
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    least = layers + (config.n_routed_experts if config.is_moe(layers - 1) else 0)
    if least > found + 10**5:
        raise ValueError(f"{folder}: config.json asks for more than {least:,} tensors, the files hold {found:,}")


# -- writing -----------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: str | Path, config: Config, params: Params, dtype: Any = "float32", max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write config.json and the weights; other files in the folder stay.

    All new files are written in full before the first old one is replaced, and one rename makes the new weights the
    valid ones: whoever is killed before it leaves the old checkpoint, a full disk does so too (OSError). A config that
    differs follows in a second rename; `load_checkpoint` knows what to do when it is missed.
    """
    folder, storage = Path(folder), as_storage(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    earlier = _earlier_shards(folder)
    shards = _split(dict(_disk_tensors(params, storage)), max_shard_bytes)
    text = _restated(config, storage).to_json()
    mark = uuid.uuid4().hex[:8]
    final, ready, waiting = _SINGLE if len(shards) == 1 else _INDEX, folder / f"model-{mark}.tmp", None
    try:
        if len(shards) == 1:
            write_tensors(ready, shards[0])
        else:
            _write_shards(folder, shards, mark)
        if text != _text(folder / "config.json"):
            waiting = _waiting_config(ready)
            waiting.write_text(text, "utf-8")
        os.replace(ready, folder / final)
    except Exception:  # not at Ctrl-C, which may come after the rename; the next save clears what it leaves
        for path in [*folder.glob(f"model-*{mark}.*"), *([waiting] if waiting else [])]:
            path.unlink(missing_ok=True)
        raise
    if final == _INDEX:
        (folder / _SINGLE).unlink(missing_ok=True)  # it is read first: from here the shards count
    if waiting:
        os.replace(waiting, folder / "config.json")
    others = [folder / (_INDEX if final == _SINGLE else _SINGLE), *(path for path in earlier if mark not in path.name)]
    left = [*folder.glob(f"model-{_MARK}.tmp"), *folder.glob(f"config-{_MARK}.tmp")]  # by saves that were killed
    for path in [*others, *left]:
        path.unlink(missing_ok=True)


def _earlier_shards(folder: Path) -> list[Path]:
    """The weights that count until the new ones do, and those of saves that were killed; nothing else is ours."""
    own = list(folder.glob(f"model-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9]-{_MARK}.safetensors"))
    try:
        return own + [folder / name for name in _index_of(folder).values() if name.endswith(".safetensors")]
    except ValueError:
        return own


def check_saved(folder: str | Path, params: Params, dtype: Any) -> None:
    """Read back what `save_checkpoint` wrote. Raises ValueError if a bit differs or a tensor is not there."""
    with open_files(Path(folder)) as files:
        for name, wanted in _disk_tensors(params, as_storage(dtype)):
            if name not in files or not same_bits(files[name].read(name), wanted):
                raise ValueError(f"{folder}: {name} did not come back as it was written; is the disk sound?")


def _disk_tensors(params: Params, storage: Storage) -> Iterator[tuple[str, Array]]:
    for name, array in walk(params):
        stored = cast(name, array, storage)
        parts = disk_tensors(name, stored) if isinstance(stored, SmallFloats) else [(name, stored)]
        for part_name, part in parts:
            yield part_name, np.ascontiguousarray(part)  # safetensors 0.8 garbles transposed views


def _restated(config: Config, storage: Storage) -> Config:
    """Where the config says how the weights are stored, it must say what is written now: transformers obeys it."""
    extra = {k: storage.rest.name if k in ("dtype", "torch_dtype") else v for k, v in config.extra.items()}
    extra.pop("quantization_config", None)
    if storage.small:
        extra["quantization_config"] = quantization_config(storage.small, config)
    return config.replace(extra=extra)


def _text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError):
        return None


def _split(tensors: dict[str, Array], max_bytes: int) -> list[dict[str, Array]]:
    shards: list[dict[str, Array]] = [{}]
    size = 0
    for name, array in tensors.items():
        if shards[-1] and size + array.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    return shards


def _write_shards(folder: Path, shards: list[dict[str, Array]], mark: str) -> None:
    """Shards get names that no earlier save used, so that an old index never points to new weights."""
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}-{mark}.safetensors"
        write_tensors(folder / name, shard)
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(array.nbytes for shard in shards for array in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"model-{mark}.tmp").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
