"""An answer's text taken apart: thinking, content and tool calls, in the tags of GLM-4.5 and 4.7."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from minglm.text.template import checked_tools, mapping


class ToolCall(NamedTuple):
    """One call that the model asks for."""

    name: str
    arguments: dict[str, Any]


class Answer(NamedTuple):
    """An assistant's turn taken apart. What is blank is None."""

    thinking: str | None
    content: str | None
    tool_calls: list[ToolCall]


def parse_answer(text: str, tools: Sequence[Mapping[str, Any]] | None = None) -> Answer:
    """Take a whole answer apart (without its end token); never fails on any text.

    Thinking is what `<think>` opens at the start, up to the first `</think>`; or, where the prompt has
    opened it already (GLM-4.7), everything before a lone `</think>`. Calls are read in the layouts of GLM-4.5
    and 4.7; one that is not complete stays in the content, as does text between and after calls.

    `tools`, as given to `render`, decides about values: where the schema says string, the text as it is;
    elsewhere JSON, then a Python literal, then text. So without `tools` the zip code "10001" is a number.

    A value ends at the first tag that balances its own and that an argument or the end of the call follows.
    The text `</arg_value></tool_call>` in a value, without its opening tags, reads as the end of the call.
    """
    schemas = _parameters_by_name(checked_tools(tools) or [])
    thinking, rest = _split_thinking(text)
    calls = _find_calls(rest)
    bounds = [0, *(edge for call in calls for edge in (call.start, call.end)), len(rest)]
    outside = [rest[start:end].strip() for start, end in zip(bounds[::2], bounds[1::2], strict=True)]
    content = "\n".join(part for part in outside if part)
    return Answer(thinking, content or None, [_typed(call, schemas.get(call.name, {})) for call in calls])


# -- piece by piece ----------------------------------------------------------------------------------------------


class Said(NamedTuple):
    """What a piece of an answer turned out to be: some thinking, some content, or a whole call."""

    kind: str  # "thinking", "content" or "call"
    text: str = ""
    call: ToolCall | None = None


