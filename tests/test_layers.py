"""The architecture, enforced: who may import whom, one door per library, sizes, names, documentation.

The checks parse sources and import nothing. Each check returns its findings as lines, so that
test_layers_can_fail.py can show on small bad snippets that it is able to fail.
"""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Room -> rooms that it may import, besides itself. A room is a top module, a package, or a package of ROOMS_WITHIN.
DATA = {"errors", "fields", "kernels", "parallel", "storage"}
ROOMS_WITHIN = {"activations", "lab"}
"""Packages whose packages are rooms of their own."""
BELOW_CONFIG = DATA | {"activations", "activations.store", "activations.language_model", "sae", "training"}
BELOW_RUNS = BELOW_CONFIG | {"config", "evals"}
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "fields": {"errors"},
    "kernels": {"errors"},
    "parallel": {"errors", "fields"},
    "storage": {"errors", "fields", "parallel"},
    "sae": {"errors", "fields", "kernels"},
    "sparse_coding": {"errors", "fields", "kernels", "sae"},
    "activations": DATA,
    "activations.store": DATA | {"activations"},
    "activations.language_model": DATA | {"activations", "activations.store"},
    "evals": DATA | {"sae"},
    "training": DATA | {"activations", "sae"},
    "config": BELOW_CONFIG,
    "runs": BELOW_RUNS,
    "interop": DATA | {"evals", "sae"},
    "report": BELOW_RUNS | {"runs"},
    "lab": set(),
    "lab.metrics": DATA | {"evals", "sae"},
    "lab.codes": {"errors", "fields", "kernels", "sparse_coding"},
    "lab.experiments": BELOW_RUNS | {"runs", "sparse_coding", "lab.codes", "lab.metrics"},
    "cli": BELOW_RUNS | {"interop", "lab.experiments", "report", "runs"},
    "__init__": BELOW_RUNS | {"interop", "runs"},
    "__main__": {"cli"},
}
MAX_TOP_MODULES = 4

# Which modules may import a library whose interface moves or whose import is heavy.
DOORS: dict[str, tuple[str, ...]] = {
    "wandb": ("saejax.storage.tracking",),
    "hydra": ("saejax.cli", "saejax.config", "saejax.fields.key_value", "saejax.cli.preflight", "scripts"),
    "omegaconf": ("saejax.cli", "saejax.config", "saejax.fields.key_value", "saejax.cli.preflight", "scripts"),
    "orbax": ("saejax.storage.checkpoint", "saejax.storage.checkpoint_read"),
    "tensorstore": ("saejax.storage.checkpoint",),
    "safetensors": ("saejax.interop", "saejax.activations"),
    "grain": ("saejax.activations",),
    "torch": ("saejax.activations.language_model.torch_source", "saejax.interop.saebench"),
    "huggingface_hub": ("saejax.interop.hub",),
    "transformers": ("saejax.activations.language_model.torch_source",),
    "tokenizers": ("saejax.activations.language_model",),
    "gguf": ("saejax.activations.language_model",),
    "jinja2": ("saejax.report",),
    "matplotlib": ("saejax.lab.experiments",),
    "sklearn": ("saejax.lab.experiments",),
}

VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "core", "misc"}
MAX_FILE_LINES = 500
MAX_MEDIAN_LINES = 140
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 8

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*folders: str) -> list[Path]:
    """All Python files of the given folders of the repository."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """`saejax/sae/base.py` -> `saejax.sae.base`; a package is named without `__init__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also inside functions, `TYPE_CHECKING` and `import_module("...")`.

    `from a import b` yields `a.b`: whether b is a module does not matter to a rule about prefixes.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"}:
                yield node.lineno, str(node.args[0].value)


def within(module: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the prefixes or lies below one."""
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def room(module: str) -> str:
    """The room of a module: `saejax.sae.base` -> `sae`, `saejax.activations.store.reader` -> `activations.store`."""
    parts = module.split(".")[1:]
    nested = parts and parts[0] in ROOMS_WITHIN and ".".join(parts[:2]) in LAYERS
    return ".".join(parts[:2]) if nested else parts[0] if parts else "__init__"


def layer_findings(module: str, tree: ast.AST) -> list[str]:
    """Imports of a saejax module that its layer does not allow."""
    part = room(module)
    if part not in LAYERS:
        return [f"{module}: part '{part}' has no place in LAYERS; give it one, and a line in docs/architecture.md"]
    findings = []
    for line, name in imported(tree):
        target = room(name) if within(name, ("saejax",)) else ""
        if name.startswith("."):
            findings.append(f"{module}:{line}: relative import; write from saejax.<part> import <module>")
        elif target in LAYERS and target not in LAYERS[part] | {part}:
            findings.append(f"{module}:{line}: '{part}' must not import '{name}'")
        elif within(module, ("saejax.evals", "saejax.lab.metrics")) and is_other_metric(module, name):
            findings.append(f"{module}:{line}: a metric must not import another metric's file ('{name}')")
    return findings


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach one another, each in order of name."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        found, waiting = set(), list(graph[start])
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += graph.get(node, ())
        reach[start] = found
    groups = {
        tuple(sorted(n for n in reach[node] if node in reach.get(n, ()))) for node in graph if node in reach[node]
    }
    return sorted(map(list, groups))


def import_graph(sources: list[tuple[str, ast.AST]]) -> dict[str, set[str]]:
    """Module -> modules of saejax that it imports, also inside functions and for types alone; packages left out."""
    modules = {module for module, _ in sources}
    graph: dict[str, set[str]] = {}
    for module, tree in sources:
        names = {name for _, name in imported(tree)} | {name.rpartition(".")[0] for _, name in imported(tree)}
        graph[module] = (names & modules) - {module}
    return graph


def is_metric_file(module: str) -> bool:
    """Whether a module of evals defines a metric, that is, a class derived from `Metric`."""
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    if module == "saejax.evals.metric" or not path.exists():
        return False
    classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    return any(ast.unparse(base).split(".")[-1] == "Metric" for node in classes for base in node.bases)


def is_other_metric(module: str, name: str) -> bool:
    """Whether a metric's file imports a name of another metric's file."""
    folders = ("saejax.evals.", "saejax.lab.metrics.")
    others = [other for other in (name, name.rpartition(".")[0]) if other.startswith(folders)]
    return is_metric_file(module) and any(other != module and is_metric_file(other) for other in others)


def door_findings(module: str, tree: ast.AST) -> list[str]:
    """Imports of a library outside the modules that are its door."""
    return [
        f"{module}:{line}: '{name}' may be imported only in {', '.join(DOORS[name.split('.')[0]])}"
        for line, name in imported(tree)
        if name.split(".")[0] in DOORS and not within(module, DOORS[name.split(".")[0]])
    ]


def size_findings(where: str, text: str) -> list[str]:
    """A file or a function that no longer fits the eye."""
    n_lines = len(text.splitlines())
    findings = [f"{where}: {n_lines} lines, at most {MAX_FILE_LINES}"] if n_lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, Function):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                findings.append(f"{where}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
    return findings


def signature_findings(where: str, tree: ast.AST) -> list[str]:
    """Functions with more parameters than one can keep in mind; `self` and `cls` are not counted."""
    findings = []
    for node in ast.walk(tree):
        if isinstance(node, Function | ast.Lambda):
            a = node.args
            given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            count = len(given) - (bool(given) and given[0].arg in ("self", "cls"))
            if count > MAX_PARAMETERS:
                name = getattr(node, "name", "lambda")
                findings.append(f"{where}:{node.lineno}: {name} has {count} parameters, at most {MAX_PARAMETERS}")
    return findings


def name_findings(where: str) -> list[str]:
    """A file or folder whose name says nothing."""
    vague = VAGUE_NAMES & {part.strip("_") for part in Path(where).with_suffix("").parts}
    return [f"{where}: '{name}' says nothing about what it holds" for name in sorted(vague)]


def public(name: str) -> bool:
    """Whether a name is meant for others."""
    return not name.startswith("_")


def documented_methods(trees: list[ast.AST]) -> dict[str, tuple[list[str], set[str]]]:
    """Class name -> (names of its bases, names of its documented methods), over all sources."""
    table: dict[str, tuple[list[str], set[str]]] = {}
    for node in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        methods = {item.name for item in node.body if isinstance(item, Function) and ast.get_docstring(item)}
        table[node.name] = ([ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases], methods)
    return table


def inherits_doc(table: dict[str, tuple[list[str], set[str]]], class_name: str, method: str) -> bool:
    """Whether a base class documents the method: an override need not repeat its contract."""
    bases, _ = table.get(class_name, ([], set()))
    return any(method in table.get(base, ([], set()))[1] or inherits_doc(table, base, method) for base in bases)


def is_config(node: ast.ClassDef) -> bool:
    """Whether a class is a configuration: a frozen, keyword-only dataclass."""
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    return any("dataclass(" in text and "frozen=True" in text and "kw_only=True" in text for text in decorators)


def undocumented_fields(node: ast.ClassDef) -> list[str]:
    """Public fields of a dataclass that no string literal follows."""
    missing = []
    for item, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(item, ast.AnnAssign) or "ClassVar" in ast.unparse(item.annotation):
            continue
        told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if public(ast.unparse(item.target)) and not told:
            missing.append(ast.unparse(item.target))
    return missing


def doc_findings(where: str, tree: ast.Module, table: dict[str, tuple[list[str], set[str]]]) -> list[str]:
    """Public modules, functions, classes, methods and config fields without a word of explanation."""
    findings = [] if ast.get_docstring(tree) else [f"{where}: module has no docstring"]
    for node in tree.body:
        if not isinstance(node, Function | ast.ClassDef) or not public(node.name):
            continue
        if not ast.get_docstring(node):
            findings.append(f"{where}:{node.lineno}: {node.name} has no docstring")
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                silent = isinstance(item, Function) and public(item.name) and not ast.get_docstring(item)
                silent = silent and ast.unparse(item.body[-1]) != "..."  # a shape that a Protocol asks for
                if silent and not inherits_doc(table, node.name, item.name):
                    findings.append(f"{where}:{item.lineno}: {node.name}.{item.name} has no docstring")
            if is_config(node):
                fields = undocumented_fields(node)
                findings += [f"{where}:{node.lineno}: field {node.name}.{name} is not documented" for name in fields]
    return findings


# A path of one machine, or the address of a package registry: neither means anything to another reader.
PRIVATE_PLACES = re.compile(
    r"(?<![\w.~/}])/(?:work|root|home|opt|Users)/|(?:pypi|pythonhosted|npmjs|testpypi)\.(?:org|com)\b"
)


def place_findings(where: str, text: str) -> list[str]:
    """Lines that name a place which exists on one machine only."""
    lines = enumerate(text.splitlines(), start=1)
    return [
        f"{where}:{n}: names a private place: {line.strip()[:80]}" for n, line in lines if PRIVATE_PLACES.search(line)
    ]


def tracked_texts() -> Iterator[tuple[str, str]]:
    """(path, text) of every tracked text file; skips the test outside a git checkout."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            try:
                yield name, (ROOT / name).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def show(findings: list[str]) -> None:
    """Fails with one line per finding."""
    assert not findings, "\n" + "\n".join(findings)


def test_layers_and_doors():
    sources = [(module_name(path), ast.parse(path.read_text())) for path in python_files("saejax", "scripts")]
    show([line for module, tree in sources for line in door_findings(module, tree)])
    show([line for module, tree in sources if module.startswith("saejax") for line in layer_findings(module, tree)])


def modules() -> list[tuple[str, ast.AST]]:
    """(name, tree) of every module that is no package."""
    files = [path for path in python_files("saejax") if path.name != "__init__.py"]
    return [(module_name(path), ast.parse(path.read_text())) for path in files]


def test_no_circles():
    show([" -> ".join(circle) for circle in circles(import_graph(modules()))])
    rooms = {part: targets - {part} for part, targets in LAYERS.items()}
    show([" -> ".join(circle) for circle in circles(rooms)])


def test_the_top_is_small():
    assert len(list((ROOT / "saejax").glob("*.py"))) <= MAX_TOP_MODULES
    lengths = [len(path.read_text().splitlines()) for path in python_files("saejax")]
    assert statistics.median(lengths) <= MAX_MEDIAN_LINES


def test_sizes_and_names():
    files = python_files("saejax", "scripts", "tests", "benchmarks")
    where = {path: str(path.relative_to(ROOT)) for path in files}
    show([line for path in files for line in size_findings(where[path], path.read_text())])
    show([line for path in files for line in name_findings(where[path])])


def test_signatures():
    trees = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in python_files("saejax")}
    show([line for where, tree in trees.items() for line in signature_findings(where, tree)])


def test_everything_public_is_documented():
    trees = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in python_files("saejax")}
    table = documented_methods(list(trees.values()))
    show([line for where, tree in trees.items() for line in doc_findings(where, tree, table)])


def test_no_private_places():
    show([line for where, text in tracked_texts() for line in place_findings(where, text)])
