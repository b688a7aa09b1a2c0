"""Facts that only the publisher of a checkpoint knows, read from a small YAML file."""

from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from mquant.data_files import read_yaml
from mquant.errors import DataFileError

_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+$"

RepoId = Annotated[str, StringConstraints(pattern=_PATTERN, max_length=96)]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Companion(_Data):
    """A repo that belongs to the checkpoint's repo, and its purpose."""

    repo: RepoId
    what: str = ""


class About(_Data):
    """The publisher's facts. `repo`: the future hub repo; `base_model`: the parent's hub repo."""

    repo: RepoId | None = None
    base_model: RepoId | None = None
    companions: tuple[Companion, ...] = Field(default=())
    citation: str = ""


def read_about(path: Path) -> About:
    """Read the YAML file. Raises DataFileError, which names the key, if the file is wrong."""
    try:
        return About.model_validate(read_yaml(path) or {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataFileError(
            f"{path.name}: {where}: {first['msg']}.",
            "The file may have the keys repo, base_model, companions (repo, what) and citation.",
        ) from None
