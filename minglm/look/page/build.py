"""What a trace page holds: tokens, steps with their arrays, routing, weights as far as there is room.

And, in words, what was left out.
"""

import html
import json
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import minglm
from minglm.formats.files import write_text
from minglm.look.formulas import FORMULAS, line_of, spec_of
from minglm.look.glossary import terms
from minglm.look.page.pack import Packer
from minglm.look.page.recipes import recipe_of
from minglm.look.taps import SPECS
from minglm.look.trace import Trace
from minglm.look.walk import idea_of, same_tokens
from minglm.model.ops import Array, softmax
from minglm.model.params import Moe, map_arrays, walk
from minglm.model.rope import rotation

if TYPE_CHECKING:
    from minglm.api import Model

BYTES = 11_000_000  # of arrays and weights in a page, before they are compressed and written as text
FIRST = 4  # tokens at the beginning that are always kept
TOP = 8  # tokens listed for each place
_ROUTING = ("mlp.router_scores", "mlp.biased_scores", "mlp.expert_indices", "mlp.expert_weights")
_KEYS = ("self_attn.k_rope", "self_attn.v")
_SOURCES = ("data.js", "why.js", "views.js", "app.js")


def write_page(
    model: "Model",
    prompt: Any,
    path: str | Path,
    beside: Any = None,
    without_bias: bool = False,
    most_bytes: int = BYTES,
) -> list[str]:
    """Write the forward pass over a prompt (a text, or ids [T]) as one HTML file. Returns what was left out, in words.

    beside: another prompt, to be compared with it; without_bias: the same prompt without the routers' selection
    bias, to be compared. most_bytes: of arrays and weights together; beyond it tokens in the middle are left out,
    then weights. Raises ValueError for a prompt that `Model.trace` refuses, for more than one row, and for two things
    to compare.
    """
    if beside is not None and without_bias:
        raise ValueError("one comparison at a time: another prompt, or the same one without the bias")
    runs = [(model, prompt, "A")]
    if beside is not None:
        runs.append((model, beside, "B"))
    if without_bias:
        if not any(isinstance(layer.mlp, Moe) for layer in model.params.layers):
            raise ValueError("this model has no router, so there is no selection bias to leave out")
        runs.append((_unbiased(model), prompt, "B, without the selection bias"))
    packer, notes = Packer(), list[str]()
    traces = [
        _collect(run, given, label, f"{'ab'[i]}", most_bytes * 6 // 10 // len(runs), packer, notes)
        for i, (run, given, label) in enumerate(runs)
    ]
    differs = _differences(traces) if len(traces) > 1 else None
    used = {name for trace in traces for name in trace.pop("experts")}
    for trace in traces:
        del trace["arrays"]
    weights = _weights(model, used, most_bytes - packer.nbytes, packer, notes)
    letters = {term.symbol: [term.english, term.chinese] for term in terms() if term.kind == "axis"}
    data = {
        "model": model.name, "about": repr(model), "config": _config(model), "traces": traces, "weights": weights,
        "differs": differs, "letters": letters, "notes": notes, "version": minglm.__version__,
    }  # fmt: skip
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file that a page could be written to; give one such as out/trace.html")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, _page(f"{model.name}: a forward pass", data, packer))
    return notes


def _page(title: str, data: dict[str, Any], packer: Packer) -> str:
    folder = files("minglm.look.page")

    def read(name: str) -> str:
        return folder.joinpath(name).read_text("utf-8")

    parts = {
        "@TITLE@": html.escape(title),
        "@STYLE@": read("page.css"),
        "@DATA@": json.dumps(data, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c"),
        "@GROUPS@": packer.scripts(),
        "@SCRIPT@": "\n".join(read(name) for name in _SOURCES),
    }
    # in one go: a prompt may hold a mark itself
    return re.sub("|".join(parts), lambda found: parts[found[0]], read("page.html"))


def _unbiased(model: "Model") -> "Model":
    def without(name: str, array: Array) -> Array:
        return np.zeros_like(array) if name.endswith("e_score_correction_bias") else array

    return type(model)(model.config, map_arrays(without, model.params), model.tokenizer, name=model.name)


# -- one forward pass --------------------------------------------------------------------------------------------


def _collect(
    model: "Model", prompt: Any, label: str, key: str, room: int, packer: Packer, notes: list[str]
) -> dict[str, Any]:
    ids = model.as_ids(prompt)
    if len(ids) != 1:
        raise ValueError(f"a page shows one row of tokens, got {len(ids)}")
    trace = model.trace(ids)
    kept, whole = _kept(trace, room)
    T = ids.shape[1]
    if len(kept) < T:
        for_all = "Routing, keys and values are" if _KEYS[0] in whole else "Routing is"
        notes.append(
            f"{label[:1]}: {T} tokens; arrays are kept for {len(kept)} of them, the first {FIRST} and the last "
            f"{len(kept) - FIRST}. {for_all} kept for all."
        )
    steps = [_step(model, trace, name, kept, whole, key, packer) for name in trace]
    experts = {f"{n.split('.')[1]}.{n.split('.')[4]}" for n in trace if n.endswith(".tokens")}
    cos, sin = rotation(np.arange(T)[None], model.config, np.dtype(np.float32))
    return {
        "arrays": dict(trace),
        "label": label,
        "prompt": prompt if isinstance(prompt, str) else " ".join(map(str, ids[0])),
        "tokens": trace.tokens,
        "ids": ids[0].tolist(),
        "steps": steps,
        "top": _top(model, trace["logits"][0]),
        "draft": _draft(model, ids, trace),
        "bias": {
            str(i): [_plain(b) for b in np.asarray(layer.mlp.gate.e_score_correction_bias, np.float64)]
            for i, layer in enumerate(model.params.layers)
            if isinstance(layer.mlp, Moe)
        },
        "cos": packer.add(f"{key}-ends", cos[0]),
        "sin": packer.add(f"{key}-ends", sin[0]),
        "experts": experts,
    }


def _kept(trace: Trace, room: int) -> tuple[list[int], tuple[str, ...]]:
    """Places whose arrays fit into the room, the first few and the last; and the steps that are kept for all places."""
    T = trace.ids.shape[1]
    for whole in (_ROUTING + _KEYS, _ROUTING):
        taken = sum(trace[name].nbytes for name in trace if name.endswith(whole))
        rest = sum(array.nbytes for array in trace.values()) - taken
        fitting = int(max(room - taken, 0) // max(rest / T, 1))
        if fitting >= min(FIRST + 4, T):
            break
    count = max(fitting, FIRST + 4)
    if count >= T:
        return list(range(T)), whole
    return [*range(FIRST), *range(T - (count - FIRST), T)], whole


def _step(
    model: "Model", trace: Trace, name: str, kept: list[int], whole: tuple[str, ...], key: str, packer: Packer
) -> dict[str, Any]:
    config, array = model.config, trace[name]
    spec = spec_of(name, config.num_hidden_layers)
    letters = SPECS[spec].axes.split()
    line = line_of(spec)
    group = f"{key}-{name.split('.')[1]}" if name.startswith("layers.") else f"{key}-ends"
    flat = array[0] if letters[0] == "B" else array
    letters = letters[1:] if letters[0] == "B" else letters
    owners = _owners(trace, name, letters)
    axis = letters.index("T") if "T" in letters else 0
    chosen = range(len(owners)) if name.endswith(whole) else [i for i, t in enumerate(owners) if t in set(kept)]
    packed = packer.add(group, np.take(flat, np.array(chosen, int), axis=axis))
    return {
        "name": name, "idea": idea_of(name), "axes": letters, "full": list(flat.shape), "what": SPECS[spec].what,
        "formula": FORMULAS[spec], "file": f"{line.file}:{line.number}", "code": line.text, "data": packed,
        "rows": [owners[i] for i in chosen], "stats": _stats(array), "recipe": recipe_of(name, config),
    }  # fmt: skip


def _owners(trace: Trace, name: str, letters: list[str]) -> list[int]:
    """Which token each row along the token axis belongs to."""
    if letters[0] == "n":
        return [int(t) for t in trace[name.rsplit(".", 1)[0] + ".tokens"]]
    return list(range(trace.ids.shape[1]))


def _stats(array: Array) -> dict[str, Any]:
    counts = {name: int(test(array).sum()) for name, test in _ODD.items()}
    known = array[np.isfinite(array)].astype(np.float64)
    if not known.size:
        return counts
    with np.errstate(over="ignore"):
        found = {"mean": known.mean(), "sd": known.std(), "min": known.min(), "max": known.max()}
    return {name: _plain(value) for name, value in found.items()} | counts


_ODD: dict[str, Callable[[Array], Array]] = {"−∞": np.isneginf, "∞": np.isposinf, "NaN": np.isnan}


def _plain(value: Any) -> float | str:
    """For JSON, which has no ∞ and no NaN: JavaScript's words for them."""
    number = float(value)
    return number if np.isfinite(number) else "NaN" if np.isnan(number) else f"{'-' * (number < 0)}Infinity"


def _top(model: "Model", logits: Array) -> list[list[list[Any]]]:  # [T, V] -> for each place [text, id, probability]
    with np.errstate(invalid="ignore"):
        probs = softmax(logits[:, : model.usable_tokens].astype(np.float64))
    order = np.argsort(-probs, axis=-1, kind="stable")[:, :TOP]
    return [
        [[_token(model, int(i)), int(i), _plain(round(row[i], 6))] for i in best]
        for row, best in zip(probs, order, strict=True)
    ]


def _token(model: "Model", number: int) -> str:
    return model.tokenizer.token(number) if model.tokenizer and number < model.usable_tokens else str(number)


def _draft(model: "Model", ids: Array, trace: Trace) -> list[list[list[Any]]] | None:
    """What the MTP layer expects two tokens on from each place; at the last, after the likeliest next token."""
    longest = model.config.max_position_embeddings
    if not model.params.mtp or ids.shape[1] + 1 > longest:
        return None
    following = int(np.argmax(trace["logits"][0, -1, : model.usable_tokens]))
    return _top(model, model.mtp(np.append(ids, [[following]], axis=1))[0])


def _differences(traces: list[dict[str, Any]]) -> dict[str, float | str]:
    """How far the steps of the same tokens are apart: 0 where they are equal, and in words where there is no number."""
    a, b = (trace["arrays"] for trace in traces)
    if traces[0]["ids"] != traces[1]["ids"]:
        return {}
    return {name: _apart(name, a, b) for name in {**a, **b}}


def _apart(name: str, a: dict[str, Array], b: dict[str, Array]) -> float | str:
    if name not in a or name not in b:
        return f"only in {'A' if name in a else 'B'}: in the other no token picked this expert"
    if not same_tokens(name, a, b):
        return "other tokens picked this expert"
    differs = (a[name] != b[name]) & ~(np.isnan(a[name]) & np.isnan(b[name]))
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(b[name][differs].astype(np.float64) - a[name][differs])
    if not np.isfinite(apart).all():
        return "differ in NaN or ∞"
    return float(apart.max(initial=0))


# -- weights and sizes -------------------------------------------------------------------------------------------


def _weights(model: "Model", used: set[str], room: int, packer: Packer, notes: list[str]) -> dict[str, dict[str, Any]]:
    """The tensors that sums are made of, as bfloat16, small ones first, as long as there is room."""
    wanted = {name: array for name, array in walk(model.params) if _is_used(name, used, model.config.num_hidden_layers)}
    found, left = {}, 0
    exact = True
    for name, array in sorted(wanted.items(), key=lambda item: item[1].size):
        if 2 * array.size > room:
            left += 1
            continue
        with np.errstate(over="ignore"):
            wide = np.asarray(array.astype(np.float32))
        narrow = wide.ndim > 1
        exact &= not narrow or not (wide.view(np.uint32) & 0xFFFF).any()
        parts = name.split(".")
        group = f"w-{parts[2]}" if parts[1] == "layers" else "w-ends"
        found[name] = packer.add(group, wide, narrow)
        room -= (2 if narrow else 4) * array.size
    if left:
        notes.append(
            f"{left} of {len(wanted)} weight tensors are not in this page: sums with them cannot be opened here. "
            "minglm step opens all."
        )
    if not exact:
        notes.append(
            "Weights are rounded to bfloat16 here: opened sums differ from the model's number in the third digit."
        )
    return found


def _is_used(name: str, used: set[str], layers: int) -> bool:
    parts = name.split(".")
    if parts[1] == "layers":
        if int(parts[2]) >= layers:
            return False  # an MTP layer's
        if "experts" in parts:
            return f"{parts[2]}.{parts[parts.index('experts') + 1]}" in used
    return True


def _config(model: "Model") -> dict[str, Any]:
    c = model.config
    return {
        "layers": c.num_hidden_layers, "D": c.hidden_size, "H": c.num_attention_heads, "G": c.num_key_value_heads,
        "d": c.head_dim, "E": c.n_routed_experts, "K": c.num_experts_per_tok, "V": c.vocab_size,
        "scale": c.routed_scaling_factor, "normalise": c.norm_topk_prob, "groups": c.n_group,
        "open_groups": c.topk_group, "dense": c.first_k_dense_replace, "shared": c.n_shared_experts,
    }  # fmt: skip
