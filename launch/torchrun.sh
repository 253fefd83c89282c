#!/bin/bash
# torchrun, which starts all ranks anew where one has died: bash launch/torchrun.sh configs/clip.yaml train.batch=4096
#
# The run then continues from its newest checkpoint with the same samples in the same order. Stopped by a
# signal, the ranks save and exit, and are not started again. To choose:
#   LOCAL_RANKS=4       the ranks of this machine; else one for each GPU, two without
#   MAX_RESTARTS=10     deaths that are survived (3)
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT=890   where a step and a save take longer than 110 s
# Several nodes run the same command, each with
#   N_NODES=4           or 2:4, which goes on with as many as are there; train.batch has to fit every number of ranks
#   HEAD=node1:29400    the node where all meet, and a free port of it
#   RUN_ID=clip1        a name that no other run there has
#   NODE_RANK=0         says which node is HEAD where its name does not; others have another number
# Another engine: train.engine=fsdp2, zero1, zero2 or zero3.
set -euo pipefail

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$launch/environment.sh"

n_gpus=$(vlp_gpus)
ranks=${LOCAL_RANKS:-$((n_gpus > 0 ? n_gpus : 2))}
vlp_environment "$ranks" "$(nproc)"

nodes=${N_NODES:-1}
if [ "$nodes" = 1 ]; then
  meeting=(--standalone)
elif [ -n "${HEAD:-}" ] && [ -n "${RUN_ID:-}" ]; then
  # The other nodes wait for the first one so long; torch gives it 60 s, and an image takes minutes.
  waiting=read_timeout=600
  if [ -n "${NODE_RANK:-}" ]; then
    waiting+=,is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)
  fi
  meeting=(--rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "$RUN_ID" --rdzv-conf "$waiting")
else
  echo "launch/torchrun.sh: N_NODES is $nodes; set HEAD=HOST:PORT and RUN_ID=NAME, the same on every node" >&2
  exit 2
fi

# Where the number of nodes changes torchrun starts anew, too, and counts it as the first start.
resume=(resume=auto)
if [[ " $* " == *" resume="* ]]; then
  resume=()
fi

exec torchrun --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-3}" \
  "${meeting[@]}" "$launch/train.py" "$@" "${resume[@]}"
