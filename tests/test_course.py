"""Hand-outs without solutions, grading in processes of their own, the class's mistakes."""

import ast
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minglm.cli import main
from minglm.learn import child, handout
from minglm.learn.check import Stopped
from minglm.learn.child import receive, send
from minglm.learn.course import changed, read_term, release, tasks, term
from minglm.learn.exercises import EXERCISES, WEEKS
from minglm.learn.grade import Submission, find, grade_file, read_csv, report, write_csv
from minglm.learn.variants import variant

ROOT = Path(__file__).parents[1]
RIGHT = """
import numpy as np

def rms_norm(x, weight, eps):
    print("what is printed goes nowhere")
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight
"""
WRONG = RIGHT.replace(".mean(", ".sum(")


def submission(tmp_path, text, name="rms_norm"):
    file = tmp_path / f"{name}.py"
    file.write_text(text, "utf-8")
    return file


# -- hand-outs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXERCISES)
def test_the_stubs_of_the_repository_are_those_of_the_exercises(name):
    """Whoever has solved one has changed the function's body only."""
    wanted = ast.parse(handout.stub(EXERCISES[name]))
    found = ast.parse((ROOT / f"notebooks/exercises/{name}.py").read_text("utf-8"))
    assert ast.get_docstring(found) == ast.get_docstring(wanted)
    signatures = [[ast.unparse(n.args) for n in t.body if isinstance(n, ast.FunctionDef)][:1] for t in (found, wanted)]
    assert signatures[0] == signatures[1]


def test_every_exercise_has_its_week_and_every_week_its_notebook():
    assert sorted(name for names in WEEKS.values() for name in names) == sorted(EXERCISES)
    for week, names in WEEKS.items():
        written = json.loads((ROOT / f"notebooks/exercises/week-{week}.ipynb").read_text("utf-8"))
        assert written == handout.notebook(f"Exercises of week {week}", [EXERCISES[name] for name in names])


