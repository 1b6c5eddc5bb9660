#!/bin/sh
# Train the hypernetwork of SmolLM2-135M: on from the one that ships with SHINE, or from nothing. Ctrl-C stops it at a step that it
# goes on from when the same command is given again.
#
# usage: sh examples/smollm2/train.sh [folder [checkpoint [KEY=VALUE...]]]
#   folder      where the stages are written: outputs/smollm2
#   checkpoint  what they start from: smollm2-135m, the shipped one; nothing trains the three stages and the reader from nothing
#   KEY=VALUE   for every stage, as for train.py: stage.steps=3000 backbone.device=cuda
#
# EXPERIMENT=smollm2_gpu sh examples/smollm2/train.sh … takes the larger recipe, for a GPU of 80 GB.
#
# Reads data/squad, data/race and, from nothing, data/transmla_pretrain_6B_tokens ($SHINE_DATA instead of data; with .venv active):
#   sh scripts/download_data.sh squad race transmla
set -eu
cd "$(dirname "$0")/../.."
out=${1:-outputs/smollm2}
start=${2:-smollm2-135m}
[ $# -lt 2 ] || shift
[ $# -lt 1 ] || shift
python=${PYTHON:-.venv/bin/python}
experiment=${EXPERIMENT:-smollm2}

stages="mqa 1qa"
if [ "$start" = nothing ]; then
    stages="pretrain mqa 1qa"
    start=null
fi
data=${SHINE_DATA:-data}
for folder in squad race; do
    if [ ! -d "$data/$folder" ]; then
        echo "error: there is no $data/$folder: sh scripts/download_data.sh $folder, or set SHINE_DATA" >&2
        exit 2
    fi
done
for stage in $stages; do
    if [ ! -e "$out/$stage/final" ]; then
        "$python" train.py "experiment=$experiment" "stage=$stage" "checkpoint=$start" "output=$out/$stage" resume=auto "$@"
    fi
    start=$out/$stage
done
if [ "$stages" = "pretrain mqa 1qa" ] && [ ! -e "$out/reader" ]; then
    "$python" -m shine.cli.main tune-reader "$out/reader" "experiment=$experiment" stage=mqa stage.steps=150 "$@"
fi
reader=shine/assets/smollm2-135m/reader
[ ! -e "$out/reader" ] || reader=$out/reader
echo "trained: $start; score it with: sh examples/smollm2/score.sh $out/scores $start $reader"
