"""The other plots: what they say and show, that they draw at odd sizes, and that they can be read without colour."""

import warnings

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text

import minglm.look.plots as plots
from minglm.look.plots.figure import SHARE_COLOURS, short, some
from minglm.look.specialisation import coactivation, domain_shares, would_drop
from tests.test_plots import draw, labels, lightness, routing, texts

NAMED = {"name": "glm-$x$"}  # no formula is read into it


def figures(T, layers, E, K, seed=0):
    """Every plot of routing and attention, by name, for a routing of this size."""
    rng = np.random.default_rng(seed)
    indices, _ = routing(T, layers, E, K, seed)
    scores = rng.random((T, layers, E)).astype(np.float32)
    biased = scores + rng.normal(0, 0.1, E).astype(np.float32)
    tokens, domains = [f"t{n}" for n in rng.integers(0, 3, T)], [f"d{n}" for n in rng.integers(0, 2, T)]
    history = np.stack([routing(T, layers, E, K, n)[0] for n in range(4)]).astype(np.uint8)
    numbers, steps = range(3, 3 + layers), (1, 10, 100, 1000)
    probs = np.tril(np.ones((6, T, T))) / np.arange(1, T + 1)[:, None]
    one = {"layer": layers - 1, "layers": numbers, **NAMED}
    return {
        "bars": plots.plot_bars(indices, E, **one),
        "load_over_training": plots.plot_load_over_training(history, E, steps, **one),
        "drops": plots.plot_drops(indices, E, layers=numbers, **NAMED),
        "selection": plots.plot_selection(scores, biased, K, token=T - 1, tokens=tokens, **one),
        "confidence": plots.plot_confidence(scores, biased, K, numbers, **NAMED),
        "coactivation": plots.plot_coactivation(indices, E, **one),
        "lift": plots.plot_coactivation(indices, E, lift=True, **one),
        "vocabulary": plots.plot_vocabulary(indices, tokens, E, min_count=1, **one),
        "domains": plots.plot_domains(indices, domains, E, None, tokens, numbers, **NAMED),
        "paths": plots.plot_paths(indices, E, numbers, **NAMED),
        "saturation": plots.plot_saturation(history, None, steps, E, numbers, **NAMED),
        "overlap": plots.plot_overlap(indices[:, :1], indices, E, numbers, **NAMED),
        "removal": plots.plot_removal(rng.normal(0, 1, (E, 3)), ["a", "b", "$c"], np.ones(E) / E, 3, K=K, T=T, **NAMED),
        "attention": plots.plot_attention(probs, tokens, kv_heads=2, layer=3, **NAMED),
    }


ODD = [(1, 1, 1, 1), (3, 2, 4, 4), (40, 92, 160, 8)]  # one token and expert; K = E; GLM-4.5


def said(figure):
    """All titles."""
    above = figure.get_suptitle()
    return "\n".join([above, *(ax.get_title(loc=side) for ax in figure.axes for side in ("left", "center"))])


@pytest.mark.parametrize("size", ODD, ids=str)
def test_every_plot_draws_says_its_sizes_and_is_large_enough_to_read(size, tmp_path):
    T, _, E, K = size
    for name, figure in figures(*size).items():
        assert isinstance(figure, Figure)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw(figure, tmp_path)
        title = said(figure)
        assert "glm-$x$" in title, name
        assert f"T = {T}" in title, name
        if name != "attention":
            assert f"E = {E}," in title, name
            assert f"K = {K}" in title, name
        written = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        assert min(text.get_fontsize() for text in written) >= 9, name
        assert max(figure.get_size_inches()) <= 24, name


def dashed(figure):
    """Heights of horizontal, and places of vertical, dashed lines."""
    lines = [line for ax in figure.axes for line in ax.lines if line.get_linestyle() == "--"]
    return {float(line.get_ydata()[0]) for line in lines} | {float(line.get_xdata()[0]) for line in lines}


