"""Hints: all are there, in both languages; none gives the code away; what they say of a variant and by hand is true."""

import re
from pathlib import Path

import numpy as np
import pytest

from minglm.learn import check, hint
from minglm.learn.exercises import EXERCISES
from minglm.learn.exercises.cache import feed
from minglm.learn.hints import LANGUAGES, hints

ROOT = Path(__file__).parents[1]
MISTAKES = {name: {m.id for m in task.mistakes} for name, task in EXERCISES.items()}
FLAGS = {name: {flag for m in task.mistakes for flag in m.flags} for name, task in EXERCISES.items()}
CODE = r"np\.|`|\*\*|==|\[:|axis=|keepdims|\.(sum|mean|T|reshape|astype)\b|\breturn \w|\w+\(\w+\)\["


def texts():
    """Every text as (place, {language: text})."""
    for name, known in hints().items():
        yield f"{name}.first", known["first"]
        yield f"{name}.by_hand", known["by_hand"]
        for kind in ("question", "piece"):
            yield from ((f"{name}.{kind}.{key}", text) for key, text in known[kind].items())


TEXTS = dict(texts())


# -- complete, short, no code --------------------------------------------------------------------------------------


def test_every_exercise_mistake_and_flag_has_its_hint_and_none_is_left_over():
    assert set(hints()) == set(EXERCISES)
    for name, known in hints().items():
        assert set(known) == {"first", "question", "piece", "by_hand"}
        assert set(known["question"]) == MISTAKES[name], name
        assert set(known["piece"]) == FLAGS[name], name


@pytest.mark.parametrize("place", TEXTS)
def test_a_hint_is_short_and_without_code_in_both_languages(place):
    text = TEXTS[place]
    assert set(text) == set(LANGUAGES)
    assert len(text["en"]) <= 240
    assert len(text["zh"]) <= 160
    for said in text.values():
        assert not re.search(CODE, said), said
    assert not re.search(r"[\u4e00-\u9fff]", text["en"])
    assert re.search(r"[\u4e00-\u9fff]", text["zh"])


@pytest.mark.parametrize("place", TEXTS)
def test_both_languages_have_the_same_numbers(place):
    """And the same pages."""
    en, zh = (set(re.findall(r"\d+\.\d+|\d+|[⁰¹²³⁴-⁹]+", text)) for text in TEXTS[place].values())
    assert en == zh
    assert re.findall(r"docs/[\w/-]+\.md", TEXTS[place]["en"]) == re.findall(r"docs/[\w/-]+\.md", TEXTS[place]["zh"])


@pytest.mark.parametrize("place", [place for place in TEXTS if ".piece." in place])
def test_a_piece_names_a_page_that_there_is(place):
    page = re.search(r"\((?:notebook (\d\d[a-c]?)|(docs/[\w/-]+\.md))\)$", TEXTS[place]["en"])
    assert page, TEXTS[place]["en"]
    notebook, file = page.groups()
    assert (ROOT / file).exists() if file else len(list((ROOT / "notebooks").glob(f"{notebook}-*.ipynb"))) == 1
    assert TEXTS[place]["zh"].endswith(f"（{file}）" if file else f"（笔记本 {notebook}）")


@pytest.mark.parametrize("place", [place for place in TEXTS if ".piece." not in place])
def test_the_others_ask(place):
    assert TEXTS[place]["en"].count("?") >= 1
    assert TEXTS[place]["zh"].count("？") >= 1


# -- hint() --------------------------------------------------------------------------------------------------------


def test_hints_with_and_without_mistakes():
    known = hints()["router"]
    question, piece = known["question"], known["piece"]
    assert hint("router") == known["first"]["en"] == hint("router", 1, ["as_glm45"])
    assert hint("router", 1, ["softmax"]) == question["softmax"]["en"]
    two = ("softmax", "no_scale")
    assert hint("router", 1, two, "zh") == question["softmax"]["zh"] + "\n" + question["no_scale"]["zh"]
    assert hint("router", 2, two) == piece["score"]["en"] + "\n" + piece["scaled"]["en"]
    assert hint("router", 2).split("\n") == [text["en"] for text in piece.values()]
    assert hint("router", 3) == hint("router", 3, two) == known["by_hand"]["en"]
    assert hint("router", 3, language="zh") == known["by_hand"]["zh"]


