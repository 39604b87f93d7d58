"""What many tests share: a tiny configuration, a state and a batch for it, compiled steps, jaxprs.

Compiling is most of the cost of this suite. `compiled_step` therefore keeps every step it compiles
for the whole session and asks LLVM for no optimisation, which changes no rounding; states are drawn
with numpy, because compiling an initialisation takes as long as running a hundred tiny steps.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from lmjax.train import Config, Phase, TrainState

os.environ.setdefault("LMJAX_COMPILED", "off")  # what a test compiles depends on no other run

GPT2 = {"vocab_size": 64, "max_positions": 16, "width": 16, "layers": 2, "heads": 2}
LLAMA = GPT2 | {
    "heads": 4,
    "kv_heads": 2,
    "mlp_width": 32,
    "positions": "rope",
    "norm": "rms",
    "activation": "swiglu",
    "bias": False,
    "tied": False,
    "qk_norm": True,
}
FAMILIES = {"gpt2": GPT2, "llama": LLAMA}

# What hypothesis draws by default is the same every time, so that no change is refused for what was
# wrong before it. `pytest --hypothesis-profile=search` draws other examples, and more.
settings.register_profile("fixed", max_examples=200, derandomize=True, deadline=None)
settings.register_profile("search", max_examples=2000, deadline=None)
settings.load_profile("fixed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the table of faults, if tests recorded any; see `train/test_faults.py`."""
    reports = [r for name in ("passed", "failed") for r in terminalreporter.getreports(name)]
    rows = [value for r in reports for name, value in r.user_properties if name == "fault"]
    if rows:
        terminalreporter.section("faults")
        terminalreporter.write_line(f"{'fault':60}{'times':>8}{'equal':>8}")
        for fault, times, equal in rows:
            terminalreporter.write_line(f"{fault:60}{times:8}{equal:8}")


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Config]:
    """`tiny(precision, family, **changes)`: a config of two blocks of width 16.

    `changes` replaces fields of `Config`, except `model` and `optimizer`, which are dicts of
    changes to the fields of those parts.
    """
    from lmjax.model import ModelConfig
    from lmjax.optim.optimizer import OptimizerConfig
    from lmjax.train import Config

    def make(
        precision: str = "f32",
        family: str = "gpt2",
        *,
        model: dict[str, Any] | None = None,
        optimizer: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Config:
        rates = {"learning_rate": 1e-2, "warmup_steps": 5} | (optimizer or {})
        return Config(
            **{"steps": 100, "context": 16, "batch_size": 4} | changes,
            precision=precision,
            model=ModelConfig(**FAMILIES[family] | (model or {})),
            optimizer=OptimizerConfig(**rates),
        )

    return make


@pytest.fixture(scope="session")
def draw_params() -> Callable[..., Any]:
    """`draw_params(config, std, seed)`: random parameters in their stored formats.

    Norm scales are drawn around 1 and biases around 0, so that no parameter is at a value where
    leaving it out would go unnoticed.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lmjax.model import structure
    from lmjax.precision import paths
    from lmjax.runs.resolved import phase_of

    def draw(config: Config | Phase, std: float = 0.02, seed: int = 0) -> Any:
        generator, phase = np.random.default_rng(seed), phase_of(config)
        sites = phase.param_sites

        def one(keys: Any, leaf: Any) -> jax.Array:
            path = paths.path_string(keys)
            value = generator.normal(0.0, std, leaf.shape) + path.endswith("scale")
            return sites[path].to_params(jnp.asarray(value.astype(np.float32)))

        return jax.tree_util.tree_map_with_path(one, structure(phase.config.model)[1])

    return draw


@pytest.fixture(scope="session")
def draw_state(
    draw_params: Callable[..., Any], compile_fast: Callable[..., Any]
) -> Callable[..., TrainState]:
    """`draw_state(config, std, seed)`: a train state with random parameters at step 0."""
    import jax
    import jax.numpy as jnp

    from lmjax.optim.storage import initial_residuals
    from lmjax.runs.resolved import phase_of
    from lmjax.runs.state import optimizer_of
    from lmjax.telemetry.measure import initial_scaling
    from lmjax.train import TrainState

    def draw(config: Config | Phase, std: float = 0.02, seed: int = 0) -> TrainState:
        phase = phase_of(config)
        params = draw_params(phase, std, seed)
        sites = phase.param_sites
        optimizer = optimizer_of(phase)
        narrow = any(str(moment) != "f32" for s in sites.values() for moment in (s.mu, s.nu))
        init = compile_fast(optimizer.init) if narrow else optimizer.init
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=init(params),
            residuals=initial_residuals(params, sites),
            scaling=initial_scaling(phase.layout, phase.sites),
            key=jax.random.key_data(jax.random.key(seed, impl="threefry2x32")),
        )

    return draw


@pytest.fixture(scope="session")
def draw_batch() -> Callable[..., dict[str, Any]]:
    """`draw_batch(config, seed)`: a batch of uniformly random tokens."""
    import jax.numpy as jnp
    import numpy as np

    def draw(config: Config, seed: int = 0) -> dict[str, Any]:
        shape = (config.batch_size, config.context + 1)
        tokens = np.random.default_rng(seed).integers(0, config.model.vocab_size, shape, np.int32)
        return {"inputs": jnp.asarray(tokens[:, :-1]), "targets": jnp.asarray(tokens[:, 1:])}

    return draw


@pytest.fixture(scope="session")
def compile_fast() -> Callable[..., Any]:
    """`compile_fast(function, **options)`: `exact.jit` that spends no time on LLVM optimisation."""
    import jax

    from lmjax.precision import exact

    fast = {**exact.COMPILER_OPTIONS, "xla_backend_optimization_level": 0}
    return lambda function, **options: jax.jit(function, compiler_options=fast, **options)


@pytest.fixture(scope="session")
def compiled_step(compile_fast: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled_step(config)`: the train step on one device, compiled once a session.

    It does not donate its state, so that a test can compare before and after.
    """
    import jax

    from lmjax.parallel import sharding
    from lmjax.runs.resolved import phase_of
    from lmjax.train.step import train_step

    steps: dict[Config, Any] = {}

    def compiled(config: Config) -> Any:
        if config not in steps:
            mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
            steps[config] = compile_fast(train_step(phase_of(config), mesh))
        return steps[config]

    return compiled


@pytest.fixture(scope="session")
def equations() -> Callable[..., list[Any]]:
    """`equations(jaxpr, *primitives)`: all equations of those primitives, nested ones too."""
    from jax.extend import core

    def inner(value: Any) -> Iterator[Any]:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, (tuple, list)):
            for part in value:
                yield from inner(part)

    def walk(jaxpr: Any) -> Iterator[Any]:
        for equation in jaxpr.eqns:
            yield equation
            for value in equation.params.values():
                for nested in inner(value):
                    yield from walk(nested)

    def collect(closed: Any, *primitives: str) -> list[Any]:
        return [e for e in walk(closed.jaxpr) if not primitives or e.primitive.name in primitives]

    return collect
