# %% [markdown]
# # 08a · Expert load: is the work shared evenly, and how would one know?
#
# *Reading 35 minutes · running 25 seconds · needs [07](07-forward-step.ipynb)*
#
# GLM-4.5 has 160 experts in a layer, and each token goes to 8. Where the experts stand on many machines, a busy expert
# is the one for which all others wait. An idle one is a matrix that learns nothing. This notebook counts who gets how
# much, and looks at the ways in which such a count can mislead.

# %% [markdown]
# ## The question
#
# How evenly does a router share its tokens out among the experts, what keeps it so, and what would happen without?
#
# We need text that the models have not been trained on, of several kinds, as a router may be even on the whole and
# one-sided on each kind. `minglm` has five: Python code, English prose, small puzzles with direct answers (sums,
# sorting, counting letters, following arrows, number words in English and Chinese), the same puzzles with the working
# written out, and conversations.

# %%
import numpy as np

import minglm
from minglm.evaluate.domains import DOMAINS, heldout_streams, one_domain_rows
from minglm.look import plots, routing

np.set_printoptions(precision=3, suppress=True, linewidth=110)
model = minglm.load("glm-tiny")
sample = one_domain_rows(heldout_streams(model, tokens=2048), tokens=2048)
ids, segments = sample.batch.ids, sample.batch.segments  # [B, T] each; a document is a segment
print("rows × tokens", ids.shape, "  rows of each kind", len(ids) // len(DOMAINS))

# %% [markdown]
# One pass over these ten thousand tokens, of which only the routing is kept.


# %%
def route(model):
    return model.trace(ids, keep="*.router_scores", segments=segments).routing


table = route(model)
T, layers, K = table.indices.shape
E = table.experts
print(f"T = {T:,} tokens, {layers} layers {table.layers}, K = {K} of E = {E}")

# %% [markdown]
# ## Counting
#
# The **load** $c_e$ of an expert is the number of tokens that picked it. It counts tokens: the weight with which an
# answer is heard does not matter, as a quiet expert has to compute as much as a loud one. All K choices count, not only
# the first. So the loads of a layer sum to K · T, and a fair share is $\bar c = K · T / E$.

# %%
load = np.zeros((layers, E), int)
for layer in range(layers):
    for expert in range(E):
        load[layer, expert] = (table.indices[:, layer] == expert).sum()
assert np.array_equal(load, routing.load(table.indices, E))
assert (load.sum(axis=1) == K * T).all()
print(f"fair share {K * T / E:.0f}; layer 1:", load[0])

# %% [markdown]
# A picture of all layers, each load divided by the fair share.

# %%
plots.plot_load(table.indices, E, table.layers, name=model.name)

# %% [markdown]
# Sixteen columns of experts, five rows of layers. Most cells are near 1, and none is far from it: over this mixture
# `glm-tiny` is nearly even.
#
# ## Six numbers for a row of the picture
#
# Each is a line of NumPy. Let us do layer 1 by hand.

# %%
c = load[0]
fair = c.mean()
share = c / c.sum()
entropy = -(share * np.log(share)).sum()
by_hand = {
    "max_vio": (c.max() - fair) / fair,
    "min_vio": (c.min() - fair) / fair,
    "cv": c.std() / fair,
    "dead": (c == 0).mean(),
    "entropy": entropy,
    "diversity": np.exp(entropy) / E,
}

# %%
row = routing.summary(table)[0]
for name, value in by_hand.items():
    assert np.isclose(value, getattr(row, name)), name
    print(f"{name:10} {value:6.3f}")

# %% [markdown]
# **MaxVio** says how far the busiest expert is above the fair share: 0 is even, and the most there can be is E/K − 1,
# when one expert is picked by every token. It is the measure of the paper from which this balancing comes (arXiv
# 2408.15664). **MinVio** is −1 as soon as one expert gets nothing. **CV**, standard deviation over mean, looks at all
# experts and not only the extremes. **Dead** is the share of experts without a token. The **entropy** of the shares
# is ln E when even; its exponential over E, **diversity**, is the share of the experts that are "really" in use.
#
# Two slips are common. One takes T/E for the fair share, forgetting that a token makes K picks. One takes the largest
# *distance* from the fair share, so that an idle expert counts as a violation.

# %%
forgot_K = (c.max() - T / E) / (T / E)
print(f"right {by_hand['max_vio']:.3f}   fair share T/E: {forgot_K:.3f}")
idle = np.array([0, 5, 5, 5, 5])  # nobody is overworked by more than a quarter
print(f"right {idle.max() / idle.mean() - 1:.2f}   largest distance {abs(idle / idle.mean() - 1).max():.2f}")
assert np.isclose(forgot_K, K * (1 + by_hand["max_vio"]) - 1)

# %% [markdown]
# The first slip makes an even layer look as if its busiest expert had two and a half times its share. The second cannot
# tell a layer with one idle expert from one in which somebody is given twice the work.
#
# ## How even would chance be?
#
# A router that draws two of sixteen experts with dice is as even as can be asked. Predict its MaxVio on ten tokens, and
# on ten thousand.

# %%
rng = np.random.default_rng(0)
for tokens in (10, 100, 1_000, T):
    dice = rng.random((20, tokens, E)).argpartition(K, axis=-1)[..., :K]  # 20 times, K different experts for each token
    loads = np.array([np.bincount(each.reshape(-1), minlength=E) for each in dice])
    vio, dead = routing.max_violation(loads).mean(), (loads == 0).mean()
    print(f"{tokens:6,} tokens: MaxVio {vio:.2f}, without a token {dead:.0%}")
    assert tokens > 10 or (vio > 1 and dead > 0.1)

# %% [markdown]
# With ten tokens even dice leave experts idle, and the busiest gets more than twice its share. So a load without its
# number of tokens says nothing: the picture of a single prompt always looks one-sided. And the MaxVio of batches,
# averaged, is not comparable with that of a whole text.
#
# `glm-tiny` is above the dice at ten thousand tokens. Partly that is no fault: tokens of a text are not independent.
# The same word goes to the same experts each time, so ten thousand tokens are worth fewer.
#
# ## With and without balancing
#
# `glm-tiny-balanced` and `glm-tiny-unbalanced` are twins, smaller than `glm-tiny` (four layers, three with experts):
# same seed, same text, same thousand steps. One was balanced as GLM-4.5 was: after each step, the selection bias of
# every expert went up a little if it had been idle and down if it had been busy ([05](05-router.ipynb),
# [11](11-training.ipynb)), with a very small loss term beside it. The other was left alone.
#
# Predict: how many of its 16 experts does the other one use?

# %%
twins = {name: minglm.load(name) for name in ("glm-tiny-balanced", "glm-tiny-unbalanced")}
tables = {name: route(twin) for name, twin in twins.items()}
print("layer               MaxVio  diversity  dead")
for name, its in tables.items():
    for row in routing.summary(its):
        print(
            f"{row.layer}  {name.removeprefix('glm-tiny-'):14} {row.max_vio:8.2f} {row.diversity:10.2f} {row.dead:5.0%}"
        )

# %%
even, uneven = tables.values()
worst = routing.max_violation(routing.load(even.indices, E)).max()
assert routing.max_violation(routing.load(uneven.indices, E)).min() > 3 * worst
print("layer 1, unbalanced, load over fair share", routing.utilisation(routing.load(uneven.indices, E))[0], sep="\n")

# %% [markdown]
# A few experts do nearly everything. In layer 1 of the second twin nearly every token goes to one and the same expert,
# and most to one and the same pair; half the experts get nothing at all.
#
# Why does it not even out by itself? An expert that is picked more often is trained more often, so it becomes better,
# and the router learns to pick it more. Nothing pulls the other way.
#
# ## Over the training
#
# Both runs kept the routing of one fixed text of 511 tokens at some moments.

# %%
from minglm.look.history import read_history

histories = {name: read_history(minglm.api.find(name)) for name in twins}
for name, (steps, indices) in histories.items():
    vio = [routing.max_violation(routing.load(moment, E)).mean() for moment in indices]
    print(f"{name:20}", "  ".join(f"{step}: {v:.1f}" for step, v in zip(steps, vio, strict=True)))

# %%
steps, moments = histories["glm-tiny-unbalanced"]
plots.plot_load_over_training(moments, E, steps, layer=0, layers=(1, 2, 3), name="glm-tiny-unbalanced")

# %%
steps, moments = histories["glm-tiny-balanced"]
plots.plot_load_over_training(moments, E, steps, layer=0, layers=(1, 2, 3), name="glm-tiny-balanced")

# %% [markdown]
# The printed numbers are means of MaxVio over the three layers; the pictures show layer 1, time running downwards.
# Both twins begin alike. By step 200 both are lopsided. In the first picture two columns turn dark and stay dark. In
# the second, expert 15 runs ahead too, but its bias falls by 0.002 in each step for as long as it is overloaded; by
# step 400 it has half of what it had, and from step 600 on the mean MaxVio is 1 or less.
#
# Read the second picture from top to bottom. In the first thirty steps another expert is busiest each time; from step
# 100 on it is 15 at every moment but one: at step 200 with 3.7 times its share, from 400 on with less than twice. (The
# two scales differ: black is 8 times the fair share in the first picture and 3.7 times in the second.) A load *averaged
# over the run* is flatter than that of most moments.

# %%
each = np.array([routing.max_violation(routing.load(moment, E)) for moment in moments])  # [moment, layer]
whole = routing.max_violation(sum(routing.load(moment, E) for moment in moments))
print("mean of the moments", each.mean(axis=0), "  of the summed loads", whole)
assert (whole < each.mean(axis=0)).all()
busiest = moments[:, :, 0].reshape(len(moments), -1)  # layer 1
assert [np.bincount(m, minlength=E).argmax() for m in busiest][3:] == [15, 15, 15, 15, 6, 15]

# %% [markdown]
# ## The average hides it
#
# The same happens across texts. Each of our rows is 256 tokens of one kind, about what a batch of short requests might
# be. Its MaxVio, beside that of all rows together:

# %%
rows = table.indices.reshape(*ids.shape, layers, K)  # [B, T, layer, K]
of_rows = np.array([routing.max_violation(routing.load(row, E)) for row in rows])  # [B, layer]
together = routing.max_violation(load)
dice = rng.random((200, 256, E)).argpartition(K, axis=-1)[..., :K]
by_dice = np.mean([routing.max_violation(np.bincount(each.reshape(-1), minlength=E)) for each in dice])
assert (of_rows.min(axis=0) > together).all()
assert (of_rows > by_dice).all()
print("all together", together, "\nmean of rows", of_rows.mean(axis=0), f"\ndice, 256 tokens: {by_dice:.2f}")

# %%
from minglm.look.plots import Picture

figure = Picture(figsize=(7.5, 4), layout="constrained")
ax = figure.subplots()
marks, colours = "osD^v", ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")
for d, name in enumerate(DOMAINS):
    values = of_rows[sample.domains[:, 0] == d]  # [row, layer]
    x = np.arange(1, layers + 1) + 0.14 * (d - 2)
    ax.plot(np.repeat(x[None], len(values), 0).T, values.T, marks[d], color=colours[d], ms=4, alpha=0.8)
    ax.plot([], [], marks[d], color=colours[d], label=name)
ax.hlines(together, np.arange(layers) + 0.6, np.arange(layers) + 1.4, "black", lw=2, label="all rows together")
ax.axhline(by_dice, color="black", ls="--", label="dice, 256 tokens")
ax.set(xlabel="layer", ylabel="MaxVio", title=f"glm-tiny, K = {K} of E = {E}: rows of 256 tokens (8 a kind), all {T:,}")
ax.legend(fontsize=9, ncols=2, loc="upper left")
ax.set_ylim(0, 1.35 * of_rows.max())
figure

# %% [markdown]
# Every single row (a mark) is further from even than all rows together (the long bar), and above what dice would give
# for so few tokens (dashed). The most one-sided are some puzzles with direct answers, in layers 2 and 5: few different
# tokens, over and over. One kind overworks these experts, another kind those, and in the total it cancels.
#
# That is how it should be, if experts are to differ at all. It is also why the load of a whole run says little about a
# machine that serves one kind of text at a time.
#
# ## What the bias does
#
# The bias is added to the scores when the K best are chosen, and nowhere else. So we can take it away and choose again:
# how many picks would be others, and how even would the load be?


# %%
def without_bias(its):  # -> int [T, layer, K]
    return np.argsort(-its.scores, axis=-1, kind="stable")[..., :K]


def changed(its):  # -> [layer]: the share of picks that are not among those without the bias
    found = its.indices[..., None] == without_bias(its)[..., None, :]  # [T, layer, K, K]
    return 1 - found.any(axis=-1).mean(axis=(0, 2))


# %%
from minglm.look.specialisation import bias_effect

for name, its in {"glm-tiny": table, **tables}.items():
    np.testing.assert_allclose(changed(its), bias_effect(its.scores, its.biased_scores, K))
    bare = routing.max_violation(routing.load(without_bias(its), E))
    full = routing.max_violation(routing.load(its.indices, E))
    print(f"{name}: picks changed {changed(its)}\n    MaxVio {full}, without bias {bare}")

# %% [markdown]
# In layer 1 of both balanced models the bias changes more than a third of all picks, and without it MaxVio would be
# around 5: nearly all of the balance there is the bias's work. In the upper layers it does less. In layers 3 and 5 of
# `glm-tiny` the load is even *more* equal without it. The biases were made for another mixture than ours, and in the
# last of the three stages of training they stood still while the weights went on. For the unbalanced twin nothing
# changes, as its biases are zero.
#
# GLM-4.5 did the same at its scale: a rate of 0.001 for the first 15 trillion tokens, then none (arXiv 2508.06471,
# section 2.4).
#
# Which expert has which bias? Layer 1 of `glm-tiny`, each expert with its bias and the load it would have without.

# %%
bias = model.params.layers[1].mlp.gate.e_score_correction_bias
bare = routing.utilisation(routing.load(without_bias(table), E))[0]
order = np.argsort(-bare)
print("expert", order[:8], "\nbias", bias[order[:8]], "\nload without", bare[order[:8]])
print("load with", routing.utilisation(load)[0][order[:8]])
assert bias.argmin() == bare.argmax()

# %% [markdown]
# One expert would get nearly six times its share; its bias is by far the lowest. Only *differences* of biases matter:
# the same number added to all would change no choice.
#
# ## Padding must not count
#
# Rows of unequal length are filled up. Filler tokens run through the layers like others, but nobody reads what comes
# out, and they are all the same token: they go to the same experts. Let us fill our first row up with another 256.

# %%
filled = np.concatenate([ids[:1], np.full((1, 256), model.config.eos_token_id[0])], axis=1)
seen = np.concatenate([segments[:1], np.full((1, 256), -1)], axis=1)  # a negative segment: padding
trace = model.trace(filled, keep="*.expert_indices", segments=seen)
everything = np.stack([trace[name] for name in trace.names()], axis=1)  # int [512, layer, K]
valid = seen[0] >= 0
counted, masked = routing.load(everything, E), routing.load(everything, E, valid)
print("MaxVio, padding counted ", routing.max_violation(counted))
print("MaxVio, padding left out", routing.max_violation(masked))

# %%
assert np.array_equal(masked, routing.load(trace.routing.indices, E))  # a trace leaves it out
assert np.array_equal(masked, routing.load(rows[0], E))  # and the row's own tokens went where they went
assert (routing.max_violation(counted) > routing.max_violation(masked) + 1).all()
print(
    "padding goes to",
    everything[~valid][0].tolist(),
    "in the five layers; different choices:",
    len(np.unique(everything[~valid], axis=0)),
)

# %% [markdown]
# All 256 go to the same two experts of each layer. In training the mistake would be worse than in a picture: the biases
# would push those two experts down, away from real tokens.
#
# ## What a limit would lose
#
# Many models before gave each expert room for a fixed number of picks, factor · K · T / E, and dropped what came
# beyond: those tokens went on without that expert. GLM-4.5 drops nothing. What would a limit have cost?

# %%
from minglm.look.specialisation import would_drop


def lost(its, factor):  # -> [layer], the share of picks beyond the limit
    room = int(np.ceil(factor * K * len(its.indices) / E))
    return np.maximum(routing.load(its.indices, E) - room, 0).sum(axis=1) / its.indices[:, 0].size


for name, its in tables.items():
    np.testing.assert_allclose([lost(its, f) for f in (1, 1.25)], would_drop(its.indices, E, (1, 1.25)))
    print(f"{name:20} factor 1: {lost(its, 1)}   factor 2: {lost(its, 2)}")
assert lost(tables["glm-tiny-balanced"], 2).max() == 0
assert lost(uneven, 2).min() > 0.3

# %%
plots.plot_drops(uneven.indices, E, layers=uneven.layers, name="glm-tiny-unbalanced")

# %% [markdown]
# Three falling lines, none of which reaches the bottom: without balance even three times the fair room loses much of
# the work. With balance, twice the room loses nothing of this text, taken as one batch. Smaller batches lose more, as
# the rows above showed.
#
# ## What imbalance costs
#
# If half the experts are idle, is the model worse? The cards of the twins have the figures, on all of the held-out
# text.

# %%
import json

for name in twins:
    figures = json.loads((minglm.api.find(name) / "eval.json").read_text("utf-8"))
    text = next(each for each in figures["tables"] if each["title"] == "Held-out text")["rows"]
    print(f"{name:20}", *[f"{r['domain']} {r['bits_per_byte']:.3f} ({r['low']:.2f} to {r['high']:.2f})" for r in text])

# %% [markdown]
# The balanced one is ahead by one to three hundredths of a bit per byte, far inside intervals that come from so few
# documents. And one pair is one draw of the dice: [the ablations](../docs/ablations.md#loss-free-balancing) repeat it
# with three seeds and see no difference in loss. So what balance buys here is not quality that we could measure; it
# is work that can be shared. What it buys at GLM-4.5's size, a model of this size cannot say.
#
# ## The same in GLM-4.5
#
# How large can these numbers become there?

# %%
big = minglm.PRESETS["GLM-4.5"]
many, few = big.n_routed_experts, big.num_experts_per_tok
print(f"E = {many}, K = {few}: a fair share is {few / many:.0%} of the tokens; MaxVio at most {many / few - 1:.0f}")
print(f"tokens before each expert can have one: {many // few}")
for tokens in (100, 1_000, 10_000):
    dice = rng.random((tokens, many)).argpartition(few, axis=-1)[:, :few]
    print(
        f"dice, {tokens:6,} tokens: MaxVio {routing.max_violation(np.bincount(dice.reshape(-1), minlength=many)):.2f}"
    )

# %% [markdown]
# ## What was learnt
#
# Load is a count of picks beside the fair share K · T / E, and each summary of it needs the number of tokens beside it.
# The selection bias keeps the mixture even; each single text is not, and averages over texts or time hide that. Padding
# must be left out, and nothing here says what the experts are *good for*.
#
# That is the question of [08b](08b-specialisation.ipynb).
#
# ## Questions
#
# 1. Make all biases of `glm-tiny-balanced` zero (`gate.e_score_correction_bias[:] = 0` in each layer) and route again.
#    In which layer is MaxVio exactly what `without_bias` said, and why not in the others?
# 2. Compute the load from `table.weights` instead of counts. Which experts look busier than they are, and would
#    balancing by that number be better for the machines?
# 3. How many tokens of dice does it take until their MaxVio is as large as that of a row of 256 real tokens? What does
#    that say about how independent the tokens of a text are?
