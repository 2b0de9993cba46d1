# %% [markdown]
# # 13 · Thinking, direct answers and tool calls
#
# *Reading 40 minutes · running 25 seconds · needs [04b](04b-generation.ipynb)*
#
# GLM-4.5 is one model with two ways of answering: it thinks first, or it answers at once. And it can ask for a
# function to be run. Inside, nothing changes for any of this: the same weights predict the next token. All of it is
# text with tags, and programs around the model that write and read them.

# %% [markdown]
# ## The question
#
# What is the switch between thinking and not thinking? What stands between `<think>` and `</think>`, and does the
# model need it, or is it decoration? And who runs the function when a model "calls a tool"?
#
# `glm-tiny` has learnt all three on small tasks, in the chat format of GLM-4.5. It runs here with the compiled
# kernels, which are made once on a new machine (some ten seconds).

# %%
import numpy as np

import minglm
from minglm.look.plots import Picture

np.set_printoptions(precision=3, suppress=True, linewidth=110)
model = minglm.load("glm-tiny")
template, tokenizer = model.chat_template, model.tokenizer
messages = [{"role": "user", "content": "4821+937"}]
print(repr(template.render(messages)))
print(repr(template.render(messages, enable_thinking=False)))

# %% [markdown]
# ## The switch is text
#
# That is what the model reads: the conversation as one text. `<|user|>` and `<|assistant|>` are single tokens that
# say whose turn it is. A turn has no end mark: the next role's token ends it.
#
# Now compare the two lines. Without thinking, the template does two things. It appends the token `/nothink` to what
# the user said, and it begins the assistant's turn with an **empty** thinking block, `<think></think>`. There is no
# other switch: no second model, no flag that the weights could see.
#
# What will the model write after each?

# %%
for enable_thinking in (True, False):
    said = model.generate(template.render(messages, enable_thinking=enable_thinking), max_new_tokens=64)
    print(f"thinking {enable_thinking!s:5} {len(said.ids):2} tokens, ended by {tokenizer.token(said.ids[-1])}", end=" ")
    print(repr(said.text))
assert said.text.strip() != "5758" == str(4821 + 937)

# %% [markdown]
# With thinking it adds column by column from the right, as on paper: digit + digit + carry = carry and digit. Read
# the last digits of the results from right to left and you have the answer. Without, it writes four digits at once,
# and they are wrong.
#
# Both end with the token `<|user|>`: the model gives the turn back. That is one of its three end tokens; a program
# that stops only at `<|endoftext|>` lets the model go on and write the user's next question itself.

# %%
ends = [tokenizer.token(i) for i in model.config.eos_token_id]
beyond = model.generate(template.render(messages), max_new_tokens=80, end_ids=[model.config.eos_token_id[0]])
print(ends, "\n", repr(beyond.text))
assert "<|user|>" in beyond.text

# %% [markdown]
# In a longer conversation the template keeps no old thinking: of earlier turns an empty block is left. It has done
# its work, and it would fill the context.

# %%
earlier = {"role": "assistant", "content": "5", "reasoning_content": "2+3+0=05"}
longer = template.render([{"role": "user", "content": "2+3"}, earlier, *messages])
print(repr(longer))
assert "2+3+0" not in longer

# %% [markdown]
# ## Is thinking worth its tokens?
#
# Five kinds of generated tasks, forty questions each, none of which the training has seen (`heldout_items`). An
# answer is right if it is exactly right. The intervals are Wilson's, at 95 %: with forty questions a share is known
# to some ten per cent.
#
# The tasks: sums of four digits, products, sums modulo 10, following arrows in a map, and turning a word around.
# Guess for which of them thinking does *not* help.

# %%
from minglm.data.tasks import TASKS, heldout_items
from minglm.evaluate.accuracy import accuracy, answer_limit
from minglm.evaluate.confidence import wilson

sizes = {"addition": 4, "multiplication": 3, "sums": 8, "follow": 4, "reverse": 6}
asked = {name: heldout_items(TASKS[name], 40, seed=5, size=size) for name, size in sizes.items()}
scores = {}
for name, items in asked.items():
    print(f"{name:15} {items[0].question!r:32} chance {np.mean([item.chance for item in items]):.1%}")
    for how, thinking in (("direct", False), ("thinking", True)):
        score = accuracy(model, items, thinking, max_new_tokens=answer_limit(model, items, thinking))
        scores[name, how] = score
        low, high = wilson(score.right, score.asked)
        print(f"    {how:9} {score.share:4.0%} ({low:.0%} to {high:.0%}), {score.tokens / score.asked:.0f} tokens")

