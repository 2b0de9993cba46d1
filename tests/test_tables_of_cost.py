"""The two tables behind docs/small-floats.md and docs/speculation.md, on a shipped model and few items."""

import numpy as np
import pytest

import minglm
from minglm.bench import drafts
from minglm.evaluate import storage
from minglm.formats.smallfloats import SmallFloats
from minglm.model import linear


@pytest.fixture(scope="module")
def nano():
    return minglm.load("glm-nano")


def test_storage_rows(nano):
    rows = {row.kept: row for row in storage.storage_rows(nano, batches=1, items=2)}
    assert list(rows)[:5] == ["float32", "bfloat16", "fp8", "fp8-block", "mxfp4"]
    assert rows["float32"].worse == 0
    assert rows["float32"].routing == 1
    assert rows["float32"].megabytes > rows["bfloat16"].megabytes > rows["fp8"].megabytes
    assert rows["bfloat16"].code == rows["float32"].code  # it is stored so
    for name in ("fp8", "mxfp4", "fp8, inputs too, dynamic", "fp8, inputs too, static"):
        assert 0 < abs(rows[name].worse) < 3
        assert 0.9 < rows[name].routing < 1


def test_the_command_tells_each_row_as_it_comes(monkeypatch, capsys):
    def rows(*given):
        yield storage.StorageRow("float32", 30.0, 1.1, 1.5, 0.0, 1.0, None, None)
        raise ValueError("enough")

    monkeypatch.setattr(storage, "storage_rows", rows)
    assert storage.main(["--model", "glm-nano"]) == 1
    said = capsys.readouterr()
    assert said.out == "kept as float32, MB 30.0, code 1.1000, prose 1.5000, worse, % +0.00, same experts, % 100.00\n"
    assert said.err == "error: enough\n"


def test_inputs_are_rounded_where_releases_round_them(nano):
    layer = nano.params.layers[1]
    q_proj, gate = layer.self_attn.q_proj.weight, layer.mlp.gate.weight
    x = np.random.default_rng(0).standard_normal((5, q_proj.shape[1])).astype(np.float32)
    wanted = linear(SmallFloats.of("fp8", x).astype(np.float32), q_proj)  # a token is a row with a scale
    dynamic = storage.fp8_inputs(nano, None)
    np.testing.assert_allclose(dynamic.linear(x, q_proj), wanted, rtol=1e-5, atol=1e-6)
    assert np.array_equal(dynamic.linear(x, gate), linear(x, gate))  # the router's input is not
    seen: dict = {}
    assert np.array_equal(storage.fp8_inputs(nano, None, seen).linear(x, q_proj), linear(x, q_proj))
    assert list(seen.values()) == [float(np.abs(x).max())]


def test_error_rows(nano):
    rows = {(row.kind, row.role): row for row in storage.error_rows(nano)}
    assert rows["fp8", "mlp.experts.*.up_proj"].tensors == 8 * 4
    assert 0.02 < rows["fp8", "self_attn.q_proj"].error < 0.03
    assert 0.1 < rows["mxfp4", "mlp.experts.*.up_proj"].error <= rows["mxfp4", "mlp.experts.*.up_proj"].worst < 0.13
    assert ("mxfp4", "self_attn.q_proj") not in rows


def test_draft_rows(nano):
    rows = list(drafts.rows(nano, nano, most=2, count=2))
    assert [(row.text, row.drafter, row.drafts) for row in rows[:4]] == [
        ("code", "MTP layer", 1), ("code", "MTP layer", 2), ("code", "glm-nano", 1), ("code", "glm-nano", 2)
    ]  # fmt: skip
    for row in rows:
        assert 1 <= row.tokens_per_round <= row.drafts + 1
        assert row.by_bytes < row.tokens_per_round
    itself = [row for row in rows if row.drafter == "glm-nano"]
    assert all(set(row.accepted.split()) == {"100"} for row in itself)  # who drafts what it will say


def test_the_output_before_the_norm_is_another(nano):
    hidden = np.random.default_rng(0).standard_normal((1, 128)).astype(np.float32)
    normed, before = (kind(nano, 4).feed(hidden, [5]) for kind in (drafts.NumpyMtpLayer, drafts._WithoutNorm))
    assert np.array_equal(normed[0], before[0])
    weight = nano.params.mtp[0].shared_head.norm.weight
    again = before[1] / np.sqrt(np.square(before[1]).mean() + nano.config.rms_norm_eps) * weight
    np.testing.assert_allclose(again, normed[1], rtol=1e-5)
    assert len(list(drafts.recycling(nano, count=1))) == 6
