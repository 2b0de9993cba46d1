"""Evaluation: each measure against a case made by hand, or against the obvious loop."""

import json

import numpy as np
import pytest

from minglm.api import Model, load
from minglm.cli import main
from minglm.data import chats
from minglm.data.batches import IGNORE, Batch, Corpus, Piece, TokenStream, lay_out
from minglm.data.heldout import make_document
from minglm.data.items import Item
from minglm.data.tasks import TASKS, is_heldout
from minglm.evaluate import accuracy, balance, bits_per_byte, domains, mtp, removal, report, specialisation, tools
from minglm.evaluate.confidence import bootstrap, wilson
from minglm.evaluate.passes import operations, picks, token_bits
from minglm.evaluate.specialisation import information, mutual_information, permuted_within
from minglm.generate.batch import Continuation, continue_all
from minglm.model import ops as numpy_ops
from minglm.model.attention import make_layout
from minglm.model.loss import shift_targets
from minglm.model.mtp import mtp_layer
from minglm.model.params import init_params
from minglm.model.transformer import head, transformer
from minglm.text.answer import ToolCall
from minglm.text.template import ChatTemplate
from minglm.text.tokenizer import train_tokenizer
from minglm.text.tools import call_tool, run_tools, run_tools_all, turn
from minglm.train.observe import probe_routing
from tests.helpers import assert_close
from tests.variants import MICRO, random_params

TOKENIZER = train_tokenizer([], 292)  # bytes and tags
CONFIG = MICRO.replace(vocab_size=320, max_position_embeddings=4096, eos_token_id=TOKENIZER.end_ids)
ITEM = Item("calculator", "3+4", "3+4", "7", 2, 0.01)


def model_of(dtype=np.float32, config=CONFIG, seed=0) -> Model:
    return Model(config, random_params(config, seed, dtype), TOKENIZER, ChatTemplate())


@pytest.fixture(scope="module")
def model() -> Model:
    return model_of()


def batch_of(rows, segments=None) -> Batch:
    ids = np.array(rows)
    segments = np.zeros_like(ids) if segments is None else np.array(segments)
    return Batch(ids, shift_targets(ids, segments), segments)


# -- intervals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson(right, asked, low, high):
    """The last is Newcombe's example (Statistics in Medicine 17, 1998)."""
    assert wilson(right, asked) == pytest.approx((low, high), abs=1e-4)


def test_wilson_wants_a_share():
    for right, asked in ((0, 0), (3, 2), (-1, 4)):
        with pytest.raises(ValueError, match="is not a share"):
            wilson(right, asked)


def test_bootstrap():
    assert bootstrap(np.full((7, 2), 3.0), lambda total: total[0] / total[1]) == (1.0, 1.0)
    units = np.random.default_rng(0).normal(5, 2, size=400)
    low, high = bootstrap(units, lambda total: total / 400)
    error = units.std() / 20
    assert (low, high) == pytest.approx((units.mean() - 1.96 * error, units.mean() + 1.96 * error), abs=0.03)


# -- text --------------------------------------------------------------------------------------------------------


def test_token_bits_are_those_of_the_softmax():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)) * 30
    targets = np.array([[1, IGNORE, 4], [0, 2, 2]])
    found, kept = token_bits(logits, targets), logits.copy()
    for b, t in np.ndindex(2, 3):
        p = np.exp(kept[b, t]) / np.exp(kept[b, t]).sum()
        assert found[b, t] == pytest.approx(0 if targets[b, t] == IGNORE else -np.log2(p[targets[b, t]]))
    assert (logits == kept).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_document_bits_are_each_documents_own(dtype):
    model = model_of(dtype)
    texts = [make_document("code", "a", "x = 1\ny = 2\n"), make_document("prose", "b", "héllo")]
    found = bits_per_byte.document_bits(model, texts, sequence_length=64)
    for (bits, size), document in zip(found, texts, strict=True):
        ids = [*TOKENIZER.encode(document.text), TOKENIZER.end_ids[0]]
        logits = model.forward([ids[:-1]]).logits[0].astype(np.float64)
        wanted = sum(np.log2(np.exp(row - row[target]).sum()) for row, target in zip(logits, ids[1:], strict=True))
        assert bits == pytest.approx(wanted, rel=1e-5)
        assert size == len(document.text.encode()) - 1
    assert bits_per_byte.bits_per_byte(model, texts, 64) == pytest.approx(found[:, 0].sum() / found[:, 1].sum())
    many_windows = bits_per_byte.document_bits(model, texts, sequence_length=2)  # more than one batch
    assert (many_windows[:, 1] == found[:, 1]).all()
    with pytest.raises(ValueError, match="tokenizer"):
        bits_per_byte.bits_per_byte(Model(CONFIG, model.params), texts)


