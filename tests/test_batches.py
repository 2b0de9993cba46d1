"""Batches: pieces in rows, packing, shares, and what a recipe's stages make of text, tasks and conversations."""

import json
import re
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.data.batches import (
    IGNORE,
    PADDING,
    Batch,
    Corpus,
    Mixture,
    Piece,
    TextSource,
    _switched,
    best_fit,
    lay_out,
    whole,
)
from minglm.data.calculator import calculate
from minglm.data.chats import (
    CALCULATOR,
    PHRASES,
    SMALL_TALK,
    Chat,
    ChatSource,
    continuation_chat,
    encode_chat,
    spans,
    task_chat,
    tool_chat,
    turns_chat,
)
from minglm.data.documents import load_text_files
from minglm.data.heldout import make_document
from minglm.data.tasks import TASKS, is_heldout, make_train
from minglm.text.answer import parse_answer
from minglm.text.template import ChatTemplate
from minglm.text.tokenizer import Tokenizer, train_tokenizer
from minglm.train.curriculum import DOCUMENT, Curriculum, TaskSource, given_source
from minglm.train.recipe import Recipe, Stage
from minglm.train.run import with_own_data

END = 999
TEMPLATE = ChatTemplate()


class Counting:
    """Pieces of one letter: `base`, `base` + 1, …; the last token of each is never an input."""

    def __init__(self, base: int, length: int):
        self.base, self.length = base, length

    def piece(self, rng, most):
        return whole(self.base + np.arange(self.length))


@cache
def tokenizer() -> Tokenizer:
    """All bytes, and the tags."""
    rng = np.random.default_rng(0)
    texts = ["".join(make_train(TASKS[name], rng).steps for _ in range(50)) for name in ("addition", "sums", "sort")]
    return train_tokenizer([*texts, "the quick brown fox and other words " * 50], 300)


# -- pieces in rows ----------------------------------------------------------------------------------------------


def test_pieces_stand_one_after_the_other_and_the_rest_is_padding():
    first, second = whole([1, 2, 3]), Piece(np.array([7, 8, 9]), np.array([False, False, True]))
    batch = lay_out([[first, second], [second]], 5, END)
    assert batch.ids.tolist() == [[1, 2, 7, 8, END], [7, 8, END, END, END]]
    assert batch.targets.tolist() == [[2, 3, IGNORE, 9, IGNORE], [IGNORE, 9, IGNORE, IGNORE, IGNORE]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, PADDING], [0, 0, PADDING, PADDING, PADDING]]
    cut = lay_out([[first, second]], 3, END)
    assert cut.ids.tolist() == [[1, 2, 7]]
    assert cut.targets.tolist() == [[2, 3, IGNORE]]


@given(st.lists(st.integers(1, 12), max_size=30), st.integers(1, 6), st.integers(3, 12))
@settings(deadline=None)
def test_best_fit_never_overfills_and_leaves_out_only_what_fits_nowhere(lengths, rows, T):
    pieces = [whole(np.arange(n + 1) + 100 * i) for i, n in enumerate(lengths)]
    filled = best_fit(pieces, rows, T)
    used = [sum(p.places for p in row) for row in filled]
    assert len(filled) == rows
    assert max(used, default=0) <= T
    placed = {int(p.ids[0]) for row in filled for p in row}
    left = [p for p in pieces if int(p.ids[0]) not in placed]
    assert sum(map(len, filled)) + len(left) == len(pieces)
    # it could not have been placed even now, when rows only have less room than when it was tried
    assert all(p.places > T - min(used) for p in left)


def test_best_fit_takes_the_row_with_the_least_room():
    sizes = [6, 5, 4, 3, 2]
    filled = best_fit([whole(np.arange(n + 1)) for n in sizes], 2, 10)
    assert [[p.places for p in row] for row in filled] == [[6, 4], [5, 3, 2]]


# -- text --------------------------------------------------------------------------------------------------------


def corpus(*lengths: int):
    texts = ["".join(chr(65 + (i + j) % 26) for j in range(n)) for i, n in enumerate(lengths)]
    documents = [make_document("text", str(i), text) for i, text in enumerate(texts)]
    return Corpus.build(documents, lambda text: list(text.encode()), END).streams["text"], texts


