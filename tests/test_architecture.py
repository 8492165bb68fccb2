"""The layers, the cost of an import, and the things that no module may do: read from the source with `ast`.

The table of layers is the one in CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import fnmatch
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "xmc_midx"
HEAVY = ("torch", "scipy", "sklearn", "numba", "faiss", "pandas", "matplotlib")
PACKAGES = {"", "data", "exporting", "samplers"}
"""Packages whose `__init__` imports nothing at run time (`cli` and `pipeline` are in the table)."""

TORCH_FREE = (
    "errors",
    "types",
    "config",
    "recipe",
    "forecast",
    "rundir",
    "metrics",
    "pipeline",
    "pipeline.*",
    "data.*",
    "cli",
    "cli.*",
    "__main__",
)
"""Modules that start without torch: `--help`, `datasets`, `check` and the evaluation of a predictions file."""
TORCH_MAY = ("data.batches",)


def module_name(path: Path) -> str:
    """`xmc_midx/data/files.py` -> `data.files`; the package itself -> ``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def read_layers() -> dict[str, int]:
    """Pattern of module names -> layer, from the rows `| L2 | `a`, `b.*` | ... |`."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| L(\d) \| ([^|]+) \|", text, flags=re.MULTILINE)
    return {name: int(layer) for layer, names in rows for name in re.findall(r"`([^`]+)`", names)}


LAYERS = read_layers()


def layer_of(module: str) -> int | None:
    found = {layer for pattern, layer in LAYERS.items() if fnmatch.fnmatchcase(module, pattern)}
    if module == "cli":
        found = {LAYERS["cli.*"]}
    assert len(found) <= 1, f"{module} is in several layers"
    return found.pop() if found else None


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def run_time_nodes(tree: ast.AST, *, functions: bool) -> Iterator[ast.AST]:
    """All nodes but those for type checkers alone; without `functions`, what runs when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and is_type_checking(node.test):
            for other in node.orelse:
                yield from run_time_nodes(other, functions=functions)
            continue
        if not functions and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield node
        yield from run_time_nodes(node, functions=functions)


def imported_names(module: str, *, functions: bool) -> Iterator[str]:
    """Full dotted names: `import a.b` gives `a.b`, `from a import b` gives `a.b`."""
    for node in run_time_nodes(TREES[module], functions=functions):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(module: str, *, functions: bool = True) -> set[str]:
    """Modules of the package that a module imports."""
    found = set()
    for name in imported_names(module, functions=functions):
        if name.partition(".")[0] != "xmc_midx":
            continue
        inner = name.removeprefix("xmc_midx").removeprefix(".")
        while inner not in MODULES:
            inner = inner.rpartition(".")[0]
        found.add(inner)
    return found - {""}


def test_the_table_was_read() -> None:
    assert LAYERS["errors"] == 0 and LAYERS["pipeline"] == 6 and LAYERS["cli.*"] == 7
    assert sorted(set(LAYERS.values())) == list(range(8))


def test_every_module_has_a_layer_and_every_entry_a_module() -> None:
    assert {name for name in MODULES if layer_of(name) is None} == PACKAGES
    assert {pattern for pattern in LAYERS if not any(fnmatch.fnmatchcase(name, pattern) for name in MODULES)} == set()


@pytest.mark.parametrize("module", sorted(set(MODULES) - PACKAGES))
def test_the_docstring_begins_with_the_layer(module: str) -> None:
    docstring = ast.get_docstring(TREES[module])
    assert docstring is not None and docstring.startswith(f"Layer {layer_of(module)}. ")


