"""Write the simulation in docs/scale-out.md and its pictures: how long a run takes, and why.

    python scripts/simulate.py [--check]

`--check` writes no file and fails if a file differs from what the script would write. The script
takes about a minute, because it makes and shares out plans of 10 TB. The formulas are in
simulation.py, the figures in simulation_cases.py, the text in simulate.md.
"""

import re
import sys
from pathlib import Path
from typing import Final

from mquant.plan import shares
from mquant.text import size
from pages import DOCS, write_or_check
from simulation import fetched_again, work_of
from simulation_cases import (
    CASES,
    CORE,
    CORES,
    FETCH,
    GBIT,
    MACHINES,
    NETWORKS,
    SHARD,
    STORAGES,
    Alone,
    Case,
    Outcome,
    downloaded,
    in_jobs,
    on_ray,
    single,
    through_scratch,
)
from simulation_page import Curve, fill, hours, picture, span, table

TEMPLATE: Final = Path(__file__).parent / "simulate.md"
NAME: Final = "scale-out"
MARK: Final = "<!-- scripts/simulate.py writes the rest of this page: do not edit. -->\n"
SHARDS: Final = (SHARD, 2_000_000_000, 1_000_000_000, 500_000_000)
NEAR: Final = 1.1
"""A time of at most this factor times the best time counts as equally good."""
WORTH: Final = 0.5
"""The lowest efficiency that is worth its price."""

REAL: Final = (
    ("4.39 GB, whole, a quiet hour", "3.0 s", "2.59 s", "-14 %"),
    ("4.39 GB, whole, a busy hour", "4.4 s", "3.99 s", "-9 %"),
    ("1.41 GB, whole", "2.0 s", "2.2 s", "+8 %"),
    ("1.41 GB, two shares at once", "2.2 s", "2.2 s", "+4 %"),
    ("1.41 GB, from a hub of 40 MB/s, `--scratch`", "38.9 s", "39.8 s", "+2 %"),
    ("the last three, a busy hour: whole", "3.7 s", "5.3 s", "+42 %"),
    ("two shares", "3.6 s", "5.8 s", "+62 %"),
    ("`--scratch`", "40.6 s", "41.3 s", "+2 %"),
)
"""Copied by hand from the output of `scripts/bench_scale.py` and from docs/lab-log.md."""


def where_it_stops(outcomes: list[Outcome]) -> tuple[Outcome, str]:
    """Return the outcome of the fewest machines with about the best time, and its limit."""
    best = min(outcome.seconds for outcome in outcomes)
    stop = next(outcome for outcome in outcomes if outcome.seconds <= NEAR * best)
    if stop.storage > 0.8 * (stop.seconds - stop.begin - stop.finish):
        return stop, "shared storage"
    single = min(outcome.largest for outcome in outcomes)
    return stop, "the largest shard" if stop.largest < 1.3 * single else "start and finish"


def grid(case: Case) -> str:
    """Return a table of time, cost and efficiency for machines and bandwidths."""
    rows = []
    for machines in MACHINES:
        outcomes = [in_jobs(case, machines, network * GBIT, 100e9) for network in NETWORKS]
        cells = [f"{span(o.seconds)}, {hours(o.hours)}, {o.efficiency:.0%}" for o in outcomes]
        rows.append([f"{machines:,}", *cells])
    return table(["machines", *(f"{n} Gbit/s" for n in NETWORKS)], rows)


def stops(case: Case) -> str:
    """Return a table of the useful numbers of machines for all bandwidths, and of limits."""
    rows = []
    for storage in STORAGES:
        for network in NETWORKS:
            outcomes = [in_jobs(case, n, network * GBIT, storage * 1e9) for n in MACHINES]
            stop, limit = where_it_stops(outcomes)
            worth = [o for o in outcomes if o.efficiency >= WORTH]
            rows.append(
                [
                    f"{network} Gbit/s, {storage} GB/s",
                    f"{stop.machines:,}",
                    span(stop.seconds),
                    limit,
                    span(stop.begin + stop.finish),
                    f"{worth[-1].machines:,}: {span(worth[-1].seconds)}" if worth else "none",
                ]
            )
    return table(["", "machines", "time", "the limit", "start and finish", f"at {WORTH:.0%}"], rows)


