"""Eight mistakes that others really made with this architecture, each planted in a model: symptoms to be explained.

`patient(number, model)` is the model with one of them; `minglm.look.diff.diff` finds the step, `CASES[number - 1]`
tells what was planted. Six are in the code (`Patient.ops`), one is in the config, one in the weights. The routers here
have one group of experts, as GLM-4.5's.
"""

import inspect
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minglm.config import Config
from minglm.look.diff import Diff, diff, ops_with
from minglm.model import ops as numpy_ops
from minglm.model.ops import Array, Ops, Sight, Tap, no_tap, softmax
from minglm.model.params import Params, Router
from minglm.model.router import RouterSaved, Routing

if TYPE_CHECKING:
    from minglm.api import Model

# -- where tokens stand, and who reads whom ----------------------------------------------------------------------


def neighbours(x: Array, cos: Array, sin: Array) -> Array:  # [B, T, heads, d] -> [B, T, heads, d]
    r, y = 2 * cos.shape[-1], x.copy()
    cos, sin = cos[:, :, None], sin[:, :, None]
    y[..., 0:r:2] = x[..., 0:r:2] * cos - x[..., 1:r:2] * sin
    y[..., 1:r:2] = x[..., 1:r:2] * cos + x[..., 0:r:2] * sin
    return y


def tiled(q: Array, k: Array, v: Array, sight: Sight, tap: Tap = no_tap) -> Any:  # -> [B, T, H, d]
    H, G = q.shape[2], k.shape[2]
    reads = np.arange(H) % G
    return numpy_ops.attend(q, k[:, :, reads], v[:, :, reads], sight, tap)


def norm_late() -> Ops:
    """The queries' and the keys' norm wait here until the rotation is done."""
    waiting: deque[tuple[Array, float]] = deque(maxlen=2)

    def rms_norm(x: Array, weight: Array, eps: float) -> Array:
        if x.ndim < 4:  # not a head
            return numpy_ops.rms_norm(x, weight, eps)
        waiting.append((weight, eps))
        return x

    def rope(x: Array, cos: Array, sin: Array) -> Array:
        return numpy_ops.rms_norm(numpy_ops.rope(x, cos, sin), *waiting.popleft())

    return ops_with(rms_norm=rms_norm, rope=rope)


# -- who is picked, and how loud ---------------------------------------------------------------------------------


def softmax_gate(
    x: Array, params: Router, config: Config, tap: Tap = no_tap, ops: Ops = numpy_ops
) -> tuple[Routing, RouterSaved]:  # [N, D] -> [N, K] ×2
    logits = tap("router_logits", ops.linear(x, params.weight))
    scores = tap("router_scores", softmax(logits))
    biased = tap("biased_scores", scores + params.e_score_correction_bias)
    order = np.argsort(-biased, axis=-1, kind="stable")
    indices = tap("expert_indices", order[:, : config.num_experts_per_tok])
    return _weighed(x, scores, scores, indices, config, tap)


def bias_weighed(
    x: Array, params: Router, config: Config, tap: Tap = no_tap, ops: Ops = numpy_ops
) -> tuple[Routing, RouterSaved]:  # [N, D] -> [N, K] ×2
    logits = tap("router_logits", ops.linear(x, params.weight))
    scores = tap("router_scores", numpy_ops.sigmoid(logits))
    biased = tap("biased_scores", scores + params.e_score_correction_bias)
    order = np.argsort(-biased, axis=-1, kind="stable")
    indices = tap("expert_indices", order[:, : config.num_experts_per_tok])
    return _weighed(x, scores, biased, indices, config, tap)


def _weighed(
    x: Array, scores: Array, loudness: Array, indices: Array, config: Config, tap: Tap
) -> tuple[Routing, RouterSaved]:
    picked = np.take_along_axis(loudness, indices, axis=-1)
    weights = picked / picked.sum(axis=-1, keepdims=True) * config.routed_scaling_factor
    routing = Routing(indices, tap("expert_weights", weights))
    return routing, RouterSaved(x, scores, routing)


def all_scaled(config: Config) -> Callable[..., Array]:
    """The addition of the shared expert's rows [N, D]; the residual stream [B, T, D] is added as it should be."""

    def add(x: Array, *others: Array) -> Array:
        factor = config.routed_scaling_factor if x.ndim == 2 else 1
        return numpy_ops.add(x, *(other * x.dtype.type(factor) for other in others))

    return add


# -- what no code shows ------------------------------------------------------------------------------------------


def swapped_halves(params: Params) -> Params:
    """The columns of each eh_proj as for [state, token], where the layer joins [token, state]."""

    def swapped(weight: Array) -> Array:
        token, state = np.split(weight, 2, axis=-1)
        return np.concatenate([state, token], axis=-1)

    layers = (m._replace(eh_proj=m.eh_proj._replace(weight=swapped(m.eh_proj.weight))) for m in params.mtp)
    return params._replace(mtp=tuple(layers))


# -- the cases ---------------------------------------------------------------------------------------------------


