#!/usr/bin/env bash
# Install into a venv, then run every check: lint, types, generated docs, tests.
# Run it: scripts/test.sh [pytest arguments], from any folder, as often as you like.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

ruff check .
ruff format --check .
mypy
python scripts/make_docs.py --check
exec pytest --numprocesses "${MQUANT_TEST_WORKERS:-2}" "$@"
