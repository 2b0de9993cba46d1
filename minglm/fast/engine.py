"""`Decoder`: the fused step for one model, as Python calls it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from minglm.config import Config
from minglm.fast import decode
from minglm.fast.decode import Cache, Entry, Room, Sizes, Tokens, Weights, draft_step, step
from minglm.fast.jit import DISABLE_JIT
from minglm.fast.kernels import CHUNK, NOT_PICKED
from minglm.fast.ops import shared_ops
from minglm.fast.team import team, thread_count
from minglm.formats.mapped import ExpertStack
from minglm.formats.smallfloats import BLOCK, SmallFloats
from minglm.model.attention import last_segment
from minglm.model.kvcache import KVCache
from minglm.model.mtp import mtp_embedding_weight, mtp_head_weight, mtp_states
from minglm.model.ops import Array, Tap, no_tap
from minglm.model.params import Layer, Moe, Params, expert, shapes, walk_stacked
from minglm.model.rope import rotation
from minglm.model.transformer import head_weight, transformer


def sizes_of(config: Config) -> Sizes:
    return Sizes(
        layers=config.num_hidden_layers,
        dense_layers=config.first_k_dense_replace,
        D=config.hidden_size,
        H=config.num_attention_heads,
        G=config.num_key_value_heads,
        d=config.head_dim,
        V=config.vocab_size,
        E=config.n_routed_experts,
        F=config.moe_intermediate_size,
        shared_F=config.shared_intermediate_size,
        dense_F=config.intermediate_size,
        groups=config.n_group,
        open_groups=config.topk_group,
        normalise=config.norm_topk_prob,
        head_norm=config.use_qk_norm,
        factor=np.float32(config.routed_scaling_factor),
        eps=np.float32(config.rms_norm_eps),
    )


class AddressBook:
    """Addresses of the weights of some layers and of what stands around them, and the arrays that must stay alive as
    long as they are used.

    Matrices stay where they are. Vectors (norms, biases), which are small, are copied to float32.
    """

    def __init__(self, layers: Sequence[Layer], embedding: Array, norm: Array, head: Array, config: Config):
        """Raises ValueError for weights that the kernels do not read."""
        rest = embedding.dtype
        if rest.name not in ("float32", "bfloat16") or not rest.isnative:
            kind = rest.name if rest.isnative else f"{rest.name} of another byte order"
            raise ValueError(
                f"the fast engine reads float32, bfloat16, fp8 and mxfp4 weights, these are {kind}; use engine='numpy'"
            )
        self._kept: list[Any] = []
        self._no_bias = np.zeros(config.num_attention_heads * config.head_dim, np.float32)
        self._config, self._rest = config, rest.name
        self._linear, self._routed = _stored_as(layers, rest.name)
        L, E, D, V = len(layers), config.n_routed_experts, config.hidden_size, config.vocab_size
        self.layers, self.experts = np.zeros((2, L, decode.COLUMNS), np.int64), np.zeros((2, L, E, 3), np.int64)
        for i, layer in enumerate(layers):
            self._enter(i, layer)
        stacks: list[tuple[int, Any]] = [
            (i, layer.mlp.experts.gate_proj) for i, layer in enumerate(layers) if isinstance(layer.mlp, Moe)
        ]
        self.mapped: dict[int, ExpertStack] = {i: s for i, s in stacks if isinstance(s, ExpertStack)}
        ends = self.matrix(embedding, rest.name, V, D)[0], self.vector(norm, D), self.matrix(head, rest.name, V, D)[0]
        self.ends = np.array(ends)

    @classmethod
    def of_trunk(cls, params: Params, config: Config) -> "AddressBook":
        found, wanted = ({name for name, _ in walk_stacked(p._replace(mtp=()))} for p in (params, shapes(config)))
        if found != wanted:
            raise ValueError(f"weights and config are of different models: {', '.join(sorted(found ^ wanted)[:4])}")
        return cls(params.layers, params.embed_tokens.weight, params.norm.weight, head_weight(params), config)

    def weights(self) -> Weights:
        rest, linear, routed = (np.zeros(0, _CODES[kind]) for kind in (self._rest, self._linear, self._routed))
        return Weights(
            layers=self.layers[0],
            experts=self.experts[0],
            ends=self.ends,
            layer_scales=self.layers[1],
            expert_scales=self.experts[1],
            rest=rest,
            linear=linear,
            routed=routed,
            block=BLOCK if self._routed == "fp8-block" else 0,
        )

    def _enter(self, i: int, layer: Layer) -> None:
        attention, mlp, row, c = layer.self_attn, layer.mlp, self.layers[:, i], self._config
        D, d, q_size, kv_size = c.hidden_size, c.head_dim, self._no_bias.size, c.num_key_value_heads * c.head_dim
        row[0, decode.INPUT_NORM] = self.vector(layer.input_layernorm.weight, D)
        for weight, bias, projection, size in (
            (decode.Q, decode.Q_BIAS, attention.q_proj, q_size),
            (decode.K, decode.K_BIAS, attention.k_proj, kv_size),
            (decode.V, decode.V_BIAS, attention.v_proj, kv_size),
        ):
            row[:, weight] = self.matrix(projection.weight, self._linear, size, D)
            row[0, bias] = self.vector(self._no_bias[:size] if projection.bias is None else projection.bias, size)
        row[:, decode.O] = self.matrix(attention.o_proj.weight, self._linear, D, q_size)
        if attention.q_norm is not None and attention.k_norm is not None:
            row[0, decode.Q_NORM] = self.vector(attention.q_norm.weight, d)
            row[0, decode.K_NORM] = self.vector(attention.k_norm.weight, d)
        row[0, decode.POST_NORM] = self.vector(layer.post_attention_layernorm.weight, D)
        F, columns = c.intermediate_size, [decode.GATE, decode.UP, decode.DOWN]
        if isinstance(mlp, Moe):
            row[:, decode.ROUTER] = self.matrix(mlp.gate.weight, self._rest, c.n_routed_experts, D)
            row[0, decode.ROUTER_BIAS] = self.vector(mlp.gate.e_score_correction_bias, c.n_routed_experts)
            for e in range(c.n_routed_experts):
                parts = expert(mlp.experts, e)
                self.experts[:, i, e] = self._mlp(parts, self._routed, c.moe_intermediate_size)
            F = c.shared_intermediate_size
        shared = mlp.shared_experts if isinstance(mlp, Moe) else mlp
        if shared is not None:
            row[:, columns] = self._mlp([part.weight for part in shared], self._linear, F)

    def _mlp(self, parts: Sequence[Any], kind: str, F: int) -> Array:  # -> [2, 3]
        gate, up, down = parts
        D = self._config.hidden_size
        return np.array([self.matrix(gate, kind, F, D), self.matrix(up, kind, F, D), self.matrix(down, kind, D, F)]).T

    def matrix(self, array: Any, kind: str, *shape: int) -> tuple[int, int]:
        """Addresses of the weight, or of its codes, and of its scales."""
        small = isinstance(array, SmallFloats)
        parts: list[Array] = [array.codes, array.scales] if small else [array]
        found = array.kind if small else array.dtype.name
        if found != kind or array.shape != shape or not all(part.flags.c_contiguous for part in parts):
            raise ValueError(
                f"the fast engine wants contiguous {kind} weights of shape {list(shape)} here, got {found} of shape "
                f"{list(array.shape)} with strides {parts[0].strides}; use np.ascontiguousarray, or engine='numpy'"
            )
        self._kept += parts
        return parts[0].ctypes.data, parts[1].ctypes.data if small else 0

    def vector(self, array: Array, size: int) -> int:
        if array.shape != (size,):
            raise ValueError(f"a norm weight or bias has shape {list(array.shape)}, the config asks for [{size}]")
        self._kept.append(np.ascontiguousarray(array, np.float32))
        return self._kept[-1].ctypes.data


_CODES = {
    "float32": np.float32, "bfloat16": np.uint16, "fp8": np.uint8, "fp8-block": np.uint8, "mxfp4": np.int8,
}  # fmt: skip


def _stored_as(layers: Sequence[Layer], rest: str) -> tuple[str, str]:
    """How the matrices of attention and dense MLPs are stored, and the routed experts."""
    routed = [layer.mlp.experts.gate_proj[0] for layer in layers if isinstance(layer.mlp, Moe)]
    first = layers[0].self_attn.q_proj.weight, routed[0] if routed else None
    linear, experts = (each.kind if isinstance(each, SmallFloats) else rest for each in first)
    if {linear, experts} == {"fp8", "fp8-block"}:
        raise ValueError("the fast engine reads scales by row or by block, not both in one model; use engine='numpy'")
    return linear, experts if routed else linear


PIECE = 8  # tokens of a short prompt that go through the step together
PROMPT = 2048  # tokens of a long one that go through the book's functions together: it bounds their buffers


class FastEngine:
    """One sequence through the kernels: what `Model.generate` runs on by default."""

    def __init__(self, params: Params, config: Config, capacity: int, threads: int | None = None, rows: int = 1):
        """`rows`: the most tokens of a `feed_each`. Raises ValueError for weights that are not float32 or
        bfloat16, or not contiguous."""
        threads = thread_count(threads, config)
        self.name = "fast engine, JIT off" if DISABLE_JIT else f"fast engine, {threads} thread" + "s" * (threads > 1)
        self._params, self._config, self._threads = params, config, threads
        self._decoder = Decoder(params, config, max(rows, PIECE), threads)
        self._piece = 1 if self._decoder.bounded else PIECE
        self._cache = KVCache(config, capacity=capacity)
        self.hidden = np.zeros((0, config.hidden_size), np.float32)
        self._picks = np.zeros((0, config.num_hidden_layers, config.num_experts_per_tok), np.int64)

    def feed(self, ids: Sequence[int]) -> Array:  # -> [V], used again by the next call
        """Continue the sequence; logits after the last token."""
        states = []
        if len(ids) > 2 * PIECE:
            ops = shared_ops(self._threads)
            with ops.session():
                for start in range(0, len(ids) - 1, PROMPT):
                    piece = np.array([ids[start : min(start + PROMPT, len(ids) - 1)]], np.int64)
                    hidden, _ = transformer(piece, self._params, self._config, self._cache, ops=ops)
                    states.append(hidden[0])
            ids = ids[-1:]
        for start in range(0, len(ids), self._piece):
            logits = self._step(ids[start : start + self._piece], last_only=True)
            states.append(self._decoder.hidden)
        self.hidden = _joined(states)
        return logits[-1]

    def feed_each(self, ids: Sequence[int]) -> Array:  # -> [T, V], used again by the next call
        """The same for a few tokens; logits after each."""
        size = 1 if self._decoder.bounded else len(ids)  # of one step: each token may bring experts of its own
        logits, states, picks = [], [], []
        for start in range(0, len(ids), size):
            rows = self._step(ids[start : start + size], last_only=False)
            logits.append(rows if size == len(ids) else rows.copy())
            states.append(self._decoder.hidden)
            picks.append(self._decoder.picks)
        self.hidden, self._picks = _joined(states), _joined(picks)
        return _joined(logits)

    def _step(self, ids: Sequence[int], last_only: bool) -> Array:
        piece = np.array([ids], np.int64)
        return self._decoder.step(piece, self._cache, np.zeros_like(piece), last_only)[0]

    def truncate(self, length: int) -> None:
        self._cache.truncate(length)

    def picks(self) -> Array:  # -> int [T, layer, K]
        """Of the tokens of the last `feed_each`."""
        return self._picks


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Steps:
    """What takes a few tokens at a time through the layers of an `AddressBook`, continuing the rows of a `KVCache`."""

    def __init__(self, book: AddressBook, sizes: Sizes, config: Config, rows: int, threads: int | None):
        """`rows`: the most tokens of one step, over all sequences."""
        self.config = config
        self._book, self._sizes, self._weights = book, sizes, book.weights()
        self._team = team(thread_count(threads, config))
        self._rows = rows
        ids, rows_of, slots, segments = np.zeros((4, rows), np.int64)
        wanted, layers = np.ones(rows, np.bool_), np.array([0, sizes.layers])
        self._tokens = Tokens(np.zeros(1, np.int64), ids, rows_of, slots, segments, wanted, layers)
        self._cache: KVCache | None = None
        self._kernel: Any = None
        self._tap: Tap = no_tap

    def run(
        self, kernel: Any, ids: Array, cache: KVCache, segments: Array | None, last_only: bool, *more: Any
    ) -> Array:  # [B, T] -> [B, T, V], used again by the next step
        """Run a kernel of `minglm.fast.decode` on these tokens; `more` are its arguments after the `Room`."""
        B, T = ids.shape
        with self._team.lock:
            if cache is not self._cache:
                self._use(cache)
            if cache.batch != B or B * T > self._rows:
                raise ValueError(f"{B} × {T} tokens, for a cache of {cache.batch} rows and {self._rows} tokens a step")
            slots = cache.slots(T)
            if segments is None:
                segments = np.repeat(last_segment(cache, B)[:, None], T, axis=1)
            tokens = self._tokens
            tokens.N[0] = N = B * T
            tokens.ids[:N] = ids.reshape(-1)
            tokens.rows[:N] = np.repeat(np.arange(B), T)
            tokens.slots[:N] = slots.reshape(-1)
            tokens.segments[:N] = segments.reshape(-1)
            tokens.wanted[:N] = not last_only
            tokens.wanted[T - 1 : N : T] = True
            cache.segments[np.arange(B)[:, None], slots] = segments
            if kernel is not self._kernel:
                self._kernel, self._launch = kernel, self._team.prepare(kernel, *self._state, *more)
            if self._book.mapped or self._tap is not no_tap:
                self._launch_by_layer(N)
            else:
                self._launch()
            cache.advance(segments)
            return self._room.logits[:N].reshape(B, T, -1)

    @property
    def bounded(self) -> bool:
        """Whether the weights may not take more than some memory."""
        return any(stack.home.residency.budget is not None for stack in self._book.mapped.values())

    def _launch_by_layer(self, N: int) -> None:
        """So that experts of mapped files can be given back before those of the next layer come, and so that the room
        can be looked at in between."""
        L, layers = self._sizes.layers, self._tokens.layers
        for i in range(L):
            layers[:] = i, i + 1
            self._launch()
            if i in self._book.mapped:
                self._book.mapped[i].used(self._room.picks[i, :N])
            if self._tap is not no_tap:
                self._show_layer(i, N)
        if self._tap is not no_tap:
            layers[:] = L, L  # the end once more, from what the tap made of the stream
            self._launch()
        layers[:] = 0, L

    def _show_layer(self, i: int, N: int) -> None:
        """What layer i left in the room, under the names of the book's taps."""
        room, cache, at = self._room, self._cache, f"layers.{i}."
        assert cache is not None
        B = cache.batch
        places = self._tokens.rows[:N].reshape(B, -1), self._tokens.slots[:N].reshape(B, -1)
        self._tap(f"{at}self_attn.v", cache.v[i][places])
        self._tap(f"{at}self_attn.q_rope", room.q[:N].reshape(B, N // B, *room.q.shape[1:]).copy())
        self._tap(f"{at}self_attn.k_rope", cache.k[i][places])
        self._tap(f"{at}self_attn.heads", room.heads[:N].reshape(B, N // B, *room.q.shape[1:]).copy())
        if i >= self._sizes.dense_layers:
            indices = room.picks[i, :N].copy()
            self._tap(f"{at}mlp.router_scores", room.router_scores[:N].copy())
            self._tap(f"{at}mlp.expert_indices", indices)
            self._tap(f"{at}mlp.expert_weights", np.take_along_axis(room.own_weights[0, :N], indices, axis=1))
        self._tap(f"{at}mlp.out", room.y[:N].reshape(B, N // B, -1).copy())
        room.x[:N] = self._tap(f"{at}out", room.x[:N].reshape(B, N // B, -1).copy()).reshape(N, -1)

    @property
    def hidden(self) -> Array:  # [N, D]
        """The last step's states after the final norm; a copy."""
        return self._room.hidden[: self._tokens.N[0]].copy()

    @property
    def picks(self) -> Array:  # int [N, layer, K]
        """The experts that the last step's tokens picked, −1 in dense layers."""
        return self._room.picks[:, : self._tokens.N[0]].swapaxes(0, 1).copy()

    def _use(self, cache: KVCache) -> None:
        c, rows, threads = self.config, self._rows, self._team.threads
        wanted = (self._sizes.layers, cache.batch, cache.capacity, c.num_key_value_heads, c.head_dim)
        if cache.k.shape != wanted or cache.k.dtype != np.float32:
            raise ValueError(
                f"the fast engine wants a float32 cache of shape {list(wanted)} for this model, "
                f"got {cache.k.dtype.name} {list(cache.k.shape)}"
            )
        cos, sin = rotation(np.arange(cache.capacity)[None], c, np.float32)
        self._room = _room(c, self._sizes.layers, rows, threads, cache.capacity)
        arrays = Cache(cache.k, cache.v, cache.segments, cos[0], sin[0])
        self._state: Any = (self._sizes, self._weights, self._tokens, arrays, self._room)
        self._cache, self._kernel = cache, None


class Decoder(Steps):
    """Takes a few tokens at a time through a whole model."""

    def __init__(self, params: Params, config: Config, rows: int = 1, threads: int | None = None):
        """`rows`: the most tokens of one step, over all sequences. Raises ValueError for weights of other dtypes."""
        super().__init__(AddressBook.of_trunk(params, config), sizes_of(config), config, rows, threads)

    def step(
        self, ids: Array, cache: KVCache, segments: Array | None = None, last_only: bool = False
    ) -> Array:  # [B, T] -> [B, T, V]
        """Logits of these tokens, which continue the rows of the cache; `last_only` leaves out all but each row's
        last. The array is used again by the next step. Who calls has checked the ids.

        `segments` as in `make_layout`. Raises ValueError, and changes nothing, if the cache does not fit.
        """
        return self.run(step, ids, cache, segments, last_only)

    def watch(self, ids: Array, cache: KVCache, tap: Tap, segments: Array | None = None) -> None:
        """The same a layer at a time. `tap(name, array)` sees what each layer leaves behind (v, q_rope, k_rope, heads,
        router_scores, expert_indices, expert_weights, mlp.out, out), then norm and logits. A layer is one kernel: only
        a replaced `layers.*.out` is gone on with."""
        with self._team.lock:
            self._tap = tap
            try:
                logits = self.step(ids, cache, segments)
            finally:
                self._tap = no_tap
            tap("norm", self.hidden.reshape(*ids.shape, -1))
            tap("logits", logits.copy())


class MtpDecoder(Steps):
    """Takes a few rows at a time through a multi-token-prediction layer: `mtp_step` of the book in one kernel."""

    def __init__(self, params: Params, config: Config, number: int = 0, rows: int = 1, threads: int | None = None):
        """`number`: which MTP layer. Raises ValueError for weights of other dtypes."""
        mtp, D = params.mtp[number], config.hidden_size
        embedding, head = mtp_embedding_weight(params, mtp), mtp_head_weight(params, mtp)
        book = AddressBook([mtp.block], embedding, mtp.shared_head.norm.weight, head, config)
        super().__init__(book, sizes_of(config)._replace(layers=1, dense_layers=0), config, rows, threads)
        self._entry = Entry(
            np.array([book.vector(mtp.enorm.weight, D), book.vector(mtp.hnorm.weight, D),
                      book.matrix(mtp.eh_proj.weight, params.norm.weight.dtype.name, D, 2 * D)[0]]),
            np.zeros((rows, D), np.float32),
            np.zeros((rows, 2 * D), np.float32),
        )  # fmt: skip

    def step(self, hidden: Array, next_ids: Array, cache: KVCache) -> tuple[Array, Array]:
        """States [T, D] and the tokens after them, int [T], continue the one row of the cache. Returns the logits
        after the last, [V], used again by the next step, and what a further depth gets as states, [T, D]."""
        with self._team.lock:
            self._entry.hidden[: len(hidden)] = hidden
            ids = next_ids[None]
            logits = self.run(draft_step, ids, cache, np.zeros_like(ids), True, self._entry)
            return logits[0, -1], self.hidden


class FastMtpLayer:
    """An MTP layer with its cache, for `minglm.generate.speculative.MtpDrafter`."""

    def __init__(self, params: Params, config: Config, capacity: int, number: int = 0, threads: int | None = None):
        self._params, self._config, self._number, self._threads = params, config, number, threads
        self._decoder = MtpDecoder(params, config, number, PIECE, threads)
        self._piece = 1 if self._decoder.bounded else PIECE
        self._cache = KVCache(config, capacity=capacity, layers=1)

    @property
    def length(self) -> int:
        return int(self._cache.length[0])

    def feed(self, hidden: Array, next_ids: Sequence[int]) -> tuple[Array, Array]:  # [T, D] -> [V], [T, D]
        """Continue by these rows; logits after the last, and the outputs after shared_head.norm."""
        ids, outputs = np.asarray(next_ids, np.int64), []
        if len(ids) > 2 * PIECE:
            ops = shared_ops(thread_count(self._threads, self._config))
            with ops.session():
                for start in range(0, len(ids) - 1, PROMPT):
                    part = slice(start, min(start + PROMPT, len(ids) - 1))
                    rows = hidden[None, part], ids[None, part]
                    outputs.append(mtp_states(*rows, self._params, self._config, self._cache, self._number, ops=ops)[0])
            hidden, ids = hidden[-1:], ids[-1:]
        for start in range(0, len(ids), self._piece):
            part = slice(start, start + self._piece)
            logits, normed = self._decoder.step(hidden[part], ids[part], self._cache)
            outputs.append(normed)
        return logits, np.concatenate(outputs)

    def truncate(self, length: int) -> None:
        self._cache.truncate(length)


def _room(c: Config, layers: int, N: int, threads: int, capacity: int) -> Room:
    D, H, d, E = c.hidden_size, c.num_attention_heads, c.head_dim, c.n_routed_experts
    F = max(c.moe_intermediate_size, c.shared_intermediate_size, c.intermediate_size)
    picked = min(N * c.num_experts_per_tok, E)

    def floats(*shape: int) -> Array:
        return np.zeros(shape, np.float32)

    own_weights = np.full((threads, N, E + 1), NOT_PICKED)
    own_weights[:, :, E] = 1
    return Room(
        x=floats(N, D),
        positions=np.zeros(N, np.int64),
        own_normed=floats(threads * N, D),
        own_head=floats(threads * N, d),
        own_rows=np.zeros((threads, N), np.int64),
        own_found=floats(threads, N, decode.OUTPUTS),
        q=floats(N, H, d),
        firsts=np.zeros(N, np.int64),
        own_scores=floats(threads, CHUNK),
        parts=floats(N, H, capacity // CHUNK + 1, d + 2),
        heads=floats(N, H * d),
        router_scores=floats(N, E),
        own_biased=floats(threads, E),
        own_weights=own_weights,
        own_picks=np.zeros((threads, c.num_experts_per_tok), np.int64),
        picks=np.full((layers, N, c.num_experts_per_tok), -1),
        own_picked=np.zeros((threads, E + 1), np.int64),
        gate=floats((picked + 1) * N, F),
        up=floats((picked + 1) * N, F),
        y=floats(N, D),
        hidden=floats(N, D),
        logits=floats(N, c.vocab_size),
    )
