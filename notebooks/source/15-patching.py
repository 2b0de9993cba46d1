# %% [markdown]
# # 15 · Patching: what happens if this part is not there?
#
# *Reading 40 minutes · running 50 seconds · needs [07](07-forward-step.ipynb) and [13](13-thinking-and-tools.ipynb)*
#
# A trace shows what a part computes. It does not show what the part is *for*. A head may look at the right token
# without anything depending on it; an expert may be busy and dispensable. To find out, one has to interfere: change
# one array in the middle of the computation, let the rest run on, and look at what comes out.

# %% [markdown]
# ## The question
#
# In GLM-4.5 a token passes 92 layers with 96 heads and 8 of 160 experts in each. Which of them does an answer need?
# Here the question is asked of `glm-tiny`, first about experts and bits per byte, then about one digit: on which way
# does it get from the question into the answer?
#
# Every intervention in this notebook has a **control**: the same amount of disturbance without the cause that is
# claimed. Almost any change of a model makes it worse. The question is whether this one makes it worse than others.

# %%
import numpy as np

import minglm
from minglm.data.heldout import heldout_documents
from minglm.evaluate.confidence import bootstrap
from minglm.look import plots
from minglm.model import softmax

np.set_printoptions(precision=3, suppress=True, linewidth=110)
model = minglm.load("glm-tiny")
tokenizer, config = model.tokenizer, model.config

# %% [markdown]
# The text: pieces of 128 tokens from the frozen code that no training saw. There are 24 of them, because a single
# piece would not show which differences are chance.
#
# A share of bits needs bytes below the line, so each piece's bytes are counted too.

# %%
encoded = [tokenizer.encode(document.text) for document in heldout_documents("code")]
text = np.array([e[s : s + 128] for e in encoded for s in range(0, len(e) - 128, 1024)][:24])  # [B, T]
size = np.array([sum(len(tokenizer.token_bytes(int(i))) for i in row[1:]) for row in text])  # bytes [B]
print("B, T =", text.shape, "tokens of held-out code,", size.sum(), "bytes")

# %% [markdown]
# ## A tap may answer
#
# Every step hands its array to a tap, `tap(name, array)`. So far taps have only looked. If a tap **returns** an array
# of the same shape, the model goes on with that one. Here layer 1's shared expert is silenced: its answer becomes 0.


# %%
def at(step, change):
    """A tap that changes one step's array and leaves all others alone."""
    return lambda name, array: change(array) if name == step else None


# %% [markdown]
# Is the array really replaced? What layer 1 adds should now be the routed experts' part alone.

# %%
silent = at("layers.1.mlp.shared", lambda array: 0 * array)
trace = model.trace(text[:1], keep="layers.1.mlp.*", tap=silent)
np.testing.assert_array_equal(trace["layers.1.mlp.out"][0], trace["layers.1.mlp.routed"])
print(trace["layers.1.mlp.out"].shape, "equal")

# %% [markdown]
# The ruler is bits per byte ([04b](04b-generation.ipynb)): how much worse is the text predicted? The 24 pieces are
# compared one by one with the healthy model, and a bootstrap over the pieces gives the interval.


# %%
def bits(tap=None, model=model):  # -> [B]
    probs = softmax(model.forward(text, tap=tap).logits[:, :-1])
    return -np.log2(np.take_along_axis(probs, text[:, 1:, None], axis=-1)[..., 0]).sum(axis=1)


# %% [markdown]
# Measured once for the healthy model; everything else is compared with this.
#
# `rise` gives three numbers: the mean, and the two ends of its interval.

# %%
before = bits()


def rise(tap=None, model=model):
    """Bits per byte more than before, and the 95 % interval."""
    units = np.stack([bits(tap, model) - before, size], axis=1)
    low, high = bootstrap(units, lambda total: total[0] / total[1], draws=400)
    return np.array([units[:, 0].sum() / size.sum(), low, high])


print(f"healthy: {before.sum() / size.sum():.3f} bits per byte; layer 1's shared expert silent:", rise(silent))

