# %% [markdown]
# # 10c · Backward through the experts: a choice has no slope
#
# *Reading 40 minutes · running 25 seconds · needs [10b](10b-backward-attention.ipynb) and [09](09-mtp.ipynb)*
#
# GLM-4.5 sends a token to 8 of 160 experts. "Which 8" is not a number that can be moved a little, so it has no slope.
# How does the router learn then? This notebook undoes a mixture-of-experts layer by hand, follows the second loss to
# the two places where it meets the first, and at the end checks every kind of weight of a whole model.

# %% [markdown]
# ## The question
#
# What part of a router can a gradient reach, and by which path? We take layer 2 of `glm-tiny` again, with E = 16
# experts of which K = 2 see a token, and the thirteen tokens of before.

# %%
import numpy as np

import minglm
from minglm.look.plots import Picture
from minglm.model import expert_mlp, linear_bwd, moe, router, router_bwd, sigmoid

np.set_printoptions(precision=3, suppress=True, linewidth=110)

# %% [markdown]
# The input of the experts is what leaves the second norm of the layer.

# %%
model = minglm.load("glm-tiny", dtype="float64")
trace = model.trace("for i in range(10):\n    print(i)", keep="layers.2.*")
x = trace["layers.2.post_attention_layernorm"][0].copy()  # [N, D]
params, config = model.params.layers[2].mlp, model.config
gate, (N, D), K = params.gate, x.shape, config.num_experts_per_tok
routing, saved = router(x, gate, config)
print("first choices ", routing.indices[:, 0])
print("second choices", routing.indices[:, 1])

# %% [markdown]
# ## A walk along a line
#
# Take the router's matrix and push it along one random direction: $W + t U$. Watch a single number: the layer's output
# for one token, ` range`, projected on a random `dy`.
#
# Predict: what does the curve look like, as $t$ goes from −2.6 to −0.6?

# %%
rng = np.random.default_rng(5)
U, dy_one = rng.standard_normal(gate.weight.shape), rng.standard_normal(D)
U /= np.linalg.norm(U)
token = trace.tokens.index("␣range")

# %% [markdown]
# One function: put the router at $W + t U$, send the token through the layer, look at the result and at who was picked.


# %%
def along(t):
    moved = gate._replace(weight=gate.weight + t * U)
    out, kept = moe(x[token : token + 1], params._replace(gate=moved), config)
    return float(out[0] @ dy_one), tuple(np.sort(kept.router.routing.indices[0]).tolist())


# %% [markdown]
# 201 places on the line, and the places where the choice changes.

# %%
line = np.linspace(-2.6, -0.6, 201)
values, picks = zip(*(along(t) for t in line), strict=True)
changes = [i for i in range(1, len(line)) if picks[i] != picks[i - 1]]
print("experts along the line:", *dict.fromkeys(picks))
assert len(changes) >= 2

# %% [markdown]
# And the picture: the projected output over $t$, broken where the choice changes.

# %%
figure = Picture(figsize=(8, 3.4), layout="constrained")
ax = figure.subplots()
ax.set_ylim(min(values) - 2, max(values) + 2)
for start, end in zip([0, *changes], [*changes, len(line)], strict=True):
    ax.plot(line[start:end], values[start:end], color="#0072b2", linewidth=2)
    ax.text(line[start:end].mean(), min(values) - 1.5, "{} + {}".format(*picks[start]), fontsize=9, ha="center")
for i in changes:
    ax.axvline((line[i] + line[i - 1]) / 2, color="black", linestyle="--", linewidth=1)
ax.set(xlabel="t: the router's matrix is W + t·U", ylabel="output, projected; experts below")
ax.set_title("The output for one token along a line, layer 2 of glm-tiny, E = 16, K = 2", fontsize=10, loc="left")
figure

# %% [markdown]
# Smooth pieces, with a jump wherever the choice changes (dashed). On a piece the two experts stay the same and only the
# *weights* move, gently. There the curve has a slope. At a jump it has none, and where the jump is does not depend
# smoothly on anything that a gradient could follow.
#
# What does a central difference say across a jump? Halve the interval around the first one until it is found, and
# divide.

