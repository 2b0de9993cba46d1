# %% [markdown]
# # 04b · Generation: from scores to text, and how surprised a model is
#
# *Reading 35 minutes · running 15 seconds · needs [04](04-attention.ipynb)*
#
# A model does not write. It gives a score to every token of its vocabulary, for the place after the text so far.
# Somebody has to choose one, append it, and ask again. This notebook is about that somebody, and about what the same
# scores say of a text that is already there.

# %% [markdown]
# ## The question
#
# GLM-4.5 gives 151,552 scores for each place (its 151,365 tokens, and rows of padding). How do they become a token? Why
# do two runs differ, and how is a run repeated? When does an answer end? And how is the quality of those scores
# measured, in a way that does not depend on the tokenizer?

# %%
import numpy as np

import minglm
from minglm.generate.sampling import Sampling, draw, probabilities
from minglm.look import plots
from minglm.model import softmax

np.set_printoptions(precision=3, suppress=True, linewidth=110)
model = minglm.load("glm-tiny")
prompt = model.as_ids("for i in range(")  # [1, T]
logits = model.forward(prompt).logits[0, -1]  # [V] the scores after the last token
probs = softmax(logits)
best = np.argsort(-probs, kind="stable")
print([(model.tokenizer.token(int(i)), f"{probs[i]:.1%}") for i in best[:6]], f"of {len(probs):,} tokens")

# %% [markdown]
# The softmax is the one of attention, over the vocabulary this time. The first three numbers are close together: it
# is a reasonable opinion about what a `range` begins with. Most of the 2,048 tokens have next to no probability.
#
# ## Greedy
#
# The simplest somebody takes the best token each time. We do it for eight tokens, without a cache: the whole text
# goes through the model again for each. `generate` does the same when its `temperature` is 0.

# %%
text = prompt
for _ in range(8):
    token = model.forward(text).logits[0, -1].argmax()
    text = np.append(text, [[token]], axis=1)
result = model.generate(prompt, max_new_tokens=8, engine="numpy")  # "numpy": the functions of the book
assert result.ids == text[0, prompt.shape[1] :].tolist()
print(repr(result.text))

# %% [markdown]
# Greedy text is always the same for the same prompt. It need not be the likeliest text: a good first word may lead to
# poor ones. And it likes to run in circles, above all in small models.
#
# ## Prefill and decode
#
# With a KV cache the work has two phases. In **prefill** the prompt goes through in one piece, all tokens at once; in
# **decode** every new token goes through alone. The tokens must come out the same.

# %%
cache, fed, step, written = model.new_cache(capacity=32), 0, prompt, []
for _ in range(8):
    scores = model.forward(step, cache=cache).logits[0, -1]
    fed += step.shape[1]
    written.append(int(scores.argmax()))
    step = np.array([[written[-1]]])
assert written == result.ids
without = sum(prompt.shape[1] + n for n in range(8))
print(f"tokens through the model: {fed} with the cache, {without} without")

# %% [markdown]
# Prefill is a product of matrices with many rows: every weight that is read serves all tokens of the prompt. In
# decode each weight serves one token, so a machine waits for its memory more than for its arithmetic. That is why
# long prompts are read faster than answers are written ([14](14-speed.ipynb) measures it).
#
# For GLM-4.5, with 2 bytes a weight: one token decoded alone needs the weights that are active for it; 4,096 tokens
# of a prompt need at most all there are, once.

# %%
glm = minglm.PRESETS["GLM-4.5"].count_parameters()
decode, prefill = 2 * glm.active / 1e9, 2 * (glm.total - glm.mtp) / 4096 / 1e9
print(f"GB of weights read for each token: decode {decode:.1f}, prefill of 4,096 at most {prefill:.2f}")
assert decode > 300 * prefill

# %% [markdown]
# ## Temperature
#
# Choosing by chance needs a distribution, and it can be made sharper or flatter first. **Temperature** divides the
# logits before the softmax. Below 1 differences grow, above 1 they shrink; 0 is a limit that stands for greedy.

