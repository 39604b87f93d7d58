"""Which documents are held out, and that prepared TFDS datasets are read as they are."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.data import DataConfig, DataError, prepare, tokenized_corpus
from lmjax.data.documents import choose_held_out, split_documents
from lmjax.data.sources import Document, find_source


def documents(sizes):
    return [Document(id=f"d{i}", text=chr(97 + i % 26) * size) for i, size in enumerate(sizes)]


@given(
    sizes=st.lists(st.integers(1, 1000), min_size=2, max_size=60),
    fraction=st.floats(0.01, 0.99),
)
def test_a_document_is_on_one_side_and_both_sides_have_one(sizes, fraction):
    hashes = [hashlib.sha256(str(i).encode()).digest() for i in range(len(sizes))]
    held_out = choose_held_out(sizes, hashes, fraction)
    assert 0 < len(held_out) < len(sizes)
    assert held_out <= set(range(len(sizes)))


@given(sizes=st.lists(st.integers(1, 1000), min_size=50, max_size=80))
def test_the_held_out_share_is_within_half_a_document_of_the_fraction(sizes):
    hashes = [hashlib.sha256(str(i).encode()).digest() for i in range(len(sizes))]
    share = sum(sizes[index] for index in choose_held_out(sizes, hashes, 0.2))
    assert abs(share - 0.2 * sum(sizes)) <= max(sizes) / 2


def test_the_split_holds_every_document_once():
    texts = split_documents(documents(range(10, 60)), 0.1)
    everything = sorted([*texts.train, *texts.validation])
    assert everything == sorted(document["text"] for document in documents(range(10, 60)))
    assert (len(texts.train), len(texts.validation)) == (
        len(list(texts.train)),
        len(list(texts.validation)),
    )


def test_the_choice_follows_ids_not_order():
    one = documents(range(10, 60))
    forwards, backwards = (split_documents(order, 0.1) for order in (one, one[::-1]))
    assert sorted(forwards.validation) == sorted(backwards.validation)


def test_another_document_leaves_the_choice_among_the_others_nearly_alone():
    """Growing a corpus must not reshuffle the split, or old checkpoints have seen the new one."""
    sizes = [100] * 200
    before = set(split_documents(documents_named(sizes), 0.1).validation)
    after = set(split_documents(documents_named([*sizes, 100]), 0.1).validation)
    assert len(before - after) <= 1


def documents_named(sizes):
    return [Document(id=f"d{i}", text=f"{i:0{size}d}") for i, size in enumerate(sizes)]


def test_a_single_document_gives_its_tail():
    text = "aé日" * 1000
    texts = split_documents([Document(id="only", text=text)], 0.25)
    (head,), (tail,) = texts.train, texts.validation
    assert head + tail == text
    assert len(tail.encode()) == pytest.approx(0.25 * len(text.encode()), abs=3)


def test_shakespeare_is_cut_into_scenes():
    scenes = list(find_source(DataConfig()).documents())
    assert len(scenes) == 158
    assert len({scene["id"] for scene in scenes}) == 158
    assert all(scene["text"].startswith("ACT ") for scene in scenes)
    assert sum(len(scene["text"].encode()) for scene in scenes) == 1_092_873


# --- tfds:NAME ---

TRAIN = [f"Training text number {i}, in ASCII, at some length.\n" for i in range(20)]
HELD_OUT = ["Held-out text: naïve café.\n", "More of it, and a little more still.\n"]


def store(root, splits, file_format="array_record", name="my_texts"):
    """Prepares a TFDS dataset with a text feature `body` and no ids."""
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {"body": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=3)}
    )

    def build(self, dl_manager):
        return {
            split: iter([(i, {"body": text, "label": 1}) for i, text in enumerate(texts)])
            for split, texts in splits.items()
        }

    members = {
        "VERSION": tfds.core.Version("1.2.3"),
        "name": name,
        "_info": lambda self: tfds.core.DatasetInfo(
            builder=self, features=features, disable_shuffling=True
        ),
        "_split_generators": build,
        "_generate_examples": lambda self: iter(()),
    }
    with tfds.core.registered.skip_registration():
        builder = type("MyTexts", (tfds.core.GeneratorBasedBuilder,), members)
    builder(data_dir=root, file_format=file_format).download_and_prepare()
    return root / name / "1.2.3"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "tensorflow_datasets"


def test_a_prepared_dataset_keeps_its_own_splits(folder, no_network):
    store(folder, {"train": TRAIN, "test": HELD_OUT})
    for name in ("tfds:my_texts", "tfds:my_texts:1.2.3"):
        corpus = tokenized_corpus(DataConfig(dataset=name, feature="body"), window=17)
        assert corpus.tokenizer.decode(corpus.train) == "".join(TRAIN)
        assert corpus.tokenizer.decode(corpus.validation) == "".join(HELD_OUT)
        assert (corpus.train_documents, corpus.validation_documents) == (20, 2)
        assert corpus.validation_bytes == len("".join(HELD_OUT).encode())
    assert not no_network


def test_validation_comes_before_test(folder):
    store(folder, {"train": TRAIN, "test": TRAIN, "validation": HELD_OUT})
    corpus = tokenized_corpus(DataConfig(dataset="tfds:my_texts", feature="body"), window=17)
    assert corpus.tokenizer.decode(corpus.validation) == "".join(HELD_OUT)


def test_a_lone_split_is_divided_by_document(folder):
    store(folder, {"train": TRAIN})
    corpus = tokenized_corpus(DataConfig(dataset="tfds:my_texts", feature="body"), window=17)
    assert (corpus.train_documents, corpus.validation_documents) == (18, 2)


def test_a_dataset_prepared_anew_is_tokenised_anew(folder):
    config = DataConfig(dataset="tfds:my_texts", feature="body")
    path = store(folder, {"train": TRAIN})
    before = tokenized_corpus(config, window=17)
    shutil.rmtree(path)
    store(folder, {"train": TRAIN[::-1]})
    assert tokenized_corpus(config, window=17).fingerprint != before.fingerprint


def test_a_dataset_that_is_not_prepared_says_how(folder, no_network):
    config = DataConfig(dataset="tfds:lm1b/subwords:1.0.0")
    with pytest.raises(
        DataError,
        match=r"not prepared.*run python -m lmjax prepare --data.dataset tfds:lm1b/subwords:1.0.0",
    ):
        tokenized_corpus(config, window=17)
    store(folder, {"train": TRAIN})
    with pytest.raises(DataError, match="not prepared"):
        tokenized_corpus(DataConfig(dataset="tfds:my_texts:1.0.0"), window=17)
    assert not no_network


def test_a_missing_feature_names_those_there_are(folder):
    store(folder, {"train": TRAIN})
    with pytest.raises(DataError, match=r"no text feature 'text'.*\(body\)"):
        tokenized_corpus(DataConfig(dataset="tfds:my_texts"), window=17)


@pytest.mark.parametrize("file_format", ["parquet", "tfrecord"])
def test_formats_that_lose_data_or_need_tensorflow_are_refused(folder, file_format):
    info = store(folder, {"train": TRAIN}) / "dataset_info.json"
    content = json.loads(info.read_text())
    info.write_text(json.dumps({**content, "fileFormat": file_format}))
    message = f"stored as {file_format}.*lmjax prepare --data.dataset tfds:my_texts"
    with pytest.raises(DataError, match=message):
        tokenized_corpus(DataConfig(dataset="tfds:my_texts", feature="body"), window=17)


def test_several_configs_must_be_told_apart(folder):
    path = store(folder, {"train": TRAIN})
    for config in ("large", "small"):
        shutil.copytree(path, folder / "my_texts" / config / "1.2.3")
    shutil.rmtree(path)
    with pytest.raises(DataError, match=r"several configs \(large, small\)"):
        tokenized_corpus(DataConfig(dataset="tfds:my_texts", feature="body"), window=17)
    config = DataConfig(dataset="tfds:my_texts/small", feature="body")
    assert tokenized_corpus(config, window=17).train_documents == 18


def test_prepare_opens_what_is_prepared_without_the_network(folder, no_network):
    store(folder, {"train": TRAIN})
    assert prepare(DataConfig(dataset="tfds:my_texts", feature="body")).train_documents == 18
    assert not no_network


def test_prepare_refuses_a_name_that_tfds_does_not_know(no_network):
    with pytest.raises(DataError, match="TFDS knows no dataset no_such_dataset"):
        prepare(DataConfig(dataset="tfds:no_such_dataset"))
