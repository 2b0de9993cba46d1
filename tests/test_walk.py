"""Walks: moves are exact in both directions, edits go on as a tap would, a script gives the same bits."""

import io
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import minglm
from minglm.cli import main
from minglm.look.conditions import QUANTITIES, Condition, measure
from minglm.look.stepper import Stepper
from minglm.look.walk import idea_of, steps_of

ROOT = Path(__file__).parents[1]
IDS = [[3, 14, 15, 9, 2]]


@pytest.fixture
def walk():
    return minglm.new("micro", seed=1).step(IDS)


# -- moves -------------------------------------------------------------------------------------------------------


def test_into_visits_every_step_and_back_returns(walk):
    names = list(minglm.new("micro", seed=1).trace(IDS))
    seen = [walk.name]
    for _ in names[1:]:
        seen.append(walk.into().name)
    assert seen == names
    assert walk.into().name == "logits"  # the last: it stays
    for name in reversed(names[:-1]):
        assert walk.back().name == name
    assert walk.back().name == "embed_tokens"


def test_next_goes_over_ideas(walk):
    seen = [walk.next().name for _ in range(9)]
    assert seen == [
        "layers.0.input_layernorm", "layers.0.self_attn.o", "layers.0.middle", "layers.0.post_attention_layernorm",
        "layers.0.mlp.hidden", "layers.0.mlp.out", "layers.0.out", "layers.1.input_layernorm", "layers.1.self_attn.o",
    ]  # fmt: skip
    ideas = [idea for idea, _ in steps_of(walk.names)]
    assert [i for i in ideas if i.startswith("layer 1, ")] == [
        "layer 1, norm before attention", "layer 1, attention", "layer 1, residual after attention",
        "layer 1, norm before the MLP", "layer 1, router", "layer 1, experts", "layer 1, shared expert",
        "layer 1, what the MLP adds", "layer 1, residual after the MLP",
    ]  # fmt: skip
    assert sum(len(names) for _, names in steps_of(walk.names)) == len(walk.names)


def test_to_a_step_or_a_layer(walk):
    assert walk.to("router_scores").name == "layers.1.mlp.router_scores"
    assert walk.to("router_scores").name == "layers.2.mlp.router_scores"
    assert walk.to("router_scores").name == "layers.1.mlp.router_scores"  # none ahead: the first again
    assert walk.to(2).name == walk.to("layer 2").name == "layers.2.input_layernorm"
    assert walk.to("logits").name == "logits"
    with pytest.raises(ValueError, match=r"no step is called 'layers\.9'"):
        walk.to("layers.9")


def test_until_a_condition_holds(walk):
    place = walk.until("margin < 10")
    assert place.name == "layers.1.mlp.biased_scores"
    assert walk.until("load > 0 and layer == 2").name == "layers.2.mlp.expert_indices"
    with pytest.raises(ValueError, match="does not hold at any later step"):
        walk.until("nan > 0")
    assert walk.name == "layers.2.mlp.expert_indices"
    for nonsense in (
        "",
        "margin",
        "margin <",
        "weight > 1",
        "__import__('os')",
        "max > 1; min",
        "max(1) > 0",
        "[1] > 0",
        "margin and max > 1",
        "(max > 1) + 1 > 0",
        "not max",
        "max > True",
        "max > 1e999",
        "+".join(["1"] * 3000) + " < max",
    ):
        with pytest.raises(ValueError, match=r"condition|not known here|wanted something like|too long"):
            walk.until(nonsense)


def test_quantities_are_what_they_say():
    biased = np.array([[0.5, 0.1, 0.45, -np.inf], [0.9, 0.3, 0.2, 0.25]])
    name = "layers.3.mlp.biased_scores"
    assert measure("margin", name, biased, 2) == pytest.approx(0.05)
    assert measure("layer", name, biased, 2) == 3
    assert (measure("max", name, biased, 2), measure("min", name, biased, 2)) == (0.9, 0.1)
    probs = np.array([[[[1.0, 0], [0.5, 0.5]]]])
    assert measure("entropy", "layers.0.self_attn.probs", probs, 2) == pytest.approx(np.log(2))
    assert measure("load", "layers.1.mlp.expert_indices", np.array([[0, 1], [0, 2], [1, 0]]), 2) == 1.0
    known = {"rms": np.sqrt(12.5), "mean": 3.5, "std": 0.5, "nan": 0}
    for quantity, wanted in known.items():
        assert measure(quantity, "norm", np.array([3.0, 4.0]), 2) == pytest.approx(wanted)
    assert set(QUANTITIES) == {"max", "min", "layer", "margin", "entropy", "load", *known}
    assert Condition("1 < max / 2 <= 2 or not -max < 0").holds("norm", np.array([3.0, 4.0]), 2)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("margin < 1", False),
        ("not margin < 1", False),
        ("margin < 1 or max > 3", True),  # a side that is not known does not matter where the other settles it
        ("max > 3 or margin < 1", True),
        ("margin < 1 and max > 3", False),
        ("not (margin < 1 and max > 5)", True),
        ("max / 0 > 1", False),
        ("layer < 1 or margin < 1", False),
    ],
)
def test_what_a_step_lacks_is_unknown(text, holds):
    assert Condition(text).holds("norm", np.array([3.0, 4.0]), 2) is holds


