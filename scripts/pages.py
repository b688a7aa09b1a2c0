"""Write generated pages into docs/, or check that the pages in docs/ are up to date."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

DOCS: Final = Path(__file__).parent.parent / "docs"


def write_or_check(pages: Mapping[str, str], complaint: str) -> int:
    """Write pages by name; with `--check`, print `complaint` for each outdated page, return 1."""
    behind = 0
    for name, text in pages.items():
        path = DOCS / name
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            print(f"docs/{name} {complaint}")
            behind = 1
    return behind
