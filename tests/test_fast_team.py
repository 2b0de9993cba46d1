"""Threads: asked for in range, always the same result, and nothing that befalls them leaves anybody waiting."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from numba.core.errors import TypingError

from minglm.api import Model
from minglm.config import PRESETS
from minglm.fast import team as teams
from minglm.fast.jit import DISABLE_JIT
from minglm.fast.team import Team, barrier, parallel, share, team, thread_count
from tests.variants import random_params

MICRO = PRESETS["micro"].replace(eos_token_id=())
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
pytestmark = pytest.mark.usefixtures("no_hang")
JIT_ONLY = pytest.mark.skipif(DISABLE_JIT, reason="without the JIT there is one thread; runs whenever the JIT is on")


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    monkeypatch.setattr(teams, "cores", lambda: 4)


def model_of(seed=0, dtype="float32"):
    return Model(MICRO, random_params(MICRO, seed)).astype(dtype)


# -- how many ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [True, 0, -1, 99, 5, "x", "2.0", 2.0, "", "1e0"])
def test_counts_out_of_range_are_refused_with_the_range(asked, monkeypatch):
    with pytest.raises(ValueError, match=r"threads = .* must be a whole number between 1 and 4, the cores there are"):
        thread_count(asked, MICRO)
    if asked != "":
        monkeypatch.setenv("MINGLM_THREADS", str(asked))
        with pytest.raises(ValueError, match=r"MINGLM_THREADS = .* must be a whole number between 1 and 4"):
            thread_count(None, MICRO)


def test_the_public_face_refuses_them_before_any_work():
    model = model_of()
    for wrong in (0, 99, True, 1.5):
        with pytest.raises(ValueError, match=r"threads = .* between 1 and 4"):
            model.generate(PROMPT, 4, threads=wrong)


@JIT_ONLY
def test_the_argument_comes_before_the_environment_and_both_before_the_rule(monkeypatch):
    monkeypatch.delenv("MINGLM_THREADS", raising=False)
    assert thread_count(None, MICRO) == 1  # small: waiting would take longer than the work
    assert thread_count(None, PRESETS["GLM-4.5-Air"]) == 4
    monkeypatch.setattr(teams, "cores", lambda: 1)
    assert thread_count(None, PRESETS["GLM-4.5-Air"]) == 1
    monkeypatch.setattr(teams, "cores", lambda: 4)
    monkeypatch.setenv("MINGLM_THREADS", " 3 ")
    assert thread_count(None, MICRO) == 3
    assert thread_count(2, MICRO) == thread_count(np.int64(2), MICRO) == 2
    monkeypatch.setenv("MINGLM_THREADS", "")
    assert thread_count(None, MICRO) == 1
    assert thread_count(None) == 4  # training and other work of many tokens


@JIT_ONLY
def test_the_engine_says_how_many_it_uses(monkeypatch):
    assert model_of().generate(PROMPT, 2, threads=3).stats.engine == "fast engine, 3 threads"
    monkeypatch.setenv("MINGLM_THREADS", "2")
    assert model_of().generate(PROMPT, 2).stats.engine == "fast engine, 2 threads"


def test_cores_follow_affinity_and_quota(monkeypatch, tmp_path):
    monkeypatch.undo()
    everything = teams.cores()
    assert 1 <= everything <= (os.cpu_count() or 1)
    for text, wanted in (("max 100000", everything), ("100000 100000", 1), ("50000 100000", 1), ("", everything)):
        (tmp_path / "cpu.max").write_text(text)
        monkeypatch.setattr(teams, "Path", lambda path: tmp_path / "cpu.max")
        assert teams.cores() == wanted
    monkeypatch.setattr(teams, "Path", lambda path: tmp_path / "missing")
    assert teams.cores() == everything


# -- sharing and meeting -----------------------------------------------------------------------------------------


def test_shares_are_everything_once_and_differ_by_one_at_most():
    for n in (0, 1, 2, 7, 16, 1001):
        for threads in range(1, 9):
            parts = [share(rank, threads, n) for rank in range(threads)]
            assert [i for start, stop in parts for i in range(start, stop)] == list(range(n))
            sizes = [stop - start for start, stop in parts]
            assert max(sizes) - min(sizes) <= 1


@parallel
def rotate(rank, threads, words, rounds, marks):
    """In each round every rank reads what its neighbour wrote in the one before: wrong unless all wait for all."""
    for i in range(rounds):
        marks[i + 1, rank] = marks[i, (rank + 1) % threads] + 1
        barrier(words, threads)


@JIT_ONLY
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_nobody_passes_a_barrier_before_all_are_there(threads):
    mine = Team(threads)
    for rounds in (1, 3000):
        for _ in range(20):
            marks = np.zeros((rounds + 1, threads), np.int64)
            mine.run(rotate, rounds, marks)
            assert (marks == np.arange(rounds + 1)[:, None]).all()


@JIT_ONLY
def test_workers_that_went_home_come_back():
    mine, marks = Team(4), np.zeros((4, 4), np.int64)
    for pause in (0, 0.1, 0, 0.02, 0.001, 0.001, 0):
        time.sleep(pause)
        marks[:] = 0
        mine.run(rotate, 3, marks)
        assert marks[3].tolist() == [3, 3, 3, 3]
    deadline = time.monotonic() + 20
    while mine.words[teams.TASK] != teams.CLOSED:  # somebody is still spinning
        assert time.monotonic() < deadline
        time.sleep(0.01)


@JIT_ONLY
def test_a_task_that_cannot_start_leaves_the_team_usable():
    mine, marks = Team(3), np.zeros((2, 3), np.int64)
    for wrong in ((1,), (1, "marks"), (1, marks, 2)):
        with pytest.raises(TypingError):
            mine.run(rotate, *wrong)
    mine.run(rotate, 1, marks)
    assert marks[1].tolist() == [1, 1, 1]


@JIT_ONLY
def test_a_system_without_more_threads_is_an_error_and_no_hang(monkeypatch):
    mine, marks, start = Team(3), np.zeros((2, 3), np.int64), threading.Thread.start

    def refuse(thread):
        if thread.name == "minglm-2":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="can't start new thread"):
            mine.run(rotate, 1, marks)
    monkeypatch.setattr(threading.Thread, "start", start)
    mine.run(rotate, 1, marks)
    assert marks[1].tolist() == [1, 1, 1]


def test_a_team_is_made_once_for_each_number_of_threads():
    assert team(2) is team(2)
    assert team(2) is not team(3)


# -- generating --------------------------------------------------------------------------------------------------


def ids_of(model, count=16, prompt=PROMPT, **options):
    return model.generate(prompt, count, temperature=0.7, seed=3, **options).ids


@JIT_ONLY
def test_one_thread_and_four_generate_the_same():
    for dtype in ("float32", "bfloat16"):
        assert len({tuple(ids_of(model_of(dtype=dtype), threads=n)) for n in (1, 2, 3, 4)}) == 1


def at_once(jobs):
    """Each job in a Python thread of its own; their results, in order."""
    results, started = [None] * len(jobs), threading.Barrier(len(jobs))

    def work(i):
        started.wait()
        results[i] = jobs[i]()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("threads", [1, pytest.param(3, marks=JIT_ONLY)])
def test_python_threads_that_generate_at_once_all_get_their_own_tokens(threads):
    models = [model_of(0), model_of(1)]
    jobs = [(m, [*PROMPT, i]) for m in models for i in range(3)]
    wanted = [ids_of(m, prompt=p, threads=threads) for m, p in jobs]
    assert len({tuple(ids) for ids in wanted}) == len(wanted)
    found = at_once([lambda m=m, p=p: ids_of(m, prompt=p, threads=threads) for m, p in jobs])
    assert found == wanted


@pytest.mark.parametrize("threads", [1, pytest.param(4, marks=JIT_ONLY)])
def test_generators_may_take_turns(threads):
    models = [model_of(0), model_of(1), model_of(0, "bfloat16")]
    runs = [m.steps(PROMPT, 8, threads=threads) for m in models]
    found = [[step.id for step in steps] for steps in zip(*runs, strict=True)]
    assert list(map(list, zip(*found, strict=True))) == [m.generate(PROMPT, 8).ids for m in models]


def test_a_generator_that_is_dropped_half_way_disturbs_nobody():
    model = model_of()
    for _ in range(3):
        next(model.steps(PROMPT, 8))
    assert model.generate(PROMPT, 8).ids == model.generate(PROMPT, 8, engine="numpy").ids


# -- whole processes ---------------------------------------------------------------------------------------------

START = """if True:
    import os, signal, sys, threading, time, warnings
    import numpy as np
    from minglm.api import Model
    from minglm.fast import team as teams
    from tests.test_fast_team import MICRO, PROMPT, ids_of, model_of
    teams.cores = lambda: 4
    model = model_of()
