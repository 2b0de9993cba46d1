"""The training loss and its gradient for every parameter of a whole model."""

import numpy as np
import pytest

from minglm.model import IGNORE, init_params, loss_and_grads, map_arrays, shift_targets, transformer, walk
from minglm.model.params import walk_stacked
from tests.gradcheck import check_model, total_loss
from tests.helpers import (
    MICRO,
    assert_all_differ,
    assert_close,
    difference,
    naive_cross_entropy,
    naive_hidden,
    naive_mtp,
    no_warnings,
    random_params,
    random_state,
)

IDS = random_state(0).randint(0, 61, (2, 7))
PARAMS = random_params(MICRO, 1)
SMALL = MICRO.replace(
    vocab_size=17, num_hidden_layers=2, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2
)


def run(ids=IDS, targets=None, params=PARAMS, config=MICRO, **arguments):
    targets = shift_targets(ids, arguments.get("segments")) if targets is None else targets
    return loss_and_grads(ids, targets, params, config, **arguments)


# -- the value ---------------------------------------------------------------------------------------------------


def naive_losses(ids, targets, params, config):
    """(main, [one per depth]): each row through the naive model, the mean over all targets that count."""
    head = (params.lm_head or params.embed_tokens).weight
    depths = min(len(params.mtp), ids.shape[1] - 1)
    logits, wanted = [[] for _ in range(depths + 1)], [[] for _ in range(depths + 1)]
    for row, answers in zip(ids, targets, strict=True):
        state = naive_hidden(row, params, config)
        for k in range(depths + 1):
            if k:
                state = naive_mtp(state[:-1], row[k:], params.mtp[k - 1], params.embed_tokens.weight, config)
            logits[k] += list(state @ head.T)
            wanted[k] += list(answers[k:])
    main, *deeper = [naive_cross_entropy(z, t) for z, t in zip(logits, wanted, strict=True)]
    return main, deeper


@pytest.mark.parametrize("tied", [False, True])
def test_losses_equal_the_naive_ones(tied):
    config = MICRO.replace(tie_word_embeddings=tied)
    params = random_params(config, 2)
    targets = shift_targets(IDS)
    targets[1, :3] = IGNORE
    main, deeper = naive_losses(IDS, targets, params, config)
    loss, _ = run(targets=targets, params=params, config=config)
    assert loss.main == pytest.approx(main, rel=1e-11)
    assert loss.mtp == pytest.approx(np.mean(deeper), rel=1e-11)
    assert loss.total == pytest.approx(main + 0.3 * np.mean(deeper), rel=1e-11)


def test_total_is_the_weighted_sum():
    loss, _ = run(mtp_weight=0.7, balance_weight=0.2)
    assert loss.total == pytest.approx(loss.main + 0.7 * loss.mtp + 0.2 * loss.balance, rel=1e-14)
    assert loss.balance > 4 * 0.9  # four routers, each about 1 when balanced
    assert loss.total == pytest.approx(
        total_loss(IDS, shift_targets(IDS), PARAMS, MICRO, mtp_weight=0.7, balance_weight=0.2)[0], rel=1e-14
    )


def test_wrong_targets_are_told_apart():
    right = run()[0]
    shifted = shift_targets(IDS)
    wrong = {
        "predicts itself": run(targets=IDS)[0],
        "double shift": run(targets=np.concatenate([IDS[:, 2:], np.full((2, 2), IGNORE)], axis=1))[0],
        "wraps around": run(targets=np.roll(IDS, -1, axis=1))[0],
        "last row predicts zero": run(targets=np.where(shifted == IGNORE, 0, shifted))[0],
    }
    assert_all_differ({name: loss.main for name, loss in wrong.items()}, right.main)
    assert_all_differ({name: loss.mtp for name, loss in wrong.items()}, right.mtp)


def test_weight_zero_switches_the_mtp_loss_off_and_leaves_its_parameters_alone():
    loss, grads = run(mtp_weight=0.0)
    assert loss.mtp == 0
    assert loss.total == loss.main
    assert sorted(loss.load) == [1, 2]
    for name, gradient in walk(grads):
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        assert gradient.any() == (layer < 3 and not name.endswith("correction_bias") and ran(name, loss.load)), name


def ran(name, load):
    """Whether this tensor took part: experts without a token did not."""
    parts = name.split(".")
    return ".experts." not in name or load[int(parts[2])][int(parts[5])] > 0


def test_balance_weight_zero_means_no_balance_loss():
    assert run()[0].balance == 0
    assert run(balance_weight=0.1)[0].main == run()[0].main


