"""`minglm routing`: every plot of routing that a text, a file or a folder of domains allows, with its table."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm.std import tqdm

from minglm.data.batches import Batch
from minglm.evaluate.confidence import wilson
from minglm.evaluate.mtp import DEPTHS, agreement
from minglm.evaluate.passes import moe_layers, operations
from minglm.evaluate.removal import removal_costs
from minglm.look import rows as tables
from minglm.look.history import History, read_history
from minglm.look.routing import LoadRow, PickRow, RoutingTable, load_rows, pick_rows, to_csv
from minglm.look.specialisation import VocabularyRow, numbered, picks_by, unbiased_picks, vocabulary_rows
from minglm.model.loss import shift_targets
from minglm.model.ops import Array

if TYPE_CHECKING:
    from minglm.api import Model

TOKENS = 8192  # of each domain, at most
REMOVAL_TOKENS = 512  # of each domain, when experts are removed one by one
FREQUENT = 10  # occurrences from which on a token counts for the vocabulary
SUFFIXES = ".txt .md .py .rst .json .jsonl .csv .toml .html".split()


# -- what is read ------------------------------------------------------------------------------------------------


def read_texts(source: str) -> dict[str, list[str]]:
    """Texts by domain: each sub-folder and each file of a folder is one; so is a file, or the text itself.

    Hidden files, `__pycache__` and, beside others, empty files are passed over. Raises ValueError for a folder without
    text, a file that is not UTF-8, and what looks like a path but leads nowhere; OSError for a file it may not read.
    """
    path = Path(source)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError:  # too long for a file's name
        is_folder = is_file = False
    if is_folder and source.strip():
        return _domains(path)
    if is_file:
        return {path.stem: [_read(path)]}
    looks_like_one = path.suffix in SUFFIXES or source.startswith(("/", "./", "../", "~"))
    if looks_like_one and not any(c.isspace() for c in source):
        raise ValueError(
            f"{source}: no such file or folder; to look at these letters as a text, put a space behind them"
        )
    return {"text": [source]}


def _domains(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in sorted(folder.iterdir()):
        files = [entry] if entry.is_file() else sorted(path for path in entry.rglob("*") if path.is_file())
        texts = [_read(file) for file in files if not _hidden(file.relative_to(folder))]
        if any(text.strip() for text in texts):
            found.setdefault(entry.stem, []).extend(texts)
        elif entry.is_dir() and not _hidden(entry.relative_to(folder)):
            raise ValueError(f"{entry}: no text in it; wanted a folder whose sub-folders, or files, are the domains")
    if not found:
        raise ValueError(f"{folder}: no text in it; wanted a folder whose sub-folders, or files, are the domains")
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error


class Look(NamedTuple):
    """What the plots are made from: every token of every text, one after the other."""

    model: "Model"
    routing: RoutingTable
    tokens: list[str]
    domains: list[str]  # of each token
    pieces: list[tuple[str, Array]]  # domain, ids [1, n]: what went through the model together
    place: int  # of the layer that is shown where only one is: along the layer axis
    history: History | None


def look(model: "Model", texts: dict[str, list[str]], layer: int | None = None, folder: Path | None = None) -> Look:
    """Take the texts through the model, in pieces as long as its context, at most `TOKENS` of each domain.

    `layer`: the one to show where only one is, by default the middle one; `folder`: the model's, in which the routing
    over its training may be. Raises ValueError for a model without
    experts, for a layer that has none, and for no text.
    """
    layers = moe_layers(model)
    if layer is not None and layer not in layers:
        raise ValueError(f"layer {layer} has no router; layers with experts are {', '.join(map(str, layers))}")
    pieces = [(domain, ids) for domain, each in texts.items() for ids in _pieces(model, each)]
    parts: list[RoutingTable] = []
    tokens: list[str] = []
    domains: list[str] = []
    for domain, ids in tqdm(pieces, desc="routing", unit="piece", disable=None if len(pieces) > 1 else True):
        trace = model.trace(ids, keep="layers.*.mlp.expert_indices")
        parts.append(trace.routing)
        tokens += trace.tokens
        domains += [domain] * ids.shape[1]
    routing = parts[0]._replace(
        indices=np.concatenate([part.indices for part in parts]),
        weights=np.concatenate([part.weights for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        biased_scores=np.concatenate([part.biased_scores for part in parts]),
    )
    place = len(layers) // 2 if layer is None else layers.index(layer)
    return Look(model, routing, tokens, domains, pieces, place, _history(folder, len(layers)))


def _pieces(model: "Model", texts: Sequence[str]) -> Iterator[Array]:
    """Each text's ids in rows [1, n]."""
    length, left = model.config.max_position_embeddings, TOKENS
    for text in texts:
        ids = model.as_ids(text, limit=False)[:, :left] if text.strip() or len(texts) == 1 else np.zeros((1, 0), int)
        for start in range(0, ids.shape[1], length):
            yield ids[:, start : start + length]
        left -= ids.shape[1]
        if not left:
            return


