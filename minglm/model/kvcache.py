"""The key/value cache: what attention remembers of earlier tokens.

It saves recomputation. It does not save reading: each new token still looks at every key. Memory is taken at once, for
every slot of every row `config.kv_bytes_per_token` (with the bytes of a number in the cache's dtype).
"""

from typing import Any

import numpy as np

from minglm.config import Config
from minglm.model.ops import Array


class KVCache:
    """Keys (already rotated) and values of `layers` layers for B rows, in slots 0 … capacity − 1.

    Each row fills its own slots: `length[b]` says how many row b holds, so rows of different length live together.
    `segments[b, s]` says which document slot s belongs to (negative: padding, seen by nobody else).
    The forward pass asks `slots` where its tokens go, each layer calls `append`, and once, at the end, `advance`.
    """

    def __init__(
        self,
        config: Config,
        batch: int = 1,
        capacity: int | None = None,
        dtype: Any = np.float32,
        layers: int | None = None,
    ):
        """`capacity` defaults to the model's context, `layers` to num_hidden_layers."""
        layers = config.num_hidden_layers if layers is None else layers
        self.capacity = config.max_position_embeddings if capacity is None else capacity
        shape = (layers, batch, self.capacity, config.num_key_value_heads, config.head_dim)
        self.k = np.zeros(shape, dtype)
        self.v = np.zeros(shape, dtype)
        self.segments = np.full((batch, self.capacity), -1, np.int64)
        self.length = np.zeros(batch, np.int64)

    @property
    def batch(self) -> int:
        return len(self.length)

    def slots(self, count: int) -> Array:  # -> [B, count]
        """The slots of the next `count` tokens of each row. Raises ValueError when a row has no room for them."""
        fullest = int(self.length.max())
        if fullest + count > self.capacity:
            raise ValueError(
                f"the cache holds {fullest} tokens and {count} more do not fit into its {self.capacity} slots; "
                "make it with a larger capacity, or truncate it"
            )
        return self.length[:, None] + np.arange(count)

    def append(self, layer: int, k: Array, v: Array, slots: Array) -> tuple[Array, Array]:
        """Store k and v [B, T, G, d] in these slots [B, T]; return all keys and values [B, S, G, d] so far."""
        rows = np.arange(self.batch)[:, None]
        self.k[layer, rows, slots] = k
        self.v[layer, rows, slots] = v
        end = int(slots.max()) + 1
        return self.k[layer, :, :end], self.v[layer, :, :end]

    def advance(self, segments: Array) -> None:
        """The step is over: its tokens, with these segments [B, T], are now part of the past."""
        slots = self.slots(segments.shape[1])
        self.segments[np.arange(self.batch)[:, None], slots] = segments
        self.length += segments.shape[1]

    def truncate(self, length: int | Array) -> None:
        """Forget everything from slot `length` on; one number for all rows or one for each.

        Raises ValueError if a row holds fewer.
        """
        wanted = np.zeros_like(self.length) + length
        if wanted.dtype != np.int64 or (wanted < 0).any() or (wanted > self.length).any():
            raise ValueError(f"cannot truncate rows holding {self.length.tolist()} tokens to {wanted.tolist()}")
        self.length = wanted

    def __repr__(self) -> str:
        megabytes = (self.k.nbytes + self.v.nbytes) / 1e6
        return f"KVCache(length={self.length.tolist()}, capacity={self.capacity}, {megabytes:.1f} MB)"
