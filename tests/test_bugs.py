"""Every case of `learn.bugs` is found at its own step, and is the book where its mistake cannot show."""

import re

import numpy as np
import pytest

import minglm
from minglm.api import Model
from minglm.learn import bugs
from minglm.model import ops
from minglm.model.params import map_arrays

PROMPT = "for i in range("
every_case = pytest.mark.parametrize("number", range(1, len(bugs.CASES) + 1), ids=[case.name for case in bugs.CASES])


@pytest.fixture(scope="module")
def model():
    return minglm.load("glm-nano")


def number_of(name):
    return next(i for i, case in enumerate(bugs.CASES, 1) if case.name == name)


def logits(ill, ids):
    return ill.model.forward(ids, ops=ill.ops).logits


@every_case
def test_each_is_found_at_its_step(model, number):
    found, case = bugs.examine(number, model, PROMPT), bugs.CASES[number - 1]
    assert not found.same
    first = "" if found.first is None else re.sub(r"\d+", "*", found.first.name)
    assert first == case.step
    assert found.b.startswith(f"case {number},")  # and no name that tells


def test_a_case_says_what_it_is():
    assert len({case.name for case in bugs.CASES}) == len(bugs.CASES) == 8
    for case in bugs.CASES:
        assert case.wrong != case.right
        assert case.source == case.wrong or f"def {case.name}(" in case.source
    with pytest.raises(ValueError, match=r"there is no case 9; take 1 … 8"):
        bugs.patient(9, None)


# -- blind inputs: models in which the mistake changes nothing ---------------------------------------------------


def changed(model, change, **fields):
    return Model(model.config.replace(**fields), map_arrays(change, model.params), name="blind")


def unbiased(name, array):
    return 0 * array if name.endswith("e_score_correction_bias") else array


def flat_norms(name, array):
    return 0 * array + 1 if re.search(r"[qk]_norm", name) else array


def same(name, array):
    return array


@pytest.mark.parametrize(
    ("name", "change", "fields"),
    [
        ("bias_weighed", unbiased, {}),
        ("norm_late", flat_norms, {}),  # a rotation keeps lengths: only the norm's weight tells the two orders apart
        ("all_scaled", same, {"routed_scaling_factor": 1.0}),
        ("eps", same, {"rms_norm_eps": 1e-6}),
    ],
)
def test_some_models_hide_a_mistake(model, name, change, fields):
    blind, ids = changed(model, change, **fields), model.as_ids(PROMPT)
    ill = bugs.patient(number_of(name), blind)
    np.testing.assert_allclose(logits(ill, ids), blind.forward(ids).logits, atol=1e-4)
    assert abs(logits(bugs.patient(number_of(name), model), ids) - model.forward(ids).logits).max() > 1e-4


def test_at_position_0_nothing_is_turned(model):
    q = np.random.default_rng(0).standard_normal((1, 3, 2, 8)).astype(np.float32)
    cos, sin = np.cos(np.zeros((1, 3, 2), np.float32)), np.zeros((1, 3, 2), np.float32)
    np.testing.assert_array_equal(bugs.neighbours(q, cos, sin), q)
    sin[:] = 1
    cos[:] = 0  # a quarter turn: (a, b) becomes (−b, a)
    expected = np.concatenate([-q[..., 1:2], q[..., 0:1], -q[..., 3:4], q[..., 2:3], q[..., 4:]], axis=-1)
    np.testing.assert_array_equal(bugs.neighbours(q, cos, sin), expected)


def test_one_key_value_head_has_no_order(model):
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 4, heads, 8)) for heads in (6, 1, 1))
    sight = ops.Sight(np.arange(4)[None], np.zeros((1, 4), int), np.zeros((1, 4), int))
    np.testing.assert_allclose(bugs.tiled(q, k, v, sight)[0], ops.attend(q, k, v, sight)[0], atol=1e-12)


def test_the_trunk_does_not_know_of_the_swapped_halves(model):
    ids = model.as_ids(PROMPT)
    ill = bugs.patient(number_of("swapped_halves"), model).model
    np.testing.assert_array_equal(ill.forward(ids).logits, model.forward(ids).logits)
    assert abs(ill.mtp(ids) - model.mtp(ids)).max() > 1
    token, state = np.random.default_rng(2).standard_normal((2, model.config.hidden_size))
    given, swapped = (m.params.mtp[0].eh_proj.weight for m in (model, ill))
    np.testing.assert_allclose(swapped @ np.concatenate([token, state]), given @ np.concatenate([state, token]))
