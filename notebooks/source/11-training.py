# %% [markdown]
# # 11 · Training: what is done with the gradients
#
# *Reading 40 minutes · running 40 seconds · needs [10c](10c-backward-experts.ipynb)*
#
# GLM-4.5 was trained on 23 trillion tokens (its report's abstract). What happens in each of those steps fits on a page:
# gradients, a limit on their size, an optimiser, and a nudge for the routers. This notebook takes one step apart,
# trains a very small model three times, and then reads the records of the shipped checkpoints.

# %% [markdown]
# ## The question
#
# A gradient says which way is down, for each weight, and how steep. It does not say how far to go. Two optimisers
# answer that differently: AdamW looks at each entry alone, Muon at a matrix as a whole. And the experts' load, which no
# gradient balances, needs a rule of its own. What do these rules do, and how much do they matter?
#
# The model is a `micro` with 8 experts of which 2 see a token, small enough to be trained here.

# %%
import numpy as np

import minglm
from minglm.look.plots import Picture

np.set_printoptions(precision=3, suppress=True, linewidth=110)

# %% [markdown]
# Groups of experts and the MTP layers are left out, to keep it quick.

# %%
settings = {"vocab_size": 96, "hidden_size": 32, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
settings["num_nextn_predict_layers"] = 0
config = minglm.PRESETS["micro"].replace(**settings)
print(minglm.new(config))

# %% [markdown]
# ## The text
#
# Four kinds of puzzles, generated, with their solutions written out. A token is a character. Random digits in a
# question cannot be guessed, so no model will bring the loss to zero; everything after the colon can be worked out.

# %%
from minglm.data.tasks import TASKS, make_train, plain

rng = np.random.default_rng(0)
kinds = [TASKS[name] for name in ("addition", "reverse", "count", "sort")]
text = "".join("".join(plain(make_train(kinds[i % 4], rng), True)) for i in range(12_000))

# %% [markdown]
# The vocabulary: the printable characters of ASCII, and 95 for the end of a line.

# %%
ids = np.array([95 if c == "\n" else ord(c) - 32 for c in text])
print(f"{len(ids):,} tokens, beginning with\n\n{text[:150]}")

# %% [markdown]
# A batch is a few rows cut out at random places, and the targets are the ids, moved on by one. The batch of a step
# depends on nothing but the step's number: so each run sees the same tokens in the same order.

# %%
from minglm.data.batches import Batch


def batch(step, B=12, T=64):
    starts = np.random.default_rng([1, step]).integers(0, len(ids) - T, B)
    rows = ids[starts[:, None] + np.arange(T)]
    return Batch(rows, minglm.model.shift_targets(rows), np.zeros_like(rows))


# %% [markdown]
# A recipe holds every number of a run. This one has a single stage; the loss has no balance term, and the selection
# biases stay where they are unless `bias_rate` says otherwise.

# %%
from minglm.train.recipe import Recipe, Stage


def recipe(optimiser, rate, bias_rate=0.0, steps=200):
    stage = Stage(
        "pre-training",
        steps,
        12,
        64,
        learning_rate=rate,
        final_rate=rate / 10,
        warmup=20,
        balance_weight=0.0,
        bias_rate=bias_rate,
    )
    return Recipe("micro", (stage,), settings, optimiser=optimiser, engine="numpy")


# %% [markdown]
# ## One step, by hand
#
# `train_step` does four things. We do the first three by hand and compare. **Gradients**: from 10a to 10c.
# **Clipping**: the norm over *all* gradients together is measured, and if it is above a limit, here 1, all are scaled
# down to it. One bad batch must not throw the model far away.

# %%
from minglm.train.optim import clip, global_norm
from minglm.train.step import start, train_step

plan = recipe("adamw", 0.01)
model = minglm.new(config, seed=0)
first = batch(0)
loss, grads = model.loss_and_grads(first.ids)
norm = global_norm(grads)
assert np.isclose(global_norm(clip(grads, norm, norm / 3)), norm / 3)
print(f"loss {loss.main:.3f}, a blind guess {np.log(config.vocab_size):.3f}; gradient norm {norm:.2f}")

# %% [markdown]
# **AdamW** keeps two running means for each entry: of the gradient, and of its square. The step goes along mean /
# √(mean square), so an entry whose gradients are small but always of one sign moves as far as one with large gradients.
# Both means start at zero and are divided by the share of weight that real gradients have in them. At the first step
# that leaves $g / |g|$: the sign.
#
# Predict: how far does each entry of a matrix move in the first step?

# %%
name = "model.layers.1.self_attn.q_proj.weight"
before = dict(minglm.model.walk_stacked(model.params))[name]
g = dict(minglm.model.walk_stacked(clip(grads, norm, plan.clip_norm)))[name]
mean, square = 0.1 * g, 0.05 * g**2  # betas 0.9 and 0.95, from zero
direction = (mean / 0.1) / (np.sqrt(square / 0.05) + 1e-8)
rate = plan.at(0).learning_rate
after = before * (1 - rate * 0.1) - rate * direction  # weight decay 0.1, apart from the gradient

# %% [markdown]
# Against the project's step. Then the middle nine tenths of the entries: how large were the gradients, how large the
# steps?

# %%
state, metrics = train_step(start(model, plan), first, model, plan)
np.testing.assert_allclose(dict(minglm.model.walk_stacked(state.params))[name], after, atol=1e-6)
for what, sizes in (("gradients", abs(g)), ("steps", abs(rate * direction))):
    print(f"{what:9} from {np.quantile(sizes, 0.05):.2g} to {np.quantile(sizes, 0.95):.2g}")

# %% [markdown]
# The same step, the rate itself, for nearly all entries, though their gradients differ more than tenfold. That is
# Adam's answer to "how far". The **decay** pulls matrices towards zero by a fixed share; it applies to matrices but not
# to embeddings, norm weights and biases.
#
# ## Muon: the answer for a whole matrix
#
# A matrix is more than its entries. Write a gradient as $G = U S V^T$, its singular value decomposition: directions,
# and how much each counts. In a real gradient some count far more than others. Here is one, from `glm-tiny` on a
# held-out page.

# %%
from minglm.data.heldout import heldout_documents

tiny = minglm.load("glm-tiny")
page = [tiny.tokenizer.encode(heldout_documents("code")[0].text)[:256]]
G = dict(minglm.walk(tiny.loss_and_grads(page)[1]))["model.layers.2.self_attn.q_proj.weight"].astype(np.float64)
s = np.linalg.svd(G, compute_uv=False)
count = np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.9) + 1
print(f"{G.shape}: {count} of {len(s)} directions hold 90 % of its square")
assert count < len(s) / 4

