"""What a team would do without this program: Hugging Face's Trainer, one padded prompt a target."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dti_dist.benchmarks import measure
from dti_dist.console import without_library_chatter
from dti_dist.data.index import read_block
from dti_dist.data.layout import PackShape, build_pack
from dti_dist.data.samples import SampleSettings, sample_lengths
from dti_dist.data.sequences import SequenceBlock
from dti_dist.inputs import Inputs

Prompt = dict[str, Any]


class PaddedTrainer:
    """Calls of `train` take a few steps of Trainer each, on prompts that were not taken before.

    The same backbone and weights as a transformers sequence classifier of two labels, which reads
    the last token; its attention is transformers' own, causal; batches are padded to their longest
    prompt, in the random order in which Trainer draws them.

    Args:
        inputs: of the sliding-window paradigm.
        prompts: of one call.
        batch: prompts of a step.

    Attributes:
        seconds: from the first step's begin to the last one's end in the last call: without
            Trainer's set-up.
        tokens: that the last call ran on, padding included.
    """

    def __init__(
        self,
        inputs: Inputs,
        targets: int,
        prompts: int,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self._inputs, self._prompts, self._batch = inputs, prompts, batch
        self._device, self._dtype = device, dtype
        self._drawn = _drawn_prompts(inputs, targets)
        self._model = _classifier(inputs).train()
        self._pad = self._model.config.pad_token_id
        self.seconds = 0.0
        self.tokens = 0

    def train(self) -> None:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        device = self._device
        times: list[float] = []

        class Clock(TrainerCallback):
            def on_step_begin(self, *arguments: Any, **named: Any) -> None:
                times.append(measure.now(device))

            def on_step_end(self, *arguments: Any, **named: Any) -> None:
                times.append(measure.now(device))

        prompts = [next(self._drawn) for _ in range(self._prompts)]
        self.tokens = 0
        training = self._inputs.config.training
        with without_library_chatter(), tempfile.TemporaryDirectory() as unused:
            arguments = TrainingArguments(
                output_dir=unused,
                per_device_train_batch_size=self._batch,
                num_train_epochs=1,
                learning_rate=1e-5,
                bf16=self._dtype == torch.bfloat16,
                use_cpu=self._device.type == "cpu",
                gradient_checkpointing=training.activation_checkpointing is True,
                logging_strategy="no",
                save_strategy="no",
                remove_unused_columns=False,
                report_to=[],
                disable_tqdm=True,
            )
            Trainer(
                self._model,
                arguments,
                train_dataset=prompts,
                data_collator=self._padded,
                callbacks=[Clock()],
            ).train()
        self.seconds = times[-1] - times[0]

    def _padded(self, prompts: list[Prompt]) -> dict[str, torch.Tensor]:
        longest = max(len(prompt["ids"]) for prompt in prompts)
        ids = np.full((len(prompts), longest), self._pad)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt["ids"])] = prompt["ids"]
        self.tokens += ids.size
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy((ids != self._pad).astype(np.int64)),
            "labels": torch.tensor([prompt["label"] for prompt in prompts]),
        }


def _classifier(inputs: Inputs) -> Any:
    """The config's model with a readout of two labels, and an embedding more, of padding."""
    from transformers import AutoModelForSequenceClassification

    causal_lm = inputs.causal_lm()
    vocabulary = causal_lm.get_input_embeddings().num_embeddings
    causal_lm.resize_token_embeddings(vocabulary + 1, mean_resizing=False)
    config = causal_lm.config
    config.num_labels, config.pad_token_id = 2, vocabulary
    model = AutoModelForSequenceClassification.from_config(config)
    model.base_model.load_state_dict(causal_lm.base_model.state_dict())
    return model


def _drawn_prompts(inputs: Inputs, targets: int) -> Iterator[Prompt]:
    """The sliding-window prompts of the first users, at random, again and again."""
    tokens = inputs.tokens
    index = inputs.stream_plan("train", k=1, max_targets=targets).index
    blocks = [read_block(inputs.dataset, place, tokens) for place in index.row_groups]
    block = SequenceBlock.join(blocks)
    settings = SampleSettings.of(inputs.config.sample)
    samples = replace(settings, k=1).cut(block)
    samples = samples.take(np.arange(min(index.total_targets, len(samples))))
    lengths = sample_lengths(samples, block, tokens)
    rng = np.random.default_rng(0)
    while True:
        for number in rng.permutation(len(samples)):
            one = samples.take(np.array([number]))
            pack = build_pack(one, block, tokens, PackShape(int(lengths[number]), 1))
            body = pack.tokens[: int(pack.layout.readout_end[0])]  # up to the target's label
            yield {"ids": np.append(body, tokens.sum_id), "label": int(pack.labels[0])}
