"""The file of a copy is that of the original, and later steps don't reach it."""

from __future__ import annotations

import io
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler

from dti_dist.training import staging
from dti_dist.training.staging import HostCopies, NoRoom


def content(seed: int = 0):
    """As DeepSpeed's: views of flat buffers, the same tensor twice, and records."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.nn.Parameter(torch.randn(1000, generator=generator))
    half = torch.randn(64, generator=generator).bfloat16()
    moments = {
        "step": torch.tensor(float(seed)),
        "exp_avg": torch.randn(1000, generator=generator),
    }
    module = OrderedDict(first=flat.detach()[:400].view(20, 20), second=flat.detach()[400:900])
    module._metadata = {"version": 1}
    return {
        "module": module,
        "optimizer": {"state": {0: moments, 1: moments}, "flat": [flat, flat.detach()[10:20]]},
        "bf16": (half, half[3:5], torch.empty(0), half.view(8, 8).t()),
        "names": ["a", "a"],
        "loss_scaler": LossScaler(scale=1.0),
        "size": torch.Size([2, 3]),
    }


def saved(what) -> bytes:
    file = io.BytesIO()
    torch.save(what, file)
    return file.getvalue()


def test_the_file_of_a_copy_is_that_of_the_original():
    original = content()
    assert saved(HostCopies(1).copy(original)) == saved(original)


def test_what_is_trained_later_does_not_reach_a_copy():
    copies, original = HostCopies(1), content()
    expected = saved(original)
    copy = copies.copy(original)
    with torch.no_grad():
        original["optimizer"]["flat"][0].add_(1)
    original["optimizer"]["state"][0]["step"] += 1
    original["module"]["third"] = torch.ones(1)
    original["loss_scaler"].cur_scale = 8.0
    assert saved(original) != expected
    assert saved(copy) == expected


def test_the_next_copies_take_the_same_memory():
    copies = HostCopies(1)
    first = [copies.copy(content(0)), copies.copy({"more": torch.ones(5)})]
    places = first[0]["module"]["first"].data_ptr(), first[1]["more"].data_ptr()
    assert saved(first[0]) == saved(content(0)), "the second copy has memory of its own"
    copies.reuse()
    second = [copies.copy(content(1)), copies.copy({"more": torch.ones(5)})]
    assert (second[0]["module"]["first"].data_ptr(), second[1]["more"].data_ptr()) == places
    assert saved(second[0]) == saved(content(1))


def test_memory_that_was_made_ahead_is_what_the_copies_take(monkeypatch):
    copies = HostCopies(1)
    copies.expect([content(0), {"more": torch.ones(5)}])
    copies._making.join()
    made = [buffer.data_ptr() for buffer in copies._buffers]
    monkeypatch.setattr(staging, "free_memory_bytes", lambda: 0)
    copies.reuse()
    found = [copies.copy(content(1)), copies.copy({"more": torch.ones(5)})]
    assert saved(found[0]) == saved(content(1))
    assert found[0]["module"]["first"].data_ptr() == made[0]
    assert found[1]["more"].data_ptr() == made[-1]


def test_no_memory_is_made_ahead_where_there_is_no_room(monkeypatch):
    monkeypatch.setattr(staging, "free_memory_bytes", lambda: 0)
    copies = HostCopies(1)
    copies.expect([content()])
    with pytest.raises(NoRoom):
        copies.copy(content())
    assert copies._buffers == []


def test_content_of_another_size_is_copied_too():
    copies = HostCopies(1)
    for numbers in (5, 9, 2):
        copies.reuse()
        original = {"a": torch.arange(float(numbers)), "b": torch.arange(3.0)}
        assert saved(copies.copy(original)) == saved(original)


def test_a_copy_is_refused_where_all_ranks_copies_would_not_fit(monkeypatch):
    original = {"a": torch.zeros(250)}  # 1,000 bytes
    free = SimpleNamespace(bytes=3000)
    monkeypatch.setattr(staging, "free_memory_bytes", lambda: free.bytes)
    with pytest.raises(NoRoom):
        HostCopies(3).copy(original)
    copies = HostCopies(2)
    copies.copy(original)
    free.bytes = 0
    copies.reuse()
    copies.copy(original)  # nothing more is taken
