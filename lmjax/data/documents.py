"""Documents as TFDS stores them, and their split into training and validation text.

TFDS, and `builders.py` which needs it, are imported only inside functions here: an existing token
cache opens in milliseconds and should not wait for an unused import. Only `download_and_prepare`
downloads. May import the room's config, errors, sources and store.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lmjax import strict_json
from lmjax.data.config import DataConfig, TfdsName
from lmjax.data.errors import DataError
from lmjax.data.network import refuse_unreachable
from lmjax.data.sources import Document, TextSource
from lmjax.data.store import seal, sealed_content, storage_explained
from lmjax.files.filenames import expanded, plain, printable
from lmjax.files.publishing import discard, published_directory, remove_leftovers

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_VALIDATION_SPLITS = ("validation", "test")
_MOST_NAMED = 8


@dataclass(frozen=True)
class TextSplits:
    """The texts of both splits; each collection can be iterated repeatedly."""

    train: Collection[str]
    validation: Collection[str]
    held_out: str
    """Which documents `validation` has, and who chose them: a phrase for display."""
    labels: tuple[Sequence[str], Sequence[str]] = ((), ())
    """The class of each document of `train` and of `validation`; empty where they have none."""


# --- Built-in corpora ---


@contextlib.contextmanager
def stored_source(
    source: TextSource, directory: Path, validation_fraction: float
) -> Iterator[TextSplits]:
    """The splits of `source`, read from its TFDS dataset in `directory`, prepared if missing.

    A newly prepared dataset is published only if the block succeeds, so a rejected corpus leaves
    nothing behind.
    """
    from lmjax.data.builders import BUILDERS, SPLIT

    # Also if the dataset exists already and nothing is built.
    remove_leftovers(directory.parent)
    with contextlib.ExitStack() as stack:
        if directory.is_dir() and sealed_content(directory) is None:
            discard(directory)
        if not directory.is_dir():
            directory = stack.enter_context(published_directory(directory))
            with _quiet():
                builder = BUILDERS[source.name](source, data_dir=os.fspath(plain(directory)))
                builder.download_and_prepare()
            seal(directory, {"dataset": source.name})
        (dataset,) = directory.glob(f"{source.name}/*/dataset_info.json")
        documents = _StoredDocuments(_open_split(dataset.parent, SPLIT), "text", "label")
        if source.held_out:
            yield _named_split(documents, source)
        else:
            yield split_documents(documents, validation_fraction)


# --- Datasets already prepared by TFDS ---


@dataclass(frozen=True)
class PreparedDataset:
    """A prepared TFDS dataset on this machine."""

    name: TfdsName
    directory: Path
    info: dict[str, Any]
    """The content of dataset_info.json."""

    def fingerprint(self) -> str:
        """Hex SHA-256 over the metadata, and the name, size and time of every data file."""
        digest = hashlib.sha256(strict_json.dumps(self.info, sort_keys=True).encode())
        for path in sorted(self.directory.iterdir()):
            stat = path.stat()
            digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        return digest.hexdigest()

    def splits(self, feature: str, validation_fraction: float) -> TextSplits:
        """Its own train and validation (else test) splits; a single split is divided by document.

        Raises:
          DataError: the text feature is missing, or the splits cannot be identified.
        """
        self._check_feature(feature)
        names = [split["name"] for split in self.info["splits"]]
        train = "train" if "train" in names else names[0]
        if train != "train" and len(names) > 1:
            raise DataError(f"tfds:{self.name} has no train split, only {', '.join(names)}")
        documents = _StoredDocuments(_open_split(self.directory, train), feature)
        for validation in _VALIDATION_SPLITS:
            if validation in names and validation != train:
                held_out = _StoredDocuments(_open_split(self.directory, validation), feature)
                chosen = f"{_count(held_out)}, the dataset's own split {validation}"
                return TextSplits(_Selection(documents), _Selection(held_out), chosen)
        return split_documents(documents, validation_fraction)

    def _check_feature(self, feature: str) -> None:
        content = strict_json.loads((self.directory / "features.json").read_text(encoding="utf-8"))
        features = content.get("featuresDict", {}).get("features", {})
        texts = [name for name, spec in features.items() if "text" in spec]
        if feature not in texts:
            raise DataError(
                f"tfds:{self.name} has no text feature {feature!r}: set --data.feature to one of "
                f"its text features ({', '.join(texts) or 'there is none'})"
            )


def find_prepared(config: DataConfig, name: TfdsName) -> PreparedDataset:
    """Finds `name` in TFDS's data folder, without TFDS and without the network.

    Raises:
      DataError: not prepared, ambiguous, or stored in a format that cannot be read.
    """
    root = tfds_folder() / name.name
    prepare = f"python -m lmjax prepare --data.dataset tfds:{name}"
    found = _version_folders(root, name)
    if not found:
        raise DataError(f"tfds:{name} is not prepared under {tfds_folder()}: run {prepare}")
    configs = {path.parent for path in found}
    if len(configs) > 1:
        choices = ", ".join(sorted(path.name for path in configs))
        raise DataError(f"tfds:{name} is prepared in several configs ({choices}): name one")
    directory = max(found, key=lambda path: tuple(map(int, path.name.split("."))))
    try:
        info = strict_json.loads((directory / "dataset_info.json").read_text(encoding="utf-8"))
        strict_json.loads((directory / "features.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"tfds:{name} in {directory} cannot be read ({error}): delete it and run {prepare}"
        ) from error
    file_format = info.get("fileFormat", "tfrecord")
    if file_format != "array_record":
        raise DataError(
            f"tfds:{name} is stored as {file_format}, which needs TensorFlow or loses data: delete "
            f"{directory} and run {prepare}, which stores array_record"
        )
    return PreparedDataset(name, directory, info)


def download_and_prepare(name: TfdsName) -> None:
    """Has TFDS download and store `name` as array_record: minutes to hours, on request only.

    Raises:
      DataError: TFDS does not know the name, its builder needs TensorFlow, or its download cannot
        be reached.
      CacheFailed: the disk is full.
    """
    import tensorflow_datasets as tfds

    with storage_explained(tfds_folder(), "TFDS_DATA_DIR"):
        _download_and_prepare(name, tfds)


def _download_and_prepare(name: TfdsName, tfds: Any) -> None:
    try:
        builder = tfds.builder(str(name), data_dir=os.fspath(plain(tfds_folder())))
        refuse_unreachable(str(name), builder.url_infos)
        builder.download_and_prepare(file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise DataError(f"TFDS knows no dataset {name}: check the name and version") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise DataError(f"tfds:{name} cannot be downloaded: {error}") from error
    except ImportError as error:
        raise DataError(
            f"tfds:{name} cannot be built without the module {error.name}, which lmjax does not "
            "use: prepare it elsewhere with file_format=array_record and copy the folder"
        ) from error


def tfds_folder() -> Path:
    """Where TFDS keeps prepared datasets: $TFDS_DATA_DIR or ~/tensorflow_datasets, as in TFDS."""
    chosen = os.environ.get("TFDS_DATA_DIR", "")
    return expanded(chosen or "~/tensorflow_datasets")


def _version_folders(root: Path, name: TfdsName) -> list[Path]:
    version = name.version or "*"
    patterns = [f"{name.config}/{version}"] if name.config else [version, f"*/{version}"]
    infos = (path for pattern in patterns for path in root.glob(f"{pattern}/dataset_info.json"))
    return [info.parent for info in infos if _VERSION.fullmatch(info.parent.name)]


# --- Division into splits ---


class Documents(Protocol):
    """Documents by position, read on demand; a list of them qualifies."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Document: ...


