"""Muon: the polynomial on singular values, the size of a step, who moves what, and the kernel against the book."""

import math

import ml_dtypes
import numpy as np
import pytest

from minglm.api import Model
from minglm.fast.ops import FastOps
from minglm.fast.team import cores
from minglm.formats.tensors import write_tensors
from minglm.model.loss import loss_and_grads, shift_targets
from minglm.model.params import map_arrays, walk_stacked
from minglm.train import muon
from minglm.train.muon import COEFFICIENTS, TINY, Muon, newton_schulz, step_length
from minglm.train.optim import AdamW, clip, decays
from tests.helpers import assert_all_differ, difference, mutated
from tests.variants import MICRO, random_params

RATES = 0.01, 0.03, 0.02
OPTIONS = {"weight_decay": 0.3, "momentum": 0.8, "betas": (0.7, 0.9)}
THREADS = sorted({1, 2, cores()} & set(range(1, cores() + 1)))
SHAPES = [(1, 1), (1, 50), (50, 1), (7, 7), (13, 70), (70, 13), (33, 34), (96, 192), (3, 8, 21), (2, 21, 8)]


def normal(*shape, seed=0, dtype=np.float64):
    return np.random.RandomState(seed).standard_normal(shape).astype(dtype)


def p5(s):
    """The quintic five times, on singular values."""
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def by_svd(x):
    """`newton_schulz` of one matrix the long way: take the singular values out, move them, put them back."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return u @ np.diag(p5(s / np.linalg.norm(x))) @ vt


def widely_spread(rows, cols, seed=0):
    """A matrix whose singular values go from 1 to 0.0001."""
    u, _, vt = np.linalg.svd(normal(rows, cols, seed=seed), full_matrices=False)
    return u @ np.diag(np.logspace(0, -4, min(rows, cols))) @ vt


# -- the orthogonalisation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (9, 9), (40, 41), (1, 6), (6, 1)])
@pytest.mark.parametrize("make", [normal, widely_spread])
def test_it_moves_the_singular_values_and_nothing_else(shape, make):
    x = 3.7 * make(*shape)
    assert difference(newton_schulz(x), by_svd(x)) < 1e-10


def test_a_diagonal_shows_what_becomes_of_each_value():
    found = newton_schulz(np.diag([1, 0.1, 0.01, 0.001]))
    assert np.diag(found).round(2).tolist() == [0.7, 0.71, 0.7, 0.47]  # 0.001 is below the reach of five steps
    assert not (found - np.diag(np.diag(found))).any()


def test_experts_are_orthogonalised_one_by_one():
    stack = normal(2, 3, 12, 5) * np.array([1, 0.01, 100]).reshape(3, 1, 1)
    one_by_one = [[newton_schulz(x) for x in row] for row in stack]
    assert difference(newton_schulz(stack), one_by_one) < 1e-13
    assert difference(newton_schulz(stack.reshape(-1, 5)).reshape(stack.shape), one_by_one) > 0.1  # not as one matrix


def test_size_does_not_matter_until_there_is_nothing_left():
    x = normal(6, 9)
    assert difference(newton_schulz(1e-6 * x), newton_schulz(1e4 * x)) < 1e-12
    assert not newton_schulz(0 * x).any()
    assert np.abs(newton_schulz(1e-14 * x)).max() < 1e-3  # less than TINY: rounding, not a direction


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_and_steps(dtype):
    x = normal(2, 5, 3, dtype=dtype)
    assert newton_schulz(x).dtype == dtype
    assert newton_schulz(x).shape == x.shape
    size = np.linalg.norm(x, axis=(1, 2), keepdims=True)
    assert difference(newton_schulz(x, steps=0), x / size) < 1e-6


@pytest.mark.parametrize("shape", [(96, 192), (192, 96), (64, 64), (192, 192), (384, 96), (1024, 192), (8, 24)])
def test_the_rms_of_an_update_is_near_a_fifth_of_the_rate(shape):
    update = step_length(shape) * newton_schulz(normal(*shape))
    assert 0.15 < math.sqrt((update**2).mean()) < 0.21
    assert step_length((5000, *shape)) == step_length(shape)  # however many experts there are


def test_mutations_of_newton_schulz_are_seen():
    inputs = [widely_spread(12, 5), widely_spread(5, 12, seed=1)]
    wrong = {
        "b and c exchanged": ("a, b, c = COEFFICIENTS", "a, c, b = COEFFICIENTS"),
        "cubic": ("a, b, c = COEFFICIENTS", "a, b, c = 1.5, -0.5, 0"),
        "largest entry for the norm": ("np.linalg.norm(wide, axis=(-2, -1), keepdims=True)", "np.abs(wide).max()"),
        "square by entries": ("gram @ gram", "gram * gram"),
        "one step fewer": ("range(steps)", "range(steps - 1)"),
        "tall not turned back": ("return y.mT if tall else y", "return y"),
    }
    for x in inputs:
        with np.errstate(all="ignore"):
            found = {name: mutated(newton_schulz, *change)(x) for name, change in wrong.items()}
        if x.shape[0] < x.shape[1]:
            del found["tall not turned back"]
        assert_all_differ({n: np.nan_to_num(f, posinf=9, neginf=9) for n, f in found.items()}, by_svd(x))


# -- the optimiser -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_ends", [False, True])
def test_who_moves_what(own_ends):
    params = random_params(MICRO, 0, np.float32, own_ends)
    shapes = {name: a.shape for name, a in walk_stacked(params)}
    turned = {name for name in shapes if Muon.start(params).turns(name)}
    heads = {"lm_head.weight"} | {n for n in shapes if n.endswith("shared_head.head.weight")}
    assert len(heads) == 1 + 2 * own_ends
    assert heads < turned
    for name in ("mlp.gate.weight", "mlp.experts.*.down_proj.weight", "self_attn.k_proj.weight"):
        assert f"model.layers.1.{name}" in turned
    assert "model.layers.3.eh_proj.weight" in turned
    assert set(shapes) - turned == {n for n in shapes if len(shapes[n]) == 1 or "embed_tokens" in n}
    assert {name for name in shapes if Muon.start(params, head="adamw").turns(name)} == turned - heads
    with pytest.raises(AssertionError, match="sgd"):
        Muon.start(params, head="sgd")


def reference(params, gradients, rates, head="muon"):
    """Muon and AdamW written out for named arrays, one matrix at a time; nothing of `minglm.train`."""
    adamw, b, decay = {}, 0.8, 0.3
    now = {name: a.copy() for name, a in walk_stacked(params)}
    means = {name: np.zeros_like(a) for name, a in now.items()}
    for step, (grads, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        for name, g in walk_stacked(grads):
            if name.endswith("e_score_correction_bias"):
                continue
            by_adamw = g.ndim == 1 or "embed_tokens" in name
            if by_adamw or ("head" in name and head == "adamw"):
                m, v = adamw.get(name, (0, 0))
                m, v = adamw[name] = 0.7 * m + 0.3 * g, 0.9 * v + 0.1 * g * g
                direction = m / (1 - 0.7**step) / (np.sqrt(v / (1 - 0.9**step)) + 1e-8)
                now[name] *= 1 if by_adamw else 1 - rate * decay
                now[name] -= rate * direction
            else:
                means[name] += 0.2 * (g - means[name])
                ahead = g + b * (means[name] - g)
                for at in np.ndindex(g.shape[:-2]):
                    scale = 0.2 * max(g.shape[-2:]) ** 0.5
                    now[name][at] = (1 - rate * decay) * now[name][at] - rate * scale * by_svd(ahead[at])
    return now


@pytest.mark.parametrize("head", ["muon", "adamw"])
def test_several_steps_are_the_written_out_ones(head):
    params = random_params(MICRO, 1, np.float64, mtp_own_ends=True)
    gradients, rates = (
        [random_params(MICRO, seed, np.float64, mtp_own_ends=True) for seed in (2, 3, 4)],
        (0.01, 0.03, 0.02),
    )
    before = [a.tobytes() for _, a in walk_stacked(params)]
    moved, optimiser = params, Muon.start(params, head=head, **OPTIONS)
    for grads, rate in zip(gradients, rates, strict=True):
        moved, optimiser = optimiser.update(moved, grads, rate)
    assert optimiser.step == 3
    wanted = reference(params, gradients, rates, head)
    assert max(difference(a, wanted[name]) for name, a in walk_stacked(moved)) < 1e-10
    assert [a.tobytes() for _, a in walk_stacked(params)] == before  # nothing in place


def test_mutations_of_the_update_are_seen(monkeypatch):
    params, *gradients = (random_params(MICRO, seed, np.float64) for seed in (1, 2, 3))
    wanted = reference(params, gradients, RATES[:2])

    def worst(**changes):
        for name, value in changes.items():
            monkeypatch.setattr(muon, name, value)
        moved, optimiser = params, Muon.start(params, **OPTIONS)
        for grads, rate in zip(gradients, RATES[:2], strict=True):
            moved, optimiser = optimiser.update(moved, grads, rate)
        monkeypatch.undo()
        return max(difference(a, wanted[name]) for name, a in walk_stacked(moved))

    flat = lambda x, steps: newton_schulz(x.reshape(-1, x.shape[-1]), steps).reshape(x.shape)  # noqa: E731
    assert worst() < 1e-10
    for wrong in (
        {"newton_schulz": flat},
        {"step_length": lambda shape: 0.2 * math.sqrt(min(shape[-2:]))},
        {"step_length": lambda shape: 0.2 * math.sqrt(shape[-1])},
        {"COEFFICIENTS": (2.0315, -4.7750, 3.4445)},
        {"decays": lambda name: decays(name) and "gate.weight" not in name},
    ):
        assert worst(**wrong) > 1e-4, wrong


def test_without_gradient_matrices_decay_and_the_rest_stays():
    params = random_params(MICRO, 1, np.float64)
    zeros = map_arrays(lambda name, a: 0 * a, params)
    moved, _ = Muon.start(params, weight_decay=0.3).update(params, zeros, 0.1)
    before = dict(walk_stacked(params))
    for name, a in walk_stacked(moved):
        assert difference(a, before[name] * (0.97 if decays(name) else 1)) < 1e-15


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_what_is_saved_continues_with_the_same_bits(kind, tmp_path):
    from safetensors.numpy import load_file

    params, grads = random_params(MICRO, 1, np.float32), random_params(MICRO, 2, np.float32)
    params, optimiser = kind.start(params, weight_decay=0.2).update(params, grads, 0.01)
    write_tensors(tmp_path / "optimiser.safetensors", dict(optimiser.walk()))
    arrays = load_file(tmp_path / "optimiser.safetensors")
    again = kind.restore(params, arrays, optimiser.step, weight_decay=0.2)
    assert [a.tobytes() for _, a in again.walk()] == [a.tobytes() for _, a in optimiser.walk()]
    pairs = zip(optimiser.update(params, grads, 0.01), again.update(params, grads, 0.01), strict=True)
    (wanted, one), (found, other) = zip(*pairs, strict=True)
    assert one.step == other.step == 2
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(walk_stacked(wanted), walk_stacked(found), strict=True))


def test_means_of_squares_cost_nothing_where_muon_moves():
    params = random_params(MICRO, 1, np.float32)
    second = dict(walk_stacked(Muon.start(params).second))
    assert all((a.size == 0) == Muon.start(params).turns(name) for name, a in second.items())


def test_the_moments_of_another_optimiser_are_refused():
    params = random_params(MICRO, 1, np.float32)
    by_adamw, by_muon = (dict(kind.start(params).walk()) for kind in (AdamW, Muon))
    for kind, arrays in ((AdamW, by_muon), (Muon, by_adamw)):
        with pytest.raises(ValueError, match=r"second\.\S+ has shape .* saved by another optimiser"):
            kind.restore(params, arrays, 1)
    with pytest.raises(ValueError, match=r"second\.lm_head\.weight has shape \(0, 20\), not \(61, 20\)"):
        Muon.restore(params, by_muon, 1, head="adamw")
    with pytest.raises(KeyError, match="first"):
        Muon.restore(params, {}, 1)


# -- the kernel --------------------------------------------------------------------------------------------------


def kernel_step(matrices, threads=THREADS[-1], clip=1.0, momentum=0.9, kept=0.99):
    FastOps(threads).muon(matrices, clip, momentum, kept, COEFFICIENTS, TINY, 5)


def float32_matrices(shapes=SHAPES):
    """Weight, gradient, running mean, length: gradients of very different size, and one of no size."""
    f = np.float32
    found = [
        (normal(*s, seed=i, dtype=f), f(10.0 ** (i % 7 - 4)) * normal(*s, seed=50 + i, dtype=f), 0, 0.1 * i)
        for i, s in enumerate(shapes)
    ]
    found = [(p, g, g.std() * normal(*g.shape, seed=99, dtype=f), length) for p, g, _, length in found]
    return [*found, (normal(9, 4, dtype=f), np.zeros((9, 4), f), np.zeros((9, 4), f), 1.0)]


def low_rank(rows, cols, rank):
    return (normal(rows, rank) @ normal(rank, cols, seed=1)).astype(np.float32)


def test_the_kernel_is_the_book():
    """Against the book in float64. Singular values below float32's rounding can become 485 times as large as they are
    (3.4445⁵); measured: 5e-6 of the largest entry."""
    matrices = float32_matrices()
    before = [(p.astype(float), g.astype(float), m.astype(float)) for p, g, m, _ in matrices]
    kernel_step(matrices, clip=0.37)
    for (p, g, m), (found, gradient, mean, length) in zip(before, matrices, strict=True):
        wanted_mean = 0.9 * m + 0.1 * 0.37 * g
        step = length * newton_schulz(0.9 * wanted_mean + 0.1 * 0.37 * g)
        assert not g.any() or difference(mean, wanted_mean) <= 1e-6
        assert np.abs(found - (0.99 * p - step)).max() <= 1e-5 * max(np.abs(step).max(), 1)
        assert np.array_equal(gradient, g)


@pytest.mark.parametrize("shape", [(96, 192), (192, 96), (60, 60)])
@pytest.mark.parametrize("rank", [1, 5])
def test_a_gradient_of_low_rank(shape, rank):
    """What an expert gets that was picked by few tokens. The other singular values are rounding, which five steps
    blow up; measured: 2e-4 of the largest entry, for the book in float32 too."""
    g = low_rank(*shape, rank)
    p, m = np.zeros_like(g), np.zeros_like(g)
    kernel_step([(p, g, m, -1.0)], momentum=0.0)
    assert difference(p, newton_schulz(g.astype(float))) <= 5e-4


@pytest.mark.parametrize("shape", [(96, 192), (192, 96)])
def test_two_matrices_of_one_kernel_call_are_two_calls(shape):
    stack, alone = normal(3, *shape, dtype=np.float32), normal(3, *shape, dtype=np.float32)
    g, m = normal(3, *shape, seed=1, dtype=np.float32), np.zeros((3, *shape), np.float32)
    kernel_step([(stack, g, m.copy(), 0.5)])
    for e in range(3):
        kernel_step([(alone[e], g[e], m[e], 0.5)])
    assert np.array_equal(stack, alone)


def test_the_kernels_bits_do_not_depend_on_threads_nor_on_used_buffers():
    def result(ops):
        matrices = float32_matrices()
        for _ in range(2):
            ops.muon(matrices, 0.5, 0.9, 0.99, COEFFICIENTS, TINY, 5)
        return [a.tobytes() for p, _, m, _ in matrices for a in (p, m)]

    first = result(FastOps(1))
    for threads in [*THREADS, THREADS[-1]]:
        ops = FastOps(threads)
        assert result(ops) == first
        assert result(ops) == first


@pytest.mark.parametrize("head", ["muon", "adamw"])
def test_steps_in_place_are_the_books(head):
    """With the model's own gradients, which come from the fast operations, clipped."""
    ops, ids = FastOps(THREADS[-1]), np.random.RandomState(5).randint(0, MICRO.vocab_size, (2, 11))
    params = random_params(MICRO, 1, np.float32)
    there, fast = map_arrays(lambda name, a: a.copy(), params), Muon.start(params, head=head, **OPTIONS)
    here, book = params, Muon.start(params, head=head, **OPTIONS)
    for _ in range(3):
        _, grads = loss_and_grads(ids, shift_targets(ids), there, MICRO, 0.3, 0.1, ops=ops)
        here, book = book.update(here, clip(grads, 4.0, 1.0), 0.01)
        fast = fast.update_in_place(there, grads, 0.01, 0.25, ops)
    assert fast.step == book.step == 3
    start, wanted = dict(walk_stacked(params)), dict(walk_stacked(here))
    for name, a in walk_stacked(there):
        assert np.abs(a - wanted[name]).max() <= 2e-4 * max(np.abs(wanted[name] - start[name]).max(), 1e-3), name
    for (name, a), (_, b) in zip(fast.walk(), book.walk(), strict=True):
        assert not b.any() or difference(a, b) < 1e-5, name


