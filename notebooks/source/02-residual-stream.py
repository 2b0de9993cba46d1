# %% [markdown]
# # 02 · The residual stream, and the norm before every part
#
# *Reading 25 minutes · running 10 seconds · needs [01](01-tokens.ipynb)*
#
# Between the embedding and the last matrix lies one array, [T, D], that every layer reads and adds to. Nothing else
# goes from layer to layer. This notebook watches it grow, computes the norm that each part sees it through, and looks
# into it half-way: what would the model say if it stopped here?

# %% [markdown]
# ## The question
#
# A layer of GLM-4.5 does not replace its input. It adds to it. Why, how much, and what keeps the numbers in bounds
# when 92 layers have added theirs?
#
# We use `glm-tiny`, which has six layers, and a line of Python.

# %%
import numpy as np

import minglm
from minglm.look import plots
from minglm.model import rms_norm, softmax

np.set_printoptions(precision=3, suppress=True, linewidth=110)
model = minglm.load("glm-tiny")
trace = model.trace("import numpy as np\n\nfor i in range(10):\n    print(i", keep="*")
print(trace.tokens, trace["embed_tokens"].shape)

# %% [markdown]
# ## Adding
#
# A layer has two parts, attention and the MLP (or experts), and does the same with both: norm, part, add. By hand,
# for layer 3, from what the trace kept of the two parts:

# %%
x = trace["layers.2.out"]  # what layer 3 gets
middle = x + trace["layers.3.self_attn.o"]
out = middle + trace["layers.3.mlp.out"]
np.testing.assert_array_equal(middle, trace["layers.3.middle"])
np.testing.assert_array_equal(out, trace["layers.3.out"])

# %% [markdown]
# The sum through all layers is the **residual stream**. Two things follow from its being a sum.
#
# *Backward*, the gradient of a sum is the gradient of each term: the last layer's gradient arrives at the embedding
# undiminished, whatever the layers between do ([10a](10a-backward.ipynb)). *Forward*, whatever one layer wrote is
# still there for all later ones, and they can answer to it, or cancel it.
#
# How much does each part write? We measure the length of a row, √Σx², and take the mean over the tokens.


# %%
def length(name):
    return np.linalg.norm(trace[name][0], axis=-1).mean()


print(f"embedding: {length('embed_tokens'):.1f}")
for i in range(6):
    o, mlp, out = (length(f"layers.{i}.{part}") for part in ("self_attn.o", "mlp.out", "out"))
    print(f"layer {i}: attention writes {o:5.1f}, MLP {mlp:5.1f}; the stream is {out:5.1f} long")

# %% [markdown]
# The stream grows from layer to layer. Not by the sum of the lengths: contributions point in different directions,
# and vectors at right angles add like the sides of a triangle. In a wide stream most directions are nearly at right
# angles, so there is room for many messages in one row.
#
# The picture has one number for each pair of contributions to the last token: the cosine between them.

# %%
names = ["embed_tokens", *(f"layers.{i}.{part}" for i in range(6) for part in ("self_attn.o", "mlp.out"))]
parts = np.stack([trace[name][0, -1] for name in names])  # [13, D]
unit = parts / np.linalg.norm(parts, axis=1, keepdims=True)
labels = ["emb", *(f"{i} {part}" for i in range(6) for part in ("att", "mlp"))]
plots.plot_array(unit @ unit.T, "part part", "cosines of what was added to the last token", rows=labels, columns=labels)

# %% [markdown]
# Along the diagonal a part meets itself: 1. Most of the rest is grey, near 0: nearly at right angles. The red cells at
# the upper left are the embedding and the first two MLPs, which point partly the same way. None is clearly negative:
# here no part takes back what another has said.
#
# **And the sum of all parts is the last state**, to rounding. There is no other way from beginning to end.

# %%
total = parts.sum(axis=0)
print("differs from the last state by", np.abs(total - trace["layers.5.out"][0, -1]).max())
assert np.abs(total - trace["layers.5.out"][0, -1]).max() < 1e-4

