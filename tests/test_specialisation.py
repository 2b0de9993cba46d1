"""Measures of specialisation: hand-computed cases, slow loops that say the same, controls that do their work."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.look import rows, specialisation
from minglm.look.history import read_history
from minglm.look.routing import load, to_csv
from minglm.look.specialisation import (
    VocabularyRow,
    bias_effect,
    coactivation,
    coactivation_lift,
    domain_control,
    domain_shares,
    overlap,
    pair_counts,
    paths,
    random_coactivation,
    saturation,
    shuffled,
    vocabulary_rows,
    vocabulary_specialisation,
    would_drop,
)

# Four tokens, two layers, K = 2 of E = 4; layer 0: {0,1} {0,2} {0,1} {0,2}.
HAND = np.array([[[0, 1], [0, 1]], [[0, 2], [2, 3]], [[0, 1], [0, 1]], [[0, 2], [3, 2]]])


def random_routing(rng, T, layers, E, K):
    return np.argsort(rng.random((T, layers, E)), axis=-1)[..., :K]


@st.composite
def routings(draw):
    T, layers, E = draw(st.integers(1, 12)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    K = draw(st.integers(1, E))
    return random_routing(np.random.default_rng(draw(st.integers(0, 2**32 - 1))), T, layers, E, K), E


# -- the control -------------------------------------------------------------------------------------------------


@given(routings(), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_shuffling_keeps_the_load_and_whole_choices(case, seed):
    indices, E = case
    mixed = shuffled(indices, np.random.default_rng(seed))
    np.testing.assert_array_equal(load(mixed, E), load(indices, E))
    for i in range(indices.shape[1]):
        assert sorted(map(tuple, mixed[:, i])) == sorted(map(tuple, indices[:, i]))


def test_shuffling_within_labels_keeps_each_labels_choices():
    rng = np.random.default_rng(0)
    indices, words = random_routing(rng, 200, 3, 8, 2), rng.choice(["a", "b", "c"], 200)
    mixed = shuffled(indices, rng, words)
    assert (mixed != indices).any()
    assert (mixed[:, 0] != shuffled(indices, rng)[:, 0]).any()
    for word in "abc":
        np.testing.assert_array_equal(load(mixed[words == word], 8), load(indices[words == word], 8))
    np.testing.assert_array_equal(shuffled(indices, rng, np.arange(200)), indices)  # all different: nothing moves


def test_shuffling_is_independent_in_each_layer_and_repeats_with_its_seed():
    indices = np.arange(50)[:, None, None].repeat(2, axis=1)
    mixed = shuffled(indices, np.random.default_rng(3))
    assert (mixed[:, 0] != mixed[:, 1]).any()
    np.testing.assert_array_equal(mixed, shuffled(indices, np.random.default_rng(3)))
    with pytest.raises(ValueError, match="within holds 2 labels, indices 50 tokens"):
        shuffled(indices, np.random.default_rng(0), ["a", "b"])


# -- together ----------------------------------------------------------------------------------------------------


def test_coactivation_by_hand():
    nan = np.nan
    wanted = [[1, 0.5, 0.5, 0], [1, 1, 0, 0], [1, 0, 1, 0], [nan, nan, nan, nan]]
    np.testing.assert_array_equal(coactivation(HAND, 4), wanted)
    assert pair_counts(HAND, 4, 1).tolist() == [[2, 2, 0, 0], [2, 2, 0, 0], [0, 0, 2, 2], [0, 0, 2, 2]]
    lift = coactivation_lift(HAND, 4)
    assert lift[0, :3].tolist() == [1, 1, 1]  # expert 0 is always there
    assert lift[1, :3].tolist() == [1, 2, 0]
    assert np.isnan(lift[3]).all()
    assert np.isnan(lift[:, 3]).all()


@given(routings())
@settings(max_examples=40, deadline=None)
def test_coactivation_is_the_slow_loop(case):
    indices, E = case
    T, layers, K = indices.shape
    for layer in range(layers):
        sets = [set(indices[t, layer].tolist()) for t in range(T)]
        shares, lift = coactivation(indices, E, layer), coactivation_lift(indices, E, layer)
        for i in range(E):
            with_i = [s for s in sets if i in s]
            if not with_i:
                assert np.isnan(shares[i]).all()
                continue
            assert shares[i].sum() == pytest.approx(K)
            for j in range(E):
                both, of_j = sum(j in s for s in with_i), sum(j in s for s in sets)
                assert shares[i, j] == pytest.approx(both / len(with_i))
                if of_j:
                    assert lift[i, j] == pytest.approx(both * T / (len(with_i) * of_j))


def test_random_routing_gives_the_baseline():
    """All pairs count: neighbouring ranks alone would give 0.028 here, and the definition 0.111."""
    indices = random_routing(np.random.default_rng(0), 4000, 1, 64, 8)
    off = ~np.eye(64, dtype=bool)
    assert random_coactivation(64, 8) == pytest.approx(7 / 63)
    assert coactivation(indices, 64)[off].mean() == pytest.approx(7 / 63, rel=0.01)
    assert coactivation_lift(indices, 64)[off].mean() == pytest.approx(random_coactivation(64, 8, lift=True), rel=0.01)
    assert random_coactivation(16, 2, lift=True) == pytest.approx(8 / 15)
    assert random_coactivation(1, 1) == 0


# -- domains -----------------------------------------------------------------------------------------------------


def test_domain_shares_by_hand():
    names, shares = domain_shares(HAND, ["b", "a", "a", "a"], 4)
    assert names == ["a", "b"]
    assert shares.shape == (2, 2, 4)
    assert shares[1].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert shares[0] == pytest.approx(np.array([[1, 1 / 3, 2 / 3, 0], [1 / 3, 1 / 3, 2 / 3, 2 / 3]]))
    assert domain_shares(HAND, np.array([5, 3, 3, 3]), 4)[0] == ["3", "5"]
    with pytest.raises(ValueError, match="domains holds 3 labels, indices 4 tokens"):
        domain_shares(HAND, ["a"] * 3, 4)


def test_the_control_tells_words_from_domains():
    """A router that reads the token alone agrees with the control within equal tokens, not with the free one."""
    rng = np.random.default_rng(0)
    domains = rng.integers(0, 2, 2000)
    tokens = rng.integers(0, 4, 2000) + 3 * domains  # token 3 is in both
    by_token = tokens[:, None, None] // 2
    shares = domain_shares(by_token, domains, 4)[1]
    free, within = (domain_control(by_token, domains, 4, words) for words in (None, tokens))
    assert within.mean == pytest.approx(shares)
    assert within.sd.max() < 1e-9
    assert abs(free.mean - shares).max() > 0.1
    assert free.mean[0] == pytest.approx(free.mean[1], abs=0.02)  # the load over all
    by_domain = domains[:, None, None]
    within = domain_control(by_domain, domains, 2, np.zeros(2000))
    assert within.mean[:, 0, 1] == pytest.approx(domains.mean(), abs=0.03)
    assert (within.sd > 0).all()


def test_information_rows_are_those_of_evaluate():
    rng = np.random.default_rng(0)
    domains = np.array(["code", "prose"])[rng.integers(0, 2, 600)]
    tokens = rng.choice(["x", "y"], 600)
    by_domain = np.stack([(domains == "code") * 1, (tokens == "x") * 1], axis=1)[..., None]
    found = rows.information_rows(by_domain, domains, tokens, (4, 7), permutations=10)
    assert [row.layer for row in found] == [4, 7]
    assert found[0].bits == pytest.approx(1, abs=0.01)
    assert found[0].above == pytest.approx(found[0].bits - found[0].control)
    assert found[0].control < 0.02
    assert found[1].bits < 0.01
    wanted = specialisation.mutual_information(by_domain, (domains == "prose") * 1)
    assert [row.bits for row in found] == pytest.approx(wanted.tolist())


# -- tokens ------------------------------------------------------------------------------------------------------


def test_vocabulary_by_hand():
    first = np.array([2, 2, 0, 1, 0, 0])[:, None, None]
    tokens = ["a", "a", "a", "b", "c", "c"]
    assert vocabulary_rows(first, tokens, 3, min_count=2) == [
        VocabularyRow("c", 0, 1.0, 2),
        VocabularyRow("a", 2, pytest.approx(2 / 3), 3),
    ]
    assert len(vocabulary_rows(first, tokens, 3, min_count=1)) == 3
    mixed = np.array([1, 1, 0, 1, 1, 1])[:, None, None]  # of one expert the purest first
    assert [row.token for row in vocabulary_rows(mixed, tokens, 3, min_count=2)] == ["c", "a"]
    assert vocabulary_rows(first, tokens, 3) == []
    ranks = np.concatenate([first, 2 - first], axis=-1)  # only the first choice counts
    assert vocabulary_rows(ranks, tokens, 3, min_count=2) == vocabulary_rows(first, tokens, 3, min_count=2)
    whole = vocabulary_specialisation(first, tokens, 3, min_count=2)
    assert whole.share == pytest.approx([5 / 6])
    assert whole.tokens == 2
    assert np.isnan(vocabulary_specialisation(first, tokens, 3).share).all()


def test_the_shuffled_control_shows_what_few_occurrences_do():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 30, 600)
    by_chance, by_token = rng.integers(0, 8, (600, 1, 1)), (tokens % 8)[:, None, None]
    found = vocabulary_specialisation(np.concatenate([by_chance, by_token], axis=1), tokens, 8)
    assert found.share[1] == 1
    assert found.control[1] < 0.4
    assert abs(found.share[0] - found.control[0]) < 4 * found.control_sd[0]
    assert found.share[0] > 1 / 8 + 0.1  # far above uniform although there is nothing: hence the control
    again = vocabulary_specialisation(np.concatenate([by_chance, by_token], axis=1), tokens, 8)
    np.testing.assert_array_equal(found.control, again.control)


# -- two routings ------------------------------------------------------------------------------------------------


def test_overlap_by_hand():
    a, b = np.array([[0, 1], [2, 3]]), np.array([[1, 0], [3, 4]])
    assert overlap(a, b) == 0.75
    assert overlap(a[:, None], np.stack([b, a], axis=1)).tolist() == [0.75, 1]  # one layer beside two
    with pytest.raises(ValueError, match=r"two routings of the same tokens .* got \[2, 2\], \[1, 2\]"):
        overlap(a, b[:1])
    with pytest.raises(ValueError, match="two routings"):
        overlap(np.zeros((4, 2, 2), int), np.zeros((4, 3, 2), int))


@given(routings(), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_overlap_is_the_slow_loop(case, seed):
    a, E = case
    T, layers, K = a.shape
    b = random_routing(np.random.default_rng(seed), T, layers, E, K)
    wanted = [np.mean([len(set(a[t, i]) & set(b[t, i])) / K for t in range(T)]) for i in range(layers)]
    assert overlap(a, b) == pytest.approx(wanted)
    assert overlap(a, a) == pytest.approx(1)


def test_chance_overlap_is_K_over_E():
    rng = np.random.default_rng(0)
    a, b = (random_routing(rng, 4000, 1, 16, 4) for _ in range(2))
    assert overlap(a, b) == pytest.approx([0.25], abs=0.01)
    (row,) = rows.overlap_rows(a, b, 16)
    assert row.chance == 0.25
    assert row.shuffled == pytest.approx(0.25, abs=0.01)
    assert row.renumbered == pytest.approx(0.25, abs=0.01)


def test_renumbering_shows_when_numbers_mean_nothing():
    """Both follow the token, by other numbers: far from chance now and then, never far from renumbering."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 4, 1000)
    a, b = tokens[:, None, None], rng.permutation(4)[tokens][:, None, None]
    (row,) = rows.overlap_rows(a, b, 4)
    assert abs(row.overlap - row.renumbered) < 3 * row.renumbered_sd
    assert row.shuffled == pytest.approx(0.25, abs=0.03)
    assert row.renumbered_sd > 0.1


