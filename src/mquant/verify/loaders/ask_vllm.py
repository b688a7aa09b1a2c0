"""vLLM's verdict on a checkpoint, without a GPU and from the headers alone.

vLLM parses the config, builds the model and loads the headers in a Python of its own
(`inside_vllm.py`). A refusal is an error in vLLM's words. Tensors that vLLM silently drops, leaves
unset, reshapes or converts are errors too.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mquant.checkpoint import CONFIG_NAME, FIRST_READ, INDEX_NAME, Source, read_first
from mquant.checkpoint.generation_config import GENERATION
from mquant.data_files import temporary_folder
from mquant.errors import HeaderError, LoaderError
from mquant.findings import Finding, Rule, rule
from mquant.loader_model.modules import MODELOPT_NAME
from mquant.untrusted import parse_json

PROBE: Final = Path(__file__).with_name("inside_vllm.py")
_JSON: Final = (CONFIG_NAME, INDEX_NAME, GENERATION, MODELOPT_NAME)
_MOST_JSON: Final = 50_000_000
_SECONDS: Final = 300
_STAGES: Final = {
    "start": "starting",
    "config": "reading config.json",
    "model": "building the model",
    "weights": "loading the weights",
}
# Messages of vLLM whose cause is this machine or the probe, not the checkpoint.
_NOT_HERE: Final = (
    "not supported on",
    "no kernel",
    "find a kernel",
    "no available",
    "supports the deployment configuration",
    "requires a gpu",
    "cuda",
    "compute capability",
    "min_capability",
    "current platform",
    "device type",
    "--mamba-block-size",  # a model whose state has blocks, which vLLM's CPU build does not take
    "meta tensor",  # a model that needs values, which the probe does not have
    "failed to be inspected",  # a model whose packages are not here
    "module 'triton' has no attribute",  # a kernel of GPUs; the environment's triton is a stub
    "a model of its own for cpus",
    "contains custom code",  # the probe runs no code of a checkpoint
)
_KINDS_NOT_HERE: Final = ("ImportError", "ModuleNotFoundError", "MemoryError", "Killed")

VLLM_REFUSES: Final = rule(
    "vllm-refuses",
    "vLLM parses the config, builds the model and takes every tensor.",
    "vLLM cannot serve the checkpoint.",
    "Repair what vLLM names; findings of other rules say more.",
    needs="loader",
)
VLLM_DROPS: Final = rule(
    "vllm-drops",
    "vLLM loads every tensor into a parameter.",
    "A tensor that vLLM drops, without a message, is not in the model: often its name is unknown.",
    "Give the tensors the original release's names, or remove those that do not belong.",
    needs="loader",
)
VLLM_LEAVES_UNSET: Final = rule(
    "vllm-leaves-unset",
    "vLLM fills every parameter of the model from the checkpoint.",
    "Other parameters stay uninitialised: vLLM does not check quantized models.",
    "Quantize again, or add the missing tensors.",
    needs="loader",
)
VLLM_RESHAPES: Final = rule(
    "vllm-reshapes",
    "vLLM copies every tensor into a parameter of the same shape.",
    "vLLM broadcasts a tensor that is too small over the parameter, without a message.",
    "Quantize again, with a tool that writes the shapes of the layout.",
    needs="loader",
)
VLLM_CONVERTS: Final = rule(
    "vllm-converts",
    "vLLM keeps the meaning of the bytes of codes and scales.",
    "For example vLLM converts U8 to E4M3 by value, without a message: the scales change.",
    "Quantize again, with a tool that writes the dtypes of the layout.",
    needs="loader",
)
VLLM_NOT_ASKED: Final = rule(
    "vllm-not-asked",
    "vLLM's CPU build can load the checkpoint's layout.",
    "Some layouts can only be built on a GPU: they were not tried.",
    "Try to load the checkpoint with vLLM on a machine with a GPU.",
    severity="warning",
    needs="loader",
)


@dataclass(frozen=True)
class Verdict:
    """vLLM's verdict: `loads`, `refuses`, `loads wrong` or `not asked`.

    `words` is vLLM's message, if vLLM stopped.
    """

    version: str
    verdict: str
    words: str
    findings: tuple[Finding, ...]

    @property
    def answered(self) -> bool:
        """Whether vLLM judged the checkpoint."""
        return self.verdict != "not asked"

    def to_json(self) -> dict[str, str]:
        """Return the value of the key `loader` of `mquant.verify/1`."""
        return {
            "name": "vllm",
            "version": self.version,
            "verdict": self.verdict,
            "words": self.words,
        }


def ask(source: Source, shards: tuple[str, ...], python: Path) -> Verdict:
    """Ask the vLLM of a Python about a checkpoint, by its headers and JSON alone.

    Raises the errors of reading the source, and LoaderError if the disk is full.
    """
    with temporary_folder() as scratch:
        folder, result = Path(scratch, "checkpoint"), Path(scratch, "result.json")
        why = _run(python, folder, result, lambda: _materialise(source, shards, folder))
        return read_verdict(_read(result), why)


def read_verdict(reported: Mapping[str, Any], why: str = "") -> Verdict:
    """Return the verdict from the probe's result; `why` says why the probe did not finish."""
    version, stage = str(reported.get("vllm", "?")), str(reported.get("stage", "start"))
    if stage == "done":
        try:
            findings = tuple(_silent(reported))
        except (TypeError, ValueError, AttributeError, LookupError):
            return read_verdict({"vllm": version}, "its answer cannot be read")
        return Verdict(version, "loads wrong" if findings else "loads", "", findings)
    error = str(reported.get("error", ""))
    words = " ".join(error.split())[:600] or why or "it stopped without a word"
    kind = reported.get("kind", "")
    quoted = f"{kind}: {words}" if kind else words
    doing = _STAGES.get(stage, stage)
    of_machine = kind in _KINDS_NOT_HERE or any(w in words.lower() for w in _NOT_HERE)
    if stage == "start" or of_machine:
        message = f"vLLM {version} could not be asked: vLLM stopped while {doing}: {quoted}"
        findings = (VLLM_NOT_ASKED.finding("vLLM", _sentence(message)),)
        return Verdict(version, "not asked", quoted, findings)
    message = f"vLLM {version} refuses the checkpoint while {doing}: {quoted}"
    return Verdict(version, "refuses", quoted, (VLLM_REFUSES.finding("vLLM", _sentence(message)),))