# %%
low, high = line[changes[0] - 1], line[changes[0]]
for _ in range(40):
    middle = (low + high) / 2
    low, high = (middle, high) if along(middle)[1] == along(low)[1] else (low, middle)
print(f"the choice changes at t = {high:.6f}")

# %% [markdown]
# Four steps, from $10^{-2}$ to $10^{-5}$, at a place on a piece and at the jump.

# %%
for where, t in (("on a piece", -1.0), ("at the jump", high)):
    found = [(along(t + h)[0] - along(t - h)[0]) / (2 * h) for h in (1e-2, 1e-3, 1e-4, 1e-5)]
    print(f"{where:11}:", *(f"{slope:14,.4f}" for slope in found))
assert abs(found[3] / found[2] - 10) < 0.1

# %% [markdown]
# On a piece the four differences agree. At the jump they grow tenfold each time: a jump of fixed height over a smaller
# and smaller step.
#
# So there are two lessons. The backward treats the choice as **fixed**: its derivative is zero wherever it has one. And
# a check by differences must make sure that the same experts are picked at both points, or leave that entry out. This
# is what *frozen routing* means in the tests.
#
# ## The router, backwards
#
# With the indices $I$ fixed, what is left of the router is smooth:
#
# $$ z = x W^T, \qquad s = \sigma(z), \qquad p_k = s_{I_k}, \qquad w_k = c  p_k / \textstyle\sum_j p_j $$
#
# Undo it from the right. **Normalise**: $w_k$ depends on all $K$ picked scores. With $\Sigma = \sum_j p_j$ the quotient
# rule gives
#
# $$ dp_j = \frac{c}{\Sigma} \Big( dw_j - \sum_k dw_k \frac{p_k}{\Sigma} \Big) $$
#
# Look at the shape of it: once more a value minus its weighted average, as with the softmax. The weights always sum to
# $c$, so one can only rise if another falls.
#
# **Pick**: $ds$ is zero except at the K places picked. **Sigmoid**: $\sigma' = \sigma(1 - \sigma)$, so
# $dz = ds \circ s \circ (1 - s)$. **Linear**: as ever.

# %%
dw = rng.standard_normal((N, K))
c, scores, I = config.routed_scaling_factor, saved.scores, routing.indices
p = np.take_along_axis(scores, I, axis=-1)  # [N, K]
total = p.sum(axis=-1, keepdims=True)

# %% [markdown]
# The four formulas, from the weights back to the token and the matrix:

# %%
dp = c / total * (dw - (dw * p / total).sum(axis=-1, keepdims=True))
ds = np.zeros_like(scores)
np.put_along_axis(ds, I, dp, axis=-1)
dz = ds * scores * (1 - scores)
dx, dW = dz @ gate.weight, dz.T @ x

# %% [markdown]
# The check uses the model's real router, which is free to choose, and makes sure that it chose the same. Some entries
# are tried, as in 10b.


# %%
def error(L, array, gradient, count=20, h=1e-5):
    """Largest gap between gradient and central differences of L() at random entries, relative to the largest slope."""
    places = [np.unravel_index(i, array.shape) for i in rng.permutation(array.size)[:count]]
    slopes = []
    for at in places:
        kept, found = array[at], []
        for change in (h, -h):
            array[at] = kept + change
            found.append(L())
        array[at] = kept
        slopes.append((found[0] - found[1]) / (2 * h))
    return np.abs(np.array([gradient[at] for at in places]) - slopes).max() / np.abs(slopes).max()


# %% [markdown]
# An assert inside of `L` guards the choice.


# %%
def L():
    tried = router(x, gate, config)[0]
    assert np.array_equal(tried.indices, I)
    return np.vdot(dw, tried.weights)


# %% [markdown]
# Then the package's function.

# %%
for name, array, gradient in (("x", x, dx), ("W", gate.weight, dW)):
    gap = error(L, array, gradient)
    print(f"d{name}: error {gap:.0e}")
    assert gap < 1e-6
theirs_dx, theirs = router_bwd(dw, saved, gate, config)
np.testing.assert_allclose(dx, theirs_dx, atol=1e-13)
np.testing.assert_allclose(dW, theirs.weight, atol=1e-13)

