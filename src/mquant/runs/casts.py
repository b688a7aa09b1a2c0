"""What a cast from MXFP4 to NVFP4 keeps and loses, counted from the source's scales."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from mquant.checkpoint import RangeReader, Source, reader_of
from mquant.events import Note
from mquant.findings import Finding, rule
from mquant.plan import Plan
from mquant.runs.workers import default_workers
from mquant.text import names, plural

CAST_LOSSLESS: Final = rule(
    "cast-lossless",
    "Every block that goes from MXFP4 to NVFP4 keeps all its weights.",
    "Both formats hold E2M1 codes, and E4M3 scales hold 17 octaves under one global scale.",
    "Nothing to do.",
    severity="info",
    needs="plan",
)
CAST_NOT_EXACT: Final = rule(
    "cast-not-exact",
    "Under --exact, no block of MXFP4 is rounded again.",
    "A fused set has one global scale in NVFP4: where its blocks span more than 17 octaves, the "
    "smallest blocks must be rounded again.",
    "Leave out --exact, or give the role the value `source`: its weights then stay in MXFP4.",
    needs="plan",
)
CAST_UNSAFE: Final = rule(
    "cast-unsafe",
    "The block scales of a cast fused set span at most 14 octaves.",
    "FP4 Marlin wants block scales of 2^-6 and more, and vLLM rescales block scales in half "
    "precision: smaller ones may become 0.",
    "Serve the checkpoint with a kernel other than FP4 Marlin, or give the role the value "
    "`source`: its weights then stay in MXFP4.",
    severity="warning",
    needs="plan",
)


_CONNECTIONS: Final = 32


@dataclass(frozen=True)
class Casts:
    """The counts of a plan's casts, in blocks of 16 weights.

    `requantized` maps a module to its blocks that were rounded again. `unsafe` are the first
    modules of the fused sets that span more than 14 octaves.
    """

    blocks: int
    requantized: Mapping[str, int]
    unsafe: tuple[str, ...]

    @property
    def lossless(self) -> int:
        """The blocks in which every weight is equal to the source's."""
        return self.blocks - sum(self.requantized.values())

    @property
    def summary(self) -> str:
        """The count in words."""
        return f"lossless: {self.lossless:,} of {self.blocks:,} blocks"

    def to_json(self) -> dict[str, Any]:
        """Return the entry of mquant.json."""
        return {
            "blocks": self.blocks,
            "lossless": self.lossless,
            "requantized": dict(self.requantized),
            "unsafe_for_marlin": list(self.unsafe),
        }

    def notes(self) -> Iterator[Note]:
        """Yield what a person should know of a run."""
        yield Note("info", f"MXFP4 cast to NVFP4, {self.summary}.")
        if self.requantized:
            yield Note("warning", f"{self._lost()}.")
        if self.unsafe:
            yield Note("warning", f"{self._unsafe()}.")

    def findings(self) -> Iterator[Finding]:
        """Yield what a plan under --exact says."""
        if self.requantized:
            message = f"{self._lost()}, and --exact was given."
            yield CAST_NOT_EXACT.finding(next(iter(self.requantized)), message)
        else:
            yield CAST_LOSSLESS.finding("weights", f"MXFP4 becomes NVFP4, {self.summary}.")
        if self.unsafe:
            yield CAST_UNSAFE.finding(self.unsafe[0], f"{self._unsafe()}.")

    def _lost(self) -> str:
        count = self.blocks - self.lossless
        are = "is" if count == 1 else "are"
        return (
            f"{plural(count, 'block')} of {names([*self.requantized])} {are} rounded again: the "
            "scales of the fused set span more than 17 octaves"
        )

    def _unsafe(self) -> str:
        one = len(self.unsafe) == 1
        return (
            f"{plural(len(self.unsafe), 'fused set')} ({names(self.unsafe)}) "
            f"{'spans' if one else 'span'} more than 14 octaves: {'it is' if one else 'they are'} "
            "unsafe for FP4 Marlin"
        )


def count_casts(plan: Plan, source: Source, workers: int | None = None) -> Casts | None:
    """Return the counts of a plan's casts; None if the plan casts nothing.

    The scales are read, of a hub repo over many connections, because each read is a request. The
    codes of a fused set are read only if its scales leave open what happens.
    Raises SourceError for scales that are NaN, and if the source cannot be read.
    """
    units = [unit for unit in plan.units if unit.cast]
    if not units:
        return None
    from mquant.engines.cast import count_blocks, keeps_all  # numba
    from mquant.numerics.mx_cast import prepare_cast
    from mquant.numerics.nvfp4 import GROUP

    prepare_cast()
    requantized, unsafe = dict[str, int](), list[str]()
    total = sum(action.source.elements // GROUP for unit in units for action in unit.actions)
    threads = workers or default_workers()
    with closing(reader_of(source)) as reader:
        requests = max(threads, _CONNECTIONS) if isinstance(reader, RangeReader) else threads
        with ThreadPoolExecutor(requests) as pool:
            kept = [*pool.map(partial(keeps_all, reader), units)]
        rest = [unit for unit, keeps in zip(units, kept, strict=True) if not keeps]
        with ThreadPoolExecutor(threads) as pool:
            counted = [*pool.map(partial(count_blocks, reader), rest)]
        for unit, counts in zip(rest, counted, strict=True):
            if any(count.requantized or count.subnormal for count in counts):
                unsafe.append(unit.actions[0].module)
            for action, count in zip(unit.actions, counts, strict=True):
                if count.requantized:
                    requantized[action.module] = count.requantized
    return Casts(total, requantized, tuple(unsafe))


def exact(plan: Plan) -> Plan:
    """Return the plan with findings: an error if a block of MXFP4 would be rounded again.

    Raises SourceError as `count_casts`.
    """
    if plan.refusals:
        return plan
    from mquant.loader_model.storage import MXFP4S

    findings: list[Finding] = []
    again = [
        action
        for action in plan.actions
        if action.kind == "quantize" and action.stored and action.stored.format in MXFP4S
    ]
    if again:
        weights = f"{plural(len(again), 'weight')} in MXFP4"
        findings.append(
            CAST_NOT_EXACT.finding(
                again[0].module,
                f"{weights} ({names([action.module for action in again])}) would be rounded again "
                "as a whole, and --exact was given.",
                "Give their role the scheme NVFP4A16, or `source`.",
            )
        )
    casts = count_casts(plan, plan.survey.checkpoint.source)
    findings += casts.findings() if casts else ()
    return replace(plan, findings=(*plan.findings, *findings))
