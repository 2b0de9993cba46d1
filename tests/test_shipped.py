"""The checkpoints that come with the package: each is what its card says, and says the same as ever."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import minglm
from minglm.api import find
from minglm.data.calculator import calculate
from minglm.data.chats import CALCULATOR
from minglm.data.documents import read_file_list, standard_library_documents
from minglm.data.heldout import heldout_documents
from minglm.data.tasks import TASKS, heldout_items
from minglm.demo import conversations
from minglm.evaluate.accuracy import accuracy
from minglm.evaluate.bits_per_byte import bits_per_byte
from minglm.evaluate.golden import golden
from minglm.evaluate.ngram import ngram_bits_per_byte
from minglm.look.curves import read_metrics
from minglm.look.routing import load, max_violation
from minglm.model import walk
from minglm.text.tools import run_tools
from minglm.train.recipe import load_recipe

TALKERS = ["glm-nano", "glm-tiny"]
PAIR = ["glm-tiny-balanced", "glm-tiny-unbalanced"]
GOLDEN = [(name, g) for name in TALKERS for g in json.loads((find(name) / "golden.json").read_text("utf-8"))]


@pytest.fixture(scope="module", params=TALKERS)
def model(request):
    return minglm.load(request.param)


@pytest.fixture(scope="module")
def tiny():
    return minglm.load("glm-tiny")


@pytest.mark.parametrize(("name", "wanted"), GOLDEN, ids=lambda v: v if isinstance(v, str) else v["prompt"][-24:])
def test_golden_text(name, wanted):
    """Greedy, from prompts whose every margin exceeds 1e-3: no rounding may change a token."""
    found = golden(minglm.load(name), wanted["prompt"])
    assert found is not None, "a margin fell below 1e-3"
    assert found.ids == wanted["ids"]
    assert found.text == wanted["text"]


def test_there_are_golden_texts_of_both_kinds():
    for name in TALKERS:
        prompts = [g["prompt"] for owner, g in GOLDEN if owner == name]
        chats = [prompt for prompt in prompts if prompt.startswith("[gMASK]")]
        assert len(chats) >= 3
        assert len(prompts) - len(chats) >= 3


def test_every_feature_is_on(model):
    c = model.config
    assert c.first_k_dense_replace == 1
    assert c.num_hidden_layers - c.first_k_dense_replace >= 3
    assert c.n_shared_experts == c.num_nextn_predict_layers == 1
    assert c.use_qk_norm
    assert c.attention_bias
    assert c.routed_scaling_factor != 1
    assert c.rope_theta == 1e6  # since mid-training
    assert all(s % 32 == 0 for s in (c.hidden_size, c.intermediate_size, c.moe_intermediate_size, c.head_dim))


def test_sizes():
    tiny, nano = (minglm.load(name).config for name in ("glm-tiny", "glm-nano"))
    assert 4e6 < tiny.count_parameters().total < 8e6
    assert 1.5e6 < tiny.count_parameters().active < 2.5e6
    assert tiny.n_routed_experts >= 16
    assert nano.count_parameters().total < 2e6
    total = sum(path.stat().st_size for path in find("glm-tiny").parent.rglob("*") if path.is_file())
    assert total <= 30e6
    assert (find("glm-tiny") / "model.safetensors").stat().st_size <= 16e6


def test_one_can_draft_for_the_other():
    texts = [(find(name) / "tokenizer.json").read_text("utf-8") for name in TALKERS]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", [*TALKERS, *PAIR])
def test_weights_are_bfloat16_and_biases_float32(name):
    kept = {key: array.dtype.name for key, array in walk(minglm.load(name, "bfloat16").params)}
    assert {kind for key, kind in kept.items() if not key.endswith("correction_bias")} == {"bfloat16"}
    assert kept["model.layers.1.mlp.gate.e_score_correction_bias"] == "float32"


def test_the_balancing_left_its_mark(model):
    """Trained biases differ from each other: routing without them would be another one."""
    for name, array in walk(model.params):
        if name.endswith("e_score_correction_bias"):
            assert np.ptp(array) > 0.01, name


@pytest.mark.parametrize("name", [*TALKERS, *PAIR])
def test_card_names_this_file_and_this_recipe(name):
    folder = find(name)
    card = (folder / "README.md").read_text("utf-8")
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in card
    assert f"{minglm.load(name).config.count_parameters().total:,} parameters" in card
    assert (folder / "recipe.toml").read_text("utf-8") == load_recipe(name).to_toml()
    files, origins = read_file_list((folder / "training_files.json").read_text("utf-8"))
    assert len(files) > 500
    assert all(f"| {origin.name} |" in card and origin.licence in card for origin in origins)


def test_it_beats_a_byte_trigram_on_held_out_code(model):
    """On the first held-out modules; the card has all of them."""
    held_out = heldout_documents("code")[:3]
    training = "".join(d.text for d in standard_library_documents() if d.domain == "code").encode()
    trigram = ngram_bits_per_byte(training, "".join(d.text for d in held_out).encode())
    assert bits_per_byte(model, held_out) < 0.65 * trigram


def test_thinking_helps(tiny):
    """Ten-step sums that it never saw: guesses when asked directly, right with the steps written out."""
    items = heldout_items(TASKS["sums"], 60, seed=7, size=10)
    assert accuracy(tiny, items, thinking=True).share >= 0.95
    assert accuracy(tiny, items, thinking=False).share <= 0.35


def test_it_calls_the_calculator_and_believes_it(tiny):
    def answer(prompt):
        return tiny.generate(prompt, 160).text

    items, right = heldout_items(TASKS["calculator"], 12, seed=7), 0
    for item in items:
        question = {"role": "user", "content": item.question}
        said = run_tools(answer, [question], [CALCULATOR], {"calculator": calculate}, tiny.chat_template, False)
        right += said[-1]["content"] == item.answer
    assert right >= 10


def test_the_demo_s_conversations_are_right(tiny):
    (_, thinking), _, (_, tool) = conversations(tiny)
    assert thinking.rstrip().endswith("\n2")
    assert "<tool_call>calculator" in tool
    assert tool.rstrip().endswith("17274")


def test_the_pair_differs_in_nothing_but_balancing():
    on, off = (load_recipe(name) for name in PAIR)
    changed = {"bias_rate", "balance_weight"}
    for one, other in zip(on.stages, off.stages, strict=True):
        assert {k for k, v in vars(one).items() if vars(other)[k] != v} == changed
    assert {k for k, v in vars(on).items() if vars(off)[k] != v} == {"stages"}
    one, other = (minglm.load(name) for name in PAIR)
    assert (find(PAIR[0]) / "tokenizer.json").read_text("utf-8") == (find(PAIR[1]) / "tokenizer.json").read_text(
        "utf-8"
    )
    text = heldout_documents("code")[0].text[:2000]
    loads = [load(m.trace(text, keep="*.mlp.expert_*,*scores").routing.indices, 16) for m in (one, other)]
    assert max_violation(loads[0]).max() < max_violation(loads[1]).max()


@pytest.mark.parametrize("name", [*TALKERS, *PAIR])
def test_metrics_and_routing_over_time_come_along(name):
    from safetensors.numpy import load_file

    lines = read_metrics(find(name))
    steps = load_recipe(name).steps
    assert max(line["step"] for line in lines) == steps - 1
    moments = load_file(find(name) / "routing.safetensors")
    assert f"step_{steps:06d}" in moments
    assert len(moments) >= 6
    assert len({array.shape for array in moments.values()}) == 1


def test_found_from_any_working_directory(tmp_path):
    script = "import minglm; print(minglm.load('glm-nano'))"
    environment = {**os.environ, "PYTHONPATH": str(find("glm-nano").parents[1])}
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
    root = find("glm-nano").parents[1]
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(root)]
    subprocess.run(build, check=True)
    wheel = next(tmp_path.glob("*.whl"))
    site = tmp_path / "site"
    subprocess.run([*build[:3], "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True)
    script = (
        "import minglm; from minglm.look.glossary import find; m = minglm.load('glm-nano'); "
        "print(minglm.__file__, find('router').chinese, m.generate('17+25=', 3).text)"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
