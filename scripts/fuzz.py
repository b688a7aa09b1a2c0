"""Feed mquant hostile inputs, random changes of good inputs, until the time is up.

    python scripts/fuzz.py [--seconds 900] [--cases 10000] [--seed 0] [--case N] [--data]

A case is a hostile checkpoint beside good ones, with hostile recipe, family, text, importance,
card and result files. The script runs some verbs on every case, in this process; over some hundred
cases all verbs run, but `loader`. Every fifth case is on the tests' fake hub, which also tampers
with its answers, as the fake server that `smoke` asks does. `--data` runs only verbs that
calibrate, whose memory is not limited: torch alone takes 400 MB.

A failure is: an exit code other than 0 to 3, a traceback, a command that takes more than 10 s
(more on a busy machine, and 1 s more for every 300 MB of the case, because some commands read whole
shards, and a shard of holes may have 137 GB) or 500 MB, a file outside OUT that changed, a control
character on the terminal, JSON with NaN. After a failure, the script keeps the case's folder and
prints the command that repeats the case.
"""

import argparse
import faulthandler
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "tests"))

SECONDS, MOST_MB = 10, 500
READ = 300e6  # bytes a second


class TooLong(BaseException):
    """A command exceeded its time. `except Exception` does not catch a BaseException."""


def main() -> int:
    """Run cases and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", action="store_true", help="run the verbs that calibrate")
    parser.add_argument("--case", type=int, help="run only the case of this number")
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, _too_long)
    where = Path(tempfile.mkdtemp(prefix="mquant-fuzz-"))
    fuzzer = Fuzzer(where, options.seed, data=options.data)
    start, number = time.monotonic(), options.case or 0
    try:
        while time.monotonic() - start < options.seconds and number < options.cases:
            if wrong := fuzzer.try_case(number):
                print(f"case {number} of seed {options.seed} ({where / str(number)}):", *wrong)
                print(f"again: python scripts/fuzz.py --seed {options.seed} --case {number}")
                return 1
            number += 1
            if options.case is not None:
                break
    finally:
        fuzzer.close()
    shutil.rmtree(where)
    took, cases = time.monotonic() - start, number - (options.case or 0)
    print(f"{cases:,} cases in {took:,.0f} s, {cases / took:.1f} a second; ", end="")
    print(f"peak memory {fuzzer.peak:,.0f} MB; slowest command {fuzzer.slowest:.1f} s; exit codes ")
    for verb, codes in sorted(fuzzer.codes.items()):
        print(f"  {verb}: " + ", ".join(f"{n:,} x {code}" for code, n in sorted(codes.items())))
    return 0


class Fuzzer:
    """A maker of cases in a folder, which runs mquant on each case."""

    def __init__(self, where: Path, seed: int, *, data: bool) -> None:
        from fakehub import GOOD_TOKEN, FakeHub
        from fakeserver import FakeServer

        self.where, self.seed, self.data = where, seed, data
        self.codes: dict[str, Counter[int]] = {}
        self.peak = self.slowest = self.reading = 0.0
        self.hub, self.server = FakeHub(), FakeServer()
        # Set the environment first: huggingface_hub reads the environment once, at its import.
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
            os.environ.pop(name, None)
        home = {"HF_HOME": str(where / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": GOOD_TOKEN}
        home["XDG_CACHE_HOME"] = str(where / "home")
        os.environ.update(home, HF_ENDPOINT=self.hub.url, NO_PROXY="127.0.0.1,localhost")
        import hostile_inputs
        from hostile import Bases
        from mquant.checkpoint import retry

        retry.BACKOFF_SECONDS = 0.0  # type: ignore[misc]
        (where / "bases").mkdir()
        self.bases = Bases.make(where / "bases")
        self.good = hostile_inputs.good_inputs(self.bases.folder)

    def close(self) -> None:
        """Stop the servers, whose threads would keep this process alive."""
        self.hub.close()
        self.server.close()

    def try_case(self, number: int) -> list[str]:
        """Make case `number`, run commands on the case, and return a list of failures."""
        import hostile

        chance = random.Random(f"{self.seed}-{number}")  # noqa: S311
        where = self.where / str(number)
        src = str(hostile.make_case(self.bases, where, chance))
        if number % 5 == 4:
            src = self._publish(where, chance)
        commands = self._commands(src, where, chance)  # also writes the files that commands read
        files = [path for path in where.rglob("*") if path.is_file() and not path.is_symlink()]
        self.reading = sum(path.stat().st_size for path in files) / READ
        before = hostile.snapshot(where)
        for command in commands:
            if wrong := self._run(command):
                return [" ".join(map(repr, command)) + ":", *wrong]
        after = hostile.snapshot(where)
        if changed := [name for name in {*before, *after} if before.get(name) != after.get(name)]:
            return [f"changed outside OUT: {changed}"]
        self.hub.tamper = None
        self.hub.ranges = "served"
        shutil.rmtree(where)
        shutil.rmtree(self.where / "home", ignore_errors=True)
        return []

    def _commands(self, src: str, where: Path, chance: random.Random) -> list[list[str]]:
        import hostile
        import hostile_inputs

        inputs = hostile_inputs.Inputs(where, self.good, chance)
        if self.data:
            return list(hostile_inputs.data_commands(src, where, inputs, chance))
        hostile_inputs.spoil_shares(where, self.bases.folder, chance)
        answer = hostile.dumped(chance.choice(hostile_inputs.ANSWERS), chance)
        self.server.answer = lambda _: chance.choice(hostile_inputs.ANSWERS)
        self.server.raw = answer if chance.random() < 0.3 else None
        commands = list(hostile.commands(src, where, chance))
        chosen = sorted(chance.sample(range(len(commands)), 3))
        more = list(hostile_inputs.commands(src, where, inputs, chance, self.server.url))
        return [*(commands[number] for number in chosen), *more]

    def _publish(self, where: Path, chance: random.Random) -> str:
        import hostile

        if any(p.is_file() and p.stat().st_size > 10**8 for p in (where / "src").rglob("*")):
            return str(where / "src")  # sending 1 TB of zeros takes too long
        self.hub.repos.clear()
        self.hub.forget()
        self.hub.add("org/model", where / "src")
        self.hub.ranges = chance.choice(("served", "served", "ignored", "shifted", "cut short"))

        def tamper(answer: bytes) -> bytes:
            value: Any = hostile.twisted(json.loads(answer), chance)
            return hostile.dumped(value, chance)

        self.hub.tamper = tamper if chance.random() < 0.6 else None
        return "org/model"

    def _run(self, command: list[str]) -> list[str]:
        import hostile

        Path("/proc/self/clear_refs").write_text("5")  # reset the peak before this command
        start = time.monotonic()
        busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        limit = int((SECONDS + self.reading) * busy)
        faulthandler.dump_traceback_later(limit + 5 * SECONDS, exit=True)
        signal.alarm(limit)
        try:
            code, wrong = hostile.run_command(command)
        except TooLong as late:
            return [f"took more than {limit} s", repr(late.args)]
        finally:
            signal.alarm(0)
            faulthandler.cancel_dump_traceback_later()
        self.slowest = max(self.slowest, time.monotonic() - start)
        status = Path("/proc/self/status").read_text()
        used = int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) * 1024 / 1e6
        self.peak = max(self.peak, used)
        self.codes.setdefault(command[0], Counter())[code] += 1
        return [*wrong, *([f"took {used:,.0f} MB"] if used > MOST_MB and not self.data else [])]


def _too_long(signum: int, frame: Any) -> None:
    raise TooLong(f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "")


if __name__ == "__main__":
    sys.exit(main())
