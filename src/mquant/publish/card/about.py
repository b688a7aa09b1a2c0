"""What only its publisher knows of a checkpoint: a small YAML file beside the facts."""

from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from mquant.data import read_yaml
from mquant.errors import DataFileError

_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+$"

RepoId = Annotated[str, StringConstraints(pattern=_PATTERN, max_length=96)]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Companion(_Data):
    """Another repo that belongs to this one, and what it is."""

    repo: RepoId
    what: str = ""


class About(_Data):
    """`repo`: where the checkpoint will be; `base_model`: the hub repo it was made from."""

    repo: RepoId | None = None
    base_model: RepoId | None = None
    companions: tuple[Companion, ...] = Field(default=())
    citation: str = ""


def read_about(path: Path) -> About:
    """The file. Raises DataFileError, naming the key, if it is wrong."""
    try:
        return About.model_validate(read_yaml(path) or {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "it"
        raise DataFileError(
            f"{path.name}: {where}: {first['msg']}.",
            "It may hold repo, base_model, companions (repo, what) and citation.",
        ) from None