# %% [markdown]
# ### Three properties
#
# If all K weights of a token get the *same* gradient, there is nothing to gain: their sum is fixed. With K = 1 that is
# always so, and a router with one expert per token and normalised weights would learn nothing at all. And the experts
# that were not picked get exactly nothing: the router is never told that another one would have been better.

# %%
assert np.abs(router_bwd(np.ones_like(dw), saved, gate, config)[0]).max() < 1e-14
alone = config.replace(num_experts_per_tok=1)
assert np.abs(router_bwd(dw[:, :1], router(x, gate, alone)[1], gate, alone)[1].weight).max() < 1e-14
never = sorted(set(range(16)) - set(I.reshape(-1).tolist()))
assert not dW[never].any()
print("experts that none of these tokens saw:", never, " their rows of dW: zeros")

# %% [markdown]
# The third one is about the **selection bias**. It stands in the choice alone: scores *with* it are ranked, scores
# *without* it become weights. So its gradient is zero.

# %%
bias = gate.e_score_correction_bias
assert not theirs.e_score_correction_bias.any()

# %% [markdown]
# Move one bias and see.

# %%
before = bias[3]
for h in (1e-6, 1e-4, 0.3):
    bias[3] = before + h
    tried = router(x, gate, config)[0]
    print(f"bias of expert 3 up by {h:g}: {(tried.indices == 3).sum()} picks, loss {np.vdot(dw, tried.weights):.10f}")
bias[3] = before

# %% [markdown]
# A small change of the bias changes nothing, not even the last digit. A large one brings other experts, by a jump. Who
# moves the bias then? A rule of its own, after each step: up for idle experts, down for busy ones. It comes in
# [11](11-training.ipynb).
#
# ### The usual mistakes
#
# Each makes the router learn something else, and none raises an error.

# %%
biased = np.take_along_axis(scores + bias, I, axis=-1)
of_biased = biased.sum(axis=-1, keepdims=True)
wrong = {
    "sum held constant": c / total * dw,
    "plain for weighted mean": c / total * (dw - dw.mean(axis=-1, keepdims=True)),
    "biased scores weighed": c * (dw - (dw * biased).sum(axis=-1, keepdims=True) / of_biased) / of_biased,
    "scaling factor lost": dp / c,
}
for label, dpicked in wrong.items():
    ds = np.zeros_like(scores)
    np.put_along_axis(ds, I, dpicked, axis=-1)
    gap = error(L, x, (ds * scores * (1 - scores)) @ gate.weight)
    print(f"{label:24} error {gap:.2f}")
    assert gap > 0.1

# %% [markdown]
# ## One expert
#
# An expert is SwiGLU between linear maps: $a = x W_g^T$, $u = x W_u^T$, $h = \mathrm{silu}(a) \circ u$, $y = h W_d^T$,
# with $\mathrm{silu}(a) = a \sigma(a)$. The product rule gives its slope: $\sigma + a \sigma(1 - \sigma)$. Then
#
# $$ da = dh \circ u \circ \sigma \circ (1 + a \circ (1 - \sigma)), \qquad du = dh \circ \mathrm{silu}(a) $$
#
# and $x$, used twice, gets $dx = da W_g + du W_u$.

# %%
Wg, Wu, Wd = (matrix[9].copy() for matrix in params.experts)  # expert 9: [F, D], [F, D], [D, F]
rows = x[:4].copy()
dy = rng.standard_normal(rows.shape)
a, u = rows @ Wg.T, rows @ Wu.T
s = sigmoid(a)
h = a * s * u

# %% [markdown]
# Backwards: the last product, SwiGLU, the first two products.

# %%
dh, dWd = dy @ Wd, dy.T @ h
da, du = dh * u * s * (1 + a * (1 - s)), dh * a * s
drows, dWg, dWu = da @ Wg + du @ Wu, da.T @ rows, du.T @ rows

# %% [markdown]
# Checked against differences of the package's forward and against its backward.

