#!/bin/bash
# The GPUs of one machine: bash launch/local.sh configs/clip.yaml train.batch=4096
#
# Like `accelerate launch` with launch/accelerate/ddp.yaml, from any folder, on as many ranks as there are GPUs (two ranks
# on a machine without), with the environment of environment.sh, which a YAML file cannot set. To choose:
#   ACCELERATE_FILE=…/fsdp2.yaml   another engine; also zero1 to zero3, or a file of your own
#   LOCAL_RANKS=4                  the number of ranks
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT=890   where a step and a save take longer than 110 s
set -euo pipefail

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$launch/environment.sh"

n_gpus=$(vlp_gpus)
default=ddp
if [ "$n_gpus" = 0 ]; then
  default=cpu2
  n_gpus=2
fi
ranks=${LOCAL_RANKS:-$n_gpus}
vlp_environment "$ranks" "$(nproc)"

# accelerate's files for several GPUs are refused for one.
if [ "$ranks" = 1 ]; then
  exec python "$launch/train.py" "$@"
fi
file=${ACCELERATE_FILE:-$launch/accelerate/$default.yaml}
# shellcheck disable=SC2046  # words of options
exec accelerate launch $(vlp_launcher_options "$file") --num_processes "$ranks" "$launch/train.py" "$@"
