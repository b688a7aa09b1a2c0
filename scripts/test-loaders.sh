#!/usr/bin/env bash
# Have vLLM judge the output of every recipe, random checkpoints (1.5 minutes), and the tests' corpus
# of broken checkpoints.
# The first run needs 4 GB for vLLM.
# Run: scripts/test-loaders.sh, from any folder; set MQUANT_VLLM_PYTHON to use your own vLLM.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

[[ -n "${MQUANT_VLLM_PYTHON:-}" ]] || mquant loader install vllm
python scripts/judge_recipes.py
python scripts/differential.py --seed 0 --cases 40
exec python scripts/judge_corpus.py "$@"
