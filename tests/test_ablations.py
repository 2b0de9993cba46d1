"""The ablations: each model differs from the baseline in what it says, runs go on, verdicts follow the rule."""

import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest

from minglm.api import Model
from minglm.data.batches import IGNORE, PADDING, Corpus
from minglm.data.heldout import make_document
from minglm.fast.ops import FastOps
from minglm.model import loss_and_grads, shift_targets
from minglm.model import ops as book
from minglm.model.params import Router, walk, walk_stacked
from minglm.model.router import router, router_bwd
from minglm.model.transformer import transformer
from minglm.text.tokenizer import train_tokenizer
from minglm.train.ablations import claims, run
from minglm.train.ablations import figures as measured
from minglm.train.ablations.__main__ import main
from minglm.train.ablations.claims import BASELINE, CLAIMS, MEASURES, VARIANTS, chosen
from minglm.train.ablations.gate import SoftmaxGate
from minglm.train.ablations.report import page_text, paired, read_comments, verdict, write_report
from minglm.train.recipe import Recipe
from minglm.train.step import start
from tests.gradcheck import check_gradients
from tests.variants import MICRO, error, gradient_errors, random_ids, random_params

# -- one change each ---------------------------------------------------------------------------------------------

CHANGES = {  # what the model says of itself: fields of the config, the recipe and its stage
    "baseline": {},
    "unbalanced": {"bias_rate": 0.0, "balance_weight": 0.0},
    "unscaled": {},
    "init-0.006": {"initializer_range": 0.006},
    "adamw": {"optimiser": "adamw"},
    "adamw-time": {"optimiser": "adamw"},
    "adamw-head": {"head_optimiser": "adamw"},
    "muon-rate": {"learning_rate": claims.RATE / 2},
    "adamw-rate": {"optimiser": "adamw", "learning_rate": claims.ADAMW_RATE * 2},
    "no-qk-norm": {"use_qk_norm": False},
    "no-mtp": {"mtp_weight": 0.0},
    "kv-1": {"num_key_value_heads": 1},
    "kv-4": {"num_key_value_heads": 4},
    "deep": {"num_hidden_layers": 7, "hidden_size": 96, "intermediate_size": 576},
    "shallow": {"num_hidden_layers": 3, "hidden_size": 192, "intermediate_size": 192},
    "no-shared": {"n_shared_experts": 0, "n_routed_experts": 17, "num_experts_per_tok": 3},
    "softmax": {},
}


def settings(variant, seed=0):
    """Everything that a run is made of, flat."""
    recipe = variant.make_recipe(seed=seed)
    values = asdict(recipe)
    (stage,) = values.pop("stages")
    return {**values, **stage, **recipe.model_config().to_dict(), "config": None}


@pytest.mark.parametrize("name", VARIANTS)
def test_each_model_differs_from_the_baseline_in_what_it_says(name):
    changed = {"learning_rate": claims.ADAMW_RATE} if "AdamW" in VARIANTS[name].label else {}
    wanted = {**settings(BASELINE), **(changed if "adamw" in name and name != "adamw-head" else {}), **CHANGES[name]}
    assert settings(VARIANTS[name]) == wanted
    assert (VARIANTS[name].ops is SoftmaxGate) == (name == "softmax")
    assert VARIANTS[name].seeds == (1 if name.endswith("-rate") else None)
    assert VARIANTS[name].equal_time == (name == "adamw-time")
    assert settings(VARIANTS[name], seed=2)["seed"] == 2


def fresh(name, seed=0):
    variant = VARIANTS[name]
    config = variant.make_recipe().model_config().replace(vocab_size=400)  # smaller, so that it is quick
    return dict(walk_stacked(variant.make_params(config, seed)))


@pytest.mark.parametrize(
    "name", [n for n, changes in CHANGES.items() if not n.startswith(("kv", "deep", "sh", "no-s"))]
)
def test_models_of_one_shape_begin_with_the_same_weights(name):
    base, own = fresh("baseline"), fresh(name)
    outputs = {n for n in base if n.endswith(("o_proj.weight", "down_proj.weight"))}
    assert len(outputs) == 6 + 1 + 2 * 5  # attention of five layers and MTP; dense; routed and shared experts
    for tensor, array in own.items():
        if name == "unscaled" and tensor in outputs:
            np.testing.assert_allclose(array, base[tensor] * 10**0.5, rtol=1e-6)
            assert array.std() == pytest.approx(0.02, rel=0.02)
        elif name == "init-0.006" and not tensor.endswith(("norm.weight", "bias")):
            np.testing.assert_allclose(array, base[tensor] * 0.3, rtol=1e-5)
        else:
            assert np.array_equal(array, base[tensor]), tensor
    missing = base.keys() - own.keys()
    assert all(n.endswith(("q_norm.weight", "k_norm.weight")) for n in missing)
    assert len(missing) == (12 if name == "no-qk-norm" else 0)
    assert not np.array_equal(fresh(name, seed=1)["lm_head.weight"], own["lm_head.weight"])


def counts(name):
    return VARIANTS[name].make_recipe().model_config().count_parameters()


def test_where_equal_parameters_are_promised_they_are_equal():
    base = counts("baseline")
    for name in ("deep", "shallow", "no-shared"):
        assert counts(name).active == pytest.approx(base.active, rel=0.03)
        assert counts(name).total == pytest.approx(base.total, rel=0.03)
    order = [VARIANTS[name].make_recipe().model_config() for name in ("deep", "baseline", "shallow")]
    assert [c.num_hidden_layers for c in order] == [7, 5, 3]
    assert [c.hidden_size for c in order] == [96, 128, 192]
    heads = [VARIANTS[n].make_recipe().model_config().num_key_value_heads for n in ("kv-1", "baseline", "kv-4")]
    assert heads == [1, 2, BASELINE.make_recipe().model_config().num_attention_heads]
    config = BASELINE.make_recipe().model_config()  # every feature of GLM-4.5
    assert min(config.use_qk_norm, config.attention_bias, config.n_shared_experts, config.num_nextn_predict_layers) == 1


def test_equal_time_is_more_steps_and_the_same_schedule_over_them():
    recipe = VARIANTS["adamw-time"].make_recipe(800, 0, 1.25)
    assert recipe.steps == 1000
    assert VARIANTS["adamw"].make_recipe(800, 0, 1.25).steps == 800
    assert recipe.at(999).learning_rate == pytest.approx(claims.ADAMW_RATE / 10)


def test_every_model_belongs_to_a_claim_and_names_choose():
    assert {"baseline", *(name for claim in CLAIMS for name in claim.variants)} == set(VARIANTS) == set(CHANGES)
    assert len(CLAIMS) == 9
    assert [v.name for v in chosen(["gqa", "softmax"])] == ["baseline", "kv-1", "kv-4", "softmax"]
    assert chosen([]) == list(VARIANTS.values())
    with pytest.raises(ValueError, match=r"'kv-3' is no ablation; known are the claims and models balance, init"):
        chosen(["kv-3"])


def test_runs_of_the_whole_plan_fit_into_four_hours():
    runs = sum(variant.seeds or 3 for variant in VARIANTS.values())
    assert runs == 47
    assert runs * 5.1 <= 240  # minutes


def test_the_heads_optimiser_is_part_of_the_recipe():
    recipe = VARIANTS["adamw-head"].make_recipe()
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert "head_optimiser" not in BASELINE.make_recipe().to_toml()
    model = Model(MICRO, random_params(MICRO))
    assert start(model, recipe).optimiser.head == "adamw"
    assert start(model, BASELINE.make_recipe()).optimiser.head == "muon"
    with pytest.raises(ValueError, match=r"head_optimiser = 'sgd' must be 'adamw', or left out"):
        Recipe("micro", recipe.stages, head_optimiser="sgd")


