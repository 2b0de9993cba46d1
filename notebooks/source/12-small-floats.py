# %% [markdown]
# # 12 · Small floats: weights of 16, 8 and 4 bits
#
# *Reading 40 minutes · running 30 seconds · needs [05](05-router.ipynb), [06](06-experts.ipynb)*
#
# GLM-4.5 is published twice: in bfloat16, two bytes a weight, and in FP8, one byte. Others round it further, to four
# bits. A number of four bits can have sixteen values. This notebook encodes one weight by hand in each of these ways,
# and then measures what the model loses: in its weights, in its predictions, in its choice of experts, in its text.

# %% [markdown]
# ## The question
#
# How can a weight be one of 16 values, and the model still write the same text? And when it does not write the same
# text, is it broken?

# %%
import ml_dtypes
import numpy as np

import minglm
from minglm.formats.smallfloats import SmallFloats
from minglm.look import plots

np.set_printoptions(precision=3, suppress=True, linewidth=110)
model = minglm.load("glm-tiny")  # as float32
weight = model.params.layers[1].mlp.experts.gate_proj[0]  # [F, D]: one matrix of one expert
print(weight.shape, f"standard deviation {weight.std():.3f}, largest {np.abs(weight).max():.3f}")

# %% [markdown]
# ## A float is a power of two and a fraction
#
# A float32 has 32 bits: one for the sign, 8 for the exponent e, 23 for the fraction f. Its value is
# ±2^(e − 127) · (1 + f / 2²³). The exponent says between which two powers of two the number lies, the fraction where
# between them. So the **relative** precision is the same for large and small numbers.

# %%
bits = int(np.float32(-0.2).view(np.uint32))
sign, exponent, fraction = bits >> 31, bits >> 23 & 255, bits & (1 << 23) - 1
print(f"{bits:032b}  sign {sign}, exponent {exponent}, fraction {fraction}")
value = (-1) ** sign * 2.0 ** (exponent - 127) * (1 + fraction / 2**23)
assert value == np.float32(-0.2)

# %% [markdown]
# **bfloat16** is the upper half of that: the same 8 bits of exponent, 7 of fraction. Rounding to it means to drop 16
# bits, but to the *nearest*, and of two equally near ones to the one that ends in 0. Adding half a step before the
# cut does it; the half is a little less, by one, if the last bit that stays is 0.


# %%
def to_bfloat16(x):  # float32 -> float32 that fits into 16 bits
    bits = x.view(np.uint32)
    half = 0x7FFF + (bits >> 16 & 1)
    return (bits + half & 0xFFFF0000).view(np.float32)


ties = 1 + np.arange(256) / 256  # every second one is half-way between two
numbers = np.append(np.random.default_rng(0).normal(size=100_000), ties).astype(np.float32)
np.testing.assert_array_equal(to_bfloat16(numbers), numbers.astype(ml_dtypes.bfloat16).astype(np.float32))
print(f"worst relative error {np.abs(to_bfloat16(numbers) / numbers - 1).max():.4f}, and 2⁻⁸ is {2**-8:.4f}")
assert np.array_equal(to_bfloat16(weight), weight)

# %% [markdown]
# Half of the last bit, at worst: 2⁻⁸. The last line says that `glm-tiny`'s weights lose nothing at all in bfloat16.
# They were written to the repository in that format, and reading them as float32 adds zeros.
#
# One array of the model must not be kept so: the **selection bias** of the routers ([05](05-router.ipynb)). Its
# values lie close together, and only their differences count. Take biases as they can be after a long training, all
# near 7. How many different values are left of 160?

# %%
biases = (7 + 0.05 * np.random.default_rng(0).normal(size=160)).astype(np.float32)
kept = len(np.unique(to_bfloat16(biases)))
print(f"160 biases around 7 ± 0.05: {len(np.unique(biases))} values in float32, {kept} in bfloat16")
assert kept < 15
assert model.astype("bfloat16").params.layers[1].mlp.gate.e_score_correction_bias.dtype == np.float32

