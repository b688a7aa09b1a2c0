#!/usr/bin/env bash
# Install into a venv, then run every check: lint, types, generated docs, tests.
# Run: scripts/test.sh [--fast] [--cov] [pytest arguments], from any folder, as often as you like.
#   --fast  some tests of each room (tests/fast_lane.py), in under a minute
#   --cov   also print the lines that no test in pytest's own processes reaches
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

tests=()
options=()
while [ $# -gt 0 ]; do
    case $1 in
        --fast) mapfile -t tests < <(python tests/fast_lane.py) ;;
        --cov) options+=(--cov --cov-report=term-missing:skip-covered) ;;
        *) break ;;
    esac
    shift
done
if [ ${#tests[@]} -gt 0 ]; then
    options+=(-m "not upstream")
fi

ruff check .
ruff format --check .
mypy
python scripts/make_docs.py --check
exec pytest --numprocesses "${MQUANT_TEST_WORKERS:-2}" "${options[@]}" "${tests[@]}" "$@"
