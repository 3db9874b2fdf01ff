"""Which process this is, by every environment; and what a start that cannot be says."""

import os
import time

import process_groups
import pytest

from saejax.errors import MISTAKE, UserError
from saejax.parallel import processes, sharding

NOTHING = ("SLURM_", "JAX_COORDINATOR", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JOB_COMPLETION", "TPU_", "MEGASCALE")

SRUN = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],login1",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
POD = {"JOB_COMPLETION_INDEX": "3", "JAX_COORDINATOR_ADDRESS": "train-0.train:1234", "JAX_NUM_PROCESSES": "4"}


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in [name for name in os.environ if name.startswith(NOTHING)]:
        monkeypatch.delenv(name)
    return monkeypatch


def found(monkeypatch, how: str, environment: dict[str, str], **given):
    with monkeypatch.context() as patched:
        for name, value in environment.items():
            patched.setenv(name, value)
        return sharding.MeshConfig(distributed=processes.Distributed[how], **given).place()


def test_a_machine_by_itself_is_alone(bare):
    assert found(bare, "none", SRUN | POD) is None
    assert found(bare, "auto", {}) is None
    # A shell inside an allocation, and a task of its own, have no company.
    assert found(bare, "auto", {k: v for k, v in SRUN.items() if k != "SLURM_STEP_NODELIST"}) is None
    assert found(bare, "auto", SRUN | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert not processes.several() and processes.first() and processes.gather("x") == ["x"]


def test_srun_says_which_task_this_is(bare):
    for how in ("auto", "slurm"):
        at = found(bare, how, SRUN)
        assert (at.process_id, at.n_processes, at.coordinator) == (2, 4, "gpu07:61442")
        assert at.local_devices is None  # one task on a node has all of its GPUs
    for nodes, host in (("node1", "node1"), ("a-1,a-2", "a-1"), ("n[3]", "n3"), ("n[001-016]", "n001")):
        assert found(bare, "slurm", SRUN | {"SLURM_STEP_NODELIST": nodes}).coordinator == f"{host}:61442"


def test_several_tasks_of_a_node_have_a_gpu_each_unless_slurm_gave_them_one(bare):
    packed = SRUN | {"SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "2"}
    assert found(bare, "slurm", packed).local_devices == [2]
    assert found(bare, "slurm", packed | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}).local_devices == [2]
    assert found(bare, "slurm", packed | {"CUDA_VISIBLE_DEVICES": "2"}).local_devices is None


def test_an_indexed_job_and_the_fields_say_so_too(bare):
    for how in ("auto", "kubernetes"):
        at = found(bare, how, POD)
        assert (at.process_id, at.n_processes, at.coordinator) == (3, 4, "train-0.train:1234")
    at = found(bare, "manual", {}, coordinator="[::1]:80", num_processes=2, process_id=1)
    assert (at.process_id, at.n_processes, at.coordinator) == (1, 2, "[::1]:80")
    # What is given goes before the variables, these before what a scheduler says.
    variables = SRUN | {"JAX_COORDINATOR_ADDRESS": "head:99", "JAX_PROCESS_ID": "1"}
    at = found(bare, "slurm", variables, process_id=0)
    assert (at.process_id, at.n_processes, at.coordinator) == (0, 4, "head:99")
    assert found(bare, "auto", {"TPU_WORKER_HOSTNAMES": "a,b"}).how is processes.Distributed.tpu


@pytest.mark.parametrize(
    ("how", "environment", "given", "said"),
    [
        ("manual", {}, {}, "needs mesh.process_id, or JAX_PROCESS_ID"),
        ("manual", {}, {"process_id": 0}, "needs mesh.num_processes, or JAX_NUM_PROCESSES"),
        ("manual", {}, {"process_id": 0, "num_processes": 2}, "needs mesh.coordinator, or JAX_COORDINATOR_ADDRESS"),
        (
            "manual",
            {},
            {"process_id": 2, "num_processes": 2, "coordinator": "a:1"},
            r"mesh.process_id must be in \[0, ",
        ),
        ("manual", {}, {"process_id": 0, "num_processes": 2, "coordinator": "a"}, "mesh.coordinator must be host:port"),
        ("manual", POD | {"JAX_PROCESS_ID": "one"}, {}, "mesh.process_id must be a number, got one"),
        ("slurm", {}, {}, "start the command with srun"),
        ("kubernetes", {}, {}, "needs mesh.process_id"),
    ],
)
def test_what_is_missing_is_named(bare, how, environment, given, said):
    with pytest.raises(UserError, match=said):
        found(bare, how, environment, **given)


def test_no_config_of_a_run_holds_what_belongs_to_one_process():
    mesh = sharding.MeshConfig(latent=2, coordinator="a:1", num_processes=2, process_id=1)
    assert mesh.anywhere() == sharding.MeshConfig(latent=2)
    for name, value in (("timeout_seconds", 0), ("dead_after_seconds", 5)):
        with pytest.raises(UserError, match=f"mesh.{name} must be at least"):
            sharding.MeshConfig(**{name: value})


@pytest.mark.nightly
@pytest.mark.parametrize("number", [0, 1])
def test_processes_that_do_not_come_together_end_in_one_line(tmp_path, number):
    started = time.monotonic()
    alone = {"JAX_PROCESS_ID": str(number), "JAX_NUM_PROCESSES": "2"}
    arguments = ("train", "mesh.distributed=manual", "mesh.timeout_seconds=3", f"hydra.run.dir={tmp_path}/run")
    with process_groups.running(1, tmp_path, *arguments, **alone) as group:
        assert group.statuses(60) == [MISTAKE]
    why = "process 0 does not answer" if number else "not all of 2 processes have come"
    last = group.said(0).splitlines()[-1]
    assert why in last and "within mesh.timeout_seconds=3" in last
    assert "Traceback" not in group.said(0) and time.monotonic() - started < 45
