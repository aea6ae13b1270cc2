"""The figures of the page that other documents quote.

A quote is a text as it stands in a document, with figures in braces: the name of the result file, the path to the
figure, and its format, as in `{loop[flops_ratio]:.2f}`. In a list of rows, the path selects a row by its values, as in
`{paper[rows][backbone=ResNet-18,method=certified][disagreement]:.1 %}`, where a share becomes a percentage. In a list
of numbers or lines, the path gives the index; a list of lines without an index is quoted whole. The instructions of the
processor become "with" or "without" those for 8-bit products (`{int8[run][instructions]:8-bit}`) or for bfloat16. If a
paragraph of such a document links to the page, the paragraph and the table below it may contain no other figures than
those of quotes; in the README, this is true of all paragraphs. Numbers that are no results must be in the text of a
quote.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from string import Formatter
from typing import Any

from tests.benchmarks.page.markdown import percent, ratio
from tests.benchmarks.published import BATCH, PUBLISHED


def _row_of(title: str, arm: str) -> str:
    """Return a row of the README's table: what an arm loses, and what it costs as a share of the original."""
    figures = ("accuracy_loss]:.1 %", "disagreement]:.1 %", "flops_ratio]:.2f",
               *(f"cpu_time_ratio][{size}]:.2f" for size in (1, 8, 32)))
    loss, differs, flops, *times = (f"{{int8[rows][arm={arm}][{figure}}}" for figure in figures)
    return f"| {title} | {loss} | {differs} | {flops} | {' / '.join(times)} |"


def _row_of_paper(model: str) -> str:
    """Return the row of the README's table with the figures that the paper reports."""
    told = PUBLISHED[model]
    before, after = told.flops
    return (f"| the paper's exits, on its {told.model} | {percent(told.accuracy_loss)} | not reported | "
            f"{ratio(after / before)} | {ratio(1 - told.cpu_saved)} at {BATCH} |")


def _ms(part: str, clients: int, mode: str, quantile: str = "p50") -> str:
    """Return a quantile of the latency, by default the median, in a part of the benchmark of early answers."""
    return f"{{answers[rows][part={part},load={clients} clients,mode={mode}][{quantile}_ms]:.0f}}"


