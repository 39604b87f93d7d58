"""One module an experiment: `config()` returns what `python -m experiments.NAME` runs."""
