# %% [markdown]
# # 00b · NumPy for this course: as much as the model needs
#
# *Reading 30 minutes · running 10 seconds · needs [00](00-tour.ipynb)*
#
# The whole of GLM-4.5 is written in this course with arrays and some ten habits of using them. This notebook shows
# each habit on an array of the model, and beside it the mistake that is nearest: most of them raise no error and give
# numbers of the right shape.

# %% [markdown]
# ## The question
#
# What must be known of NumPy to read every line of `minglm/model/`? If you use it daily, read the headings and do the
# questions.
#
# The arrays come from a trace of eleven tokens. In the notebooks a comment such as `# [B, T, D]` behind a line gives
# the shape of what the line makes.

# %%
import numpy as np

import minglm
from minglm.look import plots

np.set_printoptions(precision=3, suppress=True, linewidth=110)
model = minglm.load("glm-tiny")
config = model.config
trace = model.trace("def add(a, b):\n    return a + b")
print(trace.tokens)

# %% [markdown]
# ## Axes have letters
#
# A shape is a list of sizes; what counts is what each axis *means*. The course has one letter for each meaning: B rows
# of a batch, T tokens that ask, S tokens that are looked at, N the tokens of all rows in one line, D hidden size, H
# query heads, G heads of keys and values, d size of a head, E experts, K picked experts. What heads and experts are
# comes in 04 and 05; here they are axes. [The glossary](../docs/glossary.md) has all of them.

# %%
for name, letters in [
    ("embed_tokens", "B T D"),
    ("layers.1.self_attn.q", "B T H d"),
    ("layers.1.self_attn.k", "B T G d"),
    ("layers.1.self_attn.probs", "B H T S"),
    ("layers.1.mlp.router_scores", "N E"),
    ("layers.1.mlp.expert_indices", "N K"),
]:
    print(f"{name:30} {letters:8} {trace[name].shape}")

# %% [markdown]
# An operation that goes *along* an axis makes it disappear: a sum over E of `[N, E]` is `[N]`. Counting from the end
# is safest, since axes are added at the front: `axis=-1` is "the last" in any of the arrays above.
#
# What sums to one here: attention's probabilities over the keys S. Summed along another axis they are something else,
# and nothing warns you.

# %%
probs = trace["layers.1.self_attn.probs"]  # [B, H, T, S]
np.testing.assert_allclose(probs.sum(axis=-1), 1, rtol=1e-5)
print("over S, head 0:", probs.sum(axis=-1)[0, 0])
print("over T, head 0:", probs.sum(axis=-2)[0, 0])
assert not np.allclose(probs.sum(axis=-2), 1)

# %% [markdown]
# The second line is not wrong by itself: it says how much each token was looked at. The same shape, another meaning.
#
# ## Broadcasting: axes of size 1 are stretched
#
# Two arrays meet axis by axis, *from the end*. Sizes must be equal, or one of them is 1 (or missing) and is repeated.
# So a column `[T, 1]` and a row `[S]` make a table `[T, S]`. `[:, None]` puts in an axis of size 1. Here is the
# distance from each token to each other one, and with it the rule "nobody looks ahead".

# %%
places = np.arange(len(trace.tokens))
distance = places[:, None] - places  # [T, 1] − [S] -> [T, S]
hidden = distance < 0
assert np.array_equal(np.isneginf(trace["layers.1.self_attn.scores"][0, 0]), hidden)
plots.plot_array(distance, "T S", "distance to the token looked at", rows=trace.tokens, columns=trace.tokens)

# %% [markdown]
# Down the side stands the token that asks, along the bottom the one looked at. The diagonal is 0; above it the distance
# is negative, the other token comes later, and there the model's scores are −∞, as the assert has checked.
#
# `keepdims=True` keeps a summed axis as size 1, so that the result still fits. Predict what happens without it: the
# sums `[N]` meet the table `[N, E]` from the end.

# %%
scores = trace["layers.1.mlp.router_scores"]  # [N, E]
share = scores / scores.sum(axis=-1, keepdims=True)  # [N, E] / [N, 1]
np.testing.assert_allclose(share.sum(axis=-1), 1, rtol=1e-5)
try:
    scores / scores.sum(axis=-1)
except ValueError as error:
    print("11 tokens, 16 experts:", error)

# %% [markdown]
# An error: 11 is not 16. That was luck. With as many tokens as experts the shapes fit, and each column is divided by
# the sum of a token that has nothing to do with it:

