"""How Sphinx makes the site: `make docs`, into out/docs.

The pages are the Markdown files and notebooks of the repository, read where they stand and written for GitHub. What a
site needs more is added while they are read: menus from the links of a front page, an API page for each Python file
that docs/api.md names, and links that lead to it instead of to the file.
"""

import ast
import inspect
import posixpath
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FRONTS = (
    "docs/derivations/README",
    "docs/decisions/README",
    "docs/teaching/index",
    "notebooks/README",
    "docs/api",
    "docs/index",
)
MODULES = sorted(set(re.findall(r"\]\(\.\./(minglm/[\w/]+)\.py\)", (ROOT / "docs" / "api.md").read_text("utf-8"))))

project = "minglm"
author = "The minglm developers"
language = "en"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = ["docs/**.md", "notebooks/*.ipynb", "notebooks/README.md", "README*.md", "weights/*/README.md"]
exclude_patterns = [".*", "out", "runs", "build", "dist", "minglm", "tests"]
nb_execution_mode = "off"  # the committed outputs are shown; `make notebooks` makes and checks them
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # shapes are in the docstrings; types in the source, one click away
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
html_theme = "furo"
html_title = "minglm"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False


# -- pages as they are read ----------------------------------------------------------------------------------------


def prepare_page(app, name, source):
    """Lead links to where the site has what they name, and give a front page its menus. `source` holds the text."""
    text = re.sub(r"\[([^\]]+)\]\([^):\s]*/\)", r"\1", source[0])  # a folder has a page on GitHub only
    folder = posixpath.dirname(name)

    def to_api(link):
        path = posixpath.normpath(posixpath.join(folder, link[1]))
        return f"](/docs/api/{path.replace('/', '.')}.md)" if path in MODULES else link[0]

    text = re.sub(r"\]\(([\w./-]+)\.py\)", to_api, text)
    source[0] = text + menus(text, name) if name in FRONTS else text


def menus(text, name):
    """A hidden toctree for each section of a front page, from its links to pages; the first link to a page counts."""
    found, seen = "", {f"/{name}"}
    sections = re.split(r"^## ", text, flags=re.M)
    for number, section in enumerate(sections):
        links = re.findall(r"\]\(([^):#\s]+)\.(?:md|ipynb)\)", section)
        pages = [posixpath.normpath(posixpath.join("/", posixpath.dirname(name), link)) for link in links]
        if name == "notebooks/README" and section is sections[-1]:  # those that no table names yet
            pages += [f"/notebooks/{path.stem}" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
        pages = [page for page in dict.fromkeys(pages) if page not in seen and belongs(page[1:], name)]
        seen.update(pages)
        caption = [f":caption: {section.splitlines()[0]}"] if number else []
        if pages:
            found += "\n".join(["\n\n```{toctree}", ":hidden:", *caption, "", *pages, "```"])
    return found


def belongs(page, front):
    """Whether a page stands in the menu of this front: in that of its own folder, or in that of docs/index."""
    own = {posixpath.dirname(other): other for other in FRONTS} | {"docs/api": "docs/api"}
    return (own.get(posixpath.dirname(page), "docs/index") if page not in FRONTS else "docs/index") == front


def write_api_pages(app):
    """docs/api/minglm.model.router.md and so on: git ignores them."""
    folder = ROOT / "docs" / "api"
    folder.mkdir(exist_ok=True)
    wanted = {folder / f"{path.replace('/', '.')}.md": path.replace("/", ".") for path in MODULES}
    for page in set(folder.glob("*.md")) - set(wanted):
        page.unlink()
    for page, module in wanted.items():
        text = f"# {module}\n\n```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n   :ignore-module-all:\n```\n"
        if not page.exists() or page.read_text("utf-8") != text:
            page.write_text(text, "utf-8")


# -- docstrings: plain text here, reStructuredText there -------------------------------------------------------------


def to_rst(app, what, name, thing, options, lines):
    """Backticks are code, *this* is emphasis, an indented block is shown as it is, other signs stand for themselves."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    if what == "class" and (fields := fields_of(thing)):
        paragraphs.append(fields)
    shown = []
    for paragraph in paragraphs:
        if paragraph.startswith("    "):
            shown.append("::\n\n" + textwrap.indent(textwrap.dedent(paragraph), "    "))
        else:
            parts = paragraph.split("`")
            parts[::2] = [re.sub(r"(?<![\w*])(\*\w[\w ]*\*)(?![\w*])|([\\*|_])", _escaped, part) for part in parts[::2]]
            shown.append("".join(f"``{part}``" if i % 2 else part for i, part in enumerate(parts)))
    lines[:] = "\n\n".join(shown).split("\n")


def _escaped(sign):
    return sign[1] or "\\" + sign[2]


def fields_of(thing):
    """The fields of a record with the comments beside them: a list in plain text, empty for a class without."""
    try:
        source = textwrap.dedent(inspect.getsource(thing))
    except (OSError, TypeError):  # made by a library: there is no source
        return ""
    rows, lines = [], source.split("\n")
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            _, _, comment = lines[node.end_lineno - 1].partition("  # ")
            kind = ast.unparse(node.annotation).strip("'\"")
            rows.append(f"- `{node.target.id}`: {kind}" + (f"; {comment}" if comment else ""))
    return "\n".join(rows)


def skip_fields(app, what, name, thing, skip, options):
    return True if str(getattr(thing, "__doc__", "")).startswith("Alias for field number") else None


def write_front(app, error):
    """The site's first address leads to docs/index.html."""
    if error is None and app.builder.name == "html":
        page = '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html"><title>minglm</title>'
        (Path(app.outdir) / "index.html").write_text(page + '<a href="docs/index.html">minglm</a>\n', "utf-8")


def setup(app):
    app.connect("builder-inited", write_api_pages)
    app.connect("source-read", prepare_page)
    app.connect("env-get-outdated", lambda *_: list(FRONTS))  # what they list may have changed
    app.connect("autodoc-process-docstring", to_rst)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("build-finished", write_front)
