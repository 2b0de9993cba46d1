"""The chat format: every render GLM-4.5's template is known by, and reading answers back."""

import functools
import itertools
import json
import time
from datetime import datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minglm
from minglm.chat import chat
from minglm.data.calculator import calculator
from minglm.data.chats import CALCULATOR
from minglm.text.answer import Answer, AnswerStream, Said, ToolCall, parse_answer
from minglm.text.template import ChatTemplate
from minglm.text.tools import call_tool, schema_of, tools_in

quick = settings(deadline=None, max_examples=150)
TEMPLATE = ChatTemplate()
HI = {"role": "user", "content": "Hi"}
BYE = {"role": "user", "content": "Bye"}


def render(*messages, **options):
    return TEMPLATE.render(list(messages), **options)


def said(content=None, **fields):
    return {"role": "assistant", "content": content, **fields}


def called(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


# Rendering


def test_render_plain_with_thinking_on():
    assert render(HI) == "[gMASK]<sop><|user|>\nHi<|assistant|>"
    assert render(HI, enable_thinking=True) == render(HI)


def test_render_thinking_off_marks_every_user_turn_once():
    expected = "[gMASK]<sop><|user|>\nHi/nothink<|assistant|>\n<think></think>"
    assert render(HI, enable_thinking=False) == expected
    assert render({"role": "user", "content": "Hi/nothink"}, enable_thinking=False) == expected
    turns = render(HI, said("Hello"), BYE, enable_thinking=False)
    assert turns == (
        "[gMASK]<sop><|user|>\nHi/nothink<|assistant|>\n<think></think>\nHello"
        "<|user|>\nBye/nothink<|assistant|>\n<think></think>"
    )


def test_render_system_and_no_generation_prompt():
    messages = [{"role": "system", "content": "Be brief."}, HI]
    assert render(*messages) == "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi<|assistant|>"
    assert render(*messages, add_generation_prompt=False) == "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi"


@pytest.mark.parametrize(
    "answer",
    [
        said("Hello"),
        said("Hello", reasoning_content="because"),
        said("\n<think>because</think>\nHello"),
        said("because</think>\n\n Hello \n"),
    ],
)
def test_render_drops_thinking_before_the_last_user_turn(answer):
    expected = "[gMASK]<sop><|user|>\nHi<|assistant|>\n<think></think>\nHello<|user|>\nBye<|assistant|>"
    assert render(HI, answer, BYE) == expected


@pytest.mark.parametrize(
    "answer", [said("Hello", reasoning_content=" because\n"), said("<think>\nbecause\n</think>\n\nHello")]
)
def test_render_keeps_thinking_after_the_last_user_turn(answer):
    expected = "[gMASK]<sop><|user|>\nHi<|assistant|>\n<think>because</think>\nHello"
    assert render(HI, answer, add_generation_prompt=False) == expected


def test_render_finds_the_last_user_turn_among_equal_ones():
    turns = render(HI, said("a", reasoning_content="one"), HI, said("b", reasoning_content="two"))
    assert "one" not in turns
    assert "<think>two</think>" in turns


def test_render_user_text_is_not_stripped_and_not_escaped():
    text = "  <b>&\"'{{ x }}\n\n"
    assert render({"role": "user", "content": text}) == f"[gMASK]<sop><|user|>\n{text}<|assistant|>"


def test_render_list_content_is_joined():
    parts = [{"type": "text", "text": "H"}, "i"]
    assert render({"role": "user", "content": parts}) == render(HI)


def test_render_tools_block_comes_before_the_system_turn():
    tools = [tool("wetter", ort={"type": "string", "description": "Stadt: Köln, 北京 <b>"}), tool("now")]
    text = render({"role": "system", "content": "Be brief."}, HI, tools=tools)
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in tools)
    assert text.startswith("[gMASK]<sop><|system|>\n# Tools\n\n")
    assert f"<tools>\n{lines}</tools>\n\n" in text
    assert text.endswith("</tool_call><|system|>\nBe brief.<|user|>\nHi<|assistant|>")
    assert render(HI, tools=[]) == render(HI, tools=None) == render(HI)


