# %% [markdown]
# # 06 · Experts: sixteen small networks, of which two work
#
# *Reading 35 minutes · running 10 seconds · needs [05](05-router.ipynb)*
#
# The router has chosen. Now the tokens must get to their experts, the experts must answer, and the answers must get
# back to the right tokens with the right weights. The maths is a weighted sum over the picked experts, plus the shared
# one; the difficulty is bookkeeping.

# %% [markdown]
# ## The question
#
# GLM-4.5 has 355 billion parameters and uses 32 billion of them for a token. Where are the other 323 billion while it
# works, and how can a program skip them without slowing down?
#
# We take the two lines of the router's notebook, and layer 2 of `glm-tiny`: E = 16 experts, K = 2 picked.

# %%
import numpy as np

import minglm
from minglm.look import plots

np.set_printoptions(precision=3, suppress=True, linewidth=110)
model = minglm.load("glm-tiny")
config = model.config
trace = model.trace("for i in range(10):\n    print(i)", keep="layers.*.mlp.*,layers.2.post_attention_layernorm")
rows = trace["layers.2.post_attention_layernorm"][0]  # [N, D]
moe = model.params.layers[2].mlp
indices, weights = trace["layers.2.mlp.expert_indices"], trace["layers.2.mlp.expert_weights"]  # [N, K] ×2
N, K = indices.shape
print("experts\n", indices.T, "\nweights\n", weights.T)

# %% [markdown]
# ## One expert by hand
#
# An expert is a small network with three matrices and no bias. Two of them read the token and give F numbers each:
# `gate` and `up`. The gate goes through silu(z) = z · sigmoid(z), which lets positive numbers pass and holds negative
# ones near 0; then it multiplies `up`, entry by entry. `down` makes D numbers again. The whole is called SwiGLU
# (arXiv 2002.05202).
#
# (This `gate` is not the router's, though the files call both so.) The order matters: silu is on the gate, and only
# there. Here is expert 3, on token 0, which picked it first.

# %%
e, token = 3, 0
experts = moe.experts  # all experts of the layer in three arrays: [E, F, D], [E, F, D], [E, D, F]
x = rows[token]  # [D]
gate, up = experts.gate_proj[e] @ x, experts.up_proj[e] @ x  # [D] -> [F] ×2
hidden = gate / (1 + np.exp(-gate)) * up
answer = experts.down_proj[e] @ hidden  # [F] -> [D]
here = trace["layers.2.mlp.experts.3.tokens"].tolist().index(token)  # its place among expert 3's tokens
np.testing.assert_allclose(answer, trace["layers.2.mlp.experts.3.out"][here], atol=1e-4)
print("tokens of expert 3:", trace["layers.2.mlp.experts.3.tokens"], "; D, F =", x.size, gate.size)

# %% [markdown]
# Is it the same to weigh the question or the answer? With a linear map it would be. Try both with token 0's weight.


# %%
def expert(e, x):  # [.., D] -> [.., D]
    gate, up = x @ experts.gate_proj[e].T, x @ experts.up_proj[e].T
    return (gate / (1 + np.exp(-gate)) * up) @ experts.down_proj[e].T


w = weights[token, indices[token].tolist().index(e)]
ratio = np.linalg.norm(expert(e, w * x)) / np.linalg.norm(w * expert(e, x))
print(f"weight {w:.2f}: weighing the question gives a row {ratio:.2f} times as long as weighing the answer")
assert abs(ratio - 1) > 0.05

# %% [markdown]
# Not the same: an expert is not linear. GLM-4.5 weighs the answer.
#
# ## The dense sum: right, and wasteful
#
# In symbols the routed part is, for token t,
#
# $$ y_t = \sum_{k} w_{t,k} \mathrm{expert}_{i_{t,k}}(x_t) $$
#
# The plainest program asks all E experts about all tokens and gives a weight of 0 to those that were not picked. It
# is the definition, and a good reference. It does E/K times too much work.