# %% [markdown]
# Going along $G$ therefore means going along those few. Muon replaces $S$ by ones: every direction gets the same
# length. GLM-4.5's report (2.4) uses it for all matrices but the embeddings. (What it orthogonalises is not one
# gradient but a running mean of them, with a momentum of 0.95.)
#
# A decomposition would be slow. **Newton–Schulz** gets there by products alone: since $G G^T = U S^2 U^T$, the matrix
# $aX + b(XX^T)X + c(XX^T)^2 X$ has the same directions as $X$, and each singular value $s$ has become
# $as + bs^3 + cs^5$. Five times, with coefficients that lift small values quickly.

# %%
from minglm.train.muon import newton_schulz

a, b, c = 3.4445, -4.7750, 2.0315
X = G / np.linalg.norm(G)  # no singular value above 1

# %% [markdown]
# Five steps; `history` keeps the singular values after each.

# %%
history = [np.linalg.svd(X, compute_uv=False)]
for _ in range(5):
    A = X @ X.T
    X = a * X + (b * A + c * A @ A) @ X
    history.append(np.linalg.svd(X, compute_uv=False))
np.testing.assert_allclose(X, newton_schulz(G), atol=1e-10)

# %% [markdown]
# And the claim about the singular values, each by itself: five times the polynomial.

