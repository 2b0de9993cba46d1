"""The teacher's kit: solutions pass, the plan counts right, rubrics are complete, figures and data are made."""

import csv
import re
import runpy
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from minglm.learn import check
from minglm.learn.exercises import EXERCISES, WEEKS

KIT = Path(__file__).parents[1] / "docs/teaching"


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_passes(name):
    spec = spec_from_file_location(name, KIT / f"solutions/{name}.py")
    solution = module_from_spec(spec)
    spec.loader.exec_module(solution)
    report = check(name, getattr(solution, name))
    assert report.passed, report


SLIPS = [  # in the solutions, which are written otherwise than the references: what is changed, and what is said of it
    ("rope", "-2 * i / r", "-i / r", "exp1"),
    ("rope", "a * np.cos(angle) - b", "a * np.cos(angle) + b", "noneg"),
    ("rope", "positions * theta", "np.arange(len(x)) * theta", "restart0"),
    ("rope", "y = x.copy()", "y = np.zeros_like(x)", "zero_rest"),
    ("rope", "[:, None].astype", "[None, :].astype", "head_axis"),
    ("kv_cache", "start + np.arange(len(q))", "np.arange(len(q))", "restart_positions top_left"),
    ("kv_cache", "rotate(k, positions)", "rotate(k, np.arange(len(k)))", "query_only"),
    ("kv_cache", "rotate(k, positions)", "k", "unrotated_cache"),
    ("kv_cache", "if layer in cache:", "if False:", ""),  # and a mask that fits no case
    ("kv_cache", "old_k[:start], k]), np.concatenate([old_v[:start]", "old_k, k]), np.concatenate([old_v",
     "stale_after_truncate"),
    ("kv_cache", "> positions[:, None]", "> np.arange(T)[:, None]", "top_left"),
    ("kv_cache", "> positions[:, None]", "> (S if start else positions[:, None])", "no_mask_after_first"),
    ("moe", "y[tokens] += weights[tokens, ranks, None] * expert(x[tokens])", "y[tokens] += expert(x[tokens])", "ones"),
    ("moe", "weights[tokens, ranks, None] * expert(x[tokens])", "expert(weights[tokens, ranks, None] * x[tokens])",
     "weight_on_input"),
    ("moe", "shared(x)", "np.zeros_like(x)", "no_shared"),
    ("moe", "shared(x)", "x + shared(x)", "add_residual"),
    ("moe", "indices == e", "indices[:, :1] == e", "top1"),
    ("moe", "enumerate(experts)", "zip(np.unique(indices), experts)", "shifted_experts"),
    ("load", "indices[valid]", "indices", "padding"),
    ("load", "indices[valid]", "indices[valid, 0]", "top1"),
    ("load", "ratio.max() - 1", "ratio.max()", "ratio"),
    ("load", "ratio.max() - 1", "abs(ratio - 1).max()", "abs_max_vio"),
    ("load", "ratio.std()", "ratio.var()", "variance"),
    ("load", "counts[counts > 0] / counts.sum()", "counts / counts.sum()", "zero_log_zero"),
    ("load", "np.log(shares)", "np.log2(shares)", "bits"),
    ("mtp_input", "embedding[ids[1:]]", "embedding[ids[:-1]]", "no_shift"),
    ("mtp_input", "[words, states]", "[states, words]", "concat_swapped"),
    ("mtp_input", "rms_norm(rms_norm(stream, norm), hnorm)", "rms_norm(stream, hnorm)", "pre_norm_hidden"),
    ("mtp_input", "[:-1]  #", "[1:]  #", "hidden_shifted"),
    ("mtp_input", "np.append(ids[2:], -100)", "ids[1:]", "wrong_target"),
    ("verify", "np.maximum(p[i] - q[i], 0)", "p[i]", "resample_p"),
    ("verify", "np.maximum(p[i] - q[i], 0)", "abs(p[i] - q[i])", "abs_residual"),
    ("verify", "return [*kept, draw(rest / rest.sum())]", "return kept", "no_replacement"),
    ("verify", "return [*kept, draw(p[len(drafts)])]", "return kept", "no_bonus"),
    ("verify", "u[i] * q[i][token]", "u[i]", "accept_p"),
    ("router", "-biased.reshape(scores.shape)", "-(scores + bias)", "no_groups"),
    ("router", "[:, :, -2:]", "[:, :, -1:]", "group_max"),
    ("router", "-np.inf", "0", "group_fill_zero"),
    ("router", "weights * scale", "-np.sort(-weights, axis=-1) * scale", "unpaired"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "right", "slip", "mistake"), SLIPS, ids=[f"{n}-{m}-{s}" for n, _, s, m in SLIPS])
def test_a_slip_in_a_solution_is_named(name, right, slip, mistake):
    """Code that the references know nothing of; "" where the slip is none of the list: then nothing is named."""
    text = (KIT / f"solutions/{name}.py").read_text("utf-8")
    assert right in text
    known = {}
    exec(text.replace(right, slip), known)
    report = check(name, known[name])
    assert not report.passed
    assert report.mistakes == tuple(mistake.split()), report


def test_the_plan_has_every_exercise_and_counts_its_minutes():
    text = (KIT / "index.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d) \|([^|]*)\|([^|]*)\| (\d+) \|", text, re.M)
    assert [int(week) for week, *_ in rows] == list(WEEKS)
    for week, _, written, minutes in rows:
        names = re.findall(r"`(\w+)`", written)
        assert names == list(WEEKS[int(week)])
        hunt = 60 if "bug hunt" in written else 0
        assert int(minutes) == sum(EXERCISES[name].minutes for name in names) + hunt


def test_every_exercise_has_points_a_question_and_a_model_answer():
    text = "".join((KIT / f"rubrics-{part}.md").read_text("utf-8") for part in (1, 2))
    sections = {part.split("\n")[0].strip(): part for part in text.split("\n### ")[1:]}
    assert list(sections) == list(EXERCISES)
    for name, section in sections.items():
        assert f"{len(EXERCISES[name].points()) + 1} points" in section, name
        assert "**Question.**" in section
        assert "**Model answer.**" in section


def test_figures_and_data_are_those_that_the_command_makes(tmp_path):
    runpy.run_path(str(KIT / "make.py"))["main"](tmp_path)
    for part in ("figures", "data"):
        assert sorted(p.name for p in (tmp_path / part).iterdir()) == sorted(p.name for p in (KIT / part).iterdir())
    for path in (tmp_path / "data").iterdir():
        assert path.read_text("utf-8") == (KIT / "data" / path.name).read_text("utf-8")
    with open(KIT / "data/load-over-training.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    of_one = [
        float(r["relative_to_uniform"]) for r in rows if (r["model"], r["step"], r["layer"]) == ("glm-tiny", "1", "1")
    ]
    assert sum(of_one) == pytest.approx(16, abs=1e-3)
