"""Checkpoints: what is saved is what is loaded, bad folders are one clear error, a save that dies loses nothing."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

import minglm
from minglm.config import PRESETS, Config
from minglm.formats import tensors as tensor_files
from minglm.formats.checkpoint import load_checkpoint, save_checkpoint
from minglm.formats.storage import DTYPES, as_dtype, stored_dtype
from minglm.model.params import Params, map_arrays, walk
from minglm.model.router import router
from minglm.model.transformer import transformer
from tests.variants import random_params

MICRO = PRESETS["micro"]
OTHER = MICRO.replace(hidden_size=24, num_nextn_predict_layers=1)  # fits none of MICRO's weights
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 120_000  # bytes: micro in float32 becomes two shards


def assert_same(a: Params, b: Params) -> None:
    """Same names, dtypes and bits."""
    left, right = dict(walk(a)), dict(walk(b))
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert left[name].tobytes() == right[name].tobytes(), name


def is_same(a: Params, b: Params) -> bool:
    left, right = dict(walk(a)), dict(walk(b))
    return left.keys() == right.keys() and all(left[n].tobytes() == right[n].tobytes() for n in left)


def rewrite(folder: Path, change) -> None:
    """Save the tensors of a single file again after `change(dict)`."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / SINGLE)


# -- round trip --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shard", [10**9, SHARD // 2])
def test_save_and_load_give_the_same_bits(tmp_path, dtype: str, shard: int) -> None:
    params = map_arrays(lambda n, a: a.astype(stored_dtype(n, as_dtype(dtype))), random_params(mtp_own_ends=True))
    save_checkpoint(tmp_path / "a" / "b", MICRO, params, dtype, shard)
    config, again = load_checkpoint(tmp_path / "a" / "b", dtype)
    assert_same(params, again)
    assert config == Config.from_dict(MICRO.to_dict())
    assert (tmp_path / "a/b" / SINGLE).exists() == (shard > SHARD)


def test_narrowing_is_the_same_at_saving_and_at_loading(tmp_path) -> None:
    params = random_params()
    save_checkpoint(tmp_path / "wide", MICRO, params, "float32")
    save_checkpoint(tmp_path / "narrow", MICRO, params, "bfloat16")
    loaded = load_checkpoint(tmp_path / "wide", "bfloat16")[1]
    assert_same(loaded, load_checkpoint(tmp_path / "narrow", "bfloat16")[1])
    assert loaded.norm.weight.dtype == ml_dtypes.bfloat16
    assert np.array_equal(loaded.norm.weight, params.norm.weight.astype(ml_dtypes.bfloat16))
    wide = load_checkpoint(tmp_path / "narrow", "float64")[1]
    assert np.array_equal(wide.norm.weight, loaded.norm.weight.astype(np.float64))


def test_files_are_in_the_hugging_face_layout(tmp_path) -> None:
    save_checkpoint(tmp_path, MICRO, random_params(), "bfloat16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", SINGLE]
    with safe_open(tmp_path / SINGLE, framework="np") as file:
        assert file.metadata()["format"] == "pt"
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}
    assert shapes["model.layers.1.mlp.experts.7.down_proj.weight"] == [20, 12]
    assert shapes["model.layers.2.mlp.experts.0.gate_proj.weight"] == [12, 20]
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == [28, 20]
    assert shapes["model.layers.3.eh_proj.weight"] == [20, 40]
    assert shapes["model.layers.4.mlp.shared_experts.up_proj.weight"] == [24, 20]
    assert not [name for name in shapes if "*" in name or ".block." in name or name.endswith("experts.gate_proj")]
    assert {name for name, kind in kinds.items() if kind != "BF16"} == {
        f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2, 3, 4)
    }
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "glm4_moe"


def test_index_of_shards(tmp_path) -> None:
    save_checkpoint(tmp_path, MICRO, random_params(), "float32", SHARD)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == 2
    assert files == sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert re.fullmatch(rf"model-00001-of-0000{len(files)}-\w+\.safetensors", files[0])
    assert index["metadata"]["total_size"] == sum(array.nbytes for _, array in walk(random_params()))
    for file in files:
        held = load_file(tmp_path / file)
        assert sum(a.nbytes for a in held.values()) <= SHARD
        assert all(index["weight_map"][name] == file for name in held)