# %% [markdown]
# Between 4 and 8 the steps of bfloat16 are 1/32 wide, and 160 experts share a handful of them: most of the choices
# would be decided by ties. That is why the selection bias stays float32 in every file, here too.
#
# ## e4m3fn: all 256 of them
#
# An FP8 weight has one bit of sign, **4 of exponent, 3 of fraction**, hence e4m3. The exponent counts from −7. Where
# its bits are all 0, the leading 1 is left out and the steps stay even down to 0 (*subnormal* numbers). And "fn" is
# *finite*: there is no infinity. Only the code with all bits 1 is no number.

# %%
code = np.arange(128, dtype=np.uint8)  # the positive half; the sign bit is 0
e, f = code >> 3, code & 7
values = np.where(e == 0, f / 8 * 2.0**-6, (1 + f / 8) * 2.0 ** (e.astype(int) - 7))
values[127] = np.nan
np.testing.assert_array_equal(values, code.view(ml_dtypes.float8_e4m3fn).astype(np.float64))
with np.printoptions(formatter={"float": "{:9.6g}".format}, linewidth=100):
    print(values.reshape(16, 8))

# %% [markdown]
# Those are all there are, and their negatives. Each row is a power of two in eight steps; each row has steps twice as
# wide as the row above, but for the first, which has the steps of the second. The largest is 448, the smallest above
# 0 is 2⁻⁹.
#
# How wrong can a rounded number be? Half a step, at worst right after a power of two: 1/16 of its value. The picture
# has the worst relative error among numbers of about the same size, for three formats; numbers beyond the largest
# value are set to it.

# %%
x = np.geomspace(2.0**-12, 2.0**14, 26 * 400).astype(np.float32)
formats = {
    "e2m1 (4 bits)": (ml_dtypes.float4_e2m1fn, 6, "#d55e00", "-"),
    "e4m3fn (8 bits)": (ml_dtypes.float8_e4m3fn, 448, "#0072b2", "--"),
    "bfloat16": (ml_dtypes.bfloat16, np.inf, "#009e73", ":"),
}
picture = plots.Picture(figsize=(8, 4), layout="constrained")
axes = picture.add_subplot(xscale="log", yscale="log", ylim=(1e-3, 2), xlabel="number", ylabel="worst relative error")
for name, (kind, largest, colour, line) in formats.items():
    off = np.abs(np.clip(x, 0, largest).astype(kind).astype(np.float32) / x - 1)
    axes.plot(x.reshape(-1, 40)[:, 20], off.reshape(-1, 40).max(axis=1), line, color=colour, linewidth=2, label=name)
axes.axhline(1 / 16, color="black", linewidth=1, label="1/16")
axes.set_title("Rounding to the nearest value that a format has", fontsize=10, loc="left")
axes.legend(fontsize=9, loc="lower center", ncols=4, bbox_to_anchor=(0.5, 0.24))
picture

# %% [markdown]
# e4m3fn (dashed) lies at or below 1/16 from 2⁻⁶ to 448. Further left its steps are too wide, until everything becomes
# 0, which is an error of 1; further right everything becomes 448. The four bits of e2m1 (solid) are of some use from
# 1 to 6 and of none elsewhere. bfloat16 (dotted) is level, on both sides as far as the picture goes.
#
# So a format has a **window** of sizes in which it is good. Weights must be moved into it, and that is what *scales*
# are for: weight = code · scale.
#
# ## One weight in FP8, by hand
#
# GLM-4.5's FP8 releases keep one scale for each row of a matrix: the row's largest number becomes 448. We take the
# first row of the expert's matrix, and number 2 of it.

# %%
row = weight[0]
scale = np.abs(row).max() / np.float32(448)
wanted = row[2] / scale
below, above = values[:127][values[:127] <= abs(wanted)].max(), values[:127][values[:127] >= abs(wanted)].min()
print(f"scale {scale:.6f}; weight {row[2]:.6f} / scale = {wanted:.3f}; between {below} and {above}")
nearest = np.sign(wanted) * (below if abs(wanted) - below < above - abs(wanted) else above)
print(f"kept {nearest} · {scale:.6f} = {nearest * scale:.6f}, error {nearest * scale - row[2]:+.6f}")

# %% [markdown]
# Now the package's rounding of the whole matrix, which must have the same scale and the same code in that place.