def smaller(case: Case) -> str:
    """Return a table of times for smaller output shards (--max-shard-size)."""
    rows = []
    for nbytes in SHARDS:
        works = single(case, nbytes)
        cells = [size(nbytes), f"{len(works):,}", size(max(work.written for work in works))]
        for network in (1, 25):
            outcomes = [in_jobs(case, n, network * GBIT, 100e9, nbytes) for n in MACHINES]
            stop, _ = where_it_stops(outcomes)
            cells.append(f"{span(stop.seconds)} on {stop.machines:,}")
        rows.append(cells)
    return table(["shards of", "shards", "the largest", "1 Gbit/s", "25 Gbit/s"], rows)


def ray(case: Case) -> str:
    """Return a table of times on Ray and with fixed shares."""
    counts = [n for n in MACHINES if n <= 256]
    net = 25 * GBIT
    return table(
        ["machines", *(f"{n:,}" for n in counts)],
        [
            ["`--cluster ray`", *(span(on_ray(case, n, net, 100e9)) for n in counts)],
            ["`--share i/N`", *(span(in_jobs(case, n, net, 100e9).seconds) for n in counts)],
        ],
    )


def alone(case: Case) -> str:
    """Return a table of times of one machine whose source is on a hub."""

    def cell(run: Alone) -> str:
        return f"{span(run.seconds)}: {run.bound}"

    rows = []
    for network in NETWORKS:
        rate = network * GBIT
        pushed = through_scratch(case, rate, push=True)
        rows.append(
            [
                f"{network} Gbit/s",
                cell(downloaded(case, rate)),
                cell(through_scratch(case, rate, push=False)),
                cell(pushed),
                f"{pushed.commits:,}, {3600 * pushed.commits / pushed.seconds:.0f} an hour",
            ]
        )
    return table(["", "download, then quantize", "scratch", "scratch, push", "commits"], rows)


def again(case: Case) -> str:
    """Return a sentence on the bytes that shares of a hub repo would download more than once."""
    repeated = {n: fetched_again(shares(case.plan, n), case.files) for n in (2, 8, 32, 128)}
    total = sum(case.files.values())
    parts = ", ".join(f"{n}: {size(b)} ({b / total:.1%})" for n, b in repeated.items())
    return (
        "Shares of a hub repo (`--share` with a repo id) download whole files, and a file that two "
        f"shares need is downloaded twice. Downloaded again, by number of shares: {parts}."
    )


def curves(case: Case) -> str:
    """Return the picture of a checkpoint as SVG: time against machines."""
    lines = [
        Curve(
            f"{network} Gbit/s, {storage} GB/s",
            group,
            storage != max(STORAGES),
            [(n, in_jobs(case, n, network * GBIT, storage * 1e9).seconds) for n in MACHINES],
        )
        for group, network in enumerate(NETWORKS)
        for storage in reversed(STORAGES)
    ]
    shards = len(case.plan.shards)
    title = f"{case.title}: time against machines, by network and shared storage"
    return picture(title, lines, shards, f"{shards:,} output shards")


WHAT: Final = {
    "278gb": "MiniMax-M2 pruned to 154 experts (62 layers, hidden size 3072, intermediate 1536)",
    "1tb": "DeepSeek-V3's own shapes with its layer of multi-token prediction, in BF16",
    "10tb": "A MiniMax-M2 of 88 layers, 256 experts, hidden size 12288, intermediate 6144",
}
NOTES: Final = {
    "278gb": "More machines help only if the network is slow: at 1 Gbit/s, 16 machines take "
    "{slow16} and one machine takes {slow1}.",
    "1tb": "The last shards hold lm_head and the layer of multi-token prediction, which are "
    "copied: for these shards as many bytes are written as are read.",
    "10tb": "`embed_tokens` and `lm_head` are 4.9 GB each, stay in BF16 and cannot be shared out: "
    "smaller shards do not divide these tensors. Samples of the source take most of the time that "
    "does not shrink ({samples} samples in each process). Memory is a fused set for each worker, "
    "0.3 GB for this model, and 0.25 GB.",
}


