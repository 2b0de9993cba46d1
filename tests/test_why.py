"""Every number of a forward pass equals the formula that is printed for it."""

import numpy as np
import pytest

import minglm
from minglm.look.formulas import FORMULAS, line_of, spec_of
from minglm.look.taps import TAPS
from minglm.look.why import why
from minglm.model.params import map_arrays

IDS = np.array([[3, 14, 15, 9, 2], [6, 5, 35, 8, 9]])
CONFIGS = {
    "micro": {},
    "groups, no norm, no bias": {
        "n_group": 2, "topk_group": 1, "norm_topk_prob": False, "use_qk_norm": False, "attention_bias": False,
    },
    "all experts, G = H": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 8, "num_key_value_heads": 6},
    "one head, three groups open": {"num_attention_heads": 1, "num_key_value_heads": 1, "n_group": 4, "topk_group": 3},
    "tied, no shared expert, scale": {"tie_word_embeddings": True, "n_shared_experts": 0, "routed_scaling_factor": 2.5},
}  # fmt: skip


def loud(model, seed=0):
    """The same model with norm weights that are not 1, and biases that are not 0."""
    rng = np.random.default_rng(seed)

    def shake(name, array):
        return array + 0.3 * rng.standard_normal(array.shape) if array.ndim == 1 else array * 3

    return minglm.Model(model.config, map_arrays(shake, model.params))


@pytest.fixture(scope="module", params=CONFIGS)
def walked(request):
    config = minglm.PRESETS["micro"].replace(**CONFIGS[request.param])
    model = loud(minglm.new(config, seed=1).astype("float64"))
    return model, model.trace(IDS)


def test_the_formulas_are_those_of_the_taps():
    assert list(FORMULAS) == [tap.name for tap in TAPS] or set(FORMULAS) == {tap.name for tap in TAPS}
    for tap in TAPS:
        line = line_of(tap.name)
        assert "tap(" in line.text, tap
        assert tap.name.split(".")[-1] in line.text, (tap, line)
    with pytest.raises(ValueError, match=r"there is no tap 'layers\.0\.nothing'"):
        spec_of("layers.0.nothing", 3)


def test_every_step_is_its_formula(walked):
    """Several numbers of every tap, in float64, to the last digits."""
    model, trace = walked
    rng = np.random.default_rng(5)
    seen = set()
    for name, array in trace.items():
        if not array.size:
            continue
        seen.add(spec_of(name, model.config.num_hidden_layers))
        for _ in range(4):
            index = tuple(int(rng.integers(n)) for n in array.shape)
            opened = why(model, trace, IDS, name, index)
            assert opened.value == array[index]
            assert opened.total == pytest.approx(opened.value, rel=1e-11, abs=1e-12), f"{opened}"
            if opened.rest is not None:
                terms = sum(term.value for term in opened.terms)
                assert terms + opened.rest[1] == pytest.approx(opened.total, rel=1e-11, abs=1e-12)
            assert str(opened).startswith(f"{name}[")
    assert len(seen) >= 30


def test_terms_are_what_they_say(walked):
    model, trace = walked
    opened = why(model, trace, IDS, "layers.1.mlp.expert_weights", (3, 0))
    scores = [term.value for term in opened.terms[: model.config.num_experts_per_tok]]
    share = scores[0] / sum(scores) if model.config.norm_topk_prob else scores[0]
    assert opened.total == pytest.approx(share * model.config.routed_scaling_factor)
    future = why(model, trace, IDS, "layers.0.self_attn.scores", (0, 0, 1, 3))
    assert future.total == -np.inf
    assert "key 3 comes after query 1" in str(future)


def test_a_wrong_number_shows():
    """An array that was changed no longer equals its formula."""
    model = loud(minglm.new("micro", seed=1).astype("float64"))
    arrays = dict(model.trace(IDS))
    arrays["layers.1.mlp.routed"] = arrays["layers.1.mlp.routed"] + 1
    opened = why(model, arrays, IDS, "layers.1.mlp.routed", (2, 2))
    assert opened.value == pytest.approx(opened.total + 1)


def test_numbers_that_are_not_finite_are_their_formulas_too():
    """NaN and ∞ in the weights: what the formula makes is what the model made, at every step, and never an error."""
    base = loud(minglm.new("micro", seed=1).astype("float64"))
    for value in (np.nan, np.inf, -np.inf):
        for part in ("q_proj.weight", "mlp.gate.weight", "experts.*.up_proj.weight", "embed_tokens.weight"):
            params = map_arrays(lambda n, a, p=part, v=value: _planted(a, v) if n.endswith(p) else a, base.params)
            model = minglm.Model(base.config, params)
            with np.errstate(all="ignore"):
                trace = model.trace(IDS)
            for name, array in trace.items():
                for index in (tuple(0 for _ in array.shape), tuple(n - 1 for n in array.shape)):
                    opened = why(model, trace, IDS, name, index)
                    assert opened.total == pytest.approx(opened.value, rel=1e-9, abs=1e-9, nan_ok=True), f"{opened}"
                    assert str(opened)


def _planted(array, value):
    """Both signs of it, in the row of row 0's last token if it is a table of tokens."""
    array = array.copy()
    at = int(IDS[0, -1]) * array.shape[1] if len(array) == 61 else 0
    array.flat[[at + 1, at + 2]] = value, -value
    return array


def test_only_what_comes_later_is_hidden():
    """A score or an expert that was edited to −∞ is not called hidden by the mask or by its group."""
    walk = minglm.new(minglm.PRESETS["micro"].replace(n_group=1, topk_group=1), seed=1).step(IDS[:1])
    walk.edit("layers.1.self_attn.scores[0, 0, 3, 1] = -inf")
    assert "comes after" not in str(walk.why("layers.1.self_attn.scores[0, 0, 3, 1]"))
    walk.edit("layers.1.mlp.biased_scores[3, 1] = -inf")
    assert "its group is closed" not in str(walk.why("layers.1.mlp.biased_scores[3, 1]"))


def test_wrong_input():
    model = minglm.new("micro")
    trace = model.trace([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"has the shape \[1, 3, 61\]: wanted 3 numbers within it, got \[0, 3, 0\]"):
        why(model, trace, np.array([[1, 2, 3]]), "logits", (0, 3, 0))
    with pytest.raises(ValueError, match="there is no tap 'logit'"):
        why(model, trace, np.array([[1, 2, 3]]), "logit", (0, 0, 0))
