"""Taps and traces: what is published fires, what fires is published; traces keep, estimate, save and explain."""

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import minglm
from minglm.look.describe import describe, describe_html, table
from minglm.look.tables import html_table
from minglm.look.taps import AXES, TAPS, WHERE, taps_markdown
from minglm.look.trace import StepRow, Trace, estimate_bytes, expected_taps, load_trace, take_trace

# Every tap of `micro` in the order of the forward pass; {a b} stands for a, then b. These names are public.
MICRO = """
embed_tokens
layers.0.input_layernorm
layers.0.self_attn.{q k v q_norm k_norm q_rope k_rope scores probs heads o}
layers.0.{middle post_attention_layernorm}
layers.0.mlp.{gate up hidden out}
layers.0.out
layers.1.input_layernorm
layers.1.self_attn.{q k v q_norm k_norm q_rope k_rope scores probs heads o}
layers.1.{middle post_attention_layernorm}
layers.1.mlp.{router_logits router_scores biased_scores expert_indices expert_weights}
layers.1.mlp.experts.{0 1 2 3 4 5 6 7}.{tokens gate up hidden out}
layers.1.mlp.routed
layers.1.mlp.shared_experts.{gate up hidden}
layers.1.mlp.{shared out}
layers.1.out
layers.2.input_layernorm
layers.2.self_attn.{q k v q_norm k_norm q_rope k_rope scores probs heads o}
layers.2.{middle post_attention_layernorm}
layers.2.mlp.{router_logits router_scores biased_scores expert_indices expert_weights}
layers.2.mlp.experts.{0 1 2 3 4 5 6 7}.{tokens gate up hidden out}
layers.2.mlp.routed
layers.2.mlp.shared_experts.{gate up hidden}
layers.2.mlp.{shared out}
layers.2.out
norm
logits
"""

MICRO_MTP = """
layers.3.{embed_tokens enorm hnorm eh_proj}
layers.3.input_layernorm
layers.3.self_attn.{q k v q_norm k_norm q_rope k_rope scores probs heads o}
layers.3.{middle post_attention_layernorm}
layers.3.mlp.{router_logits router_scores biased_scores expert_indices expert_weights}
layers.3.mlp.experts.{0 1 2 3 4 5 6 7}.{tokens gate up hidden out}
layers.3.mlp.routed
layers.3.mlp.shared_experts.{gate up hidden}
layers.3.mlp.{shared out}
layers.3.out
layers.3.shared_head.norm
"""


def expand(text: str) -> list[str]:
    names = []
    for line in text.split("\n"):
        choices = [part.split(" ") for part in re.split(r"[{}]", line)]
        names += ["".join(parts) for parts in product(*choices)] if line else []
    return names


def ids_for(config, B=2, T=9, seed=3):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (B, T))


@pytest.fixture(scope="module")
def micro():
    return minglm.new("micro", seed=1)


@pytest.fixture(scope="module")
def trace(micro):
    return micro.trace(ids_for(micro.config))


# -- the table and the model agree -------------------------------------------------------------------------------


def test_names_of_micro_are_pinned():
    taps = expected_taps(minglm.PRESETS["micro"], B=2, T=9, mtp_depth=1)
    assert [tap.name for tap in taps] == expand(MICRO) + expand(MICRO_MTP)


def fits(array, expected, dtype):
    wanted_dtype = np.int64 if expected.dtype == "int" else dtype
    axes = zip(array.shape, expected.shape, strict=True)
    return array.dtype == wanted_dtype and all(want in (None, got) for got, want in axes)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "config",
    [
        minglm.PRESETS["micro"],
        minglm.PRESETS["glm-nano"],
        minglm.PRESETS["micro"].replace(
            n_shared_experts=0, use_qk_norm=False, first_k_dense_replace=3, num_nextn_predict_layers=1
        ),
    ],
    ids=["micro", "glm-nano", "dense without shared experts"],
)
def test_every_declared_tap_fires_and_no_other(config, dtype):
    model = minglm.new(config, seed=1, dtype=dtype)
    ids, fired = ids_for(config), []

    def tap(name, array):
        fired.append((name, array))

    model.forward(ids, tap=tap)
    MTP = tuple(f"layers.{config.num_hidden_layers + i}." for i in range(config.num_nextn_predict_layers))
    model.mtp(ids, depth=3, tap=lambda name, array: tap(name, array) if name.startswith(MTP) else None)  # trunk: above
    expected = iter(expected_taps(config, *ids.shape, mtp_depth=3))
    silent = []
    for name, array in fired:  # the expected ones in order; between two that fired, experts that nobody picked
        for want in expected:
            if want.name == name:
                break
            silent.append(want.name)
        else:
            pytest.fail(f"{name} fired, but is not declared, or not at this place")
        assert fits(array, want, dtype), f"{name}: {array.dtype} {array.shape}, declared {want}"
    silent += [want.name for want in expected]
    assert all(".experts." in name for name in silent)
    assert len({name for name, _ in fired if ".experts." in name}) > len(set(silent))


