"""GGUF files, read with the package that llama.cpp's own tools use. What llama.cpp makes of them: tests/parity."""

import json

import gguf
import ml_dtypes
import numpy as np
import pytest

import minglm
from minglm.cli import main
from minglm.formats import gguf_file
from minglm.formats.gguf_file import save_gguf
from tests.releases import RELEASES, SMALL, write_release

KINDS = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def tiny():
    return minglm.load("glm-tiny")


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    for dtype in gguf_file.GGUF_DTYPES:
        tiny.save(folder / f"{dtype}.gguf", dtype)
    return {dtype: gguf.GGUFReader(folder / f"{dtype}.gguf") for dtype in gguf_file.GGUF_DTYPES}


def tensors(reader):
    return {tensor.name: tensor for tensor in reader.tensors}


def test_every_weight_is_there_once_with_its_number(tiny, files):
    found = tensors(files["float32"])
    assert sum(int(t.n_elements) for t in found.values()) == sum(array.size for _, array in minglm.walk(tiny.params))
    layer, mtp = tiny.params.layers[2], tiny.params.mtp[0]
    for name, wanted in {
        "token_embd.weight": tiny.params.embed_tokens.weight,
        "output_norm.weight": tiny.params.norm.weight,
        "blk.2.attn_q.bias": layer.self_attn.q_proj.bias,
        "blk.2.attn_k_norm.weight": layer.self_attn.k_norm.weight,
        "blk.2.ffn_down_exps.weight": layer.mlp.experts.down_proj,
        "blk.2.ffn_up_shexp.weight": layer.mlp.shared_experts.up_proj.weight,
        "blk.2.ffn_gate_inp.weight": layer.mlp.gate.weight,
        "blk.2.exp_probs_b.bias": layer.mlp.gate.e_score_correction_bias,
        "blk.6.nextn.eh_proj.weight": mtp.eh_proj.weight,
        "blk.6.nextn.enorm.weight": mtp.enorm.weight,
        "blk.6.nextn.hnorm.weight": mtp.hnorm.weight,
        "blk.6.nextn.shared_head_norm.weight": mtp.shared_head.norm.weight,
        "blk.6.ffn_gate_exps.weight": mtp.block.mlp.experts.gate_proj,
    }.items():
        np.testing.assert_array_equal(found[name].data, wanted, err_msg=name)


def test_the_mtp_layer_s_own_embedding_and_head_go_along(tmp_path):
    write_release(tmp_path / "release", RELEASES["GLM-4.5"], **SMALL)
    model = minglm.load(tmp_path / "release")
    save_gguf(tmp_path / "it.gguf", model.config, model.params, "float32")
    found = tensors(gguf.GGUFReader(tmp_path / "it.gguf"))
    np.testing.assert_array_equal(
        found["blk.3.nextn.embed_tokens.weight"].data, model.params.mtp[0].embed_tokens.weight
    )
    own_head = model.params.mtp[0].shared_head.head
    np.testing.assert_array_equal(found["blk.3.nextn.shared_head_head.weight"].data, own_head.weight)


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", KINDS.BF16), ("q8_0", KINDS.Q8_0)])
def test_matrices_are_small_vectors_and_routers_are_not(tiny, files, dtype, kind):
    for tensor in files[dtype].tensors:
        plain = len(tensor.shape) == 1 or ".ffn_gate_inp." in tensor.name
        assert tensor.tensor_type == (KINDS.F32 if plain else kind), tensor.name
    experts = tiny.params.layers[1].mlp.experts.up_proj
    found = gguf.quants.dequantize(tensors(files[dtype])["blk.1.ffn_up_exps.weight"].data, kind)
    if dtype == "bfloat16":
        np.testing.assert_array_equal(found.reshape(experts.shape), experts.astype(ml_dtypes.bfloat16).astype("f4"))
    else:  # half a step of a block: its largest number / 127 / 2, and the scale's own rounding
        blocks = np.abs(experts).reshape(*experts.shape[:-1], -1, 32).max(-1).repeat(32, -1)
        assert (np.abs(found.reshape(experts.shape) - experts) <= blocks / 127 * 0.52 + blocks / 2048).all()


def test_rows_that_no_block_of_32_divides_stay_float16(tmp_path):
    model = minglm.new("micro")
    assert model.config.hidden_size % 32
    model.save(tmp_path / "odd.gguf", "q8_0")
    found = tensors(gguf.GGUFReader(tmp_path / "odd.gguf"))["blk.0.attn_q.weight"]
    assert found.tensor_type == KINDS.F16
    np.testing.assert_array_equal(found.data, model.params.layers[0].self_attn.q_proj.weight.astype(np.float16))


