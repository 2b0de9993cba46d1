# %% [markdown]
# # 04 · Attention: what a token takes from the ones before it
#
# *Reading 40 minutes · running 10 seconds · needs [03](03-rotary-positions.ipynb)*
#
# Everything else in the model works on one token at a time. Attention is the only place where a token can learn
# something from another. This notebook computes one head by hand, then all of them, then what has to be remembered
# while a text is being written.

# %% [markdown]
# ## The question
#
# A layer of GLM-4.5 has 96 query heads, and only 8 key/value heads: twelve queries share what they read. What does
# one head compute? Which heads share? And what does sharing save, at 131,072 tokens?
#
# We take layer 4 of `glm-tiny`, with H = 6 query heads on G = 2 key/value heads of d = 32, and the two lines of the
# last notebook. Attention reads what leaves the layer's first norm.

# %%
import numpy as np

import minglm
from minglm.look import plots
from minglm.look.families import FAMILIES
from minglm.model import rms_norm, rope, rotation, softmax

np.set_printoptions(precision=3, suppress=True, linewidth=110)
model = minglm.load("glm-tiny")
config = model.config
trace = model.trace("def area(width, height):\n    return width * height\n", keep="layers.4.*")
tap = {name.split(".")[-1]: trace[name][0] for name in trace.names("layers.4.self_attn.*")}
x = trace["layers.4.input_layernorm"][0]  # [T, D]
weights = model.params.layers[4].self_attn
print(x.shape, {name: array.shape for name, array in tap.items()})

# %% [markdown]
# ## One head by hand
#
# Head 4 it will be. **Step 1, project.** Three matrices make three rows for each token: a *query* (what am I looking
# for), a *key* (what can be found here), a *value* (what is handed over). In the matrices the heads stand one after
# the other, so head 4 owns rows 4·d … 5·d of `q_proj`.
#
# Its keys and values come from key/value head 4 // R = 1, where R = H/G = 3 query heads share one. These projections
# have a bias in GLM-4.5; few models still do.

# %%
d, R = config.head_dim, config.num_attention_heads // config.num_key_value_heads
h, g = 4, 4 // R
q = x @ weights.q_proj.weight[h * d : (h + 1) * d].T + weights.q_proj.bias[h * d : (h + 1) * d]  # [T, D] -> [T, d]
k = x @ weights.k_proj.weight[g * d : (g + 1) * d].T + weights.k_proj.bias[g * d : (g + 1) * d]
v = x @ weights.v_proj.weight[g * d : (g + 1) * d].T + weights.v_proj.bias[g * d : (g + 1) * d]
for ours, theirs in ((q, tap["q"][:, h]), (k, tap["k"][:, g]), (v, tap["v"][:, g])):
    np.testing.assert_allclose(ours, theirs, atol=1e-4)

# %% [markdown]
# **Step 2, norm.** Query and key are brought to a fixed size by the RMSNorm of [02](02-residual-stream.ipynb), over
# the d entries of the head, with one weight for all heads. The report says what for: it stabilises the range of the
# scores (arXiv 2508.06471, section 2.1). GLM-4.5 has this norm, GLM-4.5-Air does not.
#
# A dot product is at most the product of the lengths. So with the norm there is a largest possible score, whatever
# the token; without it, nothing stops a long query from shouting. The values get no norm.

# %%
q_normed = rms_norm(q, weights.q_norm.weight, config.rms_norm_eps)
k_normed = rms_norm(k, weights.k_norm.weight, config.rms_norm_eps)
lengths = [np.linalg.norm(a, axis=-1) for a in (q, q_normed)]
print(
    f"length of the queries: before {lengths[0].min():.1f} … {lengths[0].max():.1f}, "
    f"after {lengths[1].min():.1f} … {lengths[1].max():.1f}"
)
largest = d * np.abs(weights.q_norm.weight).max() * np.abs(weights.k_norm.weight).max() / np.sqrt(d)
seen = np.abs(tap["scores"][np.isfinite(tap["scores"])]).max()
print(f"no score of this layer can pass {largest:.1f}; the largest here is {seen:.1f}")
assert seen < largest

# %% [markdown]
# **Step 3, rotate**, by each token's position: the last notebook.
#
# **Step 4, score.** The dot product of every query with every key, divided by √d. Entries of size 1 in random
# directions would give dot products of size √d; the division brings them back to 1, so that the softmax that follows
# starts neither flat nor frozen, however large a head is.
#
# **Then hide the future.** Token t may see itself and what came before. The other scores become −∞.