# %%
eight = SmallFloats.of("fp8", weight)
print(eight, eight.codes.shape, eight.codes.dtype, eight.scales.shape, eight.scales.dtype)
assert eight.scales[0, 0] == scale
assert eight.codes.view(ml_dtypes.float8_e4m3fn)[0, 2] == nearest
np.testing.assert_allclose(eight.astype(np.float32)[0, 2], nearest * scale, rtol=1e-6)


def error(kept, weight=weight):  # √(Σ error² / Σ weight²)
    return np.sqrt(np.square(kept.astype(np.float32) - weight).sum() / np.square(weight).sum())


print(f"the whole matrix: error {error(eight):.2%} of the weights")

# %% [markdown]
# Less than the 1/16 of the worst case, since most weights lie nearer to a value.
#
# What if the scale is forgotten, and weights are simply cast? And what happens beyond 448? Predict both.

# %%
cast = weight.astype(ml_dtypes.float8_e4m3fn)
smaller = weight / 16  # as if the model had been made with smaller weights
print(f"cast without scale: error {error(cast):.2%}")
cast, scaled = smaller.astype(ml_dtypes.float8_e4m3fn), SmallFloats.of("fp8", smaller)
print(f"the same with all weights / 16: {error(cast, smaller):.2%} without scale, {error(scaled, smaller):.2%} with")
print("449, 465 and 1e9 as e4m3fn:", np.float32([449, 465, 1e9]).astype(ml_dtypes.float8_e4m3fn))
assert error(cast, smaller) > 3 * error(scaled, smaller)

# %% [markdown]
# These weights happen to lie in the window, so the cast is not much worse; smaller weights fall out of it to the
# left. With a scale their size does not matter. To the right there is no infinity to go to, so the result is NaN, and
# one NaN weight makes every number after it NaN. Whoever rounds must clip first.
#
# ## A scale for each row, or for each block
#
# DeepSeek-V3 shares a scale among a block of 128 × 128. Suppose one weight is far too large: 10, 1,000 or 100,000
# times the largest of the others. It takes the scale with it. Whose error grows? Beside the two we look at **int8**,
# which has 255 even steps and the same number of bits, with a scale for each row.


# %%
def int8(weight):
    scale = np.abs(weight).max(axis=1, keepdims=True) / 127
    return np.round(weight / scale) * scale


ways = {"int8": int8, "fp8": lambda w: SmallFloats.of("fp8", w), "fp8-block": lambda w: SmallFloats.of("fp8-block", w)}
print({name: f"{error(keep(weight)):.2%}" for name, keep in ways.items()})

# %% [markdown]
# Without an outlier int8 is the most exact: it spends its 255 values evenly, and weights of one row are of similar
# size. And with one? Predict: which of the three spoils the whole matrix, and which is spoilt by a factor of only 10?

# %%
for factor in (10, 1_000, 100_000):
    spoilt = weight.copy()
    spoilt[0, 0] = factor * np.abs(weight).max()
    found = {}
    for name, keep in ways.items():
        kept = keep(spoilt).astype(np.float32)
        found[name] = error(kept[0, 1:], weight[0, 1:]), error(kept[1:], weight[1:])
    shown = (f"{name}: its row {own:6.1%}, others {rest:5.1%}" for name, (own, rest) in found.items())
    print(f"× {factor:7,}: ", "; ".join(shown))
assert found["fp8"][1] < 0.03 < found["fp8-block"][1]

# %% [markdown]
# An outlier of 10 already ruins the row for int8, and with 1,000 all its other weights become 0. FP8 does not even
# notice 1,000: its window spans a factor of 448 / 2⁻⁶ = 28,672. Only with 100,000 do the others
# fall out of it. Then it matters who shares the scale: with one for each row the damage stays in the row, with a
# block it reaches the whole matrix, which fits into one block here.
#
# That is the case for small *floats*: how scales are shared hardly matters, until it does.
#
# ## Four bits: mxfp4
#
# **e2m1** has one bit of sign, two of exponent, one of fraction. These are its values:

# %%
four = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
print(four)

