"""Nothing is lost: killed, stopped and resumed runs end as the one that was never interrupted."""

import os
import signal
import subprocess
import sys
import time

import forked
import numpy as np
import pytest
import small_runs as runs

from saejax import config
from saejax.errors import UserError
from saejax.parallel import signals
from saejax.runs import run
from saejax.sae import base

# The command line of `runs.compose(architecture, 100)`, checkpoints kept so that step 50 can be looked at.
COMMAND = [
    "train.n_tokens=51200", "train.batch=512", "buffer.rows=4096", "train.log_every_steps=1", "train.eval_rows=512",
    "train.dead_after_tokens=1024", "train.eval_every_steps=null", "checkpoint.save_every_steps=50",
    "checkpoint.keep_last=5", "sae.d_sae=1024",
]  # fmt: skip


def start(architecture: str, run_dir, *overrides: str) -> subprocess.Popen:
    """A run in a process of its own, on one device."""
    sizes = [o for o in runs.SIZES[architecture] if "d_sae" not in o]
    code = "import sys; from saejax import cli; sys.exit(cli.main(sys.argv[1:]))"
    arguments = ["train", *sizes, *COMMAND, f"hydra.run.dir={run_dir}", *overrides]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE
    )


def resume(run_dir) -> int:
    """Go on with a run in a process of its own."""
    return forked.run("train", f"resume={run_dir}").returncode


