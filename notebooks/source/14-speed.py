# %% [markdown]
# # 14 · From NumPy to memory speed: the roofline of one token
#
# *Reading 30 minutes · running 40 seconds · needs [04b](04b-generation.ipynb), [12](12-small-floats.ipynb)*
#
# Why does a large language model write thirty tokens a second and not three hundred? The answer is a division: how
# many bytes must be read for a token, over how many bytes the memory delivers. This notebook counts the bytes,
# measures the memory, and then looks for what stands between plain NumPy and that limit.

# %% [markdown]
# ## The question
#
# One token goes through `glm-tiny`. What is the least time that it can take on this machine, and why does NumPy take
# several times as long?
#
# **About the times.** What you see was measured on the machine that ran this notebook last, a virtual one with two
# cores that shares its memory with others. They will be others on yours, and others again an hour later. So the text
# speaks of ratios, and roughly. What is asserted are counts and equalities, never times.

# %%
import statistics
import time
from types import SimpleNamespace

import numpy as np
from threadpoolctl import threadpool_limits

import minglm
from minglm.bench import machine
from minglm.look import plots
from minglm.model import linear, ops

np.set_printoptions(precision=3, suppress=True, linewidth=110)

# %% [markdown]
# All but the section on threads is measured on **one core**, so that like is compared with like; NumPy's matrix
# library is told so, too.

# %%
model = minglm.load("glm-tiny")  # as float32
c = model.config
threadpool_limits(1)  # NumPy's matrix library: one thread from here on
cores = machine.cores()
print(f"{machine.processor_name()}, {cores} cores; largest cache {(machine.largest_cache() or 0) / 1e6:.0f} MB")

# %% [markdown]
# A single timing says little: the first run is slow, some later one is interrupted. We take the **median** of some
# runs, after one that does not count.


# %%
def milliseconds(work, runs=15):
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
# Every weight that takes part in a token's step is read, and takes part in one multiplication and one addition. Which
# weights take part? We let the model tell: every matrix product goes through `linear` or `expert_mlp`, so we hand it
# versions of these two that count. Each weight that is seen is noted once, by its address, however often it is used.


# %%
seen, done = {}, []  # address of a weight -> its bytes; operations


