"""The house: who imports whom, in rooms and in files; printed by `python tests/contracts/house.py [SRC]`."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "lorq"
_BEFORE = ("core", "methods", "kernels", "storage", "models", "runtime", "pipeline", "adapt", "foreign")
# A room may import those before it in its line, and nothing else (CONTRIBUTING.md has the tree).
ROOMS = {
    "core": (),
    "methods": ("core",),
    "kernels": ("core",),
    "storage": ("core",),
    "models": ("core", "storage"),
    "runtime": ("core", "kernels", "storage", "models"),
    "pipeline": ("core", "methods", "kernels", "storage", "models", "runtime"),
    "adapt": ("core", "kernels", "storage", "models", "runtime"),
    "foreign": ("core", "methods", "kernels", "storage", "models", "runtime", "pipeline"),
    "exports": _BEFORE,
    "faces": (*_BEFORE, "exports"),
    "bench": (*_BEFORE, "exports", "faces"),
    "cli": (*_BEFORE, "exports", "faces", "bench"),
}
# Files of the first level that belong to no room: everybody may import them, they import nothing of lorq.
GROUND = ("pools", "progress", "version")
LAZY = ("__init__", "_autoload")  # the package's own door imports on demand


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(file: Path) -> Iterator[str]:
    """Every module, or name of one, that a file imports anywhere in it, dotted."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def entry(file: Path, source: Path = SOURCE) -> str:
    """The folder or file of the first level that a file is in."""
    return file.relative_to(source).parts[0].removesuffix(".py")


def room(name: str, source: Path = SOURCE) -> str:
    """The room of an entry: a folder is one, files are faces but for the command line."""
    return name if (source / name).is_dir() or name == "cli" else "faces"


def module_of(name: str, source: Path = SOURCE) -> Path | None:
    """The file of lorq behind a dotted name, or None."""
    parts = name.split(".")
    if parts[0] != "lorq":
        return None
    for length in range(len(parts), 1, -1):
        path = source.joinpath(*parts[1:length])
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        if (path / "__init__.py").is_file():
            return path / "__init__.py"
    return source / "__init__.py"


def floors(needs: dict[str, set[str]]) -> list[list[str]]:
    """What imports nothing, what imports only that, and so on; a last floor that is a circle raises.

    Raises:
        ValueError: naming the members of a circle.
    """
    rest, found = {name: others & set(needs) for name, others in needs.items()}, []
    while rest:
        free = sorted(name for name, others in rest.items() if not others & set(rest))
        if not free:
            raise ValueError(f"a circle among {sorted(rest)}")
        found.append(free)
        rest = {name: others for name, others in rest.items() if name not in free}
    return found


def arrows(source: Path = SOURCE) -> dict[str, set[str]]:
    """Entries of the first level and what they import of each other."""
    found: dict[str, set[str]] = {}
    for file in sorted(source.rglob("*.py")):
        home = entry(file, source)
        if home in LAZY:
            continue
        own = found.setdefault(home, set())
        for name in imported(file):
            target = module_of(name, source)
            if target is not None and entry(target, source) not in (home, *LAZY):
                own.add(entry(target, source))
    return found


def main(source: Path) -> None:
    needs = arrows(source)
    levels = floors(needs)
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in source.rglob("*.py"))
    print(f"{lines} lines, {len(needs)} entries, {len(levels)} floors, {sum(map(len, needs.values()))} arrows")
    for number, names in enumerate(levels):
        print(f"{number:3} {' '.join(names)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else SOURCE)
