"""The compile cache: used again, never trusted, never in the way."""

import importlib
import linecache
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numba
import pytest

from minglm.fast import jit

pytestmark = pytest.mark.skipif(jit.DISABLE_JIT, reason="without the JIT nothing is compiled; runs whenever it is on")

TINY = """
from minglm.fast.jit import kernel

@kernel
def plus_one(x):
    return x + 1

@kernel
def triple(x):
    return plus_one(x) * 3 - 3
"""


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Call it with a cache folder: the module with two small kernels as a new process would import it, and the notices
    that using it gives."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code/tiny.py").write_text(TINY)
    monkeypatch.syspath_prepend(tmp_path / "code")

    def use(cache=None, x=5):
        if cache is not None:
            monkeypatch.setenv("MINGLM_CACHE", str(cache))
        jit.cache_folder.cache_clear()
        jit._noticed.clear()
        sys.modules.pop("tiny", None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tiny = importlib.import_module("tiny")
            assert tiny.triple(x) == 3 * x
            assert tiny.triple(float(x)) == 3 * x
        return tiny, [str(w.message) for w in caught]

    yield use
    jit.cache_folder.cache_clear()
    jit._noticed.clear()
    sys.modules.pop("tiny", None)


def hits_and_misses(tiny):
    return sum(tiny.triple.stats.cache_hits.values()), sum(tiny.triple.stats.cache_misses.values())


def entries(cache):
    return sorted(cache.rglob("*.kernel"))


def test_the_second_use_compiles_nothing_and_writes_nothing(fresh, tmp_path):
    cache = tmp_path / "cache"
    tiny, notices = fresh(cache)
    assert (hits_and_misses(tiny), notices) == ((0, 2), [])
    assert len(entries(cache)) == 4  # two kernels, for whole numbers and for floats
    before = {path: path.stat().st_mtime_ns for path in entries(cache)}
    tiny, notices = fresh(cache)
    assert (hits_and_misses(tiny), notices) == ((2, 0), [])
    assert {path: path.stat().st_mtime_ns for path in entries(cache)} == before


def run(code, folder, cache):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def environment(cache):
    root = str(Path(__file__).parents[1])
    return {**os.environ, "MINGLM_CACHE": str(cache), "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"}


SHOW = "import tiny; print(tiny.triple(7), sum(tiny.triple.stats.cache_hits.values()))"


def test_two_processes_that_compile_at_once_are_both_right_and_a_third_finds_the_result(fresh, tmp_path):
    cache = tmp_path / "cache"
    processes = [run(SHOW, tmp_path / "code", cache) for _ in range(2)]
    assert [p.communicate(timeout=60)[0].split()[0] for p in processes] == ["21", "21"]
    assert run(SHOW, tmp_path / "code", cache).communicate(timeout=60)[0] == "21 1\n"
    assert len(entries(cache)) == 2
    assert not list(cache.rglob("unfinished-*"))


SUMS = """
import numpy as np
from minglm.fast.ops import FastOps
x, w = np.random.RandomState(0).standard_normal((40, 12)).astype("f"), np.ones(12, "f")
print([FastOps(threads).rms_norm(x, w, 1e-5).tobytes().hex() for threads in (1, 2)])
"""


@pytest.mark.parametrize("checks", ["0", "1"])
def test_code_just_compiled_and_code_from_the_cache_sum_in_the_same_order(tmp_path, checks):
    """On one thread and on two. A kernel is linked into what starts it: there must be one copy of it that is called."""
    settings = environment(tmp_path) | {"NUMBA_BOUNDSCHECK": checks}
    once, again = (
        subprocess.run([sys.executable, "-c", SUMS], env=settings, capture_output=True, text=True) for _ in range(2)
    )
    assert once.stderr == again.stderr == ""
    one_thread, two_threads = eval(once.stdout)
    assert one_thread == two_threads
    assert once.stdout == again.stdout


# -- faults: right results, one notice ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:20],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: bytes(len(data)),
        lambda data: data[:1000] + bytes([data[1000] ^ 1]) + data[1001:],
        lambda data: bytes([data[0] ^ 1]) + data[1:],
    ],
)
def test_damaged_files_are_rebuilt_with_one_notice(fresh, tmp_path, damage):
    cache = tmp_path / "cache"
    fresh(cache)
    for path in entries(cache):
        path.write_bytes(damage(path.read_bytes()))
    tiny, notices = fresh(cache)
    assert hits_and_misses(tiny) == (0, 2)
    assert len(notices) == 1
    assert "damaged files in the cache of compiled kernels" in notices[0]
    assert "compiled anew" in notices[0]
    tiny, notices = fresh(cache)
    assert (hits_and_misses(tiny), notices) == ((2, 0), [])


def test_what_a_killed_process_left_is_no_entry(fresh, tmp_path):
    cache = tmp_path / "cache"
    fresh(cache)
    folder = entries(cache)[0].parent
    for path in entries(cache):
        path.rename(folder / f"unfinished-{path.stem}")
    tiny, notices = fresh(cache)
    assert (hits_and_misses(tiny), notices) == ((0, 2), [])


