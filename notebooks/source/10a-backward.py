# %% [markdown]
# # 10a · Backward by hand: the slope of one loss in every weight
#
# *Reading 35 minutes · running 10 seconds · needs [07](07-forward-step.ipynb)*
#
# Training moves every weight of GLM-4.5 a little, many thousands of times. Each time it must know, for each weight, in
# which direction to move it and how much that matters. This notebook derives these numbers for the three operations at
# the top of the model, and shows how to find out whether a derivation is right.

# %% [markdown]
# ## The question
#
# The loss is one number: how surprised the model was by the next tokens, on average. Suppose one weight moves by a tiny
# step. By how much does the loss move, per step? That ratio is the weight's **gradient**. There is one for every
# weight, and all of them come out of one walk through the model from back to front. How?
#
# First we ask for all of them, then we take them apart. Everything here is in float64: comparing slopes needs more
# digits than float32 has, as we shall see.

# %%
import numpy as np

import minglm
from minglm.look.plots import Picture

np.set_printoptions(precision=3, suppress=True, linewidth=110)
model = minglm.load("glm-tiny", dtype="float64")

# %% [markdown]
# The model has a second loss, for the token after the next one. We leave it out until
# [10c](10c-backward-experts.ipynb): `mtp_weight=0`.

# %%
ids = model.as_ids("for i in range(10):\n    print(i)")  # int [B, T]
loss, grads = model.loss_and_grads(ids, mtp_weight=0)
print(f"ids {ids.shape}, loss {loss.total:.4f} nats per token")

# %% [markdown]
# ## What a gradient record is
#
# `grads` is a record of the same type as `model.params`: the same names, the same shapes. Where the weights have a
# number, it has that number's slope. There is no graph and no history in it.

# %%
weights, gradients = dict(minglm.walk(model.params)), dict(minglm.walk(grads))
assert type(grads) is type(model.params)
assert all(gradients[name].shape == weights[name].shape for name in weights)
name = "model.layers.2.self_attn.q_proj.weight"
print(f"{len(weights)} tensors; {name} {gradients[name].shape}")

# %% [markdown]
# What does one of these numbers claim? Take the entry of this matrix with the largest gradient. Move it up by a small
# $h$ and run the model, move it down by $h$ and run it again. The difference of the two losses over $2h$ should be the
# entry of the record. That is a **central difference**.
#
# The check is a function of its own, as we shall need it all the time: it moves every entry of an array, in place, and
# puts it back. `L` computes the one number.


# %%
def differences(L, x, entries=None, h=1e-5):
    """The slope of L() in every entry of x, or in the given ones."""
    slopes = np.zeros_like(x)
    for at in np.ndindex(x.shape) if entries is None else entries:
        kept, losses = x[at], []
        for change in (h, -h):
            x[at] = kept + change
            losses.append(L())
        x[at] = kept
        slopes[at] = (losses[0] - losses[1]) / (2 * h)
    return slopes


# %% [markdown]
# Here one entry is enough. `weights` holds views: what we move is the model's own weight.
#
# Predict: how many digits will agree, with $h = 10^{-5}$?

# %%
at = np.unravel_index(np.abs(gradients[name]).argmax(), gradients[name].shape)
slope = differences(lambda: model.loss_and_grads(ids, mtp_weight=0)[0].total, weights[name], [at])[at]
print(f"entry {at[0]}, {at[1]}: gradient {gradients[name][at]:.11f}, difference {slope:.11f}")
assert abs(slope - gradients[name][at]) < 1e-7 * abs(slope)

# %% [markdown]
# Seven digits or more. So the number is what it claims to be, for this entry.
#
# Why not do this for all of them and forget about derivations? Because each entry costs two runs of the model. A
# backward costs about as much as two runs, for *all* entries: each matrix product of the forward has two in the
# backward, one for its input and one for its weight.

# %%
for each in ("glm-tiny", "GLM-4.5"):
    count = minglm.PRESETS[each].count_parameters().total
    print(f"{each:8}: differences {2 * count:,} runs of the model; a backward about 2")