def test_what_a_report_offers_can_be_pasted_at_the_prompt_that_a_stub_leaves(tmp_path):
    text = handout.stub(EXERCISES["router"], "spec-7")
    assert "Hints speak of GLM-4.5, not of what this version changes." in " ".join(text.split())
    file = submission(tmp_path, text.replace("raise NotImplementedError", "return 1"), "router")
    said = subprocess.run([sys.executable, file], capture_output=True, text=True, check=True).stdout
    lines = [line.split(": ")[1] for line in said.splitlines() if line.startswith("Look")]
    lines += [line.removeprefix("Stuck? ") for line in said.splitlines() if line.startswith("Stuck")]
    assert lines == ['replay("router", 0, router)', 'hint("router", 1)']
    run = subprocess.run(
        [sys.executable, "-i", file], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    assert "Error" not in run.stderr
    assert "\n1\n" in run.stdout
    assert "For one token: which experts" in run.stdout


def test_a_notebook_is_one_and_knows_its_points():
    nbformat = pytest.importorskip("nbformat")
    made = handout.notebook("Week 3", [EXERCISES["router"]], "spec-7")
    nbformat.validate(nbformat.reads(json.dumps(made), as_version=4))
    graded = [cell for cell in made["cells"] if "nbgrader" in cell["metadata"]]
    assert [cell["metadata"]["nbgrader"].get("points") for cell in graded] == [None, None, 5]
    assert all(cell["metadata"]["nbgrader"]["locked"] for cell in graded)
    assert "term='spec-7'" in "".join(graded[1]["source"])
    assert graded[2]["source"] == ['reports["router"].earned']  # nothing that could write to stderr


def test_a_release_holds_no_solution_and_keeps_what_is_there(tmp_path):
    given = term(5, "spec-7")
    release(given, tmp_path)
    for task in tasks(given):
        text = (tmp_path / f"{task.name}.py").read_text("utf-8")
        assert "raise NotImplementedError" in text
        assert "return" not in text.split('"""')[2]
        assert task.brief == variant(EXERCISES[task.name], "spec-7").brief
    (tmp_path / "router_bwd.py").write_text("mine", "utf-8")
    release(given, tmp_path)
    assert (tmp_path / "router_bwd.py").read_text("utf-8") == "mine"
    assert read_term(tmp_path) == given
    for other in (term(5, "spec-8"), term(4, "spec-7")):  # the stubs would stay, and be graded as the other's
        with pytest.raises(ValueError, match="holds week 5 of term 'spec-7', not week"):
            release(other, tmp_path)
    assert changed(given) == []
    assert "the checks have changed" in changed(given._replace(checks="0"))[0]
    assert "glm-nano has other weights" in changed(given._replace(weights={"glm-nano": "0"}))[0]


# -- one submission ----------------------------------------------------------------------------------------------


def test_right_and_wrong(tmp_path):
    task = EXERCISES["rms_norm"]
    assert grade_file(submission(tmp_path, RIGHT), task).passed
    assert grade_file(submission(tmp_path, WRONG), task).mistakes == ("sum_not_mean",)
    asked = variant(task, "spec-7")
    assert grade_file(submission(tmp_path, RIGHT), asked, draw=3).mistakes == ("as_glm45",)


ROGUES = {  # what the function or the file does -> what is said
    "while True: pass": "ran for more than 2 seconds and was stopped",
    "open('/etc/hostname').read()": "may not read or write files",
    "open('mine.txt', 'w').write('x')": "may not read or write files",
    "np.fromfile('/etc/hostname', np.uint8)": "may not read or write files",
    "os.listdir('/')": "may not read or write files",
    "os.open(np.__file__, os.O_WRONLY)": "may not read or write files",
    "os.open(np.__file__, os.O_CREAT)": "may not read or write files",
    "np.memmap('/etc/hostname')": "may not read or write files",
    "import linecache; assert linecache.getline('/etc/hostname', 1)": "AssertionError",
    "import tokenize; tokenize.open('/etc/hostname')": "may not read or write files",
    "import readline": "may not do this: import readline",
    "import sqlite3; sqlite3.connect('/nowhere')": "may not do this: sqlite3",
    "os.chdir('/')": "may not do this: os.chdir",
    "os.utime('.')": "may not do this: os.utime",
    "os.mkfifo('mine')": "may not do this: os.mkfifo",
    "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_CORE)": "may not do this: resource.prlimit",
    "import __main__ as m; m._READS = m._FORBIDDEN = (); open('/etc/hostname')": "may not read or write files",
    "import pathlib as p; p.PurePath.is_relative_to = lambda *a: True; open('/etc/hostname')": "may not read or write",
    "os.fsdecode = lambda place: np.__file__; open('/etc/hostname')": "may not read or write files",
    "import _posixsubprocess as p; p.fork_exec()": "may not do this: _posixsubprocess.fork_exec",
    "import multiprocessing as m; m.get_context('spawn').Process().start()": "may not do this: _posixsubprocess",
    "__import__('_interpreters' if sys.version_info >= (3, 13) else '_xxsubinterpreters').create()": (
        "may not do this: _(xxsub)?interpreters.create"
    ),
    "os.remove('/nowhere')": "may not do this: os.remove",
    "os.system('true')": "may not do this: os.system",
    "os.fork()": "may not do this: os.fork",
    "__import__('subprocess').run(['true'])": "may not do this: subprocess.Popen",
    "__import__('socket').create_connection(('localhost', 9))": "may not do this: socket",
    "__import__('ctypes').CDLL(None)": "may not do this: ctypes",
    "__import__('minglm.model')": "minglm cannot be imported here",
    "__import__('minglm')": "minglm cannot be imported here",
    "np.ones(1 << 34)": "more memory than there is for it",
    "os._exit(0)": "its process ended",
    "sys.exit(0)": "SystemExit",
    "raise ValueError('x' * 10_000)": r"^.{400,560} …",
    "raise ValueError('\\udcff')": "ValueError",
    "return np.broadcast_to(0.0, (10**6, 10**6))": "returned 8,000,000 MB, wanted at most 100 MB",
    "import __main__ as m; m.send(OUT, ('error',))": "its process ended",
    "import __main__ as m; m.send(OUT, (np.ones(2), 1))": "its process ended",
    "os.write(3, b'garbage' * 50)": "its process ended|ran for more",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "f = lambda: f(); f()": "RecursionError",
    "return lambda: 0": r"y is function, wanted float64 \[5, 8\]",
    "return np.array([{}])": "returned ndarray, wanted arrays or numbers",
    "return None": "returned None: does it end in a return",
}


@pytest.mark.skipif(sys.platform == "win32", reason="its bounds are those of POSIX")
@pytest.mark.parametrize("does", ROGUES)
def test_a_rogue_harms_nobody_and_is_told_why(tmp_path, does):
    text = (
        "import os, sys\nfrom types import SimpleNamespace\nimport numpy as np\n"
        "OUT = SimpleNamespace(write=lambda text: os.write(3, text), flush=lambda: None)\n"
        f"def rms_norm(x, weight, eps):\n    {does}\n"
    )
    found = grade_file(submission(tmp_path, text), EXERCISES["rms_norm"], seconds=2)
    assert found.earned == 0
    assert re.search(ROGUES[does], found.says[0]), found.says


@pytest.mark.skipif(sys.platform == "win32", reason="its bounds are those of POSIX")
def test_a_clone_s_solutions_are_not_read(tmp_path, monkeypatch):
    """An editable install puts the whole repository on the path."""
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "pyproject.toml").touch()
    (tmp_path / "clone" / "solution.py").write_text("secret", "utf-8")
    hook = f"import sys; sys.path.append({str(tmp_path / 'clone')!r})\n"
    started = tmp_path / "child.py"
    started.write_text(hook + Path(child.__file__).read_text("utf-8"), "utf-8")
    monkeypatch.setattr(child, "__file__", str(started))
    text = f"def rms_norm(x, weight, eps):\n    raise ValueError(open({str(tmp_path / 'clone/solution.py')!r}).read())"
    found = grade_file(submission(tmp_path, text), EXERCISES["rms_norm"])
    assert "may not read or write files" in found.says[0]


