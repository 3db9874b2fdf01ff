"""The documents say what the code does: every metric is defined, every part has its layer."""

import re
from pathlib import Path

from test_layers import LAYERS

from saejax.evals import evaluate, recovery

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_every_metric_is_defined():
    page = set(re.findall(r"`(\w+)`", (DOCS / "metrics.md").read_text()))
    keys = {key for metric in evaluate.default_metrics() for key in metric.definitions()} | set(recovery.DEFINITIONS)
    arrays_for_the_report = {"match", "match_cos"}
    assert not keys - arrays_for_the_report - page


def test_every_part_is_described():
    page = set(re.findall(r"`(\w+)`", (DOCS / "architecture.md").read_text()))
    root = DOCS.parent / "saejax"
    parts = {path.stem for path in root.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts <= set(LAYERS)
    assert not {part for part in parts if not part.startswith("__")} - page
