# %% [markdown]
# # 09 · Next-next-token prediction, and decoding with drafts
#
# *Reading 40 minutes · running 20 seconds · needs [04b](04b-generation.ipynb), [07](07-forward-step.ipynb)*
#
# GLM-4.5 has one layer more than it needs. It guesses not the next token but the one after it. In training that is a
# second task for the same states; in writing it makes guesses that the main model checks several at a time. This
# notebook computes the layer by hand, breaks it in the ways in which others broke it, measures its guesses, and
# decodes with them without changing a token.

# %% [markdown]
# ## The question
#
# A model that has just written `he` must run once more to write `ight`. Everybody can see what comes. Can something
# cheap say it, and the expensive model only nod?

# %%
import numpy as np

import minglm
from minglm.bench.drafts import prompts
from minglm.look import plots
from minglm.model import cross_entropy, layer, make_layout, rms_norm, softmax

np.set_printoptions(precision=3, suppress=True, linewidth=110)
model = minglm.load("glm-tiny")
c, mtp, name = model.config, model.params.mtp[0], model.tokenizer.token
ids = model.as_ids("def area(width, height):\n    return width * height\n")
print([name(int(i)) for i in ids[0]])

# %% [markdown]
# ## The layer by hand
#
# The main model has made a state hᵢ for each position i, from which its head guesses token i + 1. To guess token
# **i + 2** one more thing must be known: which token i + 1 became. So row i of the MTP layer joins
#
# - the embedding of token i + 1, and
# - the state hᵢ, as it is after the final norm,
#
# each normed with weights of its own, the embedding first. A matrix brings the 2·D numbers back to D.

# %%
hidden = model.forward(ids).hidden  # [B, T, D] after the final norm
h, next_ids = hidden[:, :-1], ids[:, 1:]  # row i: state i and token i + 1
token_part = rms_norm(model.params.embed_tokens.weight[next_ids], mtp.enorm.weight, c.rms_norm_eps)
state_part = rms_norm(h, mtp.hnorm.weight, c.rms_norm_eps)
joined = np.concatenate([token_part, state_part], axis=-1)  # -> [B, T − 1, 2·D]
x = joined @ mtp.eh_proj.weight.T  # -> [B, T − 1, D]
print(hidden.shape, "->", joined.shape, "->", x.shape)

# %% [markdown]
# Then comes a decoder layer like the others, with attention and experts of its own; then a norm, `shared_head.norm`;
# then the *main model's* head. (GLM-4.5's file has a copy of embedding and head for this layer, GLM-4.6's and ours
# have none.)

# %%
out, _ = layer(x, mtp.block, c, make_layout(next_ids.shape, c, np.float32))  # -> [B, T − 1, D]
normed = rms_norm(out, mtp.shared_head.norm.weight, c.rms_norm_eps)
logits = normed @ model.params.lm_head.weight.T  # -> [B, T − 1, V]

# %% [markdown]
# Now the model's own function. Its taps have the names of the weights; the MTP layer has the number after the last
# layer's, here 6.

# %%
taps = {}
theirs = model.mtp(ids, tap=lambda tap, array: taps.update({tap: array.copy()}))
steps = {"enorm": token_part, "hnorm": state_part, "eh_proj": x, "out": out, "shared_head.norm": normed}
for step, by_hand in steps.items():
    np.testing.assert_allclose(by_hand, taps[f"layers.6.{step}"], atol=1e-4)
np.testing.assert_allclose(logits, theirs, atol=1e-3)
for i in (5, 7, 11):
    known, guess, there = (name(int(n)) for n in (ids[0, i + 1], logits[0, i].argmax(), ids[0, i + 2]))
    print(f"row {i:2}, after {known!r:10} it guesses {guess!r:10} and there stands {there!r}")

# %% [markdown]
# Equal, step by step. What does such a layer cost? In GLM-4.5 and here:

# %%
glm = minglm.PRESETS["GLM-4.5"]
for config in (glm, c):
    n = config.count_parameters()
    shares = f"{n.mtp / n.report_total:.1%} of all, {n.mtp_active / n.report_active:.1%} of a token's"
    print(f"{config.num_hidden_layers:2} layers: the MTP layer has {n.mtp:13,} parameters, {shares}")
assert glm.num_nextn_predict_layers == c.num_nextn_predict_layers == 1

# %% [markdown]
# One layer of 93 in GLM-4.5: a guess costs a hundredth of a step, plus the head. In `glm-tiny` it is a sixth, so
# drafts are dear; keep that in mind for the end.
#
# ## How much worse is a guess from further away?
#
# Held-out code, eight pieces of 256 tokens. The main model guesses token i + 2 from state i + 1, one place nearer. We
# measure the loss, and how often the layer's best token is the *main model's* best token. The second number is what
# decoding will ask for: nobody minds there what a programmer once wrote.

# %%
from minglm.data.heldout import heldout_documents

code = "".join(document.text for document in heldout_documents("code"))
page = model.as_ids(code, limit=False)[0, : 8 * 256].reshape(8, 256)
run = model.forward(page)
choice = run.logits.argmax(axis=-1)  # [B, T] the main model's token i + 1
main = float(cross_entropy(run.logits[:, 1:-1], page[:, 2:])[0])
print(f"{page.size:,} tokens; loss of the main model {main:.2f}")

# %% [markdown]
# For the MTP layer, the steps of above as two functions: what the layer makes of its two parts, and what the head
# makes of that.


# %%
def run_layer(token_part, state_part):  # [B, rows, D] each -> [B, rows, D] before shared_head.norm
    x = np.concatenate([token_part, state_part], axis=-1) @ mtp.eh_proj.weight.T
    return layer(x, mtp.block, c, make_layout(x.shape[:2], c, np.float32))[0]


def read_out(out):  # [B, rows, D] -> [B, rows, V]
    return rms_norm(out, mtp.shared_head.norm.weight, c.rms_norm_eps) @ model.params.lm_head.weight.T


def measure(token_part, state_part):
    z = read_out(run_layer(token_part, state_part))[:, :-1]
    return float(cross_entropy(z, page[:, 2:])[0]), np.mean(z.argmax(axis=-1) == choice[:, 1:-1])


# %%
embedding, eps = model.params.embed_tokens.weight, c.rms_norm_eps
t = rms_norm(embedding[page[:, 1:]], mtp.enorm.weight, eps)  # the token's part
s = rms_norm(run.hidden[:, :-1], mtp.hnorm.weight, eps)  # the state's part
right = measure(t, s)
print(f"loss: main model {main:.2f}, MTP layer {right[0]:.2f}; it agrees with the main model {right[1]:.1%}")
assert main < right[0] < main + 0.5

# %% [markdown]
# The loss is hardly larger, and of ten guesses seven are the main model's own. Where does the knowledge come from:
# the state, or the new token? Take one of them away. And then every way to get the layer wrong that we know of; each
# of them was in somebody's engine or port, all shapes fit, and no text shows it. Before you look: which one is worst,
# and which is the hardest to notice?

# %%
before_norm = model.trace(page, keep="layers.5.out")["layers.5.out"][:, :-1]  # what the final norm reads
first_zeroed = t.copy()
first_zeroed[:, 0] = 0
variants = {
    "right": (t, s),
    "no state": (t, 0 * s),
    "no token": (0 * t, s),
    "state first": (s, t),
    "token i instead of i + 1": (rms_norm(embedding[page[:, :-1]], mtp.enorm.weight, eps), s),
    "without enorm": (embedding[page[:, 1:]], s),
    "without hnorm": (t, run.hidden[:, :-1]),
    "state before the final norm": (t, rms_norm(before_norm, mtp.hnorm.weight, eps)),
    "position 0 zeroed": (first_zeroed, s),
}