# %%
square = np.tile(scores, (2, 1))[:16]  # 16 tokens, 16 experts
wrong = square / square.sum(axis=-1)
print("shape", wrong.shape, "rows sum to", wrong.sum(axis=-1)[:5])
assert not np.allclose(wrong.sum(axis=-1), 1)

# %% [markdown]
# This is why the tests of the project use sizes that are all different. Do the same when you try something.
#
# ## Matrix products, and einsum to read them
#
# Weights stand as `[out, in]`, so a row times a weight is `x @ weight.T`. With more than two axes `@` multiplies the
# last two and lets the ones before broadcast.
#
# `np.einsum` says the same with letters: **a letter that is missing behind the arrow is summed over**. The model
# is written with `@`, which hands the work straight to the matrix library; but no notation says more clearly what is
# meant.

# %%
x = trace["layers.1.post_attention_layernorm"]  # [B, T, D]
weight = model.params.layers[1].mlp.gate.weight  # [E, D]
logits = np.einsum("btd,ed->bte", x, weight)
np.testing.assert_allclose(logits, x @ weight.T, atol=1e-5)
np.testing.assert_allclose(logits[0], trace["layers.1.mlp.router_logits"], atol=1e-5)
print("router: D is summed,", logits.shape)

# %% [markdown]
# Now attention's scores: each query with each key, over the size of a head. There are 6 query heads and 2 key heads;
# three neighbouring query heads share one. So H is split into G and R. Before you read the string: which letters are
# summed, which stay?