"""


@pytest.fixture(scope="module")
def warm():
    """The step is compiled and in the cache, so that processes need not."""
    for dtype in ("float32", "bfloat16"):
        model_of(dtype=dtype).generate(PROMPT, 2)


def python(code, timeout=120, **environment):
    """What a process prints that runs this code after START; it must end well and in time."""
    done = subprocess.run(
        [sys.executable, "-c", START + code],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": ".", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1], done.stderr


@JIT_ONLY
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork; runs wherever it can")
def test_a_forked_child_computes_with_one_thread_and_says_so_once(warm):
    out, err = python("""
    warnings.simplefilter("always")
    wanted = ids_of(model, threads=4)
    print(wanted)
    steps = model.steps(PROMPT, 4, threads=4)
    first = next(steps).id
    child = os.fork()
    if child == 0:
        print(ids_of(model, threads=4))  # a new engine
        print([first, *(step.id for step in steps)] == model.generate(PROMPT, 4).ids)  # one that was at work
        print(ids_of(model, threads=4), flush=True)
        os._exit(0)
    print(os.waitpid(child, 0)[1])
    print([first, *(step.id for step in steps)] == model.generate(PROMPT, 4).ids)
    print(ids_of(model, threads=4))
    """)
    ids = out[-1]
    assert sorted(out) == sorted([ids, ids, ids, ids, "True", "True", "0"]) or out.count(ids) >= 4
    assert out.count("True") == 2
    assert "0" in out
    assert err.count("a forked process computes with one thread; start it with 'spawn' to use all") == 1


@JIT_ONLY
@pytest.mark.skipif(sys.platform == "win32", reason="signals come otherwise on Windows; runs everywhere else")
def test_ctrl_c_in_the_middle_leaves_everything_usable(warm):
    """At many moments: in the kernels, between them, while workers wake."""
    out, _ = python("""
    wanted = model.generate(PROMPT, 50, threads=4).ids
    caught = 0
    for i in range(200):
        if i % 3 == 0:
            time.sleep(0.003)  # the workers went home
        try:
            threading.Timer(0.0001 * (i % 40), os.kill, (os.getpid(), signal.SIGINT)).start()
            while True:
                model.generate(PROMPT, 50, threads=4)
        except KeyboardInterrupt:
            caught += 1
    print(caught, model.generate(PROMPT, 50, threads=4).ids == wanted)
    """)
    assert out == ["200 True"]


@JIT_ONLY
def test_a_process_ends_while_its_workers_wait(warm):
    for last in ("", "next(model.steps(PROMPT, 4, threads=4))"):
        out, err = python(f"""
    ids_of(model, 4, threads=4)
    print("done", flush=True)
    {last}
    """)
        assert (out, err) == (["done"], "")


@JIT_ONLY
def test_a_process_with_a_busy_python_thread_still_gets_its_tokens(warm):
    out, _ = python("""
    def spin():
        while True:
            sum(range(1000))
    threading.Thread(target=spin, daemon=True).start()
    print(ids_of(model, 5, threads=4) == ids_of(model, 5, engine="numpy"))
    """)
    assert out == ["True"]


WITHOUT_JIT = """
    for dtype in ("float32", "bfloat16"):
        model = model_of(dtype=dtype)
        result = model.generate(PROMPT, 5, threads=4)
        print(result.ids == model.generate(PROMPT, 5, engine="numpy").ids, result.stats.engine)