# %% [markdown]
# ## The chain rule, once for the whole series
#
# Let an operation make $y$ from $x$, and let the loss $L$ depend on $y$. The backward is handed `dy`, the slope of $L$
# in every entry of $y$, and returns `dx`, the slope in every entry of $x$. An entry $x_j$ reaches the loss through all
# outputs that it touches, so its slope is a sum over them:
#
# $$ dx_j = \sum_i dy_i \frac{\partial y_i}{\partial x_j} $$
#
# The whole art is to find a short formula for this sum, without ever writing down the matrix of all
# $\partial y_i / \partial x_j$. And there are three rules that return in every notebook from here to 10c:
#
# - **Used twice, added up.** If $x$ feeds two branches, its gradient is the sum of what the branches send back.
# - **Broadcast forward, summed backward.** A bias is added to every row, so its gradient is the sum over rows.
# - **A gradient has the shape of its array.** Often that alone leaves one way to write the product.
#
# ## A check for any operation
#
# The operations in between have arrays as outputs, not one number. To get a number, choose an array `dy` at random and
# let $L = \sum dy \circ f(x)$: a **random projection** of the output. Then `dy` really is the slope of $L$ at the
# output, and `differences` of $L$ must give what the backward returns. We judge by the largest gap, relative to the
# largest slope.


# %%
def error(found, slopes):
    return np.abs(found - slopes).max() / np.abs(slopes).max()


# %% [markdown]
# ## Linear
#
# Forward: $y_{no} = \sum_i x_{ni} W_{oi} + b_o$. Rows $n$, inputs $i$, outputs $o$. As a product, $y = x W^T + b$.
#
# **dx.** Entry $x_{ni}$ touches the outputs of its own row, each with slope $W_{oi}$. So
# $dx_{ni} = \sum_o dy_{no} W_{oi}$.
#
# **dW.** Entry $W_{oi}$ touches output $o$ of *every* row, with slope $x_{ni}$. So $dW_{oi} = \sum_n dy_{no} x_{ni}$.
#
# **db.** $b_o$ touches output $o$ of every row with slope 1. So $db_o = \sum_n dy_{no}$.
#
# Now write the three as products. The input has 5 rows of 4 entries, the output 6 entries.

# %%
rng = np.random.default_rng(0)
x, W, b, dy = (rng.standard_normal(shape) for shape in [(5, 4), (6, 4), (6,), (5, 6)])
dx = dy @ W  # [N, out] · [out, in] -> [N, in]
dW = dy.T @ x  # [out, N] · [N, in] -> [out, in]
db = dy.sum(axis=0)  # [N, out] -> [out]

# %% [markdown]
# And the check, for each of the three arrays.

# %%
for what, array, by_hand in (("x", x, dx), ("W", W, dW), ("b", b, db)):
    slopes = differences(lambda: np.vdot(dy, x @ W.T + b), array)
    print(f"d{what} {by_hand.shape}: error {error(by_hand, slopes):.0e}")
    assert error(by_hand, slopes) < 1e-8

# %% [markdown]
# The same lines stand in the package as `linear_bwd`. A few lines, which do nearly all of a model's arithmetic.

# %%
theirs = minglm.model.linear_bwd(dy, x, W, b)
assert all(np.allclose(mine, other, rtol=1e-12) for mine, other in zip((dx, dW, db), theirs, strict=True))

# %% [markdown]
# ### Mistakes, and which inputs show them
#
# A check is worth something only if it fails when the formula is wrong. So we break the formula on purpose, in the ways
# in which it is usually broken, and try it on a **square** weight, once with five rows and once with **one row**.
#
# Predict: which of the wrong lines will pass somewhere?


# %%
def errors_of(variants, N):
    W, x, dy = rng.standard_normal((4, 4)), rng.standard_normal((N, 4)), rng.standard_normal((N, 4))
    slopes = {"dx": differences(lambda: np.vdot(dy, x @ W.T), x), "dW": differences(lambda: np.vdot(dy, x @ W.T), W)}
    return [f"{error(f(dy, x, W), slopes[of]):.0e}" for of, f in variants.values()]


# %% [markdown]
# The wrong lines take what the right ones take, and the last of them differs by a single division.

# %%
wrong = {
    "dx, W transposed": ("dx", lambda dy, x, W: dy @ W.T),
    "dW transposed": ("dW", lambda dy, x, W: x.T @ dy),
    "dW as a mean": ("dW", lambda dy, x, W: dy.T @ x / len(x)),
}
five_rows, one_row = errors_of(wrong, N=5), errors_of(wrong, N=1)
for label, several, one in zip(wrong, five_rows, one_row, strict=True):
    print(f"{label:17} error with 5 rows {several}, with one row {one}")