def test_saving_twice_gives_the_same_bytes(tmp_path) -> None:
    for name in "ab":
        save_checkpoint(tmp_path / name, MICRO, random_params(), "bfloat16")
    assert (tmp_path / "a" / SINGLE).read_bytes() == (tmp_path / "b" / SINGLE).read_bytes()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_in_the_config_is_kept_true(tmp_path, key: str) -> None:
    """transformers loads in the dtype that config.json names, whatever the file holds."""
    config = MICRO.replace(extra={key: "bfloat16", "use_cache": True})
    save_checkpoint(tmp_path, config, random_params(), "float32")
    assert load_checkpoint(tmp_path)[0].extra == {
        key: "float32",
        "use_cache": True,
        "architectures": ["Glm4MoeForCausalLM"],
    }


# -- the selection bias ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_biases_near_7_keep_their_routing(tmp_path, dtype: str) -> None:
    """Trained biases lie in 6.82 … 7.06 (sglang #37133); a bfloat16 step there is 1/32 and most of them merge."""
    rng = np.random.RandomState(0)
    config = MICRO.replace(n_group=1, topk_group=1)
    bias = rng.uniform(6.82, 7.06, 8).astype(np.float32)
    params = random_params(config)
    params = map_arrays(lambda n, a: bias if n == BIAS else a.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    save_checkpoint(tmp_path, config, params, dtype)
    gate = load_checkpoint(tmp_path, dtype)[1].layers[1].mlp.gate
    assert gate.e_score_correction_bias.dtype == np.float32
    assert np.array_equal(gate.e_score_correction_bias, bias)

    x = 0.3 * rng.standard_normal((200, 20)).astype(np.float32)
    weight = params.layers[1].mlp.gate.weight

    def picks(b: np.ndarray) -> np.ndarray:
        record = params.layers[1].mlp.gate._replace(weight=weight, e_score_correction_bias=b)
        return np.sort(router(x, record, config)[0].indices)

    merged = bias.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(picks(gate.e_score_correction_bias), picks(bias))
    assert (picks(merged) != picks(bias)).any(axis=1).mean() > 0.1  # so it matters
    assert len(np.unique(merged)) < 8


def test_the_bias_follows_float64(tmp_path) -> None:
    params = map_arrays(lambda n, a: a.astype(np.float64) + 1e-12, random_params())
    save_checkpoint(tmp_path, MICRO, params, "float64")
    assert_same(params, load_checkpoint(tmp_path, "float64")[1])
    assert load_checkpoint(tmp_path, "float32")[1].layers[1].mlp.gate.e_score_correction_bias.dtype == np.float32


# -- views -------------------------------------------------------------------------------------------------------


def transposed(array: np.ndarray) -> np.ndarray:
    return array.T.copy().T


def strided(array: np.ndarray) -> np.ndarray:
    wide = np.repeat(array, 2, axis=-1)
    return wide[..., ::2]


@pytest.mark.parametrize("view", [transposed, strided, lambda a: np.asfortranarray(a), lambda a: a[::-1].copy()[::-1]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_views_are_saved_right(tmp_path, view, dtype: str) -> None:
    params = map_arrays(lambda n, a: a.astype(stored_dtype(n, as_dtype(dtype))), random_params())
    views = map_arrays(lambda n, a: view(a), params)
    assert not all(a.flags.c_contiguous for _, a in walk(views))
    save_checkpoint(tmp_path, MICRO, views, dtype)
    assert_same(params, load_checkpoint(tmp_path, dtype)[1])


def test_why_views_are_copied(tmp_path) -> None:
    """safetensors/safetensors#825: version 0.8 writes the bytes of a transposed view in the wrong order."""
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_file({"a": array.T}, tmp_path / "a")
    if np.array_equal(load_file(tmp_path / "a")["a"], array.T):
        pytest.skip("this safetensors saves views right; the copy in save_checkpoint can go when 0.8 is gone")
    assert sorted(load_file(tmp_path / "a")["a"].ravel()) == sorted(array.ravel())


# -- layouts of the multi-token-prediction layers ----------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
def test_mtp_with_its_own_embedding_and_head(tmp_path, layers: int) -> None:
    config = MICRO.replace(num_nextn_predict_layers=layers)
    params = random_params(config, mtp_own_ends=True)
    save_checkpoint(tmp_path, config, params)
    again = load_checkpoint(tmp_path)[1]
    assert_same(params, again)
    assert len(again.mtp) == layers
    assert again.mtp[-1].embed_tokens is not None
    assert again.mtp[-1].shared_head.head is not None
    assert f"model.layers.{2 + layers}.shared_head.head.weight" in load_file(tmp_path / SINGLE)


@pytest.mark.parametrize("layers", [1, 2])
def test_mtp_that_borrows_embedding_and_head(tmp_path, layers: int) -> None:
    """GLM-4.6 and later (vllm #27597)."""
    config = MICRO.replace(num_nextn_predict_layers=layers)
    params = random_params(config)
    save_checkpoint(tmp_path, config, params)
    again = load_checkpoint(tmp_path)[1]
    assert_same(params, again)
    assert again.mtp[0].embed_tokens is None
    assert again.mtp[0].shared_head.head is None


def test_mtp_that_is_not_there_warns(tmp_path) -> None:
    """Converters drop the layer and leave the config (GLM-5.2-NVFP4-MTP's card): say so, go on without."""
    params = random_params()
    save_checkpoint(tmp_path, MICRO, params)
    rewrite(tmp_path, lambda t: [t.pop(n) for n in list(t) if re.match(r"model\.layers\.[34]\.", n)])
    with pytest.warns(UserWarning, match=r"config.json names 2 multi-token-prediction layer\(s\).*loaded without"):
        config, again = load_checkpoint(tmp_path)
    assert (config.num_nextn_predict_layers, again.mtp) == (0, ())
    assert_same(params._replace(mtp=()), again)


def test_no_mtp_by_config_is_silent(tmp_path) -> None:
    config = MICRO.replace(num_nextn_predict_layers=0)
    save_checkpoint(tmp_path, config, random_params(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(tmp_path)[1].mtp == ()


def test_mtp_layers_unknown_to_the_config_are_an_error(tmp_path) -> None:
    save_checkpoint(tmp_path, MICRO, random_params())
    (tmp_path / "config.json").write_text(MICRO.replace(num_nextn_predict_layers=0).to_json())
    with pytest.raises(ValueError, match=r"compare .* num_nextn_predict_layers(.|\n)*unexpected: model.layers.3.enorm"):
        load_checkpoint(tmp_path)


def test_tied_embeddings_have_no_head(tmp_path) -> None:
    config = MICRO.replace(tie_word_embeddings=True)
    params = random_params(config)
    save_checkpoint(tmp_path, config, params)
    assert "lm_head.weight" not in load_file(tmp_path / SINGLE)
    assert_same(params, load_checkpoint(tmp_path)[1])


# -- strict ------------------------------------------------------------------------------------------------------


def test_everything_wrong_is_in_one_error(tmp_path) -> None:
    save_checkpoint(tmp_path, MICRO, random_params())

    def spoil(tensors: dict) -> None:
        del tensors["model.norm.weight"], tensors["model.layers.2.mlp.experts.5.up_proj.weight"]
        tensors["model.layers.1.self_attn.rotary"] = np.zeros((2, 3), np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:60]
        tensors["model.embed_tokens.weight"] = np.zeros((20, 61), np.float32)
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((28, 20), np.int32)

    rewrite(tmp_path, spoil)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(tmp_path)
    first, *rest = str(caught.value).split("\n")
    assert str(tmp_path) in first
    assert "6 tensors do not fit config.json" in first
    assert sorted(line.strip() for line in rest) == [
        "missing: model.layers.2.mlp.experts.5.up_proj.weight [12, 20]",
        "missing: model.norm.weight [20]",
        "unexpected: model.layers.1.self_attn.rotary [2, 3]",
        "wrong dtype: model.layers.0.mlp.up_proj.weight is I32, wanted one of BF16, F16, F32, F64",
        "wrong shape: lm_head.weight is [60, 20], wanted [61, 20]",
        "wrong shape: model.embed_tokens.weight is [20, 61], wanted [61, 20]",
    ]


def test_fp8_weights_are_a_wrong_dtype(tmp_path) -> None:
    save_checkpoint(tmp_path, MICRO, random_params())
    name = "model.norm.weight"
    rewrite(tmp_path, lambda t: t.update({name: t[name].astype(ml_dtypes.float8_e4m3fn)}))
    with pytest.raises(ValueError, match=r"wrong dtype: model.norm.weight is F8_E4M3"):
        load_checkpoint(tmp_path)


def test_a_config_of_another_size_is_an_error(tmp_path) -> None:
    save_checkpoint(tmp_path, MICRO, random_params())
    (tmp_path / "config.json").write_text(OTHER.to_json())
    with pytest.raises(ValueError, match=r"wrong shape: model.norm.weight is \[20\], wanted \[24\]"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", ["int8", "float8", "f4", np.int64, None])
def test_dtypes_that_hold_no_weights(tmp_path, dtype) -> None:
    with pytest.raises(ValueError, match=r"cannot hold weights here; take one of float64, float32"):
        load_checkpoint(tmp_path, dtype)
    with pytest.raises(ValueError, match=r"cannot hold weights here"):
        save_checkpoint(tmp_path, MICRO, random_params(), dtype)
    assert not list(tmp_path.iterdir())


def test_nan_and_infinity_are_named(tmp_path) -> None:
    params = random_params()
    params.layers[1].mlp.experts.up_proj[3, 2, 1] = np.nan
    params.norm.weight[4] = -np.inf
    save_checkpoint(tmp_path, MICRO, params, "bfloat16")
    message = r"NaN or infinity in model.layers.1.mlp.experts.3.up_proj.weight, model.norm.weight$"
    with pytest.warns(UserWarning, match=message) as caught:
        again = load_checkpoint(tmp_path, "bfloat16")[1]
    assert np.isnan(again.layers[1].mlp.experts.up_proj[3, 2, 1].astype(np.float32))
    assert caught[0].filename == __file__  # the caller's line


# -- damaged folders ---------------------------------------------------------------------------------------------


@pytest.fixture
def single(tmp_path) -> Path:
    save_checkpoint(tmp_path / "m", MICRO, random_params(), "bfloat16")
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path) -> Path:
    save_checkpoint(tmp_path / "m", MICRO, random_params(), "bfloat16", SHARD // 2)
    return tmp_path / "m"


def test_a_file_cut_short_anywhere(single) -> None:
    path = single / SINGLE
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    lengths = {0, 1, 7, 8, 9, header // 2, header + 7, header + 8, header + 9, len(whole) - 1}
    lengths |= set(np.random.RandomState(0).randint(0, len(whole), 40).tolist())
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model.safetensors: cannot read it: .*Copy it again"):
            load_checkpoint(single)
    path.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match="cannot read it"):
        load_checkpoint(single)


def test_flipped_bytes_in_the_header(single) -> None:
    """Always a ValueError, unless the flip hit something that means nothing (the metadata, a space)."""
    path, good = single / SINGLE, random_params()
    good = map_arrays(lambda n, a: a.astype(stored_dtype(n, as_dtype("bfloat16"))), good)
    whole = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.RandomState(1)
    places = [*range(12), *rng.randint(0, header, 290).tolist()]
    errors = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randint(8)
        path.write_bytes(damaged)
        try:
            assert is_same(good, load_checkpoint(single, "bfloat16")[1]), place
        except ValueError as error:
            errors += 1
            assert str(single) in str(error), place  # noqa: PT017
    assert errors > 250


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: [p.unlink() for p in f.glob("*-of-*")], r"named in model.safetensors.index.json but not there"),
        (
            lambda f: sorted(f.glob("*-of-*"))[1].unlink(),
            r"model-00002-of-\w+-\w+.safetensors named in .* copy the rest",
        ),
        (lambda f: (f / INDEX).unlink(), r"neither model.safetensors nor model.safetensors.index.json is there"),
        (lambda f: (f / INDEX).write_text("{"), r"index.json: wanted a JSON object with a 'weight_map'"),
        (lambda f: (f / INDEX).write_text("[]"), r"index.json: wanted a JSON object with a 'weight_map'"),
        (lambda f: (f / INDEX).write_text("[" * 100_000), r"index.json: wanted a JSON object with a 'weight_map'"),
        (lambda f: (f / INDEX).write_text('{"weight_map": [1]}'), r"index.json: wanted a JSON object"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 3}}'), r"index.json: wanted a JSON object"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": ["b"]}}'), r"index.json: wanted a JSON object"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "b", "c": 1}}'), r"index.json: wanted a JSON object"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": ".."}}'), r"cannot read it"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": ""}}'), r"cannot read it"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "\\u0000"}}'), r"but not there"),
        (
            lambda f: (f / INDEX).write_text('{"weight_map": {}}'),
            r"tensors do not fit(.|\n)*missing: model.embed_tokens",
        ),
        (lambda f: ((f / INDEX).unlink(), (f / INDEX).mkdir()), r"index.json: wanted a JSON object"),
        (lambda f: (f / "config.json").unlink(), r"config.json: cannot read the model's config: No such file"),
        (lambda f: (f / "config.json").write_text("{"), r"config.json: not valid JSON"),
        (lambda f: (f / "config.json").write_text("{}"), r"config.json: config: model_type = None"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*multi-token-prediction")
def test_a_damaged_folder(sharded, damage, message: str) -> None:
    damage(sharded)
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(sharded)
    assert str(sharded) in str(caught.value)


def test_one_damaged_shard_is_named(sharded) -> None:
    path = sorted(sharded.glob("*-of-*"))[1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=path.name):
        load_checkpoint(sharded)


def test_an_index_never_leads_outside_the_folder(sharded) -> None:
    """A file elsewhere is not opened, however the index spells its way to it."""
    index = json.loads((sharded / INDEX).read_text())
    moved = sorted(sharded.glob("*-of-*"))[0]
    outside = sharded.parent / moved.name
    moved.rename(outside)
    for spelling in (str(outside), f"../{moved.name}"):
        changed = {k: spelling if v == moved.name else v for k, v in index["weight_map"].items()}
        (sharded / INDEX).write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ValueError, match=f"{moved.name} named in .* but not there"):
            load_checkpoint(sharded)