SAME = {  # right, and unusual: bytes of a file
    "byte order mark": b"\xef\xbb\xbf" + RIGHT.encode(),
    "Windows' ends of lines": RIGHT.replace("\n", "\r\n").encode(),
    "Latin-1": "# -*- coding: latin-1 -*-\n# für\n".encode("latin-1") + RIGHT.encode(),
    "a dataclass": b"from __future__ import annotations\nfrom dataclasses import dataclass\n"
    + b"@dataclass\nclass P:\n    a: int\n"
    + RIGHT.encode(),
    "a breakpoint": RIGHT.replace("    print", "    breakpoint()\n    print").encode(),
    "a list of rows": RIGHT.replace("return ", "return list(").encode().rstrip() + b")\n",
    "much printing": RIGHT.replace("print(", "print(1000 * ").encode(),
    "warnings": RIGHT.replace("    print", "    import warnings; warnings.warn('w')\n    print").encode(),
    "a thread that never ends": RIGHT.encode()
    + b"import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n",
}


@pytest.mark.parametrize("kind", SAME)
def test_right_in_an_unusual_file(tmp_path, kind):
    file = tmp_path / "a folder" / "rms_norm.py"
    file.parent.mkdir()
    file.write_bytes(SAME[kind])
    found = grade_file(file, EXERCISES["rms_norm"])
    assert found.passed, found