# %%
found = {said: measure(*parts) for said, parts in variants.items()}
for said, (loss, agree) in found.items():
    print(f"{said:28} loss {loss:5.2f}, agreement {agree:5.1%}")
assert found["state first"][1] < 0.05
assert found["token i instead of i + 1"][1] < 0.1
assert abs(found["position 0 zeroed"][1] - right[1]) < 0.005

# %% [markdown]
# Neither part is enough: without the state, or without the token, little is left. To swap the halves of `joined`, or
# to pair the state with a token that it has already seen, is ruinous, and to forget the token's norm is bad: such
# bugs are found on the first day.
#
# The last three are the dangerous ones. To leave out the second norm, or to take the state from before the final
# norm, costs a point or two here. Zeroing position 0 costs next to nothing. That bug comes from a reasonable thought,
# "position 0 has no token before it"; but after the shift row 0 holds token **1**, a real one. To find it one must
# look row by row. Here are 512 short pieces of 16 tokens.

# %%
short = model.as_ids(code, limit=False)[0, : 512 * 16].reshape(512, 16)
begin = model.forward(short)
t_short = rms_norm(embedding[short[:, 1:]], mtp.enorm.weight, eps)
s_short = rms_norm(begin.hidden[:, :-1], mtp.hnorm.weight, eps)
by_row = {}
for said, first in (("right", 1), ("position 0 zeroed", 0)):
    t_short[:, 0] *= first
    guess = read_out(run_layer(t_short, s_short)).argmax(axis=-1)[:, :-1]
    by_row[said] = 100 * np.mean(guess == begin.logits.argmax(axis=-1)[:, 1:-1], axis=0)
assert by_row["right"][0] > 2 * by_row["position 0 zeroed"][0]
assert np.abs(by_row["right"] - by_row["position 0 zeroed"])[1:].max() < 5

# %%
picture = plots.Picture(figsize=(8, 3.4), layout="constrained")
axes = picture.add_subplot(xlabel="row i", ylabel="% that agree with the main model", ylim=(0, 80))
for (said, shares), style in zip(by_row.items(), ("o-", "s--"), strict=True):
    axes.plot(shares, style, color="#0072b2" if said == "right" else "#d55e00", label=said)
axes.set_title("glm-tiny: guesses of the MTP layer at the beginning of 512 pieces of code", fontsize=10, loc="left")
axes.legend(fontsize=9, loc="lower right")
picture

# %% [markdown]
# The two lines lie on each other but for the first point, where the zeroed one (dashed, squares) is less than half as
# high. So here the damage stays in its row; the rows after it can look at row 0, but hardly need to. A mean over a
# long text cannot show that, and the text itself never does, as we will see.
#
# ## Further ahead: the layer on its own output
#
# One layer guesses one token. For a second guess engines put the layer's own output in again, as if it were a state,
# beside the token that was just guessed. The output **after** `shared_head.norm`: that is most like a state after the
# final norm. Depth 2 by hand, against the model:

# %%
two = read_out(run_layer(token_part[:, 1:], rms_norm(normed[:, :-1], mtp.hnorm.weight, eps)))
np.testing.assert_allclose(two, model.mtp(ids, depth=2), atol=1e-3)
print(two.shape, "row i guesses token i + 3")

# %% [markdown]
# What if the output is handed on as it is *before* that norm? Some engines did. The function below runs the chain
# both ways, on the held-out page.


# %%
def agreement(with_norm):
    """Of depths 1, 2, 3: how often the guess is the main model's choice."""
    state, shares = run.hidden[:, :-1], []
    for depth in (1, 2, 3):
        out = run_layer(t[:, depth - 1 :], rms_norm(state, mtp.hnorm.weight, eps))
        shares.append(np.mean(read_out(out).argmax(axis=-1)[:, :-1] == choice[:, depth:-1]))
        state = (rms_norm(out, mtp.shared_head.norm.weight, eps) if with_norm else out)[:, :-1]
    return np.array(shares)