def test_keys_say_what_the_config_says(tiny, files):
    def key(name):
        return files["bfloat16"].get_field(f"glm4moe.{name}").contents()

    c = tiny.config
    assert files["bfloat16"].get_field("general.architecture").contents() == "glm4moe"
    assert (key("block_count"), key("nextn_predict_layers")) == (c.num_hidden_layers + 1, 1)
    assert (key("embedding_length"), key("feed_forward_length")) == (c.hidden_size, c.intermediate_size)
    assert (key("attention.head_count"), key("attention.head_count_kv")) == (
        c.num_attention_heads,
        c.num_key_value_heads,
    )
    assert (key("attention.key_length"), key("rope.dimension_count")) == (c.head_dim, c.rotary_dim)
    assert key("rope.freq_base") == c.rope_theta
    assert (key("expert_count"), key("expert_used_count")) == (c.n_routed_experts, c.num_experts_per_tok)
    assert (key("expert_gating_func"), key("expert_weights_norm")) == (2, c.norm_topk_prob)
    assert key("expert_weights_scale") == pytest.approx(c.routed_scaling_factor)
    assert key("leading_dense_block_count") == c.first_k_dense_replace


def test_the_tokenizer_and_the_template_go_along(tiny, files):
    def key(name):
        return files["q8_0"].get_field(f"tokenizer.{name}").contents()

    tokens, kinds = key("ggml.tokens"), key("ggml.token_type")
    assert len(tokens) == len(kinds) == tiny.config.vocab_size
    assert tokens == [tiny.tokenizer.library.id_to_token(i) for i in range(len(tokens))]
    user, think = tiny.tokenizer.id("<|user|>"), tiny.tokenizer.id("<think>")
    assert (kinds[0], kinds[user], kinds[think]) == (1, 3, 4)
    assert (key("ggml.eot_token_id"), key("ggml.eos_token_id")) == (user, tiny.tokenizer.id("<|endoftext|>"))
    assert key("ggml.add_bos_token") is False
    assert key("chat_template") == tiny.chat_template.source


def test_a_model_without_tokenizer_or_mtp_layer(tmp_path):
    model = minglm.new(minglm.PRESETS["micro"].replace(num_nextn_predict_layers=0))
    model.save(tmp_path / "bare.gguf", "float32")
    reader = gguf.GGUFReader(tmp_path / "bare.gguf")
    assert reader.get_field("tokenizer.ggml.model").contents() == "no_vocab"
    assert reader.get_field("glm4moe.nextn_predict_layers").contents() == 0
    assert not any("nextn" in tensor.name for tensor in reader.tensors)


def test_convert_writes_a_file_and_does_not_write_over_one(tmp_path, capsys):
    file = str(tmp_path / "nano.gguf")
    assert main(["convert", "glm-nano", file, "--dtype", "q8_0"]) == 0
    assert "and read it back" in capsys.readouterr().out
    before = (tmp_path / "nano.gguf").read_bytes()
    assert main(["convert", "glm-nano", file]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["convert", "glm-nano", file, "--dtype", "fp8", "--force"]) == 2
    assert "float32, bfloat16, q8_0" in capsys.readouterr().err
    assert (tmp_path / "nano.gguf").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["nano.gguf"]


def test_a_file_that_comes_back_otherwise_is_not_kept(tiny, tmp_path, monkeypatch):
    (tmp_path / "it.gguf").write_bytes(b"the old one")
    monkeypatch.setattr(gguf_file, "same_bits", lambda a, b: False)
    with pytest.raises(ValueError, match=r"token_embd\.weight did not come back"):
        tiny.save(tmp_path / "it.gguf", "bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["it.gguf"]
    assert (tmp_path / "it.gguf").read_bytes() == b"the old one"


def test_what_has_no_place_is_refused(tiny, tmp_path):
    stretched = tiny.config.replace(rope_scaling={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(ValueError, match="rope_scaling"):
        save_gguf(tmp_path / "no.gguf", stretched, tiny.params)
    content = json.loads(tiny.tokenizer.library.to_str())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"
    other = type(tiny.tokenizer)(type(tiny.tokenizer.library).from_str(json.dumps(content)))
    with pytest.raises(ValueError, match="does not cut text as GLM"):
        save_gguf(tmp_path / "no.gguf", tiny.config, tiny.params, tokenizer=other)
    assert not list(tmp_path.iterdir())


def test_numbers_that_a_block_cannot_hold_are_refused(tmp_path):
    model = minglm.new("micro", seed=0)
    for dtype, number in (("q8_0", 1e10), ("bfloat16", 3.4e38), ("q8_0", np.nan), ("bfloat16", np.inf)):
        model.params.embed_tokens.weight[0, 0] = number
        with pytest.raises(ValueError, match=r"model.embed_tokens.weight holds NaN, infinity, or numbers too large"):
            model.save(tmp_path / "m.gguf", dtype)
    model.save(tmp_path / "m.gguf", "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_folder_is_not_replaced(tmp_path):
    (tmp_path / "m.gguf").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        minglm.new("micro", seed=0).save(tmp_path / "m.gguf")
