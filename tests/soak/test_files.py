"""A hundred thousand damaged folders: each is a clear error or loads right; nothing crashes, hangs or takes memory."""

import json
import random
import time
import warnings

import numpy as np
import pytest

import minglm
from minglm.look.folder import describe_folder
from minglm.text.template import ChatTemplate
from minglm.text.tokenizer import train_tokenizer
from tests.releases import RELEASES, SMALL, write_release
from tests.variants import MICRO, random_params

TIMES = 32_000  # of each kind of damage
TEMPLATES = 300  # each is a child process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("soak") / "GLM"
    write_release(path, RELEASES["GLM-4.6-FP8"], shards=2, **{**SMALL, "n_routed_experts": 2, "num_hidden_layers": 2})
    return path


NUMBERS = [b"0", b"-1", b"99999999999999999999", b"1e9", b"3.5", b"null"]


def damaged(random: random.Random, data: bytes) -> bytes:
    """A few bytes changed, left out, doubled; or a number made huge."""
    data = bytearray(data)
    for _ in range(random.choice([1, 1, 1, 2, 5, 20])):
        at, kind = random.randrange(max(len(data), 1)), random.randrange(6)
        if kind == 0 and data:
            data[at] = random.randrange(256)
        elif kind == 1:
            del data[at : at + random.randrange(1, 30)]
        elif kind == 2:
            data[at:at] = data[at : at + random.randrange(1, 30)]
        elif kind == 3:
            digits = [i for i in range(at, min(at + 200, len(data))) if 48 <= data[i] < 58]
            if digits:
                data[digits[0] : digits[0] + 1] = random.choice(NUMBERS)
        elif kind == 4:
            data[at:at] = random.choice([b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\x00", b"\xff", b"NaN"])
        elif kind == 5:
            del data[at:]
    return bytes(data)


def tried(action) -> str:
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            action()
            found = "loaded"
        except ValueError:
            found = "ValueError"
    assert time.monotonic() - began < 20
    return found


def report(capsys, what, counts):
    with capsys.disabled():
        print(f"\n{what}: " + ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"])
def test_damaged_files(folder, capsys, name):
    rng, path, counts = random.Random(name), folder / name, {}
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little") if name.endswith(".safetensors") else len(whole)
    try:
        for number in range(TIMES):
            path.write_bytes(damaged(rng, whole[:header]) + whole[header:])
            action = (lambda: minglm.load(folder, "fp8"), lambda: minglm.load(folder, mode="mmap"),
                      lambda: describe_folder(folder))[number % 3]  # fmt: skip
            found = tried(action)
            counts[found] = counts.get(found, 0) + 1
    finally:
        path.write_bytes(whole)
    assert set(counts) <= {"loaded", "ValueError"}
    assert minglm.load(folder, "fp8").params
    report(capsys, name, counts)


def test_damaged_tokenizers(tmp_path, capsys):
    model = minglm.Model(
        MICRO.replace(vocab_size=320), random_params(MICRO.replace(vocab_size=320)), train_tokenizer([], 292)
    )
    model.save(tmp_path)
    rng, counts = random.Random(1), {}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(TIMES // 10):
            (tmp_path / name).write_bytes(damaged(rng, whole))
            found = tried(lambda: minglm.load(tmp_path))
            counts[found] = counts.get(found, 0) + 1
        (tmp_path / name).write_bytes(whole)
    report(capsys, "tokenizers", counts)


def test_damaged_templates(capsys):
    rng, source, counts = random.Random(2), ChatTemplate().source.encode(), {}
    messages = [{"role": "user", "content": "Hi"}]
    for _ in range(TEMPLATES):
        text = damaged(rng, source).decode("utf-8", "replace")
        found = tried(lambda text=text: ChatTemplate(text).render(messages))
        counts[found] = counts.get(found, 0) + 1
    report(capsys, "templates", counts)


def test_random_weights_stay_what_they_are(folder):
    """The soak itself has left the folder whole."""
    assert np.isfinite(minglm.load(folder).forward([[1, 2, 3]]).logits).all()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "glm4_moe"
