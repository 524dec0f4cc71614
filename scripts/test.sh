#!/usr/bin/env bash
# Installs the project with its test extra into .venv, then runs every check: ruff, pyright, pytest.
# Arguments go to pytest, e.g.  ./scripts/test.sh -m slow   or   ./scripts/test.sh tests/attention
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install test
fetch_models

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright --pythonpath .venv/bin/python
# Two processes at a time; -n 0 for one.
.venv/bin/python -m pytest -n 2 --dist worksteal "$@"