def test_render_call_with_strings_raw_and_the_rest_as_json():
    answer = said(tool_calls=[called("f", {"a": " x ", "b": True, "c": [1, "ä"], "d": None, "e": 1.5})])
    assert render(HI, answer, add_generation_prompt=False).removeprefix("[gMASK]<sop><|user|>\nHi") == (
        "<|assistant|>\n<think></think>\n<tool_call>f\n"
        "<arg_key>a</arg_key>\n<arg_value> x </arg_value>\n"
        "<arg_key>b</arg_key>\n<arg_value>true</arg_value>\n"
        '<arg_key>c</arg_key>\n<arg_value>[1, "ä"]</arg_value>\n'
        "<arg_key>d</arg_key>\n<arg_value>null</arg_value>\n"
        "<arg_key>e</arg_key>\n<arg_value>1.5</arg_value>\n</tool_call>"
    )


@pytest.mark.parametrize("call", [called("now", {}), called("now", None), {"name": "now"}])
def test_render_call_without_arguments(call):
    text = render(HI, said(tool_calls=[call]), add_generation_prompt=False)
    assert text.endswith("<|assistant|>\n<think></think>\n<tool_call>now\n</tool_call>")


def test_render_content_then_several_calls():
    answer = said("Let me see.", tool_calls=[called("a", {}), called("b", {})])
    text = render(HI, answer, add_generation_prompt=False)
    assert text.endswith("\nLet me see.\n<tool_call>a\n</tool_call>\n<tool_call>b\n</tool_call>")


def test_render_results_open_one_observation_per_run():
    results = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    expected = (
        "<|observation|>\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|assistant|>"
    )
    assert render(HI, *results).endswith("Hi" + expected)
    assert render(HI, {"role": "tool", "content": [{"output": "1"}, "2"]}).endswith("Hi" + expected)
    again = render(HI, results[0], said("ok"), results[1])
    assert again.count("<|observation|>") == 2


def test_render_thinking_is_kept_through_a_tool_loop():
    answer = said("", reasoning_content="ask", tool_calls=[called("now", {})])
    text = render(HI, answer, {"role": "tool", "content": "12:00"})
    assert text == (
        "[gMASK]<sop><|user|>\nHi<|assistant|>\n<think>ask</think>\n<tool_call>now\n</tool_call>"
        "<|observation|>\n<tool_response>\n12:00\n</tool_response><|assistant|>"
    )


def test_render_leaves_the_messages_alone():
    message = said(tool_calls=[called("now", {})])
    render(HI, message)
    assert message["content"] is None


# Messages that are refused


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("Hi", r"messages is str; wanted a list"),
        (HI, r"messages is dict; wanted a list"),
        ([HI, "Hi"], r"messages\[1\] is str"),
        ([{"content": "Hi"}], r"messages\[0\]: role is None; wanted one of system"),
        ([HI, {"role": "bot", "content": "Hi"}], r"messages\[1\]: role is 'bot'"),
        ([HI, said(None)], r"messages\[1\]: content is missing or None"),
        ([{"role": "user"}], r"messages\[0\]: content is missing"),
        ([{"role": "user", "content": 5}], r"messages\[0\]: content is int"),
        ([{"role": "user", "content": ["a", {"type": "image"}]}], r"content\[1\] is not text"),
        ([said(tool_calls={"name": "f"})], r"messages\[0\]: tool_calls is dict"),
        ([said(tool_calls=[{"function": {}}])], r"tool_calls\[0\] has no function name"),
        ([said(tool_calls=["f"])], r"tool_calls\[0\] has no function name"),
        (
            [HI, said(tool_calls=[called("g", {}), called("f", '{"a": 1}')])],
            r"messages\[1\]: tool_calls\[1\]: arguments is str; wanted a dict. Try json.loads",
        ),
        ([said(tool_calls=[called("f", [1])])], r"tool_calls\[0\]: arguments is list"),
        ([said(tool_calls=[called("f", {"a": {1}})])], r"messages\[0\] holds .* set"),
    ],
)
def test_wrong_message_is_named(messages, says):
    with pytest.raises(ValueError, match=says):
        TEMPLATE.render(messages)


def test_wrong_tools_are_named():
    with pytest.raises(ValueError, match="tools is not a list"):
        render(HI, tools={"name": "f"})


# Templates of other checkpoints


