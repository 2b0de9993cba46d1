"""Generation: the cache changes nothing, seeds repeat, every stop has its reason, every bad request fails first."""

import types

import numpy as np
import pytest

import minglm
from minglm.api import Model
from minglm.config import PRESETS, Config
from minglm.generate.batch import continue_all
from minglm.model.params import Params, map_arrays
from tests.variants import random_params

MICRO = PRESETS["micro"].replace(eos_token_id=())
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
ENGINES = ["numpy", "fast"]


def model_of(config: Config = MICRO, seed: int = 0, dtype: type = np.float32, tokenizer: object = None) -> Model:
    return Model(config, random_params(config, seed, dtype), tokenizer)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> Model:
    return model_of()


class Decoder:
    """Holds back every second token, as a streaming decoder does in the middle of a character."""

    def __init__(self, names: list[str]):
        self.names, self.held = names, ""

    def feed(self, token: int) -> str:
        text, self.held = self.held + self.names[token], ""
        if len(text) % 2:
            return text
        self.held = text
        return ""

    def finish(self) -> str:
        return self.held


class FakeTokenizer:
    """One letter or two for each id; fewer ids than the model has rows."""

    def __init__(self, size: int = 50):
        self.names = [chr(97 + i % 26) * (1 + i // 26) for i in range(size)]

    def __len__(self) -> int:
        return len(self.names)

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 97 for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.names[i] for i in ids)

    def stream(self) -> Decoder:
        return Decoder(self.names)


# -- the cache changes nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "dtype", "margin"), [("numpy", np.float64, 1e-9), ("fast", np.float32, 1e-4)])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_the_argmax_of_whole_forwards(seed: int, engine: str, dtype: type, margin: float) -> None:
    model = model_of(seed=seed, dtype=dtype)
    result = model.generate(PROMPT, 12, engine=engine)
    ids = list(PROMPT)
    for got in result.ids:
        logits = model.forward([ids]).logits[0, -1]
        top = np.sort(logits)[-2:]
        assert top[1] - top[0] > margin  # no near-tie that would let either pass
        assert got == np.argmax(logits)
        ids.append(got)
    assert len(set(result.ids)) > 3  # not one token again and again
    assert (result.stop_reason, result.text) == ("length", None)


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize("seed", range(3))
def test_any_split_between_prefill_and_decode(dtype: type, bound: float, seed: int) -> None:
    model = model_of(seed=seed, dtype=dtype)
    ids = np.random.RandomState(seed).randint(0, 61, (2, 9))
    whole = model.forward(ids)
    assert whole.logits.dtype == dtype
    for split in [[1] * 9, [8, 1], [1, 8], [4, 5], [3, 3, 3], [2, 1, 1, 5]]:
        cache, start, logits = model.new_cache(2, 9), 0, []
        for count in split:
            out = model.forward(ids[:, start : start + count], cache)
            logits.append(out.logits)
            start += count
        error = np.abs(np.concatenate(logits, axis=1) - whole.logits).max() / np.abs(whole.logits).max()
        assert error <= bound, split
        assert cache.length.tolist() == [9, 9]


@pytest.mark.parametrize(("engine", "dtype", "bound"), [("numpy", np.float64, 1e-12), ("fast", np.float32, 1e-5)])
def test_every_step_has_the_logits_of_a_whole_forward(engine: str, dtype: type, bound: float) -> None:
    model = model_of(dtype=dtype)
    ids = list(PROMPT)
    for step in model.steps(PROMPT, 8, temperature=1.5, seed=3, engine=engine):
        wanted = model.forward([ids]).logits[0, -1]
        np.testing.assert_allclose(step.logits, wanted, rtol=0, atol=bound * np.abs(wanted).max())
        assert step.seconds > 0
        ids.append(step.id)


@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16_weights_generate_what_their_float32_copies_do(model: Model, engine: str) -> None:
    narrow = model.astype("bfloat16")
    wide = narrow.astype("float32")
    assert narrow.generate(PROMPT, 10, engine=engine).ids == wide.generate(PROMPT, 10, engine=engine).ids


def test_both_engines_take_the_same_tokens(model: Model) -> None:
    for options in ({}, {"temperature": 1.0, "seed": 4}, {"temperature": 2.0, "top_k": 9, "seed": 7}):
        book, fast = (model.generate(PROMPT, 30, engine=engine, **options) for engine in ENGINES)
        assert book.ids == fast.ids
        assert book.stats.engine == "NumPy engine"
        assert fast.stats.engine.startswith("fast engine, ")
    assert model.generate(PROMPT, 3).stats.engine == fast.stats.engine  # what runs by default


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_weights_that_the_fast_engine_does_not_read_are_refused_and_not_taken_elsewhere(dtype: str) -> None:
    model = model_of().astype(dtype)
    with pytest.raises(
        ValueError, match=f"fast engine reads float32, bfloat16, fp8 and mxfp4 weights, these are {dtype}; use eng"
    ):
        model.generate(PROMPT, 3)
    assert len(model.generate(PROMPT, 3, engine="numpy").ids) == 3


def test_a_tap_and_the_fast_engine_exclude_each_other(model: Model) -> None:
    for options in ({}, {"engine": "fast"}):
        with pytest.raises(ValueError, match="fast engine's steps cannot be tapped; take engine='numpy'"):
            model.generate(PROMPT, 3, tap=refuse, **options)


# -- seeds -------------------------------------------------------------------------------------------------------


def test_equal_seeds_repeat_and_others_differ(model: Model) -> None:
    def run(seed: int) -> list[int]:
        return model.generate(PROMPT, 20, temperature=1.0, seed=seed).ids

    assert run(5) == run(5)
    assert len({tuple(run(seed)) for seed in range(6)}) == 6
    assert model.generate(PROMPT, 20).ids == model.generate(PROMPT, 20, seed=9).ids  # greedy draws nothing


def test_the_filters_reach_the_draw(model: Model) -> None:
    greedy = model.generate(PROMPT, 10).ids
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-9}):
        assert model.generate(PROMPT, 10, **{"temperature": 3.0, "seed": 1, **options}).ids == greedy
    assert model.generate(PROMPT, 10, temperature=3.0, seed=1).ids != greedy


