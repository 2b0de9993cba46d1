"""Folders of the GLM-4.x releases in their true layout: read strictly, mapped, described without reading."""

import json
import re
import sys
import time
import warnings

import numpy as np
import pytest

import minglm
from minglm.cli import main
from minglm.formats.checkpoint import map_checkpoint
from minglm.formats.mapped import ExpertStack, Residency
from minglm.formats.smallfloats import SmallFloats
from minglm.look import reading
from minglm.look.folder import describe_folder
from minglm.model import walk
from tests.helpers import difference
from tests.releases import RELEASES, SMALL, write_release

pytestmark = pytest.mark.usefixtures("no_hang")


@pytest.fixture(scope="module", params=RELEASES)
def release(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("releases") / request.param
    write_release(folder, RELEASES[request.param], **SMALL)
    return folder


def release_of(folder):
    return RELEASES[folder.name]


# -- reading -----------------------------------------------------------------------------------------------------


def test_a_release_loads_and_runs(release):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = minglm.load(release)
    c = model.config
    assert (c.use_qk_norm, c.routed_scaling_factor) == ((False, 1.0) if "Air" in release.name else (True, 2.5))
    assert len(model.params.mtp) == 1
    assert (model.params.mtp[0].embed_tokens is not None) == release_of(release).mtp_ends
    assert (model.params.mtp[0].shared_head.head is not None) == release_of(release).mtp_ends
    text = model.generate([5, 6, 7], 8, end_ids=())
    assert model.generate([5, 6, 7], 8, end_ids=(), draft=2).ids == text.ids
    assert model.generate([5, 6, 7], 8, end_ids=(), engine="numpy").ids == text.ids


@pytest.mark.parametrize("release", [name for name, each in RELEASES.items() if each.fp8], indirect=True)
def test_fp8_is_kept_and_means_the_same_numbers(release):
    kept, wide = minglm.load(release, "fp8"), minglm.load(release)
    q_proj = kept.params.layers[2].self_attn.q_proj.weight
    assert isinstance(q_proj, SmallFloats)
    assert q_proj.kind == "fp8"
    ids = [[1, 2, 3, 4, 5]]
    numbers = dict(walk(wide.params))
    for name, array in walk(kept.params):
        if isinstance(array, SmallFloats):
            assert np.array_equal(array.astype(np.float32), numbers[name]), name
    assert (
        difference(kept.forward(ids).logits, wide.forward(ids).logits) < 0.02
    )  # the MTP head apart, bfloat16 rounding


def test_unknown_keys_are_kept(release, tmp_path):
    model = minglm.load(release)
    model.save(tmp_path / "again", "bfloat16")
    values = json.loads((tmp_path / "again/config.json").read_text())
    for key, value in release_of(release).extra.items():
        assert values[key] == value
    assert "quantization_config" not in values
    assert values["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["GLM-4.5", "GLM-4.6"])
def test_a_release_without_its_mtp_layer_loads_without(tmp_path, name):
    """As transformers and several quantisers leave it."""
    write_release(tmp_path, RELEASES[name], **SMALL)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    model = minglm.load(tmp_path)
    bare = model.params._replace(mtp=())
    minglm.formats.checkpoint.save_checkpoint(tmp_path / "bare", model.config, bare, "bfloat16")
    assert any(".layers.3." in key for key in index["weight_map"])
    with pytest.warns(UserWarning, match=r"names 1 multi-token-prediction layer\(s\), the weights have none"):
        found = minglm.load(tmp_path / "bare")
    ids = [[1, 2, 3]]
    assert np.array_equal(found.forward(ids).logits, model.forward(ids).logits)
    with pytest.raises(ValueError, match="no multi-token-prediction layer to draft with"):
        found.generate([1], 2, draft=1)


# -- mapped ------------------------------------------------------------------------------------------------------


def stacks(model):
    return [
        layer.mlp.experts.gate_proj
        for layer in (*model.params.layers, *(mtp.block for mtp in model.params.mtp))
        if hasattr(layer.mlp, "experts")
    ]


def test_mapped_weights_give_the_same(release):
    mapped = minglm.load(release, mode="mmap")
    owned = minglm.load(release, "fp8" if release_of(release).fp8 else "bfloat16")
    assert all(isinstance(stack, ExpertStack) for stack in stacks(mapped))
    for options in ({}, {"engine": "numpy"}, {"draft": 2}):
        for prompt in ([5, 6, 7], list(range(40))):
            found, wanted = (m.generate(prompt, 8, end_ids=(), **options) for m in (mapped, owned))
            assert found.ids == wanted.ids
    ids = [[1, 2, 3, 4, 5]]
    assert np.array_equal(mapped.mtp(ids), owned.mtp(ids))
    assert np.array_equal(mapped.forward(ids).logits, owned.forward(ids).logits)


def test_nothing_of_the_experts_is_read_before_a_token_needs_it(tmp_path):
    write_release(tmp_path, RELEASES["GLM-4.6"], **SMALL)
    model = minglm.load(tmp_path, mode="mmap")
    residency = stacks(model)[0].home.residency
    assert residency.read == 0
    model.generate([5], 1, end_ids=())
    expert = 3 * 32 * 64 * 2
    assert residency.read == 2 * 2 * expert  # two layers, two experts each
    model.generate(list(range(60)), 1, end_ids=())
    assert 8 * expert < residency.read == residency.resident <= 2 * 8 * expert  # each counted once


def test_a_budget_holds_and_changes_no_token(tmp_path):
    write_release(tmp_path, RELEASES["GLM-4.6"], **SMALL)
    free = minglm.load(tmp_path, mode="mmap")
    wanted = free.generate(list(range(30)), 20, end_ids=())
    with pytest.raises(
        ValueError, match=r"memory = 1.0 kB is less than one token of .*; give at least 27\d.\d kB \(\d+ bytes\)"
    ):
        minglm.load(tmp_path, mode="mmap", memory=1000)
    rest = sum(array.nbytes for name, array in walk(free.params) if ".mlp.experts." not in name)
    expert = 3 * 32 * 64 * 2
    model = minglm.load(tmp_path, mode="mmap", memory=rest + 5 * expert)
    residency, seen = stacks(model)[0].home.residency, []
    for step in model.steps(list(range(30)), 20, end_ids=()):
        seen.append(step.id)
        assert residency.resident <= 5 * expert
    assert seen == wanted.ids
    assert residency.read > 16 * expert  # given back and read again


@pytest.mark.parametrize("options", [{"draft": 1}, {"draft": 6}, {"draft": 2, "engine": "numpy"}])
def test_a_budget_holds_with_drafts(tmp_path, monkeypatch, options):
    """Several tokens at once would bring experts of several: a bounded model checks drafts a token at a time, and
    never gives back the expert that is being read."""
    write_release(tmp_path, RELEASES["GLM-4.6"], **SMALL)
    free = minglm.load(tmp_path, mode="mmap")
    rest = sum(array.nbytes for name, array in walk(free.params) if ".mlp.experts." not in name)
    expert = 3 * 32 * 64 * 2
    model = minglm.load(tmp_path, mode="mmap", memory=rest + 2 * expert)  # what one layer reads, nothing besides
    residency, together, use = stacks(model)[0].home.residency, [], Residency.use

    def watched(self, stack, experts):
        together.append(len(experts))
        use(self, stack, experts)
        assert list(self._spans)[-1][1] == list(experts)[-1]

    monkeypatch.setattr(Residency, "use", watched)
    found = model.generate(list(range(30)), 20, end_ids=(), **options)
    assert found.ids == free.generate(list(range(30)), 20, end_ids=()).ids
    assert residency.resident <= expert
    assert max(together) <= 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps; runs on Linux")
def test_given_back_pages_leave_memory(tmp_path):
    """What counts as ours, by the system's own count, before and after."""
    config = write_release(
        tmp_path,
        RELEASES["GLM-4.6"],
        **{**SMALL, "moe_intermediate_size": 512, "hidden_size": 512, "n_routed_experts": 32},
    )
    rest = 10_000_000
    model = minglm.load(tmp_path, mode="mmap", memory=rest + 4_000_000)
    whole = minglm.load(tmp_path, mode="mmap")
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 100).tolist()
    before = resident(tmp_path)
    whole.generate(ids, 2, end_ids=())
    all_of_it = resident(tmp_path) - before
    del whole
    model.generate(ids, 20, end_ids=())
    assert all_of_it > 40_000_000
    assert resident(tmp_path) < rest + 8_000_000 + before


def resident(folder):
    """Bytes of this folder's files that count as this process's memory."""
    total, ours = 0, False
    for line in open("/proc/self/smaps", encoding="utf-8"):
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def test_wrong_ways_to_ask(tmp_path):
    for options, message in (
        ({"mode": "disk"}, "mode = 'disk' is not there"),
        ({"mode": "mmap", "dtype": "float32"}, "mapped weights stay as the files have them"),
        ({"memory": 1e9}, "give it with mode='mmap'"),
    ):
        with pytest.raises(ValueError, match=message):
            minglm.load("glm-nano", **options)


def test_numpy_reads_one_expert_at_a_time(tmp_path):
    write_release(tmp_path, RELEASES["GLM-4.6"], **SMALL)
    _, params = map_checkpoint(tmp_path)
    stack = params.layers[1].mlp.experts.up_proj
    assert (stack.shape, stack.ndim, len(stack), stack.size) == ((8, 32, 64), 3, 8, 8 * 32 * 64)
    assert stack.dtype.name == "bfloat16"
    wide = stack.astype(np.float32)
    assert wide.dtype == np.float32
    assert stack.home.residency.read == 0
    assert np.array_equal(wide[3], stack[3].astype(np.float32))
    assert stack.home.residency.read == 3 * 32 * 64 * 2


# -- described ---------------------------------------------------------------------------------------------------


def test_a_folder_is_described(release):
    said = describe_folder(release)
    assert "Every tensor that config.json asks for is there, and nothing else." in said
    assert ("F8_E4M3" in said) == release_of(release).fp8
    assert "mode='mmap', memory=" in said
    assert "dtype='mxfp4'" in said


def test_what_does_not_fit_is_listed_and_nothing_is_raised(tmp_path):
    write_release(tmp_path, RELEASES["GLM-4.5"], **SMALL)
    values = json.loads((tmp_path / "config.json").read_text())
    values["num_hidden_layers"] = 2
    (tmp_path / "config.json").write_text(json.dumps(values))
    said = describe_folder(tmp_path, tensors=True)
    assert "tensors do not fit config.json" in said
    assert "unexpected: model.layers.3." in said
    assert "… and" in said
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in said


@pytest.mark.parametrize("name", ["GLM-4.5-Air", "GLM-4.5", "GLM-4.5-FP8"])
def test_a_folder_of_full_size_is_described_in_seconds(tmp_path, name):
    """Files as long as the real ones, without content. Nothing but headers can be read of them."""
    try:
        config = write_release(tmp_path, RELEASES[name], shards=40, sparse=True)
    except OSError as error:
        pytest.skip(f"this file system has no files with holes: {error}")
    began = time.monotonic()
    said = describe_folder(tmp_path)
    assert time.monotonic() - began < 60
    assert f"{config.count_parameters().total:,}" in said
    assert "Every tensor that config.json asks for is there" in said
    with pytest.raises(ValueError, match=r"parameters: .* GB in float32.*are free: .*mode='mmap'"):
        minglm.load(tmp_path)


def test_generate_reads_mapped_files_and_says_how_much(capsys):
    assert main(["generate", "--mmap", "--memory", "0.01", "--tokens", "6", "import "]) == 0
    mapped = capsys.readouterr()
    assert re.search(r"0\.0\d GB of experts read, cut at 6 tokens; --tokens N\)", mapped.err)
    assert main(["generate", "--dtype", "bfloat16", "--tokens", "6", "import "]) == 0
    owned = capsys.readouterr()
    assert owned.out == mapped.out
    assert "experts read" not in owned.err
    assert main(["generate", "--memory", "1", "import "]) == 2
    assert "--memory bounds what stays of mapped files; give it with --mmap" in capsys.readouterr().err


def test_while_the_first_token_is_awaited_the_terminal_shows_what_is_read(monkeypatch, capsys):
    model = minglm.load("glm-nano", mode="mmap")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(reading, "EVERY", 0.01)

    def slowly():
        time.sleep(0.1)
        yield from (1, 2)
        time.sleep(0.05)

    assert list(reading.show_reading(slowly(), model.params)) == [1, 2]
    shown = capsys.readouterr().err
    assert "\r0.00 GB of experts read" in shown
    assert shown.endswith("\r\033[K")
    assert list(reading.show_reading((1, 2), minglm.new("micro").params)) == [1, 2]
    assert capsys.readouterr().err == ""
