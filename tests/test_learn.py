"""Checks of exercises: right answers pass in any form, each known mistake is named, others are described truly."""

import math
import re
import runpy
import sys
import warnings
from bdb import BdbQuit

import ml_dtypes
import numpy as np
import pytest

import minglm.model as book
from minglm.config import PRESETS
from minglm.generate.sampling import draw as draw_token
from minglm.generate.speculative import verify
from minglm.learn import case, check, replay
from minglm.learn.check import judge
from minglm.learn.describe import describe
from minglm.learn.exercise import apart
from minglm.learn.exercises import EXERCISES
from minglm.learn.variants import variant, variants, with_designs
from minglm.look import routing
from minglm.model.ops import IGNORE, AttendSaved, Sight, attend, attend_bwd, sigmoid, softmax
from minglm.model.params import Experts, Router, Weight
from minglm.model.rope import rotation
from minglm.model.router import RouterSaved, Routing
from minglm.train.muon import newton_schulz, step_length

ALL = [(task, mistake) for task in EXERCISES.values() for mistake in task.mistakes]


def router(h, gate, bias, K, normalise, scale, n_group, topk_group):
    config = router_config(len(gate), K, normalise, scale, n_group, topk_group)
    made, _ = book.router(h, Router(gate, bias), config)
    return made.indices, made.weights


def rope(x, positions, theta, r):
    config = PRESETS["micro"].replace(head_dim=x.shape[-1], partial_rotary_factor=r / x.shape[-1], rope_theta=theta)
    return book.ops.rope(x[None], *rotation(positions[None], config, x.dtype))[0]


def kv_cache(cache, layer, start, q, k, v, rotate):
    if cache is None:
        config = PRESETS["micro"].replace(num_key_value_heads=k.shape[1], num_attention_heads=q.shape[1], head_dim=4)
        cache = book.KVCache(config, capacity=32, dtype=k.dtype, layers=2)
    cache.length[:] = start
    slots = cache.slots(len(q))
    keys, values = cache.append(layer, rotate(k, slots[0])[None], v[None], slots)
    sight = Sight(slots, np.zeros(slots.shape, int), np.zeros((1, keys.shape[1]), int))
    return attend(rotate(q, slots[0])[None], keys, values, sight)[0].reshape(len(q), -1), cache


def moe(x, indices, weights, experts, shared):
    params = Experts(*(np.stack([e.matrices[i].astype(x.dtype) for e in experts]) for i in range(3)))
    return book.routed_experts(x, Routing(indices, weights), params)[0] + shared(x)


def mtp_input(stream, ids, embedding, norm, enorm, hnorm, eh_proj, eps):
    """What the model's own MTP layer hands to its decoder layer, and the targets that its loss counts."""
    D, seen = stream.shape[1], {}
    config = PRESETS["micro"].replace(hidden_size=D, vocab_size=len(embedding), rms_norm_eps=eps)
    params = book.init_params(config, np.random.default_rng(0), stream.dtype)
    own = params.mtp[0]._replace(enorm=Weight(enorm), hnorm=Weight(hnorm), eh_proj=Weight(eh_proj))
    params = params._replace(mtp=(own._replace(embed_tokens=Weight(embedding)),))
    layout = book.make_layout((1, len(ids)), config, stream.dtype)

    def tap(name, array):
        seen[name.split(".")[-1]] = array
        return array

    book.mtp_chain(book.rms_norm(stream, norm, eps)[None], ids[None], layout, params, config, 1, tap)
    targets = np.append(ids[1:], IGNORE)  # as the trunk has them
    return seen["eh_proj"][0], targets[1:]


def load(indices, weights, valid, E):
    counts = routing.load(indices[:, None], E, valid)[0]
    return (
        counts, routing.max_violation(counts), routing.coefficient_of_variation(counts), routing.load_entropy(counts),
    )  # fmt: skip


def router_config(E, K, normalise, scale, n_group=1, topk_group=1):
    return PRESETS["micro"].replace(
        n_routed_experts=E, num_experts_per_tok=K, norm_topk_prob=normalise, routed_scaling_factor=scale,
        n_group=n_group, topk_group=topk_group,
    )  # fmt: skip


