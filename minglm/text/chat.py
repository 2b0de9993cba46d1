"""Chat turns to prompt text, and an answer's text back to thinking, content and tool calls.

GLM-4.5 marks turns and calls with tags of its own; `glm45.jinja` beside this file writes them, `parse_answer`
reads them. `run_tools` is the loop around both: ask, run the tools that the answer calls, ask again.
"""

from __future__ import annotations

import ast
import json
import re
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from minglm.formats.files import write_text

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]  # {"role": "user", "content": "Hi"}, in OpenAI's and Hugging Face's layout
ROLES = ("system", "user", "assistant", "tool")


class ChatTemplate:
    """A Jinja chat template: messages in, the text of the prompt out."""

    def __init__(self, source: str | None = None):
        """`source` is Jinja text; without it, GLM-4.5's format. ValueError if it does not compile."""
        import jinja2

        self.source = source if source is not None else _GLM45.read_text(encoding="utf-8")
        try:
            self._template = _environment().from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat template, line {error.lineno}: {error.message}") from error
        except Exception as error:  # deep nesting breaks Python's own compiler, in several ways
            raise ValueError(f"chat template does not compile: {type(error).__name__}: {error}") from error

    @staticmethod
    def load(folder: str | Path) -> ChatTemplate:
        """The checkpoint's template (chat_template.jinja or tokenizer_config.json), else GLM-4.5's format."""
        path = Path(folder) / "chat_template.jinja"
        try:
            return ChatTemplate(path.read_text("utf-8") if path.exists() else _template_in_config(Path(folder)))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"cannot use the chat template in {folder}: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Write `chat_template.jinja`, where transformers and the engines look for it."""
        write_text(Path(folder) / "chat_template.jinja", self.source)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool = True,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """The prompt. Tags in the text of a message are not escaped: the tokenizer will read them as tags.

        `tools` are JSON schemas in OpenAI's layout. `enable_thinking=False` asks for an answer without
        thinking. `add_generation_prompt` opens the assistant's turn at the end. `extra` goes to the template,
        for switches of other models, such as `clear_thinking=False` of GLM-4.7. ValueError says which message
        is wrong, and how.
        """
        values = extra | {
            "messages": _checked_messages(messages),
            "tools": _checked_tools(tools),
            "enable_thinking": enable_thinking,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(values)
        except Exception as error:  # a template can raise anything
            raise ValueError(f"chat template{_template_line(error)}: {type(error).__name__}: {error}") from error


_GLM45 = Path(__file__).with_name("glm45.jinja")


def _environment() -> jinja2.Environment:
    """Jinja as Hugging Face sets it up, so a checkpoint's own template renders the same here."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def _template_in_config(folder: Path) -> str | None:
    path = folder / "tokenizer_config.json"
    config = _mapping(json.loads(path.read_text("utf-8"))) if path.exists() else {}
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {str(entry.get("name")): entry.get("template") for entry in map(_mapping, template)}
        template = named.get("default", template)
    if not isinstance(template, str | None):
        raise ValueError(f"chat_template in {path} is {type(template).__name__}, wanted Jinja text")
    return template


def _template_line(error: Exception) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return f", line {lines[-1]}" if lines else ""


# What a message may hold. Checked before the template runs: a template says little about what went wrong, and
# writes the word None where content is missing.


def _checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if not isinstance(messages, list | tuple):
        raise ValueError(
            f'messages is {type(messages).__name__}; wanted a list. Try [{{"role": "user", "content": …}}]'
        )
    return [_checked_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _checked_message(where: str, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f'{where} is {type(message).__name__}; wanted a dict with "role" and "content"')
    if message.get("role") not in ROLES:
        raise ValueError(f"{where}: role is {message.get('role')!r}; wanted one of {', '.join(ROLES)}")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list | tuple):
        raise ValueError(f"{where}: tool_calls is {type(calls).__name__}; wanted a list of calls")
    for index, call in enumerate(calls):
        _check_call(f"{where}: tool_calls[{index}]", call)
    content = message.get("content")
    if content is None and calls:
        content = ""
    _check_content(where, content, ("text", "output") if message["role"] == "tool" else ("text",))
    thinking = message.get("reasoning_content")
    if not isinstance(thinking, str | None):
        raise ValueError(f"{where}: reasoning_content is {type(thinking).__name__}; wanted a str")
    return _plain(where, {**message, "content": content})


def _check_content(where: str, content: Any, fields: tuple[str, ...]) -> None:
    if content is None:
        raise ValueError(f'{where}: content is missing or None; wanted text. Try "" for an empty turn')
    if isinstance(content, str):
        return
    if not isinstance(content, list | tuple):
        raise ValueError(f"{where}: content is {type(content).__name__}; wanted a str or a list of text parts")
    for index, part in enumerate(content):
        if isinstance(part, str):
            continue
        held = [part[name] for name in fields if name in part] if isinstance(part, Mapping) else []
        is_text = bool(held) and part.get("type", "text") in fields and ("output" in part or isinstance(held[0], str))
        if not is_text:
            raise ValueError(f"{where}: content[{index}] is not text; minglm reads only text parts")


def _check_call(where: str, call: Any) -> None:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f'{where} has no function name; wanted {{"function": {{"name": …, "arguments": {{…}}}}}}')
    arguments = function.get("arguments")
    if arguments is None:
        return
    if not isinstance(arguments, Mapping):
        hint = ". Try json.loads(arguments)" if isinstance(arguments, str) else ""
        raise ValueError(f"{where}: arguments is {type(arguments).__name__}; wanted a dict{hint}")


def _checked_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError("tools is not a list of dicts; wanted JSON schemas in OpenAI's layout")
    return [_plain(f"tools[{index}]", tool) for index, tool in enumerate(tools)]


def _plain(where: str, value: Mapping[str, Any]) -> dict[str, Any]:
    # A template is code from outside: it gets plain data, never an object whose methods it could call.
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} holds something that JSON cannot say: {error}") from error


# -- reading an answer -------------------------------------------------------------------------------------------


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
    schemas = _parameters_by_name(_checked_tools(tools) or [])
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
    functions = [_mapping(tool.get("function", tool)) for tool in tools]
    return {
        function["name"]: _mapping(_mapping(function.get("parameters")).get("properties"))
        for function in functions
        if isinstance(function.get("name"), str)
    }


def _types(schema: Any) -> set[str]:
    """The type names a JSON schema allows; empty if it does not say."""
    schema = _mapping(schema)
    types = schema.get("type")
    allowed = {name for name in (types if isinstance(types, list) else [types]) if isinstance(name, str)}
    for key in ("anyOf", "oneOf"):
        options = schema.get(key)
        for option in options if isinstance(options, list) else []:
            allowed |= _types(option)
    return allowed


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


# -- the tool loop -----------------------------------------------------------------------------------------------

Tool = Callable[..., Any]  # takes a call's arguments by name; what it returns is shown to the model as text
ROUNDS = 4


def run_tools(
    answer: Callable[[str], str],
    messages: Sequence[Message],
    schemas: Sequence[Mapping[str, Any]],
    tools: Mapping[str, Tool],
    template: ChatTemplate,
    enable_thinking: bool = True,
    rounds: int = ROUNDS,
) -> list[Message]:
    """Ask, run the tools that the answer calls, and ask again with their results, until an answer calls none.

    `answer(prompt)` is the model: the text that it writes behind a prompt, without the end token. `schemas` tell it
    what there is, `tools` are the functions themselves, by name. Returns all messages; the last one is the
    assistant's, or a tool's if it still called tools after so many `rounds`.
    """
    return run_tools_all(
        lambda prompts: list(map(answer, prompts)), [messages], schemas, tools, template, enable_thinking, rounds
    )[0]


def run_tools_all(
    answers: Callable[[list[str]], list[str]],
    conversations: Sequence[Sequence[Message]],
    schemas: Sequence[Mapping[str, Any]],
    tools: Mapping[str, Tool],
    template: ChatTemplate,
    enable_thinking: bool = True,
    rounds: int = ROUNDS,
) -> list[list[Message]]:
    """`run_tools` for many conversations at once: `answers` gets the prompts of all that wait for one."""
    found = [list(messages) for messages in conversations]
    waiting = list(range(len(found)))
    for _ in range(rounds):
        prompts = [template.render(found[i], schemas, enable_thinking) for i in waiting]
        for i, text in zip(waiting, answers(prompts) if prompts else [], strict=True):
            found[i] += turn(text, schemas, tools)
        waiting = [i for i in waiting if found[i][-1]["role"] == "tool"]
    return found


def turn(text: str, schemas: Sequence[Mapping[str, Any]], tools: Mapping[str, Tool]) -> list[Message]:
    """The assistant's message that a text says, and the result of each tool that it calls."""
    thinking, content, calls = parse_answer(text, schemas)
    said: dict[str, Any] = {"role": "assistant", "content": content or ""}
    if thinking is not None:
        said["reasoning_content"] = thinking
    if not calls:
        return [said]
    said["tool_calls"] = [{"function": call._asdict()} for call in calls]
    return [said, *({"role": "tool", "content": call_tool(call, tools)} for call in calls)]


def call_tool(call: ToolCall, tools: Mapping[str, Tool]) -> str:
    """What the tool says. An error of the tool, or an unknown tool, is said too: the model may do better next time."""
    if call.name not in tools:
        return f"error: no tool {call.name!r}; there are: {', '.join(tools) or 'none'}"
    try:
        return str(tools[call.name](**call.arguments))
    except Exception as error:  # a tool can raise anything, also for arguments that it does not have
        return f"error: {error}"
