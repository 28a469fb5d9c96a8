"""What a rank holds while a model is loaded."""

from __future__ import annotations

import pytest

from tests.training.large_model import prepare, train

SHARD_MIB = 48
TABLE_MIB = 16  # the largest tensor
NOISE_MIB = 60


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_holds_its_share_one_tensor_and_rank_0_one_shard(tmp_path):
    pytest.importorskip("peft")  # without an optimizer for most weights, loading is the peak
    tiny, _ = prepare(tmp_path / "tiny", layers=1, hidden=256, vocabulary=400, lora=True)
    constant = min(train(tiny, only_loading=True)["loaded_mib"])
    large, parameters = prepare(
        tmp_path / "large",
        layers=8,
        hidden=1024,
        vocabulary=8000,
        shard_bytes=SHARD_MIB * 2**20,
        lora=True,
    )
    share = 2 * parameters / 2 / 2**20  # bfloat16, two ranks
    assert share > NOISE_MIB
    assert len(list((tmp_path / "large" / "model").glob("*.safetensors"))) > 3
    peaks = sorted(train(large, only_loading=True)["loaded_mib"])
    assert peaks[0] < constant + share + TABLE_MIB + NOISE_MIB
    assert peaks[1] < constant + share + TABLE_MIB + SHARD_MIB + NOISE_MIB
