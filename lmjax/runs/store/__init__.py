"""Runs in object stores: a local copy, which is mirrored.

Why Orbax does not write to the store itself (tried with Orbax 0.12.8 and a moto server, as in
`tests/runs/store/test_s3.py`): for `s3://bucket/run` its metadata go to the store through etils,
but its arrays to TensorStore, which is handed `s3:/bucket/run` as a local path.
`StandardCheckpointer` and `CheckpointManager` stop with "Checkpoint path should be absolute";
without OCDBT the arrays land in a folder `s3:` of the working directory, while the store receives a
checkpoint with `commit_success.txt` and no arrays. Such a mark also says nothing about a later loss
of bytes, for which the tests ask: here a manifest with a digest of each file is written last.
"""
