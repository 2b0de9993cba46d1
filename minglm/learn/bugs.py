"""Eight bugs that others made in code for GLM-4.5 or models like it, each as a change to a model that is right.

Notebook 16 hunts them. Four are in operations, handed in by `Model.forward(ops=)`, as `minglm.look.diff.ops_with` makes
them; four are in the config or the weights, as a conversion gets them wrong. `BUGS` has them in the notebook's order,
without names that would give them away: the cases are numbers, what it was is in `Bug.is_called`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from minglm.api import Model
from minglm.config import Config
from minglm.look.diff import ops_with
from minglm.model import ops
from minglm.model.ops import Array, Ops, Sight, Tap, no_tap, softmax
from minglm.model.params import Params, Router, map_arrays
from minglm.model.router import RouterSaved, Routing


class Case(NamedTuple):
    """A model to be examined: run it with `case.model.forward(ids, ops=case.ops)`."""

    model: Model
    ops: Ops


class Bug(NamedTuple):
    is_called: str
    happened: str  # where it was seen
    step: str  # the end of the name of the first tap that is wrong
    make: Callable[[Model], Case]


# -- in operations -----------------------------------------------------------------------------------------------


def _neighbouring_pairs(x: Array, cos: Array, sin: Array) -> Array:  # [B, T, heads, d] -> the same
    """Turns entries (2i, 2i + 1) together; GLM-4.5 turns (i, i + r/2)."""
    r, y = 2 * cos.shape[-1], x.copy()
    cos, sin = cos[:, :, None], sin[:, :, None]
    even, odd = x[..., 0:r:2], x[..., 1:r:2]
    y[..., 0:r:2] = even * cos - odd * sin
    y[..., 1:r:2] = odd * cos + even * sin
    return y


def _every_other_head(q: Array, k: Array, v: Array, sight: Sight, tap: Tap = no_tap) -> Any:
    """Lets query head h read key/value head h mod G; it is h // R."""
    H, G = q.shape[2], k.shape[2]
    order = np.arange(H).reshape(-1, G).T.reshape(-1)  # the heads that read the same key, side by side
    back = np.argsort(order)
    kept = {}

    def in_place(name: str, array: Array) -> Array:
        axis = 1 if name in ("scores", "probs") else 2
        kept[name] = tap(name, np.take(array, back, axis))
        return np.take(kept[name], order, axis)

    heads, saved = ops.attend(q[:, :, order], k, v, sight, tap=in_place)
    return heads[:, :, back], saved


def _router(scores_of: Callable[[Array], Array], weigh_biased: bool) -> Callable[..., tuple[Routing, RouterSaved]]:
    """The book's router without groups, with another gate or with the wrong scores as weights."""

    def router(
        x: Array, params: Router, config: Config, tap: Tap = no_tap, ops: Ops = ops
    ) -> tuple[Routing, RouterSaved]:
        logits = tap("router_logits", ops.linear(x, params.weight))
        scores = tap("router_scores", scores_of(logits))
        biased = tap("biased_scores", scores + params.e_score_correction_bias)
        order = np.argsort(-biased, axis=-1, kind="stable")
        indices = tap("expert_indices", order[:, : config.num_experts_per_tok])
        picked = np.take_along_axis(biased if weigh_biased else scores, indices, axis=-1)
        weights = picked / picked.sum(axis=-1, keepdims=True) * config.routed_scaling_factor
        routing = Routing(indices, tap("expert_weights", weights))
        return routing, RouterSaved(x, scores, routing)

    return router


def _in_operations(**functions: Callable[..., Any]) -> Callable[[Model], Case]:
    return lambda model: Case(model, ops_with(**functions))


# -- in config and weights ---------------------------------------------------------------------------------------


def _in_config(**fields: Any) -> Callable[[Model], Case]:
    return lambda model: Case(_copy(model, replace(model.config, **fields), model.params), ops)


def _swapped(one: str, other: str) -> Callable[[Model], Case]:
    """Two tensors of each layer have changed places."""

    def make(model: Model) -> Case:
        arrays: dict[str, Array] = {}
        map_arrays(lambda name, array: arrays.setdefault(name, array), model.params)

        def moved(name: str, array: Array) -> Array:
            if one in name:
                return arrays[name.replace(one, other)]
            return arrays[name.replace(other, one)] if other in name else array

        return Case(_copy(model, model.config, map_arrays(moved, model.params)), ops)

    return make


def _copy(model: Model, config: Config, params: Params) -> Model:
    return Model(config, params, model.tokenizer, model.chat_template, "the case")


BUGS = (
    Bug(
        "the routed experts are not scaled: routed_scaling_factor is 1",
        "SGLang's first support of GLM-4.5 (sgl-project/sglang#8511)",
        "mlp.expert_weights",
        _in_config(routed_scaling_factor=1.0),
    ),
    Bug(
        "rotary positions turn neighbouring entries together",
        "ports that take the pairs of GPT-J for those of GPT-NeoX (ohdearquant/lattice#392)",
        "self_attn.q_rope",
        _in_operations(rope=_neighbouring_pairs),
    ),
    Bug(
        "the weights of the experts come from the biased scores",
        "several, GLM-4.5's own among them (vllm-project/vllm#12002, PaddlePaddle/PaddleFormers#3452)",
        "mlp.expert_weights",
        _in_operations(router=_router(ops.sigmoid, weigh_biased=True)),
    ),
    Bug(
        "gate_proj and up_proj of the experts have changed places",
        "what happens when a fused gate_up tensor is cut the wrong way round",
        "mlp.experts.*.gate",
        _swapped("experts.*.gate_proj", "experts.*.up_proj"),
    ),
    Bug(
        "query head h reads key/value head h mod G",
        "grouped attention by tiling (ekzhang/jax-js#180, onnx/onnx#7274)",
        "self_attn.scores",
        _in_operations(attend=_every_other_head),
    ),
    Bug(
        "the whole head is rotated: partial_rotary_factor is 1",
        "ml-explore/mlx-lm#1698, vllm-project/vllm#16904",
        "self_attn.q_rope",
        _in_config(partial_rotary_factor=1.0),
    ),
    Bug(
        "the gate is a softmax",
        "routers written for Mixtral or Qwen and used for GLM",
        "mlp.router_scores",
        _in_operations(router=_router(softmax, weigh_biased=False)),
    ),
    Bug(
        "rms_norm_eps is 1e-6 instead of 1e-5",
        "a default taken from another model",
        "input_layernorm",
        _in_config(rms_norm_eps=1e-6),
    ),
)


def case(number: int, model: Model) -> Case:
    """Case 1 … 8, made of a model that is right. Raises ValueError for another number."""
    if not 1 <= number <= len(BUGS):
        raise ValueError(f"there are cases 1 … {len(BUGS)}, not {number}")
    return BUGS[number - 1].make(model)
