"""Chat turns to prompt text: GLM-4.5's chat template (`glm45.jinja` beside this file), or a checkpoint's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minglm.formats.files import write_text
from minglm.text import sandbox

Message = Mapping[str, Any]  # {"role": "user", "content": "Hi"}, in OpenAI's and Hugging Face's layout
ROLES = ("system", "user", "assistant", "tool")


class ChatTemplate:
    """A Jinja chat template: messages in, the text of the prompt out."""

    def __init__(self, source: str | None = None):
        """`source` is Jinja text; without it, GLM-4.5's format. ValueError if it does not compile.

        Another one than ours runs in a child process, with bounds on its time and memory; see `sandbox`.
        """
        own = _GLM45.read_text(encoding="utf-8")
        self.source = own if source is None else source
        self._template = sandbox.compiled(own) if self.source == own else None
        if self._template is None:
            sandbox.run(self.source)

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
        switches = extra | {"enable_thinking": enable_thinking, "add_generation_prompt": add_generation_prompt}
        values = {name: _plain(name, value) for name, value in switches.items()} | {
            "messages": _checked_messages(messages),
            "tools": checked_tools(tools),
        }
        return sandbox.run(self.source, values) if self._template is None else sandbox.rendered(self._template, values)


_GLM45 = Path(__file__).with_name("glm45.jinja")


def _template_in_config(folder: Path) -> str | None:
    path = folder / "tokenizer_config.json"
    config = mapping(json.loads(path.read_text("utf-8"))) if path.exists() else {}
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {str(entry.get("name")): entry.get("template") for entry in map(mapping, template)}
        template = named.get("default", template)
    if not isinstance(template, str | None):
        raise ValueError(f"chat_template in {path} is {type(template).__name__}, wanted Jinja text")
    return template


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


def checked_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError("tools is not a list of dicts; wanted JSON schemas in OpenAI's layout")
    return [_plain(f"tools[{index}]", tool) for index, tool in enumerate(tools)]


def _plain(where: str, value: Any) -> Any:
    # A template is code from outside: it gets plain data, never an object whose methods it could call.
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} holds something that JSON cannot say: {error}") from error


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}
