"""Compile numeric loops with numba: loops release the GIL, and compiled code is cached on disk.

The cache only saves seconds: whatever is wrong with its files or its folder, the loops are compiled
again.
"""

import glob
import hashlib
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

_F = TypeVar("_F", bound=Callable[..., Any])
_DIGEST: Final = hashlib.sha256().digest_size


class _Files(IndexDataCacheFile):  # type: ignore[misc]
    """The files of one function. A digest follows the data: half a file may be code that runs."""

    def _dump(self, data: object) -> bytes:
        raw: bytes = super()._dump(data)
        return raw + hashlib.sha256(raw).digest()

    def _load_data(self, name: str) -> object:
        raw = Path(self._data_path(name)).read_bytes()
        if hashlib.sha256(raw[:-_DIGEST]).digest() != raw[-_DIGEST:]:
            raise ValueError(name)
        return pickle.loads(raw)  # noqa: S301 -- the user's own cache, as numba reads it


class _Cache(FunctionCache):  # type: ignore[misc]
    """numba's cache of one function. Files that cannot be read are deleted."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, *arguments: Any) -> Any:
        try:
            return super().load_overload(*arguments)
        except Exception:  # noqa: BLE001 -- pickle raises anything for a file that holds anything
            own = f"{glob.escape(self._impl.filename_base)}.*"
            with suppress(OSError):
                for path in Path(self._cache_path).glob(own):
                    path.unlink(missing_ok=True)
            return None

    def save_overload(self, *arguments: Any) -> None:
        with suppress(Exception):
            super().save_overload(*arguments)


def compiled(function: _F, **options: Any) -> _F:
    """Return the function, which numba compiles at its first call for each type of arguments.

    Division by zero follows IEEE 754 and raises nothing.
    """
    dispatcher = numba.njit(**{"nogil": True, "error_model": "numpy", **options})(function)
    with suppress(RuntimeError):  # no folder can be written: each run compiles
        dispatcher._cache = _Cache(function)
    return cast(_F, dispatcher)
