# %% [markdown]
# # 07 · One forward step: every array between a line of text and the next token
#
# *Reading 40 minutes · running 15 seconds · needs [04](04-attention.ipynb), [06](06-experts.ipynb)*
#
# The parts of GLM-4.5 have been taken apart one by one. Here they are put together: one prompt goes in, one token comes
# out, and nothing in between is skipped.

# %% [markdown]
# ## The question
#
# What exactly happens between a line of text and the token that follows it?
#
# GLM-4.5 answers with 92 layers, `glm-tiny` with 6. The steps inside a layer are the same, in the same order. We write
# them in plain NumPy as we go, and hold each array against the one that the model itself computed. At the end two lists
# must be equal: the names that the model announced, and the names that we made.

# %%
import numpy as np

import minglm
from minglm.look import plots

np.set_printoptions(precision=3, suppress=True, linewidth=110)
model = minglm.load("glm-tiny")
trace = model.trace("def add(a, b):\n    return a +")
print(trace)
print([t.replace("↵", "\\n") for t in trace.tokens])

# %% [markdown]
# Ten tokens, some four hundred arrays. Every step of the forward pass hands its result to a function called a *tap*,
# with a name; a trace is what a tap collected. [docs/taps.md](../docs/taps.md) lists the names with their axes. That
# list also says which names *should* have come. The only ones missing may be those of experts that nobody picked.

# %%
from minglm.look.trace import expected_taps

listed = [tap.name for tap in expected_taps(model.config, B=1, T=10)]
silent = [name for name in listed if name not in trace]
assert [name for name in listed if name in trace] == trace.names()
assert all(".experts." in name for name in silent)
arrays_each = 5  # of an expert: tokens, gate, up, hidden, out
idle = len(silent) // arrays_each
print(f"{len(listed)} names listed, {len(trace)} arrays came; in five layers {idle} experts kept silent")

# %% [markdown]
# Same names, same order. GLM-4.5's own list is longer, as 89 of its layers have 160 experts each; per layer the kinds
# of steps are the same.

# %%
big = minglm.PRESETS["GLM-4.5"]
kinds = {name.split("layers.5.")[1] for name in listed if name.startswith("layers.5.") and ".experts." not in name}
theirs = {t.name.split("layers.91.")[1] for t in expected_taps(big, 1, 10) if t.name.startswith("layers.91.")}
assert kinds == {name for name in theirs if ".experts." not in name}
print(f"steps of a layer besides its experts: {len(kinds)}; names in GLM-4.5: {len(expected_taps(big, 1, 10)):,}")

# %% [markdown]
# ## Our own notebook page: `note`
#
# From here on we compute. `note` puts an array on our list and at once compares it with the trace, in
# shape and value. It is a tap, only that it insists.
#
# With `show` we print what is on the list: shape, mean and standard deviation (of finite numbers).

# %%
arrays = dict(trace)  # name -> array, as the model computed it
mine = {}


def note(name, array):
    theirs = arrays[name]
    theirs = theirs[0] if theirs.ndim > array.ndim else theirs  # ours have no batch axis
    assert array.shape == theirs.shape, name
    assert np.allclose(array, theirs, rtol=1e-3, atol=1e-4), name
    mine[name] = array
    return array


# %%
def show(*names):
    for name in names:
        shape, values = mine[name].shape, mine[name][np.isfinite(mine[name])]
        print(f"{name:38}{list(shape)!s:14} mean {values.mean():7.3f}   std {values.std():7.3f}")


# %% [markdown]
# ## The embedding
#
# The first step reads, and computes nothing: each id picks its row of a table [V, D]. The ten rows are the beginning of
# the **residual stream**, to which every later step only adds.

# %%
weights, config = model.params, model.config
ids = trace.ids[0]  # [T]
x = note("embed_tokens", weights.embed_tokens.weight[ids])  # -> [T, D]
show("embed_tokens")
plots.plot_array(x, "T D", f"{model.name}, the embedding", rows=trace.tokens)

