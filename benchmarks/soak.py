"""Does anything grow? A long run of small steps, with its memory, open files and speed sampled as it goes.

    python benchmarks/soak.py                      200,000 steps, a checkpoint every 500, an evaluation every 1,000
    python benchmarks/soak.py --steps 4000 --every 100 --save-every 20     200 checkpoints: do they grow?

Prints a line per sample and at the end the slopes, fitted over the second half of the run (the first fills caches):
resident memory in MB per 10,000 steps, descriptors and threads per 10,000 steps, and the change of speed, in steps per
second and per second of CPU time, which other work on the machine disturbs less. Status 1 where
memory grows by more than 1 MB per 10,000 steps, or a descriptor stays open for every 10,000.
"""

from __future__ import annotations

from saejax.cli import kept_pages

if __name__ == "__main__":
    kept_pages.keep()  # as `saejax train`, before NumPy and JAX

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from saejax import config
from saejax.runs import directory, run
from saejax.storage import tracking

MB_PER_10K, FILES_PER_10K = 1.0, 1.0


class Sampler(tracking.Tracker):
    """The tracker of the run, which also looks at the process every so many lines."""

    samples: list[dict[str, float]] = []
    began = time.monotonic()

    def log(self, step: int, values: dict[str, float]) -> None:
        super().log(step, values)
        if "tokens" not in values:
            return
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        sample = {
            "step": step,
            "seconds": time.monotonic() - self.began,
            "cpu_seconds": time.process_time(),
            "rss_mb": int(status["VmRSS"].split()[0]) / 1024,
            "files": len(os.listdir("/proc/self/fd")),
            "threads": int(status["Threads"]),
        }
        self.samples.append(sample)
        print("  ".join(f"{name} {value:.6g}" for name, value in sample.items()), flush=True)


def slopes(samples: list[dict[str, float]]) -> dict[str, float]:
    """What grows, per 10,000 steps, over the second half; and the speed of its end over that of its beginning."""
    half = samples[len(samples) // 2 :]
    steps = np.array([sample["step"] for sample in half]) / 1e4
    found = {
        f"{name}_per_10k": float(np.polyfit(steps, [sample[name] for sample in half], 1)[0])
        for name in ("rss_mb", "files", "threads")
    }
    ends = half[0], half[(len(half) - 1) // 2], half[-1]
    for name, clock in (("second", "seconds"), ("cpu_second", "cpu_seconds")):
        before, after = ((b["step"] - a["step"]) / (b[clock] - a[clock]) for a, b in itertools.pairwise(ends))
        found |= {f"steps_per_{name}": after, f"steps_per_{name}_ratio": after / before}
    return found


def main() -> int:
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--save-every", type=int, default=500, help="steps between two checkpoints")
    parser.add_argument("--evaluate-every", type=int, default=1000, help="steps between two evaluations")
    parser.add_argument("--every", type=int, default=1000, help="steps between two samples")
    parser.add_argument("--out", type=Path, help="directory for the run; a temporary one by default")
    given = parser.parse_args()
    overrides = [
        "sae.d_sae=64", "sae.k=4", "source.d_in=16", "source.n_features=64", "source.heldout_rows=512",
        "train.batch=64", f"train.n_tokens={64 * given.steps}", "buffer.rows=512", "train.eval_rows=512",
        f"train.eval_every_steps={given.evaluate_every}", f"checkpoint.save_every_steps={given.save_every}",
        f"train.log_every_steps={given.every}", "mesh=single",
    ]  # fmt: skip
    cfg = config.load("train", config.Config, overrides)
    run.tracking.Tracker = Sampler
    with tempfile.TemporaryDirectory() as temporary:
        run_dir = given.out or Path(temporary) / "run"
        found = directory.decide(cfg, run_dir, directory.Request.same)
        run.train(cfg, run_dir, resume=found.action is directory.Action.go_on)
    if len(Sampler.samples) < 8:
        print("too few samples for a slope: at least 8 are needed, so lower --every")
        return 2
    found = slopes(Sampler.samples)
    print(json.dumps({"steps": given.steps} | found, indent=1))
    return int(found["rss_mb_per_10k"] > MB_PER_10K or found["files_per_10k"] > FILES_PER_10K)


if __name__ == "__main__":
    sys.exit(main())