# %% [markdown]
# ## The norm
#
# A part that reads the stream should not care whether layer 2 or layer 90 stands behind it, so it does not read the
# stream itself but its direction. **RMSNorm** divides each row by the root of the mean of its squares (its
# RMS; the length is √D times that), so that its RMS is 1, and multiplies each column by a learned weight.
#
# $$y = \frac{x}{\sqrt{\text{mean}(x^2) + \varepsilon}} \cdot w$$

# %%
row = x[0, -1]  # [D], the last token before layer 3
weight, eps = model.params.layers[3].input_layernorm.weight, model.config.rms_norm_eps
size = np.sqrt((row**2).mean() + eps)
by_hand = row / size * weight
np.testing.assert_allclose(by_hand, trace["layers.3.input_layernorm"][0, -1], rtol=1e-4, atol=1e-5)
print(f"root mean square {size:.2f}, after the division {np.sqrt(((row / size) ** 2).mean()):.3f}")

# %% [markdown]
# Equal. It is a norm over the D numbers of *one token*: tokens know nothing of each other here. A mean over all
# tokens would give the same when there is one token, and leak the future when there are several.
#
# Make a row a thousand times longer, and the norm gives the same. Predict what happens if you *add* 1 to every entry.

# %%
normed = rms_norm(row, weight, eps)
print("a thousand times longer:", np.abs(rms_norm(1000 * row, weight, eps) - normed).max())
print("1 added to each entry:  ", np.abs(rms_norm(row + 1, weight, eps) - normed).max())
centred = row - row.mean()
print("as LayerNorm would see it:", np.abs(centred / centred.std() * weight - normed).max())

# %% [markdown]
# Adding a constant changes it. The older LayerNorm subtracts the mean first and would not have noticed; RMSNorm
# (arXiv 1910.07467) leaves that step out. On this row the two hardly differ, because the mean of 192 numbers of both
# signs is small anyway: with such inputs a test cannot tell one from the other.
#
# **What is ε for?** So that a row of zeros is not divided by zero. It stands *inside* the root. For ordinary rows
# nobody can tell; for a tiny row it decides.

# %%
tiny = row * 1e-4
inside = tiny / np.sqrt((tiny**2).mean() + eps)
outside = tiny / (np.sqrt((tiny**2).mean()) + eps)
print(f"sizes: inside the root {np.sqrt((inside**2).mean()):.3f}, outside {np.sqrt((outside**2).mean()):.3f}")
assert np.sqrt((inside**2).mean()) < 0.1 < np.sqrt((outside**2).mean())

# %% [markdown]
# Inside the root, ε = 10⁻⁵ means: rows smaller than √ε ≈ 0.003 stay small. Outside, they would be blown up to size
# 1.
#
# Each layer has two norms with weights of their own, q and k have theirs inside attention ([04](04-attention.ipynb)),
# and a last one stands before the head. Their weights start at 1 and are trained. A column with a large weight is
# listened to, one with a small weight is not. (Compare within a layer: the size of all of them together can be made up
# for by the matrix that reads.)

# %%
for i in range(6):
    a, b = (getattr(model.params.layers[i], name).weight for name in ("input_layernorm", "post_attention_layernorm"))
    print(f"layer {i}: before attention {a.min():.2f} … {a.max():.2f}, before the MLP {b.min():.2f} … {b.max():.2f}")
last = model.params.norm.weight
print(f"before the head: {last.min():.2f} … {last.max():.2f}")

# %% [markdown]
# ## Looking in half-way
#
# The head compares the last state with a row for each token of the vocabulary. But the stream has the same D numbers
# after every layer, so the comparison can be made at any of them. That is the **logit lens**: last norm and head,
# applied too early.


# %%
def lens(state):  # [.., D] -> [.., V]
    return softmax(rms_norm(state, last, eps) @ model.params.lm_head.weight.T)