after, before = agreement(True), agreement(False)
print("after the norm ", after, "\nbefore the norm", before)
spread = mtp.shared_head.norm.weight.std() / mtp.shared_head.norm.weight.mean()
print(f"weights of shared_head.norm: standard deviation / mean = {spread:.2f}")
assert after[0] == before[0]
assert np.abs(after - before).max() < 0.03

# %% [markdown]
# Here it makes no difference to speak of, and we can say why. What comes in is normed again by `hnorm`, which undoes
# the size. What stays is the *shape* of the weights of `shared_head.norm`, and in `glm-tiny` they are nearly all
# equal. In large models they are not, and engines with this mistake lost most of their acceptance from the second
# draft on ([docs/speculation.md](../docs/speculation.md)). A small model can hide a bug.
#
# ## How often are drafts accepted?
#
# Now in decoding. A guess is called a **draft**; it is **accepted** if it and all drafts before it in the round are
# the main model's own choices. Eight held-out beginnings of code, eight questions answered with thinking, the same
# eight answered directly; three drafts a round.

# %%
from minglm.evaluate.confidence import wilson

asked = prompts(model, 8)
made = {text: [model.generate(prompt, 64, draft=3) for prompt in some] for text, some in asked.items()}
rounds = {
    text: [r for result in results for r in result.stats.rounds if r.drafted == 3] for text, results in made.items()
}
rows = []
for text, some in rounds.items():
    for depth in (1, 2, 3):
        right = sum(r.accepted >= depth for r in some)
        rows.append((text, depth, right, len(some), *wilson(right, len(some))))
plots.plot_acceptance(rows, name="glm-tiny, MTP layer")

# %% [markdown]
# One line for each kind of text; further to the right the guess reaches further ahead, and the bars are 95 %
# intervals. Written-out thinking (dashed) is the most predictable at depth 1: in `3+8=1 1+1=2` the result is copied
# to the next sum, an operator comes, and so on. At depth 2 it falls below code: there the *result* of a sum would be
# needed, and one layer that was trained for depth 1 does not add. Code (solid) falls slowly. Direct answers (dotted)
# are nothing but result.
#
# The line of a text also says what a round gives: one token that is always right, and each depth's share.

# %%
for text, some in rounds.items():
    shares = np.array([row[2] / row[3] for row in rows if row[0] == text])
    per_round = np.mean([1 + r.accepted for r in some])
    np.testing.assert_allclose(per_round, 1 + shares.sum())
    print(f"{text:9} 1 + {' + '.join(f'{share:.2f}' for share in shares)} = {per_round:.2f} tokens a round")

# %% [markdown]
# ## A control
#
# Is that more than knowing which tokens are frequent? Hold each guess against a place that it was not meant for: the
# main model's choice one token later, in the same text. What agrees then agrees by chance.

# %%
for text, results in made.items():
    hits, shifted = [], []
    for prompt, result in zip(asked[text], results, strict=True):
        whole, start = np.append(model.as_ids(prompt)[0], result.ids)[None], len(model.as_ids(prompt)[0])
        own = model.forward(whole).logits[0].argmax(axis=-1)[start:]  # choices for the tokens after the first new one
        guess = model.mtp(whole)[0].argmax(axis=-1)[start - 1 :]  # the same places
        hits.extend(guess == own)
        shifted.extend(guess[:-1] == own[1:])
    print(f"{text:9} agreement {np.mean(hits):.0%}, one place off {np.mean(shifted):.0%}")
    assert np.mean(hits) > 2 * np.mean(shifted)

# %% [markdown]
# One place off next to nothing agrees: a guess that is right is right for its place. (And the table of mistakes had
# the other control, "no state": the new token alone gives 14 % of agreement in code.)
#
# ## A round by hand
#
# The text ends in `he`, say. First the main model chooses a token, as always. Then, drafts; then **one** step of the
# main model over the token and its drafts, which gives its own choice after each of them.

