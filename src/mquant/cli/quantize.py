"""`mquant quantize`: quantize a checkpoint."""

from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mquant.cli.options import (
    AllowUnsafe,
    Data,
    DryRun,
    Exact,
    FamilyFile,
    FormatChoice,
    Importance,
    Length,
    MaxShardSize,
    Out,
    Public,
    RecipeName,
    Restart,
    Revision,
    Samples,
    Scratch,
    Src,
    Workers,
)
from mquant.cli.output import Format, Output, output
from mquant.cli.plan import chosen_recipe, make, show_plan
from mquant.cli.progress import progress
from mquant.cli.results import tell_result, tell_share
from mquant.cli.source import default_out, is_repo_id
from mquant.cli.text import parse_share, parse_size
from mquant.errors import UsageError
from mquant.runs.spec import Engine, check_data, check_sampling
from mquant.text import clean

if TYPE_CHECKING:
    from mquant.plan import Plan
    from mquant.recipe import Recipe
    from mquant.runs.job_spec import JobSpec
    from mquant.runs.run import Result


CarryOut = Callable[..., "Result"]
"""A function that carries out a plan, given the options of a run."""


class Cluster(StrEnum):
    """The systems that can distribute the work."""

    RAY = "ray"


EngineChoice = Annotated[
    Engine,
    typer.Option(
        help="The engine that quantizes; `auto`: stream, or calibrated if the recipe needs data."
    ),
]
PushTo = Annotated[
    str | None,
    typer.Option(
        metavar="REPO",
        help="Write into a hub repo: finished shards are uploaded, then deleted on this disk.",
    ),
]
Share = Annotated[
    str | None,
    typer.Option(
        "--share",
        "--job",
        metavar="I/N",
        help="Quantize share I of N only; other processes do the rest; then: mquant finish OUT.",
    ),
]
OnCluster = Annotated[
    Cluster | None, typer.Option(help="Distribute the work over this cluster, and finish OUT.")
]


def quantize(
    src: Src = None,
    recipe: RecipeName = None,
    out_folder: Out = None,
    engine: EngineChoice = Engine.AUTO,
    importance: Importance = None,
    data: Data = None,
    samples: Samples = None,
    length: Length = None,
    dry_run: DryRun = False,
    max_shard_size: MaxShardSize = None,
    scratch: Scratch = None,
    push_to: PushTo = None,
    public: Public = False,
    workers: Workers = None,
    share: Share = None,
    cluster: OnCluster = None,
    restart: Restart = False,
    allow_unsafe: AllowUnsafe = False,
    exact: Exact = False,
    family: FamilyFile = None,
    revision: Revision = None,
    output_format: FormatChoice = Format.HUMAN,
) -> None:
    """Quantize a checkpoint into a folder that loads.

    mquant refuses a broken result before it reads a weight. If interrupted, run the command again.

    Many machines: --share 1/N to --share N/N into an OUT that all machines see, then `mquant finish
    OUT`; or --cluster ray: the cluster at RAY_ADDRESS, else one on this machine, else a new one.

    Example: mquant quantize ./MiniMax-M2.7-REAP --recipe nvfp4 -o ./MiniMax-M2.7-REAP-NVFP4
    """
    with output("quantize", output_format) as out:
        parsed_share = None if share is None else parse_share(share)
        _check_options(parsed_share, cluster, engine, push_to, scratch, restart=restart)
        limit = None if scratch is None else parse_size(scratch)
        checks = {"allow_unsafe": allow_unsafe, "exact": exact}
        chosen = _chosen_recipe(recipe, data, samples, length)
        plan = make(quantize, src, chosen, revision, max_shard_size, family, **checks)
        if dry_run or plan.refusals:
            show_plan(out, plan, out_folder)
            check_data(plan.recipe, data)
            return
        out.report(plan.findings)
        folder = out_folder or default_out(plan.survey.checkpoint.source, plan.recipe.suffix)
        job_spec = _job_spec(plan, max_shard_size, importance, allow_unsafe=allow_unsafe)
        if parsed_share is not None:
            _make_share(out, plan, job_spec, folder, parsed_share, workers)
            return
        choices = {"engine": engine, "importance": importance}
        if push_to is not None:
            carry_out = _into_repo(plan, folder, push_to, public=public, **choices)
        elif cluster is not None:
            carry_out = _on_cluster(plan, job_spec, folder)
        else:
            carry_out = _into_folder(plan, folder, data=data, **choices)
        with progress(out) as emit:
            result = carry_out(workers=workers, scratch=limit, restart=restart, emit=emit)
        tell_result(out, result)


