#!/usr/bin/env bash
# Builds the native kernels with AddressSanitizer and UndefinedBehaviorSanitizer into a temporary folder, and runs
# the tests of the custom calls with them: they give what XLA and numpy give, and no access is out of bounds.
# Arguments go to pytest. PYTHON names an interpreter that has the test extra, by default that of .venv;
# ICEFORMER_EXAMPLES is the number of inputs of each case.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
  source scripts/environment.sh
  install test
  PYTHON=.venv/bin/python
fi
runtimes="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
for runtime in $runtimes; do
  [ -e "$runtime" ] || { echo "g++ comes without $runtime: install the sanitizers' runtime libraries" >&2; exit 1; }
done

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
sanitizers="-fsanitize=address,undefined"
echo "building with $sanitizers ..." >&2
# Python's own flags have -fwrapv, which would make signed overflow defined.
CXX=g++ LDFLAGS="$sanitizers" \
  ICEFORMER_CXXFLAGS="$sanitizers -fno-sanitize-recover=all -fno-omit-frame-pointer -fno-wrapv -g1 -O1" \
  "$PYTHON" setup.py --quiet build_ext --build-lib "$folder" --build-temp "$folder/objects"

# Leaks are not looked for: Python and XLA keep memory until the process ends. Output is captured above the level of file
# descriptors, because the report of an abort would be lost with it.
LD_PRELOAD="$runtimes" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  ICEFORMER_KERNELS="$folder/iceformer/kernels/native/libiceformer.so" ICEFORMER_SANITIZED=1 \
  "$PYTHON" -m pytest tests/attention/test_custom_calls.py tests/model/test_products.py \
  tests/model/test_activations.py --capture=sys "$@"
