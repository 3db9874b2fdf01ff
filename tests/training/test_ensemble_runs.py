"""Members of an ensemble are the runs that they would be alone: same bits, same files, same ways to go on."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import small_runs as runs

import saejax
from saejax import cli, config
from saejax.errors import UserError
from saejax.runs import ensembles, run
from saejax.storage import checkpoint
from saejax.training import ensemble_config, memory

SMALL = ("sae.d_sae=64", "source.n_features=64", "mesh.data=1", "train.eval_rows=256", "buffer.rows=512")
# Dead latents all along, so that AuxK and the counters take part.
DEAD = ("train.dead_after_tokens=256", "train.eval_every_steps=null")
# Products over a stack of matrices add up in another order; see TOLERANCE in test_ensemble.py. Over ten steps.
TOLERANCE = 1e-5

KNOBS = {
    "topk": ["ensemble.seed=[0,0,3]", "ensemble.k=[2,6,4]", "ensemble.lr=[1e-3,3e-3,1e-3]", "ensemble.combine=zip"],
    "l1": ["ensemble.seed=[0,1]", "ensemble.l1_coef=[0.1,0.5]", "ensemble.combine=zip"],
    "gated": ["ensemble.l1_coef=[0.01,0.1]"],
    "p_anneal": ["ensemble.l1_coef=[0.01,0.1]"],
    "jumprelu": ["ensemble.l0_coef=[1e-4,1e-2]", "ensemble.lr=[1e-3,1e-4]"],
    "batch_topk": ["ensemble.k=[2,6]"],
    "matryoshka": ["ensemble.k=[2,6]"],
    "abs_topk": ["ensemble.k=[2,6]", "train.resample_every_steps=4"],
    "matching_pursuit": ["ensemble.k=[2,6]", "train.ema_decay=0.9"],
}
# Of those, in which k is a number of slots, or is not varied.
STACKED = ["topk", "l1", "gated", "p_anneal", "jumprelu", "abs_topk"]


def compose(architecture, n_steps, *overrides):
    return runs.compose(architecture, n_steps, *SMALL, *DEAD, *KNOBS[architecture], *overrides)


def train_apart(cfg, root):
    """Every member as a run of its own."""
    for name, member in ensemble_config.members(cfg).items():
        run.train(member, root / name)


def assert_same_runs(members, apart, *, exactly=True):
    """The same files, configs, logs and arrays."""
    there, wanted = ({path.name: path for path in root.iterdir() if path.is_dir()} for root in (members, apart))
    assert there.keys() == wanted.keys()  # a sweep of Hydra has a multirun.yaml beside them
    for one in wanted.values():
        other = members / one.name
        assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
        assert config.from_run(one) == config.from_run(other)
        assert checkpoint.steps(one) == checkpoint.steps(other)
        for name in ("train/loss", "train/dead_share", "eval/fvu"):
            now, then = runs.logged(other, name), runs.logged(one, name)
            np.testing.assert_allclose(now, then, rtol=0 if exactly else TOLERANCE, err_msg=name)
        a, b = runs.saved(other), runs.saved(one)
        assert a.keys() == b.keys()
        for name, leaf in b.items():
            atol = 0 if exactly or leaf.dtype.kind != "f" else TOLERANCE * np.abs(leaf).max()
            np.testing.assert_allclose(a[name], leaf, rtol=0, atol=atol, err_msg=name)
        before, after = (json.loads((path / "run.json").read_text()) for path in (one, other))
        assert before["evaluation"].keys() == after["evaluation"].keys()
        assert after.keys() - before.keys() == {"ensemble_members"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An ensemble of three, its members apart, and what was compiled for the ensemble."""
    root = tmp_path_factory.mktemp("ensemble")
    cfg = compose("topk", 8, "checkpoint.save_every_steps=4", "checkpoint.keep_last=1", "train.eval_every_steps=4")
    compiled = []
    handler = logging.Handler()
    handler.emit = lambda record: compiled.append(record.getMessage())
    logging.getLogger("jax").addHandler(handler)
    with jax.log_compiles():
        result = ensembles.train(cfg, root / "ensemble")
    logging.getLogger("jax").removeHandler(handler)
    train_apart(cfg, root / "apart")
    return root, cfg, result, compiled