QUOTES: dict[str, tuple[str, ...]] = {
    "README.md": (
        "These figures were measured once on two cores of a processor {int8[run][instructions]:8-bit} instructions for "
        "8-bit products, and are compared with the original model.",
        _row_of("this plugin without exits", "folded"),
        _row_of("with exits, certified at 2 %", "folded with exits"),
        _row_of("8-bit weights alone", "openvino-int8"),
        _row_of("8-bit weights with exits, certified at 2 %", "openvino-int8 with exits"),
        _row_of_paper("ResNet-18"),
        "A certificate with 95 % confidence may be false. Of the {certificates[n]} certificates on the page of "
        "[benchmarks](docs/benchmarks.md), {certificates[broken]} did not hold on the requests that were measured, by "
        "at most {certificates[excess_points]:.1f} percentage points.",
        "a small ResNet-18 takes {overhead[resnet18w32_32px][recording_ratio][1]:.2f} times its CPU time for single "
        "requests, and {overhead[resnet18w32_32px][recording_ratio][8]:.2f} times in batches of 8",
        "Python 3.10 to 3.13", "Python >= 3.10", "TorchServe 0.12", "torch >= 2.9",
        "early_exit_torchserve-0.2.0-py3-none-any.whl",
        "{loop[told][0]} {loop[told][-1]}"),
    "docs/loop.md": ("{loop[told]}",),
    "docs/engines.md": (
        "reaches {engine[share_of_ideal][folded][8]:.0 %} of the ideal saving with `folded` and "
        "{engine[share_of_ideal][openvino][8]:.0 %} with `openvino`",
        "on a processor {engine[run][instructions]:8-bit} instructions for 8-bit products and "
        "{engine[run][instructions]:bfloat16} instructions for bfloat16: `openvino` takes "
        "{engine[cells][batch=8,engine=openvino,exits=none][ratio_to_eager]:.2f} of its time, `bfloat16` "
        "{engine[cells][batch=8,engine=bfloat16,exits=none][ratio_to_eager]:.2f} and `openvino-int8` "
        "{engine[cells][batch=8,engine=openvino-int8,exits=none][ratio_to_eager]:.2f}",
        "with exits it takes "
        "{engine[cells][batch=8,engine=openvino-int8,exits=10/60/12][ratio_to_same_engine]:.2f} of its time without "
        "cuts"),
    "docs/modes.md": (
        f"With one client, the median answer of a ResNet-50 at 224 px takes {_ms('a', 1, 'plain')} ms without exits, "
        f"{_ms('a', 1, 'batched')} ms with exits, and {_ms('a', 1, 'early')} ms with early answers; with 32 clients, "
        f"{_ms('a', 32, 'plain')}, {_ms('a', 32, 'batched')} and {_ms('a', 32, 'early')} ms. For a small ResNet-18 "
        f"with 32 clients, it is {_ms('b', 32, 'plain')}, {_ms('b', 32, 'batched')} and {_ms('b', 32, 'early')} ms. "
        f"Slow answers are slower still: with 8 clients, 95 % of the ResNet-50's answers come within "
        f"{_ms('a', 8, 'batched', 'p95')} ms with exits and {_ms('a', 8, 'early', 'p95')} ms with early answers.",),
    "docs/operate.md": (
        "a small ResNet-18 takes {overhead[resnet18w32_32px][recording_ratio][1]:.2f} times the CPU time if every "
        "request is recorded, and a ResNet-50 at 224 px {overhead[resnet50_224px][recording_ratio][1]:.2f} times; in "
        "batches of 8 they take {overhead[resnet18w32_32px][recording_ratio][8]:.2f} and "
        "{overhead[resnet50_224px][recording_ratio][8]:.2f} times",),
    "docs/guarantee.md": (
        "In {certify[n]} splits of CIFAR-10 for each of two networks, and for tolerances of 1 and 2 %, each rule is "
        "judged on a pool of 5,000 requests. The certified rules tune with 1,000 others and certify with 1,500 that "
        "are drawn from this pool; the other rules choose with 2,500 that are drawn from it. In the worst of these "
        "four cases, the certificate was false in {certify[certified_broken_share]:.1 %} of the splits (exact 95 % "
        "interval {certify[certified_broken_interval][0]:.1 %} to {certify[certified_broken_interval][1]:.1 %}), with "
        "`--risk confidence-gap` in {certify[certified-confidence-gap_broken_share]:.1 %}, and with `--risk accuracy` "
        "in {certify[certified-accuracy_broken_share]:.1 %}; 5 % are allowed. The paper's rule broke its budget in "
        "{certify[paper_broken_share]:.0 %}, and equal budgets broke theirs in {certify[equal_broken_share]:.0 %}. The "
        "rule of the baseline earlyon, on our heads, lost more accuracy than asked in "
        "{certify[earlyon_broken_share]:.0 %}.",
        "Of 400 plans for each kind of traffic, at 2 % and with 95 % confidence, the certificate was false for "
        "{dependence[streams][name=independent][broken_share]:.1 %} where requests are independent, for "
        "{dependence[streams][name=scenes of 20][broken_share]:.1 %} and {dependence[streams][name=scenes of "
        "60][broken_share]:.1 %} where scenes have 20 and 60 frames, for {dependence[streams][name=repeated "
        "files][broken_share]:.1 %} where files come again and again, for "
        "{dependence[streams][name=bursts][broken_share]:.1 %} with bursts of one client, and for "
        "{dependence[streams][name=slow change][broken_share]:.1 %} under slow change; 5 % are allowed. Where "
        "fifty files are followed by others, {dependence[streams][name=50 files, then others][refused_share]:.0 "
        "%} of the plans were refused.",
        "The monitor raised a false alarm for {dependence[streams][name=independent][false_alarm_share]:.1 %} of "
        "the true plans on independent traffic, and for {dependence[streams][name=scenes of "
        "60][false_alarm_share]:.1 %} with scenes of 60 frames. It noticed three times the tolerance after "
        "{dependence[median_samples_to_alarm]:.0f} shadow samples (median).",
        "After 500 quiet shadow samples {drift[mixed]} makes the true disagreement three times the tolerance: the "
        "alarm takes {drift[median_samples_to_alarm]:.0f} shadow samples (median), and "
        "{drift[false_alarm_share]:.1 %} of {drift[streams]} clean streams of 3,000 samples raise one."),
}
"""The quotes of each document."""
_INSTRUCTIONS = {"8-bit": {"avx512_vnni", "avx_vnni", "amx_int8", "i8mm"},
                 "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"}}
