"""The face of the package: `load`, `new`, and the `Model` they return."""

import os
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minglm.config import PRESETS, Config
from minglm.model import loss as losses
from minglm.model import ops as numpy_ops
from minglm.model.kvcache import KVCache
from minglm.model.mtp import mtp_chain, mtp_head_weight
from minglm.model.ops import Array, Ops, Tap, linear, no_tap
from minglm.model.params import Params, compute_dtype, init_params, map_arrays
from minglm.model.transformer import head, transformer

if TYPE_CHECKING:
    from minglm.generate.loop import Engine, Result, Step
    from minglm.generate.speculative import Drafter
    from minglm.look.trace import Trace
    from minglm.look.walk import Walk
    from minglm.text.template import ChatTemplate
    from minglm.text.tokenizer import StreamDecoder, Tokenizer

MOST_DRAFTS = 32
UserTap = Callable[[str, Array], Array | None]


class Output(NamedTuple):
    logits: Array | None  # [B, T, V]; None with stop_at
    hidden: Array  # [B, T, D] after the final norm; with stop_at, the residual stream there


class Model:
    """A GLM-4.5: its config, its weights, and its tokenizer if the folder had one.

    Nothing in it changes when it runs: caches, taps and generators are arguments.
    """

    def __init__(
        self,
        config: Config,
        params: Params,
        tokenizer: "Tokenizer | None" = None,
        chat_template: "ChatTemplate | None" = None,
        name: str = "model",
        folder: Path | None = None,
    ):
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.name = name
        self.folder = folder  # that it was loaded from

    @property
    def compute_dtype(self) -> Any:
        """float64 for float64 weights, float32 for all others, however few bits they are stored in."""
        return compute_dtype(self.params)

    @property
    def usable_tokens(self) -> int:
        """Ids below this one stand for a token; the rest of the vocabulary is padding and is never generated."""
        return min(len(self.tokenizer), self.config.vocab_size) if self.tokenizer else self.config.vocab_size

    # -- running ---------------------------------------------------------------------------------------------

    def forward(
        self,
        ids: Any,
        cache: KVCache | None = None,
        positions: Any = None,
        segments: Any = None,
        tap: UserTap | None = None,
        stop_at: int | None = None,
        ops: Ops = numpy_ops,
    ) -> Output:
        """Logits [B, T, V] and final hidden states [B, T, D] for ids, int [B, T].

        `segments` [B, T] numbers the documents in a row (negative: padding); `positions` [B, T] overrides the
        default, which counts from 0 within each. `cache` (see `new_cache`) is continued. `tap(name, array)` sees
        every step and may return a replacement. `stop_at=n` stops after n layers. `ops`: other operations than the
        book's, see `minglm.look.diff.ops_with`.

        Raises ValueError for ids outside the vocabulary, wrong shapes, or more tokens than the context holds.
        """
        ids = self._check_ids(ids, cache)
        positions = self._check_like("positions", positions, ids)
        segments = self._check_like("segments", segments, ids)
        layers = self.config.num_hidden_layers
        if stop_at is not None and not _is_whole(stop_at, 0, layers):
            raise ValueError(f"stop_at = {stop_at} must be a whole number between 0 and {layers} layers")
        if stop_at is not None and cache is not None:
            raise ValueError("stop_at would leave the cache of the later layers empty; use one of the two")
        checked = _checked_tap(tap, self.config)
        hidden, _ = transformer(
            ids, self.params, self.config, cache, positions, segments, checked, ops, stop_at=stop_at
        )
        return Output(None if stop_at is not None else head(hidden, self.params, checked, ops), hidden)

    def mtp(self, ids: Any, depth: int = 1, segments: Any = None, tap: UserTap | None = None) -> Array:
        """Logits [B, T − depth, V] of the multi-token-prediction layers: at depth 1 row i predicts token i + 2, from
        hidden state i and token i + 1; each further depth looks one token further.

        Beyond the last MTP layer they are used again from the first. Raises ValueError if the model has none.
        """
        ids = self._check_ids(ids)
        segments = self._check_like("segments", segments, ids)
        if not self.params.mtp:
            raise ValueError("this model has no multi-token-prediction layer (num_nextn_predict_layers = 0)")
        if not _is_whole(depth, 1, ids.shape[1] - 1):
            raise ValueError(f"depth = {depth} must be a whole number between 1 and T − 1 = {ids.shape[1] - 1}")
        checked = _checked_tap(tap, self.config)
        hidden, saved = transformer(ids, self.params, self.config, segments=segments, tap=checked)
        chain = mtp_chain(hidden, ids, saved.layout, self.params, self.config, depth, checked)
        weight = mtp_head_weight(self.params, self.params.mtp[chain[-1].number])
        return linear(chain[-1].normed, weight.astype(hidden.dtype, copy=False))

    def loss_and_grads(
        self,
        ids: Any,
        targets: Any = None,
        mtp_weight: float = 0.3,
        balance_weight: float = 0.0,
        positions: Any = None,
        segments: Any = None,
    ) -> tuple[losses.Loss, Params]:
        """The training loss and its gradient for every parameter; see `minglm.model.loss`.

        `targets[b, t]`: the token after `ids[b, t]`, −100 to leave it out; by default the ids themselves, moved on
        by one within each segment. Raises ValueError for weights stored in fewer than 32 bits: load as float32.
        """
        if self.params.norm.weight.dtype not in (np.float32, np.float64):
            stored = self.params.norm.weight.dtype.name
            raise ValueError(
                f"gradients need float32 or float64 weights, these are {stored}; load with dtype='float32'"
            )
        ids = self._check_ids(ids)
        segments = self._check_like("segments", segments, ids)
        positions = self._check_like("positions", positions, ids)
        if targets is None:
            targets = losses.shift_targets(ids, segments)
        else:
            targets = self._check_targets(self._check_like("targets", targets, ids))
        return losses.loss_and_grads(
            ids, targets, self.params, self.config, mtp_weight, balance_weight, positions, segments
        )

    def trace(
        self, prompt: Any, keep: str = "*", tap: UserTap | None = None, limit: float = 2e9, segments: Any = None
    ) -> "Trace":
        """Run a prompt (text, or ids [T] or [B, T]) and keep every array whose name matches `keep`, patterns as in
        the shell, several separated by commas. Raises ValueError beforehand if they would take over `limit` bytes."""
        from minglm.look.trace import take_trace

        ids = self.as_ids(prompt)
        return take_trace(self, ids, keep, tap, limit, self._check_like("segments", segments, ids))

    def step(self, prompt: Any, limit: float = 2e9) -> "Walk":
        """A forward pass to be walked through in both directions; see `minglm.look.walk`. A text, or ids [T] or
        [B, T]. Raises ValueError beforehand if its arrays would take over `limit` bytes."""
        from minglm.look.walk import Walk

        return Walk(self, self.as_ids(prompt), limit)

    # -- generating ------------------------------------------------------------------------------------------

    def generate(self, prompt: Any, max_new_tokens: int = 64, **options: Any) -> "Result":
        """Continue a prompt (text or ids [T]); returns ids, text, stop_reason and stats.

        Options: temperature (0: greedy), top_k, top_p, min_p, seed, end_ids (default: the config's), tap,
        engine ("fast": compiled kernels; "numpy": the book), threads (default: as many as pay); draft: guess so many
        tokens ahead with the MTP layer, or with draft_model, a smaller model with the same tokenizer. Greedy text stays
        the same, sampled text keeps its distribution but is another draw of it for the same seed. Drafts pay where a
        step is slow; small models may get slower.

        Raises ValueError for a tap with the fast engine, whose steps cannot be watched, and for weights that it does
        not read (float64, float16): then take engine="numpy".
        """
        from minglm.generate.loop import Result, Stats

        ids = self._prompt_ids(prompt)
        done = list(self.steps(ids, max_new_tokens, **options))
        new_ids = [step.id for step in done]
        text = None
        if self.tokenizer:
            ended = done[-1].stop_reason == "end token"
            text = self.tokenizer.decode(new_ids[:-1] if ended else new_ids)
        return Result(new_ids, text, done[-1].stop_reason or "length", Stats.of(len(ids), done))

    def stream(self, prompt: Any, max_new_tokens: int = 64, **options: Any) -> Iterator[str]:
        """The text of `generate`, piece by piece as it comes; same options. Needs a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer, so there is no text to stream; use generate with ids")
        return _pieces(self.tokenizer.stream(), self.steps(prompt, max_new_tokens, **options))

    def steps(
        self,
        prompt: Any,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        end_ids: Sequence[int] | None = None,
        tap: UserTap | None = None,
        engine: str = "fast",
        threads: int | None = None,
        draft: int = 0,
        draft_model: "Model | str | Path | None" = None,
    ) -> "Iterator[Step]":
        """The tokens of `generate`, one by one, each with its logits and timing. All checks come before any work."""
        from minglm.generate.loop import check_room, steps
        from minglm.generate.sampling import Sampling
        from minglm.generate.speculative import speculative_steps

        if engine not in ("fast", "numpy"):
            raise ValueError(f"engine = {engine!r} is not there; take 'fast' or 'numpy'")
        if engine == "fast" and tap is not None:
            raise ValueError("the fast engine's steps cannot be tapped; take engine='numpy'")
        helper = self._check_draft(draft, draft_model)
        ids = self._prompt_ids(prompt)
        check_room(len(ids), max_new_tokens, self.config.max_position_embeddings)
        how = Sampling(temperature, top_k, top_p, min_p).check()
        if not _is_whole(seed, 0, 2**63):
            raise ValueError(f"seed = {seed!r} must be a whole number, 0 or more")
        ends = self._checked_ends(end_ids)
        capacity = len(ids) + max_new_tokens
        chosen = self._engine(engine, capacity, threads, tap, draft + 1)
        rest = max_new_tokens, how, ends, self.usable_tokens
        if not draft:
            return steps(chosen, ids, *rest, seed)
        drafter = self._drafter(engine, capacity, threads, tap, helper)
        return speculative_steps(chosen, drafter, ids, *rest, draft, seed)

    def _checked_ends(self, end_ids: Any) -> frozenset[int]:
        if end_ids is None:
            return frozenset(self.config.eos_token_id)
        ends = np.atleast_1d(np.array(end_ids, object)).tolist()
        if wrong := [i for i in ends if not _is_whole(i, 0, self.config.vocab_size - 1)]:
            raise ValueError(
                f"end_ids: {wrong[0]!r} is no token id (0 … {self.config.vocab_size - 1}); give some in a flat list"
            )
        return frozenset(ends)

    def _engine(self, name: str, capacity: int, threads: int | None, tap: UserTap | None, rows: int = 1) -> "Engine":
        from minglm.generate.loop import NumpyEngine

        self._check_cache_memory(1, capacity)
        if name == "numpy":
            return NumpyEngine(self, capacity, _checked_tap(tap, self.config))
        from minglm.fast.engine import FastEngine

        return FastEngine(self.params, self.config, capacity, threads, rows)

    def _drafter(
        self, name: str, capacity: int, threads: int | None, tap: UserTap | None, helper: "Model | None"
    ) -> "Drafter":
        from minglm.generate.speculative import ModelDrafter, MtpDrafter, NumpyMtpLayer

        if helper is not None:
            if name == "fast":
                from minglm.fast.team import thread_count

                threads = thread_count(threads, self.config)  # one team for both: its workers are awake already
            return ModelDrafter(helper._engine(name, capacity, threads, None))
        numbers = range(len(self.params.mtp))
        if name == "numpy":
            checked = _checked_tap(tap, self.config)
            return MtpDrafter([NumpyMtpLayer(self, capacity, number, checked) for number in numbers])
        from minglm.fast.engine import FastMtpLayer

        return MtpDrafter([FastMtpLayer(self.params, self.config, capacity, n, threads) for n in numbers])

    def _check_draft(self, draft: int, draft_model: "Model | str | Path | None") -> "Model | None":
        """The model that drafts, if it is another one. Raises ValueError for what cannot draft."""
        if not _is_whole(draft, 0, MOST_DRAFTS):
            raise ValueError(f"draft = {draft!r} must be a whole number between 0 (no drafts) and {MOST_DRAFTS}")
        if draft_model is None:
            if draft and not self.params.mtp:
                raise ValueError(
                    f"{self.name} has no multi-token-prediction layer to draft with; give draft_model=, a smaller "
                    "checkpoint with the same tokenizer"
                )
            return None
        if not draft:
            raise ValueError("draft_model is given but draft is 0; say how many tokens to draft, such as draft=3")
        helper = draft_model if isinstance(draft_model, Model) else load(draft_model)
        ours, theirs = (m.tokenizer.library.to_str() if m.tokenizer else m.config.vocab_size for m in (self, helper))
        if ours != theirs:
            raise ValueError(f"{helper.name} has another tokenizer than {self.name}, so its drafts are other tokens")
        return helper

    def new_cache(self, batch: int = 1, capacity: int | None = None) -> KVCache:
        """An empty key/value cache for `forward`; capacity defaults to the model's context."""
        for name, value in (("batch", batch), ("capacity", capacity)):
            if value is not None and not _is_whole(value, 1, 2**31):
                raise ValueError(f"{name} = {value!r} must be a whole number, 1 or more")
        self._check_cache_memory(batch, capacity or self.config.max_position_embeddings)
        return KVCache(self.config, batch, capacity, self.compute_dtype)

    def _check_cache_memory(self, batch: int, capacity: int) -> None:
        from minglm.formats.memory import check_memory

        needed = batch * capacity * self.config.kv_bytes_per_token(np.dtype(self.compute_dtype).itemsize)
        what = f"the keys and values of {batch} × {capacity:,} tokens take {needed / 1e9:,.1f} GB"
        check_memory(what, needed, "ask for fewer")

    # -- keeping ---------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, dtype: Any = "float32") -> None:
        """Write a folder that `minglm.load`, transformers, vLLM and SGLang read; see `formats.checkpoint`.

        A name that ends in .gguf becomes a file for llama.cpp instead (dtype float32, bfloat16 or q8_0); see
        `formats.gguf_file`.
        """
        from minglm.formats.checkpoint import save_checkpoint
        from minglm.formats.gguf_file import save_gguf

        if is_gguf(folder):
            save_gguf(folder, self.config, self.params, dtype, self.tokenizer, self.chat_template)
            return
        if self.tokenizer is None and (Path(folder) / "tokenizer.json").exists():
            raise ValueError(f"{folder} holds a model with a tokenizer, this one has none; save it somewhere else")
        save_checkpoint(folder, self.config, self.params, dtype)
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
        if self.chat_template is not None:
            self.chat_template.save(folder)

    def astype(self, dtype: Any) -> "Model":
        """The same model with its weights stored as `dtype`."""
        from minglm.formats.storage import as_storage, cast

        storage = as_storage(dtype)
        params = map_arrays(lambda name, array: copy(cast(name, array, storage)), self.params)
        return Model(self.config, params, self.tokenizer, self.chat_template, self.name, self.folder)

    # -- checking what comes in ------------------------------------------------------------------------------

    def as_ids(self, prompt: Any, limit: bool = True) -> Array:
        """Text, ids [T] or ids [B, T] as an int array [B, T]; with `limit`, no more than the context holds."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this model has no tokenizer; give token ids instead of text")
            prompt = [self.tokenizer.encode(prompt)]
        array = _as_array(prompt)
        return self._check_ids(array[None] if array.ndim == 1 else array, limit=limit)

    def _prompt_ids(self, prompt: Any) -> list[int]:
        ids = self.as_ids(prompt, limit=False)  # the limit is checked with the new tokens
        if len(ids) != 1:
            raise ValueError(f"generation takes one prompt, got {len(ids)} rows; call it once for each")
        return [int(i) for i in ids[0]]

    def _check_ids(self, ids: Any, cache: KVCache | None = None, limit: bool = True) -> Array:
        ids = _as_array(ids)
        if ids.ndim == 2 and ids.size == 0:
            raise ValueError("the prompt is empty; give at least one token")
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"ids must be whole numbers of shape [B, T], got {ids.dtype} of shape {list(ids.shape)}")
        outside = np.argwhere((ids < 0) | (ids >= self.config.vocab_size))
        if len(outside):
            b, t = outside[0]
            raise ValueError(
                f"token id {ids[b, t]} at row {b}, position {t} is outside the vocabulary (0 … "
                f"{self.config.vocab_size - 1})"
            )
        past = 0
        if cache is not None:
            self._check_cache(cache, len(ids))
            past = int(cache.length.max())
        if limit and past + ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                (f"{past} cached tokens + {ids.shape[1]} new ones" if past else f"{ids.shape[1]} tokens")
                + f" > context of {self.config.max_position_embeddings}; shorten the text"
            )
        return ids.astype(np.int64, copy=False)

    def _check_cache(self, cache: KVCache, rows: int) -> None:
        if not isinstance(cache, KVCache):
            raise ValueError(f"cache is a {type(cache).__name__}, wanted a KVCache; make one with model.new_cache()")
        c, (layers, batch, _, kv_heads, head_dim) = self.config, cache.k.shape
        if (layers, kv_heads, head_dim) != (c.num_hidden_layers, c.num_key_value_heads, c.head_dim):
            raise ValueError("the cache was made for another model; make one with model.new_cache()")
        if batch != rows:
            raise ValueError(f"the cache has {batch} rows, ids have {rows}")

    def _check_like(self, name: str, given: Any, ids: Array) -> Array | None:
        if given is None:
            return None
        array = np.asarray(given)
        if array.shape != ids.shape or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"{name} must be whole numbers shaped like ids, {list(ids.shape)}; got {array.dtype} of shape "
                f"{list(array.shape)}"
            )
        return array.astype(np.int64, copy=False)

    def _check_targets(self, targets: Array | None) -> Array:
        assert targets is not None
        wrong = targets[(targets != losses.IGNORE) & ((targets < 0) | (targets >= self.config.vocab_size))]
        if wrong.size:
            raise ValueError(
                f"target {wrong[0]} is neither a token id below {self.config.vocab_size} nor −100 (ignore)"
            )
        return targets

    # -- showing ---------------------------------------------------------------------------------------------

    @property
    def storage(self) -> str:
        """How the weights are kept: a dtype that `load` takes."""
        from minglm.look.parts import storage_of

        return storage_of(self.params)

    def __repr__(self) -> str:
        counts = self.config.count_parameters()
        return (
            f"Model({self.name}: {counts.total:,} parameters, {counts.active:,} active, "
            f"{self.storage}, {self.config.num_hidden_layers} layers + "
            f"{len(self.params.mtp)} MTP)"
        )

    def _repr_html_(self) -> str:
        from minglm.look.describe import describe_html

        return describe_html(self)


def load(name: str | Path, dtype: Any = None, mode: str = "memory", memory: float | None = None) -> Model:
    """Load a checkpoint: a folder, or the name of a shipped one ("glm-nano"), found from any working directory.

    `dtype` says how the weights are kept: "float32" (default), "float64", "bfloat16", "float16", "fp8", "fp8-block",
    "mxfp4"; computation is in float32, or float64 for float64 weights. `mode="mmap"` leaves them in the files, as they
    are stored there, and reads what a token needs when it needs it: for folders larger than memory. `memory` bounds the
    bytes of the files that then stay in memory.

    Raises ValueError naming the path and what is wrong with it.
    """
    from minglm.formats.checkpoint import load_checkpoint, map_checkpoint
    from minglm.text.template import ChatTemplate
    from minglm.text.tokenizer import Tokenizer

    folder = find(name)
    if memory is not None and (
        isinstance(memory, bool) or not isinstance(memory, int | float) or not 0 < memory < 2**62
    ):
        raise ValueError(f"memory = {memory!r} must be a number of bytes above 0, such as 5e9")
    if mode not in ("memory", "mmap"):
        raise ValueError(f"mode = {mode!r} is not there; take 'memory' or 'mmap'")
    if mode == "mmap":
        if dtype is not None:
            raise ValueError(f"dtype = {dtype!r}: mapped weights stay as the files have them; leave dtype out")
        config, params = map_checkpoint(folder, None if memory is None else int(memory))
    elif memory is not None:
        raise ValueError("memory bounds what stays of mapped files; give it with mode='mmap'")
    else:
        config, params = load_checkpoint(folder, "float32" if dtype is None else dtype)
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").exists() else None
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{folder}: tokenizer.json has {len(tokenizer)} tokens, the model only {config.vocab_size}; it belongs to "
            "another model, remove it or put the right one in its place"
        )
    return Model(config, params, tokenizer, ChatTemplate.load(folder), folder.name, folder.resolve())


def new(config: Config | str, seed: int = 0, dtype: Any = "float32") -> Model:
    """A model with fresh weights, initialised as GLM-4.5's were. `config`: a Config or the name of a preset."""
    from minglm.formats.memory import check_memory, sizes_by_mode
    from minglm.formats.storage import as_dtype

    name = "model"
    if not isinstance(config, Config):
        name = str(config)
        if name not in PRESETS:
            raise ValueError(f"no preset {config!r}; there are {', '.join(PRESETS)}")
        config = PRESETS[name]
    if not _is_whole(seed, 0, 2**63):
        raise ValueError(f"seed = {seed!r} must be a whole number, 0 or more")
    kind = as_dtype(dtype)
    drawn = np.dtype(np.float64 if kind == np.float64 else np.float32)
    count = config.count_parameters().total
    check_memory(
        f"{name} has {count:,} parameters: {sizes_by_mode(count)}",
        count * (drawn.itemsize if kind == drawn else drawn.itemsize + kind.itemsize),
        "take a smaller preset, such as glm-nano or micro",
    )
    model = Model(config, init_params(config, np.random.default_rng(seed), drawn), name=name)
    return model if kind == drawn else model.astype(kind)


