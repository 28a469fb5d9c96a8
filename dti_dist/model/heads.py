"""Heads: what makes a logit of [SUM]'s last hidden state, and how it is exported.

A head is a class here and a name in `ModelConfig.head`. What others ask of it, it says itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dti_dist.data.dataset import UNKNOWN
from dti_dist.data.layout import Pack
from dti_dist.data.stream import Batch
from dti_dist.errors import UserError
from dti_dist.model.families import logits_divisor
from dti_dist.model.weights import Reader, Stored, mark_stored, stored

_RAREST = 1e-6  # a label rate is at least so far from 0 and 1
_GENTLE = 0.05  # logits of up to 8 raise the first loss by less than 0.02; at 0, nothing is learned


class Head(nn.Module, ABC):
    """[SUM]'s last hidden state → a logit of label 1, one for each task.

    The main task's is the head's own. Each further task has a vector, which starts at zero: its
    product with the hidden state is the logit. Each task has a bias.

    Attributes:
        is_new: it has weights that the pretrained model lacks.
        auto_class: of transformers, that an exported model is loaded by; by peft, its task.
        exported_weight: the name of `weight` in an exported model.
        pipeline_tag: of the exported model on the hub.
        reading: how the probability of a click is read from an exported model.
    """

    is_new: ClassVar[bool]
    auto_class: ClassVar[str]
    peft_task: ClassVar[str]
    exported_weight: ClassVar[str]
    pipeline_tag: ClassVar[str]
    reading: ClassVar[str]
    weight: nn.Parameter
    tasks: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def add_tasks(self, tasks: Sequence[str]) -> None:
        """Add the vectors and biases of further tasks; once."""
        self.tasks = tuple(tasks)
        for task in tasks:
            shape = 1, self.weight.shape[1]
            self.register_parameter(task_parameter(task), nn.Parameter(torch.zeros(shape)))
            self.register_parameter(bias_parameter(task), nn.Parameter(torch.zeros(1)))

    def begin_at(self, rates: Sequence[float], pretrained: bool) -> None:
        """Have training begin with the label rate as every prediction, of each task.

        Args:
            rates: of label 1, of the main task first.
            pretrained: whether the backbone is; random weights have nothing to begin gently for.
        """
        for bias, rate in zip(self.biases, rates, strict=True):
            # A rate of 0 or 1 is that of a sample; no target's logit is infinite.
            nn.init.constant_(bias, math.log(max(rate, _RAREST) / max(1 - rate, _RAREST)))

    @property
    def biases(self) -> list[nn.Parameter]:
        """[1] of each task, the main one first."""
        return [self.bias, *(getattr(self, bias_parameter(task)) for task in self.tasks)]

    @property
    def task_vectors(self) -> dict[str, nn.Parameter]:
        """[1, hidden] of each further task."""
        return {task: getattr(self, task_parameter(task)) for task in self.tasks}

    @classmethod
    def check(cls, config: Any) -> None:
        """Raises UserError for a family in which the head could be trained and not exported."""

    @classmethod
    @abstractmethod
    def of(cls, causal_lm: Any, label_ids: tuple[int, int]) -> Head:
        """The head for a causal LM.

        Args:
            label_ids: token ids of label 0 and label 1.
        """

    @property
    def table(self) -> nn.Parameter | None:
        """The base model's table, of which `weight` has some rows alone; it does not train."""
        return None

    def exported(self, read: Reader) -> Tensor:
        """The weight of an exported model, made of this head's and the table."""
        return read("head.weight", self.weight)

    @abstractmethod
    def main_logits(self, hidden: Tensor) -> Tensor:
        """[B, S, hidden] float32 at least → [B, S], of the main task."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, hidden] → [B, S] float32 logits; with further tasks [B, S, tasks], the main one
        first."""
        hidden = _at_least_float32(hidden)
        main = self.main_logits(hidden) + _at_least_float32(self.bias)
        if not self.tasks:
            return main
        rows = _at_least_float32(torch.cat(list(self.task_vectors.values())))
        biases = _at_least_float32(torch.cat(list(self.biases[1:])))
        return torch.cat([main[..., None], hidden @ rows.T + biases], dim=-1)

    @staticmethod
    def loss(logits: Tensor, batch: Batch) -> Tensor:
        """Sum of the weighted binary cross-entropies of the used [SUM] slots, in float32.

        With further tasks, of all tasks' known labels, each times its task's scale.
        """
        main = of_main_task(logits, batch)
        losses = F.binary_cross_entropy_with_logits(main, batch.labels, reduction="none")
        loss = (losses * batch.weight).sum()
        labels = batch.further_labels
        if labels is None:
            return loss
        scales = batch.task_scales or (1.0,) * (1 + labels.shape[-1])
        known = labels != UNKNOWN
        further = F.binary_cross_entropy_with_logits(
            logits[..., 1:], labels.where(known, 0), reduction="none"
        )
        weighted = further.where(known, 0) * batch.weight[..., None]
        sums = weighted.flatten(end_dim=-2).sum(dim=0)
        return scales[0] * loss + (sums * sums.new_tensor(scales[1:])).sum()

    @classmethod
    def empty_export(cls, config: Any) -> Any:
        """A transformers model of the family, to be filled with the exported weights."""
        import transformers

        return getattr(transformers, cls.auto_class).from_config(config)