# -- the softmax gate --------------------------------------------------------------------------------------------

GATE = SoftmaxGate(book)
RANDOM = np.random.RandomState(3)
X, WEIGHT, BIAS = RANDOM.standard_normal((9, 6)), RANDOM.standard_normal((8, 6)), RANDOM.uniform(-0.1, 0.1, 8)
CONFIGS = {
    "normalised": MICRO.replace(n_group=1, topk_group=1),
    "as they are": MICRO.replace(n_group=1, topk_group=1, norm_topk_prob=False),
    "groups": MICRO.replace(n_group=4, topk_group=2),
}


def test_softmax_scores_choose_by_bias_and_weigh_without():
    config = CONFIGS["normalised"]
    routing, saved = GATE.router(X, Router(WEIGHT, BIAS), config)
    exps = np.exp(X @ WEIGHT.T)
    scores = exps / exps.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(saved.scores, scores, rtol=1e-12)
    for n in range(len(X)):
        best = sorted(range(8), key=lambda e: -(scores[n, e] + BIAS[e]))[: config.num_experts_per_tok]
        assert routing.indices[n].tolist() == best
        wanted = config.routed_scaling_factor * scores[n, best] / scores[n, best].sum()
        np.testing.assert_allclose(routing.weights[n], wanted, rtol=1e-12)
    plain, _ = router(X, Router(WEIGHT, BIAS), config)
    assert error(plain.weights, routing.weights) > 0.05


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_softmax_gate_backward_equals_central_differences(config):
    """Of the weights and, for the balance loss, of the scores."""
    K = config.num_experts_per_tok

    def forward(x, weight, bias):
        return GATE.router(x, Router(weight, bias), config)

    def values(**inputs):
        routing, saved = forward(**inputs)
        return np.concatenate([routing.weights, saved.scores], axis=1)

    def backward(backward_of):
        def found(dy, x, weight, bias):
            saved = forward(x, weight, bias)[1]
            dx, dparams = backward_of(dy[:, :K], saved, Router(weight, bias), config, dy[:, K:])
            return dx, *dparams

        return found

    inputs = {"x": X, "weight": WEIGHT, "bias": BIAS}
    choices = {"choices": lambda **i: forward(**i)[0].indices, "known": {}}
    report = check_gradients(values, backward(GATE.router_bwd), inputs, **choices)
    assert not report.wrong(), report.errors
    sigmoids = check_gradients(values, backward(router_bwd), inputs, **choices)
    assert sigmoids.wrong() == ["x", "weight"]


