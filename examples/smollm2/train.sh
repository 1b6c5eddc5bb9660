#!/bin/sh
# Train the hypernetwork of SmolLM2-135M: on from the one that ships with SHINE, or from nothing. Ctrl-C stops it at a step that it
# goes on from when the same command is given again.
#
# usage: sh examples/smollm2/train.sh [folder [checkpoint [KEY=VALUE...]]]
#   folder      where the stages are written: outputs/smollm2
#   checkpoint  what they start from: smollm2-135m, the shipped one, with the longest texts; nothing trains all stages from
#               nothing, short texts first (what longer ones gain by that: docs/training_log.md, section 7), and the reader
#   KEY=VALUE   for every stage, as for train.py: stage.steps=3000 backbone.device=cuda
#
# EXPERIMENT=smollm2_gpu sh examples/smollm2/train.sh … takes the larger recipe, for a GPU of 80 GB.
#
# Reads data/squad, data/race and data/transmla_pretrain_6B_tokens ($SHINE_DATA instead of data; with .venv active):
#   sh scripts/download_data.sh squad race transmla
set -eu
cd "$(dirname "$0")/../.."
out=${1:-outputs/smollm2}
start=${2:-smollm2-135m}
[ $# -lt 2 ] || shift
[ $# -lt 1 ] || shift
. examples/smollm2/common.sh
need squad race transmla_pretrain_6B_tokens
experiment=${EXPERIMENT:-smollm2}

# Tokens of the texts to give back, steps, learning rate.
texts="48:250:3e-3 96:80:2.5e-3 168:80:2e-3"
[ "$experiment" = smollm2 ] || texts="64:1000:1.5e-3 256:400:1.5e-3"
from_nothing=
if [ "$start" = nothing ]; then
    from_nothing=yes
    start=null
else
    texts=${texts##* }
fi

train() {  # train NAME STAGE [KEY=VALUE...]: into a folder of that name, from what was trained last
    name=$1 stage=$2
    shift 2
    if [ ! -e "$out/$name/final" ]; then
        "$python" train.py "experiment=$experiment" "stage=$stage" "checkpoint=$start" "output=$out/$name" resume=auto "$@"
    fi
    start=$out/$name
}

for text in $texts; do
    length=${text%%:*} steps=${text#*:}
    train "pretrain-$length" pretrain "stage.context_length=$length" "stage.conversation_length=$((length + 24))" \
        "stage.steps=${steps%:*}" "stage.learning_rate=${text##*:}" "$@"
done
train mqa mqa "$@"
train 1qa 1qa "$@"
if [ "$from_nothing" ] && [ ! -e "$out/reader" ]; then
    "$python" -m shine.cli.main tune-reader "$out/reader" "experiment=$experiment" stage=mqa stage.steps=150 "$@"
fi
reader=shine/assets/smollm2-135m/reader
[ ! -e "$out/reader" ] || reader=$out/reader
echo "trained: $start; score it with: sh examples/smollm2/score.sh $out/scores $start $reader"