def router_bwd(dweights, h, gate, indices, normalise, scale):
    saved = RouterSaved(h, sigmoid(h @ gate.T), Routing(indices, dweights))
    params = Router(gate, np.ones(len(gate), h.dtype))
    dh, grads = book.router_bwd(
        dweights, saved, params, router_config(*gate.shape[:1], *indices.shape[1:], normalise, scale)
    )
    return dh, *grads


def attention_bwd(dy, q, k, v, probs):
    return tuple(a[0] for a in attend_bwd(dy[None], AttendSaved(q[None], k[None], v[None], probs[None])))


def cross_entropy_bwd(dloss, logits, targets):
    return dloss * book.cross_entropy(logits[None], targets[None])[1][0]


def attention(q, k, v):
    T, S = len(q), len(k)
    sight = Sight(np.arange(S - T, S)[None], np.zeros((1, T), int), np.zeros((1, S), int))
    return attend(q[None], k[None], v[None], sight)[0][0].reshape(T, -1)


BOOK = {
    "rms_norm": book.rms_norm,
    "rope": rope,
    "router": router,
    "linear_bwd": lambda dy, x, weight: book.linear_bwd(dy, x, weight, np.zeros(len(weight), dy.dtype)),
    "rms_norm_bwd": book.rms_norm_bwd,
    "swiglu_bwd": book.swiglu_bwd,
    "attend": attention,
    "kv_cache": kv_cache,
    "moe": moe,
    "load": load,
    "mtp_input": mtp_input,
    "verify": verify,
    "attend_bwd": attention_bwd,
    "router_bwd": router_bwd,
    "orthogonalise": lambda x: newton_schulz(x) * step_length(x.shape),
    "fp8_encode": lambda x: np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8),
    "bias_update": lambda bias, indices, valid, rate: book.update_bias(
        bias, book.expert_load(indices, len(bias), valid), rate
    ),
}


@pytest.mark.parametrize("name", EXERCISES)
def test_the_reference_passes_and_gives_every_point(name):
    report = check(name, EXERCISES[name].reference)
    assert report.passed, report
    assert f"{len(report.points)} of {len(report.points)} points" in report.headline


@pytest.mark.parametrize("name", BOOK)
def test_the_model_s_own_function_passes(name):
    assert check(name, BOOK[name]).passed, check(name, BOOK[name])


@pytest.mark.parametrize(("task", "mistake"), ALL, ids=[f"{t.name}-{m.id}" for t, m in ALL])
@pytest.mark.parametrize("draw", [0, 1, 2])
def test_a_mistake_differs_from_the_truth_on_three_cases(task, mistake, draw):
    with np.errstate(all="ignore"):
        different = 0
        for each in task.cases(draw):
            try:
                wrong = task.truth(each.inputs, **mistake.flags)
            except ValueError:
                continue
            different += apart(wrong, task.truth(each.inputs)) > 1000 * task.tolerance
    assert different >= 3


def test_mistakes_are_named():
    """At least 95 of a hundred; the others are told by their shape or by the error that they end in."""
    counts, described = {}, []
    for task, mistake in ALL:
        report = check(task.name, lambda *inputs, t=task, m=mistake: t.reference(*inputs, **m.flags))
        assert not report.passed
        assert report.says
        named = report.mistakes == (mistake.id,)
        assert named or not report.mistakes, (task.name, mistake.id, report)  # never by another's name
        listed, recognised = counts.get(task.name, (0, 0))
        counts[task.name] = listed + 1, recognised + named
        described += [] if named else [(task.name, mistake.id, report.says[0])]
    for name, (listed, recognised) in counts.items():
        print(f"{name:18} {listed:3} listed, {recognised:3} named, {listed - recognised} described")
    named = len(ALL) - len(described)
    print(f"{len(ALL)} listed misconceptions: {named} recognised by name, {len(described)} described")
    assert named >= 0.95 * len(ALL), described


P, Q = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.2, 0.3, 0.1, 0.4])


