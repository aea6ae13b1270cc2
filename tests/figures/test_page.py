"""The page of benchmarks matches its result files, and other documents quote it word for word."""

from __future__ import annotations

import json
import re
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.benchmarks import report
from tests.benchmarks.page.certificates import certificates
from tests.benchmarks.page.page import PAGE, PICTURE, SECTIONS, page, picture, read_results
from tests.benchmarks.page.quotes import QUOTES, misquoted
from tests.benchmarks.page.river import river
from tests.benchmarks.published import PUBLISHED
from tests.benchmarks.report import conditions, save
from tests.support.documents import README, ROOT

RUN = {**conditions({"rounds": 3}), "seconds": 12}
ROW = {"backbone": "ResNet-50", "data": "CIFAR-100", "heads": "searched", "labelled": False, "replayed": False,
       "layers": 8, "tolerance": 0.02, "risk": "disagreement", "accuracy": 0.68, "accuracy_loss": 0.011,
       "certificate": None, "disagreement": 0.014, "flops_ratio": 0.61,
       "cpu_time_ratio": {"1": 0.8, "8": 0.77, "32": 0.7}, "hits": {"a": 0.6, "full": 0.4}}


def test_the_page_is_what_the_result_files_say() -> None:
    assert PAGE.read_text() == page(read_results()), "write it again: python -m tests.benchmarks.page"


def test_the_readmes_picture_is_of_a_result_file() -> None:
    assert PICTURE.read_text() == picture(read_results()), "write it again: python -m tests.benchmarks.page"
    assert f"({PICTURE.relative_to(ROOT)})" in README.read_text()


def test_the_area_of_the_river_is_the_work_that_is_done() -> None:
    exits = [{"layer": "a", "cost": 0.25, "share": 0.4}, {"layer": "b & c", "cost": 0.75, "share": 0.5},
             {"layer": "full", "cost": 1.0, "share": 0.1}]
    drawn = ElementTree.fromstring(river(exits, "90 % < 100 %"))
    [shape] = [one for one in drawn.iter("{http://www.w3.org/2000/svg}path") if one.get("d", "").endswith("Z")]
    outline = corners(shape.get("d", ""))
    left, right, top, bottom = *(f(x for x, _ in outline) for f in (min, max)), *(
        f(y for _, y in outline) for f in (min, max))
    area = sum((x2 - x1) * (2 * bottom - y1 - y2) / 2 for (x1, y1), (x2, y2) in pairwise(outline) if x2 > x1)
    spent = sum(one["cost"] * one["share"] for one in exits)
    assert area / (right - left) / (bottom - top) == pytest.approx(spent, abs=1e-3)


def test_no_label_of_the_river_begins_left_of_the_picture() -> None:
    drawn = ElementTree.fromstring(river([{"layer": "relu", "cost": 0.003, "share": 0.4},
                                          {"layer": "full", "cost": 1.0, "share": 0.6}], "at the left edge"))
    labels = [one for one in drawn.iter("{http://www.w3.org/2000/svg}text") if one.text == "relu"]
    assert [(one.get("text-anchor"), one.get("x")) for one in labels] == [("start", "20")]


def corners(path: str) -> list[tuple[float, float]]:
    """Return the end points of the lines and curves of a path.

    A curve that is unchanged by half a turn encloses the same area as the straight line between its ends.
    """
    found, (x, y) = [], (0.0, 0.0)
    for kind, numbers in re.findall(r"([MHVCZ])([^MHVCZ]*)", path):
        values = [float(value) for value in re.findall(r"[\d.]+", numbers)]
        if kind in "MC":
            x, y = values[-2:]
        elif kind in "HV":
            x, y = (values[0], y) if kind == "H" else (x, values[0])
        found.append((x, y))
    return found


@pytest.mark.parametrize("document", QUOTES)
def test_a_document_quotes_the_page(document: str) -> None:
    results = read_results()
    results = {**results, "certificates": certificates(results)}
    assert misquoted((ROOT / document).read_text(), QUOTES[document], results,
                     everywhere=document == README.name) == []


def test_certificates_that_did_not_hold_are_counted_with_those_that_did() -> None:
    certified = {"certificate": "it holds", "risk": "disagreement", "tolerance": 0.02, "accuracy_loss": 0.0,
                 "hits": {"full": 0.5}}
    accuracy = {**certified, "risk": "accuracy", "disagreement": 0.05}
    results = {
        "demo": {"certificate": {"n": 240}, "disagreement": 0.0201, "certified_bound": 0.02},
        "int8": {"run": {"settings": {"tolerance": 0.01}}, "rows": [
            {"certificate": None, "disagreement": 0.5}, {"certificate": "it holds", "disagreement": 0.009}]},
        "paper-a": {"rows": [{**certified, "disagreement": 0.028}, accuracy, {**accuracy, "accuracy_loss": 0.021},
                             {**certified, "disagreement": 0.0, "hits": {"full": 1}}, {"left_out": "no data"}]},
        "methods": {"rows": [{**certified, "disagreement": 0.5}]}}
    assert certificates(results) == {"n": 5, "broken": 3, "excess_points": pytest.approx(0.8)}


