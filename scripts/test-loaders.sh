#!/usr/bin/env bash
# Have vLLM itself judge what every recipe makes, and the tests' corpus of broken checkpoints.
# Needs 4 GB for vLLM, once.
# Run it: scripts/test-loaders.sh, from any folder; set MQUANT_VLLM_PYTHON to use a vLLM of yours.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

[[ -n "${MQUANT_VLLM_PYTHON:-}" ]] || mquant loader install vllm
python scripts/judge_recipes.py
exec python scripts/judge_corpus.py "$@"
