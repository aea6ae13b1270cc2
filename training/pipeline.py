"""The steps from records to a plan, in order. A run that was stopped does not repeat the steps that it has finished."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from early_exit.handler.archive_layout import ArchiveLayout, read_manifest
from early_exit.handler.backbone.backbone import Backbone, BackboneDescription
from early_exit.handler.backbone.candidates import CandidateLayer, spread_over
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.errors import RecordError, TooFewRecordsError
from early_exit.handler.exits.plan import save_plan
from early_exit.handler.exits.risk import Risk
from early_exit.handler.files.private import replacing
from early_exit.handler.recording.format import read_times
from early_exit.handler.user_handler.description import HandlerDescription
from early_exit.training.costs.cost import FlopCost
from early_exit.training.costs.profiling import Profile, TimeCost, profile_backbone
from early_exit.training.data.dataset import (
    DRAWN_MORE_OFTEN,
    NEWER_THAN_OTHERS,
    NOT_WRITTEN,
    RecordedTraffic,
    load_traffic,
)
from early_exit.training.data.labels import load_labels
from early_exit.training.data.preprocessing import preprocessing
from early_exit.training.data.replay import replay_records
from early_exit.training.data.shards import of_engine, of_newest_setting, of_traffic, recorded_layers, tell_keys
from early_exit.training.data.split import Part, Split
from early_exit.training.data.traffic import traffic_in
from early_exit.training.data.training_set import TrainingSet, prepare
from early_exit.training.heads.heads import find_architectures, train_heads
from early_exit.training.heads.trial import HeadCost, evaluators_of
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.planning.choose import choose, make_plan
from early_exit.training.planning.exit_costs import exit_costs
from early_exit.training.planning.predictions import predict
from early_exit.training.report.summary import RunReport, head_reports, make_report
from early_exit.training.selection.certify import records_needed

_NAMED = 5
"""The largest number of hosts that a line of the log names."""


def train(model: str, archive: ArchiveLayout, shards: list[Path], options: TrainingOptions, run: RunPaths,
          *, mar: Path | None = None, labels: Path | None = None,
          log: Callable[[str], None] = lambda line: None) -> RunReport:
    """Make heads, plan and report from records, and write them into the folder of the run.

    A run that was stopped continues with the records it was started with, after its last finished step.

    Args:
        model: the name of the model, for the report.
        archive: the extracted archive that was recorded.
        shards: the records.
        options: the options of the run.
        run: the folder to write into.
        mar: the path of the archive, which is stored for `ee-train report`.
        labels: CSV of request ids and true classes, for the risk `accuracy` and for the report.
        log: receives lines for the user.

    Raises:
        RecordError: there are too few records, records of different kinds, or the folder belongs to another run.
    """
    backbone = load_backbone(archive.folder)
    description = backbone.description
    identity = traffic_in(archive, description)
    training_set, left_out = _training_set(archive, mar, backbone, identity, shards, options, run, log)
    truth = load_labels(labels, training_set.request, training_set.row, training_set.n_classes, log) if labels else None
    if options.risk is Risk.ACCURACY:
        _require_labels(truth, training_set, options)
    profile = _profile(run, archive, backbone, training_set.layers, options)
    head_cost: HeadCost = FlopCost(description.flops)
    if profile is not None and options.service is None:
        head_cost = TimeCost(profile, options.batch_size, options.policy)
    trials_on = evaluators_of(training_set, options.tolerance, options.trial_recipe, head_cost, options.policy)
    architectures, dropped = find_architectures(trials_on, run, options.space, options.search, options.service, log)
    trainings = evaluators_of(training_set, options.tolerance, options.recipe, head_cost, options.policy)
    log(f"the heads of {len(architectures)} layers are trained in full")
    heads, no_better = train_heads(trainings, architectures, run)
    dropped += no_better
    if not heads:
        raise RecordError(f"no layer has a head that is better than chance: {'; '.join(dropped)}")
    costs = exit_costs(profile, heads, [options.policy] * len(heads), description, options.batch_size)
    predictions = predict(training_set, heads, costs, options.risk, options.policy, truth)
    with replacing(run.predictions) as scratch:
        predictions.save(scratch)
    point = choose(predictions, options)
    plan = replace(make_plan(point, predictions, heads, training_set, description, options, profile),
                   traffic=identity)
    plan = save_plan(run.root, plan, {trained.layer.path: trained.head for trained in heads})
    records = {"train": len(training_set.rows(Part.TRAIN)), "tune": len(predictions.tune),
               "certify": len(predictions.certify)}
    report = make_report(model, records, plan, point, predictions,
                         head_reports(heads, predictions, point, description), (*left_out, *dropped),
                         training_set.skipped, description)
    for path, text in ((run.report_json, json.dumps(report.to_json(), indent=1)), (run.report_text, report.to_text())):
        with replacing(path) as scratch:
            scratch.write_text(text)
    return report


def _training_set(archive: ArchiveLayout, mar: Path | None, backbone: Backbone, identity: str, shards: list[Path],
                  options: TrainingOptions, run: RunPaths, log: Callable[[str], None]) -> tuple[TrainingSet, list[str]]:
    """Return the training set of the run, and a line with the reason for each candidate that is not in it."""
    description = backbone.description
    shards, inputs = _inputs(run, description, identity, shards, options, log)
    if run.training_set.index.exists():  # the shards may have been deleted in the meantime
        training_set = TrainingSet.load(run.training_set)
    else:
        training_set = _collected(archive, mar, backbone, identity, shards, inputs, options, run, log)
    if n_skipped := sum(training_set.skipped.values()):
        _require_enough({part: len(training_set.rows(part)) for part in Part}, training_set.split, options,
                        f". {n_skipped} requests are skipped")
    kept = {layer.path for layer in training_set.layers}
    return training_set, [f"{layer.path}: not recorded, too large for float16, or not one of the {options.layers} "
                          "layers that cover the cost evenly"
                          for layer in description.candidates if layer.path not in kept]


def _collected(archive: ArchiveLayout, mar: Path | None, backbone: Backbone, identity: str, shards: list[Path],
               inputs: Mapping[str, Any], options: TrainingOptions, run: RunPaths,
               log: Callable[[str], None]) -> TrainingSet:
    """Return the training set from the shards that stay until it is complete.

    Workers delete old shards at any time, and their age says nothing about losses, so the others are still evidence.
    """
    while True:
        try:
            return _collect(archive, mar, backbone, identity, shards, inputs, options, run, log)
        except RecordError:
            present = [shard for shard in shards if shard.exists()]
            if not present or len(present) == len(shards):
                raise
            log(f"{len(shards) - len(present)} of {len(shards)} shards were deleted meanwhile, as too old or too many "
                "records are: the run begins again with the others")
            shards, inputs = present, {**inputs, "shards": [str(shard.resolve()) for shard in present]}
            run.training_set.progress.unlink(missing_ok=True)  # it counts the records of all of them


def _collect(archive: ArchiveLayout, mar: Path | None, backbone: Backbone, identity: str, shards: list[Path],
             inputs: Mapping[str, Any], options: TrainingOptions, run: RunPaths,
             log: Callable[[str], None]) -> TrainingSet:
    description = backbone.description
    shards = of_traffic(shards, identity, log)
    if options.replay is None:
        shards = _alike(of_engine(shards, options.engine), log)
    tell_keys(shards, log)
    n_rows = HandlerDescription.load(archive.handler_description).rows_per_request
    if n_rows is not None and n_rows > 1:
        log(f"each request becomes {n_rows} rows of the model's input, and one of them, drawn at random, stands for "
            f"it: the certificate is about rows, and up to {n_rows} times as many requests may have a row that is "
            "answered differently")
    traffic = load_traffic(shards, options.fresh_after, options.split)
    for reason, count in traffic.skipped.items():
        log(f"{count} requests are skipped: {reason}")
    if traffic.ended:
        named = ", ".join(f"{host} ({count})" for host, count in [*traffic.ended.items()][:_NAMED])
        more = f" and {len(traffic.ended) - _NAMED} more" if len(traffic.ended) > _NAMED else ""
        log(f"the records of some hosts end before those of others: {named}{more}. In brackets is how many of the "
            f"{traffic.size(Part.CERTIFY)} requests that certify are theirs. If such a host still serves, the "
            "certificate is not about its later requests: copy its records anew")
    if traffic.split.is_trend:
        log("requests are alike for longer than a tenth of the records: there is a trend, and the certificate "
            "assumes that it continues as in the records that certify")
    _require_written(traffic, options)
    others = _no_evidence(traffic)
    if options.replay is not None:
        traffic = traffic.of_known_requests()
    _require_enough({part: traffic.size(part) for part in Part}, traffic.split, options, others)
    with replacing(run.inputs) as scratch:
        scratch.write_text(json.dumps({**inputs, "archive": mar and str(mar.resolve())}, indent=1))
    if options.replay is None:
        recorded, pool = recorded_layers(shards)
        layers = spread_over([layer for layer in description.candidates if layer.path in recorded], options.layers)
        return prepare(run.training_set, traffic, layers, description.n_classes, pool)
    layers = spread_over(description.candidates, options.layers)
    original = read_manifest(archive.original_manifest)
    with preprocessing(archive.root, original) as handler, \
            tqdm(desc="replay", unit="request", disable=None,
                 total=len(traffic) + options.replay.rounds * traffic.size(Part.TRAIN)) as progress:
        return replay_records(run.training_set, traffic, layers, backbone, handler, options.replay,
                              engine=options.engine, on_batch=progress.update, log=log,
                              most_skipped=options.most_skipped)


def _no_evidence(traffic: RecordedTraffic) -> str:
    """Return the end of a message about the records that belong only to the train part."""
    why = ((traffic.n_anonymous, "their requests are not known; the log of the workers says why"),
           (traffic.n_without_content, "their contents are not known: an earlier version wrote these records, or the "
            "handler received something other than JSON and bytes"))
    told = [f". {n} more records can train heads but prove nothing, because {because}" for n, because in why if n]
    told += [f". {n} more records are not used, because {reason}" for reason in (DRAWN_MORE_OFTEN, NEWER_THAN_OTHERS)
             if (n := traffic.skipped.get(reason))]
    return "".join(told)


def _require_written(traffic: RecordedTraffic, options: TrainingOptions) -> None:
    """Check that few records were dropped beside those that certify: those that were may be of a kind of their own."""
    if traffic.dropped > options.most_skipped:
        raise RecordError(
            f"{traffic.dropped:.1%} of the records of the time of those that certify were dropped, because "
            f"{NOT_WRITTEN}, so the certificate would not be about the busiest times: let workers record to a faster "
            "disk with enough space, or set a lower sampling_rate, and record anew. The log of the workers has the "
            "reason")


def _alike(shards: list[Path], log: Callable[[str], None]) -> list[Path]:
    """Return the shards that can be used together, and log how many records the others hold."""
    alike = of_newest_setting(shards)
    others = [shard for shard in shards if shard not in alike]
    if others:
        log(f"{sum(len(read_times(shard)) for shard in others)} records are skipped: they were recorded with "
            "another early_exit.pool, or at other layers, than the newest ones. With --replay they can be used, if "
            "their requests were kept")
    return alike


def _require_enough(sizes: Mapping[Part, int], split: Split, options: TrainingOptions, others: str) -> None:
    """Check that each part has enough records; the error ends with `others`, a text about records that are not used."""
    if options.thresholds == "certified":
        split.evidence().require_enough(options.risk, options.tolerance, options.delta, Part.CERTIFY.share, others)
    if not all(sizes.values()):
        raise TooFewRecordsError(
            f"{sum(sizes.values())} records are too few to split into "
            f"{', '.join(part.name.lower() for part in Part)}, or have too few distinct contents{others}")


def _require_labels(truth: Tensor | None, training_set: TrainingSet, options: TrainingOptions) -> None:
    if truth is None:
        raise TooFewRecordsError(
            "the risk 'accuracy' compares with true labels: pass --labels FILE with request ids and classes, or choose "
            "--risk disagreement or confidence-gap, which need none")
    to_certify = records_needed(options.tolerance, options.delta) if options.thresholds == "certified" else 1
    for part, least in ((Part.TUNE, 1), (Part.CERTIFY, to_certify)):
        rows = training_set.rows(part)
        n_labelled = int((truth[rows] >= 0).sum())
        if n_labelled < least:
            fresh = "" if options.fresh_after is None else ", recorded since the last certificate,"
            raise TooFewRecordsError(
                f"{n_labelled} of the {len(rows)} records of the {part.name.lower()} part have a label, but the risk "
                f"'accuracy' needs at least {least} there: label about {round((least - n_labelled) / part.share)} "
                f"more requests{fresh} drawn at random, of which {part.share:.0%} belong to that part. No plan was "
                "written")
    if options.thresholds == "certified":
        training_set.split.evidence(truth >= 0).require_enough(
            options.risk, options.tolerance, options.delta, Part.CERTIFY.share,
            ". With the risk 'accuracy' only requests with a label count")


def _inputs(run: RunPaths, backbone: BackboneDescription, traffic: str, shards: list[Path], options: TrainingOptions,
            log: Callable[[str], None]) -> tuple[list[Path], dict[str, Any]]:
    """Return the shards to use and the content of run.json. A run that is continued keeps the shards of its start.

    Raises:
        RecordError: the folder holds a run of another backbone, of other traffic or with other options.
    """
    asked: dict[str, Any] = json.loads(json.dumps({"backbone": backbone.sha256, "traffic": traffic,
                                                   "options": options.to_json()}))
    present = [str(shard.resolve()) for shard in shards]
    if not run.inputs.exists():
        return shards, {**asked, "shards": present}
    started: dict[str, Any] = json.loads(run.inputs.read_text())
    if {key: started.get(key) for key in asked} != asked:
        raise RecordError(f"{run.root} holds a run of another backbone, of other traffic or with other options: pass "
                          "another --to, or delete it")
    if started["shards"] != present:
        log(f"{run.root} continues with the {len(started['shards'])} shards it was started with, although there are "
            f"{len(present)} now: pass another --to to use them all")
    return [Path(shard) for shard in started["shards"]], started


def _profile(run: RunPaths, archive: ArchiveLayout, backbone: Backbone, layers: Sequence[CandidateLayer],
             options: TrainingOptions) -> Profile | None:
    """Return the measured times of the backbone's stages; None if the run minimises FLOPs."""
    if options.measure == "flops":
        return None
    if not run.profile.exists():
        device = options.measure_device
        here = backbone if device == "cpu" else load_backbone(archive.folder, device)
        profile = profile_backbone(here, layers, engine=options.engine, device=device)
        with replacing(run.profile) as scratch:
            scratch.write_text(json.dumps(asdict(profile), indent=1))
    return Profile.load(run.profile)

