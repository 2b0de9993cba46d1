"""The key/value cache: the same tokens in any split give the same states; what is forgotten stays forgotten."""

import itertools
from functools import partial

import numpy as np
import pytest

from minglm.model import KVCache, attention, make_layout, transformer
from minglm.model.ops import visible_keys
from tests.helpers import MICRO, assert_all_differ, assert_close, mutated, random_params, random_state, with_visible

CONFIG = MICRO.replace(num_hidden_layers=2)
PARAMS = random_params(CONFIG, 0)
IDS = random_state(1).randint(0, 61, (2, 7))
WHOLE = transformer(IDS, PARAMS, CONFIG)[0]


def new_cache(batch=2, capacity=16):
    return KVCache(CONFIG, batch, capacity, np.float64)


def in_pieces(ids, pieces, cache, run=transformer):
    """Hidden states of `ids`, computed in pieces of the given lengths."""
    ends = np.cumsum(pieces)
    return np.concatenate(
        [run(ids[:, e - n : e], PARAMS, CONFIG, cache)[0] for n, e in zip(pieces, ends, strict=True)], axis=1
    )


ALL_SPLITS = [
    [len(list(group)) for _, group in itertools.groupby(np.cumsum([0, *cuts]))]
    for cuts in itertools.product([0, 1], repeat=6)
]


def test_every_split_of_seven_tokens_gives_the_states_of_one_call():
    assert len(ALL_SPLITS) == 64
    for pieces in ALL_SPLITS:
        cache = new_cache()
        assert_close(in_pieces(IDS, pieces, cache), WHOLE)
        assert cache.length.tolist() == [7, 7]


def wrong_run(old, new, of):
    """The transformer with one piece of the layout's or the attention's source replaced."""
    if of is visible_keys:
        return partial(transformer, ops=with_visible(old, new))
    if of is make_layout:
        run = mutated(transformer, "layout = make_layout(", "layout = wrong_layout(")
        run.__globals__["wrong_layout"] = mutated(make_layout, old, new)
        return run
    layer = mutated(
        transformer.__globals__["layer"],
        "attention_out, saved_attention = attention(",
        "attention_out, saved_attention = wrong_attention(",
    )
    layer.__globals__["wrong_attention"] = mutated(attention, old, new)
    run = mutated(transformer, "x, saved = layer(", "x, saved = wrong_layer(")
    run.__globals__["wrong_layer"] = layer
    return run


POSITIONS = "positions = np.where(segments < 0, 0, np.take_along_axis(_place_in_segment(key_segments), slots, axis=1))"
VISIBLE = "(earlier & same_segment) | itself"
WRONG = {
    "restart_positions": (POSITIONS, "positions = np.broadcast_to(np.arange(count), (batch, count))", make_layout),
    "no_mask_with_cache": (VISIBLE, "same_segment | itself", visible_keys),
    "no_mask_after_first": (VISIBLE, f"(same_segment | itself) if slots[0, 0] > 0 else {VISIBLE}", visible_keys),
    "top_left": (VISIBLE, "np.broadcast_to(keys <= np.arange(slots.shape[1])[:, None], earlier.shape)", visible_keys),
    "overwrite, or new_only": (VISIBLE, f"({VISIBLE}) & (keys >= slots[:, :1])", visible_keys),
    "double_rotate": (
        "k_seen, v_seen, layout.sight, tap",
        "ops.rope(k_seen, layout.cos[:, :1], layout.sin[:, :1]), v_seen, layout.sight, tap",
        attention,
    ),
    "unrotated_cache": ("cache.append(layer, k_turned,", "cache.append(layer, k_normed,", attention),
    "one layer's slots for all": ("cache.append(layer,", "cache.append(0,", attention),
}


def test_every_wrong_use_of_the_cache_is_told_apart():
    """The masks need a later chunk of more than one token; "one layer's slots for all" needs two layers."""
    found = {name: in_pieces(IDS, [3, 1, 2, 1], new_cache(), wrong_run(*piece)) for name, piece in WRONG.items()}
    assert len(found) == 8
    assert_all_differ(found, WHOLE)


def test_one_call_would_hide_most_of_them():
    hidden = [
        name
        for name, piece in WRONG.items()
        if np.allclose(transformer_once(wrong_run(*piece)), WHOLE, rtol=0, atol=1e-9)
    ]
    assert len(hidden) >= 4


def transformer_once(run):
    return in_pieces(IDS, [7], new_cache(), run)


def test_unwritten_slots_are_never_read():
    cache = new_cache()
    cache.k[:], cache.v[:] = 1e3, np.nan
    assert_close(in_pieces(IDS, [3, 1, 2, 1], cache), WHOLE)


def test_capacity_may_be_filled_exactly():
    assert_close(in_pieces(IDS, [3, 4], new_cache(capacity=7)), WHOLE)


def test_too_many_tokens_are_refused_with_numbers_and_advice():
    cache = new_cache(capacity=7)
    in_pieces(IDS[:, :5], [5], cache)
    before = cache.k.copy()
    with pytest.raises(
        ValueError, match="holds 5 tokens and 3 more do not fit into its 7 slots; make it with a larger"
    ):
        transformer(IDS[:, :3], PARAMS, CONFIG, cache)
    assert cache.length.tolist() == [5, 5]
    assert np.array_equal(cache.k, before)


# -- truncate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", range(8))
def test_after_truncate_other_tokens_give_the_states_of_a_fresh_run(keep):
    cache = new_cache()
    in_pieces(IDS, [7], cache)
    cache.truncate(keep)
    other = (IDS + 7) % 61
    fresh = np.concatenate([IDS[:, :keep], other[:, keep:], other], axis=1)
    wanted = transformer(fresh, PARAMS, CONFIG)[0][:, keep:]
    assert_close(in_pieces(fresh[:, keep:], [2, 12 - keep], cache), wanted)