@pytest.mark.parametrize(("name", "mistake"), [(name, each) for name in EXERCISES for each in MISTAKES[name]])
def test_each_mistake_has_steps_1_and_2(name, mistake):
    assert hint(name, 1, [mistake]) == hints()[name]["question"][mistake]["en"]
    flags = [flag for m in EXERCISES[name].mistakes if m.id == mistake for flag in m.flags]
    assert hint(name, 2, [mistake]).split("\n") == [hints()[name]["piece"][f]["en"] for f in dict.fromkeys(flags)]


def test_hints_that_there_are_not():
    with pytest.raises(ValueError, match="no exercise 'ruoter'; there are rms_norm"):
        hint("ruoter")
    with pytest.raises(ValueError, match="step = 4; there are 1"):
        hint("router", 4)
    with pytest.raises(ValueError, match="language = 'de'; there are en and zh"):
        hint("router", language="de")


def test_a_report_ends_with_a_hint_that_can_be_pasted():
    task = EXERCISES["router"]
    report = check("router", lambda *inputs: task.reference(*inputs, score="softmax", scaled=False))
    last = repr(report).splitlines()[-1]
    assert last == 'Stuck? hint("router", 1, ["softmax", "no_scale"])'
    assert eval(last.removeprefix("Stuck? ")) == hint("router", 1, report.mistakes)
    assert "Stuck? hint(" in report._repr_html_()
    nothing = check("router", lambda *inputs: (np.zeros((len(inputs[0]), inputs[3]), int), 1))
    assert repr(nothing).endswith('\nStuck? hint("router", 1)')
    assert "Stuck" not in repr(check("router", task.reference))
    assert "Stuck" not in check("router", task.reference)._repr_html_()


# -- by hand: what is said, computed with the reference --------------------------------------------------------------


def of(name, *inputs, **flags):
    return EXERCISES[name].reference(*(np.array(a) if isinstance(a, list) else a for a in inputs), **flags)


def logit(p):
    return np.log(np.array(p) / (1 - np.array(p)))


