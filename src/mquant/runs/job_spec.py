"""What `mquant quantize` was asked for, in JSON: any process makes the same plan from it.

The job spec lies in OUT, where somebody else may have put it: it is read as hostile input.
"""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mquant.checkpoint import Folder, Source, open_checkpoint
from mquant.errors import SourceError
from mquant.family import Family, load_families
from mquant.plan import Plan, make_plan
from mquant.recipe import Recipe

AbsolutePath = Annotated[str, Field(pattern=r"^/[^\x00]*$", max_length=4096)]


class FolderAt(BaseModel):
    """A folder that all machines see, by its absolute path."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: AbsolutePath

    def open(self) -> Source:
        """The folder as it is now. Raises SourceError if there is none."""
        try:
            return Folder(Path(self.folder))
        except OSError as error:
            raise SourceError(
                f"{self.folder[:200]} cannot be read: {error.strerror}.", "Check the path."
            ) from error


class RepoAt(BaseModel):
    """A hub repo at a commit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    repo: str = Field(max_length=96)
    commit: str = Field(pattern=r"^[0-9a-f]{40}$")

    def open(self) -> Source:
        """The repo. Raises SourceError if it cannot be listed."""
        from mquant.checkpoint.hub import HubRepo  # slow to import

        return HubRepo(self.repo, self.commit)


class JobSpec(BaseModel):
    """A plan's source, its recipe, and the options that decide about bytes."""

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
        """The job spec of a plan that was made with these options."""
        source = plan.survey.checkpoint.source
        if source.folders:
            where: FolderAt | RepoAt = FolderAt(folder=str(source.folders[0].absolute()))
        else:
            identity = source.identity()
            where = RepoAt(repo=identity["repo"], commit=identity["commit"])
        return cls(
            source=where,
            recipe=plan.recipe,
            foreign=plan.recipe.foreign,
            max_shard_bytes=max_shard_bytes,
            allow_unsafe=allow_unsafe,
            importance=None if importance is None else str(importance.absolute()),
            family=plan.family if plan.family.own else None,
        )

    @classmethod
    def read(cls, value: dict[str, Any]) -> Self:
        """The job spec that lies in OUT. Raises ValueError, naming the key that is wrong."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise ValueError(".".join(map(str, error.errors()[0]["loc"]))[:80]) from None

    def to_json(self) -> dict[str, Any]:
        """What `read` takes; the key `family` is left out if the family ships."""
        return self.model_dump(mode="json", exclude=None if self.family else {"family"})

    def plan(self) -> Plan:
        """Make the plan again, from the source's headers."""
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
        """The importance file, if there is one."""
        return None if self.importance is None else Path(self.importance)
