"""What a rank holds while a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launching import job, job_with, run
from tests.training.large_model import RANKS, config_of, write_model

SHARD_MIB = 48
TABLE_MIB = 16  # the largest tensor
NOISE_MIB = 60


def loaded(folder: Path, data: Path) -> list[float]:
    """The most MiB that was resident of each rank until its first step, least first."""
    config = config_of(folder, data, lora=True)
    before_step = f"""
Path({str(folder)!r}, f"peak-{{rank}}").write_text(str(peak_mib(os.getpid())))
torch.distributed.barrier()
os._exit(0)
"""
    first = "from pathlib import Path\nfrom tests.training.large_model import peak_mib"
    script = job_with(before_step, folder / "job.py", first)
    run(job(RANKS, config, script=script), folder / "log")
    return sorted(float((folder / f"peak-{rank}").read_text()) for rank in range(RANKS))


@pytest.mark.slow
def test_a_rank_holds_its_share_one_tensor_and_rank_0_one_shard(synthetic, tmp_path):
    pytest.importorskip("peft")  # without an optimizer for most weights, loading is the peak
    tiny, large = tmp_path / "tiny", tmp_path / "large"
    write_model(tiny / "model", 1, 256, 400, shard_bytes=10**9)
    constant = loaded(tiny, synthetic)[0]
    parameters = write_model(large / "model", 8, 1024, 8000, shard_bytes=SHARD_MIB * 2**20)
    share = 2 * parameters / 2 / 2**20  # bfloat16, two ranks
    assert share > NOISE_MIB
    assert len(list((large / "model").glob("*.safetensors"))) > 3
    peaks = loaded(large, synthetic)
    assert peaks[0] < constant + share + TABLE_MIB + NOISE_MIB
    assert peaks[1] < constant + share + TABLE_MIB + SHARD_MIB + NOISE_MIB