places = ["embed_tokens", *(f"layers.{i}.out" for i in range(6))]
for name in places:
    probs = lens(trace[name][0, -1])
    best = np.argsort(-probs)[:3]
    print(f"{name:13}", *(f"{model.tokenizer.token(int(i))!r:12}{probs[i]:6.1%}  " for i in best))
    assert (model.tokenizer.token(int(best[0])) in ("ma", "mplement")) == (name < "layers.4")
np.testing.assert_allclose(lens(trace["layers.5.out"]), softmax(trace["logits"]), atol=1e-5)

# %% [markdown]
# The last line is the model's own answer: the lens is exact there. Above it the model does not know yet where it is.
# Until layer 3 it continues the *letter*: after `i` come `ma`, `mp`, `mplement`, as in "implement". From layer 4 on it
# continues the *program*: this `i` is a variable inside brackets, so a plus or a closing bracket may follow.
#
# Nothing in training asked the early layers to be readable. That they are is a consequence of adding.
#
# How much is still to be gained at each layer? The loss that the lens would have, over all tokens of the line:

# %%
ids = trace.ids[0]
losses = [-np.log(lens(trace[name][0])[np.arange(len(ids) - 1), ids[1:]]).mean() for name in places]
for name, loss in zip(places, losses, strict=True):
    print(f"{name:13} {loss:6.2f}  {'#' * int(3 * loss)}")
assert losses[-1] == min(losses)

# %% [markdown]
# Guessing blindly among 2,048 tokens costs ln 2048 = 7.6. Read through a head that was made for the last state, the
# embedding is slightly worse than blind: confidently wrong. Then each layer takes off 0.7 to 1.1, and the last two.
#
# ## The only memory of a position
#
# Replace one token's state after layer 2 by something else, and everything that the model knew there is gone. A tap
# can do that: it sees each array and may give another back.


# %%
def forget(name, array):
    if name == "layers.2.out":
        emptied = array.copy()
        emptied[0, 9] = 0  # the state of the first `(`
        return emptied


changed = model.forward(trace.ids, tap=forget).logits[0]
moved = np.abs(changed - trace["logits"][0]).max(axis=-1)  # [T]
for t, token in enumerate(trace.tokens):
    print(f"{t:2} {token!r:10} {moved[t]:6.2f}")
assert moved[:9].max() < 1e-4
assert np.allclose(moved[[10, 11]] / moved[9], [2 / 3, 1 / 2], atol=0.03)
assert moved[12:].max() < moved[9] / 6

# %% [markdown]
# Tokens before it have not moved, but for rounding (an expert multiplies the rows of several tokens together), since
# nobody looks ahead. Token 9 itself is lost. The two digits after it
# still move by two thirds and by half as much, tokens further on by a seventh or less: all of them had looked at token
# 9 in layers 0 to 2, which still happened, and miss it in 3 to 5.
#
# ## What we have learnt
#
# Every part reads the stream through a norm and adds its answer, so the last state is the embedding plus everything
# that was said since. The norm brings each row to RMS 1, token by token, so a part sees directions and not lengths.
#
# The next notebook begins with what attention needs to know besides the stream: where a token stands,
# [03](03-rotary-positions.ipynb).
#
# ## Questions
#
# 1. Rows of a stream at right angles: how long is the sum of 13 vectors of length 1 then, and how long is the sum if
#    all point the same way? Which of the two is nearer to what layers 0 to 5 do here?
# 2. The weight of a norm could be multiplied into the matrix that reads it, and the norm's weight set to 1. Do it for
#    `layers[3].input_layernorm` and q, k, v (their biases too?) and check that the logits stay. (Records are tuples:
#    write into the arrays of
#    `self_attn.q_proj`, `k_proj`, `v_proj`, `weight[:] *= w` with weights [out, in], on a model that you load for it.)
# 3. Swap two tokens' states in `layers.2.out`. Which logits move, and do they become each other's?
