"""The page of all benchmarks. It is made from the result files, so each table shows a single run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.page import certificates, sections
from tests.benchmarks.page.markdown import any_figures, in_words
from tests.benchmarks.page.river import river_of

ROOT = Path(__file__).parents[3]
RESULTS, PAGE, PICTURE = ROOT / "docs" / "results", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "river.svg"
INTRODUCTION = """\
# Benchmarks

`python -m tests.benchmarks.page` writes this page from the files of `docs/results`, which `make bench` writes: change
those, not this. Each table comes from one run, on the machine and with the settings that stand above it; different
tables may come from different machines. Shares and losses are numbers between 0 and 1 unless they have a % sign.

A ratio below 1 is a saving. Three baselines occur, and each table says which one it means: the user's *original* model,
as it was before anything was folded or fused; *ours without exits*, which shows what the exits do by themselves; and
the *plain backbone* on the same engine, which is not cut into stages. CPU times of models are those of one thread, all
arms in turns, with the server's allocator. They repeat to about 0.03: plans without an exit measured 0.99 to 1.02.
What is recorded and what is measured are never made from the same picture, except in the two sections on the
certificate, which draw both from one known population.
"""


@dataclass(frozen=True)
class Section:
    """The title, text and tables of one benchmark on the page."""

    title: str
    command: str
    about: str
    """What a reader needs to know beside the table."""
    tables: Callable[[Mapping[str, Any]], Iterator[str]] = any_figures
    parts: tuple[str, ...] = ()
    """What a result file of its own is due for, NAME-PART.json, if a single file is not enough."""


NETWORKS = ("resnet18-full", "resnet50", "resnet56", "efficientnet", "vit", "mobilefacenet", "dlrm", "mask-rcnn")
"""The networks of the section on the paper's networks, as the command names them."""
SECTIONS = {
    "demo": Section("The demo", "tests.demo", "Scikit-learn's digits through a real TorchServe. Each part of the "
                    "records shows digits of its own, and what is measured others again. Records that choose and "
                    "certify show each digit once, so each is evidence of its own.",
                    sections.loop),
    "loop": Section("The loop", "tests.benchmarks.loop", "ResNet-18 (width 32) on the CIFAR-10 test JPEGs through a "
                    "real TorchServe: half of them recorded, the other half measured. Both of ours record 5 % of the "
                    "requests.", sections.loop),
    "int8": Section("Exits and 8-bit weights", "tests.benchmarks.int8", "The paper's ResNet-18 on CIFAR-10: half of "
                    "the images recorded, the other half measured, compared with the original model as it was "
                    "exported. Exits are certified on each engine and have default heads; 5 % of their requests run "
                    "to the end.",
                    sections.int8),
    "paper": Section("The paper's networks", "tests.benchmarks.paper", "Rows are measured on requests that nothing was "
                     "chosen with, against the plain backbone. *Certified* rows promise their budget; the other "
                     "methods are given it. All had the same records and shrink batches alike. Unlike the tables "
                     "above, these leave out the shadow sample, which a version with exits runs to the end, 5 % by "
                     "default. "
                     "The faces, the "
                     "digits of the ViT and the scenes of the Mask R-CNN, which is trained here, are varied from few "
                     "pictures: a certificate that counts each variant as evidence is too optimistic. The "
                     "EfficientNet has 600 recorded photos of 1,000 classes, from which no head learns enough to be "
                     "certified, so no request leaves early. All rows of a network, and all networks on CIFAR-10, "
                     "are certified with the same records, so luck with these records helps or hurts all of them: "
                     "their certificates hold or fail together. Of both CIFAR sets, the records that certify happen "
                     "to be easier than those that are measured: the originals are right on 1 to 2 % more of them. "
                     "[The certificate](#the-certificate) draws records anew and counts how often it is false.",
                     sections.paper, NETWORKS),
    "methods": Section("The methods", "tests.benchmarks.paper", "As above, with every method, budget and number of "
                       "layers on one network. The baselines learn from labels, and have the default head and replays "
                       "of one class each; `no-nas` is ours with the default head.", sections.paper),
    "engine": Section("Engines", "tests.benchmarks.engine", "ResNet-50 at 224 px; which rows leave is scripted, 10, 60 "
                      "and 12 % after layers 1 to 3, and their numbers vary from batch to batch. The ideal is "
                      "the cost of the stages up to each row's exit, at the speed of full batches.", sections.engine),
    "overhead": Section("Overhead and recording", "tests.benchmarks.overhead", "Recording is timed over whole shards, "
                        "until they are written.", sections.overhead),
    "answers": Section("When answers leave", "tests.benchmarks.answers", "(a) ResNet-50 at 224 px with scripted "
                       "exits, (b) ResNet-18 (width 32) with a certified plan, through TorchServe. `plain` is ours "
                       "without exits. The rate of the Poisson load is 70 % of what `plain` answers with 8 "
                       "clients.", sections.answers),
    "certify": Section("The certificate", "tests.benchmarks.certify", "The section counts how often the loss of a "
                       "rule exceeds the budget for which the rule chose its thresholds. Each of n splits draws the "
                       "requests with which a rule chooses from a pool of 5,000; its loss is then that on the whole "
                       "pool. The broken share is the share of the splits whose loss exceeds the budget, with its "
                       "exact 95 % interval. The first table shows the worst network and budget of each rule. The "
                       "promise is the loss that a rule bounds, and the columns mean and worst are over the splits."),
    "dependence": Section("Requests that are alike", "tests.benchmarks.dependence", "The section counts how often the "
                          "certificate is false where requests depend on each other. From each kind of traffic "
                          "records are drawn again and again; each time a plan is chosen and certified at 2 % with 95 "
                          "% confidence. It is refused if nothing is certified or fewer than 5 % leave, and broken if "
                          "more than 2 % of the requests, or of the new contents, that could follow are answered "
                          "differently. The monitor watches the plans that hold, so that each of its alarms is a "
                          "false alarm. A low end is that of the 95 % interval of the share before it. The saving is "
                          "that of FLOPs; beside it stands the saving of the rule for independent requests. Traffic "
                          "that may be refused has too few blocks of its own to certify anything."),
    "drift": Section("Drift", "tests.benchmarks.drift", "The section tells how soon the monitor raises an alarm, and "
                     "how often a false one. Streams of shadow samples are drawn from answered requests, clean ones "
                     "at first and then drifted ones. The strength is the radius of a blur in pixels, the standard "
                     "deviation of noise, or the share by which contrast falls. Medians are over the streams; steps "
                     "are fallback levels. Disagreement by step is that of the drifted traffic at each fallback "
                     "level. *Mixed* traffic has just so many drifted requests that the disagreement is three times "
                     "the tolerance."),
    "recovery": Section("Recovery", "tests.benchmarks.recovery", "The runs go from a drift to a new certified plan, "
                        "on a server with its watcher. Every run is listed, also those that did not end with a new "
                        "plan. Where the first plan stays within the tolerance on drifted traffic, no alarm is due. "
                        "Disagreement by step is that of the drifted traffic at each fallback level; n and k of the "
                        "new plan are the records that certify it, and how many of them differed."),
    "search": Section("The search for heads", "tests.benchmarks.search", "The figures are the time of a search, what "
                      "is lost when it is killed halfway and started again, and the largest memory of a training on "
                      "many records, in MB. Trials that are clearly worse than others are stopped early."),
    "roll": Section("Rolls", "tests.benchmarks.roll", "Eight clients send digits without a pause while versions with "
                    "exits are rolled in, and some are rolled back. Both cores are busy, and each new worker takes one "
                    "of them while it starts. Quiet times are those before the first roll. A request fails if its "
                    "status is not 200, and is lost if it gets no answer.", sections.rolls),
    "coverage": Section("Models", "tests.benchmarks.coverage", "Classifiers of libraries, with random weights: those "
                        "of torchvision, fifty architectures of timm, and sequence and image classifiers of "
                        "transformers (hf). A model is ok if it is exported without code of its own, has two candidate "
                        "layers, its stages give its own scores to 1e-4, and its probe notices overwritten weights.",
                        sections.coverage),
    "habits": Section("Handlers", "tests.benchmarks.habits", "What clients notice of a repackaged handler."),
    "fuzz": Section("Malformed requests", "tests.benchmarks.fuzz", "Good requests among malformed ones: how many were "
                    "answered wrongly, by kind and status, and how much the memory of the worker grew, in MB."),
    "gpu": Section("GPU", "tests.benchmarks.gpu", "ResNets at 224 px are compared with the plain backbone in CUDA "
                   "graphs."),
}
"""Keys are the names of result files. One benchmark may have several files, NAME-PART.json."""