def test_text_rows(model, monkeypatch):
    held_out = {"code": [make_document("code", "c", "def f():\n    return 1\n" * 9)], "prose": [
        make_document("prose", "p", "A word and a word. " * 9)]}  # fmt: skip
    monkeypatch.setattr(bits_per_byte, "heldout_documents", held_out.get)
    monkeypatch.setattr(bits_per_byte, "standard_library_documents", lambda: iter(held_out["code"]))
    code, prose = bits_per_byte.text_rows(model)
    assert (code.domain, code.documents, code.bytes) == ("code", 1, 9 * 22 - 1)
    assert code.low == code.high == pytest.approx(code.bits_per_byte)  # one document: nothing to draw
    assert code.ngram < 1 < code.zlib < code.bits_per_byte  # it has seen that very text
    assert prose.ngram is None  # there was no prose to learn from


# -- tasks -------------------------------------------------------------------------------------------------------


def test_reading_answers():
    assert accuracy.first_line("42\n7") == "42"
    assert accuracy.last_line("1+1=2\n=42\n") == "42"
    assert accuracy.last_line("42\n") == ""  # not a line that says the answer
    assert accuracy.chat_answer("\n<think>1+1=2</think>\n42") == "42"
    assert accuracy.chat_answer("\n<think>1+1=2 42") == ""  # never came to an end


def scripted(answers):
    """In place of `continue_all`: what `answers(prompt)` says."""

    def continue_all(model, prompts, most, done=None, engine="fast", threads=None):
        return [Continuation([1], list(range(len(answers(p)))), answers(p)) for p in prompts]

    return continue_all


def test_task_rows_count_exact_answers(model, monkeypatch):
    """A model that adds in its head only when it thinks."""
    addition = TASKS["addition"]
    monkeypatch.setattr(accuracy, "TASKS", {"addition": addition, "calculator": TASKS["calculator"]})

    def answers(prompt):
        question = prompt.partition("<|user|>\n")[2].partition("<|assistant|>")[0]
        if question.endswith("/nothink"):
            return "\n0"
        steps, answer = addition.solve(question)
        return f"\n<think>{steps}</think>\n{answer}"

    monkeypatch.setattr(accuracy, "continue_all", scripted(answers))
    rows = accuracy.task_rows(model, items=5)
    assert {row.task for row in rows} == {"addition"}  # the calculator needs a tool
    assert [row.size for row in rows] == 2 * [None, *addition.sizes]
    together = {row.how: row for row in rows if row.size is None}
    asked = sum(row.asked for row in rows if row.how == "thinking" and row.size)
    assert together["thinking"][3:6] == (asked, asked, 1.0)
    assert together["direct"].right == 0
    assert together["direct"].tokens == 2
    assert rows[1].chance == pytest.approx(0.1)  # one digit: not the mean over all sizes
    assert together["direct"].high == wilson(0, asked).high


