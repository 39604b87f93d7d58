"""How a process finds its place among others, and how it ends when it does not find them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_helpers import finish, start

from lmjax.parallel.distributed import DistributedConfig, ProcessPlace, find_place

TORCHRUN = {"MASTER_ADDR": "node7", "MASTER_PORT": "29500", "RANK": "3", "WORLD_SIZE": "4"}
SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[012-013,020],login1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPENMPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
PLACES: dict[str, tuple[dict[str, Any], dict[str, str], ProcessPlace | None]] = {
    "nothing said": ({}, {}, None),
    "flags": (
        {"coordinator": "a:1", "processes": 4, "process": 0},
        {},
        ProcessPlace("a:1", 4, 0, None),
    ),
    "flags for one": ({"coordinator": "a:1", "processes": 1, "process": 0}, {}, None),
    "torchrun": ({}, TORCHRUN, ProcessPlace("node7:29500", 4, 3, None)),
    "torchrun that listens itself": (
        {},
        TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"},
        ProcessPlace("node7:29501", 4, 3, None),
    ),
    "torchrun, two on a host": (
        {},
        TORCHRUN | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        ProcessPlace("node7:29500", 4, 3, [1]),
    ),
    "torchrun, GPUs divided already": (
        {},
        TORCHRUN | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "5"},
        ProcessPlace("node7:29500", 4, 3, None),
    ),
    "JAX_LOCAL_DEVICE_IDS": (
        {},
        TORCHRUN | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "JAX_LOCAL_DEVICE_IDS": "2,3"},
        ProcessPlace("node7:29500", 4, 3, None),
    ),
    "torchrun of one": ({}, TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}, None),
    "flags before the environment": (
        {"coordinator": "a:1", "process": 2},
        TORCHRUN,
        ProcessPlace("a:1", 4, 2, None),
    ),
    "none": ({"cluster": "none"}, TORCHRUN | SLURM | OPENMPI, None),
    "slurm": ({}, SLURM, ProcessPlace("gpu012:61446", 4, 3, [1])),
    "slurm, one on a host": (
        {},
        SLURM | {"SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NODELIST": "n1,n[2-4]"},
        ProcessPlace("n1:61446", 4, 3, None),
    ),
    "slurm, a port": (
        {},
        SLURM | {"JAX_COORDINATOR_PORT": "999", "SLURM_STEP_NODELIST": "n[7,9]"},
        ProcessPlace("n7:999", 4, 3, [1]),
    ),
    "an interactive shell of slurm": (
        {},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
        None,
    ),
    "a batch script of slurm": ({}, {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}, None),
    "openmpi": ({}, OPENMPI, ProcessPlace("10.96.0.1:62624", 4, 3, [1])),
    "openmpi, IPv6": (
        {},
        OPENMPI | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::3,2620::2]:43370"},
        ProcessPlace("[fe80::3]:61441", 4, 3, [1]),
    ),
    "openmpi 5": (
        {"coordinator": "a:1"},
        {name: text for name, text in OPENMPI.items() if "MCA" not in name},
        ProcessPlace("a:1", 4, 3, [1]),
    ),
    "tpu": ({"cluster": "tpu"}, {}, ProcessPlace()),
    "kubernetes": ({"cluster": "kubernetes"}, TORCHRUN, ProcessPlace()),
}


@pytest.mark.parametrize("name", PLACES)
def test_where_a_process_finds_its_place(name: str) -> None:
    flags, environment, expected = PLACES[name]
    assert find_place(DistributedConfig(**flags), environment) == expected


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        ({"processes": 4}, {}, "--distributed.coordinator and --distributed.process too"),
        ({"process": 0}, TORCHRUN | {"WORLD_SIZE": "1"}, "--distributed.coordinator and"),
        ({}, {k: v for k, v in OPENMPI.items() if "MCA" not in k}, "--distributed.coordinator too"),
        ({"cluster": "slurm"}, TORCHRUN, "distributed.cluster is slurm"),
    ],
)
def test_what_is_missing_is_named(
    flags: dict[str, Any], environment: dict[str, str], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        find_place(DistributedConfig(**flags), environment)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"coordinator": "node7"}, "HOST:PORT"),
        ({"processes": 0}, "at least 1"),
        ({"processes": 2, "process": 2}, "less than distributed.processes"),
        ({"timeout": 0}, "at least 1"),
    ],
)
def test_flags_that_fit_nothing(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DistributedConfig(**flags)


def test_a_process_whose_others_do_not_come_ends_in_time(tmp_path: Path) -> None:
    flags = "--distributed.processes 2 --distributed.process 0 --distributed.timeout 1"
    process = start(
        "experiments.quickstart",
        *("--workdir", "run", "--distributed.coordinator", "localhost:0", *flags.split()),
        cwd=tmp_path,
    )
    code, _, err = finish(process)
    assert code == 1
    assert err.splitlines()[-1].startswith("error: JAX has ended this process")
    assert list(tmp_path.iterdir()) == []
