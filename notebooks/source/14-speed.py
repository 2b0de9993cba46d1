# %% [markdown]
# # 14 · From NumPy to memory speed: the roofline of one token
#
# *Reading 30 minutes · running 40 seconds · needs [04b](04b-generation.ipynb), [06](06-experts.ipynb)*
#
# Why does a large language model write thirty tokens a second and not three hundred? The answer is a division: how
# many bytes must be read for a token, over how many bytes the memory delivers. This notebook counts both, and times
# what is left on the way from plain NumPy to that limit.

# %% [markdown]
# ## The question
#
# One token goes through `glm-tiny`. What is the least time that it can take on this machine, and why does NumPy take
# many times as long?
#
# All times below were measured on the machine that ran this notebook, a virtual one of two cores, and will be others
# on yours. What is asserted are counts and equalities, never times.

# %%
import statistics
import time

import numpy as np

import minglm
from minglm.bench.machine import bandwidths, product_rate
from minglm.look import plots
from minglm.model import walk

np.set_printoptions(precision=3, suppress=True, linewidth=110)
model = minglm.load("glm-tiny")
c = model.config


# %%
def milliseconds(work, runs=30):
    """The median of some runs, after one that does not count."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


# %% [markdown]
# ## Counting
#
# Every weight that takes part in a token's step must come from memory once, and takes part in one multiplication and
# one addition. So a step of one token has **two operations for each weight it reads**, whatever the model. Which
# weights take part? All matrices, but of the routed experts only K of E, and of the embedding one row.

# %%
counts = c.count_parameters()
experts = 3 * c.hidden_size * c.moe_intermediate_size  # of one: gate, up, down
everything = sum(array.size for name, array in walk(model.params) if "layers.6." not in name)  # without the MTP layer
idle = (c.num_hidden_layers - 1) * (c.n_routed_experts - c.num_experts_per_tok) * experts
read = everything - idle - model.params.embed_tokens.weight.size + c.hidden_size
print(f"{everything:,} parameters, {idle:,} of them in experts that the token does not go to: reads {read:,}")
print(
    f"{4 * read / 1e6:.1f} MB in float32, {2 * read / 1e6:.1f} million operations: {2 * read / (4 * read):.1f} per byte"
)
assert abs(read / counts.active - 1) < 0.3

# %% [markdown]
# Half an operation per byte. What can the machine do? Two numbers tell: how fast it reads a large array, and how fast
# it multiplies matrices when everything is at hand.

# %%
reading = max(bandwidths(256).values()) / 1e9  # GB/s
products = product_rate(1024) / 1e9  # GFLOP/s
print(f"reads {reading:.0f} GB/s, multiplies {products:.0f} GFLOP/s")
print(f"that is {products / reading:.0f} operations in the time of one byte")
reading_ms, multiplying_ms = 1e3 * 4 * read / reading / 1e9, 1e3 * 2 * read / products / 1e9
print(f"one token: reading {reading_ms:.3f} ms, multiplying {multiplying_ms:.3f} ms")

# %% [markdown]
# The machine could do many operations in the time in which it reads a byte, and a token needs half of one. So it
# waits. **Writing is bound by memory**: the time of a token is bytes over bandwidth, and no amount of arithmetic skill
# helps.
#
# The picture is called a *roofline*. To the left, where there are few operations per byte, the roof is slanted:
# memory. To the right it is flat: arithmetic. A token alone stands far to the left; a prompt of many tokens, which
# reads each weight once for all of them, moves right.

# %%
works = []
for tokens in (1, 8, 64, 512):
    touched = min(tokens * c.num_experts_per_tok, c.n_routed_experts) / c.num_experts_per_tok
    bytes_read = 4 * (read + (touched - 1) * c.num_experts_per_tok * experts * (c.num_hidden_layers - 1))
    intensity = 2 * read * tokens / bytes_read
    works.append((f"{tokens} tokens at once", "the limit", intensity, min(intensity * reading, products)))
    print(f"{tokens:4} tokens: {intensity:6.1f} operations per byte, at most {works[-1][3]:.0f} GFLOP/s")
plots.plot_roofline(works, reading, products, "glm-tiny, float32")

# %% [markdown]
# The letters lie on the line because they are limits, not measurements. One token (A) is deep in the slanted part; a
# prompt of 512 (D) is near the flat one. That is why a prompt is read at thousands of tokens a second by a machine
# that writes hundreds.
#
# ## NumPy, one token at a time
#
# Now the clock. The book's functions, with a cache, one token per step:

# %%
prompt = model.as_ids("for i in range(10):\n    print(i)\n")[0].tolist()


def numpy_step():
    cache = numpy_cache
    cache.truncate(len(prompt))
    return model.forward([[5]], cache=cache).logits


numpy_cache = model.new_cache(capacity=64)
model.forward([prompt], cache=numpy_cache)
numpy_ms = milliseconds(numpy_step)
limit_ms = 1e3 * 4 * read / reading / 1e9
print(
    f"NumPy: {numpy_ms:.2f} ms a token; the memory's limit {limit_ms:.3f} ms: {numpy_ms / limit_ms:.0f} times as long"
)

# %% [markdown]
# Far from the limit. Not because NumPy multiplies slowly; its products are as good as anybody's. How many array
# operations does a step make?

# %%
calls = []
model.forward([[5]], cache=None, tap=lambda name, array: calls.append(name))
print(len(calls), "named steps for one token, each several NumPy calls on arrays of about", c.hidden_size, "numbers")
small = np.ones(c.hidden_size, np.float32)
microseconds = 1e3 * milliseconds(lambda: small + small, 300)
print(f"one addition of {c.hidden_size} numbers: {microseconds:.2f} µs")

# %% [markdown]
# The adding itself would take some hundredths of that: sixteen numbers at a time. The rest is the call: finding the
# types, checking shapes, making the result. On a matrix of a million numbers nobody notices. Here a whole token's
# arithmetic takes less time than the calls.
#
# So the remedy is not a faster product but **fewer, larger steps**: one compiled function that takes the token
# through the whole model, and touches each weight once.

# %%
plain = model.generate(prompt, 48, engine="numpy", end_ids=[])
model.generate(prompt, 48, end_ids=[])  # the first compiles
fused = min((model.generate(prompt, 48, end_ids=[]) for _ in range(8)), key=lambda made: made.stats.decode_seconds)
assert fused.ids == plain.ids
fused_ms = 1e3 * fused.stats.decode_seconds / (len(fused.ids) - 1)
plain_ms = 1e3 * plain.stats.decode_seconds / (len(plain.ids) - 1)
print(f"NumPy {plain_ms:.2f} ms a token, {fused.stats.engine} {fused_ms:.2f} ms, the limit {limit_ms:.3f} ms")

# %% [markdown]
# The same 48 tokens, to the last one. The kernels are in `minglm/fast/decode.py`: the same steps in the same order as
# the book's, as loops that Numba compiles.
#
# What is left above the limit? The threads must wait for each other between stages, since a stage needs all of the
# one before, and some work is no product at all. On the other hand a model this small lies partly in the processor's
# cache, which is faster than the memory that was measured; the limit is one for large models.
#
# ## Fewer bytes
#
# If bytes are the price, store fewer. In bfloat16 a weight has two bytes, in fp8 one
# ([12](12-small-floats.ipynb)). Nothing else changes: they are widened when they are read, and added up in float32.

# %%
for dtype in ("float32", "bfloat16", "fp8"):
    stored = minglm.load("glm-tiny", dtype)
    made = min((stored.generate(prompt, 48, end_ids=[]) for _ in range(8)), key=lambda made: made.stats.decode_seconds)
    size = sum(array.nbytes for _, array in walk(stored.params))
    print(f"{dtype:9} {size / 1e6:5.1f} MB, {1e3 * made.stats.decode_seconds / (len(made.ids) - 1):.2f} ms a token")

# %% [markdown]
# Halving the bytes does not halve the time here: `glm-tiny` fits into the cache, and what is left is waiting. With a
# model of two gigabytes it very nearly does: [docs/small-floats.md](../docs/small-floats.md) has 1.5 times the speed
# of bfloat16 for fp8, of the 1.7 that the bytes would allow.
#
# ## More tokens for the same bytes
#
# A prompt's tokens are all known, so each weight is read once for all of them. Time per token against the number of
# tokens that go together:

# %%
together = []
for tokens in (1, 4, 16, 64, 256):
    ids = [(prompt * 20)[:tokens]]
    together.append((tokens, milliseconds(lambda ids=ids: model.forward(ids), 8) / tokens))
    print(f"{tokens:4} tokens in one step: {together[-1][1]:6.3f} ms a token")

# %% [markdown]
# Even in NumPy the time per token falls by a factor of ten or so. It is the same arithmetic; the calls and the bytes
# are shared.
#
# Three things of modern models follow from this table. *Batching*: a server puts the tokens of many users into one
# step. *Drafts*: several guessed tokens are checked in one step ([09](09-mtp.ipynb)). And *experts* make both a little
# less attractive, because different tokens need different experts, so that the bytes grow with the tokens:

# %%
rng = np.random.default_rng(0)
for tokens in (1, 2, 4, 8, 32):
    distinct = np.mean([len(np.unique(np.argsort(rng.random((tokens, 160)), axis=1)[:, :8])) for _ in range(200)])
    share = distinct / 8 / tokens
    print(f"{tokens:3} tokens, 8 of 160 experts each, by dice: {distinct:5.1f} experts, {share:.0%} of single steps")

# %% [markdown]
# ## GLM-4.5
#
# The same division for the real one: its active parameters in bfloat16, on memories of different speed. No product
# was timed for this table, it is bytes over bandwidth.

# %%
glm = minglm.PRESETS["GLM-4.5"]
active = glm.count_parameters().report_active
memories = {
    "a laptop's memory, 60 GB/s": 60,
    "a server's, 400 GB/s": 400,
    "eight accelerators, 8 × 3,350 GB/s": 8 * 3350,
}
for where, speed in memories.items():
    seconds = 2 * active / (speed * 1e9)
    print(f"{where:36} {1e3 * seconds:8.1f} ms a token, {1 / seconds:6.1f} tokens/s at best")
total = glm.count_parameters().report_total
print(f"if all {total / 1e9:.0f} billion were active: {total / active:.0f} times slower")

# %% [markdown]
# The last line is what the router is for. All parameters must be *kept*, but only a tenth is *read* for a token: that
# is what a mixture of experts buys.
#
# ## What we have learnt
#
# Writing one token at a time reads every active weight for two operations each, so memory decides. NumPy is slow here
# because of its calls, not its arithmetic; a fused step removes them. After that only fewer bytes help, or more
# tokens for the same bytes.
#
# Next: [15](15-patching.ipynb) changes arrays on the way and reads the effect.
#
# ## Questions
#
# 1. At which number of tokens in one step does this machine's limit change from reading to multiplying? Use `reading`
#    and `products`, first without experts, then with them.
# 2. `model.generate(prompt, 48, threads=1)` and `threads=2`: which is faster on your machine, for `glm-tiny` and for
#    `glm-nano`? What does a second thread have to pay for?
# 3. The cache of keys and values is read for each token, too. From [04](04-attention.ipynb): at which context does
#    GLM-4.5 read as many bytes of cache as of weights?
