"""What a GPU can do at best, by its vendor's datasheet; or this machine's processors, measured."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch

from dti_dist.errors import UserError, nearest
from dti_dist.host import memory_bytes, rank_threads


@dataclass(frozen=True)
class Gpu:
    """One rank's share of hardware.

    Attributes:
        bf16, fp32: dense peak, FLOP/s; bf16 None where there are no such units. fp32 is without
            TF32, which torch leaves off.
        memory: bytes.
        source: where the figures are from.
    """

    name: str
    bf16: float | None
    fp32: float
    memory: int
    source: str

    def peak(self, precision: str) -> float:
        """FLOP/s at best. Raises UserError for bf16 where there is none."""
        if precision == "fp32":
            return self.fp32
        if self.bf16 is None:
            raise UserError(
                f"training.precision is bf16, and {self.name} computes none. Set "
                "training.precision=fp32, or choose another with --gpu."
            )
        return self.bf16


# TFLOP/s bf16 and fp32 without sparsity, and GB (10^9 bytes, which is on the safe side: drivers
# show a little more). NVIDIA's datasheets give tensor-core peaks "with sparsity": half of those.
_DATASHEETS: dict[str, tuple[float | None, float, int]] = {
    "B200": (2250, 75, 180),
    "H200": (989, 67, 141),
    "H100-SXM": (989, 67, 80),
    "H100-PCIe": (756, 51, 80),
    "H100-NVL": (835, 60, 94),
    "GH200-96GB": (989, 67, 96),
    "A100-80GB": (312, 19.5, 80),
    "A100-40GB": (312, 19.5, 40),
    "A40": (149.7, 37.4, 48),
    "A30": (165, 10.3, 24),
    "A10": (125, 31.2, 24),
    "A10G": (70, 35, 24),
    "L40S": (362, 91.6, 48),
    "L40": (181, 90.5, 48),
    "L4": (121, 30.3, 24),
    "RTX-6000-Ada": (364, 91.1, 48),
    "RTX-A6000": (154.8, 38.7, 48),
    "RTX-4090": (165.2, 82.6, 24),
    "RTX-3090": (71, 35.6, 24),
    "V100-32GB": (None, 15.7, 32),
    "V100-16GB": (None, 15.7, 16),
    "T4": (None, 8.1, 16),
}
# What people and drivers call them.
_ALIASES = {"H100": "H100-SXM", "A100": "A100-80GB", "V100": "V100-32GB", "GH200": "GH200-96GB"}
# Words of names whose peaks are not those of the name without them.
_VARIANTS = {"nvl", "ti", "super", "d", "laptop"}
CPU = "cpu"


def find_gpu(name: str, ranks_here: int = 1, threads: int | None = None) -> Gpu:
    """By name, in any case and with or without what joins its parts; `cpu` is this machine.

    Args:
        ranks_here: of `cpu`, how many ranks share this machine.
        threads: of such a rank; default: its share of the cores.

    Raises:
        UserError: for a name that is not in the table, naming the nearest.
    """
    if name.lower() == CPU:
        return _this_machine(ranks_here, threads)
    known = {_plain(key): key for key in _DATASHEETS} | {_plain(a): k for a, k in _ALIASES.items()}
    key = known.get(_plain(name))
    if key is None:
        names = [*_DATASHEETS, CPU]
        raise UserError(
            f"--gpu {name!r} is not in the table.{nearest(name.upper(), names)} "
            f"Known: {', '.join(names)}."
        )
    bf16, fp32, gigabytes = _DATASHEETS[key]
    return Gpu(
        key,
        None if bf16 is None else bf16 * 1e12,
        fp32 * 1e12,
        gigabytes * 10**9,
        "datasheet",
    )


def gpu_at_hand() -> Gpu | None:
    """This rank's GPU, with its real memory; None where there is none or an unknown one."""
    if not torch.cuda.is_available():
        return None
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return gpu_of_device(torch.cuda.get_device_name(), memory)


def gpu_of_device(name: str, memory: int) -> Gpu | None:
    """The GPU that a driver calls so, with so many bytes; None where it is not in the table."""
    words = set(re.split(r"[ _-]", name.lower()))
    fitting = [key for key in _DATASHEETS if _parts(key) <= words]
    if not fitting:
        fitting = [key for alias, key in _ALIASES.items() if alias.lower() in words]
    fitting = [key for key in fitting if words & _VARIANTS <= _parts(key)]
    if not fitting:
        return None
    # Of several the one whose memory is nearest, and of those the longest name: A10G is no A10.
    key = min(fitting, key=lambda k: (abs(_DATASHEETS[k][2] * 1e9 - memory) // 8e9, -len(k)))
    found = find_gpu(key)
    return Gpu(key, found.bf16, found.fp32, memory, "datasheet; memory of the GPU at hand")


def _parts(key: str) -> set[str]:
    """What a driver's name must hold as whole words; memory is told by its size."""
    return {part for part in key.lower().split("-") if not part.endswith("gb")}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _this_machine(ranks: int, threads: int | None) -> Gpu:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or rank_threads(ranks))
    bf16, fp32 = (_matmul_rate(dtype) for dtype in (torch.bfloat16, torch.float32))
    torch.set_num_threads(before)
    return Gpu(CPU, bf16, fp32, memory_bytes() // ranks, "measured: matrix products here")


def _matmul_rate(dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of square products, the best of a few."""
    a = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
