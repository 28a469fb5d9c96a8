"""What a process may use, where schedulers and containers limit it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dti_dist import host

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
NO_LIMIT_OF_VERSION_1 = "9223372036854771712\n"


def cgroups_of(folder, membership, files):
    """Where these cgroups are mounted, and the file that says which is the process's."""
    (folder / "self").write_text(membership)
    for name, text in files.items():
        path = folder / "cgroups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "cgroups", folder / "self"


def test_cores_are_those_that_the_process_may_run_on():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from dti_dist import host; print(host.cores(), host.rank_threads(1), host.rank_threads(4))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout == "1 1 1\n"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/job/step\n", {"job/step/memory.max": "max\n", "job/memory.max": "4096\n"}, 4096),
        ("0::/job\n", {"job/memory.max": "max\n"}, MACHINE),
        ("0::/\n", {"memory.max": "8192\n"}, 8192),
        # A container sees its own group as the root, and the host's path.
        ("4:memory:/docker/abc\n", {"memory/memory.limit_in_bytes": "4096\n"}, 4096),
        (
            "5:cpu:/x\n4:cpuacct,memory:/job\n",
            {
                "memory/job/memory.limit_in_bytes": "12288\n",
                "memory/memory.limit_in_bytes": NO_LIMIT_OF_VERSION_1,
            },
            12288,
        ),
        ("", {}, MACHINE),
    ],
)
def test_memory_is_the_least_limit_of_the_cgroups(tmp_path, membership, files, expected):
    assert host.memory_bytes(*cgroups_of(tmp_path, membership, files)) == expected


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (
            "0::/job/step\n",
            {"job/step/cpu.max": "max 100000\n", "job/cpu.max": "300000 100000\n"},
            3,
        ),
        ("0::/job\n", {"job/cpu.max": "250000 100000\n"}, 2),
        ("0::/job\n", {"job/cpu.max": "50000 100000\n"}, 1),
        ("0::/job\n", {"job/cpu.max": "900000 100000\n"}, 4),
        ("0::/job\n", {"job/cpu.max": "max 100000\n"}, 4),
        (
            "3:cpu,cpuacct:/docker/abc\n",
            {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "50000\n"},
            3,
        ),
        (
            "3:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            4,
        ),
        ("", {}, 4),
    ],
)
def test_of_four_cores_a_quota_leaves_whole_ones(
    tmp_path, monkeypatch, membership, files, expected
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert host.cores(*cgroups_of(tmp_path, membership, files)) == expected


def test_free_memory_is_what_machine_and_cgroups_leave(tmp_path):
    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def free():
        return host.free_memory_bytes(tmp_path / "cgroups", tmp_path / "self", tmp_path / "meminfo")

    group = {"memory.current": "30000\n", "memory.stat": "anon 10000\ninactive_file 4000\n"}
    write({"meminfo": "MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable: 64 kB\n"})
    write({f"cgroups/job/{name}": text for name, text in group.items()})
    write({"self": "0::/job/step\n", "cgroups/job/memory.max": "40960\n"})
    assert free() == 40960 - (30000 - 4000)
    write({"cgroups/job/memory.max": "200000\n"})
    assert free() == 64 * 1024
    group = {
        "memory.limit_in_bytes": "40960\n",
        "memory.usage_in_bytes": "30000\n",
        "memory.stat": "inactive_file 0\ntotal_inactive_file 4000\n",
    }
    write({"self": "4:memory:/job\n"})
    write({f"cgroups/memory/job/{name}": text for name, text in group.items()})
    assert free() == 40960 - (30000 - 4000)


def test_without_cgroups_memory_is_the_machines(tmp_path):
    assert host.memory_bytes(tmp_path / "none", tmp_path / "none") == MACHINE
