# %% [markdown]
# # 01 · From text to tokens to vectors
#
# *Reading 25 minutes · running 10 seconds · needs [00b](00b-numpy.ipynb)*
#
# A language model never sees a letter. It sees numbers that stand for pieces of text, and its first step turns each
# number into a row of a table. This notebook makes the pieces, by hand on a small text and with the tokenizer of
# `glm-tiny`, and follows them into the table.

# %% [markdown]
# ## The question
#
# What should the pieces be? Letters make long sequences, and every token costs a step of the whole model. Words make
# a table that never ends, and a word that was not in it cannot be read at all. GLM-4.5, like most models today,
# begins with bytes and merges what often stands together: **byte-pair encoding**, BPE.

# %%
import json
from collections import Counter
from itertools import pairwise

import numpy as np

import minglm
from minglm.data.heldout import heldout_documents
from minglm.look import plots

np.set_printoptions(precision=3, suppress=True, linewidth=110)
model = minglm.load("glm-tiny")
tokenizer = model.tokenizer
for text in ("for i in range(10):", "你好", "naïve 🙂"):
    print(f"{text!r:24}", list(text.encode()))

# %% [markdown]
# Any text in any language is bytes, numbers from 0 to 255. A tokenizer that knows all 256 can read anything, so
# nothing is ever "unknown". A Chinese character is three of them, an emoji four.
#
# ## Merging by hand
#
# The rule: count all pairs of neighbours, merge the most frequent into a new piece, and do it again. Here is a small
# text. Which pairs stand there most often? (Of equals this cell takes the last in the alphabet; the library has a rule
# of its own.)


# %%
def merge(pieces, pair):
    merged = []
    for piece in pieces:
        joined = merged and (merged[-1], piece) == pair
        merged[-1:] = [merged[-1] + piece] if joined else [*merged[-1:], piece]
    return merged


pieces = list("the cat and the hat and the bat")
for step in range(6):
    pairs = Counter(pairwise(pieces))
    pair, count = max(pairs.items(), key=lambda each: (each[1], each[0]))
    pieces = merge(pieces, pair)
    print(f"{step + 1}: {pair[0]!r} + {pair[1]!r} stands there {count} times ->", "·".join(pieces))
assert len(pieces) < 20

# %% [markdown]
# After six merges, 31 characters have become fewer than 20 pieces, and one of them is a word. One thing is wrong: a
# piece may now reach over the space between two words, and `e` of one word with the space after it is not a unit of
# anything.
#
# So real tokenizers first cut the text by a fixed pattern (words with the space before them, numbers, punctuation,
# line ends), and merge only inside these cuts. With that, our few lines are the real thing: here they learn thirty
# merges from 87 kB of English, and the library learns from the same text. A word that stands there often is merged
# once and counted often. Will the two lists be the same?

# %%
from minglm.text.tokenizer import train_tokenizer

prose = "".join(document.text for document in heldout_documents("prose"))
library = train_tokenizer([prose], 256 + 30 + 36).library  # bytes, merges, tags
words = Counter(word for word, _ in library.pre_tokenizer.pre_tokenize_str(prose))
pieces = {word: list(word) for word in words}
learnt = []
for _ in range(30):
    pairs = Counter()
    for word, times in words.items():
        pairs.update({pair: count * times for pair, count in Counter(pairwise(pieces[word])).items()})
    learnt.append(max(pairs, key=pairs.get))
    pieces = {word: merge(p, learnt[-1]) for word, p in pieces.items()}
assert [list(pair) for pair in learnt] == json.loads(library.to_str())["model"]["merges"]
print(f"{len(prose.encode()):,} bytes:", " ".join(map("".join, learnt)))

# %% [markdown]
# The same thirty, in the same order. (`Ġ` is how the library writes a space, `Ċ` the end of a line.) Runs of spaces and
# dashes come early, since this English is documentation with indented lists and ruled tables. Then pairs of letters;
# and `Ġt` and `he` meet in the most frequent word of English.
#
# The merges, once learnt, are a fixed list: encoding applies them in the order in which they were learnt. The list of
# `glm-tiny`, which saw code and prose:

