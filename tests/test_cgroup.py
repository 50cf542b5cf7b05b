"""CPU and memory limits of control groups: on fake file trees, and on a real group where the system allows one."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from rednet.service.system.cgroup import cpu_limit, memory_left_bytes, memory_limit_bytes

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_CPU = "33 24 0:28 {top} /sys/fs/cgroup/cpu,cpuacct ro,nosuid master:11 - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "36 24 0:31 {top} /sys/fs/cgroup/memory ro,nosuid master:14 - cgroup cgroup rw,memory"
NO_V1_LIMIT = "9223372036854771712"
DOCKER = "/docker/1f0c2a"


def tree(root: Path, membership: str, mounts: str, files: Mapping[str, str]) -> Path:
    """Write the files below `root` in which a process finds its control groups."""
    for name, text in {"proc/self/cgroup": membership, "proc/self/mountinfo": mounts, **files}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("text", "cores"), [("50000 100000", 0.5), ("150000 100000", 1.5), ("20000 10000", 2.0), ("max 100000", None)]
)
def test_cpu_max_of_a_container_with_its_own_namespace(tmp_path: Path, text: str, cores: float | None) -> None:
    """cgroup v2 in Docker: the process's own group is the root that it sees."""
    assert cpu_limit(tree(tmp_path, "0::/", V2, {"sys/fs/cgroup/cpu.max": text})) == cores


def test_smallest_limit_of_nested_v2_groups_applies(tmp_path: Path) -> None:
    """A slice limits the service in it, even if the service's own limit is larger or missing."""
    files = {
        "sys/fs/cgroup/app.slice/cpu.max": "max 100000",
        "sys/fs/cgroup/app.slice/app-ml.slice/cpu.max": "250000 100000",
        "sys/fs/cgroup/app.slice/app-ml.slice/rednet.service/cpu.max": "400000 100000",
        "sys/fs/cgroup/app.slice/memory.max": "3000000000",
        "sys/fs/cgroup/app.slice/app-ml.slice/memory.max": "max",
        "sys/fs/cgroup/app.slice/app-ml.slice/rednet.service/memory.max": "4000000000",
    }
    root = tree(tmp_path, "0::/app.slice/app-ml.slice/rednet.service", V2, files)
    assert cpu_limit(root) == 2.5
    assert memory_limit_bytes(root) == 3_000_000_000


def test_memory_high_is_a_limit(tmp_path: Path) -> None:
    """Above it the kernel throttles the group: systemd's MemoryHigh= without MemoryMax=."""
    files = {"sys/fs/cgroup/a/memory.max": "max", "sys/fs/cgroup/a/memory.high": "1000"}
    assert memory_limit_bytes(tree(tmp_path, "0::/a", V2, files)) == 1000


def test_memory_left_counts_file_caches_as_free(tmp_path: Path) -> None:
    """The group with the least memory left counts, whose limit need not be the lowest."""
    files = {
        "sys/fs/cgroup/a/memory.max": "1000",
        "sys/fs/cgroup/a/memory.current": "900",
        "sys/fs/cgroup/a/memory.stat": "anon 500\ninactive_file 300\nactive_file 100",
        "sys/fs/cgroup/a/b/memory.max": "700",
        "sys/fs/cgroup/a/b/memory.current": "200",
    }
    root = tree(tmp_path, "0::/a/b", V2, files)
    assert memory_left_bytes(root) == 400
    assert memory_left_bytes(tree(tmp_path, "0::/", V2, {})) is None


def test_memory_left_in_v1_counts_nested_groups(tmp_path: Path) -> None:
    """Without the prefix `total_`, their file caches are missing."""
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "900",
        "sys/fs/cgroup/memory/memory.stat": "inactive_file 10\ntotal_inactive_file 300",
    }
    root = tree(tmp_path, "3:memory:/", V1_MEMORY.format(top="/"), files)
    assert memory_left_bytes(root) == 400


@pytest.mark.parametrize("top", ["/", DOCKER])
def test_v1_quota_with_the_mount_of_the_host_or_the_container(tmp_path: Path, top: str) -> None:
    """Docker mounts the container's group at the host's path. Without a container, the whole hierarchy is mounted."""
    inside = "" if top == DOCKER else DOCKER
    files = {
        f"sys/fs/cgroup/cpu,cpuacct{inside}/cpu.cfs_quota_us": "150000",
        f"sys/fs/cgroup/cpu,cpuacct{inside}/cpu.cfs_period_us": "100000",
        f"sys/fs/cgroup/memory{inside}/memory.limit_in_bytes": "2000000000",
        "sys/fs/cgroup/memory/unrelated/memory.limit_in_bytes": "1",
    }
    membership = f"5:memory:{DOCKER}\n4:cpu,cpuacct:{DOCKER}\n1:name=systemd:{DOCKER}\n0::/"
    root = tree(tmp_path, membership, "\n".join((V1_CPU, V1_MEMORY)).format(top=top), files)
    assert cpu_limit(root) == 1.5
    assert memory_limit_bytes(root) == 2_000_000_000


def test_v1_without_limits(tmp_path: Path) -> None:
    """The quota is -1, and the memory limit is the kernel's number for "unlimited"."""
    files = {
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_V1_LIMIT,
    }
    root = tree(tmp_path, "4:cpu,cpuacct:/\n3:memory:/", "\n".join((V1_CPU, V1_MEMORY)).format(top="/"), files)
    assert cpu_limit(root) is None
    assert memory_limit_bytes(root) is None


def test_hybrid_v1_and_v2_hierarchies_are_both_read(tmp_path: Path) -> None:
    """In systemd's hybrid layout, each controller is in one of the two."""
    v2 = V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")
    files = {
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/unified/a/memory.max": "7000",
    }
    root = tree(tmp_path, "4:cpu,cpuacct:/\n0::/a", "\n".join((V1_CPU.format(top="/"), v2)), files)
    assert cpu_limit(root) == 3.0
    assert memory_limit_bytes(root) == 7000


@pytest.mark.parametrize("membership", ["0::/../../other", "0::/moved/away"])
def test_group_outside_of_the_mount_falls_back_to_the_mounted_group(tmp_path: Path, membership: str) -> None:
    """The path of a process that was moved out of its container's group cannot be resolved."""
    mount = V2.replace(" / ", " /container ")
    assert cpu_limit(tree(tmp_path, membership, mount, {"sys/fs/cgroup/cpu.max": "100000 100000"})) == 1.0


def test_cgroup_paths_with_blanks_colons_and_deleted_groups(tmp_path: Path) -> None:
    """mountinfo escapes blanks, and a group may be removed while the process is in it."""
    mount = V2.replace("/sys/fs/cgroup ", r"/mnt/c\040groups ")
    files = {"mnt/c groups/a:b c/cpu.max": "50000 100000"}
    assert cpu_limit(tree(tmp_path, "0::/a:b c/gone (deleted)", mount, files)) == 0.5


def test_no_limits_without_control_groups(tmp_path: Path) -> None:
    """macOS and some Linux systems do not have the files."""
    assert cpu_limit(tmp_path) is None
    assert memory_limit_bytes(tree(tmp_path, "", "", {})) is None
    assert cpu_limit(tree(tmp_path, "0::/", "not a mount - cgroup2", {})) is None


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A new v1 CPU group below this process's own."""
    parent = Path("/sys/fs/cgroup/cpu")
    path = next(
        (line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":cpu" in line), None
    )
    if path is None or not (parent / "cpu.cfs_quota_us").exists():
        pytest.skip("cgroup v1 is not mounted for the CPU")
    group = parent / path.lstrip("/") / f"rednet-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        yield group
    finally:
        with suppress(OSError):
            group.rmdir()


@pytest.mark.parametrize(("quota_us", "cores"), [(50_000, 1), (100_000, 1)])
def test_real_v1_quota_limits_the_cores(real_group: Path, quota_us: int, cores: int) -> None:
    """A process in the group and one in a nested group both see the limit."""
    (real_group / "cpu.cfs_quota_us").write_text(str(quota_us))
    nested = real_group / "nested"
    nested.mkdir()
    code = "from rednet.service.system import cgroup, cores; print(cores.usable_cores(), cgroup.cpu_limit())"
    try:
        for group in (real_group, nested):
            move = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -c '{code}'"
            done = subprocess.run(["sh", "-c", move], capture_output=True, text=True, check=True)
            assert done.stdout.split() == [str(cores), str(quota_us / 100_000)]
    finally:
        nested.rmdir()