def test_members_are_their_own_runs_bit_for_bit(small):
    root, cfg, result, _ = small
    assert_same_runs(root / "ensemble" / "members", root / "apart")
    assert [path.name for path in result.evaluations] == list(ensemble_config.members(cfg))
    assert result.signum is None and not result.failed
    one, other = (runs.saved(root / "apart" / name) for name in ("seed0_lr0.001_k2", "seed3_lr0.001_k4"))
    np.testing.assert_array_equal(one["['buffer']['rows']"], other["['buffer']['rows']"])  # of one data_seed
    assert (one["['params']['W_enc']"] != other["['params']['W_enc']"]).any()
    dead = runs.logged(root / "apart" / "seed0_lr0.001_k2", "train/dead_share")
    assert dead[-1] > 0  # or the test would not see AuxK


def test_the_step_is_compiled_once(small):
    *_, compiled = small
    assert len([line for line in compiled if "Finished XLA compilation of jit(ensemble_step)" in line]) == 1
    assert not [line for line in compiled if "Finished XLA compilation of jit(step)" in line]


def test_a_member_is_loaded_evaluated_and_goes_on_alone(small, capsys):
    root, cfg, *_ = small
    name = next(iter(ensemble_config.members(cfg)))
    member, alone = root / "ensemble" / "members" / name, root / "apart" / name
    rows = next(iter(cfg.source.heldout(64, 64)))
    np.testing.assert_array_equal(saejax.load(member)(rows), saejax.load(alone)(rows))
    longer = [f"train.n_tokens={128 * 10}"]
    for path in (member, alone):
        assert run.train(config.from_run(path, longer), path, resume=True).step == 10
    assert_equal_arrays(runs.saved(member), runs.saved(alone))
    with pytest.raises(UserError, match="is an ensemble: take one of .*members/seed0_lr0.001_k2"):
        saejax.load(root / "ensemble")
    assert cli.main(["report", f"sweep={root / 'ensemble'}"]) == 0


