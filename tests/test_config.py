"""Config: the released files load, every spelling is read, every rule names field, value and rule, counts are right."""

import copy
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.config import PRESETS, Config
from minglm.model.params import Params, build, walk
from minglm.model.rope import inverse_frequencies


def air() -> dict:
    """config.json of GLM-4.5-Air, as released."""
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "pad_token_id": 151329,
        "eos_token_id": [151329, 151336, 151338],
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "partial_rotary_factor": 0.5,
        "initializer_range": 0.02,
        "intermediate_size": 10944,
        "max_position_embeddings": 131072,
        "model_type": "glm4_moe",
        "moe_intermediate_size": 1408,
        "norm_topk_prob": True,
        "num_attention_heads": 96,
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.0,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 46,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "num_nextn_predict_layers": 1,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.54.0",
        "use_cache": True,
        "use_qk_norm": False,
        "vocab_size": 151552,
    }


def large(context: int) -> dict:
    """The same for GLM-4.6 and 4.7, which differ from 4.5 in the context only."""
    return {
        **air(),
        "hidden_size": 5120,
        "num_hidden_layers": 92,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "n_routed_experts": 160,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "use_qk_norm": True,
        "max_position_embeddings": context,
    }


def glm_47() -> dict:
    values = {**large(202752), "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_router_dtype": "float32"}
    del values["initializer_range"]
    return values


