# %% [markdown]
# # 00 · A tour: GLM-4.5 in ten minutes
#
# *Reading 10 minutes · running 10 seconds · needs Python and matrix products*
#
# GLM-4.5 is a language model of 355 billion parameters, of which each token uses 32 billion. We walk once through a
# model of the same build that fits into a notebook: from a line of text to the next token, to an answer with thinking,
# to a tool, and to one step of training. Each stop is a taste of a later notebook.
# (In Chinese: [00-tour-zh](00-tour-zh.ipynb).)

# %% [markdown]
# ## The question
#
# Text goes in, and one more piece of text comes out. What happens in between?
#
# `glm-tiny` was trained for this course, on Python and on small puzzles. It is a toy: it shows how a mixture-of-experts
# model works, not what a large one can do.

# %%
import numpy as np

import minglm
from minglm.look import plots

np.set_printoptions(precision=3, suppress=True, linewidth=110)
model = minglm.load("glm-tiny")
model

# %% [markdown]
# The letters are the names of axes, and stay the same in the whole course: a **hidden size** D of 192 numbers for each
# token, L = 6 layers, E = 16 experts of which K = 2 see a token. Here are the same sizes of GLM-4.5 itself. Only a
# part of the parameters is active for a token; that is the point of experts.

# %%
for name, config in [("glm-tiny", model.config), ("GLM-4.5", minglm.PRESETS["GLM-4.5"])]:
    counts = config.count_parameters()
    c = f"D = {config.hidden_size:,}, L = {config.num_hidden_layers}, E = {config.n_routed_experts}"
    print(f"{name}: {c}, K = {config.num_experts_per_tok}; {counts.active / counts.total:.0%} of the parameters active")
assert counts.report_total // 10**9 == 355  # as its authors count
assert counts.report_active // 10**9 == 32

# %% [markdown]
# (MTP: a further layer that guesses one token more, [09](09-mtp.ipynb).)
#
# ## From text to rows of numbers
#
# A prompt is cut into **tokens**, and each becomes a row of a table, its **embedding**. More in
# [01-tokens](01-tokens.ipynb). `trace` runs the model and keeps every array it makes, by name.

# %%
prompt = "def add(a, b):\n    return a +"
trace = model.trace(prompt)
print(trace.tokens)
print(len(trace), "arrays; the first:", trace["embed_tokens"].shape)
assert np.array_equal(trace["embed_tokens"][0], model.params.embed_tokens.weight[trace.ids[0]])

# %% [markdown]
# ## Six layers, each of which adds
#
# A layer has two parts. **Attention** lets each token read from the tokens before it. Then an **MLP** (matrix products
# with a bend between them), or in layers 1 to 5 the **experts**, work on each token alone. Neither replaces the row;
# both add to it. So the rows after the last layer are the embeddings plus everything that was added:
# [02-residual-stream](02-residual-stream.ipynb).

# %%
added = [trace[f"layers.{i}.{part}"] for i in range(6) for part in ("self_attn.o", "mlp.out")]
np.testing.assert_allclose(trace["embed_tokens"] + sum(added), trace["layers.5.out"], atol=1e-3)
for name in trace.names("layers.1.*"):
    if ".experts." not in name:
        print(f"{name:38} {trace[name].shape}")

# %% [markdown]
# These are the steps of one layer, in order; only the experts' own arrays are left out. Where tokens stand is told to
# attention by turning its rows ([03](03-rotary-positions.ipynb)), and who reads from whom is in `probs`
# ([04](04-attention.ipynb)). Under `mlp` come the router and the experts ([05](05-router.ipynb),
# [06](06-experts.ipynb)).
#
# ## Who went where
#
# For each token the router of a layer picks 2 of 16 experts, and says how loud each speaks. The picture has a row for
# each token and two cells for each layer: the expert's number, and its weight below.

# %%
routing = trace.routing
assert routing.indices.shape == (10, 5, 2)  # tokens, layers with experts, picks
assert routing.indices[0, :2].tolist() == [[15, 4], [9, 5]]
plots.plot_picks(routing.indices, routing.weights, trace.tokens, routing.experts, routing.layers, name="glm-tiny")

# %% [markdown]
# Read a line: `def` goes to experts 15 and 4 in layer 1, to 9 and 5 in layer 2. The two weights sum to 1.5. Some
# tokens listen to one expert almost alone, others to two. Expert 5 of one layer and expert 5 of the next have nothing
# in common but the number. Whether all get equal work is the subject of [08a](08a-expert-load.ipynb), whether they
# specialise that of [08b](08b-specialisation.ipynb).
#
# ## The next token
#
# The last row is compared with a row for each of the 2,048 tokens of the vocabulary. The results are **logits**; a
# softmax (e to the power of each, divided by their sum) makes probabilities of them. What should come after `return a
# +`?

# %%
from minglm.model import softmax

probs = softmax(trace["logits"][0, -1])
for i in np.argsort(-probs)[:3]:
    print(f"{model.tokenizer.token(int(i))!r:8} {probs[i]:.1%}")
assert model.tokenizer.token(int(probs.argmax())) == "␣b"