class AnswerStream:
    """`parse_answer` while the answer comes: `feed` returns what is certain so far, `finish` the rest, and then
    `answer` holds all of it.

    A tag may be cut anywhere; text that could still become one is held back, and so is a call until it is complete. One
    that never is turns out to be content in the end. What stands in the thinking is never a call. Whether the prompt
    has opened the thinking (GLM-4.7) must be told, because a lone `</think>` comes too late.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None = None, opened: bool = False):
        self._schemas = _parameters_by_name(checked_tools(tools) or [])
        self._held, self._state, self._open = "", "thinking" if opened else "start", _OpenCall()
        self._thoughts, self._contents, self._calls = [""] if opened else list[str](), [""], list[ToolCall]()

    def feed(self, piece: str) -> list[Said]:
        """Some more text."""
        self._held += piece
        said: list[Said] = []
        while (found := self._step()) is not None:
            said += found
        return said

    def finish(self) -> list[Said]:
        """There is no more text."""
        left, self._held = self._held, ""
        if self._state == "thinking":
            return self._think(left)
        said, at = list[Said](), 0
        for call in _find_calls(left):
            said += [*self._say(left[at : call.start]), self._call(call)]
            at = call.end
        return [*said, *self._say(left[at:])]

    @property
    def answer(self) -> Answer:
        """Everything so far, as `parse_answer` gives it."""
        thinking = "\n".join(filter(None, (thought.strip() for thought in self._thoughts)))
        content = "\n".join(filter(None, (part.strip() for part in self._contents)))
        return Answer(thinking or None, content or None, list(self._calls))

    def _step(self) -> list[Said] | None:
        """What can be told from the front of the held text; None when more is needed."""
        if self._state == "start":
            self._held = text = self._held.lstrip()
            if text.startswith(_THINK):
                self._held, self._state = text.removeprefix(_THINK), "thinking"
                self._thoughts.append("")
                return []
            if _THINK.startswith(text):
                return None
            self._state = "content"
            return []
        if self._state == "thinking":
            return self._until(_END_THINK, self._think, "start")
        start = self._held.find("<tool_call>")
        if start == 0:
            return self._take_call()
        if start > 0:
            text, self._held = self._held[:start], self._held[start:]
            return self._say(text)
        return self._until("<tool_call>", self._say, "content")

    def _until(self, tag: str, say: Callable[[str], list[Said]], then: str) -> list[Said] | None:
        """Everything before the tag, and without one everything that cannot be its beginning."""
        text, found, rest = self._held.partition(tag)
        if found:
            self._held, self._state = rest, then
            return say(text)
        keep = next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        said = say(text[: len(text) - keep])
        return said or None

    def _take_call(self) -> list[Said] | None:
        call = self._open.read(self._held)
        if call is None:
            return None
        self._held, self._open = self._held[call.end :], _OpenCall()
        return [self._call(call)]

    def _think(self, text: str) -> list[Said]:
        if text:
            self._thoughts[-1:] = [(self._thoughts or [""])[-1] + text]
        return [Said("thinking", text)] if text else []

    def _say(self, text: str) -> list[Said]:
        if not self._contents[-1]:
            text = text.lstrip()
        self._contents[-1] += text
        return [Said("content", text)] if text else []

    def _call(self, raw: _RawCall) -> Said:
        self._calls.append(_typed(raw, self._schemas.get(raw.name, {})))
        self._contents.append("")
        return Said("call", call=self._calls[-1])


# -- thinking ----------------------------------------------------------------------------------------------------

_THINK, _END_THINK = "<think>", "</think>"


def _split_thinking(text: str) -> tuple[str | None, str]:
    if not text.lstrip().startswith(_THINK) and _closes_thinking(text):
        text = _THINK + text
    thoughts = []
    while text.lstrip().startswith(_THINK):  # GLM sometimes writes an empty block and then the real one
        thought, _, text = text.lstrip().removeprefix(_THINK).partition(_END_THINK)
        thoughts.append(thought.strip())
    return "\n".join(filter(None, thoughts)) or None, text


def _closes_thinking(text: str) -> bool:
    end = text.find(_END_THINK)
    return end >= 0 and not any(call.start < end < call.end for call in _find_calls(text))


class _RawCall(NamedTuple):
    start: int  # where its text starts and ends in the answer
    end: int
    name: str
    pairs: list[tuple[str, str]]  # keys and values as written


_CLOSE = "</tool_call>"
_NAME = re.compile(r"<tool_call>\s*([^\s<]+)\s*")
_KEY = re.compile(r"\s*<arg_key>([^<]*)</arg_key>\s*<arg_value>")
_END = re.compile(r"\s*</tool_call>")
# A value ends only where another argument or the end of the call follows: group 1 is there if so.
_VALUE_TAG = re.compile(rf"<arg_value>|</arg_value>(?=({_KEY.pattern}|{_END.pattern})?)")


def _find_calls(text: str) -> list[_RawCall]:
    calls = []
    last_value_end = max((tag.start() for tag in _VALUE_TAG.finditer(text) if tag[1]), default=-1)
    start = text.find("<tool_call>")
    while start >= 0:
        call = _read_call(text, start, last_value_end)
        if call:
            calls.append(call)
        start = text.find("<tool_call>", call.end if call else start + 1)
    return calls


class _OpenCall:
    """The call at the front of a text that is still coming, to be had when no more text could change it: its values
    end at their balancing tags. It is read up to each `</tool_call>` that comes, and what was read is not read again.
    """

    def __init__(self) -> None:
        self._name, self._pairs, self._broken = "", list[tuple[str, str]](), False
        self._key, self._value, self._depth = "", -1, 0  # the argument that is open, where its value starts
        self._at = self._seen = 0  # read so far; searched for the end so far

    def read(self, text: str) -> _RawCall | None:
        """`text`: the same as before and more."""
        stop = text.rfind(_CLOSE, max(0, self._seen - len(_CLOSE))) + len(_CLOSE)
        self._seen = len(text)
        if stop <= max(self._at, len(_CLOSE)) or self._broken:
            return None
        if not self._name:
            if not (name := _NAME.match(text)):
                self._broken = True  # as more text does not mend it
                return None
            self._name, self._at = name[1], name.end()
        while self._at < stop:
            if self._value < 0:
                if close := _END.match(text, self._at):
                    return _RawCall(0, close.end(), self._name, self._pairs)
                if not (key := _KEY.match(text, self._at)):
                    self._broken = True
                    return None
                self._key, self._at, self._value, self._depth = key[1].strip(), key.end(), key.end(), 0
            self._read_value(text, stop)
        return None

    def _read_value(self, text: str, stop: int) -> None:
        for tag in _VALUE_TAG.finditer(text, self._at, stop):
            if tag[0] == "<arg_value>":
                self._depth += 1
            elif tag[1] and self._depth == 0:
                self._pairs.append((self._key, text[self._value : tag.start()]))
                self._at, self._value = tag.end(), -1
                return
            else:
                self._depth = max(0, self._depth - 1)
        self._at = stop


def _read_call(text: str, start: int, last_value_end: int) -> _RawCall | None:
    """The call whose tag is at `start`, or None if it is not complete. Beyond the text's last value end nobody looks
    for one: thousands of calls that are never closed would be searched to the end each."""
    name = _NAME.match(text, start)
    if not name:
        return None
    at, pairs = name.end(), []
    while key := _KEY.match(text, at):
        end = _value_end(text, key.end()) if key.end() <= last_value_end else None
        if end is None:
            return None
        pairs.append((key[1].strip(), text[key.end() : end]))
        at = end + len("</arg_value>")
    close = _END.match(text, at)
    return _RawCall(start, close.end(), name[1], pairs) if close else None


def _value_end(text: str, start: int) -> int | None:
    """Where the value from `start` ends: at its balancing tag, else at the first tag that could be it."""
    depth, first = 0, None
    for tag in _VALUE_TAG.finditer(text, start):
        if tag[0] == "<arg_value>":
            depth += 1
            continue
        if tag[1] and depth == 0:
            return tag.start()
        if tag[1] and first is None:
            first = tag.start()
        depth = max(0, depth - 1)
    return first


def _typed(call: _RawCall, parameters: Mapping[str, Any]) -> ToolCall:
    return ToolCall(call.name, {key: _value(raw, _types(parameters.get(key))) for key, raw in call.pairs})


def _value(raw: str, types: set[str]) -> Any:
    if "null" in types and raw.strip() == "null":
        return None
    return raw if types - {"null"} == {"string"} else _guess(raw)


def _guess(raw: str) -> Any:
    """JSON, else a Python literal that JSON can say too, else the text as it is."""
    try:
        return json.loads(raw.strip())
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():  # Python warns of odd literals
            warnings.simplefilter("ignore")
            return json.loads(json.dumps(ast.literal_eval(raw.strip())))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return raw


def _parameters_by_name(tools: list[dict[str, Any]]) -> dict[str, Mapping[str, Any]]:
    functions = [mapping(tool.get("function", tool)) for tool in tools]
    return {
        function["name"]: mapping(mapping(function.get("parameters")).get("properties"))
        for function in functions
        if isinstance(function.get("name"), str)
    }


def _types(schema: Any) -> set[str]:
    """The type names a JSON schema allows; empty if it does not say."""
    schema = mapping(schema)
    types = schema.get("type")
    allowed = {name for name in (types if isinstance(types, list) else [types]) if isinstance(name, str)}
    for key in ("anyOf", "oneOf"):
        options = schema.get(key)
        for option in options if isinstance(options, list) else []:
            allowed |= _types(option)
    return allowed
