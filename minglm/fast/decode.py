"""The fused step: a few tokens through the whole model in one compiled function that allocates nothing.

It reads beside `minglm.model`: the stages stand in the same order and compute the same numbers. What differs is who
does it. `threads` ranks run this code at the same time; each stage gives every rank a share of its *outputs*, because
reading weights is all the work there is, and ends at a `barrier` where the ranks wait for each other. What is cheaper
to repeat than to wait for (norms, the choice of experts) every rank computes for itself, in room of its own.

An output of a matrix is always made by one rank, for all rows (`products`), keys go in chunks that are counted from the
first, and rows do not know of each other: so a row's bits depend neither on the number of threads nor on what else is
in the batch.
"""

from typing import NamedTuple

import numpy as np

from minglm.fast.jit import inlined, stage
from minglm.fast.kernels import (
    CHUNK,
    NOT_PICKED,
    ZERO,
    attend_keys,
    choose,
    first_key,
    join_parts,
    normalise_row,
    sigmoid,
    silu_times,
    turn,
)
from minglm.fast.machine import matrix, vector, widen
from minglm.fast.team import barrier, parallel, share
from minglm.fast.vectors import codes_at, products, scales_at

OUTPUTS = 64  # of a matrix that are made in one go

# -- what the step works on --------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """The config's numbers that kernels need; letters as in the glossary, F for the routed experts."""

    layers: int
    dense_layers: int
    D: int
    H: int
    G: int
    d: int
    V: int
    E: int
    F: int
    shared_F: int  # 0: no shared expert
    dense_F: int
    groups: int
    open_groups: int
    normalise: bool
    head_norm: bool
    factor: np.float32
    eps: np.float32


class Weights(NamedTuple):
    """Where the weights are. An array's address stands for it, so that one kernel serves every layout: experts stacked
    or apart, in memory of ours or in a mapped file. Columns of `layers` are named below.

    How they are stored stands in the dtypes of three arrays without entries: float32; uint16 for bfloat16; uint8 for
    e4m3fn; int8 for mxfp4.
    """

    layers: np.ndarray  # int64 [L, columns]
    experts: np.ndarray  # int64 [L, E, 3] gate_proj, up_proj, down_proj
    ends: np.ndarray  # int64 [3] embed_tokens, norm, lm_head
    layer_scales: np.ndarray  # int64 [L, columns], and
    expert_scales: np.ndarray  # int64 [L, E, 3]: of small floats
    rest: np.ndarray  # [0] how `ends` and the router are stored,
    linear: np.ndarray  # [0] attention, dense MLPs, shared experts,
    routed: np.ndarray  # [0] and routed experts
    block: int  # rows and columns that share a scale of e4m3fn; 0: each row has its own


(INPUT_NORM, Q, K, V, Q_BIAS, K_BIAS, V_BIAS, Q_NORM, K_NORM, O, POST_NORM) = range(11)
(ROUTER, ROUTER_BIAS, GATE, UP, DOWN) = range(11, 16)  # GATE, UP, DOWN: the dense MLP, or the shared expert
COLUMNS = 16


class Tokens(NamedTuple):
    """The step's input, for up to as many rows as there is room for; `N[0]` are in use."""

    N: np.ndarray  # int64 [1]
    ids: np.ndarray  # int64 [N]
    rows: np.ndarray  # int64 [N] of the cache
    slots: np.ndarray  # int64 [N] where each goes in its row
    segments: np.ndarray  # int64 [N]
    wanted: np.ndarray  # bool [N] whose logits to compute
    layers: np.ndarray  # int64 [2] the first of them to go through in this launch, and the one to stop before


class Cache(NamedTuple):
    """The arrays of a `KVCache`, and the angles of its positions."""

    k: np.ndarray  # [L, B, capacity, G, d]
    v: np.ndarray
    segments: np.ndarray  # int64 [B, capacity]
    cos: np.ndarray  # [capacity, r/2]
    sin: np.ndarray


