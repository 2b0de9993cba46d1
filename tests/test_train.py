"""Training: the optimiser against a scalar twin, and a run that continues bit for bit wherever it was cut."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

import minglm
from minglm.api import Model
from minglm.data.batches import Batch
from minglm.fast.team import cores
from minglm.formats.files import only_one, write_text
from minglm.model import shift_targets
from minglm.model.params import map_arrays, walk_stacked
from minglm.train import folder, loop
from minglm.train.folder import newest_checkpoint, newest_state
from minglm.train.loop import EARLY, train
from minglm.train.optim import AdamW, clip, decays, global_norm
from minglm.train.recipe import Recipe, Stage
from minglm.train.schedule import warmup_cosine
from minglm.train.step import DivergedError, start, train_step
from tests.variants import MICRO, random_params

FIRST = Stage("first", 7, 2, 9, {}, learning_rate=3e-3, final_rate=3e-4, warmup=3, bias_rate=0.05)
SECOND = Stage("second", 5, 2, 9, {}, rope_theta=500.0, mtp_weight=0.1, bias_rate=0.0)
RECIPE = Recipe("micro", (FIRST, SECOND), engine="numpy", log_every=1, eval_every=5, save_every=4)
ADAMW = replace(RECIPE, optimiser="adamw")


def with_stage(recipe: Recipe, **changes) -> Recipe:
    """The recipe with its first stage changed, and no other."""
    return replace(recipe, stages=(replace(recipe.stages[0], **changes),))


class Batches:
    """Random tokens, two documents and some padding in each row; a pure function of the step."""

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng([7, step])
        ids = rng.integers(0, MICRO.vocab_size, (2, 9))
        segments = np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1], [-1, -1, 0, 0, 0, 0, 0, 0, 0]])
        return Batch(ids, shift_targets(ids, segments), segments)


def bits(model: Model) -> list[bytes]:
    return [array.tobytes() for _, array in walk_stacked(model.params)]


@pytest.fixture
def model():
    return Model(MICRO, random_params(MICRO, 1))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole")
    trained = train(Model(MICRO, random_params(MICRO, 1)), RECIPE, Batches(), run, progress=False)
    return bits(trained), (run / "metrics.jsonl").read_text()


# -- the optimiser -----------------------------------------------------------------------------------------------


def adamw_by_hand(p, gradients, rate, decay, b1=0.9, b2=0.95, eps=1e-8):
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p - rate * decay * p
        p = p - rate * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)
    return p


def test_adamw_is_the_textbook_one(model):
    params = random_params(MICRO, 1, np.float64)
    optimiser = AdamW.start(params, weight_decay=0.2)
    before = dict(walk_stacked(params))
    gradients = [random_params(MICRO, seed, np.float64) for seed in (2, 3, 4)]
    for grads in gradients:
        params, optimiser = optimiser.update(params, grads, 0.01)
    assert optimiser.step == 3
    histories = [dict(walk_stacked(g)) for g in gradients]
    for name, array in walk_stacked(params):
        place = tuple(s // 2 for s in array.shape)
        decay = 0.2 if decays(name) else 0.0
        if name.endswith("e_score_correction_bias"):
            assert (array == before[name]).all()
        else:
            wanted = adamw_by_hand(before[name][place], [h[name][place] for h in histories], 0.01, decay)
            assert array[place] == pytest.approx(wanted, rel=1e-12)


def test_what_decays():
    names = {name for name, _ in walk_stacked(random_params(MICRO, 0))}
    kept = {name for name in names if not decays(name)}
    assert kept == {n for n in names if "norm" in n.rsplit(".", 2)[-2] or n.endswith("bias") or "embed_tokens" in n}
    assert decays("lm_head.weight")
    assert decays("model.layers.1.mlp.gate.weight")
    assert not decays("model.layers.3.shared_head.norm.weight")


def test_an_update_changes_nothing_in_place(model):
    before = bits(model)
    grads = random_params(MICRO, 2)
    AdamW.start(model.params).update(model.params, grads, 0.1)
    assert bits(model) == before


def test_clipping_scales_the_whole_gradient():
    grads = random_params(MICRO, 5, np.float64)
    norm = global_norm(grads)
    assert norm == pytest.approx(math.sqrt(sum((a**2).sum() for _, a in walk_stacked(grads))))
    clipped = clip(grads, norm, norm / 7)
    assert global_norm(clipped) == pytest.approx(norm / 7)
    assert clip(grads, norm, norm * 2) is grads


def test_schedule():
    rates = [warmup_cosine(s, 100, 10, 1.0, 0.1) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert warmup_cosine(0, 1, 0, 1.0, 0.1) == 1.0


# -- one step ----------------------------------------------------------------------------------------------------


def test_a_step_lowers_the_loss_and_moves_the_biases_by_the_sign_of_the_load(model):
    recipe = with_stage(replace(ADAMW, weight_decay=0.0), learning_rate=1e-3, warmup=1, bias_rate=0.25)
    batch, state = Batches().batch(0), start(model, recipe)
    losses = []
    for _ in range(5):
        before = dict(walk_stacked(state.params))
        state, metrics = train_step(state, batch, model, recipe)
        losses.append(metrics.loss)
        for layer, load in metrics.load.items():
            name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
            moved = dict(walk_stacked(state.params))[name] - before[name]
            np.testing.assert_allclose(moved, 0.25 * np.sign(np.mean(load) - load), atol=1e-6)
            assert metrics.max_violation[layer] == pytest.approx(max(load) / np.mean(load) - 1, abs=1e-4)
            assert metrics.bias[layer] == pytest.approx(dict(walk_stacked(state.params))[name], abs=1e-5)
    assert losses[-1] < losses[0]
    assert set(metrics.load) == {1, 2, 3, 4}
    valid = (batch.segments >= 0).sum()
    assert sum(metrics.load[1]) == valid * MICRO.num_experts_per_tok


# -- runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 4, 5, 7, 8, 11])
def test_resuming_gives_the_same_bits(cut, uninterrupted, tmp_path):
    """Cut after any step, on or between checkpoints, at the end of a stage: same weights, same metrics."""
    train(Model(MICRO, random_params(MICRO, 1)), RECIPE, Batches(), tmp_path, stop_after=cut, progress=False)
    resumed = train(Model(MICRO, random_params(MICRO, 1)), RECIPE, Batches(), tmp_path, progress=False)
    weights, metrics = uninterrupted
    assert bits(resumed) == weights
    assert (tmp_path / "metrics.jsonl").read_text() == metrics


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_while_it_runs(times, uninterrupted, tmp_path):
    """kill −9 at random moments, in the middle of saving too; then the run goes on to the same bits. The long one has
    as many runs as kills, each killed at another moment."""
    for number in range(1 if times == 3 else times):
        run = tmp_path / str(number)
        kill_while_it_trains(run, times if times == 3 else 1)
        finished = train(Model(MICRO, random_params(MICRO, 1)), RECIPE, Batches(), run, progress=False)
        assert bits(finished) == uninterrupted[0]
        assert (run / "metrics.jsonl").read_text() == uninterrupted[1]


def kill_while_it_trains(run, times):
    script = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {os.getcwd()!r})
        from pathlib import Path
        from tests.test_train import *
        slow = Batches()
        real = slow.batch
        slow.batch = lambda step: (time.sleep(0.02), real(step))[1]
        print("ready", flush=True)
        train(Model(MICRO, random_params(MICRO, 1)), RECIPE, slow, Path({str(run)!r}), progress=False)
    """)
    rng = np.random.default_rng()
    for _ in range(times):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        process.wait()
        process.stdout.close()


