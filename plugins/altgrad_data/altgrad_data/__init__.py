"""Data sets for AltGrad: license texts, legal cases, Wikipedia, your own files, Markov sources."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import attrs
from attrs.validators import ge, gt, instance_of, le, lt

from altgrad_core.hookspecs import Component, hookimpl
from altgrad_core.options import option

MOST_TRANSITIONS = 2**20
"""Transition probabilities a Markov source may have: 8 MB of float64."""


def _named(_: object, field: attrs.Attribute[str], value: str) -> None:
    if not value.strip():
        raise ValueError(f"{field.name!r} is empty; write the path of your data")


def _named_column(_: object, field: attrs.Attribute[str], value: str) -> None:
    if not value.strip():
        raise ValueError(f"{field.name!r} is empty; write the name of a column")


@attrs.frozen(kw_only=True)
class LicensesOptions:
    """The license texts leave nothing to choose: everybody trains and validates on the same texts."""

    label_count: ClassVar[int] = 10

    labels: Literal["labels"] = option(
        "the column of the label indices, which is the only one here", default="labels"
    )


@attrs.frozen(kw_only=True)
class HubOptions:
    """A data set of the Hugging Face hub."""

    path: str = option(
        "files with the hub's columns instead: a folder of Parquet files or .jsonl (.gz, .xz), "
        "or one such file; empty: the hub",
        default="",
        validator=instance_of(str),
    )


@attrs.frozen(kw_only=True)
class LabeledHubOptions(HubOptions):
    """A data set of the Hugging Face hub with labels."""

    labels: str = option(
        "the column of the label indices", default="labels", validator=[instance_of(str), _named_column]
    )


def _label_count(of_the_hub: int) -> Any:
    """Return an option for data whose column `labels` has that many; of another column that is not known."""
    return option(
        f"how many labels there are, for classification; left out: the {of_the_hub} of the "
        "column labels, or 0 for another column: as many as the largest index says",
        default=attrs.Factory(
            lambda options: of_the_hub if options.labels == "labels" else 0, takes_self=True
        ),
        validator=[instance_of(int), ge(0)],
    )


@attrs.frozen(kw_only=True)
class EurlexOptions(LabeledHubOptions):
    """EU laws under EuroVoc concepts."""

    label_count: int = _label_count(100)


@attrs.frozen(kw_only=True)
class EcthrOptions(LabeledHubOptions):
    """Cases of the European Court of Human Rights under the articles that were violated."""

    label_count: int = _label_count(10)


@attrs.frozen(kw_only=True)
class TextOptions:
    """Plain text files."""

    path: str = option(
        "a text file, a folder (every .txt below it), or a glob",
        validator=[instance_of(str), _named],
        example="texts/*.txt",
    )
    validation: str = option(
        "the same for the validation split; empty: a part of `path`", default="", validator=instance_of(str)
    )
    validation_fraction: float = option(
        "share of the text held out where `validation` is empty",
        unit="of the bytes",
        default=0.1,
        validator=[gt(0.0), lt(1.0)],
    )


@attrs.frozen(kw_only=True)
class JsonlOptions:
    """Documents in a file with one JSON object a line."""

    path: str = option(
        "a .jsonl, .jsonl.gz or .jsonl.xz file",
        validator=[instance_of(str), _named],
        example="documents.jsonl",
    )
    validation: str = option(
        "the file of the validation split; empty: a part of `path`", default="", validator=instance_of(str)
    )
    split: str = option(
        "the key that says `train`, `validation` or `test`; empty: none does",
        default="",
        validator=instance_of(str),
    )
    field: str = option(
        "the key of the text: a string, or a list of strings, joined by newlines",
        default="text",
        validator=instance_of(str),
    )
    labels: str = option(
        "the key of the label indices: an integer or a list of them",
        default="labels",
        validator=instance_of(str),
    )
    label_count: int = option(
        "how many labels there are, for classification: every object must then have the key; "
        "0: as many as the largest index says, if any has it",
        default=0,
        validator=[instance_of(int), ge(0)],
    )
    validation_fraction: float = option(
        "share held out where neither `validation` nor `split` says",
        unit="of the documents",
        default=0.1,
        validator=[gt(0.0), lt(1.0)],
    )

    def __attrs_post_init__(self) -> None:
        if self.validation and self.split:
            raise ValueError(
                f"validation = {self.validation!r} and split = {self.split!r} both say what the validation "
                "split is; keep one of them"
            )


@attrs.frozen(kw_only=True)
class BinOptions:
    """Token files as nanoGPT prepares them."""

    path: str = option(
        "the folder that holds train.bin and val.bin, uint16 tokens",
        validator=[instance_of(str), _named],
        example="data/openwebtext",
    )
    vocab_size: int = option(
        "tokens of the vocabulary; the default is GPT-2's",
        unit="tokens",
        default=50257,
        validator=[instance_of(int), ge(2), le(65536)],
    )


@attrs.frozen(kw_only=True)
class MarkovOptions:
    """A random Markov source whose entropy, and so the lowest possible loss, is known exactly."""

    order: int = option(
        "how many tokens back the next one depends on",
        unit="tokens",
        default=2,
        validator=[instance_of(int), ge(1)],
    )
    vocab_size: int = option(
        "different tokens", unit="tokens", default=16, validator=[instance_of(int), ge(2), le(65536)]
    )
    tokens: int = option(
        "length of the training split", unit="tokens", default=1_000_000, validator=[instance_of(int), ge(2)]
    )
    validation_tokens: int = option(
        "length of the validation split, a stream of its own",
        unit="tokens",
        default=100_000,
        validator=[instance_of(int), ge(2)],
    )
    concentration: float = option(
        "Dirichlet concentration of each row of probabilities; smaller: lower entropy",
        default=0.3,
        validator=[gt(0.0), le(1000.0)],
    )
    seed: int = option(
        "draws the probabilities and the tokens; the run's seed does not matter",
        default=0,
        validator=[instance_of(int), ge(0), lt(2**64)],
    )

    def __attrs_post_init__(self) -> None:
        if self.vocab_size ** (self.order + 1) > MOST_TRANSITIONS:
            raise ValueError(
                f"order = {self.order} and vocab_size = {self.vocab_size} make "
                f"{self.vocab_size}^{self.order + 1} transition probabilities; at most {MOST_TRANSITIONS}: "
                "lower one of them"
            )


@hookimpl
def altgrad_datasets() -> list[Component]:
    return [
        Component(
            name="licenses",
            summary="14.9 MB of license texts that are installed with this plugin; 10 categories",
            options=LicensesOptions,
            target="altgrad_data.licenses:Licenses",
            source="ScanCode's license data, pip package licensedcode-data, CC-BY-4.0",
        ),
        Component(
            name="eurlex",
            summary="EU laws with the labels of 100 EuroVoc concepts, from the hub or from files",
            options=EurlexOptions,
            target="altgrad_data.hub:eurlex",
            source="Chalkidis et al., LexGLUE, ACL 2022; hub: coastalcph/lex_glue",
        ),
        Component(
            name="ecthr_a",
            summary="cases of the European Court of Human Rights, labeled by 10 articles, from hub or files",
            options=EcthrOptions,
            target="altgrad_data.hub:ecthr_a",
            source="Chalkidis et al., LexGLUE, ACL 2022; hub: coastalcph/lex_glue",
        ),
        Component(
            name="wikitext",
            summary="WikiText-103, raw: articles of Wikipedia, from the hub or from files",
            options=HubOptions,
            target="altgrad_data.hub:wikitext",
            source="Merity et al., Pointer Sentinel Mixture Models, ICLR 2017; hub: Salesforce/wikitext",
        ),
        Component(
            name="text",
            summary="your own text files",
            options=TextOptions,
            target="altgrad_data.text:TextFiles",
        ),
        Component(
            name="jsonl",
            summary="your own documents, one JSON object a line, also .gz and .xz",
            options=JsonlOptions,
            target="altgrad_data.jsonl:JsonLines",
        ),
        Component(
            name="bin",
            summary="nanoGPT's train.bin and val.bin",
            options=BinOptions,
            target="altgrad_data.bin:TokenFiles",
            source="https://github.com/karpathy/nanoGPT",
        ),
        Component(
            name="markov",
            summary="a generated Markov source whose entropy is known exactly",
            options=MarkovOptions,
            target="altgrad_data.markov:Markov",
            source="Shannon, A Mathematical Theory of Communication, 1948, sections 2 to 7",
        ),
    ]
