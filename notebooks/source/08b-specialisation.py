# %% [markdown]
# # 08b · Specialisation: what does an expert know, and what would chance look like?
#
# *Reading 40 minutes · running 50 seconds · needs [08a](08a-expert-load.ipynb)*
#
# The word *expert* promises a lot: one for code, one for history. What one finds in a model is patterns, always; the
# work is to say which of them would be there anyway. So every measure in this notebook comes with a control, and most
# of the surprises are in the controls.

# %% [markdown]
# ## The question
#
# Do the experts of a mixture specialise, in what, and how much of it is more than "this token goes there"?
#
# What follows is about `glm-tiny`, a model of seven million parameters. It says nothing about what the experts of
# GLM-4.5 do. The measures and controls are those that one would use there.
#
# The text is that of [08a](08a-expert-load.ipynb), five kinds, held out. But now every row holds a piece of 64 tokens
# of each kind, in random order: if a row were all code, everything *before* a token would tell the router where it
# is.

# %%
import numpy as np

import minglm
from minglm.evaluate.domains import DOMAINS, changing_rows, heldout_streams, one_domain_rows
from minglm.look import plots, specialisation

np.set_printoptions(precision=3, suppress=True, linewidth=110)
model = minglm.load("glm-tiny")
streams = heldout_streams(model, tokens=2048)
sample = changing_rows(streams, tokens=2048)
ids, domains = sample.batch.ids, sample.domains  # [B, T] each
print("rows × tokens", ids.shape, "  kinds", DOMAINS)

# %% [markdown]
# Three routings of this text. **Ours**; that of an **untrained** model, the same config with fresh random weights;
# and a **shuffled** one, our own choices dealt out anew among all tokens. The last has the same load and no reason
# for it.


# %%
def route(model):  # -> int [T, layer, K]
    return model.trace(ids, keep="*.router_scores").routing.indices


ours = route(model)
untrained = route(minglm.new(model.config, seed=0))
shuffled = specialisation.shuffled(ours, np.random.default_rng(0))

# %% [markdown]
# For each token also its text and its kind. The load of the shuffled choices is indeed ours:

# %%
(T, layers, K), E, numbers = ours.shape, model.config.n_routed_experts, range(1, 6)
tokens = np.array([model.tokenizer.token(int(i)) for i in ids.reshape(-1)])
kind = np.array(DOMAINS)[domains.reshape(-1)]
assert np.array_equal(np.bincount(ours[:, 0].reshape(-1)), np.bincount(shuffled[:, 0].reshape(-1)))

# %% [markdown]
# ## Domains
#
# The simplest count: of the tokens of one kind, which share went to an expert? For one expert of layer 5, by hand:

# %%
expert = 5
for name in DOMAINS:
    of_kind = ours[kind == name, 4]  # [n, K], layer 5
    print(f"{name:14} {(of_kind == expert).any(axis=1).mean():6.1%} of its tokens at expert {expert}")
print(f"uniform        {K / E:6.1%}")

# %% [markdown]
# The package counts the same, for all experts, layers and kinds.

# %%
names, shares = specialisation.domain_shares(ours, kind, E)  # [domain, layer, E]
assert np.isclose(shares[names.index("direct"), 4, expert], (ours[kind == "direct", 4] == expert).any(axis=1).mean())
assert shares[names.index("direct"), 4, expert] > 2 * shares[names.index("code"), 4, expert]

# %% [markdown]
# An expert for direct answers, it seems: it gets more of their tokens than of any other kind. But direct answers are
# made of digits, signs and capital letters, and code has other tokens. Would a router that reads nothing but the
# token look different?
#
# That can be made. Shuffle the choices once more, but only among occurrences of the **same token**: whatever the
# token explains stays, and the rest goes. In the picture the short black lines are this control.

# %%
picture = {"layers": numbers, "name": model.name}
plots.plot_domains(ours, kind, E, tokens=ids.reshape(-1), **picture)

