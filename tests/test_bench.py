"""The benchmark: shapes, arithmetic, workers, what is left out. Nothing here asserts a timing."""

import json
import sys
import types

import numpy as np
import pytest

import minglm
from minglm.bench import compare, doctor, goals, large, machine, processes, run_machine
from minglm.bench.compare import Settings, memory_needed, roofline_points, takes_part, write_json, write_plot
from minglm.bench.job import Job, median_seconds, prompt_ids
from minglm.bench.processes import Subject, WorkerError, measure, subjects
from minglm.bench.shapes import SHAPES, Shape, Work, quick_params, unit_bytes, unit_operations, write_weights
from minglm.bench.worker import run
from minglm.cli import main
from minglm.config import PRESETS
from minglm.formats.memory import in_bytes
from minglm.look.plots import plot_roofline
from minglm.model.params import walk

MICRO = PRESETS["micro"].replace(num_nextn_predict_layers=0)
TINY = Shape("tiny", MICRO, (Work("decode", "float32", 6, 8), Work("prefill", "float32", 9, 2)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "micro"
    write_weights(path, MICRO, "float32")
    return str(path)


def job(folder, subject="minglm", work="decode", **more):
    return Job(**{
        "subject": subject, "folder": folder, "work": work, "dtype": "float32", "prompt": 6, "units": 3,
        "budget": 0.0, "vocab_size": MICRO.vocab_size, **more,
    })  # fmt: skip


# -- shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "millions"), [("S", 15.7), ("M", 876), ("air", 4994)])
def test_shapes_have_the_parameters_that_were_agreed(name, millions):
    assert SHAPES[name].config.count_parameters().total / 1e6 == pytest.approx(millions, rel=2e-3)


def test_shapes_differ_in_what_the_issue_says_and_share_the_rest():
    for shape in SHAPES.values():
        c = shape.config
        assert (c.n_shared_experts, c.attention_bias, c.partial_rotary_factor) == (1, True, 0.5)
        assert c.use_qk_norm == (shape.name != "air")
        assert max([0, *(max(w.contexts, default=0) for w in shape.works)]) < c.max_position_embeddings


def test_every_goal_belongs_to_a_work_that_is_measured_against_that_subject():
    works = {(s.name, w.name, w.dtype): w for s in SHAPES.values() for w in s.works}
    for key, wanted in goals.GOALS.items():
        assert all(takes_part(subject, key[0], works[key]) for subject in wanted if subject != "straight line"), key


def test_quick_weights_are_the_same_numbers_in_every_dtype_and_leave_nothing_at_zero():
    exact, rounded = dict(walk(quick_params(MICRO))), dict(walk(quick_params(MICRO, "bfloat16")))
    for name, array in exact.items():
        assert array.std() > 0
        np.testing.assert_allclose(rounded[name].astype(np.float32), array, rtol=2**-8)
    first, second = (exact[f"model.layers.1.mlp.experts.{e}.up_proj.weight"] for e in (0, 1))
    assert not np.array_equal(first, second)


def test_bytes_and_operations_of_a_unit_by_hand():
    c, decode = SHAPES["S"].config, SHAPES["S"].works[0]
    counts = c.count_parameters()
    assert unit_bytes(c, decode, keys=10) == 4 * counts.active + 10 * 2 * 8 * 2 * 32 * 4
    head = c.vocab_size * c.hidden_size
    prefill = Work("prefill", "float32", 2, 1)
    assert unit_operations(c, prefill) == 2 * (2 * counts.trunk_active + 4 * 8 * 32 * 8) + 2 * head
    assert unit_operations(c, Work("train", "float32", 2, 1, rows=3)) == 3 * 6 * c.flops_per_token(1)


# -- arithmetic --------------------------------------------------------------------------------------------------


def test_medians_are_taken_over_rounds_for_each_variant_and_point():
    rounds = [{"a": {"unit": s}, "b": {"unit": 10 * s}} for s in (3.0, 1.0, 2.0)]
    assert goals.median_of_rounds(rounds) == {"a": {"unit": 2.0}, "b": {"unit": 20.0}}


def test_rows_compare_with_the_best_variant_and_know_their_goals():
    found = {
        "minglm": {"": {"unit": 0.001}},
        "torch": {"eager": {"unit": 0.02}, "grouped_mm": {"unit": 0.014}},
        "llama.cpp": {"": {"unit": 0.002}},
        "bandwidth": {"": {"byte": 1e-11}},
    }
    config, work = SHAPES["M"].config, SHAPES["M"].works[0]
    rows = {row.against: row for row in goals.rows("M", config, work, found)}
    torch, llama, reading = rows["torch (grouped_mm)"], rows["llama.cpp"], rows["bandwidth"]
    assert (torch.ratio, torch.goal, torch.met) == (pytest.approx(14), 4, True)
    assert (llama.ratio, llama.goal) == (pytest.approx(2), 1.15)
    keys = work.prompt + work.units // 2
    assert reading.ratio == pytest.approx(1e-11 * unit_bytes(config, work, keys) / 0.001)
    assert torch.cells()[1:4] == ("1,000 tok/s", "torch (grouped_mm)", "71.4 tok/s")


def test_a_missed_goal_and_one_that_does_not_exist():
    assert not goals.Row("w", "", "torch", "", 1.2, 1.5).met
    assert goals.Row("w", "", "torch", "", 1.2, None).met is None
    assert goals.Row("w", "", "torch", "", 1.2, 1.5).cells()[-3:] == ("1.2", "≥ 1.5", "not met")


def test_growth_is_the_slope_over_keys_and_how_straight_it_is():
    line = {str(keys): 1e-3 + 2e-9 * keys for keys in (64, 1024, 8192)}
    assert goals.slope(line).seconds == pytest.approx(2e-9)
    assert goals.slope(line).straightness == pytest.approx(1)
    assert goals.slope({"0": 1.0, "1": 5.0, "2": 2.0}).straightness < 0.5
    assert np.isnan(goals._ratio(-1e-9, 1e-9))
    work = SHAPES["S"].works[-1]
    found = {"minglm": {"": line}, "torch": {"eager": {k: 2 * s for k, s in line.items()}}}
    rows = list(goals.rows("S", SHAPES["S"].config, work, found))
    assert [(row.against, round(row.ratio, 6), row.met) for row in rows] == [
        ("torch (eager)", 2.0, True), ("straight line", 1.0, True),
    ]  # fmt: skip


def test_nothing_is_compared_when_ours_did_not_run():
    found = {"torch": {"eager": {"unit": 1.0}}}
    assert not list(goals.rows("S", SHAPES["S"].config, SHAPES["S"].works[0], found))


def test_start_rows_hold_seconds_against_their_limits():
    rows = list(goals.start_rows({"import minglm": 0.1, "first token, kernels cached": 2.0}))
    assert [(row.ratio, row.met) for row in rows] == [(2.0, True), (0.5, False)]


def test_median_seconds_stops_when_the_time_is_up_but_not_before_three():
    calls = []
    median_seconds(lambda: calls.append(1), 100, budget=0.0)
    assert len(calls) == 4  # one uncounted, three timed
    calls.clear()
    median_seconds(lambda: calls.append(1), 10, budget=60.0, uncounted=2)
    assert len(calls) == 12


# -- doctor ------------------------------------------------------------------------------------------------------


def test_doctor_prints_every_line(capsys):
    doctor.doctor(megabytes=0.1, size=16)
    out = capsys.readouterr().out
    for line in (
        "numpy", "scipy", "numba", "BLAS", "compiled kernels", "processor", "features", "largest cache", "free memory",
        "cores", "MINGLM_THREADS", "threads for decoding", "float32, 1 thread", "bfloat16, 1 thread", "NumPy float32",
    ):  # fmt: skip
        assert line in out


def test_doctor_tells_a_wrong_thread_count_instead_of_failing(capsys, monkeypatch):
    monkeypatch.setenv("MINGLM_THREADS", "many")
    doctor.doctor(megabytes=0.1, size=16)
    assert "MINGLM_THREADS = 'many' must be a whole number" in capsys.readouterr().out


def test_doctor_where_the_system_tells_nothing_and_nothing_can_be_kept(capsys, monkeypatch):
    monkeypatch.setattr(machine, "largest_cache", lambda: None)
    monkeypatch.setattr(machine, "free_memory", lambda: None)
    monkeypatch.setattr(machine, "cache_folder", lambda: None)
    doctor.doctor(megabytes=0.1, size=16)
    out = capsys.readouterr().out
    assert out.count("not told by the system") == 2
    assert "nowhere to keep them" in out


def test_reading_sums_the_whole_matrix(monkeypatch):
    from minglm.fast import measure as measuring

    kept, team = {}, measuring.team

    class Team:
        def run(self, kernel, weight, x, rows, found):
            kept["rows"] = len(weight)
            team(1).run(kernel, weight, x, rows, found)
            kept["last"] = found[0, 0, 0]

    monkeypatch.setattr(measuring, "team", lambda threads: Team())
    assert measuring.read_bandwidth(0.1, 1, runs=1) > 0
    assert kept == {"rows": 100_000 // 4 // measuring.COLUMNS, "last": measuring.COLUMNS}


# -- workers -----------------------------------------------------------------------------------------------------


def test_a_worker_measures_each_work_of_minglm(folder, tmp_path):
    decode = run(job(folder, logits=str(tmp_path / "scores.npy")))
    assert decode["seconds"][""]["unit"] > 0
    wanted = minglm.load(folder).forward(prompt_ids(job(folder))[None]).logits[0, -1]
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert run(job(folder, work="prefill"))["seconds"][""]["unit"] > 0
    assert run(job(folder, work="train", rows=2))["seconds"][""]["unit"] > 0
    growth = run(job(folder, work="growth", contexts=(4, 12)))["seconds"][""]
    assert list(growth) == ["4", "12"]


def test_the_machine_s_own_limits(folder, monkeypatch):
    monkeypatch.setattr(run_machine, "matrix_megabytes", lambda: 0.1)
    assert run(job(folder, "bandwidth"))["seconds"][""]["byte"] > 0
    for work in ("prefill", "train"):
        assert run(job(folder, "products", work))["seconds"][""]["unit"] > 0


def test_bare_products_are_those_of_the_model(folder):
    model = minglm.load(folder)
    N = 16
    done = sum(2 * weight.size * rows for weight, rows in run_machine._products(model, N, N))
    c = model.config
    counts = c.count_parameters()
    vectors = counts.trunk_active + c.vocab_size * c.hidden_size - done / (2 * N)
    norms_and_biases = (
        c.hidden_size * (2 * c.num_hidden_layers + 1)
        + c.num_hidden_layers * c.head_dim * (c.num_attention_heads + 2 * c.num_key_value_heads + 2)
        + 2 * c.n_routed_experts
    )
    assert vectors == norms_and_biases


def test_a_worker_in_its_own_process_answers_and_says_why_it_cannot(folder):
    answer = measure(Subject("minglm", sys.executable), job(folder))
    assert set(answer) == {"seconds", "left_out", "peak_bytes"}
    with pytest.raises(WorkerError, match=r"subject = 'nobody' must be one of minglm"):
        measure(Subject("nobody", sys.executable), job(folder, "nobody"))


def test_what_an_interpreter_with_llama_cpp_alone_reads_needs_numpy_only():
    code = """
import sys
before = set(sys.modules)
import minglm.bench.worker, minglm.bench.job
heavy = {"numba", "scipy", "safetensors", "ml_dtypes", "threadpoolctl", "tqdm", "jinja2"}
print(sorted(heavy & set(sys.modules)))
"""
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=processes.PACKAGE.parent)
    assert done.stdout.strip() == "[]", done.stderr


# -- who takes part ----------------------------------------------------------------------------------------------


def test_what_is_not_installed_is_left_out_with_a_line_on_how_to_install_it(monkeypatch):
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    found = {s.name: s.missing for s in subjects(["torch", "llama.cpp"])}
    assert found["minglm"] == ""
    assert found["torch"] == "torch, transformers missing: in minglm's folder, pip install -e '.[bench]'"
    assert "gguf missing: in minglm's folder, pip install" in found["llama.cpp"]


def test_an_interpreter_without_llama_cpp_and_one_that_is_not_there(monkeypatch):
    monkeypatch.setattr(processes, "find_spec", lambda name: object())
    monkeypatch.setattr(processes.subprocess, "run", lambda *a, **k: types.SimpleNamespace(returncode=1))
    assert "llama_cpp missing" in subjects(["llama.cpp"])[1].missing
    monkeypatch.undo()
    monkeypatch.setattr(processes, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match=r"--llama-python /nowhere cannot be started"):
        subjects(["llama.cpp"], "/nowhere")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--shape", "L"], "--shape L: not there; take S, M, air"),
        (["--shape", "S", "--against", "jax"], "--against jax: not there; take torch, torch.compile, llama.cpp"),
        (["--shape", "S", "--only", "decoding"], "--only decoding: not there; take decode"),
        (["--shape", ","], "--shape is empty"),
        (["--shape", "S", "--rounds", "0"], "--rounds 0 must be 1 or more"),
        (["--shape", "S", "--folder", "/nowhere"], "--folder /nowhere: no such folder"),
    ],
)
def test_wrong_options_are_named(options, complaint, capsys):
    assert main(["bench", *options]) == 2
    assert complaint in capsys.readouterr().err


