#!/bin/sh
# The data sets of the recipe into data/: all, or those named. `sh scripts/download_data.sh --help` says the rest.
#
#   sh scripts/download_data.sh --list
#   HF_ENDPOINT=https://hf-mirror.com sh scripts/download_data.sh squad mqa_collection
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" -m shine.cli.main download data "$@"