@pytest.mark.parametrize(
    ("flags", "distance", "kept"),
    [
        ({}, 0, 0.65),
        ({"accept": "drawn"}, 0, 0.225),
        ({"rest": "p"}, 0.125, 0.65),
        ({"rest": "without the draft"}, 0.116, 0.65),
        ({"rest": "|p - q|"}, 0.175, 0.65),
        ({"rest": "q - p"}, 0.35, 0.65),
        ({"rest": "q"}, 0.245, 0.65),
        ({"accept": "q / p"}, 0.35, 0.85),
        ({"accept": "p ≥ q"}, 0.05, 0.6),
    ],
)
def test_what_a_mistake_in_accepting_does_to_the_text(flags, distance, kept):
    """Over a grid of uniform numbers: the first token's distribution (total variation to p; 0: the text is the
    model's own), and the share of drafts that are kept. By hand: Σ min(p, q) = 0.65, Σ p·q = 0.225."""
    grid = (np.arange(100) + 0.5) / 100
    found, hits = np.zeros(4), 0.0
    for token, chance in enumerate(Q):
        for u in grid:
            for v in grid:
                new = EXERCISES["verify"].reference(
                    np.array([token]), Q[None], np.array([P, P]), np.array([u]), v, **flags
                )
                found[new[0]] += chance / grid.size**2
                hits += chance / grid.size**2 * (len(new) == 2)
    assert abs(found - P).sum() / 2 == pytest.approx(distance, abs=0.01)
    assert hits == pytest.approx(kept, abs=0.01)


def test_two_mistakes_at_once_are_named():
    task = EXERCISES["router"]
    report = check("router", lambda *inputs: task.reference(*inputs, score="softmax", scaled=False))
    assert set(report.mistakes) == {"softmax", "no_scale"}
    assert report.says[0].startswith("Two things: ")


