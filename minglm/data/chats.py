"""Generated conversations, in the layout that chat templates read: questions with and without thinking, tool calls,
several turns, and text to be continued. Only what the assistant says after the last question counts as a target.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator

from minglm.data.batches import Encode, Piece, TokenStream
from minglm.data.tasks import TASKS, Item, Task, make_train
from minglm.text.template import ChatTemplate
from minglm.text.tokenizer import Tokenizer

CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Value of an arithmetic expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
"""The schema of the one tool that the generated conversations call: `minglm.data.calculator.calculate`."""

PHRASES = ("{}", "{} = ?", "What is {}?", "Please answer: {}")  # the first is what evaluations ask


class Chat(NamedTuple):
    """One conversation: what `ChatTemplate.render` takes."""

    messages: list[dict[str, Any]]
    thinking: bool
    tools: list[dict[str, Any]] | None = None


# -- making ------------------------------------------------------------------------------------------------------


def ask(item: Item, phrase: str = PHRASES[0]) -> dict[str, Any]:
    return {"role": "user", "content": phrase.format(item.question)}


def answer(item: Item, thinking: bool) -> dict[str, Any]:
    said = {"role": "assistant", "content": item.answer}
    return {**said, "reasoning_content": item.steps} if thinking else said


def task_chat(item: Item, thinking: bool, phrase: str = PHRASES[0]) -> Chat:
    """A question and its answer."""
    return Chat([ask(item, phrase), answer(item, thinking)], thinking)


def tool_chat(item: Item, thinking: bool, phrase: str = PHRASES[0]) -> Chat:
    """A question, a call of the calculator, its result, the answer."""
    call = {"function": {"name": "calculator", "arguments": {"expression": item.steps}}}
    first: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
    last: dict[str, Any] = {"role": "assistant", "content": item.answer}
    if thinking:
        first["reasoning_content"], last["reasoning_content"] = f"calculator: {item.steps}", f"it says {item.answer}"
    return Chat([ask(item, phrase), first, {"role": "tool", "content": item.answer}, last], thinking, [CALCULATOR])


SMALL_TALK = (
    ("Hello", "Hello! Ask me for a sum, a word or a line of Python."),
    ("Hi", "Hi! What shall we work out?"),
    ("Who are you?", "A tiny GLM-4.5, trained with minglm."),
    ("Thank you", "You are welcome."),
    ("Thanks!", "Gladly."),
    ("What can you do?", "Sums, reversals, sorting, number words and small Python."),
    ("你好", "你好！"),
    ("Goodbye", "Goodbye!"),
)


def turns_chat(tasks: Sequence[Task], thinking: bool, rng: Generator) -> Chat:
    """One to three turns of questions and small talk."""
    messages: list[dict[str, Any]] = []
    for _ in range(int(rng.integers(1, 4))):
        if rng.random() < 0.4:
            said, reply = SMALL_TALK[int(rng.integers(len(SMALL_TALK)))]
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]
        else:
            item = make_train(tasks[int(rng.integers(len(tasks)))], rng)
            messages += [ask(item, PHRASES[int(rng.integers(len(PHRASES)))]), answer(item, thinking)]
    return Chat(messages, thinking)


def continuation_chat(text: str, cut: int) -> Chat:
    """A text to be continued: the user gives its beginning, the assistant the rest."""
    messages = [{"role": "user", "content": f"Continue:\n{text[:cut]}"}, {"role": "assistant", "content": text[cut:]}]
    return Chat(messages, thinking=False)


# -- encoding ----------------------------------------------------------------------------------------------------

END = "<|user|>"  # the next turn's tag ends an answer


def spans(chat: Chat, template: ChatTemplate) -> list[tuple[str, bool]]:
    """The conversation's text in pieces, and whether the assistant said each; only turns after the last question
    count. All pieces together are what the template renders, and the end tag. Raises ValueError for messages that the
    template cannot render, and if nobody answers."""
    template.render(chat.messages, chat.tools, chat.thinking)  # so that it says what is wrong with them

    def render(messages: Sequence[Mapping[str, Any]], prompt: bool) -> str:
        return template.render(messages, chat.tools, chat.thinking, add_generation_prompt=prompt)

    question = max((i for i, message in enumerate(chat.messages) if message["role"] == "user"), default=-1)
    found, done = [], ""
    for i in range(question + 1, len(chat.messages)):
        if chat.messages[i]["role"] == "assistant":
            prompt, said = render(chat.messages[:i], True), render(chat.messages[: i + 1], False)
            end = "<|observation|>" if chat.messages[i].get("tool_calls") else END
            found += [(prompt.removeprefix(done), False), (said.removeprefix(prompt) + end, True)]
            done = said + end
    if not found:
        raise ValueError("no answer of the assistant after the last question, so there is nothing to learn")
    return found


def encode_chat(chat: Chat, template: ChatTemplate, encode: Encode) -> Piece:
    """The conversation's tokens, and which of them the assistant said."""
    ids: list[int] = []
    counts: list[bool] = []
    for text, said in spans(chat, template):
        new = encode(text)
        ids += new
        counts += [said] * len(new)
    return Piece(np.array(ids, np.int64), np.array(counts, bool))


# -- sources -----------------------------------------------------------------------------------------------------

TRIES = 50  # to find a conversation that fits into a row


class ChatSource(NamedTuple):
    """Conversations of one kind: the name of a task, "turns", or the stream of a text domain to continue."""

    kind: str
    template: ChatTemplate
    tokenizer: Tokenizer
    encode: Encode
    thinking: float = 0.5
    stream: TokenStream | None = None

    def piece(self, rng: Generator, most: int) -> Piece:
        if self.stream is not None:
            return self._continuation(self.stream, rng, most)
        for _ in range(TRIES):
            piece = encode_chat(self._chat(rng), self.template, self.encode)
            if len(piece.ids) <= most:
                return piece
        raise ValueError(f"no conversation of {self.kind!r} in {TRIES} fits into {most} tokens; lengthen the sequence")

    def _chat(self, rng: Generator) -> Chat:
        thinking = bool(rng.random() < self.thinking)
        if self.kind == "turns":
            return turns_chat([task for task in TASKS.values() if task.name != "calculator"], thinking, rng)
        item, phrase = make_train(TASKS[self.kind], rng), PHRASES[int(rng.integers(len(PHRASES)))]
        return (tool_chat if self.kind == "calculator" else task_chat)(item, thinking, phrase)

    def _continuation(self, stream: TokenStream, rng: Generator, most: int) -> Piece:
        """A place in a text domain, cut after one to 32 tokens: the rest is the assistant's."""
        length = max(most - 24, 2)  # the template's own tokens
        at = int(rng.integers(len(stream.tokens)))
        document = int(np.searchsorted(stream.starts, at, side="right"))
        end = int(stream.starts[document]) if document < len(stream.starts) else len(stream.tokens)
        ids = stream.tokens[at : min(at + length, end - 1)].tolist()
        text = self.tokenizer.decode(ids)
        cut = len(self.tokenizer.decode(ids[: int(rng.integers(1, 33))]))
        if not text[cut:].strip():
            return self._continuation(stream, rng, most)
        return encode_chat(continuation_chat(text, cut), self.template, self.encode).cut(most)