# %%
expected = history[0]
for _ in range(5):
    expected = a * expected + b * expected**3 + c * expected**5
np.testing.assert_allclose(np.sort(expected), np.sort(history[-1]), atol=1e-8)

# %% [markdown]
# The picture shows them sorted, on a logarithmic scale.

# %%
figure = Picture(figsize=(7.5, 3.8), layout="constrained")
ax = figure.subplots()
looks = (("-", "black"), (":", "#0072b2"), ("--", "#0072b2"), ("-.", "#009e73"), ("--", "#d55e00"), ("-", "#d55e00"))
for i, (values, (style, colour)) in enumerate(zip(history, looks, strict=True)):
    ax.semilogy(values, style, color=colour, label=f"after {i}" if i else "before", linewidth=2)
ax.set(xlabel="singular value, largest first", ylabel="size", ylim=(1e-6, 3))
ax.set_title("Newton–Schulz on a gradient: q_proj, layer 2 of glm-tiny, [192, 192]", fontsize=10, loc="left")
ax.legend(fontsize=9, ncols=2)
ax.grid(color="#dddddd")
figure

# %% [markdown]
# Before, the values fall over several powers of ten. Each step lifts the small ones by up to 3.4445, until after five
# three quarters lie on a plateau near 1. They do not *converge* to 1: the polynomial makes 0.7 of a 1, and the values
# wander between about 0.7 and 1.2. Values far too small at the start stay behind, on the right.
#
# That is meant so. For a step it matters more that no direction is missed than that each has exactly length 1; the
# gentler polynomial that does converge lifts by 1.875 only, and would leave more of them behind.

# %%
plateau = np.mean((history[-1] > 0.68) & (history[-1] < 1.21))
print(f"before: largest {history[0][0]:.2f}, median {np.median(history[0]):.4f}")
print(f"after: {plateau:.0%} within 0.68 … 1.21, largest {history[-1].max():.2f}")
assert 0.7 < plateau < 0.8
assert history[-1].max() < 1.21

# %% [markdown]
# How much do the details matter? Three variants, judged by the share of values above 0.68 and by the largest: the right
# one; with the entries of $XX^T$ squared, `A * A`, where the product `A @ A` is meant, a slip that NumPy allows; and
# with the coefficients that converge.


# %%
def five_steps(a, b, c, square=lambda A: A @ A):
    X = G / np.linalg.norm(G)
    for _ in range(5):
        A = X @ X.T
        X = a * X + (b * A + c * square(A)) @ X
    return np.linalg.svd(X, compute_uv=False)


# %% [markdown]
# `expected` from above is the first of them once more.

# %%
variants = {
    "right": five_steps(a, b, c),
    "A * A": five_steps(a, b, c, square=lambda A: A * A),
    "converging": five_steps(15 / 8, -10 / 8, 3 / 8),
}
for label, values in variants.items():
    print(f"{label:11} {np.mean(values > 0.68):4.0%} above 0.68, largest {values[0]:.3g}")
assert np.mean(variants["converging"] > 0.68) < plateau / 2

# %% [markdown]
# The slip does not stay small: values above 1 are thrown ever further out, and in float32 that run would end in
# infinities. The converging coefficients are exact at the top and reach a quarter of the directions, where Muon's reach
# three quarters.
#
# Last, the length. A matrix of ones as singular values has small entries, smaller the wider it is. Muon scales by
# $0.2 \sqrt{\max(\text{rows}, \text{cols})}$, so that an update has about the root mean square that AdamW's have,
# whatever the shape, and one learning rate serves both.

