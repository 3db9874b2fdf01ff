"""`saejax experiment`: list, one run, all quick forms; each with its files, its status and its one-line errors."""

import dataclasses
import json

import pytest
import yaml

from saejax import cli
from saejax.activations.synthetic import Synthetic
from saejax.lab.experiments import figures, harness


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line(harness.Experiment):
    """A stand-in: measures slope times n."""

    name = "stub/line"
    summary = "a straight line"
    cpu_seconds = (100, 1)

    n: int = 100
    """How far to go."""
    slopes: tuple[float, ...] = (1.0, 2.0)
    """Slopes to draw."""
    data: Synthetic = dataclasses.field(default_factory=Synthetic)
    """A nested config."""
    wanted: float = 200.0
    """What the check expects at least."""
    breaks: bool = False
    """Whether to raise."""

    def quick(self):
        return dataclasses.replace(self, n=10, wanted=20.0)

    def run(self):
        if self.breaks:
            raise RuntimeError("no luck today")
        figure, (ax,) = figures.new()
        for i, slope in enumerate(self.slopes):
            figures.line(ax, [0, self.n], [0, slope * self.n], i, f"slope {slope}")
        figures.finish(ax, x="distance (m)", y="height (m)", legend=True)
        height = self.n * max(self.slopes)
        checks = [
            harness.Check(quantity="height", measured=height, low=self.wanted, source="geometry"),
            harness.Check(quantity="missing arm", measured=None, source="geometry"),
        ]
        return harness.Outcome({"height": height, "n": self.n, "d_in": self.data.d_in}, checks, figure)


@pytest.fixture
def only_line(monkeypatch):
    """The registry holds nothing but the stand-in, wherever it is asked for."""
    monkeypatch.setattr("saejax.lab.experiments.command.all_experiments", lambda: {"stub/line": Line})


@pytest.mark.usefixtures("only_line")
class TestOne:
    def test_leaves_config_numbers_table_and_figure(self, tmp_path, capsys):
        assert cli.main(["experiment", "stub/line", f"out={tmp_path}"]) == 0
        assert {p.name for p in tmp_path.iterdir()} == {
            "config.yaml", "metrics.json", "table.txt", "figure.png", "figure.svg"
        }  # fmt: skip
        record = json.loads((tmp_path / "metrics.json").read_text())
        assert record["passed"] and record["values"]["height"] == 200
        assert [c["verdict"] for c in record["checks"]] == ["pass", "not built"]
        assert yaml.safe_load((tmp_path / "config.yaml").read_text())["slopes"] == [1.0, 2.0]
        assert (tmp_path / "table.txt").read_text().strip() in capsys.readouterr().out

    def test_takes_overrides_over_the_quick_form(self, tmp_path):
        overrides = ["quick=true", "slopes=[3.0,4.0]", "data.d_in=32", "seed=5"]
        assert cli.main(["experiment", "stub/line", *overrides, f"out={tmp_path}"]) == 0
        values = json.loads((tmp_path / "metrics.json").read_text())["values"]
        assert (values["n"], values["height"], values["d_in"]) == (10, 40, 32)
        config = yaml.safe_load((tmp_path / "config.yaml").read_text())
        assert config["type"] == "stub/line" and config["seed"] == 5

    def test_a_failed_check_is_status_1(self, tmp_path, capsys):
        assert cli.main(["experiment", "stub/line", "n=50", f"out={tmp_path}"]) == 1
        assert "FAIL" in capsys.readouterr().out

    def test_does_not_overwrite_another_experiment(self, tmp_path, capsys):
        (tmp_path / "config.yaml").write_text("type: other\n")
        assert cli.main(["experiment", "stub/line", f"out={tmp_path}"]) == 2
        assert "something else" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["nothing"], "stub/line"),
            (["stub/line", "slope=3"], "slopes"),
            (["stub/line", "n=many"], "n must be"),
            (["stub/line", "data.kind=odd"], "hierarchical"),
            (["stub/line", "data.noise=-1"], "source.noise"),
            (["stub/line", "slopes=[1"], "saejax experiment"),
            (["stub/line", "quick=maybe"], "true or false"),
            (["stub/line", "fast"], "fast"),
            (["all_quick", "n=3"], "n=3"),
            (["all_quick", "only=none"], "stub/line"),
        ],
    )
    def test_mistakes_end_in_one_line(self, arguments, told, capsys):
        assert cli.main(["experiment", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert told in error and "\n" not in error

    def test_help_names_every_key_and_its_quick_value(self, capsys):
        assert cli.main(["experiment", "stub/line", "--help"]) == 0
        text = capsys.readouterr().out
        assert "n = 100    (quick: 10)" in text and "How far to go." in text and "seed = 0" in text


@pytest.mark.usefixtures("only_line")
class TestAll:
    def test_one_table_in_quick_form(self, tmp_path, capsys):
        assert cli.main(["experiment", "all_quick", f"out={tmp_path}"]) == 0
        text = capsys.readouterr().out
        assert text.split()[:5] == ["experiment", "quantity", "expected", "measured", "verdict"]
        assert json.loads((tmp_path / "stub_line" / "metrics.json").read_text())["values"]["n"] == 10

    def test_one_that_breaks_fails_and_does_not_stop_the_others(self, tmp_path, monkeypatch, capsys):
        class Broken(Line):
            """Raises."""

            name = "stub/broken"

            def run(self):
                raise RuntimeError("no luck today")

        found = {"stub/broken": Broken, "stub/line": Line}
        monkeypatch.setattr("saejax.lab.experiments.command.all_experiments", lambda: found)
        assert cli.main(["experiment", "all_quick", f"out={tmp_path}"]) == 1
        text = capsys.readouterr().out
        assert "no luck today" in text and "1 of 2 checks FAILED, 1 not built" in text and "missing arm" in text


def test_the_list_names_every_experiment_with_its_time(capsys):
    assert cli.main(["experiment"]) == 0
    text = capsys.readouterr().out
    found = {name: cls for name, cls in harness.EXPERIMENTS.items() if cls.__module__.startswith("saejax.")}
    assert found and all(name in text and cls.summary in text for name, cls in found.items())
    for cls in found.values():
        assert cls.name.count("/") == 1 and "\n" not in cls.summary and cls.cpu_seconds[1] <= cls.cpu_seconds[0]
        assert cls().quick() == cls().quick().quick()
