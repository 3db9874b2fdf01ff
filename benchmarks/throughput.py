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
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saejax import sharding
from saejax.activations import normalize
from saejax.sae import base
from saejax.training import memory, optim, settings, state, step

N_BATCHES = 4
"""Different batches that the contenders cycle through."""
DEAD_AFTER_TOKENS = 10_000_000
STEPS = 100_000
"""Length of the run that each trainer believes to be in: long enough for warm schedules to be flat."""

Advance = Callable[[int], None]
"""Runs one training step on the batch of that number, to its end."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One table: an architecture at one size and precision."""

    architecture: str
    d_in: int
    d_sae: int
    k: int
    batch: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.architecture} d_in {self.d_in} d_sae {self.d_sae} k {self.k} batch {self.batch} {self.dtype}"

    def batches(self) -> list[np.ndarray]:
        """Rows of E||x||^2 = 1 with some structure: sparse codes of a random dictionary plus noise."""
        rng = np.random.default_rng(0)
        directions = rng.standard_normal((2 * self.d_in, self.d_in)).astype(np.float32) / self.d_in**0.5
        made = []
        for _ in range(N_BATCHES):
            codes = rng.exponential(size=(self.batch, 2 * self.d_in)) * (rng.random((self.batch, 2 * self.d_in)) < 0.02)
            rows = codes.astype(np.float32) @ directions
            rows += 0.1 * np.std(rows) * rng.standard_normal(rows.shape).astype(np.float32)
            made.append(rows / np.sqrt(np.mean(np.sum(rows**2, axis=1))))
        return made


# What each architecture is called, with the settings under which all do the same work.
OURS: dict[str, dict[str, Any]] = {
    "topk": {},
    "batch_topk": {},
    "matryoshka": {},
    "jumprelu": {"l0_coef": 1e-3, "bandwidth": 1e-2},
    "gated": {"l1_coef": 0.05},
    "l1": {"l1_coef": 0.05},
}
SAELENS = {
    "topk": "topk",
    "batch_topk": "batchtopk",
    "matryoshka": "matryoshka_batchtopk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "l1": "standard",
}
DICTIONARY_LEARNING = {
    "topk": ("top_k", "TopKTrainer"),
    "batch_topk": ("batch_top_k", "BatchTopKTrainer"),
    "matryoshka": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer"),
    "jumprelu": ("jumprelu", "JumpReluTrainer"),
    "gated": ("gdm", "GatedSAETrainer"),
    "l1": ("standard", "StandardTrainer"),
}


def saejax_steps(task: Task, batches: list[np.ndarray]) -> Advance:
    """The step that `saejax train` compiles, on a buffer that holds one batch."""
    kind = base.ARCHITECTURES[task.architecture]
    fields: dict[str, Any] = {"d_in": task.d_in, "d_sae": task.d_sae, **OURS[task.architecture]}
    if "k" in kind.__dataclass_fields__:
        fields["k"] = task.k
    if task.architecture in ("l1", "gated"):  # as the peers: no AuxK in L1 and Gated
        fields["aux_alpha"] = 0.0
    sparsifier = kind(**fields, matmul_dtype=base.MatmulDtype[task.dtype])
    rates = optim.OptimConfig(lr=1e-4)
    tx = optim.make(rates, STEPS, sparsifier.lr_scales(), d_sae=task.d_sae)
    train = settings.TrainConfig(
        batch=task.batch, n_lanes=1, n_tokens=task.batch * STEPS, b_dec_init=settings.DecoderBias.mean
    )
    normalizing = normalize.NormalizeConfig(mode=normalize.NormMode.none)
    mesh = sharding.make_mesh(1, 1)
    rows = [jnp.asarray(batch)[None] for batch in batches]
    now = state.create(sparsifier, tx, train, normalizing, rows[0][:, None], seed=0, mesh=mesh)
    now = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.devices()[0]), now)
    one = step.make(
        sparsifier, tx, dead_window_tokens=DEAD_AFTER_TOKENS, learning_rate=optim.schedule(rates, STEPS, task.d_sae)
    )
    compiled = jax.jit(one, donate_argnums=0).lower(now, rows[0]).compile()
    held = [now]

    def advance(number: int) -> None:
        held[0], metrics = compiled(held[0], rows[number % N_BATCHES])
        jax.block_until_ready((held[0], metrics))

    return advance