# %%
dense = np.zeros((N, config.n_routed_experts), rows.dtype)  # [N, E] weights, 0 where not picked
np.put_along_axis(dense, indices, weights, axis=1)
everyone = np.stack([expert(e, rows) for e in range(config.n_routed_experts)], axis=1)  # [N, E, D]
by_definition = (dense[:, :, None] * everyone).sum(axis=1)
np.testing.assert_allclose(by_definition, trace["layers.2.mlp.routed"], atol=1e-4)
print(f"{everyone.shape[0] * everyone.shape[1]} answers computed, {np.count_nonzero(dense)} needed")

# %% [markdown]
# ## Dispatch: sort the picks by expert
#
# There are N·K picks. Write them in one line, token by token: slot s belongs to token s // K. Sort the slots by
# expert. Then every expert's tokens stand together, and how many it has is counted with `bincount`.

# %%
flat = indices.reshape(-1)  # [N·K]
order = np.argsort(flat, kind="stable")  # slots, expert by expert
counts = np.bincount(flat, minlength=config.n_routed_experts)
ends = np.cumsum(counts)
print("slots ", order, "\ntokens", order // K, "\nexpert", flat[order], "\ncounts", counts)
assert counts.sum() == N * K

# %% [markdown]
# Read it from the left: expert 0 has a token, expert 1 another, expert 2 has none. An empty expert must keep its
# place in `counts`; with `np.unique` instead of `bincount` all later experts would move up by one and answer for each
# other.
#
# ## Experts and combine
#
# Now the loop: cut out an expert's tokens, one matrix product for all of them, weigh, add to the rows they belong to.
# Experts without tokens are skipped. This is the model's own loop; it is in `minglm/model/experts.py`.

# %%
routed = np.zeros_like(rows)
for e in range(config.n_routed_experts):
    slots = order[ends[e] - counts[e] : ends[e]]
    tokens = slots // K
    if len(slots):
        routed[tokens] += weights.reshape(-1, 1)[slots] * expert(e, rows[tokens])
np.testing.assert_allclose(routed, by_definition, atol=1e-4)
print(f"{(counts > 0).sum()} of {len(counts)} experts were asked, about {counts.sum()} rows in all")

# %% [markdown]
# The same sum, with an eighth of the work.
#
# The `+=` is safe because within one expert every token occurs once. Over all experts together it would not be:
# NumPy's `y[tokens] += parts` with a repeated token keeps only the last part. A look at what would be lost:

# %%
parts = np.concatenate([expert(e, rows[order[ends[e] - n : ends[e]] // K]) for e, n in enumerate(counts)])
lost = np.zeros_like(rows)
lost[order // K] += weights.reshape(-1, 1)[order] * parts  # wrong: every token occurs K times
right = np.zeros_like(rows)
np.add.at(right, order // K, weights.reshape(-1, 1)[order] * parts)
np.testing.assert_allclose(right, routed, atol=1e-4)
print(f"kept of the length of a row: {(np.linalg.norm(lost, axis=1) / np.linalg.norm(routed, axis=1)).mean():.0%}")
assert not np.allclose(lost, routed, atol=1e-2)

# %% [markdown]
# No error, no wrong shape: one of the two experts of every token is silently gone. `np.add.at` adds them all.
#
# ## The shared expert
#
# Beside the routed experts there is one that sees every token. It is not chosen, not weighted and not scaled: its
# answer is simply added (arXiv 2401.06066). What every token needs need not be learnt by sixteen experts over again.

# %%
shared = moe.shared_experts
gate, up = rows @ shared.gate_proj.weight.T, rows @ shared.up_proj.weight.T
always = (gate / (1 + np.exp(-gate)) * up) @ shared.down_proj.weight.T
np.testing.assert_allclose(always, trace["layers.2.mlp.shared"], atol=1e-4)
out = trace["layers.2.mlp.out"].reshape(rows.shape)
np.testing.assert_allclose(routed + always, out, atol=1e-4)
print("routed + shared = the layer's MLP, for all", N, "tokens")

# %% [markdown]
# `routed_scaling_factor` is already in the routed weights. To multiply the shared expert by it, too, breaks no shape;
# nor does forgetting it (sglang pull request 8333) or applying it twice (pull request 150 of HYGON-AI/sglang-das). How
# large are the two parts, in all layers?

# %%
layers = range(config.first_k_dense_replace, config.num_hidden_layers)
size = {p: [np.linalg.norm(trace[f"layers.{i}.mlp.{p}"], axis=-1).mean() for i in layers] for p in ("routed", "shared")}
picture = plots.Picture(figsize=(7, 3.2), layout="constrained")
axes = picture.add_subplot(xlabel="layer", ylabel="mean length of a row", xticks=list(layers))
for part, shift, colour, hatch in (("routed", -0.2, "#0072b2", ""), ("shared", 0.2, "#e69f00", "//")):
    axes.bar(np.array(layers) + shift, size[part], 0.4, color=colour, hatch=hatch, edgecolor="black", label=part)
axes.set_title(f"What experts write into the stream: glm-tiny, K = {K}, E = 16, T = {N} tokens", fontsize=10)
axes.legend(fontsize=9)
picture

# %% [markdown]
# The rows get longer towards the end, as the stream does. In layers 1 to 4 the routed part (plain bars) is the longer
# one, in the last layer the shared part (hatched). Neither is a mere correction of the other.

# %%
ratios = np.array(size["routed"]) / np.array(size["shared"])
print("routed ÷ shared, layers 1 to 5:", ratios.round(2))
assert (ratios[:-1] > 1).all()
assert ratios[-1] < 1

# %% [markdown]
# ## Nobody is dropped
#
# Many earlier models gave each expert a fixed number of places, its *capacity*; tokens beyond it got no answer from
# that expert (arXiv 2101.03961). GLM-4.5 drops nobody: an expert with more tokens simply has a larger matrix product.
# Here is the load of our layer, and what a capacity of the fair share, rounded up, would have cost.

# %%
plots.plot_bars(trace.routing.indices, experts=16, layer=1, layers=trace.routing.layers, name="glm-tiny")

# %% [markdown]
# (MaxVio and CV in the title are explained in [08a](08a-expert-load.ipynb).) The bars differ a lot, and some experts
# have none: thirteen tokens are few. The dashed line is the fair share.

# %%
place = int(np.ceil(N * K / config.n_routed_experts))  # places per expert
dropped = np.maximum(counts - place, 0).sum()
print(f"with {place} places per expert {dropped} of {N * K} picks would be dropped; without a limit none")
idle = np.flatnonzero(counts == 0)
assert not any(f"layers.2.mlp.experts.{e}.out" in trace for e in idle)
print("experts that nobody picked:", idle, "; there are no arrays of them in the trace")
assert dropped > 0

# %% [markdown]
# An expert without tokens costs nothing but its memory. In training it also learns nothing, which is why loads are
# balanced ([08a](08a-expert-load.ipynb)).
#
# With a single token all but K experts are idle. The layer must work all the same, and give the row that the token
# has among others: what a token gets from its experts does not depend on its neighbours.

# %%
alone, saved = minglm.model.moe(rows[None, 5:6], moe, config)
np.testing.assert_allclose(alone[0, 0], out[5], atol=1e-4)
print("one token:", [(visit.expert, len(visit.tokens)) for visit in saved.history], "(expert, tokens)")
assert len(saved.history) == K

# %% [markdown]
# ## Why sort, and not gather
#
# There is a shorter program: take each pick's own copy of the three matrices, `gate_proj[indices]`, and multiply all
# at once. It has no loop and is right. What does it cost? Every pick reads and writes a whole expert. Sorted by
# expert, each expert that was picked is read once, however many tokens it has.

# %%
gathered = np.einsum("nkfd,nd->nkf", experts.gate_proj[indices], rows)  # a copy of gate_proj for each pick
np.testing.assert_allclose(gathered[token, 0], experts.gate_proj[3] @ rows[token], atol=1e-4)


def read(config, tokens, bytes_per_number=2):  # bytes of expert weights per layer: gathered, sorted (even load)
    E, K = config.n_routed_experts, config.num_experts_per_tok
    one = 3 * config.hidden_size * config.moe_intermediate_size * bytes_per_number
    return tokens * K * one, E * (1 - (1 - K / E) ** tokens) * one


glm = minglm.PRESETS["GLM-4.5"]
for tokens in (1, 16, 256, 4096):
    gather, by_expert = read(glm, tokens)
    ratio = gather / by_expert
    print(f"{tokens:4} tokens: gathered {gather / 1e9:7.1f} GB, sorted {by_expert / 1e9:4.2f} GB: {ratio:.1f} ×")
assert read(glm, 1)[0] == round(read(glm, 1)[1])

# %% [markdown]
# For one token the two are equal. For thousands they are not in the same world: one layer of GLM-4.5 has 7.5 GB of
# routed experts in two-byte numbers, and gathering for 4,096 tokens would copy that two hundred times over.
#
# The sorted column assumes that picks fall evenly and independently, so it is an expectation. It shows something
# else, too: with 16 tokens together more than half of the experts are read already. What saves *bytes* for one token
# saves only *operations* for many.
#
# ## How much of the model a token uses
#
# Now the numbers of the question, counted from the configs. The *trunk* is everything but embedding, head and MTP
# layer; the report counts trunk and MTP layer; as active it counts what one token uses of both.

# %%
for name in ("glm-tiny", "GLM-4.5-Air", "GLM-4.5"):
    c = minglm.PRESETS[name]
    n = c.count_parameters()
    one = 3 * c.hidden_size * c.moe_intermediate_size
    sparse = c.num_hidden_layers - c.first_k_dense_replace
    visited, there = sparse * c.num_experts_per_tok, sparse * c.n_routed_experts
    print(f"{name}: a token visits {visited} of {there:,} routed experts of {one:,} weights")
    print(
        f"   trunk {n.trunk:,}, active {n.trunk_active:,}; routed experts are "
        f"{there * one / n.trunk:.0%} of the trunk and {visited * one / n.trunk_active:.0%} of what is active"
    )
assert (round(n.report_total / 1e9), round(n.report_active / 1e9)) == (355, 32)
print(f"GLM-4.5 as the report counts: {n.report_total:,} and {n.report_active:,}")

# %% [markdown]
# Nearly all of GLM-4.5 is routed experts, and a token sees one in twenty of them. So it does the arithmetic of a
# model of 32 billion parameters. The other 323 billion lie in memory: they do not cost operations, but somebody has
# to hold them.
#
# "Active" is counted for one token. A page of text, or a machine that serves many users at once, touches nearly all
# experts. In `glm-tiny` the sparsity is one in eight, and much of what is active is attention and the dense layer.
#
# ## What we have learnt
#
# The picks are sorted by expert, each expert answers for its tokens with one matrix product, and the weighted answers
# are added back; the shared expert answers for everybody. Sorting changes nothing about the sum and reads each expert
# once. No token is dropped, and what it gets does not depend on its neighbours.
#
# Next: [07](07-forward-step.ipynb) puts the parts together into one forward step.
#
# ## Questions
#
# 1. Double the weight of every token's first pick. How much longer do the rows of `routed` get: twice? Why not?
# 2. Which two experts of layer 2 give the most alike answers to the same tokens? Compare the rows of `everyone` by
#    their cosine. Would you merge them?
# 3. From how many tokens on does a layer of GLM-4.5 read nine tenths of its experts, if picks fall evenly? And of
#    `glm-tiny`?
