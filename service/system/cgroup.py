"""Reads the CPU and memory limits of this process's control groups (cgroup v1 and v2).

A limit applies to all groups below it, so that all groups count from this process's own up to the mount point: a
systemd slice limits its services, a Kubernetes pod its containers.
"""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")  # tests pass another file tree

# cgroup v1 reports "no limit" as the largest multiple of a page that fits in 63 bits. No machine has half of that.
V1_NO_MEMORY_LIMIT = 1 << 62


def cpu_limit(root: Path = ROOT) -> float | None:
    """CPU limit of this process, in cores; None: not limited."""
    limits: list[float] = []
    for group in _groups("cpu", root):
        match _numbers(group / "cpu.max"), _numbers(group / "cpu.cfs_quota_us"), _numbers(group / "cpu.cfs_period_us"):
            case ([quota, period], _, _) | (_, [quota], [period]) if quota > 0 and period > 0:  # v1: -1 is no limit
                limits.append(quota / period)
    return min(limits, default=None)


def memory_limit_bytes(root: Path = ROOT) -> int | None:
    """Memory limit of this process's group, shared by all processes in it; None: not limited.

    `memory.high` counts as well: the kernel does not kill a group above it, but slows it down until it hardly runs.
    """
    return min((limit for group in _groups("memory", root) for limit in _memory_limits(group)), default=None)


def memory_left_bytes(root: Path = ROOT) -> int | None:
    """Memory that the limits of this process's groups leave; None: not limited.

    Files in the page cache that were not used lately count as free, as the kernel drops them first.
    """
    left = []
    for group in _groups("memory", root):
        used = _numbers(group / "memory.current") or _numbers(group / "memory.usage_in_bytes")
        left += [limit - used[0] + _inactive_file_bytes(group) for limit in _memory_limits(group) if used]
    return min(left, default=None)


def _memory_limits(group: Path) -> list[int]:
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    return [limit for name in names for limit in _numbers(group / name) if limit < V1_NO_MEMORY_LIMIT]


def _inactive_file_bytes(group: Path) -> int:
    """With those of nested groups, which v1 counts apart."""
    sizes = {name: size for name, _, size in (line.partition(" ") for line in _lines(group / "memory.stat"))}
    return int(sizes.get("total_inactive_file") or sizes.get("inactive_file") or 0)


def _numbers(file: Path) -> list[int]:
    """The numbers in a file; none if it is missing or contains "max"."""
    try:
        return [int(word) for word in file.read_text().split()]
    except (OSError, ValueError):
        return []


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Directories of the groups whose limits apply to this process, in the controller's v1 hierarchy and in v2."""
    paths: dict[str, str] = {}  # of this process's groups, by kind of hierarchy
    for line in _lines(root / "proc/self/cgroup"):  # "4:cpu,cpuacct:/docker/1f0c", v2: "0::/user.slice/rednet.service"
        match line.split(":", 2):
            case [_, "", path]:
                paths["cgroup2"] = path
            case [_, controllers, path] if controller in controllers.split(","):
                paths["cgroup"] = path
    for line in _lines(root / "proc/self/mountinfo"):
        # "33 24 0:28 /docker/1f0c /sys/fs/cgroup/cpu ro,nosuid master:11 - cgroup cgroup rw,cpu,cpuacct"
        match [fields.split(" ") for fields in line.split(" - ")]:
            case [[_, _, _, top, mount_point, *_], [kind, _, options]] if kind in paths:
                if kind == "cgroup2" or controller in options.split(","):
                    group = _below(paths[kind], _unescape(top))
                    for each in (group, *group.parents):
                        yield root / _unescape(mount_point).lstrip("/") / each


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return []


def _below(path: str, top: str) -> Path:
    """The path of a group, relative to the mounted group.

    A container that shares the host's cgroup namespace sees the host's path, but only its own group is mounted. If the
    group is outside the namespace or the mount, only the mounted group is visible.
    """
    group = Path(path.removesuffix(" (deleted)"))
    if ".." in group.parts or not group.is_relative_to(top):
        return Path()
    return group.relative_to(top)


def _unescape(field: str) -> str:
    """Decode the octal escapes that mountinfo uses for blanks and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field)
