"""The contestants of `throughput`: the train step of lmjax and its peers, behind one interface.

A contestant trains one shape on one fixed batch, with AdamW at a constant rate, in its own process.
The JAX contestants run this file as `python -m experiments.benchmarks.contestants KIND POLICY
SHAPE`; they start from the same initial parameters.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.peers import plain_jnp
from experiments.benchmarks.processes import GIB, KEEP_FREED_MEMORY, Worker
from lmjax import strict_json
from lmjax.console import stages
from lmjax.model import ModelConfig, llama_1b
from lmjax.optim.optimizer import OptimizerConfig
from lmjax.parallel import sharding
from lmjax.plan.memory import expected_memory
from lmjax.precision.policy import carrier
from lmjax.runs.resolved import phase_of
from lmjax.train import Config, create_state, make_train_step
from lmjax.train.memory import free_bytes, keep_freed_memory, return_freed_memory
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

    name: str
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
    name: str,
    layers: int,
    width: int,
    heads: int,
    vocab_size: int,
    context: int,
    batch: int,
    steps: int,
) -> Shape:
    model = ModelConfig(
        vocab_size=vocab_size,
        max_positions=context,
        width=width,
        layers=layers,
        heads=heads,
        unroll=layers,  # faster than a loop, and what the peers do
    )
    return Shape(name, model, context, batch, steps)


_LLAMA = llama_1b(z_loss=1e-4, remat="dots")

SHAPES = {
    shape.name: shape
    for shape in (
        _shape("S", 4, 256, 4, 8192, context=256, batch=8, steps=3),
        _shape("M", 12, 768, 12, 50304, context=512, batch=2, steps=1),
        _shape("L", 12, 768, 12, 50304, context=4096, batch=1, steps=1),
        _shape("char", 4, 128, 4, 256, context=64, batch=12, steps=30),
        _shape("tiny", 1, 16, 2, 64, context=16, batch=2, steps=2),
        _shape("gpt2_124m", 12, 768, 12, 50304, context=1024, batch=32, steps=5),
        Shape("llama_1b", _LLAMA, context=2048, batch_size=8, steps=2),
    )
}
"""S and M: 5.3 and 124 million parameters; L: M at 8 times the context; char:
`experiments.char_shakespeare`; tiny: a test; gpt2_124m and llama_1b: for an accelerator."""


PROCESS_BYTES = GIB // 2
"""What a process has before it trains: Python, JAX or PyTorch, and the compiler at work."""


class LeftOut(RuntimeError):
    """A contestant that is not started; the message says which and why."""


@dataclass(frozen=True)
class Contestant:
    """Something that trains.

    Attributes:
      name: as printed.
      format: its compute format, which says what its peak is.
      compile_seconds: what compiling took; None where it cannot be told from the first step.
      first_loss: that of the step which it took when it was started, and all its memory with it.
      worker: its process.
    """

    name: str
    format: str
    compile_seconds: float | None
    first_loss: float
    worker: Worker

    def run(self, steps: int) -> tuple[float, float]:
        """Trains for a number of steps: the seconds that they took, and the last loss.

        Raises:
          Died: its process ended.
        """
        answer = self.worker.ask(str(steps))
        return answer["seconds"], answer["loss"]


def estimated_bytes(shape: Shape) -> int:
    """What a contestant of a shape needs: the step that `lmjax plan` expects, and its process."""
    return int(sum(expected_memory(phase_of(config_of(shape, "f32")), 1).values())) + PROCESS_BYTES


def refuse_without_memory(name: str, shape: Shape) -> None:
    """Refuses to start a contestant that the memory left is not enough for.

    Raises:
      LeftOut: it is not.
    """
    needed, free = estimated_bytes(shape), free_bytes(jax.devices()[0])
    if free is not None and needed > free:
        raise LeftOut(
            f"{name}: it needs about {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free"
        )


def refuse_other_than_gpt2(name: str, shape: Shape) -> None:
    """Refuses a peer for a shape of another architecture than GPT-2's.

    Raises:
      LeftOut: the shape has another one.
    """
    own = dataclasses.asdict(shape.model)
    sizes = ("vocab_size", "max_positions", "width", "layers", "heads", "unroll")
    if own != dataclasses.asdict(ModelConfig(**{size: own[size] for size in sizes})):
        raise LeftOut(f"{name}: the peers have the architecture of GPT-2; {shape.name} has another")


def contestant(
    name: str,
    number_format: str,
    command: Sequence[str],
    settings: Any = None,
    *,
    max_bytes: int | None = None,
) -> Contestant:
    """Starts a process and waits until it has taken a first step.

    Args:
      name: as printed.
      number_format: its compute format, the name of a dtype.
      command: what to run.
      settings: the first line that it is given, as JSON.
      max_bytes: most memory that it may allocate.

    Raises:
      Died: it ended instead.
    """
    # On a GPU each would take most of the memory for itself.
    environment = {**KEEP_FREED_MEMORY, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    worker = Worker(name, command, environment=environment, max_bytes=max_bytes)
    try:
        answer = worker.ask(strict_json.dumps(settings))
    except BaseException:
        worker.close()
        raise
    return Contestant(name, number_format, answer.get("compile_seconds"), answer["loss"], worker)


def jax_contestant(
    kind: str, policy: str, shape: Shape, max_bytes: int | None = None
) -> Contestant:
    """The train step of `lmjax` or that of the peer `jnp`, on one device.

    Raises:
      LeftOut: there is not enough memory, or the peer has no such architecture.
      Died: its process ended.
    """
    name = f"{kind} {policy}"
    if kind == "jnp":
        refuse_other_than_gpt2(name, shape)
    refuse_without_memory(name, shape)
    number_format = np.dtype(carrier(phase_of(config_of(shape, policy)).sites["head"].compute)).name
    command = [sys.executable, "-m", __spec__.name, kind, policy, shape.name]
    return contestant(name, number_format, command, max_bytes=max_bytes)


def torch_contestant(
    name: str, python: str, shape: Shape, max_bytes: int | None = None
) -> Contestant:
    """PyTorch, run by a Python that has it.

    Raises:
      LeftOut: there is not enough memory, or the peer has no such architecture.
      Died: its process ended: there is no torch, or torch.compile finds no C++ compiler.
    """
    refuse_other_than_gpt2(name, shape)
    refuse_without_memory(name, shape)
    number_format, compiled = TORCH[name]
    model, optimizer = shape.model, config_of(shape, "f32").optimizer
    rates = ("learning_rate", "b1", "b2", "eps", "weight_decay", "clip_norm")
    settings = {
        **{field: getattr(model, field) for field in ("layers", "width", "heads", "vocab_size")},
        **{field: getattr(optimizer, field) for field in rates},
        **{field: rows.tolist() for field, rows in draw_batch(shape).items()},
        "context": shape.context,
        "threads": os.cpu_count(),
        "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
        "dtype": number_format,
        "compile": compiled,
    }
    return contestant(
        name,
        "bfloat16" if number_format == "bf16" else "float32",
        [python, str(Path(__file__).parent / "peers" / "torch_gpt.py")],
        settings,
        max_bytes=max_bytes,
    )


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


Program = tuple[Any, Any, Any, Callable[[Any], jax.Array]]
"""A jitted step, its state, its batch, and how the loss is found in what it returns."""


def lmjax_program(shape: Shape, policy: str) -> Program:
    """The step of `make_train_step`, on a mesh of one device."""
    config = config_of(shape, policy)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    batch = sharding.global_batch(mesh, draw_batch(shape), 1)
    step, state = make_train_step(config, mesh), create_state(config, mesh)
    return step, state, batch, lambda metrics: metrics["loss"]


def jnp_program(shape: Shape, policy: str) -> Program:
    """The same arithmetic by hand, from the same initial parameters."""
    config = config_of(shape, policy)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    o = config.optimizer
    adam = plain_jnp.Adam(o.learning_rate, o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm)
    init, step = plain_jnp.make_step(FORMATS[policy], shape.model.heads, adam)
    state = init(plain_params(create_state(config, mesh).params))
    return step, state, jax.tree.map(jnp.asarray, draw_batch(shape)), lambda loss: loss


PROGRAMS = {"lmjax": lmjax_program, "jnp": jnp_program}


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


def main() -> None:
    """Answers each line of stdin: the first by compiling and a step, others by timing so many."""
    stages.end(stages.IMPORTING)
    keep_freed_memory()
    kind, policy, shape = sys.argv[1:]
    answer = lambda **values: print(strict_json.dumps(values), flush=True)
    sys.stdin.readline()
    step, state, batch, loss_of = PROGRAMS[kind](SHAPES[shape], policy)
    start = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start
    return_freed_memory()  # as runs do
    state, result = compiled(state, batch)
    answer(compile_seconds=compile_seconds, loss=float(loss_of(result)), **device_memory())
    for line in sys.stdin:
        # The first step after a pause does not count: the machine took freed memory back meanwhile.
        state, result = jax.block_until_ready(compiled(state, batch))
        start = time.perf_counter()
        for _ in range(int(line)):
            state, result = compiled(state, batch)
        loss = float(loss_of(result))
        answer(seconds=time.perf_counter() - start, loss=loss, **device_memory())


def device_memory() -> dict[str, int]:
    """The most memory of an accelerator that this process has had; nothing on CPU."""
    statistics = jax.devices()[0].memory_stats() or {}
    peak = statistics.get("peak_bytes_in_use")
    return {} if peak is None else {"peak_bytes": peak}


if __name__ == "__main__":
    main()
