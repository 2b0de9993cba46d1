# %% [markdown]
# # 07 · One whole forward step, traced
#
# *Reading 30 minutes · running 10 seconds · needs [02](02-residual-stream.ipynb) to [06](06-experts.ipynb)*
#
# The parts are known. Now they run together, once, on one line of code, and nothing is hidden: every array that the
# model makes is kept under its name, in the order of the computation. At the end stands one token.

# %% [markdown]
# ## The question
#
# `glm-tiny` is given the beginning of a function. How do fifteen numbers, one for each token, become a guess at what
# comes next? And is what we have seen of the parts really all that there is?
#
# A **trace** keeps every array. Its names are those of the weights: `layers.3.self_attn.q` is what
# `model.layers.3.self_attn.q_proj.weight` makes. They are listed in [docs/taps.md](../docs/taps.md).

# %%
import numpy as np

import minglm
from minglm.look import plots
from minglm.model import rms_norm, softmax

np.set_printoptions(precision=3, suppress=True, linewidth=110)
model = minglm.load("glm-tiny")
trace = model.trace("def area(width, height):\n    return width *")
print(trace, "\n", trace.tokens)

# %% [markdown]
# Fifteen tokens, 457 arrays. Most of them are experts' insides; the rest fits on a page. Here are the names of the
# first layer, of one that has experts, and of what stands around the layers.


# %%
def size(name):
    """Shape, and root of the mean square: how large a typical entry is."""
    finite = trace[name][np.isfinite(trace[name])]
    return f"{name:38}{trace[name].shape!s:18}{np.sqrt((finite.astype(np.float64) ** 2).mean()):8.3f}"


for name in ["embed_tokens", *trace.names("layers.0.*"), "norm", "logits"]:
    print(size(name))

# %% [markdown]
# Read down the shapes. B = 1 row, T = 15 tokens, D = 192 numbers for each: `(1, 15, 192)` is the residual stream, and
# it is the shape that every part starts from and comes back to. In between, attention has heads, (1, 15, 6, 32), and
# the dense MLP of layer 0 is wider, 512.
#
# ## The beginning: rows of a table
#
# `embed_tokens` is a lookup: token 4 is `w`, its id is a row number. No arithmetic happens.

# %%
ids = trace.ids[0]
np.testing.assert_array_equal(trace["embed_tokens"][0], model.params.embed_tokens.weight[ids])
twice = [t for t in range(len(ids)) if trace.tokens[t] == "idth"]
print(
    "id of 'idth':",
    ids[twice],
    "; same row twice:",
    (trace["embed_tokens"][0, twice[0]] == trace["embed_tokens"][0, twice[1]]).all(),
)
plots.plot_array(trace["embed_tokens"][0], "T D", "embed_tokens, glm-tiny", rows=trace.tokens)

# %% [markdown]
# Each line of the picture is a token, each column one of the 192 numbers; red is positive, blue negative. The two
# `idth` are the same line: a row of the table knows neither its place nor its neighbours. Whatever tells them apart
# must come from attention.
#
# ## Layer 0: attention, then a dense MLP
#
# The stream is normed, attention reads it, and its result is **added**: `middle`. Normed again, the MLP reads it, and
# its result is added: `out`. Nothing is ever overwritten.

# %%
at = "layers.0."
x = trace["embed_tokens"]
middle = x + trace[at + "self_attn.o"]
out = middle + trace[at + "mlp.out"]
np.testing.assert_array_equal(middle, trace[at + "middle"])
np.testing.assert_array_equal(out, trace[at + "out"])

# %% [markdown]
# Equal to the last bit. Now the attention of this layer, all six heads: who looks at whom?

# %%
plots.plot_attention(trace[at + "self_attn.probs"][0], trace.tokens, kv_heads=2, layer=0, name="glm-tiny")

# %% [markdown]
# Tokens that ask stand down the side, those that are looked at along the bottom; dark is much. The upper right half is
# empty: nobody sees the future. Most rows are pale, spread over all that came before. The darkest cell away from the
# corner is in head 2: `he` looks at the first `idth`, one parameter at the other.
#
# After this layer, the two `idth` are no longer equal. How far apart are they, layer by layer? And two tokens that
# stand next to each other, `(` and `w`? The measure is the cosine, 1 for the same direction.


# %%
def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


for i in range(-1, 6):
    stream = (trace["embed_tokens"] if i < 0 else trace[f"layers.{i}.out"])[0]
    where = "the table" if i < 0 else f"layer {i}  "
    print(f"after {where}: idth, idth {cosine(stream[5], stream[13]):.2f}   (, w {cosine(stream[3], stream[4]):.2f}")

# %% [markdown]
# The two `idth` begin as one vector and drift apart as each collects its own past, one of them about to be followed
# by a comma and the other by a star.
#
# ## Layer 1: the first one with experts
#
# The same two steps; but the second reads: router, experts, shared expert.

# %%
for name in trace.names("layers.1.mlp.*"):
    if ".experts." not in name and name != "layers.1.mlp.expert_indices":
        print(size(name))
print("experts of the first three tokens:", trace["layers.1.mlp.expert_indices"][:3].tolist())

# %% [markdown]
# Here the batch and the time axis have become one: N = B·T = 15 tokens, because a router does not care in which row a
# token stands. Sixteen scores for each, two picks (`expert_indices`, whole numbers), two weights.
#
# The picture shows all five layers with experts: which two experts each token went to, and with which weight.

# %%
routing = trace.routing
plots.plot_picks(routing.indices, routing.weights, trace.tokens, routing.experts, routing.layers, name="glm-tiny")

# %% [markdown]
# Read a line: `def` went to one pair in layer 1 and to another in layer 2. Layers do not share experts; expert 3 of
# layer 1 and expert 3 of layer 2 have nothing in common but the number.
#
# How many experts does a layer wake for these fifteen tokens? Each of those runs once, on all of its tokens together.

# %%
for layer in routing.layers:
    visits = {int(name.split(".")[4]): trace[name] for name in trace.names(f"layers.{layer}.mlp.experts.*.tokens")}
    assert sum(len(tokens) for tokens in visits.values()) == 15 * model.config.num_experts_per_tok
    print(
        f"layer {layer}: {len(visits)} of {routing.experts} experts;",
        {e: tokens.tolist() for e, tokens in visits.items()},
    )

# %% [markdown]
# Every token appears in two lists: 30 picks. What do the experts of one token say? Take the last one, `*`, in layer
# 1: its two answers, each times its weight, plus the shared expert's, are what is added to the stream.

# %%
last, layer = 14, 1
parts = []
for e, w in zip(routing.indices[last, layer - 1], routing.weights[last, layer - 1], strict=True):
    row = np.flatnonzero(trace[f"layers.1.mlp.experts.{e}.tokens"] == last)[0]
    parts.append(w * trace[f"layers.1.mlp.experts.{e}.out"][row])
    print(f"expert {e:2}: weight {w:.2f}, size of its answer {np.linalg.norm(parts[-1] / w):.2f}")
shared = trace["layers.1.mlp.shared"][last]
np.testing.assert_allclose(sum(parts) + shared, trace["layers.1.mlp.out"][0, last], atol=1e-5)
print(f"routed together {np.linalg.norm(sum(parts)):.2f}, shared {np.linalg.norm(shared):.2f}")

# %% [markdown]
# ## The rest: the same again
#
# Four more layers do the same with other weights. What each adds to the last token's row, and what the row has become
# after it, is all that we need to see of them.

# %%
for i in range(6):
    parts = [trace[f"layers.{i}.{name}"][0, last] for name in ("self_attn.o", "mlp.out", "out")]
    attention, mlp, out = (np.linalg.norm(part) for part in parts)
    print(f"layer {i}: attention adds {attention:5.1f}, the MLP or experts {mlp:5.1f}; now {out:6.1f}")

# %% [markdown]
# The row grows, since every layer adds. And that is the whole story of the stream: the last state is the embedding
# plus twelve contributions. If anything were hidden, this sum would not come out.

