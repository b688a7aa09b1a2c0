"""Stand-ins for a Python that has vLLM."""

from pathlib import Path


def fake_python(path: Path, probe: str, *, has_vllm: bool = True) -> Path:
    """Write a script that says whether it has vLLM, and runs `probe` (sh) as the probe.

    In `probe`, $1 is the checkpoint and $2 the file for the answer.
    """
    path.write_text(
        f'#!/bin/sh\n[ "$2" = -c ] && echo {has_vllm} && exit\nshift 2\n{probe}\n', "utf-8"
    )
    path.chmod(0o755)
    return path