# %% [markdown]
# Ten rows of 192 numbers of both signs, around zero. No single column means anything to the eye; a few stand out in one
# row or another. Nothing yet depends on where a token stands: equal tokens have equal rows. Our prompt has ` a` once
# and `(a` once, which are two different tokens, so no two rows are alike here.
#
# ## Layer 0, first half: attention
#
# The steps of [04](04-attention.ipynb). First the norm: each row is divided by the root of its mean square, and
# multiplied by a weight. The *normed* rows are what attention reads. The stream itself stays as it is.


# %%
def norm(x, weight):  # over the last axis
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + config.rms_norm_eps) * weight


layer = weights.layers[0]
read = note("layers.0.input_layernorm", norm(x, layer.input_layernorm.weight))
show("embed_tokens", "layers.0.input_layernorm")

# %% [markdown]
# Three projections follow, cut into heads: six query heads, but two heads of keys and of values. Then a norm over the
# 32 numbers of each head of the queries and keys, but not of the values.


# %%
def project(x, linear):  # [T, D] -> [T, heads, d]
    return (x @ linear.weight.T + linear.bias).reshape(len(x), -1, config.head_dim)


def queries_keys_values(read, w, where):
    q = note(where + "q", project(read, w.q_proj))
    k = note(where + "k", project(read, w.k_proj))
    v = note(where + "v", project(read, w.v_proj))
    q = note(where + "q_norm", norm(q, w.q_norm.weight))
    k = note(where + "k_norm", norm(k, w.k_norm.weight))
    return q, k, v


q, k, v = queries_keys_values(read, layer.self_attn, "layers.0.self_attn.")
show(*[f"layers.0.self_attn.{name}" for name in ("q", "k", "v", "q_norm", "k_norm")])

# %% [markdown]
# Then positions enter, for the first and only time in a layer. The first half of a head's entries is turned, in pairs,
# by angles that grow with the position ([03](03-rotary-positions.ipynb)); the second half is left alone.
#
# Predict: which row of `q` does not change at all?

# %%
half = config.rotary_dim // 2
angles = np.arange(len(ids))[:, None, None] * config.rope_theta ** (-np.arange(half) / half)  # [T, 1, r/2]


def turn(x):  # [T, heads, d]
    a, b, rest = np.split(x, [half, 2 * half], axis=-1)
    turned = a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles), rest
    return np.concatenate(turned, axis=-1).astype(x.dtype)


moved = abs(turn(q) - q).max(axis=(1, 2))
assert moved[0] == 0
print("largest change by token", moved)

# %% [markdown]
# The first: at position 0 all angles are zero.
#
# Now each query is multiplied with the keys, divided by √d, hidden where the key comes later, and softmaxed. The
# probabilities mix the values, and one matrix takes all heads back to D numbers. Three query heads share a key head.