def tiny(**changes: object) -> dict:
    values = PRESETS["micro"].to_dict()
    values.update(changes)
    return values


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Valid configs with every switch."""

    def size(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    groups, per_group, kv_heads, rotary = size(1, 3), size(2, 4), size(1, 3), size(1, 3)
    kept, layers, vocab = size(1, groups), size(1, 4), size(2, 40)
    factor = draw(st.sampled_from([0.25, 0.5, 1.0]))
    token = st.integers(0, vocab - 1)
    number = st.floats(0.01, 1e6)
    scaling = st.one_of(
        st.none(),
        st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": number}),
        st.fixed_dictionaries(
            {"rope_type": st.just("yarn"), "factor": number},
            optional={"beta_fast": st.none() | number, "original_max_position_embeddings": st.integers(1, 99)},
        ),
    )
    return Config(
        vocab_size=vocab,
        hidden_size=size(1, 24),
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * size(1, 3),
        num_key_value_heads=kv_heads,
        head_dim=int(2 * rotary / factor),
        intermediate_size=size(1, 20),
        moe_intermediate_size=size(1, 12),
        n_routed_experts=groups * per_group,
        num_experts_per_tok=size(1, kept * per_group),
        n_shared_experts=size(0, 2),
        first_k_dense_replace=size(0, layers),
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(number),
        use_qk_norm=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        partial_rotary_factor=factor,
        rope_theta=draw(st.floats(1.5, 1e7)),
        rope_scaling=draw(scaling),
        max_position_embeddings=size(1, 500),
        rms_norm_eps=draw(st.floats(1e-8, 1e-2)),
        tie_word_embeddings=draw(st.booleans()),
        num_nextn_predict_layers=size(0, 2),
        eos_token_id=tuple(draw(st.lists(token, max_size=3))),
        pad_token_id=draw(st.none() | token),
        bos_token_id=draw(st.none() | token),
        extra=draw(st.dictionaries(st.sampled_from(["use_cache", "torch_dtype", "quant"]), st.none() | st.text())),
    )


# -- released models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [("GLM-4.5-Air", air()), ("GLM-4.5", large(131072)), ("GLM-4.6", large(202752)), ("GLM-4.7", glm_47())],
)
def test_released_files_give_the_presets(name: str, values: dict) -> None:
    config = Config.from_dict(values)
    assert config.replace(extra={}) == PRESETS[name]
    assert (config.rotary_dim, config.eos_token_id) == (64, (151329, 151336, 151338))
    written = config.to_dict()
    assert {k: written[k] for k in values} == values  # nothing lost, unknown keys included
    assert written["num_nextn_predict_layers"] == 1


def test_counts_of_the_report() -> None:
    """Table 1 of arXiv 2508.06471: 355 B with 32 B active, Air 106 B with 12 B; exact derived counts per part."""
    counts, small = PRESETS["GLM-4.5"].count_parameters(), PRESETS["GLM-4.5-Air"].count_parameters()
    assert (round(counts.report_total / 1e9, 1), round(counts.report_active / 1e9, 1)) == (355.2, 32.5)
    assert (round(small.report_total / 1e9, 1), round(small.report_active / 1e9, 1)) == (108.0, 12.5)
    assert (counts.mtp, small.mtp) == (3_988_069_792, 2_375_059_584)
    assert (round(counts.trunk / 1e9, 3), round(small.trunk / 1e9, 3)) == (351.246, 105.611)
    total = counts.trunk + counts.embedding + counts.head
    assert (round(total / 1e9, 3), counts.total) == (352.798, total + counts.mtp)
    assert counts.active == counts.trunk_active + counts.head
    assert PRESETS["GLM-4.5"].kv_bytes_per_token() == 376_832
    assert PRESETS["GLM-4.5-Air"].kv_bytes_per_token() == 188_416


def test_counts_by_hand() -> None:
    micro = PRESETS["micro"]  # D 20, H 6, G 2, d 8, F 12, E 8, K 3, 2 shared, 3 layers of which 1 dense, 2 MTP
    attention = 20 * 8 * (6 + 4) + 8 * (6 + 4) + 2 * 8 + 48 * 20
    moe_block = 8 * 20 + 8 + 3 * 20 * 12 * 2
    dense_layer, expert = 40 + attention + 3 * 20 * 28, 3 * 20 * 12
    assert micro.count_parameters().trunk == dense_layer + 2 * (40 + attention + moe_block + 8 * expert) + 20
    active = dense_layer + 2 * (40 + attention + moe_block + 3 * expert) + 20
    assert micro.count_parameters().active == active + 61 * 20
    assert micro.flops_per_token(0) == 2 * (active + 61 * 20)
    assert micro.flops_per_token(5) - micro.flops_per_token(4) == 4 * 6 * 8 * 3
    assert micro.kv_bytes_per_token(4) == 2 * 3 * 2 * 8 * 4


def sizes(config: Config, own_ends: bool = False) -> Params:
    """A model whose arrays have their shapes and take no memory."""
    return build(config, lambda name, shape: np.broadcast_to(np.float32(0), shape), own_ends)


def count(tree: object) -> int:
    if isinstance(tree, np.ndarray):
        return tree.size
    return sum(count(part) for part in tree) if isinstance(tree, tuple) else 0


@pytest.mark.parametrize("name", ["micro", "glm-nano", "GLM-4.5-Air"])
def test_counts_are_the_sizes_of_the_arrays(name: str) -> None:
    _counts_match(PRESETS[name])


@settings(max_examples=60, deadline=None)
@given(configs())
def test_counts_are_the_sizes_of_the_arrays_of_any_config(config: Config) -> None:
    _counts_match(config)


def _counts_match(config: Config) -> None:
    params, counts = sizes(config), config.count_parameters()
    assert counts.embedding == count(params.embed_tokens)
    assert counts.head == count(params.lm_head)
    assert counts.trunk == count(params.layers) + count(params.norm)
    assert counts.mtp == count(params.mtp)
    assert counts.total == count(params) == sum(array.size for _, array in walk(params))
    per_expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = (config.n_routed_experts - config.num_experts_per_tok) * per_expert
    sparse = config.num_hidden_layers - config.first_k_dense_replace
    assert counts.trunk - counts.trunk_active == sparse * idle
    assert counts.mtp - counts.mtp_active == config.num_nextn_predict_layers * idle


# -- spellings ---------------------------------------------------------------------------------------------------


YARN = {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16}


@pytest.mark.parametrize(
    ("given_keys", "scaling"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, None),
        ({"rope_theta": 5e5}, None),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, None),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, None),
        ({"rope_parameters": {"rope_theta": 5e5}}, None),
        ({"rope_theta": 5e5, "rope_parameters": None}, None),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, {"rope_type": "linear", "factor": 2}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2}},
            {"rope_type": "linear", "factor": 2},
        ),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **YARN}}, {"rope_type": "yarn", **YARN}),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn", **YARN}}, {"rope_type": "yarn", **YARN}),
        ({"rope_theta": 1.5, "rope_parameters": {"rope_theta": 5e5}}, None),  # as transformers: inside wins
    ],
)
def test_spellings_of_rope(given_keys: dict, scaling: dict | None) -> None:
    values = {k: v for k, v in tiny().items() if k not in ("rope_theta", "rope_scaling")}
    config = Config.from_dict({**values, **given_keys})
    assert (config.rope_theta, config.rope_scaling) == (5e5, scaling)
    assert "rope_parameters" not in config.to_dict()


@pytest.mark.parametrize(
    ("given_keys", "rotary"),
    [
        ({}, 4),
        ({"partial_rotary_factor": None}, 4),
        ({"partial_rotary_factor": 1.0}, 8),
        ({"rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 100.0}}, 2),
    ],
)
def test_rotary_factor_is_a_half_unless_given(given_keys: dict, rotary: int) -> None:
    """mlx-lm #1698 rotated all entries when the key was missing."""
    values = {k: v for k, v in tiny().items() if k != "partial_rotary_factor"}
    assert Config.from_dict({**values, **given_keys}).rotary_dim == rotary


