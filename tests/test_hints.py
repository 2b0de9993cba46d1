"""Hints: all are there, in both languages; none gives the code away; what they say of a variant and by hand is true."""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from minglm.learn import check, hint
from minglm.learn.exercises import EXERCISES
from minglm.learn.exercises.cache import feed
from minglm.learn.hints import LANGUAGES, hints
from minglm.look import glossary

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
    assert hint("router") == known["first"]["en"] == hint("router", 1, ["no such mistake"])
    assert hint("router", 1, ["softmax"]) == question["softmax"]["en"]
    two = ("softmax", "no_scale")
    assert hint("router", 1, two, "zh") == question["softmax"]["zh"] + "\n" + question["no_scale"]["zh"]
    assert hint("router", 2, two) == piece["score"]["en"] + "\n" + piece["scaled"]["en"]
    assert hint("router", 2).split("\n") == [text["en"] for text in piece.values()]
    assert hint("router", 3) == hint("router", 3, two) == known["by_hand"]["en"]
    assert hint("router", 3, language="zh") == known["by_hand"]["zh"]


@pytest.mark.parametrize(("name", "mistake"), [(name, each) for name in EXERCISES for each in sorted(MISTAKES[name])])
def test_each_mistake_has_steps_1_and_2(name, mistake):
    assert hint(name, 1, [mistake]) == hints()[name]["question"][mistake]["en"]
    flags = [flag for m in EXERCISES[name].mistakes if m.id == mistake for flag in m.flags]
    assert hint(name, 2, [mistake]).split("\n") == [hints()[name]["piece"][f]["en"] for f in dict.fromkeys(flags)]


def test_a_prompt_shows_a_hint_in_lines():
    assert repr(hint("router", 2)) == hint("router", 2)
    assert len(repr(hint("router", 2)).splitlines()) == len(FLAGS["router"])


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
    dtype = check("rms_norm", lambda *inputs: EXERCISES["rms_norm"].reference(*inputs).astype(float))
    assert not dtype.passed
    assert "Stuck" not in repr(dtype)  # its sentence says all: no hint is about the dtype
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
        lambda: of("mtp_input", np.ones((4, 1)), [7, 3, 5, 2], np.ones((8, 1)), *np.ones((3, 1)), [[1, 1]], 0)[1],
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


# -- what a question says of its variant -----------------------------------------------------------------------------


def new(position, make):
    """A change: the input at this place made anew from a copy of the old."""
    return lambda inputs: tuple(
        make(a.copy() if isinstance(a, np.ndarray) else a) if i == position else a for i, a in enumerate(inputs)
    )


def put(position, index, value=0.0):
    def make(a):
        a[index] = value
        return a

    return new(position, make)


def times(position, factor):
    return new(position, lambda a: a * factor)


def repeated(count, *positions):
    """Every row several times."""
    return lambda inputs: tuple(np.concatenate([a] * count) if i in positions else a for i, a in enumerate(inputs))


def first(*positions):
    """Rows come once more, at the end, as rows that do not count."""

    def changed(inputs):
        made = [np.concatenate([a, a[:2]]) if i in positions else a for i, a in enumerate(inputs)]
        made[2] = np.append(inputs[2], [0, 0] if inputs[2].dtype == bool else [-100, -100]).astype(inputs[2].dtype)
        return tuple(made)

    return changed