# %%
at = "layers.1.self_attn."
q, k, v = trace[at + "q_rope"], trace[at + "k_rope"], trace[at + "v"]
B, T, H, d = q.shape
G = k.shape[2]
grouped = q.reshape(B, T, G, H // G, d)  # [B, T, G, R, d]
products = np.einsum("btgrd,bsgd->bgrts", grouped, k) * np.float32(d**-0.5)
seen = ~hidden
np.testing.assert_allclose(products.reshape(B, H, T, T)[..., seen], trace[at + "scores"][..., seen], atol=1e-4)
mixed = np.einsum("bgrts,bsgd->btgrd", probs.reshape(B, G, H // G, T, T), v)
np.testing.assert_allclose(mixed.reshape(B, T, H, d), trace[at + "heads"], atol=1e-5)

# %% [markdown]
# Equal, both. In the first only d is summed: a number for each query and key. In the second only s: each token gets a
# mean of the values it looks at, with its probabilities.
#
# Some more strings of the model, as exercises in reading. Cover the right side and say what each does.

# %%
a, w = x[0], trace["layers.1.mlp.expert_weights"]  # [N, D], [N, K]
answers = np.ones((*w.shape, a.shape[1]), np.float32)  # [N, K, D] stand-ins for the experts' answers
strings = {
    "nd,nd->n": (np.einsum("nd,nd->n", a, a), (a * a).sum(axis=-1)),  # square of each row's length
    "nk,nkd->nd": (np.einsum("nk,nkd->nd", w, answers), (w[:, :, None] * answers).sum(axis=1)),  # weighted sum
    "nd,ne->de": (np.einsum("nd,ne->de", a, scores), a.T @ scores),  # a weight's gradient: tokens are summed
    "te->e": (np.einsum("te->e", scores), scores.sum(axis=0)),  # each expert's sum over tokens
}
for string, (left, right) in strings.items():
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)
    print(f"{string:11} -> {left.shape}")

# %% [markdown]
# ## Indexing with arrays
#
# An array of ids as index looks up rows: ids `[B, T]` into a table `[V, D]` give `[B, T, D]`. That is the embedding,
# all of it.

# %%
table = model.params.embed_tokens.weight  # [V, D]
rows = table[trace.ids]  # [B, T] -> [B, T, D]
assert np.array_equal(rows, trace["embed_tokens"])
print(table.shape, trace.ids.shape, "->", rows.shape)

# %% [markdown]
# **Who is picked?** `argsort` sorts upwards, so the scores are negated. `kind="stable"` keeps equal ones in order, the
# lower number first. Without that word the order of equal scores is up to the library, and may differ between machines.
#
# `argsort` of an order gives the way back: if `order = np.argsort(x)`, then `rank = np.argsort(order)` says at which
# place each entry of x stands.

# %%
biased = trace["layers.1.mlp.biased_scores"]  # [N, E]
indices = np.argsort(-biased, axis=-1, kind="stable")[:, :2]  # [N, K]
assert np.array_equal(indices, trace["layers.1.mlp.expert_indices"])
tied = np.array([0.5, 0.9, 0.5, 0.9])
print("of equals the first:", np.argsort(-tied, kind="stable"), " reversed:", np.argsort(tied, kind="stable")[::-1])
assert np.argsort(-tied, kind="stable").tolist() == [1, 3, 0, 2]

# %% [markdown]
# Sorting upwards and reading backwards looks like the same thing, and takes the *last* of equals.
#
# **Each row its own columns.** Token n wants the scores of *its* two experts. `take_along_axis` does that. What does
# the plain index `scores[:, indices]` give?

# %%
picked = np.take_along_axis(scores, indices, axis=-1)  # [N, K]
also = scores[np.arange(len(scores))[:, None], indices]  # the same, written with broadcasting
assert np.array_equal(picked, also)
print("right", picked.shape, " plain index", scores[:, indices].shape)

# %% [markdown]
# The plain index takes every token's experts for every token: 11 × 11 × 2. The diagonal of that would be right.
#
# ## Adding where indices repeat
#
# Backward, the embedding collects gradients: row 7 gets the sum over all places where token 7 stood. In our text ` b`
# stands twice. The line that comes to mind first is `grad[ids] += g`.

# %%
ids = trace.ids[0]
g = np.ones((len(ids), 3), np.float32)  # a gradient of ones, three columns, for each token
lost, right = np.zeros((2, len(table), 3), np.float32)
lost[ids] += g
np.add.at(right, ids, g)
again = ids[-1]  # ␣b
print("␣b stands", (ids == again).sum(), "times; += counted", lost[again, 0], " add.at", right[again, 0])
assert (lost[again, 0], right[again, 0]) == (1, 2)

# %% [markdown]
# `grad[ids] += g` means `grad[ids] = grad[ids] + g`: all rows are read, then all are written, and of two writes to one
# row the last stays. `np.add.at` adds one after the other.
#
# The model does use `+=` with an index where an expert's answers go back to its tokens. There it is right: within one
# expert no token comes twice. But all experts in one statement would lose one of each token's two answers.

# %%
tokens, every = np.repeat(np.arange(11), 2), np.ones(22, np.float32)  # [N·K] the token of each pick
at_once, one_by_one = np.zeros((2, 11), np.float32)
at_once[tokens] += every
for e in range(config.n_routed_experts):
    mine = tokens[indices.reshape(-1) == e]
    one_by_one[mine] += 1
print("all at once", at_once, "\none by one ", one_by_one)
assert (one_by_one == 2).all()
assert (at_once == 1).all()

# %% [markdown]
# ## Views and copies
#
# A slice, a transpose, most reshapes: the same memory, seen in another way; nothing is copied, and writing into it
# writes into the original. An index with an array, or with a mask, is a **copy**: writing into it is lost.

# %%
stream = trace["layers.1.out"].copy()  # [B, T, D]
view, copied = stream[:, :3], stream[:, [0, 1, 2]]
print("shares memory: slice", np.shares_memory(stream, view), " array of ids", np.shares_memory(stream, copied))
copied[:] = 0
assert stream[0, 0].any()
view[:] = 0
assert not stream[0, :3].any()
assert np.shares_memory(grouped, q)  # a split axis is a view, too

# %% [markdown]
# Weights are read by everybody, so the model writes into nothing that it was given. If you write into an array of a
# model or a trace, take a `.copy()` first.
#
# **Reshape does not move numbers.** It cuts the same sequence into other pieces. To bring axes into another order, use
# `transpose` or `swapaxes`. A classic mistake is to undo the split into heads by reshaping alone:

# %%
heads_first = trace[at + "heads"].transpose(0, 2, 1, 3)  # [B, H, T, d]
merged = heads_first.transpose(0, 2, 1, 3).reshape(B, T, H * d)
bad = heads_first.reshape(B, T, H * d)  # right shape, wrong places
assert np.array_equal(merged, trace[at + "heads"].reshape(B, T, H * d))
print("same numbers:", np.array_equal(np.sort(bad, axis=None), np.sort(merged, axis=None)))
print("in the same places:", f"{(bad == merged).mean():.0%}")

# %% [markdown]
# All the right numbers, nearly all in the wrong rows, and no error: a token has received parts of other tokens.
#
# ## Dtypes: who makes float64 of it
#
# The model computes in float32, 4 bytes a number. One float64 array in a line makes the result float64, and from there
# on everything: twice the memory, and a comparison "in float32" that is none. Guess, for each line, which dtype comes
# out.

# %%
row = x[0, 0]  # float32 [D]
lines = {
    "row * 2.5": row * 2.5,
    "row * np.sqrt(2.5)": row * np.sqrt(2.5),
    "row * np.float32(2.5)": row * np.float32(2.5),
    "row + np.zeros(192)": row + np.zeros(192),
    "row * np.arange(192)": row * np.arange(192),
    "np.mean(row)": np.mean(row),
    "np.where(row > 0, row, 0)": np.where(row > 0, row, 0),
}
for line, value in lines.items():
    print(f"{line:28} {value.dtype}")
assert [v.dtype.itemsize for v in lines.values()] == [4, 8, 4, 8, 8, 4, 4]

# %% [markdown]
# A Python number bends to the array. A NumPy number does not: `np.sqrt(2.5)` is a float64 (since NumPy 2 it counts like
# an array). `np.zeros` and `np.ones` make float64 unless told, and whole numbers of `np.arange` are int64, which
# float32 cannot hold, so both become float64.
#
# The cure is to say it: `np.zeros(n, x.dtype)`, `np.zeros_like(x)`, `x.dtype.type(c)`, `d**-0.5` in plain Python.
#
# ## What float32 can hold
#
# A float32 has 24 binary digits, about seven decimal ones. Between 1 and the next number above it there is a gap of
# 1.2e-7. Small changes of large numbers vanish, and a sum depends on the order.

# %%
one = np.float32(1)
print("gap above 1:", np.spacing(one), " above 16,777,216:", np.spacing(np.float32(2**24)))
assert np.float32(2**24) + one == np.float32(2**24)
values = table.reshape(-1)  # 393,216 numbers
up, down = np.add.accumulate(values)[-1], np.add.accumulate(values[::-1])[-1]
print(f"one after the other {up:.5f}, backwards {down:.5f}, in float64 {values.sum(dtype=np.float64):.5f}")
assert up != down

# %% [markdown]
# So two right programs need not agree to the last digit: they add in another order. Compare with a tolerance,
# `np.testing.assert_allclose`, and know its two parts: `rtol` is relative to the value, `atol` is for values near zero,
# where nothing is relative.

# %%
alone = np.stack([model.forward([ids[: t + 1]]).logits[0, t] for t in (3, 7, 10)])
together = trace["logits"][0, [3, 7, 10]]
print("largest difference", np.abs(alone - together).max(), "of logits as large as", np.abs(together).max())
np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-4)
assert np.array_equal(alone.argmax(axis=-1), together.argmax(axis=-1))

# %% [markdown]
# A prefix alone and the same tokens within a longer text: the same up to rounding, since nobody looks ahead. How to
# tell rounding from a bug has a page of its own, [Comparing](../docs/comparing.md).
#
# **Large exponents.** The largest float32 is about 3.4e38, and e⁸⁹ is above it. A softmax therefore takes the largest
# score off first, which changes nothing in the quotient.

# %%
large = np.array([100.0, 99.0, 0.0], np.float32)
with np.errstate(over="ignore", invalid="ignore"):
    print("plain   ", np.exp(large) / np.exp(large).sum())
shifted = np.exp(large - large.max())
print("shifted ", shifted / shifted.sum())
np.testing.assert_allclose(shifted / shifted.sum(), minglm.model.softmax(large))

# %% [markdown]
# ## What we have learnt
#
# Know what each axis means, sum along the right one, and keep it with `keepdims`. Repeated indices need `np.add.at`,
# each row's own columns `take_along_axis`, equals a stable sort. Reshape cuts and transpose moves; a slice is a view
# and an index array a copy. Float64 comes in by constants, and float32 agrees to about seven digits.
#
# Most of the mistakes shown here have the right shape. That is why the next notebooks compare every step with the
# model's own arrays. They begin with text: [01-tokens](01-tokens.ipynb).
#
# ## Questions
#
# 1. Write `np.einsum("bthd,bshd->bhts", q, k_repeated)` with `k_repeated = np.repeat(k, 3, axis=2)`. Equal to the
#    grouped product? And with `np.tile(k, (1, 1, 3, 1))`? Which query heads then read the wrong key head?
# 2. Softmax over the wrong axis: apply it to the scores of layer 1 along T instead of S. Which two rows of the
#    result show the mistake at a glance, and why?
# 3. Add 1 to a float32 zero 20 million times: `np.add.accumulate(np.ones(20_000_000, np.float32))[-1]`. And `.sum()` of
#    the same array? Find out how `sum` does it (its documentation says *pairwise*).