def test_other_names() -> None:
    values = tiny()
    values["num_mtp_layers"] = values.pop("num_nextn_predict_layers")
    values["num_local_experts"] = values.pop("n_routed_experts")
    config = Config.from_dict(values)
    assert config == PRESETS["micro"].replace(extra=config.extra)
    assert (config.num_nextn_predict_layers, config.n_routed_experts) == (2, 8)
    assert "num_mtp_layers" not in config.to_dict()
    assert Config.from_dict(tiny(num_mtp_layers=2, num_local_experts=8)) == config
    with pytest.raises(ValueError, match=r"num_mtp_layers = 1 must equal num_nextn_predict_layers = 2"):
        Config.from_dict(tiny(num_mtp_layers=1))


@pytest.mark.parametrize(("eos", "wanted"), [(7, (7,)), ([7, 9], (7, 9)), (None, ()), ([], ()), ([0], (0,))])
def test_spellings_of_eos(eos: object, wanted: tuple) -> None:
    config = Config.from_dict(tiny(eos_token_id=eos))
    assert config.eos_token_id == wanted
    assert config.to_dict()["eos_token_id"] == list(wanted)


def test_missing_head_dim() -> None:
    values = tiny(hidden_size=24)
    del values["head_dim"]
    assert Config.from_dict(values).head_dim == 4
    assert Config.from_dict({**values, "head_dim": None}).head_dim == 4
    with pytest.raises(ValueError, match=r"head_dim = None is missing and hidden_size = 25 .*; set head_dim"):
        Config.from_dict({**values, "hidden_size": 25})


def test_every_missing_field_is_listed() -> None:
    with pytest.raises(ValueError, match=r"missing vocab_size, hidden_size, .*num_experts_per_tok"):
        Config.from_dict({"model_type": "glm4_moe"})
    values = tiny()
    del values["vocab_size"], values["n_routed_experts"]
    with pytest.raises(ValueError, match=r"missing vocab_size, n_routed_experts; add them"):
        Config.from_dict(values)


def test_unknown_keys_are_kept() -> None:
    extra = {"auto_map": {"a": [1, 2]}, "extra": 5, "torch_dtype": "bfloat16", "architectures": ["Mine"]}
    config = Config.from_dict(tiny(**extra))
    assert config.extra == extra
    assert {k: config.to_dict()[k] for k in extra} == extra
    assert PRESETS["micro"].to_dict()["architectures"] == ["Glm4MoeForCausalLM"]