# %%
for temperature in (0.5, 1.0, 2.0):
    by_hand = softmax(logits / np.float32(temperature))
    np.testing.assert_allclose(by_hand, probabilities(logits, Sampling(temperature)), atol=1e-6)
    print(f"temperature {temperature}: best {by_hand.max():.1%}, three best {np.sort(by_hand)[-3:].sum():.1%}")
assert probabilities(logits, Sampling(0)).tolist() == [float(i == best[0]) for i in range(len(logits))]

# %% [markdown]
# Temperature never changes the order of the tokens. What it changes is the tail: the picture has all tokens, best
# first.

# %%
picture = plots.Picture(figsize=(8, 3.4), layout="constrained")
axes = picture.add_subplot(xscale="log", yscale="log", xlabel="rank of the token, best first", ylabel="probability")
for temperature, colour, line in ((0.5, "#0072b2", "-"), (1.0, "#d55e00", "--"), (2.0, "#009e73", ":")):
    ordered = np.sort(softmax(logits / np.float32(temperature)))[::-1]
    label = f"temperature {temperature}"
    axes.plot(np.arange(1, len(probs) + 1), ordered, color=colour, linestyle=line, linewidth=2, label=label)
axes.axhline(1 / len(probs), color="black", linewidth=1, label=f"uniform, 1/{len(probs):,}")
axes.set(ylim=(1e-8, 1), title="glm-tiny after 'for i in range(': probability by rank")
axes.legend(fontsize=9)
assert (softmax(logits / np.float32(2)) > 1 / len(probs)).sum() > 300
picture

# %% [markdown]
# The tokens are sorted, so all three lines fall. At temperature 0.5 (solid) the tail drops out of sight; at 2 (dotted)
# the line is much flatter: hundreds of tokens lie above the uniform level. Each is unlikely alone. Together they are
# not.

# %%
for temperature in (0.5, 1.0, 2.0):
    tail = np.sort(softmax(logits / np.float32(temperature)))[::-1][100:].sum()
    print(
        f"temperature {temperature}: {tail:.1%} for the {len(probs) - 100:,} tokens that are not among the best hundred"
    )
assert tail > 0.4

# %% [markdown]
# At temperature 2 every second token would come from there. If every place were as open as this one, a text of 20
# tokens would meet about ten, and after the first one the model goes on from nonsense. Three filters cut the tail
# before the draw.
#
# ## Top-k, top-p, min-p
#
# **Top-k** keeps the k best. It is blind to how sure the model is: where only one token fits, k = 3 keeps two that do
# not.
#
# **Top-p** (arXiv 1904.09751) keeps the smallest set of best tokens whose probabilities reach p: few where the model
# is sure, many where it is not.
#
# **Min-p** (arXiv 2407.01082) keeps what is at least a fraction of the best token's probability.


# %%
def renormalised(kept):  # bool [V] -> [V]
    return np.where(kept, probs, 0) / probs[kept].sum()


rank = np.argsort(best)  # [V] 0 for the best token
before = np.append(0, np.cumsum(probs[best])[:-1])[rank]  # [V] what the better tokens hold
filters = {"top_k": (3, rank < 3), "top_p": (0.8, before < 0.8), "min_p": (0.1, probs >= 0.1 * probs.max())}
for name, (value, kept) in filters.items():
    np.testing.assert_allclose(
        renormalised(kept), probabilities(logits, Sampling(1.0, **{name: value})), rtol=1e-4, atol=1e-7
    )
    print(f"{name} = {value}: {kept.sum():2} tokens stay; they held {probs[kept].sum():.1%}")

# %% [markdown]
# All three equal the package's `probabilities`. Note `before < 0.8`: a token stays while the *better* ones have not
# yet reached p, so the one that crosses the line is kept, and the best always is. `cumsum <= p` is the usual mistake:
# it can leave nothing.
#
# **The order matters.** Here, as in most programs, temperature comes first, and the filters see the flattened
# distribution. Predict: at temperature 2, which of top-p 0.8 and min-p 0.1 still cuts the tail?

# %%
flat = {name: probabilities(logits, Sampling(2.0, **{name: value})) for name, (value, _) in filters.items()}
for name, kept in flat.items():
    print(f"temperature 2, {name}: {(kept > 0).sum()} tokens stay")
