"""Small puzzles over letters: follow a map, reverse, sort, count. Every step copies what it uses.

follow   B>K A>F K>Q … from B 2 times   B>K K>Q                           Q
         a map of eight letters whose arrows form one circle
reverse  reverse HELLO                  1:H 2:E 3:L 4:L 5:O
                                        5:O 4:L 3:L 2:E 1:H               OLLEH
sort     sort 31 7 42                   31 7 42: 7
                                        31 42: 31
                                        42: 42                            7 31 42
         what is left, then the smallest of it
count    count A in BANANA              B:0 A:1 N:1 A:2 N:2 A:3           3
         every letter with the count so far
"""

import re
from math import factorial

from numpy.random import Generator

from minglm.data.items import LETTERS, Item, Task, below, below_each, draw_size, not_a_question, pick, shuffled

MAP_LETTERS = 8
FOLLOW_SIZES = tuple(range(1, MAP_LETTERS))  # times
REVERSE_SIZES = tuple(range(2, 9))  # characters
SORT_SIZES = tuple(range(3, 9))  # things
COUNT_SIZES = tuple(range(4, 13))  # letters
MOST_COUNTED = 4  # every count from 0 to this is equally frequent


# -- made --


def make_follow(rng: Generator, size: int | None = None) -> Item:
    """A circle of eight letters, its arrows shuffled, to be followed `size` times."""
    size = draw_size(rng, size, FOLLOW_SIZES, "follow")
    circle = shuffled(rng, LETTERS)[:MAP_LETTERS]
    arrows = [f"{a}>{b}" for a, b in zip(circle, circle[1:] + circle[:1], strict=True)]
    question = f"{' '.join(shuffled(rng, arrows))} from {circle[0]} {size} times"
    return Item("follow", question, " ".join(arrows[:size]), circle[size], size, 1 / MAP_LETTERS)


def make_reverse(rng: Generator, size: int | None = None) -> Item:
    """A string of `size` letters or digits, to be written backwards."""
    size = draw_size(rng, size, REVERSE_SIZES, "reverse")
    alphabet = pick(rng, (LETTERS, "0123456789"))
    text = "".join([alphabet[i] for i in below_each(rng, len(alphabet), size)])
    places = [f"{place}:{character}" for place, character in enumerate(text, 1)]
    steps = f"{' '.join(places)}\n{' '.join(places[::-1])}"
    return Item("reverse", f"reverse {text}", steps, text[::-1], size, 1 / factorial(size))


def make_sort(rng: Generator, size: int | None = None) -> Item:
    """`size` one-digit numbers, numbers below 100, or letters, to be put in order."""
    size = draw_size(rng, size, SORT_SIZES, "sort")
    end = pick(rng, (10, 100, 26))
    left = below_each(rng, end, size)
    names = LETTERS if end == 26 else _NUMBERS
    written, lines, ordered = [names[x] for x in left], [], sorted(left)
    question = f"sort {' '.join(written)}"
    for smallest in ordered:
        lines.append(f"{' '.join(written)}: {names[smallest]}")
        written.remove(names[smallest])
    return Item("sort", question, "\n".join(lines), " ".join([names[x] for x in ordered]), size, 1 / factorial(size))


_NUMBERS = [str(number) for number in range(100)]


def make_count(rng: Generator, size: int | None = None) -> Item:
    """How often a letter occurs among `size` letters, which are of four kinds: 0 to 4 times."""
    size = draw_size(rng, size, COUNT_SIZES, "count")
    wanted, *others = shuffled(rng, LETTERS)[:4]
    times = below(rng, MOST_COUNTED + 1)
    letters = shuffled(rng, [wanted] * times + [others[i] for i in below_each(rng, 3, size - times)])
    groups, count = [], 0
    for letter in letters:
        count += letter == wanted
        groups.append(f"{letter}:{count}")
    question = f"count {wanted} in {''.join(letters)}"
    return Item("count", question, " ".join(groups), str(times), size, 1 / (MOST_COUNTED + 1))


# -- solved: from the question's text, by other means --


def solve_follow(question: str) -> tuple[str, str]:
    """Steps and answer of `A>F F>C C>A from F 2 times`."""
    found = re.fullmatch(r"((?:[A-Z]>[A-Z] )+)from ([A-Z]) (\d+) times", question, re.ASCII)
    after = dict(arrow.split(">") for arrow in found[1].split()) if found else {}
    if not found or set(after) != set(after.values()) or found[2] not in after or int(found[3]) > len(after):
        raise not_a_question("follow", question, "A>F F>C C>A from F 2 times")
    here, steps = found[2], []
    for _ in range(int(found[3])):
        steps.append(f"{here}>{after[here]}")
        here = after[here]
    return " ".join(steps), here


def solve_reverse(question: str) -> tuple[str, str]:
    """Steps and answer of `reverse HELLO`."""
    text = question.removeprefix("reverse ")
    if not re.fullmatch(r"reverse ([A-Z]+|\d+)", question, re.ASCII):
        raise not_a_question("reverse", question, "reverse HELLO")
    there = " ".join(f"{i + 1}:{text[i]}" for i in range(len(text)))
    back = " ".join(f"{i}:{text[i - 1]}" for i in range(len(text), 0, -1))
    return f"{there}\n{back}", "".join(reversed(text))


def solve_sort(question: str) -> tuple[str, str]:
    """Steps and answer of `sort 31 7 42`."""
    if not re.fullmatch(r"sort(( \d+)+|( [A-Z])+)", question, re.ASCII):
        raise not_a_question("sort", question, "sort 31 7 42")
    left, lines = question.split()[1:], []
    while left:
        best = min(range(len(left)), key=lambda i: (len(left[i]), left[i]))  # the shorter number is the smaller one
        lines.append(f"{' '.join(left)}: {left[best]}")
        del left[best]
    return "\n".join(lines), " ".join(line.split()[-1] for line in lines)


def solve_count(question: str) -> tuple[str, str]:
    """Steps and answer of `count A in BANANA`."""
    if not (found := re.fullmatch(r"count ([A-Z]) in ([A-Z]+)", question, re.ASCII)):
        raise not_a_question("count", question, "count A in BANANA")
    letter, text = found.groups()
    steps = " ".join(f"{text[i]}:{text[: i + 1].count(letter)}" for i in range(len(text)))
    return steps, str(text.count(letter))


PUZZLES = (
    Task("follow", make_follow, FOLLOW_SIZES, solve_follow),
    Task("reverse", make_reverse, REVERSE_SIZES, solve_reverse),
    Task("sort", make_sort, SORT_SIZES, solve_sort),
    Task("count", make_count, COUNT_SIZES, solve_count),
)
