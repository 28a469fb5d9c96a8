"""Settings that compute the same in less memory, or in less time: which of them fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dti_dist.config import AUTO, RunConfig
from dti_dist.costs.memory import OVERHEAD, Demand, Memory, Setting, memory
from dti_dist.gpus import CPU
from dti_dist.zero.configuration import read_deepspeed

MARGIN = 0.10  # of the memory is left free: allocators fragment, and shapes vary a little
_MOST_PACKS = 32  # of a micro-batch that is looked at
_ON_GPUS = ("zero1", "zero2", "zero3", "zero3_offload")
_IN_4_BITS = ("zero1", "zero2")  # stage 3 can't partition such weights


@dataclass(frozen=True)
class Room:
    """What one rank may use.

    Attributes:
        memory: bytes of its GPU, or its share of the machine.
        device: cpu or cuda.
        host: its share of the host's memory, beside a GPU; None where it is not known.
    """

    memory: float
    device: str = CPU
    host: float | None = None

    def holds(self, found: Memory) -> bool:
        if found.peak > (1 - MARGIN) * self.memory:
            return False
        return self.host is None or OVERHEAD[CPU] + found.host <= (1 - MARGIN) * self.host


@dataclass(frozen=True)
class Option:
    """A setting with what it takes."""

    setting: Setting
    memory: Memory
    fits: bool

    @property
    def slowness(self) -> tuple[Any, ...]:
        """Offloading waits for the host's memory; checkpointing computes a forward pass more;
        stage 3 communicates half as much again; larger micro-batches start fewer kernels."""
        setting = self.setting
        return (
            self.memory.host > 0,
            setting.checkpointing,
            setting.stage,
            -setting.micro_batch_packs,
        )


def decide(run: Demand, world: int, room: Room) -> Option:
    """The config's own settings; of those that are `auto` the fastest that fits.

    Where none fits, the one that takes least.
    """
    training = run.config.training
    settings = [
        _setting(name, training.micro_batch_packs, checkpointing)
        for name in _names(run.config, room)
        for checkpointing in _checkpointing(run.config)
    ]
    found = options(run, settings, world, room)
    return fastest(found) or min(found, key=lambda option: option.memory.peak)


def decided(config: RunConfig, option: Option) -> RunConfig:
    """The config with what it left open as in the option."""
    setting = option.setting
    taken = {"deepspeed": setting.deepspeed, "activation_checkpointing": setting.checkpointing}
    return config.model_copy(update={"training": config.training.model_copy(update=taken)})


def alternatives(run: Demand, world: int, room: Room) -> list[Option]:
    """All settings that give the same steps as the config's."""
    training = run.config.training
    named = () if training.deepspeed == AUTO else (training.deepspeed,)
    micro_batches = training.global_batch_packs // world
    settings = [
        _setting(name, packs, checkpointing)
        for name in dict.fromkeys((*_usual(run.config, room), *named))
        for checkpointing in (False, True)
        for packs in range(1, min(micro_batches, _MOST_PACKS) + 1)
        if micro_batches % packs == 0
    ]
    return options(run, settings, world, room)


def leanest(config: RunConfig, room: Room) -> list[Setting]:
    """Of each usual DeepSpeed configuration the setting that takes least."""
    return [_setting(name, 1, True) for name in _usual(config, room)]


def options(run: Demand, settings: Iterable[Setting], world: int, room: Room) -> list[Option]:
    found = ((setting, memory(run, setting, world, room.device)) for setting in settings)
    return [Option(setting, taken, room.holds(taken)) for setting, taken in found]


def fastest(found: Iterable[Option]) -> Option | None:
    """Of those that fit; None where none does."""
    fitting = (option for option in found if option.fits)
    return min(fitting, key=lambda option: option.slowness, default=None)


def _usual(config: RunConfig, room: Room) -> tuple[str, ...]:
    if config.model.lora.load_in_4bit:
        return _IN_4_BITS
    return (CPU,) if room.device == CPU else _ON_GPUS


def _names(config: RunConfig, room: Room) -> tuple[str, ...]:
    name = config.training.deepspeed
    return _usual(config, room) if name == AUTO else (name,)


def _checkpointing(config: RunConfig) -> tuple[bool, ...]:
    given = config.training.activation_checkpointing
    return (False, True) if given == AUTO else (given,)


def _setting(name: str, packs: int, checkpointing: bool) -> Setting:
    return Setting(name, read_deepspeed(name)["zero_optimization"], packs, checkpointing)