def test_a_checkpoint_of_a_run_is_a_model_folder(tmp_path, model):
    trained = train(model, RECIPE, Batches(), tmp_path, progress=False)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "checkpoint-000012"
    assert bits(minglm.load(newest)) == bits(trained)
    assert minglm.load(newest).config.rope_theta == 500.0  # the last stage's
    assert len(list(tmp_path.glob("checkpoint-*"))) == folder.KEPT
    assert newest_state(tmp_path, RECIPE).step == 12


def test_a_finished_run_is_not_run_again(tmp_path, model):
    first = train(model, RECIPE, Batches(), tmp_path, progress=False)
    lines = (tmp_path / "metrics.jsonl").read_text()
    again = train(model, RECIPE, Batches(), tmp_path, progress=False)
    assert bits(first) == bits(again)
    assert (tmp_path / "metrics.jsonl").read_text() == lines


def test_evaluation_is_logged(tmp_path, model):
    seen = []

    def observe(model, step):
        written = (tmp_path / "metrics.jsonl").read_text().splitlines()
        seen.append((step, json.loads(written[-1])["step"], model.config.rope_theta))
        return {"held_out": 1.5} if step > 1 else {}

    train(model, RECIPE, Batches(), tmp_path, observe, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "held_out" in line] == [4, 9, 11]
    assert EARLY[:2] == (1, 10)
    assert seen == [(1, 0, 100.0), (5, 4, 100.0), (10, 9, 500.0), (12, 11, 500.0)]


