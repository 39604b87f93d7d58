"""The training clock, and the rows of logged steps.

Knows the metrics that a step returns, not how steps are computed.
"""

from __future__ import annotations

import time

import jax

from lmjax.console.progress import Reporter
from lmjax.console.wording import counted
from lmjax.errors import NonFiniteGradients
from lmjax.runs.metrics import MetricsWriter
from lmjax.runs.resolved import Resolved
from lmjax.telemetry.rows import mechanisms, telemetry_row
from lmjax.train.utilisation import Peak, flops_per_token, peak_memory_bytes


class Clock:
    """Seconds of training over all processes of a run, from a monotonic clock.

    Args:
      seconds: those of earlier processes.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Counts the time since the last pause or resumption."""
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + (now - self._since), now

    def resume(self) -> None:
        """Discards the time since the last pause."""
        self._since = time.perf_counter()


class StepLog:
    """Writes the rows of logged steps, one step late.

    Attributes:
      peak: the devices' peak rate in the current phase; None: unknown.
    """

    def __init__(
        self, writer: MetricsWriter, report: Reporter, run: Resolved, clock: Clock, first: int
    ):
        self.writer, self.report, self.run, self.clock = writer, report, run, clock
        self.config = config = run.config
        self.peak: Peak | None = None
        self._flops_per_token = flops_per_token(config.model, config.context)
        self._waiting: tuple[int, dict[str, jax.Array]] | None = None
        self._logged_step, self._logged_seconds = first, clock.seconds

    def pending(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Remembers a step's metrics, which the device may still be computing."""
        self._waiting = (step, metrics)

    def evaluated(self, step: int, loss: float) -> None:
        """Writes and shows the loss of an evaluation."""
        self.writer.write({"step": step, "eval_loss": loss})
        self.report.note(f"step {step}  held-out loss {loss:.4f}")

    def flush(self) -> None:
        """Waits for the pending metrics, then writes and shows them.

        Raises:
          NonFiniteGradients: the limit of consecutive skipped steps was reached.
        """
        if self._waiting is None:
            return
        step, arrays = self._waiting
        self._waiting = None
        fetched = jax.device_get(arrays)
        tensors, updates = fetched.pop("telemetry", None), fetched.pop("updates", None)
        values = {name: value.item() for name, value in fetched.items()}
        self.clock.pause()
        seconds = self.clock.seconds
        elapsed, steps = seconds - self._logged_seconds, step - self._logged_step
        self._logged_step, self._logged_seconds = step, seconds
        skips = values.pop("consecutive_skips")
        tokens_per_second = steps * self.config.batch_size * self.config.context / elapsed
        row = {
            "step": step,
            **values,
            "tokens_per_second": tokens_per_second,
            "step_seconds": elapsed / steps,
            **self._use(tokens_per_second),
        }
        if tensors is not None:
            phase = self.run.after(step)
            counts = telemetry_row(step, tensors, updates, phase.sites, phase.layout)
            self.writer.write_telemetry(counts)
            row |= mechanisms(counts)
        self.writer.write(row)
        self.report.metrics(row)
        # A run too short to reach the limit has still failed if it skipped every step.
        limit = min(self.config.loss_scale.max_consecutive_skips, self.config.steps)
        if skips >= limit and self.config.faults.non_finite != "skip":
            raise NonFiniteGradients(
                f"the gradients of the last {counted(skips, 'step')} up to step {step} were not "
                f"finite, at loss scale {values['loss_scale']:g}; nothing was learned from "
                "them. Lower the learning rate, give the parameters or the compute format more "
                "exponent bits, or "
                "return to an earlier checkpoint with --faults.non-finite rewind",
                step,
                skips,
            )

    def _use(self, tokens_per_second: float) -> dict[str, float]:
        """`mfu` and `peak_memory_bytes`, where known."""
        memory = peak_memory_bytes()
        use: dict[str, float] = {} if memory is None else {"peak_memory_bytes": memory}
        if self.peak is None:
            return use
        return {"mfu": tokens_per_second * self._flops_per_token / self.peak.flops, **use}
