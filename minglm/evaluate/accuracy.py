"""Exact answers to generated tasks, in plain text or in the chat format, direct or with written-out thinking."""

from typing import TYPE_CHECKING, NamedTuple

from minglm.data.chats import ask
from minglm.data.tasks import Item, check, plain
from minglm.generate.batch import continue_all
from minglm.text.chat import ChatTemplate, parse_answer

if TYPE_CHECKING:
    from minglm.api import Model


class Score(NamedTuple):
    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked


def accuracy(
    model: "Model", items: list[Item], thinking: bool = False, chat: bool = True, max_new_tokens: int = 320
) -> Score:
    """How many of the items the model answers exactly, with nothing before the question.

    `chat`: asked as a conversation, with thinking on or off; otherwise as the plain text of pre-training.
    """
    answers = (chat_answers if chat else plain_answers)(model, items, thinking, max_new_tokens)
    return Score(sum(check(item, text) for item, text in zip(items, answers, strict=True)), len(items))


def plain_answers(model: "Model", items: list[Item], thinking: bool, max_new_tokens: int) -> list[str]:
    """What stands behind the last "=": on the first line, or after the steps on a line of its own."""
    prompts = [plain(item, thinking)[0] for item in items]

    def done(text: str) -> bool:
        return text.endswith("\n") and (not thinking or text.rstrip("\n").rpartition("\n")[2].startswith("="))

    texts = continue_all(model, prompts, max_new_tokens, done)
    return [text.rstrip("\n").rpartition("\n")[2].removeprefix("=") if thinking else text for text in texts]


def chat_answers(model: "Model", items: list[Item], thinking: bool, max_new_tokens: int) -> list[str]:
    """The answers' content, without the thinking."""
    template = model.chat_template or ChatTemplate()
    prompts = [template.render([ask(item)], enable_thinking=thinking) for item in items]
    return [parse_answer(text).content or "" for text in continue_all(model, prompts, max_new_tokens)]
