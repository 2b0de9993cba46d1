"""Multi-token prediction: one more layer that guesses the token after the next one.

Row i pairs the hidden state h_i with the *next* token t_{i+1} and predicts t_{i+2}. Chained, depth 2 pairs depth 1's
output for row i with t_{i+2} and predicts t_{i+3}, and so on. GLM-4.5 trains one such layer and uses it to draft
tokens for speculative decoding. Sources: `MtpLayer` of transformers; DeepSeek-V3 report, arXiv 2412.19437, section 2.2.

Easily got wrong, and all tested: the embedding comes first in the concatenation; h is taken after the final norm; what
is passed on to the next depth is taken after `shared_head.norm`; no position is masked or zeroed.
"""

from typing import Any, NamedTuple

import numpy as np

from minglm.config import Config
from minglm.model import ops as numpy_ops
from minglm.model.attention import Layout, make_layout
from minglm.model.kvcache import KVCache
from minglm.model.layer import LayerSaved, layer, layer_bwd
from minglm.model.ops import IGNORE, Array, Ops, Tap, no_tap, scoped
from minglm.model.params import Mtp, Params, SharedHead, Weight, in_compute_dtype, zeros_like
from minglm.model.transformer import head_weight


class MtpSaved(NamedTuple):
    ids: Array  # [B, T] the next tokens
    embedding: Array  # [B, T, D]
    hidden: Array  # [B, T, D] as it came in
    joined: Array  # [B, T, 2·D]
    layer: LayerSaved
    out: Array  # [B, T, D] of the decoder layer, before shared_head.norm


def mtp_layer(
    hidden: Array,
    next_ids: Array,
    params: Mtp,
    embedding_weight: Array,
    config: Config,
    layout: Layout,
    cache: KVCache | None = None,
    index: int = 0,
    tap: Tap = no_tap,
    ops: Ops = numpy_ops,
) -> tuple[Array, MtpSaved]:  # [B, T, D], int [B, T] -> [B, T, D]
    """eh_proj([norm(embedding of the next token), norm(hidden)]), a decoder layer, shared_head.norm.

    The result is what the head reads and what the next depth gets as `hidden`. `index` is this layer's number in its
    cache. `mtp_embedding_weight` gives the table to look the tokens up in.
    """
    eps = config.rms_norm_eps
    # 1. join the new token with the state that has not seen it
    embedding = tap("embed_tokens", ops.embed(next_ids, embedding_weight).astype(hidden.dtype, copy=False))
    token_part = tap("enorm", ops.rms_norm(embedding, params.enorm.weight, eps))
    state_part = tap("hnorm", ops.rms_norm(hidden, params.hnorm.weight, eps))
    joined = np.concatenate([token_part, state_part], axis=-1)  # -> [B, T, 2·D]
    x = tap("eh_proj", ops.linear(joined, params.eh_proj.weight))  # -> [B, T, D]
    # 2. one decoder layer
    out, saved_layer = layer(x, params.block, config, layout, cache, index, tap, ops)
    # 3. norm
    normed = tap("shared_head.norm", ops.rms_norm(out, params.shared_head.norm.weight, eps))
    return normed, MtpSaved(next_ids, embedding, hidden, joined, saved_layer, out)


