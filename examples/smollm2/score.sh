#!/bin/sh
# Every score of the hypernetwork of SmolLM2-135M, with intervals: SQuAD's unseen articles and unseen invented worlds (Only Question,
# In-Context, In-Context tuned, SHINE), others of both by which no version was chosen, texts given back, and what adapters do beside
# answering. Stopped, the tests go on where they were.
#
# usage: sh examples/smollm2/score.sh [folder [checkpoint [reader [KEY=VALUE...]]]]
#   folder      where the results are written: outputs/smollm2-scores
#   checkpoint  what is scored: smollm2-135m, the shipped one
#   reader      the LoRA of In-Context, tuned: the shipped one
#   KEY=VALUE   for both tests, as for test.py: backbone.device=cuda batch_size=64
#
# Reads data/squad and data/wikitext ($SHINE_DATA instead of data; with .venv active):
#   sh scripts/download_data.sh squad wikitext
set -eu
cd "$(dirname "$0")/../.."
out=${1:-outputs/smollm2-scores}
checkpoint=${2:-smollm2-135m}
reader=${3:-shine/assets/smollm2-135m/reader}
for _ in 1 2 3; do
    [ $# -lt 1 ] || shift
done
. examples/smollm2/common.sh
need squad wikitext/wikitext-2-v1

"$python" test.py experiment=smollm2 "checkpoint=$checkpoint" "reader=$reader" "output=$out/test" \
    "methods=[shine,shine_other,in_context,in_context_tuned,only_question]" max_new_tokens=24 "$@"
"$python" test.py experiment=smollm2 sets=passages/other "checkpoint=$checkpoint" "reader=$reader" "output=$out/other" \
    "methods=[shine,in_context,in_context_tuned,only_question]" max_new_tokens=24 "$@"
"$python" test_pretrain.py experiment=smollm2 "checkpoint=$checkpoint" "output=$out/test_pretrain" \
    stage.context_length=320 "$@"
"$python" -m shine.cli.main trust "$checkpoint" --contexts 16 --seed 9000 --knowledge examples/knowledge.jsonl --output "$out/trust"
"$python" -m shine.cli.main report "$out/test" "$out/test_pretrain" --output "$out/report"