# %%
picture = Picture(figsize=(8, 3.4), layout="constrained")
axes = picture.add_subplot(xlim=(0, 1.02), xlabel="share of exact answers, 40 questions each (95 %: Wilson)")
for how, colour, marker, shift in (("direct", "#d55e00", "s", 0.15), ("thinking", "#0072b2", "o", -0.15)):
    of = [scores[name, how] for name in sizes]
    share, bounds = np.array([s.share for s in of]), np.array([wilson(s.right, s.asked) for s in of])
    across = np.abs(bounds.T - share)
    axes.errorbar(share, np.arange(5) + shift, xerr=across, fmt=marker, color=colour, capsize=3, label=how)
chance = [np.mean([item.chance for item in items]) for items in asked.values()]
axes.plot(chance, np.arange(5), "k|", markersize=18, label="blind guess")
axes.set_yticks(range(5), [f"{name}, {size}" for name, size in sizes.items()])
axes.set_title("glm-tiny: exact answers, direct and with thinking")
axes.invert_yaxis()
axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
picture

# %% [markdown]
# Circles are thinking, squares direct, black bars a blind guess (in three rows at the left edge). In the upper four
# rows the circles stand at the right edge and the squares far to the left of them. For `sums` and `follow` the
# squares' intervals reach the guess: forty direct answers do not show that the model knows anything. In the last row
# both are at the edge.

# %%
for name in ("addition", "multiplication", "sums", "follow"):
    assert wilson(*scores[name, "thinking"][:2]).low > wilson(*scores[name, "direct"][:2]).high
for name in ("sums", "follow"):
    low, high = wilson(*scores[name, "direct"][:2])
    assert low < np.mean([item.chance for item in asked[name]]) < high
assert scores["reverse", "direct"].right == scores["reverse", "thinking"].right == 40
assert scores["reverse", "thinking"].tokens > 5 * scores["reverse", "direct"].tokens

# %% [markdown]
# Why? A token passes through six layers, and that is all the work that goes into it. Eight digits must be added one
# after the other, and each step needs the one before: many steps for six layers, and the training has not found a
# shorter way. Written out, every step is a token of its own, and the next one can read it: **the text is the memory**,
# and the number of steps is no longer bounded by the number of layers.
#
# To turn a word around no step needs another. Every letter can be looked up where it stands, directly; there thinking
# costs more than five times the tokens and gains nothing. That is why GLM-4.5 has the switch.
#
# ## Does the answer come from the thinking?
#
# High scores *with* thinking do not prove that the answer is made *from* it. The model might know the answer and
# write the steps for show. To find out, we put our own thinking into its mouth. The prompt ends inside the thinking
# block, and the model goes on from there.

# %%
from minglm.data.chats import ask
from minglm.generate.batch import continue_all

items = asked["sums"]
print("question:", items[0].question, "\nsteps:   ", items[0].steps, "\nanswer:  ", items[0].answer)


def after(thoughts):
    """What the model answers if its thinking begins with these texts, one for each item."""
    prompts = [template.render([ask(item)]) + "\n<think>" + t for item, t in zip(items, thoughts, strict=True)]
    return [each.text.split("</think>")[-1].strip() for each in continue_all(model, prompts, 80)]


# %% [markdown]
# Each experiment makes forty thoughts, and says what the answer would be if it followed them. First the **control**:
# the right steps, put in by us. If that failed, the method would be at fault.
#
# Then: the very last digit changed by 3. Then an early result changed, and everything after it left as it was. What
# does the answer follow? Write down three numbers of forty before you run the cell.

# %%
END = "</think>\n"
steps, answer = [item.steps for item in items], [item.answer for item in items]
moved = [str((int(a) + 3) % 10) for a in answer]  # the answer, 3 too large
last = [s[:-1] + m for s, m in zip(steps, moved, strict=True)]
early = [s[:4] + str((int(s[4]) + 3) % 10) + s[5:] for s in steps]  # 6+8=4 becomes 6+8=7


def hits(thoughts, wanted):
    return sum(a == b for a, b in zip(after(thoughts), wanted, strict=True))


print("control: right steps, right answers:       ", hits([s + END for s in steps], answer), "of 40")
print("last digit changed, the answer follows it: ", hits([s + END for s in last], moved), "of 40")
print("early result changed, answer still right:  ", hits([s + END for s in early], answer), "of 40")
assert hits([s + END for s in last], moved) == hits([s + END for s in early], answer) == 40

