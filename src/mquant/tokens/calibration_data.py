"""Find what `--data` names: a file on this machine, or the files of a dataset on the hub."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from mquant.checkpoint import Stamp, stamp
from mquant.checkpoint.dataset import DatasetRepo
from mquant.errors import DataFileError, SourceError
from mquant.events import Emit
from mquant.recipe import data_file
from mquant.text import names
from mquant.tokens.rows import FIX
from mquant.untrusted import open_named

_DATASET: Final = re.compile(r"(?P<id>[^@:]+)(?:@(?P<revision>[^:]+))?(?::(?P<start>.+))?")
_KINDS: Final = (".parquet", ".jsonl", ".jsonl.gz")
_TRAINING: Final = re.compile(r"(?:^|[/_.-])train(?:ing)?(?=[/_.-])")
_CONVERTED: Final = "refs/convert/parquet"
"""The branch in which the hub keeps a copy of a dataset as Parquet files."""
_MOST_BYTES: Final = 1_000_000_000
"""The bytes of a dataset from which on no further file of the dataset is read."""


@dataclass(frozen=True)
class CalibrationData:
    """Calibration data that was found.

    `shown` is what the user gave, for messages. `name` and `identity` say what it is without a
    path of this machine: `identity` is the sha256 of the file, or the dataset's id, commit and
    START. `path` is the file, and `found` its stamp, or `repo` the dataset with its `files`.
    """

    shown: str
    name: str
    identity: str
    path: Path | None = None
    found: Stamp | None = None
    repo: DatasetRepo | None = None
    files: Sequence[str] = ()

    def paths(self, emit: Emit) -> Sequence[Path]:
        """Return the files on this machine; those of a dataset are downloaded into the cache."""
        if self.repo is None:
            return [] if self.path is None else [self.path]
        folder = self.repo.materialize(emit, self.files)
        return [folder.path(file) for file in self.files]

    def check_unchanged(self) -> None:
        """Raise DataFileError if the file on this machine has changed since it was found."""
        if self.path is not None:
            with open_named(self.path, FIX) as file:
                if stamp(os.fstat(file.fileno())) != self.found:
                    raise DataFileError(
                        f"{self.shown} changed while it was read.",
                        "Wait until no process writes to the file, then run the command again.",
                    )

    def record(self) -> dict[str, Any]:
        """Return what mquant.json says of the data: hashes, and no path of this machine."""
        if self.repo is None:
            size = 0 if self.found is None else self.found.size
            return {"name": self.name, "bytes": size, "sha256": self.identity}
        digests = {file: self.repo.digest(file) for file in self.files}
        return {"name": self.name, "commit": self.repo.commit, "files": digests}


def find_data(data: str) -> CalibrationData:
    """Find the file or the dataset that `data` names: a path, or ID[@REVISION][:START].

    Of a dataset, these files are read: those whose path begins with START, of the first kind that
    there is (.parquet, .jsonl, .jsonl.gz), and of them those for training if there are such. If
    the repo has no file of these kinds, the hub's own copy of the dataset in Parquet is read.

    Raises DataFileError for a file that cannot be read, a dataset that cannot be listed, or one
    with several configurations of which none was named.
    """
    path = data_file(data)
    if path is not None:
        with open_named(path, FIX) as file:
            found = stamp(os.fstat(file.fileno()))
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return CalibrationData(data, path.name, digest, path, found)
    parts = _DATASET.fullmatch(data)
    if parts is None:
        raise DataFileError(f"{data!r} is no file, and no dataset's id.", FIX)
    start = parts["start"] or ""
    try:
        repo = DatasetRepo(parts["id"], parts["revision"])
        files = _chosen(data, repo.files, start)
        if not files and parts["revision"] is None:
            with suppress(SourceError):  # the hub converts some datasets only
                repo = DatasetRepo(parts["id"], _CONVERTED)
                files = _chosen(data, repo.files, start)
    except SourceError as error:
        raise DataFileError(
            f"{data} is no file, and cannot be read as a dataset of the hub: {error.message}",
            error.fix,
        ) from error
    if not files:
        raise DataFileError(
            f"The dataset {data} has no file that ends with {' or '.join(_KINDS)}.", FIX
        )
    identity = f"{repo.repo_id}@{repo.commit}:{start}"
    return CalibrationData(data, data, identity, repo=repo, files=files)


def _chosen(data: str, sizes: Mapping[str, int], start: str) -> list[str]:
    """Return the files of a dataset to read, in the order of their names."""
    matching = [path for path in sizes if path.startswith(start)]
    found = next((f for kind in _KINDS if (f := [p for p in matching if p.endswith(kind)])), [])
    found = [path for path in found if _TRAINING.search(path)] or found
    folders = sorted({_configuration(path) for path in found})
    if len(folders) > 1 and not start:
        raise DataFileError(
            f"The dataset {data} has several configurations: {names(folders)}.",
            f"Name one by the beginning of its files' paths: --data {data}:{folders[0]}",
        )
    chosen: list[str] = []
    for path in found:
        if chosen and sum(sizes[each] for each in chosen) + sizes[path] > _MOST_BYTES:
            break
        chosen.append(path)
    return chosen


def _configuration(path: str) -> str:
    """Return the folder of a file's configuration: without the folder of its split."""
    return "/".join(
        part for part in PurePosixPath(path).parts[:-1] if not _TRAINING.search(f"/{part}/")
    )
