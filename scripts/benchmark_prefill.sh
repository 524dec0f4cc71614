#!/usr/bin/env bash
# Times prefill of the default random model (4 layers, hidden 768) in float32 and bfloat16, from 4096 to 65536 tokens,
# beside every other engine; eager attention at 4096 tokens only. Takes hours on two cores, and goes on where it was
# interrupted. Results: benchmarks/prefill-DTYPE/benchmark.{json,png}. Options go to `iceformer benchmark`.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install bench

engines=two_stage,exact,floor,sdpa,openvino,onnxruntime
for dtype in float32 bfloat16; do
  folder=benchmarks/prefill-$dtype
  .venv/bin/iceformer benchmark "$folder" --dtype "$dtype" --lengths 4096 --engines "$engines,eager" "$@"
  .venv/bin/iceformer benchmark "$folder" --dtype "$dtype" --lengths 16384,32768,65536 --engines "$engines" "$@"
done