# %% [markdown]
# The answer is the last digit of the thinking, whatever it is, even if a calculation above it says otherwise. The
# early mistake is ignored, for the digits after it are right.
#
# So is an early mistake harmless? Only because we wrote the rest ourselves. Let the model write it: change the third
# result and leave the block **open**.

# %%
opened = []
for s in steps:
    three = " ".join(s.split(" ")[:3])
    opened.append(three[:-1] + str((int(three[-1]) + 3) % 10))
print(steps[0], "\n" + opened[0], "…")
print("the mistake is carried to the end: ", hits(opened, moved), "of 40")
assert hits(opened, moved) == 40

# %% [markdown]
# Every later step takes over the wrong digit and adds correctly to it, so the answer is 3 too large: forty times of
# forty. The model does not check what it has written; it goes on from it.
#
# Two more. Thinking that is **cut off** after four of seven steps. And the thinking of **another question**.

# %%
cut = [" ".join(s.split(" ")[:4]) for s in steps]
foreign, theirs = steps[1:] + steps[:1], answer[1:] + answer[:1]
print("cut off: right", hits([s + END for s in cut], answer), "; the last digit written", end=" ")
print(hits([s + END for s in cut], [s[-1] for s in cut]), "of 40")
print("another's thinking: right", hits([s + END for s in foreign], answer), end=" ")
print("; the other question's answer", hits([s + END for s in foreign], theirs), "of 40")
assert hits([s + END for s in cut], [s[-1] for s in cut]) == hits([s + END for s in foreign], theirs) == 40

# %% [markdown]
# What the question says has no say in the answer any more. (The few right ones are those whose answer
# happens to be the same digit.)
#
# In this model, on this task, the thinking is the computation. That is a strong statement because it was tested by
# changing the cause. It must not be carried over to large models: they have many layers, have learnt from texts of
# every kind, and are known to answer against their own written steps at times. There one has to ask for each task,
# by the same experiments.
#
# ## Taking an answer apart
#
# What comes back from the model is text. A program must separate thinking, content and calls. For a well-formed
# answer that is one line:

# %%
from minglm.text.answer import AnswerStream, parse_answer

text = "\n<think>7+5+0=12</think>\n12"
thinking, _, content = text.partition("</think>")
by_hand = thinking.strip().removeprefix("<think>"), content.strip()
parsed = parse_answer(text)
assert by_hand == (parsed.thinking, parsed.content) == ("7+5+0=12", "12")
print(parsed)

# %% [markdown]
# And these are not well-formed, or not so simple. What would the line above make of them?

# %%
for odd in (
    "12",  # thinking was off
    "\n<think>7+5+0=",  # cut off by the limit of tokens
    "\n<think></think>\n<think>real</think>\n12",  # an empty block first
    "\n<think>I could write <tool_call>now\n</tool_call></think>\nNo.",  # a call that is only thought of
):
    print(repr(odd), "\n   ", parse_answer(odd))
assert parse_answer("12").content == "12"
assert parse_answer("12".partition("</think>")[0]).thinking is None

# %% [markdown]
# The first is what one-line parsers get wrong most often: without a closing tag they take the whole answer for
# thinking, and show nothing. The last one matters for safety: what is only thought must not be run.
#
# ## Piece by piece
#
# A chat shows text while it comes. Then a tag can be cut in the middle: `</thi` and later `nk>`. A parser that looks
# at each piece by itself misses it. We cut an answer into pieces of four characters:

# %%
pieces = [text[i : i + 4] for i in range(0, len(text), 4)]
print(pieces, "\nclosing tag seen by looking at each piece:", any("</think>" in piece for piece in pieces))
stream = AnswerStream()
for piece in pieces:
    print(f"{piece!r:10} ->", [(said.kind, said.text) for said in stream.feed(piece)])
print("finish     ->", [(said.kind, said.text) for said in stream.finish()])
assert stream.answer == parsed

# %% [markdown]
# Text that could still become a tag is **held back**: after `</th` nothing comes out until it is clear. So nobody ever
# sees half a tag, and what comes out as thinking is thinking. It must hold for every cut:

# %%
for size in range(1, len(text)):
    stream = AnswerStream()
    said = [s for i in range(0, len(text), size) for s in stream.feed(text[i : i + size])] + stream.finish()
    assert stream.answer == parsed
    assert "".join(s.text for s in said if s.kind == "thinking") == "7+5+0=12"
