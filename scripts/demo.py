"""The main job end to end in minutes: harvest, train, sweep, evaluate, export, report; then the key figures.

`make demo` runs it. Everything goes to demo/; what is there already is not done again.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from saejax import cli

ROOT = Path("demo")
STORE = ROOT / "store"
RUN = ROOT / "topk"
SWEEP = ROOT / "sweep"

HARVEST = [f"path={STORE}", "hook=blocks.5.hook_resid_post", "n_tokens=131072", "heldout_tokens=16384"]
TRAIN = ["experiment=smollm2_demo", f"source.path={STORE}"]

FIGURES = {
    "fvu": "held-out fraction of variance unexplained",
    "l0": "active latents per token",
    "dead_share": "share of latents that never fire on held-out text",
    "delta_ce": "cross-entropy added by the splice, nats",
    "kl": "KL divergence to the clean model, nats",
    "recovered_zero": "loss recovered against zero ablation",
    "recovered_mean": "loss recovered against mean ablation",
}


def main() -> int:
    """Run every command that is not done yet; stop at the first that fails."""
    started = time.perf_counter()
    steps = [
        (STORE / "done", ["harvest", *HARVEST]),
        (RUN / "run.json", ["train", *TRAIN, f"hydra.run.dir={RUN}"]),
        (
            SWEEP / "2" / "run.json",
            ["train", "-m", *TRAIN, "sae.k=16,32,64", "train.n_tokens=131072", f"hydra.sweep.dir={SWEEP}"],
        ),
        (RUN / "eval.json", ["evaluate", f"run={RUN}"]),
        (RUN / "export_saelens", ["export", f"run={RUN}"]),
        (RUN / "report.html", ["report", f"run={RUN}"]),
        (SWEEP / "sweep.html", ["report", f"sweep={SWEEP}"]),
    ]
    for result, command in steps:
        if result.exists():
            continue
        print(f"\n$ saejax {' '.join(command)}", flush=True)
        status = cli.main(command)
        if status:
            return status
    print(f"\n{summary()}")
    print(f"reports: {RUN / 'report.html'}  {SWEEP / 'report.html'}")
    print(f"took {time.perf_counter() - started:.0f} s")
    return 0


def summary() -> str:
    """The key figures of the run, one on a line."""
    metrics = json.loads((RUN / "eval.json").read_text())["metrics"]
    lines = [f"  {name:<15} {metrics[name]:>8.4f}   {text}" for name, text in FIGURES.items() if name in metrics]
    return "\n".join(["key figures (SmolLM2-135M-Instruct, 4-bit, blocks.5.hook_resid_post):", *lines])


if __name__ == "__main__":
    sys.exit(main())
