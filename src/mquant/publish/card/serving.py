"""How to serve the checkpoint: engines, commands, hardware, KV cache, recommended sampling."""

import json
import shlex
from collections.abc import Iterator

from mquant.checkpoint.generation_config import GENERATION
from mquant.publish.card.facts import Card
from mquant.publish.card.inference_engines import ENGINES, HARDWARE
from mquant.publish.card.markdown import block, code, table, text
from mquant.text import binary_size
from mquant.verify.tensor_parallel import TENSOR_PARALLEL


def serving(card: Card) -> str:
    """Return the section; empty if the scheme is unknown and no sampling is recommended."""
    parts = [*_engines(card), *_hardware(card), *_sampling(card)]
    return "\n".join(["## How to serve the checkpoint\n", *parts]) if parts else ""


def _engines(card: Card) -> Iterator[str]:
    has_experts = bool(card.inspection.experts)
    engines = [e for e in ENGINES.get(card.scheme, ()) if has_experts or not e.only_experts]
    if not engines or not card.tried:
        return
    model = card.about.repo or f"./{card.inspection.name}"
    if "/" in card.inspection.name:
        model = card.repo
    first = next(engine for engine in engines if engine.loads == "yes")
    yield f"With {first.name} {first.version}:\n"
    yield block([shlex.join(["vllm", "serve", model])], "sh")
    rows = [
        (f"{engine.name} {engine.version}".strip(), engine.loads, text(engine.what), engine.seen)
        for engine in engines
    ]
    yield table(("Engine", "Loads the checkpoint", "Support", "Evidence"), rows)


def _hardware(card: Card) -> Iterator[str]:
    if card.scheme not in HARDWARE or not card.tried:
        return
    yield f"{HARDWARE[card.scheme]}\n"
    for finding in card.report.findings:
        if finding.rule == TENSOR_PARALLEL.id:
            yield f"{text(finding.message)}\n"
    weights = binary_size(card.inspection.file_bytes)
    yield f"The weights take {weights} of memory, over all GPUs together.\n"
    if card.cache_bytes is None:
        return
    cache = f"The KV cache takes {card.cache_bytes:,} bytes a token in 16 bits"
    if card.inspection.context:
        whole = binary_size(card.cache_bytes * card.inspection.context)
        cache += f", {whole} for the whole context of {card.inspection.context:,} tokens"
    scales = (
        "The checkpoint brings scales for a cache in fewer bits."
        if card.cache_scheme
        else "The checkpoint has no scales for a cache in fewer bits: leave `--kv-cache-dtype` at "
        "`auto`; the accuracy with `fp8` was not measured."
    )
    yield f"{cache}. {scales}\n"


def _sampling(card: Card) -> Iterator[str]:
    if card.generation:
        yield f"Recommended sampling, from `{GENERATION}`, which vLLM reads by default:\n"
        yield table(
            ("Parameter", "Value"),
            ((code(key), code(json.dumps(value))) for key, value in card.generation.items()),
        )
