"""Recipes: what holds at each step, files that say what they mean, and every wrong one named."""

import math
import tomllib
from dataclasses import fields, replace

import pytest

from minglm.train.recipe import NAMES, Recipe, Stage, load_recipe
from minglm.train.schedule import ramp, warmup_cosine

PRE = Stage(
    "pre", 60, 8, 64, {"code": 1.0}, learning_rate=1e-2, final_rate=1e-3, warmup=10, first_batch_size=2, ramp=20
)
MID = Stage("mid", 40, 4, 128, {"code": 1.0}, packing="best-fit", rope_theta=1e6, mtp_weight=0.1, bias_rate=0.0)
CHAT = Stage("chat", 20, 4, 128, {"sums": 1}, format="chat", packing="best-fit", learning_rate=2e-3, warmup=5)
RECIPE = Recipe("glm-nano", (PRE, MID, CHAT))


def at(step):
    return RECIPE.at(step)


# -- what holds at a step ----------------------------------------------------------------------------------------


def test_stages_follow_each_other():
    assert RECIPE.steps == 120
    assert [at(s).stage.name for s in (0, 59, 60, 99, 100, 119, 500)] == ["pre", "pre", "mid", "mid", *["chat"] * 3]
    assert [at(s).step for s in (0, 59, 60, 100, 119, 500)] == [0, 59, 0, 0, 19, 19]


def test_one_cosine_runs_over_pre_training_and_mid_training():
    """Warm-up, then down to the floor at the end of the last stage that does not begin a schedule of its own."""
    wanted = [warmup_cosine(s, 100, 10, 1e-2, 1e-3) for s in range(100)]
    assert [at(s).learning_rate for s in range(100)] == wanted
    assert at(0).learning_rate == pytest.approx(1e-3)
    assert at(9).learning_rate == 1e-2
    assert at(10 + 45).learning_rate == pytest.approx((1e-2 + 1e-3) / 2, rel=2e-2)  # half way
    assert at(99).learning_rate == pytest.approx(1e-3)


def test_a_stage_with_a_rate_begins_its_own_schedule_and_ends_at_a_tenth():
    assert at(100).learning_rate == pytest.approx(2e-3 / 5)
    assert at(104).learning_rate == 2e-3
    assert at(119).learning_rate == pytest.approx(2e-4)


def test_the_batch_grows_in_a_straight_line():
    sizes = [at(s).batch_size for s in range(60)]
    assert sizes[0] == 2
    assert sizes[10] == 5
    assert set(sizes[20:]) == {8}
    assert sizes == sorted(sizes)
    assert ramp(5, 0, 1, 7) == 7


def test_tokens_are_counted_with_the_ramp():
    assert RECIPE.tokens == sum(at(s).batch_size for s in range(60)) * 64 + 40 * 4 * 128 + 20 * 4 * 128
    assert RECIPE.tokens_at(70) == 512


def test_the_rotary_base_is_the_stage_s():
    assert RECIPE.model_config(0).rope_theta == 10000.0
    assert RECIPE.model_config(1).rope_theta == 1e6
    changed = replace(RECIPE, config={"n_shared_experts": 0, "rope_theta": 5.0})
    assert changed.model_config(0).n_shared_experts == 0
    assert changed.model_config(0).rope_theta == 5.0


@pytest.mark.parametrize("steps", [3, 7, 60, 119, 121, 5000])
def test_shortened_keeps_the_shares(steps):
    short = RECIPE.shortened(steps)
    assert short.steps == steps
    assert all(s.steps >= 1 and s.warmup <= s.steps and s.ramp <= s.steps for s in short.stages)
    if steps >= 60:
        for stage, whole in zip(short.stages, RECIPE.stages, strict=True):
            assert stage.steps == pytest.approx(whole.steps * steps / 120, abs=1.5)
    with pytest.raises(ValueError, match="steps = 2 must be 3 or more"):
        RECIPE.shortened(2)


# -- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_recipes_of_the_package_round_trip(name):
    recipe = load_recipe(name)
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert math.isfinite(recipe.tokens)


