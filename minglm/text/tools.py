"""The tool loop: ask, run the tools that the answer calls, ask again."""

from __future__ import annotations

import inspect
import runpy
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minglm.text.answer import ToolCall, parse_answer
from minglm.text.template import ChatTemplate, Message

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
        said = str(tools[call.name](**call.arguments))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a tool can raise anything, even SystemExit, also for arguments it does not have
        said = f"error: {_told(error)}"
    return said.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair is no text


def _told(error: BaseException) -> str:
    try:
        return str(error) or type(error).__name__
    except Exception:  # its own __str__ fails
        return type(error).__name__


# -- Python functions as tools -----------------------------------------------------------------------------------

_JSON = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}


def schema_of(function: Tool) -> dict[str, Any]:
    """The JSON schema of a function, in OpenAI's layout: its name, the first paragraph of its docstring, and its
    parameters with the types of their annotations. Raises ValueError for parameters that a call cannot name, and for
    annotations that JSON has no word for, or that Python cannot resolve, and for what is not a plain function."""
    name = getattr(function, "__name__", "")
    if not inspect.isroutine(function) or inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise ValueError(f"tool {name or repr(function)}: only a plain function can be one; write a def around it")
    properties: dict[str, Any] = {}
    required = []
    hints = _hints(name, function)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ValueError(f"tool {name}: {parameter} cannot be given by name; write its parameters out")
        properties[parameter.name] = _type(name, parameter.name, hints.get(parameter.name, str))
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required}
    said = inspect.getdoc(function) or ""
    about = {"name": name, "description": " ".join(said.split("\n\n")[0].split()), "parameters": parameters}
    return {"type": "function", "function": about}


def _hints(name: str, function: Tool) -> dict[str, Any]:
    """The annotations, of which those given as text are resolved one by one, so that an error names its parameter."""
    names = getattr(inspect.unwrap(function), "__globals__", {})
    hints = {}
    for parameter, hint in getattr(function, "__annotations__", {}).items():
        if parameter == "return":
            continue
        try:
            hints[parameter] = eval(hint, names) if isinstance(hint, str) else hint
        except Exception as error:  # evaluating text can raise anything
            raise ValueError(f"tool {name}: {parameter}: {hint!r} cannot be resolved: {_told(error)}") from error
    return hints


def _type(tool: str, parameter: str, hint: Any) -> dict[str, Any]:
    kinds = [each for each in typing.get_args(hint) or (hint,) if each is not type(None)]
    origin = typing.get_origin(hint)
    kind = origin if origin in list(_JSON) else kinds[0] if len(kinds) == 1 else hint
    kind = typing.get_origin(kind) or kind
    if kind not in list(_JSON):  # which need not have a hash
        raise ValueError(f"tool {tool}: {parameter} is {hint}; take {', '.join(k.__name__ for k in _JSON)}")
    return {"type": _JSON[kind]}


def tools_in(path: str | Path) -> dict[str, Tool]:
    """The public functions that a Python file defines, by name. The file is run, so it must be one's own. Raises
    ValueError for a file without any, or that fails."""
    path = Path(path)
    try:
        found = runpy.run_path(str(path))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # it may raise anything, even SystemExit
        raise ValueError(f"{path}: {type(error).__name__}: {_told(error)}") from error
    tools: dict[str, Tool] = {
        name: each
        for name, each in found.items()
        if inspect.isfunction(each) and not name.startswith("_") and each.__code__.co_filename == str(path)
    }
    if not tools:
        raise ValueError(f"{path} defines no function without a leading underscore")
    return tools