# %% [markdown]
# ## The shared expert, layer by layer
#
# A small rise. Is it the loss of *that answer*, or would any push of that size do as much? The control leaves the
# answer in place and adds noise to it, row by row exactly as long as the answer itself. So the residual stream is
# moved just as far as by silencing, in a direction that means nothing.

# %%
rng = np.random.default_rng(0)


def as_long(array):
    """Noise; each row as long as that of the array."""
    drawn = rng.standard_normal(array.shape).astype(array.dtype)
    return drawn * np.linalg.norm(array, axis=-1, keepdims=True) / np.linalg.norm(drawn, axis=-1, keepdims=True)


# %% [markdown]
# Now each of the five shared experts, silenced and pushed.

# %%
shared = []  # [layer, silent or pushed, (rise, low, high)]
for layer in range(1, 6):
    step = f"layers.{layer}.mlp.shared"
    shared.append([rise(at(step, lambda a: 0 * a)), rise(at(step, lambda a: a + as_long(a)))])
    print(f"layer {layer}: silent {shared[-1][0]}, pushed as far by noise {shared[-1][1]}")
shared = np.array(shared)
assert (shared[:, 0, 0] > shared[:, 1, 0]).all()
assert (shared[2:, 1, 1] > 0).all()
assert shared[4, 1, 0] > shared[4, 0, 0] / 2

# %%
picture = plots.Picture(figsize=(8, 3.4), layout="constrained")
axes = picture.add_subplot(xlabel="layer", ylabel="rise in bits per byte (95 %)", xticks=range(1, 6))
looks = (("silent", "#0072b2", "o", -0.08), ("control: pushed as far by noise", "#d55e00", "s", 0.08))
for which, (label, colour, marker, shift) in enumerate(looks):
    value, low, high = shared[:, which].T
    span = [value - low, high - value]
    axes.errorbar(np.arange(1, 6) + shift, value, span, fmt=marker, color=colour, capsize=3, label=label)
axes.axhline(0, color="black", linestyle="--")
axes.set_title(f"shared expert of each layer, glm-tiny, {text.size:,} tokens of code")
axes.legend(fontsize=9, loc="upper left")
picture

# %% [markdown]
# Circles are the silenced shared expert, squares the control; the dashed line is no change. In every layer the circle
# is above the square: the answer matters, and not only because something is moved.
#
# But from layer 3 on the squares are clearly above the line too, in layer 5 by more than half of the circle. Without
# the control we would have taken the whole rise for the worth of the expert.
#
# ## Removing an expert: two meanings
#
# What is "without expert 11 of layer 5"? Either its answer is replaced by nothing, and its weight is lost. Or the
# router may not pick it, and the next expert in order takes its place. The second is what happens if an expert is
# pruned from a model. `without_expert` does it with the selection bias.

# %%
from minglm.evaluate.removal import removal_costs, without_expert

step = "layers.5.mlp.experts.11.out"
pruned = minglm.Model(config, without_expert(model.params, config, layer=5, expert=11), tokenizer)
picks = pruned.trace(text[:2], keep="layers.5.mlp.expert_indices")["layers.5.mlp.expert_indices"]
assert not (picks == 11).any()
print("silent ", rise(at(step, lambda a: 0 * a)))
print("pruned ", rise(model=pruned))
print("control", rise(at(step, lambda a: a + as_long(a))))

# %% [markdown]
# The two meanings cost about the same here: the expert that steps in makes up for nothing. The control costs far
# less.
#
# Now all 80 experts, pruned in turn, beside their **load**, the share of the picks that each got. An expert that many
# tokens picked, is it the one that is missed? (This loop knows that the layers before the pruned one compute what they
# did, so they run once; it counts in bits per *token*.)

# %%
from minglm.data.batches import IGNORE, Batch
from minglm.evaluate.passes import operations

targets = np.append(text[:, 1:], np.full((len(text), 1), IGNORE), axis=1)
with operations(model) as ops:  # the compiled ones: it is a long loop
    costs = dict(removal_costs(model, Batch(text, targets, np.zeros_like(text)), ops))

