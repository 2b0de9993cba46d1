"""`minglm routing`: what it reads, what it saves, what it leaves out and why."""

import csv
import shutil

import numpy as np
import pytest

import minglm
from minglm.api import Model
from minglm.evaluate.pictures import LeftOut, acceptance_rows, look, mtp_picks, read_texts, save_pictures
from minglm.look.routing import load
from minglm.text.template import ChatTemplate
from minglm.text.tokenizer import train_tokenizer
from tests.variants import MICRO, random_params

ALWAYS = "load picks bars drops coactivation paths selection confidence".split()


def model_of(config=MICRO, name="bytes"):
    tokenizer = train_tokenizer([], 292)
    config = config.replace(vocab_size=320, max_position_embeddings=64, eos_token_id=tokenizer.end_ids)
    return Model(config, random_params(config, 1), tokenizer, ChatTemplate(), name)


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """Two sub-folders and a file: three domains."""
    folder = tmp_path_factory.mktemp("domains")
    files = {
        "code/a.py": "for i in x:\n" * 3,
        "code/deep/b.py": "y = 1\n",
        "prose/c.txt": "Once upon " * 12,
        "sums.txt": "1+1=2 2+2=4",
        "code/.hidden": "no",
        "code/__pycache__/a.pyc": "no",
        "empty.txt": "",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return folder


# -- reading -----------------------------------------------------------------------------------------------------


def test_a_folder_is_read_by_domain(domains):
    texts = read_texts(str(domains))
    assert list(texts) == ["code", "prose", "sums"]
    assert texts["code"] == ["for i in x:\n" * 3, "y = 1\n"]
    assert read_texts(str(domains / "sums.txt")) == {"sums": ["1+1=2 2+2=4"]}
    assert read_texts("some text.txt") == {"text": ["some text.txt"]}
    assert read_texts("x" * 5000) == {"text": ["x" * 5000]}


def test_what_cannot_be_read_is_explained(domains, tmp_path):
    with pytest.raises(ValueError, match="no text in it"):
        read_texts(str(tmp_path))
    with pytest.raises(ValueError, match=r"novel\.txt: no such file or folder"):
        read_texts("novel.txt")
    shutil.copytree(domains, tmp_path / "d")
    (tmp_path / "d" / "nothing").mkdir()
    with pytest.raises(ValueError, match="nothing: no text in it"):
        read_texts(str(tmp_path / "d"))
    (tmp_path / "d" / "nothing" / "x.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"x\.bin: not UTF-8"):
        read_texts(str(tmp_path / "d"))


# -- looking -----------------------------------------------------------------------------------------------------


def test_every_token_is_seen_once_in_pieces_of_the_context(domains):
    model, texts = model_of(), read_texts(str(domains))
    seen = look(model, texts)
    lengths = {domain: sum(len(model.tokenizer.encode(text)) for text in each) for domain, each in texts.items()}
    assert {domain: seen.domains.count(domain) for domain in texts} == lengths
    assert len(seen.tokens) == len(seen.domains) == len(seen.routing.indices) == sum(lengths.values())
    assert [ids.shape[1] for _, ids in seen.pieces] == [36, 6, 64, 56, 11]
    assert max(ids.shape[1] for _, ids in seen.pieces) <= 64
    first = model.trace(texts["code"][0]).routing
    np.testing.assert_array_equal(seen.routing.indices[:36], first.indices)
    np.testing.assert_array_equal(seen.routing.biased_scores[:36], first.biased_scores)
    assert seen.routing.layers[seen.place] == 2
    assert look(model, texts, layer=1).place == 0


def test_long_domains_are_cut(domains, monkeypatch):
    monkeypatch.setattr("minglm.evaluate.pictures.TOKENS", 40)
    seen = look(model_of(), read_texts(str(domains)))
    assert [seen.domains.count(domain) for domain in ("code", "prose", "sums")] == [40, 40, 11]


def test_models_and_layers_without_a_router():
    with pytest.raises(ValueError, match="no layer with experts"):
        look(model_of(MICRO.replace(first_k_dense_replace=3)), {"text": ["abc"]})
    with pytest.raises(ValueError, match="layer 0 has no router; layers with experts are 1, 2"):
        look(model_of(), {"text": ["abc"]}, 0)


def test_the_mtp_layer_stands_beside_the_token_it_has_read_last():
    model = model_of()
    seen = look(model, {"a": ["abcdef"], "b": ["xyz", "u"]})
    drafted, trunk = mtp_picks(seen)
    assert drafted.shape == (7, 1, 3)
    assert trunk.shape == (7, 2, 3)
    np.testing.assert_array_equal(trunk, seen.routing.indices[[1, 2, 3, 4, 5, 7, 8]])
    taps = {}
    model.mtp(seen.pieces[1][1], tap=lambda name, array: taps.update({name: array}))
    np.testing.assert_array_equal(drafted[5:, 0], taps["layers.3.mlp.expert_indices"])


def test_acceptance_counts_drafts_that_the_trunk_would_say():
    model = model_of()
    seen = look(model, {"a": ["abcdefghij"]})
    ids = seen.pieces[0][1]
    rows = acceptance_rows(seen)
    own = model.forward(ids).logits.argmax(axis=-1)[0]
    ends = model.tokenizer.end_ids
    assert [row.depth for row in rows] == [1, 2, 3]
    for row in rows:
        drafts = model.mtp(ids, row.depth).argmax(axis=-1)[0]
        counted = [i for i in range(9 - row.depth) if own[i + row.depth] not in ends]
        assert row.drafted == len(counted)
        assert row.accepted == sum(drafts[i] == own[i + row.depth] for i in counted)
        assert row.low <= row.accepted / row.drafted <= row.high


# -- saving ------------------------------------------------------------------------------------------------------


def names(folder, suffix):
    return {path.stem for path in folder.glob(f"*.{suffix}")}


def test_everything_that_applies_is_saved_with_its_table(domains, tmp_path):
    said = []
    seen = look(model_of(), read_texts(str(domains)))
    save_pictures(seen, tmp_path, said.append)
    wanted = {*ALWAYS, "vocabulary", "domains", "acceptance", "overlap", "removal"}
    assert names(tmp_path, "png") == wanted
    wanted |= {"bias", "vocabulary_by_layer", "information"}
    assert names(tmp_path, "csv") == wanted
    assert len(said) == 2
    assert all(name in said[0] for name in wanted)
    assert said[1].startswith("left out load_over_training, saturation: no routing over the training")
    with (tmp_path / "load.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    counts = load(seen.routing.indices, 8)
    assert [int(row["picks"]) for row in rows] == counts.reshape(-1).tolist()
    assert {row["layer"] for row in rows} == {"1", "2"}
    with (tmp_path / "domains.csv").open(encoding="utf-8") as file:
        assert {row["domain"] for row in csv.DictReader(file)} == {"code", "prose", "sums"}


def test_a_single_token_leaves_most_out_and_says_why(tmp_path):
    said = []
    save_pictures(look(model_of(MICRO.replace(num_nextn_predict_layers=0)), {"text": ["a"]}), tmp_path, said.append)
    assert names(tmp_path, "png") == set(ALWAYS)
    left = {line.removeprefix("left out ").split(": ")[0]: line for line in said[1:]}
    assert set(left) == {
        "vocabulary, vocabulary_by_layer",
        "domains, information",
        "load_over_training, saturation",
        "acceptance, overlap",
        "removal",
    }
    assert "no MTP layer" in left["acceptance, overlap"]
    assert "one domain only" in left["domains, information"]
    with_mtp = look(model_of(), {"text": ["a"]})
    save_pictures(with_mtp, tmp_path, said.append)
    assert any(line.startswith("left out overlap: a single token") for line in said)


def test_removal_is_left_out_where_no_expert_may_go(tmp_path):
    said = []
    config = MICRO.replace(n_routed_experts=3, num_experts_per_tok=3, n_group=1, topk_group=1)
    save_pictures(look(model_of(config), {"text": ["abcdef"]}), tmp_path, said.append)
    assert any(line.startswith("left out removal: without an expert 2 are open") for line in said)


def test_a_shipped_checkpoint_has_its_training(tmp_path):
    model = minglm.load("glm-tiny-balanced")
    seen = look(model, {"text": ["x = 1\n"]}, folder=minglm.api.find("glm-tiny-balanced"))
    assert seen.history is not None
    assert seen.history.indices.shape[2] == len(seen.routing.layers)
    assert LeftOut("a", "b").why == "b"