# %%
def attention(read, w, where):  # [T, D] -> [T, D]
    q, k, v = queries_keys_values(read, w, where)
    q, k = note(where + "q_rope", turn(q)), note(where + "k_rope", turn(k))
    k, v = (np.repeat(each, config.num_attention_heads // config.num_key_value_heads, axis=1) for each in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(config.head_dim)
    scores = note(where + "scores", np.where(np.tri(len(q), dtype=bool), scores, -np.inf).astype(q.dtype))
    exps = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probs = note(where + "probs", exps / exps.sum(axis=-1, keepdims=True))
    heads = note(where + "heads", np.einsum("hts,shd->thd", probs, v))
    return note(where + "o", heads.reshape(len(q), -1) @ w.o_proj.weight.T)


added = attention(read, layer.self_attn, "layers.0.self_attn.")
show(*[f"layers.0.self_attn.{name}" for name in ("q_rope", "k_rope", "scores", "probs", "heads", "o")])

# %% [markdown]
# Every one of these arrays was just held against the model's. The picture shows the probabilities, one panel for each
# query head.

# %%
probs = mine["layers.0.self_attn.probs"]
assert np.allclose(probs.sum(axis=-1), 1)
assert probs[3, 5, 5] > 0.5
assert probs[3, 6, 5] > 0.5
plots.plot_attention(probs, trace.tokens, kv_heads=config.num_key_value_heads, layer=0, name=model.name)

# %% [markdown]
# Each row sums to 1, and above the diagonal there is nothing, for later tokens are hidden. Most heads spread their look
# over all that came before. Some cells are dark: in head 3 the line's end `):` looks at itself, and the spaces after it
# look at it, too.
#
# What attention answers is *added* to the stream.

# %%
middle = note("layers.0.middle", x + added)
show("embed_tokens", "layers.0.self_attn.o", "layers.0.middle")

# %% [markdown]
# ## Layer 0, second half: a dense MLP
#
# Again a norm first, of what is in the stream by now. Then two projections to 512 numbers, one of them through
# $z · \mathrm{sigmoid}(z)$, their product, and a projection back. No token looks at another one here.


# %%
def gated(x, gate, up, down, where):  # [n, D] -> [n, D]; an expert, the shared expert and a dense MLP alike
    g = note(where + "gate", x @ gate.T)
    u = note(where + "up", x @ up.T)
    hidden = note(where + "hidden", g / (1 + np.exp(-g)) * u)
    return hidden @ down.T


def matrices(mlp):
    return mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight


# %%
read = note("layers.0.post_attention_layernorm", norm(middle, layer.post_attention_layernorm.weight))
answer = note("layers.0.mlp.out", gated(read, *matrices(layer.mlp), "layers.0.mlp."))
out = note("layers.0.out", middle + answer)
show(*[f"layers.0.{name}" for name in ("post_attention_layernorm", "mlp.gate", "mlp.hidden", "mlp.out", "out")])
assert answer.std() > 5 * added.std()

# %% [markdown]
# That was layer 0. Compare two standard deviations, `mlp.out` here and `self_attn.o` before: the MLP adds far more than
# attention did. The embedding itself is small, so most of what leaves this layer was written by its MLP.
#
# ## Layer 1: a mixture of experts
#
# Attention is the same code with other weights, so it takes one line for what took a page before. Then the stream is
# normed, and the router reads it.

# %%
layer, x = weights.layers[1], out
read = note("layers.1.input_layernorm", norm(x, layer.input_layernorm.weight))
middle = note("layers.1.middle", x + attention(read, layer.self_attn, "layers.1.self_attn."))
read = note("layers.1.post_attention_layernorm", norm(middle, layer.post_attention_layernorm.weight))
show(*[f"layers.1.{name}" for name in ("input_layernorm", "self_attn.o", "middle", "post_attention_layernorm")])

# %% [markdown]
# **The router.** A score for each expert, a bias to choose with, the K best, and weights from the scores *without* the
# bias ([05](05-router.ipynb)).


# %%
def route(read, gate, where):  # [N, D] -> picks [N, K], weights [N, K]
    logits = note(where + "router_logits", read @ gate.weight.T)
    scores = note(where + "router_scores", 1 / (1 + np.exp(-logits)))
    biased = note(where + "biased_scores", scores + gate.e_score_correction_bias)
    best = np.argsort(-biased, axis=-1, kind="stable")[:, : config.num_experts_per_tok]
    picks = note(where + "expert_indices", best)
    picked = np.take_along_axis(scores, picks, axis=-1)
    share = picked / picked.sum(axis=-1, keepdims=True)
    return picks, note(where + "expert_weights", share * config.routed_scaling_factor)


picks, loud = route(read, layer.mlp.gate, "layers.1.mlp.")
show(*[f"layers.1.mlp.{name}" for name in ("router_logits", "router_scores", "biased_scores", "expert_weights")])
print(picks.T, loud.T, sep="\n")

# %% [markdown]
# The columns are tokens; above the numbers of the two experts, below their weights. Each column of weights sums to 1.5.
#
# **The experts.** Each picked expert takes the rows of its tokens, all at once, and answers. The answers are multiplied
# by the weights and added into place ([06](06-experts.ipynb)). **The shared expert** takes every row, and its answer is
# added as it is.


# %%
def routed(read, picks, loud, experts, where):  # -> [N, D]
    total = np.zeros_like(read)
    for e in np.unique(picks):
        tokens, rank = np.nonzero(picks == e)
        name = f"{where}experts.{e}."
        note(name + "tokens", tokens)
        three = experts.gate_proj[e], experts.up_proj[e], experts.down_proj[e]
        answers = note(name + "out", gated(read[tokens], *three, name))
        total[tokens] += loud[tokens, rank][:, None] * answers
    return note(where + "routed", total)


# %%
def mixture(read, mlp, where):  # [N, D] -> [N, D]
    picks, loud = route(read, mlp.gate, where)
    total = routed(read, picks, loud, mlp.experts, where)
    shared = note(where + "shared", gated(read, *matrices(mlp.shared_experts), where + "shared_experts."))
    return note(where + "out", total + shared)


answer = mixture(read, layer.mlp, "layers.1.mlp.")
out = note("layers.1.out", middle + answer)
show(*[f"layers.1.mlp.{name}" for name in ("routed", "shared", "out")], "layers.1.out")

# %% [markdown]
# One of the experts in full: who came, how it answered, how loud that was heard. These are the arrays that a trace
# names `layers.1.mlp.experts.…`.

# %%
busy = int(np.bincount(picks.reshape(-1)).argmax())
here = f"layers.1.mlp.experts.{busy}."
show(*[here + name for name in ("gate", "up", "hidden", "out")])
for t, length in zip(mine[here + "tokens"], np.linalg.norm(mine[here + "out"], axis=1), strict=True):
    print(f"{trace.tokens[t]!r:12} |answer| {length:5.2f}   weight {loud[t][picks[t] == busy][0]:.2f}")

# %% [markdown]
# Each of its tokens is a row of those four arrays, in the order of the text. An expert does not know which tokens it
# has not seen: it is given rows, and rows come back.
#
# ## The rest of the layers
#
# Layers 2 to 5 do what layer 1 did. One function holds a whole layer: norm, attention, add; norm, MLP or experts, add.


# %%
def whole_layer(x, layer, where):  # [T, D] -> [T, D]
    read = note(where + "input_layernorm", norm(x, layer.input_layernorm.weight))
    middle = note(where + "middle", x + attention(read, layer.self_attn, where + "self_attn."))
    read = note(where + "post_attention_layernorm", norm(middle, layer.post_attention_layernorm.weight))
    if hasattr(layer.mlp, "gate"):
        return note(where + "out", middle + mixture(read, layer.mlp, where + "mlp."))
    answer = note(where + "mlp.out", gated(read, *matrices(layer.mlp), where + "mlp."))
    return note(where + "out", middle + answer)


for i in (2, 3, 4, 5):
    out = whole_layer(out, weights.layers[i], f"layers.{i}.")
show(*[f"layers.{i}.out" for i in range(6)])

# %% [markdown]
# No assert spoke up, so all arrays of these layers are equal to the model's. The stream grows from layer to layer.
# Nothing obliges it to, for what is added may cancel what is there; here it mostly does not.
#
# Who went where, in all five layers that have experts:

# %%
table = trace.routing
for place, i in enumerate(table.layers):
    assert np.array_equal(table.indices[:, place], mine[f"layers.{i}.mlp.expert_indices"])
plots.plot_picks(table.indices, table.weights, trace.tokens, table.experts, table.layers, name=model.name)

# %% [markdown]
# Ten rows of tokens; in each layer two cells, a token's first and second choice, with the weight under the number. An
# expert 3 in one layer has nothing to do with the expert 3 of another. [08a](08a-expert-load.ipynb) and
# [08b](08b-specialisation.ipynb) ask what such tables say.
#
# ## Nothing but a sum
#
# If every step only added, the stream at the end must be the embedding plus all that was added: six answers of
# attention, six of MLPs or experts. In the layers with experts these are again sums over experts.

# %%
branches = {"embedding": mine["embed_tokens"]}
for i in range(6):
    branches[f"{i} attention"] = mine[f"layers.{i}.self_attn.o"]
    branches[f"{i} {'experts' if i else 'MLP'}"] = mine[f"layers.{i}.mlp.out"]
np.testing.assert_allclose(sum(branches.values()), trace["layers.5.out"][0], rtol=1e-4, atol=1e-4)
print(f"{len(branches)} parts; largest difference {abs(sum(branches.values()) - trace['layers.5.out'][0]).max():.1e}")

# %% [markdown]
# Equal but for rounding: there is no other way from layer to layer. How large is each part, token by token? The picture
# has the root mean square of each.

# %%
sizes = np.array([np.sqrt((part**2).mean(axis=-1)) for part in branches.values()])  # [part, T]
name = f"{model.name}, root mean square of what each part adds"
average = sizes.mean(axis=1)
assert set(np.argsort(average)[:2]) == {0, 1}
assert average.argmax() == 12
plots.plot_array(sizes, "part T", name, rows=list(branches), columns=trace.tokens)

# %% [markdown]
# Read it downwards: the embedding and the first attention are the lightest rows, the experts of the last layer the
# darkest. Later layers write more, but for the dense MLP of layer 0. They must, to be heard: each reads a *normed* copy
# of a stream that has grown.
#
# A typical misreading is that the norm replaces the stream, so that a layer computes norm(x) + attention(norm(x)). The
# shapes would fit. The first assert on `middle` would not hold:

# %%
read = mine["layers.1.input_layernorm"]
wrong = read + mine["layers.1.self_attn.o"]
assert not np.allclose(wrong, trace["layers.1.middle"][0], atol=0.1)
print(f"away from the model by up to {abs(wrong - trace['layers.1.middle'][0]).max():.1f}")

# %% [markdown]
# ## From the last state to a token
#
# The stream is normed a last time, and each row is multiplied with every row of the head's matrix [V, D]. That gives
# the **logits**: one number for each of the 2,048 tokens of the vocabulary, at each of the ten places.

# %%
hidden = note("norm", norm(out, weights.norm.weight))
logits = note("logits", hidden @ weights.lm_head.weight.T)  # [T, V]
show("norm", "logits")
assert list(mine) == trace.names()
print(f"our list and the model's: {len(mine)} names, in the same order")

# %% [markdown]
# That is the promise of the beginning: every array that the model announced was made here, from the weights and what
# came before, by the few functions on this page.
#
# Softmax turns the logits of the **last** row into probabilities. The other nine rows guess tokens that we already
# have; they matter in training.

# %%
last = np.exp(logits[-1] - logits[-1].max())
last /= last.sum()
best = np.argsort(-last)[:5]
for i in best:
    print(f"{model.tokenizer.token(int(i))!r:10} logit {logits[-1, i]:6.2f}   probability {last[i]:.3f}")
assert model.generate("def add(a, b):\n    return a +", max_new_tokens=1).ids == [best[0]]

# %% [markdown]
# ` b`, and by far: what the name and the arguments ask for. ` a` comes next.
#
# ## Who wrote that?
#
# The last norm divides a row by one number and multiplies each column by a weight; the head is a matrix. With that
# number fixed, both are linear. So the logit of ` b` is a sum too, with one part for each branch, exactly.

# %%
token = best[0]
scale = np.sqrt((out[-1] ** 2).mean() + config.rms_norm_eps)
direction = weights.norm.weight * weights.lm_head.weight[token] / scale  # [D]
average_direction = weights.norm.weight * weights.lm_head.weight.mean(axis=0) / scale
parts = np.array([part[-1] @ direction for part in branches.values()])
above = parts - np.array([part[-1] @ average_direction for part in branches.values()])
np.testing.assert_allclose(parts.sum(), logits[-1, token], rtol=1e-4)
assert (above > 0).all()
assert set(np.argsort(-above)[:2]) == {9, 12}  # layer 4's attention, layer 5's experts
print(f"sum of {len(parts)} parts {parts.sum():.3f}, the logit {logits[-1, token]:.3f}")

# %% [markdown]
# Adding the same number to all logits changes no probability. So the picture shows what a part gives to ` b` *above*
# what it gives to the average token.

# %%
from minglm.look.plots import Picture

figure = Picture(figsize=(7, 4), layout="constrained")
ax = figure.subplots()
colours = ["#999999"] + ["#0072B2", "#E69F00"] * 6
bars = ax.barh(list(branches), above, color=colours, edgecolor="black")
for bar in list(bars)[1::2]:
    bar.set_hatch("//")  # attention: hatched, so that colour is not alone
ax.axvline(0, color="black", linewidth=0.8)
ax.invert_yaxis()
ax.set_xlabel("logit of “ b” above the average logit (hatched: attention)")
ax.set_title(f"glm-tiny, T = 10: which part of the stream asks for “ b”; sum {above.sum():.1f}")
figure

# %% [markdown]
# The bars grow downwards: the embedding and the first layers ask little for ` b` (the dense MLP of layer 0 most of
# them), the last three layers do. The longest are the experts of layer 5 and the attention of layer 4. What does that
# attention look at? The o_proj is linear, so its bar falls apart again, into heads.

# %%
heads = mine["layers.4.self_attn.heads"][-1]  # [H, d]
back = weights.layers[4].self_attn.o_proj.weight.reshape(-1, *heads.shape)  # [D, H, d]
by_head = np.einsum("hd,Dhd,D->h", heads, back, direction - average_direction)
assert np.isclose(by_head.sum(), above[9], rtol=1e-3)
h = by_head.argmax()
looks = mine["layers.4.self_attn.probs"][h, -1]
assert set(np.argsort(-looks)[:2]) == {2, 4}  # "(a" and " b"
print(f"by head {by_head}; head {h} looks at", *[f"{trace.tokens[s]!r} {looks[s]:.2f}" for s in np.argsort(-looks)[:4]])

# %% [markdown]
# One head gives the largest part, and from the row of `+` it looks at two tokens: ` b` and `(a`, the two arguments
# of the function. It carries over what stands there.
#
# A warning. A bar says what a part writes *directly*. That head could find the arguments only because earlier layers
# had marked them, and for that they get no bar. [15](15-patching.ipynb) takes parts away and looks at what follows.
#
# ## The draft
#
# GLM-4.5 has one more layer, of multi-token prediction (MTP), behind the last one. With the token ` b` in hand it
# guesses the one *after* it, from the hidden state of the place before and the embedding of the new token.
# [09](09-mtp.ipynb) is about it; here we only follow the arrays. Those have no trace, but the same kind of tap.

# %%
longer = np.append(ids, token)  # the ten tokens and the new one
taps = {}
drafts = model.mtp(longer[None], tap=lambda name, array: taps.update({name: array.copy()}))[0]
beyond = [name for name in taps if name not in listed]
print(len(taps), "arrays, of which", len(beyond), "of the MTP layer; drafts", drafts.shape)
print(*[name for name in beyond if ".experts." not in name][:5], "…", beyond[-1], sep="\n")

# %% [markdown]
# Row i joins the hidden state of token i, after the final norm, with the embedding of token i + 1, both normed; a
# matrix [D, 2·D] brings the pair back to D numbers. Then comes a decoder layer like all others: we use our own
# function, and `note` compares with the new taps. `glm-tiny` has one table and one head for both, trunk and MTP layer.

# %%
arrays |= {name: taps[name] for name in beyond}
mtp = weights.mtp[0]
assert np.allclose(taps["norm"][0, :10], hidden, atol=1e-3)  # an eleventh token changes nothing before it
new = note("layers.6.embed_tokens", weights.embed_tokens.weight[longer[1:]])  # [T − 1, D]
pair = note("layers.6.enorm", norm(new, mtp.enorm.weight)), note("layers.6.hnorm", norm(hidden, mtp.hnorm.weight))
joined = note("layers.6.eh_proj", np.concatenate(pair, axis=-1) @ mtp.eh_proj.weight.T)
out = whole_layer(joined, mtp.block, "layers.6.")
read = note("layers.6.shared_head.norm", norm(out, mtp.shared_head.norm.weight))
assert list(mine)[-len(beyond) :] == beyond
show("layers.6.enorm", "layers.6.hnorm", "layers.6.eh_proj", "layers.6.out", "layers.6.shared_head.norm")

# %% [markdown]
# The head makes logits of it. The last row's best token is the draft. Does the model itself, in its next step, choose
# the same?

# %%
ours = read @ weights.lm_head.weight.T
np.testing.assert_allclose(ours, drafts, rtol=1e-3, atol=1e-3)
draft, choice = int(ours[-1].argmax()), int(model.forward(longer[None]).logits[0, -1].argmax())
print(f"drafted {model.tokenizer.token(draft)!r}, chosen {model.tokenizer.token(choice)!r}")
assert draft != choice

# %% [markdown]
# Nearly: two line ends where the model wants three. So this draft is thrown away, and the model goes on with its own
# token. A draft never changes the text, it only saves time where it is right; [09](09-mtp.ipynb) counts how often.
#
# ## The same step in GLM-4.5
#
# The functions above would run GLM-4.5, as its config differs in numbers only. What would one step of ten tokens be?

# %%
from minglm.look.trace import estimate_bytes

for its, name in ((config, "glm-tiny"), (big, "GLM-4.5")):
    counts = its.count_parameters()
    print(f"{name:9} {its.num_hidden_layers:3} layers, stream of {its.hidden_size:,}, logits of {its.vocab_size:,}")
    share = counts.report_active / counts.report_total  # counted as its authors do: without embedding and head
    print(f"{'':9} {share:.0%} of its parameters work for a token")
    print(f"{'':9} at most {estimate_bytes(its, 1, 10) / 1e6:,.1f} MB for every array of ten tokens, in float32")

# %% [markdown]
# (The tour had 28 %: here embedding, head and MTP layer are left out.)
#
# ## What was learnt
#
# A forward step is one stream of rows: the sum of 13 parts here, and of 185 in GLM-4.5. Each part but the first is
# computed from a normed copy of the stream. Between the prompt and the token there are only the steps that the list
# names, and each is a few lines of NumPy. Who writes what can be read off exactly, since the last steps are linear.
#
# Next: [08a](08a-expert-load.ipynb), which asks of many tokens what this notebook asked of ten: who went where, and is
# the work shared evenly?
#
# ## Questions
#
# 1. `model.forward(ids[None], tap=lambda name, array: array * 0 if name == "layers.4.self_attn.o" else None)` leaves
#    one part out. Does the logit of ` b`, above the average, fall by the length of its bar? Why not?
# 2. Trace the prompt with `(c` for `(a`. Which rows stay the same, but for rounding? And why is there rounding at all?
#    (Which experts do the rows share, and with how many tokens are they multiplied together?)
# 3. Take the ten tokens, and then ` b`, through the model with `cache = model.new_cache()`. In the second step, which
#    arrays (seen by a tap) have an axis of length 11, and which have only one row?