# %% [markdown]
# The result is a table by layer and expert. Its errors are those of a mean over tokens.

# %%
load = np.array([cost.load for cost in costs.values()]).reshape(5, 16)
missed = np.array([cost.bits for cost in costs.values()]).reshape(5, 16)
error = np.array([cost.error for cost in costs.values()]).reshape(5, 16)
order = np.argsort(-missed, axis=None)[:5]
print(
    "dearest:",
    [f"layer {i // 16 + 1} expert {i % 16}: {missed.flat[i]:+.3f} at load {load.flat[i]:.1%}" for i in order],
)

# %%
picture = plots.Picture(figsize=(8, 4), layout="constrained")
axes = picture.add_subplot(xlabel="load: share of the layer's picks", ylabel="bits per token when pruned")
looks = zip(("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#555555"), "os^Dx", strict=True)
for i, (colour, marker) in enumerate(looks):
    axes.scatter(load[i], missed[i], color=colour, marker=marker, label=f"layer {i + 1}")
axes.axvline(1 / 16, color="black", linestyle="--", label="uniform load, 1/16")
axes.axhline(0, color="black", linewidth=0.8)
axes.set_title(f"glm-tiny, K = 2 of E = 16, {text.size:,} tokens of code")
axes.legend(fontsize=9, ncols=2)
picture

# %% [markdown]
# Each mark is an expert. The cloud rises to the right: who sees few tokens cannot be missed much. But it fans out.
# Around the dashed line, where all have about the same load, how far apart are the costs?


# %%
fair = np.abs(load - 1 / 16) < 0.02
together = np.corrcoef(*(np.argsort(np.argsort(each, axis=None)) for each in (load, missed)))[0, 1]
print(f"rank correlation of load and cost, 80 experts: {together:.2f}")
print(f"{fair.sum()} experts near the uniform load: cost {missed[fair].min():+.4f} to {missed[fair].max():+.4f}")
print(f"of them more than two standard errors from 0: {(missed[fair] > 2 * error[fair]).sum()}")
assert 0.3 < together < 0.8
assert missed[fair].max() > 20 * missed[fair].min()
assert 0 < (missed[fair] < 2 * error[fair]).sum() < fair.sum() / 2

# %% [markdown]
# Of experts with about the same load, the dearest costs more than twenty times what the cheapest costs, and some
# cannot be told from 0. So load says something about importance, the correlation is not small, but it is not the same:
# it says how often an expert is asked, not what would be lost without it. And this is the
# loss on code only: on sums other experts are dear ([the model's card](../weights/glm-tiny/README.md) has a table).
#
# ## Forcing an expert
#
# The opposite of removing: the tap on `expert_indices` may send tokens where it likes, as long as each has K different
# experts. The weights follow the picks. In layer 4 we force one expert on every token, in place of its second choice
# (or leave the token, if it has the expert already).


# %%
def force(expert):
    def change(indices):
        lacking = ~(indices == expert).any(axis=1)
        return np.where(lacking[:, None] & [False, True], expert, indices)

    return at("layers.4.mlp.expert_indices", change)


# %% [markdown]
# Do the weights follow? They should be the forced experts' own scores, normalised as always. Then the cost of three
# experts: 10, one of the dearest to remove, and 2 and 14.

# %%
trace = model.trace(text[:1], keep="layers.4.mlp.*", tap=force(10))
chosen = np.take_along_axis(trace["layers.4.mlp.router_scores"], trace["layers.4.mlp.expert_indices"], axis=1)
by_hand = chosen / chosen.sum(axis=1, keepdims=True) * config.routed_scaling_factor
np.testing.assert_allclose(trace["layers.4.mlp.expert_weights"], by_hand, rtol=1e-5)
assert len(trace["layers.4.mlp.experts.10.tokens"]) == 128
print({expert: rise(force(expert)) for expert in (2, 10, 14)})

# %% [markdown]
# Expert 10 was one of the dearest to remove. Is it then a good one to have? The controls: a *random* second choice for
# each token, and a random first choice.


