# %% [markdown]
# # 10b · Backward through attention: what a token tells the tokens before it
#
# *Reading 35 minutes · running 10 seconds · needs [10a](10a-backward.ipynb) and [04](04-attention.ipynb)*
#
# Attention is the only place in GLM-4.5 where one token's state reaches another token. So it is the only place where
# the surprise at one token can change what the model does at an earlier one. This notebook undoes an attention layer
# step by step, first one head by hand, then a group of heads, then everything around them.

# %% [markdown]
# ## The question
#
# At the output of attention, each token is told how its row should have been different. Which part of that concerns the
# queries, which the keys and values of *earlier* tokens, and which the nine weight tensors? We use layer 2 of
# `glm-tiny`: H = 6 query heads on G = 2 key/value heads, so that R = 3 query heads share one, each of d = 32 entries.

# %%
import numpy as np

import minglm
from minglm.look.plots import Picture

np.set_printoptions(precision=3, suppress=True, linewidth=110)
model = minglm.load("glm-tiny", dtype="float64")

# %% [markdown]
# The trace of layer 2 holds what we need: queries and keys after norm and rotation, and the values.

# %%
trace = model.trace("for i in range(10):\n    print(i)", keep="layers.2.*")
config, params = model.config, model.params.layers[2].self_attn
q, k, v = (trace[f"layers.2.self_attn.{name}"][0] for name in ("q_rope", "k_rope", "v"))
print("q", q.shape, " k", k.shape, " v", v.shape)

# %% [markdown]
# As in 10a, the loss is a random projection: `dy`, one random number for each entry of the output, is what the layer is
# told from above. And the check is the same function, moving entries and comparing slopes. To save time it now moves a
# few random entries of an array, not all.

# %%
rng = np.random.default_rng(0)


def error(L, x, dx, count=20, h=1e-5):
    """Largest gap between dx and central differences of L() at some entries of x, relative to the largest slope."""
    places = [np.unravel_index(i, x.shape) for i in rng.choice(x.size, min(count, x.size), replace=False)]
    slopes = []
    for at in places:
        kept, found = x[at], []
        for change in (h, -h):
            x[at] = kept + change
            found.append(L())
        x[at] = kept
        slopes.append((found[0] - found[1]) / (2 * h))
    return np.abs(np.array([dx[at] for at in places]) - slopes).max() / np.abs(slopes).max()


# %% [markdown]
# ## One head, forward
#
# Queries $Q$, keys $K$ and values $V$ of one head, each [T, d], already normed and rotated. With $c = 1/\sqrt d$:
#
# $$ S = c Q K^T \text{ where visible, else } -\infty, \qquad P = \mathrm{softmax}(S), \qquad O = P V $$

# %%
T, d = len(q), config.head_dim
visible = np.tril(np.ones((T, T), bool))  # a token sees itself and earlier ones


def head(Q, K, V):
    S = np.where(visible, Q @ K.T / np.sqrt(d), -np.inf)
    P = minglm.model.softmax(S)
    return P @ V, P


Q, K, V = q[:, 1].copy(), k[:, 0].copy(), v[:, 0].copy()  # query head 1 reads key/value head 0
O, P = head(Q, K, V)
assert np.allclose(O, trace["layers.2.self_attn.heads"][0, :, 1])
print(O.shape, P.shape)

# %% [markdown]
# ## One head, backward
#
# Four short steps, each of a kind we have met. They begin at the end.
#
# **$O = PV$** is a matrix product with two inputs. As with a linear layer, collect along the axis that was summed:
# $dP = dO V^T$, and $dV = P^T dO$. The transpose matters: value $s$ was used by the *later* queries $t$, so its
# gradient collects over $t$.
#
# **$P = \mathrm{softmax}(S)$**, row by row, from 10a: $dS = P \circ (dP - \mathrm{rowsum}(dP \circ P))$.
#
# **The mask.** A hidden score is the constant −∞. A constant gets no gradient, and indeed $P$ is 0 there, so $dS$ is 0.
#
# **$S = c QK^T$** is a product again: $dQ = c dS K$ and $dK = c dS^T Q$.