# %%
for shape in ((96, 192), (192, 96), (16, 192), (2048, 192)):
    O = newton_schulz(rng.standard_normal(shape))
    update = 0.2 * np.sqrt(max(shape)) * O
    print(f"{shape!s:12} rms of O {np.sqrt((O**2).mean()):.4f}, of the update {np.sqrt((update**2).mean()):.3f}")
    assert 0.15 < np.sqrt((update**2).mean()) < 0.21

# %% [markdown]
# Four shapes, one size: between 0.16 and 0.20, where the bare $O$ differs by a factor of three.
#
# Experts are stacked in memory, [E, F, D], and each is a matrix of its own: `newton_schulz` does every matrix of a
# stack by itself. Taken as one tall matrix, an expert with few tokens, and so with a small gradient, would stay behind
# like the small singular values above; alone, it takes a full step like any other.
#
# ## The learning rate over time
#
# Neither rule says how long a step is in the end: that is the learning rate, and it moves. Up in a straight line first,
# because the running means are still young. Then down along half a cosine, to a tenth. In the report (2.4) it goes from
# 0 to $2.5 \cdot 10^{-4}$ and ends at $2.5 \cdot 10^{-5}$.


# %%
def by_hand(step, total, warmup, peak, floor):
    if step < warmup:
        return peak * (step + 1) / warmup
    return floor + (peak - floor) * (1 + np.cos(np.pi * (step - warmup) / (total - 1 - warmup))) / 2


# %% [markdown]
# Against the recipe's own, at each of 200 steps. `plan.at(step)` says what holds at a step: the stage, the batch, the
# rate.

# %%
plan = recipe("muon", 0.02)
rates = [plan.at(step).learning_rate for step in range(200)]
np.testing.assert_allclose(rates, [by_hand(step, 200, 20, 0.02, 0.002) for step in range(200)])
print("rates at steps 0, 19, 110, 199:", *(f"{rates[step]:.4f}" for step in (0, 19, 110, 199)))

# %% [markdown]
# At step 0 the rate is already above zero, at step 19 at its peak; half-way down the cosine it is half-way between peak
# and floor, and at the last step a tenth of the peak.
#
# ## Three runs
#
# Now all together, 200 steps, three times from the same weights over the same tokens: AdamW; Muon; and Muon with the
# routers balanced. A single rate for both would be unfair to one of them. The rates here, 0.08 and 0.02, came out best
# of eight tried for AdamW (from 0.005 to 0.25) and of four for Muon (from 0.005 to 0.04), on these same batches.
#
# Predict: which line is lowest at the end, and which in the first twenty steps?


# %%
def train(plan):
    model = minglm.new(plan.model_config(), seed=0)
    state, log = start(model, plan), []
    for step in range(plan.steps):
        state, metrics = train_step(state, batch(step), model, plan)
        log.append(metrics)
    return state, log


# %% [markdown]
# That is a training loop. The project's own (`minglm/train/loop.py`) adds what a long run needs: a log, checkpoints,
# and resuming so exactly that the bits are the same.
#
# The next cell is the slow one.

# %%
runs = {
    "AdamW": train(recipe("adamw", 0.08)),
    "Muon": train(recipe("muon", 0.02)),
    "Muon, balanced": train(recipe("muon", 0.02, bias_rate=0.01)),
}
tokens = 200 * 12 * 64
print(f"{tokens:,} tokens each")

# %% [markdown]
# How much work is that? A token costs about 2 operations for each active parameter in the forward, one multiplication
# and one addition, and twice as many in the backward (10a). So 6 · active parameters · tokens, here and for GLM-4.5:

# %%
ours = 6 * config.count_parameters().active * tokens
theirs = 6 * minglm.PRESETS["GLM-4.5"].count_parameters().report_active * 23e12
print(f"each run {ours:.1e} operations, GLM-4.5 {theirs:.1e}: {theirs / ours:.0e} times as many")

# %% [markdown]
# The loss of the next token, as a mean of ten steps; the dashed line at the top is a blind guess.


# %%
def smooth(values, over=10):
    return np.convolve(values, np.ones(over) / over, "valid")


