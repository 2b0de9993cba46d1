"""An answer's text taken apart: thinking, content and tool calls, in the tags of GLM-4.5 and 4.7."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
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