def test_the_index_is_believed(sharded) -> None:
    """A tensor is read from the shard that the index names, whatever other shards hold under its name."""
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    name = "model.embed_tokens.weight"
    first, last = index[name], sorted(set(index.values()) - {index[name]})[-1]
    wanted = load_file(sharded / first)[name]
    save_file({**load_file(sharded / last), name: wanted * 0}, sharded / last)
    assert np.array_equal(load_checkpoint(sharded)[1].embed_tokens.weight, wanted.astype(np.float32))
    index["lm_head.weight"] = next(file for file in index.values() if file != index["lm_head.weight"])
    (sharded / INDEX).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ValueError, match=r"names lm_head.weight in model-.*, which is not there"):
        load_checkpoint(sharded)


def test_files_that_are_nobody_s_shards_stay(sharded) -> None:
    kept = [sharded / "model-best-of-3.safetensors", sharded / "model-00001-of-00002.safetensors"]
    for path in kept:
        path.write_text("precious")
    old = sorted(sharded.glob(f"model-*-of-*-{'[0-9a-f]' * 8}.safetensors"))
    save_checkpoint(sharded, MICRO, random_params(), "bfloat16")
    assert old
    assert not any(path.exists() for path in old)
    assert all(path.read_text() == "precious" for path in kept)


