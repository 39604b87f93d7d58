"""Experiments: each module's `config()` returns what `python -m experiments.NAME` runs."""
