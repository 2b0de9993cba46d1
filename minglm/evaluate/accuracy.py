"""Exact answers to generated tasks, in plain text or in the chat format, direct or with written-out thinking."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tqdm.std import tqdm

from minglm.data.chats import ask
from minglm.data.tasks import TASKS, Item, check, plain
from minglm.evaluate.confidence import wilson
from minglm.evaluate.domains import some_heldout
from minglm.evaluate.passes import engine, tokenizer_of
from minglm.generate.batch import Continuation, continue_all
from minglm.text.answer import parse_answer
from minglm.text.template import ChatTemplate

if TYPE_CHECKING:
    from minglm.api import Model


class Score(NamedTuple):
    right: int
    asked: int
    tokens: int = 0  # generated, all answers together, without end tokens

    @property
    def share(self) -> float:
        return self.right / self.asked


def accuracy(
    model: "Model", items: list[Item], thinking: bool = False, chat: bool = True, max_new_tokens: int = 320
) -> Score:
    """How many of the items the model answers exactly, with nothing before the question.

    `chat`: asked as a conversation, with thinking on or off; otherwise as the plain text of pre-training.
    """
    written = (chat_continuations if chat else plain_continuations)(model, items, thinking, max_new_tokens)
    read = chat_answer if chat else last_line if thinking else first_line
    right = sum(check(item, read(each.text)) for item, each in zip(items, written, strict=True))
    return Score(right, len(items), sum(len(each.ids) for each in written))


def plain_continuations(
    model: "Model", items: Sequence[Item], thinking: bool, max_new_tokens: int
) -> list[Continuation]:
    """What follows `4821+937=`, one line; or `4821+937:`, lines up to one that begins with "="."""

    def done(text: str) -> bool:
        return text.endswith("\n") and (not thinking or text.rstrip("\n").rpartition("\n")[2].startswith("="))

    return continue_all(model, [plain(item, thinking)[0] for item in items], max_new_tokens, done, engine(model))


def chat_continuations(
    model: "Model", items: Sequence[Item], thinking: bool, max_new_tokens: int
) -> list[Continuation]:
    """The assistant's turns, thinking and all."""
    template = model.chat_template or ChatTemplate()
    prompts = [template.render([ask(item)], enable_thinking=thinking) for item in items]
    return continue_all(model, prompts, max_new_tokens, engine=engine(model))


def first_line(text: str) -> str:
    return text.partition("\n")[0]


def last_line(text: str) -> str:
    """What stands behind "=" on the last line."""
    line = text.rstrip("\n").rpartition("\n")[2]
    return line.removeprefix("=") if line.startswith("=") else ""


def chat_answer(text: str) -> str:
    """The content, without the thinking."""
    return parse_answer(text).content or ""


# -- all tasks ---------------------------------------------------------------------------------------------------


class TaskRow(NamedTuple):
    """Exact answers to held-out items of one size of a task; in the unit of the task: digits, steps, letters …"""

    task: str
    size: int | None  # None: all sizes together
    how: str  # "thinking" or "direct" in the chat format; "plain worked" or "plain direct" as pre-training text
    right: int
    asked: int
    share: float
    low: float  # 95 %: Wilson
    high: float
    chance: float  # mean probability that a blind guess among plausible answers is right
    tokens: float  # generated, mean per item


HOW = {"direct": (True, False), "thinking": (True, True), "plain direct": (False, False), "plain worked": (False, True)}


def task_rows(
    model: "Model", items: int = 64, how: Sequence[str] = ("direct", "thinking"), seed: int = 1
) -> list[TaskRow]:
    """For each task and way of asking a row for all its sizes together, then one for each size.

    At most `items` different held-out items of each size: fewer where there are fewer. An answer that is longer than
    twice the longest right one, and 16 tokens, is cut off and so counts as wrong. The calculator's items need a tool:
    `tools.tool_rows`.
    """
    pools = {
        name: {size: found for size in task.sizes if (found := some_heldout(task, items, seed, size))}
        for name, task in TASKS.items()
        if name != "calculator"
    }
    rows: list[TaskRow] = []
    with tqdm(total=sum(map(len, pools.values())) * len(how), desc="tasks", unit="size", disable=None) as bar:
        for name, by_size in pools.items():
            for way in how:
                scores = {}
                for size, found in by_size.items():
                    scores[size] = _ask(model, found, way)
                    bar.update()
                rows += _rows(name, way, by_size, scores)
    return rows


def _ask(model: "Model", items: list[Item], way: str) -> Score:
    chat, thinking = HOW[way]
    return accuracy(model, items, thinking, chat, answer_limit(model, items, thinking))


def answer_limit(model: "Model", items: Sequence[Item], thinking: bool) -> int:
    """Twice the longest right answer in tokens, and 16 for what stands around it."""
    encode = tokenizer_of(model).encode
    return 16 + 2 * max(len(encode(plain(item, thinking)[1])) for item in items)


def _rows(task: str, way: str, items: dict[int, list[Item]], scores: dict[int, Score]) -> list[TaskRow]:
    together = Score(*map(sum, zip(*scores.values(), strict=True)))
    everything = [item for found in items.values() for item in found]
    by_size = [_row(task, size, way, items[size], score) for size, score in scores.items()]
    return [_row(task, None, way, everything, together), *by_size]


def _row(task: str, size: int | None, way: str, items: list[Item], score: Score) -> TaskRow:
    chance = sum(item.chance for item in items) / len(items)
    right, asked, tokens = score
    return TaskRow(task, size, way, right, asked, score.share, *wilson(right, asked), chance, tokens / asked)