# %% [markdown]
# The window is tiny: from 1 to 6, and ½ below it. One scale for a row would not do. In **mxfp4** (OCP Microscaling
# Formats 1.0) 32 neighbours in a row share one, and the scale itself has only 8 bits of exponent, e8m0: it is a power
# of two. So a weight has 4 + 8/32 = 4.25 bits.
#
# By hand: the first 32 weights of row 0. Which power of two? With the smaller candidate the largest weight may lie
# beyond 6 and is cut off there. With the larger one nothing is cut, but all others are rounded more coarsely. We try
# both and take the one with the smaller error.

# %%
group = weight[0, :32]
power = int(np.floor(np.log2(np.abs(group).max()))) - 2  # largest / 2^power is in [4, 8)
tried = {}
for p in (power, power + 1):
    codes = np.clip(group / 2.0**p, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    tried[p] = codes, codes.astype(np.float32) * np.float32(2.0**p)
    print(f"2^{p}: largest / scale {np.abs(group).max() / 2.0**p:.2f}, error {error(tried[p][1], group):.1%}")
best = min(tried, key=lambda p: error(tried[p][1], group))
print(f"taken 2^{best}; weight 2: {group[2]:.4f} -> code {tried[best][0][2]} -> {tried[best][1][2]:.4f}")

# %% [markdown]
# In the file two codes lie in one byte, the first one in its lower half; and the scale is one byte, its power plus
# 127.

# %%
packed = SmallFloats.of("mxfp4", weight)
print(packed.codes.shape, packed.scales.shape, f"first byte {packed.codes[0, 0]:08b}, scale byte {packed.scales[0, 0]}")
assert packed.scales[0, 0] == best + 127
np.testing.assert_array_equal(packed.astype(np.float32)[0, :32], tried[best][1])
first, second = tried[best][0][:2].view(np.uint8)
assert packed.codes[0, 0] == first | second << 4
print(f"{8 * packed.nbytes / weight.size} bits a weight, error {error(packed):.1%}")

# %% [markdown]
# The typical error is a ninth of the typical weight. The picture shows the 32 weights of the group: the original, and
# what 8 and 4 bits make of it.

# %%
picture = plots.Picture(figsize=(9, 3.6), layout="constrained")
axes = picture.add_subplot(xlabel="weight of row 0", ylabel="value", xlim=(-1, 32))
axes.hlines(sorted(four * 2.0**best), -1, 32, color="#cccccc", linewidth=0.8, label="values of 4 bits, this group")
axes.vlines(np.arange(32), group, tried[best][1], color="#d55e00", linewidth=1.5)
axes.plot(tried[best][1], "s", color="#d55e00", markersize=5, label="mxfp4")
axes.plot(eight.astype(np.float32)[0, :32], "x", color="#0072b2", markersize=6, label="fp8")
axes.plot(group, "o", color="black", markersize=3, label="the weight")
axes.set_title(
    "glm-tiny, layer 1, expert 0, gate_proj: 32 weights that share a scale in mxfp4", fontsize=10, loc="left"
)
axes.legend(fontsize=9, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.18))
picture

# %% [markdown]
# The grey lines are the only values that the group may have; they lie close near 0 and far apart outside. Each square
# sits on one, and the orange bar is its error. The crosses of fp8 cover the dots: at this size their error cannot be
# seen.
#
# ## Every tensor
#
# Are some kinds of matrices worse off than others? The same error over all of them, and its worst case. In mxfp4 only
# the routed experts are rounded, as here and in gpt-oss; embedding, head, norms, routers and `eh_proj` never are.

# %%
from minglm.evaluate.storage import error_rows

rows = list(error_rows(model))
for kind in ("fp8", "fp8-block", "mxfp4"):
    own = [row for row in rows if row.kind == kind]
    kinds, tensors = len(own), sum(row.tensors for row in own)
    least, most = min(row.error for row in own), max(row.error for row in own)
    worst = max(row.worst for row in own)
    print(f"{kind:10} {tensors} tensors of {kinds:2} kinds: {least:.2%} … {most:.2%}, worst tensor {worst:.2%}")
assert max(r.worst for r in rows if r.kind == "fp8") < 0.03
assert max(r.worst for r in rows if r.kind == "mxfp4") < 0.12