def test_several_names_all_and_none():
    settings = Settings.read("S,M", "none", "all", 1, sys.executable, None)
    assert [shape.name for shape in settings.shapes] == ["S", "M"]
    assert settings.against == []
    assert settings.works == list(compare.WORKS)


# -- a run -------------------------------------------------------------------------------------------------------


class Fake:
    """In place of worker processes: who was asked for what, in which order, and made-up seconds."""

    def __init__(self, fails=()):
        self.asked, self.fails = [], fails

    def __call__(self, subject, job):
        self.asked.append((job.work, subject.name))
        if (job.work, subject.name) in self.fails:
            raise WorkerError("no luck")
        if job.logits:
            np.save(job.logits, np.ones(4, np.float32) * (2 if subject.name == "torch" else 1))
        point = "byte" if subject.name == "bandwidth" else "unit"
        return {"seconds": {"": {point: 0.5}}, "left_out": {"slow": "too large"} if subject.name == "torch" else {}}


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    monkeypatch.setattr(compare, "measure", fake)
    monkeypatch.setattr(compare, "measure_start", lambda: {"import minglm": 0.1})
    monkeypatch.setattr(compare, "_elsewhere", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(compare, "_machine", lambda: {
        "processor": "test", "cores": 1, "bandwidths": {"float32, 1 thread": 1e10}, "product_rate": 1e11,
    })  # fmt: skip
    monkeypatch.setattr(compare, "subjects", lambda against, python: [Subject(n, "") for n in ("minglm", *against)])
    return fake


def settings(*works, shape=TINY, rounds=2):
    return Settings([shape], list(works), ["torch"], rounds)


def test_subjects_take_turns_and_everything_is_kept(fake, tmp_path):
    said = []
    result = compare.compare(settings("decode", "prefill", "start"), said.append)
    turn = [("decode", name) for name in ("minglm", "torch", "bandwidth")]
    assert fake.asked == [*turn, *turn, *([("prefill", name) for name in ("minglm", "torch", "products")] * 2)]
    assert [row.against for row in result.rows] == ["torch", "bandwidth", "torch", "products", "limit"]
    assert result.works[0]["scores_differ"] == {"torch": 1.0}
    assert any("torch's scores differ from minglm's by 1.0e+00" in line for line in said)
    assert "tiny decode float32, torch (slow) left out: too large" in said
    write_json(result, tmp_path / "all.json")
    kept = json.loads((tmp_path / "all.json").read_text("utf-8"))
    assert len(kept["works"][0]["answers"]["minglm"]) == 2
    assert kept["rows"][0]["ratio"] == 1
    write_plot(result, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").stat().st_size > 5000


def test_a_busy_machine_is_told(fake, monkeypatch):
    monkeypatch.setattr(machine, "load", lambda: 3.0)
    assert "busy (load 3.0" in compare.compare(settings("decode"), lambda line: None).notes[0]
    monkeypatch.setattr(machine, "load", lambda: None)
    assert not any("busy" in note for note in compare.compare(settings("decode"), lambda line: None).notes)


def test_who_fails_is_left_out_with_the_reason_and_not_asked_again(fake):
    fake.fails = {("decode", "torch")}
    result = compare.compare(settings("decode"), lambda line: None)
    assert fake.asked.count(("decode", "torch")) == 1
    assert "tiny decode float32, torch left out: no luck" in result.notes
    assert [row.against for row in result.rows] == ["bandwidth"]


def test_what_does_not_fit_is_left_out_before_anything_is_written(fake, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 1_000_000)
    result = compare.compare(settings("decode"), lambda line: None)
    assert not fake.asked
    assert "tiny decode float32 left out: it takes about 1.5 GB of memory, 0.0 GB are free" in result.notes
    monkeypatch.setattr(machine, "free_memory", lambda: None)
    monkeypatch.setattr(compare.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10))
    result = compare.compare(settings("decode"), lambda line: None)
    assert not fake.asked
    assert "name another place with --folder" in result.notes[-1]


def test_training_m_wants_what_it_needs():
    works = {work.name: work for work in SHAPES["M"].works if work.dtype == "float32"}
    assert 14e9 < memory_needed(SHAPES["M"], works["train"]) < 20e9


def test_an_interrupted_run_keeps_what_it_has(fake, monkeypatch):
    def interrupted(rounds, result):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "_measure_start", interrupted)
    result = compare.compare(settings("decode", "start"), lambda line: None)
    assert len(result.rows) == 2
    assert "interrupted" in result.notes[-1]


