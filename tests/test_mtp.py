"""Multi-token prediction: which word meets which state, in which order, through which norm."""

import numpy as np
import pytest

from minglm.model import KVCache, make_layout, mtp_chain, mtp_layer, mtp_step, ops, transformer
from minglm.model.mtp import mtp_embedding_weight, mtp_head_weight
from tests.helpers import (
    MICRO,
    assert_all_differ,
    assert_close,
    mutated,
    naive_hidden,
    naive_layer,
    naive_mtp,
    naive_rms_norm,
    random_params,
    random_state,
)

T, D, EPS = 8, 20, MICRO.rms_norm_eps
PARAMS = random_params(MICRO, 0)  # two MTP layers; every norm weight is another vector
IDS = random_state(1).permutation(61)[:T]  # no token twice
HIDDEN, SAVED = transformer(IDS[None], PARAMS, MICRO, save=True)
TABLE = PARAMS.embed_tokens.weight
LAYER = PARAMS.mtp[0]


def chain(depths, params=PARAMS, config=MICRO, ids=IDS[None], segments=None):
    hidden, saved = transformer(ids, params, config, segments=segments)
    return mtp_chain(hidden, ids, saved.layout, params, config, depths)


def test_the_norms_of_this_test_are_all_different():
    norms = [PARAMS.norm.weight, LAYER.enorm.weight, LAYER.hnorm.weight, LAYER.shared_head.norm.weight]
    assert all(np.abs(a - b).max() > 0.1 for i, a in enumerate(norms) for b in norms[:i])
    assert all(np.ptp(a) > 0.1 for a in norms)


def test_depth_one_pairs_each_state_with_the_next_token():
    (depth,) = chain(1)
    hidden = naive_hidden(IDS, PARAMS, MICRO)
    assert_close(HIDDEN[0], hidden, 1e-11)
    assert_close(depth.normed[0], naive_mtp(hidden[:-1], IDS[1:], LAYER, TABLE, MICRO), 1e-11)
    assert depth.normed.shape == (1, T - 1, D)
    assert depth.valid.all()


def naive_variant(
    words=IDS[1:], states=None, swap=False, norms=(LAYER.enorm, LAYER.hnorm), zero_first=False, last=True
):
    """The naive layer with every decision open; compared on rows 1 … T − 3, which all variants have."""
    states = HIDDEN[0][: T - 1] if states is None else states
    rows = min(len(words), len(states))
    words, states = TABLE[words[:rows]], states[:rows]
    if zero_first:
        words = words * (np.arange(rows) > 0)[:, None]
    parts = [
        part if norm is None else naive_rms_norm(part, norm.weight, EPS)
        for part, norm in zip((words, states), norms, strict=True)
    ]
    joined = np.concatenate(parts[::-1] if swap else parts, axis=-1)
    out = naive_layer(joined @ LAYER.eh_proj.weight.T, LAYER.block, MICRO)
    return (naive_rms_norm(out, LAYER.shared_head.norm.weight, EPS) if last else out)[: T - 2]


def test_every_wrong_input_of_the_mtp_layer_is_told_apart():
    right = chain(1)[0].normed[0, : T - 2]
    assert_close(naive_variant(), right, 1e-11)
    enorm, hnorm = LAYER.enorm, LAYER.hnorm
    wrong = {
        "no_shift": naive_variant(words=IDS[: T - 1]),
        "shift_back": naive_variant(words=np.roll(IDS, 1)[: T - 1]),
        "shift_two": naive_variant(words=IDS[2:]),
        "hidden_shifted": naive_variant(states=HIDDEN[0, 1:]),
        "concat_swapped": naive_variant(swap=True),
        "pre_norm_hidden": naive_variant(states=SAVED.last[0, : T - 1]),
        "norms_swapped": naive_variant(norms=(hnorm, enorm)),
        "no_norms": naive_variant(norms=(None, None)),
        "no_enorm": naive_variant(norms=(None, hnorm)),
        "no_hnorm": naive_variant(norms=(enorm, None)),
        "pos0_zeroed": naive_variant(zero_first=True),
        "main norm at the end": naive_rms_norm(naive_variant(last=False), PARAMS.norm.weight, EPS),
        "no norm at the end": naive_variant(last=False),
    }
    assert len(wrong) == 13
    assert_all_differ(wrong, right)


def test_the_pre_norm_state_would_pass_with_a_constant_final_norm():
    """Why the weights of this test are not ones: hnorm takes the size away, so only the channels' weights show."""
    constant = PARAMS._replace(norm=PARAMS.norm._replace(weight=np.full(D, 1.3)))
    config = MICRO.replace(rms_norm_eps=1e-12)
    hidden, saved = transformer(IDS[None], constant, config, save=True)
    right = mtp_chain(hidden, IDS[None], saved.layout, constant, config, 1)[0].normed
    assert_close(mtp_chain(saved.last, IDS[None], saved.layout, constant, config, 1)[0].normed, right, 1e-8)