assert all(float(e) > 0.1 for e in five_rows)
assert float(one_row[2]) < 1e-8

# %% [markdown]
# All three are caught with five rows. With one row a mean is a sum, and the third passes: a test with one row, or one
# token, proves little. And a square weight lets the transposed products *run*. With 6 outputs and 4 inputs the first
# raises an error and the second has the wrong shape, which is the cheapest test of all. So take sizes that all differ.
#
# ## Softmax, and why ones prove nothing
#
# $p_i = e^{z_i} / \sum_k e^{z_k}$ along a row. Every entry depends on every other one, because they share the sum. By
# the quotient rule $\partial p_i / \partial z_j = p_i([i = j] - p_j)$, where $[i = j]$ is 1 if true and 0 if not. Put
# into the chain rule:
#
# $$ dz_j = p_j \Big( dp_j - \sum_i dp_i p_i \Big) $$
#
# In words: an entry's gradient counts only by how much it is above the row's average, weighted by $p$.
#
# One could think of checking this with `dp` all ones. That is the slope of the plain sum of all outputs. Look what it
# says about the formula and about three wrong ones.

# %%
z = rng.standard_normal((3, 7))
truths = []
for dp in (np.ones_like(z), rng.standard_normal(z.shape)):
    truths.append((dp, differences(lambda dp=dp: np.vdot(dp, minglm.model.softmax(z)), z)))

# %% [markdown]
# `truths` holds the differences for ones and for a random `dp`. Now the formula and three others.

# %%
candidates = {
    "right": lambda dp, p: p * (dp - (dp * p).sum(-1, keepdims=True)),
    "3.7 times it": lambda dp, p: 3.7 * p * (dp - (dp * p).sum(-1, keepdims=True)),
    "not times p": lambda dp, p: dp - (dp * p).sum(-1, keepdims=True),
    "all zeros": lambda dp, p: np.zeros_like(p),
}
for label, f in candidates.items():
    gaps = [np.abs(f(dp, minglm.model.softmax(z)) - slopes).max() for dp, slopes in truths]
    print(f"{label:13} largest gap with ones {gaps[0]:.0e}, with a random dp {gaps[1]:.0e}")
    assert gaps[0] < 1e-9
    assert (gaps[1] < 1e-9) == (label == "right")

# %% [markdown]
# With ones, all four pass. A row of a softmax sums to 1 whatever $z$ is, so the sum of the outputs has slope zero
# everywhere, and any formula that gives zero looks right. A random `dp` tells them apart at once.
#
# ## Cross-entropy
#
# The loss of one row, with target $y$, is $\ell = -\log p_y = \log \sum_k e^{z_k} - z_y$. The second form is easier:
# the slope of the logarithm is $e^{z_v} / \sum_k e^{z_k}$, which is $p_v$ again, and the last term gives $-1$ at the
# target.
#
# $$ \frac{\partial \ell}{\partial z_v} = p_v - [v = y] $$
#
# Softmax minus one-hot. The loss is the *mean* over the $n$ rows that have a target, so this is divided by $n$. Rows
# without a target (marked −100, `IGNORE`) count for nothing: no loss, no gradient, and not in $n$.

# %%
from minglm.model import IGNORE, cross_entropy, cross_entropy_bwd

z, targets = 2 * rng.standard_normal((6, 5)), np.array([0, IGNORE, 4, 2, IGNORE, 1])
rows = np.flatnonzero(targets != IGNORE)

# %% [markdown]
# Six rows of five logits, two of the rows without a target. The formula, row by row:

# %%
dz = np.zeros_like(z)
dz[rows] = minglm.model.softmax(z[rows])
dz[rows, targets[rows]] -= 1
dz /= len(rows)
print(dz, "\nrow sums", dz.sum(axis=1))

# %% [markdown]
# And the check, against differences and against the package.

# %%
slopes = differences(lambda: cross_entropy(z, targets)[0], z)
assert error(dz, slopes) < 1e-8
assert np.allclose(dz, cross_entropy_bwd(1.0, cross_entropy(z, targets)[1]), atol=1e-15)

