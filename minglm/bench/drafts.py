"""What drafts are worth: `python -m minglm.bench.drafts` prints a table for a checkpoint, and can write it.

Greedy text in each domain, plain and with drafts, one after the other in the same process: tokens per round, accepted
drafts by depth, the time of drafting and of checking, and what that gives. Beside it the bound by bytes: a step's time
cannot shrink below the weights that it reads, and several tokens read more experts than one.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minglm.api import Model, load
from minglm.bench.shapes import SHAPES, quick_params
from minglm.data.heldout import heldout_documents
from minglm.data.tasks import TASKS, Item
from minglm.evaluate.domains import some_heldout
from minglm.generate.loop import NumpyEngine, Round, Stats
from minglm.generate.sampling import Sampling
from minglm.generate.speculative import MtpDrafter, NumpyMtpLayer, speculative_steps
from minglm.look.tables import markdown_table, table
from minglm.model.ops import Array

PROMPTS = 12  # of each domain
NEW = 96  # tokens of each, at most
TURNS = 3  # plain and with drafts in turn; the fastest counts
HEADER = (
    "text", "drafted by", "drafts", "tokens / round", "accepted by depth, %", "draft ms", "check ms", "experts / round",
    "by bytes", "gain",
)  # fmt: skip


class DraftRow(NamedTuple):
    """One way to draft in one domain. `gain`: tokens per second over plain decoding's."""

    text: str
    drafter: str
    drafts: int
    tokens_per_round: float
    accepted: str
    draft_ms: float
    check_ms: float
    experts: float
    by_bytes: float  # tokens per round over the bytes of a round's check, a plain step's being 1: the bound
    gain: float