class _StoredDocuments(Documents):
    """The records of a TFDS data source, whose text may be bytes or str.

    Its documents have classes only if a feature is named for them: any dataset may have labels.
    """

    def __init__(self, records: Any, feature: str, label: str = "") -> None:
        self._records = records
        self._feature = feature
        self._label = label

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> Document:
        record = self._records[index]
        # Documents without ids are identified by position, which TFDS keeps stable per version.
        identity = record.get("id", str(index))
        text = _as_str(record[self._feature]).removeprefix("\ufeff")  # a byte order mark
        document = Document(id=_as_str(identity), text=text)
        if self._label in record:
            document["label"] = _as_str(record[self._label])
        return document


def _as_str(value: Any) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


class _Selection(Collection[str]):
    """The texts of some documents, read when iterated."""

    def __init__(self, documents: Documents, indices: Sequence[int] | None = None) -> None:
        self._documents = documents
        self._indices = range(len(documents)) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[str]:
        return (self._documents[index]["text"] for index in self._indices)

    def __contains__(self, text: object) -> bool:
        return any(text == mine for mine in self)


def split_documents(documents: Documents, validation_fraction: float) -> TextSplits:
    """Holds out whole documents, as close to `validation_fraction` of the UTF-8 bytes as possible.

    Documents are visited in the order of the SHA-256 of their ids, and one is held out if that
    brings the held-out fraction closer to the target. The choice depends only on ids and sizes, is
    not biased to a part of the corpus, and leaves neither side empty. A single document cannot be
    divided by document: its tail is held out.
    """
    if len(documents) == 1:
        head, tail = _cut_tail(documents[0]["text"], validation_fraction)
        return TextSplits(
            [head], [tail], f"the last {validation_fraction:.0%} of the only document"
        )
    sizes, hashes, labels = [], [], []
    for document in map(documents.__getitem__, range(len(documents))):
        sizes.append(len(document["text"].encode("utf-8")))
        hashes.append(hashlib.sha256(document["id"].encode("utf-8")).digest())
        labels += [document["label"]] if "label" in document else []
    held_out = choose_held_out(sizes, hashes, validation_fraction)
    kept = [index for index in range(len(documents)) if index not in held_out]
    names = _listed([documents[index]["id"] for index in sorted(held_out)[: _MOST_NAMED + 1]])
    share = sum(sizes[index] for index in held_out) / sum(sizes)
    by = "the text" if labels else f"their names: {names}"
    chosen = (
        f"{len(held_out):,} of {_count(documents)}, {share:.1%} of the text, chosen by a hash of "
        f"{by}"
    )
    held = sorted(held_out)
    of = lambda split: [labels[index] for index in split] if labels else []
    own = of(kept), of(held)
    return TextSplits(_Selection(documents, kept), _Selection(documents, held), chosen, own)


