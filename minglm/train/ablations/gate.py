"""A softmax gate in place of GLM-4.5's sigmoids, to compare them.

With sigmoids every expert scores a token by itself; with a softmax the scores of all E experts add up to one. All else
is the router's: the bias decides who is picked, the unbiased scores of the picked ones are normalised and scaled.
"""

from typing import Any

import numpy as np

from minglm.config import Config
from minglm.model.ops import Array, Ops, Tap, no_tap, softmax, softmax_bwd
from minglm.model.params import Router
from minglm.model.router import RouterSaved, Routing, _keep_best_groups, _normalise, _normalise_bwd


class SoftmaxGate:
    """The operations of `base`, NumPy's or the fast ones, but for the router's."""

    def __init__(self, base: Ops):
        self._base = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def router(
        self, x: Array, params: Router, config: Config, tap: Tap = no_tap, ops: Any = None
    ) -> tuple[Routing, RouterSaved]:  # [N, D] -> [N, K] ×2
        """The steps of `minglm.model.router.router`."""
        logits = tap("router_logits", self._base.linear(x, params.weight))  # [N, D] -> [N, E]
        # 1. the experts share out one token's attention among them
        scores = tap("router_scores", softmax(logits))
        # 2. the bias decides who is picked …
        biased = tap("biased_scores", _keep_best_groups(scores + params.e_score_correction_bias, config))
        order = np.argsort(-biased, axis=-1, kind="stable")
        indices = tap("expert_indices", order[:, : config.num_experts_per_tok])  # -> [N, K]
        # 3. … and has no say in how loud they speak
        picked = np.take_along_axis(scores, indices, axis=-1)  # -> [N, K]
        weights = tap("expert_weights", _normalise(picked, config))
        routing = Routing(indices, weights)
        return routing, RouterSaved(x, scores, routing)

    def router_bwd(
        self,
        dweights: Array,
        saved: RouterSaved,
        params: Router,
        config: Config,
        dscores: Array | None = None,
        ops: Any = None,
    ) -> tuple[Array, Router]:  # [N, K] -> [N, D], the record
        """As `minglm.model.router.router_bwd`, with dlogits = s · (ds − Σ ds · s): an expert that was not picked gets a
        gradient too, unless the weights are normalised, where what it takes from the picked ones cancels out."""
        x, scores, routing = saved
        # 3. weights = normalise(scores at the picked experts)
        picked = np.take_along_axis(scores, routing.indices, axis=-1)
        dscores_all = np.zeros_like(scores) if dscores is None else dscores.copy()
        dscores_all[np.arange(len(x))[:, None], routing.indices] += _normalise_bwd(dweights, picked, config)
        # 2. the choice has no gradient
        # 1. scores = softmax(logits)
        dx, dweight, _ = self._base.linear_bwd(softmax_bwd(dscores_all, scores), x, params.weight)
        return dx, Router(dweight, np.zeros_like(params.e_score_correction_bias))