class Room(NamedTuple):
    """What the stages leave for each other, for N rows. Of an `own` array each rank writes only its part: own[rank], or
    for [threads · N, …] the rows from `mine` = rank · N on."""

    x: np.ndarray  # [N, D] the residual stream
    positions: np.ndarray  # int64 [N]
    own_normed: np.ndarray  # [threads · N, D]
    own_head: np.ndarray  # [threads · N, d]
    own_rows: np.ndarray  # int64 [threads, N] rows to multiply, and
    own_found: np.ndarray  # [threads, N, OUTPUTS] what comes out
    q: np.ndarray  # [N, H, d]
    firsts: np.ndarray  # int64 [N] the first key that each row sees
    own_scores: np.ndarray  # [threads, CHUNK]
    parts: np.ndarray  # [N, H, chunks, d + 2]
    heads: np.ndarray  # [N, H·d]
    router_scores: np.ndarray  # [N, E]
    own_biased: np.ndarray  # [threads, E]
    own_weights: np.ndarray  # [threads, N, E + 1] combine weights, or NOT_PICKED; the last, the shared expert's, is 1
    own_picks: np.ndarray  # int64 [threads, K]
    picks: np.ndarray  # int64 [L, N, K] for who wants to know; −1 in dense layers
    own_picked: np.ndarray  # int64 [threads, E + 1] the experts that somebody picked, in order
    gate: np.ndarray  # [(picked + 1) · N, F] and after the activation: hidden
    up: np.ndarray
    y: np.ndarray  # [N, D] what the experts answer
    hidden: np.ndarray  # [N, D] after the final norm
    logits: np.ndarray  # [N, V]


class Entry(NamedTuple):
    """What an MTP layer has before its decoder layer."""

    weights: np.ndarray  # int64 [3] enorm, hnorm, eh_proj
    hidden: np.ndarray  # [N, D] the states that come in
    joined: np.ndarray  # [N, 2·D]


# -- the step ----------------------------------------------------------------------------------------------------


@parallel
def step(rank, threads, words, sizes, weights, tokens, cache, room):
    """One rank's part in taking the tokens through the model, as `minglm.model.transformer` does, or through some of
    its layers. Keys and values go into the cache here; who calls has written the new segments and moves the cache's
    length afterwards."""
    if tokens.layers[0] == 0:
        begin(rank, threads, sizes, weights, tokens, cache, room)
        barrier(words, threads)
    for layer in range(tokens.layers[0], tokens.layers[1]):
        decoder_layer(rank, threads, words, layer, sizes, weights, tokens, cache, room)
    if tokens.layers[1] == sizes.layers:
        finish(rank, threads, sizes, weights, tokens, room)


@parallel
def draft_step(rank, threads, words, sizes, weights, tokens, cache, room, entry):
    """One rank's part in taking states and the tokens after them through an MTP layer, as `minglm.model.mtp` does."""
    begin(rank, threads, sizes, weights, tokens, cache, room)
    join(rank, threads, sizes, tokens, room, entry)
    barrier(words, threads)
    project_joined(rank, threads, sizes, weights, tokens, room, entry)
    barrier(words, threads)
    decoder_layer(rank, threads, words, 0, sizes, weights, tokens, cache, room)
    finish(rank, threads, sizes, weights, tokens, room)


