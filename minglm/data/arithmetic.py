"""Sums, differences, products and sums mod 10, column by column from the right, as on paper.

Every column copies its digits and its carry and says one fact; the facts chain through the carry:

    addition        4821+937    1+7+0=08 2+3+0=05 8+9+0=17 4+0+1=05
                                digit + digit + carry = next carry, then the digit of the answer
    subtraction     937-4821    -(4821-937)
                                1-7-0+10=4 2-3-1+10=8 8-9-1+10=8 4-0-1+00=3
                                first the larger minus the smaller; then digit - digit - borrowed + borrow = digit
    multiplication  478*23      478*3: 8*3+0=24 7*3+2=23 4*3+2=14 =1434
                                478*20: 8*2+0=16 7*2+1=15 4*2+1=09 =9560
                                1434+9560: 4+0+0=04 3+6+0=09 4+5+0=09 1+9+0=10
                                the longer number by each digit of the shorter, then the sum of the two products
    sums            3+8+1 mod 10    3+8=1 1+1=2

A last carry is the first digit of the result: `9+8` is `9+8+0=17`, 17. Leading zeros are dropped: 100-99 is 1.
"""

import re

from numpy.random import Generator

from minglm.data.items import Item, Task, below, below_each, draw_number, draw_size, not_a_question, pick

ADDITION_SIZES = SUBTRACTION_SIZES = (1, 2, 3, 4, 5)  # digits of the longer number
PRODUCT_DIGITS = {2: ((1, 1),), 3: ((2, 1),), 4: ((2, 2), (3, 1)), 5: ((3, 2),)}  # size: digits of the factors
PRODUCT_SIZES = tuple(PRODUCT_DIGITS)
SUMS_SIZES = tuple(range(2, 13))  # how many numbers
NEGATIVE = 0.2  # the share of differences with the smaller number first
SWAPPED = 0.25  # the share of products with the shorter number first


def _pair(rng: Generator, size: int) -> tuple[int, int]:
    """A number of `size` digits and one of at most as many, in either order; equal lengths are most frequent."""
    long = draw_number(rng, size)
    short = draw_number(rng, 1 + max(below(rng, size), below(rng, size)))
    return (long, short) if rng.random() < 0.5 else (short, long)


# -- made: digit by digit, the carry handed on --


def _columns(first: int, second: int) -> list[tuple[int, int]]:
    """The digits that stand over each other, from the right; the shorter number is filled up with zeros."""
    width = len(str(max(first, second)))
    pairs = zip(str(first).zfill(width), str(second).zfill(width), strict=True)
    return [(int(a), int(b)) for a, b in pairs][::-1]


def _sum_columns(first: int, second: int) -> str:
    groups, carry = [], 0
    for a, b in _columns(first, second):
        groups.append(f"{a}+{b}+{carry}={a + b + carry:02}")
        carry = (a + b + carry) // 10
    return " ".join(groups)


def _difference_columns(large: int, small: int) -> str:
    groups, borrowed = [], 0
    for a, b in _columns(large, small):
        borrow = 10 if a - b - borrowed < 0 else 0
        groups.append(f"{a}-{b}-{borrowed}+{borrow:02}={a - b - borrowed + borrow}")
        borrowed = borrow // 10
    return " ".join(groups)


def _product_line(number: int, digit: int, zeros: str) -> str:
    """`478*20: 8*2+0=16 7*2+1=15 4*2+1=09 =9560` for 478, 2 and one zero."""
    groups, carry = [], 0
    for a in map(int, reversed(str(number))):
        groups.append(f"{a}*{digit}+{carry}={a * digit + carry:02}")
        carry = (a * digit + carry) // 10
    factor = f"{digit}{zeros}"
    return f"{number}*{factor}: {' '.join(groups)} ={number * int(factor)}"


def _product_steps(long: int, short: int) -> str:
    tens, unit = divmod(short, 10)
    lines = [_product_line(long, unit, "")]
    if tens:
        by_unit, by_tens = long * unit, long * tens * 10
        lines += [_product_line(long, tens, "0"), f"{by_unit}+{by_tens}: {_sum_columns(by_unit, by_tens)}"]
    return "\n".join(lines)


def make_addition(rng: Generator, size: int | None = None) -> Item:
    """A sum of two numbers, the longer one of `size` digits."""
    size = draw_size(rng, size, ADDITION_SIZES, "addition")
    first, second = _pair(rng, size)
    steps = _sum_columns(first, second)
    return Item("addition", f"{first}+{second}", steps, str(first + second), size, 10.0**-size)


def make_subtraction(rng: Generator, size: int | None = None) -> Item:
    """A difference, the longer number of `size` digits; one in five is negative."""
    size = draw_size(rng, size, SUBTRACTION_SIZES, "subtraction")
    small, large = sorted(_pair(rng, size))
    columns = _difference_columns(large, small)
    if rng.random() < NEGATIVE and small < large:
        question, steps, answer = f"{small}-{large}", f"-({large}-{small})\n{columns}", small - large
    else:
        question, steps, answer = f"{large}-{small}", f"{large}-{small}\n{columns}", large - small
    return Item("subtraction", question, steps, str(answer), size, 10.0**-size)


