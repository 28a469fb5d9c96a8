"""What a process may use, where schedulers and containers limit it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dti_dist import host

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
NO_LIMIT_OF_VERSION_1 = "9223372036854771712\n"


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
    (tmp_path / "self").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "cgroups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert host.memory_bytes(tmp_path / "cgroups", tmp_path / "self") == expected


def test_without_cgroups_memory_is_the_machines(tmp_path):
    assert host.memory_bytes(tmp_path / "none", tmp_path / "none") == MACHINE
