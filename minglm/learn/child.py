"""The process that a student's function runs in: `python -I child.py FILE NAME HIDDEN`. It imports nothing of minglm.

It holds no answer: inputs come in, outputs go out, and the parent compares. What a submission could do to its
surroundings is bounded: memory, files, other processes, the network, and `import minglm`. That stops accidents and the
usual tricks; it is no wall against an attacker (docs/teaching/grading.md).

Both sides speak in frames: eight bytes of length, then an npz: the arrays, and the structure around them as JSON. A
function among the inputs (an expert, a rotation) stays with the parent: the child asks for it by its number and waits.
An object of the student's own (a cache that is a class) stays with the child, and the parent hands its number back.
"""

import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import decode_source
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NoReturn

import numpy as np

BYTES = 1_000_000_000  # of memory beyond what the process has when the student's file is read
SECONDS = 120  # of processor time in all
FRAME = 100_000_000  # bytes of one answer
LONGEST = 500  # letters of one sentence
EMPTY = "Nothing is written yet: replace the line that raises NotImplementedError."

# -- frames ------------------------------------------------------------------------------------------------------


Ask = Callable[[int, tuple[Any, ...]], Any]  # number of a function of the parent's, what it is given -> its answer


@dataclass(frozen=True)
class Held:
    """What the parent sees of an object of the student's own, such as a cache of some class: the child keeps it."""

    number: int
    kind: str


def send(stream: BinaryIO, value: Any, here: list[Any] | None = None) -> None:
    """Write one frame: numbers, texts, None, arrays, and tuples, lists and dicts of those. Functions, and objects in
    what was returned, are put into `here`, if there is such a list, and go as their number. Raises ValueError for other
    things."""
    arrays: list[Any] = []
    packed = _packed(value, arrays, here)
    if (size := sum(array.nbytes for array in arrays)) > FRAME:
        raise ValueError(f"the function returned {size / 1e6:,.0f} MB, wanted at most {FRAME / 1e6:,.0f} MB")
    held = io.BytesIO()
    np.savez(held, structure=np.array(json.dumps(packed)), **{f"a{i}": array for i, array in enumerate(arrays)})
    stream.write(len(held.getbuffer()).to_bytes(8, "big") + held.getbuffer())
    stream.flush()


def receive(stream: BinaryIO, ask: Ask | None = None, here: Sequence[Any] = ()) -> Any:
    """Read one frame; arrays come as they were, read-only or not; functions call `ask`; what stayed `here` is found
    again. Raises EOFError at the end of the stream, ValueError for a frame that is larger, or becomes larger, than any
    answer."""
    length = stream.read(8)
    if len(length) < 8:
        raise EOFError
    if (size := int.from_bytes(length, "big")) > 2 * FRAME:
        raise ValueError(f"a frame of {size:,} bytes")
    with np.load(io.BytesIO(stream.read(size)), allow_pickle=False) as file:
        if sum(each.file_size for each in file.zip.infolist()) > 2 * FRAME:
            raise ValueError("a frame that grows when it is unpacked")
        return _unpacked(json.loads(str(file["structure"])), file, ask, here)


def _packed(value: Any, arrays: list[Any], here: list[Any] | None, depth: int = 0) -> Any:
    if isinstance(value, Held):
        return {"back": value.number}
    kind = next((kind for kind in (tuple, list, dict) if isinstance(value, kind)), None)
    if kind and (kind is type(value) or depth < 2):  # a named tuple may be what is returned; deeper it is an object
        parts = value.items() if kind is dict else value
        return {kind.__name__: [_packed(each, arrays, here, depth + 1) for each in parts]}
    if isinstance(value, np.ndarray | np.generic) and np.asarray(value).dtype.kind in "fiub":
        arrays.append(np.asarray(value))
        name = "array" if isinstance(value, np.ndarray) else "number"
        return {name: len(arrays) - 1, "writeable": bool(np.asarray(value).flags.writeable)}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if here is not None and (depth > 1 or callable(value)):
        here.append(value)
        return {"stays": len(here) - 1, "kind": type(value).__name__}
    raise ValueError(f"the function returned {type(value).__name__}, wanted arrays or numbers")


