"""`python -m tools.fuzz --runs 100000 --seed 0`: what was run, how it ended, and what it took.

A finding is anything but an end or a one-line OnnxqError with a cure: another exception, a run that
computes for more than 10 seconds or waits for more than 60, a process of more than 2 GB. `--keep
FOLDER` keeps its file; `--only NUMBER` runs it again, with the traceback. Where the whole process
ends, FOLDER/running says in which run.
Exit 1 where there is a finding.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from onnxq.errors import OnnxqError
from tools.fuzz.targets import Case, Cases

LIMIT_SECONDS = 10  # of CPU: on a busy machine the clock runs faster
LIMIT_WAITING = 60  # by the clock
LIMIT_BYTES = 2_000_000_000
_LONGEST_LINE = 1200
_SHOWN = 25


class Hang(BaseException):
    """A run took too long. No Exception: nothing on the way may take it for a bad file."""


@dataclass
class Tally:
    """What has been seen so far."""

    runs: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    findings: dict[str, list[str]] = field(default_factory=dict)
    slowest: list[tuple[float, int, str]] = field(default_factory=list)

    def add(self, number: int, case: Case, end: str, seconds: float) -> None:
        self.runs += 1
        self.kinds[case.kind] += 1
        self.ends[end] += 1
        self.slowest = sorted([*self.slowest, (seconds, number, case.seed)], reverse=True)[:3]

    def find(self, what: str, where: str) -> None:
        self.findings.setdefault(what, []).append(where)

    def lines(self, started: float) -> list[str]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        whole, wrong = self.ends["whole"], sum(map(len, self.findings.values()))
        said = [(n, words) for words, n in self.ends.most_common() if words != "whole"]
        lines = [
            f"{self.runs} runs in {time.monotonic() - started:.0f} s: "
            + ", ".join(f"{n} {kind}" for kind, n in self.kinds.most_common()),
            f"{whole} accepted, {self.runs - whole - wrong} refused in one line, "
            f"{len(said)} different lines:",
            *(f"  {n:6} {words}" for n, words in said[:_SHOWN]),
        ]
        if said[_SHOWN:]:
            lines.append(f"  {sum(n for n, _ in said[_SHOWN:]):6} {len(said) - _SHOWN} others")
        lines += [f"slowest: {s:.2f} s, run {number} ({seed})" for s, number, seed in self.slowest]
        lines.append(f"peak resident memory: {peak / 1e6:.0f} MB (limit {LIMIT_BYTES / 1e6:.0f})")
        lines.append(f"{wrong} findings, {len(self.findings)} of them different")
        for what, where in self.findings.items():
            lines.append(f"  {len(where):5} {what}: {', '.join(where[:3])}")
        return lines


def main() -> int:
    options = _options()
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    signal.signal(signal.SIGPROF, _hang)
    signal.signal(signal.SIGALRM, _hang)
    faulthandler.enable()
    warnings.simplefilter("ignore")  # zipfile's, of names that are twice in an archive
    tally, started = Tally(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="onnxq-fuzz-", dir=options.folder) as name:
        folder = Path(name)
        cases = Cases(folder, options.models, options.seed)
        os.mkfifo(folder / "pipe")
        numbers = range(options.start, options.start + options.runs)
        for number in numbers if options.only is None else [options.only]:
            case = cases.make(number)
            _run(number, case, folder, options, tally)
            if sys.stderr.isatty() and number % 100 == 0:
                print(f"\r{number - options.start} of {options.runs}", end="", file=sys.stderr)
        left = [p.name for p in folder.iterdir() if p.name.startswith(".onnxq")]
        if left:
            tally.find("temporary files left behind", str(left))
    print("\n".join(tally.lines(started)))
    return 1 if tally.findings else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools.fuzz", description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first run")
    parser.add_argument("--only", type=int, help="one run, with its traceback")
    parser.add_argument("--models", type=Path, default=Path("models/out"), help="real models")
    parser.add_argument("--keep", type=Path, help="folder for the files of findings")
    parser.add_argument("--folder", help="where to work; default: the system's temporary folder")
    return parser.parse_args()


def _run(number: int, case: Case, folder: Path, options: argparse.Namespace, tally: Tally) -> None:
    place = folder / "case"
    place.mkdir(exist_ok=True)
    path = place / f"x{case.suffix}"
    path.write_bytes(case.content)
    if case.suffix == ".onnx":
        for shared in ("data", "pipe"):
            if not (place / shared).exists() and (folder / shared).exists():
                (place / shared).symlink_to(folder / shared)
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
        (options.keep / "running").write_text(f"--seed {options.seed} --only {number}\n")
    faulthandler.dump_traceback_later(2 * LIMIT_WAITING, exit=True)
    started = time.process_time()
    finding = ""
    signal.setitimer(signal.ITIMER_PROF, LIMIT_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_WAITING)
    try:
        case.run(path)
        end = "whole"
    except OnnxqError as error:
        end = _class(str(error))
        finding = _untidy(error)
    except (Exception, Hang) as error:
        finding = end = f"{type(error).__name__}: {str(error)[:200]}"
        if options.only is not None:
            traceback.print_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    seconds = time.process_time() - started
    if seconds > LIMIT_SECONDS and not finding:
        finding = f"took {seconds:.1f} s"
    if finding:
        tally.find(finding, f"run {number} ({case.kind} {case.seed})")
        if options.keep is not None:
            (options.keep / f"{options.seed}-{number}{case.suffix}").write_bytes(case.content)
    if options.only is not None:
        print(f"run {number}: {case.kind} {case.seed}, {len(case.content)} bytes: {end}")
    tally.add(number, case, end, seconds)
    for file in place.iterdir():
        if file.name not in ("data", "pipe"):
            file.unlink()


def _hang(number: int, _: object) -> None:
    computed = number == signal.SIGPROF
    raise Hang(f"{LIMIT_SECONDS} s of CPU" if computed else f"{LIMIT_WAITING} s by the clock")


def _untidy(error: OnnxqError) -> str:
    """What is wrong with the line that a user would see, or ''."""
    line = str(error)
    if "\n" in line:
        return f"more than one line: {line!r:.200}"
    if len(line) > _LONGEST_LINE:
        return f"a line of {len(line)} characters: {line[:100]}"
    return "" if error.hint else f"no cure: {line:.200}"


def _class(line: str) -> str:
    """The line without what differs from file to file: names, paths, numbers."""
    line = re.sub(r"/\S*/", "", line)
    line = re.sub(r"'[^']*'|\"[^\"]*\"|b'.*'", "'...'", line)
    return re.sub(r"-?\d[\d.e+x,]*", "N", line)[:110]


if __name__ == "__main__":
    sys.exit(main())
