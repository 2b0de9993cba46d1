"""llama.cpp's part of the benchmark, through the C functions that llama-cpp-python exposes."""

import ctypes
from typing import Any

import llama_cpp
import numpy as np

from minglm.bench.job import Answer, Job, keep_logits, median_seconds, prompt_ids

F32 = 0  # GGML_TYPE_F32


class Llama:
    """A model and a context of one sequence. Settings are llama.cpp's own, but for the number of threads; `exact`
    keeps keys and values in float32, as minglm does, instead of float16."""

    def __init__(self, path: str, capacity: int, threads: int, exact: bool = False):
        llama_cpp.llama_log_set(_silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise ValueError(f"{path}: llama.cpp cannot read it; its version may be too old for glm4moe")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = capacity, 512, 512
        settings.n_threads = settings.n_threads_batch = threads
        if exact:
            settings.type_k = settings.type_v = F32
            settings.flash_attn_type = 0  # its products are in float16
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise ValueError(f"{path}: llama.cpp cannot make a context of {capacity} tokens")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def feed(self, ids: Any) -> Any:  # -> a pointer to [V] scores after the last token
        """Continue the sequence, 512 tokens at a time."""
        for at in range(0, len(ids), 512):
            piece = (llama_cpp.llama_token * len(ids[at : at + 512]))(*ids[at : at + 512])
            if code := llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(piece, len(piece))):
                raise ValueError(f"llama_decode failed with code {code}")
        return llama_cpp.llama_get_logits_ith(self._context, -1)  # waits for the computation

    def scores(self, pointer: Any) -> np.ndarray:  # -> [V]
        return np.ctypeslib.as_array(pointer, (self._vocabulary,)).copy()

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def close(self) -> None:
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)


@llama_cpp.llama_log_callback
def _silence(level: int, text: bytes, data: Any) -> None: ...


def run(job: Job) -> Answer:
    return {"seconds": {"": WORKS[job.work](job)}}


def _decode(job: Job) -> dict[str, float]:
    ids = prompt_ids(job).tolist()
    exact = Llama(job.folder, job.prompt, job.threads, exact=True)
    keep_logits(job, exact.scores(exact.feed(ids)))
    exact.close()
    llama = Llama(job.folder, job.prompt + job.units + 8, job.threads)
    llama.feed(ids)
    tokens = iter(prompt_ids(job, job.units + 8).tolist())
    return {"unit": median_seconds(lambda: llama.feed([next(tokens)]), job.units, job.budget, uncounted=2)}


def _prefill(job: Job) -> dict[str, float]:
    ids, llama = prompt_ids(job).tolist(), Llama(job.folder, job.prompt, job.threads)

    def unit() -> None:
        llama.forget()
        llama.feed(ids)

    return {"unit": median_seconds(unit, job.units, job.budget)}


WORKS = {"decode": _decode, "prefill": _prefill}
