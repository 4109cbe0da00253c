"""The documents hold what the studies measured."""

import json
import re
from pathlib import Path

import cases
import pytest

from benchmarks import small_batch, tables
from benchmarks.lib import facts

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


PAGES = {page.stem: page.read_text() for page in (ROOT / "docs/methods").glob("*.md")}


def test_the_facts_of_every_estimator_are_on_a_page():
    blocks = re.findall(r"<!-- facts (.*?) -->", "".join(PAGES.values()))
    assert {name for names in blocks for name in names.split()} == set(cases.KINDS)


@pytest.mark.parametrize("page", PAGES.keys() - {"centralize", "combining"})
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