def find(name: str | Path) -> Path:
    """The folder of a checkpoint: an existing folder, else a shipped checkpoint of that name."""
    if not isinstance(name, str | Path) or not str(name):
        raise ValueError(f"a checkpoint is given as a folder or a name, got {name!r}")
    path = Path(name)
    if os.path.isdir(path):
        return path
    if is_gguf(path):
        raise ValueError(f"{path}: GGUF files are written, not read; give the folder that it was made from")
    if os.path.isfile(path):
        raise ValueError(f"{path} is a file; a checkpoint is a folder with config.json and *.safetensors")
    here = Path(__file__).resolve().parent
    for weights in (here / "weights", here.parent / "weights"):  # in a wheel; in a checkout
        if os.path.exists(weights / str(name) / "config.json"):
            return weights / str(name)
    shipped = sorted({p.parent.name for w in (here, here.parent) for p in (w / "weights").glob("*/config.json")})
    raise ValueError(
        f"{name!s:.200}: no such folder, and no shipped checkpoint of that name ({', '.join(shipped) or 'none'})"
    )


def is_gguf(name: str | Path) -> bool:
    """Whether a name asks for a GGUF file. Raises ValueError for one that is nothing but the ending."""
    if Path(name).name.lower() == ".gguf":
        raise ValueError(f"{name} is an ending without a name; take model.gguf")
    return Path(name).suffix.lower() == ".gguf"