def read_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return the contents of the result files by name.

    Raises:
        ValueError: a file belongs to no benchmark that the page knows, does not say which run it comes from, or was
            measured with code that is in no commit, so that nobody can repeat it.
    """
    found = {}
    for file in sorted(folder.glob("*.json")):
        if _section(file.stem) not in SECTIONS:
            raise ValueError(f"{file.name} is the result of no benchmark; expected one of {', '.join(SECTIONS)}")
        found[file.stem] = json.loads(file.read_text())
        if "run" not in found[file.stem]:
            raise ValueError(f"{file.name} does not say what run it comes from")
        if not (commit := found[file.stem]["run"]["commit"]) or commit.endswith("+"):
            raise ValueError(f"{file.name} was measured with code that is in no commit (commit: {commit}); commit the "
                             "code and measure again")
    return found


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page for the results of some benchmarks."""
    parts = [INTRODUCTION, certificates.in_words(results)]
    for name, section in SECTIONS.items():
        runs = [result for stem, result in sorted(results.items()) if _section(stem) == name]
        if runs:
            parts += [f"## {section.title}", section.about]
        for result in runs:
            figures = {key: value for key, value in result.items() if key != "run"}
            parts += [told(section, result["run"]), *section.tables(figures)]
    missing = [f"- {section.title}{f', {part}' if part else ''}: `python -m {section.command}`"
               for name, section in SECTIONS.items() for part in section.parts or ("",)
               if (f"{name}-{part}" if part else name) not in results]
    if missing:
        parts += ["## Not measured", "There is no result yet of:", "\n".join(missing)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _section(stem: str) -> str:
    """Return the section of a result file.

    >>> _section("paper-resnet50")
    'paper'
    """
    return stem.partition("-")[0]


def picture(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the README's picture, which shows where the requests left the network."""
    return river_of(results["int8"], "ResNet-18 on CIFAR-10")


def told(section: Section, run: Mapping[str, Any]) -> str:
    """Return a sentence about the code, the machine and the settings of a run."""
    settings = ", ".join(f"{name.replace('_', ' ')} {in_words(value)}" for name, value in run["settings"].items())
    gpu = f", {run['gpu']}" if run["gpu"] else ""
    return (f"`python -m {section.command}`, {run['date'][:10]}, commit {run['commit']}, {run['seconds']} s; "
            f"{run['processor']} ({', '.join(run['instructions'])}){gpu}, {run['cores']} cores, load "
            f"{run['load_before']} before; torch {run['torch']}, {run['threads']} threads, Python {run['python']}. "
            f"Settings: {settings or 'none'}.")