@stage
def decoder_layer(rank, threads, words, layer, sizes, weights, tokens, cache, room):
    """One layer, as `minglm.model.layer` does it."""
    # attention.py: 1. project, 2. norm, 3. rotate, 4. remember
    project_heads(rank, threads, layer, sizes, weights, tokens, cache, room)
    barrier(words, threads)
    # 5. attend
    attend(rank, threads, layer, sizes, tokens, cache, room)
    barrier(words, threads)
    join_heads(rank, threads, sizes, tokens, room)
    barrier(words, threads)
    # 6. project back, and layer.py: add to the residual stream
    project_back(rank, threads, layer, sizes, weights, tokens, room)
    barrier(words, threads)
    # layer.py: norm; experts.py: 1. router, 2. routed experts with 3. the shared expert, or the dense MLP
    enter_mlp(rank, layer, sizes, weights, tokens, room)
    picked = 0
    if layer >= sizes.dense_layers:
        score_experts(rank, threads, layer, sizes, weights, tokens, room)
        barrier(words, threads)
        picked = pick_experts(rank, layer, sizes, weights, tokens, room)
    expand(rank, threads, layer, picked, sizes, weights, tokens, room)
    barrier(words, threads)
    contract(rank, threads, layer, picked, sizes, weights, tokens, room)
    barrier(words, threads)


# -- stages ------------------------------------------------------------------------------------------------------


@inlined
def begin(rank, threads, sizes, weights, tokens, cache, room):
    """Look up each token's embedding, and count the earlier tokens of its segment: its position."""
    table = matrix(weights.ends[0], sizes.V, sizes.D, weights.rest)
    start, stop = share(rank, threads, tokens.N[0])
    for n in range(start, stop):
        for i in range(sizes.D):
            room.x[n, i] = widen(table[tokens.ids[n], i])
        b, position = tokens.rows[n], 0
        for s in range(tokens.slots[n]):
            position += tokens.segments[n] >= 0 and cache.segments[b, s] == tokens.segments[n]
        room.positions[n] = position
        room.firsts[n] = first_key(cache.segments, b, tokens.slots[n], tokens.segments[n])


@inlined
def join(rank, threads, sizes, tokens, room, entry):
    """[norm(embedding), norm(state)] of the rows that this rank looked up in `begin`."""
    start, stop = share(rank, threads, tokens.N[0])
    for n in range(start, stop):
        normalise_row(room.x, n, vector(entry.weights[0], sizes.D), sizes.eps, entry.joined, n)
        normalise_row(entry.hidden, n, vector(entry.weights[1], sizes.D), sizes.eps, entry.joined[:, sizes.D :], n)


@stage
def project_joined(rank, threads, sizes, weights, tokens, room, entry):
    """The residual stream begins with eh_proj(joined)."""
    weight = matrix(entry.weights[2], sizes.D, 2 * sizes.D, weights.rest)
    scales = scales_at(0, 0, 0, 0, weights.rest)
    N, rows, found = tokens.N[0], room.own_rows[rank], room.own_found[rank]
    start, stop = share(rank, threads, sizes.D)
    all_rows(N, 0, rows)
    for first in range(start, stop, OUTPUTS):
        last = min(first + OUTPUTS, stop)
        products(weight, scales, 0, first, last, entry.joined, rows, N, found)
        for n in range(N):
            for i in range(first, last):
                room.x[n, i] = found[n, i - first]


@inlined
def all_rows(N, first, rows):
    for n in range(N):
        rows[n] = first + n


