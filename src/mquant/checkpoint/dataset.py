"""A dataset repo on the hub, read as a model repo is."""

from typing import Literal

from mquant.checkpoint.hub import HubRepo


class DatasetRepo(HubRepo):
    """A dataset repo on the hub, at one commit."""

    repo_type: Literal["model", "dataset"] = "dataset"
