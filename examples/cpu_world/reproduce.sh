#!/bin/sh
# Rebuild the shipped CPU world from nothing: backbone, three stages, three tests. Takes at most two hours on two cores.
# usage: sh examples/cpu_world/reproduce.sh [folder]
set -eu
cd "$(dirname "$0")/../.."
out=${1:-outputs/reproduce}
python=${PYTHON:-.venv/bin/python}
if [ -e "$out" ]; then
    echo "error: $out is there already; move it away, or name another folder: sh examples/cpu_world/reproduce.sh outputs/again" >&2
    exit 2
fi

"$python" examples/cpu_world/pretrain_backbone.py --output "$out/backbone"
checkpoint=null
for stage in pretrain mqa 1qa; do
    "$python" train.py experiment=cpu_world "stage=$stage" "backbone.path=$out/backbone" "output=$out/$stage" "checkpoint=$checkpoint"
    checkpoint=$out/$stage/final
done
for door in test_pretrain test_pwc test; do
    "$python" "$door.py" experiment=cpu_world "backbone.path=$out/backbone" "checkpoint=$checkpoint" "output=$out/$door"
done