# -- stops -------------------------------------------------------------------------------------------------------


def test_any_of_several_end_tokens_stops(model: Model) -> None:
    """llama.cpp #14939 honoured one of GLM-4.5's three and ran on through <|user|>."""
    free = model.generate(PROMPT, 12).ids
    unused, unused_too = [i for i in range(MICRO.vocab_size) if i not in free][:2]
    for place in (0, 2, 5):
        end = free[place]
        first = free.index(end)
        for ends in ([end], [unused, end, unused_too], (end,)):
            stopped = model.generate(PROMPT, 12, end_ids=ends)
            assert (stopped.ids, stopped.stop_reason) == (free[: first + 1], "end token")
        by_config = Model(MICRO.replace(eos_token_id=(unused, end)), model.params)
        assert by_config.generate(PROMPT, 12).ids == free[: first + 1]
        assert by_config.generate(PROMPT, 12, end_ids=[]).ids == free


def test_an_end_token_in_last_place_is_the_reason(model: Model) -> None:
    free = model.generate(PROMPT, 12).ids
    place = next(i for i in range(2, 12) if free[i] not in free[:i])
    assert model.generate(PROMPT, place + 1, end_ids=[free[place]]).stop_reason == "end token"
    assert model.generate(PROMPT, place, end_ids=[free[place]]).stop_reason == "length"


def test_stop_reasons_of_steps(model: Model) -> None:
    assert [step.stop_reason for step in model.steps(PROMPT, 3)] == [None, None, "length"]


def test_one_token_in_one_token_out(model: Model) -> None:
    result = model.generate([7], 1)
    assert result.ids == [int(np.argmax(model.forward([[7]]).logits[0, -1]))]
    assert (result.stop_reason, result.stats.prompt_tokens, result.stats.new_tokens) == ("length", 1, 1)
    assert result.stats.decode_seconds == 0
    assert np.isnan(result.stats.tokens_per_second)
    assert len(model.generate([7], 5).ids) == 5
    assert model.generate(PROMPT, 5).stats.tokens_per_second > 0


