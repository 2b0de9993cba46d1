"""Rendering chat templates, which are programs from outside.

Jinja's sandbox keeps a template away from Python's objects, but not from nested loops or strings of a terabyte. So
templates that are not our own are compiled and rendered in a child process: this file, run as a script, with bounds on
its time and memory. It imports nothing of minglm.
"""

import json
import signal
import subprocess
import sys
import traceback
from datetime import datetime
from typing import Any, NoReturn

SECONDS, BYTES = 2.0, 256_000_000  # that a child may take: of the clock; of memory beyond what it has when it begins
_TOO_MUCH = f"it wants more than {BYTES / 1e6:.0f} MB of memory"


def environment() -> Any:
    """Jinja as Hugging Face sets it up, so a checkpoint's own template renders the same here."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return made


def compiled(source: str) -> Any:
    """The template. ValueError if it does not compile."""
    import jinja2

    try:
        return environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat template, line {error.lineno}: {error.message}") from error
    except Exception as error:  # deep nesting breaks Python's own compiler, in several ways
        raise ValueError(f"chat template does not compile: {type(error).__name__}: {error}") from error


def rendered(template: Any, values: dict[str, Any]) -> str:
    """The text. ValueError if the template fails."""
    try:
        return str(template.render(values))
    except Exception as error:  # a template can raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
        where = f", line {lines[-1]}" if lines else ""
        what = _TOO_MUCH if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"chat template{where}: {what}") from error


# -- in a child process ------------------------------------------------------------------------------------------


def run(source: str, values: dict[str, Any] | None = None) -> str:
    """Compile a template in a child process, and render it if there are values. ValueError for a template that fails,
    or that takes too long or too much memory."""
    given = json.dumps([source, values])
    command = [sys.executable, "-X", "utf8", "-I", __file__]
    try:
        done = subprocess.run(command, input=given, capture_output=True, encoding="utf-8", timeout=SECONDS + START)
    except subprocess.TimeoutExpired:
        raise ValueError(_TOO_LONG) from None
    if done.returncode == -_ALARM:
        raise ValueError(_TOO_LONG)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise ValueError(
            f"chat template: its process ended without an answer (code {done.returncode}); more than "
            f"{BYTES / 1e6:.0f} MB of memory, or deeper nesting than Python holds"
        ) from None
    if "error" in answer:
        raise ValueError(answer["error"])
    return str(answer["text"])


START = 8.0  # seconds that Python and Jinja may take to begin, on a busy machine
_TOO_LONG = f"chat template: it ran for more than {SECONDS:g} seconds and was stopped"
_ALARM = getattr(signal, "SIGALRM", 0) or 1_000_000  # Windows has none: there the parent's clock is the only bound


def _bound() -> None:
    try:
        import resource
    except ImportError:
        return
    signal.setitimer(signal.ITIMER_REAL, SECONDS)  # nobody handles the alarm, so it ends the process
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
    except OSError:
        pages = 0
    limit = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _serve() -> None:
    source, values = json.loads(sys.stdin.read())
    environment()  # what it imports is not the template's memory
    _bound()
    try:
        template = compiled(source)
        answer = {"text": "" if values is None else rendered(template, values)}
    except ValueError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"error": f"chat template: {_TOO_MUCH}"}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    _serve()