def assert_equal_arrays(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_broken_off_ensemble_goes_on_from_the_newest_common_step(tmp_path, monkeypatch):
    cfg = compose("topk", 8, "checkpoint.save_every_steps=2", "sae.k=2", "ensemble.k=[]", "ensemble.lr=[]",
                  "ensemble.seed=[0,1]")  # fmt: skip
    ensembles.train(cfg, tmp_path / "straight")
    saves = []

    class Killed(BaseException):
        pass

    def save(self, step, *args):
        saves.append(step)
        if len(saves) == 6:  # of step 6 one member has been saved, one has not
            raise Killed
        return plain(self, step, *args)

    plain = checkpoint.Checkpoints.save
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(checkpoint.Checkpoints, "save", save)
        ensembles.train(cfg, tmp_path / "broken")
    assert saves[-2:] == [6, 6]
    first, second = sorted((tmp_path / "broken" / "members").iterdir())
    assert checkpoint.steps(first)[-1] == 6 and checkpoint.steps(second)[-1] == 4
    ensembles.train(cfg, tmp_path / "broken")
    assert (first / "checkpoints_ahead" / "6").is_dir()
    for path in (first, second):
        straight = tmp_path / "straight" / "members" / path.name
        assert_equal_arrays(runs.saved(path), runs.saved(straight))
        assert runs.logged(path, "train/loss") == runs.logged(straight, "train/loss")
        assert checkpoint.steps(path) == checkpoint.steps(straight)
    # Finished members are left alone, a longer ensemble trains on, another one is refused.
    before = (first / "run.json").read_bytes()
    assert ensembles.train(cfg, tmp_path / "broken").tokens_per_second == 0
    assert before == (first / "run.json").read_bytes()
    with pytest.raises(UserError, match="holds another ensemble, with seed1"):
        ensembles.train(runs.compose("topk", 8, *SMALL, "ensemble.seed=[0,2]"), tmp_path / "broken")


def test_a_member_that_is_not_finite_is_left_out(tmp_path, caplog):
    knobs = ["ensemble.lr=[1e-3,1e30]", "ensemble.seed=[]", "ensemble.k=[]", "optim.warmup_share=0", "sae.aux_alpha=0"]
    cfg = compose("topk", 6, "checkpoint.save_every_steps=1", "train.log_every_steps=50", *knobs)
    result = ensembles.train(cfg, tmp_path / "both")
    bad, good = (tmp_path / "both" / "members" / name for name in ("lr1e+30", "lr0.001"))
    assert result.failed == [bad] and list(result.evaluations) == [good]
    assert "The other members continue" in caplog.text
    record = json.loads((bad / "run.json").read_text())
    assert not record["finished"] and "not finite at step" in record["failed"]
    run.train(ensemble_config.members(cfg)["lr0.001"], tmp_path / "alone")
    assert_equal_arrays(runs.saved(good), runs.saved(tmp_path / "alone"))
    for step in checkpoint.steps(bad):
        assert all(np.isfinite(leaf).all() for leaf in runs.saved(bad, step).values())
    assert ensembles.train(cfg, tmp_path / "both").failed == [bad]  # and stays so until it goes on alone


@pytest.mark.nightly
def test_an_ensemble_ends_when_no_member_is_finite(tmp_path):
    knobs = ["ensemble.lr=[1e30,2e30]", "ensemble.seed=[]", "ensemble.k=[]", "optim.warmup_share=0"]
    with pytest.raises(UserError, match=r"train/\w+ is nan at step .* lower optim.lr"):
        ensembles.train(compose("topk", 6, *knobs), tmp_path)
    assert all("failed" in json.loads(path.read_text()) for path in tmp_path.glob("members/*/run.json"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ensemble.l1_coef=[1]"], "ensemble.l1_coef must be empty: sae=topk has no knob l1_coef; it has k"),
        (["ensemble.k=[1,2]", "ensemble.lr=[1e-3]", "ensemble.combine=zip"], "lists of one length: lr has 1, k has 2"),
        (["ensemble.k=[2,2]"], "ensemble.k must not repeat a value"),
        (["ensemble.k=[2,2]", "ensemble.combine=zip"], "two members are k2"),
        (["ensemble.k=[2,999]"], r"sae.k must be in \[1, d_sae=128\], got 999"),
        (["ensemble.lr=[0.0]"], "optim.lr must be above 0"),
        (["mesh.ensemble=2"], "mesh.ensemble must be 1 without an ensemble"),
        (["mesh.ensemble=2", "ensemble.seed=[0,1,2]"], "must divide the number of members, 3"),
        (["mesh.ensemble=2", "ensemble.seed=[0,1]", "ensemble.form=loop"], "must be vmap or auto with mesh.ensemble=2"),
        (["sae=batch_topk", "ensemble.k=[2,4]", "ensemble.form=vmap"], "the k of sae=batch_topk cannot be masked"),
        (["ensemble.k=[2,4]", "sae.multi_topk_alpha=0.1", "ensemble.form=vmap"], "multi_topk_alpha or k_start"),
        (["ensemble.k=[2,4]", "train.on_nonfinite=skip"], "train.on_nonfinite must be stop"),
        (["mesh.data=8", "ensemble.seed=[0,1]", "mesh.ensemble=2"], r"mesh.ensemble=2 needs 16 devices"),
    ],
)
def test_what_cannot_be_is_refused(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        ensembles.train(runs.compose("topk", 4, *overrides), tmp_path)
    assert not list(tmp_path.rglob("checkpoints/*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep.fold=yes"], "sweep.fold must be true or false, got yes"),
        (["sweep.fold=true", "seed=0"], "sweep.fold=true is for sweeps: add -m"),
        (["-m", "sweep.fold=true", "seed=0,1", "launcher=submitit_slurm"], "trains a grid in this process"),
        (["-m", "sweep.fold=true", "seed=0,1", "--cfg=job"], "does not go with --cfg=job"),
        (["-m", "sweep.fold=true", "optim.lr=interval(0,1)"], "a grid takes lists of values"),
        (["-m", "sweep.fold=true", "seed=0,1", "hydra.sweep.subdir=x"], "gives .*x to two jobs"),
    ],
)
def test_what_cannot_be_folded_is_refused(arguments, message, capfd):
    assert cli.main(["train", *arguments]) == 2
    error = capfd.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert re.search(message, error)


def test_memory_names_the_members_that_would_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "limit_bytes", lambda: 1)
    with pytest.raises(UserError, match="one step of 2 members needs .* about 0 of them would fit"):
        ensembles.train(runs.compose("batch_topk", 4, *SMALL, "sae.aux_alpha=0", "ensemble.seed=[0,1]"), tmp_path)
    assert memory.fitting(need=700, limit=699, shared=100, n_members=3) == 2


def test_groups_hold_what_shares_its_data_and_settings():
    def of(*overrides):
        return runs.compose("topk", 4, *overrides)

    members = {
        "a": of("sae.k=4"),
        "b": of("sae.k=8", "optim.lr=1e-4"),
        "other data": of("seed=1"),
        "same data": of("seed=1", "data_seed=0"),
        "longer": of("train.n_tokens=4096"),
        "skips": of("train.on_nonfinite=skip"),
        "clipped": of("optim.clip_norm=2"),
    }
    found = [list(group) for group in ensembles.groups(members)]  # pyright: ignore[reportArgumentType]
    assert found == [["a", "b", "same data"], ["other data"], ["longer"], ["skips"], ["clipped"]]


