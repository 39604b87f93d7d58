"""Going back to the checkpoint before gradients became non-finite, and on with other text.

The state is that of the checkpoint; the position in the data stays behind the text that was being
read, as PaLM was trained across its loss spikes (Chowdhery et al. 2022, section 5.1). Replaying the
same text from the same state would end in the same place.

Knows states, data and checkpoints; nothing of steps or files of metrics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lmjax.console.wording import counted
from lmjax.data import train_iterator
from lmjax.errors import NonFiniteGradients, TrainingFailed
from lmjax.parallel.agreement import is_first
from lmjax.runs.state import abstract_state
from lmjax.train.start import Run


def rewind(run: Run, failure: NonFiniteGradients) -> None:
    """Moves a run back to an earlier state, and its data on to the text after the failure.

    The last step whose gradients were finite may be the one that spoiled the parameters, so the
    newest checkpoint is taken that another finite step came after, now or before an earlier rewind.
    Later ones are set aside.

    Raises:
      TrainingFailed: it has done so too often, or there is no such checkpoint.
    """
    limit = run.config.faults.max_rewinds
    if len(run.rewinds) >= limit:
        raise TrainingFailed(
            f"{failure} (rewound {len(run.rewinds)} times before, as often as faults.max_rewinds "
            "allows)"
        ) from failure
    run.checkpoints.wait()
    last_applied = failure.step - failure.skips
    # A state that was rewound to is known to be good: it is the text after it that is not.
    first_suspect = last_applied + (last_applied in run.rewinds)
    step = run.checkpoints.newest_intact(before=first_suspect)
    if step is None:
        raise TrainingFailed(
            f"{failure} (no checkpoint of a step before {first_suspect} is left to rewind to; use "
            "a smaller checkpoint.every or a larger checkpoint.keep)"
        ) from failure
    batches = _record_batches(run, last_applied, failure.step)
    run.checkpoints.abandon_after(step)
    target = abstract_state(run.config.after(step), run.mesh)
    run.state = run.checkpoints.restore(step, target).state
    for position in run.positions.between(failure.step + 1, failure.step + 1).values():
        run.data.set_state(position)  # of the batch whose step was on its way
    run.positions.clear()
    run.rewinds.append(step)
    run.note(
        f"rewound to step {step}: the gradients of the {counted(failure.skips, 'step')} up to "
        f"{failure.step} were not finite; their text is left out and recorded in {batches}"
    )


def _record_batches(run: Run, first: int, last: int) -> Path:
    """Writes the batches of some steps, those of all hosts.

    Returns:
      A `.npz` with `steps`, int32[n], and what batches hold, int32[n, batch_size, context] each.
      After a resumption it starts with the first step of this process.
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
            name: np.stack([batch[name] for batch in batches]) for name in config.data.batch_fields
        }
        path.parent.mkdir(exist_ok=True)
        np.savez(path, steps=np.array(list(states), np.int32), **arrays)
    return path
