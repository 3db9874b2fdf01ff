"""Full training steps of saejax and of every installed peer, turn by turn, and the machine's floor.

A step is forward, loss, AuxK with its active path present, backward, clipping where the trainer clips, Adam, unit
decoder rows where the trainer keeps them, dead-latent tracking. Every peer runs its own trainer's step: SAELens
`SAETrainer.step`, dictionary_learning `Trainer.update`; sparsify's loop cannot be called step by step, so the body of
its loop is called here in its order. Every contender lives in a process of its own, as it would in use, with the same
batches; within a turn they run one after the other, the others asleep. Printed are medians over the turns of the time,
and of the ratios within a turn. No latent is dead.

The floor of the k-sparse step is the encoder product at the best float32 (or bfloat16) rate that XLA or PyTorch reach
here, four passes over batch x k rows of d_in numbers and seven over every parameter at the best copying rate.

    python benchmarks/throughput.py --turns 9                      # TopK, both shapes, float32 and bfloat16
    python benchmarks/throughput.py --architecture jumprelu gated --shape 512 4096 32 2048
"""

import sys

from saejax.cli import kept_pages

if "saejax" in sys.argv:  # a process that contends for it; as `saejax train`, before NumPy and JAX
    kept_pages.keep()

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from trainers import CONTENDERS, OURS, Contender, Task


def installed(task: Task, wanted: list[str]) -> dict[str, Contender]:
    """The contenders that are here and have the architecture."""
    here = {name: CONTENDERS[name] for name in wanted if importlib.util.find_spec(CONTENDERS[name].module)}
    return {name: contender for name, contender in here.items() if task.architecture in contender.architectures}


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def best(run: Callable[[], Any], turns: int = 7) -> float:
    """Shortest wall time of a few calls after two to warm up."""
    run(), run()
    return min(seconds(run) for _ in range(turns))


def ceilings(task: Task) -> dict[str, float]:
    """FLOP/s of the encoder product and bytes/s of a copy, the best of XLA and PyTorch."""
    shape = (task.batch, task.d_in), (task.d_in, task.d_sae)
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, size).astype(task.dtype) for key, size in zip(keys, shape, strict=True))
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    flop = 2 * task.batch * task.d_in * task.d_sae
    rates = {"product_xla": flop / best(lambda: jax.block_until_ready(product(a, b)))}
    n = 1 << 25
    add = jax.jit(lambda a: a + 1, donate_argnums=0)
    held = [jnp.zeros(n)]

    def triad() -> None:
        held[0] = add(held[0])
        jax.block_until_ready(held[0])

    rates["bytes_xla"] = 8 * n / best(triad)
    if importlib.util.find_spec("torch"):
        import torch

        dtype = getattr(torch, task.dtype)
        a, b = torch.randn(shape[0], dtype=dtype), torch.randn(shape[1], dtype=dtype)
        rates["product_torch"] = flop / best(lambda: a @ b)
        held = torch.zeros(n)
        rates["bytes_torch"] = 8 * n / best(lambda: held.add_(1))
    return rates


def floor_seconds(task: Task, rates: dict[str, float]) -> dict[str, float]:
    """What the k-sparse step cannot go below."""
    flops = max(rate for name, rate in rates.items() if name.startswith("product"))
    copying = max(rate for name, rate in rates.items() if name.startswith("bytes"))
    parts = {
        "product": 2 * task.batch * task.d_in * task.d_sae / flops,
        "sparse": 4 * task.batch * task.k * task.d_in * 4 / copying,
        "adam": 7 * 2 * task.d_in * task.d_sae * 4 / copying,
    }
    return parts | {"all": sum(parts.values())}


def contend(name: str, task: Task, answers_to: int) -> None:
    """A contender's process: prints "ready", then the seconds of a step for every line that it reads."""
    advance = CONTENDERS[name].steps(task, task.batches())
    for number in range(3):
        advance(number)
    answers = os.fdopen(answers_to, "w", buffering=1)
    print("ready", file=answers)
    for number, _ in enumerate(sys.stdin):
        print(seconds(lambda: advance(number)), file=answers)  # noqa: B023