def test_held_out_items_are_held_out_and_few_where_there_are_few():
    items = domains.some_heldout(TASKS["addition"], 500, 0, size=1)
    assert 0 < len(items) < 50
    assert all(is_heldout(item.task, item.question) and item.size == 1 for item in items)
    assert len({item.question for item in items}) == len(items)
    assert items == domains.some_heldout(TASKS["addition"], 500, 0, size=1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_continuations_are_those_of_generate(dtype):
    model = model_of(dtype, seed=3)
    prompts = ["def f(", "a", "12+30="]
    for prompt, found in zip(prompts, continue_all(model, prompts, 12, engine="numpy"), strict=True):
        alone = model.generate(prompt, 12, engine="numpy")
        ids = alone.ids[:-1] if alone.stop_reason == "end token" else alone.ids
        assert found.prompt_ids == TOKENIZER.encode(prompt)
        assert found.ids == ids
        assert found.text == "".join(map(TOKENIZER.stream().feed, ids))


def test_continuations_end_with_the_context():
    model = model_of(config=CONFIG.replace(max_position_embeddings=8, eos_token_id=()))
    (found,) = continue_all(model, ["abcdef"], 12)
    assert len(found.ids) == 2
    with pytest.raises(ValueError, match="context of 8"):
        continue_all(model, ["abcdefgh"], 12)


# -- the tool loop -----------------------------------------------------------------------------------------------

QUESTION = [{"role": "user", "content": "3+4"}]


def call(expression, name="calculator", key="expression"):
    return f"\n<tool_call>{name}\n<arg_key>{key}</arg_key>\n<arg_value>{expression}</arg_value>\n</tool_call>"


def converse(*answers, rounds=4):
    """The loop with a model that says these answers, the last one again and again, and the prompts that it saw."""
    prompts = []

    def answer(prompt):
        prompts.append(prompt)
        return answers[min(len(prompts), len(answers)) - 1]

    messages = run_tools(answer, QUESTION, [chats.CALCULATOR], tools.TOOLS, ChatTemplate(), rounds=rounds)
    return messages, prompts


def test_the_loop_runs_the_tool_and_shows_its_result():
    messages, prompts = converse("\n<think>calculator: 3+4</think>" + call("3+4"), "\n<think>it says 7</think>\n7")
    assert messages == [
        *QUESTION,
        {"role": "assistant", "content": "", "reasoning_content": "calculator: 3+4",
         "tool_calls": [{"function": {"name": "calculator", "arguments": {"expression": "3+4"}}}]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "7", "reasoning_content": "it says 7"},
    ]  # fmt: skip
    assert len(prompts) == 2
    assert '"name": "calculator"' in prompts[0]
    assert "<tool_response>" not in prompts[0]
    assert prompts[1].endswith("</tool_call><|observation|>\n<tool_response>\n7\n</tool_response><|assistant|>")
    assert QUESTION == [{"role": "user", "content": "3+4"}]
    assert tools.judge(ITEM, messages) == (True, True, True)


def test_what_the_loop_renders_is_what_training_shows():
    """The second prompt is the first part of the training conversation, character by character."""
    chat = chats.tool_chat(ITEM, thinking=True)
    _, prompts = converse("\n<think>calculator: 3+4</think>" + call("3+4"), "\n7")
    pieces = [text for text, _ in chats.spans(chat, ChatTemplate())]
    assert prompts[0] == pieces[0]
    assert "".join(pieces[:3]).replace("<|observation|><|observation|>", "<|observation|>") == prompts[1]


def test_without_thinking_the_prompt_says_so():
    prompts = []
    run_tools(lambda p: prompts.append(p) or "7", QUESTION, [], {}, ChatTemplate(), enable_thinking=False)
    assert prompts[0].endswith("/nothink<|assistant|>\n<think></think>")


def test_a_malformed_call_is_an_answer():
    messages, prompts = converse("<tool_call>calculator\n<arg_key>expression</arg_key>")
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert "tool_calls" not in messages[1]
    assert len(prompts) == 1
    assert tools.judge(ITEM, messages) == (False, False, False)


def test_unknown_tools_and_errors_become_text():
    messages, _ = converse(call("3+4", name="abacus"), call("3+"), call("3+4", key="sum"), call("3+4"), "7", rounds=5)
    results = [message["content"] for message in messages if message["role"] == "tool"]
    assert results[0] == "error: no tool 'abacus'; there are: calculator"
    assert results[1] == "error: '3+' is not an arithmetic expression"
    assert results[2].startswith("error: ")
    assert "sum" in results[2]
    assert results[3] == "7"
    assert tools.judge(ITEM, messages) == (False, False, True)  # right in the end, but not at once


def test_endless_calls_stop():
    messages, prompts = converse(call("3+4"), rounds=3)
    assert len(prompts) == 3
    assert messages[-1] == {"role": "tool", "content": "7"}
    assert tools.judge(ITEM, messages) == (True, True, False)


def test_several_calls_in_one_answer():
    said, *results = turn(call("3+4") + call("5*5"), [chats.CALCULATOR], tools.TOOLS)
    assert [result["content"] for result in results] == ["7", "25"]
    assert tools.call_value(said) is None  # well-formed is one call


def test_many_conversations_at_once():
    """Those that have their answer are not asked again."""
    asked = []

    def answers(prompts):
        asked.append(len(prompts))
        return ["done" if "alpha" in p or "<tool_response>" in p else call("1+1") for p in prompts]

    conversations = [[{"role": "user", "content": text}] for text in ("alpha", "beta", "gamma")]
    found = run_tools_all(answers, conversations, [chats.CALCULATOR], tools.TOOLS, ChatTemplate())
    assert asked == [3, 2]
    assert [messages[-1]["content"] for messages in found] == ["done"] * 3
    assert [len(messages) for messages in found] == [2, 4, 4]


@pytest.mark.parametrize(
    ("said", "value"),
    [
        (call("3+4"), "7"),
        (call("10-2"), "8"),
        (call("12"), "12"),  # the schema says string, so 12 is text
        (call("import os"), None),
        (call("3+4", name="abacus"), None),
        (call("3+4", key="sum"), None),
        (call("3+4").replace("</tool_call>", "<arg_key>b</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"), None),
        ("7", None),
    ],
)
def test_well_formed_calls(said, value):
    message = turn(said, [chats.CALCULATOR], tools.TOOLS)[0]
    assert tools.call_value(message) == value


def test_a_wrong_expression_is_well_formed():
    messages, _ = converse(call("3+5"), "7")
    assert tools.judge(ITEM, messages) == (True, False, False)


def test_a_right_answer_without_the_tool_is_not_right_end_to_end():
    assert tools.judge(ITEM, [*QUESTION, {"role": "assistant", "content": "7"}]) == (False, False, False)


def test_a_tool_may_return_anything():
    assert call_tool(ToolCall("f", {}), {"f": lambda: [1, None]}) == "[1, None]"


def test_tool_rows(model, monkeypatch):
    def answers(prompt):
        if "/nothink" in prompt:
            return "\n1"
        if "<tool_response>" in prompt:
            return "\n" + prompt.rpartition("<tool_response>\n")[2].partition("\n")[0]
        return call(prompt.rpartition("<|user|>\n")[2].partition("<|assistant|>")[0])

    monkeypatch.setattr(tools, "continue_all", scripted(answers))
    rows = tools.tool_rows(model, items=6)
    assert [row.measure for row in rows] == 2 * ["well_formed", "right_expression", "end_to_end"]
    assert [row.right for row in rows] == [0, 0, 0, 6, 6, 6]


# -- MTP ---------------------------------------------------------------------------------------------------------


def naive_agreement(model, batch, depths):
    """One row and one depth at a time; the layer used again reads its own output."""

    found = {}
    for b, (ids, targets) in enumerate(zip(batch.ids, batch.targets, strict=True)):
        hidden, _ = transformer(ids[None], model.params, model.config)
        trunk = head(hidden, model.params)[0].argmax(axis=-1)
        state = hidden
        for k in range(1, depths + 1):
            rows = len(ids) - k
            layer = model.params.mtp[(k - 1) % len(model.params.mtp)]
            layout = make_layout((1, rows), model.config, hidden.dtype)
            table = model.params.embed_tokens.weight
            state, _ = mtp_layer(state[:, :rows], ids[None, k:], layer, table, model.config, layout)
            drafts = head(state, model.params)[0].argmax(axis=-1)
            for i in range(rows):
                ends = TOKENIZER.end_ids
                if targets[i] == IGNORE or targets[i + k] in (IGNORE, *ends) or trunk[i + k] in ends:
                    continue
                position = int((targets[: i + k + 1] != IGNORE).sum())
                found[b, k, i] = bool(drafts[i] == trunk[i + k]), position
    return found


@pytest.mark.parametrize("layers", [1, 2])
def test_agreement_is_that_of_the_obvious_loop(layers):
    config = CONFIG.replace(num_nextn_predict_layers=layers)
    model = model_of(np.float64, config, seed=2)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, size=(3, 50))
    ids[0, 20] = TOKENIZER.end_ids[1]  # in the middle of a text
    pieces = [[Piece(row, np.arange(50) >= given)] for row, given in zip(ids, (1, 5, 12), strict=True)]
    batch = lay_out(pieces, 49, 0)
    found = naive_agreement(model, batch, depths=3)
    agree, places = mtp.agreement(model, batch)
    for row, (low, high) in enumerate([(1, 99), (1, 8), (9, 32), (33, 99)]):
        for k in (1, 2, 3):
            chosen = [same for (_, depth, _), (same, at) in found.items() if depth == k and low <= at <= high]
            assert (agree[row, k - 1], places[row, k - 1]) == (sum(chosen), len(chosen))
    assert 0 < places[0, 2] < places[0, 0]
    assert (places[1:].sum(axis=0) == places[0]).all()


