"""The fast lane has at least one test of each room, and each test imports the room."""

from pathlib import Path

import pytest

import mquant
from fast_lane import ROOMS

SOURCE = Path(mquant.__file__).parent
TESTS = Path(__file__).parent


def test_every_room_has_a_fast_test() -> None:
    rooms = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert set(ROOMS) == rooms
    assert all(ROOMS.values())


@pytest.mark.parametrize("room", ROOMS)
def test_a_fast_test_imports_its_room(room: str) -> None:
    for test in ROOMS[room]:
        assert f"mquant.{room}" in (TESTS / test.partition("::")[0]).read_text("utf-8"), test
