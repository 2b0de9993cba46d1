"""What a run shows: its curves, and the routing of a fixed text over time."""

import json

import numpy as np
import pytest

import minglm
from minglm.look.curves import plot_training, read_metrics
from minglm.train.observe import observer, probe_routing, probe_text, routing_over_time
from minglm.train.recipe import Recipe, Stage


def line(step, stage="first"):
    layers = ("1", "2")
    return {
        "step": step,
        "stage": stage,
        "main": 5.0 - step / 100,
        "mtp": 5.2 - step / 100,
        "learning_rate": 0.001 * (step + 1),
        "max_violation": dict.fromkeys(layers, 2.0 / (step + 1)),
        "bias": {i: [0.001 * step, -0.001 * step, 0.0] for i in layers},
    }


LINES = [
    *(line(s, "first" if s < 60 else "second") for s in range(0, 100, 10)),
    {"step": 49, "code_bits_per_byte": 2.0},
]
LINES[-1]["prose_bits_per_byte"] = 2.5


def test_curves_show_what_is_in_the_metrics():
    figure = plot_training(LINES, "a run")
    loss, balance, bias, rate = figure.axes
    assert loss.get_title(loc="left") == "Training, a run: 91 steps"
    assert {text.get_text().strip() for text in loss.texts} == {"first", "second"}
    code = next(drawn for drawn in loss.lines if drawn.get_label().startswith("code"))
    assert (list(code.get_xdata()), list(code.get_ydata())) == ([49], [2.0])
    smooth = next(drawn for drawn in loss.lines if drawn.get_label().startswith("next token"))
    np.testing.assert_allclose(smooth.get_ydata(), [5.0 - s / 100 for s in range(0, 100, 10)])
    assert sum(drawn.get_label().startswith("layer") for drawn in balance.lines) == 2
    assert sum(len(drawn.get_xdata()) == 10 for drawn in bias.lines) == 6  # two layers of three experts
    np.testing.assert_allclose(rate.lines[0].get_ydata(), [0.001 * (s + 1) for s in range(0, 100, 10)])
    borders = [drawn.get_xdata()[0] for drawn in rate.lines[1:]]
    assert borders == [0, 60]


def test_a_run_of_one_step_can_be_drawn(tmp_path):
    plot_training([line(0)]).savefig(tmp_path / "one.png")
    with pytest.raises(ValueError, match="no step among the metrics"):
        plot_training(LINES[-1:])


def test_metrics_are_read_up_to_the_last_whole_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line(0)) + "\n" + json.dumps(line(1))[:40])
    assert [found["step"] for found in read_metrics(tmp_path)] == [0]
    with pytest.raises(ValueError, match=r"metrics\.jsonl: no such file"):
        read_metrics(tmp_path / "nowhere")


def test_the_probe_is_fixed_and_changes_its_domain():
    text = probe_text()
    assert text == probe_text()
    assert "mod 10" in text
    assert 1000 < len(text) < 4000


def test_an_observer_keeps_the_routing_at_each_moment(tmp_path):
    model = minglm.load("glm-nano")
    stage = Stage("one", 4, 1, 8, {}, learning_rate=1e-3)
    observe = observer(tmp_path, Recipe("glm-nano", (stage,), eval_every=2), lambda model: {"held_out": 1.0})
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line(0)) + "\n")
    assert observe(model, 1) == {}
    assert not (tmp_path / "training.png").exists()
    assert observe(model, 2) == {"held_out": 1.0}
    assert (tmp_path / "training.png").exists()
    assert observe(model, 4) == {"held_out": 1.0}  # the last step, at any number
    moments = routing_over_time(tmp_path)
    assert list(moments) == ["step_000001", "step_000002", "step_000004"]
    kept, c = moments["step_000002"], model.config
    assert kept.dtype == np.uint8
    assert kept.shape[1:] == (c.num_hidden_layers - c.first_k_dense_replace, c.num_experts_per_tok)
    trace = model.trace(probe_text()[:200])
    T = trace.ids.shape[1] - 3  # the last tokens of a text that is cut may be others
    assert (probe_routing(model)[:T] == trace.routing.indices[:T]).all()