@pytest.mark.parametrize("module", sorted(set(MODULES) - PACKAGES))
def test_a_module_imports_its_own_layer_or_a_lower_one(module: str) -> None:
    mine = layer_of(module)
    assert mine is not None
    too_high = {name for name in own_imports(module) if (layer_of(name) or 0) > mine}
    assert too_high == set()


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {module: own_imports(module) - {module} for module in MODULES}
    assert tuple(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", sorted(PACKAGES))
def test_a_package_imports_nothing_of_its_own(module: str) -> None:
    assert own_imports(module, functions=False) == set()


@pytest.mark.parametrize(
    "module", [m for m in MODULES if any(fnmatch.fnmatchcase(m, p) for p in TORCH_FREE) and m not in TORCH_MAY]
)
def test_torch_stays_out_of_modules_that_do_not_compute_with_it(module: str) -> None:
    roots = {name.partition(".")[0] for name in imported_names(module, functions=False)}
    assert "torch" not in roots


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    script = f"{code}\nimport sys\nprint('LOADED', *sorted({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


def test_importing_the_predictor_does_not_load_what_fits_alone_need() -> None:
    loaded_by("import sys, xmc_midx.predictor\nassert 'scipy.optimize' not in sys.modules")


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = loaded_by("import xmc_midx; dir(xmc_midx); xmc_midx.XmcMidxError; xmc_midx.Config")
    assert "xmc_midx" in loaded and not loaded & set(HEAVY)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["datasets"]])
def test_help_and_the_registry_load_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import runpy, sys
sys.argv = ["xmc-midx", *{arguments!r}]
try:
    runpy.run_module("xmc_midx", run_name="__main__")
except SystemExit as exit:
    assert not exit.code, exit.code
"""
    assert not loaded_by(code) & set(HEAVY)


def test_the_torch_free_modules_do_not_load_torch_by_a_detour() -> None:
    names = [m for m in MODULES if any(fnmatch.fnmatchcase(m, p) for p in TORCH_FREE)]
    names = [m for m in names if m not in (*TORCH_MAY, "__main__")]
    loaded = loaded_by("import importlib\nfor m in " + repr(names) + ": importlib.import_module('xmc_midx.' + m)")
    assert not loaded & {"torch", "faiss", "matplotlib"}


# ----------------------------------------------------------------- what is forbidden


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_can_run_code_from_a_file(module: str) -> None:
    roots = {name.partition(".")[0] for name in imported_names(module, functions=True)}
    assert not roots & {"pickle", "joblib", "dill", "cloudpickle", "marshal", "shelve"}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            assert name not in {"torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
        if isinstance(node, ast.Call):
            assert not (isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"})
            assert all(keyword.arg != "allow_pickle" for keyword in node.keywords)


@pytest.mark.parametrize("module", sorted(name for name in MODULES if not name.startswith("cli")))
def test_the_library_never_prints(module: str) -> None:
    calls = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]
    assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_randomness_comes_from_generators_with_a_seed(module: str) -> None:
    """No module draws from, or seeds, the global generators of torch, numpy and Python."""
    assert "random" not in {name.partition(".")[0] for name in imported_names(module, functions=True)}
    for node in ast.walk(TREES[module]):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg for keyword in node.keywords}
        assert name not in {"torch.manual_seed", "torch.seed", "np.random.seed"}
        if name in {"torch.rand", "torch.randn", "torch.randint", "torch.randperm", "torch.multinomial"}:
            assert "generator" in keywords, f"{module}:{node.lineno}"
        if re.fullmatch(r"np\.random\.\w+", name):
            assert name == "np.random.default_rng" and node.args, f"{module}:{node.lineno}"


def test_the_readme_draws_every_module_and_script() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text[text.index("```\nxmc_midx/") :].partition("\n```\n")[0]
    drawn = set(re.findall(r"[\w/]+\.(?:py|sh)", tree))
    modules = {path.name for path in PACKAGE.rglob("*.py") if "cli" not in path.parts and "__" not in path.name}
    scripts = {str(path.relative_to(ROOT / "scripts")) for path in (ROOT / "scripts").rglob("*.[ps][yh]")}
    assert modules | scripts <= drawn
    assert {name for name in drawn if name not in modules | scripts} == set()


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_every_command_is_in_the_readme_and_has_a_place_in_the_reference() -> None:
    commands = {name.removeprefix("cli.") for name in MODULES if name.startswith("cli.")}
    commands -= {"app", "answers", "options", "render"}
    readme, reference = (page.read_text(encoding="utf-8") for page in (PAGES[0], ROOT / "docs" / "commands.md"))
    table = set(re.findall(r"`([a-z]+)\b", "\n".join(line for line in readme.splitlines() if line.startswith("| `"))))
    headings = set(re.findall(r"[a-z]+", " ".join(re.findall(r"^## (.+)$", reference, flags=re.MULTILINE))))
    assert commands <= table and commands == headings
