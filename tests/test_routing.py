"""Routing measures: hand-computed cases, bounds, invariances, masks; the table made from taps; CSV."""

import csv
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minglm
from minglm.look.routing import (
    LoadRow,
    PickRow,
    RoutingTable,
    SummaryRow,
    coefficient_of_variation,
    dead_experts,
    diversity,
    from_taps,
    load,
    load_entropy,
    load_rows,
    max_violation,
    min_violation,
    pick_rows,
    score_entropy,
    summary,
    to_csv,
    utilisation,
)

# Four tokens, two layers, K = 2 of E = 4. Layer 0: counts 4, 2, 2, 0. Layer 1: all 2.
HAND = np.array([[[0, 1], [0, 1]], [[0, 2], [2, 3]], [[0, 1], [0, 1]], [[0, 2], [3, 2]]])


@st.composite
def routings(draw):
    """indices [T, layer, K] with K different experts in each choice, and E."""
    T, layers, E = draw(st.integers(1, 12)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    K = draw(st.integers(1, E))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return np.argsort(rng.random((T, layers, E)), axis=-1)[..., :K], E


# -- by hand -----------------------------------------------------------------------------------------------------


def test_load_by_hand():
    counts = load(HAND, 4)
    assert counts.tolist() == [[4, 2, 2, 0], [2, 2, 2, 2]]
    assert utilisation(counts).tolist() == [[2, 1, 1, 0], [1, 1, 1, 1]]
    assert max_violation(counts).tolist() == [1, 0]
    assert min_violation(counts).tolist() == [-1, 0]
    assert coefficient_of_variation(counts) == pytest.approx([0.5**0.5, 0])  # deviations 1, 0, 0, −1 from a mean of 1
    assert load_entropy(counts) == pytest.approx([1.5 * np.log(2), 2 * np.log(2)])  # shares 1/2, 1/4, 1/4, 0
    assert diversity(counts) == pytest.approx([2**1.5 / 4, 1])
    dead = dead_experts(HAND, 4)
    assert dead.fraction.tolist() == [0.25, 0]
    assert dead.tokens == 4


def test_max_violation_is_not_the_largest_deviation():
    counts = np.array([4, 4, 4, 4, 4, 4, 4, 0])  # a dead expert deviates by 100 %, the busiest by 14 %
    assert max_violation(counts) == pytest.approx(4 / 3.5 - 1)
    assert min_violation(counts) == -1


def test_score_entropy_by_hand():
    scores = np.array([[[0.5, 0.5, 0.5, 0.5], [0.8, 0, 0, 0]], [[0.2, 0.2, 0, 0], [0.6, 0.2, 0, 0]]])
    wanted = [[np.log(4), 0], [np.log(2), -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))]]
    assert score_entropy(scores) == pytest.approx(np.array(wanted))
    assert score_entropy(scores.astype(np.float32)).dtype == np.float32


def test_a_mask_leaves_padding_out():
    valid = np.array([True, False, True, False])
    np.testing.assert_array_equal(load(HAND, 4, valid), load(HAND[[0, 2]], 4))
    assert load(HAND, 4, valid)[0].tolist() == [2, 2, 0, 0]
    assert dead_experts(HAND, 4, valid).tokens == 2
    assert dead_experts(HAND, 4, valid).fraction.tolist() == [0.5, 0.5]
    np.testing.assert_array_equal(load(HAND, 4, valid.reshape(2, 2)), load(HAND, 4, valid))  # [B, T] as well
    nothing = load(HAND, 4, np.zeros(4, bool))
    assert np.isnan(max_violation(nothing)).all()
    assert np.isnan(load_entropy(nothing)).all()


@pytest.mark.parametrize(
    ("indices", "experts", "valid", "words"),
    [
        (HAND[:, 0], 4, None, r"\[T, layer, K\], got int64 of shape \[4, 2\]"),
        (HAND * 1.0, 4, None, "got float64"),
        (HAND, 3, None, r"expert 3 is outside 0 … E − 1 = 2"),
        (-HAND, 4, None, "expert -1 is outside"),
        (HAND, 4, np.ones(3, bool), "each of the 4 tokens, got bool of shape"),
        (HAND, 4, np.ones(4), "got float64"),
    ],
)
def test_bad_input_is_explained(indices, experts, valid, words):
    with pytest.raises(ValueError, match=words):
        load(indices, experts, valid)


