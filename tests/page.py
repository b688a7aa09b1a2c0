"""Chromium for tests: facts about a page that a browser has laid out."""

import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium on PATH (.ci/run installs it)"
)
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--allow-file-access-from-files",
    "--virtual-time-budget=4000",
)
_PROBE = """<!doctype html><iframe src="{page}" style="width:{width}px;height:900px"></iframe>
<pre id="out"></pre><script>
addEventListener("load", () => {{
  const page = frames[0].document, root = page.documentElement, facts = [];
  facts.push("width=" + root.scrollWidth);
  facts.push("back=" + frames[0].getComputedStyle(page.body).backgroundColor);
  facts.push("ink=" + frames[0].getComputedStyle(page.body).color);
  facts.push("broken=" + [...page.images].filter((i) => !i.naturalWidth).length);
  facts.push("title=" + page.querySelector("h1").textContent);
  facts.push("scripts=" + page.scripts.length);
  document.getElementById("out").textContent = facts.join("|");
}});
</script>
"""


def laid_out(page: Path, folder: Path, width: int, *, dark: bool) -> dict[str, str]:
    """Return facts about a page that Chromium lays out `width` pixels wide, in light or dark."""
    assert CHROMIUM is not None
    probe = folder / "probe.html"
    probe.write_text(_PROBE.format(page=page.as_uri(), width=width), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *_OPTIONS, scheme, profile, "--dump-dom", probe.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    output = re.search(r'<pre id="out">([^<]+)</pre>', run.stdout)
    assert output, run.stdout + run.stderr
    return dict(part.split("=", 1) for part in unescape(output[1]).split("|"))
