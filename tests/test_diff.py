"""`diff`: every planted mistake is found at its own step, and what rounding does is not taken for one."""

import json
import re

import numpy as np
import pytest

import minglm
from minglm.api import Model
from minglm.cli import main
from minglm.look.diff import REPLACEABLE, diff, ops_with
from minglm.look.judge import distance
from minglm.look.parts import reads, storage_of
from minglm.look.taps import expected_taps
from minglm.model import ops
from minglm.model.experts import picks_by_expert
from minglm.model.params import expert, map_arrays, walk
from minglm.model.router import RouterSaved, Routing
from tests.variants import MICRO, VARIANTS, random_ids, random_params

SQUARE = MICRO.replace(hidden_size=MICRO.num_attention_heads * MICRO.head_dim, num_nextn_predict_layers=0)
IDS = random_ids(MICRO, 0)


def model_of(config=MICRO, name="right", **changes):
    params = random_params(config)
    if changes:
        params = map_arrays(lambda n, a: next((f(a) for key, f in changes.items() if n.endswith(key)), a), params)
    return Model(config, params, name=name)


def with_weights(change, config=MICRO):
    """A model with `change(name, array)` made to its weights."""
    return Model(config, map_arrays(lambda n, a: change(n, a.copy()), random_params(config)), name="mistaken")


def kinds(found):
    """Steps that add more than rounding, without numbers."""
    return {re.sub(r"\d+", "*", row.name) for row in found.rows if row.verdict == "differs"}


# -- mistakes in the operations ----------------------------------------------------------------------------------


def interleaved(x, cos, sin):
    r = 2 * cos.shape[-1]
    cos, sin, y = cos[:, :, None], sin[:, :, None], x.copy()
    y[..., 0:r:2] = x[..., 0:r:2] * cos - x[..., 1:r:2] * sin
    y[..., 1:r:2] = x[..., 1:r:2] * cos + x[..., 0:r:2] * sin
    return y


def eps_outside(x, weight, eps):
    return x / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + x.dtype.type(eps)) * weight


def tiled_groups(q, k, v, sight, tap):
    """Query head h reads key/value head h mod G."""
    H, G = q.shape[2], k.shape[2]
    order = np.arange(H) % G
    return ops.attend(q, k[:, :, order], v[:, :, order], sight, tap)


def unscaled(q, k, v, sight, tap):
    return ops.attend(q * q.dtype.type(q.shape[-1] ** 0.5), k, v, sight, tap)


def sees_next(q, k, v, sight, tap):
    last = sight.key_segments.shape[1] - 1
    return ops.attend(q, k, v, sight._replace(slots=np.minimum(sight.slots + 1, last)), tap)


def swapped_gate(x, gate_proj, up_proj, down_proj, tap=ops.no_tap):
    gate, up = tap("gate", ops.linear(x, gate_proj)), tap("up", ops.linear(x, up_proj))
    hidden = tap("hidden", ops.swiglu(up, gate))
    return ops.linear(hidden, down_proj), None


def shared_scaled(x, *others):
    """Tokens are in one axis only where routed and shared experts meet."""
    return x + others[0] * x.dtype.type(2.5) if x.ndim == 2 else ops.add(x, *others)


def no_residual(x, *others):
    return others[0] if x.ndim == 3 else ops.add(x, *others)


def router_with(score=ops.sigmoid, choose_by_bias=True, weigh_by_bias=False, factor=None):
    """The book's router, without groups, with a mistake."""

    def router(x, params, config, tap=ops.no_tap, ops=ops):
        logits = tap("router_logits", ops.linear(x, params.weight))
        scores = tap("router_scores", score(logits))
        biased = tap("biased_scores", scores + params.e_score_correction_bias)
        by = biased if choose_by_bias else scores
        indices = tap("expert_indices", np.argsort(-by, axis=-1, kind="stable")[:, : config.num_experts_per_tok])
        picked = np.take_along_axis(biased if weigh_by_bias else scores, indices, axis=-1)
        c = config.routed_scaling_factor if factor is None else factor
        weights = tap("expert_weights", picked / (picked.sum(axis=-1, keepdims=True) + 1e-20) * c)
        return Routing(indices, weights), RouterSaved(x, scores, Routing(indices, weights))

    return router