def test_template_that_does_not_compile_names_the_line():
    with pytest.raises(ValueError, match="chat template, line 2: "):
        ChatTemplate("a\n{% if %}")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('no tools here') }}", "line 1: TemplateError: no tools here"),
        ("\n\n{{ messages[0].a.b }}", "line 3: UndefinedError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_template_that_fails_says_where(source, says):
    with pytest.raises(ValueError, match=says):
        ChatTemplate(source).render([HI])


def test_template_is_set_up_as_hugging_face_does():
    source = "  {% for m in messages %}\n  {% if loop.index0 %}\n{% break %}\n  {% endif %}\n{{ m | tojson }}\n"
    source += "{% endfor %}\n{{ strftime_now('%Y') | length }}{{ clear_thinking }}"
    rendered = ChatTemplate(source).render([{"role": "user", "content": "ä<"}, HI], clear_thinking=False)
    assert rendered == '{"role": "user", "content": "ä<"}\n4False'


def test_load_prefers_the_checkpoints_own_template(tmp_path):
    assert ChatTemplate.load(tmp_path).source == TEMPLATE.source
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{}")
    assert ChatTemplate.load(tmp_path).source == TEMPLATE.source
    config.write_text('{"chat_template": "in config"}')
    assert ChatTemplate.load(tmp_path).render([HI]) == "in config"
    config.write_text('{"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}')
    assert ChatTemplate.load(tmp_path).render([HI]) == "d"
    (tmp_path / "chat_template.jinja").write_text("own 你", encoding="utf-8")
    assert ChatTemplate.load(tmp_path).render([HI]) == "own 你"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "rag", "template": "r"}]}'),
        ("chat_template.jinja", b"{% if %}"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_damaged_template_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="cannot use the chat template in"):
        ChatTemplate.load(tmp_path)


# Answers: thinking


@pytest.mark.parametrize(
    ("text", "thinking", "content"),
    [
        ("\n<think>so</think>\nHello", "so", "Hello"),
        ("<think>so</think>Hello", "so", "Hello"),
        ("\n<think></think>\nHello", None, "Hello"),
        ("Hello", None, "Hello"),
        ("so</think>Hello", "so", "Hello"),  # GLM-4.7: the prompt has opened the block
        ("</think>Hello", None, "Hello"),
        ("\n<think>so it goes on", "so it goes on", None),
        ("<think>", None, None),
        ("<think>so</think>", "so", None),
        ("<think>so</think> \n ", "so", None),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
        ("<think></think>\n<think>so</think>\nHello", "so", "Hello"),
        ("", None, None),
        (" \n", None, None),
    ],
)
def test_thinking_is_told_from_content(text, thinking, content):
    assert parse_answer(text) == Answer(thinking, content, [])


def test_call_inside_thinking_is_thinking():
    inside = "try <tool_call>f\n</tool_call> first"
    assert parse_answer(f"\n<think>{inside}</think>\nDone") == Answer(inside, "Done", [])
    assert parse_answer(f"{inside}</think>Done") == Answer(inside, "Done", [])
    assert parse_answer(f"<think>{inside}") == Answer(inside, None, [])
    after = parse_answer(f"<think>{inside}</think>\n<tool_call>g\n</tool_call>")
    assert after == Answer(inside, None, [ToolCall("g", {})])


def test_end_of_thinking_inside_a_value_is_the_value():
    text = "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x</think>y</arg_value>\n</tool_call>"
    assert parse_answer(text) == Answer(None, None, [ToolCall("f", {"a": "x</think>y"})])


# Answers: calls

TOOLS = [
    tool(
        "f",
        s={"type": "string"},
        n={"type": "integer"},
        o={"anyOf": [{"type": "string"}, {"type": "null"}]},
        u={"type": ["string", "integer"]},
        t={"type": ["string", "null"]},
        free={},
    )
]


def call_text(name, *pairs):
    body = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in pairs)
    return f"\n<tool_call>{name}\n{body}</tool_call>"


@pytest.mark.parametrize(
    "text",
    [
        "\n<tool_call>now\n</tool_call>",
        "<tool_call>now</tool_call>",
        "<tool_call>\nnow\n</tool_call>",
        "<think></think><tool_call> now </tool_call>",
    ],
)
def test_call_without_arguments(text):
    assert parse_answer(text) == Answer(None, None, [ToolCall("now", {})])


