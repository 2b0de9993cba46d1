# %% [markdown]
# # 09 · Next-next-token prediction, and decoding with drafts
#
# *Reading 40 minutes · running 20 seconds · needs [04b](04b-generation.ipynb), [07](07-forward-step.ipynb)*
#
# GLM-4.5 has one layer more than it needs. It guesses not the next token but the one after it. In training that makes
# the main model think ahead; in writing it makes guesses that the main model checks several at a time. This notebook
# computes the layer by hand, measures how good its guesses are, and decodes with them without changing a token.

# %% [markdown]
# ## The question
#
# A model that has just written `he` must run once more to write `ight`. Everybody can see what comes. Can something
# cheap say it, and the expensive model only nod?

# %%
import numpy as np

import minglm
from minglm.bench.drafts import prompts
from minglm.generate.speculative import verify
from minglm.look import plots
from minglm.model import cross_entropy, layer, make_layout, rms_norm

np.set_printoptions(precision=3, suppress=True, linewidth=110)

# %%
model = minglm.load("glm-tiny")
c, mtp = model.config, model.params.mtp[0]
ids = model.as_ids("def area(width, height):\n    return width * height\n")
print([model.tokenizer.token(int(i)) for i in ids[0]])

# %% [markdown]
# ## The layer by hand
#
# The main model has made a state hᵢ for each position i, from which its head guesses token i+1. To guess token **i+2**
# one more thing must be known: which token i+1 became. So row i of the MTP layer joins
#
# - the embedding of token i+1, and
# - the state hᵢ, as it is after the final norm,
#
# each normed with weights of its own, embedding first. A matrix brings the 2·D numbers back to D.

# %%
hidden = model.forward(ids).hidden  # [B, T, D] after the final norm
h, next_ids = hidden[:, :-1], ids[:, 1:]  # row i: state i and token i + 1
token_part = rms_norm(model.params.embed_tokens.weight[next_ids], mtp.enorm.weight, c.rms_norm_eps)
state_part = rms_norm(h, mtp.hnorm.weight, c.rms_norm_eps)
joined = np.concatenate([token_part, state_part], axis=-1)  # -> [B, T − 1, 2·D]
x = joined @ mtp.eh_proj.weight.T  # -> [B, T − 1, D]
print(hidden.shape, "->", joined.shape, "->", x.shape)

# %% [markdown]
# Then comes a decoder layer like the others, with attention and experts of its own, a norm, and the *main model's*
# head: GLM-4.5's file has a copy of it, GLM-4.6 has none.

# %%
layout = make_layout(next_ids.shape, c, np.float32)
out, _ = layer(x, mtp.block, c, layout)
normed = rms_norm(out, mtp.shared_head.norm.weight, c.rms_norm_eps)
logits = normed @ model.params.lm_head.weight.T
np.testing.assert_allclose(logits, model.mtp(ids), atol=1e-3)
for i in (5, 7, 11):
    known, guess = model.tokenizer.token(int(ids[0, i + 1])), model.tokenizer.token(int(logits[0, i].argmax()))
    print(f"after {known!r:10} it guesses {guess!r:10} and there stands {model.tokenizer.token(int(ids[0, i + 2]))!r}")

# %% [markdown]
# Equal to `model.mtp`. How many parameters does that take? One layer of the model, and the matrix. And how well does
# it guess, beside the main model that stands one token nearer? The loss over the same tokens of this line:

# %%
main, _ = cross_entropy(model.forward(ids).logits[0, 1:-1], ids[0, 2:])
second, _ = cross_entropy(logits[0, :-1], ids[0, 2:])
print(f"main model, from one token before: {main:.2f}    MTP layer, from two before: {second:.2f}")
assert main < second

# %% [markdown]
# ## What is easily got wrong
#
# Each of these was somebody's bug, and all shapes fit. Predict which costs most.


# %%
def loss_with(joined):
    out, _ = layer(joined @ mtp.eh_proj.weight.T, mtp.block, c, layout)
    z = rms_norm(out, mtp.shared_head.norm.weight, c.rms_norm_eps) @ model.params.lm_head.weight.T
    return float(cross_entropy(z[0, :-1], ids[0, 2:])[0])


