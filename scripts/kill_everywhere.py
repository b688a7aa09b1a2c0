"""Kill each verb that writes at every change of a file, run the verb again, and compare the bytes.

    python scripts/kill_everywhere.py [--verb V ...] [--step K | --sample N | --at N [--torn]]

A library that the script compiles and preloads (kill_preload.c) counts the calls that change a file
or folder: open with O_CREAT or O_TRUNC, write, rename, unlink, link, mkdir, truncate, fallocate,
sendfile and the like, the pieces of uploads, and the start of a child process. A process dies by
SIGKILL, with its children, before call N, or, if the call writes, also in the middle of the call:
one half of the bytes is written. N goes from 0 to the end of the command; what a child writes does
not count. After each kill the script demands:

- no source and no parent changed, in bytes, mode or time of change
- a result that looks whole (a config.json, a card, a report, a repo's config.json) is whole, or is
  the one that was there before
- the same command succeeds, and leaves the files of an undisturbed command, no others

Files in TMPDIR are not compared: the system removes what a killed process leaves there. Nor are
those in the cache of huggingface_hub, which has temporary files of random names, and .pyc files,
which hold times. Exit code 1: a demand failed; the script prints the command that repeats the first
failures.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from kill_cases import CASES, Case, Inputs, case_of

sys.path.append(str(Path(__file__).parent.parent / "tests"))

HERE = Path(__file__).parent
WRITES = ("write ", "pwrite ", "writev ", "pwritev ", "sendfile ", "copy_file_range ", "send ")
OTHERS = (".around/tmp", ".around/home")
KILLED = -signal.SIGKILL
UNDECIDED = "a JUnit file of a run without a verdict"
State = dict[str, str]
"""Path -> what is there."""


@dataclass
class Tally:
    """What was done to a case, and the faults that were found."""

    case: Case
    operations: int = 0
    kills: int = 0
    reruns: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ran:
    """The exit code of a command, the operations before its end, and what it printed."""

    code: int
    listed: list[str]
    printed: str


class Killer:
    """A fork server, a fake hub and inputs in a temporary folder."""

    def __init__(self) -> None:
        """Compile the library, start the server, and write the inputs."""
        from fakehub import FakeHub

        self.where = Path(tempfile.mkdtemp(prefix="mquant-kill-")).resolve()
        self.work, self.kept = self.where / "work", self.where / "kept"
        self.hub = FakeHub()
        setattr(self.hub._server, "handle_error", ignore)  # noqa: B010
        library = self.where / "preload.so"
        source = str(HERE / "kill_preload.c")
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), source, "-ldl"], check=True
        )
        around = self.work / ".around"
        environment = self.hub.environment(around) | {
            "LD_PRELOAD": str(library),
            "TMPDIR": str(around / "tmp"),
            "NO_PROXY": "127.0.0.1,localhost",
            "SSL_CERT_DIR": str(self.where),  # no certificates: to load them takes 0.2 s
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_FIND_LINKS": str(self.where / "wheels"),
            "PIP_NO_CACHE_DIR": "1",
            "PIP_NO_INDEX": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        self._server = subprocess.Popen(
            [sys.executable, str(HERE / "kill_server.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._threads = threading.active_count()
        Inputs(self.where, self._prepare).make()
        self.before = snapshot(self.kept, times=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.__exit__(None, None, None)  # the end of its stdin ends the server
        self.hub.close()
        shutil.rmtree(self.where, ignore_errors=True)

    def _ask(
        self, command: Iterable[str], at: int = -1, torn: bool = False, here: bool = False
    ) -> Ran:
        (self.work / ".around" / "tmp").mkdir(parents=True, exist_ok=True)
        log = self.where / "log"
        job: dict[str, Any] = {
            "command": [*command],
            "folder": str(self.work),
            "root": f"{self.work}/",
        }
        job |= {"at": at, "torn": torn, "here": here, "log": str(log)}
        job["modules"] = str(self.where / "modules")
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        self._settle()
        return Ran(answer["code"], answer["listed"], log.read_text(errors="replace"))

    def _settle(self) -> None:
        """Wait until the hub has done all requests, also those of a killed process."""
        while threading.active_count() > self._threads:
            time.sleep(0.001)

    def _prepare(self, command: tuple[str, ...], folder: Path) -> None:
        assert folder == self.work
        ran = self._ask(command, here=True)
        if ran.code:
            raise RuntimeError(f"{' '.join(command)}: {ran.printed}")

    def begin(self, case: Case) -> None:
        """Make the state in which a command begins."""
        shutil.rmtree(self.work, ignore_errors=True)
        if case.begin:
            shutil.copytree(self.where / "begins" / case.begin, self.work)
        self.hub.repos.clear()
        self.hub.stored.clear()
        for name in ("bf16", "broken"):
            self.hub.add(f"org/{name}", self.kept / name)

    def state(self, case: Case) -> tuple[State, State]:
        """Return the files of the command, and those of the repo that the command writes."""
        repo = self.hub.repos.get(case.repo)
        there = {} if repo is None else snapshot(repo.folders[repo.revisions["main"]])
        return snapshot(self.work), there

    def try_case(self, case: Case, numbers: "Numbers") -> Tally:
        """Kill a command at the numbers; return what was found."""
        start, tally = time.monotonic(), Tally(case)
        if not case.sampled:  # the first run loads modules, which write files of their own
            self.begin(case)
            self._ask(case.command)
        self.begin(case)
        before = self.state(case)
        whole = self._ask(case.command)
        after = self.state(case)
        if whole.code:
            tally.faults.append(f"exit code {whole.code} undisturbed: {whole.printed[-600:]}")
            return tally
        tally.operations = len(whole.listed)
        for at, torn in numbers.of(whole.listed):
            self.begin(case)
            killed = self._ask(case.command, at, torn)
            if killed.code == 0:
                continue  # threads: this time the command needed fewer operations
            tally.kills += 1
            where = killed.listed[-1].replace(f"{self.where}/", "") if killed.listed else "?"
            faults = list(self._after_kill(case, killed, before, after))
            again = None
            if numbers.twice:
                again = self._ask(case.command, numbers.random(at, tally.operations))
                faults += self._after_kill(case, None, before, after)
            if again is None or again.code == KILLED:
                again = self._ask(case.command)
            tally.reruns += 1
            faults += self._after_rerun(case, again, after)
            option = f"--verb {case.verb} --at {at}" + " --torn" * torn + numbers.flags
            tally.faults += [f"{option} ({where}): {fault}" for fault in faults]
            if any(fault.startswith("a source") for fault in faults):
                break  # the inputs are spoilt
        tally.seconds = time.monotonic() - start
        return tally

    def _after_kill(
        self,
        case: Case,
        killed: Ran | None,
        before: tuple[State, State],
        after: tuple[State, State],
    ) -> Iterator[str]:
        if killed is not None and killed.code != KILLED:
            yield f"ended with {killed.code}, not by the kill: {killed.printed[-600:]}"
        files, repo = self.state(case)
        if case.result:
            states = [part(state, case.result) for state in (before[0], after[0])]
            yield from half_made(part(files, case.result), *states, gone=case.gone)
        yield from (f"the repo: {what}" for what in half_made(repo, before[1], after[1], gone=True))
        yield from self._sources()

    def _sources(self) -> Iterator[str]:
        if changed := differences(self.before, snapshot(self.kept, times=True)):
            yield f"a source changed: {changed}"

    def _after_rerun(self, case: Case, again: Ran, after: tuple[State, State]) -> Iterator[str]:
        if again.code or "failed unexpectedly" in again.printed or "Traceback" in again.printed:
            yield f"the rerun exits with {again.code}: {again.printed[-600:]}"
        files, repo = self.state(case)
        if changed := differences(after[0], files):
            yield f"the rerun leaves other files: {changed}"
        if changed := differences(after[1], repo):
            yield f"the rerun leaves another repo: {changed}"
        yield from self._sources()


@dataclass(frozen=True)
class Numbers:
    """Which operations to kill at."""

    step: int = 1
    sample: int = 0
    seed: int = 0
    at: int | None = None
    torn: bool = False
    twice: bool = False

    @property
    def flags(self) -> str:
        """The options that repeat a case, beside the operation."""
        return f" --twice --seed {self.seed}" if self.twice else ""

    def random(self, at: int, most: int) -> int:
        """Return the operation at which the rerun of a command that was killed at `at` dies."""
        return random.Random(f"{self.seed} {at}").randrange(most)  # noqa: S311

    def of(self, listed: list[str]) -> list[tuple[int, bool]]:
        """Return the numbers of the operations, each with whether the process dies in it."""
        if self.at is not None:
            return [(self.at, self.torn)]
        every = [(number, False) for number in range(0, len(listed), self.step)]
        every += [(n, True) for n, _ in every if listed[n].startswith(WRITES)]
        if not self.sample:
            return every
        chance = random.Random(f"{self.seed} {len(listed)}")  # noqa: S311
        return chance.sample(every, min(self.sample, len(every)))


def ignore(*_: object) -> None:
    """Say nothing of a request of which a killed process sent a part only."""


def snapshot(folder: Path, *, times: bool = False) -> State:
    """Return what is at each path, but OTHERS and .pyc files; `times` adds modes and times."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(parent, name)
            key = path.relative_to(folder).as_posix()
            if key.startswith(OTHERS) or key.endswith(".pyc"):
                continue
            stat = path.lstat()
            if path.is_symlink():
                what = f"link to {path.readlink()}"
            else:
                what = "folder" if path.is_dir() else _content(path)
            found[key] = f"{what} {stat.st_mode} {stat.st_mtime_ns}" if times else what
    return found