def test_calls_of_both_layouts_parse_alike():
    inline = "<tool_call>f<arg_key>s</arg_key><arg_value>x</arg_value><arg_key>n</arg_key><arg_value>2</arg_value>"
    expected = Answer(None, "See:", [ToolCall("f", {"s": "x", "n": 2})])
    assert parse_answer(f"See:{inline}</tool_call>", TOOLS) == expected
    assert parse_answer("See:" + call_text("f", ("s", "x"), ("n", "2")), TOOLS) == expected


def test_several_calls_keep_their_order():
    answer = parse_answer(call_text("a", ("k", "1")) + call_text("b") + call_text("a", ("k", "2")))
    assert answer.tool_calls == [ToolCall("a", {"k": 1}), ToolCall("b", {}), ToolCall("a", {"k": 2})]
    assert answer.content is None


@pytest.mark.parametrize(
    ("key", "raw", "value"),
    [
        ("s", "10001", "10001"),
        ("s", "123_456", "123_456"),
        ("s", "  two spaces  \n", "  two spaces  \n"),
        ("s", "", ""),
        ("s", "null", "null"),
        ("s", '{"a": 1}', '{"a": 1}'),
        ("o", "true", "true"),
        ("o", "null", None),
        ("t", " null ", None),
        ("t", "10001", "10001"),
        ("u", "10001", 10001),
        ("u", "abc", "abc"),
        ("n", " 5 \n", 5),
        ("n", "five", "five"),
        ("free", "10001", 10001),
        ("free", "true", True),
        ("free", "True", True),
        ("free", "None", None),
        ("free", '[1, "a"]', [1, "a"]),
        ("free", "{'a': (1, 2)}", {"a": [1, 2]}),
        ("free", " plain ", " plain "),
        ("free", "{1, 2}", "{1, 2}"),
        ("free", "'\\d'", "\\d"),
        ("other", "1.5", 1.5),
    ],
)
def test_values_follow_the_schema(key, raw, value):
    answer = parse_answer(call_text("f", (key, raw)), TOOLS)
    got = answer.tool_calls[0].arguments[key]
    assert got == value
    assert type(got) is type(value)


def test_schema_is_found_for_every_layout_of_tools_and_call():
    bare = [TOOLS[0]["function"]]
    for text in ("<tool_call>f\n", "<tool_call>f", "<tool_call>\nf \n"):
        body = "<arg_key>s</arg_key><arg_value>10001</arg_value></tool_call>"
        for tools in (TOOLS, bare):
            assert parse_answer(text + body, tools).tool_calls == [ToolCall("f", {"s": "10001"})]


@pytest.mark.parametrize(
    "value",
    [
        "a </tool_call> b",
        "</tool_call>",
        "<tool_call>g\n</tool_call>",
        "the </arg_value> tag",
        "the <arg_value> tag",
        "<arg_key>k</arg_key>",
        "<think>x</think>",
        "<|user|>\nHi",
        call_text("g", ("a", "1")),
        "a lone </arg_value> and" + call_text("g", ("a", "1")),
        call_text("g", ("a", "1"), ("b", "2")) + call_text("h", ("c", "3")),
        call_text("g", ("a", call_text("h", ("b", "2")))),
    ],
)
def test_tags_inside_a_value_are_the_value(value):
    text = call_text("f", ("s", value), ("n", "1")) + call_text("f", ("s", "next"))
    calls = [ToolCall("f", {"s": value, "n": 1}), ToolCall("f", {"s": "next"})]
    assert parse_answer(text, TOOLS) == Answer(None, None, calls)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call>f",
        "<tool_call>f\n<arg_key>a",
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1",
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>",
        "<tool_call>f\n<arg_key>a</arg_key>\n</tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>two words</tool_call>",
        "</tool_call>",
        "use the <tool_call> tag",
    ],
)
def test_incomplete_call_stays_in_the_content(text):
    assert parse_answer(text) == Answer(None, text, [])


@pytest.mark.parametrize("text", ["use the <tool_call> tag:", "<tool_call>f\n<arg_key>a", "<tool_call>"])
def test_call_after_an_incomplete_one_is_found(text):
    assert parse_answer(text + call_text("now")) == Answer(None, text, [ToolCall("now", {})])