# %%
dO = rng.standard_normal(O.shape)
dP = dO @ V.T  # [T, d] · [d, S] -> [T, S]
dV = P.T @ dO  # [S, T] · [T, d] -> [S, d]
dS = P * (dP - (dP * P).sum(axis=-1, keepdims=True))
dQ = dS @ K / np.sqrt(d)
dK = dS.T @ Q / np.sqrt(d)

# %% [markdown]
# The check, for the three inputs.

# %%
for name, x, dx in (("Q", Q, dQ), ("K", K, dK), ("V", V, dV)):
    gap = error(lambda: np.vdot(dO, head(Q, K, V)[0]), x, dx)
    print(f"d{name}: error {gap:.0e}")
    assert gap < 1e-7

# %% [markdown]
# All three pass. The picture shows the two matrices in the middle: what the head looked at, and how it should have
# looked differently, given this `dO`.
#
# Predict: what is in the first row of $dS$?


# %%
def show(figure, ax, matrix, colours, low, high):
    """A [query, key] matrix; what the mask hides is grey."""
    image = ax.imshow(np.where(visible, matrix, np.nan), cmap=colours, vmin=low, vmax=high)
    ax.set_facecolor("#dddddd")
    ax.set_xticks(range(T), trace.tokens, rotation=90, fontsize=9)  # ␣ is a space, ↵ a new line
    ax.set_yticks(range(T), trace.tokens, fontsize=9)
    figure.colorbar(image, ax=ax, shrink=0.8)


# %% [markdown]
# On the right, + and − stand in the cells with the larger entries.

# %%
figure = Picture(figsize=(9.5, 4.2), layout="constrained")
most = np.abs(dS).max()
scales = (("P: attention probabilities", P, "cividis_r", 0, 1), ("dS: gradient at the scores", dS, "PuOr", -most, most))
for ax, (label, matrix, colours, low, high) in zip(figure.subplots(1, 2), scales, strict=True):
    show(figure, ax, matrix, colours, low, high)
    ax.set(xlabel="key", ylabel="query")
    ax.set_title(f"{label}\nlayer 2, head 1, T = {T} tokens", fontsize=10, loc="left")
for t, s in np.argwhere(np.abs(dS) > most / 8):
    sign, colour = "+" if dS[t, s] > 0 else "−", "white" if abs(dS[t, s]) > most / 2 else "black"
    figure.axes[1].text(s, t, sign, color=colour, ha="center", va="center", fontsize=11)
figure

# %% [markdown]
# The grey triangle is what the mask hides: there is no gradient. The first row of $dS$ is zero: the first token has one
# key to look at, itself, so it has nothing to choose. Where $P$ is near 0 (light), $dS$ is near 0 (white): what is
# hardly looked at can hardly be looked at less, and a small change brings it little. In each row gains and losses
# balance.

# %%
assert np.abs(dS.sum(axis=-1)).max() < 1e-14
assert not dS[0].any()
assert not dS[~visible].any()
assert np.abs(dK.sum(axis=0)).max() < 1e-13
print(f"row sums of dS: {np.abs(dS.sum(axis=-1)).max():.0e}; dK summed over keys: {np.abs(dK.sum(axis=0)).max():.0e}")

# %% [markdown]
# The third line is a property of its own: adding the same vector to *all* keys raises every score of a query by the
# same amount, which a softmax does not notice. So the keys' gradients sum to zero.
#
# ## A group: three query heads, one key head
#
# In GLM-4.5 twelve query heads read the same keys and values; here it is three. Query head $h$ reads key/value head
# $h // R$. By the rule *used twice, added up*, the gradients of a shared key are **summed** over the R query heads.

# %%
H, G = config.num_attention_heads, config.num_key_value_heads
R = H // G
glm = minglm.PRESETS["GLM-4.5"]
print(f"GLM-4.5: {glm.num_attention_heads} query heads on {glm.num_key_value_heads}; glm-tiny: {H} on {G}")

# %% [markdown]
# The steps of above as a function:


# %%
def head_bwd(dO, Q, K, V):
    """dQ, dK, dV of one head."""
    P = head(Q, K, V)[1]
    dP = dO @ V.T
    dS = P * (dP - (dP * P).sum(axis=-1, keepdims=True))
    return dS @ K / np.sqrt(d), dS.T @ Q / np.sqrt(d), P.T @ dO


