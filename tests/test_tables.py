"""The documents hold what the studies measured."""

import json
from pathlib import Path

import pytest

from benchmarks import small_batch, tables

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
