"""transformers' part of the benchmark: `Glm4MoeForCausalLM` on torch's CPU kernels, each of its ways to run experts."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import Glm4MoeForCausalLM, StaticCache
from transformers.utils import logging

from minglm.bench.job import Answer, Job, keep_logits, median_seconds, prompt_ids

BACKENDS = ("grouped_mm", "eager", "batched_mm")
GATHERED = 4e9  # bytes of gathered expert weights past which "batched_mm" is left out


def run(job: Job) -> Answer:
    """Every backend in turn on one model; one that fails or gathers too much is left out, with the reason."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(job.threads)
    model: Any = Glm4MoeForCausalLM.from_pretrained(job.folder, dtype=getattr(torch, job.dtype)).eval()
    if job.subject == "torch.compile":
        return {"seconds": {"compiled": _compiled(model, job)}}
    seconds, left_out = {}, {}
    for backend in BACKENDS if job.work != "growth" else BACKENDS[:1]:  # attention is the same in all
        if backend == "batched_mm" and (size := _gathered_bytes(model.config, job)) > GATHERED:
            left_out[backend] = f"gathers {size / 1e9:.0f} GB of expert weights"
            continue
        model.set_experts_implementation(backend)
        try:
            seconds[backend] = WORKS[job.work](model, job)
        except (RuntimeError, NotImplementedError, MemoryError) as error:
            left_out[backend] = str(error).splitlines()[0][:200]
    return {"seconds": seconds, "left_out": left_out}


def _gathered_bytes(c: Any, job: Job) -> int:
    """What "batched_mm" copies: both matrices of each picked expert for each token; for training in every layer."""
    tokens = {"prefill": job.prompt, "train": job.prompt * job.rows}.get(job.work, 1)
    layers = c.num_hidden_layers if job.work == "train" else 1
    number = 2 if job.dtype == "bfloat16" else 4
    return int(tokens * c.num_experts_per_tok * 3 * c.hidden_size * c.moe_intermediate_size * number * layers)


def _decode(model: Any, job: Job) -> dict[str, float]:
    with torch.inference_mode():
        out = model(_tokens(job), use_cache=True, logits_to_keep=1)
        keep_logits(job, out.logits[0, -1].float().numpy())
        return {"unit": median_seconds(_stepper(model, out.past_key_values), job.units, job.budget, uncounted=2)}


def _stepper(model: Any, cache: Any) -> Callable[[], None]:
    token = torch.tensor([[1]])
    return lambda: model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _prefill(model: Any, job: Job) -> dict[str, float]:
    ids = _tokens(job)
    with torch.inference_mode():
        unit = lambda: model(ids, use_cache=True, logits_to_keep=1)  # noqa: E731
        return {"unit": median_seconds(unit, job.units, job.budget)}


def _growth(model: Any, job: Job) -> dict[str, float]:
    ids, found, fed = _tokens(job, max(job.contexts)), {}, 0
    cache: Any = None
    with torch.inference_mode():
        for context in job.contexts:
            for at in range(fed, context, 512):
                piece = ids[:, at : min(at + 512, context)]
                cache = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            found[str(context)] = median_seconds(_stepper(model, cache), job.units, job.budget)
            fed = cache.get_seq_length()
    return found


def _train(model: Any, job: Job) -> dict[str, float]:
    """Loss, gradients, clipping, AdamW that works in place."""
    model.train()
    ids = _tokens(job, job.rows * job.prompt).reshape(job.rows, job.prompt)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def unit() -> None:
        optimiser.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

    try:
        return {"unit": median_seconds(unit, job.units, job.budget)}
    finally:
        optimiser.zero_grad()
        model.eval()


def _compiled(model: Any, job: Job) -> dict[str, float]:
    """Decoding under torch.compile, with a cache of fixed size as it wants; the compiling is not counted."""
    model.set_experts_implementation("batched_mm")
    with torch.inference_mode():
        cache = StaticCache(config=model.config, max_cache_len=job.prompt + job.units + 16)
        out = model(_tokens(job), past_key_values=cache, use_cache=True, logits_to_keep=1)
        keep_logits(job, out.logits[0, -1].float().numpy())
        model.forward = torch.compile(model.forward, dynamic=False)
        return {"unit": median_seconds(_stepper(model, cache), job.units, job.budget + 60, uncounted=4)}


def _tokens(job: Job, length: int | None = None) -> torch.Tensor:  # -> int64 [1, T]
    return torch.from_numpy(prompt_ids(job, length))[None]


WORKS: dict[str, Callable[[Any, Job], dict[str, float]]] = {
    "decode": _decode,
    "prefill": _prefill,
    "growth": _growth,
    "train": _train,
}