def test_text_around_calls_is_content():
    text = "\n<think>so</think>\nFirst." + call_text("a") + "\nThen." + call_text("b") + "\n<tool_call>c"
    expected = Answer("so", "First.\nThen.\n<tool_call>c", [ToolCall("a", {}), ToolCall("b", {})])
    assert parse_answer(text) == expected


# Properties

TAGS = "<think> </think> <tool_call> </tool_call> <arg_key> </arg_key> <arg_value> </arg_value>".split()
TAG = st.sampled_from([*TAGS, "f", "\n", " ", "1", "'", "(", "["])


@quick
@given(st.lists(st.one_of(TAG, st.text(max_size=5)), max_size=25).map("".join))
def test_no_text_makes_it_fail(text):
    answer = parse_answer(text, TOOLS)
    json.dumps(answer.tool_calls)
    assert answer.content is None or answer.content.strip() == answer.content != ""


@pytest.mark.parametrize("raw", ["[" * 100_000, "(" * 100_000, "-" * 100_000 + "1", "9" * 100_000, "{'a':" * 9999])
def test_monstrous_values_stay_text(raw):
    assert parse_answer(call_text("f", ("free", raw)), TOOLS).tool_calls == [ToolCall("f", {"free": raw})]


@pytest.mark.parametrize(
    "piece",
    [
        "<tool_call>",
        "<tool_call>f",
        "</think>",
        "<think>",
        "</arg_value>",
        "<tool_call>f<arg_key>a</arg_key><arg_value>",
        "<tool_call>f<arg_key>a</arg_key><arg_value></arg_value>",
    ],
)
def test_long_broken_answers_do_not_hang(piece):
    """Where each tag is searched for to the end of the text, this takes minutes."""
    answer = parse_answer(piece * (1_000_000 // len(piece)))
    assert not answer.tool_calls


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=12)
TAGS_IN_VALUES = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "</arg_value>.", "<"]
STRINGS = st.lists(st.one_of(WORDS, st.sampled_from(TAGS_IN_VALUES)), max_size=5).map("".join)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), STRINGS)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3))
NAMES = st.from_regex(r"[a-zA-Z_][\w.-]{0,10}", fullmatch=True)
ARGUMENTS = st.dictionaries(NAMES, JSON, max_size=4)


def value_schema(value):
    return {"type": "string"} if isinstance(value, str) else {}


@quick
@given(st.lists(st.tuples(NAMES, ARGUMENTS), max_size=3, unique_by=lambda call: call[0]), WORDS, WORDS)
def test_rendered_answer_parses_back(calls, thinking, content):
    tools = [tool(name, **{key: value_schema(value) for key, value in args.items()}) for name, args in calls]
    message = said(content, reasoning_content=thinking, tool_calls=[called(*call) for call in calls])
    answer = render(HI, message, add_generation_prompt=False).removeprefix(render(HI))
    expected = Answer(thinking.strip() or None, content.strip() or None, [ToolCall(*call) for call in calls])
    assert parse_answer(answer, tools) == expected


# -- what went wrong once ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"output": "lost"}]},
        {"role": "user", "content": [{"type": "text", "text": None}]},
        {"role": "user", "content": [{"type": "image_url", "text": "x"}]},
        {"role": "assistant", "content": "a", "reasoning_content": 5},
        {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": 0}}]},
    ],
)
def test_nothing_is_dropped_in_silence(message):
    with pytest.raises(ValueError, match=r"messages\[0\]"):
        ChatTemplate().render([message])


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "{% if a %}" * 120 + "{% endif %}" * 120,
        "{% break %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
)
def test_templates_that_break_the_compiler_are_refused(source):
    with pytest.raises(ValueError, match="chat template"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for a in range(9999) %}" * 3 + "{% endfor %}" * 3, "ran for more than 2 seconds and was stopped"),
        ('{{ "a" * 10 ** 10 }}', "memory"),
        ('{% set ns = namespace(s="ab") %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}', "memory"),
        ("{{ range(10 ** 9) }}", "chat template"),
    ],
)
def test_templates_from_outside_have_bounds(source, message):
    """Compiled, too: Jinja computes constant expressions when it compiles."""
    began = time.monotonic()
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source).render([HI])
    assert time.monotonic() - began < 60


