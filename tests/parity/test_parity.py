"""Our model beside transformers' and torch's autograd, on the same folders. Needs the extra `parity`."""

import numpy as np
import pytest
import torch
import transformers

from minglm.api import Model, find, load
from minglm.formats.checkpoint import load_checkpoint, save_checkpoint
from minglm.model import walk
from minglm.model.ops import IGNORE
from tests.parity.reference import open_reference, run_reference, with_own_ends
from tests.parity.table import note
from tests.variants import (
    BALANCE_WEIGHT,
    MICRO,
    MTP_WEIGHT,
    VARIANTS,
    YARN,
    error,
    gradient_errors,
    picks,
    random_ids,
    random_params,
    same_experts,
)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture(scope="module", params=list(VARIANTS))
def both(request, tmp_path_factory):
    """One variant: our model, what theirs computed for the folder that we saved, and the ids."""
    name, seed = request.param, list(VARIANTS).index(request.param)
    config, own_ends = VARIANTS[name]
    params = random_params(config, seed, mtp_own_ends=own_ends)
    folder = tmp_path_factory.mktemp(name)
    save_checkpoint(folder, config, params)
    reference = with_own_ends(open_reference(folder, config), dict(walk(params)), config)
    ids = random_ids(config, seed)
    found = run_reference(reference, ids, config, MTP_WEIGHT, BALANCE_WEIGHT)
    return name, Model(config, params), found, ids


def test_logits_and_hidden_states(both):
    name, model, theirs, ids = both
    ours = model.forward(ids)
    worst = max(error(ours.logits, theirs.logits), error(ours.hidden, theirs.hidden))
    note(name, "logits", f"{worst:.1e}")
    assert worst <= 1e-5


def test_mtp_logits(both):
    name, model, theirs, ids = both
    errors = [error(model.mtp(ids, depth), logits) for depth, logits in enumerate(theirs.mtp_logits, start=1)]
    assert len(errors) == model.config.num_nextn_predict_layers
    if errors:
        note(name, "MTP", f"{max(errors):.1e}")
        assert max(errors) <= 1e-5


def test_losses_and_every_gradient(both):
    name, model, theirs, ids = both
    loss, grads = model.loss_and_grads(ids, mtp_weight=MTP_WEIGHT, balance_weight=BALANCE_WEIGHT)
    for kind, value in theirs.losses.items():
        assert getattr(loss, kind) == pytest.approx(value, rel=1e-5, abs=1e-6)
    errors = gradient_errors(dict(walk(grads)), theirs.grads)
    note(name, "gradients", f"{max(errors.values()):.1e}")
    assert {n: e for n, e in errors.items() if e > 1e-4} == {}


def test_same_experts(both):
    name, model, theirs, ids = both
    if not theirs.indices:
        pytest.skip("no router in this variant")
    note(name, "same experts", _compare_picks(model, theirs, ids))


def _compare_picks(model: Model, theirs, ids) -> str:
    """Every router's picks, MTP layers included; "agreeing/clear" over tokens and routers."""
    ours, agreeing, clear = picks(model, ids), 0, 0
    assert ours.keys() == theirs.indices.keys()
    for layer, (indices, biased) in ours.items():
        same, is_clear = same_experts(indices, theirs.indices[layer], biased)
        agreeing, clear = agreeing + int((same & is_clear).sum()), clear + int(is_clear.sum())
    assert agreeing == clear > 0
    return f"{agreeing}/{clear}"


def _theirs(model: Model, folder, ids, mask, positions):
    save_checkpoint(folder, model.config, model.params)
    reference = open_reference(folder, model.config)
    with torch.no_grad():
        return reference.model(
            torch.tensor(ids), attention_mask=mask, position_ids=torch.tensor(positions), use_cache=False
        ).logits.numpy()


def test_left_padding(tmp_path):
    model = Model(MICRO, random_params(MICRO, 3))
    ids = random_ids(MICRO, 3, (3, 9))
    pads = np.array([[0], [2], [5]])
    segments = np.where(np.arange(9) < pads, -1, 0)
    positions = np.maximum(np.arange(9) - pads, 0)
    theirs = _theirs(model, tmp_path, ids, torch.tensor(segments >= 0).long(), positions)
    ours = model.forward(ids, segments=segments).logits
    assert error(ours[segments >= 0], theirs[segments >= 0]) <= 1e-5


def test_packed_documents(tmp_path):
    """Their mask is spelled out, ours comes from the segments."""
    model = Model(MICRO, random_params(MICRO, 4))
    ids = random_ids(MICRO, 4, (1, 10))
    segments = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 2, 2]])
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1]])
    allowed = (segments[:, :, None] == segments[:, None, :]) & np.tri(10, dtype=bool)
    mask = torch.tensor(np.where(allowed, 0, -np.inf)[:, None].astype(np.float32))
    theirs = _theirs(model, tmp_path, ids, mask, positions)
    assert error(model.forward(ids, segments=segments).logits, theirs) <= 1e-5