def test_the_files_are_gone_afterwards(fake, tmp_path):
    compare.compare(settings("decode")._replace(folder=str(tmp_path)), lambda line: None)
    assert not list(tmp_path.iterdir())


# -- the plot ----------------------------------------------------------------------------------------------------


def test_the_roofline_names_its_subjects_axes_and_works(fake):
    result = compare.compare(settings("decode", "prefill"), lambda line: None)
    points = roofline_points(result)
    assert [point[:2] for point in points][:2] == [("tiny decode float32", "minglm"), ("tiny decode float32", "torch")]
    figure = plot_roofline(points, 30.0, 200.0, "a machine")
    ax = figure.axes[0]
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["reading 30 GB/s, products 200 GFLOP/s", "minglm", "torch", "products"]
    assert "FLOP per byte" in ax.get_xlabel()
    texts = [text.get_text() for text in ax.texts]
    assert "A  tiny decode float32\nB  tiny prefill 9 float32" in texts
    assert texts.count("A") == 2
    with pytest.raises(ValueError, match="no work was measured"):
        plot_roofline([], 30.0, 200.0)


def test_what_a_round_costs_on_random_weights(monkeypatch, capsys):
    from minglm.bench import drafts

    monkeypatch.setattr(drafts, "TURNS", 1)
    monkeypatch.setitem(
        drafts.SHAPES, "S", drafts.SHAPES["S"]._replace(config=MICRO.replace(max_position_embeddings=128))
    )
    rows = list(drafts.costs("S", "float32", most=2, threads=1))
    assert [row.drafts for row in rows] == [1, 2]
    for row in rows:
        assert row.draft_ms + row.check_ms <= 1.5 * row.round_ms
        assert row.pays_from == pytest.approx(row.round_ms / row.plain_ms)
        assert row.experts >= 2
    assert drafts.main(["--shape", "S", "--threads", "1"]) == 0
    assert "pays from tokens / round" in capsys.readouterr().out


