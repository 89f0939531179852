"""`kinema doctor`: checks this machine and, with the words of a training command, that job."""

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict

from kinema.doctor.finding import Finding, Level, examine, graded
from kinema.doctor.job import job_checks
from kinema.doctor.kernels import kernel_checks
from kinema.doctor.machine import machine_checks
from kinema.doctor.ranks import check_collectives
from kinema.doctor.storage import check_storage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument(
        "words", nargs="*", help="words of the training command, such as experiment=demo_dit: checks that job too"
    )
    parser.add_argument("--ranks", type=int, default=2, help="ranks that try the collectives (default %(default)s)")
    parser.add_argument("--world-size", type=int, default=1, help="ranks that the job will have")
    parser.add_argument("--json", action="store_true", help="one object instead of lines")


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each check, and the verdict; 0 when the job can start, 1 when something fails."""
    if int(os.environ.get("RANK", "0")) > 0:  # of a launcher: the first rank tells
        check_collectives()
        return 0
    findings = []
    for finding in findings_of(arguments):
        findings.append(finding)
        if not arguments.json:
            print(finding.lines(), flush=True)
    failed = [finding for finding in findings if finding.level is Level.FAIL]
    verdict = f"NOT READY: {', '.join(finding.name for finding in failed)}" if failed else "READY"
    if arguments.json:
        plain = [asdict(finding) | {"level": finding.level.value} for finding in findings]
        print(json.dumps({"verdict": verdict, "checks": plain}, indent=1))
    else:
        print(verdict)
    return 1 if failed else 0


def findings_of(arguments: argparse.Namespace) -> Iterator[Finding]:
    """Every check, one after the other."""
    yield from examine(machine_checks())
    yield from examine(kernel_checks())
    yield from examine([("collectives", lambda: check_collectives(arguments.ranks))])
    run_root = "runs"
    if arguments.words:
        job = job_checks(arguments.words, int(os.environ.get("WORLD_SIZE", arguments.world_size)))
        if isinstance(job, Finding):
            yield job
        else:
            run_root, checks = job
            yield graded("config", " ".join(arguments.words))
            yield from examine(checks)
    yield from examine([("storage", lambda: check_storage(run_root))])