def prompts(model: Model, count: int = PROMPTS) -> dict[str, list[str]]:
    """Held-out code to go on with, and held-out questions to be answered with thinking and directly."""
    code = [line for d in heldout_documents("code") for line in _beginnings(d.text)]
    items = [
        some_heldout(TASKS[name], count // 4 + 1, seed=3) for name in ("addition", "sums", "multiplication", "sort")
    ]
    asked = [item for four in zip(*items, strict=True) for item in four][:count]
    return {
        "code": code[:: max(len(code) // count, 1)][:count],
        "thinking": [_asked(model, item, True) for item in asked],
        "direct": [_asked(model, item, False) for item in asked],
    }


def _asked(model: Model, item: Item, thinking: bool) -> str:
    if model.chat_template is None:
        raise ValueError(f"{model.name} has no chat template, so it cannot be asked")
    return model.chat_template.render([{"role": "user", "content": item.question}], enable_thinking=thinking)


def _beginnings(text: str) -> Iterator[str]:
    lines = text.splitlines(keepends=True)
    for start in range(0, len(lines) - 8, 40):
        yield "".join(lines[start : start + 6])


def rows(
    model: Model, helper: Model | None = None, most: int = 3, threads: int | None = None, count: int = PROMPTS
) -> Iterator[DraftRow]:
    """For each domain and number of drafts: the MTP layer, and the helper if there is one."""
    per_expert, step = _bytes(model)
    for text, given in prompts(model, count).items():
        for drafter, other in (("MTP layer", None), *([(helper.name, helper)] if helper else [])):
            for drafts in range(1, most + 1):
                plain, drafted = _in_turns(model, given, drafts, other, threads)
                rounds = [r for stats in drafted for r in stats.rounds]
                seconds, tokens = _seconds(drafted), sum(s.new_tokens - 1 for s in drafted)
                experts = statistics.fmean(r.experts for r in rounds)
                alone = model.config.num_experts_per_tok * _moe_layers(model)
                bytes_of_round = (step + (experts - alone) * per_expert) / step
                yield DraftRow(
                    text, drafter, drafts, tokens / len(rounds), _accepted(rounds),
                    1e3 * statistics.fmean(r.draft_seconds for r in rounds),
                    1e3 * statistics.fmean(r.verify_seconds for r in rounds),
                    experts, tokens / len(rounds) / bytes_of_round, _seconds(plain) / seconds,
                )  # fmt: skip


def _in_turns(
    model: Model, given: Sequence[str], drafts: int, helper: Model | None, threads: int | None
) -> tuple[list[Stats], list[Stats]]:
    plain: list[Stats] = []
    drafted: list[Stats] = []
    for prompt in given:
        turns = [
            (model.generate(prompt, NEW, threads=threads),
             model.generate(prompt, NEW, threads=threads, draft=drafts, draft_model=helper))
            for _ in range(TURNS)
        ]  # fmt: skip
        assert all(one.ids == other.ids for one, other in turns), "drafts have changed a text"
        if len(turns[0][0].ids) > 1:
            plain.append(min((one.stats for one, _ in turns), key=lambda s: s.decode_seconds))
            drafted.append(min((other.stats for _, other in turns), key=lambda s: s.decode_seconds))
    return plain, drafted


def _seconds(stats: Sequence[Stats]) -> float:
    return sum(s.decode_seconds for s in stats)


def _accepted(rounds: Sequence[Round]) -> str:
    both = Stats("", 0, 0, 0.0, 0.0, tuple(rounds)).acceptance()
    return " ".join(f"{100 * accepted / made:.0f}" for accepted, made in both)


def _moe_layers(model: Model) -> int:
    return model.config.num_hidden_layers - model.config.first_k_dense_replace


def _bytes(model: Model) -> tuple[float, float]:
    """Of one routed expert, and of all weights that a plain step reads, in units of a number's size."""
    c = model.config
    return 3 * c.hidden_size * c.moe_intermediate_size, float(c.count_parameters().active)


# -- with and without the norm -----------------------------------------------------------------------------------


class _WithoutNorm(NumpyMtpLayer):
    """Hands on its output as it is before shared_head.norm: the defect of several engines."""

    def __init__(self, model: Model, capacity: int):
        super().__init__(model, capacity, tap=self._catch)
        self._out = np.zeros((1, 0, 0))

    def _catch(self, name: str, array: Array) -> Array:
        if name.endswith(f"{self._model.config.num_hidden_layers}.out"):
            self._out = array
        return array

    def feed(self, hidden: Array, next_ids: Sequence[int]) -> tuple[Array, Array]:
        logits, _ = super().feed(hidden, next_ids)
        return logits, self._out[0]


def recycling(model: Model, drafts: int = 3, count: int = PROMPTS) -> Iterator[tuple[str, str, str]]:
    """(text, what goes in again for the next draft, accepted by depth): the layer's output, normed and not."""
    for text, given in prompts(model, count).items():
        for said, kind in (("after shared_head.norm", NumpyMtpLayer), ("before it", _WithoutNorm)):
            rounds: list[Round] = []
            for prompt in given:
                ids = model.as_ids(prompt)[0].tolist()
                capacity, ends = len(ids) + NEW, frozenset(model.config.eos_token_id)
                drafter = MtpDrafter([kind(model, capacity)])
                made = speculative_steps(
                    NumpyEngine(model, capacity), drafter, ids, NEW, Sampling(), ends, model.usable_tokens, drafts
                )
                rounds += [step.round for step in made if step.round]
            yield text, said, _accepted(rounds)


# -- on a larger shape -------------------------------------------------------------------------------------------


class CostRow(NamedTuple):
    """What a round costs. Random weights guess nothing right, so there is no gain to measure, but a price."""

    drafts: int
    plain_ms: float  # a step without drafts
    draft_ms: float
    check_ms: float
    round_ms: float  # all of it
    experts: float  # that a check reads
    pays_from: float  # tokens per round: a round over a plain step


def costs(shape: str, dtype: str = "bfloat16", most: int = 3, threads: int | None = None) -> Iterator[CostRow]:
    """Plain steps and rounds in turns, on random weights of a shape of `shapes.py` with an MTP layer."""
    config = SHAPES[shape].config.replace(num_nextn_predict_layers=1)
    model = Model(config, quick_params(config, dtype), name=shape)
    prompt, new = list(range(3, 11)), 48
    for drafts in range(1, most + 1):
        model.generate(prompt, 4, end_ids=(), threads=threads, draft=drafts)  # compiles
        turns = [
            [model.generate(prompt, new, end_ids=(), threads=threads, draft=n).stats for n in (0, drafts)]
            for _ in range(TURNS)
        ]
        plain, drafted = (min(made, key=lambda s: s.decode_seconds) for made in zip(*turns, strict=True))
        rounds = [r for r in drafted.rounds if r.drafted == drafts]
        plain_ms = 1e3 * plain.decode_seconds / (new - 1)
        round_ms = 1e3 * drafted.decode_seconds / len(drafted.rounds)
        draft_ms = 1e3 * statistics.fmean(r.draft_seconds for r in rounds)
        check_ms = 1e3 * statistics.fmean(r.verify_seconds for r in rounds)
        experts = statistics.fmean(r.experts for r in rounds)
        yield CostRow(drafts, plain_ms, draft_ms, check_ms, round_ms, experts, round_ms / plain_ms)


# -- the command -------------------------------------------------------------------------------------------------


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minglm.bench.drafts", description=__doc__)
    parser.add_argument("--model", default="glm-tiny")
    parser.add_argument("--helper", default="glm-nano", help="a smaller model with the same tokenizer; '' for none")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompts", type=int, default=PROMPTS, help=f"of each domain (default {PROMPTS})")
    parser.add_argument("--shape", choices=[*SHAPES], help="instead: what rounds cost on random weights of a shape")
    parser.add_argument("--save", type=Path, help="the tables as Markdown")
    asked = parser.parse_args(given)
    if asked.shape:
        print(table([_rounded(row) for row in costs(asked.shape, threads=asked.threads)], COSTS))
        return 0
    try:
        model = load(asked.model, asked.dtype)
        helper = load(asked.helper, asked.dtype) if asked.helper else None
        found = list(rows(model, helper, threads=asked.threads, count=asked.prompts))
        again = list(recycling(model, count=asked.prompts))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    shown = [_rounded(row) for row in found]
    print(table(shown, HEADER))
    print("\n" + table(again, AGAIN))
    if asked.save:
        asked.save.write_text(markdown_table(shown, HEADER) + "\n" + markdown_table(again, AGAIN), "utf-8")
    return 0


COSTS = ("drafts", "plain ms", "draft ms", "check ms", "round ms", "experts / round", "pays from tokens / round")
AGAIN = ("text", "handed to the next draft", "accepted by depth, %")


def _rounded(row: DraftRow | CostRow) -> tuple[Any, ...]:
    return tuple(f"{value:.2f}" if isinstance(value, float) else value for value in row)


if __name__ == "__main__":
    sys.exit(main())