# %%
def shuffled(place):
    """Another expert, drawn for each token, at place 0 (first choice) or 1 (second)."""

    def change(indices):
        drawn = np.argsort(rng.random((len(indices), 16)), axis=1)[:, :3]  # three different ones: one of them is free
        free = (drawn[:, :, None] != indices[:, None]).all(axis=2).argmax(axis=1)
        changed = indices.copy()
        changed[:, place] = np.take_along_axis(drawn, free[:, None], axis=1)[:, 0]
        return changed

    return at("layers.4.mlp.expert_indices", change)


# %% [markdown]
# Which of the two will cost more, and how many times?

# %%
second, first = rise(shuffled(1)), rise(shuffled(0))
print("random second choice", second, "\nrandom first choice ", first)
assert first[1] > 3 * second[2] / 2
assert all(abs(rise(force(expert))[0] - second[0]) < 0.006 for expert in (2, 10, 14))

# %% [markdown]
# Whoever is forced, it costs about as much as a random expert: what is lost is the second choice, not more. Expert 10
# is dear because its *own* tokens need it; to the others it is no help. And the first choice is worth several times the
# second. That agrees with the weights, of which the first has the larger part.
#
# ## From text to one fact
#
# Bits per byte are an average over everything. Now a single fact. In [13](13-thinking-and-tools.ipynb) `glm-tiny`
# added digits in written steps. In each step it must **copy** a digit of the question. We stop it just before:
#
#     6+8+3+3+4+6+7+9 mod 10   <think>6+8=4 4+
#
# The next token must be the third number, 3. Two prompts that differ in nothing but this digit: what each predicts is
# known, and any difference inside comes from that one token. We take sixteen such pairs with random numbers.

# %%
from minglm.text.template import ChatTemplate

template: ChatTemplate = model.chat_template
digits = np.array([tokenizer.encode(str(n))[0] for n in range(10)])  # digit -> id


def prompt(numbers):
    """A sum, thought through up to where the third number must be copied."""
    a, b = numbers[:2]
    question = "+".join(map(str, numbers)) + " mod 10"
    asked = template.render([{"role": "user", "content": question}])
    return tokenizer.encode(f"{asked}\n<think>{a}+{b}={(a + b) % 10} {(a + b) % 10}+")


# %% [markdown]
# Clean numbers, and changed ones whose third is another digit. Then it is checked that each pair of prompts differs at
# one place only; otherwise nothing below could be attributed to it.

# %%
numbers = rng.integers(1, 10, (16, 8))
others = numbers.copy()
others[:, 2] = (numbers[:, 2] + rng.integers(1, 9, 16) - 1) % 9 + 1  # another digit, 1 … 9
clean, changed = np.array([prompt(n) for n in numbers]), np.array([prompt(n) for n in others])  # [B, T] ×2
source = np.flatnonzero((clean != changed).any(axis=0))
print([tokenizer.token(int(i)) for i in clean[0]], "\ndiffer at", source, "of", clean.shape[1])
assert source.tolist() == [8]

# %% [markdown]
# The **gap** is the logit of the one digit minus that of the other, at the last place. It is large and positive in the
# clean prompts and negative in the changed ones.

# %%
row = np.arange(16)


def gap(ids, tap=None):
    logits = model.forward(ids, tap=tap).logits[:, -1]
    return logits[row, digits[numbers[:, 2]]] - logits[row, digits[others[:, 2]]]


# %% [markdown]
# If the model could not do the task, there would be nothing to explain. It must get all 32 right.

# %%
kept = model.trace(clean)  # every array of the clean run
up, down = gap(clean), gap(changed)
print(f"mean gap: clean {up.mean():+.1f}, changed {down.mean():+.1f}")
assert up.min() > 0 > down.max()  # right in all 32

# %% [markdown]
# ## Patching one state
#
# Now run the *changed* prompts, and at one place, after one layer, put in the residual stream of the clean run.
# Everything else stays changed. If the gap comes back, this state carries the digit. The effect is the share of the
# way from the changed gap to the clean one: 0 is nothing, 1 is all.
#
# Which states will do it? Write down a guess: at which places, after which layers?


