"""Generated tasks: right answers, thinking true step by step, and a held-out split that nothing leaks through."""

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.data import words
from minglm.data.calculator import calculate
from minglm.data.tasks import (
    TASKS,
    Item,
    Task,
    canonical,
    check,
    check_steps,
    gives_away,
    heldout_items,
    is_heldout,
    make_train,
    plain,
)

EVERY_TASK = pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)


def _items(task: Task, count: int = 400, seed: int = 0, size: int | None = None) -> list[Item]:
    rng = np.random.default_rng(seed)
    return [task.make(rng, size) for _ in range(count)]


# -- what holds for every task --


@EVERY_TASK
def test_a_question_alone_gives_the_same_steps_and_answer(task: Task) -> None:
    for item in _items(task, 1500):
        assert item.task == task.name
        assert task.solve(item.question) == (item.steps, item.answer)


@EVERY_TASK
def test_items_are_well_formed(task: Task) -> None:
    for item in _items(task):
        assert item.answer
        assert "\n" not in item.question + item.answer
        for text in (item.question, item.steps, item.answer):
            assert text == text.strip() != ""
        assert not item.question.endswith(("=", ":"))
        assert "\n\n" not in item.steps
        assert 0 < item.chance <= 0.5


@EVERY_TASK
def test_sizes_are_honoured_and_all_drawn(task: Task) -> None:
    for size in task.sizes:
        for item in _items(task, 60, size=size):
            assert item.size == size == _measured_size(item)
    assert Counter(item.size for item in _items(task, 600)).keys() == set(task.sizes)
    for wrong in (0, max(task.sizes) + 1):
        with pytest.raises(ValueError, match=rf"'{task.name}' has no size {wrong}: wanted one of {task.sizes[0]}, "):
            task.make(np.random.default_rng(0), wrong)


def _measured_size(item: Item) -> int:
    numbers = re.findall(r"\d+", item.question)
    asked = item.question.split()[-1]
    match item.task:
        case "addition" | "subtraction":
            return max(map(len, numbers))
        case "multiplication":
            return sum(map(len, numbers))
        case "sums":
            return len(numbers) - 1  # without the 10 of "mod 10"
        case "calculator":
            return len(numbers)
        case "follow":
            return int(numbers[0])
        case "number_words":
            return len(item.answer if item.answer.isdigit() else asked)
        case "sort":
            return len(item.question.split()) - 1
        case "python":
            return len(item.steps.split("\n"))
    return len(asked)


@EVERY_TASK
def test_solve_refuses_what_is_no_question(task: Task) -> None:
    for text in ("", "hello", "1+", "+1", "12+3\n", "words", "sort", "__import__('os')", "٣+٤"):
        with pytest.raises(ValueError, match=rf"no question of task '{task.name}': wanted something like|is no number"):
            task.solve(text)


def test_the_answers_first_line_is_checked() -> None:
    item = Item("addition", "1+2", "1+2+0=03", "3", 1, 0.1)
    assert check(item, "3")
    assert check(item, " 3 \n99+1=100")
    for wrong in ("", "\n3", "33", "3 4", "4"):
        assert not check(item, wrong)
    assert check_steps(item, "1+2+0=03\n")
    for wrong in ("", "1+2+0=04", "1+2+0=03 0+0+0=00", "1+2+0=03\n1+2+0=03"):
        assert not check_steps(item, wrong)


def test_plain_text() -> None:
    item = Item("addition", "1+2", "1+2+0=03", "3", 1, 0.1)
    assert plain(item, thinking=False) == ("1+2=", "3\n")
    assert plain(item, thinking=True) == ("1+2:\n", "1+2+0=03\n=3\n")