def test_a_template_from_outside_renders_the_same_as_here():
    """Ours with one more comment is not ours, and goes through a child process."""
    other = ChatTemplate(TEMPLATE.source + "{# mine #}")
    tools = [{"type": "function", "function": {"name": "f", "description": "«你»", "parameters": {}}}]
    messages = [HI, {"role": "assistant", "content": "\n", "reasoning_content": "x"}, HI]
    for options in ({}, {"enable_thinking": False}, {"tools": tools}):
        assert other.render(messages, **options) == TEMPLATE.render(messages, **options)
    assert "sandbox" not in repr(other.render(messages))


@pytest.mark.parametrize("schema", [{"type": 5}, {"anyOf": 5}, {"type": [{}]}, {"oneOf": [3]}, 7])
def test_odd_schemas_count_as_untyped(schema):
    tools = [{"function": {"name": "f", "parameters": {"properties": {"k": schema}}}}]
    text = "<tool_call>f\n<arg_key>k</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
    assert parse_answer(text, tools).tool_calls[0].arguments == {"k": 1}


# -- piece by piece ----------------------------------------------------------------------------------------------

CALL = "<tool_call>f\n<arg_key>k</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>"
PARTS = [
    "Hello ", "\n", " ", "<", "</", "<tool", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_value>", "a < b",
    "<tool_call>now\n</tool_call>", CALL.format("1"), CALL.format("123_456"), CALL.format(' "x" '),
    CALL.format("a</arg_value> b"), CALL.format("<arg_value>in</arg_value>"), CALL.format("</tool_call>"),
    CALL.format("<tool_call>g\n</tool_call>"), "<tool_call>f<arg_key>a</arg_key><arg_value>[1]</arg_value></tool_call>",
]  # fmt: skip
THOUGHTS = ["", "<think></think>", "\n<think>so</think>\n", "<think>a < b <tool_call>g\n</tool_call> </thin</think>",
            "<think>never closed ", "\n<think></think>\n<think>again</think>"]  # fmt: skip
TOOLS_HERE = [{"function": {"name": "f", "parameters": {"properties": {"k": {"type": "string"}}}}}]


def streamed(text, cuts, opened=False):
    """The answer, and what was said on the way, of a text that came cut in these places."""
    stream, said = AnswerStream(TOOLS_HERE, opened), []
    for start, stop in itertools.pairwise([0, *sorted(cuts), len(text)]):
        said += stream.feed(text[start:stop])
    return stream, [*said, *stream.finish()]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(THOUGHTS), st.lists(st.sampled_from(PARTS), max_size=6), st.data())
def test_a_stream_ends_as_the_whole_text_does(thought, parts, data):
    text = thought + "".join(parts)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    stream, said = streamed(text, cuts)
    assert stream.answer == parse_answer(text, TOOLS_HERE)
    assert [call for kind, _, call in said if kind == "call"] == stream.answer.tool_calls
    assert "".join(t for kind, t, _ in said if kind == "thinking").split() == (stream.answer.thinking or "").split()


@pytest.mark.parametrize("text", [thought + "".join(PARTS[:4]) + CALL.format("1") + "done" for thought in THOUGHTS])
def test_one_character_at_a_time(text):
    stream, _ = streamed(text, range(1, len(text)))
    assert stream.answer == parse_answer(text, TOOLS_HERE)


def test_text_is_shown_as_soon_as_it_cannot_be_a_tag():
    stream = AnswerStream()
    assert stream.feed("He") == [Said("content", "He")]
    assert stream.feed("llo <") == [Said("content", "llo ")]
    assert stream.feed("3") == [Said("content", "<3")]
    assert stream.feed("<tool_call>now\n</tool") == []
    assert stream.feed("_call> ok")[0] == Said("call", call=ToolCall("now", {}))
    thinking = AnswerStream()
    assert thinking.feed("\n<thi") == []
    assert thinking.feed("nk>so</th") == [Said("thinking", "so")]
    assert thinking.feed("ink>yes") == [Said("content", "yes")]


VALUE = "<tool_call>f<arg_key>k</arg_key><arg_value>"


