"""Presets of published recipes: each composes, says the numbers of its source, and trains.

The table is written from the sources that the header of each file names, not from the files.
"""

import json

import pytest

from saejax import config
from saejax.activations.normalize import NormMode
from saejax.runs import run
from saejax.sae import base

# Of the sources: architecture; rows, batch; lr, beta1, beta2, eps, clipping; warm-up and decay as shares of the steps.
TABLE = {
    "gao_topk": ("topk", None, 131_072, 1e-4, 0.9, 0.999, 6.25e-10, None, 0, 0),
    "batch_topk": ("batch_topk", 10**9, 4096, 3e-4, 0.9, 0.99, 1e-8, None, 0, 0),
    "matryoshka": ("matryoshka", 5 * 10**8, 4096, 3e-4, 0.9, 0.99, 1e-8, None, 0, 0),
    "anthropic_l1_2024": ("l1", 200_000 * 4096, 4096, 5e-5, 0.9, 0.999, 1e-8, 1.0, 0, 0.2),
    "anthropic_jumprelu_2025": ("jumprelu", None, None, 2e-4, 0.9, 0.999, 1e-8, 1.0, 0, 0.2),
    "gemma_scope_1": ("jumprelu", 4 * 10**9, 4096, 7e-5, 0, 0.999, 1e-8, None, 1000 / 976_562, 0),
    "gemma_scope_2": ("jumprelu", None, 4096, 7e-5, 0, 0.999, 1e-8, None, 1000 / 976_562, 0),
    "gated": ("gated", 5 * 10**8, 2048, 3e-4, 0, 0.999, 1e-8, None, 1000 / 244_140, 0.2),
    "saebench": ("topk", 5 * 10**8, 2048, 3e-4, 0.9, 0.999, 1e-8, 1.0, 1000 / 244_140, 0.2),
    "saebench/gated": ("gated", 5 * 10**8, 2048, 3e-4, 0, 0.999, 1e-8, None, 1000 / 244_140, 0.2),
    "saebench/jumprelu": ("jumprelu", 5 * 10**8, 2048, 3e-4, 0, 0.999, 1e-8, 1.0, 1000 / 244_140, 0.2),
    "saebench/l1": ("l1", 5 * 10**8, 2048, 3e-4, 0.9, 0.999, 1e-8, 1.0, 1000 / 244_140, 0.2),
    "saebench/l1_plain": ("l1", 5 * 10**8, 2048, 3e-4, 0.9, 0.999, 1e-8, None, 1000 / 244_140, 0.2),
    "saebench/p_anneal": ("p_anneal", 5 * 10**8, 2048, 3e-4, 0.9, 0.999, 1e-8, None, 1000 / 244_140, 0.2),
}

# What else defines them, at d_in = 64 and the published length; steps as the sources count them.
KEYS = {
    "gao_topk": {
        "sae.k": 32, "sae.aux_alpha": 1 / 32, "sae.n_aux": 32, "sae.unit_decoder": True, "sae.subtract_b_dec": True,
        "optim.lr_reference_d_sae": 32768, "train.dead_after_tokens": 10**7, "train.ema_decay": 0.999,
        "train.b_dec_init.name": "geometric_median", "normalize.mode": NormMode.layer_norm,
    },
    "batch_topk": {
        "sae.k": 32, "sae.d_sae": 64 * 16, "sae.aux_alpha": 1 / 32, "sae.n_aux": 512, "sae.unit_decoder": True,
        "train.dead_after_tokens": 5 * 4096, "train.b_dec_init.name": "zero", "normalize.mode": NormMode.layer_norm,
        "buffer.rows": 10 * 4096,
    },
    "matryoshka": {
        "sae.k": 32, "sae.d_sae": 64 * 16, "sae.widths": (64, 128, 256, 512, 1024), "sae.n_aux": 512,
        "sae.aux_alpha": 1 / 32, "train.dead_after_tokens": 20 * 4096, "normalize.mode": NormMode.none,
    },
    "anthropic_l1_2024": {
        "sae.l1_coef": 5, "sae.l1_warmup_steps": 10_000, "sae.penalty.name": "decoder_norm", "sae.aux_alpha": 0,
        "sae.decoder_init_norm": 0.1, "sae.unit_decoder": False, "sae.subtract_b_dec": False,
        "normalize.mode": NormMode.sqrt_d,
    },
    "anthropic_jumprelu_2025": {
        "sae.penalty.name": "tanh", "sae.tanh_scale": 4, "sae.bandwidth": 2, "sae.threshold_init": 0.1,
        "sae.pre_act_coef": 3e-6, "sae.l0_coef": 10, "sae.ste_to_input": True, "sae.subtract_b_dec": False,
        "sae.unit_decoder": False, "sae.decoder_init_norm": pytest.approx(3**-0.5, abs=1e-3),
        "train.b_enc_init.name": "firing_rate", "normalize.mode": NormMode.sqrt_d,
    },
    "gemma_scope_1": {
        "sae.penalty.name": "step", "sae.bandwidth": 1e-3, "sae.threshold_init": 1e-3, "sae.l0_warmup_steps": 10_000,
        "sae.unit_decoder": True, "sae.subtract_b_dec": True, "optim.warmup.name": "cosine",
        "normalize.mode": NormMode.unit,
    },
    "gemma_scope_2": {
        "sae.penalty.name": "quadratic", "sae.bandwidth": 1e-3, "sae.threshold_init": 1e-3,
        "sae.l0_warmup_steps": 50_000, "normalize.mode": NormMode.unit,
    },
    "gated": {"sae.l1_warmup_steps": 5000, "sae.aux_alpha": 0, "normalize.mode": NormMode.unit},
    "saebench": {
        "sae.aux_alpha": 1 / 32, "sae.n_aux": 32, "train.dead_after_tokens": 10**7, "normalize.mode": NormMode.unit,
        "train.b_dec_init.name": "geometric_median",
    },
    "saebench/gated": {"sae.l1_warmup_steps": 5000, "sae.aux_alpha": 0},
    # (L0 / L0* - 1)^2 = l0_coef 2 / L0* (L0 - L0*)^2
    "saebench/jumprelu": {
        "sae.l0_coef": 1 / (2 * 80), "sae.target_l0": 80, "sae.bandwidth": 1e-3, "sae.l0_warmup_steps": 5000,
        "sae.subtract_b_dec": False,
    },
    "saebench/l1": {"sae.l1_warmup_steps": 5000, "sae.unit_decoder": False, "sae.decoder_init_norm": 0.1},
    "saebench/l1_plain": {"sae.l1_warmup_steps": 5000, "sae.unit_decoder": True, "sae.penalty.name": "plain"},
    "saebench/p_anneal": {
        "sae.p_end": 0.2, "sae.anneal_start_step": 10_000, "sae.anneal_steps": 234_140, "sae.l1_warmup_steps": 5000,
    },
}  # fmt: skip


