"""Runs the sections of a benchmark in separate processes, so that a crash or a hang ends one section only.

Everything is in one folder and one archive, which exist from the first section on: a machine may be gone early.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import RESULTS

SHOWN_LINES = 60  # of a section's log; the archive has all of it


class Section(NamedTuple):
    """A part of a benchmark.

    Attributes:
        run: does it; an exception means that it failed.
        limit_s: after which its process is killed.
    """

    run: Callable[[argparse.Namespace], None]
    limit_s: float


def main(name: str, module: str, sections: Mapping[str, Section], parser: argparse.ArgumentParser) -> int:
    """Run all sections, or those that the command line names, and return the exit status.

    Args:
        name: of the folder and of the archive in `RESULTS`.
        module: that calls this function when it is run.
        sections: by name, in their order.
        parser: knows the options that sections read.
    """
    parser.add_argument("--only", nargs="+", choices=sections, default=list(sections), help="sections to run")
    parser.add_argument("--budget-s", type=float, default=560, help="for all sections together")
    parser.add_argument("--section", choices=sections, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        sections[options.section].run(options)
        return 0
    ends = time.monotonic() + options.budget_s
    folder = RESULTS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    outcomes: dict[str, dict[str, object]] = {}
    for each in options.only:
        limit_s = min(sections[each].limit_s, ends - time.monotonic())
        command = [sys.executable, "-u", "-m", module, *sys.argv[1:], "--section", each]
        outcomes[each] = run_section(command, folder / f"{each}.log", limit_s)
        print(f"-- {each}: {outcomes[each]['result']}, {outcomes[each]['seconds']} s", flush=True)
        (folder / "outcomes.json").write_text(json.dumps(outcomes, indent=1) + "\n")
        pack(folder)
    print(f"results: {archive(folder)}")
    return 0 if all(outcome["result"] == "complete" for outcome in outcomes.values()) else 1


def run_section(command: Sequence[str], log: Path, limit_s: float) -> dict[str, object]:
    """Run a process with all of its children, write its output to a file, show the end of it, and say how it ended."""
    started = time.monotonic()
    if limit_s <= 0:
        return {"result": "not run: no time left", "seconds": 0.0}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(limit_s)
            result = "complete" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            result = f"killed after {limit_s:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # servers and clients that the section has left, too
            process.wait()
    print("\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]), flush=True)
    return {"result": result, "seconds": round(time.monotonic() - started, 1)}


def archive(folder: Path) -> Path:
    """Where the results of a folder are packed."""
    return folder.with_suffix(".tar.gz")


def pack(folder: Path) -> None:
    """Replace the archive of the folder by one of its present content."""
    unfinished = archive(folder).with_suffix(".unfinished")
    with tarfile.open(unfinished, "w:gz") as tar:
        tar.add(folder, folder.name)
    unfinished.replace(archive(folder))
