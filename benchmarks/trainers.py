"""The contenders of `throughput.py`: how each trainer takes one step.

A step is forward, loss, AuxK with its active path present, backward, clipping where the trainer clips, Adam, unit
decoder rows where the trainer keeps them, dead-latent tracking. Every peer runs its own trainer's step; sparsify's loop
cannot be called step by step, so the body of its loop is called here in its order.
"""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saejax.activations import normalize
from saejax.parallel import sharding
from saejax.sae import base
from saejax.training import optim, settings, state, step

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
