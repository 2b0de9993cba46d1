"""Golden texts: greedy continuations that must never change, from prompts that rounding cannot tip over."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minglm.text.template import ChatTemplate

if TYPE_CHECKING:
    from minglm.api import Model

LEAST_MARGIN = 1e-3  # between the best and the second-best logit
LEAST_PICK = (
    1e-5  # between the biased scores of an expert picked and one left out: ten times what rounding does to them
)


class Golden(NamedTuple):
    prompt: str
    text: str
    ids: list[int]


def golden(model: "Model", prompt: str, max_new_tokens: int = 16) -> Golden | None:
    """The greedy continuation of a prompt, or None if any choice on the way has a margin below the least."""
    picks: list[float] = []

    def watch(name: str, biased: np.ndarray) -> None:
        if name.endswith("biased_scores"):
            best = -np.sort(-biased, axis=-1)
            K = model.config.num_experts_per_tok
            picks.append(float((best[:, K - 1] - best[:, K]).min()))

    steps = list(model.steps(prompt, max_new_tokens, engine="numpy", tap=watch))
    margins = [float(np.diff(np.sort(step.logits)[-2:])[0]) for step in steps]
    if min(margins) < LEAST_MARGIN or min(picks) < LEAST_PICK:
        return None
    ids = [step.id for step in steps]
    assert model.tokenizer is not None
    return Golden(prompt, model.tokenizer.decode(ids), ids)


TEXTS = (
    "17+25=",
    "8+5=",
    "90-47=",
    "64+19:\n",
    "4821+937:\n",
    "347*6:\n",
    "3+8+1+9+4 mod 10:\n",
    "reverse HELLO:\n",
    "words 342:\n",
    "def __init__(self",
    "import os\nimport sys\n",
    "class Error(Exception):\n",
    "    def close(self):\n",
    "for i in range(",
    "    if not isinstance(",
    "        raise ValueError(",
    "from collections import ",
    "try:\n    import ",
    "if __name__ ==",
    "    for name in ",
    "Return the number of ",
    "    with open(",
)
QUESTIONS = (
    "17+25",
    "4821+937",
    "3+8+1+9+4 mod 10",
    "sort 31 7 42",
    "words 342",
    'len("abc")+3',
    "Who are you?",
    "你好",
)


def prompts() -> list[str]:
    """Plain text to go on with, and questions in the chat format, with thinking and without."""
    template = ChatTemplate()
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    chats = [template.render(messages, enable_thinking=thinking) for messages in asked for thinking in (True, False)]
    return [*TEXTS, *chats]


def golden_texts(model: "Model", most: int = 6) -> list[Golden]:
    """The first golden ones among `prompts`, of each of the two kinds."""
    chosen: dict[bool, list[Golden]] = {False: [], True: []}
    for prompt in prompts():
        kind = chosen[prompt.startswith("[gMASK]")]
        if len(kind) < most and (found := golden(model, prompt)):
            kind.append(found)
    return [*chosen[False], *chosen[True]]
