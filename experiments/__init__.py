"""One module an experiment: `config()` returns what to run, `python -m experiments.NAME` runs it."""