assert (flat["top_p"] > 0).sum() > 10 * (flat["min_p"] > 0).sum()

# %% [markdown]
# Top-p has to collect hundreds of tokens to reach 80 %, so most of the tail is back. Min-p compares with the best
# token only, and the best token's lead, though smaller, is still there. That is the point of it.
#
# ## The draw, and seeds
#
# Now a uniform number u between 0 and 1 chooses: lay the probabilities end to end on a line of length 1 and see in
# whose piece u falls. A generator of random numbers gives the same u's for the same **seed**; so a run can be
# repeated.

# %%
u = 0.37
by_hand = int(np.argmax(np.cumsum(probs.astype(np.float64)) > u * probs.astype(np.float64).sum()))
assert draw(probs, u) == by_hand
rng = np.random.default_rng(0)
drawn = np.bincount([draw(probs, rng.random()) for _ in range(10_000)], minlength=len(probs)) / 10_000
print("probability", probs[best[:6]], "\nof 10,000  ", drawn[best[:6]])
assert np.abs(drawn - probs).max() < 0.02

# %% [markdown]
# The shares of ten thousand draws agree with the probabilities to a percent or so. Now whole texts.

# %%
options = {"max_new_tokens": 12, "engine": "numpy"}
for seed in (0, 1, 2):
    print(f"seed {seed}:", repr(model.generate(prompt, temperature=0.7, seed=seed, **options).text))
print("temperature 3:", repr(model.generate(prompt, temperature=3.0, seed=0, **options).text))
again = [model.generate(prompt, temperature=0.7, seed=1, **options).ids for _ in range(2)]
assert again[0] == again[1]

# %% [markdown]
# Three seeds, three texts that look like pieces of a Python file; at temperature 3 pieces of words run together. Equal
# seeds give equal tokens on one machine. On another machine a probability may differ in its last digits, a draw may
# fall on the other side of a border, and from there on the texts part.
#
# ## Stopping
#
# An answer ends in one of two ways: an **end token** is chosen, or the limit is reached. GLM-4.5 has three end
# tokens, and so has `glm-tiny`: the end of a text, and the marks with which the user or a tool takes the next turn. A
# program that knows only the first one runs on and invents the user's next question.

# %%
question = model.chat_template.render([{"role": "user", "content": "17+25"}])
answer = model.generate(question, engine="numpy")
print(repr(answer.text), "|", answer.stop_reason, "|", repr(model.tokenizer.token(answer.ids[-1])))
print("end tokens:", [model.tokenizer.token(i) for i in model.config.eos_token_id])
first_only = model.generate(question, engine="numpy", end_ids=[model.config.eos_token_id[0]])
assert first_only.ids[: len(answer.ids)] == answer.ids
print("only the first one known:", repr(first_only.text[:90]), "|", first_only.stop_reason)

# %% [markdown]
# The answer is right and ends with the mark of the user's turn, which is not part of the text. Where that mark is not
# known as an end, the first tokens are the same, and the model goes on talking to itself.
#
# ## How surprised: bits
#
# The same probabilities measure a text that nobody generated. A token with probability p is a surprise of −log₂ p
# **bits**: 1 bit for a coin, 11 for a blind guess among 2,048. One forward pass gives the probabilities at all
# places; row t predicts token t + 1.

# %%
code = "def area(width, height):\n    return width * height\n"


def surprise(code):  # -> ids [T], bits [T − 1]
    ids = model.as_ids(code)[0]
    p = softmax(model.forward(ids[None]).logits[0].astype(np.float64))
    return ids, -np.log2(p[np.arange(len(ids) - 1), ids[1:]])


ids, bits = surprise(code)
print([f"{model.tokenizer.token(int(i))} {b:.1f}" for i, b in zip(ids[1:], bits, strict=True)])

