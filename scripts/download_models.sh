#!/bin/sh
# Backbones into models/, released hypernetworks into checkpoints/: all, or those named. `--help` says the rest.
#
#   sh scripts/download_models.sh qwen3-8b shine-pretrain shine-mqa shine-1qa
#   sh scripts/download_models.sh qwen3-8b --from modelscope
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" -m shine.cli.main download models "$@"