"""The instruction sets with which a processor computes products of a type faster than those of float32."""
_LINK = "benchmarks.md"
_FIGURE = re.compile(r"\d+\.\d+|\d+ ?%")


class _Figures(Formatter):
    """A formatter that puts figures of results into a text."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        name, *way = re.findall(r"[^][]+", field_name)
        found: Any = kwargs[name]
        for step in way:
            found = _at(found, step)
        return found, name

    def format_field(self, value: Any, format_spec: str) -> str:
        if format_spec.endswith(" %"):
            return percent(value, int(format_spec.strip(". %")))
        if format_spec in _INSTRUCTIONS:
            return "with" if _INSTRUCTIONS[format_spec] & {*value} else "without"
        if isinstance(value, list):
            return " ".join(value)
        text: str = super().format_field(value, format_spec)
        return text


def _at(found: Any, step: str) -> Any:
    """Follow one step of a path in an object, a list of numbers or lines, or a list of rows; return what is there."""
    if isinstance(found, dict):
        return found[step]
    return found[int(step)] if re.fullmatch(r"-?\d+", step) else _only_row(found, step)


def _only_row(rows: Sequence[Mapping[str, Any]], step: str) -> Mapping[str, Any]:
    """Return the only row with the values that a step of a path names.

    >>> _only_row([{"batch": 1}, {"batch": 8, "ratio": 0.7}], "batch=8")["ratio"]
    0.7
    """
    wanted = dict(pair.split("=", 1) for pair in re.split(r",(?=\w+=)", step))
    found = [row for row in rows if all(str(row.get(name)) == value for name, value in wanted.items())]
    if len(found) != 1:
        raise ValueError(f"expected one row with {step}, found {len(found)}")
    return found[0]


def misquoted(document: str, quotes: Sequence[str], results: Mapping[str, Mapping[str, Any]], *,
              everywhere: bool = False) -> list[str]:
    """Return where a document contradicts the results: quotes that it lacks, and figures that are in no quote.

    Args:
        document: the text of the document.
        quotes: the quotes that it should contain; the module's docstring explains them.
        results: the contents of the result files by name.
        everywhere: whether to look for figures in every paragraph, and not only in those that link to the page.
    """
    told = [one_line(_Figures().vformat(quote, (), results)) for quote in quotes]
    text = one_line(document)
    wrong = [f"it does not say: {quote}" for quote in told if quote not in text]
    for paragraph in paragraphs_with("" if everywhere else _LINK, document):
        rest = one_line(paragraph)
        for quote in told:
            rest = rest.replace(quote, " ")
        wrong += [f"it quotes {figure}, which no quote vouches for, in: {rest[:80]}"
                  for figure in _FIGURE.findall(rest)]
    return wrong


def paragraphs_with(link: str, text: str) -> Iterator[str]:
    """Yield the paragraphs that contain a link, each with the table that follows it. Code blocks are skipped."""
    parts = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).split("\n\n")
    for part, following in zip(parts, [*parts[1:], ""]):
        if link in part:
            yield f"{part}\n\n{following}" if following.lstrip().startswith("|") else part


def one_line(text: str) -> str:
    return " ".join(text.split())
