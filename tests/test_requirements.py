"""The pinned packages: what is written by hand in *.in, and what `make lock` and `make licences` made of it."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


EXTRAS = ("grpc", "heif", "otel")  # those that an image can have


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)(?:\[\w+\])?==([\w.]+)", text, re.MULTILINE))


def all_have_hashes(locked: str) -> bool:
    entries = re.split(r"^(?=\S+==)", locked, flags=re.MULTILINE)[1:]
    return all("--hash=sha256:" in entry for entry in entries)


@pytest.mark.parametrize("name", ["requirements", "requirements-dev", "docs/requirements"])
def test_locked_requirements_are_those_of_the_source(name: str) -> None:
    """`make lock` has run since the last change, and each package has hashes."""
    locked = (ROOT / f"{name}.txt").read_text()
    assert pins((ROOT / f"{name}.in").read_text()).items() <= pins(locked).items()
    assert all_have_hashes(locked)


@pytest.mark.parametrize("extra", EXTRAS)
def test_locked_extra_is_that_of_pyproject(extra: str) -> None:
    """`make lock` has run since the last change, each package has hashes, and each version is the tested one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = (ROOT / f"requirements-{extra}.txt").read_text()
    for requirement in map(Requirement, project["optional-dependencies"][extra]):
        assert requirement.specifier.contains(pins(locked)[requirement.name])
    tested = pins((ROOT / "requirements.txt").read_text()) | pins((ROOT / "requirements-dev.txt").read_text())
    assert pins(locked).items() <= tested.items()
    assert all_have_hashes(locked)


def test_locked_requirements_agree_on_versions() -> None:
    """A package that two files need has the same version in both, because one environment gets both."""
    found: dict[str, set[str]] = {}
    for name in ("requirements.txt", "requirements-dev.txt", "docs/requirements.txt"):
        for package, version in pins((ROOT / name).read_text()).items():
            found.setdefault(package, set()).add(version)
    assert not {package: versions for package, versions in found.items() if len(versions) > 1}


def test_licences_are_listed_for_every_package_of_the_server() -> None:
    """`make licences` has run since the last change."""
    page = (ROOT / "docs/reference/licences.md").read_text()
    listed = re.findall(r"^\| ([\w.-]+) +\| (\d[\w.]*)\S* +\| (\w+)", page, re.MULTILINE)
    wanted = pins((ROOT / "requirements.in").read_text()) | pins((ROOT / "requirements-torch.txt").read_text())
    assert {(name.lower().replace("_", "-"), version) for name, version, _ in listed} == set(wanted.items())
    assert "UNKNOWN" not in {licence for *_, licence in listed}