print(f"{len(text) - 1} sizes of pieces, one answer")

# %% [markdown]
# ## A function becomes a tool
#
# A model cannot run anything. It can write that it would like something to be run. For that it must be told what
# there is: a **schema**, made here from the signature of a Python function.

# %%
from minglm.data.calculator import calculator
from minglm.text.tools import call_tool, run_tools, schema_of

schema = schema_of(calculator)
print(schema["function"])
question = [{"role": "user", "content": "(4821+937)*3"}]
prompt = template.render(question, [schema])
print(prompt)

# %% [markdown]
# The schema stands in a system turn before the conversation, as JSON, with a short instruction how to call. All of it
# is text again. Arguments are called in tags, one pair of tags for each, and their values are written raw: the authors
# of GLM-4.5 found that code in JSON needs so much escaping that it is better avoided (arXiv 2508.06471, section 3.1).
#
# ## The loop, step by step
#
# **Step 1: ask.** The model writes until an end token.

# %%
said = model.generate(prompt, max_new_tokens=120)
print(said.text, "\nended by", tokenizer.token(said.ids[-1]))
assert tokenizer.token(said.ids[-1]) == "<|observation|>"

# %% [markdown]
# It thought (hardly), wrote a call, and ended its turn with `<|observation|>`: the next to speak is the tool.
#
# **Step 2: take the call out and run it.** Now it is we who compute.

# %%
call = parse_answer(said.text, [schema]).tool_calls[0]
result = call_tool(call, {"calculator": calculator})
print(call, "->", result)
assert result == str((4821 + 937) * 3)

# %% [markdown]
# `parse_answer` gets the schema because it says which values are text. Without it, `"10001"` looks like a number; a
# postal code should stay one.

# %%
zip_call = "<tool_call>find\n<arg_key>zip</arg_key>\n<arg_value>10001</arg_value>\n</tool_call>"


def find(zip: str) -> str:
    """A place."""
    return zip


guessed, told = (parse_answer(zip_call, schemas).tool_calls[0] for schemas in (None, [schema_of(find)]))
print(guessed, told)
assert (guessed.arguments["zip"], told.arguments["zip"]) == (10001, "10001")

# %% [markdown]
# **Step 3: tell the model.** The call and the result are appended to the conversation, and the whole is rendered
# again. **Step 4: ask again**, until an answer calls nothing.

# %%
function = {"function": call._asdict()}
thought = parse_answer(said.text).thinking
question += [{"role": "assistant", "content": "", "reasoning_content": thought, "tool_calls": [function]}]
question += [{"role": "tool", "content": result}]
again = template.render(question, [schema])
assert again.startswith(prompt + said.text)  # to the letter what it wrote itself
final = model.generate(again, max_new_tokens=60)
print(again.removeprefix(prompt + said.text), final.text)
assert parse_answer(final.text).content == result

# %% [markdown]
# The prompt of the second round begins with the first prompt and the model's own text, to the letter. That is worth
# an assert: if a template renders a call in another way than the model writes it, the model reads something that it
# has never seen, and a KV cache of the first round is useless from there on.
#
# `run_tools` is this loop:


# %%
def write(prompt):
    return model.generate(prompt, max_new_tokens=120).text


def ask_with(tools, content, schemas):
    return run_tools(write, [{"role": "user", "content": content}], schemas, tools, template)


done = ask_with({"calculator": calculator}, "(4821+937)*3", [schema])
assert done[:-1] == question
for message in done:
    print(message)

# %% [markdown]
# ## Does it believe its tool?
#
# A test of the same kind as above: a calculator that always says 12.

# %%
lied = ask_with({"calculator": lambda expression: "12"}, "(4821+937)*3", [schema])
print(lied[-1])
assert lied[-1]["content"] == "12"

# %% [markdown]
# It repeats what it was told. For a model that cannot multiply in its head that is the right thing to do, and it is
# the reason why a tool's result is as dangerous as a user's text: whoever writes the result writes the answer.
#
# And a tool that it has never seen?


# %%
def area(width: int, height: int) -> int:
    """Area of a rectangle."""
    return width * height


unknown = ask_with({"area": area}, "What is the area of 12 by 31?", [schema_of(area)])
print(schema_of(area)["function"]["parameters"], "\n", unknown[-1])
assert unknown[-1]["role"] == "assistant"  # nothing was called