def _unpacked(packed: Any, file: Any, ask: Ask | None, here: Sequence[Any]) -> Any:
    for kind in (tuple, list, dict):
        if kind.__name__ in packed:
            return kind(_unpacked(each, file, ask, here) for each in packed[kind.__name__])
    if "number" in packed:
        return file[f"a{packed['number']}"][()]
    if "array" in packed:
        array = file[f"a{packed['array']}"]
        array.flags.writeable = packed["writeable"]
        return array
    if "back" in packed:
        return here[packed["back"]]
    if "stays" in packed:
        number, known = packed["stays"], ask
        return Held(number, packed["kind"]) if known is None else lambda *given: known(number, given)
    return packed["value"]


def kind_of(value: Any) -> str:
    """Name of a value's type, for a sentence."""
    return value.kind if isinstance(value, Held) else type(value).__name__


# -- bounds ------------------------------------------------------------------------------------------------------

_FORBIDDEN = (
    "subprocess.",
    "socket.",
    "os.fork",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "os.kill",
    "os.startfile",
    "ctypes.",
    "resource.",
    "sqlite3.",
    "winreg.",
    "_winapi.CreateProcess",
    "os.chdir",  # what a relative path means would depend on it
)
_CHANGES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.chmod",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.utime",
    "os.chown",
    "os.setxattr",
    "os.removexattr",
    "os.chflags",
    "shutil.",
)
_READS = ("open", "os.listdir", "os.scandir")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_UNHEARD_MODULES = ("readline", "_testcapi", "_testinternalcapi")  # they read files without telling a hook
_UNHEARD_FUNCTIONS = (
    "subprocess._fork_exec",
    "_posixsubprocess.fork_exec",
    *(f"{module}.{name}" for module in ("os", "posix") for name in ("mkfifo", "mknod", "setpriority")),
    "signal.pidfd_send_signal",
    "_xxsubinterpreters.create",  # in another interpreter there is no hook
    "_interpreters.create",
)


class _NoMinglm:
    """`import minglm` fails: the book holds every answer."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "minglm":
            raise ImportError("minglm cannot be imported here: write it yourself, with NumPy")


def _bound_memory() -> None:
    """As minglm/text/sandbox.py does it: neither file may import the package, so each has these lines."""
    try:
        import resource
    except ImportError:  # Windows: there the parent's clock is the only bound
        return
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
    except OSError:
        pages = 0
    limit = pages * resource.getpagesize() + BYTES
    for what, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_AS, limit)):
        with suppress(ValueError, OSError):  # macOS refuses a bound on memory
            resource.setrlimit(what, (most, most))


def _take_away() -> None:
    """Functions that start processes or interpreters, signal others and make files without telling a hook."""
    for name in _UNHEARD_FUNCTIONS:
        module, _, function = name.partition(".")

        def refused(*arguments: Any, name: str = name, **named: Any) -> NoReturn:
            raise PermissionError(f"a submission may not do this: {name}")

        with suppress(ImportError):  # another platform
            setattr(import_module(module), function, refused)


def _bound_doings(hidden: Path) -> None:
    """From here on Python itself stops reading outside of its own folders, writing, starting processes, the network.

    The hook uses nothing that a submission can rebind by a name, in this file, `os` or `pathlib`."""
    real, text, is_a, str_, int_ = os.path.realpath, os.fsdecode, isinstance, str, int

    def folder(place: Any) -> str:
        return os.path.join(real(place), "")

    installed = tuple({folder(sys.prefix), folder(sys.base_prefix)})
    paths = {folder(place) for place in sys.path if place and os.path.isdir(place)}
    clones = {path for path in paths if os.path.isfile(path + "pyproject.toml") and not path.startswith(installed)}
    own = (*installed, *(paths - clones))
    closed = (folder(hidden), *(path + "minglm" + os.sep for path in paths))
    forbidden, reads, unheard, writes = _FORBIDDEN + _CHANGES, _READS, _UNHEARD_MODULES, _WRITES

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(forbidden):
            raise PermissionError(f"a submission may not do this: {event}")
        if event == "import" and arguments[0] in unheard:
            raise ImportError(f"a submission may not do this: import {arguments[0]}")
        if event not in reads or arguments[0] is None or is_a(arguments[0], int_):
            return  # an int is a stream that is open already
        changes = event == "open" and (
            (is_a(arguments[2], int_) and arguments[2] & writes)
            or (is_a(arguments[1], str_) and not arguments[1].strip("rbtU") == "")
        )
        path = real(text(arguments[0])) + os.sep
        if changes or path.startswith(closed) or not path.startswith(own):
            raise PermissionError(f"a submission may not read or write files: {arguments[0]}")

    sys.addaudithook(hook)


# -- serving -----------------------------------------------------------------------------------------------------


def sentence(error: BaseException, line: str = "") -> str:
    """What is said about an error that a student's function raised; `line`, ` at line 3: "x /= 2"`, says where."""
    if isinstance(error, MemoryError):
        return f"It wanted more memory than there is for it{line}."
    if isinstance(error, ValueError) and "read-only" in str(error):
        what = "what it was given, or a view that is read-only (broadcast_to, diagonal)"
        return f"Your function changes {what}{line}. Work on a copy, or make a new array."
    if isinstance(error, NotImplementedError):
        return EMPTY
    return shortened(f"{type(error).__name__}{line}: {error}")


