# %% [markdown]
# # 03 · Rotary positions: how a dot product learns who stands where
#
# *Reading 35 minutes · running 15 seconds · needs [02](02-residual-stream.ipynb)*
#
# GLM-4.5 reads up to 131,072 tokens. Its attention, which is the subject of the [next notebook](04-attention.ipynb),
# compares tokens by dot products, and a dot product does not know where its two rows stand. This notebook shows what
# tells it: half of every row is turned, like the hands of clocks, by angles that grow with the position.

# %% [markdown]
# ## The question
#
# In a layer every token makes a **query**, a row of d numbers that asks, and a **key**, a row of d numbers that
# answers. The score of a query and a key is their dot product: large where they fit. That is all we need of attention
# here.
#
# "The word before me" cannot be asked for in this way, because the key of a word is the same wherever it stands. How
# does GLM-4.5 put the position into the dot product, so that only the *distance* of the two tokens counts?
#
# We look at one head of layer 3 of `glm-tiny`, on two lines of Python.

# %%
import numpy as np

import minglm
from minglm.look import plots
from minglm.model import cross_entropy, inverse_frequencies, rope, rotation

np.set_printoptions(precision=3, suppress=True, linewidth=110)
model = minglm.load("glm-tiny")
config = model.config
trace = model.trace("def area(width, height):\n    return width * height\n", keep="layers.*.self_attn.*")
q = trace["layers.3.self_attn.q_norm"][0, :, 4]  # [T, d] head 4's queries, not yet turned
k = trace["layers.3.self_attn.k_norm"][0, :, 1]  # [T, d] the keys that it reads
print(len(trace.tokens), "tokens", q.shape, "of which", config.rotary_dim, "entries are turned")

# %% [markdown]
# ## What is lost without positions
#
# The positions are an argument of the model. Let us first see what they are worth: half a page of Python that the
# model has never seen, once as it should be, once with position 0 for every token. The loss is in nats per token:
# smaller is better, and a blind guess among the 2,048 tokens costs ln 2048 = 7.6.

# %%
from minglm.data.heldout import heldout_documents

ids = model.as_ids(heldout_documents("code")[0].text[:1800])[:, :512]  # [1, T]


def loss(ids, reader=model, **options):
    return float(cross_entropy(reader.forward(ids, **options).logits[:, :-1], ids[:, 1:])[0])


right, nowhere = loss(ids), loss(ids, positions=np.zeros_like(ids))
assert nowhere > right + 1
share = np.bincount(ids[0])[np.unique(ids)] / ids.size  # of each token that occurs
counts_only = -(share * np.log(share)).sum()
print(f"{ids.size} tokens: loss {right:.2f}; all at position 0: {nowhere:.2f}")
print(f"knowing only how often each token occurs in this text: {counts_only:.2f}; knowing nothing: {np.log(2048):.2f}")
assert counts_only > nowhere > counts_only - 0.5

# %% [markdown]
# Without positions a layer sees a bag of words: which ones came earlier, for nobody may look ahead, but not in which
# order. (Through several layers some order leaks back, since each token sees one more than the one before it; this
# model was not trained to use that.) Little is left of what it knows about Python beyond how often each token occurs.
#
# ## A pair of numbers, turned
#
# Take two numbers as a point in the plane and turn it by an angle. Turn a query at position 7 by 7 · φ and a key at
# position 5 by 5 · φ. What is their dot product? The lengths are 1, so it is the cosine of the angle between them.
#
# Before you run the cell: does it matter that the positions are 7 and 5, or only that they are 2 apart?


# %%
def turn(pair, angle):
    a, b = pair
    return np.array([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])


phi, east = 0.3, np.array([1.0, 0.0])
for t, s in [(7, 5), (107, 105), (7, 4)]:
    print(f"positions {t}, {s}: {turn(east, t * phi) @ turn(east, s * phi):.4f}")
assert np.isclose(turn(east, 107 * phi) @ turn(east, 105 * phi), np.cos(2 * phi))