def _history(folder: Path | None, layers: int) -> History | None:
    if folder is None:
        return None
    try:
        history = read_history(folder)
    except ValueError:  # it was not kept
        return None
    return history if history.indices.shape[2] == layers else None


# -- what is made of it ------------------------------------------------------------------------------------------


class Plot(NamedTuple):
    name: str
    draw: Callable[[], Any] | None  # -> Figure; None: a table alone
    rows: Callable[[], list[Any]]
    kind: Any  # of the rows


class LeftOut(NamedTuple):
    name: str
    why: str


def save_pictures(seen: Look, folder: Path, say: Callable[[str], None] = print) -> None:
    """Write NAME.png and NAME.csv into the folder for every plot there is something for, and say what and what not."""
    folder.mkdir(parents=True, exist_ok=True)
    plots: list[str] = []
    tables_alone: list[str] = []
    left_out: list[LeftOut] = []
    everything = [*_of_load(seen), *_of_the_router(seen), *_of_words(seen), *_of_training(seen), *_of_drafts(seen)]
    for each in tqdm([*everything, _of_removal(seen)], desc="plots", unit="plot", disable=None, leave=False):
        if isinstance(each, LeftOut):
            left_out.append(each)
            continue
        if each.draw is not None:
            each.draw().savefig(folder / f"{each.name}.png", dpi=120)
        to_csv(each.rows(), each.kind, folder / f"{each.name}.csv")
        (plots if each.draw else tables_alone).append(each.name)
    say(f"saved {folder.resolve()}: {', '.join(plots)} (.png and .csv each), {', '.join(tables_alone)} (.csv)")
    for name, why in left_out:
        say(f"left out {name}: {why}")


def _of_load(seen: Look) -> Iterator[Plot]:
    from minglm.look import plots

    indices, weights, _, _, layers, E = seen.routing
    at, name = seen.place, seen.model.name
    one: dict[str, Any] = {"layer": at, "layers": layers, "name": name}
    yield Plot(
        "load", lambda: plots.plot_load(indices, E, layers, name=name), lambda: load_rows(indices, E, layers), LoadRow
    )
    yield Plot(
        "picks",
        lambda: plots.plot_picks(indices, weights, seen.tokens, E, layers, name=name),
        lambda: pick_rows(indices, weights, layers, seen.tokens),
        PickRow,
    )
    yield Plot(
        "bars",
        lambda: plots.plot_bars(indices, E, **one),
        lambda: load_rows(indices[:, at : at + 1], E, layers[at : at + 1]),
        LoadRow,
    )
    yield Plot(
        "drops",
        lambda: plots.plot_drops(indices, E, layers=layers, name=name),
        lambda: tables.drop_rows(indices, E, layers=layers),
        tables.DropRow,
    )
    yield Plot(
        "coactivation",
        lambda: plots.plot_coactivation(indices, E, **one),
        lambda: tables.coactivation_rows(indices, E, layers),
        tables.CoactivationRow,
    )
    yield Plot(
        "paths",
        lambda: plots.plot_paths(indices, E, layers, name=name),
        lambda: tables.flow_rows(indices, layers),
        tables.FlowRow,
    )