@pytest.mark.parametrize(
    ("before", "piece"),
    [
        ("", " "),
        ("", "<"),
        ("<think>", " "),
        ("<tool_call>", " </tool_call>"),
        ("<tool_call>f <arg_key>", "x</tool_call>"),
        (VALUE, "x</tool_call>"),
        (VALUE + "<arg_value>" * 3000, "</arg_value></tool_call>"),
        (VALUE, "<arg_value></arg_value></tool_call>"),
        ("<tool_call>" + " " * 100_000 + "<", "</tool_call>"),
        (VALUE + "</arg_value><arg_key>" + "x" * 100_000, "</tool_call>"),
    ],
)
def test_hostile_streams_do_not_hang(before, piece):
    """Where what is held is read again at each tag, this takes ten seconds and more."""
    stream, began = AnswerStream(), time.process_time()
    stream.feed(before)
    for start in range(0, 100_000, 4):
        stream.feed((piece * 5)[start % len(piece) :][:4])
    stream.finish()
    assert time.process_time() - began < 3


def test_a_prompt_that_has_opened_the_thinking():
    stream, _ = streamed("so it is</think>Hello", [3, 9, 14], opened=True)
    assert stream.answer == Answer("so it is", "Hello", []) == parse_answer("so it is</think>Hello")


# -- Python functions as tools -----------------------------------------------------------------------------------


def weather(city: str, days: int = 1, units: str | None = None, exact: bool = False, at: list[float] = ()) -> str:
    """What the weather will be,
    as far as one knows.

    More about it.
    """


def test_a_function_s_schema():
    assert schema_of(weather) == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "What the weather will be, as far as one knows.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "units": {"type": "string"},
                    "exact": {"type": "boolean"},
                    "at": {"type": "array"},
                },
                "required": ["city"],
            },
        },
    }
    assert schema_of(calculator) == CALCULATOR  # what the shipped models were trained with


def test_functions_that_make_no_tool():
    def many(*numbers):
        pass

    def odd(when: complex):
        pass

    with pytest.raises(ValueError, match=r"tool many: \*numbers cannot be given by name"):
        schema_of(many)
    with pytest.raises(ValueError, match=r"tool odd: when is .*complex.*; take str, int, float"):
        schema_of(odd)


def test_tools_of_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from math import sqrt\ndef twice(n: int) -> int:\n    return 2 * n\ndef _hidden(): ...\n")
    tools = tools_in(path)
    assert list(tools) == ["twice"]
    assert call_tool(ToolCall("twice", {"n": 4}), tools) == "8"
    path.write_text("1 / 0")
    with pytest.raises(ValueError, match=r"mine.py: ZeroDivisionError"):
        tools_in(path)
    path.write_text("x = 1")
    with pytest.raises(ValueError, match="defines no function"):
        tools_in(path)
    with pytest.raises(ValueError, match=r"nowhere\.py: FileNotFoundError"):
        tools_in(tmp_path / "nowhere.py")


def test_what_is_no_plain_function_makes_no_tool():
    class Callable:
        def __call__(self, n: int) -> int:
            return n

    async def later(n: int) -> int:
        return n

    for each, name in ((functools.partial(weather, "here"), "functools.partial"), (Callable(), "Callable"),
                       (later, "later")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"tool .*{name}.*: only a plain function can be one; write a def"):
            schema_of(each)


@pytest.mark.parametrize("hint", ["Nope", "1+", "Decimal", "list[Nope]", "1/0", "[1]"])
def test_annotations_that_say_nothing_name_tool_and_parameter(tmp_path, hint):
    path = tmp_path / "mine.py"
    head = (
        "from __future__ import annotations\nimport typing\nif typing.TYPE_CHECKING:\n    from decimal import Decimal\n"
    )
    for start, written in ((head, hint if hint != "1+" else "'1+'"), ("", repr(hint))):
        path.write_text(f"{start}def f(city: str, x: {written}) -> Nowhere:\n    return x\n".replace(
            "-> Nowhere", "-> 'Nowhere'"))  # fmt: skip
        with pytest.raises(ValueError, match="tool f: x"):
            schema_of(tools_in(path)["f"])


