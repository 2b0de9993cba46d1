"""The checkpoint that comes with the package: it is what its card says, and it says the same as ever."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import minglm
from minglm.api import find
from minglm.data.documents import standard_library_documents
from minglm.data.heldout import heldout_documents
from minglm.data.tasks import TWO_DIGIT_ADDITION, heldout_items
from minglm.evaluate.accuracy import accuracy
from minglm.evaluate.bits_per_byte import bits_per_byte
from minglm.evaluate.golden import golden
from minglm.evaluate.ngram import ngram_bits_per_byte
from minglm.model import walk
from minglm.train.recipe import RECIPES, Recipe

NAME = "glm-nano"
GOLDEN = json.loads((find(NAME) / "golden.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def model():
    return minglm.load(NAME)


@pytest.mark.parametrize("wanted", GOLDEN, ids=[g["prompt"].strip() for g in GOLDEN])
def test_golden_text(model, wanted):
    """Greedy, from prompts whose every margin exceeds 1e-3: no rounding may change a token."""
    found = golden(model, wanted["prompt"])
    assert found is not None, "a margin fell below 1e-3"
    assert found.ids == wanted["ids"]
    assert found.text == wanted["text"]


def test_there_are_golden_texts():
    assert len(GOLDEN) >= 3


def test_every_feature_is_on(model):
    c = model.config
    assert c.first_k_dense_replace == 1
    assert c.num_hidden_layers - c.first_k_dense_replace >= 3
    assert c.n_routed_experts >= 8
    assert c.n_shared_experts == c.num_nextn_predict_layers == 1
    assert c.use_qk_norm
    assert c.attention_bias
    assert c.routed_scaling_factor != 1
    assert all(s % 32 == 0 for s in (c.hidden_size, c.intermediate_size, c.moe_intermediate_size, c.head_dim))
    assert 0.8e6 < c.count_parameters().total < 1.2e6


def test_it_is_small_and_in_bfloat16():
    assert sum(p.stat().st_size for p in find(NAME).iterdir()) <= 3e6
    kept = {name: array.dtype.name for name, array in walk(minglm.load(NAME, "bfloat16").params)}
    assert {kind for name, kind in kept.items() if not name.endswith("correction_bias")} == {"bfloat16"}
    assert kept["model.layers.1.mlp.gate.e_score_correction_bias"] == "float32"


def test_the_balancing_left_its_mark(model):
    """Trained biases differ from each other: routing without them would be another one."""
    for name, array in walk(model.params):
        if name.endswith("e_score_correction_bias"):
            assert np.ptp(array) > 0.01, name


def test_card_names_this_file_and_these_numbers(model):
    folder = find(NAME)
    card = (folder / "README.md").read_text("utf-8")
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in card
    assert f"{model.config.count_parameters().total:,} parameters" in card
    assert Recipe.from_json((folder / "recipe.json").read_text("utf-8")) == RECIPES[NAME]


def test_it_beats_a_byte_trigram_on_held_out_code(model):
    """On the first held-out modules; the card has all of them."""
    held_out = heldout_documents("code")[:3]
    training = "".join(d.text for d in standard_library_documents() if d.domain == "code").encode()
    trigram = ngram_bits_per_byte(training, "".join(d.text for d in held_out).encode())
    assert bits_per_byte(model, held_out) < 0.75 * trigram


def test_it_adds_two_digit_numbers_that_it_never_saw(model):
    assert accuracy(model, TWO_DIGIT_ADDITION, heldout_items(TWO_DIGIT_ADDITION, 200, seed=3), 5).share >= 0.9


def test_found_from_any_working_directory(tmp_path):
    script = "import minglm; print(minglm.load('glm-nano'))"
    environment = {**os.environ, "PYTHONPATH": str(find(NAME).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert "glm-nano" in done.stdout


def test_padding_rows_are_never_generated(model):
    assert model.usable_tokens == len(model.tokenizer) == model.config.vocab_size
    assert set(model.config.eos_token_id) == set(model.tokenizer.end_ids)


@pytest.mark.slow
def test_a_wheel_brings_its_weights(tmp_path):
    """Built, installed into an empty folder, and loaded from there. Needs the build backend, so a network once."""
    root = find(NAME).parents[1]
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(root)]
    subprocess.run(build, check=True)
    wheel = next(tmp_path.glob("*.whl"))
    site = tmp_path / "site"
    subprocess.run([*build[:3], "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True)
    script = "import minglm, sys; m = minglm.load('glm-nano'); print(minglm.__file__, m.generate('17+25=', 3).text)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