def _named_split(documents: Documents, source: TextSource) -> TextSplits:
    """The requested split: the last documents of a source are held out."""
    kept = len(documents) - len(source.held_out)
    indices = range(len(documents))
    names = _listed([file.id for file in source.held_out])
    chosen = f"{len(source.held_out)} of {_count(documents)}, the validation files: {names}"
    return TextSplits(
        _Selection(documents, indices[:kept]), _Selection(documents, indices[kept:]), chosen
    )


def _count(documents: Documents) -> str:
    return f"{len(documents):,} document{'' if len(documents) == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(printable, names[:_MOST_NAMED]))
    return shown if len(names) <= _MOST_NAMED else f"{shown}, ..."


def choose_held_out(sizes: Sequence[int], hashes: Sequence[bytes], fraction: float) -> set[int]:
    """Which of two or more documents to hold out; see `split_documents`."""
    missing = fraction * sum(sizes)
    chosen: list[int] = []
    order = sorted(range(len(sizes)), key=lambda index: (hashes[index], index))
    for index in order:
        if abs(missing - sizes[index]) < abs(missing):
            chosen.append(index)
            missing -= sizes[index]
    if not chosen:
        # Each one is more than twice the target: the smallest misses it by least.
        chosen.append(min(order, key=lambda index: sizes[index]))
    if len(chosen) == len(sizes) > 1:
        chosen.remove(min(order, key=lambda index: sizes[index]))
    return set(chosen)


def _cut_tail(text: str, fraction: float) -> tuple[str, str]:
    """Cuts at a character boundary so that the tail is closest to `fraction` of the bytes."""
    encoded = text.encode("utf-8")
    kept = round(len(encoded) * (1.0 - fraction))
    head = encoded[:kept].decode("utf-8", errors="ignore")
    return head, text[len(head) :]


# --- TFDS ---


def _open_split(directory: Path, split: str) -> Any:
    """A random-access data source over one split of a prepared dataset."""
    import tensorflow_datasets as tfds

    with _quiet():
        builder = tfds.builder_from_directory(os.fspath(plain(directory)))
        return builder.as_data_source(split=split)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS's prints and progress bars off the terminal."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