# %% [markdown]
# Bars are what each kind sent to each expert; five rows of kinds, three layers. The bars of different rows differ a
# lot. In layer 1 nearly every bar ends at its black line: there it is all the tokens. In layer 5 several bars leave
# theirs behind, among them expert 5 for direct and for worked answers, in opposite directions.
#
# ## One number for it
#
# How much does the expert tell about the kind of text? **Mutual information**, in bits: 0 if nothing, log₂ 5 = 2.3 if
# everything. It needs only the table of how often kind d met expert e.


# %%
def information(choices, labels):  # int [T, K], int [T]
    joint = np.zeros((len(DOMAINS), E))
    np.add.at(joint, (np.repeat(labels, K), choices.reshape(-1)), 1)
    joint /= joint.sum()
    apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)
    there = joint > 0
    return (joint[there] * np.log2(joint[there] / apart[there])).sum()


by_hand = np.array([information(ours[:, layer], domains.reshape(-1)) for layer in range(layers)])
found = specialisation.information(ours.reshape(*ids.shape, layers, K), ids, domains)
np.testing.assert_allclose(by_hand, found.bits)
print("layers 1 to 5", by_hand)

# %% [markdown]
# Now beside it: the shuffled choices, the untrained model, and what the token alone explains. Predict which of the
# three comes closest.

# %%
fresh = specialisation.information(untrained.reshape(*ids.shape, layers, K), ids, domains)
noise = [information(shuffled[:, layer], domains.reshape(-1)) for layer in range(layers)]
for what, bits in (
    ("ours", found.bits),
    ("shuffled", np.array(noise)),
    ("untrained", fresh.bits),
    ("explained by the token", found.control),
    ("more than the token", found.bits - found.control),
    ("  95 %, from", found.low),
    ("  95 %, to", found.high),
):
    print(f"{what:24}{bits}")

# %% [markdown]
# Three lessons in seven lines. (The last two are the middle 95 % of what comes out when rows of the text are drawn anew
# with replacement, again and again: a bootstrap.)
#
# Chance alone gives next to nothing, so the table is large enough. An untrained model gives about ten times as much as
# chance: a random matrix reads tokens too, and sends equal ones to equal places. And of what *our* model has, most is
# explained by the token, in layer 1 nine tenths. Something is left in every layer, and more of it in later ones: a
# third of what there is in layer 5.

# %%
left = (found.bits - found.control) / found.bits
assert left[0] < 0.1 < 0.3 < left[4]
assert (found.low > 0).all()
print("share that the token does not explain", left)

# %% [markdown]
# Why did the rows have to change their kind? The same measure on rows of one kind each:

# %%
rows = one_domain_rows(streams, tokens=2048)
one = model.trace(rows.batch.ids, keep="*.router_scores", segments=rows.batch.segments).routing.indices
alone = specialisation.information(one.reshape(*rows.batch.ids.shape, layers, K), rows.batch.ids, rows.domains)
print("one kind in a row", alone.bits - alone.control, "\nchanging rows    ", found.bits - found.control)
assert (alone.bits - alone.control).mean() > (found.bits - found.control).mean()

# %% [markdown]
# On average more, as one would expect where attention has seen nothing but one kind. Neither number is wrong; but the
# larger one is partly about the company, not the token.
#
# ## Vocabulary
#
# If it is the token that decides, then let us look at tokens. For each that occurs ten times or more: which expert of
# layer 1 is most often its first choice, and in which share of its occurrences?

# %%
plots.plot_vocabulary(ours, tokens, E, layer=0, **picture)

# %% [markdown]
# Sixteen lines, one for each expert, with its purest tokens. Most cells say 100 %. Expert 1 has the digits from 5 to
# 9 and expert 13 the digits from 1 to 3, expert 0 has commas and opening brackets, expert 6 has little English words,
# expert 12 closing brackets and indentation. Layer 1's router is nearly a dictionary.
#
# The mean over the tokens of their largest share, beside its controls:

# %%
flat = ids.reshape(-1)
mine = specialisation.vocabulary_specialisation(ours, flat, E)
theirs = specialisation.vocabulary_specialisation(untrained, flat, E)
for digit, expert in zip("12356789", (13, 13, 13, 1, 1, 1, 1, 1), strict=True):
    counts = np.bincount(ours[tokens == digit, 0, 0], minlength=E)  # first choices in layer 1
    assert counts[expert] > 0.9 * counts.sum()