def test_a_zero_embedding_silences_the_first_half_of_eh_proj():
    layout = make_layout((1, T - 1), MICRO, np.float64)
    weight = LAYER.eh_proj.weight.copy()
    weight[:, :D] = 0
    right = mtp_layer(HIDDEN[:, :-1], IDS[None, 1:], LAYER, 0 * TABLE, MICRO, layout)[0]
    halved = LAYER._replace(eh_proj=LAYER.eh_proj._replace(weight=weight))
    assert_close(mtp_layer(HIDDEN[:, :-1], IDS[None, 1:], halved, TABLE, MICRO, layout)[0], right)


def test_the_prediction_of_a_row_does_not_know_its_answer():
    """Row i sees tokens up to i + depth and predicts the one after: a later token may not change it."""
    for depth in (1, 2):
        before = chain(depth)[-1].normed
        for i in range(T - depth - 1):
            ids = IDS.copy()
            ids[i + depth + 1] = (ids[i + depth + 1] + 1) % 61
            after = chain(depth, ids=ids[None])[-1].normed
            assert_close(after[:, : i + 1], before[:, : i + 1])
            assert np.abs(after[:, i + 1] - before[:, i + 1]).max() > 1e-3


# -- deeper ------------------------------------------------------------------------------------------------------


def naive_depths(params, config, depths):
    """[hidden after each depth], the layers used in turn."""
    state, found = naive_hidden(IDS, params, config), []
    for k in range(1, depths + 1):
        mtp = params.mtp[(k - 1) % len(params.mtp)]
        state = naive_mtp(state[:-1], IDS[k:], mtp, params.embed_tokens.weight, config)
        found.append(state)
    return found


@pytest.mark.parametrize("layers", [1, 2])
def test_deeper_chains_equal_the_naive_ones(layers):
    config = MICRO.replace(num_nextn_predict_layers=layers)
    params = random_params(config, 2)
    depths = chain(3, params, config)
    assert [depth.number for depth in depths] == [k % layers for k in range(3)]
    for depth, wanted in zip(depths, naive_depths(params, config, 3), strict=True):
        assert_close(depth.normed[0], wanted, 1e-11)


def test_what_is_passed_on_is_normed():
    right = chain(2)
    first = right[0]
    layout = make_layout((1, T - 2), MICRO, np.float64)

    def second(state, words=IDS[2:], layer=1):
        return mtp_layer(state[:, : T - 2], words[None], PARAMS.mtp[layer], TABLE, MICRO, layout)[0]

    assert_close(second(first.normed), right[1].normed)
    wrong = {
        "before shared_head.norm": second(first.saved.out),
        "the trunk's state again": second(HIDDEN),
        "state of the next row": second(first.normed[:, 1:]),
        "first layer again": second(first.normed, layer=0),
        "same word again": second(first.normed, IDS[1 : T - 1]),
    }
    assert_all_differ(wrong, right[1].normed)


# -- whose embedding, whose head ---------------------------------------------------------------------------------


def test_own_embedding_and_head_are_used_where_the_layer_has_them():
    own = random_params(MICRO, 0, mtp_own_ends=True)
    mtp = own.mtp[0]
    assert mtp_embedding_weight(own, mtp) is mtp.embed_tokens.weight
    assert mtp_head_weight(own, mtp) is mtp.shared_head.head.weight
    assert mtp_embedding_weight(PARAMS, LAYER) is PARAMS.embed_tokens.weight
    assert mtp_head_weight(PARAMS, LAYER) is PARAMS.lm_head.weight
    tied = random_params(MICRO.replace(tie_word_embeddings=True), 0)
    assert mtp_head_weight(tied, tied.mtp[0]) is tied.embed_tokens.weight
    hidden = naive_hidden(IDS, own, MICRO)
    wanted = naive_mtp(hidden[:-1], IDS[1:], mtp, mtp.embed_tokens.weight, MICRO)
    assert_close(chain(1, own)[0].normed[0], wanted, 1e-11)
    main = naive_mtp(hidden[:-1], IDS[1:], mtp, own.embed_tokens.weight, MICRO)
    assert_all_differ({"main embedding": main}, wanted)
    cache = KVCache(MICRO, 1, T, np.float64, layers=1)
    logits, normed = mtp_step(hidden[None, :-1], IDS[None, 1:], own, MICRO, cache)
    assert_close(normed[0], wanted, 1e-11)
    assert_close(logits[0], wanted @ mtp.shared_head.head.weight.T, 1e-11)
    assert_all_differ({"main head": wanted @ own.lm_head.weight.T}, logits[0])


# -- one step with a cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[7], [1] * 7, [4, 1, 2]])
def test_steps_on_the_prompt_equal_the_chain(pieces):
    ids = random_state(3).randint(0, 61, (2, T))
    hidden, _ = transformer(ids, PARAMS, MICRO)
    wanted = chain(1, ids=ids)[0].normed
    cache, start = KVCache(MICRO, 2, T, np.float64, layers=1), 0
    for n in pieces:
        rows = slice(start, start + n)
        logits, normed = mtp_step(hidden[:, :-1][:, rows], ids[:, 1:][:, rows], PARAMS, MICRO, cache)
        assert_close(normed, wanted[:, rows])
        assert_close(logits, ops.linear(wanted[:, rows], PARAMS.lm_head.weight))
        start += n
    assert cache.length.tolist() == [7, 7]


