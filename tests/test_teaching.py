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