def test_text_is_cut_anywhere_and_never_crosses_a_document():
    stream, texts = corpus(40, 3, 1, 25)
    rng, starts = np.random.default_rng(0), Counter()
    for _ in range(3000):
        piece = TextSource(stream).piece(rng, 11)
        ids = piece.ids.tolist()
        ended = ids[-1] == END
        text = bytes(ids[:-1] if ended else ids).decode()
        assert 2 <= len(ids) <= 11
        assert any(t.endswith(text) if ended else text in t for t in texts)
        assert ended or len(ids) == 11  # cut only because the row is full
        starts[text[:1], len(text)] += 1
        assert piece.counts.all()
    assert len(starts) > 30


def test_aligned_text_comes_in_whole_documents_or_their_chunks():
    stream, texts = corpus(40, 3, 1, 25)
    rng = np.random.default_rng(0)
    wanted = {t + "|" for t in texts if len(t) < 11}
    for t in texts:
        full = t + "|"
        if len(full) > 11:
            wanted |= {full[i : i + 11] for i in range(0, len(full), 11) if len(full) - i >= 2}
    found = set()
    for _ in range(500):
        ids = TextSource(stream, aligned=True).piece(rng, 11).ids.tolist()
        found.add("".join("|" if i == END else chr(i) for i in ids))
    assert wanted <= found
    # a chunk of one token cannot be predicted, so the one before it comes along
    assert all(any(f in t + "|" for t in texts) and len(f) <= 11 for f in found)


# -- mixtures ----------------------------------------------------------------------------------------------------


def mixture(**changes) -> Mixture:
    given = {"weights": {"a": 0.5, "b": 0.3, "c": 0.2}, "sequence_length": 16, "seed": 3, "padding_id": END, **changes}
    return Mixture({"a": Counting(100, 9), "b": Counting(200, 4), "c": Counting(300, 17)}, **given)


@pytest.mark.parametrize("packing", ["truncate", "best-fit"])
def test_a_batch_is_a_pure_function_of_seed_and_step(packing):
    one, two = mixture(packing=packing, switch=0.25), mixture(packing=packing, switch=0.25)
    two.batch(7, 8)
    assert all((a == b).all() for a, b in zip(one.batch(4, 8), two.batch(4, 8), strict=True))
    others = [mixture(packing=packing, seed=4).batch(4, 8), one.batch(5, 8)]
    assert all(any((a != b).any() for a, b in zip(one.batch(4, 8), other, strict=True)) for other in others)


@pytest.mark.parametrize("packing", ["truncate", "best-fit"])
def test_every_target_is_the_next_token_of_its_document(packing):
    for step in range(5):
        ids, targets, segments = mixture(packing=packing).batch(step, 8)
        inside = targets != IGNORE
        assert (targets[inside] == ids[inside] + 1).all()  # pieces count up
        same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0)
        assert (ids[:, 1:][same] == targets[:, :-1][same]).all()
        assert (ids[segments == PADDING] == END).all()
        assert (targets[segments == PADDING] == IGNORE).all()