def test_formats() -> None:
    """One item of each kind, as the documentation shows it."""
    shown = {
        ("addition", "4821+937"): ("1+7+0=08 2+3+0=05 8+9+0=17 4+0+1=05", "5758"),
        ("addition", "9+8"): ("9+8+0=17", "17"),
        ("subtraction", "4821-937"): ("4821-937\n1-7-0+10=4 2-3-1+10=8 8-9-1+10=8 4-0-1+00=3", "3884"),
        ("subtraction", "937-4821"): ("-(4821-937)\n1-7-0+10=4 2-3-1+10=8 8-9-1+10=8 4-0-1+00=3", "-3884"),
        ("subtraction", "100-99"): ("100-99\n0-9-0+10=1 0-9-1+10=0 1-0-1+00=0", "1"),
        ("subtraction", "12-12"): ("12-12\n2-2-0+00=0 1-1-0+00=0", "0"),
        ("multiplication", "478*3"): ("478*3: 8*3+0=24 7*3+2=23 4*3+2=14 =1434", "1434"),
        ("multiplication", "20*478"): (
            "478*0: 8*0+0=00 7*0+0=00 4*0+0=00 =0\n478*20: 8*2+0=16 7*2+1=15 4*2+1=09 =9560\n"
            "0+9560: 0+0+0=00 0+6+0=06 0+5+0=05 0+9+0=09",
            "9560",
        ),
        ("sums", "3+8+1+9+4 mod 10"): ("3+8=1 1+1=2 2+9=1 1+4=5", "5"),
        ("follow", "C>A A>F F>C from F 2 times"): ("F>C C>A", "A"),
        ("number_words", "words 342"): ("300 three hundred\n40 forty\n2 two", "three hundred forty-two"),
        ("number_words", "number two thousand thirteen"): ("two thousand 2000\nthirteen 13", "2013"),
        ("number_words", "中文 1004"): ("1000 一千\n0 零\n4 四", "一千零四"),
        ("number_words", "数字 一百一十"): ("一百 100\n一十 10", "110"),
        ("number_words", "words 0"): ("0 zero", "zero"),
        ("reverse", "reverse HELLO"): ("1:H 2:E 3:L 4:L 5:O\n5:O 4:L 3:L 2:E 1:H", "OLLEH"),
        ("sort", "sort 31 7 42"): ("31 7 42: 7\n31 42: 31\n42: 42", "7 31 42"),
        ("sort", "sort C A C"): ("C A C: A\nC C: C\nC: C", "A C C"),
        ("count", "count A in BANANA"): ("B:0 A:1 N:1 A:2 N:2 A:3", "3"),
        ("python", 'max(len("abc")+3,9)-2'): ("max(3+3,9)-2\nmax(6,9)-2\n9-2\n7", "7"),
        ("python", '("abc"+"de")[::-1]'): ('"abcde"[::-1]\n"edcba"', '"edcba"'),
        ("python", "3 if 2>5 else 7"): ("3 if False else 7\n7", "7"),
        ("python", "sorted([3,1,2])"): ("[1,2,3]", "[1,2,3]"),
        ("calculator", "(4821+937)*3"): ("(4821+937)*3", "17274"),
        ("calculator", "2-(3-9)*-4--1"): ("2-(3-9)*-4--1", "-21"),
    }
    assert {key: TASKS[key[0]].solve(key[1]) for key in shown} == shown


# -- thinking, read step by step by small interpreters that share no code with the package --


def _read_columns(line: str, first: int, second: int) -> int:
    """Check the columns of a sum: digits of both numbers, true facts, a chain of carries. Returns what they say."""
    carry, digits = "0", ""
    columns = line.split(" ")
    width = max(len(str(first)), len(str(second)))
    assert len(columns) == width
    for place, column in enumerate(columns):
        a, b, handed_on, result = re.fullmatch(r"(\d)\+(\d)\+(\d)=(\d\d)", column).groups()
        assert a + b == f"{first:0{width}}"[-1 - place] + f"{second:0{width}}"[-1 - place]
        assert handed_on == carry
        assert int(a) + int(b) + int(handed_on) == int(result)
        carry, digits = result[0], result[1] + digits
    return int(carry + digits)