def test_the_load_counts_valid_tokens_of_every_router_that_ran():
    segments = np.array([[-1, -1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1]])
    load = run(segments=segments)[0].load
    assert sorted(load) == [1, 2, 3, 4]
    # twelve real tokens; depth 1 has 4 + 2 + 3 pairs within a document, depth 2 has 3 + 1 + 2
    assert [int(load[i].sum()) for i in (1, 2, 3, 4)] == [3 * 12, 3 * 12, 3 * 9, 3 * 6]


# -- masks and segments ------------------------------------------------------------------------------------------


def test_targets_stop_at_the_border_of_a_document():
    segments = np.array([[0, 0, 0, 4, 4, -1, -1]])
    ids = np.arange(1, 8)[None]
    assert shift_targets(ids).tolist() == [[2, 3, 4, 5, 6, 7, IGNORE]]
    assert shift_targets(ids, segments).tolist() == [[2, 3, IGNORE, 5, IGNORE, IGNORE, IGNORE]]


def test_an_ignored_target_may_stand_for_anything():
    targets = shift_targets(IDS)
    targets[:, 2:4] = IGNORE
    loss, _ = run(targets=targets, mtp_weight=0)
    main, _ = naive_losses(IDS, targets, PARAMS, MICRO)
    assert loss.main == pytest.approx(main, rel=1e-11)
    none, grads = run(targets=np.full_like(IDS, IGNORE))
    assert none.total == 0
    assert not any(gradient.any() for _, gradient in walk(grads))


def test_packed_documents_have_the_gradients_of_the_documents_alone():
    """Documents of four and three tokens: the main loss averages 3 + 2 targets."""
    segments = np.array([[0, 0, 0, 0, 1, 1, 1]])
    packed, _ = run(IDS[:1], segments=segments)
    (one, grads_one), (two, grads_two) = (run(IDS[:1, part], mtp_weight=0) for part in (slice(0, 4), slice(4, 7)))
    assert packed.main == pytest.approx((3 * one.main + 2 * two.main) / 5, rel=1e-12)
    _, grads = run(IDS[:1], segments=segments, mtp_weight=0)
    for (name, g), (_, g1), (_, g2) in zip(walk(grads), walk(grads_one), walk(grads_two), strict=True):
        assert difference(g, (3 * g1 + 2 * g2) / 5) < 1e-9 or np.abs(g).max() < 1e-15, name


def test_padding_does_not_change_loss_or_gradients():
    pads = np.full((2, 3), 5)
    padded = np.concatenate([pads, IDS], axis=1)
    segments = np.where(np.arange(10) < 3, -1, 0) * np.ones((2, 1), int)
    loss, grads = run(padded, segments=segments, balance_weight=0.1)
    wanted, wanted_grads = run(balance_weight=0.1)
    assert loss[:4] == pytest.approx(wanted[:4], rel=1e-12)
    for (name, g), (_, w) in zip(walk(grads), walk(wanted_grads), strict=True):
        assert difference(g, w) < 1e-9 or np.abs(w).max() < 1e-15, name
    for layer, load in wanted.load.items():
        assert loss.load[layer].tolist() == load.tolist()


# -- the gradients -----------------------------------------------------------------------------------------------


def test_every_named_parameter_of_micro_equals_central_differences():
    report = check_model(IDS, shift_targets(IDS), PARAMS, MICRO, balance_weight=0.05)
    assert report.errors.keys() == dict(walk(PARAMS)).keys()
    assert not report.wrong(), report.wrong()
    assert report.skipped <= 0.1 * report.checked


SEGMENTS = np.array([[-1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 7, 7]])


@pytest.mark.parametrize(
    ("changes", "arguments"),
    [
        ({"tie_word_embeddings": True}, {}),
        ({"use_qk_norm": False, "attention_bias": False}, {"segments": SEGMENTS, "balance_weight": 0.1}),
        ({"norm_topk_prob": False, "num_nextn_predict_layers": 1}, {"mtp_weight": 1.3}),
        ({"first_k_dense_replace": 2}, {"mtp_weight": 0.0}),
        ({"first_k_dense_replace": 2, "num_nextn_predict_layers": 0}, {}),
        ({"n_shared_experts": 0, "n_group": 1, "topk_group": 1}, {"balance_weight": 0.1}),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}, {}),
    ],
    ids=["tied", "no q/k norm, no bias, packed", "norm_topk off", "dense trunk", "all dense", "no shared", "yarn"],
)
def test_every_named_parameter_equals_central_differences_with(changes, arguments):
    config = SMALL.replace(**changes)
    params = random_params(config, 3)
    ids = random_state(4).randint(0, 17, (2, 6))
    targets = shift_targets(ids, arguments.get("segments"))
    report = check_model(ids, targets, params, config, **arguments)
    assert report.errors.keys() == dict(walk(params)).keys()
    assert not report.wrong(), report.wrong()