# %% [markdown]
# In each row one entry is negative: the target. Going against the gradient raises its logit and lowers all others, each
# in proportion to the probability it had. The fourth row is nearly zero: its target had nearly all of the probability
# already. The row sums are zero: raising all logits of a row together changes no probability, so there is nothing to
# gain.
#
# Three wrong versions. The first forgets the one-hot, the second divides by all six rows, the third divides by none.

# %%
without = dz.copy()
without[rows, targets[rows]] += 1 / len(rows)
for label, wrong in (("no one-hot", without), ("mean over all rows", dz * 4 / 6), ("sum, not mean", dz * 4)):
    sums = np.abs(wrong.sum(axis=1)).max()
    print(f"{label:19} error {error(wrong, slopes):.2f}, largest row sum {sums:.2f}")
    assert error(wrong, slopes) > 0.3

# %% [markdown]
# The last two are off by a constant. Such a mistake is easy to live with for long: training still works, as if with
# another learning rate, until batches with more padding behave differently from batches with less. Row sums do not see
# it; the differences do.
#
# Now on the model. The last hidden states times the head's matrix are the logits; we take them from a run and ask what
# the loss wants of the logits at one token.

# %%
out = model.forward(ids)
targets = minglm.model.shift_targets(ids)[0]  # the token after each token; IGNORE after the last
valid = np.flatnonzero(targets != IGNORE)
probs = minglm.model.softmax(out.logits[0])  # [T, V]
dlogits = np.zeros_like(probs)
dlogits[valid] = probs[valid] / len(valid)
dlogits[valid, targets[valid]] -= 1 / len(valid)

# %% [markdown]
# First the losses: minus the logarithm of the probability that the token which came had been given.

# %%
texts = [model.tokenizer.decode([i]) for i in ids[0]]
losses = -np.log(probs[valid, targets[valid]])
assert np.isclose(losses.mean(), loss.total)
for text, following, value in zip(texts, texts[1:], losses, strict=False):
    print(f"{text!r:>8} -> {following!r:8} {value:6.3f}")

# %% [markdown]
# The mean of these numbers is the loss from above. The picture shows the gradient at the logits of the row with the
# largest loss: its eight largest entries.

# %%
row = losses.argmax()
largest = np.argsort(-np.abs(dlogits[row]))[:8]
figure = Picture(figsize=(7, 3), layout="constrained")
ax = figure.subplots()
right = [i == targets[row] for i in largest]
bars = ax.bar(range(8), dlogits[row, largest], color=["#0072b2" if r else "#d9d9d9" for r in right], edgecolor="black")
bars[right.index(True)].set_hatch("//")
ax.set_xticks(range(8), [repr(model.tokenizer.decode([i])) for i in largest], fontsize=9)
ax.axhline(0, color="black", linewidth=0.8)
ax.set_ylabel("gradient at the logit")
ax.set_title(f"After {texts[row]!r} (glm-tiny, V = 2,048): the token that came is hatched", fontsize=10, loc="left")
figure

# %% [markdown]
# One bar goes down, the token that came. Against it stand the tokens that the model had expected, each by its
# probability. The bars of all 2,048 tokens sum to zero. If the model had been certain and right, all would be zero:
# such a token teaches nothing.
#
# ## RMSNorm
#
# Forward, for a row $x$ of $D$ entries: $r = \sqrt{\frac1D \sum_k x_k^2 + \epsilon}$, then $n_i = x_i / r$ and
# $y_i = n_i w_i$.
#
# The weight first: $w_i$ multiplies $n_i$ in every row, so $dw_i = \sum_{\text{rows}} dy_i n_i$.
#
# Then the row. Let $g_i = dy_i w_i$, the slope at $n_i$. The trap is that $x_j$ acts twice: directly on its own $n_j$,
# and through $r$ on *all* of them. How does $r$ move? From $r^2 = \frac1D \sum x_k^2 + \epsilon$ follows
# $2 r \partial r / \partial x_j = 2 x_j / D$, so $\partial r / \partial x_j = n_j / D$. The quotient rule on $x_i / r$
# gives $\partial n_i / \partial x_j = \frac1r ([i = j] - n_i n_j / D)$, and the chain rule
#
# $$ dx_j = \frac1r \Big( g_j - n_j \cdot \frac1D \sum_i g_i n_i \Big) $$
#
# In words: take $g$, remove its part along $n$, divide by the size.