def test_the_baseline_is_drawn_where_it_belongs():
    found = figures(50, 4, 8, 2)
    wanted = {"bars": 25, "domains": 25, "saturation": 25, "overlap": 25, "removal": 12.5, "coactivation": 1 / 7}
    wanted |= {"load_over_training": 1, "drops": 0, "confidence": 0, "lift": 4 / 7}
    for name, height in wanted.items():
        assert any(line == pytest.approx(height) for line in dashed(found[name])), name


def test_layer_numbers_are_those_given():
    found = figures(30, 2, 8, 2)
    for name in ("bars", "load_over_training", "selection", "coactivation", "vocabulary"):
        assert "layer 4," in said(found[name]), name
    assert labels(found["paths"].axes[0].xaxis) == ["layer 3", "layer 4"]
    assert labels(found["overlap"].axes[0].xaxis) == ["3", "4"]
    legend = found["drops"].axes[0].get_legend().get_texts()
    assert [text.get_text() for text in legend][:2] == ["layer 3", "layer 4"]
    assert [ax.get_title() for ax in found["domains"].axes[:2]] == ["layer 3", "layer 4"]


# -- readable in grey --------------------------------------------------------------------------------------------


def test_scales_fall_evenly_from_light_to_dark():
    assert (np.diff(lightness(SHARE_COLOURS(np.linspace(0, 1, 64)))) < 0).all()


def test_lines_and_texts_differ_by_more_than_colour():
    found = figures(50, 6, 8, 2)
    for name in ("drops", "saturation"):
        lines = [line for line in found[name].axes[0].lines if line.get_marker() not in ("None", "")]
        assert len({line.get_marker() for line in lines}) == 6, name
    rows = [(f"text {n}", depth, n, 10) for n in range(6) for depth in (1, 2)]
    lines = plots.plot_acceptance(rows).axes[0].lines
    assert len({line.get_marker() for line in lines}) == 6


def test_numbers_stand_out_from_their_cells():
    array = np.linspace(-1, 1, 12 * 16).reshape(12, 16)
    figure = plots.plot_array(array, "T E")
    image = figure.axes[0].images[0]
    for text in figure.axes[0].texts:
        j, i = map(int, text.get_position())
        cell = lightness(np.array([image.cmap(image.norm(array[i, j]))]))[0]
        own = lightness(np.array([to_rgba(text.get_color())]))[0]
        assert (max(cell, own) + 0.05) / (min(cell, own) + 0.05) > 3, text.get_text()  # WCAG's contrast


# -- each one ----------------------------------------------------------------------------------------------------


def test_bars_show_load_and_measures():
    indices = np.array([[[0, 1]], [[0, 2]], [[0, 1]], [[0, 2]]])
    figure = plots.plot_bars(indices, 4)
    assert [bar.get_height() for bar in figure.axes[0].patches] == [100, 50, 50, 0]
    assert "MaxVio 1.00, CV 0.71, 1 without a token" in said(figure)


def test_load_over_training_shows_one_layer_at_each_moment():
    history = np.stack([routing(20, 3, 8, 2, n)[0] for n in range(5)])
    figure = plots.plot_load_over_training(history, 8, (1, 10, 100, 1000, 2000), layer=1)
    ratios = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(ratios[2], np.bincount(history[2, :, 1].reshape(-1), minlength=8) / 5)
    assert labels(figure.axes[0].yaxis)[-2:] == ["1,000", "2,000"]
    with pytest.raises(ValueError, match="layer = 3 counts along the layer axis"):
        plots.plot_load_over_training(history, 8, layer=3)
    with pytest.raises(ValueError, match="steps names 2 moments, history holds 5"):
        plots.plot_load_over_training(history, 8, (1, 2))
    with pytest.raises(ValueError, match="got \\[20, 3, 2\\]"):
        plots.plot_load_over_training(history[0], 8)


