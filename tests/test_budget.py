from __future__ import annotations

from tpool.tensors.budget import default_budget_nbytes, memory_limit_nbytes

GIB = 1 << 30
MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1000000 kB\n"


def limit(self_cgroup: str, files: dict[str, str], meminfo: str = MEMINFO) -> int:
    return memory_limit_nbytes({"/proc/meminfo": meminfo, "/proc/self/cgroup": self_cgroup, **files}.get)


def test_without_cgroups_it_is_the_machine() -> None:
    assert limit("", {}) == 16 * GIB
    assert memory_limit_nbytes({"/proc/meminfo": MEMINFO}.get) == 16 * GIB


def test_version_2_takes_the_lowest_limit_above_us() -> None:
    files = {
        "/sys/fs/cgroup/a/b/memory.max": "max\n",
        "/sys/fs/cgroup/a/memory.max": f"{4 * GIB}\n",
        "/sys/fs/cgroup/memory.max": f"{8 * GIB}\n",
        "/sys/fs/memory.max": "1\n",
    }
    assert limit("0::/a/b\n", files) == 4 * GIB
    assert limit("0::/\n", files) == 8 * GIB
    assert limit("0::/other\n", files) == 8 * GIB


def test_version_1_and_its_way_to_say_unlimited() -> None:
    root = "/sys/fs/cgroup/memory"
    files = {
        f"{root}/job/memory.limit_in_bytes": f"{2 * GIB}\n",
        f"{root}/memory.limit_in_bytes": "9223372036854771712",
    }
    lines = "11:cpu,cpuacct:/x\n4:memory:/job\n0::/job\n"
    assert limit(lines, files) == 2 * GIB
    assert limit("4:memory:/\n", files) == 16 * GIB


def test_a_container_whose_path_is_the_hosts() -> None:
    files = {"/sys/fs/cgroup/memory/memory.limit_in_bytes": str(GIB)}
    assert limit("4:memory:/docker/0123\n", files) == GIB


def test_a_limit_above_the_machine_does_not_count() -> None:
    assert limit("0::/\n", {"/sys/fs/cgroup/memory.max": str(99 * GIB)}) == 16 * GIB


def test_strange_files() -> None:
    assert limit("nonsense\n0::\n:::\n", {"/sys/fs/cgroup/memory.max": "what\n"}) == 16 * GIB
    assert limit("", {}, meminfo="") == 4 * GIB


def test_the_default_is_three_quarters_of_this_machine() -> None:
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert 0 < default_budget_nbytes() <= total * 3 // 4
