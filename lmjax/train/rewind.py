"""Rewinds a run to a checkpoint from before gradients became non-finite, and skips that text.

The state comes from the checkpoint, while the data position stays after the text being read, as
PaLM was trained across its loss spikes (Chowdhery et al. 2022, section 5.1). Replaying the same
text from the same state would fail in the same way.

Knows states, data and checkpoints, not steps or metrics files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lmjax.console.wording import counted
from lmjax.data import train_iterator
from lmjax.errors import NonFiniteGradients, TrainingFailed
from lmjax.parallel.agreement import is_first
from lmjax.train.start import Run, restored


def rewind(run: Run, failure: NonFiniteGradients) -> None:
    """Moves a run back to an earlier state, and its data past the text that failed.

    The last step with finite gradients may have spoiled the parameters, so the run restores the
    newest checkpoint followed by another finite step, now or before an earlier rewind. Later
    checkpoints are set aside.

    Raises:
      TrainingFailed: it has rewound too often, or there is no such checkpoint.
    """
    limit = run.config.faults.max_rewinds
    if len(run.rewinds) >= limit:
        raise TrainingFailed(
            f"{failure} (rewound {len(run.rewinds)} times before, as often as faults.max_rewinds "
            "allows)"
        ) from failure
    run.checkpoints.wait()
    last_applied = failure.step - failure.skips
    # A state already rewound to is known to be good: the fault lies in the text after it.
    first_suspect = last_applied + (last_applied in run.rewinds)
    step = run.checkpoints.newest_intact(before=first_suspect)
    if step is None:
        raise TrainingFailed(
            f"{failure} (no checkpoint of a step before {first_suspect} is left to rewind to; use "
            "a smaller checkpoint.every or a larger checkpoint.keep)"
        ) from failure
    batches = _record_batches(run, last_applied, failure.step)
    run.checkpoints.abandon_after(step)
    run.state = restored(run.checkpoints, step, run.resolved, run.mesh)
    for position in run.positions.between(failure.step + 1, failure.step + 1).values():
        run.data.set_state(position)  # of the batch whose step was already dispatched
    run.positions.clear()
    run.rewinds.append(step)
    run.note(
        f"rewound to step {step}: the gradients of the {counted(failure.skips, 'step')} up to "
        f"{failure.step} were not finite; their text is left out and recorded in {batches}"
    )


def _record_batches(run: Run, first: int, last: int) -> Path:
    """Writes the batches of some steps, from all hosts.

    Returns:
      A `.npz` with `steps`, int32[n], and each array of the batches, int32[n, batch_size, ...].
      After a resumption it starts at this process's first step.
    """
    path = run.workdir / "rewound" / f"batches-{last}.npz"
    if is_first():
        config, states = run.config, run.positions.between(first, last)
        data = train_iterator(
            run.corpus,
            length=config.context,
            batch_size=config.batch_size,
            seed=config.seed,
            document_mask=config.data.document_mask,
        )
        batches = []
        for state in states.values():
            data.set_state(state)
            batches.append(next(data))
        arrays: dict[str, Any] = {
            name: np.stack([batch[name] for batch in batches]) for name in batches[0]
        }
        path.parent.mkdir(exist_ok=True)
        np.savez(path, steps=np.array(list(states), np.int32), **arrays)
    return path