def test_the_context_can_be_filled_to_the_brim(model: Model) -> None:
    assert len(model.generate(PROMPT, 64 - 8).ids) == 56


# -- text --------------------------------------------------------------------------------------------------------


def test_text_in_text_out() -> None:
    model = model_of(tokenizer=FakeTokenizer())
    result = model.generate("hello", 12)
    assert result.text == model.tokenizer.decode(result.ids)
    assert (
        result.ids == model.generate([7, 4, 11, 11, 14], 12).ids == model.generate(np.array([7, 4, 11, 11, 14]), 12).ids
    )


def test_pieces_join_to_the_text() -> None:
    model = model_of(tokenizer=FakeTokenizer())
    free = model.generate("hello", 12)
    for options in ({}, {"end_ids": [free.ids[4]]}, {"temperature": 2.0, "seed": 4}, {"end_ids": [free.ids[0]]}):
        result = model.generate("hello", 12, **options)
        pieces = list(model.stream("hello", 12, **options))
        assert "".join(pieces) == result.text
        assert "" not in pieces
    stopped = model.generate("hello", 12, end_ids=[free.ids[4]])
    assert stopped.stop_reason == "end token"
    assert stopped.text == model.tokenizer.decode(stopped.ids[:-1])  # an end token is no text
    assert list(model.stream("hello", 12, end_ids=[free.ids[0]])) == []


def test_rows_beyond_the_tokenizer_are_never_generated() -> None:
    """The rows of padding get the largest logits here, and still nobody sees them."""
    params = random_params()
    params.lm_head.weight[50:] *= 50
    masked = Model(MICRO, params, FakeTokenizer(50))  # type: ignore[arg-type]
    assert masked.usable_tokens == 50
    assert max(Model(MICRO, params).generate(PROMPT, 20).ids) >= 50
    for how in ({}, {"temperature": 1e9}, {"temperature": 1e300}, {"temperature": 5.0, "top_k": 55}):
        assert max(masked.generate(PROMPT, 40, seed=2, **how).ids) < 50
    step = next(iter(masked.steps(PROMPT, 1)))
    assert np.isneginf(step.logits[50:]).all()
    assert np.isfinite(step.logits[:50]).all()
    assert step.logits.dtype == np.float32
    assert Model(MICRO, params, FakeTokenizer(99)).usable_tokens == 61  # type: ignore[arg-type]


def test_masking_leaves_what_the_tap_saw_alone() -> None:
    model = model_of(tokenizer=FakeTokenizer())
    kept = []
    model.generate(PROMPT, 2, engine="numpy", tap=lambda n, array: kept.append(array) if n == "logits" else None)
    assert all(np.isfinite(array).all() for array in kept)
    frozen = np.zeros((1, 1, 61), np.float32)
    frozen.flags.writeable = False
    result = model.generate(PROMPT, 2, engine="numpy", tap=lambda name, array: frozen if name == "logits" else None)
    assert result.ids == [0, 0]
    assert not frozen.any()


# -- taps --------------------------------------------------------------------------------------------------------


def test_a_tap_sees_every_step(model: Model) -> None:
    seen: dict[str, list[tuple]] = {}
    result = model.generate(
        PROMPT, 4, engine="numpy", tap=lambda name, array: seen.setdefault(name, []).append(array.shape)
    )
    assert result.ids == model.generate(PROMPT, 4, engine="numpy").ids
    assert seen["embed_tokens"] == [(1, 8, 20), (1, 1, 20), (1, 1, 20), (1, 1, 20)]
    assert seen["logits"] == [(1, 1, 61)] * 4
    assert seen["layers.2.self_attn.probs"] == [(1, 6, 8, 8), (1, 6, 1, 9), (1, 6, 1, 10), (1, 6, 1, 11)]
    assert seen["layers.1.mlp.expert_indices"] == [(8, 3), (1, 3), (1, 3), (1, 3)]