@settings(max_examples=100, deadline=None)
@given(configs())
def test_writing_and_reading_give_the_same(config: Config) -> None:
    again = Config.from_dict(json.loads(config.to_json()))
    wanted = {"architectures": ["Glm4MoeForCausalLM"], **config.extra}
    assert again == config.replace(extra=wanted)
    assert Config.from_dict(again.to_dict()) == again


def test_input_is_not_changed() -> None:
    values = tiny(rope_scaling={"type": "yarn", **YARN})
    before = copy.deepcopy(values)
    Config.from_dict(values)
    assert values == before


# -- rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_routed_experts": 9}, r"n_routed_experts = 9 must be a multiple of n_group = 4"),
        ({"n_group": 8}, r"n_routed_experts = 8 gives 1 expert per group \(n_group = 8\); must be 2 or more"),
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok = 5 must be at most topk_group · .* = 2 · 2 = 4"),
        ({"topk_group": 5}, r"topk_group = 5 must be at most n_group = 4"),
        ({"num_attention_heads": 7}, r"num_attention_heads = 7 must be a multiple of num_key_value_heads = 2"),
        ({"head_dim": 6}, r"partial_rotary_factor = 0.5 rotates 3 of head_dim = 6 entries; must be an even number"),
        ({"head_dim": 1}, r"partial_rotary_factor = 0.5 rotates 0 of head_dim = 1"),
        ({"partial_rotary_factor": 1.5}, r"partial_rotary_factor = 1.5 must be in \(0, 1\]"),
        ({"partial_rotary_factor": 0}, r"partial_rotary_factor = 0 must be a finite number above 0"),
        ({"model_type": "glm4_moe_lite"}, r"model_type = 'glm4_moe_lite' must be 'glm4_moe'"),
        ({"model_type": None}, r"model_type = None must be 'glm4_moe'"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu' must be 'silu'"),
        ({"scoring_func": "softmax"}, r"scoring_func = 'softmax' must be 'sigmoid'"),
        ({"first_k_dense_replace": 4}, r"first_k_dense_replace = 4 must be at most num_hidden_layers = 3"),
        ({"first_k_dense_replace": -1}, r"first_k_dense_replace = -1 must be a whole number from 0"),
        ({"hidden_size": 0}, r"hidden_size = 0 must be a whole number from 1"),
        ({"hidden_size": 20.0}, r"hidden_size = 20.0 must be a whole number"),
        ({"hidden_size": True}, r"hidden_size = True must be a whole number"),
        ({"vocab_size": "61"}, r"vocab_size = '61' must be a whole number"),
        ({"head_dim": 10**400}, r"head_dim = 10+ must be a whole number from 1 to 2³¹ − 1"),
        ({"use_qk_norm": 1}, r"use_qk_norm = 1 must be true or false"),
        ({"norm_topk_prob": None}, r"norm_topk_prob = None must be true or false"),
        ({"routed_scaling_factor": math.nan}, r"routed_scaling_factor = nan must be a finite number above 0"),
        ({"routed_scaling_factor": 0}, r"routed_scaling_factor = 0 must be a finite number above 0"),
        ({"rope_theta": math.inf}, r"rope_theta = inf must be a finite number above 0"),
        ({"rope_theta": 10**400}, r"rope_theta = 10+ must be a finite number above 0"),
        ({"rms_norm_eps": -1e-5}, r"rms_norm_eps = -1e-05 must be a finite number above 0"),
        ({"eos_token_id": [1, 61]}, r"eos_token_id = 61 must be a token id below vocab_size = 61"),
        ({"eos_token_id": [1, None]}, r"eos_token_id = None must be a token id"),
        ({"eos_token_id": "</s>"}, r"eos_token_id = '</s>' must be a token id"),
        ({"pad_token_id": -1}, r"pad_token_id = -1 must be a token id"),
        ({"bos_token_id": 1.0}, r"bos_token_id = 1.0 must be a token id"),
        ({"rope_scaling": "yarn"}, r"rope_scaling = 'yarn' must be an object or null"),
        ({"rope_parameters": [1]}, r"rope_parameters = \[1\] must be an object or null"),
        ({"rope_scaling": {"type": "ntk", "factor": 2}}, r"rope_scaling.rope_type = 'ntk' must be one of linear, yarn"),
        ({"rope_scaling": {"rope_type": [], "factor": 2}}, r"rope_scaling.rope_type = \[\] must be one of"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling.factor = 0 must be a finite number above 0"),
        ({"rope_scaling": {"type": "yarn", "factor": "2"}}, r"rope_scaling.factor = '2' must be"),
        ({"rope_scaling": {"type": "yarn", **YARN, "beta_fast": "32"}}, r"rope_scaling.beta_fast = '32' must be"),
        ({"rope_scaling": {"type": "yarn", **YARN, "mscale": -1}}, r"rope_scaling.mscale = -1 must be"),
        ({"rope_scaling": {"type": "yarn", **YARN}, "rope_theta": 1.0}, r"rope_theta = 1.0 must be above 1 for yarn"),
    ],
)
def test_a_broken_rule_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match="^config: " + message):
        Config.from_dict(tiny(**changes))


