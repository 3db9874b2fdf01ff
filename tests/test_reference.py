"""The benchmark on known features: what each experiment file promises of the recovered dictionary, for two seeds."""

import json
import os
import subprocess
import sys

import pytest

CODE = "import sys; from saejax import cli; sys.exit(cli.main(sys.argv[1:]))"

# Bounds as the experiment files state them; chance is 0.36 for as many random directions.
BOUNDS = {
    "sb_iid_topk": {"mcc": (0.99, 1.0), "dead_share": (0.0, 0.01)},
    "sb_iid_l1": {"mcc": (0.97, 1.0)},
}


@pytest.mark.nightly
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("experiment", sorted(BOUNDS))
def test_the_true_dictionary_is_recovered(experiment, seed, tmp_path):
    run_dir = tmp_path / "run"
    _saejax("train", f"experiment={experiment}", f"seed={seed}", f"hydra.run.dir={run_dir}")
    _saejax("evaluate", f"run={run_dir}")
    found = json.loads((run_dir / "eval.json").read_text())["metrics"]
    record = json.loads((run_dir / "run.json").read_text())
    print(
        f"\n{experiment} seed {seed}: mcc {found['mcc']:.4f} (chance {found['mcc_chance']:.4f}), "
        f"dead_share {found['dead_share']:.4f}, {record['tokens'] / record['tokens_per_second']:.0f} s"
    )
    assert record["finished"] and record["seed"] == seed
    for name, (low, high) in BOUNDS[experiment].items():
        assert low <= found[name] <= high, f"{name} is {found[name]}, not in [{low}, {high}]"


def _saejax(*arguments: str) -> None:
    """A command on one device, as on a laptop: the eight of the test session are its own."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