print(f"ours {mine.share}\nuntrained {theirs.share}\nshuffled {mine.control}   ({mine.tokens} tokens)")

# %% [markdown]
# Ours is far above shuffled choices; and so is the *untrained* model. Nobody taught it anything: equal tokens have
# equal embeddings, so even a random router treats them alike. So the height of the first line is by itself no sign of
# training; what is above the second is. In later layers the share is lower, in both, as the stream fills with other
# things than the token.
#
# Beware of rare tokens. One that occurs once goes to one expert in 100 % of its occurrences. Without the minimum of
# ten:

# %%
careless = specialisation.vocabulary_specialisation(ours, flat, E, min_count=1)
print(
    f"with a minimum of 10: shuffled choices {mine.control}\nwithout:              shuffled choices {careless.control}"
)
assert (careless.control > 2 * mine.control).all()

# %% [markdown]
# Dealt-out choices, in which nothing is left of any reason, now look half specialised.
#
# ## Thinking and answering at once
#
# Where does the token explain the least? Between two kinds of text that are made of the same tokens: direct answers
# (`2+3=5`) and worked ones, where the steps are written out before the answer. That is what thinking looks like in
# this model.


# %%
def between(a, b, by=ids):  # `by`: what the control keeps
    some = (domains == DOMAINS.index(a)) | (domains == DOMAINS.index(b))
    B = len(ids)
    choices = ours.reshape(*ids.shape, layers, K)[some].reshape(B, -1, layers, K)
    return specialisation.information(choices, by[some].reshape(B, -1), domains[some].reshape(B, -1))


for a, b in (("code", "prose"), ("direct", "worked")):
    pair = between(a, b)
    print(f"{a} and {b}: bits {pair.bits}\n    by the token {pair.control}, more, at least {pair.low}")

# %%
pair = between("direct", "worked")
assert (pair.low > 0).all()
assert pair.control[4] < 0.2 * pair.bits[4]
assert (between("code", "prose").control > 0.3 * between("code", "prose").bits).all()

# %% [markdown]
# Code and prose: little, and much of it the tokens. Direct and worked: small numbers too (of at most 1 bit), but in
# layers 2 and 5 nine tenths of them are *not* the tokens. A digit goes to one expert in a direct answer, to another
# one in a worked step. Look at layer 2, first choices of the digits:

# %%
digits = np.isin(tokens, list("0123456789"))
for name in ("direct", "worked"):
    where = np.bincount(ours[digits & (kind == name), 1, 0], minlength=E)
    print(f"{name:7} {where}   of {where.sum()}")
    assert (where.argmax(), name) in ((0, "direct"), (7, "worked"))

# %% [markdown]
# In direct answers expert 0 has most digits; in worked ones expert 7 has more than expert 0. Where in the text
# does it come in? One product, with both kinds of answer, and the first choice of each token in layer 2:

# %%
from minglm.data.tasks import TASKS, plain
from minglm.evaluate.domains import some_heldout

item = some_heldout(TASKS["multiplication"], 3, seed=0)[2]
for thinking in (False, True):
    trace = model.trace("".join(plain(item, thinking)), keep="*.router_scores")
    first = trace.routing.indices[:, 1, 0]
    assert (7 in first) == (14 in first) == thinking
    print(*[f"{t}→{e}" for t, e in zip(trace.tokens, first, strict=True)])

# %% [markdown]
# A token, an arrow, its first expert. In the second line the steps begin after the first `:↵`. No digit of the question
# goes to expert 7, and none of the answer; in the steps between, three do, and others go to experts that had no digit
# in the first line, such as 14.
#
# Is that expert "for thinking"? A simpler account is always possible: it may read what stands just before. Make the
# control stricter, and let it keep all that a token *and the one before it* explain.