def shortened(text: str) -> str:
    """One line of a table: a message may be anything."""
    line = " ".join(text.encode("utf-8", "replace").decode().split())
    return line if len(line) <= LONGEST else line[:LONGEST] + " …"


def _sentence(error: BaseException, file: Path) -> str:
    own = [step for step in traceback.extract_tb(error.__traceback__) if step.filename == str(file)]
    lines = decode_source(_SOURCES[file]).split("\n") if own else []
    line = f' at line {own[-1].lineno}: "{lines[own[-1].lineno - 1].strip()}"' if own and own[-1].lineno else ""
    return sentence(error, line)


_SOURCES: dict[Path, bytes] = {}  # compile knows about byte order marks, encodings and ends of lines


def _function(file: Path, name: str) -> Callable[..., Any]:
    """The student's function: the file is run as a module, so its last lines (`if __name__ …`) are not."""
    module = sys.modules["submission"] = ModuleType("submission")  # dataclasses look it up
    exec(compile(_SOURCES[file], str(file), "exec"), vars(module))
    if not callable(vars(module).get(name)):
        raise NameError(f"the file defines no function {name}")
    made: Callable[..., Any] = vars(module)[name]
    return made


def serve(file: Path, name: str, hidden: Path) -> NoReturn:
    """Answer frames until the parent closes its end: the inputs in, the outputs or a sentence out."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the student prints goes nowhere
    questions = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _SOURCES[file] = file.read_bytes()
    sys.meta_path.insert(0, _NoMinglm())
    sys.breakpointhook = lambda *arguments, **named: None  # one that was left in a file stops nobody
    _bound_memory()
    _take_away()
    _bound_doings(hidden)
    try:
        function: Callable[..., Any] | None = _function(file, name)
        send(answers, ("ready",))
    except BaseException as error:  # a submission may raise anything, SystemExit too
        function = None
        send(answers, ("error", _sentence(error, file)))

    kept: list[Any] = []

    def ask(number: int, given: tuple[Any, ...]) -> Any:
        send(answers, ("call", number, given))
        kind, answer = receive(questions)
        if kind == "error":
            raise ValueError(answer)
        return answer

    while function is not None:
        try:
            inputs = receive(questions, ask, kept)
        except EOFError:
            break
        try:
            with np.errstate(all="ignore"):
                send(answers, ("answer", function(*inputs)), kept)
        except BaseException as error:
            send(answers, ("error", _sentence(error, file)))
    os._exit(0)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