# %%
text = model.as_ids("def area(width, height):\n    return width * he")[0]
text = np.append(text, model.forward([text]).logits[0, -1].argmax())  # chosen, and not yet read by anybody


def drafts(text, count):
    """Guesses, each from the MTP layer at the next depth, with the guesses before it in the text."""
    start = len(text)
    for depth in range(1, count + 1):
        text = np.append(text, model.mtp([text], depth=depth)[0, -1].argmax())
    return text[start:]


# %% [markdown]
# The check is one call of `forward`. Its last four rows are what we want: the logits after the chosen token, and after
# each of the three drafts.

# %%
guessed = drafts(text, 3)
checked = model.forward([np.append(text, guessed)]).logits[0, len(text) - 1 :]  # [4, V] after the token, and each draft
own = checked.argmax(axis=-1)
print("last token", repr(name(int(text[-1]))), " drafts", [name(int(i)) for i in guessed])
print("the main model's choices in their places, and one more:", [name(int(i)) for i in own])

# %% [markdown]
# Compare the two lists from the left. Drafts count as long as they agree; at the first that does not, the main
# model's own choice is taken, which is there already. If all agree, the choice after the last one is a free token. So
# a round gives 1 to n + 1 tokens, and **never a token that the main model would not have chosen**.


# %%
def accept(guessed, own):  # [n], [n + 1] -> the tokens that the round gives
    agree = np.append(guessed == own[:-1], False)
    return own[: agree.argmin() + 1]


print("this round gives", [name(int(i)) for i in accept(guessed, own)])

# %% [markdown]
# Now one round after another, for 40 tokens and more; the last round with a refusal is shown. Is the text the one
# that `generate` writes without drafts?

# %%
start, count, shown = len(text), 0, []
while len(text) < start + 40:
    guessed, count = drafts(text, 3), count + 1
    own = model.forward([np.append(text, guessed)]).logits[0, len(text) - 1 :].argmax(axis=-1)
    given = accept(guessed, own)
    shown = [guessed, own, given] if len(given) < 4 else shown
    text = np.append(text, given)
alone = model.generate(text[: start - 1], len(text) - start + 1, engine="numpy", end_ids=[]).ids
assert text[start - 1 :].tolist() == alone
print(f"{len(text) - start} tokens in {count} rounds, the same as without drafts")
for said, tokens in zip(("drafts", "own choices", "so it gives"), shown, strict=True):
    print(f"{said:11}", [name(int(i)) for i in tokens])

# %% [markdown]
# The text is the main model's own, to the last token. That is also why a broken MTP layer goes unnoticed: it only
# makes rounds shorter.
#
# The package does the same with caches for both: after a round the rows of refused drafts are cut off again
# (`truncate`), and the MTP layer's cache holds a row for every token of the prompt. Its text, for all the prompts
# above:

# %%
for text, some in asked.items():
    plain = [model.generate(prompt, 64).ids for prompt in some]
    assert plain == [result.ids for result in made[text]]
    print(
        f"{text:9} {sum(map(len, plain)):3} tokens in {sum(len(r.stats.rounds) for r in made[text]):3} rounds: the same"
    )

# %% [markdown]
# Not nearly the same: the same. In the fast engine the bits of a row do not depend on how many rows step together, so
# even near ties cannot fall the other way.
#
# ## With sampling: accept or reject
#
# At a temperature above 0, "equal" is not the question. The model would draw from a distribution p; the draft was
# drawn from another one, q. The rule (arXiv 2211.17192):
#
# 1. accept a draft x with probability min(1, p(x) / q(x));
# 2. if it is refused, draw from the **residual**: what p has more of than q, max(p − q, 0), divided by its sum.
#
# Why does the result have the distribution p? A token x can come out in two ways. Drafted and accepted: q(x) · min(1,
# p(x)/q(x)) = min(p(x), q(x)). Or from the residual, after a refusal; refusals have the total probability 1 − Σ
# min(p, q) = Σ max(p − q, 0), which is just what the residual was divided by. So the second way gives max(p(x) −
# q(x), 0), and the sum is
#
# min(p, q) + max(p − q, 0) = p,
#
# whichever of the two is larger. Nothing was said about q: with a poor one there are more refusals, never another
# text.

