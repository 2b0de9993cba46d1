"""`minglm chat`: a conversation in the terminal, with thinking shown dimmed and tools that really run."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from minglm.api import Model
from minglm.text.answer import AnswerStream, Said
from minglm.text.template import Message
from minglm.text.tools import ROUNDS, Tool, schema_of, turn

HELP = (
    "Write a line. /think and /nothink: with thinking or without. /clear forgets the conversation, /quit ends it, "
    "Ctrl-C stops an answer."
)
QUIT = ("/quit", "/exit", "exit", "quit")


def chat(
    model: Model,
    thinking: bool = True,
    max_new_tokens: int = 256,
    tools: Mapping[str, Tool] | None = None,
    about: Sequence[str] = (),
    trained: int | None = None,
    **options: Any,
) -> None:
    """Read lines, answer each with the whole conversation as context. `/quit` or the end of input ends it. `tools`:
    functions that answers may call, by name; `about`: what else to say at the beginning; `trained`: the longest
    sequence that the model was trained on, to be told when the conversation passes it; `options` go to `Model.steps`.
    """
    if model.tokenizer is None or model.chat_template is None:
        raise ValueError("chatting needs a tokenizer, and this model has none")
    if not any(end in model.tokenizer.end_ids for end in model.config.eos_token_id):
        raise ValueError("the config names no end token (eos_token_id), so an answer would never end")
    model.steps([0], min(max_new_tokens, model.config.max_position_embeddings - 1), **options)  # refuses wrong ones
    talk = _Talk(model, thinking, max_new_tokens, tools or {}, trained, options)
    print("\n".join([repr(model), *about, HELP]))
    if tools:
        print(f"Tools: {', '.join(tools)}")
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  (input() then edits lines and keeps a history)
    while (line := _ask()) is not None and line not in QUIT:
        if line == "/clear":
            talk.clear()
        elif line in ("/think", "/nothink"):
            talk.thinking = line == "/think"
            print(f"({'with' if talk.thinking else 'without'} thinking)")
        elif line.startswith("/"):
            print(HELP)
        elif line:
            talk.say(line)


def _ask() -> str | None:
    """A line; None at the end of the input, or when Ctrl-C is pressed twice in a row."""
    print()
    for again in (True, False):
        try:
            return input("> ").strip()
        except (EOFError, RuntimeError):  # the latter: there is no input, or no output, at all
            return None
        except KeyboardInterrupt:
            print("\n(/quit or a second Ctrl-C ends it)" if again else "")
    return None


class _Talk:
    """A conversation so far, and what its answers are made with."""

    def __init__(
        self,
        model: Model,
        thinking: bool,
        max_new_tokens: int,
        tools: Mapping[str, Tool],
        trained: int | None,
        options: dict[str, Any],
    ):
        self.thinking = thinking
        self._model, self._most, self._tools, self._options = model, max_new_tokens, tools, options
        self._schemas = [schema_of(tool) for tool in tools.values()] or None
        self._messages: list[Message] = []
        self._trained, self._longest = trained, trained  # the second: until it has been told

    def clear(self) -> None:
        self._messages.clear()
        self._longest = self._trained

    def say(self, line: str) -> None:
        """Answer a line, running what the answer calls. What fails or is stopped leaves the conversation as it was."""
        before = len(self._messages)
        self._messages.append({"role": "user", "content": line})
        try:
            for _ in range(ROUNDS):
                self._messages += self._answer(first=before == 0)
                if self._messages[-1]["role"] != "tool":
                    break
        except KeyboardInterrupt:
            del self._messages[before:]
            print("\n(stopped)")
        except ValueError as error:
            del self._messages[before:]
            print(error)

    def _answer(self, first: bool) -> list[Message]:
        """Stream one answer, and run what it calls; returns the messages that come of it."""
        model = self._model
        assert model.chat_template is not None
        prompt = model.chat_template.render(self._messages, self._schemas, enable_thinking=self.thinking)
        used, context = model.as_ids(prompt, limit=False).shape[1], model.config.max_position_embeddings
        if used >= context:
            what = "this message takes" if first else "with this message the conversation takes"
            todo = "write less" if first else "/clear makes room"
            raise ValueError(f"({what} {used:,} tokens, more than the context of {context:,}; {todo})")
        self._check_length(used)
        text, cut = self._stream(prompt, min(self._most, context - used))
        if cut:
            full = used + self._most > context
            why = f"the context of {context:,} is full; /clear makes room" if full else "--tokens N"
            print(f"(cut at {min(self._most, context - used):,} tokens; {why})")
        said = turn(text, self._schemas or [], self._tools)
        for message in said[1:]:
            print(f"  = {message['content']}")
        return said

    def _check_length(self, used: int) -> None:
        if self._longest is not None and used > self._longest:
            print(f"(the conversation has {used:,} tokens; this checkpoint was trained on at most {self._longest:,})")
            self._longest = None

    def _stream(self, prompt: str, most: int) -> tuple[str, bool]:
        """Show an answer as it comes; its text, and whether it was cut."""
        assert self._model.tokenizer is not None
        screen, decoder, text, reason = _Screen(), self._model.tokenizer.stream(), "", None
        answer = AnswerStream(self._schemas, opened=prompt.rstrip().endswith("<think>"))
        try:
            for step in self._model.steps(prompt, most, **self._options):
                reason = step.stop_reason
                piece = "" if reason == "end token" else decoder.feed(step.id)
                text += piece
                screen.show(answer.feed(piece))
            text += (piece := decoder.finish())
            screen.show([*answer.feed(piece), *answer.finish()])
        finally:
            screen.end()
        return text, reason == "length"


class _Screen:
    """Thinking dimmed where the output is a terminal, in its tags elsewhere; content as it is, calls on lines of their
    own."""

    def __init__(self) -> None:
        self._around = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("<think>", "</think>")
        self._kind, self._at_start = "", True

    def show(self, said: list[Said]) -> None:
        for kind, text, call in said:
            if kind != self._kind:
                self.end()
                print(self._around[0] if kind == "thinking" else "", end="")
                self._kind = kind
            if call is not None:
                given = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
                print(f"→ {call.name}({given})", end="")
            text = text.lstrip() if self._at_start else text
            print(text, end="", flush=True)
            self._at_start = self._at_start and not text and call is None

    def end(self) -> None:
        """Back to plain letters, on a new line."""
        print(self._around[1] if self._kind == "thinking" else "", end="" if self._at_start else "\n", flush=True)
        self._kind, self._at_start = "", True
