#!/usr/bin/env bash
# Train over several machines with torchrun. Run this on each machine, with its own NODE_RANK and the arguments of
# pipelite fit:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=first-node bash examples/torchrun.sh --config FILE
set -euo pipefail
exec torchrun \
    --nnodes "${NNODES:-2}" --node_rank "$NODE_RANK" --nproc_per_node "${GPUS:-4}" \
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" \
    -m lightning_pipelite fit "$@" --trainer.num_nodes "${NNODES:-2}" --trainer.devices "${GPUS:-4}"
