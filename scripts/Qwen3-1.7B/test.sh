#!/bin/sh
# Qwen3-1.7B after stage 3: single questions.
#SBATCH --job-name=shine-test --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --time=12:00:00 --requeue --signal=B:TERM@120 --output=%x-%j.log --open-mode=append
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}" && . scripts/launch.sh
evaluate test.py qwen3-1.7b train Qwen3-1.7B_4layer_8lora_128metalora "$@"
