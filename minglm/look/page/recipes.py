"""How the page recomputes a step: which arrays and tensors go into it, and in which of a few ways."""

from typing import Any

from minglm.config import Config
from minglm.look.formulas import spec_of
from minglm.look.parts import reads
from minglm.look.why import LINEAR, NORMS, SUMS


def recipe_of(name: str, config: Config) -> dict[str, Any]:
    """{"kind": …, "x": taps, "w": tensors, and the numbers of the config that it takes}."""
    spec = spec_of(name, config.num_hidden_layers)
    short = spec.removeprefix("layers.{i}.")
    in_layer = name.startswith("layers.")
    layer = int(name.split(".")[1]) if in_layer else config.num_hidden_layers
    prefix = f"layers.{layer}." if in_layer else ""
    expert = name.split("experts.")[1].split(".")[0] if ".mlp.experts." in name else ""

    def full(tap: str) -> str:
        if tap == "stream":
            return f"layers.{layer - 1}.out" if layer else "embed_tokens"
        return prefix + tap.replace("{e}", expert)

    tensors = reads(name, config.tie_word_embeddings)[0] if not name.endswith(".tokens") else []
    base = {"w": tensors}
    is_moe = layer >= config.first_k_dense_replace
    if short in SUMS and (short != "mlp.out" or is_moe):
        parts = [part for part in SUMS[short] if part != "mlp.shared" or config.n_shared_experts]
        return {**base, "kind": "add", "x": [full(part) for part in parts], "w": []}
    if short in LINEAR:
        return {**base, "kind": "linear", "x": [full(LINEAR[short])]}
    if short in NORMS or short == "norm":
        source = NORMS.get(short, "stream")
        plain = short.startswith("self_attn") and not config.use_qk_norm
        return {"kind": "same" if plain else "norm", "x": [full(source)], "w": tensors, "eps": config.rms_norm_eps}
    return {**base, **_others(short.split(".")[-1], short, full, config)}


def _others(last: str, short: str, full: Any, config: Config) -> dict[str, Any]:
    if last == "hidden":
        before = short.removesuffix("hidden")
        return {"kind": "swiglu", "x": [full(before + "gate"), full(before + "up")]}
    if last in ("q_rope", "k_rope"):
        return {"kind": "rope", "x": [full(short.replace("_rope", "_norm"))], "half": config.rotary_dim // 2}
    plain: dict[str, tuple[str, list[str]]] = {
        "embed_tokens": ("embed", []),
        "logits": ("linear", ["norm"]),
        "scores": ("scores", ["self_attn.q_rope", "self_attn.k_rope"]),
        "probs": ("softmax", ["self_attn.scores"]),
        "heads": ("mix", ["self_attn.probs", "self_attn.v"]),
        "router_scores": ("sigmoid", ["mlp.router_logits"]),
        "biased_scores": ("bias", ["mlp.router_scores"]),
        "expert_indices": ("topk", ["mlp.biased_scores"]),
        "expert_weights": ("weights", ["mlp.router_scores", "mlp.expert_indices"]),
        "tokens": ("tokens", ["mlp.expert_indices"]),
        "routed": ("routed", ["mlp.expert_weights", "mlp.expert_indices"]),
    }
    kind, taps = plain[last]
    return {"kind": kind, "x": [full(tap) if tap != "norm" else tap for tap in taps]}
