# %% [markdown]
# # 08a · Expert load: does everybody work?
#
# *Reading 30 minutes · running 15 seconds · needs [05](05-router.ipynb), [07](07-forward-step.ipynb)*
#
# A router is free to send every token to the same two experts. Then fourteen of sixteen would never learn anything,
# and on a cluster two machines would work while the others wait. This notebook measures how evenly the work is
# shared, shows what keeps it even, and what happens without.

# %% [markdown]
# ## The question
#
# How evenly do 16 experts share a page of code? What did the selection bias do for it? Two small models help: the
# pair `glm-tiny-balanced` and `glm-tiny-unbalanced`. Same architecture, same text, same seed, 1,000 steps; in one the
# bias moved, in the other it stayed zero.

# %%
import json

import numpy as np

import minglm
from minglm.api import find
from minglm.data.heldout import heldout_documents
from minglm.look import plots, specialisation
from minglm.look.history import read_history
from minglm.look.routing import load, max_violation

np.set_printoptions(precision=3, suppress=True, linewidth=110)
text = heldout_documents("code")[0].text  # never trained on
names = ("glm-tiny", "glm-tiny-balanced", "glm-tiny-unbalanced")
models = {name: minglm.load(name) for name in names}

# %% [markdown]
# We send the first 512 tokens of a held-out file through all three and keep the routing: for each token and layer the
# K = 2 experts it went to.

# %%
ids = models["glm-tiny"].tokenizer.encode(text)[:512]
routing = {name: model.trace(ids, keep="*.mlp.expert_indices").routing for name, model in models.items()}
indices = routing["glm-tiny"].indices
print("indices [T, layer, K]:", indices.shape, "; the first token:", indices[0].tolist())

# %% [markdown]
# ## Counting
#
# The **load** of an expert is how many picks it got. With T tokens and K picks each there are K·T to share, so a fair
# share is K·T/E = 64. One layer by hand, then all with the package's function:

# %%
E, K, T = 16, 2, len(indices)
counts = np.zeros(E, int)
for token in indices[:, 0]:  # the first layer that has experts
    for e in token:
        counts[e] += 1
np.testing.assert_array_equal(counts, load(indices, E)[0])
print(counts, "fair:", K * T / E)

# %%
plots.plot_bars(indices, E, layer=0, layers=routing["glm-tiny"].layers, name="glm-tiny")

# %% [markdown]
# Sixteen bars, the dashed line is the fair share. Expert by expert it is not even: this is one page of one kind of
# text, and experts do not all like code.
#
# A single number for it is **MaxVio**, the largest load over the fair share, less one: 0 is even, and with K = 2 of 16
# the worst possible is E/K − 1 = 7, everybody at the same two. It has no absolute value in it; somebody once
# reported another number because theirs had. The other measures are the spread (CV: standard deviation over mean) and
# the share of experts without any token (dead).

# %%
max_vio = counts.max() / counts.mean() - 1
np.testing.assert_allclose(max_vio, max_violation(counts))
print(f"MaxVio {max_vio:.2f}, CV {counts.std() / counts.mean():.2f}, dead {np.mean(counts == 0):.0%} of {T} tokens")
print("all layers:", max_violation(load(indices, E)))

# %% [markdown]
# **Always say over how many tokens.** Take ten tokens: twenty picks cannot fill sixteen experts evenly, however good
# the router. Which part of a number is the router, and which is chance? Fair dice tell.

# %%
dice = np.random.default_rng(0)
for some in (10, 100, 512, 5000):
    thrown = np.argsort(dice.random((some, E)), axis=1)[:, None, :K]  # K different experts for each token
    ours = f"{max_violation(load(indices[:some], E))[0]:.2f}" if some <= T else "–"
    print(f"{some:5} tokens: dice {max_violation(load(thrown, E))[0]:.2f}   glm-tiny {ours}")

# %% [markdown]
# With ten tokens the dice look terribly unbalanced, too. From a few hundred on, what is left is the router's.
#
# ## With and without
#
# Now the pair. Both saw 4.1 million tokens.

# %%
for name in names[1:]:
    loads = load(routing[name].indices, E)
    print(f"{name:20} MaxVio {max_violation(loads)}, dead {(loads == 0).mean(axis=1)}")
worst = {name: max_violation(load(routing[name].indices, E)).max() for name in names}
assert worst["glm-tiny-unbalanced"] > 4 * worst["glm-tiny-balanced"]
plots.plot_load(routing["glm-tiny-unbalanced"].indices, E, routing["glm-tiny-unbalanced"].layers, name=names[2])

# %% [markdown]
# Each row is a layer, each column an expert; 1.00 is fair, dark red is too much, pale blue is nothing. In the first
# row two cells have nearly everything: expert 5 saw every one of the 512 tokens, and expert 12 was the other one for
# nearly all. MaxVio is at its limit of 7. Twelve experts saw nobody. The other rows are little better.
#
# The same picture for its twin:

# %%
plots.plot_load(routing["glm-tiny-balanced"].indices, E, routing["glm-tiny-balanced"].layers, name=names[1])

# %% [markdown]
# No cell is empty, and the largest is about twice the fair share: this page is code only, and the balance is kept
# over the whole mixture, not over each page.
#
# ## How did it come to that?
#
# The training kept the routing of one fixed text at several moments. The picture has the unbalanced model's layer 1:
# a column is an expert, time goes downwards.

# %%
steps, history = read_history(find(names[2]))
plots.plot_load_over_training(history, E, steps, layer=0, layers=(1, 2, 3), name=names[2])