# %%
y, saved_mlp = expert_mlp(rows, Wg, Wu, Wd)
for name, array, gradient in (("x", rows, drows), ("Wg", Wg, dWg), ("Wu", Wu, dWu), ("Wd", Wd, dWd)):
    gap = error(lambda: np.vdot(dy, expert_mlp(rows, Wg, Wu, Wd)[0]), array, gradient)
    print(f"d{name:2}: error {gap:.0e}")
    assert gap < 1e-6
theirs = minglm.model.expert_mlp_bwd(dy, saved_mlp, Wg, Wu, Wd)
assert all(np.allclose(mine, other, atol=1e-13) for mine, other in zip((drows, dWg, dWu, dWd), theirs, strict=True))

# %% [markdown]
# The best known mistake here is to take $\sigma(1 - \sigma)$, the slope of a sigmoid, for the slope of silu. Or half of
# the product rule. A check with the gate at 0 lets the second pass: there the other term vanishes.

# %%
dgate = {"slope of a sigmoid": s * (1 - s), "first term only": s, "second term only": a * s * (1 - s)}
for label, slope in dgate.items():
    gap = error(lambda: np.vdot(dy, expert_mlp(rows, Wg, Wu, Wd)[0]), Wg, (dh * u * slope).T @ rows)
    print(f"{label:18} error {gap:.2f}")
    assert gap > 0.1

# %% [markdown]
# ## Dispatch and combine
#
# Look at one pick: token $t$, expert $e$, weight $w$, answer $o = E_e(x_t)$. It adds $w o$ to the output of the token.
# So three things follow, and they are all there is:
#
# - the weight multiplied a vector: $dw = dy_t \cdot o$, one number, how well the answer went with what was wanted;
# - the answer was multiplied by a number: $do = w dy_t$;
# - the token was read by K experts: its gradients from them add up.
#
# Written as plainly as possible, one pick after the other, over all 26 of them:

# %%
dy = rng.standard_normal((N, D))
dw, dx_routed, dWd_all = np.zeros((N, K)), np.zeros((N, D)), np.zeros_like(params.experts.down_proj)
for t, k in np.ndindex(N, K):
    e, w = routing.indices[t, k], routing.weights[t, k]
    matrices = [matrix[e] for matrix in params.experts]
    o, saved_mlp = expert_mlp(x[t : t + 1], *matrices)
    dw[t, k] = dy[t] @ o[0]
    dx_one, _, _, dWd_one = minglm.model.expert_mlp_bwd(w * dy[t : t + 1], saved_mlp, *matrices)
    dx_routed[t] += dx_one[0]
    dWd_all[e] += dWd_one

# %% [markdown]
# The package sorts the picks by expert first, so that each expert does one product over all of its tokens. The results
# are the same.

# %%
y, history = minglm.model.routed_experts(x, routing, params.experts)
theirs = minglm.model.routed_experts_bwd(dy, history, routing, params.experts)
np.testing.assert_allclose(dx_routed, theirs[0], atol=1e-12)
np.testing.assert_allclose(dw, theirs[1], atol=1e-12)
np.testing.assert_allclose(dWd_all, theirs[2].down_proj, atol=1e-12)
assert np.allclose((routing.weights * dw).sum(axis=-1), (dy * y).sum(axis=-1))  # the output is linear in the weights
assert not theirs[2].down_proj[never].any()

# %% [markdown]
# An expert that nobody picked gets a gradient of exact zeros: it learns nothing from this text. That is the other half
# of the balancing problem. An expert that is never picked does not become better, and left to itself it stays unpicked.
#
# ### Losing gradients without noticing
#
# In NumPy, `dx[tokens] += parts` with a repeated token keeps only the *last* of its parts. Within one expert all tokens
# are different and it is safe. For all picks in one statement it is not.

# %%
tokens = np.repeat(np.arange(N), K)
parts = rng.standard_normal((N * K, D))
lossy, exact = np.zeros((2, N, D))
lossy[tokens] += parts
np.add.at(exact, tokens, parts)
assert np.allclose(exact, parts.reshape(N, K, D).sum(axis=1))
assert np.allclose(lossy, parts.reshape(N, K, D)[:, -1])
print("of K = 2 parts for each token, the plain += kept the last one")

