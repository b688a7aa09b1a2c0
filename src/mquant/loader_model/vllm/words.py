"""What vLLM does with a checkpoint, in words."""

from collections.abc import Iterator, Sized
from typing import Literal, NamedTuple

from mquant.loader_model.vllm.load import Outcome


class Fault(NamedTuple):
    """A way in which vLLM loads a checkpoint wrongly: the kind, the first name, and a clause."""

    kind: Literal["dropped", "unset", "reshaped", "converted"]
    where: str
    clause: str


def faults_of(outcome: Outcome) -> Iterator[Fault]:
    """Yield each way in which vLLM loads a checkpoint wrongly, once; the clauses are vLLM's."""
    for name in outcome.dropped[:1]:
        yield Fault("dropped", name, f"drops {name}" + _more(outcome.dropped))
    for name, missing in outcome.unset[:1]:
        clause = f"leaves {missing:,} of {name}'s elements unset"
        yield Fault("unset", name, clause + _more(outcome.unset))
    for name, shape, target in outcome.reshaped[:1]:
        clause = f"spreads {name}, {list(shape)}, over {list(target)}"
        yield Fault("reshaped", name, clause + _more(outcome.reshaped))
    for name, dtype, into in outcome.converted[:1]:
        clause = f"converts {name} from {dtype} to {into}"
        yield Fault("converted", name, clause + _more(outcome.converted))


def in_words(outcome: Outcome, what: str = "it") -> tuple[str, str]:
    """Return a place, and a clause whose subject is vLLM, such as "loads it".

    `what` names the checkpoint. Of several tensors, place and clause name the first. Both are empty
    if it is not known what vLLM does; the place is empty if vLLM loads the checkpoint.
    """
    if outcome.unknown:
        return "", ""
    if outcome.refused:
        where, why = outcome.refused
        return where, f"refuses {what}: {where}{':' * why.startswith('vLLM ')} {why}"
    for fault in faults_of(outcome):
        return fault.where, f"loads {what} wrongly: it {fault.clause}"
    return "", f"loads {what}"


def _more(names: Sized) -> str:
    return f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""
