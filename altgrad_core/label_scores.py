"""How well labels were told: micro- and macro-averaged F1 from counts.

Of each label l: true positives TP, false positives FP, false negatives FN over all documents. A label is
predicted where its probability is above 1/2, its logit above 0.

    F1_l = 2 TP_l / (2 TP_l + FP_l + FN_l)          macro F1 = mean of F1_l over all labels
    micro F1 = 2 sum TP / (2 sum TP + sum FP + sum FN)

0/0 counts as 0, as under scikit-learn's `zero_division=0`: a label that no document has and nobody predicts
pulls the macro average down. So it is in LexGLUE (Chalkidis et al., ACL 2022), whose threshold this is too.
For ECtHR LexGLUE adds a label "none of them" before it averages; here there is none, so a document without
any label counts only by what is wrongly predicted of it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LabelCounts:
    """TP, FP and FN of each label, summed up over batches; on the device."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch; both are (documents, labels), targets of 0 and 1."""
        predicted, true = logits > 0, targets > 0
        hits, misses = predicted & true, predicted ^ true
        self._found.append(torch.stack([hits.sum(0), (misses & predicted).sum(0), (misses & true).sum(0)]))

    def total(self) -> Tensor:
        """Return (3, labels) int64: TP, FP, FN."""
        return torch.stack(self._found).sum(0)


def micro_f1(counts: Tensor) -> Tensor:
    """Return the F1 of all labels' decisions together, 0-d float64; counts: (3, labels) of TP, FP, FN."""
    return _f1(counts.sum(1))


def macro_f1(counts: Tensor) -> Tensor:
    """Return the mean of the labels' F1, 0-d float64; counts: (3, labels) of TP, FP, FN."""
    return _f1(counts).mean()


def _f1(counts: Tensor) -> Tensor:
    hits, false_positives, false_negatives = counts.double().unbind()
    decisions = 2 * hits + false_positives + false_negatives
    return 2 * hits / decisions.clamp(min=1)
