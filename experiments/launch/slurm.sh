#!/bin/bash
# Trains on several nodes of a Slurm cluster, one process a node with all of its GPUs:
#
#   sbatch experiments/launch/slurm.sh python -m experiments.llama_1b --workdir runs/llama_1b
#
# Options before the name of this file replace those below: sbatch --nodes=4 --gpus-per-node=4 ...
# lmjax reads each process's rank from srun's variables. The run directory and this directory must
# be on a file system that all nodes share.
#SBATCH --job-name=lmjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120

if [ $# -eq 0 ]; then
    echo "usage: sbatch slurm.sh COMMAND, such as: python -m experiments.llama_1b" >&2
    exit 2
fi

# Two minutes before the end srun's tasks get SIGTERM: they save a checkpoint and exit with 75, and
# the job is requeued and resumes from there.
. .venv/bin/activate
export PYTHONUNBUFFERED=1
code=0
srun --kill-on-bad-exit=0 "$@" || code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
