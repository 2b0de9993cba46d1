# %% [markdown]
# # 16 · A bug hunt: eight models, each wrong in one place
#
# *Reading 40 minutes · running 20 seconds · needs [07](07-forward-step.ipynb) and [09](09-mtp.ipynb)*
#
# Somebody writes GLM-4.5 again, in another language or for another machine. The weights load, nothing crashes, text
# comes out. Is it right? All mistakes in this notebook were really made with this family of models. None raises an
# error, and none has a wrong shape.

# %% [markdown]
# ## The question
#
# How is a wrong model noticed, and how is the place found where it is wrong? And how much can be wrong before the
# text shows it?
#
# The eight patients live in `minglm.learn.bugs`. A patient is a model, and the operations it computes with:
# `patient.model.forward(ids, ops=patient.ops)`. They have numbers instead of names. Do not read that file yet.

# %%
import numpy as np

import minglm
from minglm.learn import bugs
from minglm.look.diff import diff
from minglm.look.plots import Picture
from minglm.model import ops, softmax

np.set_printoptions(precision=3, suppress=True, linewidth=110)
right = minglm.load("glm-tiny")
tokenizer, config = right.tokenizer, right.config
healthy = bugs.Patient(right, ops)  # ops: the operations of the book
ids = right.as_ids("for i in range(10):\n    print(i)")

# %% [markdown]
# ## A rehearsal
#
# Before the hunt, one mistake that we make ourselves: the scaling factor of the routed experts is forgotten, so it is
# 1 instead of 1.5. What do we see if we compare the logits?

# %%
forgot = minglm.Model(config.replace(routed_scaling_factor=1.0), right.params, tokenizer, name="forgot")
ours, theirs = right.forward(ids).logits, forgot.forward(ids).logits
print(f"largest difference {abs(ours - theirs).max():.2f}, largest logit {abs(ours).max():.2f}")
print("same best token at", f"{(ours.argmax(-1) == theirs.argmax(-1)).mean():.0%}", "of the places")

# %% [markdown]
# They differ. The number says nothing about where. So we keep every step of both models, go through them in the order
# of the computation, and stop at the first that differs by more than rounding.


# %%
def arrays(ill):
    """Every step of a patient by name, in the order of the computation."""
    kept = {}
    ill.model.forward(ids, ops=ill.ops, tap=lambda name, array: kept.update({name: array.copy()}))
    return kept


sound, a = arrays(healthy), arrays(bugs.Patient(forgot, ops))
first = next(name for name in sound if not np.allclose(sound[name], a[name], rtol=1e-3, atol=1e-4))
assert first == "layers.1.mlp.expert_weights"
print(first)

# %% [markdown]
# The weights of the experts, in the first layer that has experts. That is the right place. Every step after it
# differs too, but only because its inputs do.
#
# Are those later steps themselves sound? To know, each must be given the *right* inputs. A tap can do that: it notes
# what the wrong model computed, and then returns the right model's array, with which the model goes on. What is noted
# is what each step **adds**; the rest it has **inherited**. `diff` does both, measures what rounding alone would do,
# and repeats the comparison in float64, where rounding almost vanishes and a mistake stays ([docs](../docs/diff.md)).

# %%
found = diff(right, forgot, ids, keep="layers.1.mlp.*,layers.2.mlp.expert_weights")
assert found.first.name == "layers.1.mlp.expert_weights"
found

# %% [markdown]
# Read the last line: the step, the size, and the field of the config that this step reads and that differs. The same
# step differs in layer 2, with an error of its own: each layer makes the mistake again.
#
# ## The symptoms
#
# Now the patients. Two measurements that any project makes: bits per byte of held-out code, and thirty-two sums,
# with thinking. First the text: 24 pieces of 128 tokens.

# %%
from minglm.data.heldout import heldout_documents
from minglm.evaluate.confidence import bootstrap

encoded = [tokenizer.encode(document.text) for document in heldout_documents("code")]
text = np.array([e[s : s + 128] for e in encoded for s in range(0, len(e) - 128, 1024)][:24])  # [B, T]
size = np.array([sum(len(tokenizer.token_bytes(int(i))) for i in row[1:]) for row in text])  # bytes [B]


def bits(ill):  # -> [B]
    probs = softmax(ill.model.forward(text, ops=ill.ops).logits[:, :-1])
    return -np.log2(np.take_along_axis(probs, text[:, 1:, None], axis=-1)[..., 0]).sum(axis=1)