def recommended(case: Case) -> dict[str, str]:
    """Return the recommended machines, with their time and cost, by template name."""
    fast, slow = 10 * GBIT, GBIT
    one, hub = in_jobs(case, 1, fast, 100e9), through_scratch(case, fast, push=True)
    large, small = (
        [o for n in MACHINES if (o := in_jobs(case, n, fast, s)).efficiency >= WORTH][-1]
        for s in (100e9, 10e9)
    )
    note = NOTES[case.name].format(
        slow16=span(in_jobs(case, 16, slow, 100e9).seconds),
        slow1=span(in_jobs(case, 1, slow, 100e9).seconds),
        samples=f"{case.samples:,}",
    )
    return {
        "hub": span(hub.seconds),
        "one_time": span(one.seconds),
        "one_hours": hours(one.hours),
        "large": str(large.machines),
        "large_time": span(large.seconds),
        "large_hours": hours(large.hours),
        "small": str(small.machines),
        "small_time": span(small.seconds),
        "note": note,
    }


def section(case: Case, template: str) -> str:
    """Return the section of one checkpoint."""
    plan, work = case.plan, work_of(case.plan)
    what = (
        f"{WHAT[case.name]}: {len(plan.survey.checkpoint.tensors):,} tensors, {size(work.read)} "
        f"in {len(case.files):,} files become {plan.output_tensors:,} tensors, "
        f"{size(work.written)} in {len(plan.shards):,} shards of 5 GB (the default)."
    )
    values = {
        "title": case.title,
        "what": what,
        "command": case.command,
        "file": case.name,
        "near": f"{NEAR - 1:.0%}",
        "worth": f"{WORTH:.0%}",
        "grid": grid(case),
        "stops": stops(case),
        "shards": smaller(case),
        "ray": ray(case),
        "alone": alone(case),
        "again": again(case),
    }
    return fill(template, values | recommended(case))


def short(case: Case) -> str:
    """Return the summary of one checkpoint, as an item of a list."""
    hub = through_scratch(case, 10 * GBIT, push=True)
    outcomes = [in_jobs(case, n, 10 * GBIT, 100e9) for n in MACHINES]
    worth = [outcome for outcome in outcomes if outcome.efficiency >= WORTH][-1]
    stop, limit = where_it_stops(outcomes)
    return (
        f"- **{case.title}**: one machine takes {span(hub.seconds)} from hub to hub, with 20 GB of "
        f"disk. From shared storage of 100 GB/s, {worth.machines} machines take "
        f"{span(worth.seconds)} and have an efficiency of {worth.efficiency:.0%}; {stop.machines} "
        f"machines take {span(stop.seconds)}, and more do not help, because of {limit}."
    )


def documents() -> dict[str, str]:
    """Return every file of docs/ that this script writes, by name."""
    fixed = "; ".join(
        f"{span((o := in_jobs(c, 1, GBIT, 1e11)).begin + o.finish)} at {c.title}" for c in CASES
    )
    values = {
        "sizes": ", ".join(case.title for case in CASES),
        "short": "\n".join(map(short, CASES)),
        "cores": f"{CORES * CORE / 1e9:.0f}",
        "net100": f"{100 * GBIT / 1e9:.1f}",
        "fetch": f"{FETCH / 1e9}",
        "fixed": fixed,
        "starts": ", ".join(f"{case.start} s" for case in CASES),
        "verifies": ", ".join(f"{case.verify} s" for case in CASES),
        "tensors": ", ".join(f"{c.title} has {c.plan.output_tensors:,} tensors" for c in CASES),
        "real": table(["run", "simulated", "measured", ""], REAL),
    }
    head, body, tail = re.split(r"<!--.*-->\n", TEMPLATE.read_text(encoding="utf-8"))
    text = fill(head, values) + "".join(section(case, body) for case in CASES) + fill(tail, values)
    # The text before the mark is written by hand; the headings after it are in its last section.
    above, mark, _ = (DOCS / f"{NAME}.md").read_text(encoding="utf-8").partition(MARK)
    below = re.sub(r"^#", "##", text, flags=re.MULTILINE)
    pictures = {f"{NAME}-{case.name}.svg": curves(case) for case in CASES}
    return {f"{NAME}.md": f"{above}{mark}\n{below}"} | pictures


def main() -> int:
    """Write or check the files, and return the exit code."""
    complaint = "is not what the figures give: run python scripts/simulate.py"
    return write_or_check(documents(), complaint)


if __name__ == "__main__":
    sys.exit(main())
