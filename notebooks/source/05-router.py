# %% [markdown]
# # 05 · The router: who sees a token, and how loud each speaks
#
# *Reading 30 minutes · running 10 seconds · needs [02](02-residual-stream.ipynb)*
#
# GLM-4.5 has 160 experts in a layer and lets 8 of them see a token. The part that chooses is one matrix and a few
# lines of arithmetic. This notebook takes one token through them by hand, then compares with the model's own
# function.

# %% [markdown]
# ## The question
#
# A token arrives as a row of D numbers. Out must come two short lists: the **K** experts that will see it, and **K**
# weights, by which their answers are multiplied before they are added up.
#
# We use layer 1 of `glm-tiny`, its first with experts: E = 16 of them, K = 2 picked. The text is two lines of Python.

# %%
import numpy as np

import minglm
from minglm.look import plots

np.set_printoptions(precision=3, suppress=True, linewidth=110)
model = minglm.load("glm-tiny")
trace = model.trace("for i in range(10):\n    print(i)", keep="layers.1.*")
print(trace.tokens)

# %% [markdown]
# The trace holds every array that layer 1 computed. The router reads what leaves the norm before the experts,
# `post_attention_layernorm`. Its own matrix `gate` has one row for each expert.

# %%
rows = trace["layers.1.post_attention_layernorm"][0]  # [T, D]
gate = model.params.layers[1].mlp.gate
token = 8  # the spaces at the start of the second line
x = rows[token]
print(x.shape, gate.weight.shape, repr(trace.tokens[token]))

# %% [markdown]
# ## Step 1: every expert scores the token
#
# A row of the matrix, times the token, is one number per expert: its *logit*. A sigmoid turns it into a score between
# 0 and 1.
#
# Many models take a softmax here, in which experts compete: one goes up, the others must go down. With a sigmoid
# each expert answers for itself. All may score high, or none.

# %%
logits = gate.weight @ x  # [E, D] · [D] -> [E]
scores = 1 / (1 + np.exp(-logits))
print(scores, f"\nsum {scores.sum():.3f}")

# %% [markdown]
# The scores do not sum to 1, and nothing asks them to. One expert fits well, number 12, and one a little, number 14.
# The others have nothing to say about this token.
#
# ## Step 2: a bias decides who is picked
#
# If the two best scores were simply taken, some experts would soon be picked by nearly every token and others by
# none. So each expert has a **selection bias**, added to its score for the choice, and only for the choice. During
# training it went up a little whenever the expert had been idle, and down when it had been busy (arXiv 2408.15664).
#
# Will expert 14 be picked?

# %%
bias = gate.e_score_correction_bias  # [E]
biased = scores + bias
order = np.argsort(-biased, kind="stable")  # best first; of equals the lower number
picked = order[: model.config.num_experts_per_tok]
print("bias", bias, "\npicked", picked, "  without the bias", np.argsort(-scores, kind="stable")[:2])
assert 14 not in picked

# %% [markdown]
# No. Only differences of biases matter, and expert 14's is far below the others: it had been picked too often, and
# every step in which it was busy took a little away. For this token expert 4 takes its place, with a score close to
# nothing.
#
# The picture shows the same. Bars are the scores, diamonds the scores with the bias; the dashed line is the border
# that the two picked ones pass.

# %%
routing = trace.routing  # what the routers of all five layers with experts chose: [T, layer, ...]
plots.plot_selection(
    routing.scores,
    routing.biased_scores,
    K=2,
    layer=0,  # the first one that has experts: layer 1
    token=token,
    tokens=trace.tokens,
    layers=routing.layers,
    name="glm-tiny",
)

# %% [markdown]
# Expert 12 stands alone. Among all the others the diamonds are almost level, for their scores are small and their
# biases alike; expert 14, whose bar is the second highest, ends below them. Hatched are the two bars whose place the
# bias changed: 4 came in, 14 went out.
#
# How near was it? The **margin** is the distance from the last one picked to the next. Where it is tiny, a rounding
# error would send the token elsewhere; comparisons of two implementations have to allow for that.

# %%
margin = biased[order[1]] - biased[order[2]]
np.testing.assert_allclose(margin, routing.margins[token, 0], atol=1e-6)
print(f"margin {margin:.4f}; smallest of the {len(rows)} tokens: {routing.margins[:, 0].min():.4f}")
changed = (np.sort(routing.indices[:, 0]) != np.sort(np.argsort(-routing.scores[:, 0])[:, :2])).any(axis=1)
print(f"tokens of the {len(rows)} that see another pair of experts because of the bias: {changed.sum()}")
assert changed[token]
assert changed.sum() > len(rows) / 2
assert np.array_equal(routing.indices[:, 0, 0], routing.scores[:, 0].argmax(axis=1))  # the first choice stays