@pytest.mark.usefixtures("no_hang")
def test_softmax_gate_on_the_fast_operations_computes_the_same():
    params, ids = random_params(MICRO, 4), random_ids(MICRO, 5)
    arguments = ids, shift_targets(ids), params, MICRO, 0.3, 0.1
    slow_loss, slow = loss_and_grads(*arguments, ops=SoftmaxGate(book))
    fast_loss, fast = loss_and_grads(*arguments, ops=SoftmaxGate(FastOps(1)))
    plain_loss, _ = loss_and_grads(*arguments)
    for found, wanted in zip(fast_loss[:4], slow_loss[:4], strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    assert all((fast_loss.load[i] == slow_loss.load[i]).all() for i in slow_loss.load)
    wanted = {n: a for n, a in walk(slow) if not n.endswith("correction_bias")}
    errors = gradient_errors(dict(walk(fast)), wanted)
    assert max(errors.values()) < 1e-4, errors
    assert abs(plain_loss.main - slow_loss.main) > 1e-3


# -- figures and runs, on a tiny model ---------------------------------------------------------------------------

TEXT = "def halve(values):\n    return [value / 2 for value in values]\n\nThe lid of the box is green, not blue. "


@pytest.fixture
def tiny(monkeypatch):
    """All settings smaller; returns the data of a folder."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
             "moe_intermediate_size": 8, "n_routed_experts": 4, "head_dim": 8, "vocab_size": 320}  # fmt: skip
    for module, name, value in (
        (claims, "SIZES", sizes), (claims, "BATCH", 2), (claims, "LENGTH", 24), (measured, "LENGTH", 24),
        (measured, "ITEMS", 2), (run, "TIMED", 1),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    tokenizer = train_tokenizer([TEXT], 320)
    documents = [make_document(domain, domain, TEXT * 20) for domain in ("code", "prose")]
    corpus = Corpus.build(documents, tokenizer.encode, tokenizer.end_ids[0])
    return run.Data(tokenizer, corpus, measured.held_out(tokenizer, 2))


def quietly(line):
    pass


def test_a_seed_decides_the_weights_and_the_order_of_the_data_whatever_the_model(tiny):
    first, second, other = (
        tiny.batches(VARIANTS[name].make_recipe(4, seed)).batch(3)
        for name, seed in (("baseline", 1), ("shallow", 1), ("baseline", 2))
    )
    weights = [
        tiny.model(BASELINE, BASELINE.make_recipe(4, seed)).params.lm_head.weight.tobytes() for seed in (1, 1, 2)
    ]
    assert weights[0] == weights[1] != weights[2]
    assert np.array_equal(first.ids, second.ids)
    assert not np.array_equal(first.ids, other.ids)


def test_the_data_of_a_folder_are_made_once(tiny, tmp_path):
    run._save_corpus(tmp_path / "corpus.safetensors", tiny.corpus)
    tiny.tokenizer.save(tmp_path)
    again = run.prepare(tmp_path, lambda line: pytest.fail(line), rows=2)
    assert again.corpus.streams.keys() == {"code", "prose"}
    for name, stream in tiny.corpus.streams.items():
        assert all(np.array_equal(a, b) for a, b in zip(again.corpus.streams[name], stream, strict=True))
    for kind, batches in tiny.held_out.batches.items():
        for one, other in zip(again.held_out.batches[kind], batches, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_figures_are_what_the_model_shows(tiny, seed):
    """Against the model's own face, tapped, on the same text, of which a part is padding."""
    for (batch,) in tiny.held_out.batches.values():
        batch.segments[1, 15:], batch.targets[1, 14:] = PADDING, IGNORE
    recipe = BASELINE.make_recipe(3)
    config = tiny.config(recipe)
    model = Model(config, random_params(config, seed), tiny.tokenizer)
    found = measured.figures(model, tiny.held_out, book)
    losses, load, logits, agree = [], {}, [], []
    for kind, (batch,) in tiny.held_out.batches.items():
        assert batch.ids.shape == (2, 24), kind
        valid = (batch.segments >= 0).reshape(-1)

        def watch(name, array, valid=valid):
            if name.endswith("expert_indices"):
                load.setdefault(name, []).append(array[valid])
            if name.endswith("attn.scores"):
                logits.append(np.abs(array[np.isfinite(array)]).max())

        out = model.forward(batch.ids, segments=batch.segments, tap=watch)
        losses.append(float(book.cross_entropy(out.logits, batch.targets)[0]))
        drafts, trunk = (a.argmax(axis=-1) for a in (model.mtp(batch.ids, segments=batch.segments), out.logits[:, 1:]))
        same = (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, 1:] >= 0)
        agree.append((drafts == trunk)[same & ~np.isin(trunk, tiny.tokenizer.end_ids)])
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["tasks_loss"] == pytest.approx(losses[2], rel=1e-5)
    assert found["attention_logit"] == pytest.approx(max(logits), rel=1e-5)
    assert found["draft_agreement"] == pytest.approx(np.concatenate(agree).mean())
    picks = [np.bincount(np.concatenate(p).reshape(-1), minlength=4) for p in load.values()]
    assert found["max_violation"] == pytest.approx(max(p.max() / p.mean() - 1 for p in picks))
    fast = measured.figures(model, tiny.held_out, FastOps(1))
    assert fast == pytest.approx(found, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_the_largest_logit_of_a_layer_is_over_each_head_with_its_own_keys(seed):
    seen, ids = {}, random_ids(MICRO, seed)

    def watch(name, array):
        seen[name] = array
        return array

    _, saved = transformer(ids, random_params(MICRO, seed), MICRO, tap=watch, save=True)
    for i, layer in enumerate(saved.layers):
        scores = seen[f"layers.{i}.self_attn.scores"]
        largest = np.abs(scores[np.isfinite(scores)]).max()
        assert measured._largest_logit(layer.attention) == pytest.approx(largest, rel=1e-5)


def without_times(folder):
    """All results but for what depends on the machine."""
    results = run.read_results(folder)
    for result in results.values():
        for look in [*result["curve"], result["figures"], result]:
            for name in ("seconds", "load_average"):
                look.pop(name, None)
    return results


@pytest.mark.usefixtures("no_hang")
def test_runs_end_in_results_are_skipped_when_finished_and_go_on_when_interrupted(tiny, tmp_path, monkeypatch):
    routed, real = [], SoftmaxGate.router
    monkeypatch.setattr(SoftmaxGate, "router", lambda *given: (routed.append(given), real(*given))[1])
    models = chosen(["baseline", "softmax", "adamw-time", "muon-rate"])
    run.run_all(tmp_path / "whole", models, 2, 3, say=quietly, data=tiny)
    whole = without_times(tmp_path / "whole")
    names = ["adamw-time", "baseline", "softmax"]
    assert sorted(whole) == sorted([*((n, s) for n in names for s in (0, 1)), ("muon-rate", 0)])
    base = whole["baseline", 0]
    assert [look["step"] for look in base["curve"]] == [0, 1, 2]
    assert base["figures"] == base["curve"][-1]
    assert base["tokens"] == 3 * 2 * 24
    assert base["config"]["hidden_size"] == 16
    assert base["parameters"]["active"] == tiny.config(BASELINE.make_recipe(3)).count_parameters().active
    losses = {s: whole["baseline", s]["curve"][0]["code_loss"] for s in (0, 1)}
    assert losses[0] != losses[1]
    steps, looks, seeds = 3, 3 * 3, 2
    assert len(routed) == seeds * (steps + looks) * 2  # by two layers, the MTP layer's among them
    assert not list((tmp_path / "whole").rglob("checkpoint-*"))

    monkeypatch.setattr(run, "run_one", lambda *given: pytest.fail("a finished run ran again"))
    run.run_all(tmp_path / "whole", models, 2, 3, say=quietly, data=tiny)
    with pytest.raises(ValueError, match=r"baseline, seed 0, is of another recipe \(it has 3 steps, this one 4\)"):
        run.run_all(tmp_path / "whole", models, 2, 4, say=quietly, data=tiny)
    monkeypatch.undo()


@pytest.mark.usefixtures("no_hang")
def test_an_interrupted_run_goes_on_to_the_same_figures(tiny, tmp_path, monkeypatch):
    models = chosen(["adamw-head"])
    run.run_all(tmp_path / "whole", models, 1, 3, say=quietly, data=tiny)
    real = run.train

    def interrupted(*given, **named):
        real(*given, **named, stop_after=1)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run_all(tmp_path / "halves", models, 1, 3, say=quietly, data=tiny)
    assert not run.read_results(tmp_path / "halves")
    assert list((tmp_path / "halves").rglob("checkpoint-000001"))
    monkeypatch.setattr(run, "train", real)
    run.run_all(tmp_path / "halves", models, 1, 3, say=quietly, data=tiny)
    assert without_times(tmp_path / "halves") == without_times(tmp_path / "whole")


@pytest.mark.usefixtures("no_hang")
def test_a_diverged_run_is_a_result_and_time_that_is_over_begins_none(tiny, tmp_path):
    wild = replace(VARIANTS["muon-rate"], stage={"learning_rate": 1e39})
    lines = []
    with np.errstate(all="ignore"):
        run.run_all(tmp_path, [wild], 1, 3, say=lines.append, data=tiny)
    result = run.read_results(tmp_path)["muon-rate", 0]
    assert result["figures"] == {}
    assert "step 0" in result["diverged"]
    assert "step 0" in lines[-1]
    said = []
    run.run_all(tmp_path / "late", [BASELINE], 1, 1, minutes=0, say=said.append, data=tiny)
    assert said[-1] == "0 minutes are over, 1 runs are left: the same command goes on"
    assert not run.read_results(tmp_path / "late")


# -- the report --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([0.10, 0.11, 0.12], "worse"),
        ([-0.10, -0.11, -0.12], "better"),
        ([-0.05, -0.10, -0.20], "perhaps better"),  # 2.6 standard errors
        ([0.05, 0.10, 0.20], "perhaps worse"),
        ([-0.01, 0.02, 0.02], "no difference seen"),
        ([0.01, 0.01, 0.2], "no difference seen"),  # one sign, but 1.2 standard errors
        ([0.0, 0.0, 0.0], "no difference seen"),
        ([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, -0.001], "no difference seen"),  # 8.9, but two signs
        ([0.1, 0.1], "too few seeds"),
        ([], "not run"),
    ],
)
def test_verdicts_follow_the_rule(differences, said):
    assert verdict(differences, MEASURES["loss"]) == said
    words = {"better": "worse", "worse": "better"}
    turned = re.sub("better|worse", lambda m: words[m[0]], said)
    assert verdict(differences, MEASURES["draft_agreement"]) == turned  # there, more is better


