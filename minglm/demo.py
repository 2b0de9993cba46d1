"""`minglm demo`: one prompt through the whole model, every step shown; then three conversations."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minglm.api import Model
from minglm.data.calculator import calculate
from minglm.data.chats import CALCULATOR
from minglm.data.tasks import TASKS
from minglm.generate.loop import Stats, check_room
from minglm.look.describe import describe
from minglm.look.routing import RoutingTable
from minglm.look.tables import table
from minglm.look.trace import Trace
from minglm.text.template import Message
from minglm.text.tools import run_tools

Say = Callable[[str], None]
INNER = ("tokens", "gate", "up", "hidden")  # inside each expert: left out of the step table unless asked for


def demo(
    model: Model, prompt: str, max_new_tokens: int, save: Path, every_tap: bool = False, say: Say = print, **engine: Any
) -> None:
    """Print architecture, steps, routing and continuation; save the load plot and say where. Checks come first."""
    check_room(model.as_ids(prompt, limit=False).shape[1], max_new_tokens, model.config.max_position_embeddings)
    save = plot_file(save)
    say(f"\n1. The model\n\n{describe(model)}")
    trace = model.trace(prompt)
    say(f"\n2. The forward pass, step by step: {prompt!r} is {trace.ids.shape[1]} tokens\n")
    say(step_table(trace, every_tap))
    say("\n3. Who went where: each token's experts in the order of choice (biased score), and their weights\n")
    say(picks_table(trace.routing, trace.tokens))
    say("\n4. The continuation, token by token\n")
    write_on(model, prompt, max_new_tokens, **engine)
    say(f"\n5. Expert load over this prompt: {save_load_plot(trace.routing, save)}")
    say("\n6. Conversations: a question with thinking, without it, and one for the calculator, which really runs")
    for title, text in conversations(model, **engine):
        say(f"\n{title}\n{indented(text)}")


SUM = "3+8+1+9+4+2+7+7+5+6 mod 10"
PRODUCT = "(4821+937)*3"


def conversations(model: Model, max_new_tokens: int = 200, **engine: Any) -> Iterator[tuple[str, str]]:
    """What was asked, and what the model said to it, with tags: thinking, direct, and with a tool. Nothing for a model
    without a tokenizer; sense only from one that was trained on conversations."""
    if model.tokenizer is None or model.chat_template is None:
        return
    template = model.chat_template

    def answer(prompt: str) -> str:
        room = model.config.max_position_embeddings - model.as_ids(prompt, limit=False).shape[1]
        if room < 1:
            return "(the question does not fit into this model's context)"
        return model.generate(prompt, min(max_new_tokens, room), **engine).text or ""

    _, right = TASKS["sums"].solve(SUM)
    for thinking in (True, False):
        prompt = template.render([{"role": "user", "content": SUM}], enable_thinking=thinking)
        how = "thinking" if thinking else "direct"
        yield f"{SUM}   ({how}; right is {right})", answer(prompt)
    question: Message = {"role": "user", "content": PRODUCT}
    said = run_tools(answer, [question], [CALCULATOR], {"calculator": calculate}, template)
    whole = template.render(said, [CALCULATOR], add_generation_prompt=False)
    yield f"{PRODUCT}   (with the tool; right is {calculate(PRODUCT)})", whole.partition(f"<|user|>\n{PRODUCT}")[2]


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip("\n").splitlines())


def step_table(trace: Trace, every_tap: bool = False) -> str:
    """Every step: name, shape, dtype, mean, standard deviation, milliseconds since the step before."""
    rows = trace.rows()
    shown = [r for r in rows if every_tap or not (".experts." in r.name and r.name.endswith(INNER))]
    text = table([r._replace(ms=round(r.ms, 2)) for r in shown], ("step", "shape", "dtype", "mean", "std", "ms"))
    left_out = len(rows) - len(shown)
    return text + (f"\n({left_out} steps inside the experts left out; --every-tap shows them)" if left_out else "")


def picks_table(routing: RoutingTable, tokens: Sequence[str]) -> str:
    """Tokens down, layers across; in each cell the experts in the order of their biased scores, and their weights."""
    header = ("token", *(f"layer {layer}" for layer in routing.layers))
    rows = []
    for t, token in enumerate(tokens):
        cells = [
            "  ".join(f"{e}:{w:.2f}" for e, w in zip(routing.indices[t, i], routing.weights[t, i], strict=True))
            for i in range(len(routing.layers))
        ]
        rows.append((token, *cells))
    return table(rows, header)


def write_on(model: Model, prompt: str, max_new_tokens: int, **options: Any) -> None:
    """Stream the continuation, then its speed and which engine ran."""
    print(prompt, end="", flush=True)
    decoder = model.tokenizer.stream() if model.tokenizer else None
    steps = []
    for step in model.steps(prompt, max_new_tokens, **options):
        steps.append(step)
        if decoder and step.stop_reason != "end token":
            print(decoder.feed(step.id), end="", flush=True)
    stats = Stats.of(model.as_ids(prompt).shape[1], steps)
    print(f"\n\n({stats}, greedy, stopped by {steps[-1].stop_reason})")


def save_load_plot(routing: RoutingTable, path: Path) -> Path:
    """The layer × expert heat map as a PNG."""
    from minglm.look.plots import plot_load

    path = plot_file(path)
    plot_load(routing.indices, routing.experts, routing.layers).savefig(path, dpi=120)
    return path.resolve()


def plot_file(path: Path) -> Path:
    """The PNG to write, its folder made: `path` itself, or demo-load.png in it if it is a folder."""
    path = path / "demo-load.png" if path.is_dir() else path
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: the plot is a PNG; give a name that ends in .png, or a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
