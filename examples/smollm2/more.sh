#!/bin/sh
# What more training of the hypernetwork of SmolLM2-135M does: its last stage gone on with, at a constant rate, and each checkpoint
# scored on questions that it was not chosen by. Ctrl-C stops it; the same command goes on.
#
# usage: sh examples/smollm2/more.sh [folder [labels|distilled [steps [KEY=VALUE...]]]]
#   folder     where all is written: outputs/smollm2-more
#   labels     learn from the labels, as the recipe does; distilled: from the tuned in-context model's distribution too
#   steps      of 48 questions, four of a context in one pass; scored every ten: 40 (given again with more, a run goes on)
#   KEY=VALUE  for the training and the tests, as for train.py: backbone.device=cuda
#
# `python examples/smollm2/more.py FOLDER` puts the scores of all that was trained there on the model card.
#
# Reads data/squad, data/race and data/transmla_pretrain_6B_tokens ($SHINE_DATA instead of data; with .venv active):
#   sh scripts/download_data.sh squad race transmla
set -eu
cd "$(dirname "$0")/../.."
out=${1:-outputs/smollm2-more}
from=${2:-labels}
steps=${3:-40}
for _ in 1 2 3; do
    [ $# -lt 1 ] || shift
done
. examples/smollm2/common.sh
need squad race transmla_pretrain_6B_tokens
distillation=null
case $from in
    labels) ;;
    distilled) distillation="{share: 0.5, top: 32, reader: shine/assets/smollm2-135m/reader}" ;;
    *) echo "error: labels or distilled, not $from" >&2; exit 2 ;;
esac

# Half of the recipe's rate, which falls to zero there. Worlds, and questions made of passages, that no run behind the shipped file drew.
# What may change is the number of steps: at a constant rate a longer run is a shorter one gone on with, even where it has ended.
resume=auto
[ ! -e "$out/$from/final" ] || resume=latest
"$python" train.py experiment=smollm2 stage=1qa checkpoint=smollm2-135m "output=$out/$from" "resume=$resume" allow_changes=true \
    stage.schedule=constant stage.learning_rate=2e-4 stage.warmup_steps=5 "stage.steps=$steps" "stage.distillation=$distillation" \
    stage.save_every=10 stage.keep=100 stage.evaluate_every=10 stage.evaluation_batches=2 \
    data.train.worlds.options.count=1500 data.train.worlds.options.seed=21000 data.train.pieces.options.seed=31 \
    data.train.pieces_race.options.seed=37 "$@"

score() {  # score CHECKPOINT NAME [KEY=VALUE...]
    checkpoint=$1 name=$2
    shift 2
    [ -e "$out/scores/$name/summary.json" ] || "$python" test.py experiment=smollm2 sets=passages/other "checkpoint=$checkpoint" \
        "output=$out/scores/$name" "methods=[shine]" max_new_tokens=24 "$@"
}

score smollm2-135m start "$@"
for checkpoint in "$out/$from"/*-0*; do
    [ ! -e "$checkpoint" ] || score "$checkpoint" "$from-${checkpoint##*-}" "$@"
done
echo "scored: put it on the card with: python examples/smollm2/more.py $out"
