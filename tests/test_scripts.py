"""The files that start runs on clusters, as far as one machine can tell: syntax, lint, schema, and what they call.

Commands of the clusters are replaced by ones that write down how they were called.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from saejax import config
from saejax.activations.language_model import harvest
from saejax.cli import preflight

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sbatch"), *(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"])
SMALL = ["train.n_tokens=10240", "train.batch=256"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_sound(path):
    subprocess.run(["bash", "-n", path], check=True, timeout=20)
    shellcheck = _tool("shellcheck")
    found = subprocess.run([shellcheck, path], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout


def test_the_image_is_sound():
    found = subprocess.run([_tool("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout
    text = (ROOT / "Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM (\S+) AS (\S+)$", text, re.MULTILINE)[::-1])
    names = re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE)
    outside = [image for image in stages if image not in names]
    assert len(outside) == 1 and re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", outside[0])
    for target in ("cpu", "cuda", "tpu"):
        body = text.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        assert "USER 1000" in body and 'ENTRYPOINT ["saejax"]' in body
    assert text.count("pip install") == text.count("pip install --constraint constraints.txt") == 3


@pytest.fixture
def cluster(tmp_path):
    """A folder of commands that write down their arguments; `srun` runs its command, `saejax` ends with $STATUS."""
    folder = tmp_path / "bin"
    folder.mkdir()
    python = f"#!{sys.executable}\nimport json, os, subprocess, sys\n"
    note = f"open({str(tmp_path / 'calls')!r}, 'a').write(json.dumps(sys.argv) + '\\n')\n"
    after = {
        "srun": "sys.exit(subprocess.call([a for a in sys.argv[1:] if not a.startswith('--')]))\n",
        "saejax": "sys.exit(int(os.environ['STATUS']))\n",
        "scontrol": "",
        "gcloud": "",
    }
    for name, code in after.items():
        (folder / name).write_text(python + note + code)
        (folder / name).chmod(0o755)
    return folder


def called(cluster: Path, name: str) -> list[list[str]]:
    """The arguments of every call of a command."""
    lines = (cluster.parent / "calls").read_text().splitlines()
    return [call[1:] for call in map(json.loads, lines) if Path(call[0]).name == name]


def execute(script: str, *arguments: str, cluster: Path, **variables: str) -> int:
    """Run a script of scripts/ where only the folder's commands and those of the system are found."""
    environment = {"PATH": f"{cluster}:{os.defpath}", "HOME": str(cluster.parent)} | variables
    done = subprocess.run(["bash", ROOT / "scripts" / script, *arguments], env=environment, timeout=60)
    return done.returncode


@pytest.mark.parametrize(
    ("status", "restarts", "queued_again"),
    [(0, "0", False), (2, "0", False), (143, "0", True), (138, "7", True), (134, "0", True), (143, "100", False)],
)
def test_the_batch_script_is_queued_again_when_work_was_stopped_after_saving(cluster, status, restarts, queued_again):
    variables = {"STATUS": str(status), "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": restarts}
    assert execute("train.sbatch", *SMALL, "sae.k=7", cluster=cluster, **variables) == status
    (arguments,) = called(cluster, "saejax")
    assert arguments == ["train", "mesh.distributed=slurm", "hydra.run.dir=runs/slurm-77", *SMALL, "sae.k=7"]
    preflight.check(arguments[1:])
    assert called(cluster, "scontrol") == [["requeue", "77"]] * queued_again


def test_a_task_of_the_array_writes_its_part(cluster):
    variables = {"STATUS": "0", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}
    assert execute("harvest.sbatch", "path=acts", cluster=cluster, **variables) == 0
    (arguments,) = called(cluster, "saejax")
    cfg = config.load("harvest", harvest.HarvestConfig, arguments[1:])
    assert (cfg.process, cfg.n_processes, cfg.path) == (3, 8, str(Path("acts").absolute()))


def test_every_worker_of_a_slice_is_told_the_same(cluster, capfd):
    assert execute("tpu_vm.sh", "sae.k=7", cluster=cluster, TPU="t", ZONE="z", SAEJAX="saejax") == 2
    assert "hydra.run.dir=DIR must be given" in capfd.readouterr().err
    given = ["hydra.run.dir=/mnt/it's here", "sae.k=7", *SMALL]
    assert execute("tpu_vm.sh", *given, cluster=cluster, TPU="t", ZONE="z", SAEJAX="saejax[wandb]") == 0
    install, train = called(cluster, "gcloud")
    assert "--worker=all" in install and "--worker=all" in train and "saejax\\[wandb\\]" in install[-1]
    words = shlex.split(train[-1].removeprefix("--command="))
    assert words == ["saejax/bin/saejax", "train", "mesh.distributed=tpu", *given]
    preflight.check(preflight.typed(words[3:]))


def test_the_jobset_says_what_its_schema_allows():
    found = yaml.safe_load((ROOT / "scripts" / "jobset.yaml").read_text())
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = _only(found["spec"], {"network", "failurePolicy", "replicatedJobs"})["replicatedJobs"][0]
    assert job.keys() == {"name", "replicas", "template"}
    known = {"completionMode", "completions", "parallelism", "backoffLimit", "template"}
    indexed = _only(job["template"]["spec"], known)
    pod = _only(
        indexed["template"]["spec"],
        {"restartPolicy", "terminationGracePeriodSeconds", "securityContext", "containers", "volumes"},
    )
    (container,) = pod["containers"]
    _only(container, {"name", "image", "args", "env", "ports", "securityContext", "resources", "volumeMounts"})
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    pods = indexed["completions"]
    assert indexed["completionMode"] == "Indexed" and indexed["parallelism"] == pods
    assert variables["JAX_NUM_PROCESSES"] == str(pods)
    first = f"{found['metadata']['name']}-{job['name']}-0-0.{found['spec']['network']['subdomain']}"
    assert variables["JAX_COORDINATOR_ADDRESS"] == f"{first}:{container['ports'][0]['containerPort']}"
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    command, *arguments = container["args"]
    assert command == "train"
    preflight.check([a for a in arguments if not a.startswith("source")])


def test_the_workflow_runs_the_commands_of_a_pull_request_with_pinned_actions():
    found = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = found["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["make lint", "make test", "make docs"]
    assert all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"]) for step in steps if "uses" in step)
    assert found["permissions"] == {"contents": "read"}


def test_the_night_runs_what_commits_do_not_with_the_same_actions():
    found, commit = (
        yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text()) for name in ("nightly", "ci")
    )
    job = found["jobs"]["night"]
    commands = {each["command"]: each["python"] for each in job["strategy"]["matrix"]["include"]}
    assert commands == {"make nightly": "3.11", "make parity": "3.11", "make test PYTHON=python3.13": "3.13"}
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {command.split()[1] for command in commands} <= set(targets)
    pinned = [step["uses"] for step in commit["jobs"]["test"]["steps"] if "uses" in step]
    assert [step["uses"] for step in job["steps"] if "uses" in step] == pinned
    assert found["permissions"] == {"contents": "read"} and True in found  # YAML reads the key `on` as true


def _only(mapping, known):
    assert mapping.keys() <= known, mapping.keys() - known
    return mapping


def _tool(name: str) -> str:
    """A linter that the developer's extra brings; beside this Python or on the path."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert found, f"{name} is missing: pip install 'saejax[dev]'"
    return found
