"""The card's YAML metadata, which the hub itself parses."""

from typing import Any

from mquant.loader_model.vllm_methods import METHODS
from mquant.publish.card.facts import Card
from mquant.publish.card.inference_engines import ENGINES


def metadata(card: Card) -> str:
    """Return the YAML between the card's first two `---`, as huggingface_hub writes YAML."""
    from huggingface_hub import ModelCardData

    parent = card.parent
    base = card.about.base_model or parent.repo or None
    fields = {
        "license": parent.license or ("other" if card.license_file else None),
        "license_name": parent.license_name or None,
        "license_link": _license_link(card),
        "language": list(parent.languages) or None,
        "base_model": base,
        "base_model_relation": "quantized" if base else None,
        "library_name": _library(card),
        "pipeline_tag": _task(card),
        "tags": _tags(card),
    }
    data = ModelCardData(**_kept(fields))
    return data.to_yaml(line_break="\n") + "\n"


def _kept(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def _license_link(card: Card) -> str | None:
    """Return the parent's link if the link is a URL; otherwise the licence file.

    None if the checkpoint has no licence file, or if the licence has an id, such as `mit`.
    """
    link = card.parent.license_link
    if link.startswith("https://"):
        return link
    named = card.parent.license not in ("", "other")
    return None if named or not card.license_file else card.license_file


def _library(card: Card) -> str | None:
    """Return the first engine that loads the checkpoint: the hub shows how to use that engine."""
    engines = ENGINES.get(card.scheme, ()) if card.tried else ()
    loads = (engine.name for engine in engines if engine.loads == "yes")
    return next((name.lower() for name in loads), None)


def _task(card: Card) -> str | None:
    if card.parent.pipeline_tag:
        return card.parent.pipeline_tag
    return "text-generation" if card.architecture.endswith("ForCausalLM") else None


def _tags(card: Card) -> list[str]:
    tags = [
        card.scheme.removesuffix("A16").lower(),
        card.report.method if card.report.method in METHODS else "",
        card.inspection.family or "",
        "reap" if card.parent.reap else "",
        "mquant" if card.record else "",
    ]
    return [tag for tag in tags if tag]
