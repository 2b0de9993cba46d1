"""`minglm chat`: a conversation in the terminal."""

from typing import Any

from minglm.api import Model
from minglm.text.answer import parse_answer

HELP = "Write a line; /clear forgets the conversation, /quit ends it, Ctrl-C stops an answer."


def chat(model: Model, thinking: bool = True, max_new_tokens: int = 128, **sampling: Any) -> None:
    """Read lines, answer each with the whole conversation as context. `/quit` or the end of input ends it."""
    if model.tokenizer is None or model.chat_template is None:
        raise ValueError("chatting needs a tokenizer, and this model has none")
    if not any(end in model.tokenizer.end_ids for end in model.config.eos_token_id):
        raise ValueError("the config names no end token (eos_token_id), so an answer would never end")
    print(f"{model!r}\n{HELP}\n(A checkpoint that was never trained on conversations will not hold one.)")
    messages: list[dict[str, str]] = []
    while (line := _ask()) not in (None, "/quit"):
        if line == "/clear":
            messages.clear()
        elif line and line.startswith("/"):
            print(HELP)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                answer = _answer(model, messages, thinking, max_new_tokens, sampling)
            except KeyboardInterrupt:
                messages.pop()
                print("\n(stopped)")
                continue
            except ValueError as error:  # a full context, most likely: say so, and keep what was said before
                messages.pop()
                print(f"{error}\n(/clear makes room)")
                continue
            messages.append({"role": "assistant", "content": answer})


def _ask() -> str | None:
    try:
        return input("\n> ").strip()
    except EOFError:
        return None


def _answer(
    model: Model, messages: list[dict[str, str]], thinking: bool, max_new_tokens: int, sampling: dict[str, Any]
) -> str:
    """Stream one answer; returns its content without the thinking, as the template wants it back."""
    assert model.chat_template is not None
    prompt = model.chat_template.render(messages, enable_thinking=thinking)
    pieces = []
    for piece in model.stream(prompt, max_new_tokens, **sampling):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return parse_answer("".join(pieces)).content or ""