# %% [markdown]
# All alike. The error depends on the format and hardly on the matrix: weights of trained matrices are shaped much
# like noise, each matrix with its own size, and the scales take the size away.
#
# ## From weights to outputs
#
# A number in a row of outputs is a sum of 192 products, each with an error of 11 % in mxfp4. Is the sum's error 192
# times as large? As large? Smaller?

# %%
page = "def mean(values):\n    return sum(values) / len(values)\n"
x = model.trace(page, keep="layers.1.post_attention_layernorm")["layers.1.post_attention_layernorm"][0]  # [T, D]
for kept in (eight, packed):
    print(f"{kept.kind}: weights {error(kept):.2%}, outputs {error(x @ kept.astype(np.float32).T, x @ weight.T):.2%}")
    assert error(x @ kept.astype(np.float32).T, x @ weight.T) < 1.3 * error(kept)

# %% [markdown]
# About as large. The roundings go up as often as down, so the errors add like the steps of a drunkard: √192 of them
# in size. The products themselves add no faster, as far as they are of both signs, so the ratio stays. Where they
# pull in one direction, the sum is *better* than its parts. That is why a model survives an error of 11 % in every
# weight: it was never one weight that mattered.
#
# ## What the predictions lose
#
# Held-out code, 8 pieces of 256 tokens: bits for each token, before and after.

# %%
from minglm.data.heldout import heldout_documents

code = "".join(document.text for document in heldout_documents("code"))
ids = model.as_ids(code, limit=False)[0, : 8 * 256].reshape(8, 256)
size = len(model.tokenizer.decode(ids[:, 1:].ravel().tolist()).encode())


def token_bits(model):  # [B, T − 1]
    z = model.forward(ids).logits[:, :-1].astype(np.float64)
    z -= z.max(axis=-1, keepdims=True)
    logs = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(logs, ids[:, 1:, None], axis=-1)[..., 0] / np.log(2)


base = token_bits(model)
print(f"float32: {base.sum() / size:.4f} bits per byte, {base.mean():.3f} bits per token")

# %% [markdown]
# The same tokens are used each time, so the differences can be averaged token by token, with a standard error of
# their own. It is far smaller than that of either mean, because most of a token's bits are the same before and after.

# %%
small = {kind: model.astype(kind) for kind in ("bfloat16", "fp8", "fp8-block", "mxfp4")}
for kind, other in small.items():
    change = token_bits(other) - base
    spread = 2 * change.std() / np.sqrt(change.size)
    print(f"{kind:10} {(base + change).sum() / size:.4f}, worse by {change.mean():+.4f} ± {spread:.4f} bits a token")
    assert abs(change.mean()) < 0.05
assert np.array_equal(token_bits(small["bfloat16"]), base)

# %% [markdown]
# Changes of a few thousandths of a bit, about as large as the interval of two standard errors beside them: on so
# short a text a rounded model may even come out ahead. A claim like "FP8 is better" would need more text than this.
# Over more text ([docs/small-floats.md](../docs/small-floats.md)) glm-tiny loses 0.07 % with fp8 and 0.27 % with
# mxfp4.
#
# A mean hides how single tokens move. How far do they?

# %%
for kind in ("fp8", "mxfp4"):
    change = np.abs(token_bits(small[kind]) - base)
    print(
        f"{kind:6} a token's bits move by {np.median(change):.3f} (median), {np.quantile(change, 0.99):.2f} (1 in 100)"
    )
    assert np.median(change) > 2 * abs((token_bits(small[kind]) - base).mean())

# %% [markdown]
# Single tokens move much further than the mean: some up, some down, and the mean cancels them. So "the same bits per
# byte" does not mean "the same model".
#
# ## Which experts are picked
#
# The routers keep their weights. But what they read comes from rounded layers, and the K-th and the next expert may
# lie close together. Which choices would you expect to change?

# %%
picked = model.trace(ids, keep="*.mlp.expert_indices,*.mlp.router_scores,*.mlp.biased_scores").routing
for kind in ("fp8", "mxfp4"):
    other = small[kind].trace(ids, keep="*.mlp.expert_indices,*.mlp.router_scores,*.mlp.biased_scores").routing
    shared = (other.indices[..., None] == picked.indices[..., None, :]).any(axis=-1)  # [T, layer, K]
    changed = ~shared.all(axis=-1)
    before, after = np.median(picked.margins[~changed]), np.median(picked.margins[changed])
    print(f"{kind:6} same picks {shared.mean():.2%}; median margin: stay {before:.4f}, change {after:.4f}")
    assert after < before / 3