def test_what_the_kernel_cannot_write_to_is_refused():
    p, g, m = (normal(5, 8, seed=i, dtype=np.float32) for i in range(3))
    fits = [(p.T, g.T, m.T), (p, g[:, :7], m), (p, g, m.astype(float)), (p.astype(ml_dtypes.bfloat16), g, m)]
    for wrong in fits:
        with pytest.raises(ValueError, match="want contiguous float32 weights of shape"):
            kernel_step([(*wrong, 0.1)])
    p.flags.writeable = False
    with pytest.raises(ValueError, match="can be written to"):
        kernel_step([(p, g, m, 0.1)])
    kernel_step([])


def test_it_learns_a_text_by_heart():
    """Thirty steps of the fast one at AdamW's rate."""
    ids, params = np.random.RandomState(5).randint(0, MICRO.vocab_size, (2, 11)), random_params(MICRO, 1, np.float32)
    ops, optimiser = FastOps(1), Muon.start(params)
    losses = []
    for _ in range(30):
        loss, grads = loss_and_grads(ids, shift_targets(ids), params, MICRO, ops=ops)
        losses.append(float(loss.main))
        optimiser = optimiser.update_in_place(params, grads, 0.02, 1.0, ops)
    assert losses[-1] < 0.5 * losses[0], losses
    assert Model(MICRO, params).forward(ids).logits.dtype == np.float32