def test_no_folder_and_an_empty_one(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such folder; a checkpoint is a folder with config.json"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"neither model.safetensors nor .* is this the folder of a model\?"):
        load_checkpoint(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"file: no such folder"):
        load_checkpoint(tmp_path / "file")


# -- saving over something ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [MICRO, OTHER])
def test_single_over_shards_over_single(tmp_path, config: Config) -> None:
    (tmp_path / "tokenizer.json").write_text("mine")
    (tmp_path / "config-old.tmp").write_text("mine")
    for turn, shard in enumerate([10**9, SHARD, SHARD, 10**9, 10**9, SHARD]):
        now = (MICRO, config)[turn % 2]
        params = random_params(now, seed=turn)
        save_checkpoint(tmp_path, now, params, "float32", shard)
        again_config, again = load_checkpoint(tmp_path)
        assert_same(params, again)
        assert again_config.hidden_size == now.hidden_size
        names = {p.name for p in tmp_path.iterdir()} - {"tokenizer.json", "config-old.tmp", "config.json"}
        if shard == SHARD:
            index = json.loads((tmp_path / INDEX).read_text())
            assert names == {INDEX, *index["weight_map"].values()}
        else:
            assert names == {SINGLE}
    assert (tmp_path / "tokenizer.json").read_text() == (tmp_path / "config-old.tmp").read_text() == "mine"


class Killed(BaseException):
    """Stands for the end of the process: no handler for errors sees it."""


class Trap:
    """Lets `left` file operations of a save pass, then raises in place of the next."""

    def __init__(self, monkeypatch, left: int, error: BaseException):
        self.left, self.error, self.failed = left, error, ()
        places = [(os, "replace"), (os, "fsync"), (tensor_files, "save_file"), (Path, "unlink"), (Path, "write_text")]
        for owner, name in places:
            monkeypatch.setattr(owner, name, self._trapped(name, getattr(owner, name)))

    def _trapped(self, name: str, real):
        def operation(*args, **kwargs):
            self.left -= 1
            if self.left == -1:
                self.failed = (name, getattr(args[0], "name", ""))
                raise self.error
            return real(*args, **kwargs)

        return operation


TINY = MICRO.replace(num_hidden_layers=2, n_routed_experts=4, n_group=2, num_nextn_predict_layers=1)
HALF = 60_000  # bytes: this one becomes two shards
CHANGES = [(10**9, 10**9), (10**9, HALF), (HALF, 10**9), (HALF, HALF)]


@pytest.mark.parametrize("error", [Killed(), OSError(28, "No space left on device")])
@pytest.mark.parametrize(("before", "after"), CHANGES)
@pytest.mark.parametrize("config", [TINY, TINY.replace(hidden_size=24)])
def test_a_save_that_stops_at_any_step(tmp_path, monkeypatch, error, before: int, after: int, config: Config) -> None:
    """Before the decisive rename the old model is there, from then on the new one; never a mixture."""
    old, new = random_params(TINY, seed=1), random_params(config, seed=2)
    outcomes = []
    for count in range(100):
        folder = tmp_path / str(count)
        save_checkpoint(folder, TINY, old, "float32", before)
        files = set(folder.iterdir())
        with monkeypatch.context() as patch:
            trap = Trap(patch, count, error)
            with contextlib.suppress(Killed, OSError):
                save_checkpoint(folder, config, new, "float32", after)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found_config, found = load_checkpoint(folder)
        assert is_same(found, old) or is_same(found, new), count
        outcomes.append(is_same(found, new))
        assert found_config.hidden_size == found.norm.weight.size
        if not outcomes[-1] and not isinstance(error, Killed) and trap.failed != ("unlink", SINGLE):
            assert set(folder.iterdir()) == files, count  # an error, unlike a kill, is cleaned up after
        save_checkpoint(folder, config, new, "float32", after)  # what is left over stands in nobody's way
        assert_same(load_checkpoint(folder)[1], new)
        assert not [p.name for p in folder.iterdir() if p.suffix == ".tmp"]
        if after == HALF:
            index = json.loads((folder / INDEX).read_text())
            assert {p.name for p in folder.glob("*.safetensors")} == set(index["weight_map"].values())
        if not trap.failed:
            break
    assert not trap.failed
    assert outcomes == sorted(outcomes)
    assert outcomes.count(False) >= 3


@pytest.mark.parametrize("shard", [10**9, SHARD])
def test_ctrl_c_right_after_the_decisive_rename(tmp_path, monkeypatch, shard: int) -> None:
    """The new weights count already: cleaning up now would take away what the index names."""
    save_checkpoint(tmp_path, MICRO, random_params(), "float32", shard)
    new, real = random_params(OTHER, seed=2), os.replace

    def interrupted(source, target) -> None:
        real(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, OTHER, new, "float32", shard)
    assert_same(load_checkpoint(tmp_path)[1], new)


def test_a_save_stopped_between_its_last_renames_stopped_again(tmp_path, monkeypatch) -> None:
    """The config that still waits to be renamed must outlive a second, failing save of the same model."""
    save_checkpoint(tmp_path, MICRO, random_params())
    new = random_params(OTHER, seed=2)
    real = os.replace

    def only_weights(source, target) -> None:
        if Path(target).name == "config.json":
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", only_weights)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, OTHER, new)
    assert Config.load(tmp_path).hidden_size == 20  # still the old one
    assert_same(load_checkpoint(tmp_path)[1], new)
    with monkeypatch.context() as patch:
        Trap(patch, 0, OSError(28, "No space left on device"))
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(tmp_path, OTHER, random_params(OTHER, seed=3))
    assert_same(load_checkpoint(tmp_path)[1], new)
    save_checkpoint(tmp_path, OTHER, new)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", SINGLE]
    assert Config.load(tmp_path).hidden_size == 24


def test_a_full_disk_is_an_os_error_that_says_what_is_still_there(tmp_path, monkeypatch) -> None:
    def full(*args, **kwargs) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(OSError, match=r"could not be written, what was there still is: .*No space left"):
        save_checkpoint(tmp_path, MICRO, random_params())
    assert not list(tmp_path.iterdir())


SAVER = """
import sys
sys.path.insert(0, {tests!r})
import test_checkpoint as t
print("ready", flush=True)
seed = 1
while True:
    seed += 1
    t.save_checkpoint({folder!r}, t.BIGGER, t.random_params(t.BIGGER, seed % 2), "float32", {shard})
    print(seed, flush=True)
"""
BIGGER = MICRO.replace(hidden_size=160, moe_intermediate_size=64)  # 3 MB: a save takes a while


def start_saver(folder: Path, shard: int) -> subprocess.Popen:
    code = SAVER.format(tests=str(Path(__file__).parent), folder=str(folder), shard=shard)
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
@pytest.mark.parametrize(
    ("shard", "kills"),
    [(10**9, 3), (10**6, 3), *(pytest.param(size, 20, marks=pytest.mark.slow) for size in (10**9, 10**6))],
)
def test_a_killed_process(tmp_path, shard: int, kills: int) -> None:
    models = [random_params(BIGGER, seed) for seed in (0, 1)]
    save_checkpoint(tmp_path, BIGGER, models[0], "float32", shard)
    moments = random.Random(kills)
    for _ in range(kills):
        process = start_saver(tmp_path, shard)
        try:
            process.stdout.readline()
            time.sleep(moments.uniform(0, 0.06))
        finally:
            process.kill()
            process.communicate()
        found = load_checkpoint(tmp_path)[1]
        assert any(is_same(found, model) for model in models)
    save_checkpoint(tmp_path, BIGGER, models[0], "float32", shard)
    assert_same(load_checkpoint(tmp_path)[1], models[0])
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]


