"""The report of a run as one HTML file that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from itertools import chain

from early_exit.training.report import chart
from early_exit.training.report.chart import Axis, Limit, Series
from early_exit.training.report.evaluate import Evaluation
from early_exit.training.report.performance import Curve, Performance
from early_exit.training.report.summary import RunReport, guarantee

_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#57606a;--line:#c9ced4;--panel:#f4f6f8;
--s0:#0068a8;--s1:#b85000;--s2:#00775a}
@media (prefers-color-scheme:dark){:root{--paper:#14171a;--ink:#e4e7ea;--soft:#a0a8b0;--line:#434a52;--panel:#1e2328;
--s0:#62b5ee;--s1:#f0a050;--s2:#4cc9a0}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:72rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:.5rem 0}
h2{font-size:1.15rem;margin:2.2rem 0 .5rem}
p{max-width:46rem;margin:.5rem 0}
small,.note{color:var(--soft)}
.promise{border-left:4px solid var(--s0);background:var(--panel);padding:.6rem .9rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));gap:.6rem;margin:1rem 0;padding:0}
.cards div{background:var(--panel);padding:.5rem .8rem;display:flex;flex-direction:column-reverse;
justify-content:flex-end}
.cards dt{font-size:.8rem;color:var(--soft)}
.cards dd{margin:0;font-size:1.35rem;font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:1.2rem}
.wide{max-width:30rem}
figure{margin:0}
figcaption{font-weight:600;font-size:.9rem;overflow-wrap:anywhere}
.table{overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);padding:.2rem 0}
th,td{padding:.25rem .7rem .25rem 0;text-align:right;border-bottom:1px solid var(--line);vertical-align:bottom}
th{font-weight:600}
thead th{min-width:4.5rem}
tbody th{font-weight:400}
tbody th,td{white-space:nowrap}
th:first-child,.words{text-align:left}
td.words{white-space:normal;min-width:9rem}
details{margin:.6rem 0}
summary{cursor:pointer;color:var(--soft)}
""" + chart.STYLE
_TABLE_THRESHOLDS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
_FIGURES: dict[str, Callable[[Performance], float | None]] = {
    "hits": lambda at: at.hit_rate, "agreement": lambda at: at.agreement, "accuracy": lambda at: at.accuracy,
    "effect": lambda at: at.effect, "bound": lambda at: at.bound}
_LABELLED = ("accuracy", "effect")


def html_page(evaluation: Evaluation) -> str:
    """Return the page."""
    run = evaluation.summary
    sections = [_head(evaluation), _exits(run), _categories(run), _frontier(evaluation), _curves(evaluation),
                _resources(evaluation), _latencies(evaluation), _heads(run), _asked(evaluation)]
    title = escape(f"Early exits for {run.model}")
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width,initial-scale=1"><title>{title}</title><style>{_STYLE}</style></head>\n'
            f"<body><main><h1>{title}</h1>\n{''.join(sections)}</main></body></html>\n")


