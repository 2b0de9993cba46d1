"""`minglm chat`: a conversation in the terminal, with thinking shown dimmed and tools that really run."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from minglm.api import Model
from minglm.text.answer import AnswerStream, Said
from minglm.text.template import Message
from minglm.text.tools import ROUNDS, Tool, schema_of, turn

with suppress(ImportError):  # not on Windows: line editing and a history for `input`
    import readline  # noqa: F401

HELP = (
    "Write a line. /think and /nothink: with thinking or without. /clear forgets the conversation, /quit ends it, "
    "Ctrl-C stops an answer."
)
END = ("/quit", "/exit", "quit", "exit")


def chat(
    model: Model,
    thinking: bool = True,
    max_new_tokens: int = 256,
    tools: Mapping[str, Tool] | None = None,
    **options: Any,
) -> None:
    """Read lines, answer each with the whole conversation as context. `/quit` or the end of input ends it. `tools`:
    functions that answers may call, by name; `options` go to `Model.stream`."""
    if model.tokenizer is None or model.chat_template is None:
        raise ValueError("chatting needs a tokenizer, and this model has none")
    if not any(end in model.tokenizer.end_ids for end in model.config.eos_token_id):
        raise ValueError("the config names no end token (eos_token_id), so an answer would never end")
    tools = dict(tools or {})
    schemas = [schema_of(tool) for tool in tools.values()] if tools else None
    print(f"{model!r}\n{HELP}\n(A checkpoint that was never trained on conversations will not hold one.)")
    if tools:
        print(f"Tools: {', '.join(tools)}")
    messages: list[Message] = []
    while (line := _ask()) not in (None, *END):
        if line == "/clear":
            messages.clear()
        elif line in ("/think", "/nothink"):
            thinking = line == "/think"
            print(f"({'with' if thinking else 'without'} thinking)")
        elif line and line.startswith("/"):
            print(HELP)
        elif line:
            before = len(messages)
            messages.append({"role": "user", "content": line})
            try:
                for _ in range(ROUNDS):
                    messages += _answer(model, messages, thinking, max_new_tokens, schemas, tools, options)
                    if messages[-1]["role"] != "tool":
                        break
            except KeyboardInterrupt:
                del messages[before:]
                print("\n(stopped)")
            except ValueError as error:  # keep what was said before
                del messages[before:]
                room = "\n(/clear makes room)" if before and "context of" in str(error) else ""
                print(f"{error}{room}")


def _ask() -> str | None:
    """The next line; None at the end of input. Ctrl-C forgets a line that was begun; twice it ends the chat."""
    for last in (False, True):
        try:
            return input("\n> ").strip()
        except KeyboardInterrupt:
            print("" if last else "\n(again, or /quit, ends the conversation)")
        except (EOFError, RuntimeError):  # the latter: there is no input, or no output, at all
            return None
    return None


def _answer(
    model: Model,
    messages: list[Message],
    thinking: bool,
    max_new_tokens: int,
    schemas: list[dict[str, Any]] | None,
    tools: Mapping[str, Tool],
    options: dict[str, Any],
) -> list[Message]:
    """Stream one answer, and run what it calls; returns the messages that come of it."""
    assert model.chat_template is not None
    assert model.tokenizer is not None
    prompt = model.chat_template.render(messages, schemas, enable_thinking=thinking)
    screen, text, reason = _Screen(), "", None
    answer = AnswerStream(schemas, opened=prompt.rstrip().endswith("<think>"))
    decoder = model.tokenizer.stream()
    try:
        for step in model.steps(prompt, max_new_tokens, **options):
            reason = step.stop_reason
            piece = decoder.feed(step.id) if reason != "end token" else ""
            text += piece
            screen.show(answer.feed(piece))
        rest = decoder.finish()
        text += rest
        screen.show([*answer.feed(rest), *answer.finish()])
    finally:
        screen.end()
    if reason == "length":
        print(f"(cut at {max_new_tokens} tokens)")
    said = turn(text, schemas or [], tools)
    for message in said[1:]:
        print(f"  = {message['content']}")
    return said


class _Screen:
    """Thinking dimmed, or in its tags where nobody watches; content as it is, calls on lines of their own."""

    def __init__(self) -> None:
        self._dim = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("<think>", "</think>")
        self._kind, self._at_start = "", True

    def show(self, said: list[Said]) -> None:
        for kind, text, call in said:
            if kind != self._kind:
                self.end()
                print(self._dim[0] if kind == "thinking" else "", end="")
                self._kind = kind
            if call is not None:
                given = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
                print(f"→ {call.name}({given})", end="")
            text = text.lstrip() if self._at_start else text
            print(text, end="", flush=True)
            self._at_start = self._at_start and not text and call is None

    def end(self) -> None:
        """Back to plain letters, on a new line."""
        print(self._dim[1] if self._kind == "thinking" else "", end="" if self._at_start else "\n", flush=True)
        self._kind, self._at_start = "", True
