# What every launch sets, unless it is set already. Sourced by local.sh, torchrun.sh and
# slurm/train.sbatch, which say how many ranks a machine starts: vlp_environment LOCAL_RANKS CORES

vlp_environment() {
  local threads=$(($2 / $1))

  # A launcher that was asked to stop kills its ranks after this many seconds. A step and a save must
  # fit; torch's default is 30.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"

  # Of a rank: hashing, metrics, saving. accelerate's default is 1; loader processes take 1 each.
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}"

  # What NCCL says, and what its last exchanges were when one of them had no answer in time, one file
  # a rank: TORCH_FR_DUMP_TEMP_FILE names the folder and the beginning of the name. What then ends
  # the rank, TORCH_NCCL_ASYNC_ERROR_HANDLING, is left to torch, whose defaults all end it.
  export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
  export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
  export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
}

# The GPUs that a machine offers, which are those named in CUDA_VISIBLE_DEVICES where that is set.
vlp_gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    tr , "\n" <<<"$CUDA_VISIBLE_DEVICES" | wc -l
  else
    nvidia-smi --list-gpus 2>/dev/null | wc -l || true
  fi
}

# The options of `accelerate launch` for a file of launch/accelerate, by its path. DeepSpeed's file is
# named anew, because the name in it holds only in the repository's own folder.
vlp_launcher_options() {
  local name
  name=$(basename "$1" .yaml)
  echo --config_file "$1"
  if [ -f "$(dirname "$1")/../deepspeed/$name.json" ]; then
    echo --deepspeed_config_file "$(dirname "$1")/../deepspeed/$name.json"
  fi
}
