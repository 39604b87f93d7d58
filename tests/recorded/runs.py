"""Records what short runs compute, to the bit, and compares a later version with the record.

    python -m tests.recorded.runs write            # before a change that must not change numbers
    python -m tests.recorded.runs check            # after it: exit code 1 if any run differs
    python -m tests.recorded.runs check fp8 int8   # only these

Each run trains for a few steps on the shipped text. Its losses, gradient norms, loss scales,
evaluation loss and the digest of its parameters are recorded as they are printed by `repr`, so that
equal means equal to the last bit. Sums depend on the processor and on the version of XLA, so the
record names both, and a check on another processor or version says that it proves nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("runs.json")
COLUMNS = ("loss", "eval_loss", "grad_norm", "loss_scale", "skipped_steps", "learning_rate")

GPT2: dict[str, Any] = {"vocab_size": 256, "max_positions": 32, "width": 32, "layers": 3}
LLAMA: dict[str, Any] = GPT2 | {
    "heads": 4,
    "kv_heads": 2,
    "mlp_width": 64,
    "positions": "rope",
    "norm": "rms",
    "activation": "swiglu",
    "bias": False,
    "tied": False,
    "qk_norm": True,
    "z_loss": 1e-4,
}
FP8 = "mixed_bf16,w=e4m3@tensor.delayed4,x=e4m3@tensor.delayed4,g=e5m2@tensor.delayed4"
EIGHT = {"devices": 8, "mesh": {"data": 2, "fsdp": 2, "tensor": 2}}
FIXED = {"deterministic_reductions": 8, "threads": 8}
GROWING = {"growth_interval": 2, "initial": 2.0**22}

RUNS: dict[str, dict[str, Any]] = {
    "f32": {"precision": "f32"},
    "f32 llama": {"precision": "f32", "model": LLAMA},
    "mixed_bf16": {"precision": "mixed_bf16"},
    "mixed_bf16 llama": {"precision": "mixed_bf16", "model": LLAMA},
    "pure_bf16": {"precision": "pure_bf16"},
    "mixed_f16 dynamic": {"precision": "mixed_f16", "loss_scale": GROWING},
    "mixed_f16 dynamic llama": {
        "precision": "mixed_f16",
        "model": LLAMA,
        "loss_scale": GROWING,
    },
    "mixed_f16 predictive": {"precision": "mixed_f16", "loss_scale": {"kind": "predictive"}},
    "mixed_f16 per block": {"precision": "mixed_f16", "loss_scale": {"per_block": True}},
    "fp8": {"precision": "fp8"},
    "fp8 llama": {"precision": "fp8", "model": LLAMA},
    "delayed": {"precision": FP8},
    "mxfp8": {"precision": "mxfp8"},
    "nvfp4 rotated": {"precision": "nvfp4,xb=nvfp4.rht", "model": LLAMA},
    "int8": {"precision": "int8"},
    "stochastic": {"precision": "p=bf16.sr,c=bf16,o=f32"},
    "kahan": {"precision": "p=bf16.kahan,c=bf16,o=f32,mu=bf16,nu=f32"},
    "narrow moments": {"precision": "mixed_bf16,mu=e4m3@block32,nu=e5m2@block32"},
    "phases": {"precision": "0: mixed_f16 | 3: p=bf16.kahan,c=bf16,o=f32 | 5: f32"},
    "unit scaling": {
        "precision": "c=bf16,w=e4m3,x=e4m3,g=e5m2",
        "model": GPT2 | {"parametrisation": "unit"},
        "optimizer": {"learning_rate": 0.5},
    },
    "unit scaling llama": {
        "precision": "mixed_f16",
        "model": LLAMA | {"parametrisation": "unit"},
        "optimizer": {"learning_rate": 0.5},
    },
    "rules by path": {
        "precision": "mixed_bf16; **/softmax: c=bf16; blocks/-1: c=f32; head: a=bf16@block16"
    },
    "emulated": {"precision": "p=f32,c=e6m7,o=f32,a=bf16@block16"},
    "micro-batches": {"precision": "mixed_f16", "micro_batches": 4},
    "dropout": {"precision": "mixed_bf16", "model": GPT2 | {"dropout": 0.1}},
    "remat dots": {"precision": "mixed_bf16", "model": LLAMA | {"remat": "dots"}},
    "remat full": {"precision": "fp8", "model": GPT2 | {"remat": "full", "unroll": 3}},
    "lion": {"precision": "mixed_bf16", "optimizer": {"name": "lion"}},
    "muon": {"precision": "f32", "optimizer": {"name": "muon"}},
    "telemetry": {"precision": "mixed_f16", "telemetry": {"every": 2}},
    "8 devices f32": {"precision": "f32", **EIGHT},
    "8 devices mixed_f16 llama": {"precision": "mixed_f16", "model": LLAMA, **EIGHT},
    "8 devices fp8": {"precision": "fp8", "devices": 8},
    "8 devices narrow sums": {"precision": "mixed_bf16,r=bf16", "devices": 8},
    "8 devices sequence": {
        "precision": "mixed_bf16",
        "devices": 8,
        "mesh": {"data": 2, "sequence": 4},
        "model": LLAMA,
    },
    "fixed order, 1 device": {"precision": "mixed_f16", "model": LLAMA, **FIXED},
    "fixed order, 8 devices": {"precision": "mixed_f16", "model": LLAMA, **FIXED, "devices": 8},
}
"""Changes to a small run, by name; `devices` and `threads` are those of the process."""

OF_PROCESS = ("devices", "threads")


def config_of(name: str) -> Any:
    """The config of a recorded run."""
    from lmjax.train import Config

    changes = {"model": GPT2} | RUNS[name]
    config = Config(steps=7, context=32, batch_size=16, log_every=1)
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=3e-3, warmup_steps=2),
        evaluation=dataclasses.replace(config.evaluation, every=4, batches=2, batch_size=8),
    )
    for field, change in changes.items():
        if field not in OF_PROCESS:
            part = getattr(config, field)
            value = dataclasses.replace(part, **change) if isinstance(change, dict) else change
            config = dataclasses.replace(config, **{field: value})
    return config


def observed(name: str) -> dict[str, Any]:
    """What a run computes, as exact text."""
    from lmjax.train import train

    with tempfile.TemporaryDirectory() as directory:
        result = train(config_of(name), Path(directory) / "run", progress=False).result
        assert result is not None
        lines = (Path(directory) / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
        telemetry = Path(directory) / "run" / "telemetry.jsonl"
        watched = telemetry.read_text("utf-8").splitlines() if telemetry.exists() else []
    rows = [json.loads(line) for line in lines]
    seen = {c: [repr(row[c]) for row in rows if c in row] for c in COLUMNS}
    seen["parameters_sha256"] = result["parameters_sha256"]
    seen["final_loss"] = repr(result["eval_loss"])
    if watched:
        seen["telemetry"] = [json.loads(line) for line in watched]
    return seen


def machine() -> dict[str, str]:
    """What the bits of a sum depend on beside the program."""
    import jax

    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    families = [line.partition(":")[2].strip() for line in lines if line.startswith("cpu family")]
    return {"processor": f"{names[0]}, family {families[0]}", "jax": jax.__version__}


def _in_processes(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The runs of each set of process-wide settings, in a process of their own."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name in names:
        settings = (RUNS[name].get("devices", 1), RUNS[name].get("threads", 0))
        groups.setdefault(settings, []).append(name)
    found = {}
    for (devices, threads), members in groups.items():
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        if threads:
            environment["PJRT_NPROC"] = str(threads)
        command = [sys.executable, "-m", "tests.recorded.runs", "observe", *members]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        found |= json.loads(done.stdout)
    return found


def main(arguments: Sequence[str]) -> int:
    """Writes or checks the record; returns the exit code."""
    verb, *chosen = arguments or ["--help"]
    unknown = [name for name in chosen if name not in RUNS]
    if verb not in ("write", "check", "observe") or unknown:
        print(__doc__)
        print("runs:", ", ".join(RUNS))
        return 2
    names = chosen or list(RUNS)
    if verb == "observe":
        found = {}
        for name in names:
            found[name] = observed(name)
            print(name, found[name]["parameters_sha256"][:12], file=sys.stderr, flush=True)
        print(json.dumps(found))
        return 0
    recorded = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {"runs": {}}
    found = _in_processes(names)
    if verb == "write":
        recorded["runs"] |= found
        record = {"machine": machine(), "runs": recorded["runs"]}
        RECORD.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        return 0
    if machine() != recorded["machine"]:
        print(f"recorded on {recorded['machine']}, this is {machine()}: proves nothing")
    differing = [name for name in names if _differs(name, recorded["runs"].get(name), found[name])]
    return 1 if differing else 0


def _differs(name: str, old: dict[str, Any] | None, new: dict[str, Any]) -> bool:
    """Prints one line about a run; True if it differs from the record."""
    if old is None:
        print(f"{name}: not recorded")
        return True
    changed = [key for key in new if new[key] != old.get(key)]
    print(f"{name}: " + ("differs in " + ", ".join(changed) if changed else "equal"))
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
