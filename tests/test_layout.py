"""The house itself: what is packaged, who imports whom, and what an import may touch."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE_DIR = PYPROJECT["tool"]["setuptools"]["package-dir"]  # "fxprune.passes" -> "passes"

# A module imports from rows above its own, and inside its row as long as nothing goes in circles.
# A trailing .* stands for every module of a package that is not listed by itself.
ROWS = [
    ["_version", "errors", "pause", "interrupts"],
    ["config", "plan", "report", "views.*", "views"],
    ["kernels.launch"],
    ["kernels.*"],
    ["kernels"],
    ["graph"],
    [
        "hints",
        "proxies",
        "decompose",
        "symbolic",
        "exported",
        "lifting",
        "modes",
        "admission",
        "trace",
        "labels",
        "flow",
        "rules.*",
        "rules",
        "groups",
        "cost",
        "coupling",
        "layers",
        "budget",
    ],
    [
        "surgery",
        "verify",
        "optim",
        "distributed",
        "checkpoint",
        "latency",
        "training.*",
        "training",
    ],
    ["rewrites.*", "rewrites"],
    ["passes.methods.*"],
    ["passes.methods"],
    ["passes.*"],
    [
        "passes",
        "planning",
        "scope",
        "evidence",
        "selection",
        "pruned",
        "recalibrate",
        "inputs",
        "masked_norms",
        "mask",
        "storage",
        "export",
    ],
    ["pipeline", "pruner"],
    ["datasets.*", "datasets"],
    ["methods", "api", "splice", "extend", "sensitivity", "evaluation", "fit", "data", "zoo"],
    [""],  # fxprune itself
    ["cli.*", "cli"],  # a user of the public names
]
# Imports inside a function that close a circle on purpose: a method of a result hands over to the
# module that does the work, which in turn reads that result.
CLOSING = {
    ("fxprune.groups", "fxprune.planning"): "Analysis.plan",
    ("fxprune.groups", "fxprune.coupling"): "Analysis.coupling",
    ("fxprune.trace", "fxprune.exported"): "trace",
    ("fxprune.report", "fxprune.views.tables"): "Report.__repr__",
    ("fxprune.report", "fxprune.views.page"): "Report.to_html",
}


def sources() -> dict[str, Path]:
    """Module -> file, by the map of pyproject.toml; links are not followed."""
    found = {}
    for package, folder in PACKAGE_DIR.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder)
            if any(
                parent.is_symlink() for parent in (path, *path.parents[: len(inside.parts) - 1])
            ):
                continue
            dotted = [package, *inside.with_suffix("").parts]
            found[".".join(dotted).removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def imports(path: Path) -> list[tuple[str, tuple[str, ...], int]]:
    """(module, names taken from it, line) of each import in a file, wherever it stands."""
    found: list[tuple[str, tuple[str, ...], int]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, (), node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import from `fxprune.` on"
            found.append((node.module, tuple(alias.name for alias in node.names), node.lineno))
    return found


def import_graph() -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from(SOURCES)
    for module, path in SOURCES.items():
        for target, names, line in imports(path):
            if target.partition(".")[0] != "fxprune":
                continue
            assert target in SOURCES, f"{path}:{line}: there is no module {target}"
            submodules = [f"{target}.{name}" for name in names if f"{target}.{name}" in SOURCES]
            for imported in submodules or [target]:
                if (module, imported) not in CLOSING:
                    graph.add_edge(module, imported, line=line)
    return graph


def row(module: str) -> int:
    """The row of a module; one that stands in none belongs in ROWS, and in a row of its choice."""
    stem = module.removeprefix("fxprune").removeprefix(".")
    for wanted in (stem, f"{stem.rpartition('.')[0]}.*"):
        for i, modules in enumerate(ROWS):
            if wanted in modules:
                return i
    pytest.fail(f"{module} has no row: put it into ROWS of {Path(__file__).name}")


def test_every_folder_with_modules_is_packaged():
    """One that is forgotten works in an editable install, and is absent from the wheel."""
    folders = {path.parent for path in SOURCES.values()}
    packages = set()
    for folder in folders:
        package, home = max(
            ((p, ROOT / d) for p, d in PACKAGE_DIR.items() if folder.is_relative_to(ROOT / d)),
            key=lambda pair: len(pair[1].parts),
        )
        packages.add(".".join([package, *folder.relative_to(home).parts]))
    assert packages == set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_every_package_has_an_init():
    for folder in {path.parent for path in SOURCES.values()}:
        assert (folder / "__init__.py").exists(), folder


def test_data_files_are_packaged():
    data = PYPROJECT["tool"]["setuptools"]["package-data"]
    for package, folder in PACKAGE_DIR.items():
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / folder)
            if path.is_dir() or path.suffix in {".py", ".pyc", ".md"} or path.is_symlink():
                continue
            own = ".".join([package, *inside.parts[:-1]])  # the package that the file lies in
            patterns = data.get(own, [])
            assert any(Path(inside.name).match(pattern) for pattern in patterns), (
                f"{folder}/{inside}"
            )


def test_imports_never_go_in_circles():
    graph = import_graph()
    if not nx.is_directed_acyclic_graph(graph):
        circle = [f"{a} (line {graph.edges[a, b]['line']})" for a, b in nx.find_cycle(graph)]
        pytest.fail(" -> ".join([*circle, circle[0]]))


def test_exceptions_are_still_needed():
    for module, imported in CLOSING:
        assert imported in [target for target, _, _ in imports(SOURCES[module])], module


def test_imports_come_from_the_rows_above():
    below = [
        f"{SOURCES[module].relative_to(ROOT)}:{edge['line']}: {module} imports {imported}"
        for module, imported, edge in import_graph().edges(data=True)
        if row(imported) > row(module)
    ]
    assert not below, "\n".join(below)


def test_kernels_import_nothing_of_passes():
    graph = import_graph()
    for module in graph:
        if module.startswith("fxprune.kernels"):
            above = nx.descendants(graph, module)
            assert not [name for name in above if name.startswith("fxprune.passes")], module


def test_methods_do_not_import_each_other():
    graph = import_graph()
    methods = {name for name in graph if name.startswith("fxprune.passes.methods.")}
    assert not [(a, b) for a, b in graph.edges if a in methods and b in methods]


def test_nobody_takes_names_from_a_parent_package():
    """A parent is still being loaded then, and may not have them yet; its modules can be had."""
    for module, path in SOURCES.items():
        for target, names, line in imports(path):
            missing = [name for name in names if f"{target}.{name}" not in SOURCES]
            early = module.startswith(f"{target}.") and target.startswith("fxprune") and missing
            assert not early, f"{path.relative_to(ROOT)}:{line}: from {target} import {missing}"


def test_what_is_imported_is_declared():
    """Every third-party import is a dependency, or part of an extra, of pyproject.toml."""
    project = PYPROJECT["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["export"]]
    known = {re.match(r"[\w-]+", text)[0] for text in declared}
    known |= {"fxprune", "triton"}  # triton comes with torch on Linux, and may be missing
    known |= {"sklearn"} if "scikit-learn" in known else set()
    for module, path in SOURCES.items():
        for target, _, line in imports(path):
            top = target.partition(".")[0]
            assert top in known | sys.stdlib_module_names, f"{module}, line {line}: {top}"


def fresh(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_import_is_lean():
    """`import fxprune` works without a GPU, without triton, and without what only some calls need."""
    heavy = ("triton", "matplotlib", "onnx", "onnxruntime", "onnxscript", "sklearn", "torchvision")
    done = fresh(
        f"import fxprune, sys, torch\n"
        f"print([name for name in {heavy} if name in sys.modules], torch.cuda.is_initialized())"
    )
    assert done.stdout.strip() == "[] False", done.stdout + done.stderr


@pytest.mark.parametrize("name", ["passes", "kernels"])
def test_a_second_copy_is_refused(name):
    done = fresh(f"import {name}")
    assert f"ImportError: import `fxprune.{name}`, not `{name}`" in done.stderr


SKIPPED = re.compile(
    r"\.git|\.venv.*|.*cache.*|.*\.egg-info|build|dist|demo-out|fxprune-out|\.hypothesis"
)
MACHINE = re.compile(r"(?<![\w.~-])/(?:home|root|work|Users|mnt|opt)/\w")


def files(folder: Path):
    for path in sorted(folder.iterdir()):
        if SKIPPED.fullmatch(path.name) or path.is_symlink():
            continue
        yield from files(path) if path.is_dir() else [path]


def test_no_file_names_a_path_of_some_machine():
    found = []
    for path in files(ROOT):
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue  # not text
        found += [f"{path.relative_to(ROOT)}:{i}" for i, line in enumerate(lines, 1) if MACHINE.search(line)]  # fmt: skip
    assert not found