# %% [markdown]
# `␣b`, with little doubt: it seems to have looked up at the parameters (question 1). All of this as one story is
# [07-forward-step](07-forward-step.ipynb).
#
# To write more, append the token and ask again. That is all that **generating** is; how a cache makes it cheap is in
# [04b](04b-generation.ipynb), and [09](09-mtp.ipynb) shows the layer that guesses one token further.

# %%
again = prompt + " b"
first = model.generate(prompt, 2).ids
assert model.generate(again, 1).ids == first[1:]
print(again + model.generate(again, 12).text)

# %% [markdown]
# It goes on with something that looks like Python. Do not ask for more than that.
#
# ## Thinking
#
# GLM-4.5 can think before it answers, or answer at once. The difference is a few tokens of the prompt. Our question:
# the sum of ten digits, its last digit only. The right answer is 2.

# %%
question = [{"role": "user", "content": "3+8+1+9+4+2+7+7+5+6 mod 10"}]
thinking = model.chat_template.render(question)
direct = model.chat_template.render(question, enable_thinking=False)
print(repr(thinking), repr(direct), sep="\n")

# %% [markdown]
# Before you run the next cell: both prompts go to the same model, with the same weights. Which one will be right?

# %%
with_thinking, at_once = (model.generate(p, 100) for p in (thinking, direct))
for answer in (with_thinking, at_once):
    print(f"{len(answer.ids)} tokens: {answer.text}\n")
assert with_thinking.text.endswith("\n2")
assert not at_once.text.endswith("2")

# %% [markdown]
# Each token that is written is another walk through the six layers, and later ones can read what earlier ones wrote.
# With thinking there are enough walks for nine additions, one after the other. Without, all of it must happen in the
# walk that writes the answer: it is a guess, here a wrong one. [13](13-thinking-and-tools.ipynb) measures this on many
# questions.
#
# ## A tool
#
# The prompt may also describe a function. The model then writes a call, a program outside runs it, and the result is
# appended as another turn.

# %%
from minglm.data.calculator import calculate
from minglm.data.chats import CALCULATOR
from minglm.text.tools import run_tools

asked = [{"role": "user", "content": "(4821+937)*3"}]
said = run_tools(
    lambda p: model.generate(p, 100).text, asked, [CALCULATOR], {"calculator": calculate}, model.chat_template
)
for message in said:
    print(message)
assert said[-1]["content"] == str((4821 + 937) * 3)

# %% [markdown]
# Four turns: the question, the call, what the calculator said, and the answer. The model did not multiply; it knew
# whom to ask.
#
# ## One step of training
#
# How did the weights come to be? By steps like this one, 6,000 of them ([the model's
# card](../weights/glm-tiny/README.md)). The **loss** says how surprised the model is by a text (−ln of the probability
# of what came, in *nats*), the **gradient** says for each weight which way is more surprise. Move all weights a little
# the other way.

# %%
text = "def area(width, height):\n    return width * height\n"
loss, grads = model.loss_and_grads(model.as_ids(text), mtp_weight=0)
gradient = dict(minglm.walk(grads))
square = sum(float((g.astype(float) ** 2).sum()) for g in gradient.values())
print(f"{len(gradient)} gradients, loss {loss.main:.4f} nats per token, length of the gradient {square**0.5:.2f}")

# %% [markdown]
# For a small step the loss should fall by the step times the square of the gradient's length. Let us see.

# %%
moved = minglm.load("glm-tiny")
step = 1e-5
for name, weight in minglm.walk(moved.params):
    weight -= np.float32(step) * gradient[name]  # in place: the arrays are the model's own
after, _ = moved.loss_and_grads(moved.as_ids(text), mtp_weight=0)
print(f"loss {loss.main:.5f} -> {after.main:.5f}; expected {loss.main - step * square:.5f}")
assert abs((loss.main - after.main) / (step * square) - 1) < 0.05

# %% [markdown]
# As expected. How a gradient is computed by hand, backwards through each part, is in [10a](10a-backward.ipynb),
# [10b](10b-backward-attention.ipynb) and [10c](10c-backward-experts.ipynb); what a good optimiser does with it, in
# [11](11-training.ipynb).
#
# ## What we have learnt, and what comes next
#
# Tokens become rows; each layer adds to them what attention and a few experts say; the last row is compared with the
# vocabulary. Thinking and tools are more text for the same machine. Training turns the walk around.
#
# Later notebooks put weights into few bits ([12](12-small-floats.ipynb)), make it fast ([14](14-speed.ipynb)), change
# it while it runs ([15](15-patching.ipynb)) and hunt bugs ([16](16-bug-hunt.ipynb)). If NumPy's axes and `einsum` are
# not at your fingertips, [00b-numpy](00b-numpy.ipynb) comes first; else go on with [01-tokens](01-tokens.ipynb).
#
# ## Questions
#
# 1. Rename the parameters: `def add(x, y):` and `return x +`. Does the model follow? And with `def add(a, b, c):`?
# 2. Give the thinking prompt of one question and begin its answer with a wrong first step, `<think>3+8=5`. Does the
#    model repair it, or go on from there?
# 3. Make the step of training three times larger, 3e-5. The loss falls by far more than the gradient promised. Compare
#    `model.trace(text).routing.indices` with those of `moved`: what happened that no gradient knows of?