# -- larger than memory ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")
def test_a_folder_larger_than_memory_is_announced_written_and_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(large, "air", lambda layers: MICRO.replace(eos_token_id=()))
    folder = tmp_path / "air"
    experts, rest = large.sizes(MICRO)
    least = rest + experts * MICRO.num_experts_per_tok // MICRO.n_routed_experts // 2  # of one of its two layers
    with pytest.raises(SystemExit, match=r"--memory .* not less than one token needs: .* give at least"):
        large.main([str(folder), "--memory", str((least - 1) / 1e9)])
    assert not folder.exists()
    large.main([str(folder), "--memory", str(least / 1e9), "--tokens", "3"])
    said = capsys.readouterr().out
    assert f"writing {in_bytes(experts + rest)} to {folder}" in said
    assert "warm   3:" in said
    assert sum(array.nbytes for _, array in walk(minglm.load(folder, "bfloat16").params)) == experts + rest
    large.main([str(folder), "--memory", "1", "--tokens", "2"])
    assert "writing" not in capsys.readouterr().out


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--layers", "1", "--memory", "4"], r"--layers 1 must lie between 2 \(the first is dense.*\) and 46"),
        (["--layers", "47"], r"--layers 47 must"),
        (["--memory", "nan"], r"--memory nan GB must be a number"),
        (["--memory", "1"], r"give at least 4\.3 GB"),
        (["--tokens", "1"], r"--tokens 1 must lie between 2 and"),
        ([], r"air would take 21\.7 GB, 1\.0 GB are free there"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(tmp_path, monkeypatch, options, says):
    monkeypatch.setattr(large.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**9))
    with pytest.raises(SystemExit, match=f"error: .*{says}"):
        large.main([str(tmp_path / "deep" / "air"), *options])
    assert not list(tmp_path.iterdir())