# %%
def effect(tap):
    return ((gap(changed, tap) - down) / (up - down)).mean()


def put(step, place, array=None):
    """The clean run's array at one step and place (or another array there)."""

    def change(current):
        current = current.copy()
        current[:, place] = kept[step][:, place] if array is None else array
        return current

    return at(step, change)


# %% [markdown]
# Seven steps times some places: around the digit, in the middle, and the last four.

# %%
steps = ["embed_tokens", *(f"layers.{i}.out" for i in range(6))]
places = [*range(6, 11), 21, *range(30, 34)]
carried = np.array([[effect(put(step, place)) for place in places] for step in steps])  # [7, places]
names = [f"{place}:{tokenizer.token(int(clean[0, place]))}" for place in places]
plots.plot_array(
    carried.round(2) + 0.0, "step place", "effect of one patched state, rounded", rows=steps, columns=names
)

# %% [markdown]
# Two columns have numbers, all others are 0 or nearly. At place 8, the digit itself, the effect is 1 from the embedding
# to `layers.2.out`, almost 1 after layer 3, and 0 after layer 4. At the last place, 33, it is the other way round: 0 at
# first, a little after layer 3, and 1 after layer 4.
#
# So the digit stays where it stands for four layers, and in **layer 4** it moves to the place where it is needed. None
# of the other places that we looked at takes part.
#
# In numbers, so that no colour decides:

# %%
at_source, at_end = carried[:, places.index(8)], carried[:, places.index(33)]
assert (at_source[:5] > 0.9).all()
assert (at_source[5:] < 0.01).all()
assert (at_end[:4] < 0.01).all()
assert (at_end[5:] > 0.99).all()
between = np.delete(carried, [places.index(8), places.index(33)], axis=1)
print(f"largest effect at any other place looked at: {np.abs(between).max():.3f}")
assert np.abs(between).max() < 0.05

# %% [markdown]
# The control: at the same places a push *as large* as the patch, in a random direction. If any disturbance there would
# flip the answer, we would have learnt nothing.

# %%
held = model.trace(changed)
for place in (8, 33):
    pushed = [held[s][:, place] + as_long(kept[s][:, place] - held[s][:, place]) for s in steps]
    control = np.array([effect(put(s, place, array)) for s, array in zip(steps, pushed, strict=True)])
    print(f"place {place}: patched {carried[:, places.index(place)]}, noise {control}")
    assert np.abs(control).max() < 0.35

# %% [markdown]
# Noise moves the gap a little, and never near 1. What is carried is the digit, not a disturbance.
#
# ## Which heads carry it
#
# Only attention moves anything between places, so it must be heads. Patch each of the 36 alone, at the last place:
# swap its mix of values for that of the clean run.


# %%
def put_head(layer, head, where=slice(-1, None)):
    step = f"layers.{layer}.self_attn.heads"

    def change(current):
        current = current.copy()
        current[:, where, head] = kept[step][:, where, head]
        return current

    return at(step, change)


# %% [markdown]
# Six layers times six heads:

# %%
heads = np.array([[effect(put_head(layer, head)) for head in range(6)] for layer in range(6)])
plots.plot_array(
    heads.round(2) + 0.0, "layer head", "effect of one patched head, rounded", rows=range(6), columns=range(6)
)

# %% [markdown]
# Heads 3 and 5 of layer 4, with nearly half of the effect each. Head 3 of layer 3 does a little. The other 33 do
# next to nothing: less than a fiftieth, the assert below says.
#
# Do they look at the digit? And do only they look?

# %%
carriers = [(3, 3), (4, 3), (4, 5)]
assert all(np.abs(heads[i, h]) < 0.02 for i in range(6) for h in range(6) if (i, h) not in carriers)
looking = np.stack([kept[f"layers.{layer}.self_attn.probs"][:, :, -1, 8].mean(axis=0) for layer in range(6)])
print("attention from the last place to the digit, [layer, head]\n", looking)
assert (looking[4, [3, 5]] > 0.7).all()
assert looking[4, 1] > looking[3, 3]
assert np.abs(heads[4, 1]) < 0.05