def test_where_names_what_is_not_finite():
    walk = minglm.new("micro", seed=1).step(IDS)
    walk.to("norm")
    place = walk.edit("norm[0, 1, 2:4] = nan")
    assert place.numbers.endswith(", 2 × NaN")
    assert place.changed.endswith("2 of 100 numbers differ from the walk without edits, 2 of them to or from ∞ or NaN")
    assert walk.to("self_attn.scores").numbers.endswith("60 × −∞")


# -- looking -----------------------------------------------------------------------------------------------------


def test_places_by_number_and_by_letter(walk):
    walk.to("logits")
    weights = walk.trace["layers.2.mlp.expert_weights"]
    assert np.array_equal(walk.look("w"), weights)  # the nearest up to here
    assert walk.look("w[3,1]") == weights[3, 1]
    assert np.array_equal(walk.look("w[1:3]"), weights[1:3])
    assert np.array_equal(walk.look("w T=3"), weights[3])  # one row: T is N
    probs = walk.trace["layers.2.self_attn.probs"]
    assert np.array_equal(walk.look("probs H=2 T=4"), probs[:, 2, 4])
    assert np.array_equal(walk.look("probs[H=2, T=4]"), probs[:, 2, 4])
    assert np.array_equal(
        walk.look("layers.1.self_attn.probs[0, :, -1]"), walk.trace["layers.1.self_attn.probs"][0, :, 4]
    )
    assert np.array_equal(walk.look(), walk.trace["logits"])
    assert np.array_equal(walk.look("stream"), walk.trace["layers.2.out"])  # not the MLP's out, nor an expert's
    walk.look("w")[:] = 0  # a copy: the walk stays exact
    assert np.array_equal(walk.look("w"), weights)
    assert weights.any()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nothing", "no step is called 'nothing'"),
        ("w[9]", "axis N: 9 is outside of 0 … 4"),
        (f"w[{'9' * 5000}]", "is outside of 0 … 4"),
        ("w[::0]", "the step of a slice cannot be 0"),
        ("probs H=2 H=3", "names an axis twice"),
        ("experts.77.out", "an expert that no token picked has no steps"),
        ("w[1,2,3]", "has 2 axes"),
        ("w[a]", "'a' is no whole number"),
        ("w[1:a]", "is no slice"),
        ("w H=3", "has the axes N K, not H"),
        ("w[", "wanted a name and a place"),
    ],
)
def test_places_that_are_not_there(walk, text, says):
    walk.to("logits")
    with pytest.raises(ValueError, match=says):
        walk.look(text)


def test_why_is_that_of_the_place(walk):
    walk.to("expert_weights")
    opened = walk.why("w[3, 0]")
    assert opened.name == "layers.1.mlp.expert_weights"
    assert opened.value == walk.array[3, 0] == pytest.approx(opened.total, rel=1e-6)
    with pytest.raises(ValueError, match=r"why takes one number: .* write expert_weights\[1, 1\]"):
        walk.why("w[3]")


# -- changing ----------------------------------------------------------------------------------------------------


def test_an_edit_goes_on_as_a_tap_would(walk):
    model = walk.model
    walk.to("router_scores")
    walk.edit("router_scores[2, 5] = 0.99")
    walk.to("logits")
    walk.edit("layers.2.self_attn.probs[0, 1, 3, :] = 0")

    def tap(name, array):
        places = {"layers.1.mlp.router_scores": ((2, 5), 0.99), "layers.2.self_attn.probs": ((0, 1, 3), 0)}
        if name in places:
            array = array.copy()
            array[places[name][0]] = places[name][1]
        return array

    wanted = model.trace(IDS, tap=tap)
    assert list(walk.trace) == list(wanted)
    assert all(np.array_equal(walk.trace[name], wanted[name]) for name in wanted)
    assert "numbers differ" in str(walk.where())
    walk.undo()
    walk.undo()
    assert all(np.array_equal(walk.trace[name], walk.plain[name]) for name in walk.plain)
    assert walk.where().changed == ""
    with pytest.raises(ValueError, match="nothing was edited"):
        walk.undo()


