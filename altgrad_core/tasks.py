"""What a run learns: its model, how a batch is drawn, and what an evaluation makes of batches.

A task is the one place that knows these. Loop, evaluation and extra passes ask it for batches and hand them
to the model, which gives `(logits, loss)` of inputs and targets, whatever they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from altgrad_core import data
from altgrad_core.document_batches import LabeledDocuments
from altgrad_core.experiment import CLASSIFICATION, Experiment
from altgrad_core.label_scores import LabelCounts, macro_f1, micro_f1
from altgrad_core.model import GPT
from altgrad_core.preparing import SPLITS, TokenData
from altgrad_core.registry import UsageError
from altgrad_core.text_classifier import PADDING, TextClassifier
from altgrad_core.validation_metrics import BITS_PER_BYTE, LOSS, MACRO_F1, MICRO_F1, PERPLEXITY

Batch = tuple[Tensor, Tensor]
"""Inputs and targets of one micro-batch, as the task's model takes them."""


class Scores(Protocol):
    """What one evaluation adds up, on the device."""

    def add(self, targets: Tensor, logits: Tensor, loss: Tensor) -> None:
        """Take in a batch: its targets, and what the model said of it."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return the evaluation's metrics; the only transfer from the device."""
        ...


class Task(Protocol):
    """What is to be learnt, on the data of one experiment."""

    read: str
    """What an epoch counts: `tokens` or `documents`."""
    epoch: int
    """How many of them the training split has."""
    per_step: int
    """How many of them a step reads."""

    def model(self, generator: torch.Generator) -> nn.Module:
        """Return the model with initial weights, on the CPU."""
        ...

    def training_batch(self, step: int, micro_batch: int) -> Batch:
        """Return a micro-batch of the step after `step` others; the same numbers give the same batch."""
        ...

    def evaluation_batches(self, batches: int) -> Iterator[Batch]:
        """Yield batches of the validation split, the same in every run; 0: all there are."""
        ...

    def there(self, inputs: Tensor, positions: torch.Size) -> Tensor | None:
        """Return which positions of activations hold something of a batch's inputs; None: all do.

        positions: the shape of the activations but for their last dimension, and that of what is returned.
        """
        ...

    def scores(self) -> Scores: ...


def task_for(experiment: Experiment, tokens: TokenData) -> Task:
    """Return the experiment's task. Raises UsageError where the data do not serve it."""
    return (Classification if experiment.task == CLASSIFICATION else LanguageModelling)(experiment, tokens)