# %%
total = trace["embed_tokens"] + sum(trace[f"layers.{i}.self_attn.o"] + trace[f"layers.{i}.mlp.out"] for i in range(6))
off = np.abs(total - trace["layers.5.out"]).max()
print(f"largest entry {np.abs(total).max():.1f}; the sum differs from the last state by {off:.0e}")
assert off < 1e-4

# %% [markdown]
# ## The end: one row against a table
#
# The last state is normed and multiplied with the head, a table with a row for each of the 2,048 tokens of the
# vocabulary. The dot product with a row is that token's **logit**; a softmax makes probabilities of them.

# %%
hidden = rms_norm(trace["layers.5.out"][0, last], model.params.norm.weight, model.config.rms_norm_eps)
logits = model.params.lm_head.weight @ hidden
np.testing.assert_allclose(logits, trace["logits"][0, last], atol=1e-3)
probs = softmax(logits)
for i in np.argsort(-probs)[:5]:
    print(f"{model.tokenizer.token(int(i))!r:10} {probs[i]:.1%}")
guess = int(probs.argmax())
assert model.tokenizer.token(guess) == "␣he"

# %% [markdown]
# `he`, the beginning of `height`: the right parameter, which stood seven tokens before the end of the line above. The
# model is tiny and not sure, but it looked in the right place.
#
# Every position has made such a guess, not only the last. In training each of them is corrected; in writing only the
# last one is used. How well did they guess what really came next?

# %%
every = softmax(trace["logits"][0])  # [T, V]
real = every[np.arange(14), ids[1:]]
for t in range(14):
    best = model.tokenizer.token(int(every[t].argmax()))
    print(f"after {trace.tokens[t]!r:10} it guessed {best!r:10} and gave {trace.tokens[t + 1]!r:10} {real[t]:6.1%}")
print(f"mean loss {-np.log(real).mean():.3f}")
loss, _ = model.loss_and_grads(ids[None], mtp_weight=0)
np.testing.assert_allclose(loss.main, -np.log(real).mean(), rtol=1e-4)

# %% [markdown]
# The mean of −log p over these guesses *is* the loss that training brings down: the number is the one that
# `model.loss_and_grads` returns.
#
# ## And the token after that
#
# GLM-4.5 has one more layer. It takes the last states and the *next* token, and guesses the token after it: multi-token
# prediction, [notebook 09](09-mtp.ipynb). We give it our own guess, `he`.

# %%
longer = np.append(ids, guess)[None]
beyond = model.mtp(longer, depth=1)[0, -1]  # from the state of `*` and the token `he`
print(
    "MTP layer:",
    model.tokenizer.token(int(beyond.argmax())),
    " main model one step later:",
    model.tokenizer.token(int(model.forward(longer).logits[0, -1].argmax())),
)
assert beyond.argmax() == model.forward(longer).logits[0, -1].argmax()

# %% [markdown]
# Both say `ight`. The MTP layer said it a step earlier and for the price of one layer.
#
# ## What we have learnt
#
# A forward step is a lookup, then twelve additions to the same rows, then a comparison with a table. Attention moves
# information between rows, experts work on each row alone, and everything that happens can be read from the trace.
# The next notebooks look at many tokens instead of one step: [08a](08a-expert-load.ipynb) asks whether experts get
# equal work, [08b](08b-specialisation.ipynb) whether they divide it in a way that means something.
#
# ## Questions
#
# 1. Put a space after the star. Is the guess still the right one? Look at `trace.tokens` before you blame the model.
# 2. Leave out one contribution, `layers.3.self_attn.o`, from the sum, norm what remains and multiply with the head.
#    Does the guess change? Is that the same as running the model without that attention?
# 3. The logits of all positions cost 15 rows times 2,048 products, and only the last row is used in writing. With
#    GLM-4.5's vocabulary of 151,552 and D = 5,120, how many operations does a prompt of 1,000 tokens save if only the
#    last row is computed? (`model.generate` does so.)
