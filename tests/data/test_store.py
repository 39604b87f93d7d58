"""What a sealed directory notices, and that an unfinished one never gets its name."""

from __future__ import annotations

import pytest

from lmjax.data.store import seal, sealed_content
from lmjax.files.publishing import published_directory


def test_truncation_is_noticed_where_every_block_looks_the_same(tmp_path):
    """Only the size tells."""
    (tmp_path / "zeros.bin").write_bytes(bytes(1 << 20))
    seal(tmp_path, {"answer": 42})
    assert sealed_content(tmp_path)["answer"] == 42
    (tmp_path / "zeros.bin").write_bytes(bytes(1 << 19))
    assert sealed_content(tmp_path) is None


def test_a_failed_block_publishes_nothing_and_leaves_nothing(tmp_path):
    def fail():
        with published_directory(tmp_path / "new" / "target") as temporary:
            (temporary / "half").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []
