"""The documents hold what the studies measured."""

import json
import re
from pathlib import Path

import cases
import pytest

from benchmarks import small_batch, tables
from benchmarks.lib import facts
from benchmarks.studies import (
    claims,
    cost_tables,
    norm_batch_report,
    norm_batch_results,
    statistics_error,
    theory,
    without_layer,
)

pytestmark = pytest.mark.studies

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("study", tables.STUDIES)
def test_committed_tables_are_made_from_the_committed_results(study):
    made = tables.STUDIES[study].markdown(json.loads(tables.results(study)))
    assert made == tables.results(study, "table.md")


@pytest.mark.parametrize("document", list(tables.documents(ROOT)), ids=lambda p: p.name)
def test_documents_hold_what_was_measured(document):
    """Digit for digit: ``python -m benchmarks.tables`` would change nothing."""
    text = document.read_text()
    assert tables.rendered(text) == text


def test_precisions_are_compared_as_measured():
    """The same job, but for the precision."""
    compared = [
        json.loads(tables.results(name)) for name in ("small_batch_bfloat16", "small_batch")
    ]
    assert small_batch.compare(*compared) in (ROOT / "benchmarks/README.md").read_text()
    other, usual = (dict(each["config"]) for each in compared)
    for config in (other, usual):
        del config["precision"], config["output"]
    assert other == usual
    assert compared[0]["environment"] == compared[1]["environment"]


PAGES = {
    page.stem: page.read_text() for page in sorted((ROOT / "docs/methods").glob("*.md"))
}


def test_the_facts_of_every_estimator_are_on_a_page():
    blocks = re.findall(r"<!-- facts (.*?) -->", "".join(PAGES.values()))
    assert {name for names in blocks for name in names.split()} == set(cases.KINDS)


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"centralize", "combining"}))
def test_pages_of_estimators_open_with_their_facts(page):
    assert re.match(r"# .+\n\n<!-- facts ", PAGES[page])


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            "batch_norm()",
            ("3 numbers per feature", "no", "behind convolutions only", "yes"),
        ),
        (
            "small_batch_norm(batch_size=2)",
            ("1 θ, 9 input patches, 16 numbers per feature", "yes", "yes", "yes"),
        ),
        ("filter_response_norm()", ("1 number per feature", "no", "yes", "no")),
        ("ghost_batch_norm(examples=2)", ("3 numbers per feature", "no", "no", "yes")),
        (
            "online_norm()",
            (
                "3 numbers per feature, 2 per feature among the parameters",
                "no",
                "yes",
                "yes",
            ),
        ),
    ],
)
def test_facts_come_from_the_library(call, expected):
    assert facts.facts_of(facts.made(call)) == expected


def test_a_method_may_have_two_calls():
    """Its one-example fact depends on an argument."""
    published, window = facts.calls_of("cross_iteration_batch_norm")
    found = [facts.facts_of(facts.made(call)).one_example for call in (published, window)]
    assert found == ["behind convolutions only", "yes"]


def test_facts_of_an_unknown_method_are_refused():
    with pytest.raises(ValueError, match="facts got the method layer_norm, expected one"):
        tables.rendered("<!-- facts layer_norm -->\n\n<!-- end -->")


def rows_of(text):
    """The cells of a table's rows, without its headings."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]


@pytest.mark.parametrize("page", PAGES)
def test_tables_of_numbers_on_pages_are_short(page):
    """Of what a study measured; the rest is in benchmarks/README.md."""
    blocks = re.findall(r"<!-- (?!facts|end)\w+ .*?<!-- end -->", PAGES[page], re.DOTALL)
    for block in blocks:
        assert len(rows_of(block)) <= 8, block[:60]


def test_the_brief_cost_has_the_slowest_cell():
    results = json.loads(tables.results("cost"))
    labels = ("group_batch_norm", "small_batch_norm")
    shown = {
        (row[0], row[1], row[2]): row[3]
        for row in rows_of(cost_tables.brief(results, *labels))
    }
    for label in labels:
        cells = [cell for cell in results["cells"] if cell["label"] == label]
        slowest = max(cells, key=lambda cell: cell["time"]["ratio"])
        place = (label, slowest["network"], str(slowest["batch_size"]))
        assert shown[place].startswith(f"{slowest['time']['ratio']:.2f} (")
    assert {place[1:] for place in shown} >= {("resnet18", size) for size in "128"}
    assert len(shown) == 8


def test_the_whole_cost_has_every_method():
    results = json.loads(tables.results("cost"))
    methods = {row[0] for row in rows_of(cost_tables.of(results))}
    assert methods == {cell["label"] for cell in results["cells"]} - {cost_tables.BASELINE}


def test_claims_of_one_author():
    results = json.loads(tables.results("claims"))
    rows = rows_of(claims.of(results, "Ma"))
    every = [row for row in rows_of(claims.markdown(results)) if row[0].startswith("Ma")]
    assert [row[1:] for row in rows] == [row[1:] for row in every] != []
    ours = rows_of(claims.of(results, "this", "norm_batch"))
    assert {row[-1] for row in ours} == {"`norm_batch`"}
    assert len(ours) < len(rows_of(claims.of(results, "this")))


def test_the_verdict_of_the_theory_names_the_worst_cell():
    def cell(window, measured, predicted, taylor):
        sides = {"measured": measured, "predicted": predicted}
        made = {kind: {"streaming_batch_norm": {"bias": b}} for kind, b in sides.items()}
        made["measured"]["cross_iteration_batch_norm"] = {"bias": taylor}
        return {"window": window, "turn": 0.5, **made}

    cells = [cell(4, -0.1, -0.11, -0.3), cell(16, 0.02, 0.05, -0.2)]
    text = theory.verdict({"cells": cells})
    assert "streaming is from -10.0 to +2.0 %" in text
    assert "Taylor term from -30.0 to -20.0 %" in text
    assert "at most 3.0 points (k = 16, 0.5 radians)" in text


def test_brief_tables_repeat_rows_of_the_whole():
    results = json.loads(tables.results("theory"))
    every = [row for row in rows_of(theory.markdown(results)) if row[0] == "16"]
    assert rows_of(theory.brief(results)) == every != []
    results = json.loads(tables.results("statistics_error"))
    scale = {tuple(row[:3]): row[4] for row in rows_of(statistics_error.markdown(results))}
    for method, *errors in rows_of(statistics_error.brief(results)):
        assert errors == [scale[cell] for cell in scale if cell[2] == method]


def test_the_standing_of_named_methods():
    """Of training from scratch and of fine-tuning, for the named methods alone."""
    results = json.loads(tables.results("norm_batch"))
    rows = rows_of(norm_batch_report.of(results, "carried_batch_norm", "frozen"))
    settings = {"from scratch": False, "fine-tuning": True}
    for name, setting, cells, gap, worst in rows:
        found = norm_batch_results.standings(results, settings[setting])[name]
        assert cells == f"{found.good} of {found.cells}"
        assert (gap, worst) == (f"{found.gap:.1f}", norm_batch_results.where(found.worst))
    assert {tuple(row[:2]) for row in rows} == {
        ("carried_batch_norm", "from scratch"),
        ("carried_batch_norm", "fine-tuning"),
        ("frozen", "fine-tuning"),
    }


def test_the_brief_comparison_without_a_layer_says_what_the_verdict_says():
    results = json.loads(tables.results("without_layer"))
    sentences = without_layer.verdict(results).splitlines()
    rows = rows_of(without_layer.brief(results))
    for (name, settings, behind), sentence in zip(rows, sentences, strict=True):
        assert sentence.startswith(f"{name}: ")
        assert f"in {settings} settings, at worst {behind} points" in sentence


def test_the_advice_follows_the_results():
    """docs/choose.md says which method is never far from the best."""
    results = json.loads(tables.results("norm_batch"))
    for tuned in (False, True):
        found = norm_batch_results.standings(results, tuned)
        known = [name for name in norm_batch_report.IN_SHORT if name in found]
        nearest = min(known, key=lambda name: found[name].gap)
        assert nearest == "small_batch_norm"