def measure(task: Task, wanted: list[str], turns: int) -> dict[str, Any]:
    """One table's figures: seconds of every turn of every contender, ceilings, floor."""
    with contextlib.ExitStack() as stack:
        asked = {name: stack.enter_context(_process(name, task)) for name in installed(task, wanted)}
        taken: dict[str, list[float]] = {name: [] for name in asked}
        for _ in range(turns):
            for name, ask in asked.items():
                taken[name].append(float(ask()))
    rates = ceilings(task)
    return {**dataclasses.asdict(task), "seconds": taken, "ceilings": rates, "floor": floor_seconds(task, rates)}


@contextlib.contextmanager
def _process(name: str, task: Task) -> Iterator[Callable[[], str]]:
    """A contender's process, ready; what it yields asks for one step."""
    reading, writing = os.pipe()
    command = [sys.executable, __file__, "--contend", name, json.dumps(dataclasses.asdict(task))]
    # Its answers come by a pipe of their own: peers print what they like.
    run = subprocess.Popen(
        [*command, "--answers", str(writing)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        pass_fds=(writing,),
    )
    os.close(writing)
    assert run.stdin is not None
    with os.fdopen(reading) as answers:

        def ask() -> str:
            print(file=run.stdin, flush=True)
            return answers.readline()

        if answers.readline() != "ready\n":
            raise SystemExit(f"{name} could not start on {task.name}")
        try:
            yield ask
        finally:
            run.stdin.close()
            run.wait()


def table(found: dict[str, Any]) -> Iterator[str]:
    """Markdown lines of one table."""
    taken, ours = found["seconds"], found["seconds"].get("saejax")
    yield "| | ms | tokens/s | saejax is faster by |"
    yield "|---|---|---|---|"
    for name, times in taken.items():
        middle = statistics.median(times)
        ratio = (
            "" if ours is None or name == "saejax" else _quartiles([t / o for t, o in zip(times, ours, strict=True)])
        )
        yield f"| {name} | {1e3 * middle:.0f} | {found['batch'] / middle:,.0f} | {ratio} |"
    if ours and found["architecture"] == "topk":
        floor = found["floor"]
        parts = ", ".join(f"{name} {1e3 * value:.0f}" for name, value in floor.items() if name != "all")
        share = floor["all"] / statistics.median(ours)
        yield f"\nFloor {1e3 * floor['all']:.0f} ms ({parts}); saejax reaches {share:.0%} of it."


def _quartiles(values: list[float]) -> str:
    if len(values) < 3:
        return f"{statistics.median(values):.2f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def machine() -> str:
    """Processor, cores and versions, in one line."""
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        here = {
            d: metadata.version(c.distribution) for d, c in CONTENDERS.items() if importlib.util.find_spec(c.module)
        }
        versions = ", ".join(f"{key} {value}" for key, value in here.items())
        return f"{os.cpu_count()} x {name}, {jax.devices()[0].device_kind}, jax {jax.__version__}, {versions}"
    return platform.platform()


def main() -> None:
    """Reads arguments, measures, prints tables, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", nargs="+", default=["topk"], choices=list(OURS))
    parser.add_argument("--shape", nargs=4, type=int, action="append", metavar=("D_IN", "D_SAE", "K", "BATCH"))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=pathlib.Path, help="JSON lines are added to this file")
    parser.add_argument("--contend", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
    if args.contend:
        contend(args.contend[0], Task(**json.loads(args.contend[1])), args.answers)
        return
    print(machine(), flush=True)
    for architecture in args.architecture:
        for shape in args.shape or [(512, 4096, 32, 2048), (768, 16384, 32, 4096)]:
            for dtype in args.dtype:
                task = Task(architecture, *shape, dtype)
                found = measure(task, args.only, args.turns)
                print(f"\n{task.name}\n", *table(found), sep="\n", flush=True)
                if args.out:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    with args.out.open("a") as lines:
                        lines.write(json.dumps({"machine": machine(), **found}) + "\n")


if __name__ == "__main__":
    main()
