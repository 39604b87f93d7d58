"""The command line. `run_experiment` is what the modules of experiments/ call."""

from lmjax.cli.common import run_experiment

__all__ = ["run_experiment"]