RESULTS = {"loop": {"flops_ratio": 0.734, "p50_ms": {"8": 41.27}, "rows": [
    {"name": "a", "share": 0.0131}, {"name": "b", "share": 0.2}]}}
QUOTE = ("It takes {loop[flops_ratio]:.2f} of the FLOPs, {loop[p50_ms][8]:.1f} ms, "
         "and {loop[rows][name=a][share]:.1 %} at 2 %.")


@pytest.mark.parametrize(("text", "wrong"), [
    ("It takes 0.73 of the FLOPs,\n41.3 ms, and 1.3 % at 2 %. See [all](docs/benchmarks.md).", 0),
    ("It takes 0.74 of the FLOPs, 41.3 ms, and 1.3 % at 2 %.", 1),
    ("It takes 0.73 of the FLOPs, 41.3 ms, and 1.3 % at 2 %. [All](docs/benchmarks.md), and 9.9 besides.", 1),
    ("It takes 0.73 of the FLOPs, 41.3 ms, and 1.3 % at 2 %.\n\n[All](docs/benchmarks.md):\n\n| a |\n|--|\n| 4.5 |", 1),
    ("It takes 0.73 of the FLOPs, 41.3 ms, and 1.3 % at 2 %.\n\n[All](docs/benchmarks.md).\n\nPython 3.10.", 0)])
def test_a_figure_that_no_result_vouches_for_is_found(text: str, wrong: int) -> None:
    assert len(misquoted(text, [QUOTE], RESULTS)) == wrong


def test_everywhere_a_paragraph_without_a_link_is_looked_at_too() -> None:
    text = "It takes 0.73 of the FLOPs,\n41.3 ms, and 1.3 % at 2 %.\n\nExits save 63 %.\n\n```\nshown 9.9\n```\n"
    [wrong] = misquoted(text, [QUOTE], RESULTS, everywhere=True)
    assert "63 %" in wrong and misquoted(text, [QUOTE], RESULTS) == []


def test_every_network_of_the_paper_that_has_no_result_is_named() -> None:
    networks = SECTIONS["paper"].parts
    text = (ROOT / "Makefile").read_text()
    assert [line.split(":=")[1].split() for line in text.splitlines() if line.startswith("NETWORKS")] == [[*networks]]
    row = {**ROW, "method": "certified"}
    missing = page({"paper-vit": {"run": RUN, "rows": [row]}}).partition("## Not measured")[2]
    assert [name for name in networks if f"- The paper's networks, {name}: `" not in missing] == ["vit"]


def test_a_quote_of_no_row_or_of_several_is_refused() -> None:
    for rows in ([], [{"name": "a"}, {"name": "a"}]):
        with pytest.raises(ValueError, match="expected one row with name=a"):
            misquoted("", ["{loop[rows][name=a][share]}"], {"loop": {"rows": rows}})


def test_every_benchmark_that_make_bench_runs_has_a_section_and_a_command() -> None:
    text = (ROOT / "Makefile").read_text()
    [measured] = [line.split(":=")[1].split() for line in text.splitlines() if line.startswith("MEASURED")]
    assert {*measured, "demo", "paper", "methods"} == SECTIONS.keys()
    for name, section in SECTIONS.items():
        assert section.command.split(".")[-1] in (name, "paper")
        if section.command != "tests.demo":
            assert (ROOT / Path(*section.command.split("."))).with_suffix(".py").is_file()


def test_every_row_of_every_network_is_on_the_page_with_the_papers_figures_beside() -> None:
    rows: list[dict[str, Any]] = [
        {**ROW, "method": "certified", "paper": PUBLISHED["ResNet-50"].to_json()},
        {**ROW, "method": "certified-papers-loss", "risk": "accuracy", "tolerance": 0.0246,
         "paper": PUBLISHED["ResNet-50"].to_json()},
        *({**ROW, "method": "gati", "tolerance": budget, "layers": layers}
          for budget in (0.005, 0.01, 0.02) for layers in (4, 8)),
        {"backbone": "DLRM", "left_out": "no | data"}]
    text = page({"paper": {"run": RUN, "rows": rows}})
    beside = next(line for line in text.splitlines() if "ResNet-50, CIFAR-100 | 2.5 % accuracy lost" in line)
    assert "0.42 | 0.54 (0.46 by its ms) |" in beside and "2.5 % | 0.42" in beside
    assert sum(line.startswith("| gati |") for line in text.splitlines()) == 6
    assert "Left out: DLRM" in text and "no / data" in text