def test_saturation():
    history = np.stack([HAND * 0, HAND, HAND[..., ::-1]]).astype(np.uint8)
    history[0, ..., 1] = 3
    found = saturation(history)
    assert found.shape == (3, 2)
    assert found[0].tolist() == [0.5, 0.5]  # expert 0 in layer 0; 0 and 3 in half of layer 1's
    assert found[1:].tolist() == [[1, 1], [1, 1]]  # the order of ranks does not matter
    assert saturation(history, HAND).tolist() == found.tolist()
    with pytest.raises(ValueError, match=r"\[moment, T, layer, K\], got \[4, 2, 2\]"):
        saturation(HAND)


# -- paths -------------------------------------------------------------------------------------------------------


def test_paths_by_hand():
    found = paths(HAND)
    assert found.layers == (0, 1)
    assert found.paths.tolist() == [[0, 0], [0, 2], [0, 3]]
    assert found.counts.tolist() == [2, 1, 1]
    assert paths(HAND, (1,)).paths.tolist() == [[0], [2], [3]]
    assert paths(np.zeros((3, 7, 1), int)).layers == (0, 3, 6)
    for wrong in ((), (0, 2), (-1,)):
        with pytest.raises(ValueError, match="wanted places 0 … 1"):
            paths(HAND, wrong)


