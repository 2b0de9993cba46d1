"""The runs: one folder holds the data, the unfinished runs and a result for each finished one.

tokenizer.json  corpus.safetensors  training_files.json    made once, the same for every run
timing.json                                                seconds of a step with Muon and with AdamW
runs/NAME-SEED/                                            as of any training run; checkpoints go when it is finished
results/NAME-SEED.json                                     there is one if and only if the run is finished
"""

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minglm.api import Model
from minglm.config import Config
from minglm.data.batches import Batch, Corpus, TokenStream
from minglm.data.documents import documents, file_list, file_list_text
from minglm.data.libraries import find_packages, origins
from minglm.formats.files import write_text
from minglm.formats.tensors import write_tensors
from minglm.look.curves import read_metrics
from minglm.text.template import ChatTemplate
from minglm.text.tokenizer import Tokenizer
from minglm.train.ablations.claims import BASELINE, VARIANTS, Variant
from minglm.train.ablations.figures import ROWS, HeldOut, figures, held_out
from minglm.train.curriculum import Curriculum
from minglm.train.loop import Batches, Observe, train
from minglm.train.recipe import Recipe
from minglm.train.run import learn_tokenizer
from minglm.train.step import DivergedError, operations, start, train_step

Say = Callable[[str], None]
Result = dict[str, Any]


class Data(NamedTuple):
    """What all runs share."""

    tokenizer: Tokenizer
    corpus: Corpus
    held_out: HeldOut

    def batches(self, recipe: Recipe) -> Curriculum:
        """The same order for the same seed, whatever the model."""
        return Curriculum(recipe, self.corpus, self.tokenizer, ChatTemplate())

    def config(self, recipe: Recipe) -> Config:
        ends = self.tokenizer.end_ids
        return recipe.model_config().replace(eos_token_id=ends, pad_token_id=ends[0])

    def model(self, variant: Variant, recipe: Recipe) -> Model:
        config = self.config(recipe)
        params = variant.make_params(config, recipe.seed)
        return Model(config, params, self.tokenizer, ChatTemplate(), variant.name)


def prepare(folder: Path, say: Say = print, rows: int = ROWS) -> Data:
    """The folder's data; made from this machine's text if they are not there yet."""
    path = folder / "corpus.safetensors"
    if not path.exists():
        say("reading the training text …")
        packages = find_packages(say=say)
        docs = list(documents(packages=packages))
        write_text(folder / "training_files.json", file_list_text(file_list(docs), origins(docs, packages)))
        if not (folder / "tokenizer.json").exists():
            say("learning the tokenizer …")
            learn_tokenizer(docs, BASELINE.make_recipe().model_config().vocab_size).save(folder)
        say("encoding …")
        tokenizer = Tokenizer.load(folder)
        _save_corpus(path, Corpus.build(docs, tokenizer.encode, tokenizer.end_ids[0]))
    tokenizer = Tokenizer.load(folder)
    return Data(tokenizer, _load_corpus(path), held_out(tokenizer, rows))


def _save_corpus(path: Path, corpus: Corpus) -> None:
    unfinished = path.with_suffix(".tmp")
    parts = {f"{name}.{part}": array for name, s in corpus.streams.items() for part, array in s._asdict().items()}
    write_tensors(unfinished, parts)
    os.replace(unfinished, path)


def _load_corpus(path: Path) -> Corpus:
    from safetensors.numpy import load_file

    arrays = load_file(path)
    names = sorted({name.rpartition(".")[0] for name in arrays})
    return Corpus({name: TokenStream(arrays[f"{name}.tokens"], arrays[f"{name}.starts"]) for name in names})


# -- equal time --------------------------------------------------------------------------------------------------

TIMED = 12  # steps of each optimiser


def muon_over_adamw(folder: Path, data: Data, ops: Any, say: Say = print) -> dict[str, float]:
    """Seconds of a step with each optimiser and their ratio; measured once for a folder, in turns, so that what else
    the machine does befalls both."""
    path = folder / "timing.json"
    if not path.exists():
        say("timing steps with Muon and AdamW …")
        variants = {name: VARIANTS[name] for name in ("baseline", "adamw")}
        recipes = {name: variant.make_recipe() for name, variant in variants.items()}
        models = {name: data.model(variants[name], recipe) for name, recipe in recipes.items()}
        states = {name: start(models[name], recipe) for name, recipe in recipes.items()}
        batch, seconds = data.batches(recipes["baseline"]).batch(0), {name: list[float]() for name in variants}
        for _ in range(TIMED + 2):  # the first ones compile
            for name in variants:
                began = time.perf_counter()
                with ops.one_thread_each():
                    states[name], _ = train_step(states[name], batch, models[name], recipes[name], ops)
                seconds[name].append(time.perf_counter() - began)
        muon, adamw = (statistics.median(seconds[name][2:]) for name in variants)
        found = {"muon": muon, "adamw": adamw, "ratio": round(muon / adamw, 3), "load_average": load_average()}
        write_text(path, json.dumps(found) + "\n")
    return json.loads(path.read_text("utf-8"))


