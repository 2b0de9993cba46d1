"""Calls of the calculator: well-formed, with the right expression, and right end to end with the tool really run."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from minglm.data.calculator import calculate
from minglm.data.chats import CALCULATOR, ask
from minglm.data.tasks import TASKS, Item, check
from minglm.evaluate.confidence import wilson
from minglm.evaluate.domains import some_heldout
from minglm.evaluate.passes import engine
from minglm.generate.batch import continue_all
from minglm.text.template import ChatTemplate, Message
from minglm.text.tools import run_tools_all

if TYPE_CHECKING:
    from minglm.api import Model

TOOLS = {"calculator": calculate}
LIMIT = 160  # new tokens of one answer


class ToolRow(NamedTuple):
    how: str  # "thinking" or "direct"
    measure: str  # a field of Outcome
    right: int
    asked: int
    share: float
    low: float  # 95 %: Wilson
    high: float


class Outcome(NamedTuple):
    """Of one question."""

    well_formed: bool  # the first answer has one call, of the calculator, with one string that it accepts
    right_expression: bool  # and the string's value is the answer
    end_to_end: bool  # a calculator's result was there, and the last answer is exactly right


def tool_rows(model: "Model", items: int = 100, seed: int = 1) -> list[ToolRow]:
    """Three rows with thinking off, three with thinking on, over held-out calculator items."""
    asked = some_heldout(TASKS["calculator"], items, seed)
    rows = []
    for how, thinking in (("direct", False), ("thinking", True)):
        outcomes = [judge(item, said) for item, said in zip(asked, converse(model, asked, thinking), strict=True)]
        for name, values in zip(Outcome._fields, zip(*outcomes, strict=True), strict=True):
            right = sum(values)
            rows.append(ToolRow(how, name, right, len(asked), right / len(asked), *wilson(right, len(asked))))
    return rows


def converse(model: "Model", items: Sequence[Item], thinking: bool) -> list[list[Message]]:
    """The conversation about each item, the calculator's results included."""

    def answers(prompts: list[str]) -> list[str]:
        return [each.text for each in continue_all(model, prompts, LIMIT, engine=engine(model))]

    questions = [[ask(item)] for item in items]
    return run_tools_all(answers, questions, [CALCULATOR], TOOLS, model.chat_template or ChatTemplate(), thinking)


def judge(item: Item, messages: Sequence[Message]) -> Outcome:
    """What became of a question, from all messages about it."""
    value = call_value(messages[1])
    last = messages[-1]
    results = [message["content"] for message in messages if message["role"] == "tool"]
    return Outcome(
        well_formed=value is not None,
        right_expression=value == item.answer,
        end_to_end=last["role"] == "assistant" and item.answer in results and check(item, last["content"]),
    )


def call_value(message: Message) -> str | None:
    """The value of the expression that an assistant's message hands to the calculator; None if it is not one
    well-formed call."""
    calls: Sequence[Mapping[str, Any]] = message.get("tool_calls", [])
    if len(calls) != 1 or calls[0]["function"]["name"] != "calculator":
        return None
    arguments = calls[0]["function"]["arguments"]
    if list(arguments) != ["expression"] or not isinstance(arguments["expression"], str):
        return None
    try:
        return calculate(arguments["expression"])
    except ValueError:
        return None
