"""Facts from the parent's own card: licence, languages, and how the parent was pruned."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from mquant.checkpoint import Source
from mquant.checkpoint.hub import HubRepo
from mquant.data_files import parse_yaml
from mquant.errors import SourceError
from mquant.events import Emit, Note
from mquant.output import Record

_README: Final = "README.md"
_MOST_BYTES: Final = 1_000_000
_MOST_QUOTED: Final = 240
_FRONT: Final = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_REAP: Final = re.compile(r"\bREAP\b")
_PRUNING: Final = re.compile(r"router.weighted expert activation pruning", re.IGNORECASE)
_WORD: Final = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_LANGUAGE: Final = re.compile(r"[a-z]{2,3}(?:-[A-Za-z]{2,4})?")
_REPO: Final = re.compile(r"(?=.{3,96}$)[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_LINK: Final = re.compile(r"https://[A-Za-z0-9./_~%-]{3,200}|[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Parent:
    """The known facts of the parent: a folder's `name`, or a `repo` at a `commit`; and its card's.

    `pruned_from` is the parent's base model; `reap` is the sentence of the parent's card about
    REAP.
    """

    name: str = ""
    repo: str = ""
    commit: str = ""
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    languages: tuple[str, ...] = ()
    pipeline_tag: str = ""
    pruned_from: str = ""
    reap: str = ""


def find_parent(record: Record | None, given: Source | None, emit: Emit) -> Parent:
    """Return the facts of the given parent, or otherwise of the hub repo that mquant.json names.

    Raises SourceError if the given parent differs from the one in mquant.json. If the repo cannot
    be read, a note says so, and the facts of the parent's card are left out.
    """
    recorded = record.source if record else {}
    if given is not None:
        identity = given.identity()
        if recorded.get("kind") == identity["kind"] and dict(recorded) != identity:
            raise SourceError(
                f"{given.name} is not the parent that mquant.json names: "
                f"{recorded.get('repo') or 'a folder with other files'}"
                f"{' at ' + recorded['commit'] if 'commit' in recorded else ''}.",
                "Give the parent of mquant.json with --from, or leave --from out.",
            )
        return _read(given)
    repo, commit = recorded.get("repo", ""), recorded.get("commit", "")
    if recorded.get("kind") != "hub" or not _REPO.fullmatch(repo):
        return Parent()
    try:
        return _read(HubRepo(repo, commit))
    except SourceError as error:
        emit(Note("warning", f"{error.message} The facts of the parent's card are left out."))
        return Parent(repo=repo, commit=commit)


def _read(source: Source) -> Parent:
    if isinstance(source, HubRepo):
        parent = Parent(repo=source.repo_id, commit=source.commit)
    else:
        parent = Parent(name=source.name)
    if not 0 < source.files.get(_README, 0) <= _MOST_BYTES:
        return parent
    card = source.read(_README).decode("utf-8", "replace").replace("\r\n", "\n")
    front = _FRONT.match(card)
    metadata = _metadata(front[1]) if front else {}
    return replace(
        parent,
        license=_one(metadata, "license", _WORD.fullmatch),
        license_name=_one(metadata, "license_name", _WORD.fullmatch),
        license_link=_one(metadata, "license_link", _LINK.fullmatch),
        languages=_all(metadata, "language", _LANGUAGE.fullmatch),
        pipeline_tag=_one(metadata, "pipeline_tag", _WORD.fullmatch),
        pruned_from=_one(metadata, "base_model", _REPO.fullmatch),
        reap=_sentence(card[front.end() :] if front else card),
    )


def _metadata(text: str) -> Mapping[str, Any]:
    try:
        value = parse_yaml(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _all(metadata: Mapping[str, Any], key: str, fits: Callable[[str], object]) -> tuple[str, ...]:
    values = metadata.get(key)
    values = values if isinstance(values, list) else [values]
    return tuple(value for value in values if isinstance(value, str) and fits(value))


def _one(metadata: Mapping[str, Any], key: str, fits: Callable[[str], object]) -> str:
    return next(iter(_all(metadata, key, fits)), "")


def _sentence(body: str) -> str:
    """Return the first line of prose that explains REAP, or else the first that names REAP."""
    lines = [line.strip() for line in body.splitlines()]
    prose = [line for line in lines if line and line[0] not in "#|<`![" and _REAP.search(line)]
    line = next(filter(_PRUNING.search, prose), next(iter(prose), ""))
    return line if len(line) <= _MOST_QUOTED else line[: _MOST_QUOTED - 3].rstrip() + "..."
