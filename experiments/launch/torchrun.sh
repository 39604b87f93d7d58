#!/bin/sh
# Trains in several processes of this machine, the way torchrun starts them: one for each GPU.
#
#   PROCESSES=8 sh experiments/launch/torchrun.sh python -m experiments.gpt2_124m --workdir runs/gpt2
#
# On CPU each process has one device. If a process fails, the others are stopped; the
# exit code is that of process 0.
set -eu
processes=${PROCESSES:?how many processes}
export MASTER_ADDR=${MASTER_ADDR:-localhost} MASTER_PORT=${MASTER_PORT:-29500}
export WORLD_SIZE=$processes LOCAL_WORLD_SIZE=$processes

rank=1
while [ "$rank" -lt "$processes" ]; do
    RANK=$rank LOCAL_RANK=$rank "$@" &
    rank=$((rank + 1))
done
first=0
RANK=0 LOCAL_RANK=0 "$@" || first=$?
wait
exit "$first"
