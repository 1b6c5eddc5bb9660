#!/bin/sh
# Qwen3-1.7B, stage 3 of 3: single questions.
#SBATCH --job-name=shine-1qa --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --time=72:00:00 --requeue --signal=B:TERM@120 --output=%x-%j.log --open-mode=append
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}" && . scripts/launch.sh
train qwen3-1.7b 1qa Qwen3-1.7B_4layer_8lora_128metalora "$@"