def test_selection_names_what_the_bias_changed():
    scores = np.array([[[0.9, 0.5, 0.4, 0.1]]])
    biased = scores + np.array([0, 0, 0.2, -np.inf])
    figure = plots.plot_selection(scores, biased, 2, tokens=["a b"])
    assert texts(figure.axes[0]) == ["1.", "out", "in\n2.", ""]
    assert "token 0 'a b', layer 0, E = 4, K = 2, T = 1" in said(figure)
    threshold = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert threshold[0].get_ydata()[0] == pytest.approx(0.55)
    hatched = [bar.get_hatch() for bar in figure.axes[0].patches[:4]]
    assert hatched == [None, "///", "///", None]
    assert "group closed" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    with pytest.raises(ValueError, match="hold no such choice"):
        plots.plot_selection(scores, biased, 2, layer=1)


def test_confidence_counts_every_choice_with_a_margin():
    rng = np.random.default_rng(0)
    scores = rng.random((30, 2, 8))
    biased = scores.copy()
    biased[:5, 1, 1:] = -np.inf
    figure = plots.plot_confidence(scores, biased, 1)
    counts = [sum(bar.get_height() for bar in ax.patches) for ax in figure.axes]
    assert counts == [30, 30, 30, 25]
    assert "5 choices without another open expert left out" in said(figure)


def test_coactivation_leaves_the_diagonal_out():
    indices, _ = routing(40, 1, 6, 2)
    figure = plots.plot_coactivation(indices, 6)
    shown = figure.axes[0].images[0].get_array()
    assert shown.mask.tolist() == np.eye(6, dtype=bool).tolist()
    wanted = coactivation(indices, 6)
    assert shown[0, 1] == wanted[0, 1]
    assert len(texts(figure.axes[0])) == 30
    assert "random routing: 0.2" in said(figure)
    assert "independent: 1" in said(plots.plot_coactivation(indices, 6, lift=True))


def test_vocabulary_shows_share_and_count():
    first = np.array([2, 2, 0, 1, 0, 0])[:, None, None]
    figure = plots.plot_vocabulary(first, ["a", "a", "a", "b", "c", "c"], 3, min_count=2)
    assert texts(figure.axes[0]) == ["c", "100% of 2", "no frequent token", "a", "67% of 3"]
    assert labels(figure.axes[0].yaxis) == ["expert 0\n50.0%", "expert 1\n16.7%", "expert 2\n33.3%"]
    assert "mean of the largest share 83%; shuffled" in said(figure)
    with pytest.raises(ValueError, match="no token occurs 10 times"):
        plots.plot_vocabulary(first, ["a"] * 3 + ["b"] * 3, 3)


def test_domains_show_shares_and_control():
    indices, _ = routing(60, 4, 5, 2)
    domains = ["code"] * 20 + ["prose"] * 40
    figure = plots.plot_domains(indices, domains, 5, layer=2)
    shares = domain_shares(indices, domains, 5)[1]
    three = plots.plot_domains(indices, domains, 5).axes  # first, middle and last layer of four, a row for each domain
    for ax, (d, i) in zip(three, [(d, i) for d in (0, 1) for i in (0, 2, 3)], strict=True):
        assert [bar.get_height() for bar in ax.patches] == pytest.approx(100 * shares[d, i])
    for d, ax in enumerate(figure.axes):
        assert [bar.get_height() for bar in ax.patches] == pytest.approx(100 * shares[d, 2])
        assert ax.get_ylim()[1] > 100 * shares[:, 2].max()
    assert figure.axes[0].get_ylabel() == "code\nn = 20"
    assert "1 of 4 layers" in said(figure)
    assert "short lines: shuffled, ±" in said(figure)
    assert "among equal tokens" in said(plots.plot_domains(indices, domains, 5, tokens=["x"] * 60))
    many = plots.plot_domains(indices, list(range(60)), 5)
    assert "60 domains (8 shown)" in said(many)


def test_paths_merge_small_experts():
    indices = np.array([0] * 6 + [1, 2, 3, 3])[:, None, None].repeat(2, axis=1)
    figure = plots.plot_paths(indices, 4)
    shown = [text for text in texts(figure.axes[0]) if "uniform" not in text]
    assert shown == ["expert 0  60%", "other  40%"] * 2
    every = plots.plot_paths(indices, 4, least=0)
    assert "expert 3  20%" in texts(every.axes[0])
    with pytest.raises(ValueError, match="wanted places 0 … 1"):
        plots.plot_paths(indices, 4, through=(0, 5))


