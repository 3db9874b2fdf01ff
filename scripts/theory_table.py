"""Fill the table of measured values in docs/theory.md from the records of experiments.

    saejax experiment all_quick out=OUT
    python scripts/theory_table.py OUT

Every number on the page comes from a `metrics.json`; running this twice changes nothing.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "theory.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def read(folder: Path) -> list[dict[str, Any]]:
    """The records below a folder, by the experiment's name; one experiment recorded twice is an error."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("metrics.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if "experiment" not in record:
            continue
        if record["experiment"] in found:
            raise SystemExit(f"{record['experiment']} is recorded twice below {folder}: give the folder of one run")
        found[record["experiment"]] = record
    if not found:
        raise SystemExit(f"no metrics.json of an experiment below {folder}")
    return [found[name] for name in sorted(found)]


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: one row for every check, what fails in bold."""
    lines = ["| experiment | quantity | expected | measured | verdict | source |", "|---|---|---|---|---|---|"]
    for record in records:
        for check in record["checks"]:
            measured = "–" if check["measured"] is None else f"{check['measured']:.4g}"
            verdict = "**FAIL**" if check["verdict"] == "FAIL" else check["verdict"]
            name = f"`{record['experiment']}`"
            cells = [name, check["quantity"], check["wanted"], measured, verdict, check["source"]]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    counts = [sum(check["verdict"] == kind for r in records for check in r["checks"]) for kind in ("pass", "FAIL")]
    devices = ", ".join(sorted({f"JAX {record['jax']} on {record['device']}" for record in records}))
    return "\n".join([f"{counts[0]} passed, {counts[1]} failed; {devices}.", "", *lines])


def filled(page: str, content: str) -> str:
    """The page with its block of measured values replaced."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise SystemExit(f"the page must hold {BEGIN} and {END} once each")
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n\n{content}\n\n{END}{rest.split(END)[1]}"


def main(arguments: list[str]) -> int:
    """Rewrite the block in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the experiments left their records")
    parser.add_argument("--page", type=Path, default=PAGE, help="the document to fill")
    given = parser.parse_args(arguments)
    page = given.page.read_text(encoding="utf-8")
    given.page.write_text(filled(page, table(read(given.folder))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
