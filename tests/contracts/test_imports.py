"""Imports point one way, the core stays pure, and importing lorq or torch costs next to nothing."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import lorq

SOURCE = Path(lorq.__file__).parent
# A file may import only what comes before it. Folders count as one.
ORDER = (
    "grids activations scales linalg basis stats sketch ranks factors tiles rounding packing weight reconstruct "
    "methods kernels linear joined safefile checkpoint source calibration selftext experts grouped tiled skeleton "
    "blocks observe report config hf solve smooth options plan verify solver pipeline adapters merge qat adapt "
    "evaluation generate cut demo bench_decode bench bench_adapt show bench_cli cli"
).split()
CORE = ORDER[: ORDER.index("methods") + 1]
LAZY = ("__init__", "_autoload")  # the package's own door imports on demand
FILES = sorted(SOURCE.rglob("*.py"))
files = pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(SOURCE).as_posix())


@cache
def tree(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def place(file):
    """The entry of ORDER that a file belongs to."""
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(file):
    """Every module that a file imports anywhere in it, as a dotted name."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno}: a relative import; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_has_its_place_in_the_order():
    assert {place(file) for file in FILES} - set(LAZY) == set(ORDER)


@files
def test_imports_point_one_way(file):
    if place(file) in LAZY:
        return
    for name in imported(file):
        package, _, rest = name.partition(".")
        home = rest.split(".")[0]
        if package != "lorq" or home in ("", "__version__"):
            continue
        inside = home == place(file) and file.parent != SOURCE  # among the files of one folder
        assert inside or home in ORDER[: ORDER.index(place(file))], f"{place(file)} comes before {home}"


@pytest.mark.parametrize("folder", ["rounding", "methods", "kernels"])
def test_files_of_one_folder_do_not_import_in_a_circle(folder):
    inside = {file.stem: file for file in FILES if place(file) == folder and file.stem != "__init__"}
    needs = {
        stem: {name.split(".")[2] for name in imported(file) if name.startswith(f"lorq.{folder}.")} & set(inside)
        for stem, file in inside.items()
    }
    while needs:
        free = {stem for stem, others in needs.items() if not others & set(needs)}
        assert free, f"a circle among {sorted(needs)}"
        needs = {stem: others for stem, others in needs.items() if stem not in free}


@files
def test_the_core_imports_only_torch_and_shape_annotations(file):
    if place(file) in CORE:
        packages = {name.split(".")[0] for name in imported(file)}
        assert packages - set(sys.stdlib_module_names) <= {"torch", "jaxtyping", "lorq"}


def test_every_public_name_is_there():
    for name in lorq.__all__:
        assert getattr(lorq, name) is not None
    assert set(dir(lorq)) == {*lorq.__all__, "__version__"}
    with pytest.raises(AttributeError, match="'lorq' has no attribute 'quantise'; public names are FLRQ, "):
        _ = lorq.quantise


def run(code):
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_importing_lorq_imports_neither_torch_nor_transformers():
    run("import sys, lorq; assert not {'torch', 'transformers'} & set(sys.modules)")


def test_importing_torch_takes_lorqs_entry_point_and_neither_transformers_nor_a_gpu():
    run(
        "import sys, torch; assert 'transformers' not in sys.modules\n"
        "assert {name for name in sys.modules if name.startswith('lorq')} == {'lorq', 'lorq._autoload'}\n"
        "assert sum(type(finder).__module__ == 'lorq._autoload' for finder in sys.meta_path) == 1\n"
        "import lorq; lorq.METHODS, lorq.read_report; assert 'transformers' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()"
    )


@files
def test_no_file_is_over_four_hundred_lines(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400


@files
def test_no_function_is_over_sixty_lines_without_its_docstring(file):
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node):
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            assert lines <= 60, f"{file.name}:{node.lineno}: {node.name} has {lines} lines"
