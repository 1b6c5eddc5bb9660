#!/bin/sh
# Qwen3-8B, stage 2 of 3: conversations about a context.
#SBATCH --job-name=shine-mqa --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --time=72:00:00 --requeue --signal=B:TERM@120 --output=%x-%j.log --open-mode=append
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}" && . scripts/launch.sh
train qwen3-8b mqa Qwen3-8B_4layer_8lora_128metalora "$@"
