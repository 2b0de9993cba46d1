"""The claims, and for each the models that answer it: the baseline with one change.

Quotes are from GLM-4.5's report (arXiv 2508.06471); the section stands behind each.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from minglm.config import Config
from minglm.model.ops import Ops
from minglm.model.params import Params, init_params, map_arrays
from minglm.train.ablations.gate import SoftmaxGate
from minglm.train.recipe import Recipe, load_recipe

# -- the baseline: every feature of GLM-4.5, small enough for a run of five minutes on two cores ------------------

STEPS = 600
BATCH, LENGTH = 16, 256  # rows of tokens a step
RATE = 8e-3  # peak, then a cosine to a tenth
ADAMW_RATE = 2e-3
# Chosen by the held-out loss of runs of 150 steps, one seed: Muon 4.34 at 4e-3, 4.05 at 8e-3, 4.05 at 16e-3; AdamW 5.01
# at 1e-3, 4.85 at 2e-3, 4.88 at 4e-3, 5.00 at 8e-3.
SIZES = {  # what differs from the preset glm-tiny
    "hidden_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "moe_intermediate_size": 64,
}


def baseline_recipe(steps: int = STEPS, seed: int = 0) -> Recipe:
    """glm-tiny's pre-training mixture at a constant batch size."""
    looks = max(1, -(-steps // 10))
    stage = replace(
        load_recipe("glm-tiny").stages[0],
        steps=steps,
        batch_size=BATCH,
        first_batch_size=None,
        ramp=0,
        sequence_length=LENGTH,
        learning_rate=RATE,
        final_rate=None,
        warmup=max(1, steps // 16),
    )
    recipe = Recipe("glm-tiny", (stage,), config=dict(SIZES), seed=seed)
    return replace(recipe, log_every=20, eval_every=looks, save_every=looks)


# -- variants ----------------------------------------------------------------------------------------------------


def same(given: Any) -> Any:
    return given


def unscaled_outputs(params: Params) -> Params:
    """Fresh weights as if o_proj and down_proj had been drawn like all others."""
    factor = (2 * len(params.layers)) ** 0.5
    outputs = ("o_proj.weight", "down_proj.weight")
    return map_arrays(lambda n, a: a * a.dtype.type(factor) if n.endswith(outputs) else a, params)


@dataclass(frozen=True)
class Variant:
    """The baseline with one change: to the config, the recipe, its stage, the fresh weights or the operations."""

    name: str
    label: str
    config: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)
    initial: Callable[[Params], Params] = same
    ops: Callable[[Ops], Ops] = same
    seeds: int | None = None  # at most so many
    equal_time: bool = False  # as many AdamW steps as take the time of the baseline's Muon steps

    def make_recipe(self, steps: int = STEPS, seed: int = 0, ratio: float = 1.0) -> Recipe:
        """`ratio`: seconds of a Muon step over those of an AdamW step."""
        steps = max(1, round(steps * ratio)) if self.equal_time else steps
        recipe = baseline_recipe(steps, seed)
        stages = (replace(recipe.stages[0], **self.stage),)
        return replace(recipe, stages=stages, config={**SIZES, **self.config}, **self.recipe)

    def make_params(self, config: Config, seed: int) -> Params:
        return self.initial(init_params(config, np.random.default_rng(seed)))


BASELINE = Variant("baseline", "baseline")
ADAMW = {"optimiser": "adamw"}

VARIANTS = {
    variant.name: variant
    for variant in (
        BASELINE,
        Variant("unbalanced", "no balancing", stage={"bias_rate": 0.0, "balance_weight": 0.0}),
        Variant("unscaled", "0.02, outputs unscaled", initial=unscaled_outputs),
        Variant("init-0.006", "0.006, outputs scaled", config={"initializer_range": 0.006}),
        Variant("adamw", "AdamW", recipe=ADAMW, stage={"learning_rate": ADAMW_RATE}),
        Variant(
            "adamw-time", "AdamW, equal time", recipe=ADAMW, stage={"learning_rate": ADAMW_RATE}, equal_time=True
        ),
        Variant("adamw-head", "AdamW for the head", recipe={"head_optimiser": "adamw"}),
        Variant("muon-rate", f"Muon, rate {RATE / 2:g}", stage={"learning_rate": RATE / 2}, seeds=1),
        Variant(
            "adamw-rate", f"AdamW, rate {ADAMW_RATE * 2:g}", recipe=ADAMW, stage={"learning_rate": ADAMW_RATE * 2},
            seeds=1,
        ),
        Variant("no-qk-norm", "no q/k norm", config={"use_qk_norm": False}),
        Variant("no-mtp", "no MTP loss", stage={"mtp_weight": 0.0}),
        Variant("kv-1", "1 key/value head", config={"num_key_value_heads": 1}),
        Variant("kv-4", "4 key/value heads (all)", config={"num_key_value_heads": 4}),
        Variant(
            "deep", "deep, narrow", config={"num_hidden_layers": 7, "hidden_size": 96, "intermediate_size": 576}
        ),
        Variant(
            "shallow", "shallow, wide", config={"num_hidden_layers": 3, "hidden_size": 192, "intermediate_size": 192}
        ),
        Variant(
            "no-shared", "no shared expert",
            config={"n_shared_experts": 0, "n_routed_experts": 17, "num_experts_per_tok": 3},
        ),
        Variant("softmax", "softmax gate", ops=SoftmaxGate),
    )
}  # fmt: skip


# -- measures and claims -----------------------------------------------------------------------------------------


class Measure(NamedTuple):
    key: str  # among the figures of a run
    label: str
    lower_is_better: bool
    digits: int = 3
    names: tuple[str, str] = ("better", "worse")


MEASURES = {
    measure.key: measure
    for measure in (
        Measure("loss", "loss", True, 4),
        Measure("tasks_loss", "loss on tasks", True, 4),
        Measure("max_violation", "MaxVio", True, 2, ("more even", "less even")),
        Measure("attention_logit", "largest logit", True, 1, ("smaller", "larger")),
        Measure("draft_agreement", "drafts agree", False, 3),
    )
}


class Claim(NamedTuple):
    key: str  # of its picture and of the commentary
    title: str
    said: str
    change: str
    variants: tuple[str, ...]
    measures: tuple[str, ...] = ("loss",)
    facts: tuple[str, ...] = ()  # what else to print of each model


CLAIMS = (
    Claim(
        "balance", "Loss-free balancing",
        "“We employ loss-free balance routing” (2.1); bias update rate 0.001, and a sequence-level balance loss of "
        "weight 0.0001 “to avoid extreme imbalance within any single sequence” (2.4)",
        "the selection bias stays at 0 and the balance loss has weight 0",
        ("unbalanced",), ("loss", "max_violation"),
    ),
    Claim(
        "init", "Initialisation",
        "nothing in the report; asked, the authors named GPT-2's rule: the projections that write into the residual "
        "stream are drawn smaller, by 1/√(2·layers)",
        "the same draw with those projections unscaled; or 0.006 for all, scaled",
        ("unscaled", "init-0.006"),
    ),
    Claim(
        "muon", "Muon",
        "“the Muon optimizer can accelerate convergence and tolerate larger batch sizes”, for all parameters except "
        "word embedding, bias, and weights for RMSNorm (2.4)",
        "AdamW for everything at equal tokens, and with as many steps as fit into the same time by the ratio of bare "
        "steps, timed in turns before (`timing.json`); AdamW for the head alone; another rate for each, one seed. "
        "Larger batches, the second half of the claim, are not tried",
        ("adamw", "adamw-time", "adamw-head", "muon-rate", "adamw-rate"), ("loss",), ("rate", "steps", "seconds"),
    ),
    Claim(
        "qk-norm", "q/k norm",
        "“We also incorporate QK-Norm to stabilize the range of attention logits” (2.1)",
        "no norm of queries and keys. Largest logit: the largest |q·k/√d| of all layers and heads on fixed "
        "held-out text",
        ("no-qk-norm",), ("loss", "attention_logit"),
    ),
    Claim(
        "mtp", "Multi-token prediction",
        "“we add an MoE layer as the MTP layer to support speculative decoding during inference” (2.1); MTP loss "
        "weight 0.3 (2.4)",
        "the MTP loss has weight 0; its layer stays as it was drawn, so its drafts are what chance gives. Drafts "
        "agree: share of held-out places, end tokens left out, where the MTP layer's best guess is the model's own",
        ("no-mtp",), ("loss", "draft_agreement"),
    ),
    Claim(
        "gqa", "Grouped-query attention",
        "“we employ Grouped-Query Attention with partial RoPE” (2.1): 96 query heads on 8 key/value heads",
        "4 query heads on 1, 2 (baseline) or 4 key/value heads",
        ("kv-1", "kv-4"), ("loss",), ("cache", "parameters"),
    ),
    Claim(
        "depth", "Depth",
        "“we reduce the width (hidden dimension and number of routed experts) of the model and increase its height "
        "(number of layers), as we found that deeper models exhibited better reasoning capacity” (2.1)",
        "7 layers of width 96 or 3 of width 192 for 5 of 128, with experts of the same kind and number, and the dense "
        "layer chosen so that active parameters are equal within 3 %. “Tasks” are what stands for reasoning here",
        ("deep", "shallow"), ("loss", "tasks_loss"), ("parameters", "seconds"),
    ),
    Claim(
        "shared", "Shared expert",
        "one shared expert in every MoE layer (table 1), without a reason given",
        "no shared expert; instead one routed expert more, and one more for each token, so that total and active "
        "parameters are the same",
        ("no-shared",), ("loss", "max_violation"), ("parameters",),
    ),
    Claim(
        "gate", "Sigmoid gate",
        "“We employ loss-free balance routing and sigmoid gates for MoE layers” (2.1)",
        "scores are a softmax over all experts; bias, choice, normalisation and scale as before",
        ("softmax",), ("loss", "max_violation"),
    ),
)  # fmt: skip


def chosen(only: Iterable[str]) -> list[Variant]:
    """The variants of these names; a claim's name stands for the baseline and its variants; nothing for all. Raises
    ValueError for a name that is neither."""
    by_claim = {claim.key: ("baseline", *claim.variants) for claim in CLAIMS}
    names: list[str] = []
    for name in only:
        if name not in by_claim and name not in VARIANTS:
            known = ", ".join([*by_claim, *VARIANTS])
            raise ValueError(f"{name!r} is no ablation; known are the claims and models {known}")
        names += by_claim.get(name, (name,))
    return [variant for variant in VARIANTS.values() if not names or variant.name in names]
