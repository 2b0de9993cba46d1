"""The tables of `minglm eval`: what a checkpoint can do and how its experts behave, all measured on held-out data."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.std import tqdm

from minglm.evaluate.accuracy import HOW, task_rows
from minglm.evaluate.balance import balance_rows
from minglm.evaluate.bits_per_byte import text_rows
from minglm.evaluate.domains import DOMAINS, changing_rows, heldout_streams, one_domain_rows
from minglm.evaluate.mtp import DEPTHS, mtp_rows
from minglm.evaluate.passes import engine, tokenizer_of
from minglm.evaluate.removal import removal_rows
from minglm.evaluate.specialisation import specialisation_rows
from minglm.evaluate.tools import tool_rows
from minglm.look.tables import markdown_table, table

if TYPE_CHECKING:
    from minglm.api import Model

SECTIONS = ("text", "tasks", "tools", "mtp", "balance", "experts")
PLAIN_SECTIONS = ("text", "mtp", "balance", "experts")  # of a model that was never in a conversation
CONTEXT = {"text": 256, "tasks": 512, "tools": 512, "mtp": 512, "balance": 256, "experts": 256}  # tokens, at least
TOKENS = 16_384  # of each domain, for mtp, balance and experts


class Table(NamedTuple):
    """One table of the report."""

    name: str  # a section's, or "removal"
    title: str
    note: str
    rows: list[Any]  # NamedTuples of one kind, such as `accuracy.TaskRow`
    seconds: float  # that it took


def report(
    model: "Model",
    only: Sequence[str] | None = None,
    items: int = 64,
    how: Sequence[str] = ("direct", "thinking"),
    with_ngram: bool = True,
    progress: bool = True,
    tables: list[Table] | None = None,
) -> list[Table]:
    """Measure a checkpoint. `only`: some of `SECTIONS` (default: all that there is something to measure for); `items`:
    at most so many of each size of a task; `how`: keys of `accuracy.HOW`; `with_ngram` fits the byte model on the
    standard library, which takes some ten seconds. Tables are added to `tables`, which so holds what was finished.

    ValueError for a section or way of asking that is not there, and for a model without a tokenizer, without what a
    section measures, or with a context too short for it.
    """
    tables = [] if tables is None else tables
    only = [name for name in SECTIONS if not _why_not(model, name)] if only is None else only
    _check(only, SECTIONS, "section")
    _check(how, HOW, "way of asking")
    if isinstance(items, bool) or not isinstance(items, int) or items < 1:
        raise ValueError(f"items = {items!r} must be a whole number, 1 or more")
    tokenizer_of(model)
    for name in only:
        if reason := _why_not(model, name):
            raise ValueError(f"{name}: {reason}; leave it out with --only")
    measures = list(_measures(model, only, items, how, with_ngram))
    bar = tqdm(measures, unit="table", disable=None if progress else True)
    for name, title, note, rows_of in bar:
        bar.set_description(name)
        start = time.perf_counter()
        rows = rows_of()
        tables.append(Table(name, title, note, rows, time.perf_counter() - start))
    return tables


def _why_not(model: "Model", section: str) -> str | None:
    """Why this model has no such section."""
    c = model.config
    if section in ("balance", "experts") and not c.is_moe(c.num_hidden_layers - 1):
        return "the model has no layer with experts"
    if section == "mtp" and not model.params.mtp:
        return "the model has no multi-token-prediction layer"
    wanted, context = CONTEXT.get(section, 0), c.max_position_embeddings
    return f"it wants a context of {wanted} tokens, the model has {context}" if context < wanted else None


def _check(given: Sequence[str], known: Sequence[str] | dict[str, Any], what: str) -> None:
    if wrong := [name for name in given if name not in known]:
        raise ValueError(f"no {what} {wrong[0]!r}; there are {', '.join(known)}")


Measure = tuple[str, str, str, Callable[[], list[Any]]]  # name, title, note, what to call


def _measures(
    model: "Model", only: Sequence[str], items: int, how: Sequence[str], with_ngram: bool
) -> Iterator[Measure]:
    """The tables of these sections, in the order of `SECTIONS`."""
    if "text" in only:
        note = "Bits per byte of the frozen held-out text; 95 % by bootstrap over documents."
        yield "text", "Held-out text", note, lambda: text_rows(model, with_ngram)
    if "tasks" in only:
        note = "Share of exact answers to held-out items (95 %: Wilson), and tokens generated per item."
        yield "tasks", "Tasks", note, lambda: task_rows(model, items, how)
    if "tools" in only:
        note = "Share of held-out calculator items (95 %: Wilson); the tool really runs."
        yield "tools", "Tool calls", note, lambda: tool_rows(model)
    if not {"mtp", "balance", "experts"} & set(only):
        return
    streams = heldout_streams(model, TOKENS)
    rows = one_domain_rows(streams, TOKENS)
    changing = changing_rows(streams, TOKENS)
    if "mtp" in only:
        note = "Share of drafts that are the trunk's greedy choice, by position in the text, without end tokens."
        yield "mtp", "Multi-token prediction", note, lambda: mtp_rows(model, streams)
    if "balance" in only:
        note = f"Load over {rows.domains.size:,} held-out tokens, as many of each of {', '.join(DOMAINS)}."
        yield "balance", "Balance of the experts", note, lambda: balance_rows(model, rows)
    if "experts" in only:
        note = (
            f"I(domain; expert) in bits per slot over {changing.domains.size:,} tokens, as many of each domain, in "
            "sequences that change it. The control permutes the domains among the occurrences of the same token."
        )
        yield "experts", "Specialisation of the experts", note, lambda: specialisation_rows(model, changing)
        note = "Each expert removed in turn: the domain that it costs most, bits per token there, and its load."
        yield "removal", "Cost of removing an expert", note, lambda: removal_rows(model, rows)


# -- showing -----------------------------------------------------------------------------------------------------

Shown = tuple[Sequence[str], list[list[str]]]  # header, cells


def as_text(tables: Sequence[Table]) -> str:
    """For the terminal."""
    parts = []
    for each in tables:
        header, cells = shown(each)
        parts.append(f"{each.title} ({each.seconds:.0f} s)\n{each.note}\n\n{table(cells, header)}\n")
    return "\n".join(parts)


def as_markdown(tables: Sequence[Table], model: "Model") -> str:
    """For a card."""
    parts = [f"Measured on {model!r}, {engine(model)} engine, by `minglm eval`.\n"]
    for each in tables:
        header, cells = shown(each)
        parts.append(f"### {each.title}\n\n{each.note}\n\n{markdown_table(cells, header)}")
    return "\n".join(parts)


def as_json(tables: Sequence[Table], model: "Model") -> str:
    """Every figure, also those that the tables leave out."""
    content = [
        {
            "name": each.name,
            "title": each.title,
            "seconds": round(each.seconds, 1),
            "rows": [r._asdict() for r in each.rows],
        }
        for each in tables
    ]
    return json.dumps({"model": model.name, "engine": engine(model), "tables": content}, indent=1) + "\n"


def shown(each: Table) -> Shown:
    """Header and cells of a table."""
    if not each.rows:
        return ["result"], [["nothing to measure"]]
    special = {"tasks": _tasks, "tools": _tools, "mtp": _mtp, "removal": _removal}
    return special[each.name](each.rows) if each.name in special else _plain(each.rows)


def _plain(rows: Sequence[Any]) -> Shown:
    """One line for each row. `low` and `high` go into the cell of the field before them."""
    header = [name.replace("_", " ") for name in rows[0]._fields if name not in ("low", "high")]
    return header, [_cells(row) for row in rows]


def _cells(row: Any) -> list[str]:
    cells: list[str] = []
    for name, value in row._asdict().items():
        if name == "low":
            cells[-1] += f" ({value:.3f} to {row.high:.3f})"
        elif name != "high":
            cells.append("" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value))
    return cells


def _percent(row: Any) -> str:
    """`93.8 % (85.0 to 97.5)` of a row with a share."""
    return f"{100 * row.share:.1f} % ({100 * row.low:.1f} to {100 * row.high:.1f})"


def _tasks(rows: Sequence[Any]) -> Shown:
    """A line for each task and size, a column for each way of asking."""
    ways = list(dict.fromkeys(row.how for row in rows))
    by_place = {(row.task, row.size, row.how): row for row in rows}
    lines = []
    for task, size in dict.fromkeys((row.task, row.size) for row in rows):
        here = [by_place[task, size, way] for way in ways]
        tokens = " / ".join(f"{row.tokens:.0f}" for row in here)
        chance = f"{100 * here[0].chance:.3g} %"
        lines.append(
            [task, "all" if size is None else str(size), str(here[0].asked), *map(_percent, here), chance, tokens]
        )
    return ["task", "size", "items", *ways, "chance", f"tokens {' / '.join(ways)}"], lines


def _tools(rows: Sequence[Any]) -> Shown:
    by_place = {(row.measure, row.how): row for row in rows}
    ways = list(dict.fromkeys(row.how for row in rows))
    lines = [
        [measure.replace("_", " "), str(rows[0].asked), *(_percent(by_place[measure, way]) for way in ways)]
        for measure in dict.fromkeys(row.measure for row in rows)
    ]
    return ["measure", "items", *ways], lines


def _mtp(rows: Sequence[Any]) -> Shown:
    by_place = {(row.text, row.position, row.depth): row for row in rows}
    lines = []
    for text, position in dict.fromkeys((row.text, row.position) for row in rows):
        here = [by_place.get((text, position, depth)) for depth in range(1, DEPTHS + 1)]
        cells = [_percent(row) if row else "" for row in here]
        lines.append([text, position, str(here[0].places if here[0] else 0), *cells])
    return ["text", "position", "places", *(f"depth {k}" for k in range(1, DEPTHS + 1))], lines


def _removal(rows: Sequence[Any]) -> Shown:
    """Experts down, layers across: the worst domain, its cost in bits per token, and the expert's load."""
    layers = list(dict.fromkeys(row.layer for row in rows))
    by_place = {(row.layer, row.expert): row for row in rows}
    lines = []
    for expert in dict.fromkeys(row.expert for row in rows):
        here = [by_place[layer, expert] for layer in layers]
        lines.append([str(expert), *(f"{row.worst} {row.cost:+.3f}, {100 * row.load:.0f} %" for row in here)])
    return ["expert", *(f"layer {layer}" for layer in layers)], lines
