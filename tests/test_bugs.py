"""Each planted bug is found at its step, and nowhere before."""

import re

import pytest

import minglm
from minglm.learn.bugs import BUGS, case
from minglm.look.diff import diff

MODEL = minglm.load("glm-tiny")
PROMPT = "def area(width, height):\n    return width *"


@pytest.mark.parametrize("number", range(1, len(BUGS) + 1))
def test_a_bug_is_found_at_its_step(number):
    broken, bug = case(number, MODEL), BUGS[number - 1]
    found = diff(MODEL, broken.model, PROMPT, ops_b=broken.ops)
    assert found.first is not None
    assert re.fullmatch(r"layers\.\d\." + re.escape(bug.step).replace(r"\*", r"\d+"), found.first.name), found.sentence


def test_nothing_is_changed_in_the_model_that_they_are_made_of():
    before = MODEL.forward(MODEL.as_ids(PROMPT)).logits
    for number in range(1, len(BUGS) + 1):
        broken = case(number, MODEL)
        other = broken.model.forward(MODEL.as_ids(PROMPT), ops=broken.ops).logits
        assert abs(other - before).max() > 1e-6
    assert (MODEL.forward(MODEL.as_ids(PROMPT)).logits == before).all()


def test_an_unknown_case():
    with pytest.raises(ValueError, match="cases 1 … 8, not 9"):
        case(9, MODEL)