def test_agreement_keeps_to_documents():
    """Two documents in a row count as they do apart, padding not at all."""
    model = model_of(np.float64, seed=2)
    ids = np.random.default_rng(1).integers(0, 256, size=60)
    first, second = (Piece(part, np.ones(len(part), bool)) for part in (ids[:25], ids[25:]))
    together = mtp.agreement(model, lay_out([[first, second]], 70, 0))
    apart = [mtp.agreement(model, lay_out([[piece]], piece.places, 0)) for piece in (first, second)]
    for both, *parts in zip(together, *apart, strict=True):
        assert (both == sum(parts)).all()


def test_a_layer_that_copies_the_trunk_always_agrees(model, monkeypatch):
    """Drafts made from the trunk's own next states."""

    class Depth:
        def __init__(self, hidden, k, segments):
            self.normed, self.number = hidden[:, k:], 0
            self.valid = np.ones(hidden[:, k:].shape[:2], bool)

    def chain(hidden, ids, layout, params, config, depths, ops):
        return [Depth(hidden, k, layout) for k in range(1, depths + 1)]

    monkeypatch.setattr(mtp, "mtp_chain", chain)
    agree, places = mtp.agreement(model, batch_of(np.random.default_rng(0).integers(0, 256, size=(2, 40))))
    assert (agree == places).all()
    assert places[0, 0] > 60


