"""What each step of the forward pass computes: its formula, and the line of the book that makes it.

The lines are found in the source of `minglm.model`, by the name that a step hands to its tap, so they cannot go stale.
`minglm.look.why` puts numbers into the formulas.
"""

import ast
import functools
import re
from pathlib import Path
from typing import NamedTuple

import minglm.model

_LAYER = {
    "input_layernorm": "y = x / √(mean(x²) + eps) · weight",
    "self_attn.q": "q[h·d + j] = Σ_D x · W_q[h·d + j, D] + bias",
    "self_attn.k": "k[g·d + j] = Σ_D x · W_k[g·d + j, D] + bias",
    "self_attn.v": "v[g·d + j] = Σ_D x · W_v[g·d + j, D] + bias",
    "self_attn.q_norm": "y = q / √(mean_d(q²) + eps) · weight; q itself without use_qk_norm",
    "self_attn.k_norm": "y = k / √(mean_d(k²) + eps) · weight; k itself without use_qk_norm",
    "self_attn.q_rope": "pair (i, i + r/2): (a, b) → (a cos φ − b sin φ, b cos φ + a sin φ), φ = position · θ^(−2i/r)",
    "self_attn.k_rope": "pair (i, i + r/2): (a, b) → (a cos φ − b sin φ, b cos φ + a sin φ), φ = position · θ^(−2i/r)",
    "self_attn.scores": "score[t, s] = Σ_d q[t] · k[s] / √d, −∞ where the key is hidden; head h reads k of h // R",
    "self_attn.probs": "p[s] = exp(score[s] − max) / Σ_s exp(score[s] − max)",
    "self_attn.heads": "y = Σ_s p[s] · v[s]; head h reads v of h // R",
    "self_attn.o": "o = Σ_(H·d) heads · W_o",
    "middle": "the stream + o",
    "post_attention_layernorm": "y = x / √(mean(x²) + eps) · weight",
    "mlp.gate": "gate = Σ_D x · W_gate",
    "mlp.up": "up = Σ_D x · W_up",
    "mlp.hidden": "gate · σ(gate) · up",
    "mlp.router_logits": "logit[e] = Σ_D x · W_e",
    "mlp.router_scores": "s[e] = σ(logit[e]) = 1 / (1 + exp(−logit[e]))",
    "mlp.biased_scores": "s[e] + bias[e]; −∞ in a group that is closed",
    "mlp.expert_indices": "the K largest of s + bias, the largest first",
    "mlp.expert_weights": "w[k] = scale · s[e_k] / Σ_k s[e_k], without the bias",
    "mlp.experts.{e}.tokens": "the tokens with e among their K picks",
    "mlp.experts.{e}.gate": "gate = Σ_D x · W_gate, x: the token's row",
    "mlp.experts.{e}.up": "up = Σ_D x · W_up, x: the token's row",
    "mlp.experts.{e}.hidden": "gate · σ(gate) · up",
    "mlp.experts.{e}.out": "E_e(x) = Σ_F hidden · W_down",
    "mlp.routed": "y = Σ_k w[k] · E_(e_k)(x)",
    "mlp.shared_experts.gate": "gate = Σ_D x · W_gate",
    "mlp.shared_experts.up": "up = Σ_D x · W_up",
    "mlp.shared_experts.hidden": "gate · σ(gate) · up",
    "mlp.shared": "Σ_J hidden · W_down",
    "mlp.out": "routed + shared; in a dense layer Σ_I hidden · W_down",
    "out": "middle + mlp.out",
}
_MTP = {
    "embed_tokens": "row t + 1's token of the embedding table",
    "enorm": "y = x / √(mean(x²) + eps) · weight",
    "hnorm": "y = x / √(mean(x²) + eps) · weight, x: the hidden state of row t",
    "eh_proj": "Σ_(2D) [enorm, hnorm] · W",
    "shared_head.norm": "y = x / √(mean(x²) + eps) · weight",
}
FORMULAS = {
    "embed_tokens": "the token's row of the embedding table",
    **{f"layers.{{i}}.{name}": text for name, text in _LAYER.items()},
    "norm": "y = x / √(mean(x²) + eps) · weight",
    "logits": "logit[v] = Σ_D x · W_head[v, D]",
    **{f"layers.{{m}}.{name}": text for name, text in _MTP.items()},
}


class Line(NamedTuple):
    """A statement of the book."""

    file: str  # "minglm/model/router.py"
    number: int  # of its first line, from 1
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number}  {self.text}"


def spec_of(name: str, decoder_layers: int) -> str:
    """The published name of a tap: "layers.3.mlp.experts.7.out" -> "layers.{i}.mlp.experts.{e}.out"; {m} for what only
    an MTP layer has. Raises ValueError for a name that is none."""
    general = re.sub(r"experts\.\d+\.", "experts.{e}.", name)
    m = re.fullmatch(r"layers\.(\d+)\.(.+)", general)
    if m:
        letter = "m" if int(m[1]) >= decoder_layers and m[2] in _MTP else "i"
        general = f"layers.{{{letter}}}.{m[2]}"
    if general not in FORMULAS:
        raise ValueError(f"there is no tap {name!r}; they are listed in docs/taps.md")
    return general


def line_of(spec: str) -> Line:
    """The statement of the book that makes a tap, given by its published name (`spec_of`)."""
    parts = spec.removeprefix("layers.{i}.").removeprefix("layers.{m}.").split(".")
    in_mtp = spec.startswith("layers.{m}.")
    for start in range(len(parts)):
        for line in _lines().get(".".join(parts[start:]), ()):
            if line.file.endswith("/mtp.py") == in_mtp:
                return line
    raise ValueError(f"no line of the book makes {spec}")


@functools.cache
def _lines() -> dict[str, list[Line]]:
    """What is handed to `tap(…)` in the book, and by which statement."""
    found: dict[str, list[Line]] = {}
    folder = Path(minglm.model.__file__).parent
    for path in sorted(folder.glob("*.py")):
        source = path.read_text("utf-8")
        for statement in ast.walk(ast.parse(source)):
            if not isinstance(statement, ast.Assign | ast.Expr | ast.Return):
                continue
            for call in ast.walk(statement):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "tap":
                    text = ast.get_source_segment(source, statement) or ""
                    line = Line(f"minglm/model/{path.name}", statement.lineno, text)
                    found.setdefault(_literal(call.args[0]), []).append(line)
    return found


def _literal(node: ast.expr) -> str:
    """A tap's name as it stands in the source, with {e} for what is put in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "{e}" for v in node.values)  # type: ignore[misc]
    return str(ast.literal_eval(node)) if isinstance(node, ast.Constant) else ""