ALL = slice(None)
OTHER = new(1, lambda ids: np.where(np.arange(6) == 1, (ids + 1) % 11, ids))  # another token 1
STAYS = [  # exercise, mistake, case, change, output (with a part of it): the variant's stays, the truth's does not
    ("rms_norm", "layer_norm", 0, new(0, lambda x: x + 1), "y"),
    ("rope", "start1", 0, new(1, lambda _: np.array([1, 2, 3])), "y"),
    ("attend", "first_kv", 0, put(2, (ALL, 1)), "y"),
    ("router", "no_bias", 0, put(2, 5, 10.0), "weights"),
    ("router", "no_norm", 0, new(4, lambda _: False), "weights"),
    ("router", "no_scale", 0, new(5, lambda _: 10.0), "weights"),
    ("moe", "ones", 0, times(2, 2), "y"),
    ("moe", "mean", 0, put(2, (0, 0), 5.0), "y"),
    ("moe", "top1", 0, put(2, (0, 1), 5.0), "y"),
    ("load", "alive_mean", 0, new(3, lambda E: E + 1), "max_vio"),
    ("bias_update", "top1", 0, put(1, (slice(6), 1), 7), "update"),
    ("cross_entropy_bwd", "ignores_dloss", 0, new(0, lambda _: 0.0), "dlogits"),
    ("cross_entropy_bwd", "no_mean", 0, repeated(2, 1, 2), "dlogits", slice(6)),
    ("linear_bwd", "mean", 0, repeated(2, 0, 1), "dweight"),
    ("rms_norm_bwd", "averaged", 0, repeated(2, 0, 1), "dweight"),
    ("attend_bwd", "first_of_group", 0, put(0, (ALL, 1)), "dv"),
    ("attend_bwd", "last_of_group", 0, put(0, (ALL, 0)), "dv"),
    ("attend_bwd", "tile_group", 0, put(0, (ALL, 1)), "dv", (ALL, 0)),
    ("swiglu_bwd", "roles", 0, times(1, 2), "dgate"),
    ("swiglu_bwd", "no_dy", 0, times(0, 2), "dgate"),
    ("router_bwd", "no_scale", 0, times(5, 2), "dgate"),
    ("mtp_input", "pre_norm_hidden", 0, times(3, np.arange(1, 7)), "x"),
    ("mtp_input", "no_norms", 0, times(4, np.arange(1, 7)), "x"),
    ("mtp_input", "no_norms", 0, times(5, np.arange(1, 7)), "x"),
    ("mtp_input", "no_hnorm", 0, times(5, np.arange(1, 7)), "x"),
    ("mtp_input", "pos0_zeroed", 0, OTHER, "x", 0),
    ("orthogonalise", "row_norm", 3, times(0, np.array([10, 1, 1, 1])[:, None]), "update"),
]
MOVES = [  # the variant's moves, the truth's stays
    ("rms_norm", "axis_all", 0, times(0, np.array([999, 1, 1, 1, 1])[:, None]), "y", 1),
    ("attend", "mean_kv", 0, put(2, (ALL, 1)), "y", (ALL, slice(12))),
    ("attend", "peek", 0, put(2, -1), "y", -2),
    ("kv_cache", "peek", 0, put(2, (ALL, -1)), "y", (ALL, -2)),
    ("router", "norm_over_tokens", 0, new(0, lambda h: h[:1]), "weights", 0),
    ("attend", "no_mask", 0, put(2, -1), "y", 0),
    ("load", "padding_in_mean", 0, first(0, 1), "max_vio"),
    ("load", "not_divided", 0, repeated(10, 0, 1, 2), "max_vio"),
    ("load", "std_in_picks", 0, repeated(10, 0, 1, 2), "cv"),
    ("load", "entropy_softmax", 0, repeated(10, 0, 1, 2), "entropy"),
    ("cross_entropy_bwd", "divides_by_N", 0, first(1), "dlogits", slice(6)),
    ("rms_norm_bwd", "no_size", 0, lambda i: (i[0], 1e4 * i[1], i[2], 1e8 * i[3]), "dweight"),
    ("orthogonalise", "no_norm", 0, times(0, 1 / 7), "update"),
    ("orthogonalise", "flat_experts", 0, put(0, (0, 0), 0.5), "update", 1),
    ("mtp_input", "hidden_shifted", 0, put(0, -1), "x", -1),
    ("mtp_input", "no_enorm", 0, times(2, 1e4), "x"),
]


def moved(task, number, change, name, part=Ellipsis, **flags):
    """By how much an output moves, against its size."""
    inputs = task.cases(0)[number].inputs
    with np.errstate(all="ignore"):
        a, b = (task.truth(i, **flags)[name] for i in (inputs, change(inputs)))
    common = tuple(slice(min(m, n)) for m, n in zip(a.shape, b.shape, strict=True))
    a, b = a[common], b[common]
    return abs(a[part] - b[part]).max() / abs(a).max()