@stage
def project_heads(rank, threads, layer, sizes, weights, tokens, cache, room):
    """Each head from start to end: project, add the bias, norm, rotate; keys and values go straight into the cache."""
    N, d, H, G = tokens.N[0], sizes.d, sizes.H, sizes.G
    at, own, mine = weights.layers[layer], room.own_head, rank * len(room.x)
    rows, found = room.own_rows[rank], room.own_found[rank]
    normalise_rows(N, room.x, vector(at[INPUT_NORM], sizes.D), sizes.eps, room.own_normed, mine)
    all_rows(N, mine, rows)
    start, stop = share(rank, threads, H + 2 * G)
    for unit in range(start, stop):  # the heads of q, then of k, then of v
        part = 0 if unit < H else 1 if unit < H + G else 2
        heads, head = (H, unit) if part == 0 else (G, unit - H) if part == 1 else (G, unit - H - G)
        weight = codes_at(at[Q + part], heads * d, sizes.D, weights.linear)
        scales = scales_at(weights.layer_scales[layer, Q + part], heads * d, sizes.D, weights.block, weights.linear)
        bias = vector(at[Q_BIAS + part], heads * d)
        for first in range(0, d, OUTPUTS):
            last, at_head = min(first + OUTPUTS, d), head * d
            products(weight, scales, weights.block, at_head + first, at_head + last, room.own_normed, rows, N, found)
            for n in range(N):
                for i in range(first, last):
                    own[mine + n, i] = found[n, i - first] + bias[at_head + i]
        for n in range(N):
            if part < 2 and sizes.head_norm:
                normalise_row(own, mine + n, vector(at[Q_NORM + part], d), sizes.eps, own, mine + n)
            if part < 2:
                turn(own, mine + n, cache.cos, cache.sin, room.positions[n])
            for i in range(d):
                if part == 0:
                    room.q[n, head, i] = own[mine + n, i]
                elif part == 1:
                    cache.k[layer, tokens.rows[n], tokens.slots[n], head, i] = own[mine + n, i]
                else:
                    cache.v[layer, tokens.rows[n], tokens.slots[n], head, i] = own[mine + n, i]


@inlined
def normalise_rows(N, x, weight, eps, into, mine):
    for n in range(N):
        normalise_row(x, n, weight, eps, into, mine + n)


@stage
def attend(rank, threads, layer, sizes, tokens, cache, room):
    """Chunk by chunk of each row's keys, for all query heads that share them. Query head h reads key/value head h // R.
    The chunks of all rows stand in one line, of which this rank takes its share."""
    pieces = 0
    for n in range(tokens.N[0]):
        pieces += count_chunks(room.firsts[n], tokens.slots[n]) * sizes.G
    start, stop = share(rank, threads, pieces)
    before = 0
    for n in range(tokens.N[0]):
        first, slot = room.firsts[n], tokens.slots[n]
        chunks = count_chunks(first, slot)
        for piece in range(max(start - before, 0), min(stop - before, chunks * sizes.G)):
            c, g = piece // sizes.G, piece % sizes.G  # neighbours in memory one after the other
            begin = first + c * CHUNK
            attend_keys(
                room.q, n, g, cache.k, cache.v, layer, tokens.rows[n], begin, min(begin + CHUNK, slot + 1), slot,
                cache.segments, tokens.segments[n], room.own_scores, rank, c, room.parts,
            )  # fmt: skip
        before += chunks * sizes.G


@inlined
def count_chunks(first, slot):
    return (slot - first) // CHUNK + 1


@inlined
def join_heads(rank, threads, sizes, tokens, room):
    """Put together what each head found on the chunks."""
    start, stop = share(rank, threads, tokens.N[0] * sizes.H)
    for piece in range(start, stop):
        n, head = piece // sizes.H, piece % sizes.H
        join_parts(room.parts, n, head, count_chunks(room.firsts[n], tokens.slots[n]), sizes.d, room.heads)


@stage
def project_back(rank, threads, layer, sizes, weights, tokens, room):
    """x + o_proj(heads)."""
    width = sizes.H * sizes.d
    weight = codes_at(weights.layers[layer, O], sizes.D, width, weights.linear)
    scales = scales_at(weights.layer_scales[layer, O], sizes.D, width, weights.block, weights.linear)
    N, rows, found = tokens.N[0], room.own_rows[rank], room.own_found[rank]
    all_rows(N, 0, rows)
    start, stop = share(rank, threads, sizes.D)
    for first in range(start, stop, OUTPUTS):
        last = min(first + OUTPUTS, stop)
        products(weight, scales, weights.block, first, last, room.heads, rows, N, found)
        for n in range(N):
            for i in range(first, last):
                room.x[n, i] += found[n, i - first]


