"""The terminal of a walk: `minglm step glm-nano "2 + 2 ="`."""

import cmd
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from minglm.formats.files import write_text
from minglm.look.conditions import QUANTITIES, Condition
from minglm.look.walk import BEGINS, Walk, steps_of

_HELP = """\
n, next            over the next idea (attention, router, experts …), to its end
i, into            one step on
b, back            to where you were before the last move
to NAME or NUMBER  to a step, or to a layer: to router_scores, to 2
until CONDITION    on until it holds: until margin < 0.01
w, where           this step again: formula, line of the book, numbers
p, print [PLACE]   an array, or part of it: p, p w[5, 1], p probs H=2 T=5, p q[0, :, 3]
why PLACE          one number as its formula with the numbers: why w[5, 1]
edit PLACE = X     change it, and go on with that: edit w[5, 1] = 0.9
undo               take the last edit back
l, list            the steps, by ideas; > marks this one
t, tokens          the tokens and their numbers
save FILE          the walk as a Python script
q, quit            end; so does Ctrl-D

An empty line is n. Short names are those of the nearest step up to here, for to of the next one ahead; w is
expert_weights, stream what goes from layer to layer. In [PLACE] the axes stand as in the step's shape.
Quantities for until: {quantities}."""


class Stepper(cmd.Cmd):
    """Reads commands, prints what comes. Wrong input is one line and ends nothing."""

    prompt = "step> "

    def __init__(self, walk: Walk, source: IO[str] | None = None, out: IO[str] | None = None):
        super().__init__(stdin=source, stdout=out)
        self.walk = walk
        self.use_rawinput = source is None
        if source is not None:
            self.prompt = ""

    def greet(self) -> None:
        """What is walked, and the first step."""
        names = self.walk.names
        tokens = " ".join(f"{i}:{token!r}" for i, token in enumerate(self.walk.trace.tokens[:12]))
        more = " …" if len(self.walk.trace.tokens) > 12 else ""
        self._say(f"{self.walk.model.name}, {len(names)} steps; tokens {tokens}{more}. help lists the commands.\n")
        self._say(str(self.walk.where()))

    def onecmd(self, line: str) -> bool:
        """One command. Returns True to end."""
        word, _, rest = (line.strip() or "next").partition(" ")
        command = _COMMANDS.get(word)
        if word == "EOF":
            return True
        if command is None:
            self._say(f"there is no command {word!r}; help lists them")
            return False
        try:
            said = command(self, rest.strip())
        except (ValueError, OSError) as error:
            said = str(error)
        except MemoryError as error:
            said = f"not enough memory: {error}"
        if said is None:
            return True
        self._say(said)
        return False

    def completenames(self, text: str, *ignored: Any) -> list[str]:
        return [word for word in _COMMANDS if word.startswith(text)]

    def completedefault(self, text: str, *ignored: Any) -> list[str]:
        known = {name.split(".")[-1] for name in self.walk.names} | set(QUANTITIES)
        return sorted(name for name in known if name.startswith(text))

    def _say(self, text: str) -> None:
        print(text, file=self.stdout, flush=True)


def _next(stepper: Stepper, rest: str) -> str:
    return _moved(stepper, stepper.walk.next)


def _into(stepper: Stepper, rest: str) -> str:
    return _moved(stepper, stepper.walk.into)


def _moved(stepper: Stepper, move: Callable[[], Any]) -> str:
    before = stepper.walk.at
    place = str(move())
    return "this is the last step; b goes back" if stepper.walk.at == before else place


def _back(stepper: Stepper, rest: str) -> str:
    before = stepper.walk.at
    place = str(stepper.walk.back())
    return "this is where the walk began" if stepper.walk.at == before else place


def _until(stepper: Stepper, rest: str) -> str:
    place, walk = stepper.walk.until(rest), stepper.walk
    found = Condition(rest).measured(walk.name, walk.array, walk.model.config.num_experts_per_tok)
    return "\n".join([str(place), *(f"  {quantity} = {value:.4g}" for quantity, value in found.items())])