def test_flows_put_small_experts_together_and_lose_no_token():
    rng = np.random.default_rng(0)
    indices = np.minimum(rng.geometric(0.4, (500, 3, 1)) - 1, 7)
    found = rows.flows(indices, 8, (0, 1, 2))
    for place, box in enumerate(found.boxes):
        assert sum(box.values()) == 500
        assert [e for e in box if e is not None] == [e for e in range(8) if load(indices, 8)[place, e] >= 1.5 * 500 / 8]
    for place, between in enumerate(found.flows):
        for source, tokens in found.boxes[place].items():
            assert sum(flow.tokens for flow in between if flow.source == source) == tokens
        for target, tokens in found.boxes[place + 1].items():
            assert sum(flow.tokens for flow in between if flow.target == target) == tokens
    assert not found.cut
    few = rows.flows(indices, 8, (0,), least=0, most=3)
    assert few.cut
    assert [e for e in few.boxes[0] if e is not None] == sorted(np.argsort(-load(indices, 8)[0])[:3])
    assert sum(row.tokens for row in rows.flow_rows(indices, (4, 5, 6))) == 1000
    pair = [row for row in rows.flow_rows(indices, (4, 5, 6)) if row[:4] == (4, 0, 5, 1)]
    assert pair[0].tokens == ((indices[:, 0, 0] == 0) & (indices[:, 1, 0] == 1)).sum()


