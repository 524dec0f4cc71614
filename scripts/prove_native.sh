#!/usr/bin/env bash
# After a change in kernels/: builds them here, runs the tests with the mark `native` and all comparisons with XLA, and
# where these pass renews tests/native_proof.sha256, which is to be committed. Read what was skipped: it was not tested.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install test
.venv/bin/python -m pytest -n 2 --dist worksteal -m native
.venv/bin/python -m pytest -n 2 --dist worksteal -m slow tests/attention/test_custom_calls.py
.venv/bin/python tests/native_proof.py
