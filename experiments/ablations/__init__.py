"""One module an ablation: `ablation()` returns what `python -m experiments.ablations.NAME` runs."""