# %% [markdown]
# ## Three gradients meet at the token
#
# The token was read by three parts: by the router, by its K experts, by the shared expert. The shared expert has no
# weight and gets `dy` as it is. The router gets the `dw` that the experts' answers produced: this is the only path by
# which it learns, but for a small balance loss.

# %%
shared = [getattr(params.shared_experts, part).weight for part in ("gate_proj", "up_proj", "down_proj")]
dx_shared = minglm.model.expert_mlp_bwd(dy, expert_mlp(x, *shared)[1], *shared)[0]
dx_router, dgate = router_bwd(dw, saved, gate, config)

# %% [markdown]
# Added up, they are what `moe_bwd` returns.

# %%
dx = dx_routed + dx_router + dx_shared
theirs_dx, theirs = minglm.model.moe_bwd(dy, moe(x, params, config)[1], params, config)
np.testing.assert_allclose(dx, theirs_dx, atol=1e-12)
np.testing.assert_allclose(dgate.weight, theirs.gate.weight, atol=1e-12)
print("sizes:", *(f"{np.linalg.norm(part):.1f}" for part in (dx_routed, dx_router, dx_shared)))

# %% [markdown]
# In order: through the routed experts, through the router, through the shared expert. And the whole block against
# differences, where the assert again guards the choice.


# %%
def L():
    out, kept = moe(x, params, config)
    assert np.array_equal(kept.router.routing.indices, I)
    return np.vdot(dy, out)


# %% [markdown]
# The choice stays, the slopes agree.

# %%
for name, array, gradient in (("x", x, dx), ("gate", gate.weight, dgate.weight)):
    gap = error(L, array, gradient)
    print(f"d{name}: error {gap:.0e}")
    assert gap < 1e-6

# %% [markdown]
# ## Two losses, and where their gradients meet
#
# GLM-4.5 is trained on a second loss. Its MTP layer reads the trunk's hidden state of token $i$ and the embedding of
# token $i + 1$, and predicts token $i + 2$; its loss is added with a weight of 0.3 (later 0.1). A sum of losses has the
# sum of their gradients. So with $\lambda$ for the weight, every gradient must be a straight line in $\lambda$:

# %%
ids = model.as_ids("for i in range(10):\n    print(i)")
main, both, heavy = (dict(minglm.walk(model.loss_and_grads(ids, mtp_weight=m)[1])) for m in (0.0, 0.3, 1.0))
for name in both:
    np.testing.assert_allclose(both[name], main[name] + 0.3 * (heavy[name] - main[name]), atol=1e-12)
mtp = {name: heavy[name] - main[name] for name in both}  # the gradient of the MTP loss alone

# %% [markdown]
# Where does the MTP loss reach? We group the tensors by where they stand and compare the size of what the two losses
# send there.

# %%
groups = {
    "embedding": "model.embed_tokens",
    "layer 0": "model.layers.0.",
    "layer 5, the last": "model.layers.5.",
    "final norm": "model.norm",
    "head": "lm_head",
    "MTP layer": "model.layers.6.",
}

# %% [markdown]
# The root of the sum of squares over each group:

# %%
for label, start in groups.items():
    sizes = [np.sqrt(sum((g**2).sum() for n, g in of.items() if n.startswith(start))) for of in (main, mtp)]
    print(f"{label:17} main {sizes[0]:6.3f}   MTP {sizes[1]:6.3f}")

# %% [markdown]
# The main loss does not know the MTP layer: exact zero. The MTP loss reaches everything, because the hidden states that
# it reads are the trunk's. It does not stop at the border: in training, the trunk is also asked to prepare the token
# after the next.
#
# Two tensors are used *directly* by both. In `glm-tiny`, as in GLM-4.6, the MTP layer borrows the main embedding and
# the main **head**. At the head we can do the sum by hand: each loss contributes
# $d\mathrm{logits}^T \cdot \mathrm{hidden}$, with its own logits and its own hidden states.

# %%
from minglm.model import cross_entropy, cross_entropy_bwd, shift_targets

hidden, kept = minglm.model.transformer(ids, model.params, config, save=True)
depth = minglm.model.mtp_chain(hidden, ids, kept.layout, model.params, config, depths=1)[0]