def test_n_is_the_number_of_tokens_that_picked_the_expert(trace):
    picked = trace["layers.2.mlp.expert_indices"]
    for e in range(8):
        n = (picked == e).sum()
        if n:
            assert len(trace[f"layers.2.mlp.experts.{e}.tokens"]) == n == len(trace[f"layers.2.mlp.experts.{e}.out"])
        else:
            assert f"layers.2.mlp.experts.{e}.out" not in trace


def test_the_table_is_closed():
    assert {axis for tap in TAPS for axis in tap.axes.split()} == set(AXES)
    assert {tap.where for tap in TAPS} == set(WHERE)
    assert {tap.dtype for tap in TAPS} == {"compute", "int"}
    assert all("|" not in tap.what for tap in TAPS)


def test_the_page_is_up_to_date():
    page = Path(__file__).parents[1] / "docs" / "taps.md"
    assert page.read_text("utf-8") == taps_markdown(), "run: python -m minglm.look.taps > docs/taps.md"


def test_mtp_taps_need_an_mtp_layer():
    with pytest.raises(ValueError, match="no multi-token-prediction layer"):
        expected_taps(minglm.PRESETS["micro"].replace(num_nextn_predict_layers=0), 1, 5, mtp_depth=1)


# -- taking a trace ----------------------------------------------------------------------------------------------


def test_a_trace_holds_what_the_forward_pass_computes(micro, trace):
    out = micro.forward(trace.ids)
    np.testing.assert_array_equal(trace["logits"], out.logits)
    np.testing.assert_array_equal(trace["norm"], out.hidden)
    assert trace.names() == list(trace) == [t.name for t in expected_taps(micro.config, 2, 9) if t.name in trace]
    assert trace.names("layers.1.self_attn.q*") == [f"layers.1.self_attn.{q}" for q in ("q", "q_norm", "q_rope")]


def test_keep_takes_several_patterns(micro):
    trace = micro.trace([1, 2, 3], keep="layers.[12].mlp.routed, logits")
    assert trace.names() == ["layers.1.mlp.routed", "layers.2.mlp.routed", "logits"]


def test_every_single_name_can_be_kept(micro, trace):
    for name in trace:
        only = take_trace(micro, trace.ids, keep=name)
        assert only.names() == [name]
        np.testing.assert_array_equal(only[name], trace[name])


def test_arrays_are_copies(micro):
    seen = {}

    def tap(name, array):
        seen[name] = array

    trace = micro.trace([1, 2, 3], tap=tap)
    assert not any(np.shares_memory(trace[name], seen[name]) for name in trace)
    assert all(trace[name].flags.c_contiguous for name in trace)


def test_what_is_kept_is_what_the_model_used(micro):
    def silence(name, array):
        return np.zeros_like(array) if name == "layers.1.mlp.shared" else None

    trace = micro.trace([1, 2, 3], tap=silence)
    assert not trace["layers.1.mlp.shared"].any()
    np.testing.assert_array_equal(trace["layers.1.mlp.out"][0], trace["layers.1.mlp.routed"])


def test_replacements_in_place_and_of_another_kind_are_kept_as_used(micro, trace):
    def double(name, array):
        if name == "embed_tokens":
            array *= 2

    np.testing.assert_array_equal(micro.trace(trace.ids, tap=double)["embed_tokens"], 2 * trace["embed_tokens"])
    ones = micro.trace([1, 2, 3], tap=lambda name, a: np.ones(a.shape).tolist() if name == "norm" else None)
    assert ones["norm"].dtype == np.float32
    assert (ones["norm"] == 1).all()


def test_a_replacement_of_another_shape_is_refused(micro):
    with pytest.raises(ValueError, match=r"returned float64 \[3\] for norm"):
        micro.trace([1, 2, 3], tap=lambda name, array: np.zeros(3) if name == "norm" else None)


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ("layers.1.self_atn.q", r"did you mean layers\.\*\.self_attn\.q"),
        ("logits,layers.7.mlp.out", r"'layers\.7\.mlp\.out'.*Layers are 0 … 2"),
        ("layers.3.enorm", "no tap of this forward pass"),
        (" , ", "names nothing"),
    ],
)
def test_keep_that_matches_nothing(micro, keep, words):
    with pytest.raises(ValueError, match=words):
        micro.trace([1, 2, 3], keep=keep)