# %%
before = np.pad(ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
two = (before.astype(np.int64) + 1) * model.config.vocab_size + ids
stricter = between("direct", "worked", by=two)
assert (stricter.control[1:] < 0.5 * stricter.bits[1:]).all()
print("bits", stricter.bits, "\none token explains", pair.control, "\ntwo tokens explain", stricter.control)

# %% [markdown]
# Two tokens explain more than one, though a pair that occurs in one of the two kinds only counts as explained. From
# layer 2 on it is still less than half. What is left needs more than these two tokens. We have not shown that it is
# about *thinking*; we have shown that it is not the token, and not only its neighbour.
#
# ## Who is picked together
#
# A token's two experts may be a team. **Co-activation** counts, for each pair, the tokens that picked both: $N_{ij}$.
# The **lift** divides by what independent choices would give.

# %%
picked = np.zeros((T, E))
np.put_along_axis(picked, ours[:, 4].astype(int), 1, axis=1)  # layer 5, who was picked: 0 or 1
together = picked.T @ picked  # [E, E]
alone = picked.sum(axis=0)
lift = together * T / np.outer(alone, alone)
np.testing.assert_allclose(lift, specialisation.coactivation_lift(ours, E, layer=4))
print(f"dice would give {specialisation.random_coactivation(E, K, lift=True):.2f} for each pair")
plots.plot_coactivation(ours, E, layer=4, lift=True, **picture)

# %% [markdown]
# Most cells are light, a few dark ones stand out: experts 3 and 7 are picked together 3.49 / 0.53, more than six times
# as often as dice would do it. (Dice give less than 1, as the two experts of a token must differ.)
#
# Teams? Ask the controls. Shuffling is useless here: it deals out whole pairs, so every pair survives. What about
# models that were never trained?


# %%
def largest(choices):  # the largest lift of a pair, in each layer
    found = np.array([specialisation.coactivation_lift(choices, E, layer) for layer in range(layers)])
    return np.where(np.eye(E, dtype=bool), 0, np.nan_to_num(found)).max(axis=(1, 2))


# %%
np.testing.assert_allclose(largest(shuffled), largest(ours))
fresh = np.array([largest(untrained)] + [largest(route(minglm.new(model.config, seed=s))) for s in range(1, 5)])
print("ours     ", largest(ours))
for seed, each in enumerate(fresh):
    print(f"untrained, seed {seed}", each)
assert (largest(ours) > np.median(fresh, axis=0)).all()
assert (fresh > largest(ours)).sum(axis=0).tolist() == [0, 0, 1, 2, 1]
strange = np.where(np.eye(E, dtype=bool), 0, np.nan_to_num(specialisation.coactivation_lift(untrained, E, 3)))
pair = np.unravel_index(strange.argmax(), (E, E))
print(
    "tokens of the strongest pair's two experts:", np.bincount(untrained[:, 3].ravel())[list(pair)], "fair:", K * T // E
)

# %% [markdown]
# Ours is above the median of five untrained models in every layer, and out of their reach in two; in the three others
# one or two of the five have a stronger pair. (The strongest of all belongs to an expert that got 80 tokens, where
# 1,280 are fair: uneven loads make lifts.) So part of a lift is there before training, and *one* untrained model is no
# control: with the first seed alone we would have said that training makes no difference, with another that it makes a
# large one.
#
# ## Paths from layer to layer
#
# Which way do tokens take through the layers? First choices only, layers 1, 3 and 5.

# %%
plots.plot_paths(ours, E, least=1.0, **picture)

# %% [markdown]
# Boxes are experts, as high as their share of the tokens, bands the tokens on their way; the smallest experts are in
# the grey boxes. Some bands are broad: many tokens share a way. Compared to what?


# %%
def broadest(choices):
    found = specialisation.paths(choices)
    return (
        f"{len(found.counts):5,} different ways; the ten most used have {found.counts[:10].sum() / T:.0%} of the tokens"
    )


same_token = specialisation.shuffled(ours, np.random.default_rng(1), within=flat)
for what, choices in (("ours", ours), ("shuffled", shuffled), ("among equal tokens", same_token)):
    print(f"{what:20}{broadest(choices)}")
counts = [specialisation.paths(c).counts[:10].sum() for c in (ours, shuffled, same_token)]
assert counts[1] < 0.1 * counts[0] < 0.8 * counts[0] < counts[2]

# %% [markdown]
# Against shuffled choices it is striking. But keep each token's choices and shuffle only among its own occurrences,
# each layer for itself, so that no path is left but for what the token says: nearly the same. The broad ways are the
# ways of frequent tokens.
#
# ## When did it settle?
#
# The training kept the routing of one text at sixteen moments. **Saturation** is the share of a token's experts, at a
# moment, that are still its experts at the end.

# %%
from minglm.look.history import read_history

steps, history = read_history(minglm.api.find("glm-tiny"))  # [moment, T, layer, K]
same = (history[4][..., :, None] == history[-1][..., None, :]).any(axis=-1)  # moment 4: each of K, is it in the last?
np.testing.assert_allclose(same.mean(axis=(0, 2)), specialisation.saturation(history)[4])
by_load = specialisation.overlap(specialisation.shuffled(history[-1], np.random.default_rng(0)), history[-1])
print(f"step {steps[4]}: {same.mean(axis=(0, 2))}   shuffled: {by_load}   K/E: {K / E}")
plots.plot_saturation(history, steps=steps, experts=E, **picture)

# %% [markdown]
# Lines for five layers, over the steps (on a log scale), from chance at the bottom to 100 % at the end. By step 500,
# a twelfth of the run, half of the final experts are in place; then it goes slowly.
#
# Two cautions. The last point is 100 % by definition, and points near it are high because weights near the end hardly
# move as the learning rate falls. And it is one text, with tokens that come again and again.
#
# ## Load is not importance
#
# What is an expert *worth*? Take it away and see. A tap can do that: it sets the expert's biased score to −∞, and the
# next one in order takes its place. The cost is how many bits more the model needs for each token.


# %%
def bits(batch, tap=None):  # -> [B, T]: −log₂ p(next token)
    z = model.forward(batch.ids, segments=batch.segments, tap=tap).logits.astype(np.float64)
    z -= z.max(axis=-1, keepdims=True)
    wanted = np.take_along_axis(z, np.maximum(batch.targets, 0)[..., None], axis=-1)[..., 0]
    return np.where(batch.targets >= 0, (np.log(np.exp(z).sum(axis=-1)) - wanted) / np.log(2), np.nan)


def without(layer, expert):
    def tap(name, array):
        if name == f"layers.{layer}.mlp.biased_scores":
            return np.where(np.arange(E) == expert, -np.inf, array)  # [N, E]
        return None  # leave it as it is

    return tap


# %% [markdown]
# One expert of layer 3, on eight rows of worked answers. Averaged over the kinds of text it has the smallest load of
# the layer, as it happens.

# %%
from minglm.evaluate.domains import some_of_each

batches = dict(some_of_each(rows, 8))
worked = batches["worked"]
full = bits(worked)
cost = np.nanmean(bits(worked, without(3, 1)) - full)
print(f"{np.nanmean(full):.3f} bits a token; without expert 1 of layer 3 {cost:+.3f}")

# %% [markdown]
# All sixteen, on all five kinds. The package does the same and starts at layer 3, as nothing changes before it.

# %%
from minglm.evaluate.removal import removal_costs

costs, errors, loads = np.zeros((3, E, len(DOMAINS)))
for d, batch in enumerate(batches.values()):
    for (_, e), found in removal_costs(model, batch, minglm.model.ops, layers=[3]):
        costs[e, d], errors[e, d], loads[e, d] = found
np.testing.assert_allclose(costs[1, DOMAINS.index("worked")], cost, rtol=0.01)
plots.plot_removal(costs, DOMAINS, loads, 3, errors, K, rows.batch.ids.size, model.name)

# %% [markdown]
# Left, the loads: all near the dashed line, since the model is balanced. Right, the costs: one dark cell, and the rest
# small, most of them in brackets, within two standard errors of nothing (a standard error: by how much such a mean
# would vary with other tokens). Of eighty cells about four would lie outside by chance; 34 do, 32 of them above zero.
# Two lie below: direct and worked answers are predicted better *without* expert 11.

# %%
clear = np.abs(costs) > 2 * errors
print(clear.sum(), "of 80 beyond two standard errors,", (clear & (costs > 0)).sum(), "of them above zero")
assert abs(clear.sum() - 34) <= 2  # two lie near the border: another machine's rounding may move them
assert np.array_equal(np.unique(np.nonzero(clear & (costs < 0))[0]), [11])
by_kind = dict(zip(DOMAINS, loads[1].round(3), strict=True))
print("share of the picks at expert 1, by kind:", by_kind, "fair:", 1 / E)

# %% [markdown]
# Averaged over the kinds expert 1 has the smallest load, and the largest cost. Is it precious and idle? Look at the
# kinds: on worked answers, where it is missed, it is the *busiest* of the sixteen. The average hid it, as in
# [08a](08a-expert-load.ipynb). Expert 5 has the largest load on average and costs little, on no kind more than 0.05
# bits: the next in order does nearly as well.

# %%
order = loads.mean(axis=1).argsort()
assert (order[0], order[-1]) == (1, 5)
assert np.unravel_index(costs.argmax(), costs.shape) == (1, DOMAINS.index("worked"))
assert loads[:, DOMAINS.index("worked")].argmax() == 1
assert abs(costs[5]).max() < 0.05

# %% [markdown]
# How much does load tell, then? The card of `glm-tiny` has loads and costs of all five layers, eighty experts, five
# kinds each. Predict both numbers: with load and cost averaged over the kinds, and with both taken on the same kind.

# %%
import json

card = json.loads((minglm.api.find("glm-tiny") / "eval.json").read_text("utf-8"))
table = next(each["rows"] for each in card["tables"] if "removing" in each["title"])
load, cost = (np.array([[row[what][k] for k in DOMAINS] for row in table]) for what in ("loads", "costs"))  # [80, 5]
averaged = np.corrcoef(load.mean(axis=1), cost.mean(axis=1))[0, 1]
same_kind = np.corrcoef(load.reshape(-1), cost.reshape(-1))[0, 1]
print(f"correlation of load and cost: averaged {averaged:.2f}, on the same kind {same_kind:.2f}")
above = load > 1 / E
print(
    f"mean cost where the load is above the fair share {cost[above].mean():.3f} bits, below {cost[~above].mean():.3f}"
)
assert 0.1 < averaged < same_kind < 0.35

# %% [markdown]
# They go together, a little: what is busy on a kind of text is dearer on it, on average. It is far too little to read
# the one off the other. Which ones are the dearest, and for which kind?

# %%
dearest = sorted(table, key=lambda row: -row["cost"])[:4]
assert {row["layer"] for row in dearest} == {1, 2}
for row in dearest:
    place = f"layer {row['layer']}, expert {row['expert']:2}"
    print(f"{place}: {row['load']:.1%} of the picks (fair: 6.2%), {row['worst']} {row['cost']:+.2f} bits")

# %% [markdown]
# They stand in the first two layers that have experts, and are dear for direct or worked
# answers.
#
# And removal has its own limits. A model that had been *trained* without the expert would have spread its work. Costs
# need not add up either: two experts that can replace each other would cost nothing apiece, and much as a pair.
#
# ## What was learnt
#
# `glm-tiny`'s routing looks specialised in every way that people plot, and most of what is seen is the token: its
# domain differences, its dictionary, its paths. Some is not, more in later layers, most clearly between worked and
# direct answers. Strong pairs exist before training, though mostly weaker ones, and so does much of the dictionary. An
# expert's average load is a poor guide to its worth, its load on one kind of text a slightly better one.
#
# Next: [09](09-mtp.ipynb), the layer behind the last one. [15](15-patching.ipynb) comes back to taking parts away.
#
# ## Questions
#
# 1. How do the largest lifts change, ours and the untrained ones, if experts with less than a quarter of the fair share
#    are left out? How many seeds do you need to say "ours is unusual"?
# 2. Find a token with two first choices in layer 5, each in a third of its occurrences or more. Which tokens stand
# before it in the one case and in the other?
# 3. Take away expert 1 *and* another one of layer 3 (`np.isin(np.arange(E), [1, other])` in the tap). For which pairs
# is the cost on worked answers more, or less, than the sum of both?