# %% [markdown]
# At step 30 nothing is decided; at step 200 experts 5 and 12 have it all, and the columns of most others stay pale to
# the end. Who is picked more gets more gradient, becomes better, and is picked more. Those without tokens
# get no gradient at all: nothing can bring them back. Nobody decided that these two should win.
#
# **The remedy** (arXiv 2408.15664) is the selection bias of [05](05-router.ipynb). After each training step: busier
# than the mean, the bias goes down by a small rate; idler, up. Only the sign counts. There is no loss term, so
# nothing pulls at what the experts learn. The record of the training shows it step by step.


# %%
def record(name):
    lines = [json.loads(line) for line in (find(name) / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line for line in lines if "max_violation" in line]


for name in names[1:]:
    print(name)
    for line in record(name)[::25]:
        worst_of_batch = line["max_violation"]["1"]
        print(f"  step {line['step']:4}: loss {line['main']:.2f}, MaxVio of the batch in layer 1: {worst_of_batch:.2f}")

# %% [markdown]
# The loss of the two is hardly different. That is the surprise of this pair: at this size and length, idle experts
# cost little, because two busy ones and the shared expert suffice for the easy part. It is not so when there is more
# to learn. And MaxVio says what is wrong long before the loss does.
#
# ## The bias at the end
#
# What does the bias of a trained router do, at the end, token by token? We leave it out and count how many picks
# change. Predict before you run it: if balancing is so important, removing the bias should undo it.

# %%
tiny = routing["glm-tiny"]
share = specialisation.bias_effect(tiny.scores, tiny.biased_scores, K)
without = np.argsort(-tiny.scores, axis=-1, kind="stable")[..., :K]
print("picks that change:", share)
print(
    "MaxVio with the bias",
    max_violation(load(tiny.indices, E)),
    "\n without the bias    ",
    max_violation(load(without, E)),
)

# %% [markdown]
# In four layers few picks change, and the load without the bias is as even as with it. There the bias did its work
# *during* training: it kept everybody learning until all were worth picking, and then the router was even by itself.
#
# Layer 1 is the exception. Nearly a third of its picks hang on the bias, and without it MaxVio is above 4.
#
# ## What a capacity limit would have dropped
#
# Older models gave each expert room for a fixed number of tokens, and what did not fit was dropped: that token went
# without its expert. GLM-4.5 drops nothing. What would a limit of factor · K·T/E have cost on this page?

# %%
factors = (1, 1.25, 2)
for name in names:
    print(
        f"{name:20}",
        *(
            f"at {f}: {d:.0%} "
            for f, d in zip(factors, specialisation.would_drop(routing[name].indices, E, factors)[:, 0], strict=True)
        ),
    )
plots.plot_drops(tiny.indices, E, layers=tiny.layers, name="glm-tiny")

# %% [markdown]
# At the exact fair share a quarter of this page's picks would be lost even in the balanced model, since one page
# favours some experts; with twice the room next to nothing. The unbalanced one would lose most of its picks.
#
# ## Two ways to measure wrongly
#
# **Counting padding.** A batch of texts of different length is filled up, and the filling goes through the router as
# well. Nobody reads it, but counted it pretends an overload. Segments below 0 mark padding:

# %%
model = models["glm-tiny"]
padded = np.array([ids[:100] + [model.config.pad_token_id] * 100])
segments = np.where(np.arange(200) < 100, 0, -1)[None]
batch = model.trace(padded, keep="*.mlp.expert_indices", segments=segments)
everything = np.stack([batch[f"layers.{i}.mlp.expert_indices"] for i in tiny.layers], axis=1)
print("MaxVio, padding left out:", max_violation(load(batch.routing.indices, E)))
print("MaxVio, padding counted: ", max_violation(load(everything, E)))
assert len(batch.routing.indices) == 100

# %% [markdown]
# **Adding up a whole run.** If the load leans one way in the first half and the other way in the second, the sum is
# even. Take the page and a list of sums, the two together against each alone:

# %%
sums = model.trace("3+8=1 1+1=2 2+9=1 1+4=5 5+2=7 7+7=4 4+7=1 1+5=6 " * 8, keep="*.mlp.expert_indices").routing.indices
code = indices[: len(sums)]
for label, some in (("code", code), ("sums", sums), ("both", np.concatenate([code, sums]))):
    print(f"{label} ({len(some)} tokens):", max_violation(load(some, E)))
both = max_violation(load(np.concatenate([code, sums]), E))
assert (both < np.maximum(max_violation(load(code, E)), max_violation(load(sums, E)))).all()

# %% [markdown]
# Together the load is always more even than the worse of the two. So `minglm eval` gives MaxVio over a large held-out
# mixture *and* over single batches, and the training record keeps every step.
#
# ## What we have learnt
#
# Load is picks per expert; MaxVio compares the largest with the fair share, over a stated number of tokens. Left
# alone, a router collapses early. A bias that follows the sign of the error keeps it even, without a loss term, and
# by the end the routers hardly need it.
#
# Even is not the same as useful: [08b](08b-specialisation.ipynb) asks what the experts have divided among themselves.
#
# ## Questions
#
# 1. Give one expert of `glm-tiny-unbalanced` that is never picked in layer 1 a bias of 10 (`_replace` on the record,
#    as in [05](05-router.ipynb)). It is now picked by everybody. Does the loss on this page rise? Why so little, or
#    so much?
# 2. The update uses the sign of the error, not its size. What would happen to the biases of a layer in which one
#    expert is 100 times overloaded and the others are a little idle, with sign and with size?
# 3. K = 8 of E = 160 in GLM-4.5. What is the largest possible MaxVio there, and what MaxVio do dice give for a batch
#    of 4,096 tokens?
