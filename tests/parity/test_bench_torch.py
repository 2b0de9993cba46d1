"""The benchmark times the same model everywhere: transformers' scores from its worker equal ours."""

import numpy as np
import pytest

from minglm.bench.job import Job
from minglm.bench.shapes import write_weights
from minglm.bench.worker import run
from minglm.config import PRESETS

CONFIG = PRESETS["micro"].replace(num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "micro"
    write_weights(path, CONFIG, "float32")
    return str(path)


def job(folder, subject, work, **more):
    return Job(subject, folder, work, "float32", 8, 2, budget=0.0, vocab_size=CONFIG.vocab_size, **more)


def test_torch_decodes_the_same_scores_and_measures_every_work(folder, tmp_path):
    scores = {}
    for subject in ("minglm", "torch"):
        file = tmp_path / f"{subject}.npy"
        answer = run(job(folder, subject, "decode", logits=str(file)))
        scores[subject] = np.load(file)
    assert set(answer["seconds"]) | set(answer["left_out"]) == {"grouped_mm", "eager", "batched_mm"}
    np.testing.assert_allclose(scores["torch"], scores["minglm"], rtol=0, atol=1e-5 * np.abs(scores["minglm"]).max())
    for work, more in (("prefill", {}), ("train", {"rows": 2}), ("growth", {"contexts": (8, 20)})):
        answer = run(job(folder, "torch", work, **more))
        assert all(s > 0 for points in answer["seconds"].values() for s in points.values())
        assert answer["seconds"]