def _content(path: Path) -> str:
    if path.name.startswith("mquant-run") and path.suffix == ".jsonl":
        return "ledger"  # a resumed run adds lines
    content = path.read_bytes()
    if b"The run ended before the verdict" in content and content.endswith(b"</testsuite>\n"):
        return UNDECIDED
    return sha256(content).hexdigest()


def part(state: State, path: str) -> State:
    """Return a file (under the name "") or the files of a folder."""
    inside = {
        key.removeprefix(f"{path}/"): v for key, v in state.items() if key.startswith(f"{path}/")
    }
    return {"": state[path]} if path in state and state[path] != "folder" else inside


def half_made(now: State, before: State, after: State, *, gone: bool) -> Iterator[str]:
    """Yield how a result that looks whole differs from the result before, and from the one after.

    More files than these may be there. With `gone` a document may also be absent.
    """
    document = "" in after
    if not document and "config.json" not in now:
        return
    if document and "" not in now and (gone or not before):
        return
    if now.get("") == UNDECIDED:
        return
    wanted = [after, *([before] if "config.json" in before or "" in before else [])]
    if not any(now.items() >= state.items() for state in wanted):
        changed = min((differences(state, now) for state in wanted), key=len)
        yield f"looks whole, and is half-made: {changed}"


def differences(wanted: State, found: State) -> str:
    """Return the paths that differ, with a sign: - absent, + too many, ! changed."""
    changed = [key for key in sorted({*wanted, *found}) if wanted.get(key) != found.get(key)]
    signs = ("-" if key not in found else "+" if key not in wanted else "!" for key in changed)
    return " ".join(sign + key for sign, key in zip(signs, changed, strict=True))