# %% [markdown]
# Of a hundred picks one or two are others. The choices that change had a small **margin**, the distance from the last
# picked to the next score: they were nearly ties before. In the picture all choices of the text are sorted by their
# margins into ten equal parts.

# %%
tenths = np.digitize(picked.margins, np.quantile(picked.margins, np.arange(0.1, 1, 0.1)))  # [T, layer] -> 0 … 9
shares = [100 * changed[tenths == part].mean() for part in range(10)]
picture = plots.Picture(figsize=(8, 3.4), layout="constrained")
axes = picture.add_subplot(xlabel="tenth of the choices, smallest margins first", ylabel="% that change")
axes.bar(np.arange(1, 11), shares, color="#8cbfe0", edgecolor="#0072b2", hatch="//")
axes.axhline(100 * changed.mean(), color="black", linestyle="--", label=f"all choices, {changed.mean():.1%}")
axes.set_xticks(range(1, 11))
said = f"5 layers, E = 16, K = 2, T = {ids.size:,} tokens"
axes.set_title(f"glm-tiny in mxfp4: tokens that see other experts, by margin\n{said}", fontsize=10, loc="left")
axes.legend(fontsize=9)
assert shares[0] > 3 * shares[4]
picture

# %% [markdown]
# The bars fall steeply: nearly all changes are in the first tenths, where the choice had been close; the dashed line
# is the mean. To compare two programs by their experts therefore means to leave out near ties, or to count them
# apart.
#
# ## Whether the text stays the same
#
# Greedy text is a chain of choices. If two tokens are nearly as good, a small change picks the other one, and from
# there on the text goes another way. Thirty-six prompts, 48 tokens each: code to go on with, and questions.

# %%
from minglm.bench.drafts import prompts

given = [prompt for some in prompts(model, 12).values() for prompt in some]
plain = [model.generate(prompt, 48).ids for prompt in given]


def first_change(kind):
    """(text, place) of the first token that differs, of those texts that differ."""
    texts = (small[kind].generate(prompt, 48).ids for prompt in given)
    found = [[a != b for a, b in zip(*both, strict=False)] for both in zip(plain, texts, strict=True)]
    return [(n, differ.index(True)) for n, differ in enumerate(found) if True in differ]


changes = {kind: first_change(kind) for kind in small}
print({kind: f"{len(found)} of {len(given)} texts" for kind, found in changes.items()})
assert not changes["bfloat16"]

# %% [markdown]
# Some texts become others, with four bits more of them; not with bfloat16, which lost nothing. Is that a broken
# model? Look at the places where they part: how far was the best token ahead of the second one, in the model before
# rounding?


# %%
def lead(n, place):
    """The best logit minus the second best, before token `place` of text n."""
    ids = [*model.as_ids(given[n])[0], *plain[n][:place]]
    second, best = np.sort(model.forward([ids]).logits[0, -1])[-2:]
    return best - second


