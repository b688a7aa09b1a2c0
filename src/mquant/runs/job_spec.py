"""The job spec: the arguments of `mquant quantize` in JSON, for processes that make the same plan.

The job spec is stored in OUT and may be somebody else's, so it is read as hostile input.
"""

from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mquant.checkpoint import Folder, Source, open_checkpoint
from mquant.errors import SourceError, UsageError
from mquant.family import Family
from mquant.family_files import load_families
from mquant.plan import Plan, make_plan
from mquant.recipe import Recipe

_LONGEST: Final = 4096
AbsolutePath = Annotated[str, Field(pattern=r"^/[^\x00]*$", max_length=_LONGEST)]


def _absolute(path: Path) -> str:
    """Return the absolute path. Raises UsageError if no file can have such a path."""
    text = str(path.absolute())
    if len(text) > _LONGEST:
        raise UsageError(f"{text[:80]}... is longer than a path can be.", "Give a shorter path.")
    return text


class FolderAt(BaseModel):
    """A source folder that all machines see, by its absolute path."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: AbsolutePath

    def open(self) -> Source:
        """Return the folder as it is now. Raises SourceError if the folder cannot be read."""
        try:
            return Folder(Path(self.folder))
        except OSError as error:
            raise SourceError(
                f"{self.folder[:200]} cannot be read: {error.strerror}.", "Check the path."
            ) from error


class RepoAt(BaseModel):
    """A source that is a hub repo at a commit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    repo: str = Field(max_length=96)
    commit: str = Field(pattern=r"^[0-9a-f]{40}$")

    def open(self) -> Source:
        """Return the repo. Raises SourceError if the hub cannot list the repo."""
        from mquant.checkpoint.hub import HubRepo  # slow to import

        return HubRepo(self.repo, self.commit)


class JobSpec(BaseModel):
    """The source and the recipe of a plan, and the options that change the bytes of the output."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: FolderAt | RepoAt
    recipe: Recipe
    foreign: bool
    """Whether the recipe came from llmcompressor's format; the recipe file does not say so."""
    max_shard_bytes: int = Field(ge=1, lt=2**53)
    allow_unsafe: bool
    importance: AbsolutePath | None
    family: Family | None = None
    """The content of the user's family file; None for a shipped family."""

    @classmethod
    def of(
        cls, plan: Plan, max_shard_bytes: int, *, allow_unsafe: bool, importance: Path | None
    ) -> Self:
        """Return the job spec of a plan that was made with these options.

        Raises UsageError for a path that is too long.
        """
        source = plan.survey.checkpoint.source
        if source.folders:
            place: FolderAt | RepoAt = FolderAt(folder=_absolute(source.folders[0]))
        else:
            identity = source.identity()
            place = RepoAt(repo=identity["repo"], commit=identity["commit"])
        return cls(
            source=place,
            recipe=plan.recipe,
            foreign=plan.recipe.foreign,
            max_shard_bytes=max_shard_bytes,
            allow_unsafe=allow_unsafe,
            importance=None if importance is None else _absolute(importance),
            family=plan.family if plan.family.own else None,
        )

    @classmethod
    def read(cls, value: dict[str, Any]) -> Self:
        """Return the job spec that OUT holds. Raises ValueError with the name of an invalid key."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise ValueError(".".join(map(str, error.errors()[0]["loc"]))[:80]) from None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON that `read` takes; the key `family` is left out for a shipped family."""
        return self.model_dump(mode="json", exclude=None if self.family else {"family"})

    def plan(self) -> Plan:
        """Make the plan again from the headers of the source."""
        return make_plan(
            open_checkpoint(self.source.open()),
            self.recipe.model_copy(update={"foreign": self.foreign}),
            self._families(),
            max_shard_bytes=self.max_shard_bytes,
            allow_unsafe=self.allow_unsafe,
        )

    def _families(self) -> dict[str, Family]:
        if self.family is None:
            return load_families()
        return {self.family.name: self.family.model_copy(update={"own": True})}

    @property
    def importance_file(self) -> Path | None:
        """The path of the importance file, or None."""
        return None if self.importance is None else Path(self.importance)