# %%
places = np.arange(len(x))
angles = rotation(places[None], config, x.dtype)
q_turned = rope(q_normed[None, :, None], *angles)[0, :, 0]
k_turned = rope(k_normed[None, :, None], *angles)[0, :, 0]
scores = q_turned @ k_turned.T / np.sqrt(d)  # [T, S]
scores[places[None, :] > places[:, None]] = -np.inf
np.testing.assert_allclose(scores, tap["scores"][h], atol=1e-4)
print(scores[:5, :5])

# %% [markdown]
# **Step 5, softmax.** Each row becomes shares that sum to 1: e to the power of the score, over the sum of the row. A
# score that is 1 higher counts e = 2.7 times as much; −∞ counts nothing.
#
# **Step 6, mix.** The new row of a token is the sum of all values, each times its share. Token 12 is `␣w`, the
# beginning of the second `width`: where will it look?

# %%
probs = softmax(scores)
mixed = probs @ v  # [T, S] · [S, d] -> [T, d]
np.testing.assert_allclose(probs, tap["probs"][h], atol=1e-4)
np.testing.assert_allclose(mixed, tap["heads"][:, h], atol=1e-4)
for s in np.argsort(-probs[12])[:3]:
    print(f"{trace.tokens[12]!r} takes {probs[12, s]:.0%} from {trace.tokens[s]!r} (token {s})")
assert probs[12].argmax() == 5

# %% [markdown]
# It takes four fifths of its new row from token 5, the `idth` that followed the first `w`. (That one stood after a
# bracket and is another token of the vocabulary, `w` without the space; the head finds it all the same.) No rule says
# so; training found that looking up *what came next the last time* is a good way to guess what comes next. Heads that
# do it are called induction heads (arXiv 2209.11895).
#
# One row of one text shows little. The usual test leaves meaning out: 24 tokens drawn at random, then the same 24
# again. How much does each head, at a token's second occurrence, look at what followed the first?

# %%
once = np.random.default_rng(0).choice(np.arange(300, 2000), 24, replace=False)  # seed 0
twice = model.trace(np.tile(once, 2)[None], keep="layers.*.self_attn.probs")
asks = np.arange(24, 47)  # the second time, but for the last token
looks = np.stack([twice[f"layers.{n}.self_attn.probs"][0][:, asks, asks - 23].mean(axis=1) for n in range(6)])
print("layer by head:\n", looks.round(2), f"\nlooking at all tokens alike: {(1 / (asks + 1)).mean():.2f}")
assert looks[4, 3:].min() > 0.2
assert np.delete(looks.ravel(), [27, 28, 29]).max() < 0.05  # heads 3, 4, 5 of layer 4 left out

# %% [markdown]
# Three heads of 36 do it, all in layer 4, and on tokens that mean nothing. They are heads 3, 4 and 5: the three that
# read key/value head 1. All others give that token about what an even look would, or less.
#
# Rows sum to 1. Columns do not, and need not: a column's sum says how much a token is listened to by all later ones.

# %%
np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-5)
print("rows   ", probs.sum(axis=1)[:6], "\ncolumns", probs.sum(axis=0)[:6])

# %% [markdown]
# ## Two ways to hide the future wrongly
#
# Setting hidden scores to 0 instead of −∞ looks harmless. But e⁰ is 1, as loud as any other score of 0. The other
# mistake is to zero the probabilities after the softmax. How much goes wrong? We look at token 5.

# %%
hidden = ~np.isfinite(scores)
zeroed = softmax(np.where(hidden, 0, scores))
late = np.where(hidden, 0, softmax(q_turned @ k_turned.T / np.sqrt(d)))
print(f"score 0: {zeroed[5, 6:].sum():.3f} of token 5's attention goes to later tokens")
print(f"zeroed after the softmax: token 5's shares sum to {late[5].sum():.3f}")
assert (zeroed[5, 6:].sum() > 0) & (late[5].sum() < 0.99)

# %% [markdown]
# The first leak is small here, because the scores that this token may see are large; where they are all far below 0
# nearly everything would leak. The second mistake leaves a twentieth of a row: the softmax had already given the rest
# to the future. In training the first leak is a catastrophe of the pleasant sort: the loss falls wonderfully, because
# the answer is in the input.
#
# ## All heads, and who shares
#
# The picture shows all six heads of the layer: a row for each key/value head, with the three query heads that read
# it.

# %%
plots.plot_attention(tap["probs"], trace.tokens, kv_heads=config.num_key_value_heads, layer=4, name="glm-tiny")

