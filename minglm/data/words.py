"""Numbers from 0 to 9999 in English words and in Chinese numerals, and back.

    words 342                       300 three hundred   40 forty   2 two       three hundred forty-two
    number three hundred forty-two  three hundred 300   forty 40   two 2       342
    中文 1004                        1000 一千   0 零   4 四                       一千零四
    数字 一千零四                     一千 1000   零 0   四 4                       1004

The steps are one line for each part of the number. English has no "and"; 10 to 19 are one part. Chinese writes 二千
and 二百 (not 两千, 两百), 十 to 十九 without 一 (but 一百一十), and one 零 for the zeros between two digits.
"""

import re
from collections.abc import Callable

from numpy.random import Generator

from minglm.data.items import Item, Task, below, draw_number, draw_size, not_a_question

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
DIGITS = "零一二三四五六七八九"
PLACES = {"千": 1000, "百": 100, "十": 10}
SIZES = (1, 2, 3, 4)  # digits

Part = tuple[int, str]  # a value and its name


# -- made: part by part --


def _english_parts(number: int) -> list[Part]:
    thousands, hundreds, rest = number // 1000, number // 100 % 10, number % 100
    tens = rest // 10 if rest >= 20 else 0
    parts = [
        (1000 * thousands, f"{UNITS[thousands]} thousand"),
        (100 * hundreds, f"{UNITS[hundreds]} hundred"),
        (10 * tens, TENS[tens]),
        (rest - 10 * tens, UNITS[rest - 10 * tens]),
    ]
    return [part for part in parts if part[0]] or [(0, "zero")]


def _join_english(parts: list[Part]) -> str:
    """The names with spaces, but a hyphen after twenty … ninety."""
    return "".join(name + ("-" if 20 <= value < 100 else " ") for value, name in parts)[:-1]


def _chinese_parts(number: int) -> list[Part]:
    if 10 <= number < 20:
        return [(10, "十"), (number - 10, DIGITS[number - 10])][: 1 + (number > 10)]
    parts: list[Part] = []
    gap = False  # zeros since the last part
    for place, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        if digit := number // place % 10:
            parts += [(0, "零")] * gap + [(digit * place, DIGITS[digit] + name)]
        gap = bool(parts) and not digit
    return parts or [(0, "零")]


def make_number_words(rng: Generator, size: int | None = None) -> Item:
    """A number of `size` digits in one of the four directions."""
    size = draw_size(rng, size, SIZES, "number_words")
    number = draw_number(rng, size)
    direction = below(rng, 4)
    if direction < 2:
        parts = _english_parts(number)
        text, to_text, to_digits = _join_english(parts), "words", "number"
    else:
        parts = _chinese_parts(number)
        text, to_text, to_digits = "".join([name for _, name in parts]), "中文", "数字"
    if direction % 2 == 0:
        steps = "\n".join([f"{value} {name}" for value, name in parts])
        return Item("number_words", f"{to_text} {number}", steps, text, size, 10.0**-size)
    steps = "\n".join([f"{name} {value}" for value, name in parts])
    return Item("number_words", f"{to_digits} {text}", steps, str(number), size, 10.0**-size)


# -- solved: the whole text first, by other rules, and the parts read back from it --


def number_to_words(number: int) -> str:
    """English for 0..9999, as in "four thousand two hundred thirteen" and "forty-two"."""
    if number < 20:
        return UNITS[number]
    if number < 100:
        tens, unit = divmod(number, 10)
        return TENS[tens] + (f"-{UNITS[unit]}" if unit else "")
    power, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    count, rest = divmod(number, power)
    return f"{UNITS[count]} {name}" + (f" {number_to_words(rest)}" if rest else "")


def words_to_number(words: str) -> int:
    """The inverse of `number_to_words`. ValueError for text that it never gives."""
    return _number_of(words, _read_english(words), number_to_words)


def number_to_chinese(number: int) -> str:
    """Chinese for 0..9999: every digit with its place, then the zeros put right."""
    named = "".join(DIGITS[int(d)] + place for d, place in zip(f"{number:04}", ("千", "百", "十", ""), strict=True))
    zeros = re.sub("(零[千百十]?)+", "零", named).strip("零")
    return re.sub("^一十", "十", zeros) or "零"


def chinese_to_number(text: str) -> int:
    """The inverse of `number_to_chinese`. ValueError for text that it never gives."""
    return _number_of(text, _read_chinese(text), number_to_chinese)


def _read_english(words: str) -> list[Part]:
    """The parts that stand in the text, with their values; words that mean nothing are left out."""
    values = {word: value for value, word in enumerate(UNITS)}
    values |= {word: 10 * value for value, word in enumerate(TENS) if value > 1}
    values |= {f"{word} hundred": 100 * value for value, word in enumerate(UNITS[:10])}
    values |= {f"{word} thousand": 1000 * value for value, word in enumerate(UNITS[:10])}
    names = re.findall(r"[a-z]+(?: hundred| thousand)?", words)
    return [(values[name], name) for name in names if name in values]


def _read_chinese(text: str) -> list[Part]:
    names = re.findall("[一二三四五六七八九]?[千百十]|[零一二三四五六七八九]", text)
    return [(_chinese_value(name), name) for name in names]


def _chinese_value(name: str) -> int:
    """The value of 三百, 十 or 七."""
    if name[-1] not in PLACES:
        return DIGITS.index(name)
    return PLACES[name[-1]] * (DIGITS.index(name[0]) if len(name) == 2 else 1)


def _number_of(text: str, parts: list[Part], write: Callable[[int], str]) -> int:
    """The sum of the parts that were read from a text, if that number is written so."""
    number = sum(value for value, _ in parts)
    if number > 9999 or write(number) != text:
        raise ValueError(f"{text!r} is no number from 0 to 9999 as {write.__name__} writes it")
    return number


def solve_number_words(question: str) -> tuple[str, str]:
    """Steps and answer of `words 342`, `number forty-two`, `中文 342` or `数字 四十二`."""
    wanted, _, argument = question.partition(" ")
    if wanted in ("words", "中文") and re.fullmatch(r"0|[1-9]\d{0,3}", argument, re.ASCII):
        answer = number_to_words(int(argument)) if wanted == "words" else number_to_chinese(int(argument))
        parts = _read_english(answer) if wanted == "words" else _read_chinese(answer)
        return "\n".join(f"{value} {name}" for value, name in parts), answer
    if wanted in ("number", "数字"):
        parts = _read_english(argument) if wanted == "number" else _read_chinese(argument)
        return "\n".join(f"{name} {value}" for value, name in parts), str(asked_number(question))
    raise not_a_question("number_words", question, "words 342")


def asked_number(question: str) -> int:
    """The number that a question of this task is about, in whichever way it is written."""
    wanted, _, argument = question.partition(" ")
    read: Callable[[str], int] = {"number": words_to_number, "数字": chinese_to_number}.get(wanted, int)
    return read(argument)


NUMBER_WORDS = Task("number_words", make_number_words, SIZES, solve_number_words)