def test_two_readers_while_one_saves(tmp_path) -> None:
    """A single file that is replaced again and again: every load gives one model or the other, whole."""
    models = [random_params(BIGGER, seed) for seed in (0, 1)]
    save_checkpoint(tmp_path, BIGGER, models[0])
    process = start_saver(tmp_path, 10**9)
    try:
        seen = set()
        for _ in range(60):
            found = load_checkpoint(tmp_path)[1]
            which = [is_same(found, model) for model in models]
            assert any(which)
            seen.add(which.index(True))
    finally:
        process.kill()
        process.communicate()
    assert seen == {0, 1}


@pytest.mark.skipif(sys.platform != "linux", reason="uses a limit on file size that only Unix has")
def test_a_real_limit_on_file_size(tmp_path) -> None:
    """The file system refuses in the middle of a file, as a full disk does."""
    save_checkpoint(tmp_path, MICRO, random_params())
    code = (
        "import resource, signal, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_checkpoint as t\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try:\n"
        f"    t.save_checkpoint({str(tmp_path)!r}, t.BIGGER, t.random_params(t.BIGGER))\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert "what was there still is" in done.stdout, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", SINGLE]
    assert_same(load_checkpoint(tmp_path)[1], random_params())


def test_a_loaded_model_runs(tmp_path) -> None:
    params = random_params()
    save_checkpoint(tmp_path, MICRO, params)
    config, again = load_checkpoint(tmp_path)
    ids = np.arange(12).reshape(2, 6)
    assert np.array_equal(transformer(ids, again, config)[0], transformer(ids, params, MICRO)[0])