def test_an_edit_that_moves_a_token_keeps_the_place(walk):
    walk.to("expert_indices")
    token, first = 2, int(walk.array[2, 0])
    other = next(e for e in range(walk.model.config.n_routed_experts) if e not in walk.array[2])
    walk.to("logits")
    place = walk.edit(f"layers.1.mlp.expert_indices[{token}, 0] = {other}")
    assert place.name == "logits"
    assert token in walk.trace[f"layers.1.mlp.experts.{other}.tokens"]
    assert token not in walk.trace._arrays.get(f"layers.1.mlp.experts.{first}.tokens", [])
    assert "the same" not in place.changed


def test_edits_that_move_tokens_do_not_lose_the_way_back(walk):
    names = list(walk.names)
    for name in ("layers.1.mlp.experts.1.out", "layers.1.mlp.out", "layers.2.mlp.routed", "logits"):
        walk.to(name if name in names else "layers.1.mlp.routed")
    been = [names[i] for i in walk._visited]
    walk.edit("layers.0.out = 0")  # all tokens alike: most experts are picked by none
    assert len(walk.names) < len(names)
    for name in reversed(been[1:]):
        if name in walk.names:
            assert walk.back().name == name


def test_an_edit_of_an_expert_stays_with_its_tokens(walk):
    expert, tokens = next((n, walk.trace[n]) for n in walk.names if n.endswith(".tokens") and len(walk.trace[n]) < 5)
    walk.edit(f"{expert.replace('tokens', 'out')}[{len(tokens) - 1}, :] = 5")
    number, kept = expert.split(".")[4], walk.trace
    for token in (int(tokens[0]), next(t for t in range(5) if t not in tokens)):  # one leaves; one comes
        picks = walk.trace["layers.1.mlp.expert_indices"][token].tolist()
        k, new = (picks.index(int(number)), min(set(range(8)) - set(picks))) if token in tokens else (0, int(number))
        with pytest.raises(ValueError, match=r"undo that first"):
            walk.edit(f"layers.1.mlp.expert_indices[{token}, {k}] = {new}")
    assert walk.trace is kept
    assert len(walk.edits) == 1