# %% [markdown]
# Down stand the tokens that ask, across those they look at; dark is much. In the lower row three of the four tokens of
# the second `width` and `height` (`␣w`, `idth`, `␣he`) find what followed the first; `ight` prefers `␣*`, what followed
# the last *name*. The first `height` already does as much with the `width` before it: among the darkest cells are
# `␣he`, which looks at `idth`, and `ight`, at the comma. Tokens that find nothing look at `def`, the first column. The
# upper row looks at the last bracket, comma, line end, `return` or `*`, wherever that is.

# %%
lower = tap["probs"][3:].mean(axis=0)  # [T, S], heads 3, 4, 5
assert [lower[t].argmax() for t in (12, 13, 15)] == [5, 6, 8]
assert lower[16].argmax() == 14
assert lower[16, 9] < 0.2
print("token 16 looks at:", {trace.tokens[s]: lower[16, s].round(2) for s in np.argsort(-lower[16])[:3]})

# %% [markdown]
# Sharing keys does not force heads to look at the same place: their queries differ. Still, in some layers heads of one
# group are more alike than others. The measure: half the sum of |p − p′|, which is 0 for equal shares and 1 for shares
# without overlap.

# %%
full = model.trace(trace.ids, keep="layers.*.self_attn.probs")
group = np.arange(6) // R
other = group[:, None] != group
same = ~other & ~np.eye(6, dtype=bool)
for layer in range(6):
    p = full[f"layers.{layer}.self_attn.probs"][0]  # [H, T, S]
    apart = np.abs(p[:, None] - p[None]).sum(axis=-1).mean(axis=-1) / 2  # [H, H]
    print(f"layer {layer}: same key/value head {apart[same].mean():.2f}, another {apart[other].mean():.2f}")
    assert layer not in (3, 4) or apart[same].mean() < apart[other].mean() - 0.1

# %% [markdown]
# In layers 3 and 4 clearly so, in the others hardly.
#
# **Which heads share** is a convention of the file, and a classic mistake: head h reads key/value head h // R,
# neighbours together, not h mod G. To see it in the model, a tap empties the values of key/value head 1. Which heads
# go silent?


# %%
def empty_one(name, array):
    array = array.copy()
    if name == "layers.4.self_attn.v":
        array[:, :, 1] = 0
        return array


