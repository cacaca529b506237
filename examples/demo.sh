#!/bin/sh
# Tune the upper two thirds of SmolLM2-135M to write SQL; measure it before and after on 100 questions about tables that
# it has not seen.
set -eu
cd "$(dirname "$0")/.."
rm -rf runs/demo

rankwise train --model smollm2-135m --data examples/text_to_sql/train.jsonl --eval-data examples/text_to_sql/test.jsonl \
    --target-modules 'model\.layers\.(1[0-9]|2[0-9])\..*_proj' --r 8 --lr 3e-3 --batch-size 4 --max-steps 250 \
    --out runs/demo

printf '\nThree of the questions, before and after:\n'
rankwise generate --adapter runs/demo --data examples/text_to_sql/test.jsonl --first 3 --use both --max-new-tokens 60