def test_places_of_targets():
    batch = Batch(
        ids=np.zeros((1, 8), int),
        targets=np.array([[1, 1, IGNORE, IGNORE, 1, 1, IGNORE, IGNORE]]),
        segments=np.array([[0, 0, 0, 1, 1, 1, 1, -1]]),
    )
    assert mtp.places_of_targets(batch).tolist() == [[1, 2, 2, 0, 1, 2, 2, 0]]


def test_only_what_the_model_wrote_counts(model):
    batch = mtp._laid_out(model, [Continuation([5, 6, 7], [8, 9], ""), Continuation([1], [2, 3, 4, 5, 6, 7], "")])
    assert batch.ids.tolist() == [[5, 6, 7, 8, *[TOKENIZER.end_ids[0]] * 2], [1, 2, 3, 4, 5, 6]]
    assert batch.targets.tolist() == [[IGNORE, IGNORE, 8, 9, IGNORE, IGNORE], [2, 3, 4, 5, 6, 7]]


def test_mtp_rows(model, monkeypatch):
    monkeypatch.setattr(mtp, "TASKS", {"sums": TASKS["sums"], "calculator": TASKS["calculator"]})
    monkeypatch.setattr(mtp, "_own_code", lambda model, code: continue_all(model, ["def f(", "x = "], 20))
    stream = Corpus.build([make_document("code", "c", "x = 1\n" * 99)], TOKENIZER.encode, TOKENIZER.end_ids[0])
    streams = {"code": stream.streams["code"], "prose": stream.streams["code"]}
    rows = mtp.mtp_rows(model, streams, items=2, tokens=256)
    assert {row.text for row in rows} >= {"held-out code", "held-out prose", "own code"}
    assert all(row.places and row.share == row.agree / row.places for row in rows)
    assert mtp.mtp_rows(model_of(config=CONFIG.replace(num_nextn_predict_layers=0)), streams) == []


# -- domains and balance -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def streams(model) -> dict[str, TokenStream]:
    return domains.heldout_streams(model, 1000)


def test_streams_are_held_out(streams):
    assert set(streams) == set(domains.DOMAINS)
    for domain in ("direct", "worked"):
        first = TOKENIZER.decode(streams[domain].tokens[: streams[domain].starts[1]].tolist())
        questions = [line.partition("=")[0] for line in first.split("\n") if "=" in line]
        assert is_heldout("addition", questions[0] if domain == "direct" else first.partition(":")[0])
    assert "<|assistant|>" in TOKENIZER.decode(streams["conversations"].tokens.tolist())
    assert len(np.unique(streams["direct"].tokens[streams["direct"].starts[1:] - 1])) == 1  # the end token


def test_rows_of_one_domain(streams):
    batch, labels = domains.one_domain_rows(streams, 600, sequence_length=200)
    assert np.bincount(labels.reshape(-1)).tolist() == [600] * 5
    assert (labels == labels[:, :1]).all()
    assert (batch.segments >= 0).all()
    for domain, part in domains.some_of_each(domains.Sample(batch, labels), 2):
        number = domains.DOMAINS.index(domain)
        assert part.ids.tolist() == batch.ids[[3 * number, 3 * number + 1]].tolist()
        assert part.ids[0].tolist() == streams[domain].tokens[:200].tolist()


