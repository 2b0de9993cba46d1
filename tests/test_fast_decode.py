"""The fused step: the book's numbers for every switch, and bits that depend on nothing but the row itself."""

import itertools

import numpy as np
import pytest

from minglm.api import Model
from minglm.config import PRESETS
from minglm.fast import engine as engines
from minglm.fast import team
from minglm.fast.engine import PIECE, Decoder, FastEngine
from minglm.fast.jit import DISABLE_JIT
from minglm.model import KVCache, head, map_arrays, transformer
from minglm.model.params import Experts, Moe, walk_stacked
from tests.helpers import difference, random_state
from tests.variants import MICRO, VARIANTS, Variant, random_params

pytestmark = pytest.mark.usefixtures("no_hang")

ALL = {**VARIANTS, "no-shared-expert": Variant(MICRO.replace(n_shared_experts=0))}
# Sizes of more than one vector register, and none a multiple of one: where a wrong order of summing would show.
WIDE = MICRO.replace(hidden_size=75, head_dim=36, intermediate_size=83, moe_intermediate_size=41)
if DISABLE_JIT:
    WIDE = MICRO  # plain Python is slow, and has no vector registers
IDS = random_state(1).randint(0, 61, (3, 12))
JIT_ONLY = pytest.mark.skipif(DISABLE_JIT, reason="without the JIT there is one thread; runs whenever the JIT is on")


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    """Threads may be asked for on any machine; that they take turns on its cores changes no result."""
    monkeypatch.setattr(team, "cores", lambda: 4)


def model_of(config=MICRO, dtype="float32", seed=0, mtp_own_ends=False):
    return Model(config, random_params(config, seed, mtp_own_ends=mtp_own_ends)).astype(dtype)


def decoder_of(model, threads=1):
    return Decoder(model.params, model.config, 16, threads)


def book_logits(model, ids, cache=None, segments=None):
    hidden, _ = transformer(ids, model.params, model.config, cache, segments=segments)
    return head(hidden, model.params)


def logits_of(model, ids, segments=None, pieces=None, threads=1, cache=None):
    """All logits [B, T, V] of ids [B, T], the decoder having taken them in pieces of the given lengths."""
    ids = np.asarray(ids)
    decoder, cache = decoder_of(model, threads), cache or KVCache(model.config, len(ids), 16)
    found, start = [], 0
    for count in pieces or [1] * ids.shape[1]:
        part = None if segments is None else segments[:, start : start + count]
        found.append(decoder.step(ids[:, start : start + count], cache, part).copy())
        start += count
    return np.concatenate(found, axis=1)


def compare_with_the_book(model, ids):
    """Token by token: logits, the greedy choice, and what the cache holds."""
    decoder, cache, books = decoder_of(model), KVCache(model.config, 1, 16), KVCache(model.config, 1, 16)
    for token in ids:
        found = decoder.step(np.array([[token]]), cache)[0, 0]
        wanted = book_logits(model, np.array([[token]]), books)[0, 0]
        assert found.dtype == wanted.dtype == np.float32
        assert difference(found, wanted) <= 1e-5
        best, second = np.sort(wanted)[-2:][::-1]
        assert best - second > 1e-5  # no near-tie here: the greedy token must be the same
        assert found.argmax() == wanted.argmax()
    assert cache.length.tolist() == books.length.tolist() == [len(ids)]
    assert np.array_equal(cache.segments, books.segments)
    assert difference(cache.k, books.k) <= 1e-5
    assert difference(cache.v, books.v) <= 1e-5


@pytest.mark.parametrize("name", ALL)
def test_logits_tokens_and_cache_are_the_books(name):
    config, own_ends = ALL[name]
    compare_with_the_book(model_of(config, mtp_own_ends=own_ends), IDS[0])


