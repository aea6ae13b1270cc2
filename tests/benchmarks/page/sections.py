"""The tables of those benchmarks whose figures need more than a list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from tests.benchmarks.page.certificates import LOSSES, did_not_hold
from tests.benchmarks.page.markdown import by_batch, in_words, percent, ratio, table

Figures = Mapping[str, Any]
_WORKER = (("CPU ms per request, whole worker", "worker_cpu_ms_per_request"), ("memory of the worker, MB", "worker_mb"),
           ("p50 ms", "p50_ms"), ("p95 ms", "p95_ms"))


def loop(figures: Figures) -> Iterator[str]:
    """Yield a table of the three arms of a loop, and sentences about its other figures."""
    original, without = figures["vs_original"], figures["vs_without_exits"]
    rows = [
        ["accuracy", percent(figures["accuracy_before"]), percent(figures["accuracy_after"] + without["accuracy_loss"]),
         percent(figures["accuracy_after"]), "", ""],
        ["answers that differ from the original's", "", percent(figures["disagreement_without_exits"]),
         percent(figures["disagreement"]), "", ""],
        ["FLOPs per request", *_relative(original["flops_ratio"], without["flops_ratio"])]]
    for size, of_original in original["cpu_time_ratio_by_batch"].items():
        rows.append([f"CPU time of the model, batches of {size}",
                     *_relative(of_original, without["cpu_time_ratio_by_batch"][size])])
    for title, name in _WORKER:
        of_arm = figures[name]
        rows.append([title, *(f"{of_arm[arm]:.3g}" for arm in ("original", "without_exits", "with_exits")),
                     ratio(original[name]), ratio(without[name])])
    yield table(["", "original", "ours without exits", "ours with exits", "with exits / original",
                 "with exits / without"], rows)
    certificate = figures["certificate"]
    if certificate:
        yield (f"Certified with {certificate['confidence']:.0%} confidence: at most "
               f"{percent(figures['certified_bound'])} of the answers differ ({certificate['k']} of "
               f"{certificate['n']} records did).")
    yield "Left at " + ", ".join(f"{name} {percent(share)}" for name, share in figures["hits"].items()) + "."
    yield (f"{figures['failed']} of {figures['requests']} requests failed, a roll under load included; "
           f"{figures['records']} were recorded, {figures['records_bytes_per_request'] / 1000:.1f} kB each.")


def _relative(to_original: float, to_without: float) -> list[str]:
    """Return the cells of a row of ratios in which the original is 1."""
    return ["1.00", ratio(to_original / to_without), ratio(to_original), ratio(to_original), ratio(to_without)]


def int8(figures: Figures) -> Iterator[str]:
    """Yield a table with a row for the original, each engine, and exits on each engine."""
    yield table(["", "accuracy", "accuracy lost", "answers that differ", "FLOPs", "CPU time, batch 1 / 8 / 32"],
                [[one["arm"], percent(one["accuracy"]), percent(one["accuracy_loss"]), percent(one["disagreement"]),
                  ratio(one["flops_ratio"]), by_batch(one["cpu_time_ratio"])] for one in figures["rows"]])
    for one in figures["rows"]:
        if one["certificate"]:
            yield f"{one['arm']}: {one['certificate']}"
    yield "Left at " + ", ".join(f"{one['layer']} {percent(one['share'])}" for one in figures["exits"]) + "."


def overhead(figures: Figures) -> Iterator[str]:
    """Yield a table of what serving without exits costs, and what recording costs."""
    yield table(["model", "without exits / plain, batch 1 / 8 / 32", "recording all / none, batch 1 / 8 / 32",
                 "the same with 10 MB in each request, batch 1", "largest difference of a score"],
                [[name.replace("_", ", "), by_batch(one["no_exit_ratio"]), by_batch(one["recording_ratio"]),
                  by_batch(one["recording_ratio_10_mb"]), f"{one['max_error']:.1e}"] for name, one in figures.items()])


def engine(figures: Figures) -> Iterator[str]:
    """Yield a table with a row for each engine and batch size."""
    pairs: dict[tuple[int, str], dict[str, Figures]] = {}
    for cell in figures["cells"]:
        pairs.setdefault((cell["batch"], cell["engine"]), {})[cell["exits"]] = cell
    rows = []
    for (batch, name), cells in pairs.items():
        none, exits = cells["none"], cells["10/60/12"]
        rows.append([str(batch), name, *(ratio(one) for one in (
            none["ratio_to_same_engine"], exits["ratio_to_same_engine"], exits["ideal_ratio"])),
            percent(exits["share_of_ideal"]), ratio(none["ratio_to_eager"]), ratio(exits["ratio_to_eager"])])
    yield table(["batch", "engine", "exits that nobody takes / same engine", "exits / same engine",
                 "ideal exits / same engine", "share of the ideal saving", "exits that nobody takes / eager",
                 "exits / eager"], rows)
    for batch, counts in figures["counts"].items():
        left = [sum(column) / sum(map(sum, counts)) for column in zip(*counts)]
        ranges = [f"{min(column)} to {max(column)}" for column in zip(*counts)]
        yield (f"At batch {batch}, {len(counts)} rounds: {' / '.join(map(percent, left[:-1]))} left after the three "
               f"layers, {', '.join(ranges[:-1])} of a round.")
    memory = figures["memory"]
    yield (f"A process with the plain backbone holds {memory['plain_mb']:.0f} MB, one with exits "
           f"{memory['exits_mb']:.0f} MB.")


def answers(figures: Figures) -> Iterator[str]:
    """Yield a table with a row for each load and answer mode."""
    yield table(["part", "load", "mode", "p50 ms", "p95 ms", "p99 ms", "requests/s", "failed",
                 "batch size, sampling rate, control rate"],
                [[one["part"], one["load"], one["mode"], *(f"{one[name]:.3g}" for name in (
                    "p50_ms", "p95_ms", "p99_ms", "requests_per_s")), f"{one['failed']} of {one['requests']}",
                  ", ".join(in_words(one[name]) for name in ("batch_size", "sampling_rate", "control_rate"))]
                 for one in figures["rows"]])


def rolls(figures: Figures) -> Iterator[str]:
    """Yield a table with a row for each answer mode, and sentences about the other parts."""
    yield table(["answers", "rolls, rollbacks", "requests", "failed", "lost", "p50 ms, quiet / rolling",
                 "p99 ms, quiet / rolling", "p99, rolling / quiet", "longest ms, quiet / rolling",
                 "seconds until a version was ready, median"],
                [[name, f"{one['rolls']}, {one['rollbacks']}", str(one["requests"]), str(one["failed"]),
                  str(one["lost"]), *(f"{one[of]['quiet']:.3g} / {one[of]['rolling']:.3g}" for of in (
                      "p50_ms", "p99_ms")), ratio(one["p99_ratio"]), f"{one['max_quiet_ms']:.0f} / {one['max_ms']:.0f}",
                  f"{one['median_ready_s']:.1f}"] for name, one in figures["modes"].items()])
    yield (f"Of {figures['rivals']} pairs of rolls that began at once, {figures['rivals_wrong']} ended otherwise than "
           "with one success, whose version stays the default.")
    adoption = figures["adoption"]
    yield (f"A server with settings of its own kept them when it adopted exits: {in_words(figures['settings_kept'])}. "
           f"A failed adoption put it back to the original: {in_words(figures['put_back_to_original'])}; "
           f"{adoption['failed']} of {adoption['requests']} requests failed meanwhile.")
    yield f"Exits answered for at most {figures['exits_off_s']:.2f} s after `ee-exits NAME off` was started."


def coverage(figures: Figures) -> Iterator[str]:
    """Yield a table with a row for each library, and a table of the models that do not go through."""
    models = figures["models"]
    families = {one["family"]: [other for other in models if other["family"] == one["family"]] for one in models}
    yield table(["library", "models", "ok", "median of the candidate layers", "largest error of the scores, exported",
                 "the same, as served"],
                [[name, str(len(some)), str(sum(one["ok"] for one in some)),
                  f"{median(one['candidates'] for one in some if one['ok']):g}",
                  *(f"{max(one[error] for one in some if one['ok']):.1e}" for error in ("max_error", "served_error"))]
                 for name, some in families.items()])
    yield "Those that are not ok:"
    yield table(["model", "candidate layers", "largest error, exported / as served", "damage that is not noticed",
                 "reason"],
                [[f"{one['family']} {one['model']}", str(one["candidates"]), _errors(one),
                  ", ".join(one.get("unnoticed_damage", ())), _first_line(one.get("reason", ""))]
                 for one in models if not one["ok"]])


def _errors(model: Figures) -> str:
    return "" if model["max_error"] is None else f"{model['max_error']:.1e} / {model['served_error']:.1e}"


def _first_line(reason: str) -> str:
    """Return the first line of a reason, which may contain torch's explanations."""
    return reason.partition("\n")[0].replace("|", " ")