def test_rows_that_change_their_domain(streams):
    batch, labels = domains.changing_rows(streams, 600, piece=50)
    assert batch.ids.shape == labels.shape == (12, 250)
    for row in labels:
        assert sorted(row[::50]) == [0, 1, 2, 3, 4]
        assert (row.reshape(5, 50) == row[::50, None]).all()
    assert len({tuple(row[::50]) for row in labels}) > 3  # in random order
    assert (batch.segments == 0).all()
    for number, domain in enumerate(domains.DOMAINS):  # pieces do not overlap
        pieces = batch.ids[labels == number].reshape(-1, 50)
        text = streams[domain].tokens
        starts = np.arange(12) * ((len(text) - 1) // 12)
        assert sorted(pieces.tolist()) == sorted(text[start : start + 50].tolist() for start in starts)


def test_balance_rows_of_counts():
    counts = np.zeros((4, 2, 3), int)
    counts[:, 0] = [2, 1, 0]
    counts[:, 1] = 1
    first, second = balance.load_rows(counts, [1, 2], tokens=12)
    assert (first.layer, first.tokens, first.max_vio, first.min_vio, first.dead, first.experts) == (1, 12, 1, -1, 1, 3)
    assert (first.low, first.high) == (1, 1)  # all rows alike
    assert (second.max_vio, second.min_vio, second.dead) == (0, 0, 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_picks_are_those_that_the_taps_show(dtype):
    model = model_of(dtype)
    batch = batch_of(np.random.default_rng(0).integers(0, 256, size=(3, 17)))
    trace = model.trace(batch.ids, keep="*.mlp.*")
    with operations(model) as ops:
        found = picks(model, batch, ops)
    assert (found.reshape(51, *found.shape[2:]) == trace.routing.indices).all()


def test_balance_rows_add_up(model, streams):
    rows = balance.balance_rows(model, domains.one_domain_rows(streams, 256, 64))
    assert [row.layer for row in rows] == [1, 2]
    assert all(row.tokens == 5 * 256 and row.low <= row.high and row.max_vio > 0 for row in rows)


def test_a_model_without_experts():
    with pytest.raises(ValueError, match="no layer with experts"):
        balance.balance_rows(model_of(config=CONFIG.replace(first_k_dense_replace=3)), None)


# -- specialisation ----------------------------------------------------------------------------------------------


def slots(experts):
    """[B, T] -> picks [B, T, 1, 1]."""
    return np.array(experts)[..., None, None]


def test_mutual_information_of_known_cases():
    labels = np.array([[0, 0, 1, 1]] * 8)
    assert mutual_information(slots(labels * 3), labels) == pytest.approx([1.0])  # the expert tells the domain
    assert mutual_information(slots([[0, 1, 0, 1]] * 8), labels) == pytest.approx([0.0])
    assert mutual_information(slots([[5, 5, 5, 5]] * 8), labels) == pytest.approx([0.0])
    # two slots per token, one that tells and one that does not: of 4 experts' slots half are shared
    two = np.stack([labels + 1, np.zeros_like(labels)], axis=-1)[:, :, None]
    assert mutual_information(two, labels) == pytest.approx([0.5])
    # layers apart from each other
    both = np.concatenate([slots(labels), slots(labels * 0)], axis=2)
    assert mutual_information(both, labels) == pytest.approx([1.0, 0.0])
    # a quarter of one domain astray: I = H(expert) − H(expert | domain)
    astray = slots([[0, 0, 0, 1], [0, 0, 1, 1]])
    h = -(5 / 8 * np.log2(5 / 8) + 3 / 8 * np.log2(3 / 8))
    assert mutual_information(astray, labels[:2]) == pytest.approx(
        [h - 0.5 * -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))]
    )