def test_a_recipe_file_is_read_and_named_in_errors(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE.to_toml(), "utf-8")
    assert load_recipe(str(path)) == RECIPE
    path.write_text(RECIPE.to_toml().replace("warmup", "warmpu"), "utf-8")
    with pytest.raises(ValueError, match=r"mine\.toml: stage 1: unknown warmpu; known are name, steps"):
        load_recipe(str(path))
    path.write_bytes(b"\xef\xbb\xbf" + RECIPE.to_toml().encode())  # as some editors begin a file
    assert load_recipe(str(path)) == RECIPE
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"mine\.toml: not UTF-8"):
        load_recipe(str(path))
    with pytest.raises(ValueError, match=r"neither a recipe file nor one of .*glm-tiny"):
        load_recipe("glm-huge")


@pytest.mark.parametrize("text", ["", "=", "stages = 5", "stages = [1]", "[" * 5000, "[[stages]]", "preset = 'micro'"])
def test_what_is_no_recipe_is_said_so(text):
    with pytest.raises(ValueError, match=r"^recipe: "):
        Recipe.from_toml(text)


def test_the_config_s_fields_are_named_and_lists_are_taken():
    assert replace(RECIPE, config={"eos_token_id": [1, 2]}).model_config().eos_token_id == (1, 2)
    with pytest.raises(ValueError, match=r"config = \['hidden'\] must be fields of a model's config: attention_bias"):
        replace(RECIPE, config={"hidden": 8, "hidden_size": 64})
    with pytest.raises(ValueError, match="stages"):
        replace(RECIPE, stages=({"name": "one"},))


NUMBERS = ("steps", "batch_size", "sequence_length", "learning_rate", "bias_rate", "mtp_weight", "thinking", "warmup")


@pytest.mark.parametrize("value", ["5", [], -1, 1.5, float("nan"), float("inf"), True, {}])
@pytest.mark.parametrize("name", NUMBERS)
def test_values_of_the_wrong_kind_are_named(name, value):
    if value == 1.5 and name in ("learning_rate", "bias_rate", "mtp_weight"):
        return
    with pytest.raises(ValueError, match=rf"stage 1 \(pre\): {name} = "):
        replace(RECIPE, stages=(replace(PRE, **{name: value}), MID))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": "poem"}, "'text' or 'chat'"),
        ({"packing": "tight"}, "'truncate' or 'best-fit'"),
        ({"format": "chat"}, "must not be cut"),
        ({"sequence_length": 5000}, "at most the model's context, 1024"),
        ({"weights": [1]}, "a table of names and shares"),
        ({"weights": {"code": "much"}}, "a table of names and shares"),
        ({"weights": {"code": -1.0}}, "numbers from 0 up"),
        ({"name": 5}, "name = 5 must be a text"),
        ({"steps": 10**9}, "a whole number from 1 to 10,000,000"),
        ({"first_batch_size": 9}, "at most batch_size, 8"),
        ({"learning_rate": None}, "the first stage begins the schedule"),
        ({"warmup": 61}, "at most the stage's 60 steps"),
        ({"ramp": 61}, "at most the stage's 60 steps"),
        ({"ramp": 0}, "given together"),
        ({"switch": 1.1}, "a share from 0 to 1"),
    ],
)
def test_impossible_stages_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        replace(RECIPE, stages=(replace(PRE, **changes),))


def test_a_schedule_s_numbers_need_a_rate():
    with pytest.raises(ValueError, match=r"stage 2 \(mid\): warmup and final_rate"):
        replace(RECIPE, stages=(PRE, replace(MID, warmup=3)))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"preset": "glm-5"}, "preset = 'glm-5' must be one of"),
        ({"preset": 3}, "preset = 3"),
        ({"engine": "slow"}, "'fast' or 'numpy'"),
        ({"optimiser": "sgd"}, "'muon' or 'adamw'"),
        ({"config": {"hidden": 3}}, "hidden"),
        ({"stages": ()}, "stages"),
        ({"save_every": 0}, "save_every = 0"),
    ],
)
def test_impossible_recipes_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        replace(RECIPE, **changes)


def test_every_field_is_in_the_page_and_every_recipe_is_commented():
    from pathlib import Path

    import minglm.train.recipe as module

    page = (Path(__file__).parents[1] / "docs" / "recipe.md").read_text("utf-8")
    for kind in (Stage, Recipe):
        for field in fields(kind):
            assert f"`{field.name}`" in page, field.name
    for path in module.FOLDER.glob("*.toml"):
        assert path.read_text("utf-8").startswith("# ")
        tomllib.loads(path.read_text("utf-8"))
