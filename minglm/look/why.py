"""Any number of a forward pass, opened as what it is made of.

`why(model, trace, ids, "layers.1.mlp.routed", (5, 0))`. Sums show their largest terms and what the others add up to;
everything else shows the numbers that its formula takes. Recomputed in float64 from the arrays that the model used: a
float32 total differs from the tap in its last digits.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minglm.look.formulas import FORMULAS, Line, line_of, spec_of
from minglm.look.parts import reads
from minglm.model.ops import Array
from minglm.model.params import walk
from minglm.model.rope import rotation
from minglm.model.transformer import head_weight

if TYPE_CHECKING:
    from minglm.api import Model


class Term(NamedTuple):
    """One of the numbers that go in; in a sum, what it adds."""

    text: str  # "x[17] · W[5, 17] = 0.31 · 1.2"
    value: float


class Why(NamedTuple):
    """One number of one step."""

    name: str  # of the tap
    place: tuple[int, ...]
    formula: str
    line: Line  # of the book
    terms: list[Term]
    rest: tuple[int, float] | None  # in a sum: how many terms are not shown, and what they add up to
    total: float  # by the formula, in float64
    value: float  # what the tap has

    def __str__(self) -> str:
        where = ", ".join(map(str, self.place))
        width = max([len(term.text) for term in self.terms] + [30])
        lines = [f"{self.name}[{where}] = {_number(self.value)}", f"  {self.formula}", f"  {self.line}"]
        lines += [f"    {term.text:{width}}  {_number(term.value):>10}" for term in self.terms]
        if self.rest and self.rest[0]:
            lines.append(f"    {f'{self.rest[0]} more':{width}}  {_number(self.rest[1]):>10}")
        lines.append(f"    {'together' if self.rest else 'makes':{width}}  {_number(self.total):>10}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)


def why(model: "Model", arrays: Mapping[str, Array], ids: Array, name: str, index: Sequence[int], most: int = 6) -> Why:
    """The number `arrays[name][index]` as the formula with its numbers.

    arrays: what a forward pass over ids [B, T] handed to its taps (a `Trace`, or part of one: the steps just before are
    needed). A sum shows `most` terms. Raises ValueError for a name or index that is not there, KeyError for a step
    before it that was not kept. Padding and segments are not looked at: a plain prompt only.
    """
    spec = spec_of(name, model.config.num_hidden_layers)
    if name not in arrays:
        raise ValueError(f"{name} is not among the arrays that were kept")
    shape = arrays[name].shape
    index = tuple(int(i) for i in index)
    if len(index) != len(shape) or not all(-n <= i < n for i, n in zip(index, shape, strict=False)):
        raise ValueError(
            f"{name} has the shape {list(shape)}: wanted {len(shape)} numbers within it, got {list(index)}"
        )
    index = tuple(i % n for i, n in zip(index, shape, strict=True))
    terms, rest, total = _Opened(model, arrays, ids, name, most).open(spec, index)
    return Why(name, index, FORMULAS[spec], line_of(spec), terms, rest, total, float(arrays[name][index]))


def _number(value: float) -> str:
    return f"{value:.6g}" if np.isfinite(value) else str(value).replace("inf", "∞")


def _total(terms: list[Term]) -> float:
    try:
        return math.fsum(term.value for term in terms)
    except (OverflowError, ValueError):  # beyond float64; ∞ − ∞
        with np.errstate(all="ignore"):
            return float(np.sum([term.value for term in terms]))


def _sigmoid(z: float) -> float:
    return 0.0 if z < -700 else 1 / (1 + math.exp(-z))


Parts = tuple[list[Term], tuple[int, float] | None, float]

LINEAR = {  # tap -> the tap whose rows it multiplies, within its layer
    "self_attn.q": "input_layernorm", "self_attn.k": "input_layernorm", "self_attn.v": "input_layernorm",
    "self_attn.o": "self_attn.heads", "mlp.gate": "post_attention_layernorm", "mlp.up": "post_attention_layernorm",
    "mlp.router_logits": "post_attention_layernorm", "mlp.experts.{e}.gate": "post_attention_layernorm",
    "mlp.experts.{e}.up": "post_attention_layernorm", "mlp.experts.{e}.out": "mlp.experts.{e}.hidden",
    "mlp.shared_experts.gate": "post_attention_layernorm", "mlp.shared_experts.up": "post_attention_layernorm",
    "mlp.shared": "mlp.shared_experts.hidden", "mlp.out": "mlp.hidden",
}  # fmt: skip
NORMS = {
    "input_layernorm": "stream", "post_attention_layernorm": "middle", "self_attn.q_norm": "self_attn.q",
    "self_attn.k_norm": "self_attn.k",
}  # fmt: skip
SUMS = {"middle": ("stream", "self_attn.o"), "out": ("middle", "mlp.out"), "mlp.out": ("mlp.routed", "mlp.shared")}


class _Opened:
    """One number's parts. Taps and weights are looked up by their names within the layer."""

    def __init__(self, model: "Model", arrays: Mapping[str, Array], ids: Array, name: str, most: int):
        self.model, self.config, self.arrays, self.ids, self.name, self.most = (
            model,
            model.config,
            arrays,
            ids,
            name,
            most,
        )
        parts = name.split(".")
        self.layer = int(parts[1]) if parts[0] == "layers" else self.config.num_hidden_layers
        self.expert = parts[parts.index("experts") + 1] if "experts" in parts else ""
        self.tensors = dict(walk(model.params))

    def tap(self, name: str) -> Array:
        """An array of this layer in float64; "stream" is what came in."""
        if name == "stream":
            full = f"layers.{self.layer - 1}.out" if self.layer else "embed_tokens"
        else:
            full = f"layers.{self.layer}.{name.replace('{e}', self.expert)}"
        return np.asarray(self.arrays[full], np.float64)

    def weights(self) -> list[Array]:
        """The tensors that the step reads, in float64."""
        tied = self.model.params.lm_head is None
        return [
            np.asarray(self.tensors[tensor].astype(np.float64))
            for tensor in reads(self.name, tied)[0]
            if tensor in self.tensors
        ]

    def open(self, spec: str, index: tuple[int, ...]) -> Parts:
        short = spec.removeprefix("layers.{i}.")
        if short in SUMS and self._is_sum(short):
            return self._added(SUMS[short], index)
        if short in LINEAR:
            return self._product(LINEAR[short], index)
        if short in NORMS:
            return self._norm(self.tap(NORMS[short]), index)
        return _OTHERS[short.split(".")[-1] if short != "norm" else "norm"](self, index)

    def _is_sum(self, short: str) -> bool:
        return short != "mlp.out" or f"layers.{self.layer}.mlp.routed" in self.arrays

    # -- sums ------------------------------------------------------------------------------------------------------

    def _sum(self, terms: list[Term], most: int | None = None) -> Parts:
        """The largest terms, and the rest of them."""
        order = sorted(terms, key=lambda term: -math.inf if math.isnan(term.value) else -abs(term.value))
        shown, rest = order[: most or self.most], order[most or self.most :]
        return shown, (len(rest), _total(rest)), _total(terms)

    def _added(self, names: tuple[str, ...], index: tuple[int, ...]) -> Parts:
        shape = np.shape(self.arrays[self.name])
        terms = []
        for name in names:
            if name == "mlp.shared" and not self.config.n_shared_experts:
                continue
            terms.append(Term(name, float(self.tap(name).reshape(shape)[index])))
        return self._sum(terms)

    def _product(self, source: str, index: tuple[int, ...]) -> Parts:
        """Row of x times row of W, and a bias where there is one."""
        shape = np.shape(self.arrays[self.name])
        x = self.tap(source)
        leading = 2 if shape[:2] == x.shape[:2] and len(shape) > 2 else 1
        row = int(np.ravel_multi_index(index[:leading], shape[:leading]))
        column = int(np.ravel_multi_index(index[leading:], shape[leading:]))
        if self.expert and source == "post_attention_layernorm":
            row = int(self.tap("mlp.experts.{e}.tokens")[row])
        rows = x.reshape(-1, self.weights()[0].shape[1])
        return self._dot(rows[row], *self.weights(), column=column, x_name=source.split(".")[-1])

    def _dot(self, x: Array, weight: Array, bias: Array | None = None, *, column: int, x_name: str) -> Parts:
        terms = [
            Term(f"{x_name}[{i}] · W[{column}, {i}] = {a:.4g} · {b:.4g}", float(a * b))
            for i, (a, b) in enumerate(zip(x, weight[column], strict=True))
        ]
        if bias is not None:
            terms.append(Term(f"bias[{column}]", float(bias[column])))
        return self._sum(terms)

    def logits(self, index: tuple[int, ...]) -> Parts:
        b, t, v = index
        hidden = np.asarray(self.arrays["norm"], np.float64)[b, t]
        return self._dot(hidden, np.asarray(head_weight(self.model.params).astype(np.float64)), column=v, x_name="norm")

    def scores(self, index: tuple[int, ...]) -> Parts:
        b, h, t, s = index
        q = self.tap("self_attn.q_rope")[b, t, h]
        R = self.config.num_attention_heads // self.config.num_key_value_heads
        k = self.tap("self_attn.k_rope")[b, s, h // R]
        if s > t:
            return [Term(f"key {s} comes after query {t}: hidden", -np.inf)], None, -np.inf
        root = math.sqrt(len(q))
        terms = [
            Term(f"q[{j}] · k[{j}] / √d = {x:.4g} · {y:.4g} / {root:.4g}", float(x * y / root))
            for j, (x, y) in enumerate(zip(q, k, strict=True))
        ]
        return self._sum(terms)

    def heads(self, index: tuple[int, ...]) -> Parts:
        b, t, h, j = index
        R = self.config.num_attention_heads // self.config.num_key_value_heads
        probs = self.tap("self_attn.probs")[b, h, t]
        values = self.tap("self_attn.v")[b, :, h // R, j]
        terms = [
            Term(f"p[{s}] · v[{s}] = {p:.4g} · {v:.4g}", float(p * v))
            for s, (p, v) in enumerate(zip(probs, values, strict=True))
            if p or not np.isfinite(v)  # 0 · NaN is NaN
        ]
        return self._sum(terms)

    def routed(self, index: tuple[int, ...]) -> Parts:
        n, column = index
        terms = []
        for e, w in zip(self.tap("mlp.expert_indices")[n], self.tap("mlp.expert_weights")[n], strict=True):
            self.expert = str(int(e))
            place = int(np.flatnonzero(self.tap("mlp.experts.{e}.tokens") == n)[0])
            answer = self.tap("mlp.experts.{e}.out")[place, column]
            terms.append(Term(f"w · E_{int(e)} = {w:.4g} · {answer:.4g}", float(w * answer)))
        return self._sum(terms, len(terms))

    # -- everything else: the numbers of the formula -----------------------------------------------------------------

    def embed_tokens(self, index: tuple[int, ...]) -> Parts:
        b, t, column = index
        token = int(self.ids[b, t])
        value = float(self.weights()[0][token, column])
        return [Term(f"row {token} of the table, column {column}", value)], None, value

    def final_norm(self, index: tuple[int, ...]) -> Parts:
        return self._norm(self.tap("stream"), index)

    def _norm(self, x: Array, index: tuple[int, ...]) -> Parts:
        value = float(x[index])
        if not self.weights():  # use_qk_norm is off
            return [Term("unchanged", value)], None, value
        row, weight, eps = x[index[:-1]], float(self.weights()[0][index[-1]]), self.config.rms_norm_eps
        square = float(np.mean(row**2))
        terms = [Term("x", value), Term("mean of x²", square), Term("eps", eps), Term("weight", weight)]
        return terms, None, value / math.sqrt(square + eps) * weight

    def rope(self, index: tuple[int, ...]) -> Parts:
        b, t, head, i = index
        x = self.tap(self.name.split(".", 2)[2].replace("_rope", "_norm"))[b, t, head]
        half = self.config.rotary_dim // 2
        if i >= 2 * half:
            return [Term("not turned", float(x[i]))], None, float(x[i])
        cos, sin = (a[0, 0, i % half] for a in rotation(np.array([[t]]), self.config, self.model.compute_dtype))
        first, second = float(x[i % half]), float(x[i % half + half])
        total = first * cos - second * sin if i < half else second * cos + first * sin
        names = (f"a, entry {i % half}", f"b, entry {i % half + half}", f"cos φ, position {t}", "sin φ")
        terms = [Term(text, float(v)) for text, v in zip(names, (first, second, cos, sin), strict=True)]
        return terms, None, float(total)

    def probs(self, index: tuple[int, ...]) -> Parts:
        row = self.tap("self_attn.scores")[index[:-1]]
        with np.errstate(invalid="ignore"):
            powers = np.exp(row - row.max())
        own = float(powers[index[-1]])
        total = float(powers.sum())
        terms = [Term("score", float(row[index[-1]])), Term("largest score", float(row.max()))]
        terms += [Term("exp(score − largest)", own), Term("sum of those over all keys", total)]
        return terms, None, own / total

    def hidden(self, index: tuple[int, ...]) -> Parts:
        before = self.name.split(".", 2)[2].removesuffix("hidden")
        gate, up = (float(self.tap(before + each)[index]) for each in ("gate", "up"))
        slope = _sigmoid(gate)
        return [Term("gate", gate), Term("σ(gate)", slope), Term("up", up)], None, gate * slope * up

    def router_scores(self, index: tuple[int, ...]) -> Parts:
        logit = float(self.tap("mlp.router_logits")[index])
        return [Term("logit", logit)], None, _sigmoid(logit)

    def biased_scores(self, index: tuple[int, ...]) -> Parts:
        score, bias = float(self.tap("mlp.router_scores")[index]), float(self.weights()[0][index[-1]])
        terms = [Term("score", score), Term(f"bias[{index[-1]}]", bias)]
        if self.config.n_group > 1 and np.isneginf(self.tap("mlp.biased_scores")[index]):
            return [*terms, Term("its group is closed", -np.inf)], None, -np.inf
        return terms, None, score + bias

    def expert_indices(self, index: tuple[int, ...]) -> Parts:
        n, k = index
        biased = self.tap("mlp.biased_scores")[n]
        order = np.argsort(-biased, kind="stable")
        shown = order[: self.config.num_experts_per_tok + 1]
        last = len(shown) - 1
        terms = [
            Term(
                f"{'not picked' if r == last and r >= self.config.num_experts_per_tok else f'{r + 1}.'} expert {e}",
                biased[e],
            )
            for r, e in enumerate(shown)
        ]
        return terms, None, float(order[k])

    def expert_weights(self, index: tuple[int, ...]) -> Parts:
        n, k = index
        picks = self.tap("mlp.expert_indices")[n].astype(int)
        scores = self.tap("mlp.router_scores")[n, picks]
        scale = float(self.config.routed_scaling_factor)
        terms = [Term(f"score of expert {e}", float(s)) for e, s in zip(picks, scores, strict=True)]
        total = float(scores.sum()) + 1e-20 if self.config.norm_topk_prob else 1.0
        terms += [Term("their sum" if self.config.norm_topk_prob else "not normalised", total), Term("scale", scale)]
        return terms, None, float(scores[k]) / total * scale

    def tokens(self, index: tuple[int, ...]) -> Parts:
        chosen = np.flatnonzero((self.tap("mlp.expert_indices") == int(self.expert)).any(axis=1))
        terms = [Term(f"tokens that picked expert {self.expert}", len(chosen))]
        return terms, None, float(chosen[index[0]])


_OTHERS: dict[str, Any] = {
    "embed_tokens": _Opened.embed_tokens, "norm": _Opened.final_norm, "logits": _Opened.logits,
    "q_rope": _Opened.rope, "k_rope": _Opened.rope, "scores": _Opened.scores, "probs": _Opened.probs,
    "heads": _Opened.heads, "hidden": _Opened.hidden, "router_scores": _Opened.router_scores,
    "biased_scores": _Opened.biased_scores, "expert_indices": _Opened.expert_indices,
    "expert_weights": _Opened.expert_weights, "tokens": _Opened.tokens, "routed": _Opened.routed,
}  # fmt: skip