looks = {"AdamW": (":", "black"), "Muon": ("-", "#0072b2"), "Muon, balanced": ("--", "#d55e00")}
figure = Picture(figsize=(7.5, 3.6), layout="constrained")
ax = figure.subplots()
for label, (style, colour) in looks.items():
    losses = smooth([m.main for m in runs[label][1]])
    ax.plot(range(9, 200), losses, style, color=colour, label=label, linewidth=2)
ax.axhline(np.log(96), color="#888888", linestyle="--", linewidth=1)
ax.set(xlabel="step", ylabel="loss, nats per token", ylim=(1, 4.8))
ax.set_title("Three runs at equal tokens, 12 × 64 a step, seed 0", fontsize=10, loc="left")
ax.legend(fontsize=9)
ax.grid(color="#dddddd")
figure

# %% [markdown]
# All three fall from the blind guess. AdamW is ahead for some thirty steps. From then on Muon is, at equal tokens, and
# stays so.
#
# Muon with balanced routers lies on the line without: balancing costs nothing that this picture could show.

# %%
final = {label: np.mean([m.main for m in log[-20:]]) for label, (_, log) in runs.items()}
print({label: f"{value:.3f}" for label, value in final.items()})
reached = int(np.argmax(smooth([m.main for m in runs["Muon"][1]]) < final["AdamW"])) + 9
print(f"Muon is where AdamW ends after {reached} of 200 steps")
assert final["Muon"] < final["AdamW"] - 0.1
assert runs["AdamW"][1][20].main < runs["Muon"][1][20].main
assert abs(final["Muon"] - final["Muon, balanced"]) < 0.1

# %% [markdown]
# One seed, one small model, rates chosen by a short look, and on these batches: a demonstration and no measurement.
# (From one of its eight rates to the next, AdamW's last loss jumped by more than a tenth, up and down again.) What
# three seeds of a model seventy times as large say stands at the end.
#
# ## The experts' load, with and without the rule
#
# The fourth thing that a step does. For each router count the picks of each expert. An expert with more than the mean
# gets its selection bias lowered by a fixed step, one with less gets it raised: `update_bias`. How far it is over does
# not matter, only on which side it is. No gradient is involved (10c: there is none).

# %%
rate, load = 0.01, np.array([250, 190, 192, 400, 80, 192, 120, 112])  # mean 192
moved = minglm.model.update_bias(np.zeros(8), load, rate)
assert np.array_equal(moved, rate * np.sign(load.mean() - load))
print(load - load.mean(), "\n", moved)

# %% [markdown]
# The experts with 250 and with 400 picks are pushed down by the same step, and the two at the mean stay. An idle expert
# is thus lured back in at a constant speed, however long it takes.
#
# So the whole history of a bias follows from the loads alone. Check it: add up the steps of layer 1 over the run, and
# compare with the bias that the model ended with.

# %%
state, log = runs["Muon, balanced"]
loads = np.array([m.load[1] for m in log])  # [steps, E]
steps = 0.01 * np.sign(loads.mean(axis=1, keepdims=True) - loads)
np.testing.assert_allclose(steps.sum(axis=0), state.params.layers[1].mlp.gate.e_score_correction_bias, atol=1e-5)
print("bias at the end:", steps.sum(axis=0))

# %% [markdown]
# We measure unevenness as MaxVio, (largest load − mean load) / mean load: 0 is even, and the worst there can be is E/K
# − 1 = 3, when every token goes to the same experts.
#
# Predict both curves before you look.

# %%
figure = Picture(figsize=(8, 5.6), layout="constrained")
above, below = figure.subplots(2, 1, sharex=True)
for label, style, colour in (("Muon", "-", "#0072b2"), ("Muon, balanced", "--", "#d55e00")):
    for layer, width in ((1, 1), (2, 2.4)):
        values = smooth([m.max_violation[layer] for m in runs[label][1]])
        above.plot(range(9, 200), values, style, color=colour, linewidth=width, label=f"{label}, layer {layer}")