def make_multiplication(rng: Generator, size: int | None = None) -> Item:
    """A product; the digits of its factors together are `size`: at most three and two."""
    size = draw_size(rng, size, PRODUCT_SIZES, "multiplication")
    long_digits, short_digits = pick(rng, PRODUCT_DIGITS[size])
    long, short = draw_number(rng, long_digits), draw_number(rng, short_digits)
    swapped = long_digits > short_digits and rng.random() < SWAPPED
    question = f"{short}*{long}" if swapped else f"{long}*{short}"
    return Item("multiplication", question, _product_steps(long, short), str(long * short), size, 10.0**-size)


def make_sums(rng: Generator, size: int | None = None) -> Item:
    """A sum mod 10 of `size` one-digit numbers."""
    size = draw_size(rng, size, SUMS_SIZES, "sums")
    digits = below_each(rng, 10, size)
    groups, total = [], digits[0]
    for digit in digits[1:]:
        groups.append(f"{total}+{digit}={(total + digit) % 10}")
        total = (total + digit) % 10
    return Item("sums", f"{'+'.join(map(str, digits))} mod 10", " ".join(groups), str(total), size, 0.1)


# -- solved: from the question's text, each carry from the numbers themselves instead of from the column before --


def _numbers(task: str, question: str, sign: str, example: str) -> tuple[int, int]:
    if not (found := re.fullmatch(rf"(0|[1-9]\d*){re.escape(sign)}(0|[1-9]\d*)", question, re.ASCII)):
        raise not_a_question(task, question, example)
    return int(found[1]), int(found[2])


def _powers(number: int) -> list[int]:
    """1, 10, 100 … for every digit of the number."""
    return [10**place for place in range(len(str(number)))]


def _solve_sum_columns(first: int, second: int) -> str:
    groups = []
    for power in _powers(max(first, second)):
        carry = (first % power + second % power) // power
        a, b = first // power % 10, second // power % 10
        groups.append(f"{a}+{b}+{carry}={a + b + carry:02}")
    return " ".join(groups)


def solve_addition(question: str) -> tuple[str, str]:
    """Steps and answer of `4821+937`."""
    first, second = _numbers("addition", question, "+", "4821+937")
    return _solve_sum_columns(first, second), str(first + second)


def solve_subtraction(question: str) -> tuple[str, str]:
    """Steps and answer of `937-4821`."""
    first, second = _numbers("subtraction", question, "-", "937-4821")
    large, small, difference = max(first, second), min(first, second), abs(first - second)
    groups = []
    for power in _powers(large):
        borrowed = int(large % power < small % power)
        borrow = "10" if large % (10 * power) < small % (10 * power) else "00"
        a, b, digit = (number // power % 10 for number in (large, small, difference))
        groups.append(f"{a}-{b}-{borrowed}+{borrow}={digit}")
    turned = f"{large}-{small}" if first >= second else f"-({large}-{small})"
    return f"{turned}\n{' '.join(groups)}", str(first - second)


def solve_multiplication(question: str) -> tuple[str, str]:
    """Steps and answer of `478*23`; the second factor of the steps, the shorter one, has at most two digits."""
    first, second = _numbers("multiplication", question, "*", "478*23")
    long, short = (second, first) if len(str(first)) < len(str(second)) else (first, second)
    if short > 99:
        raise not_a_question("multiplication", question, "478*23")
    lines = []
    for factor in [short % 10, short - short % 10][: len(str(short))]:
        digit = int(str(factor)[0])
        groups = []
        for power in _powers(long):
            a, carry = long // power % 10, long % power * digit // power
            groups.append(f"{a}*{digit}+{carry}={a * digit + carry:02}")
        lines.append(f"{long}*{factor}: {' '.join(groups)} ={long * factor}")
    if len(lines) == 2:
        parts = long * (short % 10), long * (short - short % 10)
        lines.append(f"{parts[0]}+{parts[1]}: {_solve_sum_columns(*parts)}")
    return "\n".join(lines), str(long * short)


def solve_sums(question: str) -> tuple[str, str]:
    """Steps and answer of `3+8+1 mod 10`."""
    if not re.fullmatch(r"\d(\+\d)+ mod 10", question, re.ASCII):
        raise not_a_question("sums", question, "3+8+1 mod 10")
    digits = [int(digit) for digit in question.removesuffix(" mod 10").split("+")]
    totals = [sum(digits[: end + 1]) % 10 for end in range(len(digits))]
    groups = [f"{totals[i]}+{digits[i + 1]}={totals[i + 1]}" for i in range(len(digits) - 1)]
    return " ".join(groups), str(totals[-1])


ARITHMETIC = (
    Task("addition", make_addition, ADDITION_SIZES, solve_addition),
    Task("subtraction", make_subtraction, SUBTRACTION_SIZES, solve_subtraction),
    Task("multiplication", make_multiplication, PRODUCT_SIZES, solve_multiplication),
    Task("sums", make_sums, SUMS_SIZES, solve_sums),
)
