"""How long the search for heads takes, what a kill costs it, and how much memory many records take.

    python -m tests.benchmarks.search --json FILE

`ee-train` searches 8 candidates x 20 trials on 5,000 recorded CIFAR-10 requests; halfway it is killed with SIGKILL and
started again. Then it trains on ten times as many records: copies of the same records with new request ids.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from early_exit.handler.recording.format import list_shards, read_header, read_shard, write_shard
from early_exit.training.heads.journal import read_journal
from early_exit.training.heads.trial import Trial
from early_exit.training.paths import RunPaths
from tests.benchmarks.report import report
from tests.benchmarks.subjects import Subject, resnet18

TRIALS = 20
TIMES = 10


def main() -> int:
    parser = argparse.ArgumentParser(description="Time, resumption and memory of the search for heads.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    return report(options.json, measure, {"trials": TRIALS, "times_as_many_records": TIMES})


def measure(folder: Path) -> dict[str, Any]:
    """Return the figures of the search that is killed, and of training on many records."""
    subject = resnet18(folder)
    return {**killed_search(subject, folder), **many_records(subject, folder)}


def killed_search(subject: Subject, folder: Path) -> dict[str, Any]:
    """Search, kill the process halfway, and continue; return the time of both parts and what was lost."""
    run, n_wanted = RunPaths(folder / "run"), TRIALS * len(subject.backbone.description.candidates)
    started = time.monotonic()
    process = subprocess.Popen(command(subject, subject.records, run, TRIALS))
    while len(done(subject, run)) < n_wanted // 2 and process.poll() is None:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = done(subject, run)
    subprocess.run(command(subject, subject.records, run, TRIALS), check=True)
    after = done(subject, run)
    report = json.loads(run.report_json.read_text())
    return {"records": sum(report["records"].values()), "candidates": len(subject.backbone.description.candidates),
            "trials": len(after), "trials_wanted": n_wanted, "trials_before_kill": len(before),
            "trials_lost": len([one for one in before if one not in after]),
            "stopped_early": sum(trial.stopped for _, trial in after),
            "seconds_of_trials": sum(trial.seconds for _, trial in after),
            "seconds_in_all": time.monotonic() - started}


def many_records(subject: Subject, folder: Path) -> dict[str, Any]:
    """Train on many records; return how many there were, and the largest resident size of the process."""
    more = folder / "more"
    for shard in list_shards(subject.records):
        header = read_header(shard)
        records = read_shard(shard, header.layers)
        for number in range(TIMES):
            ids = torch.randint(-2**63, 2**63 - 1, (len(records),))
            write_shard(header.folder(more) / f"{number}-{shard.name}", header, replace(records, request=ids))
    process = subprocess.Popen(command(subject, more, RunPaths(folder / "large"), 1))
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"ee-train ended with {os.waitstatus_to_exitcode(status)} on many records")
    report = json.loads(RunPaths(folder / "large").report_json.read_text())
    return {"many_records": sum(report["records"].values()), "peak_mb": usage.ru_maxrss / 1024}


def command(subject: Subject, records: Path, run: RunPaths, n_trials: int) -> list[str]:
    archive = next((subject.archive.root.parent / "store").glob("*.mar"))
    return [sys.executable, "-m", "early_exit.training", str(records), "--archive", str(archive), "--to",
            str(run.root), "--trials", str(n_trials), "--json"]


def done(subject: Subject, run: RunPaths) -> list[tuple[str, Trial]]:
    """Return the trials in the journals, each with its layer."""
    return [(layer.path, trial) for layer in subject.backbone.description.candidates
            for trial in read_journal(run, layer.path)]


if __name__ == "__main__":
    sys.exit(main())