def _of_the_router(seen: Look) -> Iterator[Plot]:
    from minglm.look import plots

    indices, _, scores, biased, layers, _ = seen.routing
    at, name, K = seen.place, seen.model.name, indices.shape[2]
    token = _telling_token(seen)
    yield Plot(
        "selection",
        lambda: plots.plot_selection(scores, biased, K, at, token, seen.tokens, layers, name),
        lambda: tables.selection_rows(scores, biased, K, at, token),
        tables.SelectionRow,
    )
    yield Plot(
        "confidence",
        lambda: plots.plot_confidence(scores, biased, K, layers, name),
        lambda: tables.confidence_rows(scores, biased, K, layers),
        tables.ConfidenceRow,
    )
    yield Plot("bias", None, lambda: tables.bias_rows(scores, biased, K, layers), tables.BiasRow)


def _telling_token(seen: Look) -> int:
    """The first one whose choice in this layer the bias changed, if there is one."""
    K = seen.routing.indices.shape[2]
    scores, biased = (each[:, seen.place] for each in (seen.routing.scores, seen.routing.biased_scores))
    changed = np.sort(picks_by(biased, K)) != np.sort(unbiased_picks(scores, biased, K))
    return int(changed.any(axis=1).argmax())


def _of_words(seen: Look) -> Iterator[Plot | LeftOut]:
    from minglm.look import plots

    indices, _, _, _, layers, E = seen.routing
    at, name, words, domains = seen.place, seen.model.name, seen.tokens, seen.domains
    one: dict[str, Any] = {"layer": at, "layers": layers, "name": name}
    most = int(np.bincount(numbered(words, len(words), "tokens")[1]).max())
    if most < FREQUENT:
        yield LeftOut(
            "vocabulary, vocabulary_by_layer", f"no token of the text occurs {FREQUENT} times, the most frequent {most}"
        )
    else:
        yield Plot(
            "vocabulary",
            lambda: plots.plot_vocabulary(indices, words, E, min_count=FREQUENT, **one),
            lambda: vocabulary_rows(indices, words, E, at, FREQUENT),
            VocabularyRow,
        )
        shares = partial(tables.vocabulary_share_rows, indices, words, E, FREQUENT, layers)
        yield Plot("vocabulary_by_layer", None, shares, tables.VocabularyShareRow)
    if len(set(domains)) < 2:
        yield LeftOut("domains, information", "one domain only; give a folder whose sub-folders, or files, are domains")
        return
    yield Plot(
        "domains",
        lambda: plots.plot_domains(indices, domains, E, None, words, layers, name=name),
        lambda: tables.domain_rows(indices, domains, E, words, layers),
        tables.DomainRow,
    )
    information = partial(tables.information_rows, indices, domains, words, layers)
    yield Plot("information", None, information, tables.InformationRow)


def _of_training(seen: Look) -> Iterator[Plot | LeftOut]:
    from minglm.look import plots

    if seen.history is None:
        yield LeftOut("load_over_training, saturation", "no routing over the training in the model's folder")
        return
    steps, history = seen.history
    layers, E, name = seen.routing.layers, seen.routing.experts, seen.model.name
    yield Plot(
        "load_over_training",
        lambda: plots.plot_load_over_training(history, E, steps, seen.place, layers, name),
        lambda: tables.load_history_rows(history, E, steps, layers),
        tables.LoadHistoryRow,
    )
    yield Plot(
        "saturation",
        lambda: plots.plot_saturation(history, None, steps, E, layers, name),
        lambda: tables.saturation_rows(history, E, steps, None, layers),
        tables.SaturationRow,
    )


