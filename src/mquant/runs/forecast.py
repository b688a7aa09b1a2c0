"""The disk and memory that a run needs, and the plan in JSON."""

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mquant.errors import OutputError
from mquant.family_rows import Role
from mquant.findings import Finding, rule
from mquant.output import examine, free_disk
from mquant.plan import Action, Plan
from mquant.runs.workers import default_workers
from mquant.text import size

# Python, numpy, numba and the plan of 62 layers of 154 experts take 0.27 GB.
_BASE_MEMORY: Final = 350_000_000
# A worker holds a fused set, its blocks' largest magnitudes (an eighth of that), and small buffers.
_PER_WORKER: Final = 1.2
# Files that hold a control group's limit, in version 2 and in version 1.
_LIMITS: Final = ("memory.max", "memory.limit_in_bytes")

DISK_TOO_SMALL: Final = rule(
    "disk-too-small",
    "The output fits on the disk.",
    "A run that fills the disk stops.",
    "Free space, or give a folder on another disk with -o.",
    severity="warning",
    needs="run",
)
MEMORY_TOO_SMALL: Final = rule(
    "memory-too-small",
    "A run fits into the free memory.",
    "The system kills a process that takes more memory than there is.",
    "Close other programs, or run on a larger machine.",
    severity="warning",
    needs="run",
)
OUT_NOT_FREE: Final = rule(
    "out-not-free",
    "The output folder is free, or holds a run of mquant.",
    "mquant overwrites nothing that it did not make.",
    "Give another folder with -o.",
    severity="warning",
    needs="run",
)


@dataclass(frozen=True, slots=True)
class Resources:
    """The bytes of disk and memory that a run into `out` needs, and that are available."""

    out: Path
    disk_needed: int
    disk_available: int
    memory_needed: int
    memory_available: int


def forecast(plan: Plan, out: Path) -> Resources:
    """Return what a run needs, and what is free on the disk of `out` and in memory."""
    return Resources(out, plan.file_bytes, free_disk(out), memory_needed(plan), memory_available())


def memory_needed(plan: Plan) -> int:
    """Return the bytes of memory that the stream engine needs; the size of the model has no effect.

    Only the widest fused set that is quantized counts: copied tensors go through a small buffer.
    """
    units = (unit for unit in plan.units if unit.scheme)
    widest = max((unit.buffer_bytes for unit in units), default=0)
    return _BASE_MEMORY + int(default_workers() * widest * _PER_WORKER)


def memory_available(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that are available in memory, or the limit of the control group if lower."""
    limits = [_machine_memory(proc)]
    try:
        entries = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        entries = []
    for entry in entries:
        _, controllers, path = entry.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = cgroups / controllers
        group = root / path.strip("/")
        # A limit on any group above counts too.
        for folder in (group, *group.parents):
            limits += [n for name in _LIMITS if (n := _number(folder / name)) is not None]
            if folder == root:
                break
    return min(limits)


def resource_findings(plan: Plan, resources: Resources) -> tuple[Finding, ...]:
    """Return a warning for each thing that would stop a run here; another machine may suffice."""
    findings, out = [], resources.out
    if resources.disk_available < resources.disk_needed:
        findings.append(
            DISK_TOO_SMALL.finding(
                str(out),
                f"{out} needs {size(resources.disk_needed)}, "
                f"{size(resources.disk_available)} are free there.",
                "Free space, or give a folder on another disk with -o.",
            )
        )
    if resources.memory_available < resources.memory_needed:
        findings.append(
            MEMORY_TOO_SMALL.finding(
                "memory",
                f"A run takes about {size(resources.memory_needed)} of memory, "
                f"{size(resources.memory_available)} are free.",
                "Close other programs, or run on a larger machine.",
            )
        )
    source = plan.survey.checkpoint.source
    try:
        # restart=True accepts any folder that mquant made.
        examine(out, source.folders, {}, restart=True)
    except OutputError as error:
        findings.append(OUT_NOT_FREE.finding(str(out), error.message, error.fix))
    return tuple(findings)


def plan_report(plan: Plan, resources: Resources) -> dict[str, Any]:
    """Return the plan in JSON: the keys of `mquant.plan/1` besides the envelope's."""
    checkpoint = plan.survey.checkpoint
    return {
        "source": checkpoint.source.name,
        "family": plan.family.name,
        "recipe": plan.recipe.name,
        "fingerprint": plan.fingerprint,
        "calibration": plan.recipe.calibration.model_dump() if plan.recipe.needs_data else None,
        "totals": {
            "source": {"tensors": len(checkpoint.tensors), "bytes": plan.source_bytes},
            "output": plan.output_totals,
        },
        "roles": _roles(plan),
        "ignore": list(plan.ignore),
        "shards": [
            {"name": shard.name, "tensors": shard.tensors, "bytes": shard.file_bytes}
            for shard in plan.shards
        ],
        "resources": {
            "disk_needed": resources.disk_needed,
            "disk_available": resources.disk_available,
            "memory_needed": resources.memory_needed,
            "memory_available": resources.memory_available,
        },
    }


def _roles(plan: Plan) -> list[dict[str, Any]]:
    """Return a row for each role and treatment: a recipe may treat one role in two ways."""
    groups: dict[tuple[Role, str, str], list[Action]] = defaultdict(list)
    for action in plan.actions:
        # A weight that a scheme cannot hold has no outputs; a finding names the tensor.
        reason = action.reason if action.outputs else "its shape or dtype does not fit"
        groups[action.role, action.scheme.name if action.scheme else "", reason].append(action)
    order = list(Role)
    return [
        _role(role, scheme, reason, actions)
        for (role, scheme, reason), actions in sorted(
            groups.items(), key=lambda item: (order.index(item[0][0]), not item[0][1])
        )
    ]


def _role(role: Role, scheme: str, reason: str, actions: list[Action]) -> dict[str, Any]:
    after = sum(action.output_bytes for action in actions)
    elements = sum(action.source.elements for action in actions)
    known = after and elements and not any(action.already for action in actions)
    return {
        "role": role.value,
        "tensors": len(actions),
        "bytes_before": sum(action.source_bytes for action in actions),
        "bytes_after": after,
        "bits_per_weight": round(after * 8 / elements, 4) if known else None,
        "scheme": scheme or None,
        "reason": reason,
    }


def _machine_memory(proc: Path) -> int:
    try:
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no /proc: not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # ValueError: "max", no limit
        return None
