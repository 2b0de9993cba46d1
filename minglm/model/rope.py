"""Where the angles of the rotary positions come from: base frequencies, and two ways to stretch them.

The rotation itself is `ops.rope`. Sources: RoPE arXiv 2104.09864; YaRN arXiv 2309.00071; checked against the
`modeling_rope_utils.py` of transformers.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from minglm.config import Config
from minglm.model.ops import Array


def rotation(positions: Array, config: Config, dtype: Any) -> tuple[Array, Array]:  # [B, T] -> 2 × [B, T, r/2]
    """cos and sin of each position's angles, computed in `dtype` throughout.

    In float32, as transformers does too, an angle near position p is off by up to p · 6e-8 radians.
    """
    frequencies, scale = inverse_frequencies(config, dtype)
    angles = positions[:, :, None].astype(dtype) * frequencies
    return np.cos(angles) * scale, np.sin(angles) * scale


def inverse_frequencies(config: Config, dtype: Any = np.float64) -> tuple[Array, float]:  # -> [r/2], factor
    """Radians per position for each pair, theta^(−2i/r), stretched if the config says so; and a factor on cos and sin.

    The power is rounded to `dtype` before it is inverted: this order gives the bits that torch gives.
    """
    r = config.rotary_dim
    exponents = np.arange(0, r, 2).astype(dtype) / r
    periods = (config.rope_theta ** exponents.astype(np.float64)).astype(dtype)
    scaling = config.rope_scaling
    if scaling is None:
        return 1 / periods, 1.0
    if scaling["rope_type"] == "linear":
        return 1 / periods / scaling["factor"], 1.0
    return _yarn(periods, scaling, config)


def _yarn(periods: Array, scaling: Mapping[str, Any], config: Config) -> tuple[Array, float]:
    """Pairs that turn fast keep their speed, slow ones are slowed by `factor`, a ramp lies between."""
    r, factor = config.rotary_dim, scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings

    def pair_with_turns(turns: float) -> float:
        """Index of the pair that makes this many full turns over the original context."""
        return r * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = pair_with_turns(scaling.get("beta_fast") or 32)
    high = pair_with_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, r - 1)
    ramp = (np.arange(r // 2).astype(periods.dtype) - low) / (high - low or 0.001)
    slowed = np.clip(ramp, 0, 1)  # 0: as it was, 1: slowed fully
    return 1 / periods * (1 - slowed) + 1 / (factor * periods) * slowed, _yarn_attention_factor(scaling)


def _yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    """Long contexts flatten attention; a factor on cos and sin (so its square on the scores) sharpens it again."""
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1 if scaling["factor"] > 1 else 1.0

    above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return mscale(above) / mscale(below) if above and below else mscale(1)