@pytest.mark.parametrize("layers", [1, 2])
def test_steps_at_depth_two_with_a_cache_of_their_own_equal_the_chain(layers):
    config = MICRO.replace(num_nextn_predict_layers=layers)
    params = random_params(config, 2)
    first, second = chain(2, params, config)
    cache = KVCache(config, 1, T, np.float64, layers=1)
    _, normed = mtp_step(first.normed[:, :-1], IDS[None, 2:], params, config, cache, number=layers - 1)
    assert_close(normed, second.normed)


def test_a_padded_prompt_warms_the_cache():
    """Left padding in the trunk is left padding here; the row before the first token pairs two paddings."""
    segments = np.array([[-1, -1, 0, 0, 0, 0, 0, 0]])
    hidden, saved = transformer(IDS[None], PARAMS, MICRO, segments=segments)
    wanted = mtp_chain(hidden, IDS[None], saved.layout, PARAMS, MICRO, 1)[0]
    cache = KVCache(MICRO, 1, T, np.float64, layers=1)
    _, normed = mtp_step(hidden[:, :-1], IDS[None, 1:], PARAMS, MICRO, cache, segments=np.where(wanted.valid, 0, -1))
    assert_close(normed[wanted.valid], wanted.normed[wanted.valid])


def test_a_rejected_draft_is_forgotten():
    cache = KVCache(MICRO, 1, T, np.float64, layers=1)
    mtp_step(HIDDEN[:, :4], IDS[None, 1:5], PARAMS, MICRO, cache)
    mtp_step(HIDDEN[:, 4:5], np.array([[60]]), PARAMS, MICRO, cache)
    cache.truncate(4)
    _, normed = mtp_step(HIDDEN[:, 4:6], IDS[None, 5:7], PARAMS, MICRO, cache)
    assert_close(normed, chain(1)[0].normed[:, 4:6])


def test_a_draft_without_the_prompt_in_its_cache_is_another_one():
    cold = KVCache(MICRO, 1, T, np.float64, layers=1)
    _, normed = mtp_step(HIDDEN[:, 6:7], IDS[None, 7:], PARAMS, MICRO, cold)
    assert_all_differ({"no warm-up": normed}, chain(1)[0].normed[:, 6:7])


# -- packed documents --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depths", [1, 2])
def test_documents_of_a_packed_row_equal_themselves_alone_and_rows_across_a_border_are_invalid(depths):
    lengths = [4, 1, 3]
    segments = np.repeat([0, 1, 2], lengths)[None]
    packed = chain(depths, segments=segments)[-1]
    wanted_valid = [i + depths < T and segments[0, i] == segments[0, i + depths] for i in range(T - depths)]
    assert packed.valid[0].tolist() == wanted_valid
    for start, end in [(0, 4), (5, 8)]:
        alone = chain(depths, ids=IDS[None, start:end])[-1]
        assert_close(packed.normed[:, start : end - depths], alone.normed)


def test_left_padded_rows_equal_unpadded_ones():
    segments = np.where(np.arange(T) < 3, -1, 0)[None]
    padded = chain(2, segments=segments)
    for depth, alone in zip(padded, chain(2, ids=IDS[None, 3:]), strict=True):
        assert_close(depth.normed[:, 3:], alone.normed)
        assert not depth.valid[:, :3].any()
        assert depth.valid[:, 3:].all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_chain_keeps_the_dtype(dtype):
    params = random_params(MICRO, 0, dtype)
    assert {depth.normed.dtype for depth in chain(3, params)} == {np.dtype(dtype)}
    cache = KVCache(MICRO, 1, T, dtype, layers=1)
    results = mtp_step(HIDDEN[:, :-1].astype(dtype), IDS[None, 1:], params, MICRO, cache)
    assert {a.dtype for a in results} == {np.dtype(dtype)}


def test_the_tests_above_notice_a_broken_source():
    layout = make_layout((1, T - 1), MICRO, np.float64)
    right = mtp_layer(HIDDEN[:, :-1], IDS[None, 1:], LAYER, TABLE, MICRO, layout)[0]
    pieces = {
        "halves swapped": ("[token_part, state_part]", "[state_part, token_part]"),
        "same norm twice": ("params.hnorm.weight", "params.enorm.weight"),
        "hidden not normed": ("ops.rms_norm(hidden, params.hnorm.weight, eps)", "hidden"),
        "residual added": ("ops.rms_norm(out, params.shared", "ops.rms_norm(out + hidden, params.shared"),
    }
    wrong = {
        name: mutated(mtp_layer, *piece)(HIDDEN[:, :-1], IDS[None, 1:], LAYER, TABLE, MICRO, layout)[0]
        for name, piece in pieces.items()
    }
    assert_all_differ(wrong, right)