def test_an_interrupted_edit_changes_nothing(walk, monkeypatch):
    kept = walk.trace

    def interrupted(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(walk.model, "trace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        walk.edit("w[1, 1] = 0.9")
    assert walk.edits == []
    assert walk.trace is kept


def test_numbers_that_are_not_finite_and_their_script(tmp_path, recwarn):
    walk = minglm.load("glm-nano").step("2 + 2 =")
    walk.edit("layers.1.mlp.biased_scores[2, 3] = −∞")
    walk.edit("layers.2.mlp.biased_scores[2, 3] = -INF")
    assert not np.any(walk.look("layers.1.mlp.expert_indices")[2] == 3)
    walk.edit("norm[0, 1, 0] = nan")
    walk.to("logits")
    assert np.isnan(walk.look("logits[0, 1]")).all()
    assert str(walk.why("logits[0, 1, 5]")).endswith("nan")
    assert not [w for w in recwarn if w.category is RuntimeWarning]
    (tmp_path / "walk.py").write_text(walk.script(), "utf-8")
    again = runpy.run_path(str(tmp_path / "walk.py"))
    assert np.array_equal(again["trace"]["logits"], walk.trace["logits"], equal_nan=True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("expert_indices[0, 0] = 2.5", "holds whole numbers, 2.5 is none"),
        ("expert_indices[0, 0] = inf", "holds whole numbers, inf is none"),
        ("expert_indices[0, 0] = nan", "holds whole numbers, nan is none"),
        ("expert_indices[0, 0] = 1e30", "holds whole numbers, 1e\\+30 is none"),
        ("w[0, 0] = 1e39", "too large for float32"),
        ("w[0, 0] = 1.2.3", "wanted NAME"),
        ("w[4:2] = 1", "there is no number"),
        ("w[3, 0]", "wanted NAME"),
        ("w[3, 0] = many", "wanted NAME"),
        ("w[3, 0 = 1", "wanted NAME"),
        ("expert_indices[0, 0] = 99", "different experts between 0"),
        ("layers.1.mlp.experts.{e}.tokens[0] = 0", "follows from expert_indices"),
    ],
)
def test_edits_that_cannot_be(walk, text, says):
    walk.to("logits")
    expert = next(n.split(".")[4] for n in walk.names if n.endswith(".tokens"))
    with pytest.raises(ValueError, match=says):
        walk.edit(text.replace("{e}", expert))
    assert walk.edits == []
    assert walk.trace is walk.plain


def test_the_script_gives_the_same_bits(tmp_path, capsys):
    walk = minglm.load("glm-nano").step("2 + 2 =")
    walk.to("expert_weights")
    walk.edit("w[1, 1] = 0.9")
    walk.to("logits")
    logits = walk.look("logits[0, -1, 7:9]")
    opened = walk.why("layers.1.mlp.routed[1, 3]")
    (tmp_path / "walk.py").write_text(walk.script(), "utf-8")
    again = runpy.run_path(str(tmp_path / "walk.py"))
    assert np.array_equal(again["trace"]["logits"], walk.trace["logits"])
    assert capsys.readouterr().out == f"{logits}\n{opened}\n"


def test_the_script_follows_the_order_of_the_walk(tmp_path, capsys):
    """What was looked at before an edit, and at a step that an undo took away, comes out as it was seen."""
    walk = minglm.load("glm-nano").step("2 + 2 =")
    picks = walk.look("layers.1.mlp.expert_indices[0]")
    new = next(e for e in range(8) if f"layers.1.mlp.experts.{e}.out" not in walk.trace or e not in picks)
    walk.edit(f"layers.1.mlp.expert_indices[0, 1] = {new}")
    seen = [picks, walk.look("layers.1.mlp.expert_indices[0]"), walk.look(f"layers.1.mlp.experts.{new}.tokens")]
    walk.undo()
    seen.append(walk.look("layers.1.mlp.expert_indices[0]"))
    (tmp_path / "walk.py").write_text(walk.script(), "utf-8")
    runpy.run_path(str(tmp_path / "walk.py"))
    assert capsys.readouterr().out == "".join(f"{array}\n" for array in seen)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_script_finds_a_model_elsewhere(tmp_path, monkeypatch, dtype):
    model = minglm.new("micro", seed=1)
    model.save(tmp_path / "a'b c")
    monkeypatch.chdir(tmp_path)
    walk = minglm.load("a'b c", dtype=dtype).step(IDS)
    walk.edit("w[1, 1] = 0.9")
    (tmp_path / "walk.py").write_text(walk.script(), "utf-8")
    monkeypatch.chdir("/")
    again = runpy.run_path(str(tmp_path / "walk.py"))
    assert np.array_equal(again["trace"]["logits"], walk.trace["logits"])
    assert again["trace"]["logits"].dtype == walk.trace["logits"].dtype


def test_the_script_of_a_model_without_a_folder_says_so(walk, tmp_path):
    assert "came from no folder" in walk.script()
    compile(walk.script(), "walk.py", "exec")
    assert "say in the script how it is made" in typed(walk, f"save {tmp_path / 'walk.py'}")


# -- the terminal ------------------------------------------------------------------------------------------------


def typed(walk, *lines):
    out = io.StringIO()
    Stepper(walk, io.StringIO("\n".join(lines) + "\n"), out).cmdloop()
    return out.getvalue()


def test_commands(walk, tmp_path):
    said = typed(
        walk, "n", "", "i", "b", "to router_scores", "until margin < 10", "w", "p w", "l", "t", "help", "q", "n"
    )
    for part in (
        "layers.0.input_layernorm", "layers.0.self_attn.o", "layers.0.middle", "layers.1.mlp.biased_scores",
        "> layer 1, router: router_logits router_scores [biased_scores]", "over the next idea", "0:",
    ):  # fmt: skip
        assert part in said
    assert walk.name == "layers.1.mlp.biased_scores"  # nothing after q
    said = typed(walk, "to w", "why w[1, 1]", "edit w[1, 1] = 0.5", "undo", f"save {tmp_path / 'walk.py'}")
    assert "makes" in said
    assert "1 of 15 numbers differ" in said
    assert (tmp_path / "walk.py").exists()


def test_wrong_input_is_a_line_and_ends_nothing(walk):
    said = typed(
        walk, "b", "foo", "to", "to foo", "until x > 1", "p w[99]", "why", "edit w", "undo", "save", "save /", "n"
    )
    assert said.count("Traceback") == 0
    for part in (
        "where the walk began",
        "no command 'foo'",
        "no step is called",
        "not known here",
        "why takes one number",
    ):
        assert part in said
    assert walk.name == "layers.0.input_layernorm"


def test_until_says_what_was_measured(walk):
    said = typed(walk, "until max > 1 or margin < 1")  # the first step that has a max has no margin
    assert "  max = " in said
    assert "margin =" not in said


def test_save_keeps_what_is_no_walk(walk, tmp_path, monkeypatch):
    mine = tmp_path / "mine.py"
    mine.write_text("precious = 1\n")
    assert "is no walk; give another name" in typed(walk, f"save {mine}")
    assert mine.read_text() == "precious = 1\n"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert typed(walk, "save ~/a walk.py", "save ~/a walk.py").count("saved ~/a walk.py") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a walk.py", "mine.py"]
    assert "there is no folder" in typed(walk, f"save {tmp_path}/none/walk.py")


def test_what_is_printed_has_its_full_name(walk):
    said = typed(walk, "to logits", "p w[1, 1]", "p w N=2", "edit w[1, 1] = 0.5", "why w[1, 1]")
    assert "layers.2.mlp.expert_weights  w[1, 1]  " in said
    assert "layers.2.mlp.expert_weights  w N=2  [3]" in said
    assert "edited layers.2.mlp.expert_weights: 1 number, now 0.5" in said
    assert "edited here, so the formula makes another number" in said


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("to logits\nq\n"))
    assert main(["step", "glm-nano", "2 + 2 ="]) == 0
    out = capsys.readouterr().out
    assert out.startswith("glm-nano, 185 steps; tokens 0:'2'")
    assert re.search(r"185 of 185  logits \[B = 1, T = 5, V = \d+\]  \(head\)", out)