def test_a_tap_can_change_what_is_generated(model: Model) -> None:
    def force(name: str, array: np.ndarray) -> np.ndarray | None:
        return np.eye(61)[[[42]]] if name == "logits" else None

    assert model.generate(PROMPT, 3, engine="numpy", tap=force).ids == [42, 42, 42]
    silent = model.generate(
        PROMPT, 8, engine="numpy", tap=lambda n, a: a * 0 if n == "layers.1.mlp.routed" else None
    ).ids
    assert silent != model.generate(PROMPT, 8, engine="numpy").ids


# -- bad requests ------------------------------------------------------------------------------------------------


def refuse(name: str, array: np.ndarray) -> None:
    raise AssertionError("the model ran")


@pytest.mark.parametrize(
    ("prompt", "count", "options", "message"),
    [
        (PROMPT, 57, {}, r"8 prompt tokens \+ 57 new ones > context of 64; shorten .* at most 56 new tokens"),
        ([1] * 64, 1, {}, r"64 prompt tokens \+ 1 new ones > context of 64; shorten the prompt$"),
        ([1] * 65, 1, {}, r"65 prompt tokens \+ 1 new ones > context of 64; shorten the prompt$"),
        ([], 5, {}, r"the prompt is empty; give at least one token"),
        ("", 5, {}, r"the prompt is empty; give at least one token"),
        (np.zeros((1, 0), int), 5, {}, r"the prompt is empty"),
        ([1.0, 2.0], 5, {}, r"ids must be whole numbers of shape \[B, T\], got float64 of shape \[1, 2\]"),
        ([True], 5, {}, r"ids must be whole numbers of shape \[B, T\], got bool"),
        (["a"], 5, {}, r"ids must be whole numbers"),
        (7, 5, {}, r"ids must be whole numbers of shape \[B, T\], got int64 of shape \[\]"),
        ([[[1]]], 5, {}, r"got int64 of shape \[1, 1, 1\]"),
        ([[1], [2]], 5, {}, r"generation takes one prompt, got 2 rows"),
        ([1, 2, 61], 5, {}, r"token id 61 at row 0, position 2 is outside the vocabulary \(0 … 60\)"),
        ([1, -1], 5, {}, r"token id -1 at row 0, position 1 is outside"),
        ([10**30], 5, {}, r"ids must be whole numbers"),
        (PROMPT, 0, {}, r"max_new_tokens = 0 must be a whole number, 1 or more"),
        (PROMPT, -3, {}, r"max_new_tokens = -3 must be"),
        (PROMPT, 2.5, {}, r"max_new_tokens = 2.5 must be a whole number"),
        (PROMPT, 5, {"engine": "torch"}, r"engine = 'torch' is not there; take 'fast' or 'numpy'"),
        (PROMPT, 5, {"draft": -2}, r"draft = -2 must be a whole number between 0 .no drafts. and 32"),
        (PROMPT, 5, {"temperature": -1.0}, r"temperature = -1.0 must be"),
        (PROMPT, 5, {"temperature": 10**400}, r"temperature = 10{39} must be a finite number"),
        (PROMPT, 5, {"temperature": np.complex64(1)}, r"temperature = .* must be a number"),
        (PROMPT, 5, {"engine": "numpy", "tap": 3}, r"tap = 3 must be a function, tap\(name, array\)"),
        (PROMPT, 5, {"end_ids": [[1], [2, 3]]}, r"end_ids: \[1\] is no token id \(0 … 60\); give some in a flat list"),
        (PROMPT, 5, {"end_ids": [[1]]}, r"end_ids: \[1\] is no token id"),
        (PROMPT, 5, {"top_k": -1}, r"top_k = -1 must be"),
        (PROMPT, 5, {"top_p": 0.0}, r"top_p = 0.0 must be"),
        (PROMPT, 5, {"min_p": 2.0}, r"min_p = 2.0 must"),
    ],
)
def test_a_bad_request_fails_before_any_work(prompt, count, options: dict, message: str) -> None:
    model = model_of(tokenizer=FakeTokenizer())
    for how in ({"engine": "numpy", "tap": refuse}, {"engine": "fast"}):
        given = {**how, **options}
        with pytest.raises(ValueError, match=message):
            model.generate(prompt, count, **given)
        with pytest.raises(ValueError, match=message):
            model.steps(prompt, count, **given)  # at once, not at the first token
        with pytest.raises(ValueError, match=message):
            next(model.stream(prompt, count, **given))
    with pytest.raises(AssertionError, match="the model ran"):
        model.generate(PROMPT, 1, engine="numpy", tap=refuse)