def mtp_layer_bwd(
    dnormed: Array,
    saved: MtpSaved,
    params: Mtp,
    embedding_weight: Array,
    config: Config,
    dscores: Array | None = None,
    ops: Ops = numpy_ops,
) -> tuple[Array, Array, Mtp]:
    """Returns dhidden [B, T, D], the gradient of the embedding table [V, D], and the layer's own gradients."""
    ids, embedding, hidden, joined, saved_layer, out = saved
    eps = config.rms_norm_eps
    # 3. normed = norm(out)
    dout, dhead_norm = ops.rms_norm_bwd(dnormed, out, params.shared_head.norm.weight, eps)
    # 2. out = layer(x)
    dx, dblock = layer_bwd(dout, saved_layer, params.block, config, dscores, ops)
    # 1. x = eh_proj([enorm(embedding), hnorm(hidden)])
    djoined, deh_proj, _ = ops.linear_bwd(dx, joined, params.eh_proj.weight)
    dtoken_part, dstate_part = np.split(djoined, 2, axis=-1)
    dhidden, dhnorm = ops.rms_norm_bwd(dstate_part, hidden, params.hnorm.weight, eps)
    dembedding, denorm = ops.rms_norm_bwd(dtoken_part, embedding, params.enorm.weight, eps)
    dtable = ops.embed_bwd(dembedding, ids, embedding_weight)
    dparams = Mtp(
        enorm=Weight(denorm),
        hnorm=Weight(dhnorm),
        eh_proj=Weight(deh_proj),
        block=dblock,
        shared_head=SharedHead(Weight(dhead_norm), None),
        embed_tokens=None,
    )
    return dhidden, dtable, dparams


def mtp_embedding_weight(params: Params, mtp: Mtp) -> Array:
    """The MTP layer's own embedding, or the main one where the file has none (GLM-4.6 and later)."""
    return (mtp.embed_tokens or params.embed_tokens).weight


def mtp_head_weight(params: Params, mtp: Mtp) -> Array:
    """The MTP layer's own head, or the main one."""
    return head_weight(params) if mtp.shared_head.head is None else mtp.shared_head.head.weight


# -- whole sequences ---------------------------------------------------------------------------------------------


class Depth(NamedTuple):
    """One depth of a chain over whole sequences."""

    number: int  # of the MTP layer that ran
    valid: Array  # bool [B, T − depth]: both tokens of the pair belong to one document
    normed: Array  # [B, T − depth, D]
    saved: MtpSaved


def mtp_chain(
    hidden: Array,
    ids: Array,
    trunk: Layout,
    params: Params,
    config: Config,
    depths: int,
    tap: Tap = no_tap,
    ops: Ops = numpy_ops,
) -> list[Depth]:  # [B, T, D], int [B, T] -> depths 1 … `depths`
    """Run depths 1, 2, … on the trunk's hidden states. Beyond the last MTP layer the layers are used again from the
    first, as engines do when they draft more tokens than there are layers.

    Depth k has T − k rows, at the positions of their hidden states (`trunk` is the layout that those were made with).
    A row whose tokens belong to two documents sees nobody and is marked invalid.
    """
    chain: list[Depth] = []
    for k in range(1, depths + 1):
        rows = ids.shape[1] - k
        number = (k - 1) % len(params.mtp)
        mtp = getattr(ops, "in_compute_dtype", in_compute_dtype)(
            params.mtp[number], params.norm.weight.dtype, hidden.dtype
        )
        own = trunk.sight.segments[:, :rows]
        valid = (own == trunk.sight.segments[:, k:]) & (own >= 0)
        layout = make_layout(
            own.shape, config, hidden.dtype, None, trunk.positions[:, :rows], segments=np.where(valid, own, -1)
        )
        table = mtp_embedding_weight(params, mtp)
        tap_here = scoped(tap, f"layers.{config.num_hidden_layers + number}.")
        normed, saved = mtp_layer(hidden[:, :rows], ids[:, k:], mtp, table, config, layout, tap=tap_here, ops=ops)
        chain.append(Depth(number, valid, normed, saved))
        hidden = normed
    return chain


def mtp_chain_loss(
    chain: list[Depth], targets: Array, params: Params, dtype: Any, ops: Ops = numpy_ops
) -> tuple[Any, list[Any]]:  # targets int [B, T] -> scalar
    """The mean over the depths. Row i of depth k predicts the token after t_{i+k}: the target of row i + k."""
    total, saved = dtype.type(0), []
    for k, depth in enumerate(chain, start=1):
        logits = ops.linear(depth.normed, mtp_head_weight(params, params.mtp[depth.number]))
        loss, saved_loss = ops.cross_entropy(logits, np.where(depth.valid, targets[:, k:], IGNORE))
        total = total + loss / len(chain)
        saved.append(saved_loss)
    return total, saved


