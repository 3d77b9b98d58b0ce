"""What an evaluation says, by task: names, units, and which way is better. No torch."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

LOSS = "validation/loss"
PERPLEXITY = "validation/perplexity"
BITS_PER_BYTE = "validation/bits_per_byte"
MICRO_F1 = "validation/micro_f1"
MACRO_F1 = "validation/macro_f1"


@attrs.frozen
class Shown:
    """How a person is told of a metric."""

    words: str
    """What a summary says, with the number's place and form in it."""
    heading: str = ""
    """What stands in front of the number in a line of the log, above a column too; empty: nowhere."""
    more_is_better: bool = False


METRICS: Mapping[str, Mapping[str, Shown]] = {
    "language_modelling": {
        LOSS: Shown("{:.4f} nats per token", "validation"),
        PERPLEXITY: Shown("perplexity {:.2f}"),
        BITS_PER_BYTE: Shown("{:.4f} bits per byte", "bits/byte"),
    },
    "classification": {
        LOSS: Shown("{:.4f} nats per label", "validation"),
        MICRO_F1: Shown("micro F1 {:.4f}", "micro F1", more_is_better=True),
        MACRO_F1: Shown("macro F1 {:.4f}", "macro F1", more_is_better=True),
    },
}
"""Task to the metrics of its evaluations, in the order in which they are told."""

HEADINGS: Mapping[str, str] = {
    name: shown.heading for of_task in METRICS.values() for name, shown in of_task.items() if shown.heading
}
"""Metric to its heading, of those that have one."""


def more_is_better(metric: str) -> bool:
    """Whether a run with more of a metric is the better one; of any but an evaluation's, less is."""
    return any(metric in shown and shown[metric].more_is_better for shown in METRICS.values())
