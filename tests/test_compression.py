"""Bytes per token: counted by hand on small vocabularies, and the table that the command prints."""

import re

import pytest

from minglm.data.documents import balanced_sample
from minglm.data.heldout import heldout_documents, make_document
from minglm.data.tasks import is_heldout
from minglm.evaluate import compression
from minglm.evaluate.compression import (
    bytes_per_token,
    compression_table,
    heldout_samples,
    main,
    markdown,
    number_tokens,
)
from minglm.text.tokenizer import train_tokenizer

WORDS = ["the cat and the hat, 3847 3847 3847 " * 20, "the dog and the log, 384 times " * 20]


def test_bytes_per_token_by_hand():
    tokenizer = train_tokenizer(["abab abab"], 293)  # one merge: ab
    assert bytes_per_token(tokenizer, ["abab"]) == 2.0
    assert bytes_per_token(tokenizer, ["abab", "c"]) == 5 / 3
    assert bytes_per_token(tokenizer, ["中"]) == 1.0  # three bytes, three tokens
    assert bytes_per_token(tokenizer, ["<|user|>"]) == 1.0  # text that looks like a tag is text
    for nothing in ([], [""]):
        with pytest.raises(ValueError, match="need some text"):
            bytes_per_token(tokenizer, nothing)


def test_number_tokens_are_groups_of_digits_alone():
    assert number_tokens(train_tokenizer(["384 384 a1 a1"], 295, digits=3)) == 2  # 38 or 84, and 384; not " a"
    assert number_tokens(train_tokenizer(WORDS, 300, digits=1)) == 0


def test_table_has_a_row_per_vocabulary_after_the_bytes():
    rows = compression_table(WORDS, {"same": WORDS, "other": ["中文"]}, [292, 310], (1, 3), hidden_size=10)
    assert [(row.vocab_size, row.digits) for row in rows] == [(256, 1), (292, 1), (310, 1), (292, 3), (310, 3)]
    plain, smallest, single, _, grouped = rows
    assert plain.bytes_per_token == smallest.bytes_per_token == {"same": 1.0, "other": 1.0}  # 36 tags, no merge
    assert plain.parameters == 2 * 256 * 10
    assert smallest.parameters == 2 * 292 * 10
    assert single.bytes_per_token["same"] > 1.9
    assert single.bytes_per_token["other"] == 1.0
    assert single.example == "3|8|4|7"
    assert single.number_tokens == 0 < grouped.number_tokens
    assert grouped.example == "384|7"


def test_table_is_markdown():
    lines = markdown(compression_table(WORDS, {"same": WORDS}, [310], [3])).splitlines()
    assert lines[0] == "| vocabulary | digits | same | number tokens | 3847 | embedding + head |"
    assert lines[2] == "| 256 (bytes) | 1 | 1.00 | 0 | 3·8·4·7 | 98,304 |"
    assert "| 384·7 | 119,040 |" in lines[3]
    assert {line.count("|") for line in lines} == {7}


def test_samples_are_held_out():
    samples = heldout_samples()
    assert samples["code"] == [document.text for document in heldout_documents("code")]
    assert all(samples.values())
    sums = [found[1] for text in samples["tasks"] if (found := re.match(r"(\d+\+\d+)[=:]", text))]
    assert len(sums) > 50
    assert all(is_heldout("addition", question) for question in sums)


def test_command_prints_and_saves_the_table(tmp_path, monkeypatch, capsys):
    docs = [make_document("prose", str(i), text) for i, text in enumerate(WORDS)]
    monkeypatch.setattr(compression, "documents", lambda: docs)
    monkeypatch.setattr(compression, "VOCAB_SIZES", (300,))
    main(["--tasks", "5", "--save", str(tmp_path / "table.md")])
    printed = capsys.readouterr().out
    assert printed.splitlines()[3].startswith("| 300 | 1 | ")
    assert (tmp_path / "table.md").read_text("utf-8") == printed


def test_balanced_sample_takes_as_much_of_each_domain_in_any_order():
    docs = [make_document(domain, str(i), f"{i:08d}") for domain in ("code", "prose") for i in range(50)]
    docs = [d for d in docs if d.domain == "code" or int(d.name) < 5]
    sample = balanced_sample(docs, 80)
    assert [sum(d.domain == domain for d in sample) for domain in ("code", "prose")] == [10, 5]
    assert balanced_sample(docs[::-1], 80) == sample
    assert sorted(d.name for d in sample if d.domain == "code") != [str(i) for i in range(10)]