def main() -> int:
    """Kill the verbs, print the table and the first failures, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = [case.verb for case in CASES]
    parser.add_argument("--verb", nargs="+", choices=verbs, default=verbs, metavar="VERB")
    parser.add_argument("--step", type=int, default=1, help="kill at each STEP-th operation")
    parser.add_argument("--sample", type=int, default=0, help="kill at SAMPLE random operations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at", type=int, help="kill at this operation only")
    parser.add_argument("--torn", action="store_true", help="kill in the middle of --at")
    parser.add_argument("--twice", action="store_true", help="kill the first rerun too, anywhere")
    parser.add_argument("--list", action="store_true", help="print the verbs and their commands")
    options = parser.parse_args()
    cases = [case_of(verb) for verb in options.verb]
    if options.list:
        for case in cases:
            print(f"{case.verb:<16} mquant {' '.join(case.command)}")
        return 0
    if shutil.which("cc") is None:
        print("kill_everywhere needs a C compiler, cc; nothing was killed.")
        return 0
    numbers = Numbers(
        options.step, options.sample, options.seed, options.at, options.torn, options.twice
    )
    print(f"{'verb':<18}{'operations':>10}{'kills':>8}{'reruns':>8}{'faults':>8}{'seconds':>9}")
    faults = []
    with Killer() as killer:
        for case in cases:
            tally = killer.try_case(case, numbers)
            counts = (
                f"{tally.operations:>10}{tally.kills:>8}{tally.reruns:>8}{len(tally.faults):>8}"
            )
            print(f"{case.verb:<18}{counts}{tally.seconds:>9.0f}", flush=True)
            for fault in tally.faults[:5]:
                print(f"  {fault}", flush=True)
            faults += tally.faults
    for fault in faults[:5]:
        print(f"again: python scripts/kill_everywhere.py {fault.partition(' (')[0]}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