before = bits(healthy)
print(f"glm-tiny: {before.sum() / size.sum():.3f} bits per byte")

# %% [markdown]
# Then the sums: eight digits each, modulo 10. All prompts have the same length, so they go through the model together.


# %%
from minglm.data.chats import ask
from minglm.data.tasks import TASKS, heldout_items
from minglm.text.answer import parse_answer

items = heldout_items(TASKS["sums"], 32, seed=1, size=8)
prompts = np.array([tokenizer.encode(right.chat_template.render([ask(item)])) for item in items])  # [B, T]


def answers(ill):
    """The greedy text behind each prompt, up to its end token."""
    cache, step, written = ill.model.new_cache(len(prompts), capacity=prompts.shape[1] + 60), prompts, []
    for _ in range(60):
        step = ill.model.forward(step, cache=cache, ops=ill.ops).logits[:, -1:].argmax(axis=-1)
        written.append(step)
    return [tokenizer.decode(row.tolist()).split("<|user|>")[0] for row in np.concatenate(written, axis=1)]


# %% [markdown]
# The rise is measured piece by piece against the healthy model, and its interval is a bootstrap over the pieces.
#
# Before you run this: how many of the eight will stand out?

# %%
rise, low, high, solved = np.zeros((4, 9))
said = {}
for number in range(9):
    ill = bugs.patient(number, right) if number else healthy
    units = np.stack([bits(ill) - before, size], axis=1)
    rise[number] = units[:, 0].sum() / size.sum()
    low[number], high[number] = bootstrap(units, lambda total: total[0] / total[1])
    said[number] = answers(ill)
    solved[number] = sum(parse_answer(t).content == i.answer for t, i in zip(said[number], items, strict=True))
    interval = f"({low[number]:+.4f} to {high[number]:+.4f})"
    print(f"case {number}: {rise[number]:+.4f} bits per byte {interval:20} {solved[number]:.0f} of 32 sums")
assert solved[0] == 32

# %% [markdown]
# Case 0 is the healthy model beside itself.

# %%
picture = Picture(figsize=(8, 3.6), layout="constrained")
picture.suptitle("Eight patients beside the healthy model: how much worse the text, how many sums right", fontsize=11)
left, other = picture.subplots(1, 2, sharey=True)
cases = np.arange(1, 9)
span = np.abs(np.stack([rise - low, high - rise]))[:, 1:]
left.errorbar(rise[1:], cases, xerr=span, fmt="o", color="#0072b2", capsize=3)
left.set_xscale("symlog", linthresh=0.001)
left.axvline(0, color="black", linestyle="--")
left.set(xlabel="rise in bits per byte (95 %)", ylabel="case", yticks=cases, title="24 × 128 tokens of held-out code")
other.barh(cases, solved[1:], color="#e69f00", edgecolor="black", hatch="//")
other.axvline(32, color="black", linestyle="--")
other.set(xlabel="sums right, of 32", title="dashed: the healthy model")
left.invert_yaxis()
picture

# %% [markdown]
# On the left each dot is one patient, with its interval; the axis is logarithmic beyond ±0.001. Cases 1 and 5 are far
# to the right and can no longer add. Case 6 is worse by a few hundredths and fails some sums. Cases 2 and 4 are above
# the dashed line by less than a hundredth and solve every sum. The intervals of 3, 7 and 8 touch zero: with this much
# text nobody could say that anything is wrong.

# %%
loud, hidden = {1, 5}, {n for n in range(1, 9) if low[n] <= 0}
assert hidden == {3, 7, 8}
assert all(rise[n] > 0.5 and solved[n] < 4 for n in loud)
assert 0.02 < rise[6] < 0.06
assert 16 < solved[6] < 32
assert all(0 < low[n] and rise[n] < 0.01 for n in (2, 4))
assert all(solved[n] == 32 for n in {2, 3, 4, 7, 8})

# %% [markdown]
# So two loud mistakes, one middling and five that an evaluation would wave through. Someone who trains on from such a
# model, or quantises it, or compares it with another, builds on sand.
#
# For each case now: look at the symptom, make a guess, look at the first diverging step, make a better guess. Then
# the faulty function is shown.
#
# ## Case 1
#
# Nearly a bit per byte worse, and no sum right. Yet what it writes is not noise.

