#!/usr/bin/env bash
# Install, then do the main job once, small and for real: plan and quantize a MiniMax-M2 that was
# trained and expert-pruned for this purpose, and compare its perplexity before and after.
# Run it: scripts/quickstart.sh, from any folder, as often as you like. Takes about 2 minutes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

parent=tests/fixtures/tiny-minimax-m2
out=out/tiny-minimax-m2-NVFP4

echo; echo "== What is there: mquant inspect"
mquant inspect "$parent"

echo; echo "== What will happen: mquant plan"
mquant plan "$parent" --recipe nvfp4 -o "$out"

echo; echo "== Do it: mquant quantize"
mquant quantize "$parent" --recipe nvfp4 -o "$out" --restart

echo; echo "== Is it right: mquant verify (quantize ended with it already)"
mquant verify "$out" --against "$parent"

echo; echo "== Was it worth it: perplexity on text the model was not trained on"
python scripts/perplexity.py "$parent" "$out" --text tests/fixtures/heldout.txt

echo; echo "== Say so: mquant card (README.md for the hub, from facts only)"
mquant card "$out" --from "$parent"

echo
echo "The quantized checkpoint is in $out"
echo "Its card is $out/README.md"
