#!/usr/bin/env bash
# Install, then do the main job once: plan and quantize a small MiniMax-M2 that was trained and
# expert-pruned for this purpose, verify the result, and write a report of the loss.
# Run: scripts/quickstart.sh, from any folder, as often as you like. It takes about 2 minutes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

parent=tests/fixtures/tiny-minimax-m2
out=out/tiny-minimax-m2-NVFP4
report=out/report.html

echo; echo "== Inspect the checkpoint: mquant inspect"
mquant inspect "$parent"

echo; echo "== Show the plan: mquant plan"
mquant plan "$parent" --recipe nvfp4 -o "$out"

echo; echo "== Quantize: mquant quantize"
mquant quantize "$parent" --recipe nvfp4 -o "$out" --restart

echo; echo "== Verify again: mquant verify (mquant quantize has verified already)"
mquant verify "$out" --against "$parent"

echo; echo "== Write a report of the loss on held-out text: mquant report"
mquant report "$out" --against "$parent" --text tests/fixtures/heldout.txt --context 256 -o "$report"

echo; echo "== Compute the same numbers with transformers, on the whole models"
python scripts/perplexity.py "$parent" "$out" --text tests/fixtures/heldout.txt

echo; echo "== Write the model card: mquant card (README.md for the hub, from facts only)"
mquant card "$out" --from "$parent"

echo
echo "The quantized checkpoint is in $out"
echo "The report is in $PWD/$report: open the report in a browser"
echo "The model card is $out/README.md"
