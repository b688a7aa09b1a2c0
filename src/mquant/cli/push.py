"""`mquant push`: publish a checkpoint on the hub."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from mquant.cli.options import DryRun, FamilyFile, FormatChoice, Public
from mquant.cli.output import Format, Output, output
from mquant.cli.progress import progress
from mquant.cli.source import example, is_repo_id, open_source
from mquant.cli.tables import table
from mquant.errors import UsageError
from mquant.text import both_sizes, clean, plural

if TYPE_CHECKING:
    from mquant.publish.push import Pushed, Shipment


Src = Annotated[str | None, typer.Argument(metavar="SRC", help="The folder that mquant wrote.")]
Repo = Annotated[str | None, typer.Argument(metavar="REPO", help="The hub repo, as org/name.")]
Replace = Annotated[
    bool, typer.Option("--replace", help="Replace another checkpoint that the repo holds.")
]


def push(
    src: Src = None,
    repo: Repo = None,
    public: Public = False,
    replace: Replace = False,
    dry_run: DryRun = False,
    family: FamilyFile = None,
    output_format: FormatChoice = Format.HUMAN,
) -> None:
    """Publish a verified checkpoint on the hub, if its bytes are those that mquant wrote.

    mquant compares every file with its sha256 in mquant.json, verifies the checkpoint, uploads the
    files (index and config.json last), and verifies the repo. If interrupted, run the same command
    again: it resumes. Exit code 3: the checkpoint, or the repo, is wrong.

    Example: mquant push ./MiniMax-M2.7-REAP-NVFP4 org/MiniMax-M2.7-REAP-NVFP4
    """
    with output("push", output_format) as out:
        if src is None or repo is None:
            raise UsageError("SRC or REPO is missing.", example(push))
        if not is_repo_id(repo):
            raise UsageError(f"{clean(repo[:96])!r} is no hub repo id.", example(push))
        source = open_source(src, None, example(push))
        from mquant.checkpoint import Folder
        from mquant.family_files import load_families
        from mquant.publish.push import load
        from mquant.publish.push import push as publish

        if not isinstance(source, Folder):
            raise UsageError(f"{src} is a hub repo already.", f"Give a folder. {example(push)}")
        shipment = load(source)
        out.put(repo=repo, files=dict(shipment.files), bytes=sum(shipment.files.values()))
        out.put(last_commit=list(shipment.last))
        families = load_families(family)
        if dry_run:
            _list(out, shipment)
            return
        with progress(out) as emit:
            pushed = publish(shipment, repo, families, emit, public=public, replace=replace)
        _tell(out, repo, pushed)


def _list(out: Output, shipment: "Shipment") -> None:
    rows = table(("bytes", "right"), ("file", "left"))
    for name in (*shipment.first, *shipment.last):
        rows.add_row(f"{shipment.files[name]:,}", Text(clean(name)))
    total = sum(shipment.files.values())
    out.show(rows, "", f"{plural(len(shipment.files), 'file')}, {both_sizes(total)}")
    out.show(f"{' and '.join(shipment.last)} are uploaded last, in one commit.")
    out.show("Nothing was verified: the push itself verifies the checkpoint first.")


def _tell(out: Output, repo: str, pushed: "Pushed") -> None:
    remote = pushed.remote
    if remote is None:
        if pushed.local is not None:
            out.report(pushed.local.findings)
        out.show(Text("The checkpoint is broken, so nothing was uploaded.", "bold red"))
        raise typer.Exit(3)
    out.put(
        url=pushed.page,
        private=pushed.private,
        sent=list(pushed.sent),
        already_done=not pushed.sent,
        verdict=remote.verdict,
    )
    visibility = "private" if pushed.private else "public"
    verb = "Pushed" if pushed.sent else "Already there:"
    title = Text.assemble((verb, "bold green"), f" {pushed.page} ({visibility})")
    out.show(title, f"The repo: {remote.verdict}")
    out.report(remote.findings)
    if remote.count("error"):
        raise typer.Exit(3)