def note(x, *weights):
    seen.update({weight.ctypes.data: weight.nbytes for weight in weights})
    done.append(2 * x.size // x.shape[-1] * sum(weight.size for weight in weights))


def counted_linear(x, weight, bias=None):
    note(x, weight)
    return ops.linear(x, weight, bias)


def counted_mlp(x, gate, up, down, tap=ops.no_tap):
    note(x, gate, up, down)
    return ops.expert_mlp(x, gate, up, down, tap)


# %% [markdown]
# `forward` takes other operations than the book's as an argument. The text is held-out code.

# %%
from minglm.data.heldout import heldout_documents

ids = model.as_ids(heldout_documents("code")[0].text, limit=False)[:, :512]
counting = SimpleNamespace(**{**vars(ops), "linear": counted_linear, "expert_mlp": counted_mlp})


def count(tokens):
    """Bytes of the weights that take part when so many tokens go through together, and operations."""
    seen.clear()
    done.clear()
    model.forward(ids[:, :tokens], ops=counting)
    return sum(seen.values()), sum(done)


# %%
size, operations = count(1)
print(f"one token: {size / 1e6:.2f} MB of float32 are read, {operations / 1e6:.2f} million operations")
print(f"{operations / size} operations per byte")
assert operations == 2 * size // 4

# %% [markdown]
# **Half an operation per byte.** Two operations for a weight, four bytes for a weight, whatever the model: with one
# token there is no other way. Norms, biases and attention's own products (two numbers for each earlier token and
# head) are left out of this count; `config.count_parameters()` has the first two, and agrees:

# %%
active = c.count_parameters().active
small = sum(array.size for name, array in minglm.walk(model.params) if array.ndim == 1 and "layers.6." not in name)
print(f"active by the config {active:,}, counted {size // 4:,}; norms and biases {small:,}")
assert active == size // 4 + small
print(f"all parameters {c.count_parameters().total:,}: a token reads {active / c.count_parameters().total:.0%} of them")

# %% [markdown]
# The rest are experts that the token does not go to, the MTP layer, and the other rows of the embedding.
#
# ## What the machine can do
#
# Two numbers: how fast it reads, and how fast it multiplies. `minglm doctor` prints both. Reading depends on *where*
# the numbers are: a small array stays in the processor's cache, a large one must come from memory each time. We read
# arrays of several sizes, over and over, with a kernel like the model's own.

# %%
from minglm.fast.measure import read_bandwidth

sizes = [1, 4, 16, 64, 256, 1024]  # MB
rates = {n: [read_bandwidth(mb, n, runs=7) / 1e9 for mb in sizes] for n in sorted({1, cores})}
for n, found in rates.items():
    print(
        f"{n} thread{'s' * (n > 1)}: "
        + ", ".join(f"{mb} MB {rate:.0f} GB/s" for mb, rate in zip(sizes, found, strict=True))
    )

# %%
picture = plots.Picture(figsize=(8, 3.6), layout="constrained")
axes = picture.add_subplot(xscale="log", xlabel="array that is read again and again, MB", ylabel="GB/s")
for (n, found), style in zip(rates.items(), ("o-", "s--"), strict=False):
    axes.plot(sizes, found, style, color="#0072b2" if n == 1 else "#d55e00", label=f"{n} thread{'s' * (n > 1)}")
axes.axvline(size / 1e6, color="black", linestyle=":", label="what a token of glm-tiny reads")
axes.set(xticks=sizes, xticklabels=sizes, ylim=(0, None))
axes.set_title("How fast this machine reads, by the size of the array", fontsize=10, loc="left")
axes.legend(fontsize=9)
picture

# %% [markdown]
# To the left the arrays lie in a cache, to the right in memory, which is slower. Where the fall is depends on the
# processor. The dotted line is our token: on most machines of today `glm-tiny` fits into a cache, wholly or in part.
# A model of gigabytes never does. The limit for large models is the right end of the picture.

# %%
reading = rates[1][-1]  # GB/s, from memory
products = machine.product_rate(1024) / 1e9  # GFLOP/s of a large product, everything at hand
print(f"reads {reading:.0f} GB/s, multiplies {products:.0f} GFLOP/s")
print(f"it could do {products / reading:.1f} operations in the time of one byte; a token needs {operations / size}")
print(f"one token: reading {1e3 * size / reading / 1e9:.2f} ms, multiplying {1e3 * operations / products / 1e9:.3f} ms")

# %% [markdown]
# The multiplying is done long before the bytes are there. **Writing one token at a time is bound by memory**: its
# time is bytes over bandwidth, and no skill in arithmetic helps.
#
# ## Plain NumPy
#
# Now the clock. The book's functions, with a cache of keys and values, one token a step:

# %%
prompt = ids[0, :32].tolist()
cache = model.new_cache(capacity=64)
model.forward([prompt], cache=cache)


def numpy_step():
    cache.truncate(len(prompt))
    return model.forward([[5]], cache=cache).logits


numpy_ms, limit_ms = milliseconds(numpy_step), 1e3 * size / reading / 1e9
print(f"NumPy: {numpy_ms:.2f} ms a token, {numpy_ms / limit_ms:.0f} times what reading takes")

# %% [markdown]
# Far from the limit. Is NumPy slow at products? Let us see where the time goes. A trace notes the seconds before each
# tap; we add them up by the part of the model, for one token and for 64 together.


# %%
words = {  # in the name of a tap -> the part; the first that is found counts
    "self_attn": "attention",
    "router": "router",
    "biased_scores": "router",
    "expert_indices": "router",
    "expert_weights": "router",
    "norm": "norms, sums",
    "mlp": "MLP, experts",
    "logits": "head",
    "": "norms, sums",  # the sums that leave a sub-layer, and the embedding
}

# %% [markdown]
# Nine traces, the median of each part's sum:


# %%
def times_by_part(tokens):
    found = []
    for _ in range(9):
        totals = dict.fromkeys(words.values(), 0.0)
        for name, seconds in model.trace(ids[:, :tokens]).seconds.items():
            totals[next(part for word, part in words.items() if word in name)] += 1e3 * seconds
        found.append(totals)
    return {part: statistics.median(totals[part] for totals in found) for part in found[0]}


# %%
one, many = times_by_part(1), times_by_part(64)
for part in one:
    ratio = many[part] / one[part]
    print(f"{part:13} 1 token {one[part]:5.2f} ms; 64 tokens {many[part]:5.2f} ms, {ratio:4.1f} times as much")
print(f"{'all':13} 1 token {sum(one.values()):5.2f} ms; 64 tokens {sum(many.values()):5.2f} ms")
names = len(model.trace(ids[:, :1]).seconds)
print(f"{names} named steps for one token, {names / c.num_hidden_layers:.0f} in a layer")

# %% [markdown]
# (The tracing itself takes a little of it.) Two things to see. The time is spread over everything, over parts without
# any large product too: the router's result is 16 numbers. And 64 times the tokens take far less than 64 times as
# long, part by part. So most of the time of one token cannot be arithmetic. It must be something that is paid once
# per *step*, whatever the size.
#
# ## The price of a call
#
# To add two arrays of 192 numbers is some dozens of instructions for a processor that adds eight or sixteen at a
# time. What does it take?

# %%
x = np.ones(c.hidden_size, np.float32)
large = np.ones(1000 * c.hidden_size, np.float32)
one_call, large_call = milliseconds(lambda: x + x, 2000), milliseconds(lambda: large + large, 200)
print(f"adding 192 numbers: {1e6 * one_call:,.0f} ns; 192,000 numbers: {1e6 * large_call:,.0f} ns")
print(f"a number takes {one_call / large_call * 1000:.0f} times as long in the small array")

# %% [markdown]
# The rest is the call: Python finds the function, NumPy checks types and shapes, makes an array for the result. With
# large arrays nobody notices. Here is the same for a product: the head's matrix at once, or in 64 pieces. The bytes
# are the same, the operations are the same, the result is the same.

# %%
head, state = model.params.lm_head.weight, np.random.default_rng(0).normal(size=(1, c.hidden_size)).astype(np.float32)
pieces = np.split(head, 64)
whole = linear(state, head)
np.testing.assert_allclose(np.concatenate([linear(state, p) for p in pieces], axis=-1), whole, rtol=1e-4, atol=1e-4)
at_once = milliseconds(lambda: linear(state, head), 200)
in_pieces = milliseconds(lambda: [linear(state, p) for p in pieces], 50)
print(f"at once {1e3 * at_once:.0f} µs, in 64 pieces {1e3 * in_pieces:.0f} µs")

# %% [markdown]
# So the remedy is not a faster product but **fewer, larger steps**. The extreme is one: a compiled function that
# takes a token through the whole model.
#
# ## The fused step
#
# `minglm/fast/decode.py` has the same steps as the book in the same order, as loops that Numba compiles into one
# piece of machine code. Is it the same model? And how fast?


# %%
def decode(model, new=64, threads=1, **options):
    """Median milliseconds for the logits of one new token, and the tokens."""
    steps = list(model.steps(prompt, new, end_ids=[], threads=threads, **options))
    return 1e3 * statistics.median(step.seconds for step in steps[4:]), [step.id for step in steps]


decode(model, 8)  # compiles, if this machine has not done so before
plain_ms, plain = decode(model, engine="numpy")
fused_ms, fused = decode(model)
assert fused == plain
print(f"{len(plain)} tokens, all the same")
print(
    f"NumPy {plain_ms:.2f} ms a token, fused {fused_ms:.2f} ms: measured here {plain_ms / fused_ms:.0f} times as fast"
)
fastest = max(max(found) for found in rates.values())
print(f"it reads {size / fused_ms / 1e6:.0f} GB/s; the memory gives {reading:.0f}, the nearest cache {fastest:.0f}")

# %% [markdown]
# Several times as fast, and not one formula is different. What is left? If the model lies in a cache, a step may even
# be faster than the memory's limit; what it waits for then is mostly itself. Where there are several threads, they
# wait for each other after each stage, since a stage needs all of the one before, and a layer has several stages.
# Also part of a step is no product: norms, the exponentials of attention, the choice of experts.
#
# ## A model that no cache holds
#
# To see the memory alone we need more bytes. Here is a model of random weights, with experts that all take part, so
# that a token reads everything. Its text is nonsense; its time is not. Now fewer bytes for a weight
# ([12](12-small-floats.ipynb)) should mean less time in proportion.

# %%
from minglm.api import Model
from minglm.bench.shapes import SHAPES, quick_params
from minglm.bench.small import token_bytes
from minglm.formats.storage import as_storage

wide = SHAPES["M"].config.replace(vocab_size=8192, num_hidden_layers=6, n_routed_experts=8, num_experts_per_tok=8)
big = Model(wide, quick_params(wide), name="large")
measured = {}
for kind in ("float32", "bfloat16", "fp8"):
    kept = big.astype(kind)
    decode(kept, 8)
    measured[kind] = token_bytes(wide, as_storage(kind)), statistics.median(decode(kept, 20)[0] for _ in range(3))

# %%
first_bytes, first_ms = measured["float32"]
for kind, (read, ms) in measured.items():
    print(
        f"{kind:9} {read / 1e6:4.0f} MB a token, {ms:6.2f} ms, {read / ms / 1e6:5.1f} GB/s; "
        f"faster by bytes {first_bytes / read:.2f}, measured here {first_ms / ms:.2f}"
    )
assert 0.499 < measured["bfloat16"][0] / first_bytes < 0.501

# %% [markdown]
# With a model of this size the step reads nearly at the rate of the memory: that is "memory speed". Fewer bytes take
# less time, a little less than in proportion: bfloat16 and the codes of fp8 must be widened before they are
# multiplied, and on few cores that arithmetic becomes visible.
#
# And the small model? Same code, same dtypes:

# %%
alone = c.replace(num_nextn_predict_layers=0)  # plain decoding leaves the MTP layer alone
for kind in ("float32", "bfloat16", "fp8"):
    stored, read = model.astype(kind), token_bytes(alone, as_storage(kind))
    ms = statistics.median(decode(stored)[0] for _ in range(3))
    print(f"glm-tiny, {kind:9} {read / 1e6:4.1f} MB a token, {ms:.3f} ms")

# %% [markdown]
# There the time falls by less than the bytes: what is not reading stays as it is.
#
# ## Threads
#
# A second core can read at the same time, as far as the memory lets it, and costs waiting. Which model gains?

# %%
for some in (model, big.astype("bfloat16")):
    found = {n: [decode(some, 24, threads=n) for _ in range(3)] for n in sorted({1, cores})}
    assert len({tuple(made) for runs in found.values() for _, made in runs}) == 1
    times = (f"{n} thread{'s' * (n > 1)} {statistics.median(ms for ms, _ in runs):.3f} ms" for n, runs in found.items())
    print(f"{some.name:8}", ", ".join(times))

# %% [markdown]
# The tokens are the same for any number of threads, since each output row is computed by one thread, in one order.
# The times depend on what else the machine is doing: a thread that is waited for and does not run stops all others.
# The package takes one thread for each begun 4 MB of weights that a token reads, and no more than there are cores
# ([docs/performance.md](../docs/performance.md)).
#
# ## More tokens for the same bytes
#
# A prompt's tokens are all known, so each weight that is read can serve all of them. We count bytes and operations as
# above, for more and more tokens together, and time the book's forward pass.

# %%
table = []
for tokens in (1, 4, 16, 64, 256):
    read, work = count(tokens)
    ms = milliseconds(lambda tokens=tokens: model.forward(ids[:, :tokens]), 15)
    table.append((tokens, read, work, ms))
    print(
        f"{tokens:3} tokens: {read / 1e6:5.1f} MB, {work / read:5.1f} operations a byte, {ms / tokens:.3f} ms a token"
    )
assert [work for _, _, work, _ in table] == [tokens * operations for tokens, *_ in table]
assert all(read < tokens * size for tokens, read, *_ in table[1:])

# %% [markdown]
# The operations grow with the tokens, exactly. The bytes do not: they grow only as long as new tokens bring new
# experts, and stop when all sixteen of each layer are in use. So there is more and more arithmetic for a byte, and
# the time for a token falls, in NumPy also because its calls are shared.
#
# The fast engine has a way for prompts, too. It asks the head for the last token only, so it has fewer operations.

# %%
tokens, read, work, ms = table[-1]
prefills = [model.generate(ids[0, :tokens], 1, threads=1).stats.prefill_seconds for _ in range(9)]
prefill_ms, fewer = 1e3 * statistics.median(prefills), work - 2 * (tokens - 1) * head.size
print(f"{tokens} tokens: NumPy {ms / tokens:.3f} ms a token, fast engine {prefill_ms / tokens:.3f} ms")

# %% [markdown]
# The picture that holds all of this is called a **roofline**. Across: operations per byte, counted. Up: operations
# per second, measured. The roof is what the machine allows: slanted where the memory limits, flat where the products
# do. Where will NumPy with one token be, and where with 256?

# %%
points = [(f"{tokens} at once", "NumPy", work / read, work / ms / 1e6) for tokens, read, work, ms in table]
points.append(("1, fused", "fast engine, glm-tiny", operations / size, operations / fused_ms / 1e6))
points.append((f"{tokens}, fast engine", "fast engine, glm-tiny", fewer / read, fewer / prefill_ms / 1e6))
read, ms = measured["bfloat16"]
points.append(("1, large model, bfloat16", "fast engine, large", 1.0, read / ms / 1e6))
plots.plot_roofline(points, reading, products, "glm-tiny and a large model, on the machine that ran this")

# %% [markdown]
# NumPy with one token (A) is well below the slanted roof: it does not even reach the memory's limit. With more tokens
# it moves right and up, but the flat part stays away: an expert's share of 256 tokens is still a small product. The
# fused step (F) is right above A: the same operations and bytes in less time. It may stand above the roof, for the
# roof is the memory's and a cache is faster. The prompt in the fast engine (G) is a little above E. The large model
# (H) has twice the operations per byte, because its weights have half the bytes, and lies near the roof.
#
# Three habits of serving large models are moves to the right in this picture. A **prompt** goes through in one piece.
# **Batching** lets the tokens of many users share a step. **Drafts** let several guessed tokens of one user share one
# ([09](09-mtp.ipynb)). Experts make each of them worth a little less, because tokens that step together read
# different ones.
#
# ## GLM-4.5
#
# The same division for the real one. Nothing was timed for this table: it is bytes over bandwidth, with bandwidths
# that are typical for such memories.

# %%
glm = minglm.PRESETS["GLM-4.5"]
trunk = glm.replace(num_nextn_predict_layers=0)
memories = {"a laptop, 60 GB/s": 60, "a server, 400 GB/s": 400, "eight accelerators, 8 × 3,350 GB/s": 8 * 3350}
for kind in ("bfloat16", "fp8"):
    read = token_bytes(trunk, as_storage(kind))
    for where, speed in memories.items():
        print(f"{kind:9} {read / 1e9:3.0f} GB a token; {where:35} at most {speed * 1e9 / read:6.1f} tokens/s")
counts = glm.count_parameters()
more = counts.report_total / counts.report_active
print(f"if all {counts.report_total / 1e9:.0f} billion parameters took part: {more:.0f} times slower")

# %% [markdown]
# The last line is what the router is for. All parameters must be *kept*, but less than a tenth is *read* for a token.
#
# Weights are not all. The keys and values of earlier tokens are read for each new one, too. At which context do they
# weigh as much as the weights?

# %%
per_token, read = glm.kv_bytes_per_token(), token_bytes(trunk, as_storage("bfloat16"))
print(f"{per_token:,} bytes of keys and values for each token of context, in bfloat16")
for context in (1_000, 32_000, glm.max_position_embeddings):
    share = context * per_token / read
    print(f"context {context:7,}: {context * per_token / 1e9:5.1f} GB, {share:.0%} of the weights' bytes")
assert glm.max_position_embeddings * per_token < read

# %% [markdown]
# Even at the end of its context GLM-4.5 reads less of the cache than of the weights, for *one* user. With many users
# in a step the weights are shared, as far as tokens pick the same experts (here by dice, as in [09](09-mtp.ipynb));
# the caches are not.

# %%
expert = 3 * glm.hidden_size * glm.moe_intermediate_size * (glm.num_hidden_layers - glm.first_k_dense_replace)
E, K = glm.n_routed_experts, glm.num_experts_per_tok
for users in (1, 10, 100):
    weights = read + 2 * (E * (1 - (1 - K / E) ** users) - K) * expert
    caches = users * 32_000 * per_token
    print(f"{users:3} users, 32,000 tokens each: weights {weights / 1e9:3.0f} GB, caches {caches / 1e9:4.0f} GB a step")
assert caches > weights

# %% [markdown]
# The weights stop growing when all experts are in use. The caches go on. That is why models that serve many long
# conversations want small ones ([04](04-attention.ipynb)).
#
# ## The limits of this picture
#
# - A roofline is an upper bound. Nothing says that it can be reached; waiting, norms and small steps are not in it.
# - "The" bandwidth does not exist. It changes with the size of the array, the number of threads, and the neighbours
# on a shared machine: ours has been seen to change several times over within a day.
# - `glm-tiny` is far too small to stand for a large model: in it the calls, the cache and the waiting rule. What
# carries over is the counting.
# - To compare programs, let them take turns on a quiet machine and look at ratios. `minglm bench` does so, and
# [docs/performance.md](../docs/performance.md) has results beside torch and llama.cpp, and what did not help.
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
# 1. At how many operations per byte does the roof of your machine bend, and how many tokens of `glm-tiny` must go
# through together to get there? Use `count`. How many would a dense model of the same size need?
# 2. `count` with 64 tokens of one repeated word instead of code: what happens to the bytes, and why?
# 3. How many tokens a second can the server of the table give to each of 1, 10 and 100 users, and how many to all of
# them together? At how many users do caches and weights weigh the same?