# -- bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("preset", ["micro", "glm-nano"])
def test_the_estimate_is_exact_for_everything(preset, dtype):
    model = minglm.new(preset, dtype=dtype)
    itemsize = np.dtype(dtype).itemsize
    for T in (1, 12):
        trace = model.trace(ids_for(model.config, 2, T))
        assert estimate_bytes(model.config, 2, T, "*", itemsize) == trace.nbytes


@pytest.mark.parametrize(
    ("keep", "exact"), [("layers.*.out", True), ("logits", True), ("*.experts.1.out", False), ("*.experts.*", True)]
)
def test_the_estimate_is_never_too_low(micro, trace, keep, exact):
    held = take_trace(micro, trace.ids, keep=keep).nbytes
    estimate = estimate_bytes(micro.config, *trace.ids.shape, keep)
    assert estimate == held if exact else estimate > held


def test_too_much_is_refused_before_running(micro):
    ran = []
    with pytest.raises(ValueError, match=r"would take 1\d\d,\d\d\d bytes, the limit is 9,000; narrow keep"):
        micro.trace(ids_for(micro.config, 1, 12), limit=9000, tap=lambda name, array: ran.append(name))
    assert not ran
    assert micro.trace(ids_for(micro.config, 1, 12), keep="norm", limit=9000).names() == ["norm"]


def test_a_large_model_is_estimated_without_its_weights():
    air = minglm.PRESETS["GLM-4.5-Air"]
    scores = 46 * 96 * 1000 * 1000 * 4  # [B, H, T, S] in each layer
    assert scores < estimate_bytes(air, 1, 1000, "*.scores") < 1.01 * scores
    assert 2 * scores < estimate_bytes(air, 1, 1000) < 4 * scores


# -- what a trace knows ------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of five letters."""

    def __len__(self):
        return 5

    def token(self, id):
        return "abcde"[id]


def test_tokens_without_and_with_a_tokenizer(micro):
    assert micro.trace([3, 60]).tokens == ["3", "60"]
    with_text = minglm.Model(micro.config, micro.params, Letters())
    assert with_text.trace([3, 60, 0]).tokens == ["d", "60", "a"]


def test_rows_and_seconds(trace):
    rows = {row.name: row for row in trace.rows()}
    assert list(rows) == trace.names()
    row = rows["norm"]
    assert row.shape == (2, 9, 20)
    assert row.dtype == "float32"
    assert row.mean == pytest.approx(trace["norm"].mean(), abs=1e-6)
    assert row.std == pytest.approx(trace["norm"].std(), rel=1e-5)
    assert row.ms == pytest.approx(1e3 * trace.seconds["norm"])
    assert all(0 <= row.ms < 1000 for row in rows.values())
    assert np.isfinite(rows["layers.0.self_attn.scores"].mean)  # −∞ at hidden keys is left out
    assert rows["layers.1.mlp.expert_indices"].mean is None  # a mean expert means nothing


def test_seconds_cover_steps_that_were_not_kept_but_not_the_users_tap(micro):
    import time

    slow = micro.trace([1, 2, 3], keep="logits", tap=lambda name, array: time.sleep(0.02) if name == "norm" else None)
    assert "layers.1.mlp.routed" in slow.seconds
    assert slow.seconds["logits"] < 0.02


def test_a_nan_shows_in_the_rows(micro):
    trace = micro.trace([1, 2], tap=lambda name, array: array * np.nan if name == "norm" else None)
    assert np.isnan(trace.rows()[trace.names().index("norm")].mean)


def test_unknown_names_are_explained(micro, trace):
    with pytest.raises(KeyError, match=r"did you mean layers\.1\.self_attn\.q"):
        trace["layers.1.self_attn.qq"]
    with pytest.raises(KeyError, match="an expert that no token picked"):
        trace["layers.1.mlp.experts.99.out"]
    narrow = micro.trace([1, 2], keep="logits")
    with pytest.raises(KeyError, match="computed but not kept"):
        narrow["norm"]
    with pytest.raises(KeyError, match="did you mean logits"):
        narrow["logit"]


def test_routing_is_there_even_if_not_asked_for(micro, trace):
    narrow = micro.trace(trace.ids, keep="logits")
    assert narrow.names() == ["logits"]
    np.testing.assert_array_equal(narrow.routing.indices, trace.routing.indices)
    assert narrow.routing.layers == (1, 2)


def test_padding_is_left_out(micro):
    ids = ids_for(micro.config, 2, 5)
    segments = np.array([[-1, -1, 0, 0, 0], [0, 0, 0, 0, 0]])
    padded = take_trace(micro, ids, segments=segments)
    alone = micro.trace(ids[:1, 2:])
    assert padded.routing.indices.shape == (8, 2, 3)
    assert padded.tokens == [str(i) for i in [*ids[0, 2:], *ids[1]]]
    np.testing.assert_array_equal(padded.routing.indices[:3], alone.routing.indices)


