"""Make the notebooks from their sources: notebooks/source/05-router.py -> notebooks/05-router.ipynb, executed.

    python notebooks/build.py                   every notebook whose source changed
    python notebooks/build.py 05 08a            these, by the beginning of their names
    python notebooks/build.py --execute 00 05   run them afresh and write nothing: do they still run?

The source is the percent format of jupytext: a notebook as a Python file, which diffs, greps and lints. What is written
is the executed notebook with its outputs and nothing that changes from run to run: no counts, times or widget state.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "source"
SECONDS = 120  # a cell that takes longer is stopped
_METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def sources(beginnings: list[str] | None = None) -> list[Path]:
    """The source files, in order; only those whose names begin so. Raises ValueError for a beginning without any."""
    found = sorted(SOURCES.glob("[0-9]*.py"))
    if not beginnings:
        return found
    for beginning in beginnings:
        if not any(path.stem.startswith(beginning) for path in found):
            raise ValueError(f"no notebook begins with {beginning!r}; there are {', '.join(p.stem for p in found)}")
    return [path for path in found if any(path.stem.startswith(beginning) for beginning in beginnings)]


def target(source: Path) -> Path:
    """Where the executed notebook of a source stands."""
    return HERE / f"{source.stem}.ipynb"


def read_source(source: Path) -> Any:
    """The notebook of a source, not yet executed."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(_METADATA)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"{source.stem}-{i}"
        cell.metadata = nbformat.from_dict({})
    return notebook


def in_step(source: Path) -> bool:
    """Whether the notebook in the repository has the cells of its source."""
    if not target(source).exists():
        return False
    written = nbformat.read(target(source), as_version=4)
    return _cells(written) == _cells(read_source(source))


def _cells(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def execute(source: Path) -> Any:
    """The notebook with its outputs. Raises CellExecutionError if a cell raises."""
    from nbclient import NotebookClient

    notebook = read_source(source)
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": HERE}}).execute()
    notebook.metadata = nbformat.from_dict(_METADATA)  # without the version of the Python that ran it
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [_clean(output) for output in _joined(cell.outputs)]
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """Prints that came in several pieces as one."""
    joined: list[Any] = []
    for output in outputs:
        if joined and output.output_type == "stream" and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _clean(output: Any) -> Any:
    if output.output_type == "execute_result":
        output.execution_count = None
    if "image/png" in output.get("data", {}):
        output.data.pop("text/plain", None)  # of a picture: its size in inches, and an address
    return output


def main(arguments: list[str] | None = None) -> None:
    """Build or execute; the seconds of each are printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of names; all if there are none")
    parser.add_argument("--execute", action="store_true", help="execute only, write nothing")
    given = parser.parse_args(arguments)
    try:
        chosen = sources(given.names)
    except ValueError as error:
        sys.exit(str(error))
    for source in chosen:
        if not given.names and not given.execute and in_step(source):
            continue
        start = time.perf_counter()
        notebook = execute(source)
        if not given.execute:
            nbformat.write(notebook, target(source))
        print(f"{source.stem}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