def interrupt(process: subprocess.Popen, run_dir, at_step: int, signum: int) -> bool:
    """Send a signal once a checkpoint of `at_step` exists; False when the run was over before."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run_dir / "checkpoints" / str(at_step)).exists():
            process.send_signal(signum)
            break
        time.sleep(0.002)
    process.wait(60)
    return not (run_dir / "checkpoints" / "100").exists()


def assert_equal_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("architecture", runs.every_architecture("topk"))
def test_killed_and_resumed_equals_straight_bit_for_bit(architecture, tmp_path):
    straight = tmp_path / "straight"
    assert start(architecture, straight).wait(240) == 0
    for attempt in range(5):
        killed = tmp_path / f"killed{attempt}"
        if interrupt(start(architecture, killed), killed, 50, signal.SIGKILL):
            break
    else:
        pytest.fail("the run was over before it could be killed, five times")
    assert_equal_bits(runs.saved(killed, 50), runs.saved(straight, 50))
    assert resume(killed) == 0
    assert_equal_bits(runs.saved(killed, 100), runs.saved(straight, 100))
    # The loader went on where it was, so every logged loss is the same, each step once.
    assert runs.logged(killed, "step") == runs.logged(straight, "step")
    assert runs.logged(killed, "train/loss") == runs.logged(straight, "train/loss")


def test_sigterm_saves_says_how_to_go_on_and_loses_nothing(tmp_path):
    for attempt in range(5):
        run_dir = tmp_path / f"stopped{attempt}"
        process = start("topk", run_dir)
        if interrupt(process, run_dir, 50, signal.SIGTERM):
            break
    assert process.returncode == 128 + signal.SIGTERM
    assert f"saejax train resume={run_dir}" in process.stderr.read().decode()
    stopped_at = max(int(p.name) for p in (run_dir / "checkpoints").iterdir())
    assert stopped_at == runs.logged(run_dir, "step")[-1] or stopped_at > 50
    assert resume(run_dir) == 0
    assert runs.logged(run_dir, "train/loss").__len__() == 100


@pytest.mark.parametrize("meshes", [[(1, 1)], pytest.param([(2, 1), (1, 4), (1, 1)], marks=pytest.mark.nightly)])
def test_a_checkpoint_goes_onto_other_meshes_and_one_device(meshes, tmp_path):
    cfg = runs.compose("topk", 20, "mesh.data=4", "mesh.latent=2", "checkpoint.keep_last=9")
    runs.train(tmp_path, cfg)
    before = runs.saved(tmp_path)
    losses = runs.logged(tmp_path, "train/loss")
    for n_data, n_latent in meshes:
        again = config.from_run(
            tmp_path, [f"mesh.data={n_data}", f"mesh.latent={n_latent}", f"train.n_tokens={128 * 20}"]
        )
        outcome = runs.train(tmp_path, again, resume=True)
        assert outcome.step == 20
        devices = outcome.state.params.W_enc.sharding.device_set
        assert len(devices) == n_data * n_latent
        np.testing.assert_array_equal(outcome.state.params.W_enc, before["['params']['W_enc']"])
        np.testing.assert_array_equal(outcome.state.buffer.rows, before["['buffer']['rows']"])
    assert runs.logged(tmp_path, "train/loss") == losses
    # For analysis no mesh is needed at all, and the normaliser is folded in.
    sae = run.load(tmp_path)
    rows = next(iter(cfg.source.heldout(64, 64)))
    normalized = (rows - before["['normalizer']['mean']"]) * before["['normalizer']['scale']"]
    params = base.SAEParams(**{n: before[f"['params']['{n}']"] for n in ("W_enc", "b_enc", "W_dec", "b_dec")})
    recon = np.asarray(cfg.sae.decode(params, cfg.sae.encode(params, normalized)))
    expected = recon / before["['normalizer']['scale']"] + before["['normalizer']['mean']"]
    np.testing.assert_allclose(sae(rows), expected, rtol=1e-4, atol=1e-4)


def test_a_finished_directory_is_not_overwritten(tmp_path):
    cfg = runs.compose("topk", 4)
    runs.train(tmp_path, cfg)
    with pytest.raises(UserError, match="already holds checkpoints: continue with resume="):
        runs.train(tmp_path, cfg)


def test_a_broken_checkpoint_falls_back_to_the_one_before(tmp_path, caplog):
    cfg = runs.compose("topk", 8, "checkpoint.save_every_steps=4", "checkpoint.keep_last=5")
    runs.train(tmp_path, cfg)
    for file in (tmp_path / "checkpoints" / "8" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    outcome = runs.train(tmp_path, cfg, resume=True)
    assert outcome.step == 8
    assert "checkpoint 8 cannot be restored" in caplog.text
    # The broken one is out of the way and a good one in its place.
    assert run.load(tmp_path).provenance["step"] == 8
    assert (tmp_path / "checkpoints_broken" / "8").exists()
    assert len(runs.logged(tmp_path, "train/loss")) == 8


def test_what_would_make_another_run_is_refused_and_the_run_stays_whole(tmp_path):
    cfg = runs.compose("topk", 4)
    runs.train(tmp_path, cfg)
    before = (tmp_path / "config.yaml").read_bytes(), (tmp_path / "run.json").read_bytes()
    for override in ("sae.d_sae=64", "seed=5", "train.batch=256", "buffer.rows=2048", "source.noise=0.5"):
        key = override.split("=")[0]
        with pytest.raises(UserError, match=f"{key} cannot change on resume"):
            runs.train(tmp_path, config.from_run(tmp_path, [override]), resume=True)
    # Going on with a finished run changes nothing, a longer one trains on.
    assert runs.train(tmp_path, config.from_run(tmp_path), resume=True).step == 4
    assert before == ((tmp_path / "config.yaml").read_bytes(), (tmp_path / "run.json").read_bytes())
    longer = config.from_run(tmp_path, [f"train.n_tokens={128 * 6}"])
    assert runs.train(tmp_path, longer, resume=True).step == 6


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    cfg = runs.compose(
        "topk", 40, "optim.lr=1e30", "optim.warmup_share=0", "train.log_every_steps=50", "checkpoint.save_every_steps=3"
    )
    with pytest.raises(UserError, match=r"train/\w+ is (nan|inf) at step 1: lower optim.lr"):
        runs.train(tmp_path, cfg)
    assert not runs.checkpoint.steps(tmp_path)


def test_leftovers_of_a_killed_save_do_not_count(tmp_path):
    (tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir(parents=True)
    assert runs.train(tmp_path, runs.compose("topk", 4)).step == 4


def test_a_failing_evaluation_does_not_lose_the_training(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr(run.evaluate.Evaluator, "evaluate", fail)
    with pytest.raises(RuntimeError, match="no"):
        runs.train(tmp_path, runs.compose("topk", 4))
    assert runs.checkpoint.steps(tmp_path) == [4]


def test_a_run_stopped_before_its_first_step_goes_on_from_there(tmp_path):
    cfg = runs.compose("topk", 4)
    with signals.hold():  # as a command that cannot be left just then
        os.kill(os.getpid(), signal.SIGTERM)
        assert runs.train(tmp_path / "run", cfg).step == 0
    runs.train(tmp_path / "run", cfg, resume=True)
    runs.train(tmp_path / "straight", cfg)
    assert_equal_bits(runs.saved(tmp_path / "run", 4), runs.saved(tmp_path / "straight", 4))