def test_steps_of_addition() -> None:
    for item in _items(TASKS["addition"]):
        first, second = map(int, item.question.split("+"))
        assert _read_columns(item.steps, first, second) == int(item.answer) == first + second


def test_steps_of_subtraction() -> None:
    answers = []
    for item in _items(TASKS["subtraction"], 1000):
        turned, columns = item.steps.split("\n")
        assert eval(turned) == eval(item.question) == int(item.answer)
        large, small = re.findall(r"\d+", turned)
        borrowed, digits = "0", ""
        for a, b, column in zip(large[::-1], small.zfill(len(large))[::-1], columns.split(" "), strict=True):
            left, digit = column.split("=")
            assert left in (f"{a}-{b}-{borrowed}+00", f"{a}-{b}-{borrowed}+10")
            assert eval(left) == int(digit) < 10
            borrowed, digits = left[-2], digit + digits
        assert borrowed == "0"
        assert int(digits) == abs(int(item.answer))
        answers.append(int(item.answer))
    assert 0.12 < np.mean(np.array(answers) < 0) < 0.28


def test_steps_of_multiplication() -> None:
    for item in _items(TASKS["multiplication"]):
        *products, last = item.steps.split("\n")
        shown = []
        for line in products or [last]:
            number, factor, columns, product = re.fullmatch(r"(\d+)\*(\d+): (.*) =(\d+)", line).groups()
            assert int(number) * int(factor) == int(product)
            carry, digits = "0", ""
            for a, column in zip(number[::-1], columns.split(" "), strict=True):
                left, result = column.split("=")
                assert left == f"{a}*{factor[0]}+{carry}"
                assert eval(left) == int(result) < 100
                carry, digits = result[0], result[1] + digits
            assert int(carry + digits) * 10 ** (len(factor) - 1) == int(product)
            shown.append(product)
        if products:
            parts, columns = last.split(": ")
            assert parts == "+".join(shown)
            assert _read_columns(columns, *map(int, shown)) == int(item.answer)
        assert eval(item.question) == int(item.answer) == sum(map(int, shown))