@pytest.mark.parametrize("name", ["micro", "tied", "all-dense", "one-pick-of-two", "no-shared-expert"])
def test_bfloat16_weights_give_what_the_book_makes_of_them(name):
    config, own_ends = ALL[name]
    compare_with_the_book(model_of(config, "bfloat16", mtp_own_ends=own_ends), IDS[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sizes_that_fill_no_vector_register_give_the_books_numbers(dtype):
    compare_with_the_book(model_of(WIDE, dtype), IDS[2])


def test_every_variant_tells_its_switch_apart():
    """A variant whose numbers were micro's would prove nothing about its switch."""
    micro = logits_of(model_of(), IDS[:1, :4])
    same = {"mtp-own-ends", "no-mtp"}  # MTP layers take no part in decoding
    for name in ALL.keys() - same - {"micro"}:
        other = logits_of(model_of(ALL[name].config), IDS[:1, :4])
        assert difference(other, micro) > 1e-3, name


# -- a row's bits depend on the row alone --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_tokens_in_one_step_are_several_steps_of_one(dtype):
    model = model_of(WIDE, dtype)
    wanted = logits_of(model, IDS[:1])
    for pieces in ([12], [5, 7], [1, 3, 8], [2] * 6):
        assert np.array_equal(logits_of(model, IDS[:1], pieces=pieces), wanted), pieces


@JIT_ONLY
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_number_of_threads_changes_no_bit(dtype):
    model = model_of(WIDE, dtype)
    wanted = logits_of(model, IDS[:, :8])
    for threads in (2, 3, 4):
        assert np.array_equal(logits_of(model, IDS[:, :8], threads=threads), wanted), threads
        assert np.array_equal(logits_of(model, IDS[:, :8], pieces=[1, 4, 3], threads=threads), wanted), threads


@JIT_ONLY
def test_more_threads_than_heads_experts_or_rows_of_a_matrix():
    config = MICRO.replace(num_attention_heads=1, num_key_value_heads=1, vocab_size=3, hidden_size=2, head_dim=4)
    config = config.replace(moe_intermediate_size=1, intermediate_size=1, n_shared_experts=1)
    model = model_of(config)
    wanted = logits_of(model, IDS[:1] % 3)
    assert difference(wanted, book_logits(model, IDS[:1] % 3)) <= 1e-5
    assert np.array_equal(logits_of(model, IDS[:1] % 3, threads=4), wanted)


def test_rows_of_different_length_have_the_bits_that_each_has_alone():
    model, lengths = model_of(WIDE), np.array([2, 7, 0])
    cache = KVCache(WIDE, 3, 16)
    logits_of(model, IDS[:, :7], cache=cache)
    cache.truncate(lengths)
    more = IDS[:, 7:]
    together = logits_of(model, more, pieces=[1, 3, 1], cache=cache)
    for b, kept in enumerate(lengths):
        alone = logits_of(model, [[*IDS[b, :kept], *more[b]]])
        assert np.array_equal(together[b], alone[0, kept:])
    assert cache.length.tolist() == [7, 12, 5]


def test_left_padding_changes_no_bit():
    model, segments, ids = model_of(WIDE), np.zeros((3, 12), np.int64), IDS.copy()
    for b, padding in enumerate((0, 3, 9)):
        segments[b, :padding] = -1
        ids[b, padding:] = IDS[b, : 12 - padding]
    for pieces in ([1] * 12, [5, 5, 2]):
        together = logits_of(model, ids, segments, pieces)
        for b, padding in enumerate((0, 3, 9)):
            alone = logits_of(model, IDS[b : b + 1, : 12 - padding])
            assert np.array_equal(together[b, padding:], alone[0])


def test_packed_documents_have_the_bits_that_each_has_alone():
    model, ends = model_of(WIDE), [0, 4, 5, 12]
    segments = np.repeat([[3, 0, 7]], [4, 1, 7], axis=1)
    together = logits_of(model, IDS[:1], segments, pieces=[6, 6])
    for start, stop in itertools.pairwise(ends):
        assert np.array_equal(together[:, start:stop], logits_of(model, IDS[:1, start:stop]))


def test_documents_that_alternate_and_padding_between_them_are_the_books():
    segments = np.array([[0, 1, 0, -1, 1, 1, 0, -1, 0, 1, 0, 0]] * 3)
    segments[1] = segments[1, ::-1]
    for config in (MICRO, WIDE):
        model, cache, books = model_of(config), KVCache(config, 3, 16), KVCache(config, 3, 16)
        wanted = book_logits(model, IDS, books, segments)
        assert difference(logits_of(model, IDS, segments, [4, 1, 4, 3], cache=cache), wanted) <= 1e-5
        assert difference(cache.k, books.k) <= 1e-5
        assert np.array_equal(cache.segments, books.segments)


def test_by_default_a_row_continues_the_document_that_it_ends_with():
    model, cache, books = model_of(), KVCache(MICRO, 2, 16), KVCache(MICRO, 2, 16)
    segments = np.array([[3, 3, 3, -1, -1], [3, 3, 4, 4, 4]])
    logits_of(model, IDS[:2, :5], segments, cache=cache)
    book_logits(model, IDS[:2, :5], books, segments)
    assert difference(logits_of(model, IDS[:2, 5:], cache=cache), book_logits(model, IDS[:2, 5:], books)) <= 1e-5
    assert cache.segments.tolist() == books.segments.tolist()


def test_what_was_forgotten_leaves_no_trace():
    model, cache = model_of(WIDE), KVCache(WIDE, 1, 16)
    cache.k[:], cache.v[:], cache.segments[:] = np.nan, np.nan, 0
    logits_of(model, IDS[:1], cache=cache)
    cache.truncate(3)
    fresh = logits_of(model, [[*IDS[0, :3], *IDS[1, :6]]])
    assert np.array_equal(logits_of(model, IDS[1:2, :6], cache=cache), fresh[:, 3:])


def test_one_decoder_serves_several_caches_by_turns():
    model = model_of()
    decoder, caches = decoder_of(model), [KVCache(MICRO, 1, 16), KVCache(MICRO, 2, 13)]
    found: list[list] = [[], []]
    for t in range(6):
        for i, cache in enumerate(caches):
            found[i].append(decoder.step(IDS[i : 2 * i + 1, t : t + 1], cache).copy())
    for i in range(2):
        assert np.array_equal(np.concatenate(found[i], axis=1), logits_of(model, IDS[i : 2 * i + 1, :6]))


def test_last_only_has_the_same_bits_in_each_rows_last_place():
    model = model_of(WIDE)
    wanted = logits_of(model, IDS[:, :8])
    decoder, cache = decoder_of(model), KVCache(WIDE, 3, 16)
    for start, stop in ((0, 1), (1, 5), (5, 6), (6, 8)):
        last = decoder.step(IDS[:, start:stop], cache, last_only=True)[:, -1]
        assert np.array_equal(last, wanted[:, stop - 1])


def test_long_prompts_go_in_pieces(monkeypatch):
    monkeypatch.setattr(engines, "PROMPT", 20)
    params, ids = random_params(MICRO, 0, np.float32), np.random.RandomState(0).randint(0, MICRO.vocab_size, 64)
    for count in (20, 21, 22, 40, 41, 42, 63):
        engine = FastEngine(params, MICRO, 64)
        hidden, _ = transformer(ids[None, : count + 1], params, MICRO)
        wanted = head(hidden, params)[0]
        assert difference(engine.feed(ids[:count].tolist()), wanted[count - 1]) <= 1e-5
        assert difference(engine.feed([int(ids[count])]), wanted[count]) <= 1e-5


def test_the_engine_gives_the_last_tokens_logits_for_prompts_of_any_length():
    model = model_of()
    wanted = logits_of(model, np.concatenate([IDS[:1], IDS[1:2, :8]], axis=1), cache=KVCache(MICRO, 1, 20))
    for count in (1, 7, 8, 9, 16, 17):
        engine = FastEngine(model.params, MICRO, 20, 1)
        ids = [*IDS[0].tolist(), *IDS[1, :8].tolist()]
        # a longer prompt goes through the book's functions: equal up to rounding, as is what follows it
        bound = 0 if count <= 2 * PIECE else 1e-5
        assert difference(engine.feed(ids[:count]), wanted[0, count - 1]) <= bound
        assert difference(engine.feed(ids[count : count + 1]), wanted[0, count]) <= bound
        assert engine.name == ("fast engine, JIT off" if DISABLE_JIT else "fast engine, 1 thread")


# -- weights -----------------------------------------------------------------------------------------------------


def with_weights(model, change):
    return Model(model.config, map_arrays(change, model.params))


def trunk(model):
    return [name for name, _ in walk_stacked(model.params._replace(mtp=()))]


def test_not_a_number_in_any_weight_reaches_every_logit():
    """But for the selection bias, which is added to nothing that is kept: NumPy's sort puts NaN last, too."""
    model = model_of()
    names = [name for name in trunk(model) if not name.endswith("e_score_correction_bias")]
    assert len(names) > 40
    for spoiled in names:
        nan = with_weights(model, lambda n, a, spoiled=spoiled: a * np.float32(np.nan) if n == spoiled else a)
        found = logits_of(nan, IDS[:1, :3], pieces=[3])
        assert np.isnan(found).all(), spoiled
        assert np.isnan(book_logits(nan, IDS[:1, :3])).all()


def test_one_key_that_is_not_a_number_spoils_those_who_see_it_and_nobody_else():
    model, cache = model_of(), KVCache(MICRO, 1, 16)
    segments = np.array([[0, 0, 0, 0, 1, 1]])
    clean = logits_of(model, IDS[:1, :6], segments)
    decoder = decoder_of(model)
    decoder.step(IDS[:1, :2], cache, segments[:, :2])
    cache.k[1, 0, 0, 0, 3] = np.nan
    found = decoder.step(IDS[:1, 2:6], cache, segments[:, 2:6])
    assert np.isnan(found[:, :2]).all()
    assert np.array_equal(found[:, 2:], clean[:, 4:])


def addresses(book):
    return {*book.layers.ravel().tolist(), *book.experts.ravel().tolist(), *book.ends.tolist()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_read_where_they_are(dtype):
    model = model_of(dtype=dtype)
    used = addresses(decoder_of(model)._book)
    for name, array in walk_stacked(model.params._replace(mtp=())):
        parts = list(array) if "*" in name else [array]
        if array.ndim > 1 or array.dtype == np.float32:
            assert {part.ctypes.data for part in parts} <= used, name
        else:
            assert array.ctypes.data not in used  # a short vector of bfloat16 is widened once, beforehand


def test_a_weight_that_changes_is_seen_by_the_next_step():
    model = model_of()
    decoder = decoder_of(model)
    before = decoder.step(IDS[:1, :1], KVCache(MICRO, 1, 4)).copy()
    model.params.lm_head.weight[5] = 0
    after = decoder.step(IDS[:1, :1], KVCache(MICRO, 1, 4))
    assert after[0, 0, 5] == 0 != before[0, 0, 5]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_read_only_weights_serve(dtype):
    model = model_of(dtype=dtype)
    wanted = logits_of(model, IDS[:1, :3])
    for _, array in walk_stacked(model.params):
        array.flags.writeable = False
    assert np.array_equal(logits_of(model, IDS[:1, :3]), wanted)


def apart(params):
    """The same weights, each expert's matrices in memory of their own."""

    def part(layer):
        if not isinstance(layer.mlp, Moe):
            return layer
        lists = Experts(*([np.array(matrix) for matrix in stack] for stack in layer.mlp.experts))
        return layer._replace(mlp=layer.mlp._replace(experts=lists))

    return params._replace(layers=tuple(part(layer) for layer in params.layers))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_may_be_anywhere_in_memory(dtype):
    model = model_of(dtype=dtype)
    spread = Model(MICRO, apart(model.params))
    gates = spread.params.layers[1].mlp.experts.gate_proj
    assert isinstance(gates, list)
    assert {gate.ctypes.data for gate in gates} <= addresses(decoder_of(spread)._book)
    assert np.array_equal(logits_of(spread, IDS[:1]), logits_of(model, IDS[:1]))


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_other_dtypes_are_refused_with_the_way_out(dtype):
    with pytest.raises(
        ValueError, match=f"reads float32, bfloat16, fp8 and mxfp4 weights, these are {dtype}; use engine='numpy'"
    ):
        decoder_of(model_of(dtype=dtype))


@pytest.mark.parametrize("layout", [np.asfortranarray, lambda a: np.repeat(a, 2, axis=-1)[..., ::2]])
def test_weights_that_are_not_contiguous_are_refused_with_the_way_out(layout):
    model = model_of()
    for name in (
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.2.mlp.gate.weight",
    ):
        strided = with_weights(model, lambda n, a, name=name: layout(a) if n == name else a)
        with pytest.raises(ValueError, match=r"wants contiguous float32 weights .* np.ascontiguousarray, or engine="):
            decoder_of(strided)
        assert strided.generate([1], 2, engine="numpy").ids  # the book takes them


def test_vectors_may_be_strided():
    model = model_of()
    strided = with_weights(model, lambda n, a: np.repeat(a, 2)[::2] if a.ndim == 1 else a)
    assert np.array_equal(logits_of(strided, IDS[:1, :3]), logits_of(model, IDS[:1, :3]))


def test_a_mix_of_dtypes_is_refused():
    model, narrow = model_of(), model_of(dtype="bfloat16")
    mixed = model.params._replace(lm_head=narrow.params.lm_head)
    with pytest.raises(ValueError, match=r"wants contiguous float32 weights of shape \[61, 20\] here, got bfloat16"):
        Decoder(mixed, MICRO)


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 62},
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 4},
        {"first_k_dense_replace": 2},
        {"use_qk_norm": False},
        {"attention_bias": False},
        {"n_shared_experts": 0},
        {"n_shared_experts": 1},
        {"n_routed_experts": 16},
        {"head_dim": 16},
        {"intermediate_size": 30},
        {"moe_intermediate_size": 6},
        {"hidden_size": 10},
        {"tie_word_embeddings": True},
    ],
)
def test_weights_of_another_config_are_refused_and_never_read_past_their_end(change):
    with pytest.raises(
        ValueError, match=r"weights and config are of different models|wants contiguous|config asks for"
    ):
        Decoder(model_of().params, MICRO.replace(**change))