def test_a_named_tuple_is_a_tuple(tmp_path):
    text = (
        "from typing import NamedTuple\nclass Both(NamedTuple):\n    dgate: object\n    dup: object\n"
        "import numpy as np\ndef swiglu_bwd(dy, gate, up):\n    s = 1 / (1 + np.exp(-gate))\n"
        "    return Both(dy * up * s * (1 + gate * (1 - s)), dy * gate * s)\n"
    )
    assert grade_file(submission(tmp_path, text, "swiglu_bwd"), EXERCISES["swiglu_bwd"]).passed


CACHES = {
    "class": "class Cache:\n    def __init__(self): self.held = {}\n",
    "named tuple": "from collections import namedtuple\nOne = namedtuple('One', 'held')\ndef Cache(): return One({})\n",
    "namespace": "from types import SimpleNamespace\ndef Cache(): return SimpleNamespace(held={})\n",
}


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_may_be_any_object(tmp_path, kind):
    """It passes `check`, and so it passes here: what cannot cross to the parent stays in the child."""
    solution = (ROOT / "docs/teaching/solutions/kv_cache.py").read_text("utf-8")
    text = CACHES[kind] + solution.replace("cache = {} if cache is None", "cache = Cache() if cache is None")
    text = text.replace("in cache:", "in cache.held:").replace("cache[layer]", "cache.held[layer]")
    found = grade_file(submission(tmp_path, text, "kv_cache"), EXERCISES["kv_cache"])
    assert found.passed, found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\0", "SyntaxError|ValueError"),
        ("import minglm.model", "minglm cannot be imported here"),
        ("def other(): pass", "the file defines no function rms_norm"),
        ("def rms_norm(", "SyntaxError"),
        ("raise SystemExit", "SystemExit"),
        ("def rms_norm(x, weight, eps):\n    raise NotImplementedError", "Nothing is written yet"),
        ("def rms_norm(x, weight, eps):\n    return x + y", 'NameError at line 2: "return x \\+ y"'),
        ("def rms_norm(x, weight, eps):\n    x /= 2", "changes what it was given"),
        ("import __main__ as m\nm.send(m.sys._getframe(2).f_locals['answers'], ('error',))", "its process ended"),
    ],
)
def test_files_that_do_not_work(tmp_path, text, says):
    found = grade_file(submission(tmp_path, text), EXERCISES["rms_norm"])
    assert found.earned == 0
    assert re.search(says, found.says[0]), found.says


def test_a_stopped_process_stays_stopped(tmp_path):
    held = Submission(submission(tmp_path, "import os\ndef rms_norm(*a): os._exit(1)"), "rms_norm")
    for _ in range(2):
        with pytest.raises(Stopped, match="its process ended"):
            held(np.ones(2), np.ones(2), 0.0)
    held.close()


def test_frames_carry_what_functions_take(tmp_path):
    sent = (
        np.arange(6.0).reshape(2, 3), np.float32(2), True, 3, 0.1, "text", None, (np.zeros(0, bool), -0.0), [1, (2,)],
        {"k": np.ones(2), (0, 1): [np.zeros(1)]},
    )  # fmt: skip
    sent[0].flags.writeable = False
    with open(tmp_path / "frame", "wb") as file:
        send(file, sent)
    with open(tmp_path / "frame", "rb") as file:
        found = receive(file)
        with pytest.raises(EOFError):
            receive(file)
    assert not found[0].flags.writeable
    assert repr(found) == repr(sent)