def test_an_entry_of_another_kernel_is_not_taken_for_this_one(fresh, tmp_path):
    cache = tmp_path / "cache"
    fresh(cache)
    before = entries(cache)
    code = tmp_path / "code/tiny.py"
    code.write_text(TINY.replace("plus_one(x) * 3 - 3", "x + x + x"))
    importlib.invalidate_caches()
    shutil.rmtree(tmp_path / "code/__pycache__", ignore_errors=True)
    linecache.clearcache()
    tiny, notices = fresh(cache)
    assert (hits_and_misses(tiny), notices) == ((0, 2), [])
    assert len(entries(cache)) == len(before) + 2


@pytest.mark.parametrize("place", ["/dev/null/x", "/proc/minglm", "a file"])
@pytest.mark.skipif(sys.platform == "win32", reason="no such places on Windows; runs everywhere else")
def test_without_a_place_to_write_everything_works_with_one_notice(fresh, tmp_path, place):
    if place == "a file":
        place = tmp_path / "file"
        place.write_text("in the way")
    _, notices = fresh(place)
    assert len(notices) == 1
    assert "no folder to keep compiled kernels in" in notices[0]
    assert "MINGLM_CACHE=folder names a place" in notices[0]
    assert jit.cache_folder() is None


def test_without_a_home_folder_everything_works_with_one_notice(fresh, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("MINGLM_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    _, notices = fresh()
    assert len(notices) == 1
    assert "no folder to keep compiled kernels in (Could not determine home directory.)" in notices[0]


def test_a_cache_that_vanishes_or_fills_up_on_the_way_gives_one_notice(fresh, tmp_path):
    cache = tmp_path / "cache"
    tiny, _ = fresh(cache)
    shutil.rmtree(cache)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert tiny.triple(1j) == 3j  # other types: compiled and not kept
        assert tiny.triple(True) == 3
    assert len(caught) == 1
    assert "cannot keep compiled kernels" in str(caught[0].message)


def test_the_default_place_is_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("MINGLM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    wanted = {"linux": "xdg/minglm", "darwin": "home/Library/Caches/minglm", "win32": "local/minglm"}
    for platform, place in wanted.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert jit._user_cache() == tmp_path / place
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert jit._user_cache() == tmp_path / "home/.cache/minglm"


# -- versions ----------------------------------------------------------------------------------------------------


def test_an_edit_of_any_kernel_file_changes_the_version(tmp_path, monkeypatch):
    copy = tmp_path / "fast"
    shutil.copytree(Path(jit.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(jit, "__file__", str(copy / "jit.py"))
    versions = [jit._version()]
    assert jit._version() == versions[0]
    for name in ("kernels.py", "decode.py", "machine.py", "team.py"):
        path = copy / name
        path.write_text(path.read_text("utf-8") + "\n", "utf-8")
        versions.append(jit._version())
    (copy / "new.py").write_text("")
    monkeypatch.setattr(jit, "__file__", str(copy / "jit.py"))
    assert len(set(versions)) == len(versions)


@pytest.mark.parametrize("name", ["BOUNDSCHECK", "OPT", "LOOP_VECTORIZE", "DEBUGINFO_DEFAULT"])
def test_code_compiled_in_another_way_has_a_cache_of_its_own(name, monkeypatch):
    before = jit._version()
    monkeypatch.setattr(numba.config, name, 7)
    assert jit._version() != before


def test_old_versions_are_removed_and_some_of_them_kept(fresh, tmp_path):
    cache = tmp_path / "cache"
    for i in range(8):
        (cache / f"kernels-{i}").mkdir(parents=True)
        os.utime(cache / f"kernels-{i}", (time.time() - 1000 + i,) * 2)
    (cache / "something else").mkdir()
    fresh(cache)
    kept = {path.name for path in cache.iterdir()}
    others = {f"kernels-{i}" for i in range(8 - jit.KEPT, 8)}
    assert kept == {"something else", jit.cache_folder().name, *others}


def test_a_version_that_is_in_use_outlives_newer_ones_that_are_not(fresh, tmp_path):
    cache = tmp_path / "cache"
    fresh(cache)
    folder = jit.cache_folder()
    os.utime(folder, (time.time() - 1000,) * 2)
    fresh(cache)
    assert time.time() - folder.stat().st_mtime < 500


def test_two_kernels_of_one_name_do_not_share_compiled_code(fresh, tmp_path):
    """As when two files each have a `forward` for the threads to run."""
    parallel = (
        "from minglm.fast.team import parallel\n@parallel\ndef work(rank, threads, words, out):\n    out[rank] = "
    )
    for number in (1, 2):
        (tmp_path / f"code/tiny{number}.py").write_text(parallel + f"{number}\n")
    show = """if True:
        import numpy as np
        from minglm.fast.team import team
        import tiny1, tiny2
        out = np.zeros(1)
        for module in (tiny1, tiny2):
            team(1).run(module.work, out)
            print(out[0])"""
    for _ in range(2):
        process = run(show, tmp_path / "code", tmp_path / "cache")
        assert process.communicate(timeout=60)[0].split() == ["1.0", "2.0"]