# %%
eps = 1e-3
x = np.array([[0.1], [0.3], [1.0], [5.0]]) * (0.7 + rng.standard_normal((4, 8)))  # rows of different size, mean not 0
w, dy = 1 + 0.5 * rng.standard_normal(8), rng.standard_normal((4, 8))
r = np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
n, g = x / r, dy * w
dx = (g - n * (g * n).mean(axis=-1, keepdims=True)) / r
dw = (dy * n).sum(axis=0)

# %% [markdown]
# Each array against the differences, and `dx` against the package.


# %%
def L():
    return np.vdot(dy, minglm.model.rms_norm(x, w, eps))


slopes = differences(L, x)
assert error(dx, slopes) < 1e-7
assert error(dw, differences(L, w)) < 1e-7
assert np.allclose(dx, minglm.model.rms_norm_bwd(dy, x, w, eps)[0], rtol=1e-10)

# %% [markdown]
# It passes, and it is the package's `rms_norm_bwd`. The inputs were chosen with care: rows of four sizes, rows with a
# mean, weights away from 1. Here is why. Each wrong formula below is an easy slip.


# %%
def table_of(x, w, dy):
    r = np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
    n, g, mean = x / r, dy * w, lambda a: a.mean(axis=-1, keepdims=True)
    slopes = differences(lambda: np.vdot(dy, minglm.model.rms_norm(x, w, eps)), x)
    wrong = {
        "r held constant (no mean term)": g / r,
        "sum for the mean": (g - n * 8 * mean(g * n)) / r,
        "dy for g in the mean term": (g - n * mean(dy * n)) / r,
        "r squared for r": (g - n * mean(g * n)) / r**2,
        "LayerNorm's mean term too": (g - mean(g) - n * mean(g * n)) / r,
    }
    return {label: error(dx, slopes) for label, dx in wrong.items()}


# %% [markdown]
# Beside the careful inputs we try the lazy ones, which many tests use: rows of size 1 whose mean is zero, weights of
# one.

# %%
lazy, even = (a - a.mean(axis=-1, keepdims=True) for a in (rng.standard_normal((4, 8)), dy))
lazy /= np.sqrt((lazy**2).mean(axis=-1, keepdims=True))
careful, blind = table_of(x, w, dy), table_of(lazy, np.ones(8), even)
for label in careful:
    print(f"{label:31} error {careful[label]:.4f}, with lazy inputs {blind[label]:.4f}")
assert min(careful.values()) > 0.01 > max(list(blind.values())[2:])

# %% [markdown]
# The careful inputs show all five. The lazy ones let three of them pass within a hundredth: with weights of one `dy`
# and $g$ are the same, with rows of size 1 so are $r$ and $r^2$, with rows and gradients of zero mean LayerNorm's extra
# term is zero. A fresh model has exactly such weights: all its norm weights are one.
#
# There is also a property to check by. Double a row: the output stays (but for $\epsilon$), so the loss has no slope in
# that direction, and $x \cdot dx$ must be nearly zero. Whoever holds $r$ constant fails that at a glance.

# %%
size = np.linalg.norm(x, axis=-1) * np.linalg.norm(dx, axis=-1)
cosine = (x * dx).sum(axis=-1) / size
print("cosine of x and dx, row by row:", cosine)
print("with r held constant:          ", (x * g / r).sum(axis=-1) / size)
assert np.abs(cosine).argmax() == 0

# %% [markdown]
# The smaller the row, the more $\epsilon$ counts, and the larger the remainder: it is largest in the first row.
#
# ## How small a step?
#
# A central difference has two errors. The curve is not a line: that error falls with $h^2$. And the two losses agree in
# most of their digits, so that their difference has few left: that error grows as $1/h$. The picture shows both, for
# the RMSNorm above, in float64 and float32, with the one-sided difference $(L(x + h) - L(x)) / h$ for comparison.
#
# Predict: where will the lowest point be?

# %%
direction = rng.standard_normal(x.shape) * np.abs(x)  # every row moves by its own size


def measured(dtype, h, down):
    """Relative error of the slope along the direction, from x + h down to x − down · h."""
    v, weight, d, u = (a.astype(dtype) for a in (x, w, dy, direction))
    high, low = (np.vdot(d, minglm.model.rms_norm(v + dtype(t) * u, weight, eps)) for t in (h, -down * h))
    return abs((high - low) / (h + down * h) / np.vdot(dx, direction) - 1)


# %% [markdown]
# The step goes from $10^{-12}$ to 1, three times.