# %% [markdown]
# The two carriers put most of their attention on it. But head 1 of layer 4 looks there as well, with more weight than
# the small carrier of layer 3, and its patch does nothing. An attention picture alone would have named it. Looking is
# not carrying: what counts is what the value holds, and what the rest of the model does with it.
#
# ## Ablating heads
#
# Patching asked what is *enough* to bring the digit. The other question is what is *needed*: silence a head, and see
# whether the right digit is still predicted. Guess for head 3, for head 5, and for both.


# %%
def silence(pairs):
    """Heads (layer, head) that say nothing at the last place."""

    def tap(name, array):
        for layer, head in pairs:
            if name == f"layers.{layer}.self_attn.heads":
                array = array.copy()
                array[:, -1, head] = 0
        return array

    return tap


# %% [markdown]
# The controls are all other pairs of heads of the same layer.


# %%
def right(pairs):
    return (model.forward(clean, tap=silence(pairs)).logits[:, -1].argmax(-1) == digits[numbers[:, 2]]).mean()


pairs = [(x, y) for x in range(6) for y in range(x + 1, 6) if (x, y) != (3, 5)]
control = [right([(4, x), (4, y)]) for x, y in pairs]
print(f"head 3: {right([(4, 3)]):.0%}, head 5: {right([(4, 5)]):.0%}, both: {right([(4, 3), (4, 5)]):.0%} right")
print(f"control, the {len(pairs)} other pairs of layer 4: {min(control):.0%} to {max(control):.0%}")
assert right([(4, 3)]) == right([(4, 5)]) == 1
assert right([(4, 3), (4, 5)]) < 0.6 < 0.9 < min(control)

# %% [markdown]
# Neither is needed, and without both most answers are wrong (sixteen prompts: the share itself is rough). They do the
# same work, and one suffices. Removing parts one at a time, as we did with the experts, never sees such a pair: each
# looks worthless. That is a limit of all our prices above.
#
# It is seen in the text, too. Here the two heads are silent at every new token while a whole answer is written; the
# control silences two others.

# %%
asked = template.render([{"role": "user", "content": "6+8+3+3 mod 10"}])
written = {}
for name, pair in (("healthy", ()), ("heads 3, 5", [(4, 3), (4, 5)]), ("heads 0, 4", [(4, 0), (4, 4)])):
    written[name] = model.generate(asked, 40, engine="numpy", tap=silence(pair)).text
    print(f"{name:11}", repr(written[name]))
assert written["heads 0, 4"] == written["healthy"] != written["heads 3, 5"]

# %% [markdown]
# It still thinks in steps, in the right form, and adds each pair correctly. It only no longer knows *which* digits to
# add. One ability is damaged, copying from the question, and the others are whole. That is what a clean intervention
# looks like.
#
# ## What must not be concluded
#
# A head set to 0 is a state that the model has never met; putting in its mean over other prompts is milder and can
# give other numbers. What one template with eight numbers shows need not hold for others. "Head 3 of layer 4 copies
# digits" says what was measured here; that it does nothing else was not asked. And this is a model of six layers. In
# large ones the same experiments find many more parts, each with a smaller share.
#
# ## What we have learnt
#
# A tap that returns an array turns looking into experiment: silence, prune, force, or put in what another prompt
# computed. The number that comes out means something only beside a control of the same size. Load and attention say
# where to look; whether a part matters is found by taking it away, and, since parts can stand in for each other, by
# taking away several.
#
# Next: [16](16-bug-hunt.ipynb) turns it round: eight models in which somebody else has interfered.
#
# ## Questions
#
# 1. Patch `layers.4.self_attn.heads` at the last place with both carriers at once. Is the effect the sum of the two?
# 2. Exchange the outputs of heads 3 and 5 of layer 4 with each other. Then those of heads 3 and 4. Why does the first
#    hardly change the logits? ([04](04-attention.ipynb): who shares keys and values?)
# 3. Silence `layers.i.self_attn.o` at all places, for one layer i at a time, and count the right answers. Which layers
#    are needed that carried nothing to the last place? What might they do?