def test_cut_rows_hold_every_kind_in_its_share():
    counts = Counter()
    for step in range(50):
        kinds = Counter((mixture().batch(step, 10).ids[:, 0] // 100).tolist())
        assert all(abs(kinds[k] - 10 * share) < 1 for k, share in ((1, 0.5), (2, 0.3), (3, 0.2)))
        counts += kinds
    uneven = mixture(weights={"a": 1, "b": 2})
    sums = Counter()
    for step in range(300):
        kinds = Counter((uneven.batch(step, 4).ids[:, 0] // 100).tolist())
        assert kinds[1] in (1, 2)
        sums += kinds
    assert sums[1] / sums.total() == pytest.approx(1 / 3, abs=0.02)


def test_packed_rows_hold_every_kind_in_its_share_of_the_tokens():
    counts, padding = Counter(), []
    for step in range(60):
        ids, _, segments = mixture(packing="best-fit").batch(step, 8)
        counts += Counter((ids[segments >= 0] // 100).tolist())
        padding.append((segments == PADDING).mean())
    for kind, share in ((1, 0.5), (2, 0.3), (3, 0.2)):
        assert counts[kind] / counts.total() == pytest.approx(share, abs=0.05)
    assert np.mean(padding) < 0.1


@pytest.mark.parametrize("T", [15, 16])
def test_switched_rows_change_midway_in_one_segment(T):
    plain_rows = mixture(sequence_length=T, weights={"a": 1, "b": 1}).batch(2, 8)
    ids, targets, segments = mixture(sequence_length=T, weights={"a": 1, "b": 1}, switch=0.25).batch(2, 8)
    middle = T // 2
    assert (ids[:2, :middle] == plain_rows.ids[:2, :middle]).all()
    assert (ids[:2, middle:] == plain_rows.ids[2:4, : T - middle]).all()
    assert (targets[:2, middle - 1] == IGNORE).all()
    assert (segments[:2, middle] == segments[:2, middle - 1]).all()  # they see each other
    assert all((new[2:] == old[2:]).all() for new, old in zip((ids, targets, segments), plain_rows, strict=True))
    jumps = np.diff(segments[:2], axis=1)
    assert ((jumps == 0) | (jumps == 1)).all()


def test_switched_rows_keep_their_padding_apart():
    """A first half that ends in padding is not continued, and padding of the second half stays padding."""
    segments = np.array([[0, 1, -1, -1, -1, -1], [0, 0, 1, 1, 2, -1], [0, 1, -1, -1, -1, -1], [0, 1, 1, 2, 2, 2]])
    batch = Batch(np.arange(24).reshape(4, 6), np.arange(1, 25).reshape(4, 6), segments.copy())
    switched = _switched(batch, 2)
    assert (
        switched.segments.tolist()
        == [
            [0, 1, -1, 2, 3, -1],  # two new documents, a padded place between
            [0, 0, 1, 1, 2, 2],  # its second document goes on in another domain
            *segments[2:].tolist(),
        ]
    )
    assert switched.ids[0].tolist() == [0, 1, 2, 12, 13, 14]
    assert switched.targets[:2, 2].tolist() == [IGNORE, IGNORE]


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ({"poetry": 1}, "poetry: wanted some of a, b, c"),
        ({"a": -1}, "from 0 up"),
        ({"a": float("inf")}, "finite"),
        ({"a": float("nan")}, "finite"),
        ({"a": 0}, "above 0"),
        ({}, "above 0"),
    ],
)
def test_weights_must_name_sources(weights, text):
    with pytest.raises(ValueError, match=text):
        mixture(weights=weights)


# -- conversations -----------------------------------------------------------------------------------------------


def example(name="addition", seed=0):
    return make_train(TASKS[name], np.random.default_rng(seed))


def chats():
    rng = np.random.default_rng(1)
    tasks = [task for task in TASKS.values() if task.name != "calculator"]
    for thinking in (False, True):
        yield task_chat(example("sort"), thinking, PHRASES[2])
        yield tool_chat(example("calculator"), thinking)
        for _ in range(8):
            yield turns_chat(tasks, thinking, rng)
    yield continuation_chat("def f(x):\n    return x\n", 10)


@pytest.mark.parametrize("chat", list(chats()), ids=lambda chat: f"{len(chat.messages)}-{chat.thinking}")
def test_pieces_of_a_conversation_are_what_the_template_renders(chat):
    """All spans together: the rendered conversation and the tag that ends the last answer. What counts begins where a
    model would be asked, and what is asked for parses back to the message."""
    found = spans(chat, TEMPLATE)
    rendered = TEMPLATE.render(chat.messages, chat.tools, chat.thinking, add_generation_prompt=False)
    assert "".join(text for text, _ in found) == rendered + "<|user|>"
    before = ""
    said = [m for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
    targets = [text for text, counts in found if counts]
    assert len(targets) in (1, 2)
    for (text, counts), nothing in zip(found, [None, *found], strict=False):
        if counts:
            assert nothing is not None
            assert before.endswith("<|assistant|>" if chat.thinking else "<|assistant|>\n<think></think>")
        before += text
    for text, message in zip(targets, said[-len(targets) :], strict=True):
        answer = parse_answer(text.removesuffix("<|user|>").removesuffix("<|observation|>"), chat.tools)
        assert (answer.content or "") == message["content"].strip()
        assert answer.thinking == message.get("reasoning_content")
        calls = [call["function"] for call in message.get("tool_calls", [])]
        assert [c._asdict() for c in answer.tool_calls] == calls
        assert text.endswith("<|observation|>" if calls else "<|user|>")


def test_only_answers_after_the_last_question_count():
    messages = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    messages += [{"role": "user", "content": "C"}, {"role": "assistant", "content": "D"}]
    piece = encode_chat(Chat(messages, False), TEMPLATE, tokenizer().encode)
    counted = tokenizer().decode(piece.ids[piece.counts])
    assert counted == "\nD<|user|>"


def test_tool_conversations_call_the_calculator_and_believe_it():
    for seed in range(20):
        item = example("calculator", seed)
        chat = tool_chat(item, thinking=bool(seed % 2))
        call = chat.messages[1]["tool_calls"][0]["function"]
        assert calculate(call["arguments"]["expression"]) == chat.messages[2]["content"] == item.answer
        assert call["name"] == CALCULATOR["function"]["name"]
        text = TEMPLATE.render(chat.messages, chat.tools, chat.thinking)
        assert text.count("<tool_response>") == 1


def source(kind="sums", **changes) -> ChatSource:
    return ChatSource(kind, TEMPLATE, tokenizer(), tokenizer().encode, **changes)


@pytest.mark.parametrize("kind", ["sums", "calculator", "turns"])
def test_conversations_are_drawn_in_both_modes_and_never_a_held_out_item(kind):
    rng, modes, seen = np.random.default_rng(0), Counter(), 0
    for _ in range(40):
        text = tokenizer().decode(source(kind).piece(rng, 4000).ids)
        modes["/nothink" in text] += 1
        for question in re.findall(r"\d(?:\+\d)+ mod 10", text):
            assert not is_heldout("sums", question)
            seen += 1
    assert min(modes.values()) > 5
    assert len(modes) == 2
    assert seen >= {"sums": 40, "calculator": 0, "turns": 1}[kind]


def test_thinking_share_is_obeyed():
    rng = np.random.default_rng(0)
    texts = [tokenizer().decode(source(thinking=0.0).piece(rng, 4000).ids) for _ in range(10)]
    assert all("/nothink" in text for text in texts)


def test_a_conversation_that_never_fits_is_an_error():
    with pytest.raises(ValueError, match="no conversation of 'calculator' in 50 fits into 30 tokens"):
        source("calculator").piece(np.random.default_rng(0), 30)


def test_continuations_are_text_of_the_stream_and_fit():
    stream, texts = None, ["the quick brown fox jumps over it and then some more words follow. " * 4, "short text here"]
    stream = Corpus.build(
        [make_document("prose", str(i), t) for i, t in enumerate(texts)], tokenizer().encode, tokenizer().end_ids[0]
    ).streams["prose"]
    rng = np.random.default_rng(0)
    for most in (60, 40):
        for _ in range(60):
            piece = source("prose", stream=stream).piece(rng, most)
            assert len(piece.ids) <= most
            text = tokenizer().decode(piece.ids)
            assert "Continue:\n" in text
            given, _, rest = text.split("Continue:\n")[1].partition("/nothink<|assistant|>\n<think></think>")
            assert any(given in t for t in texts)
            assert piece.counts[-1]
            body = rest.removeprefix("\n").removesuffix("<|user|>")
            assert any(body.strip() in t for t in texts)


def test_small_talk_is_said_in_either_language():
    assert any(ord(letter) > 0x4E00 for question, _ in SMALL_TALK for letter in question)


# -- curricula ---------------------------------------------------------------------------------------------------

PRE = Stage("pre", 3, 6, 48, {"code": 2, "sums": 1, "follow": 1}, learning_rate=1e-3, first_batch_size=4, ramp=2)
MID = Stage("mid", 2, 4, 64, {"code": 1, "sums": 1}, packing="best-fit")
CHAT = Stage("chat", 2, 4, 200, {"code": 1, "sums": 1, "turns": 1}, format="chat", packing="best-fit")
RECIPE = Recipe("glm-nano", (PRE, MID, CHAT), seed=1)
TEXT = [make_document("code", "a.py", "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(300)))]


def curriculum(recipe=RECIPE, text=TEXT) -> Curriculum:
    return Curriculum(recipe, text, tokenizer(), TEMPLATE)


def test_batches_have_the_sizes_that_the_recipe_says():
    course = curriculum()
    assert [course.batch(s).ids.shape for s in range(7)] == [(4, 48), (5, 48), (6, 48), *[(4, 64)] * 2, *[(4, 200)] * 2]


def test_stages_do_not_repeat_each_other_s_draws():
    same = replace(
        RECIPE, stages=(replace(PRE, ramp=0, first_batch_size=None), replace(PRE, ramp=0, first_batch_size=None))
    )
    course = curriculum(same)
    assert (course.batch(0).ids != course.batch(3).ids).any()


def test_text_stages_hold_task_documents_with_right_answers():
    encode, end = tokenizer().encode, tokenizer().end_ids[0]
    rng = np.random.default_rng(0)
    for name in ("addition", "number_words", "python"):
        forms = Counter()
        for _ in range(10):
            piece = TaskSource(TASKS[name], encode, end, thinking=0.5).piece(rng, 1000)
            assert piece.ids[-1] == end
            assert len(piece.ids) > DOCUMENT
            lines = iter(tokenizer().decode(piece.ids[:-1]).splitlines())
            for line in lines:
                if line.endswith(":"):
                    question = line.removesuffix(":")
                    steps, answer = TASKS[name].solve(question)
                    told = [next(lines) for _ in steps.splitlines()]
                    assert told == steps.splitlines()
                    assert next(lines) == f"={answer}"
                else:
                    question, answer = line.rsplit("=", 1)
                    assert TASKS[name].solve(question)[1] == answer
                assert not is_heldout(name, question)
                forms[line.endswith(":")] += 1
        assert min(forms.values()) > 3
        assert len(forms) == 2


def test_chat_stages_score_only_what_the_assistant_says():
    batch: Batch = curriculum().batch(5)
    assert 0.1 < (batch.targets != IGNORE).mean() < 0.9
    assert tokenizer().id("<|user|>") in set(batch.targets[batch.targets != IGNORE].tolist())


def test_a_domain_shorter_than_a_row_is_named():
    with pytest.raises(ValueError, match=r"domain 'code' has \d+ tokens, a row needs 49"):
        curriculum(text=[make_document("code", "a", "x = 1")])


def test_a_domain_with_a_task_s_name_is_an_error():
    with pytest.raises(ValueError, match="sums names a domain and a task"):
        curriculum(text=[*TEXT, make_document("sums", "a", "text")])


def test_the_calculator_needs_conversations():
    with pytest.raises(ValueError, match="calculator: wanted some of"):
        curriculum(replace(RECIPE, stages=(replace(PRE, weights={"calculator": 1}),)))


# -- the user's own conversations --------------------------------------------------------------------------------


def given(*records) -> list:
    return [make_document("chat", f"own.jsonl:{i + 1}", json.dumps(record)) for i, record in enumerate(records)]


OWN = replace(CHAT, weights={"chat": 1.0}, learning_rate=1e-3)
HELLO = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]}


def test_own_conversations_are_trained_on_as_they_are():
    thinking = {"messages": [*HELLO["messages"][:1], {"role": "assistant", "content": "x", "reasoning_content": "y"}]}
    course = curriculum(Recipe("glm-nano", (OWN,)), given(HELLO, thinking))
    texts = " ".join(tokenizer().decode(course.batch(step).ids.reshape(-1)) for step in range(2))
    assert "Hello/nothink<|assistant|>\n<think></think>\nGood day" in texts
    assert "Hello<|assistant|>\n<think>y</think>\nx" in texts


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "nothing to learn"),
        (HELLO["messages"][:1], "nothing to learn"),
        ([{"role": "judge", "content": "x"}], r"role is 'judge'"),
        (["x"], "messages\\[0\\] is str"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_line(messages, text):
    with pytest.raises(ValueError, match=rf"own\.jsonl:2: .*{text}"):
        curriculum(Recipe("glm-nano", (OWN,)), given(HELLO, {"messages": messages}))


def test_own_data_of_either_kind_changes_the_stages():
    text, chat = with_own_data(RECIPE, {"text"}), with_own_data(RECIPE, {"chat"})
    assert [(s.name, s.format, s.weights) for s in text.stages] == [
        ("pre", "text", {"text": 1.0}),
        ("mid", "text", {"text": 1.0}),
    ]
    assert [(s.name, s.format, s.packing, s.weights) for s in chat.stages] == [
        ("chat", "chat", "best-fit", {"chat": 1.0})
    ]
    with pytest.raises(ValueError, match="one kind after the other"):
        with_own_data(RECIPE, {"text", "chat"})
    with pytest.raises(ValueError, match="no text stage"):
        with_own_data(replace(RECIPE, stages=(OWN,)), {"text"})


def test_conversations_that_are_too_long_are_counted(tmp_path):
    long = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba " * 400}]
    short = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (long, short, long)), "utf-8")
    tokenizer = train_tokenizer([], 292)
    with pytest.warns(UserWarning, match="2 of 3 conversations are longer than 120 tokens, left out"):
        source = given_source(load_text_files([path]), ChatTemplate(), tokenizer.encode, 120)
    assert len(source.pieces) == 1


def test_own_files_that_begin_or_break_oddly(tmp_path):
    empty, half = tmp_path / "empty.txt", tmp_path / "half.jsonl"
    empty.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(ValueError, match=r"empty\.txt: the file is empty"):
        load_text_files([empty])
    half.write_text('{"text": "a\\ud83d"}\n', "utf-8")
    with pytest.raises(ValueError, match=r"half\.jsonl, line 1: half a character"):
        load_text_files([half])
    half.write_text('{"text": "a\\ud83d\\ude00"}\n', "utf-8")
    assert load_text_files([half])[0].text == "a😀"