def test_annotations_as_text_are_resolved_where_they_can_be(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from __future__ import annotations\ndef f(n: int, s: str | None = None) -> Nope: ...\n")
    assert schema_of(tools_in(path)["f"])["function"]["parameters"]["properties"] == {
        "n": {"type": "integer"},
        "s": {"type": "string"},
    }


def test_whatever_a_tool_does_becomes_text():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    class Other(BaseException):
        pass

    def raises(error):
        raise error

    for error, wanted in ((SystemExit(3), "3"), (SystemExit(), "SystemExit"), (Mute(), "Mute"), (Other("so"), "so")):
        assert call_tool(ToolCall("f", {}), {"f": lambda error=error: raises(error)}) == f"error: {wanted}"
    assert call_tool(ToolCall("f", {}), {"f": lambda: "a\ud800b"}) == "a?b"
    with pytest.raises(KeyboardInterrupt):
        call_tool(ToolCall("f", {}), {"f": lambda: raises(KeyboardInterrupt())})


def test_a_tool_file_that_leaves(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import sys\nsys.exit('no thanks')\n")
    with pytest.raises(ValueError, match=r"mine\.py: SystemExit: no thanks"):
        tools_in(path)


@pytest.mark.parametrize(
    ("switch", "value"), [("now", datetime(2025, 8, 11)), ("enable_thinking", np.True_), ("add_generation_prompt", {1})]
)
def test_switches_that_json_cannot_say_are_named(switch, value):
    for template in (TEMPLATE, ChatTemplate("{{ enable_thinking }}")):
        with pytest.raises(ValueError, match=f"{switch} holds something that JSON cannot say"):
            template.render([HI], **{switch: value})


def test_chatting_with_a_tool(capsys, monkeypatch):
    """The shipped model asks the calculator, which runs."""
    lines = iter(["/nothink", "(4821+937)*3", "/think", "17+25", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat(minglm.load("glm-tiny"), tools={"calculator": calculator})
    said = capsys.readouterr().out
    assert "Tools: calculator" in said
    assert "→ calculator(expression='(4821+937)*3')" in said
    assert "= 17274" in said
    assert "(without thinking)" in said
    assert "\033[" not in said  # not a terminal


# A template in the manner of GLM-4.7: no newlines around tags, thinking opened or closed by the prompt, calls inline,
# and the reasoning of earlier answers kept with `clear_thinking=False`

GLM47 = """[gMASK]<sop>
{%- if tools %}<|system|>{% for tool in tools %}{{ tool | tojson(ensure_ascii=False) }}{% endfor %}{% endif %}
{%- for m in messages %}
  {%- if m.role == "assistant" %}<|assistant|>
    {%- if m.reasoning_content and clear_thinking is defined and not clear_thinking -%}
      <think>{{ m.reasoning_content }}</think>
    {%- else %}</think>{% endif %}{{ m.content }}
    {%- for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}
      {%- for k, v in call.function.arguments.items() -%}
        <arg_key>{{ k }}</arg_key><arg_value>{{ v if v is string else v | tojson }}</arg_value>
      {%- endfor %}</tool_call>{% endfor %}
  {%- elif m.role == "tool" %}<|observation|><tool_response>{{ m.content }}</tool_response>
  {%- else %}<|{{ m.role }}|>{{ m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{{ "<think>" if enable_thinking else "</think>" }}{% endif %}"""


def test_a_template_like_glm_47_s_renders_and_its_answers_are_read():
    template, f = ChatTemplate(GLM47), TOOLS[0]
    call = {"function": {"name": "f", "arguments": {"s": "123_456", "n": 7}}}
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "reasoning_content": "so", "tool_calls": [call]},
        {"role": "tool", "content": "done"},
    ]
    pairs = "<arg_key>s</arg_key><arg_value>123_456</arg_value><arg_key>n</arg_key><arg_value>7</arg_value>"
    inline = f"<tool_call>f{pairs}</tool_call>"
    kept = template.render(messages, tools=[f], clear_thinking=False)
    assert f"<|user|>go<|assistant|><think>so</think>{inline}<|observation|><tool_response>done" in kept
    assert kept.endswith("<|assistant|><think>")
    cleared = template.render(messages, tools=[f], enable_thinking=False)
    assert f"<|assistant|></think>{inline}" in cleared
    assert cleared.endswith("<|assistant|></think>")
    wanted = Answer("so", None, [ToolCall("f", {"s": "123_456", "n": 7})])
    assert parse_answer(f"so</think>{inline}", [f]) == wanted
    for size in (1, 3, 1000):
        stream, text = AnswerStream([f], opened=True), f"so</think>{inline}"
        for start in range(0, len(text), size):
            list(stream.feed(text[start : start + size]))
        stream.finish()
        assert stream.answer == wanted