def test_text_needs_a_tokenizer(model: Model) -> None:
    with pytest.raises(ValueError, match="this model has no tokenizer; give token ids"):
        model.generate("hello")
    with pytest.raises(ValueError, match="no tokenizer, so there is no text to stream; use generate"):
        next(model.stream([1]))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_stops_with_an_error(temperature: float, engine: str) -> None:
    params = map_arrays(lambda n, a: a * np.float32(np.nan) if n == "model.norm.weight" else a, random_params())
    with pytest.raises(ValueError, match="new token 1 cannot be chosen: the logits are NaN or infinite"):
        Model(MICRO, params).generate(PROMPT, 3, temperature=temperature, engine=engine)


def test_running_changes_nothing_in_the_model(model: Model) -> None:
    before = [array.copy() for array in _arrays(model.params)]
    first = model.generate(PROMPT, 6, temperature=1.0)
    assert model.generate(PROMPT, 6, temperature=1.0).ids == first.ids
    assert all(np.array_equal(a, b) for a, b in zip(before, _arrays(model.params), strict=True))
    assert isinstance(model.steps(PROMPT, 1), types.GeneratorType)


def _arrays(params: Params) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    map_arrays(lambda n, a: (found.append(a), a)[1], params)
    return found


def test_stream_checks_before_the_first_piece_is_asked_for():
    model = Model(MICRO, random_params(MICRO, 1), FakeTokenizer(50))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="context of"):
        model.stream([1, 2, 3], MICRO.max_position_embeddings)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", range(4))
def test_float32_takes_the_same_tokens_wherever_the_choice_is_clear(seed, engine):
    """With a cache and without, float32: a first difference would have to be a near-tie, of logits or of routing."""
    model = Model(MICRO, random_params(MICRO, seed))
    ids = [1, 2, 3]
    for step in model.steps(ids, 20, engine=engine):
        whole = model.forward([ids]).logits[0, -1]
        trace = model.trace(ids, keep="logits")
        margins = [np.diff(np.sort(whole)[-2:])[0], trace.routing.margins.min()]
        assert step.id == whole.argmax() or min(margins) <= 1e-5
        ids = [*ids, step.id]
    assert len(ids) == 23


# -- many at once ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    return minglm.load("glm-nano")


PROMPTS = ["17+25=", "def f(", "x", "import os\nimport sys\n", "class A:\n    def __init__(self", "4+4="]


@pytest.mark.parametrize("engine", ["numpy", "fast"])
def test_many_continuations_are_those_of_each_alone(engine, shipped, monkeypatch):
    """Prompts of several lengths, in more than one batch: what `generate` says for each of them."""
    monkeypatch.setattr("minglm.generate.batch.ROWS", 4)
    found = [each.text for each in continue_all(shipped, PROMPTS, 12, engine=engine)]
    assert found == [shipped.generate(prompt, 12, engine=engine).text for prompt in PROMPTS]


def test_a_continuation_ends_where_it_is_done(shipped):
    texts = [each.text for each in continue_all(shipped, PROMPTS, 12, lambda text: "\n" in text or len(text) > 5)]
    whole = [each.text for each in continue_all(shipped, PROMPTS, 12)]
    for text, full in zip(texts, whole, strict=True):
        assert full.startswith(text)
        assert text == full or "\n" in text or len(text) > 5
    assert texts != whole


def test_continuations_need_a_tokenizer_and_a_known_engine(shipped):
    with pytest.raises(ValueError, match="needs a tokenizer"):
        continue_all(minglm.new("micro"), ["a"], 3)
    with pytest.raises(ValueError, match="engine is 'quick'"):
        continue_all(shipped, ["a"], 3, engine="quick")