# %%
merges = json.loads(tokenizer.library.to_str())["model"]["merges"]
print(len(merges), "merges; the first", [" + ".join(m) for m in merges[:8]])
print("the last", [" + ".join(m) for m in merges[-4:]])

# %% [markdown]
# The first merges are spaces of Python's indentation and frequent pairs like `in`; the last ones complete longer words.
#
# We apply the list ourselves to one word and compare. Of all pairs of neighbours that are in the list, the one that
# was learnt first is merged; then again.

# %%
rank = {tuple(m): i for i, m in enumerate(merges)}
pieces = list("Ġreturn")
while known := [pair for pair in pairwise(pieces) if pair in rank]:
    pieces = merge(pieces, min(known, key=rank.get))
    print("·".join(pieces))
assert [tokenizer.library.token_to_id(piece) for piece in pieces] == tokenizer.encode(" return")

# %% [markdown]
# ## What it does to text
#
# Frequent words are one token, rare ones several, and what was never in the training text falls back to bytes.

# %%
for text in ("    return self.value", "The quick brown fox", "antidisestablishmentarianism", "你好，世界"):
    ids = tokenizer.encode(text)
    print(f"{len(text.encode()):2} bytes, {len(ids):2} tokens:", "·".join(tokenizer.token(i) for i in ids))
    assert tokenizer.decode(ids) == text

# %% [markdown]
# Decoding gives back exactly the text: nothing is lost. The Chinese greeting is nearly a token per byte, since this
# tokenizer was trained on code and English. GLM-4.5's has 151,365 tokens and was trained on both languages.
#
# **Compression** is the first merit of a tokenizer: fewer tokens for the same text are fewer steps, and more text fits
# into the context. The measure is bytes per token, on text that the tokenizer was not trained on.

# %%
samples = {d: "".join(x.text for x in heldout_documents(d)) for d in ("code", "prose")}
samples |= {"sums": "3+8+1+9+4+2 mod 10\n" * 50, "Chinese": "你好，世界。今天天气很好。" * 20}
for name, text in samples.items():
    print(f"{name:8} {len(text.encode()) / len(tokenizer.encode(text)):.2f} bytes per token")
assert len(samples["code"].encode()) / len(tokenizer.encode(samples["code"])) > 2.5

# %% [markdown]
# Why not a larger vocabulary, then? Each token has a row in the embedding and one in the head. At D = 192 our 2,048
# tokens cost 0.8 million parameters, a tenth of the model; doubling them buys 14 to 17 % more bytes per token
# ([docs/tokenizer.md](../docs/tokenizer.md) has the table).
#
# ## Digits
#
# In the third line of the table every digit is a token of its own (the next cell shows it). That is on purpose, and it
# differs from GLM-4.5, whose pattern groups up to three digits. Look at what grouping would do to a sum, with cuts from
# the left:


# %%
def in_threes(number):
    return "·".join(number[i : i + 3] for i in range(0, len(number), 3))


for number in ("384", "3847", "38475"):
    single = "·".join(tokenizer.token(i) for i in tokenizer.encode(number))
    print(f"{number:6} grouped {in_threes(number):8} single {single}")
assert all(len(tokenizer.encode(str(n))) == len(str(n)) for n in range(0, 100_000, 37))

# %% [markdown]
# With groups from the left, `384` is three hundred and eighty-four in the first number and stands for thirty-eight
# thousand in the last: the same token, another value. And there are 1,110 groups of one to three digits to be learnt by
# heart. A large model with much text can; for one of seven million parameters we kept the digits apart. (How much that
# helps it to add was not measured.)
#
# ## Tokens that no text contains
#
# Some tokens are not text at all. They mark who speaks, where thinking begins, where a tool is called. They never come
# out of merges: each is found in the text first, whole, and is one token.

