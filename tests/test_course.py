"""Hand-outs without solutions, grading in processes of their own, the class's mistakes."""

import ast
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from minglm.cli import main
from minglm.learn import handout
from minglm.learn.check import Stopped
from minglm.learn.child import receive, send
from minglm.learn.course import changed, read_term, release, tasks, term
from minglm.learn.exercises import EXERCISES, WEEKS
from minglm.learn.grade import Submission, grade_file, read_csv, report, write_csv
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


def test_a_notebook_is_one_and_knows_its_points():
    nbformat = pytest.importorskip("nbformat")
    made = handout.notebook("Week 3", [EXERCISES["router"]], "spec-7")
    nbformat.validate(nbformat.reads(json.dumps(made), as_version=4))
    graded = [cell for cell in made["cells"] if "nbgrader" in cell["metadata"]]
    assert [cell["metadata"]["nbgrader"]["points"] for cell in graded] == [5]
    assert "term='spec-7'" in "".join(graded[0]["source"])


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
    "os.write(3, b'garbage' * 50)": "its process ended|ran for more",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "f = lambda: f(); f()": "RecursionError",
    "return lambda: 0": "returned function, wanted arrays or numbers",
    "return np.array([{}])": "returned ndarray, wanted arrays or numbers",
    "return None": "shape",
}


@pytest.mark.skipif(sys.platform == "win32", reason="its bounds are those of POSIX")
@pytest.mark.parametrize("does", ROGUES)
def test_a_rogue_harms_nobody_and_is_told_why(tmp_path, does):
    text = f"import os\nimport sys\nimport numpy as np\ndef rms_norm(x, weight, eps):\n    {does}\n"
    found = grade_file(submission(tmp_path, text), EXERCISES["rms_norm"], seconds=2)
    assert found.earned == 0
    assert re.search(ROGUES[does], found.says[0]), found.says


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import minglm.model", "minglm cannot be imported here"),
        ("def other(): pass", "the file defines no function rms_norm"),
        ("def rms_norm(", "SyntaxError"),
        ("raise SystemExit", "SystemExit"),
        ("def rms_norm(x, weight, eps):\n    raise NotImplementedError", "Nothing is written yet"),
        ("def rms_norm(x, weight, eps):\n    return x + y", 'NameError at line 2: "return x \\+ y"'),
        ("def rms_norm(x, weight, eps):\n    x /= 2", "changes what it was given"),
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
    assert "The file is missing" in grades[2].says
    assert main(["course", "report", str(tmp_path)]) == 0
    assert "this is GLM-4.5's own, not the variant         1" in capsys.readouterr().out


def test_a_table_comes_back_and_is_counted(tmp_path):
    from minglm.learn.grade import Grade

    grades = [
        Grade("ada", "router", 4, 4, 0.1, (), ""),
        Grade("bob", "router", 1, 4, 0.1, ("softmax", "no_scale"), 'says "two, things"\nand more'),
        Grade("cyd", "router", 1, 4, 0.1, ("softmax",), ""),
        Grade("dan", "router", 0, 4, 0.1, (), "No answer"),
    ]
    write_csv(tmp_path / "grades.csv", grades)
    assert read_csv(tmp_path / "grades.csv") == grades
    assert [(row.mistake, row.students) for row in report(grades)] == [
        ("the scores are a softmax over all experts (OLMoE and Qwen do so)", 2),
        ("(not recognised)", 1),
        ("the scale is missing, or divided away again", 1),
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