KEPT_IN_A_DICT = """
import numpy as np

def kv_cache(cache, layer, start, q, k, v, rotate):
    cache = {} if cache is None else cache
    keys, values = cache.setdefault(layer, ([], []))
    del keys[start:], values[start:]
    y = np.empty_like(q)
    for t in range(len(q)):
        keys.append(rotate(k[t : t + 1], np.array([start + t]))[0])
        values.append(v[t])
        turned = rotate(q[t : t + 1], np.array([start + t]))[0]
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            scores = np.array([turned[h] @ key[g] for key in keys]) / q.shape[2] ** 0.5
            p = np.exp(scores - scores.max())
            y[t, h] = p @ np.array([value[g] for value in values]) / p.sum()
    return y.reshape(len(q), -1), cache
"""
AT_ONCE = """
import numpy as np

def moe(x, indices, weights, experts, shared):
    answers = np.stack([expert(x) for expert in experts])
    picked = np.eye(len(experts), dtype=x.dtype)[indices]
    return np.einsum("nk,nke,end->nd", weights, picked, answers) + shared(x)
"""


def test_a_cache_is_kept_and_functions_are_called_across_processes(tmp_path):
    task = EXERCISES["kv_cache"]
    found = grade_file(submission(tmp_path, KEPT_IN_A_DICT, "kv_cache"), task)
    assert found.passed, found
    wrong = KEPT_IN_A_DICT.replace("rotate(k[t : t + 1], np.array([start + t]))", "rotate(k[t : t + 1], np.array([t]))")
    assert grade_file(submission(tmp_path, wrong, "kv_cache"), task).mistakes == ("query_only",)
    found = grade_file(submission(tmp_path, AT_ONCE, "moe"), EXERCISES["moe"])
    assert found.passed, found
    assert "were given 54 rows for 18 picks" in found.says[0]
    wrong = AT_ONCE.replace("expert(x) for", "expert(x[0]) for")
    found = grade_file(submission(tmp_path, wrong, "moe"), EXERCISES["moe"])
    assert 'ValueError at line 5: "answers =' in found.says[0]
    assert "an expert takes rows [n, 4], not [4]" in found.says[0]


def test_a_frame_has_bounds():
    with pytest.raises(ValueError, match="a frame of 1,099,511,627,776 bytes"):
        receive(io.BytesIO((1 << 40).to_bytes(8, "big")))
    held = io.BytesIO()
    np.savez_compressed(held, structure=np.array('{"array": 0, "writeable": true}'), a0=np.zeros(30_000_000))
    small = held.getvalue()
    assert len(small) < 1_000_000
    with pytest.raises(ValueError, match="grows when it is unpacked"):
        receive(io.BytesIO(len(small).to_bytes(8, "big") + small))
    with pytest.raises(ValueError, match="returned 800 MB, wanted at most 100 MB"):
        send(io.BytesIO(), (np.broadcast_to(0.0, 10**8),))


# -- a class -----------------------------------------------------------------------------------------------------


def test_a_teacher_s_way(tmp_path, capsys):
    """Hand out, three submissions (right for the variant, GLM-4.5's own, missing), grade, report."""
    assert main(["course", "release", "1", "--seed", "spec-7", "--to", str(tmp_path)]) == 0
    layer_norm = RIGHT.replace("x / ", "(x - x.mean(-1, keepdims=True)) / ").replace("(x * x).mean", "x.var")
    for student, text in (("ada", layer_norm.replace("mean(axis", "var(axis")), ("bob", RIGHT), ("cyd", None)):
        (tmp_path / student / "week-1").mkdir(parents=True)
        if text is not None:
            submission(tmp_path / student / "week-1", text.replace("x.var(axis", "x.var(axis"))
    assert main(["course", "grade", str(tmp_path), "--draw", "7"]) == 0
    grades = read_csv(tmp_path / "grades.csv")
    assert [(g.student, g.points, g.of, g.mistakes) for g in grades] == [
        ("ada", 4, 4, ()),
        ("bob", 1, 4, ("as_glm45",)),
        ("cyd", 0, 4, ()),
    ]
    assert "The file rms_norm.py is missing" in grades[2].says
    assert main(["course", "report", str(tmp_path)]) == 0
    assert "this is GLM-4.5's own, not the variant         1" in capsys.readouterr().out