# %% [markdown]
# In this layer the bias decides for more than half of these tokens who comes second, for none of them who comes first.
# That is a lot, and the price is visible: second experts with scores near nothing. It is also one layer of a small
# model; how much balance costs is measured in [08a](08a-expert-load.ipynb) and in the
# [ablations](../docs/ablations.md).
#
# ## Step 3: the weights come from the scores without the bias
#
# This is where most re-implementations go wrong at least once. The bias says *who*; it has no say in *how loud*. An
# expert that was let in because it had been idle must not drown out one that really fits.
#
# The picked scores are divided by their sum, then multiplied by a fixed number, `routed_scaling_factor`: 2.5 in
# GLM-4.5, 1.5 here. It balances the routed experts against the shared one, which is not scaled.

# %%
weights = scores[picked] / scores[picked].sum() * model.config.routed_scaling_factor
print("experts", picked, "scores", scores[picked], "weights", weights, f"sum {weights.sum():.2f}")
assert weights[1] < 0.1

# %% [markdown]
# Expert 4 was let in, and may hardly speak.
#
# Now the model's own function, on all tokens at once. It is twelve lines long and stands in `minglm/model/router.py`;
# its steps have the numbers used here.

# %%
routing, saved = minglm.model.router(rows, gate, model.config)
assert np.array_equal(routing.indices[token], picked)
np.testing.assert_allclose(routing.weights[token], weights, rtol=1e-5)
np.testing.assert_array_equal(routing.indices, trace["layers.1.mlp.expert_indices"])
print(routing.indices.T)

# %% [markdown]
# Equal. The rows of this table are the first and the second choice of each of the thirteen tokens.
#
# ## What goes wrong if the bias is weighed, too
#
# Let us make that mistake and look at the weights of our token and of all others.

# %%
wrong = np.take_along_axis(saved.scores + bias, routing.indices, axis=-1)
wrong = wrong / wrong.sum(axis=-1, keepdims=True) * model.config.routed_scaling_factor
print("right", routing.weights[token], " wrong", wrong[token])
assert wrong[token, 1] > 5 * routing.weights[token, 1]
print(f"first choice on average: right {routing.weights[:, 0].mean():.2f}, wrong {wrong[:, 0].mean():.2f}")

# %% [markdown]
# The experts are the same and the weights still sum to 1.5, so nothing crashes and no shape is wrong. But expert 4,
# let in for the sake of balance, now speaks many times louder. The model has just become vaguer: the biased scores
# are close to each other, so the weights move towards equal parts.
#
# Such a bug shows in no unit test with the default bias of zero. The tests of this project use random biases for that
# reason.
#
# ## Groups
#
# DeepSeek-V3, from which this router comes, first picks groups of experts that live on the same machine. GLM-4.5 has
# one group, so the step does nothing; the code has it because the config has it. A group is judged by the sum of its
# two best biased scores, and experts of closed groups fall to −∞.

# %%
from dataclasses import replace

grouped = replace(model.config, n_group=4, topk_group=1)  # experts 0–3, 4–7, 8–11, 12–15
indices = minglm.model.router(rows, gate, grouped)[0].indices
assert (indices[:, 0] // 4 == indices[:, 1] // 4).all()
assert np.array_equal(indices[:, 0], routing.indices[:, 0])
assert (indices[:, 1] != routing.indices[:, 1]).all()
print(indices.T)

# %% [markdown]
# Both experts of a token now stand in the same group of four. For these tokens the group of the best expert won each
# time, so the first choice is the one of before; every second choice is new. It need not be so: a group with two
# good experts beats a group with the best one and three poor ones.
#
# ## GLM-4.5's router
#
# The same few lines at the real size: how many sets of experts a layer has to choose from, and what the choice costs,
# as a share of the model's arithmetic for a token (two operations for each weight).

# %%
from math import comb

for name in ("glm-tiny", "GLM-4.5"):
    c = minglm.PRESETS[name]
    layers = c.num_hidden_layers - c.first_k_dense_replace
    share = 2 * layers * c.n_routed_experts * c.hidden_size / c.flops_per_token(0)
    print(f"{name}: {comb(c.n_routed_experts, c.num_experts_per_tok):,} sets in a layer; {layers} routers: {share:.2%}")
    assert share < 0.01

# %% [markdown]
# Choosing is cheap: less than a hundredth of the work, and it decides which of the weights do the rest. A layer of
# GLM-4.5 has nearly nine trillion sets to choose from. It was trained on 23 trillion tokens (arXiv 2508.06471): not
# three for each set, if all were alike.
#
# ## What we have learnt
#
# Every expert scores a token for itself. The scores plus a bias decide who is picked; the scores without it decide
# how loud the picked ones are, as shares of a fixed sum.
#
# Next: [06](06-experts.ipynb) sends the token to its experts and adds up what they answer.
#
# ## Questions
#
# 1. Add 0.3 to every expert's bias. What changes in `indices`, what in `weights`? Check it.
# 2. `routed_scaling_factor` multiplies weights that sum to 1. Why not leave it out and let training find the size?
#    (What else in an expert could make its answer larger?)
# 3. K = E: every expert is picked. Are the weights then those of a softmax over the logits? Try it with four experts.