@pytest.mark.parametrize("claim", [*STAYS, *MOVES], ids=lambda claim: f"{claim[0]}-{claim[1]}")
def test_what_a_question_says_of_its_variant_is_so(claim):
    name, mistake, *where = claim
    task = EXERCISES[name]
    flags = next(m.flags for m in task.mistakes if m.id == mistake)
    wrong, right = moved(task, *where, **flags), moved(task, *where)
    still, other = (wrong, right) if claim in STAYS else (right, wrong)
    assert still < 1e-5 < 1e-3 < other, (wrong, right)


def load_of(*loads, **flags):
    """The measures of these loads: one pick each."""
    picks = np.repeat(np.arange(len(loads)), loads)[:, None]
    return of("load", picks, np.ones(picks.shape), np.ones(len(picks), bool), len(loads), **flags)


def singular(start, **flags):
    """What a singular value beside one of 1 becomes, in units of it."""
    return of("orthogonalise", np.diag([1.0, start]), length="none", **flags)[1, 1]


def rms(rows, cols, **flags):
    x = np.random.default_rng(0).standard_normal((rows, cols))
    return np.sqrt((of("orthogonalise", x, **flags) ** 2).mean())


def fp8(x, **flags):
    code = of("fp8_encode", np.array([x], np.float32), **flags)
    return float(code.view(ml_dtypes.float8_e4m3fn).astype(np.float64)[0])


def dgate(gate, **flags):
    return of("swiglu_bwd", [1.0], [gate], [1.0], **flags)[0]


def dup(gate, **flags):
    return of("swiglu_bwd", [1.0], [gate], [1.0], **flags)[1]


def quotient(name, output, number=0, **flags):
    """Largest and smallest ratio of the variant's numbers to the right ones."""
    task = EXERCISES[name]
    inputs = task.cases(0)[number].inputs
    ratios = task.truth(inputs, **flags)[output] / task.truth(inputs)[output]
    return [ratios.min(), ratios.max()]


def weights_of(*scores, **flags):
    """Two picked ones."""
    return of("router", [[1.0]], logit([[s] for s in scores]), np.zeros(2), 2, True, 1.0, 1, 1, **flags)[1][0]


