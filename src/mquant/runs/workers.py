"""The number of workers of a run."""

import os
from typing import Final

MOST_CORES: Final = 16
"""The most cores that count for workers: more do not help, because the disk is the limit."""


def default_workers() -> int:
    """Return a worker for each core of this process, at most 16, and one more for the disk."""
    return min(len(os.sched_getaffinity(0)), MOST_CORES) + 1