@inlined
def enter_mlp(rank, layer, sizes, weights, tokens, room):
    """Norm the rows. A dense MLP is a shared expert, number E, without any others."""
    post_norm = vector(weights.layers[layer, POST_NORM], sizes.D)
    normalise_rows(tokens.N[0], room.x, post_norm, sizes.eps, room.own_normed, rank * len(room.x))
    room.own_picked[rank, 0] = sizes.E


@stage
def score_experts(rank, threads, layer, sizes, weights, tokens, room):
    """Score a share of the experts for each row."""
    router = matrix(weights.layers[layer, ROUTER], sizes.E, sizes.D, weights.rest)
    scales = scales_at(0, 0, 0, 0, weights.rest)
    N, rows, found = tokens.N[0], room.own_rows[rank], room.own_found[rank]
    all_rows(N, rank * len(room.x), rows)
    start, stop = share(rank, threads, sizes.E)
    for first in range(start, stop, OUTPUTS):
        last = min(first + OUTPUTS, stop)
        products(router, scales, 0, first, last, room.own_normed, rows, N, found)
        for n in range(N):
            for e in range(first, last):
                room.router_scores[n, e] = sigmoid(found[n, e - first])


@stage
def pick_experts(rank, layer, sizes, weights, tokens, room):
    """Choose each row's experts, and list those that anybody picked, then E, the shared one. Returns their number."""
    bias = vector(weights.layers[layer, ROUTER_BIAS], sizes.E)
    for n in range(tokens.N[0]):
        choose(
            room.router_scores[n], bias, sizes.groups, sizes.open_groups, sizes.normalise, sizes.factor,
            room.own_biased[rank], room.own_weights[rank, n, : sizes.E], room.own_picks[rank],
        )  # fmt: skip
        if rank == 0:
            for k in range(len(room.own_picks[rank])):
                room.picks[layer, n, k] = room.own_picks[rank, k]
    picked = 0
    for e in range(sizes.E):
        for n in range(tokens.N[0]):
            if room.own_weights[rank, n, e] != NOT_PICKED:
                room.own_picked[rank, picked] = e
                picked += 1
                break
    room.own_picked[rank, picked] = sizes.E
    return picked


@inlined
def last_width(sizes, layer):
    """Hidden size of expert E: the shared expert's, or the dense MLP's."""
    return sizes.dense_F if layer < sizes.dense_layers else sizes.shared_F


@stage
def expand(rank, threads, layer, picked, sizes, weights, tokens, room):
    """silu(gate_proj x) · up_proj x for each expert. All their outputs stand in one line, F of each and those of the
    shared expert last, of which this rank takes its share."""
    start, stop = share(rank, threads, picked * sizes.F + last_width(sizes, layer))
    for j in range(picked + 1):
        e, first, last = room.own_picked[rank, j], start - j * sizes.F, stop - j * sizes.F
        if e < sizes.E:
            at, scales = weights.experts[layer, e], weights.expert_scales[layer, e]
            expand_one(rank, j, e, first, last, sizes.F, at, scales, weights.routed, sizes, weights, tokens, room)
        else:
            at, scales = weights.layers[layer, GATE:], weights.layer_scales[layer, GATE:]
            F = last_width(sizes, layer)
            expand_one(rank, j, e, first, last, F, at, scales, weights.linear, sizes, weights, tokens, room)


@inlined
def expand_one(rank, j, e, first, last, F, at, scale_at, kind, sizes, weights, tokens, room):
    """Outputs first … last − 1 of expert e, for the rows that picked it. Row j · N + n of `gate` and `up` is row n at
    the j-th picked expert."""
    N, mine = tokens.N[0], rank * len(room.x)
    rows, found = room.own_rows[rank], room.own_found[rank]
    first, last = max(first, 0), max(min(last, F), 0)  # nothing of it: last ≤ first
    if first < last:
        count = rows_of(e, N, mine, room.own_weights[rank], rows)
        for part in range(2):
            weight = codes_at(at[part], F, sizes.D, kind)
            scales = scales_at(scale_at[part], F, sizes.D, weights.block, kind)
            into = room.gate if part == 0 else room.up
            for begin in range(first, last, OUTPUTS):
                end = min(begin + OUTPUTS, last)
                products(weight, scales, weights.block, begin, end, room.own_normed, rows, count, found)
                for m in range(count):
                    for f in range(begin, end):
                        into[j * N + rows[m] - mine, f] = found[m, f - begin]
        for m in range(count):
            silu_times(room.gate, room.up, j * N + rows[m] - mine, first, last)