def test_truncate_takes_one_length_for_each_row_and_rows_of_different_length_live_together():
    cache = new_cache(3)
    ids = random_state(2).randint(0, 61, (3, 7))
    in_pieces(ids, [5, 2], cache)
    cache.truncate(np.array([2, 7, 0]))
    assert cache.length.tolist() == [2, 7, 0]
    more = random_state(3).randint(0, 61, (3, 4))
    y = in_pieces(more, [1, 3], cache)
    for b, kept in enumerate((2, 7, 0)):
        alone = transformer(np.concatenate([ids[b, :kept], more[b]])[None], PARAMS, CONFIG)[0]
        assert_close(y[b], alone[0, kept:])
    assert cache.length.tolist() == [6, 11, 4]


def test_one_row_may_forget_a_draft_while_another_keeps_it_step_after_step():
    """What speculative decoding does: two tokens a step, each row keeping one or two of them."""
    random = random_state(4)
    cache, kept = new_cache(2, 32), [[], []]
    for _ in range(5):
        step = random.randint(0, 61, (2, 2))
        y = transformer(step, PARAMS, CONFIG, cache)[0]
        for b in range(2):
            alone = transformer(np.array([[*kept[b], *step[b]]]), PARAMS, CONFIG)[0]
            assert_close(y[b], alone[0, -2:])
        accepted = random.randint(1, 3, 2)
        cache.truncate(cache.length - 2 + accepted)
        for b in range(2):
            kept[b] += step[b, : accepted[b]].tolist()
    assert cache.length.tolist() == [len(k) for k in kept]


@pytest.mark.parametrize("length", [8, -1, [7, 8], [-1, 0]])
def test_truncate_refuses_lengths_that_are_not_there(length):
    cache = new_cache()
    in_pieces(IDS, [7], cache)
    with pytest.raises(ValueError, match=r"cannot truncate rows holding \[7, 7\] tokens to"):
        cache.truncate(length)
    assert cache.length.tolist() == [7, 7]


# -- whose memory is whose ---------------------------------------------------------------------------------------


def test_the_cache_copies_what_it_is_given():
    cache = new_cache()
    k = np.ones((2, 3, 2, 8))
    lengths = np.array([3, 3])
    cache.append(0, k, k, cache.slots(3))
    cache.advance(np.zeros((2, 3), np.int64))
    k[:] = 99
    assert (cache.k[0, :, :3] == 1).all()
    cache.truncate(lengths)
    lengths[:] = 0
    assert cache.length.tolist() == [3, 3]


def test_a_step_advances_once_and_not_once_per_layer():
    cache = new_cache()
    calls = []
    cache.advance = lambda segments: calls.append(segments.shape)
    transformer(IDS[:, :3], PARAMS, CONFIG, cache)
    assert calls == [(2, 3)]
    assert cache.length.tolist() == [0, 0]  # the layers themselves did not move it


def test_every_layer_has_written_its_own_keys():
    cache = new_cache()
    in_pieces(IDS, [4, 3], cache)
    for layer in range(2):
        assert cache.k[layer, :, :7].any(axis=(2, 3)).all()
        assert not cache.k[layer, :, 7:].any()
    assert np.abs(cache.k[0] - cache.k[1]).max() > 1e-3


def test_keys_are_kept_rotated_and_values_as_they_are():
    seen = {}
    cache = new_cache()
    transformer(IDS, PARAMS, CONFIG, cache, tap=lambda name, array: seen.setdefault(name, array))
    assert np.array_equal(cache.k[1, :, :7], seen["layers.1.self_attn.k_rope"])
    assert np.array_equal(cache.v[1, :, :7], seen["layers.1.self_attn.v"])


def test_the_cache_has_the_dtype_and_the_sizes_it_was_asked_for():
    cache = KVCache(CONFIG, 3, dtype=np.float32)
    assert cache.k.shape == cache.v.shape == (2, 3, CONFIG.max_position_embeddings, 2, 8)
    assert cache.k.dtype == np.float32
    assert cache.batch == 3
    assert 2 * cache.k[:, 0, 0].nbytes == CONFIG.kv_bytes_per_token(4)
    assert "length=[0, 0, 0]" in repr(cache)


def test_a_row_that_ends_in_padding_continues_its_own_document():
    """Right padding that was not cut off: the next token belongs to the last real segment, not to a new one."""
    cache = KVCache(MICRO, 2, 12, np.float64)
    ids = random_state(8).randint(0, 61, (2, 6))
    segments = np.array([[3, 3, 3, -1, -1], [3, 3, 3, 3, 3]])
    transformer(ids[:, :5], PARAMS, MICRO, cache, segments=segments)
    hidden, saved = transformer(ids[:, 5:], PARAMS, MICRO, cache)
    assert saved.layout.sight.segments.tolist() == [[3], [3]]
    assert saved.layout.positions.tolist() == [[3], [5]]
    alone, _ = transformer(ids[:1, [0, 1, 2, 5]], PARAMS, MICRO)
    assert_close(hidden[0, 0], alone[0, -1])


def test_truncate_takes_whole_numbers():
    cache = KVCache(MICRO, 1, 4)
    cache.advance(np.zeros((1, 3), np.int64))
    with pytest.raises(ValueError, match="cannot truncate"):
        cache.truncate(0.9)
    cache.truncate(np.array([2]))
    assert cache.length.tolist() == [2]