# %%
p, q = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.2, 0.3, 0.1, 0.4])
both, more = np.minimum(p, q), np.maximum(p - q, 0)
np.testing.assert_allclose(1 - both.sum(), more.sum())
np.testing.assert_allclose(both + more, p)
print(f"accepted {both.sum():.0%} of the time:", both, "+", more, "=", both + more)

# %% [markdown]
# Now the package's `verify`. It takes its dice as arguments, u for the decision and v for the draw, so its
# distribution can be computed without chance. Beside it, mistakes: which of them look harmless to you?

# %%
from minglm.generate.speculative import verify

accepts = np.minimum(1, p / q)  # [V] with which probability
v = (np.arange(2000) + 0.5) / 2000
exact = np.zeros(4)
for x in range(4):
    for u, share in ((0.0, accepts[x]), (1 - 1e-9, 1 - accepts[x])):  # a decision for, and one against
        drawn = [verify([x], [q], [p, p], np.array([u]), value)[0] for value in v] if share else [0]
        exact += q[x] * share * np.bincount(drawn, minlength=4) / len(drawn)
print("verify", exact, "   p", p)
np.testing.assert_allclose(exact, p, atol=1e-3)

# %%
refused = 1 - both.sum()
mistakes = {
    "no residual: draw from p": p,
    "draw from q once more": q,
    "|p − q|": np.abs(p - q) / np.abs(p - q).sum(),
    "right": more / more.sum(),
}
for said, after_refusal in mistakes.items():
    result = both + refused * after_refusal
    print(f"{said:25} {result}, off by {np.abs(result - p).max():.3f}")
    assert (np.abs(result - p).max() < 1e-12) == (said == "right")

# %% [markdown]
# Drawing from p after a refusal seems the honest thing, and it is wrong: the last token, which q likes too much, has
# already had all that p allows through acceptances, and gets more. The residual leaves it out, exactly.
#
# How often would `glm-tiny` accept when it samples? The probability is Σ min(p, q), place by place.

# %%
p_page = softmax(run.logits[:, 1:-1])  # [B, T − 2, V] the main model, for token i + 2
q_page = softmax(model.mtp(page)[:, :-1])  # the MTP layer, for the same
sampled = np.minimum(p_page, q_page).sum(axis=-1).mean()
best = np.take_along_axis(p_page, q_page.argmax(axis=-1)[..., None], axis=-1).mean()
print(f"drafts drawn from q: accepted {sampled:.1%};  the best of q as draft, main model sampling: {best:.1%}")
print(f"both greedy: {found['right'][1]:.1%}")

# %% [markdown]
# Sampling accepts about as often as greedy decoding does here. If the draft is always q's best token, its
# distribution is all on that token, and the rule accepts it with probability p of it: less than by drawing.
#
# ## Is it faster?
#
# A step's time is mostly the reading of weights ([14](14-speed.ipynb)). A dense model reads all of them once for a
# check of four tokens, as for one token. A mixture of experts does not: each token goes to experts of its own. How
# many different ones does a check read? We count them from the rounds that were made.

