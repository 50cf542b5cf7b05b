"""Prints which package imports which: python -m tests.architecture [--picture]

A package is a folder of `model/` or `service/`, with its subfolders, or a module directly in `service/`. An arrow is an
import from one package into another, anywhere in a module.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def package_of(path: Path) -> str:
    """The package of a module, given its path below the root; `model/__init__.py` is the package `model`."""
    return ".".join(path.with_suffix("").parts[:2]).removesuffix(".__init__")


def imported_modules(path: Path) -> Iterator[Path]:
    """The project's modules that a module imports, as paths below the root."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                found = [name.name for name in names]
            case ast.ImportFrom(module=str(module), names=names):
                found = [f"{module}.{name.name}" for name in names]
            case _:
                continue
        yield from filter(None, map(_module, found))


def _module(dotted: str) -> Path | None:
    parts = dotted.split(".")
    if parts.pop(0) != "rednet":
        return None
    while parts:
        for path in (Path(*parts).with_suffix(".py"), Path(*parts, "__init__.py")):
            if (ROOT / path).exists():
                return path
        parts.pop()  # a name inside a module
    return Path("model", "__init__.py")  # `from rednet import create_rednet`


def arrows(folder: str) -> Mapping[str, set[str]]:
    """For each package of `model` or `service`, the packages that it imports from."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted((ROOT / folder).rglob("*.py")):
        module = path.relative_to(ROOT)
        if module.parent != Path(folder) or module.stem != "__init__":  # that one only re-exports
            package = package_of(module)
            found[package] |= {package_of(each) for each in imported_modules(module)} - {package}
    return found


def picture() -> str:
    """The packages as a Mermaid diagram, without the arrows that follow from others."""
    found = {package: set(imported) for folder in ("model", "service") for package, imported in arrows(folder).items()}
    found["model"] = {package_of(each) for each in imported_modules(Path("model", "__init__.py"))}
    reached = {package: _reached(found, package) for package in found}
    lines = ["flowchart TD"]
    for package, imported in sorted(found.items()):
        indirect = set().union(*(reached[each] for each in imported))
        lines += [f"    {package} --> {each}" for each in sorted(imported - indirect)]
    return "\n".join(lines)


def _reached(found: Mapping[str, set[str]], package: str) -> set[str]:
    """The packages that a package imports, and those that they import, and so on."""
    return found[package].union(*(_reached(found, each) for each in found[package]))


def main() -> None:
    if "--picture" in sys.argv:
        print(picture())
        return
    for folder in ("model", "service"):
        packages = arrows(folder)
        for package, imported in packages.items():
            print(f"{package:28} {' '.join(sorted(imported))}")
        print(f"{folder}: {len(packages)} packages, {sum(map(len, packages.values()))} arrows\n")


if __name__ == "__main__":
    main()