FILES = {  # what lies in a student's folder -> the file that counts, or what is said
    ("rms_norm.py", "week-1/rms_norm.py", "rms_norm.py.txt"): "rms_norm.py",
    (".trash/rms_norm.py", "week-1/rms_norm.py", "rms_norm.ipynb/.keep"): "week-1/rms_norm.py",
    ("a/rms_norm.py", "b/rms_norm.py"): "2 files have this name: a/rms_norm.py, b/rms_norm.py. Hand in one.",
    ("Rms norm (1).py", "rms_norm.py/x"): "The file rms_norm.py is missing; there are Rms norm (1).py.",
    (): "The file rms_norm.py is missing.",
}


@pytest.mark.parametrize(("there", "wanted"), FILES.items(), ids=map(str, range(len(FILES))))
def test_which_file_counts(tmp_path, there, wanted):
    for name in there:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("", "utf-8")
    found = find(tmp_path, "rms_norm")
    assert (found if isinstance(found, str) else found.relative_to(tmp_path).as_posix()) == wanted


def test_a_huge_file_is_not_read(tmp_path):
    (tmp_path / "rms_norm.py").write_bytes(b"#" * 2_000_000)
    assert find(tmp_path, "rms_norm") == "The file rms_norm.py has 2.0 MB, wanted at most 1."


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no text")
def test_names_that_are_no_text_and_draw_0(tmp_path, capsys):
    release(term(1, None), tmp_path)
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    assert main(["course", "grade", str(tmp_path), "--draw", "0"]) == 0
    assert "--draw 0 grades" in capsys.readouterr().out
    assert [grade.student for grade in read_csv(tmp_path / "grades.csv")] == ["?"]


def test_no_cell_of_the_table_is_a_formula(tmp_path):
    from minglm.learn.grade import Grade

    grades = [Grade("=1+1", "router", 0, 4, 0.1, (), "=cmd at line 1")]
    write_csv(tmp_path / "grades.csv", grades)
    assert ",=" not in (tmp_path / "grades.csv").read_text("utf-8")
    assert read_csv(tmp_path / "grades.csv") == grades


def test_a_table_comes_back_and_is_counted(tmp_path):
    from minglm.learn.grade import Grade

    grades = [
        Grade("ada", "router", 4, 4, 0.1, (), ""),
        Grade("bob", "router", 1, 4, 0.1, ("softmax", "no_scale"), 'says "two, things"\nand more'),
        Grade("cyd", "router", 1, 4, 0.1, ("softmax",), ""),
        Grade("dan", "router", 0, 4, 0.1, (), "No answer"),
        Grade("eva", "router", 1, 4, 0.1, ("without_norm_over_K",), ""),
        Grade("fay", "router", 0, 4, 0.1, (), child.EMPTY),
        Grade("gil", "router", 0, 4, 0.1, (), "The file router.py is missing."),
    ]
    write_csv(tmp_path / "grades.csv", grades)
    assert read_csv(tmp_path / "grades.csv") == grades
    assert [(row.mistake, row.students) for row in report(grades)] == [
        ("(nothing written)", 2),
        ("the scores are a softmax over all experts (OLMoE and Qwen do so)", 2),
        ("(not recognised)", 1),
        ("the scale is missing, or divided away again", 1),
        ("this was not heeded: With `normalise` the weights are divided by K, not by their sum.", 1),
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["release", "9"], "there are 1 … 6"),
        (["grade", "{folder}"], "wanted the file that `minglm course release` wrote"),
        (["report", "{folder}"], "grades.csv"),
    ],
)
def test_wrong_input(tmp_path, capsys, arguments, says):
    assert main(["course", *(text.format(folder=tmp_path) for text in arguments)]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_without_students(tmp_path, capsys):
    release(term(1, None), tmp_path)
    assert main(["course", "grade", str(tmp_path)]) == 2
    assert "has no folder of a student" in capsys.readouterr().err
