"""Imports point one way, the core stays pure, and importing lorq or torch costs next to nothing."""

import ast
import subprocess
import sys

import house
import pytest

import lorq

FILES = sorted(house.SOURCE.rglob("*.py"))


def test_every_entry_is_a_room_a_face_or_the_ground():
    entries = {house.entry(file) for file in FILES} - set(house.LAZY)
    faces = {
        "cards",
        "bars",
        "charts",
        "compensation",
        "demo",
        "evaluation",
        "exporting",
        "generation",
        "harness",
        "inspection",
        "option_groups",
        "publishing",
        "quality",
        "quantizing",
        "refusals",
        "stopping",
        "reporting",
        "show",
        "tuning",
        "verifying",
    }
    assert entries == (set(house.ROOMS) - {"faces"}) | faces | set(house.GROUND)


def test_rooms_import_only_rooms_before_them():
    order = list(house.ROOMS)
    for name, allowed in house.ROOMS.items():
        assert set(allowed) <= set(order[: order.index(name)]), name
    wrong = []
    for name, others in house.arrows().items():
        own = house.room(name)
        for other in others - set(house.GROUND):
            if name in house.GROUND or house.room(other) not in (
                *house.ROOMS[own],
                *(["faces"] if own == "faces" else []),
            ):
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_no_files_import_each_other_in_a_circle():
    needs = {}
    for file in FILES:
        if house.entry(file) not in house.LAZY:
            targets = {house.module_of(name) for name in house.imported(file)} - {None, file}
            needs[str(file)] = {str(target) for target in targets if house.entry(target) not in house.LAZY}
    # A package's own file gathers what is in it, and is not what its files import.
    gathers = {str(file) for file in FILES if file.name == "__init__.py"}
    for name, others in needs.items():
        needs[name] = {
            other for other in others if other not in gathers or not name.startswith(other[: -len("__init__.py")])
        }
    assert len(house.floors(needs)) > 5


def test_the_core_imports_only_torch_and_shape_annotations():
    for file in FILES:
        if house.entry(file) in ("core", "methods"):
            packages = {name.split(".")[0] for name in house.imported(file)}
            assert packages - set(sys.stdlib_module_names) <= {"torch", "jaxtyping", "lorq"}, file


def test_every_public_name_is_there():
    assert {kind.__name__ for kind in lorq.METHODS.values()} < set(lorq.__all__)
    for name in lorq.__all__:
        assert getattr(lorq, name) is not None
    assert set(dir(lorq)) == {*lorq.__all__, "__version__"}
    assert dir(lorq.adapt) == sorted(lorq.adapt.__all__)
    starred: dict[str, object] = {}
    exec("from lorq import *", starred)
    assert set(lorq.__all__) <= set(starred)
    with pytest.raises(AttributeError, match="'lorq' has no attribute 'quantise'; public names are FLRQ, "):
        _ = lorq.quantise


def run(code):
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_importing_lorq_imports_neither_torch_nor_transformers():
    run(
        "import sys, lorq; assert not hasattr(lorq, '__wrapped__')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )


def test_importing_torch_takes_lorqs_entry_point_and_neither_transformers_nor_a_gpu(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)  # set by lorq, where it came before torch
    run(
        "import os, sys, torch; assert 'transformers' not in sys.modules and 'GOMP_SPINCOUNT' not in os.environ\n"
        "ours = {name for name in sys.modules if name.startswith('lorq')}\n"
        "assert ours == {'lorq', 'lorq._autoload', 'lorq.pools', 'lorq.version'}\n"
        "assert sum(type(finder).__module__ == 'lorq._autoload' for finder in sys.meta_path) == 1\n"
        "import lorq; lorq.METHODS, lorq.read_report; assert 'transformers' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()"
    )


def test_no_file_is_over_four_hundred_lines_and_no_function_over_sixty_without_its_docstring():
    for file in FILES:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, file
        for node in ast.walk(house.tree(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node):
                    lines -= node.body[0].end_lineno - node.body[0].lineno + 1
                assert lines <= 60, f"{file.name}:{node.lineno}: {node.name} has {lines} lines"
