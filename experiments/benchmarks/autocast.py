"""Compares the 16-bit error of PyTorch with that of our policies: one GPT-2, equal parameters.

Command:   python -m experiments.benchmarks.autocast
Hardware:  2 CPU cores; needs PyTorch in the same environment
Time:      2 minutes
Expected:  autocast_bf16 and autocast_f16 have the error of autocast to within a few per cent;
           mixed_bf16 has up to half as much again, because its residual stream and embeddings are
           in 16 bits too; it is a model that is cast as a whole

An error is the norm of the difference to f32 over the norm of what f32 gives, of the logits and of
all gradients. Each seed draws parameters and a batch; PyTorch and our policies get the same ones,
and are compared with the same f32 run. A ratio is the geometric mean over seeds of our error over
that of PyTorch, with its 95% interval by Student's t. The loss is multiplied by 2^15 for the
gradients, as a GradScaler does.

Autocast here is that of the CPU. The lists of CUDA differ: there softmax, layer_norm, sums and
powers return f32. This model gives none of them 16-bit input but the softmax, which fused attention
computes in f32 on both.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from lmjax.console import stages
from lmjax.console.tables import Column, print_table
from lmjax.model import ModelConfig, apply, initial_params
from lmjax.parallel import sharding
from lmjax.precision import exact, paths
from lmjax.runs.resolved import phase_of
from lmjax.train import Config
from lmjax.train.step import make_scaled_loss

SCALE = 2.0**15
DTYPES = {"bf16": "bfloat16", "f16": "float16"}
ORIGINALS = {
    "torch.autocast, bf16": ("mixed_bf16", "autocast_bf16"),
    "torch.autocast, f16": ("mixed_f16", "autocast_f16"),
    "model.to(bf16)": ("mixed_bf16", "pure_bf16"),
    "model.to(f16)": ("mixed_f16", "pure_f16"),
}
"""What PyTorch does, and policies to hold against it."""

Result = tuple[np.ndarray, np.ndarray]
"""Logits, and all gradients in the order of their paths, in f64, each as one vector."""


def model_config(layers: int, width: int, context: int, vocab_size: int) -> ModelConfig:
    """A GPT-2 with heads of 32."""
    return ModelConfig(
        vocab_size=vocab_size,
        max_positions=context,
        width=width,
        layers=layers,
        heads=max(width // 32, 1),
    )


@functools.cache
def programs(config: Config) -> tuple[Any, Any]:
    """Logits of parameters and tokens, and gradients as `make_scaled_loss` takes its arguments."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    run = functools.partial(apply, config=config.model, sites=phase_of(config).sites)
    return exact.jit(run), exact.jit(
        jax.grad(make_scaled_loss(phase_of(config), mesh), has_aux=True)
    )


def ours(config: Config, params: Any, batch: dict[str, jax.Array]) -> Result:
    """Logits and gradients under the config's policy, of parameters in f32."""
    sites = phase_of(config).param_sites
    flat = {path: sites[path].to_params(x) for path, x in paths.flatten(params).items()}
    stored, (logits, gradient) = paths.unflatten(flat), programs(config)
    gradients, _ = gradient(stored, batch, jax.random.key(0), jnp.float32(SCALE))
    vectors = _vector(paths.flatten(gradients).values())
    return _vector([logits(stored, batch["inputs"])]), vectors


def theirs(config: Config, params: Any, batch: dict[str, jax.Array], original: str) -> Result:
    """The same from PyTorch: one of `ORIGINALS`, or `f32`."""
    import torch

    from experiments.benchmarks.peers.torch_gpt import Gpt

    c = config.model
    model = Gpt(c.vocab_size, c.max_positions, c.width, c.heads, c.layers)
    with torch.no_grad():
        for path, parameter, get in _pairs(model, c.layers):
            value = np.concatenate([np.asarray(get(params, p)) for p in path], axis=-1)
            parameter.copy_(torch.tensor(value.T if path[0].endswith("kernel") else value))
    inputs, targets = (
        torch.tensor(np.asarray(batch[n]).astype(int)) for n in ("inputs", "targets")
    )
    dtype = next((getattr(torch, DTYPES[name]) for name in DTYPES if f" {name}" in original), None)
    if original.startswith("model.to"):
        model = model.to(getattr(torch, DTYPES[original[len("model.to(") : -1]]))
    with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
        logits = model.logits(inputs)
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    (loss * SCALE).backward()
    gradients: dict[str, Any] = {}
    for path, parameter, _ in _pairs(model, c.layers):
        gradient = parameter.grad.float().numpy()
        gradient = gradient.T if path[0].endswith("kernel") else gradient
        for p, part in zip(path, np.split(gradient, len(path), axis=-1), strict=True):
            gradients.setdefault(_stacked(p), []).append(part)
    vectors = [np.stack(gradients[path]) for path in sorted(gradients)]
    return _vector([logits.float().detach().numpy()]), _vector(vectors)