# -- capacity and bias -------------------------------------------------------------------------------------------


def naive_drops(indices, E, factor):
    T, layers, K = indices.shape
    room = int(np.ceil(round(factor * K * T / E, 9)))
    lost = np.zeros(layers)
    for i in range(layers):
        held = np.zeros(E, int)
        for t in range(T):
            for e in indices[t, i]:
                lost[i] += held[e] >= room
                held[e] += 1
    return lost / (K * T)


@given(routings())
@settings(max_examples=40, deadline=None)
def test_drops_are_the_slow_loop(case):
    indices, E = case
    factors = (1, 1.25, 2, E)
    wanted = [naive_drops(indices, E, factor) for factor in factors]
    np.testing.assert_allclose(would_drop(indices, E, factors), wanted)
    assert (would_drop(indices, E, (E,)) == 0).all()


def test_drops_by_hand():
    assert would_drop(HAND, 4).tolist() == [[0.25, 0], [0.125, 0], [0, 0]]  # capacities 2, 3, 4; loads 4, 2, 2, 0
    assert specialisation.capacity(100, 10, 1, 1.1) == 11


def test_bias_effect_by_hand():
    scores = np.array([[[0.9, 0.5, 0.4, 0.1]], [[0.9, 0.5, 0.4, 0.1]]])
    biased = scores + np.array([[[0, 0, 0.2, 0]], [[0, 0, 0, 0]]])
    assert bias_effect(scores, biased, 2).tolist() == [0.25]  # one pick of four
    assert bias_effect(scores, biased, 4).tolist() == [0]
    assert bias_effect(scores, scores, 1).tolist() == [0]
    closed = np.array([[[-np.inf, 0.5, 0.4, -np.inf]]])
    assert bias_effect(scores[:1], closed, 2).tolist() == [0]  # closed groups stay closed
    with pytest.raises(ValueError, match=r"\[T, layer, E\], and K = 5"):
        bias_effect(scores, biased, 5)


