#!/usr/bin/env bash
# Times attention alone, 12 heads of 64 over 16384 tokens, causal and bidirectional, in float32 and bfloat16.
# Results: benchmarks/attention-DIRECTION-DTYPE/benchmark.{json,png}. Options go to `iceformer benchmark`.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install bench

for dtype in float32 bfloat16; do
  .venv/bin/iceformer benchmark "benchmarks/attention-causal-$dtype" --attention-only --dtype "$dtype" \
    --lengths 16384 --retention "$@"
  .venv/bin/iceformer benchmark "benchmarks/attention-bidirectional-$dtype" --attention-only --dtype "$dtype" \
    --lengths 16384 --bidirectional "$@"
done