# %%
picture = plots.Picture(figsize=(8, 3.2), layout="constrained")
axes = picture.add_subplot(ylabel="bits: −log₂ probability")
axes.bar(range(len(bits)), bits, color="#0072b2", edgecolor="black", linewidth=0.6)
axes.axhline(np.log2(2048), color="black", linestyle="--", label="blind guess: log₂ 2048 = 11 bits")
names = [model.tokenizer.token(int(i)).replace("\n", "↵") for i in ids[1:]]
axes.set_xticks(range(len(bits)), names, rotation=90, family="monospace", fontsize=9)
axes.set_title("glm-tiny: surprise at each token (the first, 'def', is given)", fontsize=10)
axes.legend(fontsize=9)
picture

# %% [markdown]
# Tall bars stand at free choices: the name of the function, the first `width`, and the end of the line, where more
# could follow. Low bars stand where the text follows from what came before: `ight` after `he`, and the second `width`
# and `height`, which the heads of [04](04-attention.ipynb) find again. But so does the *first* `height`: after `width`
# it is usual. The first bar is above the dashed line: `␣are` is *less* likely than a blind guess would have it, for a
# model that has opinions can be wrong.
#
# ## What an unlikely token looks like
#
# Now a slip of the pen: the last word is `weight`, which exists nowhere else in the text. Predict where the bars
# change.

# %%
slip_ids, slip = surprise(code.replace("* height", "* weight"))
changed = [(model.tokenizer.token(int(i)), round(float(b), 1)) for i, b in zip(slip_ids[1:], slip, strict=True)]
print("slip:", changed[13:])
print("right:", [(n, round(float(b), 1)) for n, b in zip(names, bits, strict=True)][13:])
assert slip[:13].tolist() == bits[:13].tolist() or np.allclose(slip[:13], bits[:13], atol=1e-4)
assert slip[14] > bits[14] + 6  # the wrong word
assert 0.5 < slip[-1] - bits[-1] < 2  # the end of the line

# %% [markdown]
# Everything before is unchanged, for nobody looks ahead. The wrong word costs seven bits more and the line end after it
# one more; `ight` still costs nothing. A token of many bits is a question to the reader: a slip, a name, a fact. The
# model cannot say which. Low probability means *unexpected*, not *wrong*; and high probability means *usual*, not
# *true*.
#
# ## Bits per byte
#
# Bits per token cannot be compared between models: a larger vocabulary has longer tokens, fewer of them, and more
# bits for each. Bytes are the same for all. **Bits per byte** are all bits over all bytes.
#
# Two things have to be agreed on. The first token is given, so its bytes do not count. And the text must end
# somewhere: the end token is predicted, too, but has no bytes.

# %%
from minglm.data.heldout import Document
from minglm.evaluate.bits_per_byte import bits_per_byte

end = model.config.eos_token_id[0]
after = softmax(model.forward(ids[None]).logits[0, -1].astype(np.float64))
total = bits.sum() - np.log2(after[end])
counted = len(code.encode()) - len(model.tokenizer.token_bytes(int(ids[0])))
theirs = bits_per_byte(model, [Document("code", "area", code, "")])
print(f"{total:.1f} bits over {counted} bytes: {total / counted:.4f}; the package: {theirs:.4f}")
assert np.isclose(total / counted, theirs, rtol=1e-4)

# %% [markdown]
# Equal. An uncompressed byte has 8 bits; a model with 1.4 bits per byte could, with an arithmetic coder, store this
# text in about a sixth of its size. Held-out measures of `glm-tiny`, beside those of file compressors, are in [its
# card](../weights/glm-tiny/README.md). A text of 51 bytes says little about a model: take thousands.
#
# ## What we have learnt
#
# The softmax of the last row is a distribution over the next token. Temperature sharpens or flattens it, filters cut
# its tail, a seeded draw chooses; an end token or a limit stops the loop. The same distribution, read along a given
# text, is a measure of surprise in bits.
#
# Next: [05](05-router.ipynb), the part that decides which experts see a token.
#
# ## Questions
#
# 1. Top-k with k = 1 and temperature 5: what is drawn? And min-p = 1? Check both with `probabilities`.
# 2. For our prompt, which temperature gives the best token a probability of 1/2? Find it with a few lines.
# 3. The tokens that the model generates itself, greedily: are they more or less surprising, in bits, than a page of
#    real Python? Measure both. Why is text of the lowest surprise not the best text?
