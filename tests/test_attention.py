"""Grouped-query attention, and who may see whom: causal, padded, packed."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.model import KVCache, attention, attention_bwd, make_layout, ops, transformer
from minglm.model.ops import Sight, visible_keys
from tests.helpers import (
    MICRO,
    assert_all_differ,
    assert_close,
    causal,
    mutated,
    naive_attend,
    naive_attention,
    naive_softmax,
    random_params,
    random_state,
    with_visible,
)

# H = 6 query heads, G = 2 key/value heads, T = 3 queries that are the last of S = 5 positions
T, S, H, G, d = 3, 5, 6, 2, 8
RANDOM = random_state(0)
Q, K, V = (1.5 * RANDOM.standard_normal(shape) for shape in [(T, H, d), (S, G, d), (S, G, d)])
BEHIND = np.arange(S) <= np.arange(T)[:, None] + S - T


def ours(q=Q, k=K, v=V):
    return ops.attend(q[None], k[None], v[None], causal(1, T, S))[0][0]


def naive(
    kv_head=lambda h: h // 3, sees=lambda t, s: s <= t + S - T, scale=d**-0.5, hidden=None, after=False, k=K, v=V
):
    """Attention with every decision open. `hidden`: a score that forbidden keys get instead of being left out;
    `after`: forbidden keys are removed after the softmax, without dividing again."""
    y = np.zeros((T, H, d))
    for t, h in np.ndindex(T, H):
        g = kv_head(h)
        scores = [float(Q[t, h] @ k[s, g]) * scale for s in range(S)]
        if after:
            probs = [p * sees(t, s) for s, p in enumerate(naive_softmax(scores))]
        else:
            low = -1e9 if hidden is None else hidden
            probs = naive_softmax([score if sees(t, s) else low for s, score in enumerate(scores)])
        y[t, h] = sum(p * v[s, g] for s, p in enumerate(probs))
    return y


def over_queries():
    y = np.zeros((T, H, d))
    for h in range(H):
        scores = np.where(BEHIND, Q[:, h] @ K[:, h // 3].T * d**-0.5, -1e9)
        y[:, h] = ops.softmax(scores.T).T @ V[:, h // 3]
    return y


def mean_heads(x):
    return np.repeat(x.mean(axis=1, keepdims=True), G, axis=1)


WRONG = {
    "tile": naive(kv_head=lambda h: h % 2),
    "first_kv": naive(kv_head=lambda h: 0),
    "mean_kv": naive(k=mean_heads(K), v=mean_heads(V)),
    "strict": naive(sees=lambda t, s: s < t + S - T),
    "peek": naive(sees=lambda t, s: s <= t + S - T + 1),
    "top_left": naive(sees=lambda t, s: s <= t),
    "no_mask": naive(sees=lambda t, s: True),
    "future": naive(sees=lambda t, s: s >= t + S - T),
    "mask_zero": naive(hidden=0.0),
    "mask_after": naive(after=True),
    "no_scale": naive(scale=1.0),
    "1/d": naive(scale=1 / d),
    "1/sqrt(hidden)": naive(scale=20**-0.5),
    "times sqrt(d)": naive(scale=d**0.5),
    "softmax_axis": over_queries(),
    "bad_merge": naive().transpose(1, 0, 2).reshape(T, H, d),
}


def test_attend_equals_the_naive_loops_with_more_keys_than_queries():
    assert_close(ours(), naive_attend(Q, K, V))
    assert_close(ours(), naive())


def test_every_wrong_attention_is_told_apart():
    assert len(WRONG) == 16
    assert_all_differ(WRONG, ours())


def test_emptying_a_key_value_head_changes_exactly_its_group():
    k, v = K.copy(), V.copy()
    k[:, 1], v[:, 1] = 0, 0
    changed = np.abs(ours(k=k, v=v) - ours()).max(axis=(0, 2)) > 0
    assert changed.tolist() == [False, False, False, True, True, True]


def test_a_hidden_key_changes_nothing_bit_for_bit_and_gets_no_gradient():
    k, v = K.copy(), V.copy()
    k[-1], v[-1] = 1e3, -1e3
    assert np.array_equal(ours(k=k, v=v)[:-1], ours()[:-1])
    earlier = Sight(np.array([[1, 2, 3]]), np.zeros((1, T), int), np.zeros((1, S), int))
    _, dk, dv = ops.attend_bwd(Q[None], ops.attend(Q[None], K[None], V[None], earlier)[1])
    assert not dk[0, -1].any()
    assert not dv[0, -1].any()


# -- the sub-layer -----------------------------------------------------------------------------------------------

LAYER = random_params(MICRO, 1).layers[0].self_attn
X = RANDOM.standard_normal((2, 5, 20))
LAYOUT = make_layout((2, 5), MICRO, np.float64)


def test_attention_equals_the_naive_one():
    y, _ = attention(X, LAYER, MICRO, LAYOUT)
    assert_close(y, np.stack([naive_attention(row, LAYER, MICRO) for row in X]), 1e-11)


@pytest.mark.parametrize("changes", [{"use_qk_norm": False}, {"attention_bias": False}, {"num_key_value_heads": 6}])
def test_attention_equals_the_naive_one_with_other_switches(changes):
    config = MICRO.replace(**changes)
    params = random_params(config, 2).layers[0].self_attn
    y, _ = attention(X, params, config, LAYOUT)
    assert_close(y, np.stack([naive_attention(row, params, config) for row in X]), 1e-11)


def test_every_wrong_order_of_steps_is_told_apart():
    """Bias, then norm of each head, then rotation."""
    right, _ = attention(X, LAYER, MICRO, LAYOUT)
    pieces = {
        "no bias": ("ops.linear(x, *params.q_proj)", "ops.linear(x, params.q_proj.weight)"),
        "q and k norm swapped": ("_head_norm(q, params.q_norm", "_head_norm(q, params.k_norm"),
        "k not normed": ("_head_norm(k, params.k_norm, config, ops)", "k"),
        "q not rotated": ("ops.rope(q_normed, layout.cos, layout.sin)", "q_normed"),
        "k not rotated": ("ops.rope(k_normed, layout.cos, layout.sin)", "k_normed"),
        "rotated before the norm": ("ops.rope(q_normed,", "ops.rope(q,"),
        "values rotated": ("(k_turned, v) if", "(k_turned, ops.rope(v, layout.cos, layout.sin)) if"),
        "one norm over all heads": (
            "_head_norm(q, params.q_norm, config, ops)",
            "q / np.sqrt((q * q).mean(axis=(2, 3), keepdims=True) + 1e-3) * params.q_norm.weight",
        ),
    }
    wrong = {name: mutated(attention, *piece)(X, LAYER, MICRO, LAYOUT)[0] for name, piece in pieces.items()}
    assert len(wrong) == 8
    assert_all_differ(wrong, right)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_attention_and_its_gradients_keep_the_dtype(dtype):
    params, x = random_params(MICRO, 1, dtype).layers[0].self_attn, X.astype(dtype)
    x.flags.writeable = False
    y, saved = attention(x, params, MICRO, make_layout((2, 5), MICRO, dtype))
    dx, dparams = attention_bwd(y, saved, params, MICRO)
    assert {y.dtype, dx.dtype} == {np.dtype(dtype)}
    assert {a.dtype for part in dparams for a in part if a is not None} == {np.dtype(dtype)}


# -- who sees whom: the whole transformer ------------------------------------------------------------------------

PARAMS = random_params(MICRO, 3)
IDS = random_state(4).randint(0, 61, (3, 9))


def hidden(ids, **arguments):
    return transformer(np.atleast_2d(ids), PARAMS, MICRO, **arguments)[0]


def test_the_future_changes_nothing():
    other = IDS.copy()
    other[:, 6:] = (other[:, 6:] + 1) % 61
    before, after = hidden(IDS), hidden(other)
    assert_close(after[:, :6], before[:, :6])
    assert (np.abs(after[:, 6:] - before[:, 6:]).max(axis=-1) > 1e-3).all()


def test_rows_of_a_batch_do_not_see_each_other():
    assert_close(hidden(IDS), np.concatenate([hidden(row) for row in IDS]))


@pytest.mark.parametrize("pads", [[0, 1, 4], [3, 3, 0], [8, 0, 2]])
def test_left_padded_rows_equal_unpadded_ones_whatever_the_padding_holds(pads):
    segments = np.stack([np.where(np.arange(9) < p, -1, 0) for p in pads])
    for padding in (0, 60):
        ids = np.where(segments < 0, padding, IDS)
        y = hidden(ids, segments=segments)
        for b, p in enumerate(pads):
            assert_close(y[b, p:], hidden(IDS[b, p:])[0])


def test_right_padding_and_padding_in_the_middle_change_nobody():
    y = hidden(IDS[0], segments=np.array([[0, 0, 0, -1, -1, 0, 0, -1, -1]]))[0]
    assert_close(y[[0, 1, 2, 5, 6]], hidden(IDS[0, [0, 1, 2, 5, 6]])[0])


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_document_in_a_packed_row_equals_the_document_alone(lengths):
    ends = np.cumsum(lengths)
    ids = random_state(5).randint(0, 61, ends[-1])
    segments = np.repeat(np.arange(len(lengths)), lengths)
    y = hidden(ids, segments=segments[None])[0]
    for number, (start, end) in enumerate(zip(ends - lengths, ends, strict=True)):
        assert_close(y[start:end], hidden(ids[start:end])[0]), number


def test_interleaved_documents_see_their_own_tokens_only():
    segments = np.array([7, 2, 7, 7, 2, 2, 7, 2, 2])
    y = hidden(IDS[0], segments=segments[None])[0]
    for document in (2, 7):
        assert_close(y[segments == document], hidden(IDS[0, segments == document])[0])


def test_positions_count_the_earlier_tokens_of_the_same_segment():
    segments = np.array([[-1, -1, 4, 4, 4], [0, 0, 1, 1, 1], [0, 1, 0, 1, 0]])
    layout = make_layout((3, 5), MICRO, np.float64, segments=segments)
    real = segments >= 0
    assert layout.positions[real].tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0, 0, 1, 1, 2]
    assert visible_keys(layout.sight)[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def test_given_positions_are_used_and_a_common_shift_changes_nothing():
    positions = np.tile(np.arange(9), (3, 1))
    assert np.array_equal(hidden(IDS, positions=positions), hidden(IDS))
    assert_close(hidden(IDS, positions=positions + 17), hidden(IDS), 1e-9)
    assert np.abs(hidden(IDS, positions=2 * positions) - hidden(IDS)).max() > 1e-3


def test_wrong_layouts_are_told_apart():
    segments = np.array([[-1, -1, 0, 0, 0, 0, 1, 1, 1]] * 3)
    right = hidden(IDS, segments=segments)[:, 2:]

    def with_sight(old, new):
        return transformer(IDS, PARAMS, MICRO, segments=segments, ops=with_visible(old, new))[0][:, 2:]

    wrong = {
        "documents see each other": with_sight("(earlier & same_segment) | itself", "earlier | itself"),
        "own token hidden": with_sight(
            "(earlier & same_segment) | itself",
            "earlier & same_segment | itself & ~(earlier & same_segment).any(-1, keepdims=True)",
        ),
        "causal mask forgotten": with_sight("(earlier & same_segment) | itself", "same_segment | itself"),
    }
    assert len(wrong) == 3
    assert_all_differ(wrong, right)


def test_segments_in_the_cache_go_on_where_they_stopped():
    """Rows of different length in one cache, left padded, continued without saying so again."""
    segments = np.stack([np.where(np.arange(6) < p, -1, 0) for p in (0, 2, 5)])
    cache = KVCache(MICRO, 3, 12, np.float64)
    hidden(IDS[:, :6], cache=cache, segments=segments)
    y = hidden(IDS[:, 6:], cache=cache)
    for b, p in enumerate((0, 2, 5)):
        assert_close(y[b], hidden(IDS[b, p:])[0, -3:])


def test_a_row_whose_cache_ends_with_padding_goes_on_after_its_last_token():
    segments = np.stack([np.where(np.arange(6) >= n, -1, 0) for n in (6, 4, 1)])  # right padding
    cache = KVCache(MICRO, 3, 12, np.float64)
    hidden(IDS[:, :6], cache=cache, segments=segments)
    y = hidden(IDS[:, 6:], cache=cache)
    for b, n in enumerate((6, 4, 1)):
        assert_close(y[b], hidden(np.concatenate([IDS[b, :n], IDS[b, 6:]]))[0, -3:])


def test_the_scale_is_of_the_head_and_not_of_the_model():
    """All keys equal but one: its weight is e^(q·k/√d) to 1."""
    q, k = np.zeros((1, 1, 1, 4)), np.zeros((1, 2, 1, 4))
    q[..., 0], k[0, 1, 0, 0] = 2, 3
    _, saved = ops.attend(q, k, k, causal(1, 1, 2))
    assert saved.probs[0, 0, 0, 1] / saved.probs[0, 0, 0, 0] == pytest.approx(math.exp(6 / 2))