# %%
print("right:", repr(said[0][0]), "\nwrong:", repr(said[1][0][:60]))
found = bugs.examine(1, right, ids, keep="layers.0.self_attn.*,layers.0.out")
assert found.first.name == "layers.0.self_attn.q_rope"
found

# %% [markdown]
# The rotation, and nothing else: `scores` and all later steps add nothing of their own. Which rotation went wrong, and
# how? A good second question is always *where is it right?* Here is the error by position.

# %%
q, q_right = sound["layers.0.self_attn.q_norm"], sound["layers.0.self_attn.q_rope"]
layout = minglm.model.make_layout(ids.shape, config, np.float32)
turned = bugs.patient(1, right).ops.rope(q, layout.cos, layout.sin)  # the patient's step on the right inputs
difference = np.abs(turned - q_right)[0]  # [T, H, d]
print("by position", difference.max(axis=(1, 2)), "\nby entry   ", difference.max(axis=(0, 1)))
assert difference[0].max() == 0
assert difference[..., config.rotary_dim :].max() == 0

# %% [markdown]
# At position 0 it is right, so the angles enter correctly: an angle of 0 turns nothing. Beyond entry 16 it is right:
# the unrotated half passes through. And lengths?

# %%
np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(q_right, axis=-1), rtol=1e-5)
print(bugs.CASES[0].source)

# %% [markdown]
# It is a rotation, by the right angles, of the right entries: of the wrong **pairs**. Entry 2i is turned with its
# neighbour 2i + 1. GLM-4.5 pairs entry i with entry i + r/2 ([03](03-rotary-positions.ipynb)). Older GLMs and the
# paper pair neighbours, so the slip is a natural one.
#
# *The fix*: `first, second = x[..., :half], x[..., half : 2 * half]`. A model trained with wrong pairs would be as
# good as ours; the weights must be used with the pairs they were trained with.
#
# ## Case 2
#
# Less than a hundredth of a bit, and every sum is right. Something small?

# %%
found = bugs.examine(2, right, ids, keep="layers.1.*")
assert found.first.name == "layers.1.mlp.router_scores"
print(found.sentence)

# %% [markdown]
# Not small at all: scores that are wrong by more than half of the largest one. The logits are right and the scores
# are not, so it is the function between them. Scores should lie between 0 and 1, each for itself. Add them up.

# %%
a = arrays(bugs.patient(2, right))
print("sums of a token's scores, right", sound["layers.1.mlp.router_scores"].sum(axis=1)[:6])
print("sums of a token's scores, wrong", a["layers.1.mlp.router_scores"].sum(axis=1)[:6])
np.testing.assert_allclose(a["layers.1.mlp.router_scores"], softmax(a["layers.1.mlp.router_logits"]), atol=1e-6)
print(bugs.CASES[1].source)

# %% [markdown]
# A softmax where a sigmoid belongs ([05](05-router.ipynb)). *The fix* is one word.
#
# Why does it show so little? A softmax keeps the order of the scores, so without a bias the same experts would be
# picked. And the two weights are divided by their sum, which removes the softmax's denominator. What is left are
# other ratios, and a bias that now meets scores of another size.

# %%
for layer in ("layers.1.mlp.", "layers.3.mlp."):
    pairs = [np.sort(each[layer + "expert_indices"]) for each in (sound, a)]
    first = [each[layer + "expert_weights"].max(axis=1).mean() for each in (sound, a)]
    same = (pairs[0] == pairs[1]).all(axis=1).mean()
    print(f"{layer} {same:.0%} of the tokens keep their experts; louder one: {first[0]:.2f}, wrong {first[1]:.2f}")
assert same < 1

# %% [markdown]
# So a few tokens change an expert, and all change weights a little. The loss hardly minds: the shared expert, attention
# and the residual stream carry on. That is a fact about this model; nothing promises the same of K = 8 of 160.
#
# ## Case 3
#
# Nothing in the loss, no sum lost. Is there a mistake at all?

# %%
found = bugs.examine(3, right, ids, keep="embed_tokens,layers.0.*,norm")
assert found.first.name == "layers.0.input_layernorm"
assert found.first.added == max(row.added for row in found.rows) < 1e-3
found