@pytest.mark.nightly
@pytest.mark.parametrize("architecture", KNOBS)
def test_every_architecture_is_its_own_runs(architecture, tmp_path):
    cfg = compose(architecture, 10)
    ensembles.train(cfg, tmp_path / "ensemble")
    train_apart(cfg, tmp_path / "apart")
    assert_same_runs(tmp_path / "ensemble" / "members", tmp_path / "apart")


@pytest.mark.nightly
@pytest.mark.parametrize("architecture", STACKED)
@pytest.mark.parametrize("mesh", ["one", "many"])
def test_the_stacked_form_is_the_loop_up_to_rounding(architecture, mesh, tmp_path):
    """On one device; on 2 x 2 x 2 of them, members, rows and latents split."""
    knobs = KNOBS[architecture] if architecture != "topk" else [
        "ensemble.k=[2,6]", "ensemble.seed=[0,3]", "ensemble.lr=[]", "ensemble.combine=grid"
    ]  # fmt: skip
    cfg = compose(architecture, 10, *knobs)
    ensembles.train(cfg, tmp_path / "loop")
    sizes = ["mesh.ensemble=2", "mesh.data=2", "mesh.latent=2"] if mesh == "many" else ["ensemble.form=vmap"]
    ensembles.train(compose(architecture, 10, *knobs, *sizes), tmp_path / "stacked")
    for one in (tmp_path / "loop" / "members").iterdir():
        other = tmp_path / "stacked" / "members" / one.name
        np.testing.assert_allclose(runs.logged(other, "train/loss"), runs.logged(one, "train/loss"), rtol=TOLERANCE)
        a, b = runs.saved(other), runs.saved(one)
        for name, leaf in b.items():
            if "opt_state" not in name:  # Adam's step divides by what may be rounding alone
                atol = TOLERANCE * np.abs(leaf).max() if leaf.dtype.kind == "f" else 0
                np.testing.assert_allclose(a[name], leaf, rtol=0, atol=atol, err_msg=name)


@pytest.mark.nightly
def test_a_folded_sweep_leaves_what_the_sweep_would(tmp_path):
    sweep = ["train", "-m", "seed=0,1", "data_seed=0", "sae.k=2", "train.n_tokens=512,768", "train.batch=128"]
    sweep += [*SMALL, *DEAD]
    assert cli.main([*sweep, f"hydra.sweep.dir={tmp_path / 'apart'}"]) == 0
    assert cli.main([*sweep, "sweep.fold=true", f"hydra.sweep.dir={tmp_path / 'folded'}"]) == 0
    assert_same_runs(tmp_path / "folded", tmp_path / "apart")
    log = (tmp_path / "folded" / "3" / "train.log").read_text()
    assert "folded into one step: 1, 3" in log
    # Again: nothing is left to do.
    before = (tmp_path / "folded" / "3" / "run.json").read_bytes()
    assert cli.main([*sweep, "sweep.fold=true", f"hydra.sweep.dir={tmp_path / 'folded'}"]) == 0
    assert before == (tmp_path / "folded" / "3" / "run.json").read_bytes()


@pytest.mark.nightly
def test_a_killed_ensemble_goes_on_bit_for_bit(tmp_path):
    code = "import sys; from saejax import cli; sys.exit(cli.main(sys.argv[1:]))"
    arguments = ["train", "train.n_tokens=51200", "train.batch=512", "buffer.rows=4096", "train.log_every_steps=1"]
    arguments += ["train.eval_rows=512", "train.eval_every_steps=null", "checkpoint.save_every_steps=25"]
    arguments += ["sae.d_sae=512", "ensemble.k=[2,4]", "ensemble.seed=[0,1]"]

    def start(run_dir):
        command = [sys.executable, "-c", code, *arguments, f"hydra.run.dir={run_dir}"]
        return subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert start(straight).wait(240) == 0
    names = sorted(path.name for path in (straight / "members").iterdir())
    process, deadline = start(killed), time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (killed / "members" / names[0] / "checkpoints" / "25").exists():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.wait(60) == -signal.SIGKILL
    for _ in range(2):  # nothing is left to do the second time
        assert start(killed).wait(240) == 0
    for name in names:
        one, other = straight / "members" / name, killed / "members" / name
        assert_equal_arrays(runs.saved(other), runs.saved(one))
        assert runs.logged(other, "train/loss") == runs.logged(one, "train/loss")
