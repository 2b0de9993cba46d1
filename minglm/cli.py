"""The command line: `minglm COMMAND …`, the public face for the terminal."""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import minglm
from minglm.api import find, is_gguf, load
from minglm.formats.smallfloats import KINDS
from minglm.formats.storage import DTYPES

DEFAULT = "glm-tiny"
KEPT = (*DTYPES, *KINDS)  # ways to keep weights
DEMO_PROMPT = "[gMASK]<sop><|user|>\n17+25/nothink<|assistant|>\n<think></think>"  # as the chat template asks it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it went well, 1 if `diff` found a difference, 2 for wrong input, 130 if interrupted."""
    _open_streams()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = _parser()
    given, more = parser.parse_known_args(arguments)
    if given.run is _diff and len(more) == 1 and not more[0].startswith("-"):
        given.prompt = more.pop()  # argparse takes no optional argument behind options once A and B were before them
    if given.run in (_trace, _step, _routing):
        _model_first(given, more)
    if more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if given.run is None:
        parser.print_help()
        return 0
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _one_line
            return given.run(given) or 0
    except BrokenPipeError:  # `minglm … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (ValueError, OSError) as error:
        print(f"minglm {given.command}: {_in_flags(str(error))}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"minglm {given.command}: not enough memory: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nminglm {given.command}: interrupted", file=sys.stderr)
        return 130


def _model_first(given: argparse.Namespace, more: list[str]) -> None:
    """`minglm step glm-nano "2 + 2 ="` is `minglm step "2 + 2 =" --model glm-nano`, and `minglm step glm-nano` has the
    default prompt."""
    if len(more) == 1 and not more[0].startswith("-") and given.model == DEFAULT:
        given.model, given.prompt = given.prompt, more.pop()
    elif not more and given.model == DEFAULT and len(given.prompt) < 200 and "\n" not in given.prompt:
        try:
            if (find(given.prompt) / "config.json").exists():
                given.model, given.prompt = given.prompt, DEMO_PROMPT
        except ValueError:  # a text, and no checkpoint
            pass


def _open_streams() -> None:
    """UTF-8 whatever the terminal's code page is; a stream that the shell has closed (`>&-`) is empty."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")


_IN_FLAGS = (  # how errors of the Python face name things, and how the command line does
    (r"\b(engine|dtype)='([\w-]+)'", r"--\1 \2"),
    (r"\bmode='mmap'", "--mmap"),
    (r"^(dtype|draft|temperature|seed|threads) = '?([^\s']+)'?", r"--\1 \2"),
    (r"^(top|min)_([kp]) = ", r"--\1-\2 "),
    (r"\bmax_new_tokens = ", "--tokens "),
    (r"^memory\b", "--memory"),
    (r"\bleave dtype out", "leave --dtype out"),
    (r"\bdraft_model=?", "--draft-model"),
    (r"\bdraft is 0", "--draft is 0"),
    (r"\bdraft=", "--draft "),
)


def _in_flags(text: str) -> str:
    for python, flag in _IN_FLAGS:
        text = re.sub(python, flag, text)
    return text


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Our own warnings without the line of code that gives them."""
    own = issubclass(category, UserWarning)
    text = (
        f"minglm: {_in_flags(str(message))}\n" if own else warnings.formatwarning(message, category, filename, lineno)
    )
    print(text, end="", file=sys.stderr)


# -- commands ----------------------------------------------------------------------------------------------------


def _load(given: argparse.Namespace) -> minglm.Model:
    memory = None if given.memory is None else given.memory * 1e9
    return load(given.model, given.dtype, "mmap" if given.mmap else "memory", memory)


def _widened(given: argparse.Namespace, model: minglm.Model) -> str:
    """What to say where nobody asked to make more bytes of the weights than the folder has; else nothing."""
    from minglm.look.folder import small_kind

    stored = small_kind(find(given.model)) if given.dtype is None else None
    if stored in (None, model.storage):
        return ""
    return f"(stored as {stored}, widened to {model.storage}; --dtype {stored} keeps the codes)"


def _demo(given: argparse.Namespace) -> None:
    from minglm.demo import demo

    demo(load(given.model), given.prompt, given.tokens, Path(given.save), given.every_tap, **_engine(given))


def _generate(given: argparse.Namespace) -> None:
    from minglm.generate.loop import Stats
    from minglm.look.reading import residency_of, show_reading

    model, steps = _load(given), []
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer, so there is no text to print; use it from Python with token ids")
    decoder = model.tokenizer.stream()
    coming = model.steps(given.prompt, given.tokens, **_sampling(given), **_engine(given))
    for step in show_reading(coming, model.params):
        steps.append(step)
        if step.stop_reason != "end token":
            print(decoder.feed(step.id), end="", flush=True)
    print(decoder.finish())
    residency = residency_of(model.params)
    read = f", {residency.read / 1e9:,.2f} GB of experts read" if residency else ""
    cut = steps[-1].stop_reason == "length"
    how = f"cut at {given.tokens} tokens; --tokens N" if cut else f"stopped by {steps[-1].stop_reason}"
    kept = f"{model.storage} weights {_widened(given, model)}".rstrip()
    print(f"({Stats.of(0, steps)}, {kept}{read}, {how})", file=sys.stderr)


def _chat(given: argparse.Namespace) -> None:
    from minglm.chat import chat
    from minglm.data.calculator import calculator
    from minglm.text.tools import Tool, tools_in

    tools: dict[str, Tool] = {}
    about: list[str] = []
    for file in given.tools:
        found = {"calculator": calculator} if file == "calculator" else tools_in(file)
        about += [f"{name} of {file} takes the place of the one before it." for name in found if name in tools]
        tools |= found
    model = _load(given)
    longest, talks = _training(find(given.model))
    if not talks:
        about.append("It was never trained on conversations and will not hold one.")
    chat(
        model,
        about=[line for line in (_widened(given, model), *about) if line],
        trained=longest,
        thinking=not given.no_thinking,
        max_new_tokens=given.tokens,
        tools=tools,
        **_sampling(given),
        **_engine(given),
    )


def _training(folder: Path) -> tuple[int | None, bool]:
    """The longest sequence that a model of ours was trained on, and whether conversations were among them; of others
    nothing is known."""
    from minglm.train.recipe import load_recipe

    try:
        stages = load_recipe(str(folder / "recipe.toml")).stages
    except (ValueError, OSError):  # none, or not one of ours
        return None, True
    return max(stage.sequence_length for stage in stages), any(stage.format == "chat" for stage in stages)


def _trace(given: argparse.Namespace) -> None:
    from minglm.demo import step_table

    model = load(given.model)
    if given.html is not None:
        if given.save or given.keep != "*":
            raise ValueError("--html writes a page with every step: leave --keep and --save out")
        from minglm.look.page import write_page

        for note in write_page(model, given.prompt, given.html, given.beside, given.without_bias):
            print(note)
        size = Path(given.html).stat().st_size / 1e6
        print(f"saved {given.html}, {size:.1f} MB; it opens in a browser, without a network")
        return
    if given.beside is not None or given.without_bias:
        raise ValueError("--beside and --without-bias compare two passes on a page: give --html FILE too")
    trace = model.trace(given.prompt, keep=given.keep)
    print(step_table(trace, every_tap=True))
    if given.save:
        trace.save(given.save)
        print(f"saved {given.save}")


def _step(given: argparse.Namespace) -> None:
    from minglm.look.stepper import run

    run(load(given.model).step(given.prompt))


def _diff(given: argparse.Namespace) -> int:
    from minglm.look.diff import diff

    a, b = load(given.a, given.dtype_a), load(given.b, given.dtype_b)
    prompt = given.prompt if given.ids is None else given.ids
    found = diff(a, b, prompt, engine_b=given.engine_b, keep=given.keep, float64=not given.no_float64)
    print(found.text(every=given.all))
    if given.json:
        Path(given.json).parent.mkdir(parents=True, exist_ok=True)
        Path(given.json).write_text(found.to_json(), "utf-8")
        print(f"saved {given.json}")
    return 0 if found.same else 1


def _routing(given: argparse.Namespace) -> None:
    from minglm.demo import picks_table
    from minglm.evaluate.pictures import look, read_texts, save_pictures

    texts = read_texts(given.prompt)
    seen = look(load(given.model), texts, given.layer, find(given.model))
    if len(seen.pieces) == 1:
        print(f"{picks_table(seen.routing, seen.tokens)}\n")
    print(f"{seen.routing!r}\n")
    save_pictures(seen, Path(given.save))


def _train(given: argparse.Namespace) -> None:
    from minglm.train.folder import newest_checkpoint
    from minglm.train.recipe import NAMES, load_recipe
    from minglm.train.run import finish, train_recipe

    name = given.recipe or ("glm-nano" if given.start is None else "fine-tune")
    if given.save and (Path(given.save) / "config.json").exists() and not given.force:
        raise ValueError(f"{given.save} holds a model already; --force writes over it")
    recipe = load_recipe(name)
    if given.engine is not None:
        recipe = replace(recipe, engine=given.engine)
    files = [Path(f) for f in given.data]
    run = Path(given.run_folder or Path("runs") / Path(name).stem)
    start = None if given.start is None else load(given.start)
    try:
        model = train_recipe(recipe, run, files, start, threads=given.threads, steps=given.steps)
    except KeyboardInterrupt:
        newest = newest_checkpoint(run)
        kept = f"saved in {newest}; the same command goes on from there" if newest else "nothing was saved yet"
        print(f"\n{kept}", file=sys.stderr)
        raise
    as_it_stands = name in NAMES and not (files or start or given.steps is not None or given.engine)
    finish(model, recipe, run, Path(given.save or run / "model"), name if as_it_stands else None)


def _eval(given: argparse.Namespace) -> None:
    from minglm.evaluate.report import Table, as_json, as_markdown, as_text, report

    only = None if given.only is None else [name.strip() for name in given.only.split(",")]
    how = [*("direct", "thinking"), *(("plain direct", "plain worked") if given.plain else ())]
    model = load(given.model)
    files = [(Path(path), write) for path, write in ((given.save, as_markdown), (given.json, as_json)) if path]
    for path, _ in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()  # whoever cannot write there learns it now, not after the measuring
    tables: list[Table] = []
    try:
        report(model, only, given.items, how, with_ngram=not given.no_ngram, tables=tables)
    finally:  # what was measured before an error or Ctrl-C
        print(as_text(tables))
        for path, write in files:
            path.write_text(write(tables, model), "utf-8")
            print(f"saved {path}")


def _inspect(given: argparse.Namespace) -> None:
    from minglm.look.describe import architecture, parameters
    from minglm.look.folder import describe_folder
    from minglm.look.tables import table

    try:
        folder = find(given.model)
    except ValueError:
        if given.model not in minglm.PRESETS:
            raise
        config = minglm.PRESETS[given.model]  # sizes without weights
        print(table(architecture(config), ("size", "letter", "value")))
        print(f"\n{table(parameters(config), ('what', 'value'))}")
        return
    print(describe_folder(folder, given.tensors))


def _convert(given: argparse.Namespace) -> None:
    from minglm.formats.checkpoint import check_saved
    from minglm.look.describe import in_bytes

    one_file, to = is_gguf(given.to), Path(given.to)
    if given.dtype == "q8_0" and not one_file:
        raise ValueError(f"--dtype q8_0 is for .gguf files; for a folder take one of {', '.join(KEPT)}")
    _check_new_folder(given)
    model = load(given.model, "float32" if one_file else given.dtype)
    model.save(to, given.dtype)  # reads a GGUF file back itself
    if not one_file:
        check_saved(to, model.params, given.dtype)
    size = sum(file.stat().st_size for file in ([to] if one_file else to.glob("*.safetensors")))
    print(f"saved {to} and read it back: {model.name} as {given.dtype}, {in_bytes(size)}")


def _new(given: argparse.Namespace) -> None:
    _check_new_folder(given)
    model = minglm.new(given.preset, seed=given.seed)
    model.save(given.to)
    print(
        f"saved {given.to}: {model!r}\nIt has no tokenizer: from Python, minglm.load({given.to!r}).generate([5, 8, 13])"
    )


def _check_new_folder(given: argparse.Namespace) -> None:
    to = Path(given.to)
    if to.is_file() and not is_gguf(to):
        raise ValueError(f"{given.to} is a file, not a folder; give another name")
    ours = ("config.json", "*.safetensors", "*.index.json", "tokenizer*.json", "chat_template.jinja")
    there = [path.name for pattern in ours for path in sorted(to.glob(pattern))]
    if (to.is_file() or there) and not given.force:
        held = f" ({', '.join(there[:3])}{' …' if there[3:] else ''})" if there else ""
        raise ValueError(f"{given.to} holds a model already{held}; --force writes over it")


def _bench(given: argparse.Namespace) -> None:
    if given.shape is None:
        from minglm.bench.simple import bench

        bench(load(given.model), given.runs)
        return
    from minglm.bench.compare import Settings, compare, write_json, write_plot

    result = compare(
        Settings.read(
            given.shape, given.against, given.only, given.rounds, given.llama_python or sys.executable, given.folder
        )
    )
    for path, write in ((given.json, write_json), (given.plot, write_plot)):
        if path:
            write(result, path)
            print(f"saved {path}")


def _release(given: argparse.Namespace) -> None:
    from minglm.learn.course import release, term

    handed_out = term(given.week, given.seed)
    folder = Path(given.to or f"out/week-{given.week}")
    print("\n".join(f"wrote {path}" for path in release(handed_out, folder)))
    print(f"{', '.join(handed_out.exercises)}: no solutions in it; files that were there before stayed")


def _grade(given: argparse.Namespace) -> None:
    import secrets

    from minglm.learn.course import changed, read_term, tasks
    from minglm.learn.grade import grade, write_csv

    folder, draw = Path(given.folder), secrets.randbelow(10**6) + 1 if given.draw is None else given.draw
    handed_out = read_term(folder)
    for line in changed(handed_out):
        print(f"minglm: {line}", file=sys.stderr)
    grades = grade(folder, tasks(handed_out), draw, given.seconds)
    write_csv(folder / "grades.csv", grades)
    print(f"saved {folder / 'grades.csv'}; --draw {draw} grades on the same numbers again")


def _report(given: argparse.Namespace) -> None:
    from minglm.learn.grade import Commonest, read_csv, report
    from minglm.look.tables import table

    grades = read_csv(Path(given.folder) / "grades.csv")
    passed = sum(each.points == each.of for each in grades)
    print(f"{len({each.student for each in grades})} students, {passed} of {len(grades)} exercises passed")
    print(table(report(grades), Commonest._fields))


def _doctor(given: argparse.Namespace) -> None:
    from minglm.bench.doctor import doctor

    doctor()


# -- arguments ---------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minglm", description="GLM-4.5 you can read in an afternoon.")
    parser.add_argument("--version", action="version", version=minglm.__version__)
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")

    demo = _command(commands, "demo", _demo, "one prompt through the model, every step shown", prompt=DEMO_PROMPT)
    demo.add_argument("--tokens", type=int, default=48, help="how many to generate at most (default 48)")
    demo.add_argument("--save", default="out/demo-load.png", help="file of the load plot (default %(default)s)")
    demo.add_argument("--every-tap", action="store_true", help="list the steps inside each expert too")
    _add_engine(demo)

    generate = _command(commands, "generate", _generate, "continue a prompt", prompt=None)
    _add_loading(generate)
    _add_sampling(generate)
    _add_engine(generate)

    chat = _command(commands, "chat", _chat, "talk to a checkpoint")
    chat.add_argument("--no-thinking", action="store_true", help="ask for answers without thinking")
    chat.add_argument(
        "--tools", nargs="+", default=[], metavar="FILE", help="Python files whose functions it may call, or calculator"
    )
    _add_loading(chat)
    _add_sampling(chat)
    _add_engine(chat)

    _add_trace(commands)

    _command(commands, "step", _step, "walk through a forward pass, on and back; change numbers", prompt=DEMO_PROMPT)

    _add_diff(commands)

    routing = _command(
        commands, "routing", _routing, "which experts saw what: every plot of the routing, with its table",
        prompt=DEMO_PROMPT,
    )  # fmt: skip
    routing.add_argument("--save", default="out/routing", help="folder for plots and CSV (default %(default)s)")
    routing.add_argument("--layer", type=int, help="where one layer is shown, this one (default: the middle one)")

    _add_train(commands.add_parser("train", help="train a checkpoint from text", description=_train.__doc__))

    _add_eval(_command(commands, "eval", _eval, "what a checkpoint can do, on held-out data (one to four minutes)"))

    inspect = _command(commands, "inspect", _inspect, "sizes and counts of a checkpoint")
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")

    _add_writers(commands)
    _add_bench(_command(commands, "bench", _bench, "time this model, or with --shape compare with others"))

    _add_course(commands.add_parser("course", help="hand out exercises, grade them, see a class's mistakes"))

    doctor = commands.add_parser("doctor", help="versions, threads, memory, and what this machine can do")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_trace(commands: Any) -> None:
    trace = _command(commands, "trace", _trace, "list every named array of a forward pass", prompt=DEMO_PROMPT)
    trace.add_argument("--keep", default="*", help='names to keep, shell patterns: "layers.1.*,logits"')
    trace.add_argument("--save", help="a .safetensors file for the arrays")
    trace.add_argument("--html", metavar="FILE", help="a page to click through, in one file")
    trace.add_argument("--beside", metavar="PROMPT", help="on the page: compare with this prompt")
    trace.add_argument("--without-bias", action="store_true", help="on the page: compare with no selection bias")


def _add_diff(commands: Any) -> None:
    about = "the first step at which two checkpoints, dtypes or engines differ by more than rounding"
    compare = commands.add_parser("diff", help=about, description=f"{about}; exit code 0: none, 1: there is one")
    compare.set_defaults(run=_diff)
    compare.add_argument("a", metavar="A", help="folder or name of the checkpoint that is right")
    compare.add_argument("b", metavar="B", help="the one to compare with it")
    compare.add_argument("prompt", nargs="?", default=DEMO_PROMPT, help="a text")
    compare.add_argument("--ids", nargs="+", type=int, metavar="ID", help="token ids instead of a text")
    for side in "ab":
        compare.add_argument(
            f"--dtype-{side}",
            metavar="DTYPE",
            help=f"how {side.upper()}'s weights are kept: {', '.join(KEPT)} (default float32)",
        )
    compare.add_argument("--engine-b", choices=("fast", "numpy"), default="numpy", help="B on it (default numpy)")
    compare.add_argument("--keep", default="*", help='steps to list, shell patterns: "layers.1.*,logits"')
    compare.add_argument("--all", action="store_true", help="every step on a line of its own")
    compare.add_argument("--no-float64", action="store_true", help="do not repeat it in float64")
    compare.add_argument("--json", metavar="FILE", help="everything that was found")


def _add_writers(commands: Any) -> None:
    convert = _command(commands, "convert", _convert, "write a checkpoint in another dtype, or as GGUF for llama.cpp")
    convert.add_argument("to", help="folder to write, or a file FILE.gguf")
    convert.add_argument("--force", action="store_true", help="write over a model that is there")
    convert.add_argument(
        "--dtype", default="bfloat16", help=f"{', '.join(KEPT)} (default bfloat16); for GGUF bfloat16, float32, q8_0"
    )

    new = commands.add_parser("new", help="make a checkpoint with fresh weights")
    new.set_defaults(run=_new)
    new.add_argument("preset", help=f"one of {', '.join(minglm.PRESETS)}")
    new.add_argument("to", help="folder to write")
    new.add_argument("--force", action="store_true", help="write over a model that is there")
    new.add_argument("--seed", type=int, default=0)


def _add_course(course: argparse.ArgumentParser) -> None:
    course.set_defaults(run=lambda given: course.print_help())
    actions = course.add_subparsers(title="actions", metavar="ACTION")
    release = actions.add_parser("release", help="write a week's hand-out, without solutions")
    release.set_defaults(run=_release)
    release.add_argument("week", type=int)
    release.add_argument("--seed", metavar="TERM", help="vary the exercises: any text (default: as in the book)")
    release.add_argument("--to", metavar="FOLDER", help="where (default out/week-WEEK)")
    grade = actions.add_parser("grade", help="run every student's functions, each in a process of its own")
    grade.set_defaults(run=_grade)
    grade.add_argument("folder", help="with the hand-out's term.json and a folder for each student")
    grade.add_argument("--seconds", type=float, default=20.0, help="that one call may take (default %(default)g)")
    grade.add_argument("--draw", type=int, help="which numbers to grade on (default: random)")
    report = actions.add_parser("report", help="the commonest mistakes, from grades.csv")
    report.set_defaults(run=_report)
    report.add_argument("folder", help="that was graded")


def _add_train(train: argparse.ArgumentParser) -> None:
    train.set_defaults(run=_train)
    known = (
        "glm-tiny, glm-nano (default), glm-tiny-balanced, glm-tiny-unbalanced, fine-tune (default with --from --data)"
    )
    train.add_argument("recipe", nargs="?", help=f"a TOML file, or one of {known}")
    train.add_argument("--from", dest="start", metavar="FOLDER", help="go on from this checkpoint's weights")
    train.add_argument("--data", nargs="+", default=[], metavar="FILE", help="your own text or JSONL files instead")
    train.add_argument("--run-folder", help="where the run keeps its state (default runs/RECIPE); resumes from it")
    train.add_argument("--save", help="where the finished model goes (default RUN/model)")
    train.add_argument("--force", action="store_true", help="let --save write over a model that is there")
    train.add_argument("--steps", type=int, help="another number of steps")
    _add_engine(train, None, "the recipe's")


def _add_eval(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("--only", help="text, tasks, tools, mtp, balance, experts: some, with commas (default all)")
    evaluate.add_argument(
        "--items", type=int, default=64, help="at most so many per size of a task (default 64); not of tools"
    )
    evaluate.add_argument("--plain", action="store_true", help="ask the tasks as plain text too, as in pre-training")
    evaluate.add_argument("--no-ngram", action="store_true", help="leave out the 5-gram yardstick")
    evaluate.add_argument("--save", metavar="FILE", help="the tables as Markdown")
    evaluate.add_argument("--json", metavar="FILE", help="every figure")


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--runs", type=int, default=5, help="runs of the quick table (default 5)")
    bench.add_argument("--shape", help="compare on random weights instead: S, M, air, several with commas, or all")
    bench.add_argument("--against", default="all", help="torch, torch.compile, llama.cpp, all (default) or none")
    bench.add_argument("--only", default="all", help="decode, prefill, train, growth, start or all (default)")
    bench.add_argument("--rounds", type=int, default=3, help="turns of each subject (default 3)")
    bench.add_argument("--llama-python", metavar="PYTHON", help="an interpreter that has llama_cpp (default: this one)")
    bench.add_argument("--folder", help="where the weights may lie meanwhile; up to 20 GB for air")
    bench.add_argument("--json", metavar="FILE", help="everything that was measured")
    bench.add_argument("--plot", metavar="FILE", help="a roofline plot")


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str, **positional: str | None
) -> argparse.ArgumentParser:
    """A command on a model; `prompt=…` adds the prompt with its default (None: it must be given)."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help)
    parser.set_defaults(run=run)
    if name in ("convert", "inspect", "eval"):
        parser.add_argument("model", nargs="?" if name != "convert" else None, default=DEFAULT, help="folder or name")
    else:
        parser.add_argument("--model", default=DEFAULT, help="folder or name of a checkpoint (default %(default)s)")
    if "prompt" in positional:
        default = positional["prompt"]
        parser.add_argument(
            "prompt",
            nargs="?" if default else None,
            default=default,
            help="a text (for routing also a text file, or a folder of domains)",
        )
    return parser


def _add_loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", help=f"how weights are kept: {', '.join(KEPT)} (default float32)")
    parser.add_argument("--mmap", action="store_true", help="leave them in the files and read what a token needs")
    parser.add_argument(
        "--memory", type=float, metavar="GB", help="with --mmap: how much of the files may stay in memory"
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=128, help="how many to generate at most (default 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k best tokens; 0: all (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the best that reach this probability")
    parser.add_argument("--min-p", type=float, default=0.0, help="leave out tokens below this share of the best")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument(
        "--draft",
        type=int,
        default=0,
        metavar="N",
        help="guess N tokens ahead: greedy text stays the same, sampled text is another draw of the same "
        "distribution; may be slower for small models",
    )
    parser.add_argument("--draft-model", metavar="MODEL", help="who guesses (default: the model's own MTP layer)")


def _add_engine(parser: argparse.ArgumentParser, default: str | None = "fast", said: str = "fast") -> None:
    parser.add_argument(
        "--engine", choices=("fast", "numpy"), default=default, help=f"compiled kernels or the book (default {said})"
    )
    parser.add_argument("--threads", type=int, help="of the fast engine (default: as many as pay, or MINGLM_THREADS)")


def _engine(given: argparse.Namespace) -> dict[str, Any]:
    return {"engine": given.engine, "threads": given.threads}


def _sampling(given: argparse.Namespace) -> dict[str, Any]:
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "draft")
    helper = None if given.draft_model is None else load(given.draft_model)
    return {"draft_model": helper, **{name: getattr(given, name) for name in names}}