class LabelWordHead(Head):
    """The language-model head, asked for the label words alone.

    Computing two rows of the vocabulary's logits instead of all gives the same softmax over the
    two words at a small part of the cost. Where the table is not the input embeddings too, its two
    rows are all that is held and trained; an export puts them back into the base model's table.
    """

    is_new = False
    auto_class = "AutoModelForCausalLM"
    peft_task = "CAUSAL_LM"
    exported_weight = "lm_head.weight"
    pipeline_tag = "text-generation"
    reading = (
        "the sigmoid of `scale` times the difference of the two label words' logits at [SUM], "
        "label 1 minus label 0, plus `bias`"
    )

    def __init__(
        self, table: nn.Parameter, tied: bool, label_ids: tuple[int, int], divisor: float = 1.0
    ):
        super().__init__()
        self.divisor = divisor
        self.label_ids: Tensor
        self.register_buffer("label_ids", torch.tensor(label_ids), persistent=False)
        self._table = None if tied else (table,)  # in a tuple it is no parameter of this module
        self.weight = table if tied else nn.Parameter(table.detach()[list(label_ids)])
        if not tied and (where := stored(table)) is not None:
            mark_stored(self.weight, Stored(where.name, rows=label_ids))
        self.scale = nn.Parameter(torch.ones(1))

    def begin_at(self, rates: Sequence[float], pretrained: bool) -> None:
        super().begin_at(rates, pretrained)
        if pretrained:  # its opinion of the label words is no estimate of a click
            nn.init.constant_(self.scale, _GENTLE)

    @classmethod
    def of(cls, causal_lm: Any, label_ids: tuple[int, int]) -> LabelWordHead:
        table = causal_lm.get_output_embeddings().weight
        tied = table is causal_lm.get_input_embeddings().weight
        return cls(table, tied, label_ids, logits_divisor(causal_lm.config))

    @property
    def table(self) -> nn.Parameter | None:
        return self._table and self._table[0]

    def exported(self, read: Reader) -> Tensor:
        rows = super().exported(read)
        if self.table is None:
            return rows
        table = read("head.table", self.table).clone()
        table[self.label_ids] = rows.to(table.dtype)
        return table

    def main_logits(self, hidden: Tensor) -> Tensor:
        """The logit of label 1 minus that of label 0."""
        tied = self.table is None
        rows = F.embedding(self.label_ids, self.weight) if tied else self.weight
        no, yes = _at_least_float32(rows)
        return hidden @ (yes - no) / self.divisor * _at_least_float32(self.scale)


class LinearHead(Head):
    """One new linear layer on [SUM]'s last hidden state."""

    is_new = True
    auto_class = "AutoModelForSequenceClassification"
    peft_task = "SEQ_CLS"
    exported_weight = "score.weight"
    pipeline_tag = "text-classification"
    reading = "the sigmoid of the classifier's one logit at [SUM] plus `bias`"

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))

    @classmethod
    def check(cls, config: Any) -> None:
        from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise UserError(
                "model.head linear is exported as a sequence classifier, which transformers does "
                f"not have for the family {config.model_type!r}. Set model.head=yes_no."
            )

    @classmethod
    def of(cls, causal_lm: Any, label_ids: tuple[int, int]) -> LinearHead:
        head = cls(causal_lm.config.hidden_size)
        if hasattr(causal_lm, "score"):  # an exported classifier
            head.weight = causal_lm.score.weight
        return head

    @classmethod
    def empty_export(cls, config: Any) -> Any:
        config.num_labels = 1
        return super().empty_export(config)

    def main_logits(self, hidden: Tensor) -> Tensor:
        return hidden @ _at_least_float32(self.weight[0])


HEADS: dict[str, type[Head]] = {"yes_no": LabelWordHead, "linear": LinearHead}


def task_parameter(task: str) -> str:
    """The name in the head of a further task's vector."""
    return f"task_{task}"


def bias_parameter(task: str) -> str:
    """The name in the head of a further task's bias."""
    return f"bias_{task}"


def of_main_task(logits: Tensor, pack: Pack) -> Tensor:
    """[B, S] of what a head gives for these packs, of one task or of several."""
    return logits[..., 0] if logits.dim() > pack.labels.dim() else logits


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