usual = np.median([lead(n, len(text) // 2) for n, text in enumerate(plain)])
for kind in ("fp8", "mxfp4"):
    leads = [lead(*found) for found in changes[kind]]
    print(f"{kind:6} lead where the text parts: median {np.median(leads):.3f}, largest {max(leads):.2f}")
    assert np.median(leads) < usual / 4
print(f"usual lead, in the middle of each text: {usual:.2f}")

# %% [markdown]
# They part where the model had hardly a preference: logits a few hundredths apart, where a few units are usual. After
# that place the texts cannot be compared token by token any more. So equal text is no test for a rounded model, and
# different text no sign of a fault; a difference at a place with a large lead would be one.
#
# ## Inputs of 8 bits, too
#
# Hardware that multiplies FP8 needs *both* sides in FP8: the weights, and the activations that come in. Weights are
# known beforehand; activations are not. Two ways to find their scale:
#
# - **dynamic**: each token's row gets its own, as it comes. GLM-4.5's FP8 releases say this in their config.
# - **static**: one number for the matrix, the largest value seen on some other text (*calibration*).
#
# Here are the inputs of `down_proj` of the dense layer 0, for a page of code, and a calibration text that is prose.


# %%
def inputs(text):  # [T, I] what down_proj of layer 0 reads
    return model.trace(text, keep="layers.0.mlp.hidden")["layers.0.mlp.hidden"][0]


def rounded(x, largest, to=ml_dtypes.float8_e4m3fn, limit=448):
    scale = largest / np.float32(limit)
    codes = np.clip(x / scale, -limit, limit)
    return (np.round(codes) if to is int else codes.astype(to).astype(np.float32)) * scale


# %% [markdown]
# The second function is the rounding of both formats: bring the largest number to the limit, round, bring it back. It
# clips first, for the reason seen above.

# %%
prose = "".join(document.text for document in heldout_documents("prose"))[:1500]
x, seen = inputs(code[:1500]), np.abs(inputs(prose)).max()
largest = np.abs(x).max(axis=1, keepdims=True)  # [T, 1]
print(f"largest of each token: {largest.min():.2f} … {largest.max():.2f}; seen in the calibration text: {seen:.2f}")
for name, scales in (("dynamic", largest), ("static", seen)):
    fp8, whole = error(rounded(x, scales), x), error(rounded(x, scales, int, 127), x)
    print(f"{name:8} fp8 {fp8:.2%}, int8 {whole:.2%}; beyond the scale: {(np.abs(x) > scales).mean():.3%}")

# %% [markdown]
# For FP8 the two ways are close: a token that is ten times smaller than the largest still lies in the window. int8
# has no window to spare, so a scale of one's own is worth a good deal there.
#
# Nothing was beyond the scale, because the calibration text happened to have as large numbers as this one. That is
# the danger of the static way: with a harmless calibration text numbers are clipped, and it is the largest ones that
# are.

# %%
for share in (1, 0.5, 0.1):
    clipped = error(rounded(x, share * seen), x)
    print(f"calibrated on {share:4.0%} of that largest value: error {clipped:.1%}")
assert clipped > 5 * error(rounded(x, largest), x)

# %% [markdown]
# Over all matrices of the model and held-out text, [docs/small-floats.md](../docs/small-floats.md) has both: 0.12 %
# more bits per byte with dynamic scales and 0.13 % with static ones.
#
# ## Bytes
#
# What is saved? For GLM-4.5 itself, counted from its config: all tensors, with scales, and with the parts that stay
# wide.

# %%
from minglm.formats.storage import as_storage
from minglm.model.params import shapes, walk_stacked

glm = minglm.PRESETS["GLM-4.5"]
for kind in ("bfloat16", "fp8", "fp8-block", "mxfp4"):
    total = sum(as_storage(kind).bytes_of(name, array.shape) for name, array in walk_stacked(shapes(glm)))
    tiny = sum(array.nbytes for _, array in walk_stacked(small[kind].params))
    print(f"{kind:10} GLM-4.5 {total / 1e9:5.0f} GB; glm-tiny {tiny / 1e6:4.1f} MB")

# %% [markdown]
# The experts are nearly all of GLM-4.5, so it shrinks nearly as much as they do. In `glm-tiny` the embedding and the
# head are a large part, and stay wide.
#
# Fewer bytes are also faster, where reading is what takes the time: that is [14](14-speed.ipynb).
#
# ## What we have learnt
#
# A small float is a code and a scale that moves a group of weights into the window in which the format is good. The
# errors are random, so sums keep the relative error of their parts, and predictions lose a fraction of a percent.
# Near ties fall the other way: among experts, and among tokens.
#
# Next: [13](13-thinking-and-tools.ipynb) lets the model think and use a tool.
#
# ## Questions
#
# 1. Give every weight of `fp8` the scale of the whole matrix instead of its row's. How much larger is the error, and
# why so little? Then do the same with `int8`.
# 2. mxfp4 with groups of 16 or 64 instead of 32, by the cell above: what happens to the error, what to the bits?
# 3. `model.astype("bfloat16")` changes no text here. Take the weights of a model that was never rounded:
# `minglm.new("glm-nano", seed=0)`. How many of its greedy tokens change, and at which leads?