_SEARCHED = ("certified", "certified-papers-loss")
_TRAINED_ONCE = ("no-replay", "no-replay-papers-loss")
"""The rows beside the paper's figures: those with searched heads or, of a network that takes too long to search, those
with heads of the default architecture that are trained without replays."""


def paper(figures: Figures) -> Iterator[str]:
    """Yield a table of the paper's networks beside the paper's figures, and a table of all rows for each network."""
    done = [one for one in figures["rows"] if "left_out" not in one]
    searched = {one["backbone"] for one in done if one["method"] in _SEARCHED}
    known = [one for one in done if "paper" in one
             and one["method"] in (_SEARCHED if one["backbone"] in searched else _TRAINED_ONCE)]
    if known:
        yield "The paper's networks, ours beside the paper's figures:"
        yield table(["ours", "certified at", "accuracy", "accuracy lost", "answers that differ", "FLOPs",
                     "CPU time, batch 1 / 8 / 32", "the paper's", "its accuracy", "its accuracy lost", "its FLOPs",
                     "its CPU time, batch 32"], [_beside_paper(one) for one in known])
    for name in dict.fromkeys(one["backbone"] for one in figures["rows"]):
        rows = [one for one in done if one["backbone"] == name]
        if rows:
            yield f"{name}, {rows[0]['data']}, every row:"
            yield table(["method", "heads", "labels", "layers", "budget", "accuracy lost", "answers that differ",
                         "FLOPs", "CPU time, batch 1 / 8 / 32"], [_of_method(one) for one in rows])
            if "auc" in rows[0] and "majority_accuracy" in rows[0]:
                yield ("Always answering the more frequent class would be right for "
                       f"{percent(rows[0]['majority_accuracy'])} of the measured requests.")
            yield from map(_broken_promise, filter(did_not_hold, rows))
        for one in figures["rows"]:
            if one["backbone"] == name and "left_out" in one:
                yield f"Left out: {name} {one.get('method', '')} {in_words(one['left_out'])}"