def rope_as_complex(x, positions, theta, r):
    turns = np.exp(1j * positions[:, None, None] * theta ** (-np.arange(0, r, 2) / r))
    turned = (x[..., : r // 2] + 1j * x[..., r // 2 : r]) * turns
    return np.concatenate([turned.real, turned.imag, x[..., r:]], axis=-1)


def rope_by_tables(x, positions, theta, r):
    """cos and sin of all r entries in float32, and the two halves exchanged."""
    angles = (np.arange(100)[:, None] / theta ** (np.arange(0, r, 2) / r)).astype(np.float32)
    cos, sin = (np.tile(f(angles), 2)[positions][:, None] for f in (np.cos, np.sin))
    first, rest = x[..., :r], x[..., r:]
    exchanged = np.concatenate([-first[..., r // 2 :], first[..., : r // 2]], axis=-1)
    return np.concatenate([first * cos + exchanged * sin, rest], axis=-1)


def cache_of_lists(cache, layer, start, q, k, v, rotate):
    """What was kept is cut and joined anew; written to in place."""
    cache = cache or {}
    old_k, old_v = cache.get(layer, (k[:0], v[:0]))
    positions = start + np.arange(len(q))
    cache[layer] = np.concatenate([old_k[:start], rotate(k, positions)]), np.concatenate([old_v[:start], v])
    return attention(rotate(q, positions), *cache[layer]), cache


def cache_unturned(cache, layer, start, q, k, v, rotate):
    """Keys stored as they came, all turned when they are read: right, and dear."""
    cache = cache or {}
    old_k, old_v = cache.get(layer, (k[:0], v[:0]))
    cache[layer] = np.concatenate([old_k[:start], k]), np.concatenate([old_v[:start], v])
    keys = rotate(cache[layer][0], np.arange(start + len(q)))
    return attention(rotate(q, start + np.arange(len(q))), keys, cache[layer][1]), cache


def cache_repeated(cache, layer, start, q, k, v, rotate):
    """A buffer for each query head."""
    heads = q.shape[1]
    cache = np.zeros((2, 2, 32, heads, q.shape[2]), q.dtype) if cache is None else cache
    positions = start + np.arange(len(q))
    cache[0, layer, positions] = np.repeat(rotate(k, positions), heads // k.shape[1], axis=1)
    cache[1, layer, positions] = np.repeat(v, heads // k.shape[1], axis=1)
    return attention(rotate(q, positions), *cache[:, layer, : start + len(q)]), cache


def moe_by_expert(x, indices, weights, experts, shared):
    y = shared(x)
    for e in reversed(range(len(experts))):
        tokens, ranks = np.nonzero(indices == e)
        if len(tokens):
            y[tokens] += weights[tokens, ranks, None] * experts[e](x[tokens])
    return y


def moe_at_once(x, indices, weights, experts, shared):
    """Every expert for every token, most of it times zero."""
    answers = np.stack([expert(x) for expert in experts])
    picked = np.eye(len(experts), dtype=x.dtype)[indices]
    return np.einsum("nk,nke,end->nd", weights, picked, answers) + shared(x)


def moe_by_token(x, indices, weights, experts, shared):
    rows = [
        sum(weights[t, k] * experts[e](x[t : t + 1]) for k, e in enumerate(indices[t])) for t in range(len(indices))
    ]
    return np.concatenate(rows) + shared(x)


def verify_by_sampling(drafts, q, p, u, v):
    """Draws every token from p; a draft is a hit if it is the same."""
    kept = []
    for i, draft in enumerate(drafts):
        kept.append(draw_token(p[i], u[i]))
        if kept[-1] != draft:
            return kept
    return [*kept, draw_token(p[-1], v)]


DEARER = {  # right, and told what it did too much
    "verify, sampler match": ("verify", verify_by_sampling, "The text has the same distribution, but .* Σ p·q, where"),
    "moe, every expert for every token": ("moe", moe_at_once, "were given 54 rows for 18 picks. Every .* = 3 times"),
    "moe, token by token": ("moe", moe_by_token, "18 calls, where 5 do"),
    "kv_cache, keys turned when read": ("kv_cache", cache_unturned, "56 keys were turned, where 14 came"),
    "kv_cache, heads repeated": ("kv_cache", cache_repeated, "the cache holds 3072 numbers, where 1024 do"),
}


@pytest.mark.parametrize("name", DEARER)
def test_a_dearer_way_passes_with_its_bill(name):
    exercise, function, says = DEARER[name]
    report = check(exercise, function)
    assert report.passed, report
    assert re.search(says, report.says[0])


@pytest.mark.parametrize("name", BOOK)
def test_the_book_s_own_way_gets_no_bill(name):
    assert check(name, BOOK[name]).says == ()


def mtp_in_two_products(stream, ids, embedding, norm, enorm, hnorm, eh_proj, eps):
    """A product for each half of eh_proj; embeddings through one-hot rows."""
    D = len(norm)
    one_hot = np.eye(len(embedding), dtype=stream.dtype)[ids[1:]]
    words = book.rms_norm(one_hot @ embedding, enorm, eps)
    states = book.rms_norm(book.rms_norm(stream, norm, eps), hnorm, eps)[:-1]
    targets = np.full(len(ids) - 1, IGNORE)
    targets[:-1] = ids[2:]
    return words @ eh_proj[:, :D].T + states @ eh_proj[:, D:].T, targets


def verify_with_min(drafts, q, p, u, v):
    """Acceptance as a minimum, the rest normalised, choices by comparing."""

    def choice(probs):
        return int((np.cumsum(probs) <= v).sum())

    n = len(drafts)
    refused = [i for i in range(n) if u[i] >= min(1, p[i][drafts[i]] / q[i][drafts[i]])]
    if not refused:
        return np.append(drafts, choice(p[n]))
    i = refused[0]
    rest = p[i] - np.minimum(p[i], q[i])
    return (*drafts[:i], choice(rest / rest.sum()))


def load_by_comparing(indices, weights, valid, E):
    """One-hot counts; the measures from shares; Python's own numbers."""
    counts = ((indices[:, :, None] == np.arange(E)) & valid[:, None, None]).sum(axis=(0, 1))
    p = counts / counts.sum()
    entropy = -sum(float(share) * math.log(share) for share in p if share > 0)
    return counts, float(p.max() * E - 1), float(np.sqrt(((p * E - 1) ** 2).mean())), entropy


def router_by_partition(h, gate, bias, K, normalise, scale, n_group, topk_group):
    """No sort: argpartition for groups and experts; a softmax of log-scores is a division by their sum."""
    scores = 1 / (1 + np.exp(-h @ gate.T))
    groups = (scores + bias).reshape(len(h), n_group, -1)
    worth = np.partition(groups, -2, axis=-1)[:, :, -2:].sum(axis=-1)
    shut = np.argpartition(worth, n_group - topk_group - 1, axis=-1)[:, : n_group - topk_group]
    for n in range(len(h)):
        groups[n, shut[n]] = -np.inf
    indices = np.argpartition(groups.reshape(scores.shape), -K, axis=-1)[:, -K:]
    picked = np.take_along_axis(scores, indices, axis=-1)
    return indices, scale * (softmax(np.log(picked)) if normalise else picked)


def added(x):
    """The norm plus 1e-7, not at least 1e-7."""
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    y = y / (np.linalg.norm(y, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(5):
        A = y @ y.mT
        y = 3.4445 * y + (-4.7750 * A + 2.0315 * A @ A) @ y
    return (y.mT if tall else y) * 0.2 * max(x.shape[-2:]) ** 0.5


RIGHT = {
    "router, by partition": ("router", router_by_partition),
    "load, by comparing": ("load", load_by_comparing),
    "mtp_input, two products": ("mtp_input", mtp_in_two_products),
    "verify, with min": ("verify", verify_with_min),
    "moe, expert by expert": ("moe", moe_by_expert),
    "kv_cache, joined anew": ("kv_cache", cache_of_lists),
    "rope, complex": ("rope", rope_as_complex),
    "rope, tables in float32": ("rope", rope_by_tables),
    "rms_norm, power": ("rms_norm", lambda x, w, eps: x * ((x**2).mean(-1, keepdims=True) + eps) ** -0.5 * w),
    "rms_norm, length": (
        "rms_norm",
        lambda x, w, eps: x * x.shape[-1] ** 0.5 / np.sqrt((x**2).sum(-1, keepdims=True) + eps * x.shape[-1]) * w,
    ),
    "orthogonalise, 1e-7 added": ("orthogonalise", added),  # as Keller Jordan's code has it
    "attend, the book's": ("attend", attention),
    "router, another order": (
        "router",
        lambda *inputs: tuple(a[:, ::-1] for a in EXERCISES["router"].reference(*inputs)),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_in_another_form(name):
    exercise, function = RIGHT[name]
    report = check(exercise, function)
    assert not any("bill" in line for line in report.says)
    values = [point for point in report.points if point.name != "dtype in = dtype out"]
    assert all(point.passed for point in values), report


def in_place(x, weight, eps):
    x /= np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    return x * weight


FRESH = {  # not from the list of known mistakes: each gets a true sentence
    "factor": ("rms_norm", lambda x, w, eps: 2 * book.rms_norm(x, w, eps), "yours / right = 2 everywhere"),
    "sign": ("rms_norm", lambda x, w, eps: -book.rms_norm(x, w, eps), "opposite sign"),
    "shape": ("rms_norm", lambda x, w, eps: x[..., :-1], r"shape \[5, 7\], wanted \[\.\., D\] = \[5, 8\]"),
    "in place": ("rms_norm", in_place, r'changes what it was given.* at line \d+: "x /= '),
    "a text": ("rms_norm", lambda x, w, eps: "done", r"y is str, wanted float64 \[5, 8\]"),
    "a second thing": ("rms_norm", lambda x, w, eps: (book.rms_norm(x, w, eps), eps), "2 things, wanted one: y"),
    "memory": ("rms_norm", lambda x, w, eps: np.ones(1 << 50), r"more memory than there is for it at line \d+"),
    "a view": ("rms_norm", lambda x, w, eps: np.copyto(np.broadcast_to(w, x.shape), x), "or a view that is read-only"),
    "the end": ("rms_norm", lambda x, w, eps: sys.exit(3), r"SystemExit at line \d+.*: 3"),
    "random": (
        "rms_norm",
        lambda x, w, eps: book.rms_norm(x, w, eps) * np.random.default_rng().random(),  # numpy's own entropy
        "gave two answers",
    ),
    "memory of calls": ("rms_norm", lambda x, w, eps, seen=[]: seen.append(1) or x * len(seen), "gave two answers"),
    "inside NumPy": (
        "attend",
        lambda q, k, v: np.einsum("thd,shd->hts", q, k),
        r"ValueError at line \d+: \"lambda q, k, v: np.einsum",
    ),
    "NaN everywhere": (  # 0 · −∞: as all NaN as a strict mask with the softmax over queries
        "attend",
        lambda q, k, v: attention(q, k, v) * np.nan,
        r"y has NaN or infinity, first at \[0, 0\]",
    ),
    "rows of another size": (
        "rms_norm",
        lambda x, w, eps: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w,
        r"one number for each axis 0: 2\.94, 1\.01",
    ),
    "another order": (
        "attend_bwd",
        lambda *inputs: tuple(attention_bwd(*inputs)[i] for i in (0, 2, 1)),
        r"dq is right. dk is what dv should be: are they returned in another order\?",
    ),
    "no cache": ("kv_cache", lambda *inputs: inputs[3], r"^The result: wanted two things, y \[T, H·d\] and the cache"),
    "router, another order": ("router", lambda *inputs: router(*inputs)[::-1], "indices come first, then weights"),
    "router, all experts": (
        "router",
        lambda *inputs: (router(*inputs)[0], EXERCISES["router"].truth(inputs)["weights"]),
        r"weights has the shape \[40, 8\], wanted \[N, K\] = \[40, 3\]",
    ),
    "nothing": ("rms_norm", lambda x, w, eps: None, "returned None: does it end in a return"),
    "one thing": ("router", lambda *inputs: np.zeros((40, 3)), "wanted two things"),
    "no such expert": (
        "router",
        lambda *i: (np.full((len(i[0]), i[3]), 99), np.ones((len(i[0]), i[3]))),
        "whole numbers 0 … 7",
    ),
    "an error": ("attend", lambda q, k, v: q[0] @ "k", "TypeError|UFuncTypeError|ValueError"),
    "until": (
        "attend",
        lambda q, k, v: np.concatenate([attention(q, k, v)[:2], 0 * attention(q, k, v)[2:]]),
        "right for T < 2, and wrong from T = 2 on",
    ),
    "places": ("swiglu_bwd", lambda dy, g, u: tuple(a[::-1] for a in book.swiglu_bwd(dy, g, u)), "in another order"),
    "to be written": ("attend", lambda q, k, v: (_ for _ in ()).throw(NotImplementedError), "Nothing is written yet"),
    "float64": ("rms_norm", lambda x, w, eps: book.rms_norm(x, w, eps).astype(np.float64), "float64, wanted float32"),
}


NARROW = {  # right in float64: only the last point is missing, and it is said why
    "float32 inside": (lambda y, given: y.astype(np.float32).astype(y.dtype), r"right to [789] digits"),
    "float32 out": (lambda y, given: y.astype(np.float32), r"right to [789] digits"),
    "a small number": (lambda y, given: y * (1 + 1e-6), "right to 6 digits"),
    "float16": (lambda y, given: y.astype(np.float16) if given == np.float32 else y, "y is float16, wanted float32"),
    "longdouble": (lambda y, given: y.astype(np.longdouble), "y is (longdouble|float96|float128|float64), wanted"),
    "list": (lambda y, given: y.tolist(), "y is float64, wanted float32"),
    "zeros": (lambda y, given: y * (given == np.float64), "With float32 inputs the numbers are wrong"),
    "shape": (lambda y, given: y if given == np.float64 else y[0], r"float32 inputs: y has the shape \[8\]"),
}


@pytest.mark.parametrize("name", NARROW)
def test_only_the_dtype_is_wrong(name):
    change, says = NARROW[name]
    report = check("rms_norm", lambda x, w, eps: change(book.rms_norm(x, w, eps), x.dtype))
    assert [point.name for point in report.points if not point.passed] == ["dtype in = dtype out"], report
    assert re.search(says, report.says[0]), report.says


def test_no_warning_in_float32():
    """In a graded notebook cell a line on stderr costs all points."""

    def overflows(x, w, eps):
        return book.rms_norm(x, w, eps) + 0 / np.exp(0 * x + np.float32(99))  # e⁹⁹ is infinite in float32

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check("rms_norm", overflows).passed


def test_the_line_is_shown_wherever_the_package_lies(tmp_path):
    """A clone is a folder named minglm, and the exercises lie in it."""
    file = tmp_path / "minglm" / "notebooks" / "rms_norm.py"
    file.parent.mkdir(parents=True)
    file.write_text("def rms_norm(x, weight, eps):\n    return x / size\n", "utf-8")
    report = check("rms_norm", runpy.run_path(str(file))["rms_norm"])
    assert 'NameError at line 2: "return x / size"' in report.says[0]


@pytest.mark.parametrize("name", FRESH)
def test_other_mistakes_get_a_true_sentence(name):
    exercise, function, says = FRESH[name]
    report = check(exercise, function)
    assert not report.passed
    assert report.mistakes == ()
    assert re.search(says, " ".join(report.says)), report.says


def test_cases_can_be_looked_at():
    x, weight, eps = case("rms_norm", 0)
    assert (x.shape, weight.shape, eps) == ((5, 8), (8,), 1e-3)
    again = case("rms_norm", 0)
    assert np.array_equal(again[0], x)
    with pytest.raises(ValueError, match="the cases 0 … 4, not 9"):
        case("rms_norm", 9)
    with pytest.raises(ValueError, match="no exercise 'ruoter'; there are rms_norm"):
        check("ruoter", print)
    assert "not a function" in check("router", 3).says[0]


def test_a_failing_case_can_be_called_again():
    def router(h, gate, bias, K, normalise, scale, n_group, topk_group):
        h += 1

    assert 'Look at it: replay("router", 0, router)' in check("router", router).lines
    with pytest.raises(ValueError, match="read-only"):  # as in the check
        replay("router", 0, router)
    assert "your_function" in check("router", lambda *inputs: 1).lines[1]


class Quits:
    def __array__(self, dtype=None, copy=None):
        raise BdbQuit


@pytest.mark.parametrize("name", ["rms_norm", "kv_cache"])
@pytest.mark.parametrize("where", ["in the function", "after it"])
def test_q_in_a_debugger_ends_the_check(name, where):
    calls = []

    def debugged(*inputs):
        calls.append(inputs)
        if where == "in the function":
            raise BdbQuit
        return Quits()

    with pytest.raises(BdbQuit):
        check(name, debugged if name == "rms_norm" else lambda *inputs: (debugged(*inputs), None))
    assert len(calls) == 1


def test_which_slices_are_wrong_is_said_shortly():
    task = EXERCISES["kv_cache"]
    inputs = task.cases(0)[0].inputs  # seven tokens

    def said(*tokens):
        y = task.truth(inputs)["y"].copy()
        y[:, tokens] += np.arange(y.shape[2])
        return describe(task, inputs, {"y": y})

    assert said(0, 1, 2, 3, 4) == ["y is wrong for T = 0 … 4 only."]
    assert said(1, 3) == ["y is wrong for T = 1, 3 only."]


def test_a_report_shows_itself():
    report = check("rms_norm", in_place)
    assert "public checks passed, 0 of 4 points" in repr(report)
    assert "<table" in report._repr_html_()


# -- variants ----------------------------------------------------------------------------------------------------

VARIED = [(task, designs) for task in EXERCISES.values() for designs in variants(task)]


@pytest.mark.parametrize(("task", "designs"), VARIED, ids=["-".join([t.name, *(d.id for d in ds)]) for t, ds in VARIED])
def test_a_variant_asks_for_something_else_and_its_answer_passes(task, designs):
    asked = with_designs(task, designs)
    for number in (0, 5):
        flags = {name: value for design in designs for name, value in design.flags.items()}
        right = judge(asked, lambda *inputs, f=flags: task.reference(*inputs, **f), number)
        assert all(point.passed for point in right.points[:-1]), right
        wrong = judge(asked, task.reference, number)
        assert not wrong.passed
        assert wrong.mistakes == ("as_glm45",), wrong
    assert all(design.asks in asked.brief for design in designs)


def test_a_term_always_asks_for_the_same():
    asked = [variant(EXERCISES["router"], term).brief for term in ("spec-7", "spec-7", "spec-8", "spec-9", "spec-10")]
    assert asked[0] == asked[1]
    assert len(set(asked)) > 2
    report = check("router", EXERCISES["router"].reference, term="spec-7")
    assert report.mistakes == ("as_glm45",)