def _print(stepper: Stepper, rest: str) -> str:
    name, found = stepper.walk.find(rest)[0], stepper.walk.look(rest)
    where = f"{name}  {rest}" if "[" in rest or "=" in rest else name
    with np.printoptions(precision=4, suppress=True, linewidth=100, threshold=400, edgeitems=4):
        return f"{where}  {list(found.shape)}\n{found}" if found.ndim else f"{where}  {found}"


def _edit(stepper: Stepper, rest: str) -> str:
    place = stepper.walk.edit(rest)
    name, where, value = stepper.walk.edits[-1]
    count = stepper.walk.trace[name][where].size
    return f"edited {name}: {count} number{'s' if count > 1 else ''}, now {value:g}\n{place}"


def _list(stepper: Stepper, rest: str) -> str:
    lines = []
    for idea, names in steps_of(stepper.walk.names):
        shown = names if len(names) <= 12 else [*names[:6], f"… {len(names) - 9} more", *names[-3:]]
        here = stepper.walk.name in names
        short = " ".join(f"[{_last(n)}]" if n == stepper.walk.name else _last(n) for n in shown)
        lines.append(f"{'>' if here else ' '} {idea}: {short}")
    return "\n".join(lines)


def _last(name: str) -> str:
    """What tells a step from those beside it: its last part, with the number of its expert."""
    return name.split("experts.")[-1] if ".mlp.experts." in name else name.split(".")[-1]


def _tokens(stepper: Stepper, rest: str) -> str:
    return "  ".join(f"{i}:{token!r}" for i, token in enumerate(stepper.walk.trace.tokens))


def _save(stepper: Stepper, rest: str) -> str:
    if not rest:
        raise ValueError("save wants a file: save walk.py")
    path = Path(rest).expanduser()
    if path.exists() and not (path.is_file() and path.read_bytes().startswith(BEGINS.encode())):
        raise ValueError(f"{rest} is there and is no walk; give another name")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to save in")
    write_text(path, stepper.walk.script())
    if stepper.walk.model.folder is None:
        return f"saved {rest}; this model came from no folder: say in the script how it is made"
    return f"saved {rest}; python {shlex.quote(str(path))} walks it again"


def _quit(stepper: Stepper, rest: str) -> None:
    return None


_NAMED: dict[str, Callable[[Stepper, str], str | None]] = {
    "next": _next, "into": _into, "back": _back, "print": _print, "list": _list, "tokens": _tokens, "save": _save,
    "quit": _quit,
    "where": lambda stepper, rest: str(stepper.walk.where()),
    "to": lambda stepper, rest: str(stepper.walk.to(rest)),
    "until": _until,
    "why": lambda stepper, rest: str(stepper.walk.why(rest)),
    "edit": _edit,
    "undo": lambda stepper, rest: str(stepper.walk.undo()),
    "help": lambda stepper, rest: _HELP.format(quantities=", ".join(QUANTITIES)),
}  # fmt: skip
_SHORT = {
    "n": "next", "i": "into", "b": "back", "w": "where", "p": "print", "l": "list", "t": "tokens", "q": "quit",
    "?": "help",
}  # fmt: skip
_COMMANDS = {**_NAMED, **{short: _NAMED[name] for short, name in _SHORT.items()}, "exit": _quit}


def run(walk: Walk) -> None:
    """Walk in this terminal, or along the lines that are piped in. Ctrl-C leaves a command, Ctrl-D ends."""
    piped = not sys.stdin.isatty()
    stepper = Stepper(walk, sys.stdin if piped else None, sys.stdout)
    stepper.greet()
    while True:
        try:
            stepper.cmdloop()
            print()
            return
        except KeyboardInterrupt:
            if piped:
                raise
            print("\n(q ends)")