# -- caches ------------------------------------------------------------------------------------------------------


def test_a_cache_that_does_not_fit_is_refused_and_changes_nothing():
    model, cache = model_of(), KVCache(MICRO, 1, 6)
    decoder = decoder_of(model)
    wanted = logits_of(model, IDS[:1, :6])
    decoder.step(IDS[:1, :4], cache)
    before = cache.k.copy(), cache.v.copy(), cache.segments.copy(), cache.length.copy()
    wrong = [
        (KVCache(MICRO.replace(num_hidden_layers=2), 1, 6), IDS[:1, :1], "wants a float32 cache of shape"),
        (KVCache(MICRO.replace(num_key_value_heads=3), 1, 6), IDS[:1, :1], "wants a float32 cache of shape"),
        (KVCache(MICRO.replace(head_dim=16), 1, 6), IDS[:1, :1], "wants a float32 cache of shape"),
        (KVCache(MICRO, 1, 6, np.float64), IDS[:1, :1], r"float32 cache .* got float64 \[3, 1, 6, 2, 8\]"),
        (KVCache(MICRO, 2, 6), IDS[:1, :1], "1 × 1 tokens, for a cache of 2 rows"),
        (cache, IDS[:2, :1], "2 × 1 tokens, for a cache of 1 rows"),
        (cache, IDS[:1, :3], "holds 4 tokens and 3 more do not fit into its 6 slots"),
        (KVCache(MICRO, 2, 16), IDS[:2, :9], "2 × 9 tokens, for a cache of 2 rows and 16 tokens a step"),
    ]
    for other, ids, message in wrong:
        with pytest.raises(ValueError, match=message):
            decoder.step(ids, other)
        for kept, now in zip(before, (cache.k, cache.v, cache.segments, cache.length), strict=True):
            assert np.array_equal(kept, now)
    assert np.array_equal(decoder.step(IDS[:1, 4:6], cache), wanted[:, 4:])  # and the decoder goes on


def test_a_cache_of_the_step_is_one_of_the_book():
    """Each may continue what the other began."""
    model, cache = model_of(), KVCache(MICRO, 1, 16)
    wanted = book_logits(model, IDS[:1])
    decoder = decoder_of(model)
    found = [decoder.step(IDS[:1, :4], cache).copy(), book_logits(model, IDS[:1, 4:7], cache)]
    found.append(decoder.step(IDS[:1, 7:], cache))
    assert difference(np.concatenate(found, axis=1), wanted) <= 1e-5


def test_a_shipped_preset_generates_the_books_tokens():
    config = PRESETS["glm-nano"].replace(eos_token_id=())
    if DISABLE_JIT:
        config = MICRO
    model = model_of(config)
    fast, book = (model.generate([5, 3, 8], 12, engine=name) for name in ("fast", "numpy"))
    assert fast.ids == book.ids
    assert fast.stats.engine.startswith("fast engine, ")
    assert book.stats.engine == "NumPy engine"