def test_factors_are_at_most_three_and_two_digits_long_and_come_in_either_order() -> None:
    lengths = Counter(tuple(map(len, item.question.split("*"))) for item in _items(TASKS["multiplication"], 1000))
    assert lengths.keys() == {(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (1, 3), (3, 2), (2, 3)}


def test_steps_of_sums() -> None:
    for item in _items(TASKS["sums"]):
        total, *rest = item.question.removesuffix(" mod 10").split("+")
        for step, digit in zip(item.steps.split(" "), rest, strict=True):
            left, result = step.split("=")
            assert left == f"{total}+{digit}"
            assert (int(total) + int(digit)) % 10 == int(result)
            total = result
        assert total == item.answer


def test_steps_of_follow() -> None:
    places = Counter()
    for item in _items(TASKS["follow"], 600):
        *arrows, _from, start, times, _times = item.question.split(" ")
        steps = item.steps.split(" ")
        assert set(steps) <= set(arrows)
        assert len({arrow[0] for arrow in arrows}) == len({arrow[2] for arrow in arrows}) == len(arrows) == 8
        assert len(steps) == int(times) == len(set(steps))  # one circle: no arrow comes twice
        assert steps[0][0] == start
        assert steps[-1][2] == item.answer != start
        assert all(one[2] == other[0] for one, other in pairwise(steps))
        places[arrows.index(steps[0])] += 1
    assert len(places) == 8  # the arrows are shuffled


def test_steps_of_reverse() -> None:
    for item in _items(TASKS["reverse"]):
        there, back = ([pair.split(":") for pair in line.split(" ")] for line in item.steps.split("\n"))
        assert there == [[str(i + 1), character] for i, character in enumerate(item.question.split()[1])]
        assert back == there[::-1]
        assert item.answer == "".join(character for _, character in back)


def test_steps_of_sort() -> None:
    kinds = Counter()
    for item in _items(TASKS["sort"]):
        left, taken = item.question.split()[1:], []
        key = int if left[0].isdigit() else str
        for line in item.steps.split("\n"):
            shown, smallest = line.split(": ")
            assert shown == " ".join(left)
            assert key(smallest) == min(map(key, left))
            left.remove(smallest)
            taken.append(smallest)
        assert not left
        assert item.answer == " ".join(taken)
        kinds[key, max(map(len, taken))] += 1
    assert kinds.keys() == {(int, 1), (int, 2), (str, 1)}


def test_steps_of_count() -> None:
    answers = Counter()
    for item in _items(TASKS["count"], 600):
        _, wanted, _, text = item.question.split()
        seen = 0
        for letter, step in zip(text, item.steps.split(" "), strict=True):
            seen += letter == wanted
            assert step == f"{letter}:{seen}"
        assert item.answer == str(seen)
        answers[item.answer] += 1
        assert item.chance == 0.2
    assert answers.keys() == set("01234")
    assert min(answers.values()) > 80  # no count is a better guess than another


def test_steps_of_number_words() -> None:
    kinds = Counter()
    for item in _items(TASKS["number_words"]):
        kind, _, argument = item.question.partition(" ")
        number, text = (argument, item.answer) if kind in ("words", "中文") else (item.answer, argument)
        values, names = [], []
        for line in item.steps.split("\n"):
            one, other = re.fullmatch(r"(\d+) (.+)|(.+) (\d+)", line).group(*((1, 2) if number == argument else (4, 3)))
            values.append(int(one))
            names.append(other)
        assert sum(values) == int(number)
        assert sorted(values, reverse=True) == values or "零" in names
        assert "".join(names).replace(" ", "") == text.replace(" ", "").replace("-", "")
        kinds[kind] += 1
    assert kinds.keys() == {"words", "number", "中文", "数字"}
    assert min(kinds.values()) > 60


PYTHON = {"__builtins__": {}, "len": len, "max": max, "min": min, "sum": sum, "sorted": sorted}


def test_steps_of_python() -> None:
    forms = set()
    for item in _items(TASKS["python"], 1500):
        value = eval(item.question, PYTHON)
        lines = item.steps.split("\n")
        for before, after in pairwise([item.question, *lines]):
            assert before != after
            assert eval(after, PYTHON) == value
            assert type(eval(after, PYTHON)) is type(value)
        assert lines[-1] == item.answer
        assert repr(value).replace(" ", "").replace("'", '"') == item.answer  # a value, nothing left to evaluate
        forms |= set(
            re.findall(r"[a-z]{2,}(?=\()|//|[-+*%]|[<>=!]=?|\[::-1\]|\[\d\]|\bif\b|\bnot\b|\bin\b", item.question)
        )
        assert not re.search(r"\d{3}", f"{item.question}\n{item.steps}")
    assert forms >= set("len max min sum sorted upper lower count index // - + * % < > == [::-1] [1] if not in".split())


def test_python_knows_precedence() -> None:
    items = _items(TASKS["python"], 3000)
    assert any("(" in item.question and re.search(r"\([^()]*[-+][^()]*\)[*/%]", item.question) for item in items)
    assert any(re.fullmatch(r"\d+[-+]\d+\*\d+", item.question) for item in items)


def test_steps_of_calculator() -> None:
    items = _items(TASKS["calculator"])
    for item in items:
        assert item.steps == item.question
        assert str(eval(item.question)) == item.answer == calculate(item.steps)
    assert {sign for item in items for sign in re.sub(r"\d", "", item.question)} == set("+-*()")


def test_python_refuses_what_could_do_harm() -> None:
    for text in (
        "9**9**9", "().__class__", "open(1)", "len", "lambda:1", "[x for x in [1]]", '"a"*99999*99999*99999', "1//0",
        "[1][5]", '"abc".index("z")', "max(1,key=len)", "f'{1}'", '"a".join(["b"])', "1.5+1", "(1).real", '"\\n"+"a"',
    ):  # fmt: skip
        with pytest.raises(ValueError, match="no question of task 'python'"):
            TASKS["python"].solve(text)


# -- the calculator --


def test_calculate() -> None:
    known = {
        "4821+937*3": "7632", "(4821+937)*3": "17274", " 7 / 2 ": "3.5", "6/3": "2", "-7//2": "-4", "-7%3": "2",
        "2**10": "1024", "0.1+0.2": "0.3", "1/3": "0.333333333333", "-(-5)": "5", "+5": "5", "0*-1.0": "0",
        "2**-1": "0.5", "99999999999999999999*10": "999999999999999999990",
    }  # fmt: skip
    assert {expression: calculate(expression) for expression in known} == known


def test_calculate_refuses_everything_else() -> None:
    wrong = {
        "9**9**9": "exponent", "10**100": "too large", "10**60*10": "too large", "9.0**99*9.0**99": "too large",
        "1e999": "too large", "1/0": "division by zero", "0**-1": "division by zero", "5%0": "division by zero",
        "": "not an arithmetic expression", "1+": "not an arithmetic expression", "1,000": "only numbers",
        "True+1": "not a whole or decimal", "'a'*3": "not a whole or decimal", "2j": "not a whole or decimal",
        "(-8)**0.5": "not a whole or decimal", "abs(1)": "only numbers", "x": "only numbers", "1<2": "only numbers",
        "~1": "only numbers", "1<<9": "only numbers", "[1][0]": "only numbers", "__import__('os')": "only numbers",
        "1+" * 100 + "1": "201 characters", "(" * 150: "not an arithmetic expression",
        "1\0": "not an arithmetic expression",
    }  # fmt: skip
    for expression, text in wrong.items():
        with pytest.raises(ValueError, match=text):
            calculate(expression)


def _operation(inner):
    return st.builds("({}{}{})".format, inner, st.sampled_from("+-*"), inner)


@given(st.recursive(st.integers(0, 999).map(str), _operation, max_leaves=6))
def test_calculate_agrees_with_python_and_with_the_rewriting_of_text(expression: str) -> None:
    assert calculate(expression) == str(eval(expression)) == TASKS["calculator"].solve(expression)[1]


# -- number words --

TRICKY = {
    0: ("zero", "零"),
    7: ("seven", "七"),
    10: ("ten", "十"),
    11: ("eleven", "十一"),
    13: ("thirteen", "十三"),
    20: ("twenty", "二十"),
    21: ("twenty-one", "二十一"),
    40: ("forty", "四十"),
    99: ("ninety-nine", "九十九"),
    100: ("one hundred", "一百"),
    101: ("one hundred one", "一百零一"),
    110: ("one hundred ten", "一百一十"),
    115: ("one hundred fifteen", "一百一十五"),
    200: ("two hundred", "二百"),
    342: ("three hundred forty-two", "三百四十二"),
    1000: ("one thousand", "一千"),
    1001: ("one thousand one", "一千零一"),
    1010: ("one thousand ten", "一千零一十"),
    1100: ("one thousand one hundred", "一千一百"),
    1101: ("one thousand one hundred one", "一千一百零一"),
    1110: ("one thousand one hundred ten", "一千一百一十"),
    2000: ("two thousand", "二千"),
    2005: ("two thousand five", "二千零五"),
    2020: ("two thousand twenty", "二千零二十"),
    4213: ("four thousand two hundred thirteen", "四千二百一十三"),
    9999: ("nine thousand nine hundred ninety-nine", "九千九百九十九"),
}


def test_number_words_of_tricky_numbers() -> None:
    for number, (english, chinese) in TRICKY.items():
        assert words.number_to_words(number) == english
        assert words.number_to_chinese(number) == chinese


@pytest.mark.parametrize(
    ("write", "read", "parts"),
    [
        (words.number_to_words, words.words_to_number, words._english_parts),
        (words.number_to_chinese, words.chinese_to_number, words._chinese_parts),
    ],
    ids=["English", "Chinese"],
)
def test_number_words_are_one_to_one_and_made_as_solved(write, read, parts) -> None:
    texts = [write(number) for number in range(10_000)]
    assert len(set(texts)) == 10_000
    assert [read(text) for text in texts] == list(range(10_000))
    join = words._join_english if write is words.number_to_words else lambda parts: "".join(name for _, name in parts)
    assert [join(parts(number)) for number in range(10_000)] == texts


def test_number_words_are_read_strictly() -> None:
    for text in ("", "forty two", "two hundred and one", "twenty-eleven", "hundred", "fourty", "Forty-two"):
        with pytest.raises(ValueError, match="no number from 0 to 9999"):
            words.words_to_number(text)
    for text in ("", "两千", "一十", "一千四", "一千零零四", "二百零", "一万", "342"):
        with pytest.raises(ValueError, match="no number from 0 to 9999"):
            words.chinese_to_number(text)


# -- the held-out split --


def test_the_split_is_stable() -> None:
    # Frozen: a change here would make trained checkpoints' "unseen" items seen ones.
    assert [n for n in range(60) if is_heldout("addition", f"{n}+25")] == [22, 26, 28, 29, 44, 53, 56]
    assert [n for n in range(60) if is_heldout("multiplication", f"{n}*25")] == [4, 11, 26, 30]
    assert [n for n in range(60) if is_heldout("number_words", f"words {n}")] == [10, 19, 26, 30, 58]
    assert [n for n in range(60) if is_heldout("sort", f"sort 5 3 {n}")] == [3, 10, 15, 49, 51, 56, 59]
    assert [n for n in range(60) if is_heldout("python", f"max({n},3)")] == [0, 36]


def test_one_in_ten_is_held_out() -> None:
    sums = [is_heldout("addition", f"{a}+{b}") for a in range(100, 200) for b in range(100)]
    assert 0.09 < np.mean(sums) < 0.11
    for task in TASKS.values():
        assert 0.07 < np.mean([is_heldout(item.task, item.question) for item in _items(task, 2000)]) < 0.13, task.name


@given(st.integers(0, 99999), st.integers(0, 99999))
def test_sums_and_differences_that_tell_each_other_share_the_split(a: int, b: int) -> None:
    sums = {("addition", f"{a}+{b}"), ("addition", f"{b}+{a}"), ("calculator", f"{a}+{b}"), ("python", f"{b}+{a}")}
    differences = {f"{a + b}-{a}", f"{a + b}-{b}", f"{a}-{a + b}", f"{b}-{a + b}"}
    assert len({canonical(*key) for key in (*sums, *(("subtraction", text) for text in differences))}) == 1
    assert canonical("multiplication", f"{a}*{b}") == canonical("multiplication", f"{b}*{a}")
    assert canonical("multiplication", f"{a}*{b}") != canonical("addition", f"{a}+{b}")
    assert canonical("addition", f"{a}+{b}") != canonical("addition", f"{a}+{b + 100_000}")


@given(st.integers(0, 9999))
def test_a_number_shares_the_split_in_all_its_forms(number: int) -> None:
    english, chinese = words.number_to_words(number), words.number_to_chinese(number)
    forms = (f"words {number}", f"中文 {number}", f"number {english}", f"数字 {chinese}")
    assert len({canonical("number_words", form) for form in forms}) == 1


@given(st.lists(st.sampled_from("0123456789ABCXYZ"), min_size=2, max_size=8), st.randoms())
def test_the_order_of_characters_and_things_makes_no_difference(things: list[str], random) -> None:
    other = random.sample(things, len(things))
    for task, question in (("reverse", "reverse {}"), ("count", "count Q in {}")):
        text, mirror = ("".join(order) for order in (things, things[::-1]))
        assert canonical(task, question.format(text)) == canonical(task, question.format(mirror))
    assert canonical("sort", f"sort {' '.join(things)}") == canonical("sort", f"sort {' '.join(other)}")
    assert canonical("sums", f"{'+'.join(things)} mod 10") == canonical("sums", f"{'+'.join(other)} mod 10")
    assert canonical("sort", f"sort {' '.join(things)}") != canonical("sums", f"sort {' '.join(things)}")


def test_arrows_in_any_order_are_the_same_map() -> None:
    one, other = "A>B B>C C>A from A 2 times", "C>A A>B B>C from A 2 times"
    assert canonical("follow", one) == canonical("follow", other) != canonical("follow", one.replace("2", "1"))


@EVERY_TASK
def test_training_never_sees_a_held_out_item(task: Task) -> None:
    rng = np.random.default_rng(3)
    trained = {canonical(task.name, make_train(task, rng).question) for _ in range(2000)}
    held = heldout_items(task, 200, seed=3)
    assert len({item.question for item in held}) == 200
    assert all(is_heldout(task.name, item.question) for item in held)
    assert all(task.solve(item.question) == (item.steps, item.answer) for item in held)
    assert not trained & {canonical(task.name, item.question) for item in held}


def test_training_takes_sizes() -> None:
    rng = np.random.default_rng(0)
    assert {make_train(TASKS["addition"], rng, 3).size for _ in range(50)} == {3}
    assert {item.size for item in heldout_items(TASKS["addition"], 50, seed=0, size=3)} == {3}


def test_thinking_does_not_give_held_out_questions_away() -> None:
    """No long product, sum or difference inside a product's or Python's thinking is a held-out question."""
    rng = np.random.default_rng(4)
    for name in ("multiplication", "python"):
        for _ in range(1500):
            item = make_train(TASKS[name], rng)
            for line in [item.question, *item.steps.split("\n")]:
                for start in range(len(line)):
                    pair = re.match(r"\d+[-+*]\d+", line[start:])
                    if pair and not (start and line[start - 1].isdigit()) and len(pair[0]) > 3:
                        assert not is_heldout(name, pair[0]), item
                assert name != "python" or line == item.answer or not is_heldout(name, line), item
    held = next(n for n in range(100, 999) if is_heldout("multiplication", f"{n}*3"))
    steps, answer = TASKS["multiplication"].solve(f"{held}*13")
    assert gives_away(Item("multiplication", f"{held}*13", steps, answer, 5, 1e-5))


def test_heldout_items_are_reproducible() -> None:
    task = TASKS["reverse"]
    assert heldout_items(task, 20, seed=1) == heldout_items(task, 20, seed=1)
    assert heldout_items(task, 20, seed=1) != heldout_items(task, 20, seed=2)


def test_too_few_held_out_items_is_an_error_that_says_how_many_there_are() -> None:
    everything = {f"{a}+{b}" for a in range(10) for b in range(10) if is_heldout("addition", f"{a}+{b}")}
    count = len(everything)
    with pytest.raises(
        ValueError, match=rf"'addition' of size 1 has only {count} held-out questions: ask for at most {count}"
    ):
        heldout_items(TASKS["addition"], 500, seed=0, size=1)
    assert {item.question for item in heldout_items(TASKS["addition"], count, seed=0, size=1)} == everything
    with pytest.raises(ValueError, match="'number_words' of size 1 has none held out"):
        heldout_items(TASKS["number_words"], 1, seed=0, size=1)


def test_a_prompt_ends_where_a_token_must_end() -> None:
    """Under GLM's pre-tokenizer a prompt and its completion fall into the same pieces together and apart.

    Direct answers that begin with a sign or a quote are the exception ("=-" is one piece), which is why
    training encodes the two apart.
    """
    tokenizers = pytest.importorskip("tokenizers")
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    for task in TASKS.values():
        for item in _items(task, 100):
            for thinking in (False, True):
                prompt, completion = plain(item, thinking)
                ends = {end for _, (_, end) in split.pre_tokenize_str(prompt + completion)}
                assert len(prompt) in ends or (not thinking and not completion[0].isdigit())