# %%
steps = 10.0 ** (np.arange(-24, 1) / 2)
kinds = {
    "float64, both sides": (np.float64, 1),
    "float64, one side": (np.float64, 0),
    "float32, both sides": (np.float32, 1),
}
curves = {label: [measured(dtype, h, down) for h in steps] for label, (dtype, down) in kinds.items()}
at_ours = {label: y[np.abs(steps - 1e-5).argmin()] for label, y in curves.items()}
print({label: f"{e:.0e}" for label, e in at_ours.items()}, "at h = 1e-5")
assert at_ours["float64, both sides"] < 1e-6 < min(curves["float32, both sides"])

# %% [markdown]
# Both axes are logarithmic; lower is better.

# %%
figure = Picture(figsize=(7, 3.6), layout="constrained")
ax = figure.subplots()
looks = (("o-", "#0072b2"), ("s--", "#d55e00"), ("^:", "black"))
for (label, y), (style, colour) in zip(curves.items(), looks, strict=True):
    ax.loglog(steps, y, style, label=label, color=colour, markersize=5)
ax.axvline(1e-5, color="#888888", linewidth=1)
ax.set(xlabel="step h", ylabel="relative error of the difference")
ax.set_title("Which step? RMSNorm, [4, 8]; the line marks h = 1e-5", fontsize=10, loc="left")
ax.legend(fontsize=9)
ax.grid(color="#dddddd")
figure

# %% [markdown]
# Each curve is a V. Its right arm is curvature: it rises with $h^2$ for both sides, with $h$ for one. Its left arm is
# rounding. In float64 with both sides the bottom lies between $10^{-7}$ and $10^{-5}$, far below an error of $10^{-6}$,
# the bound of this project's tests. In float32 the left arm reaches much further: at $10^{-5}$ the error is near a
# hundredth, so that a backward with a wrong factor of 1.001 would pass, and below $10^{-7}$ the step is lost altogether
# (an error of 1: the difference is 0). Hence float64 for every check, and functions that compute in the type they are
# given.

# %% [markdown]
# ## The top of the model, backwards
#
# Three operations stand between the last layer and the loss: the final norm, the head, the cross-entropy. We have the
# backward of each. Undo them in reverse order, with our own lines, and compare with what `loss_and_grads` said at the
# beginning.

# %%
last = model.trace(ids, keep="layers.5.out")["layers.5.out"][0]  # [T, D]
# 3. the cross-entropy was undone above: dlogits
# 2. the head: two products
dhead, dhidden = dlogits.T @ out.hidden[0], dlogits @ model.params.lm_head.weight
# 1. the final norm
r = np.sqrt((last**2).mean(axis=-1, keepdims=True) + model.config.rms_norm_eps)
n, g = last / r, dhidden * model.params.norm.weight
dnorm = (dhidden * n).sum(axis=0)
dlast = (g - n * (g * n).mean(axis=-1, keepdims=True)) / r

# %% [markdown]
# Both against the record from the beginning.

# %%
np.testing.assert_allclose(dhead, grads.lm_head.weight, atol=1e-14)
np.testing.assert_allclose(dnorm, grads.norm.weight, atol=1e-14)
print("head", dhead.shape, " norm", dnorm.shape, " residual stream", dlast.shape)

# %% [markdown]
# Equal to the last digits. `dlast` is the gradient at the residual stream after the last layer: one row for each token,
# which says how this token's state should have been different. From here it goes down through the layers.
#
# ## What was learnt
#
# A gradient is a slope; a backward turns the slopes at an output into those at the inputs, by a short formula for each
# operation; and a formula is believed when central differences in float64, on a random projection and on inputs that
# hide nothing, agree with it. The next notebook sends a gradient through [attention](10b-backward-attention.ipynb), the
# one place where tokens pass it to each other. Every step with all its algebra stands in [the
# derivations](../docs/derivations/README.md).
#
# ## Questions
#
# 1. The last row of `dlogits` is zero. Why? And does that mean that the last token of the text gets no gradient
#    anywhere?
# 2. `dhead` has a row for every token of the vocabulary. Are there rows of exact zeros? Look, and explain what you
#    find.
# 3. Use `dy = x` instead of a random `dy` in the check of `linear` (with 4 inputs and 4 outputs and `W` symmetric).
#    Which wrong lines pass now?
