"""Sizes of other models: against the counts of transformers' own classes, and against what their makers say."""

import numpy as np
import pytest

from minglm.look.families import FAMILIES, Family, parts
from tests.variants import MICRO

# tests/parity/test_families.py counts them again with transformers
COUNTED = {
    "DeepSeek-V3": 671_026_419_200,
    "Kimi K2": 1_026_408_232_448,
    "Qwen3-235B-A22B": 235_093_634_560,
    "gpt-oss-120b": 116_829_156_672,
}


@pytest.mark.parametrize("name", COUNTED)
def test_total_is_what_transformers_counts(name):
    assert FAMILIES[name].total == COUNTED[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_totals_are_near_what_is_reported(name):
    model = FAMILIES[name]
    np.testing.assert_allclose(model.total / 1e9, model.reported[0], rtol=0.02)
    np.testing.assert_allclose(model.active / 1e9, model.reported[1], rtol=0.07)


def test_active_and_mtp_are_what_cards_say():
    assert round(FAMILIES["gpt-oss-120b"].active / 1e9, 2) == 5.13  # model card, table 1
    assert round(FAMILIES["DeepSeek-V3"].active / 1e9, 1) == 36.6  # README_WEIGHTS.md, with the head
    assert round(FAMILIES["DeepSeek-V3"].mtp / 1e9, 1) == 11.6  # there 11.5
    assert round((FAMILIES["Kimi K2"].total + FAMILIES["Kimi K2"].mtp) / 1e9) == 1044  # 1043 in GLM-4.5's table 1


def test_a_plain_model_costs_what_its_config_says():
    plain = Family(MICRO, "", (0, 0))
    counts = MICRO.count_parameters()
    assert (plain.total, plain.active) == (counts.total - counts.mtp, counts.active)
    assert plain.mtp * MICRO.num_nextn_predict_layers == counts.mtp
    assert plain.flops_per_token(50) == MICRO.flops_per_token(50)
    assert plain.cache_bytes(50) == 50 * MICRO.kv_bytes_per_token()


def test_cache_by_hand():
    assert FAMILIES["DeepSeek-V3"].cache_bytes(1) == 61 * (512 + 64) * 2
    oss = FAMILIES["gpt-oss-120b"]
    assert oss.cache_bytes(100) == 100 * 36 * 2 * 8 * 64 * 2  # within the window every layer keeps all
    assert oss.cache_bytes(1000) == (1000 + 128) * 18 * 2 * 8 * 64 * 2
    longer = oss.flops_per_token(1001) - oss.flops_per_token(1000)
    assert longer == 18 * 64 * (2 * 64 + 2 * 64)  # one key more: scores and values of 64 heads in 18 layers


@pytest.mark.parametrize("config", [MICRO, MICRO.replace(tie_word_embeddings=True), FAMILIES["GLM-4.5"].config])
def test_parts_add_up(config):
    counts = config.count_parameters()
    everything, active = (sum(column) for column in zip(*parts(config).values(), strict=True))
    assert everything == counts.total - counts.mtp
    assert active == counts.active
