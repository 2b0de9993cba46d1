"""How kernels are compiled, and where the compiled code is kept.

`@kernel` makes Numba compile a function at its first call and keep the result in the user's cache folder, so that the
next process starts at once. Numba's own cache does not notice an edit in another module, mixes entries when two
processes write at once and trips over damaged files; so each entry here is one file, written in one go, named by a
hash of everything it depends on, and checked when it is read.

With NUMBA_DISABLE_JIT=1 in the environment the kernels are plain Python functions: slow, and open to a debugger.
"""

import functools
import hashlib
import inspect
import os
import pickle
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler, CompileResult
from numba.core.serialize import dumps

# What the compiler may do with floats: sum in another order (so that it can use vector registers) and fuse a product
# with a sum. Nothing that assumes away NaN or infinity: masks use them.
FLAGS = {"reassoc", "contract"}
DISABLE_JIT = bool(numba.config.DISABLE_JIT)
ONE_THREAD = DISABLE_JIT or bool(numba.config.BOUNDSCHECK)  # a rank that finds an error leaves the others waiting
KEPT = 4  # cache folders of other versions, last used, that stay when a new one is made


# A kernel allocates nothing (so it needs no memory manager, and counts no references), and raises nothing (a division
# by zero gives what NumPy gives).
OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": FLAGS, "_nrt": False, "error_model": "numpy"}


def kernel(function: Callable[..., Any]) -> Any:
    """Compile with our options, free of the interpreter's lock, and through our cache."""
    compiled = numba.njit(**OPTIONS)(function)
    if not DISABLE_JIT and (folder := cache_folder()) is not None:
        compiled._cache = _Cache(function, folder)
    return compiled


class _Unfinished(JITCodeLibrary):
    """Code that is neither optimised nor loaded by itself, but with the kernel into which it is linked. (Loaded code
    of the same name would also be called in place of the kernel's own, which may sum in another order.)"""

    def _optimize_final_module(self) -> None: ...

    def _finalize_final_module(self) -> None:
        self._finalized = True


class _Stage(Compiler):
    """Stops before machine code."""

    def __init__(self, typing: Any, target: Any, library: Any, args: Any, returns: Any, flags: Any, local: Any):
        flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        super().__init__(typing, target, _Unfinished(target.codegen(), "stage"), args, returns, flags, local)

    def _compile_core(self) -> Any:
        compiled = super()._compile_core()

        def entry(*_: Any) -> None:
            raise TypeError(f"{compiled.fndesc.qualname} is called by kernels only")

        compiled.target_context.insert_user_function(entry, compiled.fndesc, [compiled.library])
        return compiled._replace(entry_point=entry)


def stage(function: Callable[..., Any]) -> Any:
    """A part of a kernel, which only kernels call. It is compiled by itself, and kept with the kernel it is part of."""
    compiled = numba.njit(**OPTIONS, pipeline_class=_Stage)(function)
    if not DISABLE_JIT:
        compiled.add_overload = lambda result: compiled.overloads.update({tuple(result.signature.args): result})
    return compiled


def inlined(function: Callable[..., Any]) -> Any:
    """A kernel so small that it is copied into its callers before they are compiled, which takes less time."""
    return numba.njit(**OPTIONS, inline="always")(function)


# -- where -------------------------------------------------------------------------------------------------------


@functools.cache
def cache_folder() -> Path | None:
    """The folder of compiled kernels, made if need be; None, after one notice, where nothing can be written.

    `MINGLM_CACHE` names another place than the user's cache folder.
    """
    try:
        folder = _user_cache() / f"kernels-{_version()}"
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # another process may be removing them too
                _remove_old(folder)
        os.utime(folder)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        _notice("no folder to keep compiled kernels in", "every process compiles anew, which takes seconds", error)
        return None


def _user_cache() -> Path:
    if given := os.environ.get("MINGLM_CACHE"):
        return Path(given)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "minglm"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/minglm"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minglm"


def _version() -> str:
    """A hash of every kernel's source and of what compiles it. The processor's name is in each entry's own hash."""
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    c = numba.config
    versions = (
        f"{numba.__version__} {llvmlite.__version__} {platform.python_version()} {platform.machine()} "
        f"{c.BOUNDSCHECK} {c.OPT} {c.LOOP_VECTORIZE} {c.SLP_VECTORIZE} {c.DEBUGINFO_DEFAULT}"
    )
    return hashlib.sha256(b"".join([*sources, versions.encode()])).hexdigest()[:16]


def _remove_old(current: Path) -> None:
    others = [path for path in current.parent.glob("kernels-*") if path != current]
    for path in sorted(others, key=lambda p: p.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(path, ignore_errors=True)


# -- what --------------------------------------------------------------------------------------------------------


class _Cache:
    """What a Numba dispatcher asks of a cache. An entry is a file: a checksum, then the pickled machine code."""

    def __init__(self, function: Callable[..., Any], folder: Path):
        self.cache_path = str(folder)
        self._name = f"{function.__module__}.{function.__qualname__} {inspect.getsource(function)}"

    def load_overload(self, signature: Any, target: Any) -> Any:
        """The compiled function for these argument types, or None: then Numba compiles it."""
        target.refresh()
        path = self._path(signature, target.codegen())
        try:
            data = path.read_bytes()
        except OSError:
            _say_compiling()
            return None
        try:
            checksum, code = data[:32], data[32:]
            if hashlib.sha256(code).digest() != checksum:
                raise ValueError("its checksum does not fit")
            return CompileResult._rebuild(target, *pickle.loads(code))
        except Exception as error:  # a damaged pickle raises anything
            _notice("damaged files in the cache of compiled kernels", "compiled anew", error, path)
            return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        code = dumps(compiled._reduce())
        path = self._path(signature, compiled.codegen)
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix="unfinished-", delete=False) as file:
                temporary = Path(file.name)
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(temporary, path)
        except OSError as error:
            _notice("cannot keep compiled kernels", "the next process compiles them again", error)
            if temporary is not None:
                with suppress(OSError):
                    temporary.unlink()

    def _path(self, signature: Any, codegen: Any) -> Path:
        key = f"{self._name} {signature} {codegen.magic_tuple()}"
        return Path(self.cache_path) / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.kernel"

    def enable(self) -> None: ...

    def disable(self) -> None: ...

    def flush(self) -> None: ...


@functools.cache
def _say_compiling() -> None:
    """Once per process, to who sits at a terminal or a notebook: the first token takes its time."""
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        print("minglm: compiling kernels for this processor, once; some ten seconds …", file=sys.stderr)


_noticed: set[str] = set()


def _notice(what: str, so: str, error: Exception, path: Path | None = None) -> None:
    """Say it once per process, however many kernels it befalls."""
    if what not in _noticed:
        _noticed.add(what)
        where = f"{path}: " if path else ""
        text = f"{what} ({where}{error}); {so}. MINGLM_CACHE=folder names a place for them"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
