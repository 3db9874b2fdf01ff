"""docs/theory.md and docs/errata.md name what exists, and the table of measured values comes from records."""

import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

from saejax.lab.experiments import all_experiments

ROOT = Path(__file__).resolve().parents[2]
THEORY, ERRATA = ((ROOT / "docs" / name).read_text() for name in ("theory.md", "errata.md"))
FAMILIES = "additivity|binding|check|codes|ident|interp|ood|stability|synth"


def test_every_experiment_is_on_the_page():
    assert not {name for name in all_experiments() if f"`{name}`" not in THEORY}


def test_every_named_experiment_exists():
    named = set(re.findall(rf"`((?:{FAMILIES})/\w+)`", THEORY + ERRATA))
    assert not named - set(all_experiments())


def test_every_function_named_in_the_errata_exists():
    named = re.findall(r"`(codes\.\w+)\.(\w+)`", ERRATA)
    assert len(named) > 5
    for module, function in named:
        assert callable(getattr(importlib.import_module(f"saejax.lab.{module}"), function))


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("theory_table", ROOT / "scripts" / "theory_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_holds_what_the_records_say(script, tmp_path):
    checks = [
        {"quantity": "mean |cos|", "measured": 0.12341, "wanted": ">= 0.1", "verdict": "pass", "source": "a"},
        {"quantity": "other", "measured": 2.0, "wanted": "<= 1", "verdict": "FAIL", "source": "b"},
        {"quantity": "absent", "measured": None, "wanted": "-", "verdict": "not built", "source": "c"},
    ]
    record = {"experiment": "synth/x", "jax": "0", "device": "cpu", "checks": checks}
    (tmp_path / "synth").mkdir()
    (tmp_path / "synth" / "metrics.json").write_text(json.dumps(record))
    page = tmp_path / "page.md"
    page.write_text(THEORY)
    for _ in range(2):  # the second time changes nothing
        assert script.main([str(tmp_path), "--page", str(page)]) == 0
        text = page.read_text()
        assert "| `synth/x` | mean \\|cos\\| | >= 0.1 | 0.1234 | pass | a |" in text
        assert "| `synth/x` | other | <= 1 | 2 | **FAIL** | b |" in text
        assert "1 passed, 1 failed" in text and text.count(script.BEGIN) == text.count("other | <= 1") == 1
        assert text.split(script.BEGIN)[0] == THEORY.split(script.BEGIN)[0]


def test_no_records_is_an_error(script, tmp_path):
    with pytest.raises(SystemExit, match="no metrics.json"):
        script.main([str(tmp_path)])