# %%
E, K, moe_layers = c.n_routed_experts, c.num_experts_per_tok, c.num_hidden_layers - c.first_k_dense_replace
picks = [r.picks[:, c.first_k_dense_replace :] for some in rounds.values() for r in some]  # int [4, layer, K] each
for n in (1, 2, 3, 4):
    counted = np.mean([sum(len(np.unique(each[:n, i])) for i in range(moe_layers)) for each in picks])
    dice = moe_layers * E * (1 - (1 - K / E) ** n)
    print(f"{n} tokens: {counted:4.1f} experts in 5 layers; by dice {dice:4.1f}; unshared {n * K * moe_layers}")
    assert K * moe_layers <= counted <= n * K * moe_layers
assert 2 * K * moe_layers < counted < dice

# %% [markdown]
# Neighbouring tokens share experts, more of them than dice would make them share. Still a check of four tokens reads
# nearly three times the experts of a single step.
#
# What would the gain be if time were bytes and drafts were free? Tokens of a round, over the bytes of its check
# relative to a plain step.

# %%
expert, active = 3 * c.hidden_size * c.moe_intermediate_size, c.count_parameters().active
for text, some in rounds.items():
    per_round, experts = np.mean([1 + r.accepted for r in some]), np.mean([r.experts for r in some])
    check = 1 + (experts - K * moe_layers) * expert / active
    print(f"{text:9} {per_round:.2f} tokens, {check:.2f} times the bytes: gain at most {per_round / check:.2f}")
    assert per_round / check < per_round

# %% [markdown]
# And GLM-4.5? We have not run it, but its bytes can be counted: for n tokens that pick experts by dice, and drafts of
# which each is right nine times in ten if the one before it is.

# %%
expert = 3 * glm.hidden_size * glm.moe_intermediate_size * (glm.num_hidden_layers - glm.first_k_dense_replace)
E, K, active = glm.n_routed_experts, glm.num_experts_per_tok, glm.count_parameters().active
for n in (1, 2, 3, 4):
    distinct = E * (1 - (1 - K / E) ** n)  # of each layer
    check = 1 + (distinct - K) * expert / active
    per_round = sum(0.9**depth for depth in range(n))
    gain = per_round / check
    print(f"{n} tokens: {distinct:4.1f} of {E} experts, {check:.2f} times the bytes; gain at most {gain:.2f}")

# %% [markdown]
# With 160 experts hardly any are shared by chance. A check of two tokens reads half as much again as a plain step, so
# one draft gains a quarter where a dense model would gain nine tenths, and more drafts add little. That is for
# experts picked by dice; real ones are shared more often, as we have seen. And on a server with many users at once
# most experts are read anyway, so the sum is another one.
#
# ## The verdict
#
# Measured on two cores with nothing else running, drafts do **not** make `glm-tiny` faster: 0.5 to 0.9 times the
# speed of plain decoding with the MTP layer, and 1.01 at best with `glm-nano` drafting the thinking. A plain step
# takes a quarter of a millisecond, so that the fixed costs of a round and the layer itself, a sixth of the model, eat
# up what is gained ([docs/speculation.md](../docs/speculation.md) has the table, the command that makes it, and what
# was tried). Drafts pay where a plain step is long against those costs.
#
# ## What we have learnt
#
# The MTP layer joins a state with the token that the state did not know yet, and guesses one further. Greedy text
# with drafts is the same text; sampled text has the same distribution, if what is left over is drawn after a refusal.
# Mistakes in the layer do not show in the text, only in acceptance. Experts make the gain smaller, since tokens that
# are checked together do not share them.
#
# Next: [10a](10a-backward.ipynb) turns round and goes backwards through all of it.
#
# ## Questions
#
# 1. Draft with `draft_model="glm-nano"` instead. It is better at the second and third draft of thinking. Why may a
# whole small model know the result of a sum, and one layer, fed with its own output, not?
# 2. Which rows does the zeroed row 0 reach through attention? Trace the MTP layer with and without it and compare
# `layers.6.self_attn.probs` for key 0. Why is the damage so small?
# 3. Take p = q, then p and q without a token in common. What is accepted? Then temperature 0.5 for p *and* q on the
# page above: does acceptance rise or fall?