@pytest.mark.parametrize(
    ("arguments", "begins"),
    [
        (["glm-nano"], "glm-nano, "),
        (["glm-nano", "2 + 2 ="], "glm-nano, 185 steps"),
        (["2 + 2 =", "--model", "glm-nano"], "glm-nano, 185 steps"),
        (["2 + 2 ="], "glm-tiny, "),
        ([], "glm-tiny, "),
    ],
)
def test_the_model_may_come_first(capsys, monkeypatch, arguments, begins):
    monkeypatch.setattr(sys, "stdin", io.StringIO("q\n"))
    assert main(["step", *arguments]) == 0
    assert capsys.readouterr().out.startswith(begins)


def test_too_many_words(capsys):
    with pytest.raises(SystemExit):
        main(["step", "glm-nano", "2 +", "2 ="])
    assert "unrecognized arguments: 2 + 2 =" in capsys.readouterr().err


def test_a_pipe_that_closes_early():
    command = f"printf 'l\\nl\\nl\\n' | {sys.executable} -m minglm step glm-nano 'a' | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in done.stderr


def test_ideas_have_names_for_every_tap():
    for name in minglm.new("micro").trace(IDS):
        assert idea_of(name)


# -- debuggers ---------------------------------------------------------------------------------------------------


def frames():
    """(caller, called) of every frame of the book in one forward pass, in order."""
    book, seen = str(Path(minglm.__file__).parent / "model"), []

    def trace(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(book):
            seen.append((frame.f_back.f_code.co_name, frame.f_code.co_name))

    model = minglm.new("micro", seed=1)
    sys.settrace(trace)
    try:
        model.forward(IDS)
    finally:
        sys.settrace(None)
    return [pair for pair in seen if pair[1] not in ("no_tap", "scoped")]


def test_one_step_into_leads_to_one_idea():
    """What a debugger enters: functions that the book names, nothing between a part and its parts."""
    calls = frames()

    def inside(part):  # what its first call enters, in order
        begin = next(i for i, (_, called) in enumerate(calls) if called == part)
        found = []
        for caller, called in calls[begin + 1 :]:
            if called == part:
                break
            found += [called] if caller == part else []
        return found

    assert inside("layer") == ["rms_norm", "attention", "add", "rms_norm", "mlp", "add"]  # layer 0 is dense
    assert inside("attention") == [*["linear"] * 3, "_head_norm", "_head_norm", "rope", "rope", "attend", "linear"]
    assert inside("moe") == ["router", "routed_experts", "mlp", "add"]
    assert inside("router") == ["linear", "sigmoid", "_keep_best_groups", "_normalise"]
    assert inside("expert_mlp") == ["linear", "linear", "swiglu", "linear"]
    unnamed = {called for _, called in calls if called.startswith("<")} - {"<listcomp>"}
    assert not unnamed


def test_editor_settings_skip_none_of_our_code():
    launch = json.loads((ROOT / ".vscode/launch.json").read_text("utf-8"))["configurations"]
    assert all(each["justMyCode"] is False for each in launch)
    assert launch[0]["name"] == "Debug my exercise"
    assert json.loads((ROOT / ".vscode/settings.json").read_text("utf-8"))["jupyter.debugJustMyCode"] is False
