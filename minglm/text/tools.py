"""The tool loop: ask, run the tools that the answer calls, ask again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        return str(tools[call.name](**call.arguments))
    except Exception as error:  # a tool can raise anything, also for arguments that it does not have
        return f"error: {error}"