above.hlines([0, 3], 0, 200, colors="black", linestyles=":", linewidth=1)
below.plot([m.bias[2] for m in runs["Muon, balanced"][1]], linewidth=1)
above.set(
    ylabel="MaxVio", ylim=(-0.2, 4.4), title=f"Load with and without the rule, E = 8, K = 2, {12 * 64} tokens a step"
)
below.set(xlabel="step", ylabel="selection bias, layer 2")
above.legend(fontsize=9, ncols=2, loc="upper right")
for ax in (above, below):
    ax.grid(color="#dddddd")
figure

# %% [markdown]
# The dotted lines are the two ends, 0 and 3. Without the rule (solid), layer 2 goes to the upper one: one of its eight
# experts sees nearly every token, and the others share what is left, the second choices. With it (dashed), the load is
# uneven only at the beginning, while the biases are still on their way.
#
# Below, one line for each of the eight experts. They fan out, cross, and in the end go up and down by single steps
# around the place where the load is even. They need not stand still for that: the router goes on learning beneath them.

# %%
uneven = {label: [np.mean([m.max_violation[i] for m in runs[label][1][-40:]]) for i in (1, 2)] for label in runs}
for label, values in uneven.items():
    print(f"{label:15} MaxVio over the last 40 steps, layers 1 and 2: {np.array(values)}")
assert max(uneven["Muon, balanced"]) < 0.5 < min(uneven["Muon"])

# %% [markdown]
# The step of the bias is 0.01 here, because 200 steps are few; in GLM-4.5 it is 0.001 for the first 15 trillion tokens
# and then 0 (report, 2.4). A larger step balances sooner and trembles more.
#
# ## The record of glm-tiny
#
# Now a real run of this project. Every twentieth step stands in `metrics.jsonl` beside the weights, and the recipe
# stands there, too. First a check that the two belong together: the learning rates of the record are those of the
# recipe.

# %%
from minglm.look.curves import plot_training, read_metrics
from minglm.train.recipe import load_recipe

folder = minglm.api.find("glm-tiny")
lines = read_metrics(folder)
plan = load_recipe("glm-tiny")
steps = [line for line in lines if "main" in line]
assert all(np.isclose(line["learning_rate"], plan.at(line["step"]).learning_rate) for line in steps)
print(f"{plan.steps:,} steps, {plan.tokens:,} tokens, {len(plan.stages)} stages:", *(s.name for s in plan.stages))

# %% [markdown]
# Then the picture that a run draws of itself: losses, balance, selection biases, learning rate.

# %%
plot_training(lines, "glm-tiny", mtp_layers=1)

# %% [markdown]
# From above. The **loss** falls fast, then slowly. The MTP loss runs a little above the main one from about step 1,000
# on: two tokens ahead is harder to guess than one. At the dotted lines the stage changes, and with it the mixture of
# texts, so a jump there says that the text became easier or harder, not that the model did: the code and prose of the
# held-out texts (points) hardly move. In fine-tuning only what the assistant says counts.
#
# **MaxVio** climbs at first, as experts begin to differ, and falls as soon as the biases have fanned out far enough. It
# then stays low for four thousand steps. In the last stage the bias rate is 0, as in the report: the biases stay, the
# texts have changed, and the load is less even again. The **biases** also drift upwards together. That changes no
# choice, since only differences count. **Learning rate**: warm-up, one cosine over two stages, and a smaller one for
# fine-tuning.


# %%
def mean_violation(stage, last=20):
    chosen = [line for line in steps if line["stage"] == stage][-last:]
    return np.mean([list(line["max_violation"].values()) for line in chosen])


for stage in plan.stages:
    main = np.mean([line["main"] for line in steps if line["stage"] == stage.name][-20:])
    print(
        f"{stage.name:13} ends with loss {main:.3f}, MaxVio {mean_violation(stage.name):.2f} (mean of the layers), "
        f"bias rate {stage.bias_rate:g}"
    )