def _broken_promise(row: Figures) -> str:
    """Say that a certified row lost more than it promised."""
    lost = percent(row[LOSSES[row["risk"]]])
    easier = (f" The backbone is right on {percent(row['certify_accuracy'])} of the records that certify, and on "
              f"{percent(row['accuracy'] + row['accuracy_loss'])} of the measured ones."
              if "certify_accuracy" in row else "")
    return (f"The certificate of `{row['method']}` did not hold on the measured requests: {lost} "
            f"{'differed' if row['risk'] == 'disagreement' else 'of the accuracy was lost'} where at most "
            f"{percent(row['tolerance'])} was certified. It said: {row['certificate']}{easier}")


def _beside_paper(row: Figures) -> list[str]:
    told = row["paper"]
    percents, by_ms = told["cpu_time_ratio"]["32"], told["cpu_time_ratio_by_its_ms"]["32"]
    # Where the paper contradicts itself, the table shows both of its figures.
    time = ratio(percents) if abs(percents - by_ms) < 0.01 else f"{ratio(percents)} ({ratio(by_ms)} by its ms)"
    kind = "accuracy lost" if row["risk"] == "accuracy" else "answers that differ"
    heads = ", heads not searched" if row["method"] in _TRAINED_ONCE else ""
    return [f"{row['backbone']}, {row['data']}{heads}", f"{percent(row['tolerance'])} {kind}",
            percent(row["accuracy"] + row["accuracy_loss"]), percent(row["accuracy_loss"]),
            percent(row["disagreement"]), ratio(row["flops_ratio"]), by_batch(row["cpu_time_ratio"]),
            f"{told['backbone']}, {told['data']}", percent(told["accuracy_before"]), percent(told["accuracy_loss"]),
            ratio(told["flops_ratio"]), time]


def _of_method(row: Figures) -> list[str]:
    auc = f" (AUC {row['auc_before']:.3f} to {row['auc']:.3f})" if "auc" in row else ""
    heads = f"{row['heads']}, replays" if row["replayed"] else row["heads"]
    return [row["method"], heads, "yes" if row["labelled"] else "no", str(row["layers"]),
            f"{percent(row['tolerance'])} {row['risk']}", percent(row["accuracy_loss"]) + auc,
            percent(row["disagreement"]), ratio(row["flops_ratio"]), by_batch(row["cpu_time_ratio"])]