def saelens_steps(task: Task, batches: list[np.ndarray]) -> Advance:
    """`SAETrainer.step` of SAELens; autocast for bfloat16."""
    import sae_lens.config  # pyright: ignore[reportMissingImports]
    import sae_lens.registry  # pyright: ignore[reportMissingImports]
    import sae_lens.training.sae_trainer  # pyright: ignore[reportMissingImports]
    import torch

    kind, config = sae_lens.registry.get_sae_training_class(SAELENS[task.architecture])
    fields: dict[str, Any] = {"d_in": task.d_in, "d_sae": task.d_sae}
    if task.architecture in ("topk", "batch_topk", "matryoshka"):
        fields["k"] = task.k
    if task.architecture == "matryoshka":
        fields["matryoshka_widths"] = [task.d_sae * share // 32 for share in (1, 3, 7, 15, 32)]
    sae = kind(config(**fields))
    rows = [torch.from_numpy(batch) for batch in batches]
    trainer = sae_lens.training.sae_trainer.SAETrainer(
        sae_lens.config.SAETrainerConfig(
            total_training_samples=STEPS * task.batch,
            train_batch_size_samples=task.batch,
            lr=1e-4,
            lr_end=1e-5,
            dead_feature_window=DEAD_AFTER_TOKENS // task.batch,
            autocast=task.dtype == "bfloat16",
        ),
        sae,
        iter(rows),
    )

    def advance(number: int) -> None:
        trainer.step(rows[number % N_BATCHES])
        trainer.n_training_steps += 1

    return advance


def dictionary_learning_steps(task: Task, batches: list[np.ndarray]) -> Advance:
    """`update` of its trainer; autocast around it for bfloat16, as its training loop does."""
    import torch

    file, name = DICTIONARY_LEARNING[task.architecture]
    module = importlib.import_module(f"dictionary_learning.trainers.{file}")
    fields: dict[str, Any] = {"steps": STEPS, "activation_dim": task.d_in, "dict_size": task.d_sae, "layer": 0}
    fields |= {"lm_name": "none", "device": "cpu", "lr": 1e-4}
    if task.architecture in ("topk", "batch_topk", "matryoshka"):
        fields["k"] = task.k
    if task.architecture == "matryoshka":
        fields["group_fractions"] = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32]
    trainer = getattr(module, name)(**fields)
    rows = [torch.from_numpy(batch) for batch in batches]
    cast = torch.autocast("cpu", dtype=torch.bfloat16) if task.dtype == "bfloat16" else contextlib.nullcontext()

    def advance(number: int) -> None:
        with cast:
            trainer.update(number, rows[number % N_BATCHES])

    return advance


def sparsify_steps(task: Task, batches: list[np.ndarray]) -> Advance:
    """The body of sparsify's loop for one hook, without its language model; autocast around it for bfloat16."""
    import torch
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

    sae = SparseCoder(task.d_in, SparseCoderConfig(num_latents=task.d_sae, k=task.k), dtype=torch.float32)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4)
    since, fired = torch.zeros(task.d_sae, dtype=torch.long), torch.zeros(task.d_sae, dtype=torch.bool)
    rows = [torch.from_numpy(batch) for batch in batches]
    cast = torch.autocast("cpu", dtype=torch.bfloat16) if task.dtype == "bfloat16" else contextlib.nullcontext()

    def advance(number: int) -> None:
        x = rows[number % N_BATCHES]
        sae.set_decoder_norm_to_unit_norm()
        dead = since > DEAD_AFTER_TOKENS
        variance = (x - x.mean(0)).pow(2).sum()
        with cast:
            out = sae(x=x, y=x, dead_mask=dead, total_variance=variance)
        fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach()), float(out.auxk_loss.detach())
        (out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since.add_(len(x))
        since[fired] = 0
        fired.zero_()

    return advance


@dataclasses.dataclass(frozen=True)
class Contender:
    """A trainer: the module that must be there, its distribution, the architectures it has, its step."""

    module: str
    distribution: str
    architectures: tuple[str, ...]
    steps: Callable[[Task, list[np.ndarray]], Advance]


CONTENDERS = {
    "saejax": Contender("saejax", "saejax", tuple(OURS), saejax_steps),
    "sparsify": Contender("sparsify", "eai-sparsify", ("topk",), sparsify_steps),
    "dictionary_learning": Contender(
        "dictionary_learning", "dictionary-learning", tuple(DICTIONARY_LEARNING), dictionary_learning_steps
    ),
    "SAELens": Contender("sae_lens", "sae-lens", tuple(SAELENS), saelens_steps),
}


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
    if name == "saejax":
        memory.keep_pages()  # as `saejax train`
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
