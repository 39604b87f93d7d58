"""Ablations: arms times seeds, paired statistics, verdicts in words, and the report.

grid.py         what an ablation is: arms, seeds, the cells they make and the files of those
runner.py       everything around the cells; run(ablation, directory) resumes after any interruption
worker.py       a process that runs cells; pools.py starts such processes here or on Slurm
progress.py     what a person sees meanwhile
statistics.py   intervals, tests and power for paired differences
verdict.py      an arm against its control, and what that comes to in words
report.py       run directories to one HTML page and one Markdown file
runs.py         runs that were trained one by one, read as an ablation
claims.py       a published claim: its ablation, its paper's rows, how it is judged
evidence.py     what runs say about a sentence: confirmed, refuted or undecided
account.py      all that a reviewer needs of a claim, for terminal, Markdown and page alike
setting.py      what was run: size, tokens, rate, data, seeds, machine
words.py        how numbers and counts are written
"""

from lmjax.ablation.grid import Ablation, Cell
from lmjax.ablation.report import Inline, write_report
from lmjax.ablation.report_data import compare_cells
from lmjax.ablation.statistics import (
    Estimate,
    GapTest,
    Interval,
    bootstrap_interval,
    gap_test,
    holm,
    seeds_needed,
    smallest_detectable,
)
from lmjax.ablation.verdict import Comparison, Criteria, Verdict, compare_arms, seeds_to_add

__all__ = [
    "Ablation",
    "Cell",
    "Comparison",
    "Criteria",
    "Estimate",
    "GapTest",
    "Inline",
    "Interval",
    "Verdict",
    "bootstrap_interval",
    "compare_arms",
    "compare_cells",
    "gap_test",
    "holm",
    "seeds_needed",
    "seeds_to_add",
    "smallest_detectable",
    "write_report",
]