def test_a_config_made_by_hand_is_checked_too() -> None:
    micro = PRESETS["micro"]
    with pytest.raises(ValueError, match="eos_token_id = 5 must be a tuple"):
        micro.replace(eos_token_id=5)
    with pytest.raises(ValueError, match=r"rope_type = 'default' .* \(or rope_scaling null, for default\)"):
        micro.replace(rope_scaling={"rope_type": "default"})


JUNK = st.recursive(
    st.none() | st.booleans() | st.text(max_size=4) | st.floats() | st.integers(-3, 200) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "factor", "a"]), inner),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_junk_is_a_value_error_or_a_valid_config(data: st.DataObject) -> None:
    values = tiny(**data.draw(st.sampled_from([{}, {"rope_scaling": {"type": "yarn", **YARN}}])))
    if data.draw(st.booleans()):
        values["rope_parameters"] = {"rope_theta": 1e4, "rope_type": "yarn", **YARN}
    names = [*values, "rope_parameters", "num_mtp_layers", "num_local_experts", "extra", "new"]
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        place = values
        if isinstance(values.get(name), dict) and data.draw(st.booleans()):
            place, name = values[name], data.draw(st.sampled_from([*values[name], "attention_factor"]))
        if data.draw(st.integers(0, 9)) == 0:
            place.pop(name, None)
        else:
            place[name] = data.draw(JUNK)
    try:
        config = Config.from_dict(values)
    except ValueError:
        return
    assert config.count_parameters().total > 0
    json.loads(config.to_json())
    with np.errstate(all="ignore"):
        inverse_frequencies(config)  # nor does a later step stumble over what was let through


# -- files -------------------------------------------------------------------------------------------------------


def test_reading_a_file(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(PRESETS["micro"].to_json(), "utf-8")
    assert Config.load(path) == Config.load(tmp_path) == Config.from_dict(PRESETS["micro"].to_dict())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "wanted a JSON object, got list"),
        (b"null", "wanted a JSON object, got NoneType"),
        (b"{}", "model_type = None"),
        (b'{"model_type": "glm4_moe", "hidden_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (None, "cannot read the model's config: No such file"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text: bytes | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=message) as caught:
        Config.load(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"), [("attention_factor", 0), ("attention_factor", -1), ("truncate", "yes"), ("truncate", 0)]
)
def test_yarn_options_that_would_silence_attention_or_mean_nothing(option, value):
    with pytest.raises(ValueError, match=f"rope_scaling.{option} = "):
        PRESETS["micro"].replace(rope_scaling={"rope_type": "yarn", "factor": 2.0, option: value})