# -- what went wrong once ----------------------------------------------------------------------------------------


def test_numbers_too_large_for_the_dtype_are_named(tmp_path):
    params = map_arrays(lambda n, a: a * 1e6 if n == "lm_head.weight" else a, random_params())
    with pytest.raises(ValueError, match=r"lm_head.weight holds numbers too large for float16"):
        save_checkpoint(tmp_path, MICRO, params, "float16")
    assert not list(tmp_path.glob("*"))
    save_checkpoint(tmp_path, MICRO, params, "bfloat16")


@pytest.mark.filterwarnings("ignore:.*multi-token-prediction")
@pytest.mark.parametrize("field", ["num_hidden_layers", "n_routed_experts", "num_nextn_predict_layers"])
def test_a_config_from_a_dream_is_refused_at_once(field, tmp_path):
    config = MICRO.replace(n_group=1, topk_group=1)
    save_checkpoint(tmp_path, config, random_params(config))
    values = {**config.to_dict(), field: 2 * 10**9}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"asks for more than 2,000,000,\d\d\d tensors"):
        load_checkpoint(tmp_path)


def test_empty_tensors_are_passed_over(tmp_path):
    """transformers writes shared experts of size zero where the config has none."""
    config = MICRO.replace(n_shared_experts=0)
    save_checkpoint(tmp_path, config, random_params(config))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.shared_experts.up_proj.weight"] = np.zeros((0, 20), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(load_checkpoint(tmp_path)[1], random_params(config))