# %% [markdown]
# Only the distance matters. Both points were turned, and a dot product sees nothing but the angle between them. (Here
# query and key are the same vector, so 2 before and 2 after give the same. A head's query and key differ: with `east`
# for the one and `turn(east, 1)` for the other the sign of the distance counts, too.)
#
# One pair has a weakness: a clock hand comes round again. With φ = 0.3 a distance of 21 looks almost like a distance
# of 0, because 21 · 0.3 = 6.3 is a full turn. So a head gets many pairs, with many speeds, as a clock has a hand for
# seconds and one for hours.
#
# ## The speeds
#
# Of a head's d entries the first r are turned, as r/2 pairs. Pair i turns by θ^(−2i/r) radians per position: the
# first by one radian, the last by almost nothing. θ is the **base**, `rope_theta`. In `glm-tiny` d = 32 and r = 16,
# so there are 8 pairs; in GLM-4.5 d = 128 and r = 64: 32 pairs.

# %%
r = config.rotary_dim
speeds = config.rope_theta ** (-np.arange(0, r, 2) / r)  # [r/2] radians per position
np.testing.assert_allclose(speeds, inverse_frequencies(config)[0])
print("θ =", config.rope_theta, "\ntokens for a full turn:", np.round(2 * np.pi / speeds, 1))

# %% [markdown]
# The first pair is back where it was after 6 tokens: it tells neighbours apart, and nothing else. The last one would
# need a million. In between the speeds fall by the same factor from pair to pair.
#
# ## One query, turned by hand
#
# Now the query of token 13, the second `idth`. Which two entries form a pair? In GLM-4.5 entry i goes with entry i +
# r/2: the first half of the turned part holds the first coordinates, the second half the second ones. The entries
# from r on are left as they are.

# %%
token = 13
first, second, rest = q[token, : r // 2], q[token, r // 2 : r], q[token, r:]
angles = token * speeds
by_hand = np.concatenate(
    [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles), rest]
)
np.testing.assert_allclose(by_hand, trace["layers.3.self_attn.q_rope"][0, token, 4], atol=1e-5)
print("before", q[token, :r], "\nafter ", by_hand[:r])

# %% [markdown]
# Equal to what the model computed. Two things can be checked without knowing any angle, and they catch most mistakes:
# the rest is untouched to the last bit, and every pair keeps its length, for turning changes a direction and nothing
# else.
#
# The last pairs, i = 6 and 7, have hardly moved: thirteen steps are nothing to a hand that needs 200,000 for its
# round.