def test_a_router_that_reads_the_token_alone_is_not_above_its_control():
    rng = np.random.default_rng(0)
    labels = rng.permuted(np.tile(np.arange(4).repeat(25), (40, 1)), axis=1)
    ids = rng.integers(0, 8, size=labels.shape) + 3 * labels  # shared in part
    found = information(slots(ids // 2), ids, labels, permutations=20)
    assert found.bits[0] > 0.3
    assert found.control == pytest.approx(found.bits)
    assert found.control_sd == pytest.approx([0])
    assert (found.low[0], found.high[0]) == pytest.approx((0, 0), abs=1e-12)
    assert found.shuffled[0] < 0.01


def test_a_router_that_reads_the_domain_is_above_its_control():
    rng = np.random.default_rng(0)
    labels = np.tile([0, 0, 1, 1], (200, 5))
    ids = rng.integers(0, 8, size=labels.shape)  # say nothing about the domain
    found = information(slots(labels), ids, labels, permutations=20)
    assert found.bits == pytest.approx([1.0])
    assert found.control[0] < 0.01
    assert 0.98 < found.low[0] <= found.high[0] <= 1


def test_permutation_keeps_what_the_token_says():
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(0, 9, size=(2, 30, 20))
    found = permuted_within(ids, labels, rng)
    assert (found != labels).any()
    for token in range(9):
        assert sorted(found[ids == token]) == sorted(labels[ids == token])


def test_specialisation_rows(model, streams, monkeypatch):
    monkeypatch.setattr(specialisation.information, "__defaults__", (5, 0))
    rows = specialisation.specialisation_rows(model, domains.changing_rows(streams, 256))
    assert [row.layer for row in rows] == [1, 2]
    for row in rows:
        assert row.above == pytest.approx(row.bits - row.control)
        assert 0 < row.shuffled < row.untrained != row.bits  # ids alone say that much


# -- removal -----------------------------------------------------------------------------------------------------

ONE_GROUP = CONFIG.replace(n_group=1, topk_group=1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_removed_expert_is_never_picked(dtype):
    """The others keep their order, and the next one moves up."""
    model = model_of(dtype, ONE_GROUP)
    batch = batch_of(np.random.default_rng(0).integers(0, 256, size=(2, 40)))
    E, K = ONE_GROUP.n_routed_experts, ONE_GROUP.num_experts_per_tok
    seen = {}
    model.forward(batch.ids, tap=lambda name, array: seen.update({name: array}))
    ranked = np.argsort(-seen["layers.1.mlp.biased_scores"], axis=-1, kind="stable")
    for e in range(E):
        lacking = Model(model.config, removal.without_expert(model.params, model.config, 1, e), TOKENIZER)
        with operations(lacking) as ops:
            found = picks(lacking, batch, ops)[:, :, 0].reshape(-1, K)
        assert (found == [[i for i in row if i != e][:K] for row in ranked]).all()
    with operations(model) as ops:  # and nothing has changed in the model itself
        assert (picks(model, batch, ops)[:, :, 0].reshape(-1, K) == ranked[:, :K]).all()


def test_too_few_experts_to_remove_one():
    config = ONE_GROUP.replace(num_experts_per_tok=ONE_GROUP.n_routed_experts)
    with pytest.raises(ValueError, match="needs"):
        removal.without_expert(random_params(config), config, 1, 0)


@pytest.mark.parametrize("config", [CONFIG, ONE_GROUP], ids=["groups", "one group"])
def test_removal_costs_are_those_of_a_forced_forward(config):
    model = model_of(np.float64, config)
    batch = batch_of(np.random.default_rng(0).integers(0, 256, size=(2, 30)), [[0] * 20 + [1] * 10] * 2)
    before = token_bits(model.forward(batch.ids, segments=batch.segments).logits, batch.targets)
    scored = batch.targets != IGNORE
    found = dict(removal.removal_costs(model, batch, numpy_ops))
    assert len(found) == 2 * config.n_routed_experts
    for (layer, e), cost in found.items():
        picked = []

        def forbid(name, array, layer=layer, e=e, picked=picked):
            if name == f"layers.{layer}.mlp.expert_indices":
                picked.append((array == e).mean())
            return array

        model.forward(batch.ids, segments=batch.segments, tap=forbid)
        bias = model.params.layers[layer].mlp.gate.e_score_correction_bias
        kept = bias[e]
        bias[e] = -1e6
        after = token_bits(model.forward(batch.ids, segments=batch.segments).logits, batch.targets)
        bias[e] = kept
        assert cost.bits == pytest.approx((after - before)[scored].mean(), abs=1e-9)
        assert cost.load == pytest.approx(picked[0])
    assert_close(sum(cost.load for (layer, _), cost in found.items() if layer == 1), 1)


def test_removal_rows_name_the_worst_domain(model, streams, monkeypatch):
    costs = {"code": 0.1, "prose": 0.2, "direct": -0.1, "worked": 0.5, "conversations": 0.0}
    given = iter(costs.values())

    def removal_costs(model, batch, ops):
        bits = next(given)
        yield (1, 0), removal.Cost(bits, 0.01, bits / 2)

    monkeypatch.setattr(removal, "removal_costs", removal_costs)
    (row,) = removal.removal_rows(model, domains.one_domain_rows(streams, 64, 32))
    assert (row.layer, row.expert, row.worst, row.cost) == (1, 0, "worked", 0.5)
    assert (row.low, row.high) == pytest.approx((0.4804, 0.5196))
    assert row.costs == costs
    assert row.load == pytest.approx(0.07)


# -- the report --------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(report, "TOKENS", 512)
    monkeypatch.setattr(specialisation.information, "__defaults__", (3, 0))


def test_report_of_some_sections(model, small):
    tables = report.report(model, ["experts", "balance"], progress=False)
    assert [table.name for table in tables] == ["balance", "experts", "removal"]
    text, page = report.as_text(tables), report.as_markdown(tables, model)
    for table in tables:
        assert table.title in text
        assert f"### {table.title}" in page
    widths = {line.count("|") for line in page.partition("### Cost")[2].splitlines() if line.startswith("|")}
    assert widths == {4}  # experts and two layers
    content = json.loads(report.as_json(tables, model))
    assert content["tables"][0]["rows"][0]["experts"] == CONFIG.n_routed_experts
    assert set(content["tables"][2]["rows"][0]["costs"]) == set(domains.DOMAINS)


def test_report_errors(model):
    with pytest.raises(ValueError, match="no section 'speed'; there are text, tasks"):
        report.report(model, ["speed"])
    with pytest.raises(ValueError, match="no way of asking 'loud'"):
        report.report(model, ["tasks"], how=["loud"])
    with pytest.raises(ValueError, match="tokenizer"):
        report.report(Model(CONFIG, model.params))


def test_tables_are_turned():
    rows = [
        accuracy.TaskRow("sums", size, how, 3, 4, 0.75, 0.3, 0.95, 0.1, 20.0)
        for how in ("direct", "thinking")
        for size in (None, 2)
    ]
    header, cells = report.shown(report.Table("tasks", "", "", rows, 0))
    assert header == ["task", "size", "items", "direct", "thinking", "chance", "tokens direct / thinking"]
    assert cells[0] == ["sums", "all", "4", "75.0 % (30.0 to 95.0)", "75.0 % (30.0 to 95.0)", "10 %", "20 / 20"]
    mtp_rows = [mtp.MtpRow("own code", "all", k, 1, 2, 0.5, 0.1, 0.9) for k in (1, 2)]
    _, cells = report.shown(report.Table("mtp", "", "", mtp_rows, 0))
    assert cells == [["own code", "all", "2", "50.0 % (10.0 to 90.0)", "50.0 % (10.0 to 90.0)", ""]]
    assert report.shown(report.Table("mtp", "", "", [], 0))[1] == [["nothing to measure"]]


def test_command(model, small, tmp_path, capsys):
    model.save(tmp_path / "m")
    out = [tmp_path / "new" / "card.md", tmp_path / "all.json"]
    command = ["eval", str(tmp_path / "m"), "--only", "balance", "--save", str(out[0]), "--json", str(out[1])]
    assert main(command) == 0
    assert "Balance of the experts" in capsys.readouterr().out
    assert "| layer | tokens | max vio |" in out[0].read_text("utf-8")
    assert json.loads(out[1].read_text("utf-8"))["tables"][0]["name"] == "balance"
    assert main(["eval", str(tmp_path / "m"), "--only", "speed"]) == 2
    assert "no section 'speed'" in capsys.readouterr().err


def test_sections_that_there_is_nothing_to_measure_for_are_left_out():
    model = load("glm-nano")
    layers = model.config.num_hidden_layers
    dense = model.config.replace(first_k_dense_replace=layers, num_nextn_predict_layers=0)
    it = Model(dense, init_params(dense, np.random.default_rng(0)), model.tokenizer, model.chat_template)
    tables = []
    with pytest.raises(ValueError, match="experts: the model has no layer with experts; leave it out with --only"):
        report.report(it, ["text", "experts"], tables=tables)
    assert tables == []  # said before anything is measured
    assert [name for name in report.SECTIONS if report._why_not(it, name)] == ["mtp", "balance", "experts"]
    assert probe_routing(it).shape[1] == 0


def test_tables_that_were_finished_are_kept(monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("minglm.evaluate.report.balance_rows", interrupted)
    tables = []
    with pytest.raises(KeyboardInterrupt):
        report.report(load("glm-nano"), ["text", "balance"], with_ngram=False, tables=tables, progress=False)
    assert [table.name for table in tables] == ["text"]