def _of_drafts(seen: Look) -> Iterator[Plot | LeftOut]:
    from minglm.look import plots

    name, E, layers = seen.model.name, seen.routing.experts, seen.routing.layers
    if not seen.model.params.mtp:
        yield LeftOut("acceptance, overlap", "the model has no MTP layer")
        return
    accepted = acceptance_rows(seen)
    if accepted:
        yield Plot("acceptance", partial(plots.plot_acceptance, accepted, name), lambda: accepted, tables.AcceptanceRow)
    else:
        yield LeftOut("acceptance", "no piece of text is long enough to be drafted")
    drafted, trunk = mtp_picks(seen)
    if not len(drafted):
        yield LeftOut("overlap", "a single token, which the MTP layer has no next one for")
        return
    of = ("the MTP layer", "the decoder layers")
    yield Plot(
        "overlap",
        lambda: plots.plot_overlap(drafted, trunk, E, layers, of, name=name),
        lambda: tables.overlap_rows(drafted, trunk, E, layers),
        tables.OverlapRow,
    )


def acceptance_rows(seen: Look) -> list[tables.AcceptanceRow]:
    """Drafts that are the trunk's own choice, by domain and depth, the true text being fed: `evaluate.mtp`."""
    if seen.model.tokenizer is None:
        return []
    found: dict[str, Array] = {}
    for domain, ids in seen.pieces:
        if ids.shape[1] > DEPTHS + 1:
            batch = Batch(ids, shift_targets(ids), np.zeros_like(ids))
            agree, places = agreement(seen.model, batch)
            found[domain] = found.get(domain, 0) + np.stack([agree[0], places[0]], axis=-1)
    return [
        tables.AcceptanceRow(domain, depth, int(agree), int(places), *wilson(int(agree), int(places)))
        for domain, counts in found.items()
        for depth, (agree, places) in enumerate(counts, start=1)
        if places
    ]


def mtp_picks(seen: Look) -> tuple[Array, Array]:
    """int [n, 1, K] of the first MTP layer at depth 1, and [n, layer, K] of the trunk for the same last token read.

    Row i of the MTP layer has read tokens up to i + 1, as row i + 1 of the trunk has, and both guess token i + 2.
    """
    name, start = f"layers.{seen.model.config.num_hidden_layers}.mlp.expert_indices", 0
    drafted, trunk = [], []
    for _, ids in seen.pieces:
        n = ids.shape[1]
        if n > 1:
            taps: dict[str, Array] = {}
            seen.model.mtp(ids, 1, tap=taps.__setitem__)
            drafted.append(taps[name])
            trunk.append(seen.routing.indices[start + 1 : start + n])
        start += n
    if not drafted:
        return np.zeros((0, 1, 1), int), np.zeros((0, 1, 1), int)
    return np.concatenate(drafted)[:, None], np.concatenate(trunk)


def _of_removal(seen: Look) -> Plot | LeftOut:
    from minglm.look import plots

    layer, E = seen.routing.layers[seen.place], seen.routing.experts
    names = list(dict.fromkeys(seen.domains))
    pieces = {domain: ids[:, :REMOVAL_TOKENS] for domain, ids in reversed(seen.pieces)}  # the first of each
    if min(ids.shape[1] for ids in pieces.values()) < 2:
        return LeftOut("removal", "a single token predicts nothing")
    costs, errors, loads = np.zeros((3, E, len(names)))
    try:
        with operations(seen.model) as ops:
            for d, domain in enumerate(names):
                ids = pieces[domain]
                batch = Batch(ids, shift_targets(ids), np.zeros_like(ids))
                for (_, e), cost in removal_costs(seen.model, batch, ops, [layer]):
                    costs[e, d], errors[e, d], loads[e, d] = cost
    except ValueError as error:
        return LeftOut("removal", str(error))
    T = sum(ids.shape[1] for ids in pieces.values())
    K = seen.routing.indices.shape[2]
    return Plot(
        "removal",
        lambda: plots.plot_removal(costs, names, loads, layer, errors, K=K, T=T, name=seen.model.name),
        lambda: tables.removed_rows(costs, names, loads, layer, errors),
        tables.RemovedRow,
    )
