"""This program runs with the code of the last release and makes the files of its users. It uses the old module names.

Usage: python - DIGITS.mar FOLDER < release_010.py
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from early_exit.archiver.archive import ArchiveRequest
from early_exit.handler.backbone import Backbone
from early_exit.handler.layout import ArchiveLayout, extract
from early_exit.handler.plan import Certificate, build_heads, load_plan, save_plan
from early_exit.handler.records import ShardHeader
from early_exit.handler.watchman import watch
from tests.support.digits import batches, traffic
from tests.support.plans import write_plan
from tests.support.recording import record
from tests.support.served import served_model
from tests.support.untried import build_untried

digits, folder = map(Path, sys.argv[1:])
store, records = folder / "store", folder / "records"
requests = traffic(320, seed=80)
inputs = torch.cat(list(batches(requests, 64)))

recorder = build_untried(ArchiveRequest(str(digits), store, input_shape=(1, 32, 32)))
config = folder / "config.yaml"
config.write_text("minWorkers: 1\nmaxWorkers: 1\nbatchSize: 4\nmaxBatchDelay: 20\n"
                  "early_exit:\n  seal_after_s: 2\n  control_rate: 0\n  sampling_rate: 0.5\n")
certificate = Certificate("disagreement", 0.9, 0.95, 100, 40, 0.4, 0.01, "binomial", (1.0, 2.0))
run = write_plan(folder / "run", recorder, threshold=0.3, certificate=certificate)
with tempfile.TemporaryDirectory() as scratch:
    extract(recorder, Path(scratch))
    backbone = Backbone.load(ArchiveLayout(Path(scratch)).folder)
    record(backbone, inputs, records, name="digits", bodies=[request.body for request in requests])
plan, tensors = load_plan(run)
plan = replace(plan, safer=(tuple(0.5 for _ in plan.exits),))
save_plan(run.parent, plan, build_heads(plan, tensors, backbone.description))
exiting = build_untried(ArchiveRequest(str(recorder), store, plan=run, config=config))

model = served_model(exiting)
with torch.no_grad():
    outputs = model(inputs[:64])
save_file({"inputs": inputs[:64].contiguous(), "outputs": outputs.contiguous()}, folder / "answers.safetensors")

header = ShardHeader("digits", "3.0", backbone.description.sha256, None, ())
watchman = watch(model, records, header)
assert watchman is not None
watchman.note(0, [1.0] * 200)
watchman.note(1, [0.0] * 7)
watchman.close()
assert watchman.state.alarms, "the state that is left holds an alarm"
