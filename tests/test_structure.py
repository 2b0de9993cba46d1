"""The shape of the code: who imports whom, how long things are, what a bare import brings in."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import minglm
import minglm.model

PACKAGE = Path(minglm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# A room imports from rooms to its left only. minglm/__init__.py, the face, stands outside.
ROOMS = "config model formats fast text look generate data api evaluate train learn bench demo chat cli".split()
BUDGET = 2200  # lines of config.py and model/, for now; the design aims at 1,800


def module_name(path, package=PACKAGE):
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imported(tree):
    """Every module that this code may import when it runs, inside functions too. `if TYPE_CHECKING:` never runs."""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        if is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        waiting += ast.iter_child_nodes(node)
    return found


def room(module):
    """The room of minglm.room.file, or None for what is not in a room."""
    parts = module.split(".")
    return parts[1] if parts[0] == "minglm" and len(parts) > 1 and parts[1] in ROOMS else None


def upward_imports(sources):
    """{module: source} -> every import of a room further right."""
    return [
        f"{module} imports {other}"
        for module, source in sources.items()
        for other in imported(ast.parse(source))
        if room(module) and room(other) and ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]


def sources():
    return {module_name(path): path.read_text("utf-8") for path in FILES}


def reading_order():
    listed = re.search(r"Reading order: ([^.]*)\.", minglm.model.__doc__).group(1)
    return [name.strip() for name in listed.split(",")]


def out_of_order(sources, order):
    """Imports in the book of a later file, or of a name through the package (which would load every file)."""
    return [
        f"{module} imports {other}"
        for module, source in sources.items()
        if module.startswith("minglm.model.")
        for other in imported(ast.parse(source))
        if other.startswith("minglm.model.") and other.split(".")[2] not in order[: order.index(module.split(".")[2])]
    ]


def cycles(sources):
    """Modules that reach themselves by imports. A package's __init__ collects its files and is not one of them."""
    packages = {m for m in sources if any(other.startswith(m + ".") for other in sources)}
    sources = {m: s for m, s in sources.items() if m not in packages}
    direct = {m: {o for o in imported(ast.parse(s)) if o in sources and o != m} for m, s in sources.items()}
    reached = {m: set(d) for m, d in direct.items()}
    for _ in sources:
        for m in reached:
            reached[m] |= set().union(*(reached[o] for o in reached[m]))
    return sorted(m for m in reached if m in reached[m])


def test_every_file_of_the_package_is_in_a_room():
    outside = [m for m in sources() if m != "minglm" and m != "minglm.__main__" and room(m) is None]
    assert not outside


def test_rooms_import_only_from_rooms_above_them():
    assert not upward_imports(sources())


def test_the_book_lists_all_its_files_and_each_imports_only_earlier_ones():
    order = reading_order()
    assert sorted(order) == sorted(p.stem for p in (PACKAGE / "model").glob("*.py") if p.stem != "__init__")
    assert not out_of_order(sources(), order)


def test_there_are_no_cycles():
    assert not cycles(sources())


def test_the_book_needs_numpy_alone():
    wanted = {"numpy", "minglm", "math", "json", "sys", "collections", "dataclasses", "pathlib", "typing", "types"}
    for module, source in sources().items():
        if room(module) in ("config", "model"):
            assert {name.split(".")[0] for name in imported(ast.parse(source))} <= wanted, module


def importers(sources, library):
    return [m for m, s in sources.items() if any(name.split(".")[0] == library for name in imported(ast.parse(s)))]


def test_only_plots_imports_matplotlib_and_only_fast_imports_numba():
    drawing = ("minglm.look.plots", "minglm.look.curves")
    assert all(m.startswith(drawing) for m in importers(sources(), "matplotlib"))
    assert all(room(m) == "fast" for m in importers(sources(), "numba"))
    for library, where in (("torch", "run_torch"), ("transformers", "run_torch"), ("llama_cpp", "run_llama")):
        assert importers(sources(), library) == [f"minglm.bench.{where}"]  # to be timed beside ours, never to be used


def test_import_minglm_is_light():
    heavy = ["numba", "matplotlib", "tokenizers", "jinja2", "torch", "transformers"]
    code = f"import sys, minglm; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_the_core_path_stays_within_its_budget():
    core = [PACKAGE / "config.py", *(PACKAGE / "model").glob("*.py")]
    lines = sum(len(path.read_text("utf-8").splitlines()) for path in core)
    assert 1000 < lines < BUDGET, f"{lines} lines"


def long_functions(sources, limit):
    return [
        f"{module}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for module, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= limit
    ]


def test_no_function_is_longer_than_sixty_lines():
    assert not long_functions(sources(), 60)
    assert len(long_functions(sources(), 10)) > 20  # the measure measures


def test_the_rules_of_this_file_catch_what_they_forbid():
    bad = {
        "minglm.model.rope": "from minglm.model import moe",
        "minglm.model.ops": "def f():\n    from minglm.model import router",
        "minglm.model.router": "from minglm.model.ops import linear\nfrom minglm.api import Model",
        "minglm.look.page": "import matplotlib.pyplot as plt\nimport numba",
        "minglm.generate.loop": "if TYPE_CHECKING:\n    from minglm.api import Model",
    }
    assert upward_imports(bad) == [
        "minglm.model.router imports minglm.api",
        "minglm.model.router imports minglm.api.Model",
    ]
    assert out_of_order(bad, reading_order()) == [
        "minglm.model.rope imports minglm.model.moe",
        "minglm.model.ops imports minglm.model.router",
    ]
    assert cycles(bad) == ["minglm.model.ops", "minglm.model.router"]
    assert importers(bad, "matplotlib") == importers(bad, "numba") == ["minglm.look.page"]
    assert long_functions({"m": "def f():\n" + "    pass\n" * 60}, 60) == ["m.f: 61 lines"]
    assert not long_functions({"m": "def f():\n" + "    pass\n" * 59}, 60)