def test_another_recipe_in_the_same_folder_is_refused(tmp_path, model):
    train(model, RECIPE, Batches(), tmp_path, stop_after=1, progress=False)
    with pytest.raises(ValueError, match="another recipe"):
        train(model, replace(RECIPE, seed=5), Batches(), tmp_path, progress=False)


def test_a_loss_far_beyond_a_blind_guess_is_divergence(model):
    wild = map_arrays(lambda n, a: a * 40 if n == "lm_head.weight" else a, model.params)
    with pytest.raises(DivergedError, match=r"step 0: loss .*, where guessing blindly would give 4\.11"):
        train_step(start(Model(MICRO, wild), RECIPE), Batches().batch(0), model, RECIPE)


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path, model):
    train(model, RECIPE, Batches(), tmp_path, stop_after=4, progress=False)

    good = bits(minglm.load(newest_checkpoint(tmp_path)))
    broken = map_arrays(lambda n, a: np.full_like(a, np.nan), model.params)
    with pytest.raises(DivergedError, match=r"step 0: loss nan"):
        train_step(start(Model(MICRO, broken), RECIPE), Batches().batch(0), model, RECIPE)

    def diverge(*args, **kwargs):
        raise DivergedError("step 6: loss nan, gradient norm nan")

    original, loop.train_step = loop.train_step, diverge
    try:
        with pytest.raises(DivergedError, match=r"step 6.*checkpoint-000004"):
            train(model, RECIPE, Batches(), tmp_path, progress=False)
    finally:
        loop.train_step = original
    assert bits(minglm.load(newest_checkpoint(tmp_path))) == good


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, model, monkeypatch):
    train(model, RECIPE, Batches(), tmp_path, stop_after=4, progress=False)
    good = bits(minglm.load(newest_checkpoint(tmp_path)))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minglm.formats.tensors.save_file", full)
    with pytest.raises(OSError, match="No space"):
        train(model, RECIPE, Batches(), tmp_path, progress=False)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path).name == "checkpoint-000004"
    assert bits(minglm.load(newest_checkpoint(tmp_path))) == good


# -- what went wrong once ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_a_diverged_model_is_never_saved(tmp_path, model):
    """The loss is finite, the update is not: nothing of it may reach a checkpoint, the last step's included."""
    for steps in (1, 6):
        wild = with_stage(replace(ADAMW, save_every=1), steps=steps, learning_rate=1e39, final_rate=1e39, warmup=1)
        with pytest.raises(
            DivergedError, match=r"step 0: the update would make .* NaN or infinite; lower the learning rate$"
        ):
            train(model, wild, Batches(), tmp_path / str(steps), progress=False)
        assert newest_checkpoint(tmp_path / str(steps)) is None


def test_one_process_at_a_time(tmp_path, model):
    with only_one(tmp_path), pytest.raises(OSError, match="another process is working here"):
        train(model, RECIPE, Batches(), tmp_path, progress=False)
    train(model, RECIPE, Batches(), tmp_path, stop_after=1, progress=False)  # and it is let go


def test_old_checkpoints_lose_their_name_before_their_files(tmp_path, model, monkeypatch):
    """Who is killed while one is removed must not leave half of it under its name."""
    removed = []
    monkeypatch.setattr(folder.shutil, "rmtree", lambda path, **options: removed.append(path.name))
    train(model, replace(RECIPE, save_every=2), Batches(), tmp_path, progress=False)
    assert {*removed} == {"unfinished"}


@pytest.mark.parametrize("step", ['"4"', "null", "4", "true", "NaN"])
def test_a_state_of_another_step_is_refused(step, tmp_path, model):
    for steps in (4, 4):
        train(model, RECIPE, Batches(), tmp_path, stop_after=steps, progress=False)
    (newest_checkpoint(tmp_path) / "state.json").write_text(f'{{"step": {step}}}')
    message = (
        r"tells of step .*Without checkpoint-000008, if you remove that folder, the run goes on from checkpoint-000004"
    )
    with pytest.raises(ValueError, match=message):
        newest_state(tmp_path, RECIPE)


@pytest.mark.parametrize("damage", ["optimiser.safetensors", "state.json"])
def test_damaged_state_is_named(damage, tmp_path, model):
    train(model, RECIPE, Batches(), tmp_path, stop_after=4, progress=False)
    (newest_checkpoint(tmp_path) / damage).write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"checkpoint-000004: its optimiser state cannot be read"):
        train(model, RECIPE, Batches(), tmp_path, progress=False)


