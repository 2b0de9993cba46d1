"""Plots: what they say and show, that they draw, and that they can be read without colour."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from minglm.look.plots import LOAD_COLOURS, plot_load, plot_picks


def routing(T=6, layers=2, E=8, K=2, seed=0):
    rng = np.random.default_rng(seed)
    weights = -np.sort(-rng.random((T, layers, K)), axis=-1)
    return np.argsort(rng.random((T, layers, E)), axis=-1)[..., :K], weights


def texts(ax):
    return [text.get_text() for text in ax.texts]


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def draw(figure, tmp_path):
    figure.savefig(tmp_path / "figure.png", dpi=40)
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def lightness(colours):
    linear = np.asarray(colours)[:, :3] ** 2.2
    return linear @ [0.2126, 0.7152, 0.0722]


# -- load --------------------------------------------------------------------------------------------------------


def test_load_says_what_it_shows(tmp_path):
    indices = np.array([[[0, 1]], [[0, 2]], [[0, 1]], [[0, 2]]])  # counts 4, 2, 2, 0; uniform 2
    figure = plot_load(indices, 4, layers=(7,), name="glm-nano")
    ax, bar = figure.axes
    assert isinstance(figure, Figure)
    title = ax.get_title(loc="left")
    assert "glm-nano" in title
    assert "1 layer, E = 4, K = 2, T = 4 tokens; uniform = 2 picks" in title
    assert texts(ax) == ["2.00", "1.00", "1.00", "0.00"]
    assert labels(ax.yaxis) == ["7"]
    assert bar.get_ylabel() == "picks ÷ uniform"
    assert "1 uniform" in labels(bar.yaxis)
    assert [line.get_linestyle() for line in bar.lines if list(line.get_ydata()) == [1, 1]] == ["--"]
    draw(figure, tmp_path)


def test_uniform_is_the_middle_of_the_load_colours():
    indices, _ = routing(T=50)
    image = plot_load(indices, 8).axes[0].images[0]
    assert image.norm(1) == 0.5
    assert image.norm(0) == 0
    assert image.norm.vmax >= 2


def test_load_can_be_read_in_grey():
    steps = np.diff(lightness(LOAD_COLOURS(np.linspace(0, 1, 64))))
    assert (steps < 0).all()


def test_large_load_has_no_numbers_and_few_labels(tmp_path):
    indices, _ = routing(T=20, layers=40, E=128, K=8)
    figure = plot_load(indices, 128)
    ax = figure.axes[0]
    assert not ax.texts
    assert len(labels(ax.xaxis)) <= 32
    assert max(figure.get_size_inches()) <= 24
    draw(figure, tmp_path)


def test_padding_is_not_counted():
    indices, _ = routing(T=6)
    valid = np.array([0, 0, 1, 1, 1, 1], bool)
    ax, alone = plot_load(indices, 8, valid=valid).axes[0], plot_load(indices[2:], 8).axes[0]
    assert texts(ax) == texts(alone)
    assert "T = 4 tokens" in ax.get_title(loc="left")


# -- picks -------------------------------------------------------------------------------------------------------


def test_picks_say_what_they_show(tmp_path):
    indices, weights = routing(T=3)
    figure = plot_picks(indices, weights, ["a\n", " $x$", "算"], 8, layers=(1, 2))
    ax, bar = figure.axes
    pairs = zip(indices.reshape(-1), weights.reshape(-1), strict=True)
    assert texts(ax) == [f"{expert}\n{weight:.2f}" for expert, weight in pairs]
    assert labels(ax.yaxis)[:2] == ["0  a\\n", "1  ␣$x$"]
    assert labels(ax.xaxis) == ["1", "2"]
    assert ax.get_title(loc="left").endswith("2 layers, E = 8, K = 2, T = 3 tokens")
    assert bar.get_ylabel() == "expert"
    draw(plot_picks(indices, weights, ["a\n", " $x", "$\\frac$"], 8), tmp_path)  # no formula is read into it


def test_cut_picks_say_so(tmp_path):
    indices, weights = routing(T=30, layers=10, E=32, K=8)
    figure = plot_picks(indices, weights, ["token"] * 30, 32, limit=5)
    ax = figure.axes[0]
    assert "K = 8 (the first 4 shown), T = 30 tokens (the first 5 shown)" in ax.get_title(loc="left")
    assert [text.split("\n")[0] for text in texts(ax)[:4]] == [f"{e}" for e in indices[0, 0, :4]]
    assert len(texts(ax)) == 5 * 10 * 4
    draw(figure, tmp_path)


def test_weights_are_left_out_where_there_is_no_room():
    indices, weights = routing(T=30, layers=7, E=8, K=2)
    ax = plot_picks(indices, weights, ["x"] * 30, 8).axes[0]
    assert texts(ax)[:2] == [f"{e}" for e in indices[0, 0]]
    assert "weight" not in ax.get_title(loc="left")


def test_picks_can_be_read_in_grey():
    indices = np.arange(8).reshape(8, 1, 1)
    image = plot_picks(indices, np.ones((8, 1, 1)), ["t"] * 8, 8).axes[0].images[0].get_array()
    assert (np.diff(lightness(image[:, 0] / 255 if image.max() > 1 else image[:, 0])) < 0).all()


def test_text_stands_out_from_its_cell():
    indices = np.arange(8).reshape(8, 1, 1)
    ax = plot_picks(indices, np.ones((8, 1, 1)), ["t"] * 8, 8).axes[0]
    assert ax.texts[0].get_color() == "black"  # on yellow
    assert ax.texts[-1].get_color() == "white"  # on violet


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(("layers", "E", "K"), [(1, 1, 1), (3, 2, 2), (50, 4, 1)])
def test_small_and_odd_sizes_draw(T, layers, E, K, tmp_path):
    indices, weights = routing(T, layers, E, K)
    draw(plot_load(indices, E), tmp_path)
    draw(plot_picks(indices, weights, ["x"] * T, E), tmp_path)


# -- bad input, and no trace of pyplot ---------------------------------------------------------------------------


def test_bad_input_is_explained():
    indices, weights = routing()
    with pytest.raises(ValueError, match="layers names 3 layers, indices hold 2"):
        plot_load(indices, 8, layers=(1, 2, 3))
    with pytest.raises(ValueError, match="outside 0 … E − 1"):
        plot_load(indices, 4)
    with pytest.raises(ValueError, match=r"weights \[5, 2, 2\], tokens 6"):
        plot_picks(indices, weights[1:], ["x"] * 6, 8)
    with pytest.raises(ValueError, match="tokens 2"):
        plot_picks(indices, weights, ["x"] * 2, 8)
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_picks(indices, weights, ["x"] * 6, 8, limit=0)
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_load(indices, 8, valid=np.zeros(6, bool))


def test_matplotlib_is_loaded_only_for_plots():
    code = (
        "import sys, minglm, minglm.look.trace, minglm.look.describe, minglm.look.routing\n"
        "import minglm.look.specialisation, minglm.look.rows, minglm.look.history, minglm.evaluate.pictures\n"
        "assert 'matplotlib' not in sys.modules\n"
        "import minglm.look.plots\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
