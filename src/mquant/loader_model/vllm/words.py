"""What vLLM does with a checkpoint, in words."""

from mquant.loader_model.vllm.load import Outcome


def in_words(outcome: Outcome, what: str = "it") -> tuple[str, str]:
    """Return a place, and a clause whose subject is vLLM, such as "loads it".

    `what` names the checkpoint. Of several tensors, place and clause name the first. Both are empty
    if it is not known what vLLM does; the place is empty if vLLM loads the checkpoint.
    """
    if outcome.unknown:
        return "", ""
    if outcome.refused:
        where, why = outcome.refused
        return where, f"refuses {what}: {where} {why}"
    for name in outcome.dropped[:1]:
        return name, _wrongly(what, f"drops {name}", len(outcome.dropped))
    for name, missing in outcome.unset[:1]:
        clause = f"leaves {missing:,} of {name}'s elements unset"
        return name, _wrongly(what, clause, len(outcome.unset))
    for name, shape, target in outcome.reshaped[:1]:
        clause = f"spreads {name}, {list(shape)}, over {list(target)}"
        return name, _wrongly(what, clause, len(outcome.reshaped))
    for name, dtype, into in outcome.converted[:1]:
        clause = f"converts {name} from {dtype} to {into}"
        return name, _wrongly(what, clause, len(outcome.converted))
    return "", f"loads {what}"


def _wrongly(what: str, clause: str, count: int) -> str:
    more = f" (and {count - 1:,} more)" if count > 1 else ""
    return f"loads {what} wrongly: it {clause}{more}"
