"""The trace page as it is written; tests/browser opens it."""

import base64
import json
import re
import zlib

import numpy as np
import pytest

import minglm
from minglm.cli import main
from minglm.look.page import write_page
from minglm.look.page.pack import Packer
from minglm.look.page.recipes import recipe_of
from minglm.model.params import map_arrays

CONFIGS = {"micro": {}, "dense": {"first_k_dense_replace": 3}, "alone": {"n_shared_experts": 0, "use_qk_norm": False}}


def read(path):
    """The page's data, and an array of it."""
    text = path.read_text("utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    groups = dict(re.findall(r'id="group-([\w-]+)">([\w+/=]+)</script>', text))

    def array(packed):
        raw = zlib.decompress(base64.b64decode(groups[packed["group"]]))
        size = int(np.prod(packed["shape"]))
        kinds = {"f4": np.dtype("<f4"), "i4": np.dtype("<i4"), "b2": np.dtype("<u2")}
        held = np.frombuffer(raw, kinds[packed["kind"]], size, packed["at"])
        wide = (held.astype(np.uint32) << 16).view(np.float32) if packed["kind"] == "b2" else held
        return wide.reshape(packed["shape"])

    return data, array


@pytest.mark.parametrize("which", CONFIGS)
def test_the_page_holds_the_trace(tmp_path, which):
    model = minglm.new(minglm.PRESETS["micro"].replace(**CONFIGS[which]), seed=1)
    write_page(model, [3, 14, 15, 9, 2], tmp_path / "page.html")
    data, array = read(tmp_path / "page.html")
    trace = model.trace([3, 14, 15, 9, 2])
    assert [step["name"] for step in data["traces"][0]["steps"]] == list(trace)
    for step in data["traces"][0]["steps"]:
        wanted = trace[step["name"]]
        assert np.array_equal(array(step["data"]), wanted.reshape(step["full"]))  # without the batch
        for tap in step["recipe"]["x"]:
            assert tap in trace, step
    used = {letter for step in data["traces"][0]["steps"] for letter in step["axes"]}
    assert used <= set(data["letters"])
    assert data["letters"]["D"] == ["hidden size", "隐藏维度"]
    names = dict(minglm.walk(model.params))
    for name, packed in data["weights"].items():
        assert array(packed) == pytest.approx(names[name], rel=2**-8)


def test_recipes_name_what_is_there():
    config = minglm.PRESETS["micro"]
    model = minglm.new(config)
    tensors = {name for name, _ in minglm.walk(model.params)}
    for name in model.trace([1, 2, 3]):
        assert set(recipe_of(name, config)["w"]) <= tensors, name


def test_bfloat16_is_rounded_to_nearest_even():
    packer = Packer()
    given = np.array([1 + 2**-8, 1 + 3 * 2**-8, -0.0, 1e-40, np.inf, 3.14159], np.float32)
    packer.add("g", given, narrow=True)
    ml_dtypes = pytest.importorskip("ml_dtypes")
    held = np.frombuffer(packer.groups["g"][0], np.uint16)
    assert np.array_equal(held, given.astype(ml_dtypes.bfloat16).view(np.uint16))
    packer.add("h", np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32), narrow=True)
    assert packer.groups["h"][0][:6] == b"\xc0\x7f" * 3  # every NaN stays one


def test_what_does_not_fit_is_left_out_and_named(tmp_path):
    model = minglm.new("micro")
    notes = write_page(model, list(range(1, 61)), tmp_path / "page.html", most_bytes=300_000)
    assert re.search(r"60 tokens; arrays are kept for \d+ of them", notes[0])
    data, array = read(tmp_path / "page.html")
    trace = model.trace(list(range(1, 61)))
    for step in data["traces"][0]["steps"]:
        held = array(step["data"])
        if step["name"].endswith(("expert_indices", "self_attn.v")):
            assert len(step["rows"]) == 60
        elif step["axes"][0] == "T":
            assert step["rows"][:4] == [0, 1, 2, 3]
            assert step["rows"][-1] == 59
            assert np.array_equal(held, trace[step["name"]][0][step["rows"]])
    assert data["notes"] == notes
    few = write_page(model, [1, 2, 3], tmp_path / "page.html", most_bytes=50_000)
    assert "weight tensors are not in this page" in few[0]


def test_the_command(tmp_path, capsys):
    path = tmp_path / "new" / "page.html"
    assert main(["trace", "2 + 2 =", "--model", "glm-nano", "--html", str(path)]) == 0
    assert "it opens in a browser, without a network" in capsys.readouterr().out
    assert main(["trace", "2 + 2 =", "--model", "glm-nano", "--beside", "3"]) == 2
    assert "give --html FILE too" in capsys.readouterr().err
    assert main(["trace", "a", "--model", "glm-nano", "--html", str(path), "--beside", "3", "--without-bias"]) == 2
    assert "one comparison at a time" in capsys.readouterr().err
    assert path.exists()
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


def test_what_a_page_cannot_be(tmp_path, capsys):
    with pytest.raises(ValueError, match="is no file that a page could be written to"):
        write_page(minglm.new("micro"), [1, 2], tmp_path)
    dense = minglm.new(minglm.PRESETS["micro"].replace(first_k_dense_replace=3))
    with pytest.raises(ValueError, match="no selection bias to leave out"):
        write_page(dense, [1, 2], tmp_path / "page.html", without_bias=True)
    for more in (["--keep", "logits"], ["--save", str(tmp_path / "t.safetensors")]):
        assert main(["trace", "a", "--model", "glm-nano", "--html", str(tmp_path / "page.html"), *more]) == 2
        assert "leave --keep and --save out" in capsys.readouterr().err
    assert main(["trace", "a", "--model", "glm-nano", "--html", ""]) == 2
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_json_has_none_for(tmp_path):
    """Biases that are no numbers, and a float64 model beyond float32, and beyond what can be squared."""
    model = minglm.new("micro", seed=1)
    biases = np.array([np.nan, np.inf, -np.inf, 0.5, 0, 0, 0, 0], np.float32)
    broken = map_arrays(lambda n, a: biases if n.endswith("correction_bias") else a, model.params)
    write_page(minglm.Model(model.config, broken), [1, 2, 3], tmp_path / "page.html", without_bias=True)
    data, _ = read(tmp_path / "page.html")
    assert data["traces"][0]["bias"]["1"][:4] == ["NaN", "Infinity", "-Infinity", 0.5]
    large = map_arrays(lambda n, a: a.astype("f8") * (1e160 if n == "model.norm.weight" else 1), model.params)
    with np.errstate(over="ignore"):
        write_page(minglm.Model(model.config, large), [1, 2, 3], tmp_path / "page.html")
    data, _ = read(tmp_path / "page.html")
    assert data["traces"][0]["steps"][-2]["stats"]["sd"] == "Infinity"


def test_steps_say_how_many_numbers_are_none(tmp_path):
    model = minglm.new("micro", seed=1)
    write_page(model, [1, 2, 3], tmp_path / "page.html")
    steps = {step["name"]: step["stats"] for step in read(tmp_path / "page.html")[0]["traces"][0]["steps"]}
    assert (steps["layers.1.self_attn.scores"]["−∞"], steps["layers.1.self_attn.scores"]["NaN"]) == (18, 0)


def test_one_row_only(tmp_path):
    with pytest.raises(ValueError, match="one row of tokens, got 2"):
        write_page(minglm.new("micro"), [[1, 2], [3, 4]], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