def _pairs(model: Any, layers: int) -> list[tuple[list[str], Any, Any]]:
    """Paths of ours, those of a joint projection together, beside PyTorch's parameter."""

    def get(params: Any, path: str) -> Any:
        parts = path.split("/")
        leaf = paths.flatten(params)[_stacked(path)]
        return leaf[int(parts[1])] if parts[0] == "blocks" else leaf

    pairs = [
        (["embed/table"], model.embed.weight),
        (["positions/table"], model.positions.weight),
        (["norm/scale"], model.norm.weight),
        (["norm/bias"], model.norm.bias),
    ]
    for index in range(layers):
        block, at = model.blocks[index], f"blocks/{index}"
        for norm, name in ((block.norm1, "attention"), (block.norm2, "mlp")):
            pairs.append(([f"{at}/{name}/norm/scale"], norm.weight))
            pairs.append(([f"{at}/{name}/norm/bias"], norm.bias))
        for linear, names in (
            (block.qkv, ["attention/query", "attention/key", "attention/value"]),
            (block.out, ["attention/out"]),
            (block.up, ["mlp/up"]),
            (block.down, ["mlp/down"]),
        ):
            pairs.append(([f"{at}/{name}/kernel" for name in names], linear.weight))
            pairs.append(([f"{at}/{name}/bias" for name in names], linear.bias))
    return [(path, parameter, get) for path, parameter in pairs]


def _stacked(path: str) -> str:
    """`blocks/3/mlp/up/kernel` as it is in the tree of parameters, without its index."""
    parts = path.split("/")
    return "/".join([parts[0], *parts[2:]] if parts[0] == "blocks" else parts)


def _vector(arrays: Any) -> np.ndarray:
    return np.concatenate([np.asarray(array, np.float64).ravel() for array in arrays])


def errors(seed: int, model: ModelConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Relative errors of logits and gradients, by policy and by what PyTorch does."""
    config = Config(model=model, context=model.max_positions, batch_size=batch_size)
    under = lambda policy: replace(config, precision=policy).resolved()
    params = initial_params(jax.random.key(seed), model, phase_of(under("f32")).sites)
    shape = (batch_size, model.max_positions + 1)
    tokens = np.random.default_rng(seed).integers(0, model.vocab_size, shape, np.int32)
    batch = {"inputs": jnp.asarray(tokens[:, :-1]), "targets": jnp.asarray(tokens[:, 1:])}
    in_f32 = ours(under("f32"), params, batch)

    def error(found: Result) -> np.ndarray:
        pairs = zip(found, in_f32, strict=True)
        return np.array([np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in pairs])

    policies = dict.fromkeys(policy for row in ORIGINALS.values() for policy in row)
    results = {policy: ours(under(policy), params, batch) for policy in policies}
    results |= {name: theirs(config, params, batch, name) for name in ("f32", *ORIGINALS)}
    return {name: error(result) for name, result in results.items()}


class Ratio(NamedTuple):
    """A geometric mean of ratios and its 95% interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, one: np.ndarray, other: np.ndarray) -> Ratio:
        """Of numbers that belong together in pairs, two at least."""
        logs = np.log(one / other)
        half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
        return cls(*(float(np.exp(logs.mean() + shift)) for shift in (0.0, -half, half)))

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Flags to a table on stdout."""
    stages.end(stages.IMPORTING)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8, help="at least 2")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128, help="a multiple of 32")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=512)
    flags = parser.parse_args(arguments)
    if flags.seeds < 2:
        parser.error("--seeds must be at least 2: intervals come from the spread over seeds")
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is what is measured: install it in this environment", file=sys.stderr)
        return 2
    model = model_config(flags.layers, flags.width, flags.context, flags.vocab_size)
    found = [errors(seed, model, flags.batch_size) for seed in range(flags.seeds)]
    rows = []
    for original, policies in ORIGINALS.items():
        measured = np.array([run[original] for run in found])
        means = [f"{mean:.2e}" for mean in np.exp(np.log(measured).mean(axis=0))]
        rows.append((original, *means, "relative error"))
        for policy in policies:
            mine = np.array([run[policy] for run in found])
            ratios = [str(Ratio.of(mine[:, i], measured[:, i])) for i in range(2)]
            rows.append((policy, *ratios, f"ratio to {original}"))
    titles = (Column("logits", "number"), Column("gradients", "number"), Column("what"))
    print_table((Column("policy", "key"), *titles), rows)
    print(f"both in f32 differ by {max(float(run['f32'].max()) for run in found):.1e} at most")
    return 0


if __name__ == "__main__":
    sys.exit(main())