def _chosen_recipe(
    name: str | None, data: str | None, samples: int | None, length: int | None
) -> "Recipe":
    """Return the recipe. Raises UsageError for options of data if the recipe needs no data."""
    recipe = chosen_recipe(quantize, name, samples, length)
    # A recipe that needs data is checked later: some modes refuse it, with or without --data.
    if not recipe.needs_data:
        check_data(recipe, data)
        check_sampling(recipe, samples=samples, length=length)
    return recipe


def _into_folder(plan: "Plan", folder: Path, **options: Any) -> CarryOut:
    from mquant.runs.quantize import quantize as into_folder

    return partial(into_folder, plan, folder, **options)


def _into_repo(plan: "Plan", folder: Path, repo: str, **options: Any) -> CarryOut:
    from mquant.runs.hub_to_hub import quantize_to_hub

    return partial(quantize_to_hub, plan, folder, repo, **options)


def _on_cluster(plan: "Plan", job_spec: "JobSpec", folder: Path) -> CarryOut:
    from mquant.runs.ray_cluster import quantize_on_ray

    return partial(quantize_on_ray, plan, job_spec, folder)


def _check_options(
    share: tuple[int, int] | None,
    cluster: Cluster | None,
    engine: Engine,
    push_to: str | None,
    scratch: str | None,
    *,
    restart: bool,
) -> None:
    """Raise UsageError for options that exclude each other, or a REPO that is no hub repo id."""
    if push_to is not None and (share, cluster) == (None, None) and not is_repo_id(push_to):
        example = "--push-to org/MiniMax-M2.7-REAP-NVFP4"
        raise UsageError(f"{clean(push_to[:96])!r} is no hub repo id.", f"Example: {example}")
    if share is None and cluster is None:
        return
    if share is not None and cluster is not None:
        raise UsageError(
            "--share is one part of the work, --cluster all of it.", "Leave out one option."
        )
    if push_to is not None or scratch is not None:
        raise UsageError(
            "--scratch and --push-to are for a run on one machine.",
            "Leave out both: with --share or --cluster each machine gets the files of its shares.",
        )
    if engine is Engine.ONESHOT:
        raise UsageError(
            "The oneshot engine quantizes the model as a whole, not in shares.",
            "Leave out --engine oneshot, or --share and --cluster.",
        )
    if restart:
        raise UsageError(
            "--restart would delete the files of other processes.",
            "Delete OUT yourself, or give another folder with -o.",
        )


def _job_spec(
    plan: "Plan", max_shard_size: str | None, importance: Path | None, *, allow_unsafe: bool
) -> "JobSpec":
    from mquant.plan import DEFAULT_SHARD_BYTES
    from mquant.runs.job_spec import JobSpec

    limit = DEFAULT_SHARD_BYTES if max_shard_size is None else parse_size(max_shard_size)
    return JobSpec.of(plan, limit, allow_unsafe=allow_unsafe, importance=importance)


def _make_share(
    out: Output,
    plan: "Plan",
    job_spec: "JobSpec",
    folder: Path,
    share: tuple[int, int],
    workers: int | None,
) -> None:
    from mquant.runs.shares import in_shares

    number, count = share
    run = in_shares(plan, job_spec, folder, count)
    with progress(out) as emit:
        fresh = run.make(number, workers=workers, emit=emit)
    tell_share(out, run, number, fresh=fresh)