def _silent(reported: Mapping[str, Any]) -> list[Finding]:
    """Return findings about tensors that vLLM loads wrong without an error, one for each rule."""
    version = reported["vllm"]
    counts = dict(reported.get("counts", {}))

    def add(broken: Rule, key: str, message: str, where: str) -> None:
        more = f" (and {counts[key] - 1:,} more)" if counts.get(key, 1) > 1 else ""
        findings.append(broken.finding(where, f"vLLM {version} {message}{more}, without a word."))

    findings: list[Finding] = []
    for name in reported.get("dropped", [])[:1]:
        add(VLLM_DROPS, "dropped", f"drops {name}", name)
    for name, lacking in reported.get("unset", [])[:1]:
        add(VLLM_LEAVES_UNSET, "unset", f"leaves {lacking:,} of {name}'s elements unset", name)
    for name, shape, into in reported.get("reshaped", [])[:1]:
        add(VLLM_RESHAPES, "reshaped", f"spreads {name}, {shape}, over {into}", name)
    for name, dtype, into in reported.get("converted", [])[:1]:
        plain = (dtype.removeprefix("torch."), into.removeprefix("torch."))
        add(VLLM_CONVERTS, "converted", f"converts {name} from {plain[0]} to {plain[1]}", name)
    return findings


def _sentence(text: str) -> str:
    return text if text.endswith(".") else text + "."


def _materialise(source: Source, shards: tuple[str, ...], folder: Path) -> None:
    """Write the checkpoint into `folder`: JSON whole, shards as sparse files with their headers.

    Names come from the source's listing of top-level files. Raises LoaderError if the disk is full.
    """
    folder.mkdir()

    def write(name: str, first: bytes, size: int) -> None:
        try:
            # Not `write_whole`: the folder is this process's own, and the files have holes.
            with (folder / name).open("xb") as file:
                file.write(first)
                file.truncate(size)
        except OSError as error:  # such as a size or a name that no file can have
            raise LoaderError(
                f"mquant cannot write {name[:60]} for vLLM ({error.strerror}).",
                "Leave --loader out, or set TMPDIR to a folder on another disk.",
            ) from error

    def shard(name: str) -> None:
        size = source.files[name]
        try:
            first = read_first(source, name)
        except HeaderError:  # vLLM then reports the broken header
            first = source.read(name, 0, min(FIRST_READ, size))
        write(name, first, size)

    for name in _JSON:
        if source.files.get(name, _MOST_JSON) < _MOST_JSON:
            content = source.read(name)
            write(name, content, len(content))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(shard, shards))


def _run(python: Path, folder: Path, result: Path, materialise: Callable[[], None]) -> str:
    """Run the probe; return why the probe did not finish, or an empty string.

    The probe imports vLLM for seconds while `materialise` fills the folder; then the probe waits
    for the folder.
    """
    # No tokens, no proxies, no settings of this process; vLLM writes to a home of its own.
    keep = {"PATH": os.environ.get("PATH", ""), "HOME": str(result.parent), "LC_ALL": "C.UTF-8"}
    # -I: modules are those of the user's Python, not files beside the probe.
    command = [str(python), "-I", str(PROBE), str(folder), str(result)]
    null = subprocess.DEVNULL
    try:
        probe = subprocess.Popen(  # noqa: S603  (the user's own Python)
            command,
            env=keep,
            cwd=result.parent,
            stdin=subprocess.PIPE,
            stdout=null,
            stderr=null,
            start_new_session=True,
        )
    except OSError as error:
        return f"{python} cannot be run: {error.strerror}"
    with probe:
        try:
            materialise()
            probe.communicate(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            return f"it took more than {_SECONDS} seconds"
        finally:
            if probe.poll() is None:  # vLLM runs in a child of the probe: kill both
                os.killpg(probe.pid, signal.SIGKILL)
    return ""


def _read(result: Path) -> dict[str, Any]:
    try:
        value = parse_json(result.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