# %% [markdown]
# `depth.normed` is what the MTP layer hands to the head. Its targets are those of the trunk, moved on by one.

# %%
targets, total = shift_targets(ids), np.zeros_like(both["lm_head.weight"])
for states, wanted, share in ((hidden, targets, 1.0), (depth.normed, targets[:, 1:], 0.3)):
    logits = states @ model.params.lm_head.weight.T
    dlogits = cross_entropy_bwd(share, cross_entropy(logits, wanted)[1])
    total += linear_bwd(dlogits, states, model.params.lm_head.weight)[1]
np.testing.assert_allclose(total, both["lm_head.weight"], atol=1e-12)

# %% [markdown]
# Equal. The other meeting place is the **embedding**: a token's row is read when the token enters the trunk, and again,
# as "the token that came next", by the MTP layer. The first token of the text never comes next. The last one comes next
# and is read there; its way through the trunk ends at a state that has no target. Which rows get what?

# %%
for i, text in ((0, "first"), (5, "sixth"), (12, "last")):
    row = ids[0, i]
    sizes = [np.linalg.norm(of["model.embed_tokens.weight"][row]) for of in (main, mtp)]
    print(f"{text:5} token {trace.tokens[i]!r:6}: main {sizes[0]:.4f}   MTP {sizes[1]:.4f}")
absent = np.setdiff1d(np.arange(config.vocab_size), ids)
assert not both["model.embed_tokens.weight"][ids[0, 12]].any()
assert not both["model.embed_tokens.weight"][absent].any()

# %% [markdown]
# The last token's row gets nothing from the main loss: nothing that follows is predicted from it. From the MTP loss it
# gets something only if a target exists two places on, and here there is none. And the rows of tokens that do not occur
# in the text are zero, all of them.
#
# ## The whole model against differences
#
# Now everything at once: one entry of every *kind* of tensor, the one with the largest gradient, moved up and down in
# the whole model with both losses. The routers are free to choose; we make sure by the loads that none of them chose
# otherwise.

# %%
import re

loss, grads = model.loss_and_grads(ids)
weights, kinds = dict(minglm.walk(model.params)), {}
for name, gradient in minglm.walk(grads):
    kinds.setdefault(re.sub(r"\d+", "*", name.removeprefix("model.")), []).append((name, gradient))
print(len(weights), "tensors of", len(kinds), "kinds")

# %% [markdown]
# A step of $10^{-5}$ again. For each kind, the gap relative to the slope.


# %%
def difference(array, at, h=1e-5):
    kept, found = array[at], []
    for change in (h, -h):
        array[at] = kept + change
        moved, _ = model.loss_and_grads(ids)
        assert all(np.array_equal(moved.load[i], loss.load[i]) for i in loss.load)
        found.append(moved.total)
    array[at] = kept
    return (found[0] - found[1]) / (2 * h)


# %% [markdown]
# Two runs of the model for each kind, some sixty in all. A wrong factor almost anywhere in the backward would show
# here.

# %%
gaps = {}
for kind, tensors in kinds.items():
    name, gradient = max(tensors, key=lambda pair: np.abs(pair[1]).max())
    at = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
    slope = difference(weights[name], at)
    gaps[kind] = abs(gradient[at] - slope) / max(abs(slope), 1e-12)

# %% [markdown]
# One kind must come out as exactly zero on both sides: the selection bias.

# %%
bias_kind = next(kind for kind in kinds if kind.endswith("correction_bias"))
assert gaps[bias_kind] == 0  # gradient 0, difference 0
worst = max(gaps, key=gaps.get)
print(f"worst of {len(gaps)} kinds: {gaps[worst]:.0e} ({worst})")
assert gaps[worst] < 1e-6

# %% [markdown]
# Every kind agrees. One entry of each kind is a sample; `tests/test_gradcheck.py` takes more, on a model with every
# switch on, and also breaks each backward on purpose to see that the check fails.
#
# ## How large are gradients?
#
# The picture shows the root mean square of each tensor's gradient, one mark per layer, on a longer text: the first
# tokens of a held-out Python file.

# %%
from minglm.data.heldout import heldout_documents