def _head(evaluation: Evaluation) -> str:
    run = evaluation.summary
    deployed, accuracy = run.deployed, run.deployed.accuracy
    cards = [("exits", str(len(run.exits))), (f"{_cost(run)}, relative to the backbone", f"{deployed.cost:.2f}")]
    if run.plan.measure != "flops":
        cards.append(("FLOPs, relative to the backbone", f"{deployed.flops:.2f}"))
    memory = evaluation.with_exits.ltma_bytes / evaluation.plain.ltma_bytes
    cards.append(("live tensor memory, relative to the backbone", f"{memory:.2f}"))
    cards.append(("answers that differ", _share(deployed.disagreement)))
    if accuracy is not None:
        cards.append((f"accuracy; the backbone's is {_share(accuracy.backbone)}", _share(accuracy.served)))
    records = ", ".join(f"{count} {name}" for name, count in run.records.items())
    return (f'<p class="note">backbone {run.plan.backbone[:12]} · records: {records}. Hit rates, agreement, accuracy '
            "and costs below are those on the <em>certify</em> records, which no choice has used.</p>"
            f'<p class="promise">{escape(guarantee(run.plan))}</p><dl class="cards">'
            + "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in cards) + "</dl>\n")


def _exits(run: RunReport) -> str:
    if not run.exits:
        return _section("Exits", "<p>No exit saves anything within the tolerance: every request is answered "
                        "in full.</p>")
    full = 1 - sum(exit.together.hit_rate for exit in run.exits)
    bars = [(exit.layer, exit.together.hit_rate, _share(exit.together.hit_rate)) for exit in run.exits]
    bars.append(("full backbone", full, _share(full)))
    names = [name for name in _FIGURES if run.deployed.accuracy or name not in _LABELLED]
    header = ["layer", "cost", "confidence ≥", *chain.from_iterable((name, f"{name} alone") for name in names)]
    rows = [[exit.layer, f"{exit.cost:.2f}", f"{exit.threshold:.4f}", *chain.from_iterable(
        (_share(_FIGURES[name](exit.together)), _share(_FIGURES[name](exit.alone))) for name in names)]
        for exit in run.exits]
    words = ("<p>A request leaves at the first exit that is confident enough. Each figure is given for the exit after "
             "the exits before it, and for the exit alone. <em>Cost</em> is the share of the backbone's FLOPs before "
             "the exit; <em>agreement</em> is with the backbone; <em>effect</em> is the change of the accuracy on all "
             "requests, and no exit can lower it by more than the <em>bound</em>, hits (1 - agreement).</p>")
    leaves = ", ".join(f"{share} at {name}" for name, _, share in bars)
    return _section("Exits", f'<div class="wide">{chart.bar_chart("leave", "Where requests leave", leaves, bars)}</div>'
                    + words + _table("Exits on the certify records", header, rows))


def _categories(run: RunReport) -> str:
    rows = []
    for exit in run.exits:
        for name, performance in (("", exit.together), (", alone", exit.alone)):
            counts = performance.categories
            if counts is not None:
                numbers = (counts.both_right, counts.same_mistake, counts.only_backbone, counts.only_exit,
                           counts.other_mistake)
                rows.append([exit.layer + name, str(counts.total), *(
                    f"{number} ({number / counts.total:.1%})" if counts.total else "0" for number in numbers)])
    if not rows:
        return ""
    header = ["exit", "labelled hits", "BC: both right", "¬(BC): same mistake", "B¬C: only the backbone right",
              "¬BC: only the exit right", "¬B¬C: different mistakes"]
    return _section("Who is right", "<p>In B, the backbone is right; in C, the exit is. Only B¬C costs accuracy; ¬BC "
                    "gains accuracy.</p>" + _table("Answers of exits with a known label, by category", header, rows))


def _frontier(evaluation: Evaluation) -> str:
    run, path, tolerance = evaluation.summary, evaluation.frontier, float(evaluation.asked["tolerance"])
    deployed = run.deployed
    # Points far beyond the tolerance would press the others into a corner.
    shown = [point for point in path if point.loss <= 4 * tolerance]
    series = [Series(_cost(run), [(point.cost, point.loss) for point in shown], (deployed.cost, deployed.loss))]
    if run.plan.measure != "flops":
        series.append(Series("FLOPs", [(point.flops, point.loss) for point in shown],
                             (deployed.flops, deployed.loss)))
    costs = [deployed.cost, deployed.flops, 1.0, *(cost for line in series for cost, _ in line.points)]
    losses = [0.0, 1.25 * tolerance, *(point.loss for point in shown)]
    loss = f"mean loss ({evaluation.asked['risk']})"
    summary = (f"From {path[0].loss:.2%} at cost {path[0].cost:.2f} to {path[-1].loss:.2%} at cost "
               f"{path[-1].cost:.2f}; deployed {deployed.loss:.2%} at {_cost(run)} {deployed.cost:.2f} and FLOPs "
               f"{deployed.flops:.2f}; tolerance {tolerance:.2%}.")
    figure = chart.line_chart(
        "frontier", f"{loss.capitalize()} against cost", summary,
        Axis("cost of a request, relative to the backbone", min(costs) - 0.02, max(costs) + 0.02),
        Axis(loss, min(losses), max(losses)), series, [Limit(f"tolerance {100 * tolerance:.6g}%", y=tolerance)])
    header = ["first threshold", _cost(run), "FLOPs", "answers that differ", "mean loss", "accuracy"]
    rows = [[f"{point.thresholds[0]:.4f}" if point.thresholds and point.thresholds[0] <= 1 else "never",
             f"{point.cost:.3f}", f"{point.flops:.3f}", _share(point.disagreement), _share(point.loss),
             _share(point.accuracy.served if point.accuracy else None)] for point in path[::4]]
    return _section("What more risk would save", "<p>The exits of the plan with ever lower confidence thresholds. The "
                    f'circles mark the deployed setting.</p><div class="wide">{figure}</div>'
                    + _folded("the settings as a table", _table("Every fourth setting", header, rows)))


def _curves(evaluation: Evaluation) -> str:
    thresholds = {exit.layer: exit.threshold for exit in evaluation.summary.exits}
    figures, rows = [], []
    for number, curve in enumerate(evaluation.curves):
        series = [Series("hit rate", list(zip(curve.thresholds, curve.hit_rate))),
                  Series("agreement", list(zip(curve.thresholds, curve.agreement)))]
        if any(value is not None for value in curve.accuracy):
            series.append(Series("accuracy", list(zip(curve.thresholds, curve.accuracy))))
        deployed = thresholds.get(curve.layer)
        first = f"Without a threshold, {_share(curve.agreement[0])} of the answers agree with the backbone"
        title = curve.layer + ("" if deployed is not None else " (no exit)")
        figures.append(chart.line_chart(f"curve{number}", title, first, Axis("confidence threshold", 0, 1),
                                        Axis("share", 0, 1), series,
                                        [Limit("deployed", x=deployed)] if deployed is not None else []))
        rows += _curve_rows(curve)
    header = ["layer", "threshold", "hit rate", "agreement", "accuracy"]
    return _section("Each head alone, at every threshold", f'<div class="charts">{"".join(figures)}</div>'
                    + _folded("the curves as a table", _table("Heads alone by threshold", header, rows)))


def _curve_rows(curve: Curve) -> list[list[str]]:
    return [[curve.layer, f"{curve.thresholds[index]:.2f}", _share(curve.hit_rate[index]),
             _share(curve.agreement[index]), _share(curve.accuracy[index])]
            for index in (curve.thresholds.index(threshold) for threshold in _TABLE_THRESHOLDS)]


def _resources(evaluation: Evaluation) -> str:
    rows = []
    for name, field, unit in (("FLOPs of a request", "flops", " M"),
                              ("live tensor memory of a request", "ltma_bytes", " MB"),
                              ("parameters", "parameters", " M"), ("model size", "size_bytes", " MB")):
        plain, exits = getattr(evaluation.plain, field), getattr(evaluation.with_exits, field)
        rows.append([name, f"{plain / 1e6:.3f}{unit}", f"{exits / 1e6:.3f}{unit}", f"{exits / plain:.3f}"])
    return _section("Computation and memory", _table("Means over the certify records", [
        "", "backbone", "with exits", "ratio"], rows) + '<p class="note">Live tensor memory is the sum of all tensors '
        "that are allocated from the input to the answer of a request that is served alone.</p>")


def _latencies(evaluation: Evaluation) -> str:
    rows = [[latency.device, str(latency.batch_size), f"{latency.plain_ms:.3f}", f"{latency.exits_ms:.3f}",
             f"{latency.ratio:.3f}", str(latency.repeats)] for latency in evaluation.latencies]
    bars = [(f"{latency.device}, batch {latency.batch_size}", latency.ratio, f"{latency.ratio:.2f}")
            for latency in evaluation.latencies]
    summary = ", ".join(f"{words} on {name}" for name, _, words in bars)
    figure = chart.bar_chart("time", "Time with exits, relative to the backbone (line: 1)", summary, bars, limit=1.0)
    return _section("Latency", f'<div class="wide">{figure}</div>' + _table(
        "Mean time of a batch; the two models take turns, with one thread on a CPU",
        ["device", "batch", "backbone ms", "with exits ms", "ratio", "repeats"], rows)
        + '<p class="note">Rows leave at the exits of recorded requests, which are drawn at random for each '
        "batch.</p>")


def _heads(run: RunReport) -> str:
    rows = [[head.layer, head.architecture, _share(head.agreement), f"{head.flops_ratio:.4f}", str(head.n_trials),
             "exit" if head.used else "dropped: not in the subset that costs least"] for head in run.heads]
    left_out = "".join(f"<li>{escape(reason)}</li>" for reason in run.left_out)
    skipped = "".join(f"<li>{count}: {escape(reason)}</li>" for reason, count in run.skipped.items())
    return _section("Heads, and what was dropped", _table(
        "Trained heads; agreement on the tune records",
        ["layer", "architecture", "agreement", "FLOPs, relative to the backbone", "trials", "outcome"], rows,
        words=(1, 5))
        + (f"<p>Candidates without a head:</p><ul>{left_out}</ul>" if left_out else "")
        + (f"<p>Requests that were skipped:</p><ul>{skipped}</ul>" if skipped else ""))


def _asked(evaluation: Evaluation) -> str:
    asked = evaluation.asked
    plain = {name: value for name, value in asked.items() if not isinstance(value, dict)}
    rows, more = ([[name, value if isinstance(value, str) else json.dumps(value)] for name, value in options.items()]
                  for options in (plain, {name: asked[name] for name in asked if name not in plain}))
    header = ["option", "value"]
    return _section("Options of the run", _table("Options", header, rows, words=(1,)) + _folded(
        "search, heads and training", _table("Options of search and training", header, more, words=(1,))))


def _cost(run: RunReport) -> str:
    return "FLOPs" if run.plan.measure == "flops" else f"time in batches of {run.plan.batch_size}"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>\n"


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = ()) -> str:
    """Return a table whose first column names the rows; the columns in `words` are text."""
    kind = [" class=words" if index in words else "" for index in range(len(header))]
    head = "".join(f'<th scope="col"{of}>{escape(name)}</th>' for of, name in zip(kind, header))
    body = "".join(f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(
        f"<td{of}>{escape(cell)}</td>" for of, cell in zip(kind[1:], row[1:])) + "</tr>" for row in rows)
    return (f'<div class="table" role="region" aria-label="{escape(caption)}" tabindex="0"><table><caption>'
            f"{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