"""


def test_without_the_jit_the_kernels_are_plain_python_in_one_thread():
    out, err = python(WITHOUT_JIT, NUMBA_DISABLE_JIT="1")
    assert out == ["True fast engine, JIT off"] * 2
    assert not err


@pytest.mark.slow
@JIT_ONLY
def test_no_kernel_reads_or_writes_past_the_end_of_an_array(tmp_path):
    """Numba checks every index. One thread: a rank that stops half-way would be waited for by the others."""
    code = """
    from tests.variants import VARIANTS, random_params
    from minglm.fast.engine import Decoder
    from minglm.model import KVCache
    for config, own_ends in VARIANTS.values():
        for rows in (1, 3):
            decoder = Decoder(random_params(config, 0, np.float32, own_ends), config, 12, 1)
            cache = KVCache(config, rows, 8)
            for count in (4, 1, 3):
                decoder.step(np.full((rows, count), config.vocab_size - 1), cache)
    print("done")
    cache = KVCache(config, 1, 8)
    decoder.step(np.zeros((1, 1), np.int64), cache)
    # and the check checks: with angles missing, the next step reads past their end
    decoder._state = (*decoder._state[:3], decoder._state[3]._replace(cos=decoder._state[3].cos[:0]), decoder._state[4])
    try:
        decoder.step(np.zeros((1, 1), np.int64), cache)
    except RuntimeError as error:
        print(error)
    """
    out, _ = python(code, timeout=600, NUMBA_BOUNDSCHECK="1", MINGLM_CACHE=str(tmp_path), MINGLM_THREADS="1")
    assert (out[0], out[-1]) == ("done", "an error in a kernel; NUMBA_DISABLE_JIT=1 shows where")


def test_the_environments_thread_count_changes_no_token(warm):
    found = {python("print(ids_of(model))", MINGLM_THREADS=n)[0][0] for n in ("1", "4")}
    assert len(found) == 1