# %% [markdown]
# There is. The error is a ten-thousandth, but rounding would be some eighty times less, and in float64 it stays what it
# is. Now guess: what in a norm is *nearly* right? And why is the first norm the worst?

# %%
square = (sound["embed_tokens"][0] ** 2).mean(axis=-1)  # [T]
normed = [each["layers.0.input_layernorm"][0] for each in (arrays(bugs.patient(3, right)), sound)]
ratio = (normed[0] / normed[1]).mean(axis=-1)
np.testing.assert_allclose(ratio - 1, np.sqrt((square + 1e-5) / (square + 1e-6)) - 1, rtol=0.02)
print("mean square of the embeddings", square[:5], "\nwrong / right − 1, in millionths", 1e6 * (ratio[:5] - 1))
print(found.fields)

# %% [markdown]
# The whole row is longer by the same factor, √((m + 1e-5)/(m + 1e-6)) for a mean square m: an `eps` of 1e-6 instead of
# 1e-5. `diff` says so too, because the config's field differs. Where rows are short, `eps` counts more, and the
# embedding is where they are shortest.
#
# *The fix*: read `rms_norm_eps` from config.json, and let nothing default.
#
# Is it worth fixing? The loss says no. But every comparison with another implementation will from now on show
# differences of 1e-4, and the next real mistake of that size will hide behind this one.

# %%
fresh = minglm.new("glm-tiny", seed=0)
moved = [abs(bugs.patient(3, m).model.forward(ids).logits / m.forward(ids).logits - 1) for m in (right, fresh)]
print("typical relative change of a logit, trained and fresh:", [f"{np.median(m):.1e}" for m in moved])
assert np.median(moved[1]) > 30 * np.median(moved[0])

# %% [markdown]
# A fresh model is another matter. Its embeddings are small (standard deviation 0.02, mean square 4e-4), and there the
# same mistake is far larger. Whoever *trains* with the wrong `eps` gets a different model.
#
# ## Case 4
#
# Less than a hundredth of a bit; all sums right. We have seen this one made.

# %%
found = bugs.examine(4, right, ids, keep="layers.1.mlp.*")
assert found.first.name == "layers.1.mlp.expert_weights"
print(found.sentence)
a = arrays(bugs.patient(4, right))
picked = sound["layers.1.mlp.expert_indices"]
print("weights, right\n", sound["layers.1.mlp.expert_weights"][:4], "\nwrong\n", a["layers.1.mlp.expert_weights"][:4])

# %% [markdown]
# The experts picked are right, the sum of the weights is right, and the second expert is too loud. The candidates: no
# sigmoid, no normalisation, or other scores. Which scores were already lying about?

# %%
biased = np.take_along_axis(sound["layers.1.mlp.biased_scores"], picked, axis=1)
by_hand = biased / biased.sum(axis=1, keepdims=True) * config.routed_scaling_factor
np.testing.assert_allclose(a["layers.1.mlp.expert_weights"], by_hand, rtol=1e-4)
print(bugs.CASES[3].source)

# %% [markdown]
# The biased ones: the bias was weighed, too. *The fix*: `np.take_along_axis(scores, indices, axis=-1)`, from the scores
# without it.
#
# Note what a test would need to see this: a bias that is not zero. Fresh models have zeros there.
#
# ## Case 5
#
# The second loud one. It does not even open its thinking.

# %%
print("right:", repr(said[0][0]), "\nwrong:", repr(said[5][0][:60]))
found = bugs.examine(5, right, ids, keep="layers.0.self_attn.*")
assert found.first.name == "layers.0.self_attn.scores"
print(found.sentence)

# %% [markdown]
# The scores, from right queries and right keys; and the heads, from right probabilities. So it is something that both
# products share. Again: where is it right?

