#!/bin/sh
# Qwen3-0.6B after stage 2: conversations, turn after turn.
#SBATCH --job-name=shine-test-pwc --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --time=12:00:00 --requeue --signal=B:TERM@120 --output=%x-%j.log --open-mode=append
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}" && . scripts/launch.sh
evaluate test_pwc.py qwen3-0.6b iftpwc Qwen3-0.6B_4layer_8lora_128metalora "$@"