def load_average() -> float:
    """Of the last minute, this process included; 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


# -- one run -----------------------------------------------------------------------------------------------------


class Timed:
    """The batches, and how long each step took once its batch was made."""

    def __init__(self, batches: Batches):
        self._batches, self._began = batches, 0.0
        self.seconds: list[float] = []

    def batch(self, step: int) -> Batch:
        if self._began:
            self.seconds.append(time.perf_counter() - self._began)
        made = self._batches.batch(step)
        self._began = time.perf_counter()
        return made


def run_one(folder: Path, variant: Variant, recipe: Recipe, data: Data, ops: Any, threads: int) -> Result:
    """Train one model, from its newest checkpoint if there is one, and write its result. `threads` are those of `ops`,
    to be noted."""
    run, timed = folder / "runs" / f"{variant.name}-{recipe.seed}", Timed(data.batches(recipe))
    model, diverged = data.model(variant, recipe), None
    try:
        train(model, recipe, timed, run, _observer(timed, data, ops, threads), ops=ops)
    except DivergedError as error:
        diverged = str(error).partition(";")[0]
    result = _result(variant, recipe, model.config, read_metrics(run), diverged)
    result_path(folder, variant, recipe.seed).parent.mkdir(exist_ok=True)
    write_text(result_path(folder, variant, recipe.seed), json.dumps(result, indent=1) + "\n")
    _remove_checkpoints(run)
    return result


def _remove_checkpoints(run: Path) -> None:
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def _observer(timed: Timed, data: Data, ops: Any, threads: int) -> Observe:
    def observe(model: Model, step: int) -> dict[str, float]:
        found = {name: round(value, 5) for name, value in figures(model, data.held_out, ops).items()}
        seconds, timed.seconds = timed.seconds, []
        spent = {"seconds": round(statistics.median(seconds), 4)} if seconds else {}
        return {**found, **spent, "load_average": round(load_average(), 2), "threads": threads}

    return observe


def _result(
    variant: Variant, recipe: Recipe, config: Config, metrics: list[dict[str, Any]], diverged: str | None
) -> Result:
    curve = [line for line in metrics if "code_loss" in line]
    counts = config.count_parameters()
    return {
        "name": variant.name,
        "seed": recipe.seed,
        "steps": recipe.steps,
        "tokens": recipe.tokens,
        "rate": recipe.stages[0].learning_rate,
        "parameters": {"total": counts.total, "active": counts.active},
        "cache_bytes": config.kv_bytes_per_token(),
        "figures": {} if diverged else curve[-1],
        "diverged": diverged,
        "seconds": statistics.median([look["seconds"] for look in curve if "seconds" in look] or [0.0]),
        "load_average": float(np.mean([look["load_average"] for look in curve] or [0.0])),
        "threads": curve[-1]["threads"] if curve else None,
        "versions": {name: version(name) for name in ("numpy", "scipy", "numba")},
        "curve": curve,
        "recipe": recipe.to_toml(),
        "config": config.to_dict(),
    }


# -- all runs ----------------------------------------------------------------------------------------------------


def result_path(folder: Path, variant: Variant, seed: int) -> Path:
    return folder / "results" / f"{variant.name}-{seed}.json"


def read_results(folder: Path) -> dict[tuple[str, int], Result]:
    """Every finished run, by name and seed."""
    found: dict[tuple[str, int], Result] = {}
    for path in sorted((folder / "results").glob("*.json")):
        try:
            result = json.loads(path.read_text("utf-8"))
            if path.name != f"{result['name']}-{result['seed']}.json" or len(result) < 3:
                raise ValueError("it is another run's, or empty")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not the result of a run ({error!r}); remove it, and it is made again") from error
        found[result["name"], result["seed"]] = result
    return found


def run_all(
    folder: Path,
    variants: Iterable[Variant],
    seeds: int,
    steps: int,
    minutes: float | None = None,
    threads: int | None = None,
    say: Say = print,
    data: Data | None = None,
) -> None:
    """What is not finished yet, seed by seed, so that every claim has an answer early. No run begins after so many
    `minutes`. Raises ValueError for a folder whose results are of other settings."""
    from minglm.fast.team import thread_count

    folder.mkdir(parents=True, exist_ok=True)
    began, data = time.monotonic(), data or prepare(folder, say)
    count = thread_count(threads)
    ops = operations(BASELINE.make_recipe(), count)
    timing = muon_over_adamw(folder, data, ops, say)
    planned = [(v, v.make_recipe(steps, seed, timing["ratio"])) for seed in range(seeds) for v in variants
               if seed < (v.seeds or seeds)]  # fmt: skip
    results = read_results(folder)
    for variant, recipe in planned:
        _check_same(results.get((variant.name, recipe.seed)), recipe)
    for name, seed in results:  # where a process was killed between result and tidying
        _remove_checkpoints(folder / "runs" / f"{name}-{seed}")
    left = [(variant, recipe) for variant, recipe in planned if (variant.name, recipe.seed) not in results]
    about = 1.15 * timing["muon"] * steps / 60  # batches, looks and saving take the rest
    say(f"{len(planned)} runs of {steps} steps, {len(planned) - len(left)} finished; about {about:.1f} minutes each "
        f"and {about * len(left):.0f} in all")  # fmt: skip
    for number, (variant, recipe) in enumerate(left, start=1):
        if minutes is not None and time.monotonic() - began > 60 * minutes:
            say(f"{minutes:g} minutes are over, {len(left) - number + 1} runs are left: the same command goes on")
            return
        say(f"{number} of {len(left)}: {variant.name}, seed {recipe.seed}")
        result = run_one(folder, variant, recipe, data, variant.ops(ops), count)
        say(f"  {result['diverged'] or 'loss {loss:.4f}'.format(**result['figures'])}")


def _check_same(result: Result | None, recipe: Recipe) -> None:
    if result and result["recipe"] != recipe.to_toml():
        raise ValueError(
            f"the result of {result['name']}, seed {result['seed']}, is of another recipe (it has {result['steps']} "
            f"steps, this one {recipe.steps}): give another --folder, or remove the result and the run"
        )