# -- bounds and invariances --------------------------------------------------------------------------------------


@given(routings())
@settings(max_examples=60, deadline=None)
def test_bounds(case):
    indices, E = case
    T, _, K = indices.shape
    counts = load(indices, E)
    slack = 1e-12
    assert (counts.sum(axis=-1) == T * K).all()
    assert (max_violation(counts) >= -slack).all()
    assert (max_violation(counts) <= E / K - 1 + slack).all()
    assert (min_violation(counts) >= -1).all()
    assert (min_violation(counts) <= slack).all()
    assert (load_entropy(counts) >= np.log(K) - slack).all()
    assert (load_entropy(counts) <= np.log(E) + slack).all()
    assert (diversity(counts) >= K / E - slack).all()
    assert (diversity(counts) <= 1 + slack).all()
    assert (dead_experts(indices, E).fraction <= 1 - K / E + slack).all()


@given(routings(), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_no_order_matters(case, seed):
    """Neither that of the tokens, nor of the ranks, nor the experts' numbers; and ten times the text is as balanced."""
    indices, E = case
    rng = np.random.default_rng(seed)
    renumbered = rng.permutation(E)[indices]
    shuffled = rng.permuted(rng.permutation(renumbered), axis=-1)
    for measure in (max_violation, min_violation, coefficient_of_variation, load_entropy, diversity):
        wanted = measure(load(indices, E))
        np.testing.assert_allclose(measure(load(shuffled, E)), wanted, atol=1e-12)
        np.testing.assert_allclose(measure(load(np.tile(indices, (10, 1, 1)), E)), wanted, atol=1e-12)


@given(routings(), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_masked_tokens_change_nothing(case, seed):
    indices, E = case
    valid = np.random.default_rng(seed).random(len(indices)) < 0.5
    np.testing.assert_array_equal(load(indices, E, valid), load(indices[valid], E))
    np.testing.assert_array_equal(load(indices, E, valid) + load(indices, E, ~valid), load(indices, E))


def test_the_extremes_are_reached():
    one = np.zeros((5, 1, 1), int)
    assert max_violation(load(one, 8)) == 7  # E/K − 1
    assert load_entropy(load(one, 8)) == 0
    assert not np.signbit(load_entropy(load(one, 8))).any()


# -- the table ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traced():
    model = minglm.new("micro", seed=2)
    return model.trace(np.random.default_rng(0).integers(0, 61, (2, 7)))


def test_the_table_holds_the_traces_arrays(traced):
    routing = traced.routing
    assert routing.layers == (1, 2)
    assert routing.experts == 8
    assert routing.indices.shape == routing.weights.shape == (14, 2, 3)
    for axis, layer in enumerate(routing.layers):
        at = f"layers.{layer}.mlp."
        np.testing.assert_array_equal(routing.indices[:, axis], traced[at + "expert_indices"])
        np.testing.assert_array_equal(routing.weights[:, axis], traced[at + "expert_weights"])
        np.testing.assert_array_equal(routing.scores[:, axis], traced[at + "router_scores"])
        np.testing.assert_array_equal(routing.biased_scores[:, axis], traced[at + "biased_scores"])


def test_layers_are_in_numerical_order():
    taps = ("expert_indices", "expert_weights", "router_scores", "biased_scores")
    arrays = {f"layers.{i}.mlp.{tap}": np.full((3, 4), i) for i in (10, 2, 9) for tap in taps}
    routing = from_taps(arrays, np.array([[True], [False], [True]]))
    assert routing.layers == (2, 9, 10)
    assert routing.indices[:, :, 0].tolist() == [[2, 9, 10]] * 2
    del arrays["layers.9.mlp.biased_scores"]
    assert from_taps(arrays).layers == (2, 10)
    with pytest.raises(ValueError, match="no routing here"):
        from_taps({"logits": np.zeros(3)})


def table_of(biased, K):
    biased = np.asarray(biased, np.float32)
    indices = np.argsort(-biased, axis=-1, kind="stable")[..., :K]
    return RoutingTable(indices, np.ones(indices.shape), biased, biased, (3,), biased.shape[-1])


def test_margins_by_hand():
    biased = [[[0.9, 0.1, 0.5, 0.75]], [[0.25, 0.5, 0.5, 0.0]]]
    assert table_of(biased, 1).margins == pytest.approx(np.array([[0.15], [0.0]]))
    assert table_of(biased, 2).margins == pytest.approx(np.array([[0.25], [0.25]]))
    assert table_of(biased, 2).margins.dtype == np.float32


def test_margins_without_another_open_expert_are_infinite():
    closed = [[[0.9, 0.1, -np.inf, -np.inf]], [[-np.inf, -np.inf, 0.2, 0.4]]]
    assert table_of(closed, 1).margins == pytest.approx(np.array([[0.8], [0.2]]))
    assert (table_of(closed, 2).margins == np.inf).all()  # the open groups hold just K
    assert (table_of([[[0.1, 0.2]]], 2).margins == np.inf).all()  # K = E


def test_a_change_below_the_margin_changes_no_choice(traced):
    routing = traced.routing
    shift = np.random.default_rng(1).uniform(-0.49, 0.49, routing.biased_scores.shape) * routing.margins[..., None]
    again = np.argsort(-(routing.biased_scores + shift), axis=-1)[..., :3]
    np.testing.assert_array_equal(np.sort(again), np.sort(routing.indices))


def test_summary(traced):
    routing = traced.routing
    rows = summary(routing)
    assert [row.layer for row in rows] == [1, 2]
    counts = load(routing.indices, 8)
    for i, row in enumerate(rows):
        assert (row.T, row.k, row.E) == (14, 3, 8)
        assert row.max_vio == max_violation(counts)[i]
        assert row.busiest == counts[i].argmax()
        assert row.least_margin == routing.margins[:, i].min()
        assert row.score_entropy == pytest.approx(score_entropy(routing.scores)[:, i].mean())


def test_the_table_shows_itself(traced):
    text = repr(traced.routing)
    assert text.startswith("Routing: T = 14 tokens, K = 3 of E = 8 experts, 2 layers (1, 2)\n")
    assert len(text.split("\n")) == 5
    page = traced.routing._repr_html_()
    assert "T = 14 tokens, K = 3 of E = 8" in page
    assert page.count("<tr>") == 3
    empty = from_taps({name: traced[name] for name in traced}, np.zeros(14, bool))
    assert "T = 0 tokens" in repr(empty)


# -- rows and CSV ------------------------------------------------------------------------------------------------


def test_pick_rows_and_csv(traced, tmp_path):
    routing = traced.routing
    words = ["comma,", 'quote"', "line\nbreak", "算法", *"abcdefghij"]
    text = routing.to_csv(tmp_path / "picks.csv", words)
    assert (tmp_path / "picks.csv").read_bytes() == text.encode()
    lines = list(csv.reader(io.StringIO(text)))
    assert tuple(lines[0]) == PickRow._fields
    assert len(lines) == 1 + routing.indices.size
    for line, row in zip(lines[1:], pick_rows(routing.indices, routing.weights, (1, 2), words), strict=True):
        assert line == [str(value) for value in row]
        i = routing.layers.index(row.layer)
        assert row.text == words[row.token]
        assert row.expert == routing.indices[row.token, i, row.rank]
        assert np.float32(line[-1]) == routing.weights[row.token, i, row.rank]  # no digit is lost


def test_load_rows():
    rows = load_rows(HAND, 4, (5, 6))
    assert rows[0] == LoadRow(5, 0, 4, 2.0)
    assert rows[-1] == LoadRow(6, 3, 2, 1.0)
    assert len(rows) == 8
    assert load_rows(HAND, 4, valid=np.array([1, 0, 0, 0], bool))[1] == LoadRow(0, 1, 1, 2.0)


def test_summary_as_csv(traced):
    lines = to_csv(summary(traced.routing), SummaryRow).split("\n")
    assert lines[0].split(",")[:5] == ["layer", "T", "k", "E", "max_vio"]
    assert len(lines) == 4