def mtp_chain_bwd(
    dloss: float,
    chain: list[Depth],
    saved: list[Any],
    hidden: Array,
    params: Params,
    config: Config,
    dscores: dict[int, Array],
    ops: Ops = numpy_ops,
) -> tuple[Array, Array, Array, tuple[Mtp, ...]]:
    """Last depth first, because each depth hands a gradient to the state that it read.

    Returns the gradients of the trunk's hidden states [B, T, D], of the main embedding and head [V, D] (for MTP layers
    that borrow them), and of each MTP layer. Each layer runs at most once in training.
    """
    dtable, dhead = np.zeros_like(params.embed_tokens.weight), np.zeros_like(head_weight(params))
    dmtp = [zeros_like(mtp) for mtp in params.mtp]
    dstate = np.zeros_like(hidden[:, :0])  # gradient at this depth's output from the next depth: none yet
    for depth, saved_loss in zip(reversed(chain), reversed(saved), strict=True):
        mtp = params.mtp[depth.number]
        table, of_balance = mtp_embedding_weight(params, mtp), dscores.get(config.num_hidden_layers + depth.number)
        dlogits = ops.cross_entropy_bwd(dloss / len(chain), saved_loss)
        dnormed, dhead_here, _ = ops.linear_bwd(dlogits, depth.normed, mtp_head_weight(params, mtp))
        dnormed[:, : dstate.shape[1]] += dstate
        dstate, dtable_here, dlayer = mtp_layer_bwd(dnormed, depth.saved, mtp, table, config, of_balance, ops)
        if mtp.shared_head.head is None:
            dhead += dhead_here
        else:
            dlayer = dlayer._replace(shared_head=dlayer.shared_head._replace(head=Weight(dhead_here)))
        if mtp.embed_tokens is None:
            dtable += dtable_here
        else:
            dlayer = dlayer._replace(embed_tokens=Weight(dtable_here))
        dmtp[depth.number] = dlayer
    dhidden = np.zeros_like(hidden)
    dhidden[:, : dstate.shape[1]] = dstate
    return dhidden, dtable, dhead, tuple(dmtp)


# -- one step with a cache ---------------------------------------------------------------------------------------


def mtp_step(
    hidden: Array,
    next_ids: Array,
    params: Params,
    config: Config,
    cache: KVCache,
    number: int = 0,
    segments: Array | None = None,
    tap: Tap = no_tap,
    ops: Ops = numpy_ops,
) -> tuple[Array, Array]:  # [B, T, D], int [B, T] -> logits [B, T, V], [B, T, D]
    """The draft step: MTP layer `number` continues its own `cache` (made with `layers=1`) by T rows.

    First the whole prompt, as `mtp_step(hidden[:, :-1], ids[:, 1:], …)`, so that drafts can look back at it; then one
    row for each token. To draft one token further, the second result goes in again as `hidden`: to the next layer, or
    to the same one where there is only one, as in GLM-4.5.
    """
    normed = mtp_states(hidden, next_ids, params, config, cache, number, segments, tap, ops)
    weight = mtp_head_weight(params, params.mtp[number])
    return ops.linear(normed, weight.astype(hidden.dtype, copy=False)), normed


def mtp_states(
    hidden: Array,
    next_ids: Array,
    params: Params,
    config: Config,
    cache: KVCache,
    number: int = 0,
    segments: Array | None = None,
    tap: Tap = no_tap,
    ops: Ops = numpy_ops,
) -> Array:  # [B, T, D], int [B, T] -> [B, T, D]
    """The second result of `mtp_step` alone: enough for the rows of a prompt, whose logits nobody asks for."""
    mtp = getattr(ops, "in_compute_dtype", in_compute_dtype)(params.mtp[number], params.norm.weight.dtype, hidden.dtype)
    layout = make_layout(next_ids.shape, config, hidden.dtype, cache, segments=segments)
    table = mtp_embedding_weight(params, mtp)
    normed, _ = mtp_layer(hidden, next_ids, mtp, table, config, layout, cache, 0, tap, ops)
    cache.advance(layout.sight.segments)
    return normed