# %%
chat = model.chat_template.render([{"role": "user", "content": "12+5"}])
print(repr(chat))
print([tokenizer.token(i) for i in tokenizer.encode(chat)])
assert len(tokenizer.encode("<|user|>")) == 1

# %% [markdown]
# This is what a question looks like to the model. `[gMASK]<sop>` open every text of the GLM family. `<|user|>` says
# that a user speaks, `<|assistant|>` that now the model does: whatever it writes next is its answer.
#
# The model stops by writing a token of the same kind: `<|user|>`, as if handing over, `<|observation|>` if it waits
# for a tool, or the end of the text.

# %%
print("an answer ends with one of:", [tokenizer.token(i) for i in model.config.eos_token_id])
print(repr(model.chat_template.render([{"role": "user", "content": "12+5"}], enable_thinking=False)))

# %% [markdown]
# The second line is the same question without thinking. Two things are added: `/nothink` behind the question, and an
# empty pair of `<think>` tags in the answer's place. The model has learnt that after an empty pair comes the answer
# at once ([13](13-thinking-and-tools.ipynb)).
#
# ## Rows of a table
#
# The embedding is a matrix with a row for each token. Looking up is indexing; there is no arithmetic.

# %%
table = model.params.embed_tokens.weight  # [V, D]
ids = np.array(tokenizer.encode("True and False"))
vectors = table[ids]
np.testing.assert_array_equal(vectors, model.trace([ids.tolist()], keep="embed_tokens")["embed_tokens"][0])
print(table.shape, "->", vectors.shape)

# %% [markdown]
# Equal. The same as a product with a matrix of zeros and ones, which is how mathematicians write it and why frameworks
# call it a linear layer; but nobody multiplies 2,047 zeros.
#
# These rows began as noise and were trained like everything else. Tokens used alike have moved together. The cosine
# between rows, and the nearest neighbours of a few:


# %%
def nearest(text, count=5):
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    cosine = unit @ unit[tokenizer.encode(text)[0]]
    return [f"{tokenizer.token(int(i))} {cosine[i]:.2f}" for i in np.argsort(-cosine)[1 : count + 1]]


for text in ("7", " while", "True", " import"):
    print(f"{text!r:10}", nearest(text))
assert {n[0] for n in nearest("7")} <= set("0123456789")

# %% [markdown]
# The neighbours of `7` are digits, of `True` the other constants. `while` is near `when` and `if`,
# `import` near what begins or parts a line. Nobody told the model what a digit is: its rows were pushed in the same
# directions because they stand in the same places.
#
# Even the order of the digits is in the table. The picture has the cosine between the rows of all ten.

# %%
digits = table[[tokenizer.encode(str(n))[0] for n in range(10)]]
digits = digits / np.linalg.norm(digits, axis=1, keepdims=True)
assert digits[6] @ digits[7] > digits[6] @ digits[2]
plots.plot_array(digits @ digits.T, "digit digit", "cosines of the ten digits' rows, glm-tiny")

# %% [markdown]
# Near the diagonal the numbers are larger: 6 is more like 7 than like 2. That is what a model that adds needs, and it
# is all that it starts with; the rest is done by the layers.
#
# ## What we have learnt
#
# Text is bytes; frequent neighbours are merged into tokens by a fixed list; tags mark who speaks; and the first step
# of the model is a table lookup, whose rows training has arranged by use.
#
# Each row now enters the residual stream: [02](02-residual-stream.ipynb).
#
# ## Questions
#
# 1. ` width` is two tokens, `width` at the beginning of a line may be cut otherwise. Encode both, and a version with
#    a capital. Why does a tokenizer learn a space *with* the word, and what does that cost?
# 2. A user types the eight characters `<|user|>` into the chat. What does the tokenizer do, and what should a careful
#    program do before it gives text from outside to the model?
# 3. Compare two models by their loss per token, with tokenizers of 2,048 and 8,192 tokens. Which looks better, for no
#    good reason? Which measure is fair? ([04b](04b-generation.ipynb) names it.)