def test_a_model_of_dense_layers_has_no_routing(micro):
    dense = minglm.new(micro.config.replace(first_k_dense_replace=3))
    with pytest.raises(ValueError, match="dense layers have no router"):
        _ = dense.trace([1, 2]).routing


def test_a_trace_is_compared_by_identity(trace):
    assert trace == trace
    assert trace != dict(trace)
    assert len({trace}) == 1


# -- saving ------------------------------------------------------------------------------------------------------


def test_save_and_load(micro, tmp_path):
    segments = np.array([[-1, 0, 0, 0]])
    trace = take_trace(micro, ids_for(micro.config, 1, 4), keep="layers.1.self_attn.*,logits", segments=segments)
    path = tmp_path / "new folder" / "t.safetensors"
    trace.save(path)
    trace.save(path)  # over the old one
    again = load_trace(path)
    assert isinstance(again, Trace)
    assert again.names() == trace.names()
    for name in trace:
        np.testing.assert_array_equal(again[name], trace[name])
        assert again[name].dtype == trace[name].dtype
    np.testing.assert_array_equal(again.ids, trace.ids)
    np.testing.assert_array_equal(again.routing.biased_scores, trace.routing.biased_scores)
    assert (again.tokens, again.seconds, again.model) == (trace.tokens, trace.seconds, trace.model)
    assert again.rows() == trace.rows()
    assert [p.name for p in path.parent.iterdir()] == ["t.safetensors"]


def test_transposed_views_survive_saving(micro, tmp_path):
    trace = micro.trace([1, 2, 3], keep="logits")
    view = np.arange(12.0).reshape(3, 4).T
    Trace({"logits": view}, ("logits",), trace.ids.T, trace.valid.T, [], trace.seconds).save(tmp_path / "t")
    np.testing.assert_array_equal(load_trace(tmp_path / "t")["logits"], view)


def test_files_that_are_no_trace(micro, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*cannot read"):
        load_trace(tmp_path / "nowhere")
    (tmp_path / "text").write_text("not safetensors")
    with pytest.raises(ValueError, match=r"text.*cannot read"):
        load_trace(tmp_path / "text")
    micro.save(tmp_path / "model")
    with pytest.raises(ValueError, match="not a trace"):
        load_trace(tmp_path / "model" / "model.safetensors")


# -- showing -----------------------------------------------------------------------------------------------------


def test_a_trace_shows_itself(micro, trace):
    assert re.fullmatch(rf"Trace\(micro, B = 2, T = 9: {len(trace)} arrays, 0\.\d MB\)", repr(trace))
    page = trace._repr_html_(most=5)
    assert page.count("<tr>") == 6
    assert "the first 5 of them" in page
    named = minglm.Model(micro.config, micro.params, name="<b>")
    assert "&lt;b&gt;" in named.trace([1])._repr_html_()


def test_tables_are_aligned_and_safe():
    text = table([("a\n\x1b[2J", 3, None), ("算法", 10, 0.123456)], ("name", "n", "x"))
    assert text.split("\n") == [
        "name         n       x",
        "──────────  ──  ──────",
        "a\\n\\x1b[2J   3",
        "算法        10  0.1235",
    ]
    assert table([], ("a", "b")) == "a  b\n─  ─"
    assert table([(np.float32(0.5), np.int64(7), (2, 3))], ("x", "n", "shape")).split("\n")[2] == "0.5  7  [2, 3]"
    assert '<td style="text-align:left">&lt;|user|&gt;</td>' in html_table([("<|user|>", 1)], ("token", "n"))
    with pytest.raises(ValueError, match="2 cells, the header 1"):
        table([(1, 2)], ("one",))


def test_the_step_table(trace):
    lines = table(trace.rows(), StepRow._fields).split("\n")
    assert len(lines) == len(trace) + 2
    assert lines[2].split()[:5] == ["embed_tokens", "[2,", "9,", "20]", "float32"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_describe(micro, dtype):
    text = describe(micro.astype(dtype))
    counts = micro.config.count_parameters()
    itemsize = 8 if dtype == "float64" else 4  # the cache holds what is computed, not what is stored
    for part in (
        f"{counts.total:,}",
        f"{counts.active:,}",
        f"{micro.config.kv_bytes_per_token(itemsize)} bytes",
        f"{micro.config.flops_per_token(1):,}",
        "3 (0 dense, 1 … 2 with experts)",
        "3, from the best 2 of 4 groups",
        dtype,
    ):
        assert part in text
    assert "hidden size                         D       20" in text


def test_describe_in_a_notebook(micro):
    page = minglm.Model(micro.config, micro.params, name="<script>")._repr_html_()
    assert page == describe_html(minglm.Model(micro.config, micro.params, name="<script>"))
    assert "<script>" not in page
    assert page.count("<table>") == 2