@inlined
def rows_of(e, N, first, weights, rows):
    """List the rows that picked expert e, counted from `first`; returns their number."""
    count = 0
    for n in range(N):
        if weights[n, e] != NOT_PICKED:
            rows[count] = first + n
            count += 1
    return count


@stage
def contract(rank, threads, layer, picked, sizes, weights, tokens, room):
    """x + Σ weight · down_proj(hidden), the experts in the order of their numbers and the shared one last."""
    N = tokens.N[0]
    start, stop = share(rank, threads, sizes.D)
    for n in range(N):
        for i in range(start, stop):
            room.y[n, i] = ZERO
    for j in range(picked + 1):
        e = room.own_picked[rank, j]
        if e < sizes.E:
            at, scale_at = weights.experts[layer, e, 2], weights.expert_scales[layer, e, 2]
            contract_one(rank, j, e, start, stop, sizes.F, at, scale_at, weights.routed, sizes, weights, tokens, room)
        else:
            at, scale_at = weights.layers[layer, DOWN], weights.layer_scales[layer, DOWN]
            F = last_width(sizes, layer)
            contract_one(rank, j, e, start, stop, F, at, scale_at, weights.linear, sizes, weights, tokens, room)
    for n in range(N):
        for i in range(start, stop):
            room.x[n, i] += room.y[n, i]


@inlined
def contract_one(rank, j, e, start, stop, F, at, scale_at, kind, sizes, weights, tokens, room):
    """Add expert e's answer to outputs start … stop − 1 of the rows that picked it."""
    N, rows, found = tokens.N[0], room.own_rows[rank], room.own_found[rank]
    weight = codes_at(at, sizes.D, F, kind)
    scales = scales_at(scale_at, sizes.D, F, weights.block, kind)
    count = rows_of(e, N, j * N, room.own_weights[rank], rows)
    for first in range(start, stop, OUTPUTS):
        last = min(first + OUTPUTS, stop)
        products(weight, scales, weights.block, first, last, room.gate, rows, count, found)
        for m in range(count):
            n = rows[m] - j * N
            for i in range(first, last):
                room.y[n, i] += room.own_weights[rank, n, e] * found[m, i - first]


@stage
def finish(rank, threads, sizes, weights, tokens, room):
    """The final norm, and the logits of the rows that want them."""
    N, mine = tokens.N[0], rank * len(room.x)
    rows, found = room.own_rows[rank], room.own_found[rank]
    normalise_rows(N, room.x, vector(weights.ends[1], sizes.D), sizes.eps, room.own_normed, mine)
    head = matrix(weights.ends[2], sizes.V, sizes.D, weights.rest)
    scales = scales_at(0, 0, 0, 0, weights.rest)
    count = 0
    for n in range(N):
        if tokens.wanted[n]:
            rows[count] = mine + n
            count += 1
    start, stop = share(rank, threads, sizes.V)
    for first in range(start, stop, OUTPUTS):
        last = min(first + OUTPUTS, stop)
        products(head, scales, 0, first, last, room.own_normed, rows, count, found)
        for m in range(count):
            for i in range(first, last):
                room.logits[rows[m] - mine, i] = found[m, i - first]
    if rank == 0:
        for n in range(N):
            for i in range(sizes.D):
                room.hidden[n, i] = room.own_normed[mine + n, i]
