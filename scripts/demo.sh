#!/usr/bin/env bash
# Converts and compiles the demo model, and asks it about a record of about 15,000 tokens with exact and with two-stage
# attention. The last line of stdout is a JSON object with the figures. Options go to scripts/demo.py (see --help).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install convert
exec .venv/bin/python scripts/demo.py "$@"
