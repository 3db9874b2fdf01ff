"""The main job end to end: harvest, train, sweep, evaluate, export, report; then the key figures.

`make demo` runs the short plan (an early layer, minutes), `make reference` the full one (block 15, the whole text).
What is finished already is not done again, a run that was stopped goes on, and what was made from an older run is made
anew.
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
from typing import Any

from saejax import cli


@dataclasses.dataclass(frozen=True)
class Plan:
    """One pass from text to report.

    Attributes:
      root: directory of everything that is written.
      harvest: overrides of the harvest.
      train: overrides of the run.
      sweep: further overrides of the sweep, `key=a,b` for each axis of its grid; empty for none.
      evaluate: overrides of the evaluation.
    """

    root: Path
    harvest: tuple[str, ...]
    train: tuple[str, ...]
    sweep: tuple[str, ...]
    evaluate: tuple[str, ...]

    def pending(self) -> Iterator[list[str]]:
        """The commands that are still to be run, in order; each is decided on when it is asked for.

        Harvest and training are always among them: they leave alone what is finished, and go on with what is not.
        """
        run, sweep, store = self.root / "topk", self.root / "sweep", self.root / "store"
        yield ["harvest", f"path={store}", *self.harvest]
        yield ["train", *self.train, f"source.path={store}", f"hydra.run.dir={run}"]
        if self.sweep:
            yield ["train", "-m", *self.train, f"source.path={store}", *self.sweep, f"hydra.sweep.dir={sweep}"]
            if not _made(sweep / "sweep.html", sweep.glob("*/run.json")):
                yield ["report", f"sweep={sweep}"]
        record = run / "run.json"
        if not _made(run / "eval.json", [record]):
            yield ["evaluate", f"run={run}", *self.evaluate]
        exported = [run / "export_saelens" / name for name in ("cfg.json", "sae_weights.safetensors")]
        if not all(_made(path, [record]) for path in exported):
            yield ["export", f"run={run}"]
        if not _made(run / "report.html", [record, run / "eval.json"]):
            yield ["report", f"run={run}"]


# What separated the texts that SmolLM2 was trained on; its file asks for no token, so bos=auto would take none.
BOS = 'bos="<|endoftext|>"'

PLANS = {
    "demo": Plan(
        root=Path("demo"),
        harvest=("hook=blocks.5.hook_resid_post", "n_tokens=131072", "heldout_tokens=16384", BOS),
        train=("experiment=smollm2_demo",),
        sweep=("sae.k=16,32,64", "train.n_tokens=131072"),
        evaluate=("splice_sequences=32",),
    ),
    "reference": Plan(
        root=Path("reference"),
        harvest=(BOS,),
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
    for command in plan.pending():
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


def _made(result: Path, origins: Iterator[Path] | list[Path]) -> bool:
    """Whether a file is whole and not older than what it was made from."""
    if not result.is_file():
        return False
    if result.suffix == ".json" and not _read(result):
        return False
    if result.suffix == ".html" and "</html>" not in result.read_text(encoding="utf-8"):
        return False
    made = result.stat().st_mtime_ns
    return all(origin.is_file() and origin.stat().st_mtime_ns <= made for origin in origins)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or a broken one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
