"""Ablations: `python -m experiments.ablations.NAME` runs what `ablation()` of a module returns."""
