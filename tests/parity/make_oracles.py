"""Writes tests/oracles/*.npz: what transformers and torch say about every variant, so that `make test` needs neither.

    python -m tests.parity.make_oracles

Weights are not stored: `random_params` makes them again. Gradients are stored as 16-bit fractions of each tensor's
largest, an error of 1.5e-5 where the bound is 1e-4.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from minglm.formats.checkpoint import save_checkpoint
from minglm.model import walk
from tests.parity.reference import open_reference, run_reference, with_own_ends
from tests.variants import BALANCE_WEIGHT, MTP_WEIGHT, ORACLES, VARIANTS, pack_gradients, random_ids, random_params


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for seed, (name, (config, own_ends)) in enumerate(VARIANTS.items()):
        params, ids = random_params(config, seed, mtp_own_ends=own_ends), random_ids(config, seed)
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(folder, config, params)
            reference = with_own_ends(open_reference(Path(folder), config), dict(walk(params)), config)
            found = run_reference(reference, ids, config, MTP_WEIGHT, BALANCE_WEIGHT)
        arrays = {"logits": found.logits, "hidden": found.hidden}
        arrays |= {f"mtp.{depth}": logits for depth, logits in enumerate(found.mtp_logits, start=1)}
        arrays |= {f"indices.{layer}": np.sort(i, axis=-1).astype(np.uint8) for layer, i in found.indices.items()}
        arrays |= {f"loss.{kind}": np.float32(value) for kind, value in found.losses.items()}
        arrays |= pack_gradients(found.grads)
        np.savez_compressed(ORACLES / f"{name}.npz", **arrays)
        print(name, (ORACLES / f"{name}.npz").stat().st_size)


if __name__ == "__main__":
    main()