@pytest.mark.parametrize(
    "scaling", [None, {"rope_type": "linear", "factor": 3.0}, YARN], ids=["default", "linear", "yarn"]
)
def test_far_positions(scaling, tmp_path):
    """Angles of thousands of radians: their rounding must be the same, not only small."""
    config = MICRO.replace(rope_theta=1e6, rope_scaling=scaling, head_dim=24, max_position_embeddings=10**6)
    model = Model(config, random_params(config, 5))
    ids = random_ids(config, 5, (1, 8))
    positions = np.array([[0, 1, 900, 901, 40000, 40007, 99990, 99999]])
    everything = torch.ones(ids.shape, dtype=torch.long)  # without a mask transformers reads gaps as new documents
    theirs = _theirs(model, tmp_path, ids, everything, positions)
    assert error(model.forward(ids, positions=positions).logits, theirs) <= 1e-5


@pytest.mark.parametrize(
    "change",
    [{"original_max_position_embeddings": 4, "truncate": False}, {"beta_fast": 1.0, "beta_slow": 40.0}],
    ids=["short original", "bounds swapped"],
)
def test_yarn_with_its_ramp_upside_down(change, tmp_path):
    """Nonsense settings, but the same nonsense: found by fuzzing."""
    config = MICRO.replace(rope_scaling={**YARN, **change}, head_dim=16)
    model = Model(config, random_params(config, 9))
    ids = random_ids(config, 9)
    theirs = _theirs(model, tmp_path, ids, None, np.tile(np.arange(ids.shape[1]), (len(ids), 1)))
    assert error(model.forward(ids).logits, theirs) <= 1e-5


def test_their_folder_opens_here(tmp_path):
    """transformers saves without the MTP layers, which its model does not have."""
    config = MICRO.replace(num_nextn_predict_layers=0)
    params = random_params(config, 6)
    save_checkpoint(tmp_path / "ours", config, params)
    open_reference(tmp_path / "ours", config).model.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="multi-token-prediction") if _names_mtp(tmp_path) else _nothing():
        config_back, params_back = load_checkpoint(tmp_path / "theirs")
    assert config_back.replace(extra={}) == config
    assert all((a == b).all() for (_, a), (_, b) in zip(walk(params), walk(params_back), strict=True))


def _names_mtp(folder) -> bool:
    import json

    values = json.loads((folder / "theirs" / "config.json").read_text())
    return bool(values.get("num_mtp_layers") or values.get("num_nextn_predict_layers"))


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_bfloat16_weights_give_their_logits(tmp_path):
    """Stored in bfloat16, computed in float32 on both sides."""
    model = Model(MICRO, random_params(MICRO, 7))
    save_checkpoint(tmp_path, MICRO, model.params, "bfloat16")
    _, params = load_checkpoint(tmp_path, "bfloat16")
    reference = open_reference(tmp_path, MICRO)
    ids = random_ids(MICRO, 7)
    with torch.no_grad():
        theirs = reference.model(torch.tensor(ids), use_cache=False).logits.numpy()
    assert error(Model(MICRO, params).forward(ids).logits, theirs) <= 1e-5


def test_shipped_checkpoint():
    """transformers loads glm-nano with nothing missing and only the MTP layer unexpected, and agrees with us."""
    model = load("glm-nano")
    assert model.tokenizer is not None
    reference = open_reference(find("glm-nano"), model.config)
    text = "def add(a, b):\n    return a + b\n\n17+25="
    ids = model.as_ids(text)
    found = run_reference(reference, ids, model.config, MTP_WEIGHT, BALANCE_WEIGHT)
    logits, mtp = error(model.forward(ids).logits, found.logits), error(model.mtp(ids), found.mtp_logits[0])
    note("glm-nano", "logits", f"{logits:.1e}")
    note("glm-nano", "MTP", f"{mtp:.1e}")
    note("glm-nano", "same experts", _compare_picks(model, found, ids))
    _, grads = model.loss_and_grads(ids, mtp_weight=MTP_WEIGHT, balance_weight=BALANCE_WEIGHT)
    worst = max(gradient_errors(dict(walk(grads)), found.grads).values())
    note("glm-nano", "gradients", f"{worst:.1e}")
    assert logits <= 1e-5
    assert mtp <= 1e-5
    assert worst <= 1e-4
    theirs = transformers.AutoTokenizer.from_pretrained(find("glm-nano"))
    assert theirs(text)["input_ids"] == ids[0].tolist()


def test_their_ignore_index_is_ours():
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORE
