"""A thousand prompts, plain and with drafts: not a token may differ. `make soak` prints the counts."""

import numpy as np
import pytest

import minglm
from minglm.api import Model
from minglm.bench.drafts import prompts
from minglm.config import Config
from tests.variants import random_params

CONFIGS, PROMPTS = 50, 12
SHIPPED = 140  # prompts of each of three kinds


def random_config(rng: np.random.Generator) -> Config:
    groups = int(rng.choice([1, 2, 4]))
    experts = groups * int(rng.integers(2, 5))
    open_groups = int(rng.integers(1, groups + 1))
    kv_heads = int(rng.integers(1, 4))
    layers = int(rng.integers(1, 5))
    return Config(
        vocab_size=int(rng.integers(20, 90)),
        hidden_size=int(rng.integers(8, 70)),
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * int(rng.integers(1, 4)),
        num_key_value_heads=kv_heads,
        head_dim=int(rng.choice([4, 8, 12, 20])),
        intermediate_size=int(rng.integers(5, 60)),
        moe_intermediate_size=int(rng.integers(3, 40)),
        n_routed_experts=experts,
        num_experts_per_tok=int(rng.integers(1, open_groups * experts // groups + 1)),
        n_shared_experts=int(rng.integers(0, 3)),
        first_k_dense_replace=int(rng.integers(0, layers + 1)),
        n_group=groups,
        topk_group=open_groups,
        norm_topk_prob=bool(rng.integers(2)),
        routed_scaling_factor=float(rng.uniform(0.3, 3)),
        use_qk_norm=bool(rng.integers(2)),
        attention_bias=bool(rng.integers(2)),
        partial_rotary_factor=float(rng.choice([0.5, 1.0])),
        tie_word_embeddings=bool(rng.integers(2)),
        num_nextn_predict_layers=int(rng.integers(1, 4)),
        max_position_embeddings=160,
        eos_token_id=tuple(rng.integers(0, 20, 2).tolist()),
        rope_theta=float(rng.choice([100.0, 1e4])),
    )


class Tally:
    """Compares, counts, and says so at the end."""

    def __init__(self, what: str):
        self.what, self.tokens, self.accepted, self.drafted = what, 0, 0, 0

    def compare(self, model: Model, prompt, new: int, helpers, draft, **options) -> None:
        plain = model.generate(prompt, new, **options)
        for helper in helpers:
            found = model.generate(prompt, new, draft=draft(), draft_model=helper, **options)
            assert (found.ids, found.stop_reason) == (plain.ids, plain.stop_reason), (model.config, prompt)
            self.tokens += len(plain.ids)
            self.accepted += sum(r.accepted for r in found.stats.rounds)
            self.drafted += sum(r.drafted for r in found.stats.rounds)

    def __str__(self) -> str:
        share = f"{self.accepted:,} of {self.drafted:,} drafts accepted"
        return f"\n{self.what}: {self.tokens:,} tokens, none differs; {share}"


def test_random_configs(capsys):
    rng = np.random.default_rng(0)
    tally = Tally(f"{CONFIGS} configs, {CONFIGS * PROMPTS} prompts")
    for number in range(CONFIGS):
        config = random_config(rng)
        model = Model(config, random_params(config, number)).astype(str(rng.choice(["float32", "bfloat16", "fp8"])))
        helper = Model(config, random_params(config, number)).astype("fp8")  # nearly the same: often right
        for _ in range(PROMPTS):
            prompt = rng.integers(0, config.vocab_size, int(rng.integers(1, 60))).tolist()
            threads = int(rng.integers(1, 3))
            tally.compare(model, prompt, 40, (None, helper), lambda: int(rng.integers(1, 7)), threads=threads)
    with capsys.disabled():
        print(tally)


@pytest.mark.parametrize("dtype", ["float32", "fp8"])
def test_the_shipped_model(capsys, dtype):
    model, nano = minglm.load("glm-tiny", dtype), minglm.load("glm-nano")
    given = [prompt for kind in prompts(model, SHIPPED).values() for prompt in kind]
    tally = Tally(f"glm-tiny, {dtype}, {len(given)} prompts")
    for number, prompt in enumerate(given):
        tally.compare(model, prompt, 80, (None, nano), lambda number=number: 1 + number % 4)
    with capsys.disabled():
        print(tally)
