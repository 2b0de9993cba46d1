"""Small models that between them use every switch, with weights that hide nothing.

A scaling factor of 1, a bias of 0 or a norm weight of 1 lets wrong code pass; none of these has one by default.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minglm.api import Model
from minglm.config import PRESETS, Config
from minglm.model.params import Params, build, is_norm

MICRO = PRESETS["micro"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 1.0}


class Variant(NamedTuple):
    config: Config
    mtp_own_ends: bool = False


VARIANTS: dict[str, Variant] = {
    "micro": Variant(MICRO),
    "air-like": Variant(MICRO.replace(use_qk_norm=False, n_group=1, topk_group=1, num_nextn_predict_layers=1)),
    "no-bias": Variant(MICRO.replace(attention_bias=False)),
    "unnormalised-weights": Variant(MICRO.replace(norm_topk_prob=False, routed_scaling_factor=0.7)),
    "tied": Variant(MICRO.replace(tie_word_embeddings=True)),
    "two-dense": Variant(MICRO.replace(first_k_dense_replace=2)),
    "no-dense": Variant(MICRO.replace(first_k_dense_replace=0, n_group=2, topk_group=1)),
    "all-dense": Variant(MICRO.replace(first_k_dense_replace=3)),
    "no-mtp": Variant(MICRO.replace(num_nextn_predict_layers=0)),
    "mtp-own-ends": Variant(MICRO.replace(num_nextn_predict_layers=1), mtp_own_ends=True),
    "rotate-all": Variant(MICRO.replace(partial_rotary_factor=1.0)),
    "rotate-quarter": Variant(MICRO.replace(partial_rotary_factor=0.25, head_dim=16)),
    "linear-rope": Variant(MICRO.replace(rope_scaling={"rope_type": "linear", "factor": 3.0})),
    "yarn": Variant(MICRO.replace(rope_scaling=YARN)),
    "yarn-mscale": Variant(MICRO.replace(rope_scaling={**YARN, "mscale": 0.7, "mscale_all_dim": 0.3}, head_dim=24)),
    "one-pick-of-two": Variant(MICRO.replace(n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1)),
    "one-kv-head": Variant(MICRO.replace(num_key_value_heads=1)),
    "all-kv-heads": Variant(MICRO.replace(num_key_value_heads=6, n_shared_experts=1)),
}


def random_params(
    config: Config = MICRO, seed: int = 0, dtype: type = np.float32, mtp_own_ends: bool = False
) -> Params:
    """Weights of order one everywhere: matrices 1/√in, norm weights around 1, biases and selection biases around 0.

    From RandomState, whose stream NumPy promises never to change: the committed oracles depend on it.
    """
    random = np.random.RandomState(seed)

    def make(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = random.standard_normal(shape)
        if is_norm(name):
            return (1 + 0.4 * noise).astype(dtype)
        if name.endswith("bias"):
            return (0.3 * noise).astype(dtype)
        if "embed_tokens" in name:
            return noise.astype(dtype)
        return (noise / shape[-1] ** 0.5).astype(dtype)

    return build(config, make, mtp_own_ends)


def random_ids(config: Config, seed: int, shape: tuple[int, int] = (2, 11)) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, config.vocab_size, shape)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """max |a − b| / max |b|: the error of an array, as the proof table defines it."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max()) if wanted.size else 0.0


def gradient_errors(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, float]:
    """Per tensor: max |a − b| / max(max |b|, a thousandth of the largest gradient of that kind of tensor).

    Some gradients (the gate's with one normalised pick) are rounding noise around zero; the kind's largest says what
    zero means. Every gradient must be in both, the selection biases' aside: torch has none, ours are zero.
    """
    biases = {name for name in found if name.endswith("e_score_correction_bias")}
    assert found.keys() - biases == wanted.keys()
    assert all(not found[name].any() for name in biases)
    largest: dict[str, float] = {}
    for name, array in wanted.items():
        largest[_kind(name)] = max(largest.get(_kind(name), 0.0), float(np.abs(array).max()))
    errors = {}
    for name, array in wanted.items():
        scale = max(float(np.abs(array).max()), 1e-3 * largest[_kind(name)])
        errors[name] = float(np.abs(found[name] - array).max()) / scale if scale else float(np.abs(found[name]).max())
    return errors


def _kind(name: str) -> str:
    """The name without its layer and expert numbers."""
    return re.sub(r"\d+", "#", name)


def same_experts(ours: np.ndarray, theirs: np.ndarray, biased: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per token: whether both picked the same set, and whether the choice is clear (margin above 1e-6)."""
    K = ours.shape[1]
    ranked = -np.sort(-biased, axis=-1)
    if K < biased.shape[1]:
        clear = ~(ranked[:, K - 1] - ranked[:, K] <= 1e-6)  # closed groups: −∞ − −∞ is clear too
    else:
        clear = np.ones(len(ours), bool)
    return (np.sort(ours, axis=-1) == np.sort(theirs, axis=-1)).all(axis=-1), clear


def picks(model: Model, ids: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Of every router, MTP layers included: the experts picked [N, K] and the biased scores [N, E]."""
    seen: dict[str, np.ndarray] = {}

    def note(name: str, array: np.ndarray) -> None:
        seen[name] = array.copy()

    model.forward(ids, tap=note)
    if model.params.mtp:
        model.mtp(ids, depth=len(model.params.mtp), tap=note)
    layers = [int(name.split(".")[1]) for name in seen if name.endswith("expert_indices")]
    at = "layers.{}.mlp.{}".format
    return {i: (seen[at(i, "expert_indices")], seen[at(i, "biased_scores")]) for i in layers}


# -- committed oracles -------------------------------------------------------------------------------------------

ORACLES = Path(__file__).parent / "oracles"
MTP_WEIGHT, BALANCE_WEIGHT = 0.3, 0.1


def pack_gradients(grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All gradients in one int16 array, each as a fraction of its largest entry."""
    names = sorted(grads)
    largest = np.array([np.abs(grads[n]).max() for n in names], np.float32)
    parts = [
        np.round(grads[n] / (m or 1) * 32767).astype(np.int16).reshape(-1) for n, m in zip(names, largest, strict=True)
    ]
    return {"grad_names": np.array(names), "grad_largest": largest, "grad_fractions": np.concatenate(parts)}


def unpack_gradients(packed: dict[str, np.ndarray], like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The gradients again, shaped like our own of the same names."""
    grads, at = {}, 0
    for name, largest in zip(packed["grad_names"], packed["grad_largest"], strict=True):
        size = like[name].size
        grads[str(name)] = (packed["grad_fractions"][at : at + size] / 32767 * largest).reshape(like[name].shape)
        at += size
    assert at == packed["grad_fractions"].size
    return grads
