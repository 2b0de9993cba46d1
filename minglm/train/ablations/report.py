"""docs/ablations.md: the figures of the finished runs, and verdicts that follow from them by one rule."""

import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from minglm.formats.files import write_text
from minglm.look.curves import Panel, plot_seeds
from minglm.train.ablations.claims import BASELINE, CLAIMS, MEASURES, VARIANTS, Claim, Measure, Variant
from minglm.train.ablations.run import Result, read_results

Results = dict[tuple[str, int], Result]

CLEAR, PERHAPS = 4.3, 2.0  # standard errors; for three seeds |t| is above by chance in 5 % and 18 % of all cases


def verdict(differences: list[float], measure: Measure) -> str:
    """By the rule at the top of the page."""
    if len(differences) < 3:
        return "not run" if not differences else "too few seeds"
    mean, error = _mean_and_error(differences)
    same_sign = all(d > 0 for d in differences) or all(d < 0 for d in differences)
    if not same_sign or abs(mean) <= PERHAPS * error:
        return "no difference seen"
    word = measure.names[0 if (mean < 0) == measure.lower_is_better else 1]
    return word if abs(mean) > CLEAR * error else f"perhaps {word}"


def paired(results: Results, name: str, key: str) -> list[float]:
    """Model minus baseline of the same seed, for every seed that both have finished."""
    pairs = [(r, results.get(("baseline", seed))) for (n, seed), r in sorted(results.items()) if n == name]
    return [r["figures"][key] - base["figures"][key] for r, base in pairs if base and r["figures"] and base["figures"]]


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


# -- the page ----------------------------------------------------------------------------------------------------


def write_report(folder: Path, page: Path) -> None:
    """Write the page and its pictures; what stands in the blocks for commentary on an older page is kept. Raises
    ValueError if no run is finished, or if a comment belongs to no claim."""
    results = read_results(folder)
    if not results:
        raise ValueError(f"{folder}: no finished run to report; see python -m minglm.train.ablations --help")
    comments = read_comments(page.read_text("utf-8") if page.exists() else "")
    if strange := sorted(comments.keys() - {"all", *(claim.key for claim in CLAIMS)}):
        raise ValueError(f"{page}: there is commentary on {', '.join(strange)}, which is no claim; move it first")
    pictures = page.parent / "images" / "ablations"
    pictures.mkdir(parents=True, exist_ok=True)
    for claim in CLAIMS:
        if figure := picture(claim, results):
            figure.savefig(pictures / f"{claim.key}.png", dpi=80)
    write_text(page, page_text(results, comments))


def page_text(results: Results, comments: dict[str, str]) -> str:
    sections = [_section(claim, results, comments.get(claim.key, "")) for claim in CLAIMS]
    return "\n\n".join([_head(results, comments.get("all", "")), *sections]) + "\n"


