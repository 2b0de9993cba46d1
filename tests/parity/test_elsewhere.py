"""What we export, opened by others: transformers with 16 and 8 and 4 bits, llama.cpp. Needs the extra `parity`; for
llama.cpp, which is built from source, the extra `bench`."""

import numpy as np
import pytest
import torch
import transformers

import minglm
from minglm.api import Model
from minglm.data.heldout import heldout_documents
from minglm.formats.checkpoint import load_checkpoint, save_checkpoint
from minglm.formats.tensors import same_bits
from minglm.model import walk
from tests.variants import MICRO, random_ids, random_params

BLOCKS = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "moe_intermediate_size": 128}  # of 128
WIDE = MICRO.replace(**BLOCKS, num_attention_heads=4, num_key_value_heads=4, num_nextn_predict_layers=0)


def their_weights(model) -> dict[str, np.ndarray]:
    """Name on disk -> float32. transformers stacks experts and joins gate and up."""
    found = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            parts = dict(zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True))
        elif name.endswith("experts.down_proj"):
            parts = {"down_proj": tensor}
        else:
            found[name] = tensor.float().numpy()
            continue
        for part, stack in parts.items():
            for e, matrix in enumerate(stack):
                found[f"{name.rpartition('.')[0]}.{e}.{part}.weight"] = matrix.float().numpy()
    return found


def opened(folder, quantization=None, dtype=torch.float32):
    more = {} if quantization is None else {"quantization_config": quantization}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager", **more)


