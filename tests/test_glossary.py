"""The glossary: the page is in step with its source, its names exist, and a term is found by any of its names."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from minglm.config import Config
from minglm.look.glossary import KINDS, find, renew, terms
from minglm.look.taps import AXES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "glossary.md"


def test_the_page_is_in_step_with_its_source():
    page = PAGE.read_text("utf-8")
    assert renew(page) == page, "run python -m minglm.look.glossary docs/glossary.md"
    changed = page.replace("| router | 路由器 |", "| router | 路由 |")
    assert changed != page == renew(changed)
    with pytest.raises(ValueError, match=re.escape("no <!-- glossary.toml: axis -->")):
        renew("# Glossary\n")


def test_terms_are_whole_and_none_comes_twice():
    assert {term.kind for term in terms()} == set(KINDS)
    for term in terms():
        assert term.english
        assert term.meaning
        assert bool(term.symbol) == (term.kind == "axis")
        assert "|" not in "".join(term), "a bar would end a cell"
        assert term.chinese or term.kind == "here" or term.symbol == "n", term.english
    names = [term.english for term in terms()] + [term.symbol for term in terms() if term.symbol]
    assert len(set(names)) == len(names)


def test_axis_letters_are_those_of_the_taps_and_name_config_fields():
    letters = {term.symbol: term for term in terms() if term.symbol}
    assert set(AXES) <= set(letters)
    known = {f.name for f in fields(Config)} | set(dir(Config))
    assert [term.code for term in letters.values() if term.code and term.code not in known] == []


def test_names_in_code_are_in_the_code():
    files = [path for path in (ROOT / "minglm").rglob("*.py") if path.name != "glossary.py"]
    code = "\n".join(path.read_text("utf-8") for path in files) + " ".join(path.name for path in files)
    for term in terms():
        for name in re.findall(r"\w+", term.code.replace(".py", "")):
            assert re.search(rf"\w{name}\b" if name[0] == "_" else rf"\b{name}\b", code), (term.english, name)


def test_found_by_letter_word_chinese_and_code():
    router = find("Router")
    assert router.chinese == "路由器"
    assert find("路由器") == find("router") == router
    assert find("e_score_correction_bias") == find("selection bias")
    assert [find(letter).english for letter in "Dd"] == ["hidden size", "head size"]
    assert find("max_vio").english == "MaxVio"
    assert find("") is find("phlogiston") is None
