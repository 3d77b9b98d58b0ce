"""The experiment's schema: what a TOML file may say, with every default.

These classes hold one run's options, fully resolved. `altgrad_core.experiment_file` reads them from a file,
with overrides and grids; `altgrad_core.assemble` turns them into a run. Plugins' own options stand behind
the `Choice` fields. No torch here.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import attrs

from altgrad_core.model_options import ModelOptions
from altgrad_core.options import (
    DatasetChoice,
    FallbackChoice,
    FieldError,
    FormatChoice,
    MonitorChoice,
    OptimizerChoice,
    at_least,
    between,
    option,
    plain,
    regexes,
)
from altgrad_core.quantize_options import UNQUANTIZED, QuantizeOptions
from altgrad_core.shapes import Architecture
from altgrad_core.tokenizers import tokenizer_name, vocabulary

CLASSIFICATION = "classification"

DEFAULT_PLUGINS = {"data": "licenses", "optimizer": "AdamW"}
"""Table to the plugin it means where it names none."""


def _folder_name(_: Any, field: Any, value: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,99}", value):
        raise ValueError(
            f"expected letters, digits, '.', '_', '+' and '-' (it names the run's folder), got {value!r}"
        )


@attrs.frozen(kw_only=True)
class DataOptions:
    """`[data]`: the data set and how its text becomes tokens."""

    source: DatasetChoice
    tokenizer: str = option(
        "how text becomes tokens: bytes, bpe:N (N tokens learnt from the training split) or gpt2",
        default="bytes",
        validator=tokenizer_name,
    )
    windows: int = option(
        "classification: how many windows of block_size tokens are read of a document; their logits are "
        "averaged",
        default=1,
        validator=at_least(1),
    )

    @property
    def vocab_size(self) -> int:
        return getattr(self.source.options, "vocab_size", None) or vocabulary(self.tokenizer)

    @property
    def label_count(self) -> int | None:
        """How many labels documents may have; 0: not said, None: the data set has none."""
        found: int | None = getattr(self.source.options, "label_count", None)
        return found

    def labels(self, task: str) -> int:
        """Return how many labels the model is to tell, 0 in language modelling."""
        return (self.label_count or 0) if task == CLASSIFICATION else 0

    def __attrs_post_init__(self) -> None:
        if self.tokenizer != "bytes" and getattr(self.source.options, "vocab_size", None):
            raise FieldError(
                "tokenizer",
                f"the data set {self.source.plugin!r} is tokens already, so {self.tokenizer!r} does not "
                "apply; leave tokenizer out",
            )


DATA_KEYS = frozenset(field.name for field in attrs.fields(DataOptions)) - {"source"}
"""Keys of [data] that are the core's own, whatever the plugin."""


@attrs.frozen(kw_only=True)
class TrainOptions:
    """`[train]`: the loop."""

    batch_size: int = option("sequences per micro-batch", default=32, validator=at_least(1))
    gradient_accumulation: int = option("micro-batches per optimizer step", default=1, validator=at_least(1))
    device: Literal["auto", "cpu", "cuda"] = option("auto: cuda if there is one", default="auto")
    dtype: Literal["auto", "float32", "bf16"] = option(
        "arithmetic of the forward pass; auto: bf16 autocast on cuda, float32 on cpu", default="auto"
    )
    compile: Literal["auto", True, False] = option(
        "torch.compile the model; auto: on cuda only", default="auto"
    )
    deterministic: bool = option("deterministic kernels only, for bit-equal runs on cuda", default=False)
    warmup_steps: int = option("linear warm-up", unit="steps", default=100, validator=at_least(0))
    min_lr_ratio: float = option("end of the cosine, as a share of lr", default=0.1, validator=between(0, 1))
    grad_clip: float = option(
        "global L2 norm to clip gradients to; 0: never", default=1.0, validator=at_least(0)
    )
    freeze: tuple[str, ...] = option(
        "regexes over full parameter names that do not train", default=(), validator=regexes
    )
    init_format: FormatChoice = option(
        "round the initial Linear weights to this format's grid, as [quantize] would: a control",
        default=UNQUANTIZED,
    )
    eval_every: int = option(
        "evaluation interval; 0: only at the end", unit="steps", default=100, validator=at_least(0)
    )
    eval_batches: int = option(
        "batches per evaluation; 0: the whole split", default=20, validator=at_least(0)
    )
    final_eval_batches: int = option(
        "batches of the last evaluation; 0: the whole split; default: as of every other",
        default=attrs.Factory(lambda table: table.eval_batches, takes_self=True),
        validator=at_least(0),
    )
    log_every: int = option("logging interval", unit="steps", default=10, validator=at_least(1))
    checkpoint_every: int = option(
        "checkpoint interval; 0: only at the end", unit="steps", default=100, validator=at_least(0)
    )
    keep_checkpoints: int = option("newest checkpoints kept", default=3, validator=at_least(1))


@attrs.frozen(kw_only=True)
class Experiment:
    """One run's options, resolved: file, device overlay, grid cell and `--set` together."""

    name: str = option("names the run's folder", validator=_folder_name)
    seed: int = option(
        "initial weights, data order and rounding follow from it", default=1337, validator=at_least(0)
    )
    steps: int = option("optimizer steps", default=500, validator=at_least(1))
    task: Literal["language_modelling", "classification"] = option(
        "what is learnt: the next token, or the labels of a document", default="language_modelling"
    )
    init_from: str = option("a run folder whose last weights to start from; empty: random ones", default="")
    data: DataOptions = option("the text", default=DataOptions(source=DatasetChoice(DEFAULT_PLUGINS["data"])))
    model: ModelOptions = option("nanoGPT", default=ModelOptions())
    train: TrainOptions = option("the loop", default=TrainOptions())
    quantize: QuantizeOptions | None = option("absent: nothing is quantized", default=None)
    optimizer: OptimizerChoice = option(
        "the optimizer", default=OptimizerChoice(DEFAULT_PLUGINS["optimizer"])
    )
    monitor: tuple[MonitorChoice, ...] = option("watchers, in file order", default=())
    fallback: tuple[FallbackChoice, ...] = option("policies, in file order", default=())

    @property
    def architecture(self) -> Architecture:
        return Architecture(self.model, self.data.vocab_size, self.data.labels(self.task))

    @property
    def rows_per_step(self) -> int:
        """Windows, or documents where those are classified, that one step learns from."""
        return self.train.batch_size * self.train.gradient_accumulation

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step reads; of documents with the padding after their ends."""
        return self.rows_per_step * self.data.windows * self.model.block_size

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    def plain(self) -> dict[str, Any]:
        """Return every option, defaults included, as a file would write them."""
        resolved: dict[str, Any] = plain(self)
        source = resolved["data"].pop("source")
        resolved["data"] = {**source, **resolved["data"]}
        return resolved


@attrs.frozen(kw_only=True)
class Cell:
    """One run of a file: its folder's name and its options."""

    name: str
    experiment: Experiment
    in_force: tuple[str, ...]
    """The overrides behind the options, for the header: `steps = 1500 ([on.cpu])`."""


def data_options(table: Any) -> Any:
    """Return a `[data]` table, or a name, in the shape of DataOptions: the core's keys beside the plugin."""
    if isinstance(table, str):
        return {"source": table}
    if not isinstance(table, dict):
        return table
    core = {key: value for key, value in table.items() if key in DATA_KEYS}
    source = {key: value for key, value in table.items() if key not in DATA_KEYS}
    return {**core, "source": source}