class MeanLoss:
    """The mean of batches' losses, weighted by their numbers of targets."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._weights: list[int] = []

    def add(self, targets: Tensor, loss: Tensor) -> None:
        self._losses.append(loss.double())
        self._weights.append(targets.numel())

    def mean(self) -> float:
        losses = torch.stack(self._losses)
        shares = torch.tensor(self._weights, dtype=torch.float64, device=losses.device) / sum(self._weights)
        return float((losses * shares).sum())


class LanguageModelling:
    """The next token, at every position of windows at random offsets."""

    read = "tokens"

    def __init__(self, experiment: Experiment, tokens: TokenData) -> None:
        self._experiment, self._tokens = experiment, tokens
        self.epoch, self.per_step = len(tokens.train), experiment.tokens_per_step
        for split in SPLITS:
            _check_window(experiment, len(getattr(tokens, split)), split)

    def model(self, generator: torch.Generator) -> nn.Module:
        return GPT(self._experiment.model, self._tokens.vocab_size, generator)

    def training_batch(self, step: int, micro_batch: int) -> Batch:
        return data.training_batch(
            self._tokens.train,
            block_size=self._experiment.model.block_size,
            batch_size=self._experiment.train.batch_size,
            seed=self._experiment.seed,
            step=step,
            micro_batch=micro_batch,
        )

    def evaluation_batches(self, batches: int) -> Iterator[Batch]:
        return data.evaluation_batches(
            self._tokens.validation,
            block_size=self._experiment.model.block_size,
            batch_size=self._experiment.train.batch_size,
            batches=batches,
        )

    def there(self, inputs: Tensor, positions: torch.Size) -> Tensor | None:
        return None

    def scores(self) -> Scores:
        return TokenScores(self._tokens.bytes_per_token)


class TokenScores:
    """Loss in nats per token, perplexity, and bits per byte where the tokens are text."""

    def __init__(self, bytes_per_token: float | None) -> None:
        self._loss, self._bytes_per_token = MeanLoss(), bytes_per_token

    def add(self, targets: Tensor, logits: Tensor, loss: Tensor) -> None:
        self._loss.add(targets, loss)

    def metrics(self) -> dict[str, float]:
        loss = self._loss.mean()
        metrics = {LOSS: loss, PERPLEXITY: math.exp(loss) if loss < 700 else math.inf}
        if self._bytes_per_token:
            metrics[BITS_PER_BYTE] = loss / math.log(2) / self._bytes_per_token
        return metrics


def _check_window(experiment: Experiment, length: int, split: str) -> None:
    name, block = experiment.data.source.plugin, experiment.model.block_size
    if length <= block:
        raise UsageError(
            f"the {split} split of {name!r} has {length} tokens, a window needs {block + 1}: "
            "make model.block_size smaller, or give more text"
        )


class Classification:
    """The labels of a document, each for itself."""

    read = "documents"

    def __init__(self, experiment: Experiment, tokens: TokenData) -> None:
        self._experiment, self._tokens = experiment, tokens
        self._train, self._validation = (_labeled(experiment, tokens, split) for split in SPLITS)
        self.epoch, self.per_step = len(self._train), experiment.rows_per_step

    def model(self, generator: torch.Generator) -> nn.Module:
        labels = self._experiment.architecture.labels
        return TextClassifier(self._experiment.model, self._tokens.vocab_size, labels, generator)

    def training_batch(self, step: int, micro_batch: int) -> Batch:
        return self._train.training_batch(
            self._experiment.train.batch_size,
            seed=self._experiment.seed,
            step=step,
            micro_batch=micro_batch,
        )

    def evaluation_batches(self, batches: int) -> Iterator[Batch]:
        return self._validation.evaluation_batches(self._experiment.train.batch_size, batches)

    def there(self, inputs: Tensor, positions: torch.Size) -> Tensor | None:
        """Return where a token is; behind the trunk, where a window has any."""
        tokens = inputs != PADDING  # (B, W, T)
        found = tokens if positions.numel() == tokens.numel() else tokens.any(-1)
        return found.reshape(positions)

    def scores(self) -> Scores:
        return LabelScores()


class LabelScores:
    """Loss in nats per label, micro- and macro-averaged F1."""

    def __init__(self) -> None:
        self._loss, self._counts = MeanLoss(), LabelCounts()

    def add(self, targets: Tensor, logits: Tensor, loss: Tensor) -> None:
        self._loss.add(targets, loss)
        self._counts.add(logits, targets)

    def metrics(self) -> dict[str, float]:
        """Return the metrics; what was told by logits that are NaN has no F1 either."""
        loss, counts = self._loss.mean(), self._counts.total()
        scores = {MICRO_F1: float(micro_f1(counts)), MACRO_F1: float(macro_f1(counts))}
        return {LOSS: loss, **(dict.fromkeys(scores, math.nan) if math.isnan(loss) else scores)}


def _labeled(experiment: Experiment, tokens: TokenData, split: str) -> LabeledDocuments:
    name, expected = experiment.data.source.plugin, experiment.architecture.labels
    documents = tokens.train_documents if split == "train" else tokens.validation_documents
    if documents is None:
        raise UsageError(f"no document of the data set {name!r} has a label; nothing can be classified")
    if (found := documents.labels.shape[1]) != expected:
        raise UsageError(
            f"the data set {name!r} has {found} labels, its options say {expected}; make its label_count that"
        )
    return LabeledDocuments(
        tokens=tokens.train if split == "train" else tokens.validation,
        documents=documents,
        windows=experiment.data.windows,
        block_size=experiment.model.block_size,
    )