def _pieces(decoder: "StreamDecoder", steps: "Iterator[Step]") -> Iterator[str]:
    """The steps' tokens as text, in whole characters."""
    for step in steps:
        if step.stop_reason != "end token" and (piece := decoder.feed(step.id)):
            yield piece
    if piece := decoder.finish():
        yield piece


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int | np.integer) and bool(least <= value <= most)


def _as_array(ids: Any) -> Array:
    try:
        return np.asarray(ids)
    except ValueError as error:
        raise ValueError("ids must be whole numbers of shape [B, T]: rows of different lengths do not fit") from error


def _checked_tap(tap: UserTap | None, config: Config) -> Tap:
    """A user's tap as the model calls it: returning nothing keeps the array, a replacement must fit."""
    if tap is None:
        return no_tap
    if not callable(tap):
        raise ValueError(f"tap = {tap!r} must be a function, tap(name, array)")

    def checked(name: str, array: Array) -> Array:
        replacement = tap(name, array)
        if replacement is None:
            return array
        given = np.asarray(replacement)
        if given.shape != array.shape or not np.can_cast(given.dtype, array.dtype, "same_kind"):
            raise ValueError(
                f"the tap returned {given.dtype} {list(given.shape)} for {name}, wanted {array.dtype} "
                f"{list(array.shape)} (or None to keep it)"
            )
        if name.endswith("expert_indices"):
            _check_forced(given, config)
        elif name.endswith(".tokens") and given is not array:
            raise ValueError(f"{name} follows from expert_indices and cannot be replaced; replace those")
        return given.astype(array.dtype, copy=False)

    return checked


def _check_forced(indices: Array, config: Config) -> None:
    """Tokens may be sent elsewhere, but a token cannot go to one expert twice, nor to one that is not there."""
    E, K = config.n_routed_experts, config.num_experts_per_tok
    if indices.min() < 0 or indices.max() >= E or (np.diff(np.sort(indices, axis=-1), axis=-1) == 0).any():
        raise ValueError(
            f"the tap's expert_indices must name {K} different experts between 0 and {E - 1} for each token; to force "
            "one, replace the last pick of the tokens that do not have it yet"
        )
