"""The key/value cache: the same tokens in any split, and after drafts were refused, give the same outputs."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.random import default_rng

from minglm.learn.exercise import Case, Design, Exercise, Inputs, Mistake, Outputs
from minglm.model.ops import Array, softmax

Rotate = Callable[[Array, Array], Array]  # x [T, heads, d], positions int [T] -> x turned
SLOTS = 32


def reference(
    cache: Any,  # None in the first call; then what the call before returned
    layer: int,
    start: int,
    q: Array,  # [T, H, d] of the new tokens, start … start + T − 1
    k: Array,  # [T, G, d]
    v: Array,  # [T, G, d]
    rotate: Rotate,
    *,
    turn: str = "once",  # or "from 0", "keys from 0", "again", "again and stored", "queries only"
    keys: str = "to the last token",  # or "new ones", "all slots"
    place: str = "start",  # of the new keys, or "after all that came", "one counter for all layers"
    mask: str = "past",  # or "position", "next slot", "none", "none after the first call", "top left"
    sees: int = SLOTS,  # so many tokens, itself among them
) -> tuple[Array, Any]:  # -> y [T, H·d], the cache
    """All flags at their defaults: `minglm.model.KVCache` with `rope` and `attend`. The cache is (keys, values
    [layers, slots, G, d], how many tokens came to each layer)."""
    if cache is None:
        cache = np.zeros((2, SLOTS, *k.shape[1:]), k.dtype), np.zeros((2, SLOTS, *v.shape[1:]), v.dtype), [0, 0]
    stored_k, stored_v, came = cache
    T, new = len(q), np.arange(len(q))
    first = {"start": start, "after all that came": came[layer]}.get(place, sum(came))
    came[layer] += T
    where = first + new  # slots
    if where[-1] >= SLOTS:
        raise ValueError(f"slot {where[-1]} of {SLOTS}")
    of_q = new if turn == "from 0" else start + new
    of_k = new if turn in ("from 0", "keys from 0") else start + new
    stored_k[layer, where] = k if turn in ("queries only", "again and stored") else rotate(k, of_k)
    stored_v[layer, where] = v
    end = SLOTS if keys == "all slots" else where[-1] + 1
    if turn == "again and stored":
        stored_k[layer, :end] = rotate(stored_k[layer, :end], np.arange(end))
    seen_k, seen_v = stored_k[layer, :end], stored_v[layer, :end]
    if turn == "again":
        seen_k = np.concatenate([rotate(seen_k[:first], np.arange(first)), seen_k[first:]])
    slots = np.arange(end)
    if keys == "new ones":
        seen_k, seen_v, slots = seen_k[where], seen_v[where], where
    own = {"top left": new, "position": start + new, "next slot": where + 1}.get(mask, where)
    ahead = slots[None] - own[:, None]  # [T, S]
    hidden = (ahead > 0) & (slots <= where[-1])[None] if keys == "all slots" else ahead > 0
    if mask == "none" or (mask == "none after the first call" and start):
        hidden = ahead > SLOTS
    return _attend(rotate(q, of_q), seen_k, seen_v, hidden | (ahead <= -sees)), (stored_k, stored_v, came)


def _attend(q: Array, k: Array, v: Array, hidden: Array) -> Array:  # [T, H, d], [S, G, d] ×2, [T, S] -> [T, H·d]
    T, H, d = q.shape
    k, v = (np.repeat(a, H // a.shape[1], axis=1) for a in (k, v))
    scores = np.where(hidden, -np.inf, np.einsum("thd,shd->hts", q, k) / d**0.5)
    return np.einsum("hts,shd->thd", softmax(scores), v).reshape(T, H * d).astype(q.dtype)


# -- many calls --------------------------------------------------------------------------------------------------


def rotate_by_halves(x: Array, positions: Array) -> Array:
    """`rope` of all entries, theta 100; for any number of heads."""
    half = x.shape[-1] // 2
    angles = (positions[:, None] / 100.0 ** (np.arange(half) / half)).astype(x.dtype)[:, None]  # [T, 1, d/2]
    cos, sin, first, second = np.cos(angles), np.sin(angles), x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def feed(function: Callable[..., Any], inputs: Inputs, rotate: Rotate = rotate_by_halves) -> list[Any]:
    """Call the function for each layer of each step; steps are (start, T), and take their rows one after another."""
    q, k, v, steps = inputs
    cache: Any = None
    ys: list[Any] = []
    row = 0
    for start, count in steps:
        rows = slice(row, row + count)
        row += count
        for layer in range(len(q)):
            returned = function(cache, layer, start, q[layer, rows], k[layer, rows], v[layer, rows], rotate)
            if not isinstance(returned, tuple | list) or len(returned) != 2:
                raise ValueError("wanted two things, y [T, H·d] and the cache, which the next call is given")
            y, cache = np.asarray(returned[0]), returned[1]
            wanted = (count, q.shape[2] * q.shape[3])
            if y.shape != wanted:
                raise ValueError(f"y has the shape {list(y.shape)}, wanted [T, H·d] = {list(wanted)}")
            ys.append(y)
    return [ys, cache]


def in_layers(inputs: Inputs, returned: list[Any]) -> Outputs:
    """The y of all calls, [layers, rows, H·d]."""
    layers = len(inputs[0])
    return {"y": np.stack([np.concatenate(returned[0][layer::layers]) for layer in range(layers)])}


def bill(function: Callable[..., Any], inputs: Inputs) -> str | None:
    """Keys that were turned again, or numbers held that need not be."""
    G, turned = inputs[1].shape[2], 0

    def rotate(x: Array, positions: Array) -> Array:
        nonlocal turned
        turned += len(positions) if x.shape[1] == G else 0
        return rotate_by_halves(x, positions)

    _, cache = feed(function, inputs, rotate)
    layers, rows = inputs[1].shape[:2]
    said = []
    if turned > layers * rows:
        said.append(
            f"{turned} keys were turned, where {layers * rows} came: a key can be stored as it is after its turn"
        )
    held, needed = _numbers(cache), 2 * inputs[1][0, 0].size * layers * SLOTS
    if held > 2 * needed:
        said.append(f"the cache holds {held} numbers, where {needed} do for {SLOTS} tokens: keys and values of G heads")
    return f"Right, with a bill: {'; '.join(said)}." if said else None


def _numbers(held: Any) -> int:
    if isinstance(held, dict):
        return sum(map(_numbers, held.values()))
    return sum(map(_numbers, held)) if isinstance(held, tuple | list) else int(np.size(held))


def cases(draw: int = 0) -> Sequence[Case]:
    """Seven tokens in two layers, whole and split; then drafts that are refused: a step begins before the last end."""
    rng = default_rng([5, draw])

    def inputs(*steps: tuple[int, int]) -> tuple[Any, ...]:
        n = sum(count for _, count in steps)
        return (
            2 * rng.standard_normal((2, n, 6, 4)),
            rng.standard_normal((2, n, 2, 4)),
            rng.standard_normal((2, n, 2, 4)),
            steps,
        )

    chunks = "in pieces, after the first several at once"
    refused = "after a refusal: what was from `start` on no longer counts"
    return [
        Case("whole", inputs((0, 7))),
        *(Case("token by token", inputs(*((i, 1) for i in range(7)))) for _ in range(2)),
        Case(chunks, inputs((0, 3), (3, 1), (4, 2), (6, 1))),
        Case(chunks, inputs((0, 4), (4, 3))),
        Case(chunks, inputs((0, 1), (1, 5), (6, 1))),
        Case(refused, inputs((0, 3), (3, 3), (4, 2), (6, 1))),
        Case(refused, inputs((0, 4), (4, 1), (4, 3), (5, 2))),
        Case(refused, inputs((0, 5), (5, 2), (0, 2), (2, 4))),
    ]


EXERCISE = Exercise(
    name="kv_cache",
    minutes=40,
    brief="kv_cache(cache, layer, start, q [T, H, d], k [T, G, d], v [T, G, d], rotate) -> y [T, H·d], cache. Called "
    "for each layer of each step with what is new: tokens start … start + T − 1; earlier ones are in the cache, and "
    "what it holds from `start` on was refused. The cache is None at first, and later what you returned: arrays and "
    "numbers in tuples, lists and dicts, to be written to as you like; there are never more than 32 tokens and 2 "
    "layers. rotate(x [T, heads, d], positions int [T]) turns queries or keys; then as in `attend`: scores over √d, "
    "nobody sees the future, H/G query heads in a row share a key/value head. Notebook 04.",
    reference=reference,
    cases=cases,
    mistakes=(
        Mistake("restart_positions", {"turn": "from 0"}, "in every step positions begin at 0"),
        Mistake(
            "query_only", {"turn": "keys from 0"}, "the queries know their positions; those of the keys begin at 0"
        ),
        Mistake("double_rotate", {"turn": "again"}, "keys from the cache are turned again when they are read"),
        Mistake("double_rotate", {"turn": "again and stored"}, "in every step all keys so far are turned once more"),
        Mistake("unrotated_cache", {"turn": "queries only"}, "keys are stored before their turn, and never turned"),
        Mistake(
            "new_only",
            {"keys": "new ones"},
            "only the new keys are looked at: the old ones were overwritten, or not read",
        ),
        Mistake("whole_buffer", {"keys": "all slots"}, "slots that nobody has filled are looked at, and e⁰ is 1"),
        Mistake("no_mask", {"mask": "none"}, "tokens that arrive together see each other's future"),
        Mistake(
            "no_mask_after_first",
            {"mask": "none after the first call"},
            "once the cache holds something nothing is hidden, and tokens that arrive together see their future",
        ),
        Mistake("peek", {"mask": "next slot"}, "a token sees the one after it, where it has come already"),
        Mistake("top_left", {"mask": "top left"}, "the mask begins at key 0, though the first query is token `start`"),
        Mistake(
            "stale_after_truncate",
            {"place": "after all that came"},
            "tokens that were refused are still in the cache, before the new ones",
        ),
        Mistake(
            "stale_after_truncate",
            {"place": "after all that came", "mask": "position"},
            "tokens that were refused are still in the cache, before the new ones",
        ),
        Mistake(
            "advance_per_layer",
            {"place": "one counter for all layers"},
            "every layer moves the same counter on, so layer 1 writes one step too far",
        ),
    ),
    designs=(
        Design("window", {"sees": 3}, "A token sees itself and the two before it, no more."),
        Design("query_turned_only", {"turn": "queries only"}, "Keys are not turned at all, only queries."),
    ),
    axes={"y": "L T H·d"},
    outputs=in_layers,
    run=feed,
    bill=bill,
)