class Patient(NamedTuple):
    """A model with a mistake: `model.forward(ids, ops=ops)` makes it."""

    model: "Model"
    ops: Ops


class Case(NamedTuple):
    """One mistake. `step`: the first that differs in layers of its kind, a layer's number as `*`; "" if no step of the
    forward pass shows it."""

    name: str
    step: str
    wrong: str
    right: str
    seen: str  # where others made it
    make: Callable[["Model"], Patient]
    code: Any  # the function that holds the mistake; None: see `wrong`

    @property
    def source(self) -> str:
        """The text of the function that holds the mistake, or what it would be."""
        return self.wrong if self.code is None else inspect.getsource(self.code)


def patient(number: int, model: "Model") -> Patient:
    """Case `number`, 1 … 8, planted in a model. Raises ValueError for another number."""
    if not 1 <= number <= len(CASES):
        raise ValueError(f"there is no case {number!r}; take 1 … {len(CASES)}")
    made, ops = CASES[number - 1].make(model)
    return Patient(_named(made, f"case {number}", made.config, made.params), ops)


def examine(number: int, model: "Model", prompt: Any, **options: Any) -> Diff:
    """The model and its case `number` step by step: `diff`, with its options."""
    ill, ops = patient(number, model)
    return diff(model, ill, prompt, ops_b=ops, **options)


def _named(model: "Model", name: str, config: Config, params: Params) -> "Model":
    return type(model)(config, params, model.tokenizer, model.chat_template, name)


def _with_ops(**functions: Callable[..., Any]) -> Callable[["Model"], Patient]:
    return lambda model: Patient(model, ops_with(**functions))


def _with_config(**changes: Any) -> Callable[["Model"], Patient]:
    return lambda model: Patient(_named(model, model.name, model.config.replace(**changes), model.params), numpy_ops)


def _with_params(change: Callable[[Params], Params]) -> Callable[["Model"], Patient]:
    return lambda model: Patient(_named(model, model.name, model.config, change(model.params)), numpy_ops)


CASES = (
    Case(
        name="neighbours",
        step="layers.*.self_attn.q_rope",
        wrong="rotates the pairs (2i, 2i + 1) of a head, as GLM-4 and GLM-5 do",
        right="GLM-4.5's pairs are half-split: (i, i + r/2) of the first r entries",
        seen="the commonest slip when code of an older GLM is taken over",
        make=_with_ops(rope=neighbours),
        code=neighbours,
    ),
    Case(
        name="softmax_gate",
        step="layers.*.mlp.router_scores",
        wrong="scores the experts by a softmax over all of them",
        right="a sigmoid for each expert by itself",
        seen="llama.cpp, issue 18980, on GLM-4.7-Flash",
        make=_with_ops(router=softmax_gate),
        code=softmax_gate,
    ),
    Case(
        name="eps",
        step="layers.*.input_layernorm",
        wrong="rms_norm_eps = 1e-6, the default of many libraries",
        right="1e-5, as config.json says",
        seen="any loader that leaves the field to its default",
        make=_with_config(rms_norm_eps=1e-6),
        code=None,
    ),
    Case(
        name="bias_weighed",
        step="layers.*.mlp.expert_weights",
        wrong="takes the weights from the biased scores",
        right="the bias decides who is picked; the weights come from the scores without it",
        seen="pinned by tests of mlx-swift-lm (463) and others",
        make=_with_ops(router=bias_weighed),
        code=bias_weighed,
    ),
    Case(
        name="tiled",
        step="layers.*.self_attn.scores",
        wrong="query head h reads key/value head h mod G",
        right="h // R: R consecutive query heads share a key/value head",
        seen="`tile` where `repeat` was meant: the arrays have the same shape",
        make=_with_ops(attend=tiled),
        code=tiled,
    ),
    Case(
        name="norm_late",
        step="layers.*.self_attn.q_norm",
        wrong="norms queries and keys after the rotation",
        right="norm first, then rotation: the norm's weight belongs to entries that have not been mixed",
        seen="other models do it in this order, and the shapes agree",
        make=lambda model: Patient(model, norm_late()),
        code=norm_late,
    ),
    Case(
        name="all_scaled",
        step="layers.*.mlp.out",
        wrong="multiplies the shared expert's answer by routed_scaling_factor, too",
        right="the factor is the routed experts' alone",
        seen="the factor dropped or applied twice: SGLang 8511 and 8402, GSM8K 0.965 to 0.745 on GLM-4.5",
        make=lambda model: Patient(model, ops_with(add=all_scaled(model.config))),
        code=all_scaled,
    ),
    Case(
        name="swapped_halves",
        step="",
        wrong="the MTP layer's eh_proj has its columns as for [state, token]",
        right="the token's embedding comes first: [token, state]",
        seen="engines where drafts are hardly ever accepted; the text is right all the same",
        make=_with_params(swapped_halves),
        code=swapped_halves,
    ),
)
"""Loud ones and quiet ones, in no order: a reader who counts on one would be helped by it."""