text = heldout_documents("code")[0].text
page = np.array([model.tokenizer.encode(text)[:512]])
grads = model.loss_and_grads(page)[1]
sizes = {}
for name, gradient in minglm.model.walk_stacked(grads):
    kind = re.sub(r"layers\.\d+\.", "", name.removeprefix("model.")).removesuffix(".weight")
    sizes.setdefault(kind, []).append(np.sqrt((gradient**2).mean()))
del sizes["mlp.gate.e_score_correction_bias"]  # zero

# %% [markdown]
# The scale is logarithmic. A circle stands for a matrix (the experts of a layer count as one), a triangle for the
# weight of a norm, a cross for a bias.
#
# Predict: which weights have the smallest gradients?

# %%
figure = Picture(figsize=(8, 7), layout="constrained")
ax = figure.subplots()
for y, (kind, values) in enumerate(sizes.items()):
    marker = "^" if "norm" in kind else "x" if "bias" in kind else "o"
    colour = {"^": "#009e73", "x": "#d55e00", "o": "#0072b2"}[marker]
    ax.plot(values, [y] * len(values), marker, color=colour, fillstyle="none", markersize=7)
ax.set_xscale("log")
ax.set_yticks(range(len(sizes)), list(sizes), fontsize=9)
ax.invert_yaxis()
ax.grid(color="#dddddd")
ax.set_xlabel("root mean square; ○ matrix, △ norm weight, × bias")
ax.set_title(f"Gradient sizes, glm-tiny, one row of T = {page.shape[1]} tokens", fontsize=10, loc="left")
figure

# %% [markdown]
# Most norm weights (triangles) lie to the right of most matrices: one entry of a norm's weight acts on a whole column
# of what follows. Of the biases, those of the values are large and those of queries and keys are not. The routed
# experts lie furthest left of all.
#
# Why? Each of them sees only K/E of the tokens, an eighth here, and the loss is a mean over all tokens. How much less
# do they get than the shared expert, which sees every token? And in GLM-4.5, where the share is 8/160?

# %%
ratio = [
    np.median(sizes[f"mlp.shared_experts.{part}"]) / np.median(sizes[f"mlp.experts.*.{part}"])
    for part in ("gate_proj", "up_proj", "down_proj")
]
glm = minglm.PRESETS["GLM-4.5"]
print(f"shared over routed, median of the layers: {np.array(ratio)}")
share = glm.n_routed_experts // glm.num_experts_per_tok
print(f"an expert's share of the tokens: glm-tiny 1/{config.n_routed_experts // K}, GLM-4.5 1/{share}")
assert min(ratio) > 1.5

# %% [markdown]
# About half, though they see an eighth of the tokens. If the gradients of single tokens pointed in random directions, a
# sum over eight times as many would be $\sqrt 8 = 2.8$ times as long; and the routed answers carry weights, which play
# in too.
#
# Plain gradient descent would move the routed experts less than everything else, for no better reason than this. That
# is one reason why nobody trains such a model with it: AdamW divides each entry by its own usual size, and Muon gives
# every direction of a matrix the same length. Both come next, in [11](11-training.ipynb).
#
# ## What was learnt
#
# A choice passes no gradient, the weights that go with it do; the router hears from its picked experts alone, by how
# well their answers went with what was wanted. Shared things (a token read by three parts, a head used by two losses,
# an embedding row used twice) add up what they get. The algebra stands in the derivations of the
# [router](../docs/derivations/router.md), the [experts](../docs/derivations/experts.md) and
# [MTP](../docs/derivations/mtp.md).
#
# ## Questions
#
# 1. Can the score of an expert that was *not* picked change the loss, a little? And if the balance loss is added
#    (`balance_weight=1e-4` in `loss_and_grads`)? Look at the rows `never` of the gate's gradient in layer 2.
# 2. Set `norm_topk_prob=False` with K = 1 (`config.replace`). Does the router get a gradient now? What is the price?
# 3. At the head, both losses add up with weights 1 and 0.3. Are their gradients pointing in the same direction? Compute
#    the cosine between `main` and `mtp` for the head, for layer 0 and for the embedding.