silent = model.trace(trace.ids, keep="layers.4.self_attn.heads", tap=empty_one)["layers.4.self_attn.heads"][0]
quiet = [n for n in range(6) if not silent[:, n].any()]
print("silent:", quiet, "; by h // R:", [n for n in range(6) if n // R == 1], "; by h mod G:", [1, 3, 5])
agree = {H: sum(n // (H // G) == n % G for n in range(H)) for H, G in ((6, 2), (96, 8))}
print("heads that both rules send to the same place:", agree)
assert quiet == [3, 4, 5]
assert agree == {6: 4, 96: 12}

# %% [markdown]
# With the wrong rule four of the six heads would get the right keys by accident (0, 2, 3 and 5), and the model would
# still write something. In GLM-4.5, with 96 heads on 8, it would be 12 of 96.
#
# **Step 7, project back.** The six mixed rows stand side by side, H·d = 192 numbers, and `o_proj` makes D numbers of
# them that are added to the residual stream. A matrix times a row made of parts is the sum of the parts, each times
# its columns: so every head writes into the stream on its own, and nobody waits for the others.

# %%
o = weights.o_proj.weight  # [D, H·d], without a bias
by_head = np.stack([tap["heads"][:, n] @ o[:, n * d : (n + 1) * d].T for n in range(6)])  # [H, T, D]
np.testing.assert_allclose(by_head.sum(axis=0), tap["o"], atol=1e-3)
print("size of what each head writes for token 12:", np.linalg.norm(by_head[:, 12], axis=-1).round(1))

# %% [markdown]
# H·d happens to equal D in `glm-tiny`. It need not: GLM-4.5 has 96 · 128 = 12,288 numbers from its heads, and a
# stream of 5,120. The authors took 2.5 times as many heads as usual for that width; it did not lower the training
# loss, they write, but made the model better at reasoning tests (section 2.1).
#
# ## Writing: what has to be remembered
#
# A text is written one token at a time. What does token 17 need of tokens 0 … 16? Only their keys and values: nobody
# looks ahead, so nothing in the earlier rows depends on it, and their queries were asked long ago. Keep the keys
# (turned) and the values: that is the **KV cache**.
#
# By hand, for our head: everything before the last token is remembered, and one query is asked.

# %%
k_cache, v_cache = k_turned[:-1], v[:-1]  # what was kept
k_cache, v_cache = np.append(k_cache, k_turned[-1:], axis=0), np.append(v_cache, v[-1:], axis=0)  # the new token's
row = softmax(q_turned[-1] @ k_cache.T / np.sqrt(d)) @ v_cache
np.testing.assert_allclose(row, tap["heads"][-1, h], atol=1e-4)
print("one query, 18 keys:", row[:6])

# %% [markdown]
# No mask was needed: the cache holds nothing but the past. As soon as several tokens arrive at once, the mask is
# back: each may see the cache, and of the new ones only those before itself. The model takes a cache as an argument.
# However the text is cut, the logits must be the same.

# %%
whole = model.forward(trace.ids).logits[0]
cache = model.new_cache(capacity=32)
parts = [model.forward(trace.ids[:, a:b], cache=cache).logits[0] for a, b in ((0, 3), (3, 4), (4, 6), (6, 18))]
off = np.abs(np.concatenate(parts) - whole).max()
print(f"in pieces of 3, 1, 2 and 12 tokens: logits up to {np.abs(whole).max():.0f} differ by {off:.0e};", cache)
assert off < 1e-4

# %% [markdown]
# Equal but for rounding: matrix libraries sum in another order for another number of rows.
#
# **What the cache saves** is recomputation. Without it, the n-th token sends n tokens through the whole model. **What
# it does not save** is looking: each new token still reads every key and every value. For GLM-4.5, from its config:

# %%
glm = minglm.PRESETS["GLM-4.5"]
bytes_per_token = glm.kv_bytes_per_token()  # 2 bytes a number
print(f"writing 1,000 tokens: {sum(range(1, 1001)):,} tokens through the model without a cache, {1000:,} with")
for context in (1_000, 32_768, 131_072):
    share = 1 - glm.flops_per_token(0) / glm.flops_per_token(context)
    print(
        f"{context:7,} tokens: cache {bytes_per_token * context / 2**30:5.1f} GiB, read for every new token; "
        f"{glm.flops_per_token(context) / 1e9:.0f} GFLOP, {share:.0%} of them on keys and values"
    )

# %% [markdown]
# At the full context a new token costs ten times the arithmetic of an early one, and nine tenths of it is attention.
# All of the cache has to come out of memory for each token. That is where sharing matters.
#
# ## Why 8 key/value heads, and not 96; and why not a latent
#
# (A section on machines; the next notebooks do without it. GiB: 2³⁰ bytes. GFLOP: a billion multiplications or
# additions.)
#
# **Multi-head attention** (MHA) gives each query head keys and values of its own. **Grouped-query attention** (GQA,
# arXiv 2305.13245) lets R heads share. A third way is DeepSeek's **latent attention** (MLA, arXiv 2405.04434): one
# row of 512 numbers is kept per token and layer, from which every head's keys and values could be made, and 64 rotary
# numbers beside.
#
# Nobody makes those keys and values while decoding: it would cost a matrix product for each token kept. Instead the
# matrix W that would make a key from the latent c moves to the query: q · (W c) = (Wᵀ q) · c. Then the query has the
# latent's size.

# %%
rng = np.random.default_rng(0)
sizes = FAMILIES["DeepSeek-V3"].latent  # kept: numbers of the latent; turned: rotary numbers
latent, one_query = rng.standard_normal(sizes.kept), rng.standard_normal(128)
W = rng.standard_normal((128, sizes.kept)) / 16
np.testing.assert_allclose(one_query @ (W @ latent), (W.T @ one_query) @ latent)
print("per key: a dot product over", one_query.size, "numbers becomes one over", latent.size)

# %% [markdown]
# So MLA keeps less and multiplies more. How much, with GLM-4.5's 92 layers and 96 heads, and DeepSeek-V3's latent
# sizes? Per key, layer and head a score and a share of the mix cost two operations for each number: 2 · (128 + 128)
# with ordinary heads, 2 · (576 + 512) with latents.

# %%
L, H, G = glm.num_hidden_layers, glm.num_attention_heads, glm.num_key_value_heads
kept = {"MHA": 2 * H * 128, "GQA": 2 * G * 128, "MLA": sizes.kept + sizes.turned}  # numbers per token and layer
numbers = {"MHA": 256, "GQA": 256, "MLA": 2 * sizes.kept + sizes.turned}  # that a head multiplies for a key
work = {kind: 2 * H * numbers[kind] for kind in kept}  # operations per key and layer
for kind in kept:
    print(
        f"{kind}: cache at 131,072 tokens {2 * L * kept[kind] * 131_072 / 2**30:5.1f} GiB; "
        f"{L * work[kind] * 131_072 / 1e9:5.0f} GFLOP per token; "
        f"{work[kind] / (2 * kept[kind]):5.1f} operations per byte"
    )
assert work["MLA"] / work["GQA"] == 4.25
for kind, model_of_kind in (("GQA", FAMILIES["GLM-4.5"]), ("MLA", FAMILIES["GLM-4.5"]._replace(latent=sizes))):
    assert 2 * L * kept[kind] * 131_072 == model_of_kind.cache_bytes(131_072)
    assert L * work[kind] * 131_072 == model_of_kind.flops_per_token(131_072) - model_of_kind.flops_per_token(0)

# %% [markdown]
# Sharing divides the cache by 12 and the arithmetic by nothing: GQA does exactly the work of MHA. MLA's cache is 3.6
# times smaller still, and its arithmetic 4.25 times larger: 2,519 GFLOP per token, beside 66 for all weights of the
# model together.
#
# Why did the authors take GQA? The report does not say ([docs/authors.md](../docs/authors.md) has what is known
# second-hand: MLA computes more while decoding, and on some hardware that is the bottleneck). It can be computed. A
# machine can read so many bytes and do so many operations in a second. Attention takes the longer of the two times. The
# picture has both, over the number of operations that a machine can do per byte it reads.

# %%
machine = np.geomspace(1, 1000, 200)  # operations per byte
picture = plots.Picture(figsize=(8, 3.6), layout="constrained")
axes = picture.add_subplot(xscale="log", yscale="log", xlabel="operations a machine can do per byte it reads")
for kind, colour, line in (("MHA", "#555555", ":"), ("GQA", "#0072b2", "-"), ("MLA", "#d55e00", "--")):
    time = np.maximum(2 * kept[kind], work[kind] / machine) / (2 * kept["GQA"])
    axes.plot(machine, time, color=colour, linestyle=line, linewidth=2, label=kind)
axes.set_ylabel("time per key\n(1: reading GQA's)")
axes.set_title("Time of attention in decoding, GLM-4.5's 96 heads, ideal machine, one query per read", fontsize=10)
axes.legend(fontsize=9)
picture

# %% [markdown]
# Each line falls while arithmetic is the limit and is level where reading is. GQA (solid) is level from 12 operations
# per byte on, MLA (dashed) only from 181. Left of the crossing GQA is faster, right of it MLA. MHA (dotted) keeps up
# with GQA only where an operation takes as long as reading a byte; from 12 on it is twelve times slower.

# %%
crossing = work["MLA"] / (2 * kept["GQA"])
print(f"GQA and MLA cross at {crossing:.0f} operations per byte; with two queries per read at {2 * crossing:.0f}")
assert crossing == 51

# %% [markdown]
# The crossing moves to the right when several tokens of one text are checked at once, as GLM-4.5 does with its drafts
# ([09](09-mtp.ipynb)): the bytes are read once, the operations are done for each. It is a matter of machines and of
# years: GLM-4.5, 4.6 and 4.7 have GQA; GLM-4.7-Flash and GLM-5 have MLA. A calculation like this one leaves out the
# projections, the quality of the model, and every imperfection of a real kernel.
#
# ## Two documents in one row
#
# In training, short documents are packed into one row. They must not see each other. Every token carries the number
# of its **segment**, the mask hides other segments, and positions start again at 0. So a document next to another
# gives the same logits as alone.

# %%
first, second = model.as_ids("import numpy as np\n")[0], model.as_ids("def area(width")[0]
row = np.concatenate([first, second])[None]
segments = np.repeat([0, 1], [len(first), len(second)])[None]
alone = model.forward(second[None]).logits[0]
for name, packed in (("with", model.forward(row, segments=segments)), ("without", model.forward(row))):
    print(f"{name} segments: off by {np.abs(packed.logits[0, len(first) :] - alone).max():.1e}")
assert np.abs(model.forward(row, segments=segments).logits[0, len(first) :] - alone).max() < 1e-4

# %% [markdown]
# ## What we have learnt
#
# A head compares one token's query with all earlier keys, makes shares of the scores, and takes that share of each
# value; `o_proj` writes the result into the stream. Keys and values are all that a later token needs, so they are
# kept, and sharing them among twelve heads divides that memory by twelve without saving an operation.
#
# Next: [04b](04b-generation.ipynb) writes text with it. Then [05](05-router.ipynb) opens the other half of a layer.
#
# ## Questions
#
# 1. Scores are divided by √d. Leave the division out for our head: how much of its attention does token 12 then give
#    to its favourite, and what would that do to learning from the others?
# 2. With G = 1 all 96 heads would share one key. What is the cache then, and how many operations per byte? Where
#    would its line be level in the picture?
# 3. The first token can only look at itself, so its share is 1 whatever the scores are. Many heads of large models
#    send attention that they do not need to the first token. How much do the heads of layer 5 send there, on this
#    text?
