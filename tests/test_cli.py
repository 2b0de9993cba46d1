"""The command line, on a small folder: what it prints, what it writes, what it says to wrong input."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from safetensors.numpy import load_file

import minglm
from minglm.api import Model
from minglm.cli import main
from minglm.data.documents import read_file_list, standard_library_documents
from minglm.text.template import ChatTemplate
from minglm.text.tokenizer import train_tokenizer
from minglm.train.recipe import Recipe, Stage
from tests.variants import MICRO, random_params


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A micro model with a tokenizer of bytes and tags."""
    path = tmp_path_factory.mktemp("models") / "bytes"
    tokenizer = train_tokenizer([], 292)
    config = MICRO.replace(vocab_size=320, max_position_embeddings=256, eos_token_id=tokenizer.end_ids)
    Model(config, random_params(config, 1), tokenizer, ChatTemplate()).save(path)
    return str(path)


def run(capsys, *arguments):
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_demo_shows_everything(folder, tmp_path, capsys):
    plot = tmp_path / "deep" / "load.png"
    code, out, _ = run(capsys, "demo", "--model", folder, "ab", "--tokens", "5", "--save", str(plot))
    assert code == 0
    for part in ("parameters, total", "key/value cache per token", "layers.1.self_attn.probs", "logits", "layer 2"):
        assert part in out
    assert "tokens/s" in out
    assert str(plot) in out
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_generate_prints_the_continuation(folder, capsys):
    text = minglm.load(folder).generate("ab", 6).text
    code, out, err = run(capsys, "generate", "--model", folder, "ab", "--tokens", "6")
    assert (code, out) == (0, text + "\n")
    assert "tokens/s, fast engine, " in err  # which path ran, beside the text and not in it


def test_drafts_change_nothing_but_what_is_told(folder, capsys):
    plain = run(capsys, "generate", "--model", folder, "ab", "--tokens", "6")
    for options in (("--draft", "2"), ("--draft", "3", "--draft-model", folder)):
        code, out, err = run(capsys, "generate", "--model", folder, "ab", "--tokens", "6", *options)
        assert (code, out) == plain[:2]
        assert "drafts accepted by depth" in err


def test_sampling_options_reach_the_model(folder, capsys):
    options = ("--temperature", "1.5", "--top-k", "9", "--top-p", "0.9", "--min-p", "0.01", "--seed", "3")
    wanted = minglm.load(folder).generate("ab", 9, temperature=1.5, top_k=9, top_p=0.9, min_p=0.01, seed=3).text
    assert run(capsys, "generate", "--model", folder, "ab", "--tokens", "9", *options)[1] == wanted + "\n"


def test_trace_lists_and_saves(folder, tmp_path, capsys):
    from minglm.look.trace import load_trace

    file = tmp_path / "t.safetensors"
    code, out, _ = run(capsys, "trace", "--model", folder, "ab", "--keep", "logits,layers.0.*", "--save", str(file))
    assert code == 0
    assert "layers.0.self_attn.q" in out
    assert "layers.1.self_attn.q " not in out
    model = minglm.load(folder)
    np.testing.assert_array_equal(load_trace(file)["logits"], model.forward(model.as_ids("ab")).logits)


