"""The main job end to end: harvest, train, sweep, evaluate, export, report; then the key figures.

`make demo` runs the short plan (an early layer, minutes), `make reference` the full one (block 15, the whole text).
What is there already is not done again; a run that was stopped is resumed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from saejax import cli


@dataclasses.dataclass(frozen=True)
class Plan:
    """One pass from text to report.

    Attributes:
      root: directory of everything that is written.
      harvest: overrides of the harvest.
      train: overrides of the run.
      sweep: further overrides of the sweep; empty for none.
      evaluate: overrides of the evaluation.
    """

    root: Path
    harvest: tuple[str, ...]
    train: tuple[str, ...]
    sweep: tuple[str, ...]
    evaluate: tuple[str, ...]

    def commands(self) -> Iterator[tuple[Path, list[str]]]:
        """(what exists afterwards, command) in order; the first is missing for a command that is always run."""
        store, run, sweep = self.root / "store", self.root / "topk", self.root / "sweep"
        train = [*self.train, f"source.path={store}"]
        yield store / "heldout" / "never", ["harvest", f"path={store}", *self.harvest]
        if (run / "checkpoints").exists():
            yield run / "run.json", ["train", f"resume={run}"]
        else:
            yield run / "run.json", ["train", *train, f"hydra.run.dir={run}"]
        if self.sweep:
            yield sweep / "2" / "run.json", ["train", "-m", *train, *self.sweep, f"hydra.sweep.dir={sweep}"]
            yield sweep / "sweep.html", ["report", f"sweep={sweep}"]
        yield run / "eval.json", ["evaluate", f"run={run}", *self.evaluate]
        yield run / "export_saelens", ["export", f"run={run}"]
        yield run / "report.html", ["report", f"run={run}"]


PLANS = {
    "demo": Plan(
        root=Path("demo"),
        harvest=("hook=blocks.5.hook_resid_post", "n_tokens=131072", "heldout_tokens=16384"),
        train=("experiment=smollm2_demo",),
        sweep=("sae.k=16,32,64", "train.n_tokens=131072"),
        evaluate=("splice_sequences=32",),
    ),
    "reference": Plan(
        root=Path("reference"),
        harvest=(),
        train=("experiment=smollm2",),
        sweep=(),
        evaluate=("splice_sequences=64",),
    ),
}

FIGURES = {
    "fvu": "held-out fraction of variance unexplained",
    "l0": "active latents per token",
    "dead_share": "share of latents that never fire on held-out text",
    "ce_clean": "cross-entropy of the model, nats",
    "delta_ce": "cross-entropy added by the splice, nats",
    "kl": "KL divergence to the clean model, nats",
    "recovered_zero": "loss recovered against zero ablation",
    "recovered_mean": "loss recovered against mean ablation",
}


def main(name: str = "demo") -> int:
    """Run every command of a plan that is not done yet; stop at the first that fails."""
    plan = PLANS[name]
    started = time.perf_counter()
    for result, command in plan.commands():
        if result.exists():
            continue
        print(f"\n$ saejax {' '.join(command)}", flush=True)
        status = cli.main(command)
        if status:
            return status
    print(f"\n{summary(plan)}")
    print(f"took {time.perf_counter() - started:.0f} s on {os.cpu_count()} cores ({platform.machine()})")
    print("reports: " + "  ".join(str(path) for path in sorted(plan.root.glob("*/*.html"))))
    return 0


def summary(plan: Plan) -> str:
    """The key figures of a plan's run, one on a line."""
    run = plan.root / "topk"
    metrics = json.loads((run / "eval.json").read_text())["metrics"]
    record = json.loads((run / "run.json").read_text())
    head = f"{record['source']['hook']} of SmolLM2-135M-Instruct (4-bit), {record['tokens']} tokens, "
    lines = [f"  {name:<15} {metrics[name]:>8.4f}   {text}" for name, text in FIGURES.items() if name in metrics]
    return "\n".join([head + f"{record['tokens_per_second']:.0f} tokens/s in training:", *lines])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