assert mean_violation("pre-training") < mean_violation("fine-tuning")

# %% [markdown]
# ## A pair that differs in one thing
#
# `glm-tiny-balanced` and `glm-tiny-unbalanced` were trained alike, from the same weights on the same texts, but for the
# balancing: the second has neither biases that move nor a balance loss.

# %%
for name in ("glm-tiny-balanced", "glm-tiny-unbalanced"):
    record = [line for line in read_metrics(minglm.api.find(name)) if "main" in line][-20:]
    violation = np.mean([list(line["max_violation"].values()) for line in record], axis=0)
    least = np.mean([min(map(min, line["load"].values())) for line in record])
    main = np.mean([line["main"] for line in record])
    print(f"{name:20} loss {main:.3f}, MaxVio by layer {violation}, least load {least:.0f}")
assert least < 1

# %% [markdown]
# Nearly the same loss, and a very different load. In the second model some expert gets no token at all. So balance is
# not bought for the loss. It is bought for the machine: where experts stand on different devices, a step takes as long
# as the busiest expert. [08a](08a-expert-load.ipynb) looks at the two in detail.
#
# ## What the ablations say
#
# One seed proves little. The project trained a model of three million parameters with one of the authors' choices
# changed at a time, with three seeds each, and every result stands in `docs/ablations/results`. The difference is taken
# within a seed, so that the luck of the draw is the same on both sides.

# %%
import json
from pathlib import Path

results = Path("../docs/ablations/results")


def held_out(run):
    texts = [(results / f"{run}-{seed}.json").read_text("utf-8") for seed in range(3)]
    return np.array([json.loads(text)["figures"]["loss"] for text in texts])


# %% [markdown]
# The held-out loss of the baseline for each seed, and then what each change adds to it: mean and standard deviation
# over the seeds, and the three differences.

# %%
print(f"baseline        {held_out('baseline')}  nats per token")
for run in ("adamw", "unbalanced", "no-mtp", "no-qk-norm", "kv-1", "no-shared", "softmax"):
    gaps = held_out(run) - held_out("baseline")
    print(f"{run:12} {gaps.mean():+7.3f} ± {gaps.std(ddof=1):.3f}   by seed {gaps}")

# %% [markdown]
# Positive is worse than GLM-4.5's choice. AdamW instead of Muon is worse by far, in each seed. Without the MTP loss the
# *next* token is predicted worse, too. One key/value head instead of two is worse, a little. No balancing, no q/k norm,
# no shared expert, a softmax gate: within the spread of the seeds, or too near to it for three of them.

# %%
muon, balance = held_out("adamw") - held_out("baseline"), held_out("unbalanced") - held_out("baseline")
assert muon.min() > 0.3
assert balance.min() < 0 < balance.max()

# %% [markdown]
# The limits, plainly: 3.1 million parameters, 2.5 million tokens, one batch size, rates chosen by one short look each.
# "No difference seen" does not mean that there is none at 355 billion parameters; some choices are for machines
# (balance), for stability over trillions of tokens (q/k norm), or for the cache. The [page](../docs/ablations.md) has
# every row, its verdict and its rule.
#
# ## What was learnt
#
# A step is gradients, a limit on their norm, an optimiser, and a nudge of the selection biases. AdamW moves every entry
# by its own measure, Muon every direction of a matrix alike. Balance comes from counting, not from gradients. Next:
# [numbers of few bits](12-small-floats.ipynb).
#
# ## Questions
#
# 1. How many steps do the converging coefficients need until three quarters of the values of `G` are above 0.68?
# 2. Train once more with `bias_rate=0.1`. What do MaxVio and the biases do, and why?
# 3. Muon was compared with AdamW at equal tokens. What else would you have to keep equal to call one of them better?
#    Look at the rows `adamw-time` of the results.