VALUES = {  # exercise.mistake -> a number that the question states, and what the variant gives
    "rope.sign": (-np.sin(1), lambda: of("rope", [[[1.0, 0]]], [1], 100.0, 2, direction=-1)[0, 0, 1]),
    "rope.noneg": (np.sin(1), lambda: of("rope", [[[0.0, 1]]], [1], 100.0, 2, minus=False)[0, 0, 0]),
    "rope.restart0": (2, lambda: of("rope", [[[2.0, 1]]], [5], 100.0, 2, time="from 0")[0, 0, 0]),
    "router.softmax_topk": ([0.69, 0.31], lambda: weights_of(0.9, 0.1, weigh="softmax of the picked").round(2)),
    "load.abs_max_vio": (0.5, lambda: load_of(7, 7, 7, 3, violation="absolute")[1]),
    "load.ratio": (1, lambda: load_of(5, 5, 5, violation="ratio")[1]),
    "load.sample_std": (8**0.5, lambda: 6 * load_of(4, 8, spread="sample")[2]),
    "load.variance": (1 / 9, lambda: load_of(4, 8, spread="variance")[2]),
    "load.bits": (3, lambda: load_of(*[2] * 8, entropy="bits")[3]),
    "load.entropy_relative": (1, lambda: load_of(3, 3, 3, entropy="relative")[3]),
    "bias_update.absent_only": (
        0, lambda: of("bias_update", np.zeros(2), [[0], [1], [1], [1]], [True] * 4, 1.0, update="absent only")[0],
    ),
    "attend_bwd.no_scale": ([5**0.5] * 2, lambda: quotient("attend_bwd", "dk", scale="none")),
    "attend_bwd.scale_twice": ([5**-0.5] * 2, lambda: quotient("attend_bwd", "dk", scale="twice")),
    "attend_bwd.scale_q_only": ([5**0.5] * 2, lambda: quotient("attend_bwd", "dk", scale="q only")),
    "attend_bwd.mean_group": ([1 / 3] * 2, lambda: quotient("attend_bwd", "dv", group="mean")),
    "swiglu_bwd.sigmoid_slope": (1 / 4, lambda: dgate(0.0, slope="sigmoid")),
    "swiglu_bwd.sigma_only": (1 / 2, lambda: dgate(0.0, slope="first half")),
    "swiglu_bwd.second_only": (0, lambda: dgate(0.0, slope="second half")),
    "swiglu_bwd.lost_gate": (dgate(1.0), lambda: dgate(1.0, slope="no gate")),
    "swiglu_bwd.silu_1_silu": (0, lambda: dgate(0.0, slope="silu · (1 − silu)")),
    "swiglu_bwd.sigma_of_silu": (1 / 2, lambda: dgate(0.0, slope="sigmoid of silu")),
    "swiglu_bwd.up_sigmoid": (1 / 2, lambda: dup(0.0, to_up="sigmoid")),
    "swiglu_bwd.up_gate": (-5, lambda: dup(-5.0, to_up="gate")),
    "orthogonalise.cubic": (0.015, lambda: singular(0.01, polynomial=(1.5, -0.5, 0.0), steps=1).round(3)),
    "orthogonalise.one_step": (0.034, lambda: singular(0.01, steps=1).round(3)),
    "orthogonalise.ten_steps": (0.05, lambda: singular(0.0001).round(2)),
    "orthogonalise.keller": (
        [True, True], lambda: [rms(4, 4, length="keller") > 0.3, rms(100, 100, length="keller") < 0.1],
    ),
    "fp8_encode.max240": (240, lambda: fp8(300, top=240)),
    "fp8_encode.truncate": (1, lambda: fp8(1.1, rounding="down")),
    "fp8_encode.half_away": (1.125, lambda: fp8(1.0625, rounding="half away")),
    "fp8_encode.carry_lost": (1, lambda: fp8(1.96875, carry="lost")),
    "fp8_encode.carry_clamped": (1.875, lambda: fp8(1.96875, carry="clamped")),
    "fp8_encode.flush_subnormal": (0, lambda: fp8(2**-7, low="zero")),
    "fp8_encode.sub_step_6": (2**-9, lambda: fp8(1.5 * 2**-7, step=-6)),  # what code 1 stands for
    "fp8_encode.sub_step_10": (2 * 2**-9, lambda: fp8(2**-9, step=-10)),
    "fp8_encode.overflow_nan": (np.nan, lambda: fp8(500, over="NaN")),
    "fp8_encode.no_clip": (2**-6, lambda: fp8(1000, over="wraps")),
    "fp8_encode.bias8": (2, lambda: fp8(1, bias=8)),
    "fp8_encode.double_rounding": (1, lambda: fp8(1.0629883, first="bfloat16")),
}  # fmt: skip


@pytest.mark.parametrize("place", VALUES)
def test_numbers_that_a_question_states_are_the_variant_s(place):
    name, mistake = place.split(".")
    assert mistake in hints()[name]["question"]
    wanted, variant = VALUES[place]
    np.testing.assert_allclose(variant(), wanted, rtol=1e-9, atol=1e-12)


def test_who_answers_the_book_s_task_is_sent_back_to_the_term_s():
    report = check("router", EXERCISES["router"].reference, term="spec-7")
    assert report.mistakes == ("as_glm45",)
    assert "In this version" in hint("router", 1, report.mistakes)
    assert "In this version" in hint("router", 1, report.mistakes, "zh")


@pytest.mark.parametrize(
    "word", ["token", "position", "expert", "shared expert", "padding", "gradient", "logits", "embedding", "draft"]
)
def test_the_chinese_hints_use_the_glossary_s_words(word):
    chinese = glossary.find(word).chinese
    said = [text for text in TEXTS.values() if re.search(rf"\b{word}s?\b", text["en"])]
    assert said
    assert [text["zh"] for text in said if chinese not in text["zh"]] == []