def test_drops_show_the_measure():
    indices, _ = routing(40, 2, 8, 2)
    figure = plots.plot_drops(indices, 8, (1, 2))
    assert figure.axes[0].lines[1].get_ydata() == pytest.approx(100 * would_drop(indices, 8, (1, 2))[:, 1])
    with pytest.raises(ValueError, match="nothing to plot"):
        plots.plot_drops(indices, 8, ())


def test_saturation_draws_chance_from_the_number_of_experts():
    history = np.stack([routing(20, 1, 8, 2, n)[0] for n in range(3)])
    assert 25 in dashed(plots.plot_saturation(history))  # the largest seen is 7
    assert 12.5 in dashed(plots.plot_saturation(history, history[-1], (1, 2, 3), 16))
    with pytest.raises(ValueError, match="steps names 1 moments"):
        plots.plot_saturation(history, None, (1,))


def test_acceptance_shows_shares_counts_and_intervals():
    figure = plots.plot_acceptance([("code", 1, 5, 10, 0.2, 0.8), ("code", 2, 1, 10, 0.0, 0.4)], "glm-tiny")
    ax = figure.axes[0]
    assert ax.lines[-1].get_ydata() == pytest.approx([50, 10])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["code (n = 10, 10)"]
    assert "bars: 95 %" in said(figure)
    hidden = plots.plot_acceptance([("__init__", 1, 1, 2)]).axes[0].get_legend().get_texts()
    assert [text.get_text() for text in hidden] == [" __init__ (n = 2)"]
    assert "95 %" not in said(plots.plot_acceptance([("a", 1, 0, 0), ("b", 1, 1, 2)]))
    for wrong in ([], [("a", 1, 3, 2)], [("a", 0, 1, 2)]):
        with pytest.raises(ValueError, match="wanted rows"):
            plots.plot_acceptance(wrong)


def test_removal_marks_what_is_not_sure():
    costs, errors = np.array([[0.5, -0.01], [0.0, 0.1]]), np.array([[0.1, 0.1], [0, 0.01]])
    figure = plots.plot_removal(costs, ["code", "prose"], np.array([0.7, 0.3]), 3, errors)
    map_ax = next(ax for ax in figure.axes if ax.images)
    assert texts(map_ax) == ["+0.500", "(-0.010)", "0", "+0.100"]
    assert labels(map_ax.xaxis) == ["code", "prose"]
    assert len(plots.plot_removal(costs).axes) == 2  # without loads: the map and its scale
    for wrong in ({"names": ["a"]}, {"loads": np.ones(3)}, {"errors": np.ones(2)}):
        with pytest.raises(ValueError, match=r"costs must be \[E, domain\]"):
            plots.plot_removal(costs, **wrong)


# -- arrays and attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        *(((12, 16), kind) for kind in ("positive", "whole", "hidden", "constant")),
        *((shape, "signed") for shape in [(5,), (1, 1), (300, 3), (2000, 1500), (2, 3, 4, 5)]),
    ],
)
def test_arrays_of_every_shape_and_kind_draw(shape, kind, tmp_path):
    rng = np.random.default_rng(0)
    array = {
        "signed": lambda: rng.normal(size=shape).astype(np.float32),
        "positive": lambda: rng.random(shape),
        "whole": lambda: rng.integers(0, 9, shape),
        "hidden": lambda: np.where(rng.random(shape) < 0.5, -np.inf, 1.0),
        "constant": lambda: np.zeros(shape),
    }[kind]()
    figure = plots.plot_array(array, " ".join("BHTS"[4 - len(shape) :]), "layers.1.out")
    draw(figure, tmp_path)
    assert "layers.1.out" in said(figure)
    printed = figure.axes[0].images[0].get_array().count() if max(shape) <= 16 else 0
    assert len(texts(figure.axes[0])) == printed  # every number, and none where there is none


