"""The sizes of minglm.look.families, counted by transformers' classes on the meta device, which takes no memory."""

import pytest
import torch
import transformers

from minglm.look.families import FAMILIES

CLASSES = {
    "DeepSeek-V3": "DeepseekV3",
    "Kimi K2": "DeepseekV3",
    "Qwen3-235B-A22B": "Qwen3Moe",
    "gpt-oss-120b": "GptOss",
}
OTHER_NAMES = {"Qwen3Moe": {"n_routed_experts": "num_experts"}, "GptOss": {"n_routed_experts": "num_local_experts"}}


@pytest.mark.parametrize("name", CLASSES)
def test_parameters_as_transformers_counts_them(name):
    kind = CLASSES[name]
    sizes = {OTHER_NAMES.get(kind, {}).get(k, k): v for k, v in FAMILIES[name].config.to_dict().items()}
    for ours in ("architectures", "model_type", "rope_scaling", "attention_bias", "use_qk_norm", "eos_token_id"):
        del sizes[ours]
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
    biases = [buffer for key, buffer in model.named_buffers() if key.endswith("e_score_correction_bias")]
    assert sum(array.numel() for array in [*model.parameters(), *biases]) == FAMILIES[name].total
