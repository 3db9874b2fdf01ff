"""The training step compiled for chips that are not here: memory, collectives, modelled time, costly operations.

    python benchmarks/compiled.py                     # the whole table: an hour on two cores
    python benchmarks/compiled.py --only h200 --json out.json

Needs the compilers: `pip install 'saejax[plan-tpu]'` and `saejax[plan-gpu]`. Each row is a process of its own, because
a compiler changes what JAX knows of devices. Exits with 1 where a GPU's step sorts over the latents, adds by atomics or
holds gathered rows, or where a step does not fit.
"""

import argparse
import json
import subprocess
import sys

SMALL = ["source.d_in=768", "sae.d_sae=16384", "train.batch=4096"]
WIDE = ["source.d_in=4096", "sae.d_sae=131072", "train.batch=8192"]
TOPK = ["sae=topk", "sae.k=32"]

ROWS = [
    ("h200", [*TOPK, *SMALL]),
    ("b200", [*TOPK, *SMALL]),
    *(("h200", [f"sae={name}", "sae.k=32", *SMALL]) for name in ("abs_topk", "batch_topk", "matryoshka")),
    ("h200", ["sae=matching_pursuit", "sae.k=8", *SMALL]),
    *(("h200", [f"sae={name}", *SMALL]) for name in ("jumprelu", "gated", "l1", "p_anneal")),
    ("h200", ["sae=topk", "sae.k=64", *WIDE]),
    ("h200:8", ["sae=topk", "sae.k=64", *WIDE, "mesh.latent=8"]),
    ("h200:8", ["sae=topk", "sae.k=64", *WIDE, "mesh.latent=2"]),
    ("v5e", [*TOPK, *SMALL]),
    ("v6e", [*TOPK, *SMALL]),
    ("v5e:4x4", ["sae=topk", "sae.k=64", *WIDE, "mesh.latent=16"]),
    ("v5e:4x4", ["sae=topk", "sae.k=64", *WIDE, "mesh.latent=4"]),
    ("v6e:2x4", ["sae=topk", "sae.k=64", *WIDE, "mesh.latent=4"]),
]
"""Target and overrides of each row."""

PROGRAM = """
import json, sys
from saejax.cli import dry_run
plan = dry_run.of_arguments(["--dry-run", *sys.argv[1:]])
beside = next((size for name, size in plan.parts.items() if name.startswith("temporaries (compiler)")), None)
assert beside is not None, "the compiler is not installed"
sent = sum(one.n_bytes for one in plan.exchanged if not one.of_aux_k)
costly = next((line.partition(": ")[2] for line in plan.more if line.startswith("costly")), "refused by the compiler")
print(json.dumps({
    "mesh": "x".join(str(plan.mesh[axis]) for axis in ("data", "latent")),
    "state_gib": (plan.total - beside) / 2**30, "beside_gib": beside / 2**30, "fits": plan.total <= plan.limit,
    "exchanged_gib": sent / 2**30, "modelled_ms": 1e3 * plan.time.seconds, "costly": costly,
}))
"""


def row(target: str, overrides: list[str]) -> dict:
    """One compilation."""
    command = [sys.executable, "-c", PROGRAM, f"target={target}", "sae.matmul_dtype=bfloat16", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def broken(target: str, found: dict) -> bool:
    """Whether a row breaks a bound."""
    bad = ("error" in found) or not found["fits"]
    named = [part for part in found.get("costly", "").split(", ") if part and "(AuxK)" not in part]
    return bad or target[0] in "hb" and any(not part.startswith(("none", "copies")) for part in named)


def main() -> int:
    """The table."""
    parser = argparse.ArgumentParser(description="The training step, compiled for chips that are not here.")
    parser.add_argument("--only", default="", help="targets that begin so")
    parser.add_argument("--json", default=None, help="file for the rows")
    options = parser.parse_args()
    print("| target | step | mesh | state GiB | besides GiB | exchanged GiB | modelled ms | costly operations |")
    print("|---|---|---|---|---|---|---|---|")
    rows, failed = [], False
    for target, overrides in ROWS:
        if not target.startswith(options.only):
            continue
        found = row(target, overrides)
        failed |= broken(target, found)
        rows.append({"target": target, "overrides": overrides} | found)
        values = dict(override.split("=") for override in overrides)
        step = f"{values['sae']} {values['source.d_in']} / {values['sae.d_sae']}, k {values.get('sae.k', '-')}"
        if "error" in found:
            print(f"| {target} | {step} | | {found['error']} |", flush=True)
            continue
        figures = [found[name] for name in ("state_gib", "beside_gib", "exchanged_gib", "modelled_ms")]
        shown = " | ".join(f"{figure:.2f}" for figure in figures)
        print(f"| {target} | {step} | {found['mesh']} | {shown} | {found['costly']} |", flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
