"""Processes of one run that were started differently end, all of them, with one line that names the difference."""

import concurrent.futures
import dataclasses
import itertools
import os
import socket
import threading
import types
from pathlib import Path

import numpy as np
import process_groups
import pytest

from saejax import config
from saejax.errors import MISTAKE, UserError
from saejax.parallel import processes
from saejax.runs import agreement

MANY = "mesh.distributed=manual"
COMMON = [
    "sae.d_sae=128", "sae.k=4", "train.batch=128", "train.n_tokens=12800", "buffer.rows=1024", "train.eval_rows=64",
    "mesh.data=2", MANY, process_groups.QUICK_DEATH,
]  # fmt: skip


def compose(*overrides: str) -> config.Config:
    return config.load("train", config.Config, [*COMMON, *overrides])


def flat(tree: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def test_every_key_of_a_config_is_compared_or_may_differ_for_a_reason(others):
    keys = set(flat(config.to_plain(compose())))
    own = {"mesh.coordinator", "mesh.num_processes", "mesh.process_id"} | {k for k in keys if k.startswith("tracker.")}
    assert keys - set(agreement.of_config(compose())) == own
    # Where the data lie is this machine's own affair. What they are is not, and is compared by itself.
    stored = config.load("train", config.Config, [argument.format(others) for argument in ROWS])
    assert set(flat(config.to_plain(stored))) - set(agreement.of_config(stored)) == own | {"source.path"}
    assert "source.heldout_share" in agreement.of_config(stored)


def test_the_facts_of_one_command_are_the_same_every_time_and_those_of_another_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = agreement.command("train", ["sae.k=4", "hydra.run.dir=a"])
    assert said == agreement.command("train", ["hydra.run.dir=./a", "sae.k=4"])
    for other in (["resume=a"], ["-m", "hydra.run.dir=a"], ["hydra.run.dir=b"]):
        assert agreement.command("train", other) != said
    versions = agreement.versions()
    assert {"version of saejax", "version of jax", "version of numpy", "version of Python"} < versions.keys()


class Store(dict):
    """A key-value store as the coordinator keeps it, between threads."""

    def __init__(self):
        super().__init__()
        self._changed = threading.Condition()

    def key_value_set(self, key: str, value: str) -> None:
        with self._changed:
            assert key not in self
            self[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self, timeout=10), key
            return self[key]


def agreed(monkeypatch, all_facts: list[dict[str, str]]) -> list[str]:
    """What each of several processes, a thread here, hears from `processes.agree`."""
    store, here, n = Store(), threading.local(), len(all_facts)
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(
        processes, "_joined", lambda: types.SimpleNamespace(client=store, process_id=here.number, num_processes=n)
    )
    monkeypatch.setattr(processes, "_agreements", itertools.repeat(0))

    def run(number: int) -> str:
        here.number = number
        try:
            processes.agree(all_facts[number])
        except UserError as error:
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor(n) as pool:
        return list(pool.map(run, range(n)))


def test_whichever_key_differs_is_named_by_all(monkeypatch):
    facts = agreement.versions() | agreement.of_config(compose()) | agreement.numerics()
    assert len(facts) > 60 and agreed(monkeypatch, [facts, facts, facts]) == ["", "", ""]
    for number, key in enumerate(facts):
        odd = number % 3
        said = agreed(monkeypatch, [facts | {key: "another"} if i == odd else facts for i in range(3)])
        assert len(set(said)) == 1 and f"the processes of this run differ in {key}: " in said[0]
        assert f"process {odd} has another" in said[0] and "(and in" not in said[0]
        missing = {name: value for name, value in facts.items() if name != key}
        said = agreed(monkeypatch, [missing if i == odd else facts for i in range(3)])
        assert len(set(said)) == 1 and f"differ in {key}: " in said[0] and f"process {odd} has nothing" in said[0]
    many = agreed(monkeypatch, [facts, dict.fromkeys(facts, "?"), dict.fromkeys(facts, "!")])
    assert len(set(many)) == 1 and "process 0 has" in many[0] and "process 1 has ?, process 2 has !" in many[0]


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Path:
    """What a second process may have instead: other rows, a library of another version."""
    folder = tmp_path_factory.mktemp("others")
    rng = np.random.default_rng(0)
    for name in ("rows", "other"):
        np.save(folder / f"{name}.npy", rng.standard_normal((2048, 64), dtype=np.float32))
    info = folder / "site" / "optax-9.9.9.dist-info"  # its metadata alone say so
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: optax\nVersion: 9.9.9\n")
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(config.to_yaml(compose()))
    return folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Two processes of one command that differ in something; `{}` stands for the folder of `others`."""

    all: tuple[str, ...] = ()
    """What both have beside `COMMON`."""
    second: tuple[str, ...] = ()
    """What the second one has besides."""
    variables: tuple[tuple[str, str], ...] = ()
    """Environment of the second one."""
    said: str
    """In the last line of both."""


ROWS = ("source=arrays", "source.path={}/rows.npy", "source.heldout_share=0.1")


def one(argument: str, before: str) -> Case:
    key, _, value = argument.partition("=")
    return Case(second=(argument,), said=f"differ in {key}: process 0 has {before}, process 1 has {value}")


CASES = {
    "optim.lr": one("optim.lr=0.01", "0.001"),
    "seed": one("seed=7", "0"),
    "data_seed": one("data_seed=7", "null"),
    "train.n_tokens": one("train.n_tokens=25600", "12800"),
    "train.batch": one("train.batch=256", "128"),
    "sae.d_sae": one("sae.d_sae=256", "128"),
    "sae.k": one("sae.k=8", "4"),
    "sae": Case(second=("sae=abs_topk",), said="differ in sae.type: process 0 has topk, process 1 has abs_topk"),
    "normalize.mode": Case(second=("normalize.mode=whiten",), said="differ in normalize.mode: process 0 has"),
    "mesh.latent": Case(second=("mesh.latent=2", "mesh.data=1"), said="differ in mesh."),
    "mesh.num_processes": one("mesh.num_processes=3", "2"),
    "mesh.num_processes, other way round": Case(
        all=("mesh.num_processes=3",),
        second=("mesh.num_processes=2",),
        said="differ in mesh.num_processes: process 0 has 3, process 1 has 2",
    ),
    "mesh.process_id": Case(second=("mesh.process_id=0",), said="two processes of this run are process 0"),
    "checkpoint.save_every_steps": one("checkpoint.save_every_steps=5", "1000"),
    "buffer.rows": one("buffer.rows=2048", "1024"),
    "ensemble": Case(second=("ensemble.seed=[0,1]",), said="differ in ensemble.seed: process 0 has [], process 1 has"),
    "hydra.run.dir": Case(second=("hydra.run.dir=/elsewhere",), said="differ in hydra.run.dir: process 0 has"),
    "source": Case(second=ROWS, said="differ in source.type: process 0 has synthetic, process 1 has arrays"),
    "the data": Case(all=ROWS, second=("source.path={}/other.npy",), said="differ in the data ("),
    "no data": Case(all=ROWS, second=("source.path={}/none.npy",), said="process 1: source.path"),
    "-m": Case(second=("-m",), said="differ in command: process 0 has train, process 1 has train -m"),
    "resume": Case(
        second=("resume={}/run",), said="differ in command: process 0 has train, process 1 has train resume="
    ),
    "nothing to resume": Case(second=("resume={}/none",), said="process 1: "),
    "a mistake": Case(second=("sae.k=0",), said="process 1: sae.k must be"),
    "a key that is none": Case(second=("sae.kk=1",), said="process 1: "),
    "a wrong number": Case(second=("mesh.process_id=5",), said="process 5: mesh.process_id must be in [0, "),
    "version": Case(variables=(("PYTHONPATH", "{}/site"),), said="differ in version of optax: process 0 has"),
    "x64": Case(
        variables=(("JAX_ENABLE_X64", "1"),), said="differ in jax_enable_x64: process 0 has false, process 1 has true"
    ),
}
QUICK = ("optim.lr", "a mistake", "the data")
"""Those of every run of the tests. A pair takes some 10 s, most of it to import JAX twice."""


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.nightly) for n in CASES])
def test_two_processes_that_differ_end_in_one_line(others, tmp_path, name):
    case = CASES[name]
    named = any(argument.startswith(("-m", "resume=")) for argument in case.second)
    where = () if named else (f"hydra.run.dir={tmp_path}/run",)
    arguments = [argument.format(others) for argument in (*COMMON, *case.all, *where)]
    second = [argument.format(others) for argument in case.second]
    variables = {key: value.format(others) for key, value in case.variables}
    if "PYTHONPATH" in variables:
        variables["PYTHONPATH"] = os.pathsep.join([variables["PYTHONPATH"], os.environ.get("PYTHONPATH", "")])
    with process_groups.running(
        2, tmp_path, "train", *arguments, each=[[], second], each_environment=[{}, variables]
    ) as group:
        group.wait_for_first_end()
        assert group.statuses(15) == [MISTAKE, MISTAKE], group.said(0)[-3000:] + group.said(1)[-3000:]
        ends = [group.said(number).strip().splitlines()[-1] for number in range(2)]
    for number, end in enumerate(ends):
        # A process that fails by itself says so without its own number.
        assert (case.said if number == 0 else case.said.removeprefix("process 1: ").removeprefix("process 5: ")) in end
        assert end.startswith("saejax train: ") and "Traceback" not in group.said(number)
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_a_busy_port_is_one_line_and_status_2(tmp_path):
    """It was SIGSEGV: JAX's coordinator does not look at whether it could listen."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with process_groups.running(
            1, tmp_path, "train", *COMMON, JAX_NUM_PROCESSES="2", JAX_COORDINATOR_ADDRESS=where
        ) as group:
            assert group.statuses(240) == [MISTAKE]
    last = group.said(0).strip().splitlines()[-1]
    assert last.startswith(f"saejax train: mesh.coordinator={where}: process 0 cannot listen at port")
