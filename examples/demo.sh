#!/bin/sh
# Tune SmolLM2-135M to write SQL, measure it on 100 questions that it has not seen, and show answers before and after.
set -eu
cd "$(dirname "$0")/text_to_sql"
runs=../../runs
rm -rf "$runs/demo"

rankwise train --model smollm2-135m --data train.jsonl --eval-data valid.jsonl --eval-answers 0 \
    --r 8 --batch-size 4 --lr 2e-3 --max-steps 150 --out "$runs/demo"

echo; echo "100 test questions, base model:"
rankwise eval --model smollm2-135m --data test.jsonl
echo; echo "100 test questions, with the adapter:"
rankwise eval --adapter "$runs/demo" --data test.jsonl

echo; echo "Three of them, before and after:"
rankwise generate --adapter "$runs/demo" --file test.jsonl --first 3 --use both --max-new-tokens 60