def test_selection_rows_and_confidence():
    scores = np.array([[[0.9, 0.5, 0.4, 0.1]]])
    biased = scores + np.array([0, 0, 0.2, 0])
    found = rows.selection_rows(scores, biased, 2)
    assert [row.rank for row in found] == [0, None, 1, None]
    assert [row.picked_without_bias for row in found] == [True, True, False, False]
    gaps, margins = rows.confidence(scores, biased, 2)
    q = scores[0, 0] / scores.sum()
    assert gaps == pytest.approx(np.array([[np.log(4) + (q * np.log(q)).sum()]]))
    assert margins == pytest.approx(np.array([[0.1]]))
    assert (rows.confidence(scores, biased, 4)[1] == np.inf).all()
    assert rows.confidence(np.ones((1, 1, 4)), biased, 2)[0] == 0
    with pytest.raises(ValueError, match="hold no such choice"):
        rows.selection_rows(scores, biased, 2, token=1)


# -- history and tables ------------------------------------------------------------------------------------------


def test_history_of_a_shipped_checkpoint_and_of_a_run(tmp_path):
    from minglm.api import find
    from minglm.formats.tensors import write_tensors

    history = read_history(find("glm-tiny-balanced"))
    assert history.steps == sorted(history.steps)
    assert history.indices.shape[0] == len(history.steps)
    (tmp_path / "routing").mkdir()
    for step in (100, 20):
        array = np.full((3, 1, 2), step, np.uint8)
        write_tensors(tmp_path / "routing" / f"{step:06d}.safetensors", {f"step_{step:06d}": array})
    found = read_history(tmp_path)
    assert found.steps == [20, 100]
    assert found.indices[:, 0, 0, 0].tolist() == [20, 100]
    write_tensors(tmp_path / "routing" / "x.safetensors", {"step_000300": np.zeros((4, 1, 2), np.uint8)})
    with pytest.raises(ValueError, match="different shapes"):
        read_history(tmp_path)
    with pytest.raises(ValueError, match="no routing of its training"):
        read_history(tmp_path / "routing")


def test_every_table_is_csv():
    rng = np.random.default_rng(0)
    indices, scores = random_routing(rng, 40, 2, 8, 2), rng.random((40, 2, 8))
    tokens, domains = rng.choice(["a", "b"], 40), rng.choice(["x", "y"], 40)
    history = np.stack([indices, indices])
    tables = {
        rows.SelectionRow: (rows.selection_rows(scores, scores, 2), 8),
        rows.ConfidenceRow: (rows.confidence_rows(scores, scores, 2, (3, 4)), 80),
        rows.BiasRow: (rows.bias_rows(scores, scores, 2, (3, 4)), 2),
        rows.LoadHistoryRow: (rows.load_history_rows(history, 8, (1, 2), (3, 4)), 32),
        rows.DropRow: (rows.drop_rows(indices, 8, layers=(3, 4)), 10),
        rows.SaturationRow: (rows.saturation_rows(history, 8, (1, 2), layers=(3, 4)), 4),
        rows.CoactivationRow: (rows.coactivation_rows(indices, 8, (3, 4)), 112),
        rows.DomainRow: (rows.domain_rows(indices, domains, 8, tokens, (3, 4)), 32),
        rows.VocabularyShareRow: (rows.vocabulary_share_rows(indices, tokens, 8, layers=(3, 4)), 2),
        rows.OverlapRow: (rows.overlap_rows(indices, indices, 8, (3, 4)), 2),
        rows.RemovedRow: (rows.removed_rows(np.ones((8, 2)), ["x", "y"], np.ones(8) / 8, 3), 16),
    }
    for kind, (table, count) in tables.items():
        assert all(isinstance(row, kind) for row in table)
        lines = to_csv(table, kind).splitlines()
        assert lines[0] == ",".join(kind._fields)
        assert len(lines) == 1 + count, kind
        if "layer" in kind._fields:
            assert {row.layer for row in table} <= {3, 4}
    shares = [row for row in tables[rows.DomainRow][0] if (row.layer, row.domain) == (3, "x")]
    assert sum(row.share for row in shares) == pytest.approx(2)
    assert sum(row.control for row in shares) == pytest.approx(2)
