"""Compile numeric loops with numba: loops release the GIL, and compiled code is cached on disk."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

_F = TypeVar("_F", bound=Callable[..., Any])


def compiled(function: _F, **options: Any) -> _F:
    """Return the function, which numba compiles at its first call for each type of arguments.

    Division by zero follows IEEE 754 and raises nothing.
    """
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        return cast(_F, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no folder for the cache: each run compiles, for seconds
        return cast(_F, numba.njit(**options)(function))