def made_up(name, seed, loss, **figures):
    """A result as a run writes it."""
    look = {"step": 9, "loss": loss, "tasks_loss": loss, "max_violation": 0.5, "attention_logit": 9.0}
    figures = {**look, "draft_agreement": 0.4, **figures}
    curve = [{**figures, "step": step, "loss": loss + 1 - step / 9} for step in (0, 3, 6, 9)]
    recipe = VARIANTS[name].make_recipe(10, seed)
    counts = recipe.model_config().count_parameters()
    return {"name": name, "seed": seed, "steps": 10, "tokens": 40960, "rate": 0.004, "cache_bytes": 1280,
            "parameters": {"total": counts.total, "active": counts.active}, "figures": figures, "diverged": None,
            "seconds": 0.3, "load_average": 4.0, "threads": 4, "curve": curve}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Fabricated results: balancing off is even in loss and less even in load; AdamW worse; softmax better."""
    base = [2.0, 2.1, 2.05]
    losses = {
        "baseline": base, "unbalanced": [2.01, 2.08, 2.06], "adamw": [x + 0.1 + i / 100 for i, x in enumerate(base)],
        "softmax": [x - 0.2 - i / 100 for i, x in enumerate(base)], "muon-rate": [2.2], "kv-1": [2.1, 2.2],
    }  # fmt: skip
    results = [made_up(name, seed, loss) for name, by_seed in losses.items() for seed, loss in enumerate(by_seed)]
    for result in results:
        if result["name"] == "unbalanced":
            result["figures"]["max_violation"] = 3.0 + result["seed"] / 10
    results.append({**made_up("init-0.006", 0, 0.0), "figures": {}, "diverged": "step 3: loss nan", "curve": []})
    (tmp_path / "results").mkdir()
    for result in results:
        (tmp_path / "results" / f"{result['name']}-{result['seed']}.json").write_text(json.dumps(result))
    return tmp_path


def row(text, measure, label):
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {measure} | {label} |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_the_page_says_what_the_figures_say(folder, tmp_path):
    page = tmp_path / "docs" / "ablations.md"
    page.parent.mkdir()
    write_report(folder, page)
    text = page.read_text("utf-8")
    assert row(text, "loss", "AdamW")[2:] == [
        "2.1000",
        "2.2100",
        "2.1700",
        "2.1600 ± 0.0557",
        "+0.1100 ± 0.0058",
        "worse",
    ]
    gate = text.split("## Sigmoid gate")[1]
    assert row(gate, "loss", "softmax gate")[-2:] == ["-0.2100 ± 0.0058", "better"]
    assert row(text, "loss", "no balancing")[-1] == "no difference seen"
    assert row(text, "MaxVio", "no balancing")[2:] == [
        "3.00",
        "3.10",
        "3.20",
        "3.10 ± 0.10",
        "+2.60 ± 0.06",
        "less even",
    ]
    assert row(text, "loss", "1 key/value head")[-1] == "too few seeds"
    assert row(text, "loss", "0.006, outputs scaled")[2:] == ["diverged", "—", "—", "—", "—", "diverged in 1 of 1"]
    assert row(text, "loss", "Muon, rate 0.004")[2:] == ["2.2000", "—", "—", "2.2000", "+0.2000", "too few seeds"]
    assert row(text, "loss", "deep, narrow")[2:] == ["—"] * 5 + ["not run"]
    assert "of the 5 rows with a verdict here 0.9 and 0.2." in text
    assert "nothing else to do" in text
    assert len(text.splitlines()) <= 165
    links = re.findall(r"\]\((\S+)\)", text)
    assert [link.removesuffix(".png").rpartition("/")[2] for link in links] == ["balance", "muon", "gqa", "gate"]
    sizes = [(page.parent / link).stat().st_size for link in links]
    assert 3000 < min(sizes) <= max(sizes) < 80_000


def test_commentary_is_kept_and_never_lost(folder, tmp_path):
    page = tmp_path / "ablations.md"
    write_report(folder, page)
    empty = page.read_text("utf-8")
    written = empty.replace("<!-- by hand: muon -->\n", "<!-- by hand: muon -->\nOur own words.\n\nTwo paragraphs.\n")
    page.write_text(written, "utf-8")
    write_report(folder, page)
    assert page.read_text("utf-8") == written != empty
    assert read_comments(written) == {"muon": "Our own words.\n\nTwo paragraphs.\n"}
    page.write_text(written.replace("hand: muon", "hand: adam"), "utf-8")
    with pytest.raises(ValueError, match="there is commentary on adam, which is no claim"):
        write_report(folder, page)
    assert "hand: adam" in page.read_text("utf-8")


def test_pairs_are_of_one_seed_and_a_busy_machine_is_named(folder):
    results = run.read_results(folder)
    assert paired(results, "unbalanced", "loss") == pytest.approx([0.01, -0.02, 0.01])
    del results["baseline", 1]
    assert paired(results, "unbalanced", "loss") == pytest.approx([0.01, 0.01])
    results["kv-1", 0] = {**results["kv-1", 0], "load_average": 9.5}
    text = page_text(results, {})
    assert "busy with other work in 1 of" in text
    assert "(mean load up to 9.5 on 4 threads)" in text


def test_the_command_lists_refuses_and_reports(folder, tmp_path, capsys):
    assert main(["--list", "--only", "depth"]) == 0
    assert "965,312 active" in capsys.readouterr().out
    assert main(["--only", "nothing"]) == 1
    assert "'nothing' is no ablation" in capsys.readouterr().err
    assert main(["--report", "--folder", str(tmp_path / "none")]) == 1
    assert "no finished run to report" in capsys.readouterr().err
    assert main(["--seeds", "0"]) == 1
    assert main(["--report", "--folder", str(folder), "--page", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").exists()