# %% [markdown]
# Nothing useful: a malformed call, which the parser leaves in the content and nobody runs. `glm-tiny` has learnt one
# schema by heart. GLM-4.5 is trained with many different ones and so has to *read* them. The program around both
# models is the same.
#
# ## Why only the assistant's tokens are learnt
#
# A conversation of the training holds everything: system text, question, thinking, call, result, answer. In
# fine-tuning only what the assistant says counts in the loss. `spans` has the pieces of a conversation, and whether
# each counts.

# %%
from minglm.data.chats import spans, task_chat, tool_chat

pieces = spans(tool_chat(heldout_items(TASKS["calculator"], 1, seed=5)[0], thinking=True), template)
for piece, counts in pieces:
    print("learnt" if counts else "read  ", repr(piece[-70:]))

# %% [markdown]
# Each learnt piece includes the token that ends the turn: when to stop must be learnt, too. The tool's result is only
# read.
#
# What would be different if everything counted? Look at how well each token of a conversation *can* be predicted, on
# forty sums with their right thinking. All have the same length, so they make one array.

# %%
from minglm.model import IGNORE, softmax

chats = [spans(task_chat(item, thinking=True), template) for item in items]
ids = np.array([[i for piece, _ in chat for i in tokenizer.encode(piece)] for chat in chats])  # [B, T]
learnt = np.array([counts for piece, counts in chats[0] for _ in tokenizer.encode(piece)])  # [T]
probs = softmax(model.forward(ids).logits[:, :-1])
bits = -np.log2(np.take_along_axis(probs, ids[:, 1:, None], axis=-1)[..., 0])  # [B, T − 1]
digit = np.isin(ids[0, 1:], [tokenizer.encode(str(n))[0] for n in range(10)])  # [T − 1] which places hold a digit
drawn = bits[:, np.flatnonzero(digit & ~learnt[1:])[:8]].mean()  # the eight numbers, without "mod 10"
worked = bits[:, digit & learnt[1:]].mean()
print(f"bits a token: digits of the question {drawn:.2f}, a random digit {np.log2(10):.2f}, digits said {worked:.5f}")
assert np.log2(10) < drawn < 5
assert worked < 0.01

# %% [markdown]
# The question's digits are random: nobody can predict them with fewer than log₂ 10 = 3.32 bits on average, and
# `glm-tiny` needs a little more. The assistant's digits follow from what stands before them, and it predicts them
# almost perfectly.
#
# If all tokens counted, most of the loss would be noise that no training can remove, and the gradient would be spent
# on it. For a tool's result it would be worse than a waste: a model that is taught to predict results is taught to
# **make them up**.
#
# In code, not counting is a target of −100. Here is the loss of one conversation, by hand and by the model.

# %%
targets = np.append(ids[:1, 1:], [[IGNORE]], axis=1)  # the token after each token
targets[:, :-1][:, ~learnt[1:]] = IGNORE
loss, grads = model.loss_and_grads(ids[:1], targets=targets, mtp_weight=0.0)
by_hand = bits[0][learnt[1:]].mean() * np.log(2)  # in nats
np.testing.assert_allclose(loss.main, by_hand, rtol=1e-3)
everything = model.loss_and_grads(ids[:1], mtp_weight=0.0)[0].main
print(f"{(targets != IGNORE).sum()} of {ids.shape[1] - 1} tokens count: loss {loss.main:.5f}; all: {everything:.3f}")

# %% [markdown]
# The tokens that do not count are still read: keys and values of the question are computed, and gradients flow into
# them from the answer. They are only not *asked for*.
#
# ## What we have learnt
#
# Thinking, its switch and tool calls are text in tags; the model predicts tokens as always. Written steps lift the
# bound that the number of layers sets, and for this model on these tasks the answer is read off them, right or wrong.
# A tool call is a wish that the program around the model may fulfil; only what the assistant says is learnt.
#
# Next: [14](14-speed.ipynb) asks where the time goes while all these tokens are written.
#
# ## Questions
#
# 1. Render a question with thinking on, but begin the assistant's turn with `"\n<think></think>\n"` yourself, without
#    `/nothink`. Does the model answer as it does with the switch? Which of the two signs does it go by?
# 2. Fill the thinking with the right number of steps, but with zeros for all digits. Does room alone help?
# 3. Hand the calculator `7/(3-3)`. What does `call_tool` return, and why is that better than raising?
