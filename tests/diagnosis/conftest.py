"""Runs at step 0 that tests look at without training them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run_helpers import home

from lmjax.precision import exact

__all__ = ["home"]


@pytest.fixture(scope="session", autouse=True)
def _compile_fast() -> Iterator[None]:
    """LLVM is asked for no optimisation, which changes no rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(exact.COMPILER_OPTIONS, "xla_backend_optimization_level", 0)
        yield


@pytest.fixture(scope="session")
def opened(draw_state: Callable[..., Any]) -> Callable[..., Any]:
    """`opened(config, seed)`: an `OpenRun` with random parameters, without files."""
    import jax

    from lmjax.diagnosis import OpenRun
    from lmjax.parallel import sharding
    from lmjax.runs.resolved import resolve

    def open_at_zero(config: Any, seed: int = 0) -> OpenRun:
        phases = resolve(config)
        mesh = sharding.make_mesh(phases.config.mesh, jax.devices()[:1])
        return OpenRun(Path(), phases, mesh, draw_state(config, std=0.1, seed=seed), 0, None, None)

    return open_at_zero
