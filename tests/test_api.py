"""The public face: what may come in, taps, stopping early, fresh and converted models, finding checkpoints."""

import os
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import minglm
from minglm import api
from minglm.api import Model
from minglm.config import PRESETS
from minglm.model.params import map_arrays, walk, walk_stacked
from minglm.model.transformer import head, transformer
from tests.variants import random_params

MICRO = PRESETS["micro"]
IDS = np.random.RandomState(9).randint(0, 61, (2, 7))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(MICRO, random_params(), name="mine")


def error_of(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


# -- what comes out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_shapes_and_dtypes(dtype: type) -> None:
    model = Model(MICRO, random_params(dtype=dtype))
    out = model.forward(IDS.tolist())
    assert (out.logits.shape, out.logits.dtype) == ((2, 7, 61), dtype)
    assert (out.hidden.shape, out.hidden.dtype) == ((2, 7, 20), dtype)
    for depth in (1, 2, 3, 6):
        logits = model.mtp(IDS, depth)
        assert (logits.shape, logits.dtype) == ((2, 7 - depth, 61), dtype)
    loss, grads = model.loss_and_grads(IDS, balance_weight=0.1)
    assert [(n, g.shape) for n, g in walk(grads)] == [(n, a.shape) for n, a in walk(model.params)]
    assert {g.dtype for _, g in walk(grads)} == {np.dtype(dtype)}
    assert np.isclose(loss.total, loss.main + 0.3 * loss.mtp + 0.1 * loss.balance)
    assert loss.mtp > 0 < loss.balance


def test_forward_is_the_book(model: Model) -> None:
    hidden, _ = transformer(IDS, model.params, MICRO)
    out = model.forward(IDS.astype(np.uint8))
    assert np.array_equal(out.hidden, hidden)
    assert np.array_equal(out.logits, head(hidden, model.params))


def test_repr(model: Model) -> None:
    assert repr(model) == "Model(mine: 48,812 parameters, 18,544 active, float32, 3 layers + 2 MTP)"
    bare = Model(MICRO.replace(num_nextn_predict_layers=0), random_params(MICRO.replace(num_nextn_predict_layers=0)))
    assert repr(bare.astype("bfloat16")).endswith("bfloat16, 3 layers + 0 MTP)")


# -- what may come in --------------------------------------------------------------------------------------------

BAD_IDS = [
    ([1, 2, 3], r"ids must be whole numbers of shape \[B, T\], got int64 of shape \[3\]"),
    ([[[1]]], r"got int64 of shape \[1, 1, 1\]"),
    (5, r"got int64 of shape \[\]"),
    ([[1.0, 2.0]], r"got float64 of shape \[1, 2\]"),
    ([[True, False]], r"got bool of shape"),
    ([["a"]], r"ids must be whole numbers"),
    ([[None]], r"got object of shape"),
    ([[1, 2], [3]], r"ids must be whole numbers of shape \[B, T\]: rows of different lengths"),
    ([[]], r"the prompt is empty; give at least one token"),
    (np.zeros((0, 4), int), r"the prompt is empty"),
    ([[1, 2], [3, 61]], r"token id 61 at row 1, position 1 is outside the vocabulary \(0 … 60\)"),
    ([[0, -1, 99]], r"token id -1 at row 0, position 1 is outside"),
    ([[1] * 65], r"65 tokens > context of 64"),
]


@pytest.mark.parametrize("call", ["forward", "mtp", "loss_and_grads"])
@pytest.mark.parametrize(("ids", "message"), BAD_IDS)
def test_bad_ids(model: Model, call: str, ids: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(model, call)(ids)


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        (
            "forward",
            {"positions": [0, 1]},
            r"positions must be whole numbers shaped like ids, \[2, 7\]; got int64 .*\[2\]",
        ),
        ("forward", {"positions": IDS * 1.0}, r"positions must be whole .*; got float64 of shape \[2, 7\]"),
        ("forward", {"segments": IDS[:1]}, r"segments must be whole numbers shaped like ids"),
        ("forward", {"segments": IDS > 3}, r"segments must be .*; got bool"),
        ("forward", {"stop_at": 4}, r"stop_at = 4 must be a whole number between 0 and 3 layers"),
        ("forward", {"stop_at": -1}, r"stop_at = -1 must be"),
        ("forward", {"stop_at": 1.5}, r"stop_at = 1.5 must be"),
        ("mtp", {"segments": IDS[:, :6]}, r"segments must be"),
        ("mtp", {"depth": 0}, r"depth = 0 must be a whole number between 1 and T − 1 = 6"),
        ("mtp", {"depth": 7}, r"depth = 7 must be a whole number between 1 and T − 1 = 6"),
        ("mtp", {"depth": 1.5}, r"depth = 1.5 must be"),
        ("loss_and_grads", {"targets": IDS[:, 1:]}, r"targets must be whole numbers shaped like ids, \[2, 7\]"),
        ("loss_and_grads", {"targets": IDS * 0 + 61}, r"target 61 is neither a token id below 61 nor −100"),
        ("loss_and_grads", {"targets": IDS * 0 - 1}, r"target -1 is neither"),
        ("loss_and_grads", {"segments": [[0]]}, r"segments must be"),
        ("loss_and_grads", {"positions": [[0]]}, r"positions must be"),
    ],
)
def test_bad_options(model: Model, call: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(model, call)(IDS, **options)


def test_bad_caches(model: Model) -> None:
    with pytest.raises(ValueError, match="the cache has 3 rows, ids have 2"):
        model.forward(IDS, model.new_cache(3, 8))
    cache = model.new_cache(2, 10)
    model.forward(IDS, cache)
    with pytest.raises(ValueError, match="cache holds 7 tokens and 7 more do not fit into its 10 slots"):
        model.forward(IDS, cache)
    assert cache.length.tolist() == [7, 7]
    full = model.new_cache(2)
    assert full.capacity == 64
    for _ in range(9):
        model.forward(IDS, full)
    with pytest.raises(ValueError, match=r"63 cached tokens \+ 7 new ones > context of 64"):
        model.forward(IDS, full)
    with pytest.raises(ValueError, match="stop_at would leave the cache of the later layers empty"):
        model.forward(IDS, model.new_cache(2), stop_at=1)


def test_no_mtp_layer() -> None:
    config = MICRO.replace(num_nextn_predict_layers=0)
    model = Model(config, random_params(config))
    with pytest.raises(ValueError, match=r"no multi-token-prediction layer \(num_nextn_predict_layers = 0\)"):
        model.mtp(IDS)
    assert model.loss_and_grads(IDS)[0].mtp == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_need_wide_weights(model: Model, dtype: str) -> None:
    with pytest.raises(ValueError, match=f"gradients need float32 or float64 weights, these are {dtype}; load with"):
        model.astype(dtype).loss_and_grads(IDS)


# -- taps --------------------------------------------------------------------------------------------------------


def test_a_tap_that_returns_nothing_only_looks(model: Model) -> None:
    names: list[str] = []
    watched = model.forward(IDS, tap=lambda name, array: names.append(name))
    assert np.array_equal(watched.logits, model.forward(IDS).logits)
    assert (names[0], names[-2:]) == ("embed_tokens", ["norm", "logits"])
    assert "layers.1.mlp.expert_weights" in names
    assert len(names) == len(set(names))
    mtp_names: list[str] = []
    model.mtp(IDS, 2, tap=lambda name, array: mtp_names.append(name))
    trunk = len(names) - 1  # all but the logits
    assert mtp_names[:trunk] == names[:-1]
    assert {name.split(".")[1] for name in mtp_names[trunk:]} == {"3", "4"}


def test_a_replacement_is_used(model: Model) -> None:
    mark = np.random.RandomState(0).standard_normal((2, 7, 20))  # float64 comes in, float32 goes on

    def patch(name: str, array: np.ndarray) -> np.ndarray | None:
        return mark if name == "layers.2.out" else None

    out = model.forward(IDS, tap=patch)
    weight = model.params.norm.weight
    wanted = mark / np.sqrt((mark**2).mean(-1, keepdims=True) + MICRO.rms_norm_eps) * weight
    assert error_of(out.hidden, wanted) < 1e-6
    assert out.hidden.dtype == np.float32
    as_list = model.forward(IDS, tap=lambda n, a: mark.tolist() if n == "layers.2.out" else None)
    assert np.array_equal(as_list.hidden, out.hidden)


def test_an_expert_can_be_forced(model: Model) -> None:
    seen = []

    def force(name: str, array: np.ndarray) -> list | None:
        if name == "layers.1.mlp.expert_indices":
            return [[7, 0, 3]] * 14
        if name.startswith("layers.1.mlp.experts.") and name.endswith(".out"):
            seen.append(int(name.split(".")[4]))
        return None

    model.forward(IDS, tap=force)
    assert seen == [0, 3, 7]


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        (
            "norm",
            np.zeros((2, 7, 21)),
            r"tap returned float64 \[2, 7, 21\] for norm, wanted float32 \[2, 7, 20\] \(or None",
        ),
        (
            "layers.0.self_attn.q",
            0.0,
            r"tap returned float64 \[\] for layers.0.self_attn.q, wanted float32 \[2, 7, 6, 8\]",
        ),
        ("norm", np.zeros((2, 7, 20), complex), r"tap returned complex128 \[2, 7, 20\] for norm, wanted float32"),
        (
            "layers.1.mlp.expert_indices",
            np.ones((14, 3)),
            r"tap returned float64 \[14, 3\] for layers.1.mlp.expert_indices, wanted int64 \[14, 3\]",
        ),
    ],
)
def test_a_replacement_that_does_not_fit(model: Model, name: str, replacement: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.forward(IDS, tap=lambda n, a: replacement if n == name else None)


def test_stop_at_gives_the_residual_stream(model: Model) -> None:
    kept: dict[str, np.ndarray] = {}
    model.forward(IDS, tap=lambda name, array: kept.update({name: array}))
    for n in range(4):
        seen: list[str] = []
        out = model.forward(IDS, stop_at=n, tap=lambda name, array, seen=seen: seen.append(name))
        assert out.logits is None
        assert np.array_equal(out.hidden, kept["embed_tokens" if n == 0 else f"layers.{n - 1}.out"])
        assert not any(name.startswith((f"layers.{n}.", "norm", "logits")) for name in seen)


# -- positions and segments --------------------------------------------------------------------------------------


def test_only_distances_count(model: Model) -> None:
    model = model.astype("float64")
    plain = model.forward(IDS).logits
    positions = np.broadcast_to(np.arange(7), (2, 7))
    assert np.array_equal(model.forward(IDS, positions=positions).logits, plain)
    assert error_of(model.forward(IDS, positions=positions + 20).logits, plain) < 1e-12
    assert error_of(model.forward(IDS, positions=positions * 2).logits, plain) > 1e-3


def test_documents_in_one_row_do_not_see_each_other(model: Model) -> None:
    model = model.astype("float64")
    a, b = IDS[:1, :3], IDS[:1, 3:]
    packed = model.forward(IDS[:1], segments=[[0, 0, 0, 1, 1, 1, 1]]).logits
    apart = np.concatenate([model.forward(a).logits, model.forward(b).logits], axis=1)
    assert error_of(packed, apart) < 1e-12
    assert error_of(model.forward(IDS[:1]).logits, apart) > 1e-3


def test_left_padding(model: Model) -> None:
    model = model.astype("float64")
    segments = np.array([[-1, -1, 0, 0, 0, 0, 0], [0] * 7])
    padded = model.forward(IDS, segments=segments).logits
    assert error_of(padded[0, 2:], model.forward(IDS[:1, 2:]).logits[0]) < 1e-12
    assert error_of(padded[1], model.forward(IDS[1:]).logits[0]) < 1e-12
    loss = model.loss_and_grads(IDS[:1], segments=segments[:1], mtp_weight=0.0)[0]
    assert np.isclose(loss.main, model.loss_and_grads(IDS[:1, 2:], mtp_weight=0.0)[0].main, rtol=1e-12)


def test_targets(model: Model) -> None:
    targets = np.full(IDS.shape, -100)
    targets[0, 2] = 11
    loss = model.loss_and_grads(IDS, targets, mtp_weight=0.0)[0]
    row = model.forward(IDS).logits[0, 2].astype(np.float64)
    assert np.isclose(loss.main, np.log(np.exp(row).sum()) - row[11], rtol=1e-5)
    shifted = np.concatenate([IDS[:, 1:], np.full((2, 1), -100)], axis=1)
    assert model.loss_and_grads(IDS, shifted)[0].total == model.loss_and_grads(IDS)[0].total


# -- fresh and converted models ----------------------------------------------------------------------------------


def test_new_repeats_for_a_seed() -> None:
    a, b, c = minglm.new("micro", seed=3), minglm.new(MICRO, seed=3), minglm.new("micro", seed=4)
    assert all(np.array_equal(x, y) for (_, x), (_, y) in zip(walk(a.params), walk(b.params), strict=True))
    assert not np.array_equal(a.params.embed_tokens.weight, c.params.embed_tokens.weight)
    with pytest.raises(ValueError, match=r"no preset 'GLM-9'; there are GLM-4.5, GLM-4.5-Air, .*micro"):
        minglm.new("GLM-9")


def test_new_is_initialised_as_glm_45_was() -> None:
    params = minglm.new("glm-nano").params
    attention = params.layers[2].self_attn
    assert abs(attention.q_proj.weight.std() / 0.02 - 1) < 0.05
    assert abs(attention.o_proj.weight.std() / (0.02 / 8**0.5) - 1) < 0.05  # 2 · 4 layers add up
    assert abs(params.layers[2].mlp.experts.down_proj.std() / (0.02 / 8**0.5) - 1) < 0.05
    assert not attention.q_proj.bias.any()
    assert (params.norm.weight == 1).all()
    assert not params.layers[2].mlp.gate.e_score_correction_bias.any()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_new_in_any_dtype(dtype: str) -> None:
    model = minglm.new("micro", dtype=dtype)
    for name, array in walk_stacked(model.params):
        wide = name.endswith("e_score_correction_bias") and dtype != "float64"
        assert array.dtype.name == ("float32" if wide else dtype), name
    assert model.compute_dtype == (np.float64 if dtype == "float64" else np.float32)
    narrowed = minglm.new("micro", dtype="float64").params.lm_head.weight.astype(np.float32)
    assert np.allclose(model.params.lm_head.weight.astype(np.float32), narrowed, rtol=1e-2, atol=1e-4)
    with pytest.raises(ValueError, match="dtype 'int8' cannot hold weights here"):
        minglm.new("micro", dtype="int8")


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_narrow_weights_compute_in_float32(model: Model, dtype: str, bound: float) -> None:
    narrow = model.astype(dtype)
    out, wanted = narrow.forward(IDS), model.forward(IDS)
    assert out.logits.dtype == out.hidden.dtype == np.float32
    # most tokens keep their experts: one whose margin is below the rounding may not
    errors = np.abs(out.logits - wanted.logits).max(axis=-1) / np.abs(wanted.logits).max()
    assert 1e-5 < np.median(errors) < bound
    assert np.array_equal(narrow.astype("float32").forward(IDS).logits, out.logits)  # widened layer by layer or at once
    assert model.params.norm.weight.dtype == np.float32


def test_astype_is_a_copy(model: Model) -> None:
    other = model.astype("float32")
    other.params.norm.weight[:] = 0
    assert model.params.norm.weight.all()
    assert (other.name, other.config) == (model.name, model.config)
    with pytest.raises(ValueError, match="cannot hold weights"):
        model.astype("int4")


def test_running_changes_no_weight(model: Model) -> None:
    before = {name: array.copy() for name, array in walk_stacked(model.params)}
    frozen = Model(MICRO, map_arrays(_read_only, model.params))
    frozen.forward(IDS)
    frozen.mtp(IDS, 3)
    frozen.loss_and_grads(IDS, balance_weight=0.1)
    assert all(np.array_equal(before[name], array) for name, array in walk_stacked(model.params))


def _read_only(name: str, array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


# -- folders -----------------------------------------------------------------------------------------------------


class Kept:
    """Stands for a tokenizer or a template: one file in the folder."""

    def __init__(self, file: str):
        self.file = file

    def save(self, folder: Path) -> None:
        (Path(folder) / self.file).write_text("kept")


@pytest.fixture
def text_room(monkeypatch) -> list[str]:
    """Stands for `minglm.text`: notes which folder each part was loaded from."""
    loaded: list[str] = []

    def room(name: str, part: str) -> None:
        def load(folder: Path) -> str:
            loaded.append(f"{part} {Path(folder).name}")
            return part

        module = types.ModuleType(name)
        setattr(module, part, types.SimpleNamespace(load=load))
        monkeypatch.setitem(sys.modules, name, module)

    room("minglm.text.template", "ChatTemplate")
    room("minglm.text.tokenizer", "Tokenizer")
    return loaded


def test_save_and_load(tmp_path, model: Model, text_room: list[str]) -> None:
    model.save(tmp_path / "bare")
    again = minglm.load(tmp_path / "bare")
    assert (again.name, again.tokenizer) == ("bare", None)
    assert np.array_equal(again.forward(IDS).logits, model.forward(IDS).logits)
    whole = Model(MICRO, model.params, Kept("tokenizer.json"), Kept("chat_template.jinja"))  # type: ignore[arg-type]
    whole.save(tmp_path / "whole", dtype="bfloat16")
    assert {p.name for p in (tmp_path / "whole").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    }
    narrow = minglm.load(str(tmp_path / "whole"), dtype="bfloat16")
    assert (narrow.tokenizer, narrow.chat_template) == ("Tokenizer", "ChatTemplate")
    assert text_room == ["ChatTemplate bare", "Tokenizer whole", "ChatTemplate whole"]
    assert np.array_equal(narrow.forward(IDS).logits, model.astype("bfloat16").forward(IDS).logits)


def test_shipped_checkpoints_are_found_from_anywhere(tmp_path, monkeypatch) -> None:
    """In a checkout they stand beside the package, in a wheel inside it; a folder of that name comes first."""
    monkeypatch.setattr(api, "__file__", str(tmp_path / "site" / "minglm" / "api.py"))
    in_checkout, in_wheel = tmp_path / "site/weights/glm-a", tmp_path / "site/minglm/weights/glm-b"
    for folder in (in_checkout, in_wheel):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    (tmp_path / "site/weights/notes").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert api.find("glm-a") == in_checkout
    assert api.find("glm-b") == in_wheel
    with pytest.raises(ValueError, match=r"^glm-c: no such folder, and no shipped .* of that name \(glm-a, glm-b\)$"):
        api.find("glm-c")
    with pytest.raises(ValueError, match="notes: no such folder"):
        api.find("notes")
    (elsewhere / "glm-a").mkdir()
    assert api.find("glm-a").resolve() == elsewhere / "glm-a"


def test_the_real_shipped_checkpoints_are_found(tmp_path, monkeypatch) -> None:
    root = Path(api.__file__).resolve().parents[1]
    monkeypatch.chdir(tmp_path)
    for config in (root / "weights").glob("*/config.json"):
        assert api.find(config.parent.name) == config.parent
    with pytest.raises(ValueError, match="nothing-of-that-name: no such folder"):
        api.find("nothing-of-that-name")
    assert Path(os.getcwd()) == tmp_path


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: minglm.load(None), "got None"),
        (lambda m: minglm.load(""), "got ''"),
        (lambda m: minglm.new(None), "no preset None"),
        (lambda m: minglm.new("micro", seed=1.5), "seed = 1.5"),
        (lambda m: m.new_cache(1.5), "batch = 1.5"),
        (lambda m: m.new_cache(1, -1), "capacity = -1"),
        (lambda m: m.forward(IDS, cache=3), "cache is a int"),
        (lambda m: m.forward(IDS, cache=minglm.new("glm-nano").new_cache()), "another model"),
        (lambda m: m.forward(IDS, stop_at=1.0), "stop_at = 1.0"),
        (lambda m: m.mtp(IDS, depth=1.0), "depth = 1.0"),
        (lambda m: m.generate([1], 3, seed=-1), "seed = -1"),
        (lambda m: m.generate([1], 3, temperature="x"), "temperature = 'x'"),
        (lambda m: m.generate([1], 3, end_ids=[10**6]), "end_ids: 1000000"),
        (lambda m: m.generate([1], 3, end_ids=["a"]), "end_ids: 'a'"),
        (lambda m: m.trace([1, 2], keep=["logits"]), "keep = "),
        (lambda m: m.trace([1, 2], limit=float("nan")), "the limit is nan"),
    ],
)
def test_what_does_not_fit_is_named(model, call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(model)


def test_a_tap_may_not_send_tokens_where_they_do_not_belong(model):
    def twice(name, array):
        return np.zeros_like(array) if name.endswith("expert_indices") else None

    def lost(name, array):
        return array * 0 if name.endswith(".tokens") else None

    with pytest.raises(ValueError, match="3 different experts between 0 and 7"):
        model.forward(IDS, tap=twice)
    with pytest.raises(ValueError, match="follows from expert_indices"):
        model.forward(IDS, tap=lost)