def composed(*overrides):
    return config.load("train", config.Config, list(overrides))


def value(cfg, key):
    for name in key.split("."):
        cfg = getattr(cfg, name)
    return cfg


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_has_the_numbers_of_its_source(name):
    cfg = composed(f"experiment={name}")
    kind, n_tokens, batch, lr, beta1, beta2, eps, clip, warmup, decay = TABLE[name]
    assert type(cfg.sae) is base.ARCHITECTURES[kind]
    assert n_tokens in (None, cfg.train.n_tokens) and batch in (None, cfg.train.batch)
    optim = cfg.optim
    assert (optim.name.name, optim.lr, optim.beta1, optim.beta2) == ("adam", lr, beta1, beta2)
    assert (optim.eps, optim.clip_norm, optim.decay_share) == (eps, clip, decay)
    assert optim.warmup_share == pytest.approx(warmup, rel=1e-4)
    assert {key: value(cfg, key) for key in KEYS[name]} == KEYS[name]


def test_the_table_holds_every_recipe():
    root = config.Path(config.conf_dir()) / "experiment"
    recipes = {str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml") if "# Recipe, " in p.read_text()}
    parts = {f"saebench/{p.stem}" for p in (root / "saebench").glob("*.yaml")} - {"saebench/shared"}
    assert recipes | parts == TABLE.keys() == KEYS.keys()


def test_penalties_over_all_of_training_reach_their_weight_at_its_end():
    cfg = composed("experiment=anthropic_jumprelu_2025", "train.n_tokens=40960")
    assert cfg.sae.l0_warmup_steps == cfg.train.n_steps == 10
    cfg = composed("experiment=gemma_scope_1", "train.n_tokens=4096000", "train.batch=40", "buffer.rows=4096")
    assert cfg.sae.l0_warmup_steps == pytest.approx(0.01024 * 102_400, abs=1)


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_takes_any_source_and_one_word_makes_it_small(name, small_store):
    cfg = composed(f"experiment={name}", "size=small", "source=store", f"source.path={small_store}")
    assert cfg.sae.d_in == cfg.source.d_in == 24
    assert "saebench" in name or cfg.sae.d_sae % 24 == 0
    assert (cfg.train.n_tokens, cfg.train.batch, cfg.buffer.rows) == (2**20, 1024, 2**14)
    assert cfg.train.dead_window_tokens == 2**15


def test_what_is_said_goes_before_the_size():
    assert composed("experiment=gao_topk", "size=small", "train.batch=256").train.batch == 256


def test_the_suite_is_a_sweep():
    for sae in ("batch_topk", "matryoshka"):
        cfg = composed("experiment=saebench", f"sae={sae}", "sae.k=640", "sae.d_sae=4096")
        assert (cfg.sae.name, cfg.sae.k, cfg.sae.d_sae) == (sae, 640, 4096)
    assert composed("experiment=saebench/jumprelu", "sae.target_l0=20").sae.l0_coef == 1 / 40


@pytest.mark.parametrize("name", [n if n == "gated" else pytest.param(n, marks=pytest.mark.nightly) for n in TABLE])
def test_a_recipe_trains(name, tmp_path):
    cfg = composed(
        *(
            f"experiment={name}",
            "mesh=single",
            "sae.d_sae=96",
            "train.n_tokens=192",
            "train.batch=64",
            "buffer.rows=512",
        ),
        *("train.eval_rows=64", "train.log_every_steps=1", "train.dead_after_tokens=64", "source.heldout_rows=256"),
    )
    assert run.train(cfg, tmp_path).step == 3
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["train/fvu"] < 1e3 for line in lines if "train/fvu" in line)
