"""What transformers and torch compute for one of our folders: logits, routing, MTP logits, losses, gradients.

The model is theirs (`Glm4MoeForCausalLM`, `MtpModel`), read from a folder that we saved; only the two MTP losses and
the balance loss are written here, in torch, because transformers has none to call.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.modeling_layers import MtpModel
from transformers.models.glm4_moe import modeling_glm4_moe as theirs

from minglm.config import Config


class Reference(NamedTuple):
    model: Any
    mtp: Any  # None without MTP layers
    own_embedding: list[torch.nn.Parameter | None]  # per MTP layer
    own_head: list[torch.nn.Parameter | None]


class Found(NamedTuple):
    """Everything as NumPy arrays under our names."""

    hidden: np.ndarray
    logits: np.ndarray
    mtp_logits: list[np.ndarray]  # depth 1, 2, …
    losses: dict[str, float]
    indices: dict[int, np.ndarray]  # MoE layer -> [N, K]
    grads: dict[str, np.ndarray]  # Hugging Face names, per expert


def open_reference(folder: Path, config: Config, dtype: torch.dtype = torch.float32) -> Reference:
    """Load with transformers, strictly: nothing missing, only MTP tensors unexpected."""
    L, n_mtp = config.num_hidden_layers, config.num_nextn_predict_layers
    mtp_layers = "|".join(str(L + i) for i in range(max(n_mtp, 1)))
    theirs.Glm4MoePreTrainedModel._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.({mtp_layers})\..*"]
    model, info = Glm4MoeForCausalLM.from_pretrained(
        folder, config=Glm4MoeConfig.from_pretrained(folder), dtype=dtype, attn_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["mismatched_keys"], info["mismatched_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    model.set_experts_implementation("eager")
    mtp = None
    if n_mtp:
        theirs.Glm4MoePreTrainedModel._keys_to_ignore_on_load_unexpected = [
            rf"model\.layers\.{L + i}\..*" for i in range(n_mtp)
        ]
        mtp = MtpModel.from_pretrained(model)
        mtp.set_experts_implementation("eager")
    return Reference(model, mtp, [None] * n_mtp, [None] * n_mtp)


def with_own_ends(reference: Reference, tensors: dict[str, np.ndarray], config: Config) -> Reference:
    """`MtpModel` always borrows the main embedding and head; give the layers their own, from the file."""
    L = config.num_hidden_layers

    def own(name: str) -> list[torch.nn.Parameter | None]:
        arrays = [tensors.get(f"model.layers.{L + i}.{name}.weight") for i in range(len(reference.own_head))]
        return [None if a is None else torch.nn.Parameter(torch.tensor(a)) for a in arrays]

    return reference._replace(own_embedding=own("embed_tokens"), own_head=own("shared_head.head"))


def run_reference(
    reference: Reference, ids: np.ndarray, config: Config, mtp_weight: float, balance_weight: float
) -> Found:
    """Forward, losses, and torch autograd through all of it."""
    model, mtp = reference.model, reference.mtp
    tokens = torch.tensor(ids)
    recorded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = [
        module.register_forward_hook(_record(recorded, number)) for number, module in _routers(reference, config)
    ]
    out = model.model(tokens, use_cache=False)
    hidden = out.last_hidden_state
    logits = model.lm_head(hidden)
    main = _cross_entropy(logits[:, :-1], tokens[:, 1:])

    mtp_logits, mtp_loss, state = [], torch.zeros(()), hidden
    depths = min(config.num_nextn_predict_layers, ids.shape[1] - 1)
    for k in range(1, depths + 1):
        rows = ids.shape[1] - k
        own = reference.own_embedding[k - 1]
        embedded = model.model.embed_tokens(tokens[:, k:]) if own is None else own[tokens[:, k:]]
        state = mtp.forward_layer(k - 1, state[:, :rows], torch.arange(rows)[None], None, inputs_embeds=embedded)
        head = reference.own_head[k - 1]
        mtp_logits.append(state @ (model.lm_head.weight if head is None else head).T)
        mtp_loss = mtp_loss + _cross_entropy(mtp_logits[-1][:, :-1], tokens[:, k + 1 :]) / depths
    for handle in handles:
        handle.remove()

    balance = sum((_balance(*r, len(ids), config) for r in recorded.values()), torch.zeros(()))
    total = main + mtp_weight * mtp_loss + balance_weight * balance
    model.zero_grad()
    if mtp is not None:
        mtp.zero_grad()
    total.backward()
    return Found(
        hidden.detach().numpy(),
        logits.detach().numpy(),
        [x.detach().numpy() for x in mtp_logits],
        {"total": total.item(), "main": main.item(), "mtp": mtp_loss.item(), "balance": balance.item()},
        {n: indices.numpy() for n, (_, indices) in recorded.items()},
        _named_grads(reference, config),
    )


def _routers(reference: Reference, config: Config) -> list[tuple[int, Any]]:
    layers = list(enumerate(reference.model.model.layers))
    if reference.mtp is not None:
        layers += [(config.num_hidden_layers + i, m.mtp_block) for i, m in enumerate(reference.mtp.layers)]
    return [(i, layer.mlp.gate) for i, layer in layers if hasattr(layer.mlp, "gate")]


def _record(into: dict, number: int) -> Any:
    def hook(module: Any, inputs: Any, outputs: Any) -> None:
        logits, _, indices = outputs
        into[number] = (torch.sigmoid(logits), indices)

    return hook


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if targets.numel() == 0:
        return torch.zeros(())
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


def _balance(scores: torch.Tensor, indices: torch.Tensor, rows: int, config: Config) -> torch.Tensor:
    E, K = config.n_routed_experts, config.num_experts_per_tok
    share = (scores / scores.sum(-1, keepdim=True)).reshape(rows, -1, E)
    count = torch.nn.functional.one_hot(indices, E).sum(1).reshape(rows, -1, E).float()
    f = count.mean(1) * E / K
    return (f.detach() * share.mean(1)).sum(-1).mean()


def _named_grads(reference: Reference, config: Config) -> dict[str, np.ndarray]:
    """Gradients under the names on disk: fused expert stacks are taken apart, MTP layers get their numbers back."""
    grads: dict[str, np.ndarray] = {}
    named = [(n, p) for n, p in reference.model.named_parameters()]
    if reference.mtp is not None:
        for name, parameter in reference.mtp.named_parameters():
            if m := re.fullmatch(r"layers\.(\d+)\.(.*)", name):
                rest = m[2].replace("mtp_block.", "").replace("post_norm.", "shared_head.norm.")
                named.append((f"model.layers.{config.num_hidden_layers + int(m[1])}.{rest}", parameter))
    for i, (table, head) in enumerate(zip(reference.own_embedding, reference.own_head, strict=True)):
        at = f"model.layers.{config.num_hidden_layers + i}"
        named += [(f"{at}.embed_tokens.weight", table)] if table is not None else []
        named += [(f"{at}.shared_head.head.weight", head)] if head is not None else []
    for name, parameter in named:
        if parameter.grad is None:
            continue
        grad = parameter.grad.numpy()
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            grads[name] = grad
            continue
        at = name.rsplit(".", 1)[0]
        for e in range(config.n_routed_experts):
            if name.endswith("down_proj"):
                grads[f"{at}.{e}.down_proj.weight"] = grad[e]
            else:
                grads[f"{at}.{e}.gate_proj.weight"], grads[f"{at}.{e}.up_proj.weight"] = np.split(grad[e], 2)
    return grads