def unweighted(x, routing, params, tap=ops.no_tap, ops=ops):
    y = np.zeros_like(x)
    for e, _, tokens in picks_by_expert(routing.indices, len(params.gate_proj)):
        tap(f"experts.{e}.tokens", tokens)
        answers, _ = ops.expert_mlp(x[tokens], *expert(params, e), ops.scoped(tap, f"experts.{e}."))
        y[tokens] += tap(f"experts.{e}.out", answers)
    return y, []


UNGROUPED = MICRO.replace(n_group=1, topk_group=1)
ROPE = {"layers.*.self_attn.q_rope", "layers.*.self_attn.k_rope"}
NORMS = {
    "layers.*.input_layernorm", "layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm",
    "layers.*.post_attention_layernorm", "norm",
}  # fmt: skip
OPERATIONS = {
    "interleaved rope": ({"rope": interleaved}, "layers.0.self_attn.q_rope", ROPE),
    "angle with the wrong sign": ({"rope": lambda x, c, s: ops.rope(x, c, -s)}, "layers.0.self_attn.q_rope", ROPE),
    "eps outside the root": ({"rms_norm": eps_outside}, "layers.0.input_layernorm", NORMS),
    "heads tiled over groups": (
        {"attend": tiled_groups}, "layers.0.self_attn.scores", {"layers.*.self_attn.scores", "layers.*.self_attn.heads"}
    ),
    "scores not scaled": ({"attend": unscaled}, "layers.0.self_attn.scores", {"layers.*.self_attn.scores"}),
    "sees the next token": ({"attend": sees_next}, "layers.0.self_attn.scores", {"layers.*.self_attn.scores"}),
    "gate and up swapped": (
        {"expert_mlp": swapped_gate}, "layers.0.mlp.hidden",
        {"layers.*.mlp.hidden", "layers.*.mlp.experts.*.hidden", "layers.*.mlp.shared_experts.hidden"},
    ),
    "shared expert scaled": ({"add": shared_scaled}, "layers.1.mlp.out", {"layers.*.mlp.out"}),
    "no residual": ({"add": no_residual}, "layers.0.middle", {"layers.*.middle", "layers.*.out"}),
    "softmax for sigmoid": (
        {"router": router_with(score=ops.softmax)}, "layers.1.mlp.router_scores", {"layers.*.mlp.router_scores"}
    ),
    "chosen without bias": (
        {"router": router_with(choose_by_bias=False)}, "layers.1.mlp.expert_indices", {"layers.*.mlp.expert_indices"}
    ),
    "bias on the weights": (
        {"router": router_with(weigh_by_bias=True)}, "layers.1.mlp.expert_weights", {"layers.*.mlp.expert_weights"}
    ),
    "no scaling factor": (
        {"router": router_with(factor=1.0)}, "layers.1.mlp.expert_weights", {"layers.*.mlp.expert_weights"}
    ),
    "answers not weighted": ({"routed_experts": unweighted}, "layers.1.mlp.routed", {"layers.*.mlp.routed"}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_mistaken_operation_is_found_where_it_is(name, dtype):
    functions, first, wanted = OPERATIONS[name]
    right = model_of(UNGROUPED)
    found = diff(right, right.astype(dtype), IDS, ops_b=ops_with(**functions))
    assert found.first.name == first, found.sentence
    assert kinds(found) == wanted
    assert "weights and config fields are equal: the operation differs" in found.sentence
    assert not found.same
    at = [row.name for row in found.rows].index(first)
    if dtype == "float32":
        assert all(max(row.inherited or 0, row.added) <= 1e-5 for row in found.rows[:at])
    after = [row for row in found.rows[at + 1 :] if row.added is not None and row.name not in ("norm", "logits")]
    only_follow = [row for row in after if row.verdict != "differs"]
    assert all(row.added <= max(row.limit, 1e-12) for row in only_follow)
    assert max(row.inherited or 0 for row in only_follow) > 1e-4


def test_what_is_right_in_other_words_is_rounding():
    """Another order of sums, another formula for the same: nothing is found."""

    def linear(x, weight, bias=None):
        half = x.shape[-1] // 2
        y = np.einsum("...i,oi->...o", x[..., half:], weight[:, half:])
        y = y + np.einsum("...i,oi->...o", x[..., :half], weight[:, :half])
        return y if bias is None else y + bias

    def rms_norm(x, weight, eps):
        return weight * (x / np.sqrt((x**2).sum(axis=-1, keepdims=True) / x.shape[-1] + eps))

    def rope(x, cos, sin):
        h = cos.shape[-1]
        turned = (x[..., :h] + 1j * x[..., h : 2 * h]) * (cos + 1j * sin)[:, :, None]
        return np.concatenate([turned.real, turned.imag, x[..., 2 * h :]], axis=-1).astype(x.dtype)

    for config in (MICRO, UNGROUPED, VARIANTS["all-dense"].config):
        for seed in range(3):
            right = Model(config, random_params(config, seed), name="right")
            found = diff(
                right, right, random_ids(config, seed), ops_b=ops_with(linear=linear, rms_norm=rms_norm, rope=rope)
            )
            assert found.same, found.sentence
            assert {row.verdict for row in found.rows} == {"equal", "rounding"}
            assert "no step beyond rounding; largest: " in found.sentence


# -- mistakes in weights and config ------------------------------------------------------------------------------


def only(wanted, change):
    return lambda name, array: change(array) if name == wanted else array


def swap_experts(array):
    array[[2, 5]] = array[[5, 2]]
    return array


def swapped_norms():
    params = random_params(MICRO)
    layer = params.layers[1]
    swapped = layer._replace(
        input_layernorm=layer.post_attention_layernorm, post_attention_layernorm=layer.input_layernorm
    )
    return Model(MICRO, params._replace(layers=(params.layers[0], swapped, params.layers[2])), name="mistaken")


WEIGHTS = {
    "o_proj transposed": ("layers.2.self_attn.o_proj.weight", lambda a: a.T.copy(), "layers.2.self_attn.o"),
    "key heads exchanged": ("layers.1.self_attn.k_proj.weight", lambda a: np.roll(a, 8, 0), "layers.1.self_attn.k"),
    "no selection bias": ("layers.1.mlp.gate.e_score_correction_bias", np.zeros_like, "layers.1.mlp.biased_scores"),
    "shared expert scaled": ("layers.1.mlp.shared_experts.down_proj.weight", lambda a: a * 2.5, "layers.1.mlp.shared"),
    "router rows turned round": ("layers.2.mlp.gate.weight", lambda a: a[::-1].copy(), "layers.2.mlp.router_logits"),
    "last norm": ("norm.weight", np.ones_like, "norm"),
    "head": ("lm_head.weight", lambda a: np.roll(a, 1, 0), "logits"),
    "embedding": ("embed_tokens.weight", lambda a: np.roll(a, 1, 0), "embed_tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_wrong_tensor_is_found_and_named(name):
    tensor, change, step = WEIGHTS[name]
    tensor = tensor if tensor == "lm_head.weight" else f"model.{tensor}"
    mistaken = with_weights(lambda n, a: change(a).astype(a.dtype) if n == tensor else a, SQUARE)
    found = diff(model_of(SQUARE), mistaken, IDS)
    assert found.first.name == step
    assert kinds(found) == {re.sub(r"\d+", "*", step)}
    assert [t.name for t in found.tensors] == [tensor]
    assert f"Its weights differ: {tensor} (" in found.sentence
    assert "Later steps only inherit it." in found.sentence


def test_the_wrong_expert_is_found_at_each_that_was_picked():
    def change(name, array):
        return swap_experts(array) if name.startswith("model.layers.2.mlp.experts.*.down") else array

    found = diff(model_of(), with_weights(change), IDS)
    assert [row.name for row in found.rows if row.verdict == "differs"] == [
        "layers.2.mlp.experts.2.out", "layers.2.mlp.experts.5.out"
    ]  # fmt: skip
    assert "model.layers.2.mlp.experts.2.down_proj.weight" in found.sentence


def test_two_norms_swapped():
    found = diff(model_of(), swapped_norms(), IDS)
    differing = [row.name for row in found.rows if row.verdict == "differs"]
    assert differing == ["layers.1.input_layernorm", "layers.1.post_attention_layernorm"]
    assert "model.layers.1.input_layernorm.weight" in found.sentence


CONFIGS = {
    "rms_norm_eps": (1e-5, "layers.0.input_layernorm"),
    "rope_theta": (10000.0, "layers.0.self_attn.q_rope"),
    "partial_rotary_factor": (1.0, "layers.0.self_attn.q_rope"),
    "routed_scaling_factor": (1.0, "layers.1.mlp.expert_weights"),
    "norm_topk_prob": (False, "layers.1.mlp.expert_weights"),
    "topk_group": (3, "layers.1.mlp.biased_scores"),
    "use_qk_norm": (False, "layers.0.self_attn.q_norm"),
    "attention_bias": (False, "layers.0.self_attn.q"),
}


@pytest.mark.parametrize("field", CONFIGS)
def test_a_wrong_config_field_is_found_and_named(field):
    value, step = CONFIGS[field]
    config = MICRO.replace(**{field: value})
    params = random_params(MICRO)
    if field == "use_qk_norm":
        params = params._replace(
            layers=tuple(p._replace(self_attn=p.self_attn._replace(q_norm=None, k_norm=None)) for p in params.layers)
        )
    if field == "attention_bias":
        attention = [
            p.self_attn._replace(
                **{n: getattr(p.self_attn, n)._replace(bias=None) for n in ("q_proj", "k_proj", "v_proj")}
            )
            for p in params.layers
        ]
        layers = (p._replace(self_attn=a) for p, a in zip(params.layers, attention, strict=True))
        params = params._replace(layers=tuple(layers))
    for dtype in ("float32", "bfloat16"):
        found = diff(model_of(), Model(config, params, name="mistaken").astype(dtype), IDS)
        assert found.first.name == step
        assert f"{field} {getattr(MICRO, field)} against {value}" in found.sentence


def test_a_mistake_below_the_rounding_of_storage_and_of_float32_is_found():
    config = MICRO.replace(rms_norm_eps=MICRO.rms_norm_eps * (1 + 1e-6))
    slight = Model(config, random_params(MICRO), name="slight")
    for dtype in ("float32", "bfloat16"):
        found = diff(model_of(), slight.astype(dtype), IDS)
        assert found.first.name == "layers.0.input_layernorm"
        assert found.first.added <= found.first.limit
        assert "float64" in found.first.note
        unseen = diff(model_of(), slight.astype(dtype), IDS, float64=False)
        assert unseen.first is None
        assert not unseen.same  # a field differs
        assert "Not run in float64" in unseen.text()


def test_tensors_that_no_step_reads_are_told():
    mistaken = with_weights(only("model.layers.3.enorm.weight", lambda a: a + 1))
    found = diff(model_of(), mistaken, IDS)
    assert found.first is None
    assert not found.same
    assert ". But no listed step shows what differs: model.layers.3.enorm.weight (20 of 20 numbers" in found.sentence


# -- what is no mistake ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_is_equal_to_itself(variant):
    config, own_ends = VARIANTS[variant]
    model = Model(config, random_params(config, 3, mtp_own_ends=own_ends), name=variant)
    for ids in ([5], [[1, 2, 3], [3, 3, 3]], random_ids(config, 1, (1, 30))):
        found = diff(model, model, ids)
        assert found.same
        assert {row.verdict for row in found.rows} <= {"equal", "rounding"}
        assert found.sentence.startswith("no step beyond rounding")


@pytest.mark.parametrize(("a", "b"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16"),
                                      ("float32", "fp8"), ("bfloat16", "fp8"), ("float64", "float32"),
                                      ("float32", "float64"), ("float64", "bfloat16")])  # fmt: skip
@pytest.mark.parametrize("float64", [True, False])
def test_fewer_bits_are_storage_or_rounding(a, b, float64):
    right = model_of(name="right")
    right = Model(MICRO, map_arrays(lambda n, x: x.astype(np.float64), right.params), name="right")
    found = diff(right.astype(a), right.astype(b), IDS, float64=float64)
    assert found.same, found.sentence
    verdicts = {row.verdict for row in found.rows}
    assert "storage" in verdicts or {a, b} == {"float64", "float32"}
    assert (found.rows[-1].exact is None) == (not float64 or (a, b) == ("bfloat16", "fp8"))


def test_padding_and_documents():
    segments = [[-1, -1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, -1]]
    ids = random_ids(MICRO, 2, (2, 7))
    assert diff(model_of(), model_of(), ids, segments=segments).same
    found = diff(model_of(), model_of(), ids, segments=segments, ops_b=ops_with(rope=interleaved))
    assert found.first.name == "layers.0.self_attn.q_rope"


def test_a_layer_count_and_a_kind_of_layer_are_told():
    for change, step in (
        ({"n_shared_experts": 0}, "layers.1.mlp.shared_experts.gate"),
        ({"first_k_dense_replace": 2}, "layers.1.mlp.router_logits"),
        ({"num_hidden_layers": 2}, "layers.2.input_layernorm"),
    ):
        config = MICRO.replace(**change)
        other = Model(config, random_params(config), name="other")
        found = diff(model_of(), other, IDS, keep="*")
        row = next(row for row in found.rows if row.added is None)
        assert row.name == step
        assert row.note == "only A has this step"
        back = diff(other, model_of(), IDS)
        assert any(row.note == "only B has this step" for row in back.rows)
        assert not back.same


def test_an_operation_that_shows_nothing_is_not_called_a_difference():
    def silent(x, gate_proj, up_proj, down_proj, tap=ops.no_tap):
        return ops.expert_mlp(x, gate_proj, up_proj, down_proj)

    found = diff(model_of(), model_of(), IDS, ops_b=ops_with(expert_mlp=silent))
    assert found.same
    assert {row.name.rpartition(".")[2] for row in found.rows if row.verdict == "not seen"} == {"gate", "up", "hidden"}


def test_a_wider_dtype_inside_is_told():
    def promoting(x, weight, eps):
        return ops.rms_norm(x, weight, np.float64(eps))

    found = diff(model_of(), model_of(), IDS, ops_b=ops_with(rms_norm=promoting))
    assert found.same
    assert found.rows[1].note == "A computes float32, B float64"


def test_weights_that_stay_in_their_files(tmp_path):
    model_of().save(tmp_path / "m", "bfloat16")
    mapped, whole = minglm.load(tmp_path / "m", mode="mmap"), minglm.load(tmp_path / "m")
    assert diff(whole, mapped, IDS).same
    assert diff(mapped, whole, IDS).same
    assert diff(whole, mapped, IDS, engine_b="fast").same
    scaled = Model(MICRO.replace(routed_scaling_factor=1.0), mapped.params, name="scaled")
    assert diff(whole, scaled, IDS).first.name == "layers.1.mlp.expert_weights"


# -- the fast engine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("variant", ["micro", "air-like", "all-dense", "no-dense", "unnormalised-weights", "yarn"])
def test_the_fast_engine_is_the_book_to_rounding(variant, dtype):
    config = VARIANTS[variant].config
    for seed in range(2):
        model = Model(config, random_params(config, seed), name=variant)
        found = diff(model, model.astype(dtype), random_ids(config, seed, (2, 9)), engine_b="fast")
        assert found.first is None, found.text()
        names = [row.name for row in found.rows]
        assert "layers.1.self_attn.heads" in names
        assert "layers.2.out" in names
        assert names[-2:] == ["norm", "logits"]


def test_a_mistake_in_the_fast_engine_is_found_in_its_layer():
    mistaken = with_weights(only("model.layers.1.self_attn.v_proj.bias", lambda a: a * 0))
    found = diff(model_of(), mistaken, IDS, engine_b="fast")
    assert found.first.name == "layers.1.self_attn.v"
    assert all(row.name.startswith("layers.1.") for row in found.rows if row.verdict == "differs")
    assert "model.layers.1.self_attn.v_proj.bias" in found.sentence
    assert "single kernels" in found.text()
    scaled = Model(MICRO.replace(routed_scaling_factor=1.0), random_params(MICRO), name="mistaken")
    assert diff(model_of(), scaled, IDS, engine_b="fast").first.name == "layers.1.mlp.expert_weights"


def test_watching_a_fast_step_changes_nothing():
    from minglm.fast.engine import Decoder

    model = model_of()
    decoder = Decoder(model.params, model.config, 16, 1)
    seen = {}

    def tap(name, array):
        seen[name] = array.copy()
        return array

    plain = decoder.step(IDS[:, :5], model.new_cache(2, 8)).copy()
    cache = model.new_cache(2, 8)
    decoder.watch(IDS[:, :5], cache, tap)
    assert np.array_equal(seen["logits"], plain)
    after = decoder.step(IDS[:, 5:7], cache).copy()
    assert np.array_equal(after, decoder_of_two_steps(model))
    decoder.watch(IDS[:, :5], model.new_cache(2, 8), lambda n, a: 0 * a if n == "layers.2.out" else a)
    assert np.array_equal(decoder.hidden, np.zeros_like(decoder.hidden))


def decoder_of_two_steps(model):
    from minglm.fast.engine import Decoder

    decoder, cache = Decoder(model.params, model.config, 16, 1), model.new_cache(2, 8)
    decoder.step(IDS[:, :5], cache)
    return decoder.step(IDS[:, 5:7], cache).copy()


# -- parts -------------------------------------------------------------------------------------------------------


def test_every_step_knows_what_it_reads():
    for variant, (config, own_ends) in VARIANTS.items():
        params = random_params(config, mtp_own_ends=own_ends)
        tensors = {name for name, _ in walk(params._replace(mtp=()))}
        read = set()
        for tap in expected_taps(config, 1, 3):
            if not tap.name.endswith(".tokens"):
                found, fields = reads(tap.name, config.tie_word_embeddings)
                read |= set(found)
                assert all(hasattr(config, field) for field in fields)
        assert tensors <= read, variant


def test_distance():
    inf, nan = np.inf, np.nan
    a = np.array([1.0, -4.0, -inf])
    assert distance(a, np.array([1.5, -4.0, -inf])) == 0.125
    assert distance(a, np.array([1.0, -inf, -inf])) == inf
    assert distance(a, np.array([1.0, nan, -inf])) == inf
    assert distance(np.array([nan, 2.0]), np.array([nan, 2.0])) == 0
    assert distance(np.zeros(2), np.zeros(2)) == 0
    assert distance(np.zeros(2), np.ones(2)) == inf
    assert distance(np.zeros((0, 3)), np.zeros((0, 3))) == 0
    assert distance(np.zeros(2), np.ones(2), np.full(2, 4.0)) == 0.25


def test_storage_names():
    for dtype in ("float64", "float32", "float16", "bfloat16", "fp8", "fp8-block"):
        assert storage_of(model_of().astype(dtype).params) == dtype


def test_replaced_operations():
    assert ops_with(rope=interleaved).rope is interleaved
    assert ops_with(rope=interleaved).linear is ops.linear
    assert all(hasattr(ops, name) for name in REPLACEABLE if name not in ("router", "routed_experts"))
    with pytest.raises(ValueError, match="asks for no 'swiglu' \\(it is called inside attend, expert_mlp or router"):
        ops_with(swiglu=ops.swiglu)
    with pytest.raises(ValueError, match="asks for no 'rpoe'; it asks for embed, linear"):
        ops_with(rpoe=interleaved)


@pytest.mark.parametrize(
    ("other", "options", "text"),
    [
        ({"hidden_size": 24}, {}, "hidden_size 20 against 24; the first step of another shape is embed_tokens"),
        ({"num_experts_per_tok": 2}, {}, "num_experts_per_tok 3 against 2"),
        ({"vocab_size": 70}, {}, "vocab_size 61 against 70; the first step of another shape is logits"),
        ({}, {"engine_b": "slow"}, "engine_b = 'slow' is not there"),
        ({}, {"engine_b": "fast", "ops_b": ops_with(rope=interleaved)}, "ops_b would not be used by the fast engine"),
        ({}, {"keep": "layers.9.*"}, "no tap of this forward pass is called 'layers.9.\\*'"),
        ({}, {"limit": 1000}, "would hold [0-9,]+ bytes of arrays, the limit is 1,000"),
        ({}, {"segments": [0, 0]}, "segments must be whole numbers shaped like ids"),
    ],
)
def test_wrong_input(other, options, text):
    config = MICRO.replace(**other)
    with pytest.raises(ValueError, match=text):
        diff(model_of(), Model(config, random_params(config), name="other"), IDS, **options)


def test_wrong_prompts():
    for prompt, text in (("ab", "neither model has a tokenizer"), ([99], "outside the vocabulary"), ([[]], "empty")):
        with pytest.raises(ValueError, match=text):
            diff(model_of(), model_of(), prompt)


# -- how it is shown ---------------------------------------------------------------------------------------------


def test_what_is_shown_and_kept():
    found = diff(model_of(), model_of(MICRO.replace(topk_group=3), "<mistaken>"), IDS, keep="layers.1.mlp.*,logits")
    assert {row.name.split(".mlp.")[0] for row in found.rows} == {"layers.1", "logits"}
    assert found.text(every=True).count("\n") > found.text().count("\n") > 8
    assert repr(found) == found.text()
    assert "&lt;mistaken&gt;" in found._repr_html_()
    assert "rounding: layers.1.mlp.biased_scores: −∞ or NaN stand elsewhere" in found.sentence
    about = json.loads(found.to_json())
    assert about["first"] == "layers.1.mlp.biased_scores"
    assert about["same"] is False
    row = next(row for row in about["rows"] if row["name"] == about["first"])
    assert row["added"] == "inf"
    assert about["fields"] == [{"name": "topk_group", "a": 2, "b": 3}]


def test_a_table_of_many_differences_ends():
    other = Model(MICRO, random_params(MICRO, 7), name="other")
    found = diff(model_of(), other, IDS)
    assert "more steps" in found.table()
    assert "more steps" not in found.table(every=True)
    assert found.table().count("differs") < found.table(every=True).count("differs")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A right model, one without the factor, one of another size; none with a tokenizer."""
    path = tmp_path_factory.mktemp("models")
    for name, change in (("right", {}), ("wrong", {"routed_scaling_factor": 1.0}), ("wide", {"hidden_size": 24})):
        config = MICRO.replace(**change)
        Model(config, random_params(config)).save(path / name)
    return path


def test_on_the_command_line(folders, tmp_path, capsys):
    right, wrong, wide = (str(folders / name) for name in ("right", "wrong", "wide"))
    ids = ["--ids", "5", "8", "13"]
    assert main(["diff", right, right, *ids]) == 0
    assert "no step beyond rounding" in capsys.readouterr().out
    assert main(["diff", right, right, "--dtype-b", "bfloat16", *ids]) == 0
    assert "by the storage of the weights" in capsys.readouterr().out
    assert main(["diff", right, right, "--engine-b", "fast", *ids]) == 0
    assert "fast engine" in capsys.readouterr().out
    file = tmp_path / "deep" / "diff.json"
    assert main(["diff", right, wrong, "--dtype-b", "bfloat16", "--all", "--json", str(file), *ids]) == 1
    out = capsys.readouterr().out
    assert "routed_scaling_factor 2.5 against 1.0" in out
    assert json.loads(file.read_text("utf-8"))["first"] == "layers.1.mlp.expert_weights"
    for arguments, text in (
        ([right, wide, *ids], "hidden_size 20 against 24"),
        ([right, str(folders / "nowhere"), *ids], "no such folder"),
        ([right, right, "text"], "neither model has a tokenizer"),
        ([right, right, "--dtype-a", "int3", *ids], "int3"),
    ):
        assert main(["diff", *arguments]) == 2
        assert text in capsys.readouterr().err


def test_texts_and_tokenizers(capsys):
    tiny, nano = minglm.load("glm-tiny"), minglm.load("glm-nano")
    found = diff(tiny, tiny, "2+2", keep="logits")
    assert found.source == "ids by both tokenizers, alike"
    bare = Model(tiny.config, tiny.params, name="bare")
    assert diff(tiny, bare, "2+2", keep="logits").source == "ids by A's tokenizer, the only one"
    assert diff(bare, tiny, "2+2", keep="logits").source == "ids by B's tokenizer, the only one"
    other = Model(tiny.config, tiny.params, nano.tokenizer, name="other")
    assert diff(tiny, other, "2+2", keep="logits").same  # the two shipped tokenizers agree on it
    other.tokenizer = type("Backwards", (), {"encode": lambda self, text: tiny.tokenizer.encode(text)[::-1]})()
    with pytest.raises(ValueError, match="the tokenizers disagree from token 0"):
        diff(tiny, other, "for i in")


def test_the_prompt_may_come_after_options(capsys):
    assert main(["diff", "glm-nano", "glm-nano", "--keep", "logits", "def f"]) == 0
    assert "T = 2" in capsys.readouterr().out