# %%
turned = trace["layers.3.self_attn.q_rope"][0]  # [T, H, d]
before = trace["layers.3.self_attn.q_norm"][0]
assert np.array_equal(turned[..., r:], before[..., r:])
lengths = [np.hypot(a[..., : r // 2], a[..., r // 2 : r]) for a in (before, turned)]
np.testing.assert_allclose(lengths[0], lengths[1], rtol=1e-4, atol=1e-5)
print("lengths of token 13's pairs", lengths[1][token, 4])

# %% [markdown]
# ## Only the difference matters
#
# The function of the package does this for all heads and positions: `rotation` makes the cosines and sines, `rope`
# turns. With it we can put our head's queries and keys at any positions we like. First at their own, to see that we
# get the model's scores; then all of them 700 places later.


# %%
def head_scores(q, k, q_positions, k_positions):  # [T, d], [S, d] -> [T, S]
    q_turned = rope(q[None, :, None], *rotation(q_positions[None], config, q.dtype))[0, :, 0]
    k_turned = rope(k[None, :, None], *rotation(k_positions[None], config, k.dtype))[0, :, 0]
    return q_turned @ k_turned.T / np.sqrt(config.head_dim).astype(q.dtype)


places = np.arange(len(q))
here, later = head_scores(q, k, places, places), head_scores(q, k, places + 700, places + 700)
allowed = np.tril(np.ones_like(here, bool))  # nobody looks ahead
np.testing.assert_allclose(here[allowed], trace["layers.3.self_attn.scores"][0, 4][allowed], atol=1e-4)
print(f"moved by 700: scores differ by {np.abs(here - later).max():.1e}, of {np.abs(here).max():.0f}")
assert np.abs(here - later).max() < 1e-3

# %% [markdown]
# The same scores, up to rounding. What holds for one head holds for the model: move the whole text, and the loss
# stays. Stretch it, so that neighbours are 2 apart, and it does not.

# %%
count = np.arange(ids.shape[1])[None]
moved, stretched = loss(ids, positions=count + 400), loss(ids, positions=2 * count)
print(f"loss {right:.4f}; 400 places later {moved:.4f}; neighbours 2 apart {stretched:.2f}")
assert abs(moved - right) < 1e-3
assert stretched > right + 0.5

# %% [markdown]
# This has a practical side. A program that counts positions from 1 instead of 0 makes no visible mistake, until it
# goes on with a text whose first part was counted from 0. Compare turned rows, not scores, when you look for such a
# bug.
#
# ## What a head does with it
#
# Now we can see what our head asks for. We take its average query and its average key, so that no word stands out,
# and draw the score over the distance between them; once for the turned entries, once for the rest. For comparison
# the same of head 4 in layer 4.


# %%
def by_distance(layer, head, most=48):  # -> [most], the turned part; a number, the rest
    mean_q = trace[f"layers.{layer}.self_attn.q_norm"][0, :, head].mean(axis=0)
    mean_k = trace[f"layers.{layer}.self_attn.k_norm"][0, :, head // 3].mean(axis=0)
    still = mean_q[r:] @ mean_k[r:] / np.sqrt(config.head_dim)
    asks = np.tile(mean_q, (most, 1))  # the same query at positions 0 … most − 1, the key at 0
    return head_scores(asks, mean_k[None], np.arange(most), np.zeros(1, int))[:, 0] - still, still


# %%
picture = plots.Picture(figsize=(8, 3.4), layout="constrained")
axes = picture.add_subplot(xlabel="distance: position of the query − position of the key", ylabel="score")
for layer, colour, marker in [(3, "#0072b2", "o"), (4, "#d55e00", "s")]:
    curve, still = by_distance(layer, 4)
    axes.plot(curve, color=colour, marker=marker, markersize=4, label=f"layer {layer}, head 4: turned entries")
    axes.axhline(still, color=colour, linestyle="--" if layer == 3 else ":", label=f"layer {layer}: the rest")
axes.set_title(
    f"Score over distance: mean query, mean key (glm-tiny, r = {r} of d = {config.head_dim} turned)", fontsize=10
)
axes.legend(ncols=2, fontsize=9)
picture

# %% [markdown]
# Layer 3's head (circles) is highest at distance 1: it looks for the token *before*, whatever it is. The lower peaks,
# one every six tokens or so, come from the fastest pair, which cannot tell 1 from 7; the slower pairs push them down,
# and lift them again where the second pair comes round, after some 35 tokens.
# The line of layer 4's head (squares) is almost level: averaged over words it has no wish about distance. The dashed
# and the dotted line are level by construction: entries that are not turned cannot know a distance.

# %%
curve, _ = by_distance(3, 4)
probs = trace["layers.3.self_attn.probs"][0, 4]  # [T, S] how much each token looks at each: next notebook
print("best distance", curve.argmax(), f"; share of attention on the token before: {np.diagonal(probs, -1).mean():.2f}")
assert curve.argmax() == 1

# %% [markdown]
# ## What the other half carries
#
# Half of each head is not turned. In the original method (RoFormer, arXiv 2104.09864) everything is; GLM-4.5, like
# GLM models before it, turns a half, `partial_rotary_factor` 0.5. The other half compares *content only*: its part of
# the score is the same at any distance.
#
# Layer 4's head shows what that is good for. Token 12, `␣w`, begins the second `width`. Its head could look up what
# came after the `w` of the first one. Let us split the scores of its query into the two parts.

# %%
q4, k4 = trace["layers.4.self_attn.q_rope"][0, 12, 4], trace["layers.4.self_attn.k_rope"][0, :13, 1]
moving, resting = k4[:, :r] @ q4[:r] / np.sqrt(32), k4[:, r:] @ q4[r:] / np.sqrt(32)
np.testing.assert_allclose(moving + resting, trace["layers.4.self_attn.scores"][0, 4, 12, :13], atol=1e-4)
for s in (*np.argsort(-(moving + resting))[:4], moving.argmax()):
    print(f"{trace.tokens[s]!r:10} turned {moving[s]:5.2f}  rest {resting[s]:5.2f}  sum {moving[s] + resting[s]:5.2f}")
assert (moving + resting).argmax() == resting.argmax() == 5
assert moving.argmax() != 5
assert resting[5] > np.sort(resting)[-2] + 1

# %% [markdown]
# The best key is token 5, `idth`: what came after `w` the first time. The part that is not turned sets it apart, by
# more than a point from every other key. The turned part likes it too, but left alone it would have picked another: the
# last line printed.
#
# How much does the model as a whole need each part? We empty one of them in all queries, which removes it from all
# scores, and look at the loss. A **tap** may replace any array on its way; [15](15-patching.ipynb) does more with
# that.


# %%
def without(entries):
    def tap(name, array):
        if name.endswith("q_rope"):
            return np.where(np.isin(np.arange(config.head_dim), entries), 0, array)

    return tap


turned_gone, rest_gone = loss(ids, tap=without(range(r))), loss(ids, tap=without(range(r, 32)))
print(f"loss {right:.2f}; without the turned half {turned_gone:.2f}; without the other {rest_gone:.2f}")
assert turned_gone > rest_gone > right

# %% [markdown]
# `glm-tiny` needs both halves, and the turned one far more. That is as far as this goes: taking a part
# away from a model that was trained with it says how much *this* model leans on it, not that a model trained without
# it would be worse.
#
# ## The wrong pairs
#
# The original paper pairs neighbours: entries 0 and 1, 2 and 3, and so on. So do the older GLM-4 and, again, GLM-5.
# GLM-4.5 pairs i with i + r/2, as GPT-NeoX did. Everything said so far holds for both, so the wrong choice breaks no
# property that we tested: lengths, differences, the resting half. Here is what happens to the loss.

# %%
to_neighbours = np.arange(r).reshape(2, r // 2).T.reshape(-1)  # 0 8 1 9 2 10 … : partners side by side
back = np.argsort(to_neighbours)


def interleaved(x, cos, sin):  # the rotation with neighbours as pairs
    halves = np.concatenate([x[..., :r][..., back], x[..., r:]], axis=-1)
    y = rope(halves, cos, sin)
    return np.concatenate([y[..., :r][..., to_neighbours], y[..., r:]], axis=-1)


# %% [markdown]
# A tap puts it into the model: it keeps queries and keys as they were before the rotation, and replaces the turned
# ones.

# %%
kept = {}


def wrong_pairs(name, array):
    if name.endswith(("q_norm", "k_norm")):
        kept[name[:-5]] = array
    if name.endswith(("q_rope", "k_rope")):
        return interleaved(kept[name[:-5]], *rotation(count, config, array.dtype))


wrong = loss(ids, tap=wrong_pairs)
print(f"right pairs {right:.2f}, neighbours {wrong:.2f}, no positions at all {nowhere:.2f}")
assert wrong > nowhere - 0.1

# %% [markdown]
# As bad as no positions at all, or worse. The pairing is not better or worse in itself: it is a part of the *file*.
# If the entries of queries and keys are reordered to match, neighbours give exactly the same scores, as the cell
# below shows. Programs that convert weights between the two conventions do just that to the rows of `q_proj` and
# `k_proj`.

# %%
order = np.concatenate([to_neighbours, np.arange(r, config.head_dim)])
angles = rotation(places[None], config, q.dtype)
q_n = interleaved(q[None, :, None][..., order], *angles)[0, :, 0]
k_n = interleaved(k[None, :, None][..., order], *angles)[0, :, 0]
np.testing.assert_allclose(q_n @ k_n.T / np.sqrt(32), here, atol=1e-4)
print("reordered, then turned as neighbours: the same scores")

# %% [markdown]
# ## How far the hands reach: the base
#
# GLM-4.5 was trained on texts of 4,096 tokens first, with θ = 10,000. When the authors went to 32,768 tokens they
# raised θ to 1,000,000 and kept it for 131,072 (arXiv 2508.06471, section 2.4). Why raise it?
#
# A pair that makes less than one turn over the whole text has another angle for every distance; one that turns often
# cannot tell near from far. Let us count such pairs among GLM-4.5's 32, for both bases and the three lengths.

# %%
glm = minglm.PRESETS["GLM-4.5"]
lengths = [4_096, 32_768, 131_072]
wave = {theta: 2 * np.pi / inverse_frequencies(glm.replace(rope_theta=theta))[0] for theta in (1e4, 1e6)}
for theta, waves in wave.items():
    slow = [int((waves > length).sum()) for length in lengths]
    print(f"θ = {theta:9,.0f}: slowest pair {waves[-1]:11,.0f} tokens; pairs with less than a turn: {slow}")
assert (wave[1e4] < 131_072 / 2).all()
assert (wave[1e6] > 131_072).sum() == 8

# %% [markdown]
# With the old base, at 131,072 tokens every pair goes round at least twice. With the new one eight pairs stay within
# a turn. The picture has all 32.

# %%
picture = plots.Picture(figsize=(8, 3.6), layout="constrained")
axes = picture.add_subplot(yscale="log", xlabel="pair i of 32", ylabel="tokens for a full turn")
axes.plot(wave[1e4], color="#0072b2", marker="o", markersize=4, label="θ = 10,000")
axes.plot(wave[1e6], color="#d55e00", marker="s", markersize=4, label="θ = 1,000,000")
for length, line in zip(lengths, (":", "-.", "--"), strict=True):
    axes.axhline(length, color="black", linestyle=line, linewidth=1, label=f"a text of {length:,}")
axes.set_title("GLM-4.5: how many tokens each pair needs for a full turn (r = 64)", fontsize=10)
axes.legend(fontsize=9)
picture

# %% [markdown]
# On the logarithmic scale both bases are straight lines from 6 tokens upward, the new one steeper. The fastest pairs
# are nearly the same, so what the model has learnt about neighbours stays; the slowest are slowed the most.
#
# There is a second reason, which can be counted too. In training with 4,096 tokens a slow pair only ever showed
# angles up to a part of a turn. An angle beyond is one that the weights have never met. Which of the slow pairs meet
# such angles after the move to longer texts, with and without the new base?

# %%
slow = wave[1e4] > 4_096  # less than a turn in the first training
seen = 4_096 * 2 * np.pi / wave[1e4]  # [r/2] largest angle met there
for length in lengths[1:]:
    beyond = [int((slow & (length * 2 * np.pi / wave[theta] > seen)).sum()) for theta in (1e4, 1e6)]
    print(f"{length:7,} tokens: of {slow.sum()} slow pairs meet new angles: old base {beyond[0]}, new base {beyond[1]}")
assert not (slow & (32_768 * 2 * np.pi / wave[1e6] > seen)).any()

# %% [markdown]
# With the old base all nine would have to work at angles they have never seen. With the new base none has to at
# 32,768 tokens, and two at 131,072. The rest is training: the authors went on with long texts after the change. This
# counting is ours; the report only gives the numbers.
#
# The base is not a switch that can be thrown on a finished model. `glm-tiny` was made as GLM-4.5 was: θ = 10,000 for
# its pre-training, 1,000,000 from then on, with texts twice as long. Here it reads with the base of its youth.

# %%
young = minglm.Model(config.replace(rope_theta=1e4), model.params, model.tokenizer)
old_base = loss(ids, young)
print(f"θ = 1,000,000: loss {right:.2f}; θ = 10,000: {old_base:.2f}")
assert old_base > right + 1

# %% [markdown]
# The weights have moved on, and the old angles mean little to them now.
#
# ## What we have learnt
#
# A query and a key are turned, pair by pair, by angles that grow with their positions; their dot product then depends
# on the distance alone. Fast pairs tell neighbours apart, slow pairs tell near from far, and the base decides how far
# the slow ones reach. Half of each head is not turned and compares content at any distance.
#
# Next: [04](04-attention.ipynb) makes probabilities of the scores and mixes what they point at.
#
# ## Questions
#
# 1. Give the positions backwards (`count[:, ::-1]`), so that the token before stands one place *after*. Is the loss
#    better or worse than with all positions 0? Can attention tell before from after by the scores alone?
# 2. Which `partial_rotary_factor` gives the same pairs as 0.5 if d is halved? And what would a factor of 1 cost a
#    head that looks for a word wherever it stands?
# 3. GLM-4.5 has 1,000,000 for 131,072 tokens. How large must θ be so that the slowest pair makes no full turn in a
#    million tokens, and how large so that eight pairs make none? (The first is less than what it has.)
