"""Every variant against what transformers and torch computed for it, from the files in tests/oracles."""

import numpy as np
import pytest

from minglm.api import Model
from minglm.model import walk
from tests.variants import (
    BALANCE_WEIGHT,
    MTP_WEIGHT,
    ORACLES,
    VARIANTS,
    error,
    gradient_errors,
    picks,
    random_ids,
    random_params,
    same_experts,
    unpack_gradients,
)


@pytest.fixture(scope="module", params=list(VARIANTS))
def case(request):
    name, seed = request.param, list(VARIANTS).index(request.param)
    config, own_ends = VARIANTS[name]
    model = Model(config, random_params(config, seed, mtp_own_ends=own_ends))
    with np.load(ORACLES / f"{name}.npz") as file:
        return model, random_ids(config, seed), dict(file)


def test_logits(case):
    model, ids, oracle = case
    ours = model.forward(ids)
    assert error(ours.logits, oracle["logits"]) <= 1e-5
    assert error(ours.hidden, oracle["hidden"]) <= 1e-5


def test_mtp_logits(case):
    model, ids, oracle = case
    for depth in range(1, model.config.num_nextn_predict_layers + 1):
        assert error(model.mtp(ids, depth), oracle[f"mtp.{depth}"]) <= 1e-5


def test_experts(case):
    """The routers of the MTP layers too, at the depth that each serves."""
    model, ids, oracle = case
    for layer, (ours, biased) in picks(model, ids).items():
        same, clear = same_experts(ours, oracle[f"indices.{layer}"], biased)
        assert same[clear].all()
        assert clear.mean() > 0.9


def test_losses_and_gradients(case):
    model, ids, oracle = case
    loss, grads = model.loss_and_grads(ids, mtp_weight=MTP_WEIGHT, balance_weight=BALANCE_WEIGHT)
    for kind in ("total", "main", "mtp", "balance"):
        assert getattr(loss, kind) == pytest.approx(float(oracle[f"loss.{kind}"]), rel=1e-5, abs=1e-6)
    ours = dict(walk(grads))
    assert max(gradient_errors(ours, unpack_gradients(oracle, ours)).values()) <= 1e-4


def test_float64_is_not_held_back_by_float32():
    """In float64 the same model agrees with itself in float32 to rounding, and with nothing better than that."""
    config = VARIANTS["micro"].config
    exact = Model(config, random_params(config, 0, np.float64))
    rounded = exact.astype("float32")
    ids = random_ids(config, 0)
    assert exact.forward(ids).logits.dtype == np.float64
    assert 1e-9 < error(rounded.forward(ids).logits, exact.forward(ids).logits) < 1e-5
