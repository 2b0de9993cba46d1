"""Golden texts: greedy continuations that must never change, from prompts that rounding cannot tip over."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from minglm.api import Model

LEAST_MARGIN = 1e-3  # between the best and the second-best logit, and between an expert picked and one left out


class Golden(NamedTuple):
    prompt: str
    text: str
    ids: list[int]


def golden(model: "Model", prompt: str, max_new_tokens: int = 16) -> Golden | None:
    """The greedy continuation of a prompt, or None if any choice on the way has a margin below `LEAST_MARGIN`."""
    margins: list[float] = []

    def watch(name: str, biased: np.ndarray) -> None:
        if name.endswith("biased_scores"):
            best = -np.sort(-biased, axis=-1)
            K = model.config.num_experts_per_tok
            margins.append(float((best[:, K - 1] - best[:, K]).min()))

    steps = list(model.steps(prompt, max_new_tokens, engine="numpy", tap=watch))
    for step in steps:
        second, first = np.sort(step.logits)[-2:]
        margins.append(float(first - second))
    if min(margins) < LEAST_MARGIN:
        return None
    ids = [step.id for step in steps]
    assert model.tokenizer is not None
    return Golden(prompt, model.tokenizer.decode(ids), ids)


PROMPTS = (
    "17+25=",
    "number:forty-two->",
    "def __init__(self",
    "import os\nimport sys\n",
    "class Error(Exception):\n",
    "    def close(self):\n",
    "for i in range(",
    "The following example",
    "reverse:4821->",
    "90-47=",
    "8+5=",
    "64+19=",
    "75-38=",
    "reverse:903->",
    "number:seven->",
    "number:nineteen->",
    "class Node:\n",
    "    return self.",
    "    if not isinstance(",
    "        raise ValueError(",
    "from collections import ",
    "try:\n    import ",
    "if __name__ ==",
    "    for name in ",
    "Return the number of ",
    "    with open(",
)


def golden_texts(model: "Model") -> list[Golden]:
    """The golden ones among `PROMPTS`."""
    return [found for prompt in PROMPTS if (found := golden(model, prompt))]
