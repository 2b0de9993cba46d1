"""The checks as tests, one for each point of each exercise: `pytest notebooks/exercises -k router-`."""

from importlib import import_module

import pytest

from minglm.learn import check
from minglm.learn.check import DTYPE
from minglm.learn.exercises import EXERCISES

HERE = __file__.rsplit("test_exercises.py", 1)[0]
POINTS = [(name, point) for name, task in EXERCISES.items() for point in (*task.points(), DTYPE)]


@pytest.mark.parametrize(("name", "point"), POINTS, ids=[f"{name}-{point}" for name, point in POINTS])
def test_point(name, point, monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    report = check(name, getattr(import_module(name), name))
    passed = {each.name: each.passed for each in report.points}
    if not passed[point]:
        pytest.fail("\n".join([report.headline, *report.lines]), pytrace=False)