def test_array_scale_is_around_zero_for_both_signs_only():
    signed = plots.plot_array(np.array([[-1.0, 4.0]]), "T D")
    assert signed.axes[0].images[0].norm(0) == 0.5
    assert 0 in dashed(signed)
    positive = plots.plot_array(np.array([[1.0, 4.0]]), "T D")
    assert positive.axes[0].images[0].norm(1) == 0
    assert not dashed(positive)


def test_large_arrays_say_what_is_left_out():
    figure = plots.plot_array(np.zeros((1000, 600)), "V D")
    assert "[V = 1,000, D = 600]; 1 of 4 along V shown; 1 of 2 along D shown" in said(figure)
    assert figure.axes[0].images[0].get_array().shape == (250, 300)
    assert labels(figure.axes[0].xaxis)[1] == "38"  # a number of the array, not of the picture


def test_index_chooses_along_the_first_axes():
    array = np.arange(24).reshape(2, 3, 4)
    figure = plots.plot_array(array, "H T S", index=1)
    assert texts(figure.axes[0])[0] == "12"
    assert "An array, H = 1" in said(figure)
    assert (figure.axes[0].get_ylabel(), figure.axes[0].get_xlabel()) == ("T", "S")
    for axes, index, words in (("T S", 0, "axes names 2"), ("H T S", 2, "index = 2"), ("H T S", (0, 0), "index")):
        with pytest.raises(ValueError, match=words):
            plots.plot_array(array, axes, index=index)
    with pytest.raises(ValueError, match="nothing to plot"):
        plots.plot_array(np.zeros((0, 3)))


def test_attention_groups_heads_by_their_keys(tmp_path):
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(5), (6, 3))  # three new tokens behind two in a cache
    figure = plots.plot_attention(probs, list("abcde"), kv_heads=2)
    panels = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in panels[:6]] == [f"head {h}, kv {h // 3}" for h in range(6)]
    assert panels[0].get_subplotspec().rowspan.start == 0
    assert panels[3].get_subplotspec().rowspan.start == 1
    assert labels(panels[0].yaxis) == ["c", "d", "e"]
    assert labels(panels[3].xaxis) == list("abcde")
    assert "H = 6 query heads, G = 2 key/value heads, T = 3, S = 5" in said(figure)
    draw(plots.plot_attention(probs, list("abcde"), heads=[4]), tmp_path)
    draw(plots.plot_attention(rng.random((96, 40, 40)), ["x"] * 40, kv_heads=8), tmp_path)
    assert "(24 shown)" in said(plots.plot_attention(rng.random((96, 2, 2)), ["x"] * 2))
    for wrong in ({"kv_heads": 4}, {"heads": [6]}, {"heads": []}):
        with pytest.raises(ValueError, match="heads"):
            plots.plot_attention(probs, list("abcde"), **wrong)
    with pytest.raises(ValueError, match="4 tokens"):
        plots.plot_attention(probs, list("abcd"))


# -- small things ------------------------------------------------------------------------------------------------


def test_characters_that_the_font_lacks_are_escaped():
    assert short("千\n é") == "\\u5343\\n é"


def test_some_keeps_both_ends():
    assert some(3, 6) == [0, 1, 2]
    assert some(92, 6)[0] == 0
    assert some(92, 6)[-1] == 91
    assert len(some(92, 6)) == 6


def test_a_notebook_shows_a_figure_by_itself():
    figure = plots.plot_bars(routing()[0], 8)
    assert isinstance(figure, plots.Picture)
    image, said = figure._repr_png_()
    assert image[:4] == b"\x89PNG"
    assert said["alt"].startswith("Load")


def test_old_and_new_names_are_public():
    assert {"plot_load", "plot_picks", "plot_roofline", "plot_training", "LOAD_COLOURS"} <= set(plots.__all__)
    assert all(hasattr(plots, name) for name in plots.__all__)