# %% [markdown]
# All six heads, one after the other. `dq` gets its six parts side by side, `dk` and `dv` collect three each.

# %%
dheads = rng.standard_normal(q.shape)  # [T, H, d]
dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
for h in range(H):
    dq[:, h], dk_part, dv_part = head_bwd(dheads[:, h], q[:, h], k[:, h // R], v[:, h // R])
    dk[:, h // R] += dk_part
    dv[:, h // R] += dv_part

# %% [markdown]
# The package does all heads in one product, `attend` and `attend_bwd`. It must find the same.

# %%
layout = minglm.model.make_layout((1, T), config, np.float64)
_, saved = minglm.model.attend(q[None], k[None], v[None], layout.sight)
for mine, theirs in zip((dq, dk, dv), minglm.model.attend_bwd(dheads[None], saved), strict=True):
    np.testing.assert_allclose(mine, theirs[0], atol=1e-13)

# %% [markdown]
# ### The usual mistakes
#
# Each of these is an easy slip. All have the right shape and none raises an error. The function takes one of them at a
# time; the loop prints how far it is off.


# %%
def wrong_group(mistake):
    parts = np.stack([head_bwd(dheads[:, h], q[:, h], k[:, h // R], v[:, h // R])[1] for h in range(H)], axis=1)
    if mistake == "mean over the group":
        return parts.reshape(T, G, R, d).mean(axis=2)
    if mistake == "last head of the group only":
        return parts.reshape(T, G, R, d)[:, :, -1]
    if mistake == "heads grouped by h mod G":
        return parts.reshape(T, R, G, d).sum(axis=1)
    return parts.reshape(T, G, R, d).sum(axis=2)


for mistake in ("mean over the group", "last head of the group only", "heads grouped by h mod G", "none"):
    gap = np.abs(wrong_group(mistake) - dk).max() / np.abs(dk).max()
    print(f"dk, {mistake:28}: off by {gap:.2f}")
    assert (gap < 1e-12) == (mistake == "none")

# %% [markdown]
# The same for the softmax in the middle of a head and the products around it.

# %%
P, dP = head(Q, K, V)[1], dO @ V.T
wrong = {
    "no row sum: P · dP": (P * dP) @ K / np.sqrt(d),
    "diagonal only: P · (1 − P) · dP": (P * (1 - P) * dP) @ K / np.sqrt(d),
    "summed over queries": (P * (dP - (dP * P).sum(axis=0))) @ K / np.sqrt(d),
    "mean for the weighted sum": (P * (dP - dP.mean(axis=-1, keepdims=True))) @ K / np.sqrt(d),
    "scale forgotten": dS @ K,
    "scale twice": dS @ K / d,
}
for label, dx in wrong.items():
    gap = error(lambda: np.vdot(dO, head(Q, K, V)[0]), Q, dx)
    print(f"dQ, {label:32}: error {gap:.2f}")
    assert gap > 0.1

# %% [markdown]
# A wrong scale has a signature of its own: every entry is off by the same factor. $\sqrt{32} = 5.66$, so the error is
# 4.66 when it was forgotten. If the check says so, look for a constant.
#
# ## Rotation: transpose equals inverse
#
# Before the scores, queries and keys were rotated, pair by pair, by angles that grow with the position. A rotation is a
# linear map $y = Mx$, so $dx = M^T dy$. And the transpose of a rotation is the rotation back: the same function with
# $-\sin$ in place of $\sin$.

# %%
cos, sin = layout.cos, layout.sin
dturned = rng.standard_normal((1, T, H, d))
dnormed = minglm.model.rope(dturned, cos, -sin)
u = rng.standard_normal(dturned.shape)
np.testing.assert_allclose(np.vdot(dturned, minglm.model.rope(u, cos, sin)), np.vdot(dnormed, u))  # M^T, for any u
np.testing.assert_allclose(minglm.model.rope(dnormed, cos, sin), dturned, atol=1e-12)  # M^-1
assert np.array_equal(dnormed, minglm.model.rope_bwd(dturned, cos, sin))

# %% [markdown]
# No difference quotient was needed: for a linear map, $dy \cdot M u = M^T dy \cdot u$ holds for every $u$, exactly.
#
# A position gets no gradient. It is a whole number, and nothing about it is learnt. And a caution: that transpose and
# inverse are the same is a property of pure rotations. Context extension by YaRN multiplies cos and sin by a factor,
# and then only the transpose is right.

# %%
stretched = minglm.model.rope(dturned, 1.2 * cos, -1.2 * sin)
assert np.isclose(np.vdot(dturned, minglm.model.rope(u, 1.2 * cos, 1.2 * sin)), np.vdot(stretched, u))
back = minglm.model.rope(stretched, 1.2 * cos, 1.2 * sin)[..., : config.rotary_dim]
print("there and back, rotated entries:", (back / dturned[..., : config.rotary_dim])[0, 0, 0, :3])

# %% [markdown]
# Still the right gradient, but going there and back now multiplies by $1.2^2 = 1.44$.
#
# ## The norm of queries and keys
#
# Before the rotation, GLM-4.5 norms each head's $d$ entries of $q$ and $k$, with one weight [d] for all heads. Its
# backward is RMSNorm's of 10a with $d$ in place of $D$. The weight was broadcast over all tokens and all heads, so its
# gradient is summed over both.

# %%
raw = trace["layers.2.self_attn.q"]  # [B, T, H, d] before the norm
weight, eps = params.q_norm.weight, config.rms_norm_eps
r = np.sqrt((raw**2).mean(axis=-1, keepdims=True) + eps)
n, g = raw / r, dnormed * weight
draw = (g - n * (g * n).mean(axis=-1, keepdims=True)) / r
dweight = (dnormed * n).sum(axis=(0, 1, 2))  # over B, T and H
for mine, theirs in zip((draw, dweight), minglm.model.rms_norm_bwd(dnormed, raw, weight, eps), strict=True):
    np.testing.assert_allclose(mine, theirs, atol=1e-12)

# %% [markdown]
# ## The whole layer, undone from 6 to 1
#
# The forward has six numbered steps: 1. project, 2. norm, 3. rotate, 4. remember in the cache, 5. attend, 6. project
# back. The backward undoes them from the last to the first. Step 4 has none: in training a whole text is one call, and
# there is no cache.
#
# First the forward, with the package's own function. It hands back what the backward will read.

# %%
x = trace["layers.2.input_layernorm"].copy()  # [B, T, D], the input
out, saved = minglm.model.attention(x, params, config, layout)
np.testing.assert_allclose(out, trace["layers.2.self_attn.o"], atol=1e-13)
dout = rng.standard_normal(out.shape)
print(saved._fields)

# %% [markdown]
# Then back. Values skip steps 3 and 2: they are neither rotated nor normed.

# %%
linear_bwd, rope_bwd, rms_norm_bwd = minglm.model.linear_bwd, minglm.model.rope_bwd, minglm.model.rms_norm_bwd
# 6. out = o_proj(heads)
dheads, do_weight, _ = linear_bwd(dout, saved.heads.reshape(1, T, -1), params.o_proj.weight)
# 5. heads = attend(q, k, v)
dq, dk, dv = minglm.model.attend_bwd(dheads.reshape(saved.heads.shape), saved.attend)
# 3. rotation
dq, dk = rope_bwd(dq, cos, sin), rope_bwd(dk, cos, sin)
# 2. norm
dq, dq_norm = rms_norm_bwd(dq, saved.q, params.q_norm.weight, eps)
dk, dk_norm = rms_norm_bwd(dk, saved.k, params.k_norm.weight, eps)

# %% [markdown]
# Step 1 is three projections of the same `x`. Used three times, so its three gradients are added.

# %%
# 1. q, k, v = q_proj(x), k_proj(x), v_proj(x)
parts = []
for dy, projection in ((dq, params.q_proj), (dk, params.k_proj), (dv, params.v_proj)):
    parts.append(linear_bwd(dy.reshape(1, T, -1), x, projection.weight, projection.bias))
dx = parts[0][0] + parts[1][0] + parts[2][0]

# %% [markdown]
# Against `attention_bwd`, array by array. Then against central differences: the input, two weights, a bias and the
# norms' weights.

# %%
theirs_dx, theirs = minglm.model.attention_bwd(dout, saved, params, config)
np.testing.assert_allclose(dx, theirs_dx, atol=1e-12)
np.testing.assert_allclose(do_weight, theirs.o_proj.weight, atol=1e-12)
for (_, dweight, dbias), projection in zip(parts, theirs, strict=False):  # q, k, v
    np.testing.assert_allclose(dweight, projection.weight, atol=1e-12)
    np.testing.assert_allclose(dbias, projection.bias, atol=1e-12)


# %% [markdown]
# Equal. The differences, of the whole layer:


# %%
def L():
    return np.vdot(dout, minglm.model.attention(x, params, config, layout)[0])


arrays = {
    "x": (x, dx),
    "q_proj.weight": (params.q_proj.weight, parts[0][1]),
    "k_proj.bias": (params.k_proj.bias, parts[1][2]),
    "v_proj.weight": (params.v_proj.weight, parts[2][1]),
    "q_norm.weight": (params.q_norm.weight, dq_norm),
    "k_norm.weight": (params.k_norm.weight, dk_norm),
}
for name, (array, gradient) in arrays.items():
    gap = error(L, array, gradient)
    print(f"{name:14} error {gap:.0e}")
    assert gap < 1e-6

# %% [markdown]
# Note what was *saved* for this: the input, $q$ and $k$ before their norm, the mixed values, and the probabilities. Not
# the scores: the softmax's backward needs only its output. In GLM-4.5 the probabilities are the one thing that grows
# with the square of the length, and kernels such as FlashAttention do not keep them either but compute them again.
#
# ## Who is told
#
# Give a gradient to the output of token $t$ alone, and see which rows of `dx` are not zero. One backward for each token
# fills a matrix: how strongly does the output at $t$ speak to the input at $s$?
#
# Predict its shape before you look.

# %%
told = np.zeros((T, T))
for t in range(T):
    only = np.zeros_like(dout)
    only[:, t] = dout[:, t]
    told[t] = np.linalg.norm(minglm.model.attention_bwd(only, saved, params, config)[0][0], axis=-1)
assert not np.triu(told, 1).any()
own = np.diag(told) / told.sum(axis=1)
assert own[0] == 1
assert own[1:].max() < 0.5
print("share that stays with the token itself:", own)

# %% [markdown]
# The matrix as a picture, darker for more.

# %%
figure = Picture(figsize=(6.5, 5), layout="constrained")
ax = figure.subplots()
show(figure, ax, told, "cividis_r", 0, told.max())
ax.set(xlabel="input of token s", ylabel="gradient at the output of token t alone")
ax.set_title(f"Who is told: size of dx, layer 2 of glm-tiny, all heads, T = {T}", fontsize=10, loc="left")
figure

# %% [markdown]
# A triangle again: no token tells a later one anything. The forward carries information from early to late, the
# backward carries blame from late to early. A row is dark where its token looked, and the token itself is always among
# them, because its query is made of its own input. But what it sends to others is most of it: of the first token's
# gradient all stays, of the others' less than half. (The gradient at the output is a random one here; in training it
# comes from the layers above.)
#
# ## What was learnt
#
# Attention's backward is two matrix products, a softmax, two matrix products, and sums where something was shared: over
# the queries for a key, over the group for a key head, over tokens and heads for a norm's weight. And every step is
# undone by a short function that central differences can check alone, before anyone trusts the whole. The derivation on
# paper is [here](../docs/derivations/attention-layer.md). Next comes the other half of a layer, where a choice stands
# in the way: [the experts](10c-backward-experts.ipynb).
#
# ## Questions
#
# 1. Make all value rows equal (`V[:] = V[0]`). What are $dQ$ and $dK$ then, and why?
# 2. Add 100 to every entry of `params.k_proj.bias` beyond the rotated ones of each head, with and without the q/k norm
#    (`config.replace(use_qk_norm=False)` and `params._replace(q_norm=None, k_norm=None)`). In which case does the
#    output not move? What must the gradient of these entries be?
# 3. FlashAttention replaces $\mathrm{rowsum}(dP \circ P)$ by $\mathrm{rowsum}(dO \circ O)$. Check that they are equal,
#    and find the reason.
