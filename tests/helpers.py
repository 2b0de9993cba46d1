"""What the tests share: random weights, comparisons, mutation, and naive twins of the model's parts.

The twins are the slow, obvious loops: one token, one head, one expert at a time, in float64, from the formulas.
They share no code with minglm.
"""

import inspect
import math
import textwrap
import types
import warnings
from contextlib import contextmanager

import numpy as np

from minglm.config import Config
from minglm.model import ops
from minglm.model.ops import Sight
from minglm.model.params import map_record
from tests import variants

MICRO = variants.MICRO


def random_state(seed):
    """numpy.random.RandomState: its stream is frozen, so the numbers are the same under every NumPy version."""
    return np.random.RandomState(seed)


def random_params(config: Config, seed: int, dtype=np.float64, mtp_own_ends: bool = False):
    """`variants.random_params`, in float64 unless asked otherwise."""
    return variants.random_params(config, seed, dtype, mtp_own_ends)


# -- records as dictionaries -------------------------------------------------------------------------------------


def flat(record) -> dict:
    """{name: array} of any parameter or gradient record (or of a bare array under the name "")."""
    found = {}

    def note(name, array):
        found[name.lstrip(".")] = array
        return array

    map_record(note, record)
    return found


def refilled(record, arrays: dict):
    """The same record with other arrays."""
    return map_record(lambda name, _: arrays[name.lstrip(".")], record)


# -- comparing ---------------------------------------------------------------------------------------------------


def difference(found, wanted) -> float:
    """max|a − b| / max|b|; infinite where shapes differ or anything is not a number."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return math.inf
    if found.size == 0:
        return 0.0
    return float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-300))


def assert_close(found, wanted, tolerance=1e-12):
    assert np.isfinite(wanted).all()
    assert difference(found, wanted) <= tolerance, f"differs by {difference(found, wanted):.2e}"


def assert_all_differ(wrong: dict, right, tolerance=1e-6):
    """Every wrong variant is further from the right answer than 1000 × the tolerance of a float32 comparison."""
    silent = [name for name, value in wrong.items() if difference(value, right) <= 1000 * tolerance]
    assert not silent, f"these inputs do not tell apart: {', '.join(silent)}"


def read_only(*arrays):
    """Copies that raise when written to."""
    copies = [np.array(a) for a in arrays]
    for copy in copies:
        copy.flags.writeable = False
    return copies


@contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# -- mutation ----------------------------------------------------------------------------------------------------


def mutated(function, old: str, new: str):
    """The function with one piece of its source replaced. The piece must stand there exactly once."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {function.__name__}, wanted once"
    scope = dict(function.__globals__)
    exec(source.replace(old, new), scope)
    return scope[function.__name__]


def causal(batch: int, count: int, keys: int | None = None) -> Sight:
    """`count` queries that are the last of so many keys, all of one segment."""
    keys = count if keys is None else keys
    slots = np.broadcast_to(np.arange(keys - count, keys), (batch, count))
    return Sight(slots, np.zeros((batch, count), int), np.zeros((batch, keys), int))


def with_visible(old: str, new: str):
    """The operations, with one piece of `visible_keys` replaced."""
    attend = mutated(ops.attend, "visible_keys(", "wrong_keys(")
    attend.__globals__["wrong_keys"] = mutated(ops.visible_keys, old, new)
    return swapped(ops, attend=attend)


def swapped(module, **functions):
    """A module-like namespace with some functions replaced: for the `ops` argument."""
    return types.SimpleNamespace(**{**vars(module), **functions})


# -- naive twins -------------------------------------------------------------------------------------------------


def naive_sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def naive_silu(z: float) -> float:
    return z * naive_sigmoid(z)


def naive_rms_norm(x, weight, eps):
    """One row at a time: x / √(mean(x²) + eps) · w."""
    y = np.zeros(x.shape)
    for at in np.ndindex(*x.shape[:-1]):
        root = math.sqrt(sum(v * v for v in x[at]) / len(x[at]) + eps)
        y[at] = [v / root * w for v, w in zip(x[at], weight, strict=True)]
    return y


def naive_softmax(row):
    top = max(row)
    exps = [math.exp(v - top) for v in row]
    return [e / sum(exps) for e in exps]