def test_routing_writes_plots_and_csv(folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n", encoding="utf-8")
    code, out, _ = run(capsys, "routing", "--model", folder, str(text), "--save", str(tmp_path / "r"))
    assert code == 0
    assert "layer 1" in out
    assert {"load.png", "load.csv", "picks.png", "picks.csv"} <= {p.name for p in (tmp_path / "r").iterdir()}
    assert len((tmp_path / "r" / "picks.csv").read_text("utf-8").splitlines()) > 20
    assert "left out domains, information: one domain only" in out


def test_inspect_convert_new(folder, tmp_path, capsys):
    code, out, _ = run(capsys, "inspect", folder, "--tensors")
    assert code == 0
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in out
    assert run(capsys, "convert", folder, str(tmp_path / "b"), "--dtype", "bfloat16")[0] == 0
    assert minglm.load(tmp_path / "b", "bfloat16").tokenizer is not None
    assert run(capsys, "new", "micro", str(tmp_path / "n"), "--seed", "4")[0] == 0
    ids = [[1, 2, 3]]
    fresh = minglm.new("micro", seed=4)
    assert (minglm.load(tmp_path / "n").forward(ids).logits == fresh.forward(ids).logits).all()


def test_inspect_shows_a_preset_without_weights(capsys):
    code, out, _ = run(capsys, "inspect", "GLM-4.5")
    assert code == 0
    assert "356,785,898,816" in out


def test_chat_is_a_conversation(folder, capsys, monkeypatch):
    lines = iter(["Hi", "", "/clear", "Bye", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, out, _ = run(capsys, "chat", "--model", folder, "--tokens", "4")
    assert code == 0
    assert "/quit" in out
    model = minglm.load(folder)
    prompt = model.chat_template.render([{"role": "user", "content": "Bye"}])
    assert model.generate(prompt, 4).text in out


def test_chat_ends_with_its_input(folder, capsys, monkeypatch):
    def end(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert run(capsys, "chat", "--model", folder)[0] == 0


def test_training_on_own_text(tmp_path, monkeypatch):
    """A folder comes out that loads, and a second call has nothing left to do."""
    text = tmp_path / "mine.txt"
    text.write_text("to be or not to be, that is the question\n" * 400, encoding="utf-8")
    from minglm.train import run as runs
    from minglm.train.run import finish, train_recipe

    some = list(islice(standard_library_documents(), 40))  # the rest of the standard library would only take time
    monkeypatch.setattr(runs, "documents", lambda packages: some)

    recipe = Recipe("glm-nano", (Stage("one", 2, 2, 16, {"text": 1.0}, learning_rate=1e-3),))
    said = []
    model = train_recipe(recipe, tmp_path / "run", [text], say=said.append)
    finish(model, recipe, tmp_path / "run", tmp_path / "out", say=said.append)
    assert minglm.load(tmp_path / "out").generate("to be", 3).ids
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert 0 < metrics[-1]["text_bits_per_byte"] < 12
    files, _ = read_file_list((tmp_path / "out" / "training_files.json").read_text("utf-8"))
    assert [f["domain"] for f in files] == ["text"]
    assert (tmp_path / "out" / "training.png").stat().st_size > 1000
    assert load_file(tmp_path / "out" / "routing.safetensors")["step_000002"].dtype == np.uint8
    again = train_recipe(recipe, tmp_path / "run", [text], say=said.append)
    assert all(
        (a == b).all() for (_, a), (_, b) in zip(minglm.walk(model.params), minglm.walk(again.params), strict=True)
    )


def test_an_interrupted_run_says_how_to_go_on(capsys, monkeypatch, tmp_path):
    def interrupted(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("minglm.train.run.train_recipe", interrupted)
    code, _, err = run(capsys, "train", "glm-nano", "--run-folder", str(tmp_path / "r"))
    assert code == 130
    assert "nothing was saved yet" in err
    (tmp_path / "r" / "checkpoint-000005").mkdir(parents=True)
    _, _, err = run(capsys, "train", "glm-nano", "--run-folder", str(tmp_path / "r"))
    assert f"saved in {tmp_path / 'r' / 'checkpoint-000005'}; the same command goes on from there" in err


def test_fine_tuning_goes_on_from_a_folder_on_texts_or_conversations(folder, tmp_path, capsys):
    """`--from`: its weights, its tokenizer; and a run that began with other weights is not taken up again."""
    chats, texts = tmp_path / "chats.jsonl", tmp_path / "texts.txt"
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]
    chats.write_text(json.dumps({"messages": messages}) + "\n", "utf-8")
    texts.write_text("a line of text that is long enough to be trained on, again and again\n" * 60, "utf-8")
    recipe = tmp_path / "short.toml"
    stage = Stage("short", 2, 2, 120, {"text": 1.0}, learning_rate=1e-3)
    recipe.write_text(Recipe("glm-nano", (stage,)).to_toml(), "utf-8")
    for data in (chats, texts):
        run_folder = tmp_path / f"run-{data.stem}"
        common = ["train", str(recipe), "--data", str(data), "--run-folder", str(run_folder)]
        code, _, err = run(capsys, *common, "--from", folder)
        assert code == 0, err
        before, after = minglm.load(folder), minglm.load(run_folder / "model")
        assert after.config.vocab_size == before.config.vocab_size
        pairs = zip(minglm.walk(before.params), minglm.walk(after.params), strict=True)
        assert any((a != b).any() for (_, a), (_, b) in pairs)
        code, _, err = run(capsys, *common)
        assert code == 2
        assert "began with other weights" in err
    code, out, _ = run(capsys, *common, "--from", folder)
    assert code == 0
    assert "nothing is left to train" in out
    files = read_file_list((run_folder / "training_files.json").read_text("utf-8"))
    assert files[1] == []  # the user's own files are nobody's package
    texts.write_text("another text\n" * 600, "utf-8")
    code, _, err = run(capsys, *common, "--from", folder)
    assert code == 2
    assert "holds a run on other data; give another --run-folder" in err
    recipe.write_text(Recipe("glm-nano", (replace(stage, sequence_length=300),)).to_toml(), "utf-8")
    code, _, err = run(capsys, *common[:-1], str(tmp_path / "new"), "--from", folder)
    assert code == 2
    assert "sequences of 300 tokens, bytes has a context of 256" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "--model", "no-such-model", "x"], "no such folder"),
        (["generate", "--model", "FOLDER", ""], "empty"),
        (["generate", "--model", "FOLDER", "x", "--tokens", "100000"], "context of 256"),
        (["generate", "--model", "FOLDER", "x", "--temperature", "-1"], "temperature"),
        (["generate", "--model", "FOLDER", "x", "--dtype", "int3"], "int3"),
        (["trace", "--model", "FOLDER", "x", "--keep", "layers.9.*"], "layers.9"),
        (["train", "no-such-recipe"], "neither a recipe file nor one of"),
        (["train", "--data", "missing.txt", "--run-folder", "TMP/r"], "missing.txt"),
        (["train", "--from", "FOLDER", "--run-folder", "TMP/r"], "its weights name text; wanted some of code, prose,"),
        (["train", "glm-nano", "--save", "FOLDER"], "--force"),
        (["train", "glm-nano", "--engine", "fast", "--run-folder", "TMP/r", "--steps", "2"], "steps = 2 must be 3 or"),
        (["eval", "FOLDER", "--items", "0"], "items = 0 must be a whole number"),
        (["eval", "FOLDER", "--only", ""], "no section ''"),
        (["eval", "FOLDER", "--only", "tools"], "it wants a context of 512 tokens, the model has 256"),
        (["eval", "FOLDER", "--save", "TMP"], "Is a directory"),
        (["new", "GLM-9", "x"], "no preset"),
        (["demo", "--model", "FOLDER", "ab", "--tokens", "0"], "--tokens 0 must be a whole number"),
        (["demo", "--model", "FOLDER", "ab", "--save", "TMP/x.xyz"], "ends in .png"),
        (["routing", "--model", "FOLDER", "TMP"], "no text in it"),
        (["routing", "--model", "FOLDER", "TMP/novel.txt"], "no such file or folder"),
        (["routing", "--model", "FOLDER", "TMP/novel"], "no such file or folder"),
        (["routing", "--model", "FOLDER", "ab", "--layer", "0"], "layer 0 has no router; layers with experts are 1, 2"),
        (["generate", "--model", "FOLDER", "x", "--seed", "-1"], "seed"),
        (["new", "GLM-4.5", "TMP/big"], "356,785,898,816 parameters"),
        (["new", "micro", "FOLDER"], "--force"),
        (["routing", "--model", "FOLDER", ""], "empty"),
        (["inspect", "TMP"], "is this the folder of a model?"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(arguments, says, folder, tmp_path, capsys):
    filled = [a.replace("FOLDER", folder).replace("TMP", str(tmp_path)) for a in arguments]
    code, out, err = run(capsys, *filled)
    assert code == 2
    assert says in err
    assert "Traceback" not in err
    assert out == "" or arguments[0] != "demo"  # checks come before any work


def test_help_and_module():
    done = subprocess.run([sys.executable, "-m", "minglm"], capture_output=True, encoding="utf-8")
    assert done.returncode == 0
    for command in "demo generate chat trace routing train eval inspect convert new bench doctor".split():
        assert command in done.stdout


def test_output_is_utf8_under_any_code_page(folder):
    done = subprocess.run(
        [sys.executable, "-m", "minglm", "trace", "--model", folder, "é"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert "─" in done.stdout.decode("utf-8")


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_a_closed_pipe_is_no_error(folder):
    command = f'"{sys.executable}" -m minglm trace --model "{folder}" abc | head -n 1'
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, encoding="utf-8")
    assert "Traceback" not in done.stderr


def test_routing_takes_text_longer_than_any_file_name(folder, tmp_path, capsys):
    text = "你好" * 20 + "x" * 100
    assert run(capsys, "routing", "--model", folder, text, "--save", str(tmp_path / "r"))[0] == 0


def test_a_full_context_does_not_end_the_chat(folder, capsys, monkeypatch):
    """Room is offered where there is some to make: not to a message that is too long by itself."""
    _, alone = talk(capsys, monkeypatch, folder, "x" * 300, "Bye", "/quit")
    assert "(this message takes 305 tokens, more than the context of 256; write less)" in alone
    assert "/clear makes room" not in alone
    _, second = talk(capsys, monkeypatch, folder, "Hi", "x" * 300, "/clear", "Hi")
    assert "more than the context of 256; /clear makes room)" in second
    assert "at most 0" not in alone + second
    _, filled = talk(capsys, monkeypatch, folder, "x" * 240, tokens=128)
    assert "(cut at 11 tokens; the context of 256 is full; /clear makes room)" in filled


def talk(capsys, monkeypatch, folder, *lines, tokens=4, options=()):
    """A chat in which these lines are typed; an exception among them is raised instead."""
    waiting = iter(lines)

    def ask(prompt):
        line = next(waiting, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", ask)
    code, out, err = run(capsys, "chat", "--model", folder, "--tokens", str(tokens), *options)
    assert (code, err) == (0, "")
    return list(waiting), out


def test_ctrl_c_stops_an_answer_and_unknown_commands_are_explained(folder, capsys, monkeypatch):
    real, calls = Model.steps, []

    def steps(self, prompt, *args, **options):
        calls.append(prompt)
        if len(calls) == 2:  # the first is no answer: it checks the options
            raise KeyboardInterrupt
        return real(self, prompt, *args, **options)

    monkeypatch.setattr(Model, "steps", steps)
    _, out = talk(capsys, monkeypatch, folder, "/help", "Hi", "Bye", "/quit")
    assert "(stopped)" in out
    assert out.count("/clear forgets") == 2
    assert len(calls) == 3
    assert "Hi" in calls[1]
    assert "Hi" not in calls[2]


def test_a_first_ctrl_c_clears_the_line_and_a_second_in_a_row_leaves(folder, capsys, monkeypatch):
    stop = KeyboardInterrupt
    left, out = talk(capsys, monkeypatch, folder, stop, "/think", stop, "/think", stop, stop, "/think")
    assert out.count("(with thinking)") == 2
    assert out.count("(/quit or a second Ctrl-C ends it)") == 3
    assert left == ["/think"]


@pytest.mark.parametrize(
    "word", ["/quit", "/exit", "exit", "quit", RuntimeError("input(): lost sys.stdin"), EOFError()]
)
def test_ways_to_leave(folder, capsys, monkeypatch, word):
    assert talk(capsys, monkeypatch, folder, word, "Hi")[0] == ["Hi"]


def test_an_answer_that_was_cut_says_so(folder, capsys, monkeypatch):
    assert "(cut at 4 tokens; --tokens N)" in talk(capsys, monkeypatch, folder, "Hi")[1]
    assert "cut at" not in talk(capsys, monkeypatch, "glm-tiny", "1+2", tokens=60)[1]
    assert "cut at 4 tokens; --tokens N)" in run(capsys, "generate", "--model", folder, "ab", "--tokens", "4")[2]
    prompt = "[gMASK]<sop><|user|>\n1+2/nothink<|assistant|>\n<think></think>"
    assert "float32 weights, stopped by end token)" in run(capsys, "generate", prompt)[2]


def test_thinking_is_told_from_the_answer_where_nothing_is_dimmed(capsys, monkeypatch):
    assert "<think>1+2+0=03</think>\n3\n" in talk(capsys, monkeypatch, "glm-tiny", "1+2", tokens=60)[1]


def test_chat_says_what_the_training_has_not_seen(folder, tmp_path, capsys, monkeypatch):
    """Once a conversation, from the recipe in the folder; where there is none, nothing is known."""
    note = "tokens; this checkpoint was trained on at most 120)"
    lines = ["y" * 130, "z", "/clear", "z", "y" * 130]
    assert note not in talk(capsys, monkeypatch, folder, *lines)[1]
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    (own / "recipe.toml").write_text(
        Recipe("glm-nano", (Stage("one", 2, 2, 120, {"text": 1.0}, learning_rate=1e-3),)).to_toml(), "utf-8"
    )
    said = talk(capsys, monkeypatch, str(own), *lines)[1]
    assert said.count(note) == 2
    assert "It was never trained on conversations" in said
    assert "never trained" not in talk(capsys, monkeypatch, "glm-tiny", "/quit")[1]


def test_weights_are_named_as_they_are_kept(tmp_path, capsys, monkeypatch):
    """And whoever widens few bits without asking for it is told."""
    small = str(tmp_path / "small")
    code, out, _ = run(capsys, "convert", "glm-tiny", small, "--dtype", "fp8")
    assert (code, out) == (0, f"saved {small} and read it back: glm-tiny as fp8, 8.7 MB\n")
    note = "(stored as fp8, widened to float32; --dtype fp8 keeps the codes)"
    command = ("generate", "--model", small, "--tokens", "2", "ab")
    assert f"float32 weights {note}, cut" in run(capsys, *command)[2]
    assert "fp8 weights, cut" in run(capsys, *command, "--dtype", "fp8")[2]
    assert "fp8 weights, 0.0" in run(capsys, *command, "--mmap")[2]
    assert f"\n{note}\n" in talk(capsys, monkeypatch, small)[1]
    kept = talk(capsys, monkeypatch, small, options=("--dtype", "fp8"))[1]
    assert "active, fp8, 6 layers" in kept
    assert "widened" not in kept


def test_a_tool_of_one_s_own_in_the_place_of_another_is_told(folder, tmp_path, capsys, monkeypatch):
    mine = tmp_path / "mine.py"
    mine.write_text("def calculator(expression: str) -> str:\n    return '7'\n")
    said = talk(capsys, monkeypatch, folder, options=("--tools", "calculator", str(mine)))[1]
    assert f"calculator of {mine} takes the place of the one before it." in said
    assert "takes the place" not in talk(capsys, monkeypatch, folder, options=("--tools", str(mine)))[1]


def test_gguf_files_are_written_only_and_q8_0_is_theirs(folder, tmp_path, capsys):
    plain = tmp_path / "plain"
    plain.write_text("precious")
    (tmp_path / "m.gguf").write_text("GGUF")
    for arguments, says in (
        (["inspect", str(tmp_path / "m.gguf")], "GGUF files are written, not read"),
        (["generate", "--model", str(tmp_path / "M.GGUF"), "x"], "GGUF files are written, not read"),
        (["convert", str(tmp_path / "m.gguf"), str(tmp_path / "b")], "GGUF files are written, not read"),
        (["inspect", str(plain)], "is a file; a checkpoint is a folder"),
        (["convert", folder, str(tmp_path / ".gguf"), "--force"], "is an ending without a name"),
        (["convert", folder, str(tmp_path / "b"), "--dtype", "q8_0"], "--dtype q8_0 is for .gguf files"),
        (["convert", folder, str(plain)], "plain is a file, not a folder"),
        (["convert", folder, str(plain), "--force"], "plain is a file, not a folder"),
        (["new", "micro", str(plain), "--force"], "plain is a file, not a folder"),
        (["convert", folder, str(tmp_path / "X.GGUF"), "--dtype", "fp8"], "GGUF file"),
    ):
        code, _, err = run(capsys, *arguments)
        assert (code, says in err) == (2, True), err
    assert plain.read_text() == "precious"


def test_tensors_are_listed_in_the_order_of_walk(folder, capsys):
    out = run(capsys, "inspect", folder, "--tensors")[1]
    names = [line.split()[0] for line in out.splitlines() if line.startswith(("model.", "lm_head."))]
    assert names == [name for name, _ in minglm.walk(minglm.load(folder).params)]
    for kind in ("float16", "fp8-block"):
        assert f"dtype='{kind}'" in out


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--draft-model", "glm-nano"], "--draft-model is given but --draft is 0; .* such as --draft 3"),
        (["--memory", "1"], "--memory bounds what stays of mapped files; give it with --mmap"),
        (["--mmap", "--memory", "inf"], "--memory = inf must be a number of bytes above 0"),
        (["--mmap", "--memory", "nan"], "--memory = nan must be"),
        (["--mmap", "--memory", "1e300"], "--memory = inf must be"),
        (["--mmap", "--memory", "-1"], "--memory = -1000000000.0 must be"),
        (["--mmap", "--dtype", "fp8"], "--dtype fp8: mapped weights stay as the files have them; leave --dtype out"),
        (["--dtype", "float64"], "--engine numpy"),
        (["--tokens", "0"], "--tokens 0 must be a whole number"),
        (["--top-k", "-1"], "--top-k -1 must be"),
    ],
)
def test_errors_speak_in_flags_and_come_first(folder, capsys, command, options, says):
    code, _, err = run(capsys, command, "--model", folder, *(["ab"] if command == "generate" else []), *options)
    assert code == 2
    assert re.search(says, err), err
    assert "='" not in err


def test_the_memory_that_is_said_to_be_enough_is_enough(capsys):
    command = ("generate", "--mmap", "ab", "--tokens", "2", "--memory")
    code, _, err = run(capsys, *command, "0.001")
    assert code == 2
    enough = re.search(r"give at least ([\d.]+) MB", err)
    assert run(capsys, *command, str(float(enough[1]) / 1000))[0] == 0


def test_a_warning_is_one_line(folder, tmp_path, capsys):
    bare = tmp_path / "bare"
    minglm.load(folder).save(bare)
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    model = minglm.load(folder)
    without = Model(model.config.replace(num_nextn_predict_layers=0), model.params._replace(mtp=()), model.tokenizer)
    without.save(bare)
    (bare / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    code, _, err = run(capsys, "generate", "--model", str(bare), "ab", "--tokens", "2")
    assert code == 0
    assert [line[:8] for line in err.splitlines()] == ["minglm: ", "(2 token"]
    assert "the weights have none; loaded without" in err


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_the_shell_has_closed(folder, closed):
    command = f'"{sys.executable}" -m minglm chat --model "{folder}" --tokens 2 {closed}'
    done = subprocess.run(["bash", "-c", command], input="Hi\n", capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_while_things_are_imported(monkeypatch, capsys):
    from minglm.__main__ import main as command

    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("minglm.cli.main", interrupted)
    assert command() == 130
    assert capsys.readouterr().err == "\nminglm: interrupted\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_nothing_of_another_model_is_written_over_unasked(tmp_path, capsys, name):
    (tmp_path / name).write_text("precious")
    for command in (["convert", "glm-nano"], ["new", "micro"]):
        assert main([*command, str(tmp_path)]) == 2
        assert f"holds a model already ({name}); --force writes over it" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "precious"