def test_other_folders_and_damaged_lines_are_no_obstacle(tmp_path, uninterrupted):
    train(Model(MICRO, random_params(MICRO, 1)), RECIPE, Batches(), tmp_path, stop_after=5, progress=False)
    (tmp_path / "checkpoint-backup").mkdir()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("garbage\n")
    resumed = train(Model(MICRO, random_params(MICRO, 1)), RECIPE, Batches(), tmp_path, progress=False)
    assert bits(resumed) == uninterrupted[0]
    assert (tmp_path / "metrics.jsonl").read_text() == uninterrupted[1]


def test_a_killed_first_write_leaves_no_half_file(tmp_path, monkeypatch):
    path = tmp_path / "recipe.json"
    write_text(path, "old")
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.json"]
    assert path.read_text() == "old"


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("engine", ["numpy", "fast"])
def test_ctrl_c_in_a_step_saves_after_it_and_the_run_goes_on(engine, tmp_path, monkeypatch):
    recipe = replace(ADAMW, engine=engine)
    whole = train(Model(MICRO, random_params(MICRO, 1)), recipe, Batches(), tmp_path / "whole", progress=False)

    real = loop.train_step

    def interrupted(state, *given):
        if state.step == 5:
            ctrl_c()
        return real(state, *given)

    monkeypatch.setattr(loop, "train_step", interrupted)
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(Model(MICRO, random_params(MICRO, 1)), recipe, Batches(), run, progress=False)
    assert newest_checkpoint(run).name == "checkpoint-000006"
    monkeypatch.undo()
    resumed = train(Model(MICRO, random_params(MICRO, 1)), recipe, Batches(), run, progress=False)
    assert bits(resumed) == bits(whole)
    assert (run / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_ctrl_c_in_an_evaluation_or_a_save_is_noted_too(tmp_path, monkeypatch):
    def observe(model, step):
        if step == 5:
            ctrl_c()
        return {}

    with pytest.raises(KeyboardInterrupt):
        train(Model(MICRO, random_params(MICRO, 1)), RECIPE, Batches(), tmp_path / "a", observe, progress=False)
    assert newest_checkpoint(tmp_path / "a").name == "checkpoint-000005"

    real = loop.save_state
    monkeypatch.setattr(loop, "save_state", lambda *a: (ctrl_c(), real(*a)))
    with pytest.raises(KeyboardInterrupt):
        train(Model(MICRO, random_params(MICRO, 1)), RECIPE, Batches(), tmp_path / "b", progress=False)
    assert newest_checkpoint(tmp_path / "b").name == "checkpoint-000004"


def test_the_second_ctrl_c_breaks_in(tmp_path):
    class Twice(Batches):
        def batch(self, step):
            if step == 6:
                ctrl_c()
                ctrl_c()
            return super().batch(step)

    with pytest.raises(KeyboardInterrupt):
        train(Model(MICRO, random_params(MICRO, 1)), RECIPE, Twice(), tmp_path, progress=False)
    assert newest_checkpoint(tmp_path).name == "checkpoint-000004"


def test_the_fast_engine_trains_as_the_book_does_and_on_any_number_of_threads(tmp_path):
    runs = {}
    for name, engine, threads in (("book", "numpy", None), ("one", "fast", 1), ("more", "fast", min(3, cores()))):
        given = Model(MICRO, random_params(MICRO, 1))
        before = bits(given)
        recipe = replace(RECIPE, engine=engine)
        runs[name] = train(given, recipe, Batches(), tmp_path / name, progress=False, threads=threads)
        assert bits(given) == before  # the update in place is on copies
    assert bits(runs["one"]) == bits(runs["more"])
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("book", "one")]
    for book, fast in zip(*lines, strict=True):
        assert json.loads(fast)["loss"] == pytest.approx(json.loads(book)["loss"], rel=1e-4)


def test_ctrl_c_on_a_checkpoint_leaves_it_alone(tmp_path, model, monkeypatch):
    """It would only be written again, with a moment in between at which it is gone."""

    class Interrupted(Batches):
        def batch(self, step):
            if step == 3:
                ctrl_c()
            return super().batch(step)

    removed = []
    real = folder.shutil.rmtree
    monkeypatch.setattr(folder.shutil, "rmtree", lambda path, **k: (removed.append(path.name), real(path, **k)))
    with pytest.raises(KeyboardInterrupt):
        train(model, RECIPE, Interrupted(), tmp_path, progress=False)
    assert newest_checkpoint(tmp_path).name == "checkpoint-000004"
    assert removed == ["unfinished"]