@pytest.mark.parametrize("searched", [False, True])
def test_rows_without_search_stand_beside_the_papers_figures_only_where_there_are_no_others(searched: bool) -> None:
    methods = ["no-replay", "no-replay-papers-loss", *(["certified"] if searched else [])]
    rows: list[dict[str, Any]] = [{**ROW, "method": method, "paper": PUBLISHED["ResNet-50"].to_json()}
                                  for method in methods]
    told = [line for line in page({"paper": {"run": RUN, "rows": rows}}).splitlines()
            if line.startswith("| ResNet-50, CIFAR-100") and "answers that differ" in line]
    assert [("heads not searched" in line) for line in told] == ([False] if searched else [True, True])


def test_a_row_whose_certificate_did_not_hold_says_so() -> None:
    kept = {**ROW, "method": "certified", "certificate": "At most 2%."}
    broken = {**kept, "method": "certified-papers-loss", "risk": "accuracy", "tolerance": 0.01}
    others = [{**broken, "method": "gati", "certificate": None}, {**broken, "risk": "confidence-gap"}]
    text = page({"paper": {"run": RUN, "rows": [kept, broken, *others]}})
    [told] = [line for line in text.splitlines() if line.startswith("The certificate of")]
    assert told == ("The certificate of `certified-papers-loss` did not hold on the measured requests: 1.1 % of the "
                    "accuracy was lost where at most 1.0 % was certified. It said: At most 2%.")


def test_a_section_tells_which_run_it_comes_from() -> None:
    run = {**RUN, "commit": "0123456789ab"}
    text = page({"fuzz": {"run": run, "sent": 5, "wrong_by_kind": {"empty body": 1}}})
    assert RUN["processor"] in text and "commit 0123456789ab, 12 s" in text
    assert "rounds 3" in text and "| sent | 5 |" in text


def test_each_of_several_runs_of_one_benchmark_is_told_before_its_tables() -> None:
    rows = [{**ROW, "method": "certified", "backbone": name} for name in ("small", "large")]
    text = page({f"paper-{row['backbone']}": {"run": {**RUN, "commit": f"of {row['backbone']}"}, "rows": [row]}
                 for row in rows})
    assert text.index("of large") < text.index("large, ") < text.index("of small") < text.index("small, ")


@pytest.mark.parametrize("commit", ["0123456789ab+", None])
def test_a_result_of_code_that_is_in_no_commit_is_refused(commit: str | None, tmp_path: Path) -> None:
    (tmp_path / "loop.json").write_text(json.dumps({"run": {**RUN, "commit": commit}}))
    with pytest.raises(ValueError, match=r"loop\.json was measured with code that is in no commit"):
        read_results(tmp_path)


def test_a_run_of_code_from_another_folder_than_its_commit_is_in_no_commit(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m",
                                     "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(report, "_ROOT", tmp_path)
    found = report.commit_of_code()
    assert found is not None and found.endswith("+")
    monkeypatch.setattr(report.handler, "__path__", [str(tmp_path / "handler")])
    assert report.commit_of_code() == found.removesuffix("+")


def test_a_file_of_no_benchmark_or_without_its_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(ValueError, match=r"mine\.json is the result of no benchmark"):
        read_results(tmp_path)
    (tmp_path / "mine.json").rename(tmp_path / "loop.json")
    with pytest.raises(ValueError, match=r"loop\.json does not say"):
        read_results(tmp_path)


def test_a_result_says_what_it_was_measured_with(tmp_path: Path) -> None:
    save(tmp_path / "figures.json", conditions({"rounds": 3, "json": tmp_path}), {
        "figure": 1.5, "left_out": f"no images.tar in {tmp_path / 'data'}: set a/b to 1/2 of http://127.0.0.1:80/x/y"})
    told = json.loads((tmp_path / "figures.json").read_text())
    assert told["figure"] == 1.5 and told["run"]["settings"] == {"rounds": 3}
    for name in ("commit", "date", "processor", "instructions", "cores", "threads", "torch", "python", "seconds",
                 "load_before", "allocator"):
        assert name in told["run"]
    assert told["left_out"] == "no images.tar in data: set a/b to 1/2 of http://127.0.0.1:80/x/y"