def by_hand_cache():
    """Slots that are filled, and how many keys each query of the second step sees: those whose value moves it."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 5, heads, 4)) for heads in (2, 2, 2))
    steps = ((0, 3), (2, 2))

    def run(v):
        ys, cache = feed(EXERCISES["kv_cache"].reference, (q, k, v, steps))
        return ys[2], cache  # layer 0 in the second step

    y, cache = run(v)
    seen = np.zeros(2, int)
    for row in range(5):
        other = v.copy()
        other[0, row] += 1
        seen += (run(other)[0] != y).any(axis=-1)
    return int(cache[0][0].any(axis=(1, 2)).sum()), seen.tolist()


def by_hand_attend_bwd():
    one = [[[1.0]]]
    dq, dk, dv = of("attend_bwd", one, [[[2.0]]], [[[1.0]], [[3.0]]], [[[4.0]], [[8.0]]], [[[0.25, 0.75]]])
    return [dq.ravel(), (dk / 2).ravel(), dv.ravel()]  # dk / q = dS


PICKS = [[0, 1], [0, 2], [0, 1], [0, 2], [3, 1]]
SCORES = logit([[0.8], [0.6], [0.4], [0.2]])
BY_HAND = {  # exercise -> what the reference gives, what it should be by hand, and what of it the text states
    "rms_norm": (lambda: of("rms_norm", [3.0, 4.0], [1, 2], 0), [3 / 12.5**0.5, 8 / 12.5**0.5], ["12.5"]),
    "rope": (
        lambda: of("rope", [[[1.0, 1, 0, 0, 7, 8]]], [1], 100.0, 4)[0, 0],
        [np.cos(1), np.cos(0.1), np.sin(1), np.sin(0.1), 7, 8],
        [f"cos 1 = {np.cos(1):.3f}", "0.1"],
    ),
    "attend": (
        lambda: of("attend", [[[2.0, 0, 0, 0]]], [[[0.0] * 4], [[np.log(3), 0, 0, 0]]], [[[4.0] * 4], [[8.0] * 4]]),
        [[7] * 4],
        ["1/4", "3/4"],
    ),
    "kv_cache": (lambda: np.hstack(by_hand_cache()), [4, 3, 4], ["4", "3"]),
    "router": (
        lambda: np.concatenate(of("router", [[1.0]], SCORES, np.array([0, -0.3, 0, 0]), 2, True, 3.0, 1, 1)),
        [[0, 2], [2, 1]],
        ["0.8, 0.3, 0.4, 0.2"],
    ),
    "moe": (
        lambda: of("moe", [[3.0]], [[2, 0]], [[0.5, 2]], (lambda x: x**2, None, lambda x: 10 * x), lambda x: -x),
        [[30]],
        ["33", "= 30", "= 9"],
    ),
    "load": (
        lambda: np.hstack(of("load", PICKS[:4], [[0.5, 2]] * 4, [True] * 4, 4)),
        [4, 2, 2, 0, 1, 0.5**0.5, 1.5 * np.log(2)],
        ["4, 2, 2, 0", "max_vio"],
    ),
    "bias_update": (
        lambda: of("bias_update", [0.5, 0, 0, -0.5], PICKS, [True] * 4 + [False], 0.1),
        [0.4, 0, 0, -0.4],
        ["0.4"],
    ),
    "cross_entropy_bwd": (
        lambda: of("cross_entropy_bwd", 2.0, [[np.log(3), 0]] * 2, [1, -100]),
        [[1.5, -1.5], [0, 0]],
        ["1.5", "(3/4, 1/4)"],
    ),
    "linear_bwd": (
        lambda: np.vstack(of("linear_bwd", [[1, 2]], [[3, 4]], [[1, 10], [100, 1000]])),
        [[201, 2010], [3, 4], [6, 8], [1, 2]],
        ["201", "(3, 4)"],
    ),
    "rms_norm_bwd": (
        lambda: np.vstack(of("rms_norm_bwd", [[5.0, 0]], [[1.0, 7]], [1.0, 2], 0)),
        [[0.98, -0.14], [1, 0]],
        ["0.98", "2.5", "r = 5"],
    ),
    "attend_bwd": (lambda: np.hstack(by_hand_attend_bwd()), [1.5, -0.75, 0.75, 0.25, 0.75], ["(−0.75, 0.75)"]),
    "swiglu_bwd": (
        lambda: np.hstack(of("swiglu_bwd", [10.0], [np.log(3)], [2.0])),
        [20 * (0.75 + np.log(3) * 3 / 16), 7.5 * np.log(3)],
        [f"{np.log(3) * 0.75:.3f}", f"{7.5 * np.log(3):.2f}", "0.75", f"{np.log(3) * 3 / 16:.3f}"],
    ),
    "router_bwd": (
        lambda: of("router_bwd", [[1.0, 5]], [[1.0]], logit([[0.6], [0.2]]), [[0, 1]], True, 2.0)[1],
        [[-2.5 * 0.24], [7.5 * 0.16]],
        ["−2.5", "7.5", "0.75", "0.25"],
    ),
    "orthogonalise": (
        lambda: np.diag(of("orthogonalise", np.diag([3.0, 4]), steps=1, length="none")),
        [s * (3.4445 - 4.7750 * s**2 + 2.0315 * s**4) for s in (0.6, 0.8)],
        [f"{0.6 * (3.4445 - 4.7750 * 0.36 + 2.0315 * 0.36**2):.3f}", "0.6", "0.8"],
    ),
    "mtp_input": (
        lambda: of("mtp_input", np.ones((4, 1)), [7, 3, 5, 2], np.ones((8, 1)), *np.ones((3, 1)), np.ones((1, 2)), 0)[1],
        [5, 2, -100],
        ["3", "5"],
    ),
    "verify": (
        lambda: of("verify", [2], [[0.2, 0.2, 0.6]], [[0.5, 0.3, 0.2]] * 2, [0.5], 0.8),
        [1],
        ["1/3", "(0.3, 0.1, 0)"],
    ),
    "fp8_encode": (
        lambda: of("fp8_encode", np.array([-0.3], np.float32)),
        [0b1_0101_010],
        [f"{0b0101}, in bits 0101|{0b0101}，比特是 0101", "1.6"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXERCISES)
def test_what_is_said_by_hand_is_so(name):
    reference, wanted, said = BY_HAND[name]
    np.testing.assert_allclose(reference(), wanted, rtol=1e-12, atol=1e-12)
    for language in LANGUAGES:
        for words in said:
            assert any(word in hint(name, 3, language=language) for word in words.split("|")), (words, language)