def test_a_model_without_tokenizer_does_not_overwrite_one_that_has_it(tmp_path):
    """The old tokenizer would stay and be taken for the new model's."""
    import minglm
    from minglm.api import Model
    from minglm.text.tokenizer import train_tokenizer

    config = MICRO.replace(vocab_size=320)
    first = Model(config, random_params(config), train_tokenizer([], 292))
    first.save(tmp_path)
    with pytest.raises(ValueError, match="holds a model with a tokenizer, this one has none"):
        Model(config, random_params(config, 1)).save(tmp_path)
    assert_same(minglm.load(tmp_path).params, first.params)


def test_a_tokenizer_of_another_model_is_named(tmp_path):
    from minglm.api import load
    from minglm.text.tokenizer import train_tokenizer

    save_checkpoint(tmp_path, MICRO, random_params())
    train_tokenizer([], 292).save(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer.json has 292 tokens, the model only 61"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [3, ["fp8"], {}, object(), b"fp8", "int8"])
def test_what_is_no_dtype_is_said(dtype):
    with pytest.raises(ValueError, match=r"dtype .* cannot hold weights here; take one of float64, .*, mxfp4"):
        minglm.load("glm-nano", dtype)


def test_a_name_longer_than_names_may_be():
    with pytest.raises(ValueError, match=r"^a{200}: no such folder"):
        minglm.load("a" * 5000)


@pytest.mark.parametrize("memory", ["5GB", float("inf"), float("nan"), -1, 0, 1j])
def test_memory_is_a_number_of_bytes(memory):
    with pytest.raises(ValueError, match=r"memory = .* must be a number of bytes above 0, such as 5e9"):
        minglm.load("glm-nano", mode="mmap", memory=memory)