same_token = rms_norm(model.params.embed_tokens.weight[ids[:, :-1]], mtp.enorm.weight, c.rms_norm_eps)
first_zeroed = token_part.copy()
first_zeroed[:, 0] = 0
wrong = {
    "right": joined,
    "state first": np.concatenate([state_part, token_part], axis=-1),
    "token i instead of i + 1": np.concatenate([same_token, state_part], axis=-1),
    "position 0 zeroed": np.concatenate([first_zeroed, state_part], axis=-1),
}

# %%
losses = {name: loss_with(rows) for name, rows in wrong.items()}
for name, loss in losses.items():
    print(f"{name:26} {loss:.2f}")
assert losses["state first"] > 2 * losses["right"] > 1.9 * losses["position 0 zeroed"]

# %% [markdown]
# Swapping the two halves is ruinous, and so is giving the layer the token that the state already knows. Zeroing
# position 0 touches one row and is nearly invisible: a bug that several engines carried for months because the text
# stays fine. What suffers is only how many guesses are right, and nobody compares that with anything.
#
# ## How often is it right?
#
# A **draft** counts if it is the main model's own choice. Here are held-out beginnings of code, and questions answered
# with thinking and without; up to three drafts a round, the second and third from the layer's own output, put in again
# as if it were a state.

# %%
rows, made = [], {}
for text, given in prompts(model, 8).items():
    made[text] = [model.generate(prompt, 64, draft=3) for prompt in given]
    counts = [(*result.stats.acceptance(), (0, 0), (0, 0), (0, 0))[:3] for result in made[text]]
    by_depth = np.sum(counts, axis=0)  # [depth, (accepted, drafted)]
    rows += [(text, depth, int(right), int(drafted)) for depth, (right, drafted) in enumerate(by_depth, start=1)]
plots.plot_acceptance(rows, name="glm-tiny, MTP layer")

# %% [markdown]
# Each line is a kind of text; to the right the guess reaches further ahead. Written-out thinking is the most
# predictable for the first draft: in `3+8=1 1+1=2` every second token is forced. Then it drops: further ahead the
# result of the sum would be needed, and one layer does not add. Code keeps up better. Direct answers are the worst,
# as they are all result.
#
# A control: is it more than knowing which tokens are frequent? Shift the guesses by one place, so that each is held
# against a token that it was not meant for.

# %%
page = model.as_ids(prompts(model, 8)["code"][3])
guesses, truth = model.mtp(page)[0, :-1].argmax(axis=-1), page[0, 2:]
print(f"right {np.mean(guesses == truth):.0%}, shifted by one {np.mean(guesses[1:] == truth[:-1]):.0%}")
assert np.mean(guesses == truth) > 2 * np.mean(guesses[1:] == truth[:-1])

# %% [markdown]
# ## A round of decoding with drafts
#
# By hand: the text ends in `he`, and the main model's choice after it is known. The MTP layer drafts what follows;
# then the main model takes **both tokens in one step**. Its logits after the first say whether the draft was right;
# if so, those after the second are a free token.

# %%
text = model.as_ids("def area(width, height):\n    return width * he")
chosen = int(model.forward(text).logits[0, -1].argmax())  # the token that the main model has just written
draft = int(model.mtp(np.append(text[0], chosen)[None])[0, -1].argmax())
checked = model.forward(np.append(text[0], [chosen, draft])[None]).logits[0]
own, free = int(checked[-2].argmax()), int(checked[-1].argmax())
name = model.tokenizer.token
print(f"written {name(chosen)!r}, draft {name(draft)!r}, its own choice {name(own)!r}; then {name(free)!r} is free")

# %% [markdown]
# If the draft is wrong, the model's own choice stands in its place; nothing is lost but the time of the draft. So a
# round gives between one token and n + 1, and the text is what the model would have written alone, token for token:

# %%
for text, given in prompts(model, 3).items():
    for prompt in given:
        assert model.generate(prompt, 48, draft=3).ids == model.generate(prompt, 48).ids
    tokens, rounds = (sum(f(r) for r in made[text]) for f in (lambda r: len(r.ids), lambda r: len(r.stats.rounds)))
    print(f"{text:9} same text; {tokens / rounds:.2f} tokens a round")