COMMENT = re.compile(r"<!-- by hand: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def read_comments(text: str) -> dict[str, str]:
    """The commentary of a page, by claim."""
    return {key: body for key, body in COMMENT.findall(text) if body.strip()}


def _comment(key: str, body: str) -> str:
    return f"<!-- by hand: {key} -->\n{body}<!-- end -->"


def _head(results: Results, comment: str) -> str:
    longest = max(results.values(), key=lambda r: r["steps"] * (r["name"] == "baseline"))
    counts = longest["parameters"]
    rows = sum(len(paired(results, name, key)) >= 3 for c in CLAIMS for name in c.variants for key in c.measures)
    seeds = sorted({seed for _, seed in results})
    paragraphs = [
        "# Ablations",
        "What GLM-4.5's authors say about their choices, tried on a model of "
        f"{counts['total'] / 1e6:.1f} million parameters ({counts['active'] / 1e6:.2f} active): one baseline with "
        f"every feature of GLM-4.5, one change at a time, {longest['tokens'] / 1e6:.2f} million tokens a run "
        f"({longest['steps']} steps), seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}. A seed decides "
        "fresh weights and the order of the data; each model is compared with the baseline of its own seed. Written by "
        f"`python -m minglm.train.ablations --report` from {len(results)} finished runs; `make ablations` makes them. "
        "The settings are in `minglm/train/ablations/claims.py`.",
        "**Loss**: nats per token of the next-token loss on held-out code, prose and tasks, the mean of the three. "
        "**MaxVio**: of the worst layer, over all of that text; 0 is even. **Verdicts** follow a rule: *better* or "
        "*worse* if all paired differences have one sign and their mean exceeds "
        f"{CLEAR:g} of its standard errors, *perhaps* so if it exceeds {PERHAPS:g}; else *no difference seen*. With "
        "three seeds and no effect at all, that would say “perhaps” or more in 18 % of cases, and more than “perhaps” "
        f"in 5 %: of the {rows} rows with a verdict here {0.18 * rows:.1f} and {0.05 * rows:.1f}.",
        "**Limits**: a tiny model, few tokens, one batch size, one learning rate for all that do not say otherwise. "
        "What shows here need not hold at 355 billion parameters, and what does not show here may be there. "
        + _busy(results),
        _comment("all", comment),
    ]
    return "\n\n".join(paragraphs)


def _busy(results: Results) -> str:
    busy = [r for r in results.values() if r["threads"] and r["load_average"] > r["threads"] + 1]
    if not busy:
        return "Seconds per step were measured on a machine with nothing else to do."
    most, threads = max(r["load_average"] for r in busy), busy[0]["threads"]
    return (
        f"**Careful with seconds per step**: the machine was busy with other work in {len(busy)} of {len(results)} "
        f"runs (mean load up to {most:.1f} on {threads} thread{'s' * (threads > 1)})."
    )


def _section(claim: Claim, results: Results, comment: str) -> str:
    seeds = sorted({seed for _, seed in results})
    header = f"| measure | model | {' | '.join(f'seed {s}' for s in seeds)} | mean ± sd | to the baseline | verdict |"
    rows = [
        _row(MEASURES[key], VARIANTS[name], results, seeds)
        for key in claim.measures
        for name in ("baseline", *claim.variants)
    ]
    facts = _facts(claim, results)
    drawn = _panels(claim, results)
    parts = [
        f"## {claim.title}",
        f"**Said:** {claim.said}. **Changed:** {claim.change}.{' ' + facts if facts else ''}",
        "\n".join([header, "|" + "---|" * (len(seeds) + 5), *rows]),
        *([f"![{claim.title}: curves](images/ablations/{claim.key}.png)"] if drawn else []),
        _comment(claim.key, comment),
    ]
    return "\n\n".join(parts)


def _row(measure: Measure, variant: Variant, results: Results, seeds: Iterable[int]) -> str:
    own = [results.get((variant.name, seed)) for seed in seeds]
    values = [r["figures"][measure.key] for r in own if r and r["figures"]]
    digits = measure.digits
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    mean = f"{statistics.fmean(values):.{digits}f}{spread}" if values else "—"
    cells = [measure.label, variant.label, *(_cell(r, measure) for r in own), mean]
    if variant is BASELINE:
        return f"| {' | '.join([*cells, '', ''])} |"
    differences = paired(results, variant.name, measure.key)
    beside = "—"
    if differences:
        mean_difference, error = _mean_and_error(differences)
        beside = f"{mean_difference:+.{digits}f}" + (f" ± {error:.{digits}f}" if len(differences) > 1 else "")
    lost = sum(bool(r and r["diverged"]) for r in own)
    said = f"diverged in {lost} of {sum(r is not None for r in own)}" if lost else verdict(differences, measure)
    return f"| {' | '.join([*cells, beside, said])} |"


def _cell(result: Result | None, measure: Measure) -> str:
    if result is None:
        return "—"
    return "diverged" if result["diverged"] else f"{result['figures'][measure.key]:.{measure.digits}f}"


def _facts(claim: Claim, results: Results) -> str:
    """What is no measure but belongs beside them, for each model that has a finished run."""
    said = []
    for fact in claim.facts:
        found = [
            (name, [r for (n, _), r in sorted(results.items()) if n == name]) for name in ("baseline", *claim.variants)
        ]
        texts = [f"{VARIANTS[name].label}: {_fact(fact, own)}" for name, own in found if own]
        if texts:
            said.append(f"{FACTS[fact]} — {'; '.join(texts)}.")
    return " ".join(said)


FACTS = {
    "parameters": "Million parameters, all and active",
    "cache": "Bytes of keys and values per token (bf16)",
    "seconds": "Seconds per step",
    "steps": "Steps",
    "rate": "Peak learning rate",
}


def _fact(fact: str, own: list[Result]) -> str:
    first: Any = own[0]
    if fact == "parameters":
        return f"{first['parameters']['total'] / 1e6:.3f} and {first['parameters']['active'] / 1e6:.3f}"
    if fact == "cache":
        return f"{first['cache_bytes']:,}"
    if fact == "seconds":
        return f"{statistics.median(r['seconds'] for r in own):.3f}"
    return f"{first[fact]:g}"


# -- pictures ----------------------------------------------------------------------------------------------------


def picture(claim: Claim, results: Results) -> Any:
    """The measures over the run, and the loss's paired difference; None without a finished run."""
    panels = _panels(claim, results)
    return plot_seeds(panels, claim.title) if panels else None


def _panels(claim: Claim, results: Results) -> list[Panel]:
    loss = {name: _curves(results, name, "loss") for name in ("baseline", *claim.variants)}
    names = [name for name, curves in loss.items() if curves]
    if len(names) < 2 or "baseline" not in names:
        return []
    base = loss["baseline"]
    differences = {
        VARIANTS[name].label: [_minus(curve, base[seed]) for seed, curve in loss[name].items() if seed in base]
        for name in names[1:]
    }
    panels = [Panel("held-out loss, nats per token", {VARIANTS[n].label: list(loss[n].values()) for n in names})]
    panels.append(Panel("loss − baseline's, same seed", {n: c for n, c in differences.items() if c}, zero=True))
    for key in claim.measures[1:]:
        others = {VARIANTS[n].label: list(_curves(results, n, key).values()) for n in names}
        panels.append(Panel(MEASURES[key].label, others))
    return panels


def _curves(results: Results, name: str, key: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Seed -> (million tokens, figure), from a tenth of the run on: before that, curves are steep and hide the rest."""
    found = {}
    for (n, seed), result in sorted(results.items()):
        looks = [look for look in result["curve"] if look["step"] + 1 >= result["steps"] / 10]
        if n == name and looks:
            per_step = result["tokens"] / result["steps"] / 1e6
            x, y = zip(*(((look["step"] + 1) * per_step, look[key]) for look in looks), strict=True)
            found[seed] = np.array(x), np.array(y)
    return found


def _minus(curve: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Where both were looked at."""
    at, here, there = np.intersect1d(curve[0].round(6), other[0].round(6), return_indices=True)
    return at, curve[1][here] - other[1][there]


def table_of_models(variants: Iterable[Variant]) -> str:
    """Names, parameters and settings."""
    lines = []
    for variant in variants:
        recipe = variant.make_recipe()
        config = recipe.model_config()
        counts = config.count_parameters()
        lines.append(
            f"{variant.name:12} {counts.total:>10,} parameters, {counts.active:>9,} active, "
            f"{config.flops_per_token(recipe.stages[0].sequence_length // 2) / 1e6:5.2f} MFLOP a token: {variant.label}"
        )
    return "\n".join(lines)