def test_every_named_parameter_equals_central_differences_with_own_mtp_embedding_and_head():
    params = random_params(SMALL, 5, mtp_own_ends=True)
    ids = random_state(4).randint(0, 17, (2, 6))
    report = check_model(ids, shift_targets(ids), params, SMALL)
    assert "model.layers.3.shared_head.head.weight" in report.errors
    assert not report.wrong(), report.wrong()


def test_a_tied_embedding_gets_the_gradients_of_both_its_uses():
    tied = random_params(MICRO.replace(tie_word_embeddings=True), 6)
    untied = tied._replace(lm_head=tied.embed_tokens)
    _, grads = run(params=tied, config=MICRO.replace(tie_word_embeddings=True))
    _, apart = run(params=untied)
    assert grads.lm_head is None
    both = apart.embed_tokens.weight + apart.lm_head.weight
    assert_close(grads.embed_tokens.weight, both)
    assert_all_differ({"input": apart.embed_tokens.weight, "output": apart.lm_head.weight}, both)


def test_selection_biases_get_no_gradient():
    _, grads = run(balance_weight=0.5)
    biases = [g for name, g in walk(grads) if name.endswith("e_score_correction_bias")]
    assert len(biases) == 4
    assert not any(b.any() for b in biases)


def test_a_small_step_downhill_lowers_the_loss_by_what_the_gradient_says():
    loss, grads = run(balance_weight=0.01)
    gradients = dict(walk_stacked(grads))
    rate = 1e-6
    stepped = map_arrays(lambda name, array: array - rate * gradients[name], PARAMS)
    slope = sum(float((g * g).sum()) for g in gradients.values())
    lower, _ = run(params=stepped, balance_weight=0.01)
    assert (loss.total - lower.total) / rate == pytest.approx(slope, rel=1e-3)


# -- types and edges ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_loss_and_gradients_keep_the_dtype_and_leave_the_weights_alone(dtype):
    params = random_params(MICRO, 1, dtype)
    for _, array in walk_stacked(params):
        array.flags.writeable = False
    loss, grads = run(params=params, balance_weight=0.1)
    assert {value.dtype for value in loss[:4]} == {np.dtype(dtype)}
    assert {g.dtype for _, g in walk(grads)} == {np.dtype(dtype)}
    assert [(n, g.shape) for n, g in walk(grads)] == [(n, a.shape) for n, a in walk(params)]


def test_float32_gradients_agree_with_float64():
    """The same experts are picked, so what is left is rounding."""
    loss32, grads32 = run(params=random_params(MICRO, 1, np.float32))
    loss64, grads64 = run()
    assert loss32.total == pytest.approx(loss64.total, rel=1e-5)
    assert all(loss32.load[i].tolist() == loss64.load[i].tolist() for i in loss64.load)
    for (name, a), (_, b) in zip(walk(grads32), walk(grads64), strict=True):
        assert np.abs(a - b).max() <= 1e-4 * max(np.abs(b).max(), 1e-3), name


@pytest.mark.parametrize("count", [1, 2, 3])
def test_short_sequences_run_with_as_many_depths_as_they_have_room_for(count):
    ids = IDS[:, :count]
    with no_warnings():
        loss, grads = run(ids, balance_weight=0.1)
    depths = min(2, count - 1)
    assert sorted(loss.load) == [1, 2, 3, 4][: 2 + depths]
    assert (loss.main > 0) == (count > 1)
    assert (loss.mtp > 0) == (count > 2)
    for mtp, name in zip(grads.mtp, "ab", strict=True):
        assert mtp.eh_proj.weight.any() == (depths > "ab".index(name)) or count == 2
    report = check_model(ids, shift_targets(ids), PARAMS, MICRO, samples=1, leave_out=r"experts\.", balance_weight=0.1)
    assert not report.wrong(), report.wrong()


def test_a_fresh_model_starts_at_the_loss_of_guessing():
    config = MICRO.replace(rms_norm_eps=1e-5)
    params = init_params(config, np.random.default_rng(0), np.float64)
    ids = random_state(7).randint(0, 61, (8, 40))  # logits of size 0.09: many targets, so that chance averages out
    assert run(ids, params=params, config=config)[0].main == pytest.approx(np.log(61), rel=0.01)


def test_the_transformer_equals_the_naive_one_on_every_row():
    hidden, _ = transformer(IDS, PARAMS, MICRO)
    assert_close(hidden, np.stack([naive_hidden(row, PARAMS, MICRO) for row in IDS]), 1e-11)


def test_numpy_weights_do_not_promote_the_loss():
    ids = random_state(3).randint(0, MICRO.vocab_size, (1, 6))
    loss, _ = loss_and_grads(
        ids, shift_targets(ids), random_params(MICRO, 1, np.float32), MICRO, np.float64(0.3), np.float64(0.1)
    )
    assert {getattr(loss, part).dtype for part in ("total", "main", "mtp", "balance")} == {np.dtype(np.float32)}
