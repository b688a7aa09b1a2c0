#!/usr/bin/env bash
# Install, then do the main job once, small and for real: plan and quantize a MiniMax-M2 that was
# trained and expert-pruned for this purpose, and make a report of what that did to it.
# Run it: scripts/quickstart.sh, from any folder, as often as you like. Takes about 2 minutes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

parent=tests/fixtures/tiny-minimax-m2
out=out/tiny-minimax-m2-NVFP4
report=out/report.html

echo; echo "== What is there: mquant inspect"
mquant inspect "$parent"

echo; echo "== What will happen: mquant plan"
mquant plan "$parent" --recipe nvfp4 -o "$out"

echo; echo "== Do it: mquant quantize"
mquant quantize "$parent" --recipe nvfp4 -o "$out" --restart

echo; echo "== Is it right: mquant verify (quantize ended with it already)"
mquant verify "$out" --against "$parent"

echo; echo "== Was it worth it, and where did it lose most: mquant report, on text it was not trained on"
mquant report "$out" --against "$parent" --text tests/fixtures/heldout.txt --context 256 -o "$report"

echo; echo "== The same numbers by transformers itself, on the whole models"
python scripts/perplexity.py "$parent" "$out" --text tests/fixtures/heldout.txt

echo; echo "== Say so: mquant card (README.md for the hub, from facts only)"
mquant card "$out" --from "$parent"

echo
echo "The quantized checkpoint is in $out"
echo "The report is $PWD/$report: open it in a browser"
echo "Its card is $out/README.md"