# %%
a = arrays(bugs.patient(5, right))
visible = np.tri(ids.shape[1], dtype=bool)
of_heads = [each["layers.0.self_attn.scores"][0][:, visible] for each in (a, sound)]  # [H, pairs that see each other]
apart = np.abs(of_heads[0] - of_heads[1]).max(axis=1)  # [H]
print("largest error of each head", apart)
print("reads, right", np.arange(6) // 3, "\nreads, wrong", np.arange(6) % 2)
assert np.array_equal(apart > 1e-4, np.arange(6) // 3 != np.arange(6) % 2)
print(bugs.CASES[4].source)

# %% [markdown]
# Four of six heads are right to the last bit. The two others, 1 and 4, read the key/value head that is not theirs:
# `h % G` instead of `h // R`. The library call behind it is usually `tile` instead of `repeat`, and the shapes are
# equal. *The fix*: R consecutive query heads share a key/value head.

# %%
glm = minglm.PRESETS["GLM-4.5"]
H, G = glm.num_attention_heads, glm.num_key_value_heads
lucky = (np.arange(H) // (H // G) == np.arange(H) % G).sum()
print(f"GLM-4.5: {lucky} of {H} heads would be right by luck")
assert lucky == 12

# %% [markdown]
# With as many key/value heads as query heads, or with one, the two formulas agree. Such a test model sees nothing.
#
# ## Case 6
#
# Four hundredths of a bit, and some sums fail. It thinks, in the right form, and goes astray.

# %%
n = next(n for n in range(32) if parse_answer(said[6][n]).content != items[n].answer)
print(items[n].question, "\nright:", repr(said[0][n]), "\nwrong:", repr(said[6][n]))
found = bugs.examine(6, right, ids, keep="layers.0.*")
assert [row.name.split(".")[-1] for row in found.rows if row.verdict == "differs"] == [
    "q_norm",
    "k_norm",
    "q_rope",
    "k_rope",
]
found

# %% [markdown]
# Four steps differ, each with an error of its own. Two mistakes? Look at the columns of `q_rope`. What the rotation
# *adds* is as large as what it *inherits*, and both are smaller than the error before it. It is as if the second step
# took back some of what the first did.

# %%
a = arrays(bugs.patient(6, right))
print("q_norm unchanged:", np.array_equal(a["layers.0.self_attn.q_norm"], a["layers.0.self_attn.q"]))
lengths = [np.linalg.norm(x["layers.0.self_attn.q_rope"][0, :4, 0], axis=-1) for x in (sound, a)]
print("lengths after the rotation, right", lengths[0], "wrong", lengths[1])
assert np.array_equal(a["layers.0.self_attn.q_norm"], a["layers.0.self_attn.q"])

# %% [markdown]
# The step called `q_norm` does nothing, and after the rotation the queries are normed all the same. So the norm is
# there, in the wrong place: after the rotation.
#
# Why is that nearly right? A rotation keeps lengths, so the division by the root of the mean square is the same before
# and after. What does not commute is the norm's **weight**, one number per entry: if it comes late, it multiplies
# entries that the rotation has already mixed. By hand:

# %%
q = sound["layers.0.self_attn.q"]
unit = q / np.sqrt((q * q).mean(axis=-1, keepdims=True) + config.rms_norm_eps)
weight = right.params.layers[0].self_attn.q_norm.weight
early, late = ops.rope(unit * weight, layout.cos, layout.sin), ops.rope(unit, layout.cos, layout.sin) * weight
np.testing.assert_allclose(early, sound["layers.0.self_attn.q_rope"], atol=1e-4)
np.testing.assert_allclose(late, a["layers.0.self_attn.q_rope"], atol=1e-4)
print(f"the weight's entries: {weight.min():.2f} to {weight.max():.2f}\n\n{bugs.CASES[5].source}")

# %% [markdown]
# *The fix*: norm, then rotation. If all entries of the weight were equal, as in a fresh model, nobody could tell the
# two orders apart, and nobody would have to.
#
# ## Case 7
#
# The interval of its rise has zero in it. The sums are right.

# %%
found = bugs.examine(7, right, ids, keep="layers.1.mlp.routed,layers.1.mlp.shared,layers.1.mlp.out")
assert found.first.name == "layers.1.mlp.out"
found

# %% [markdown]
# Both summands are right and the sum is not. What is left?

# %%
a = arrays(bugs.patient(7, right))
shared = sound["layers.1.mlp.shared"]
extra = a["layers.1.mlp.out"].reshape(shared.shape) - sound["layers.1.mlp.routed"]
print("factor on the shared expert:", (extra * shared).sum() / (shared * shared).sum())
np.testing.assert_allclose(extra, config.routed_scaling_factor * shared, atol=1e-3)
print(bugs.CASES[6].source)

# %% [markdown]
# The shared expert's answer was multiplied by 1.5, the factor of the routed ones. *The fix*: add it as it is.
#
# That half as much again of every shared expert should not show in the loss is remarkable, and it is a fact about
# this small model and this text, not about the mistake. In GLM-4.5 the factor is 2.5. There, the factor dropped or
# applied twice was reported to take GSM8K from 0.965 to 0.745 (SGLang, issues 8511 and 8402). In GLM-4.5-Air the
# factor is 1: a port that was only tested with Air cannot have seen any of it.
#
# ## Case 8
#
# No rise at all: to the last digit the text is as probable as before. Can such a model be wrong?

# %%
found = bugs.examine(8, right, ids, keep="layers.5.*,norm,logits")
assert found.first is None
assert not found.same
print(found.sentence)

# %% [markdown]
# Every step is equal to the bit. But `diff` has compared the weights as well, and one matrix differs that no step of
# the forward pass has read. Layer 6 is the layer after the last one: the MTP layer ([09](09-mtp.ipynb)), which drafts
# the token after the next. So the symptom must be in the drafts.

# %%
ill = bugs.patient(8, right).model
for model in (right, ill):
    choice = model.forward(text[:8]).logits[:, 1:].argmax(axis=-1)  # what the trunk will say one token later
    accepted = (model.mtp(text[:8]).argmax(axis=-1) == choice).mean()
    print(f"{model.name}: {accepted:.0%} of the drafts are what the trunk says")
assert accepted < 0.1

# %% [markdown]
# The drafts are worthless, and nobody who reads the text will ever know: a wrong draft is rejected, and the right token
# computed instead. Only the speed is gone. A tap shows the step.

# %%
steps = [{}, {}]
for kept, model in zip(steps, (right, ill), strict=True):
    model.mtp(ids, tap=lambda name, array, kept=kept: kept.update({name: array.copy()}))
first = next(name for name in steps[0] if not np.allclose(steps[0][name], steps[1][name], atol=1e-4))
joined = np.concatenate([steps[0]["layers.6.hnorm"], steps[0]["layers.6.enorm"]], axis=-1)  # [state, token]
np.testing.assert_allclose(steps[1]["layers.6.eh_proj"], joined @ right.params.mtp[0].eh_proj.weight.T, atol=1e-3)
assert first == "layers.6.eh_proj"
print(f"{first}\n\n{bugs.CASES[7].source}; right: {bugs.CASES[7].right}")

# %% [markdown]
# The two halves of the joined row are in the wrong order: state first, token second. *The fix*: the token's embedding
# comes first. A test of the MTP layer must look at its logits, or at how many drafts are accepted. The trunk's text
# says nothing about it.
#
# ## What would have hidden them
#
# Most tests use fresh weights: they are quick to make. Which of the eight would a comparison of logits then find?

# %%
baseline = fresh.forward(ids).logits
for number, case in enumerate(bugs.CASES, start=1):
    ill = bugs.patient(number, fresh)
    change = abs(ill.model.forward(ids, ops=ill.ops).logits - baseline).max() / abs(baseline).max()
    print(f"case {number} {case.name:15} {change:.1e}", "" if change > 1e-5 else "not seen")
    assert (change > 1e-5) == (number not in (4, 6, 8))

# %% [markdown]
# Three escape: zero biases hide case 4, norm weights of one hide case 6, and case 8 is not on the way to the logits at
# all. Tests of this project therefore draw random biases, random norm weights and a scaling factor other than 1, and
# compare the MTP layer's logits too.
#
# ## What we have learnt
#
# A mistake of the architecture raises no error, and often not even the loss: of eight, two were plain to see. The
# place is found by giving each step the right inputs and asking what it *adds*; then ask where the step is still
# right, which position, which head, which entry. Float64 tells a small mistake from rounding.
#
# This was the last notebook. Where to go on: the [reading order](../docs/reading-order.md) leads through the code
# itself, and [authors](../docs/authors.md) through what the authors of GLM-4.5 said of each choice.
#
# ## Questions
#
# 1. `config.replace(partial_rotary_factor=1.0)` rotates the whole head, as loaders do that miss the field. Guess its
#    rise in bits per byte beside case 1's, then measure it, and let `diff` find it.
# 2. Case 2 and case 4 each cost less than a hundredth of a bit. Make a patient with both (`ops_with` takes one router:
#    write it). Do the costs add up?
# 3. Find a prompt on which `diff` does *not* see case 1. How short must it be, and why?
