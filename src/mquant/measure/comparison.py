"""Compare a checkpoint with its parent: every weight, summed up by role, layer and expert."""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import astuple, dataclass
from typing import Any, Final, TypeVar

from mquant.checkpoint import Source, open_checkpoint, reader_of
from mquant.checkpoint.hub import HubRepo
from mquant.events import Emit, Note, silent
from mquant.family import Family
from mquant.findings import Finding
from mquant.loader_model.modules import read_modules
from mquant.measure.comparison_cache import ComparisonCache
from mquant.measure.difference import Difference, compare_pairs, pairs
from mquant.text import plural
from mquant.verify.against_parent import KEPT_TENSOR_DIFFERS
from mquant.verify.digests import check_measured
from mquant.verify.tally import Tally
from mquant.weights.decode import READABLE

_HUB_WORKERS: Final = 6  # tensors at once from a hub; each worker holds an expert's weight twice
_Key = TypeVar("_Key", int, tuple[int, int])


@dataclass
class ErrorStats:
    """Sums over some weights, and the errors that follow.

    `error`, `power` and `own` are sums of squares: of the differences, of the parent's weights, of
    the checkpoint's weights.
    """

    tensors: int = 0
    elements: int = 0
    error: float = 0.0
    power: float = 0.0
    own: float = 0.0

    def add(self, difference: Difference) -> None:
        """Count one more tensor."""
        self.tensors += 1
        self.elements += difference.elements
        self.error += difference.error
        self.power += difference.power
        self.own += difference.own

    @property
    def relative(self) -> float:
        """The L2 norm of the differences over the parent's; infinite if the parent's is 0."""
        if not self.power:
            return math.inf if self.error else 0.0
        return math.sqrt(self.error / self.power)

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise, in dB."""
        relative = self.relative
        return -20 * math.log10(relative) if relative else math.inf

    @property
    def cosine(self) -> float:
        """The cosine of the angle between both weights as vectors."""
        # x*y = (x*x + y*y - e*e) / 2: nothing cancels, as e is small and summed by itself.
        length = math.sqrt(self.power) * math.sqrt(self.own)
        return (self.power + self.own - self.error) / 2 / length if length else math.nan

    def to_json(self) -> dict[str, Any]:
        """Return the numbers; a number that is not finite is null."""
        return {
            "tensors": self.tensors,
            "elements": self.elements,
            "relative_error": _finite(self.relative),
            "sqnr_db": _finite(self.sqnr),
            "cosine": _finite(self.cosine),
        }


def error_stats(difference: Difference) -> ErrorStats:
    """Return the error of one tensor."""
    stats = ErrorStats()
    stats.add(difference)
    return stats


@dataclass(frozen=True)
class Comparison:
    """All differences of a checkpoint from its parent, in the order of the parent's files.

    `identical` tensors equal the parent's bit for bit, `equal` tensors number for number; all
    others have an error. `bytes_read` and `requests` count the reads from hub repos; None if no
    source is a hub repo.
    """

    source: str
    parent: str
    family: str | None
    tensors: tuple[Difference, ...]
    findings: tuple[Finding, ...]
    bytes_compared: int
    bytes_read: int | None = None
    requests: int | None = None

    @property
    def changed(self) -> tuple[Difference, ...]:
        """Tensors that differ from the parent's; the largest relative error first."""
        changed = [each for each in self.tensors if not (each.identical or each.equal)]
        return tuple(sorted(changed, key=_badness, reverse=True))

    @property
    def total(self) -> ErrorStats:
        """The error of all tensors that differ."""
        return _sum(self.changed)

    @property
    def equal(self) -> Mapping[str, int]:
        """Role -> how many tensors have the parent's numbers under other bits; roles with any."""
        return Counter(difference.role for difference in self.tensors if difference.equal)

    @property
    def roles(self) -> Mapping[str, tuple[int, ErrorStats]]:
        """Role -> how many tensors are identical, and the error of those that are not equal."""
        by_role: dict[str, list[Difference]] = defaultdict(list)
        for difference in self.tensors:
            by_role[difference.role].append(difference)
        return {
            role: (
                sum(f.identical for f in group),
                _sum(f for f in group if not (f.identical or f.equal)),
            )
            for role, group in by_role.items()
        }

    @property
    def layers(self) -> Mapping[int, ErrorStats]:
        """Layer -> the error of the layer's tensors that differ."""
        return _by(self.changed, lambda difference: difference.layer)

    @property
    def experts(self) -> Mapping[tuple[int, int], ErrorStats]:
        """(layer, expert) -> the error of all weights of the expert that differ."""
        return _by(
            self.changed,
            lambda f: None if f.layer is None or f.expert is None else (f.layer, f.expert),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the keys of `mquant.compare/1` besides the envelope's.

        `tensors` are rows under `columns`, since a checkpoint has tens of thousands of tensors.
        `experts` are rows [layer, expert, relative error].
        """
        return {
            "source": self.source,
            "parent": self.parent,
            "family": self.family,
            "identical": sum(difference.identical for difference in self.tensors),
            "equal": sum(self.equal.values()),
            "changed": self.total.to_json(),
            "roles": [
                {"role": role, "identical": same, "equal": self.equal.get(role, 0)}
                | error.to_json()
                for role, (same, error) in self.roles.items()
            ],
            "layers": [{"layer": at, **e.to_json()} for at, e in self.layers.items()],
            "experts": [[*at, _finite(error.relative)] for at, error in self.experts.items()],
            "worst": [difference.name for difference in self.changed[:10]],
            "columns": list(_COLUMNS),
            "tensors": [_row(difference) for difference in self.tensors],
            "bytes_compared": self.bytes_compared,
            "bytes_read": self.bytes_read,
            "requests": self.requests,
        }


_COLUMNS: Final = (
    "name",
    "role",
    "layer",
    "expert",
    "form",
    "parent_form",
    "elements",
    "identical",
    "relative_error",
    "sqnr_db",
    "cosine",
    "worst_row",
    "worst_column",
    "worst_error",
)


def _row(difference: Difference) -> list[Any]:
    error = error_stats(difference)
    numbers = (
        (error.relative, error.sqnr, error.cosine) if not difference.identical else (0.0, None, 1)
    )
    row, column, worst = difference.worst or (None, None, None)
    head = list(astuple(difference))[:8]
    return [*head, *map(_finite, numbers), row, column, _finite(worst)]


def _finite(value: float | None) -> float | None:
    """Round to nine digits: more depend on the processor. None for infinity and NaN: not JSON."""
    return float(f"{value:.9g}") if value is not None and math.isfinite(value) else None


def _badness(difference: Difference) -> tuple[bool, float]:
    relative = error_stats(difference).relative
    return (not math.isfinite(relative), relative if math.isfinite(relative) else 0.0)


def _sum(differences: Iterable[Difference]) -> ErrorStats:
    total = ErrorStats()
    # Floating point sums depend on the order, so the order is always the same.
    for difference in sorted(differences, key=lambda difference: difference.name):
        total.add(difference)
    return total


def _by(
    differences: Iterable[Difference], key: Callable[[Difference], _Key | None]
) -> dict[_Key, ErrorStats]:
    groups: dict[_Key, list[Difference]] = defaultdict(list)
    for difference in differences:
        place = key(difference)
        if place is not None:
            groups[place].append(difference)
    return {place: _sum(groups[place]) for place in sorted(groups)}


def compare(
    source: Source,
    parent: Source,
    families: Mapping[str, Family],
    *,
    workers: int | None = None,
    digests: bool = True,
    emit: Emit = silent,
) -> Comparison:
    """Compare all weights of a checkpoint with its parent's.

    `workers` None: cores + 1; 6 if a source is a hub repo. A rerun after an interruption resumes:
    tensors of the same files that were compared are not compared again. `digests` False: the
    caller has compared the files with mquant.json. Raises SourceError if a checkpoint is missing
    or cannot be read, or if the parent's files are not as its mquant.json says.
    """
    view = read_modules(open_checkpoint(source, tolerant=True), families)
    original = read_modules(open_checkpoint(parent), families)
    changed = check_measured(source, parent, emit) if digests else ()
    tally = Tally()
    hubs = [repo for repo in (source, parent) if isinstance(repo, HubRepo)]
    with closing(reader_of(source)) as reader, closing(reader_of(parent)) as parent_reader:
        all_pairs = pairs(view, original, (reader, parent_reader), tally)
        with ComparisonCache(source, parent, view.family, emit) as cache:
            known = cache.known
            if known:
                emit(Note("info", f"{len(known):,} tensors were compared before: resuming."))
            todo = [pair for pair in all_pairs if pair.name not in known]
            compare_pairs(
                todo,
                hub=bool(hubs),
                workers=workers or (_HUB_WORKERS if hubs else (os.cpu_count() or 1) + 1),
                done=cache.add,
                emit=emit,
                skipped=sum(pair.nbytes for pair in all_pairs if pair.name in known),
            )
    differences = {pair.name: cache.known[pair.name] for pair in all_pairs}
    for tensor in differences.values():
        if not tensor.identical and {tensor.form, tensor.parent_form} <= READABLE:
            fault = "is not bit-equal to the parent's"
            if tensor.form != tensor.parent_form:
                fault = f"is {tensor.form}; the parent's is {tensor.parent_form}"
            tally.add(KEPT_TENSOR_DIFFERS, tensor.name, f"{tensor.name} {fault}")
    _warn(differences.values(), emit)
    return Comparison(
        source=source.name,
        parent=parent.name,
        family=view.family.name if view.family else None,
        tensors=tuple(differences.values()),
        findings=(*changed, *tally.findings()),
        bytes_compared=sum(pair.nbytes for pair in all_pairs),
        bytes_read=sum(hub.bytes_read for hub in hubs) if hubs else None,
        requests=sum(hub.requests for hub in hubs) if hubs else None,
    )


def _warn(differences: Iterable[Difference], emit: Emit) -> None:
    """Emit one warning that names the first tensor without an error, and counts the others."""
    names = [d.name for d in differences if not math.isfinite(d.error)]
    if names:
        more = f" (and {plural(len(names) - 1, 'more tensor')} like it)" if names[1:] else ""
        fault = "holds NaN or infinity, here or in the parent"
        emit(Note("warning", f"{names[0]} {fault}{more}: no sum with it is a number."))