def assert_same_weights(theirs, folder):
    _, params = load_checkpoint(folder, "float32")
    ours = {name: array for name, array in walk(params) if f"layers.{WIDE.num_hidden_layers}." not in name}
    found = their_weights(theirs)
    assert found.keys() == ours.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_bfloat16_bits_survive_both_ways(tmp_path):
    params = random_params(WIDE, 1)
    save_checkpoint(tmp_path / "ours", WIDE, params, "bfloat16")
    theirs = opened(tmp_path / "ours", dtype=torch.bfloat16)
    assert_same_weights(theirs, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    (_, ours), (_, back) = (load_checkpoint(tmp_path / name, "bfloat16") for name in ("ours", "theirs"))
    for (name, a), (_, b) in zip(walk(ours), walk(back), strict=True):
        assert a.dtype == b.dtype, name
        assert same_bits(a, b), name


@pytest.mark.parametrize("kind", ["fp8", "fp8-block", "mxfp4"])
def test_small_floats_are_the_same_numbers_there(kind, tmp_path):
    """compressed-tensors for fp8 and mxfp4, transformers' own reader for blocks. They multiply as they like; the
    weights that they take from our files are the ones that we take."""
    from transformers.utils.quantization_config import CompressedTensorsConfig

    save_checkpoint(tmp_path, WIDE, random_params(WIDE, 2), kind)
    how = CompressedTensorsConfig(run_compressed=False)
    if kind == "fp8-block":
        how = transformers.FineGrainedFP8Config(dequantize=True)
    theirs = opened(tmp_path, how)
    assert_same_weights(theirs, tmp_path)
    if kind == "fp8":  # the others leave some weights in bfloat16, and torch then does not multiply
        theirs.set_experts_implementation("eager")
        config, params = load_checkpoint(tmp_path, "fp8")
        ids = random_ids(config, 2)
        with torch.no_grad():
            logits = theirs(torch.tensor(ids), use_cache=False).logits.numpy()
        np.testing.assert_allclose(Model(config, params).forward(ids).logits, logits, atol=1e-5 * np.abs(logits).max())


def test_the_shipped_checkpoint_in_fp8(tmp_path):
    minglm.load("glm-tiny", "fp8").save(tmp_path, "fp8")
    from transformers.utils.quantization_config import CompressedTensorsConfig

    theirs = opened(tmp_path, CompressedTensorsConfig(run_compressed=False))
    theirs.set_experts_implementation("eager")
    ids = [list(range(5, 69))]
    with torch.no_grad():
        logits = theirs(torch.tensor(ids), use_cache=False).logits.numpy()
    found = minglm.load(tmp_path, "fp8").forward(ids).logits
    assert np.abs(found - logits).max() <= 1e-5 * np.abs(logits).max()


# -- llama.cpp ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """glm-tiny, and llama.cpp with its GGUF file: float32 weights, float32 keys and values, no flash attention."""
    pytest.importorskip("llama_cpp", reason="needs pip install -e '.[bench]', which builds llama.cpp")
    model = minglm.load("glm-tiny")
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model.save(file, "float32")
    return model, llama(file)


def llama(file, capacity=600):
    from minglm.bench.run_llama import Llama

    return Llama(str(file), capacity, 1, exact=True)


def scores(opened, ids) -> np.ndarray:  # [T, V]
    opened.forget()
    return np.array([opened.scores(opened.feed([i])) for i in ids])


def test_llama_cpp_computes_the_same_logits(tiny):
    model, opened = tiny
    ids = model.tokenizer.encode(heldout_documents("code")[0].text)[:500]
    ours, theirs = model.forward([ids]).logits[0], scores(opened, ids)
    assert len(ids) == 500
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() >= 0.99
    assert np.abs(ours - theirs).max() <= 1e-3  # 2.3e-5 was seen


def test_llama_cpp_cuts_text_alike(tiny):
    import llama_cpp

    model, opened = tiny
    vocabulary = llama_cpp.llama_model_get_vocab(opened._model)
    texts = [document.text for document in heldout_documents()]
    texts += [
        "中文 1004 一百二十三",
        "3847+12=",
        "<|user|>\nhi<think></think>/nothink",
        " \n\n\ta  b 'LL I'm",
        "e\u0301 👩‍👩‍👧 \u00a0x",
    ]
    for text in texts:
        for start in range(0, len(text), 2000):
            piece = text[start : start + 2000]
            data, room = piece.encode(), (llama_cpp.llama_token * (len(piece.encode()) + 8))()
            count = llama_cpp.llama_tokenize(vocabulary, data, len(data), room, len(room), False, True)
            assert room[:count] == model.tokenizer.encode(piece), repr(piece)
    ends = {i for i in range(model.config.vocab_size) if llama_cpp.llama_vocab_is_eog(vocabulary, i)}
    assert ends == set(model.config.eos_token_id)


@pytest.mark.parametrize("dtype", ["bfloat16", "q8_0"])
def test_llama_cpp_reads_the_smaller_files(dtype, tiny, tmp_path):
    model, _ = tiny
    model.save(tmp_path / "small.gguf", dtype)
    ids = model.tokenizer.encode(heldout_documents("prose")[1].text)[:200]
    ours, theirs = model.forward([ids]).logits[0], scores(llama(tmp_path / "small.gguf"), ids)
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() >= 0.97


def test_llama_cpp_on_other_switches(tmp_path):
    """No q/k norm, the MTP layer's own embedding and head, a factor, no normalising, tied embeddings."""
    pytest.importorskip("llama_cpp", reason="needs pip install -e '.[bench]', which builds llama.cpp")
    config = WIDE.replace(use_qk_norm=False, norm_topk_prob=True, num_nextn_predict_layers=1, attention_bias=True)
    for number, change in enumerate(
        ({}, {"norm_topk_prob": False}, {"tie_word_embeddings": True}, {"n_shared_experts": 2})
    ):
        changed = config.replace(**change)
        model = Model(changed, random_params(changed, number, np.float32, mtp_own_ends=not change))
        model.save(tmp_path / "it.gguf", "float32")
        ids = random_ids(changed, number)[0].tolist()
        ours, theirs = model.forward([ids]).logits[0], scores(llama(tmp_path / "it.gguf"), ids)
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(ours).max(), change
