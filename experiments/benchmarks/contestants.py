"""Who takes part in `throughput`: the train step of lmjax, and its peers, behind one interface.

A contestant trains one shape on one fixed batch, with AdamW at a constant rate. Those in this
process start from the same initial parameters; PyTorch runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.peers import plain_jnp
from lmjax import strict_json
from lmjax.model import ModelConfig
from lmjax.optim.optimizer import OptimizerConfig
from lmjax.parallel import sharding
from lmjax.train import Config, create_state, make_train_step
from lmjax.train.utilisation import flops_per_token

FORMATS = {"f32": jnp.float32, "mixed_bf16": jnp.bfloat16, "mixed_f16": jnp.float16}
"""The compute formats of the policies that have a peer in plain jnp."""

TORCH = {
    "torch f32": ("f32", False),
    "torch f32 compiled": ("f32", True),
    "torch bf16": ("bf16", False),
    "torch bf16 compiled": ("bf16", True),
}
"""Format and use of torch.compile of each contestant in PyTorch."""


@dataclass(frozen=True)
class Shape:
    """What is trained, and how many steps a contestant takes in a round."""

    model: ModelConfig
    context: int
    batch_size: int
    steps: int

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.context * self.batch_size

    @property
    def flops_per_token(self) -> int:
        """6 N + 12 x layers x width x length; see `lmjax/train/utilisation.py`."""
        return flops_per_token(self.model, self.context)


def _shape(
    layers: int, width: int, heads: int, vocab_size: int, context: int, batch: int, steps: int
) -> Shape:
    model = ModelConfig(
        vocab_size=vocab_size,
        max_positions=context,
        width=width,
        layers=layers,
        heads=heads,
        unroll=layers,  # faster than a loop on CPU, and what the peers do
    )
    return Shape(model, context, batch, steps)


SHAPES = {
    "S": _shape(4, 256, 4, 8192, context=256, batch=8, steps=3),
    "M": _shape(12, 768, 12, 50304, context=512, batch=2, steps=1),
    "char": _shape(4, 128, 4, 256, context=64, batch=12, steps=30),
    "tiny": _shape(1, 16, 2, 64, context=16, batch=2, steps=2),
}
"""S and M: 5.3 and 124 million parameters; char: `experiments.char_shakespeare`; tiny: a test."""


@dataclass(frozen=True)
class Contestant:
    """Something that trains.

    Attributes:
      name: as printed.
      format: its compute format, which says what its peak is.
      compile_seconds: what compiling took; None where it cannot be told from the first step.
      run: trains for a number of steps and returns the seconds they took and the last loss.
      close: ends what runs outside this process.
    """

    name: str
    format: str
    compile_seconds: float | None
    run: Callable[[int], tuple[float, float]]
    close: Callable[[], None] = lambda: None


def config_of(shape: Shape, policy: str) -> Config:
    """The run of a shape under a policy: AdamW at a constant rate, so that every step is alike."""
    return Config(
        precision=policy,
        context=shape.context,
        batch_size=shape.batch_size,
        model=shape.model,
        optimizer=OptimizerConfig(schedule="constant", warmup_steps=0),
    ).resolved()


def draw_batch(shape: Shape) -> dict[str, np.ndarray]:
    """Uniformly random tokens and targets, `int32[B, T]`."""
    generator = np.random.default_rng(0)
    size = (shape.batch_size, shape.context + 1)
    tokens = generator.integers(0, shape.model.vocab_size, size, np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def lmjax_contestant(shape: Shape, policy: str) -> Contestant:
    """The step of `make_train_step`, on a mesh of one device."""
    config = config_of(shape, policy)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    state = create_state(config, mesh)
    batch = sharding.global_batch(mesh, draw_batch(shape), 1)
    step = make_train_step(config, mesh)
    loss_of = lambda metrics: metrics["loss"]
    return _compiled(f"lmjax {policy}", policy, step, state, batch, loss_of)


def jnp_contestant(shape: Shape, policy: str) -> Contestant:
    """The same arithmetic by hand, from the same initial parameters."""
    config = config_of(shape, policy)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    o = config.optimizer
    adam = plain_jnp.Adam(o.learning_rate, o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm)
    init, step = plain_jnp.make_step(FORMATS[policy], shape.model.heads, adam)
    state = init(plain_params(create_state(config, mesh).params))
    return _compiled(
        f"jnp {policy}", policy, step, state, jax.tree.map(jnp.asarray, draw_batch(shape))
    )


def plain_params(params: Any) -> Any:
    """The parameters of lmjax as `plain_jnp` names them, a dict for each block."""
    attention, mlp = params["blocks"]["attention"], params["blocks"]["mlp"]
    pairs = {
        "norm1": attention["norm"],
        "norm2": mlp["norm"],
        **{name: attention[name] for name in ("query", "key", "value", "out")},
        **{name: mlp[name] for name in ("up", "down")},
    }
    pairs = {name: (p.get("kernel", p.get("scale")), p["bias"]) for name, p in pairs.items()}
    layers = pairs["up"][0].shape[0]
    return {
        "embed": params["embed"]["table"],
        "positions": params["positions"]["table"],
        "blocks": [jax.tree.map(lambda leaf, i=i: leaf[i], pairs) for i in range(layers)],
        "norm": (params["norm"]["scale"], params["norm"]["bias"]),
    }


def _compiled(
    name: str,
    policy: str,
    step: Any,
    state: Any,
    batch: Any,
    loss_of: Callable[[Any], jax.Array] = lambda loss: loss,
) -> Contestant:
    start = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    seconds = time.perf_counter() - start

    def run(steps: int) -> tuple[float, float]:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state, result = compiled(state, batch)
        loss = float(loss_of(result))
        return time.perf_counter() - start, loss

    number_format = np.dtype(FORMATS.get(policy, jnp.float32)).name
    return Contestant(name, number_format, seconds, run)


class PeerMissing(RuntimeError):
    """A peer that cannot run here; the message says why."""


def torch_contestant(shape: Shape, name: str, python: str) -> Contestant:
    """PyTorch in a process of its own.

    Raises:
      PeerMissing: there is no torch, or torch.compile finds no C++ compiler.
    """
    number_format, compiled = TORCH[name]
    model, optimizer = shape.model, config_of(shape, "f32").optimizer
    rates = ("learning_rate", "b1", "b2", "eps", "weight_decay", "clip_norm")
    settings = {
        **{field: getattr(model, field) for field in ("layers", "width", "heads", "vocab_size")},
        **{field: getattr(optimizer, field) for field in rates},
        **{field: rows.tolist() for field, rows in draw_batch(shape).items()},
        "context": shape.context,
        "threads": os.cpu_count(),
        "dtype": number_format,
        "compile": compiled,
    }
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the process
    keep_memory = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**30)}
    try:
        process = subprocess.Popen(
            [python, str(Path(__file__).parent / "peers" / "torch_gpt.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | keep_memory,
        )
    except OSError as error:
        errors.close()
        raise PeerMissing(f"{name}: {error}") from error

    def ask(request: str) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(request, file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if answer:
            return strict_json.loads(answer)
        process.wait()
        errors.seek(0)
        said = [line for line in errors.read().splitlines() if re.match(r"\S*Error\b", line)]
        raise PeerMissing(f"{name}: {said[-1] if said else f'exit code {process.returncode}'}")

    def run(steps: int) -> tuple[float, float]:
        answer = ask(str(steps))
        return answer["seconds"], answer["loss"]

    def close() -> None:
        process.communicate()
        errors.close()

    try:
        ask(strict_json.dumps(settings))
    except PeerMissing:
        close()
        raise
    return Contestant(name, "bfloat16" if number_format == "bf16" else "float32", None, run, close)