# %% [markdown]
# ## With sampling: the same distribution
#
# At a temperature above 0 "equal" is not the question any more: the draft was drawn from one distribution, q, and the
# model would draw from another, p. The rule (arXiv 2211.17192): accept the draft with probability min(1, p/q). If it
# is refused, draw from what p has more of, max(p − q, 0).
#
# Why is that p? A token leaves the rule in two ways. Drafted and accepted: q · min(1, p/q) = min(p, q). After a
# refusal, which has the total probability Σ max(p − q, 0): exactly max(p − q, 0). The sum of both is p. In numbers:

# %%
p, q = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.2, 0.3, 0.1, 0.4])
accepted, left_over = np.minimum(p, q), np.maximum(p - q, 0)
np.testing.assert_allclose(1 - accepted.sum(), left_over.sum())
np.testing.assert_allclose(accepted + left_over, p)
print(f"accepted {accepted.sum():.0%} of the time; then", accepted, "+", left_over, "=", accepted + left_over)

# %% [markdown]
# The package's `verify` takes its dice as arguments, so that it can be run through a fine grid instead of at random.
# Beside it the usual mistake: after a refusal, draw from p itself.

# %%
grid = (np.arange(40) + 0.5) / 40
right, lazy = np.zeros(4), np.zeros(4)
for token in range(4):
    for u in grid:
        for v in grid:
            weight = q[token] / 1600
            right[verify([token], [q], [p, p], np.array([u]), v)[0]] += weight
            out = token if u * q[token] < p[token] else int(np.searchsorted(np.cumsum(p), v))
            lazy[out] += weight
print("verify:        ", right, "\ndraws from p:  ", lazy, "\nwanted:        ", p)
np.testing.assert_allclose(right, p, atol=0.01)
assert np.abs(lazy - p).max() > 0.05

# %% [markdown]
# Drawing from p after a refusal seems honest and is not: the tokens that p and q share were already served by the
# acceptances, and get a second share.
#
# ## Is it faster?
#
# A check of two tokens reads each weight once for both. But each token goes to experts of its own. How many different
# ones does a check read, and what would the gain be if time were bytes?

# %%
parameters = c.count_parameters().active
expert = 3 * c.hidden_size * c.moe_intermediate_size
for text, results in made.items():
    rounds = [r for result in results for r in result.stats.rounds if r.drafted == 3]
    experts = np.mean([r.experts for r in rounds])
    per_round = np.mean([1 + r.accepted for r in rounds])
    bytes_of_round = 1 + (experts - 10) * expert / parameters
    print(f"{text:9} {experts:.0f} experts for 4 tokens (one token: 10), {per_round:.2f} tokens a round")
    print(f"{'':9} gain if time were bytes: {per_round / bytes_of_round:.2f}")

# %% [markdown]
# Four tokens that shared no expert would need 40. They share some, but a check still reads nearly three times the
# experts of a single step. A dense model would read nothing more for four tokens than for one.
#
# And the bound leaves out that drafting costs something. Measured on two cores with nothing else running, drafts do
# **not** make `glm-tiny` faster: a plain step takes a quarter of a millisecond, and a round with its drafts about as
# much more as it gains ([docs/speculation.md](../docs/speculation.md) has the table and what was tried). They pay
# where a step of the large model is long against the fixed costs of a round, as it is in GLM-4.5.
#
# ## What we have learnt
#
# The MTP layer joins a state with the token that the state did not know yet, and guesses one further. Greedy text with
# drafts is the same text; sampled text has the same distribution, if what is left over is drawn after a refusal.
# Experts make the gain smaller, since tokens that are checked together do not share them.
#
# Next: [10a](10a-backward.ipynb) turns round and goes backwards through all of it.
#
# ## Questions
#
# 1. Draft with `draft_model="glm-nano"` instead. It is better at the second and third draft of thinking. Why may a
#    whole small model know the result of a sum, and one large layer not?
# 2. Give the layer states from *before* the final norm (the tap `layers.5.out`). How much worse is the loss, and why
#    is it not a catastrophe? (Look at the weights of `norm` and `hnorm`.)
# 3. With q = p everything is accepted. With p and q that share no token nothing is. What is the acceptance if the
#    draft is taken greedily while the model samples, and which q must the rule then use?