def naive_rope(x, positions, theta, rot):
    """x [T, heads, d]: pair (i, i + rot/2) of each head turns by position · theta^(−2i/rot)."""
    y = x.copy()
    for t, h in np.ndindex(*x.shape[:2]):
        for i in range(rot // 2):
            a, b = x[t, h, i], x[t, h, i + rot // 2]
            angle = positions[t] * theta ** (-2 * i / rot)
            y[t, h, i] = a * math.cos(angle) - b * math.sin(angle)
            y[t, h, i + rot // 2] = b * math.cos(angle) + a * math.sin(angle)
    return y


def naive_attend(q, k, v, sees=None):
    """q [T, H, d], k and v [S, G, d]. `sees(t, s)`: whether query t may look at key s; default causal, the queries
    being the last T of the S positions."""
    (T, H, d), (S, G, _) = q.shape, k.shape
    sees = sees or (lambda t, s: s <= t + S - T)
    y = np.zeros(q.shape)
    for t, h in np.ndindex(T, H):
        g = h // (H // G)
        keys = [s for s in range(S) if sees(t, s)]
        probs = naive_softmax([float(q[t, h] @ k[s, g]) / math.sqrt(d) for s in keys])
        y[t, h] = sum(p * v[s, g] for p, s in zip(probs, keys, strict=True))
    return y


def naive_mlp(x, gate_proj, up_proj, down_proj):
    """One token: x [D]."""
    gate, up = gate_proj @ x, up_proj @ x
    return down_proj @ np.array([naive_silu(g) * u for g, u in zip(gate, up, strict=True)])


def naive_route(x, weight, bias, config):
    """One token: {expert: weight}, best first."""
    scores = [naive_sigmoid(float(row @ x)) for row in weight]
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // config.n_group
    members = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
    value = [sum(sorted(biased[e] for e in group)[-2:]) for group in members]
    best_groups = sorted(range(config.n_group), key=lambda g: -value[g])[: config.topk_group]
    candidates = sorted((e for g in best_groups for e in members[g]), key=lambda e: -biased[e])
    chosen = candidates[: config.num_experts_per_tok]
    total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
    return {e: config.routed_scaling_factor * scores[e] / total for e in chosen}


def naive_moe(x, params, config):
    """One token: Σ weight · expert(x) + shared(x)."""
    chosen = naive_route(x, params.gate.weight, params.gate.e_score_correction_bias, config)
    y = sum(w * naive_mlp(x, *(matrix[e] for matrix in params.experts)) for e, w in chosen.items())
    shared = params.shared_experts
    return y if shared is None else y + naive_mlp(x, *(part.weight for part in shared))


def naive_attention(x, params, config, positions=None, sees=None):
    """One sequence: x [T, D]."""
    T, positions = len(x), range(len(x)) if positions is None else positions

    def project(linear):
        y = x @ linear.weight.T + (0 if linear.bias is None else linear.bias)
        return y.reshape(T, -1, config.head_dim)

    q, k, v = (project(p) for p in (params.q_proj, params.k_proj, params.v_proj))
    if params.q_norm is not None:
        q = naive_rms_norm(q, params.q_norm.weight, config.rms_norm_eps)
        k = naive_rms_norm(k, params.k_norm.weight, config.rms_norm_eps)
    q, k = (naive_rope(a, positions, config.rope_theta, config.rotary_dim) for a in (q, k))
    return naive_attend(q, k, v, sees).reshape(T, -1) @ params.o_proj.weight.T


def naive_layer(x, params, config, positions=None):
    """One sequence: x [T, D]."""
    eps = config.rms_norm_eps
    middle = x + naive_attention(
        naive_rms_norm(x, params.input_layernorm.weight, eps), params.self_attn, config, positions
    )
    normed = naive_rms_norm(middle, params.post_attention_layernorm.weight, eps)
    if hasattr(params.mlp, "experts"):
        return middle + np.stack([naive_moe(row, params.mlp, config) for row in normed])
    return middle + np.stack([naive_mlp(row, *(part.weight for part in params.mlp)) for row in normed])


def naive_hidden(ids, params, config):
    """One sequence: ids [T] -> [T, D] after the final norm."""
    x = params.embed_tokens.weight[np.asarray(ids)]
    for layer in params.layers:
        x = naive_layer(x, layer, config)
    return naive_rms_norm(x, params.norm.weight, config.rms_norm_eps)


def naive_mtp(hidden, next_ids, mtp, table, config):
    """One sequence, one depth: hidden [T, D], next_ids [T] -> [T, D] after shared_head.norm."""
    eps = config.rms_norm_eps
    token_part = naive_rms_norm(table[np.asarray(next_ids)], mtp.enorm.weight, eps)
    state_part = naive_rms_norm(hidden, mtp.hnorm.weight, eps)
    D = config.hidden_size
    x = token_part @ mtp.eh_proj.weight[:, :D].T + state_part @ mtp.eh_proj.weight[:, D:].T
    return naive_rms_norm(naive_layer(x, mtp.block, config), mtp.shared_head.norm.weight, eps)


def naive_cross_entropy(logits, targets):
    """Mean over the rows whose target is not −100; 0 if there is none."""
    losses = []
    for row, target in zip(logits, targets, strict=True):
        if target != -100:
            top = max(row)
            losses.append(top + math.log(sum(math.exp(z - top) for z in row)) - row[target])
    return sum(losses) / len(losses) if losses else 0.0
