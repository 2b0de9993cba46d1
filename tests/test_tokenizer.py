"""The tokenizer: GLM's ids and cuts, text that must stay text, streaming, files."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.text.tokenizer import ADDED_TOKENS, Tokenizer, train_tokenizer

TEXTS = [
    "the cat sat on the mat and the dog sat on the log. " * 5,
    "Ten times ten is 100; 1234 + 4321 = 5555. The year 2024 came after 2023.\n\n" * 5,
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))  # don't\r\n\tend" * 5,
    "你好，世界。你好，朋友。 Grüße aus Köln! 😀😀👍🏽 " * 5,
    "please answer /nothink or a/nothink and /nothinking <think> hmm </think> <|user|> " * 5,
]
SIZE = 420
BASE = SIZE - 36
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
FRAGMENT = st.one_of(TEXT, st.sampled_from([*ADDED_TOKENS, "<|user", "|>", "<think", "/noth", "ink", "\n", " "]))
TAGGED = st.lists(FRAGMENT, max_size=8).map("".join)
quick = settings(deadline=None, max_examples=100)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, SIZE)


# Vocabulary


def test_size_is_exact_and_all_bytes_are_base_ids(tokenizer):
    assert len(tokenizer) == SIZE
    data = b"".join(tokenizer.token_bytes(i) for i in range(256))
    assert sorted(data) == list(range(256))


def test_added_tokens_follow_the_base_in_glms_order(tokenizer):
    assert [tokenizer.id(token) for token in ADDED_TOKENS] == list(range(BASE, SIZE))
    assert ADDED_TOKENS[2] == "[gMASK]"
    assert ADDED_TOKENS[4] == "<sop>"
    assert ADDED_TOKENS[21:23] == ("<think>", "</think>")  # 151350 and 151351 in GLM-4.5
    assert ADDED_TOKENS[31] == "/nothink"
    assert len(ADDED_TOKENS) == 36


def test_only_the_first_18_added_tokens_are_special(tokenizer):
    assert tokenizer.special_ids == set(range(BASE, BASE + 18))
    flags = [token["special"] for token in json.loads(tokenizer.library.to_str())["added_tokens"]]
    assert flags == [True] * 18 + [False] * 18


def test_every_end_token_ends_an_answer(tokenizer):
    assert tokenizer.end_ids == (BASE, BASE + 7, BASE + 9)


def test_added_text_is_not_learned(tokenizer):
    # "/nothink" is one piece: learned as a base token it would take the added token's place
    assert tokenizer.encode("/nothink") == [BASE + 31]
    assert tokenizer.library.get_vocab_size(with_added_tokens=False) == BASE


# Cuts


def test_digits_one_by_one_by_default_and_by_three_as_glm(tokenizer):
    assert [tokenizer.token(i) for i in tokenizer.encode("2024")] == ["2", "0", "2", "4"]
    by_three = train_tokenizer(["1234 1234 1234 1234"], 294, digits=3)
    assert [by_three.token(i) for i in by_three.encode("1234")] == ["123", "4"]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("the cat's", ["the", " cat", "'s"]),
        ("WE'LL'Sx", ["WE", "'LL", "'S", "x"]),
        ("a.b != c\n\n", ["a", ".b", " !=", " c", "\n\n"]),
        ("x   y", ["x", "  ", " y"]),
        ("a \n b", ["a", " \n", " b"]),
        ("12ab", ["1", "2", "ab"]),
        ("你好，世界", ["你好", "，世界"]),
    ],
)
def test_text_is_cut_as_glm_cuts_it(tokenizer, text, pieces):
    cut = tokenizer.library.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cut] == pieces


def test_no_prefix_space_and_whole_pieces_first(tokenizer):
    assert tokenizer.decode(tokenizer.encode("the")[:1])[0] == "t"
    content = json.loads(tokenizer.library.to_str())
    assert content["model"]["ignore_merges"] is True
    assert content["normalizer"] is None
    assert content["post_processor"] is None


# Round trips


@quick
@given(TAGGED)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@quick
@given(TAGGED)
def test_plain_text_comes_back_without_any_added_id(tokenizer, text):
    ids = tokenizer.encode(text, special=False)
    assert tokenizer.decode(ids) == text
    assert all(i < BASE for i in ids)


@pytest.mark.parametrize("tag", ADDED_TOKENS)
def test_tag_is_one_id_only_when_special(tokenizer, tag):
    assert tokenizer.encode(tag) == [tokenizer.id(tag)]
    assert len(tokenizer.encode(tag, special=False)) > 1


def test_skip_special_keeps_think_and_tool_tags(tokenizer):
    ids = tokenizer.encode("[gMASK]<sop><|user|>\nHi<think>so</think><tool_call>")
    assert tokenizer.decode(ids, skip_special=True) == "\nHi<think>so</think><tool_call>"


# Single ids


def test_every_token_is_found_again_by_its_shown_text(tokenizer):
    assert [tokenizer.id(tokenizer.token(i)) for i in range(SIZE)] == list(range(SIZE))


def test_shown_text_is_readable(tokenizer):
    assert tokenizer.token(tokenizer.id(" the")) == "␣the"
    assert tokenizer.token(tokenizer.id("\n")) == "↵"
    assert "".join(tokenizer.token(i) for i in tokenizer.encode("龙")) == "<0xE9><0xBE><0x99>"
    assert tokenizer.id("␣the") == tokenizer.id(" the")


def test_unknown_token_names_near_ones(tokenizer):
    with pytest.raises(ValueError, match=r"no token 'thee' .*near matches: .*'␣the'"):
        tokenizer.id("thee")
    with pytest.raises(ValueError, match="no token"):
        tokenizer.id("Ġthe")  # the library's own spelling of " the" is not its text


@pytest.mark.parametrize(("ids", "says"), [([SIZE], "0 to 419"), ([-1], "id -1"), ([[1]], "flat"), ([1.5], "float")])
def test_wrong_ids_are_refused(tokenizer, ids, says):
    with pytest.raises(ValueError, match=says):
        tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["\ud800", None, b"bytes"])
def test_what_is_not_text_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match="wanted a str"):
        tokenizer.encode(text)


# Streaming


@quick
@given(st.lists(st.integers(0, SIZE - 1) | st.integers(BASE, SIZE - 1), max_size=40), st.booleans())
def test_streamed_pieces_join_to_decode(tokenizer, ids, skip_special):
    stream = tokenizer.stream(skip_special)
    pieces = [stream.feed(i) for i in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip_special)


@quick
@given(TAGGED)
def test_streamed_text_never_breaks_a_character(tokenizer, text):
    stream = tokenizer.stream()
    pieces = [stream.feed(i) for i in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert stream.finish() == ""


def test_streamed_emoji_and_chinese_arrive_whole(tokenizer):
    stream = tokenizer.stream()
    pieces = [stream.feed(i) for i in tokenizer.encode("🦉龙")]
    assert [piece for piece in pieces if piece] == ["🦉", "龙"]
    assert len(pieces) > 2


def test_stream_flushes_a_cut_character_and_starts_afresh(tokenizer):
    stream = tokenizer.stream()
    assert [stream.feed(i) for i in tokenizer.encode("🦉")[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"
    assert stream.feed(tokenizer.id("a")) == "a"


# Files and training


def test_saved_tokenizer_loads_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    loaded = Tokenizer.load(tmp_path / "new")
    assert loaded.library.to_str() == tokenizer.library.to_str()
    assert loaded.config == tokenizer.config
    assert loaded.end_ids == tokenizer.end_ids
    assert loaded.encode("<|user|> 龙", special=False) == tokenizer.encode("<|user|> 龙", special=False)


def test_config_is_optional_and_kept(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "你"}', encoding="utf-8")
    Tokenizer.load(tmp_path).save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").config == {"chat_template": "你"}
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path).config == {}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_damaged_file_is_named(tokenizer, tmp_path, name, content):
    tokenizer.save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s){name}.*Copy the file again"):
        Tokenizer.load(tmp_path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json.*train_tokenizer"):
        Tokenizer.load(tmp_path)


def test_other_kinds_of_tokenizer_are_refused(tokenizer, tmp_path):
    content = json.loads(tokenizer.library.to_str())
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="byte-level BPE"):
        Tokenizer.load(tmp_path)


def test_added_token_inside_the_base_vocabulary_cannot_slip_through(tokenizer, tmp_path):
    # as in a foreign file that gives "/nothink" a base id too
    content = json.loads(tokenizer.library.to_str())
    content["model"]["vocab"]["/nothink"] = BASE + 31
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="cannot keep it out"):
        Tokenizer.load(tmp_path).encode("/nothink", special=False)


def test_training_is_repeatable_across_processes_and_threads(tokenizer):
    script = (
        "import sys; from minglm.text.tokenizer import train_tokenizer; import hashlib\n"
        f"text = train_tokenizer({TEXTS!r}, {SIZE}).library.to_str()\n"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    digest = hashlib.sha256(tokenizer.library.to_str().encode()).hexdigest()
    env = os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest


@pytest.mark.parametrize(
    ("texts", "size", "digits", "says"),
    [
        (["abc"], 291, 1, "the smallest is 292"),
        (["aaa"], 400, 1, "fill only 294 of 400 ids"),
        ("one str", 300, 1, r"Try \[text\]"),
        (["abc"], 300, 0, "digits is 0"),
    ],
)
def test_training_that_cannot_work_says_so(texts, size, digits, says):
    with pytest.raises(ValueError, match=says):
        train_tokenizer(texts, size, digits)


def test_bytes_alone_make_a_tokenizer():
    tokenizer = train_tokenizer([], 292)
    assert tokenizer.encode("Hi<sop>") == [tokenizer.id("H"), tokenizer.id("i"), 256 + 4]


def test_import_is_light():
    script = "import sys, minglm.text; print(sorted({'tokenizers', 'jinja2'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_truncation_and_padding_in_the_file_are_not_obeyed(tmp_path):
    """Training scripts leave them behind; transformers does not follow them either."""
    tokenizer = train_tokenizer([], 292)
    wanted = tokenizer.encode("def f(x)")
    tokenizer.library.enable_truncation(3)
    tokenizer.library.enable_padding(length=50)
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode("def f(x)") == wanted


def test_a_save_that_dies_leaves_the_old_tokenizer(tmp_path, monkeypatch):
    train_tokenizer([], 292).save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        train_tokenizer(["abab"], 293).save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
