import importlib
import subprocess
import sys

import attrs
import pytest

import altgrad_data
from altgrad_core.registry import discover
from altgrad_core.structuring import structure
from altgrad_data import BinOptions, EurlexOptions, JsonlOptions, LicensesOptions, MarkovOptions, TextOptions

COMPONENTS = altgrad_data.altgrad_datasets()


def test_the_data_sets_are_registered():
    names = ["licenses", "eurlex", "ecthr_a", "wikitext", "text", "jsonl", "bin", "markov"]
    assert [component.name for component in COMPONENTS] == names


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.name)
def test_every_component_has_a_target_and_options_with_help(component):
    module, _, attribute = component.target.partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))
    for field in attrs.fields(component.options):
        assert field.metadata["help"]
        assert "unit" in field.metadata


def test_listing_the_data_sets_imports_neither_numpy_nor_torch():
    code = (
        "import sys, altgrad_data; altgrad_data.altgrad_datasets();"
        "sys.exit(bool({'numpy', 'torch', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TextOptions(path=" "), "'path' is empty; write the path of your data"),
        (lambda: TextOptions(path="a", validation_fraction=1.0), "'validation_fraction' must be < 1.0: 1.0"),
        (
            lambda: JsonlOptions(path="a", validation="b", split="c"),
            "validation = 'b' and split = 'c' both say",
        ),
        (lambda: EurlexOptions(labels=""), "'labels' is empty; write the name of a column"),
        (lambda: EurlexOptions(label_count=-1), "'label_count' must be >= 0: -1"),
        (lambda: BinOptions(path="a", vocab_size=70000), "'vocab_size' must be <= 65536: 70000"),
        (lambda: MarkovOptions(order=0), "'order' must be >= 1: 0"),
        (
            lambda: MarkovOptions(order=4, vocab_size=64),
            r"make 64\^5 transition probabilities; at most 1048576",
        ),
    ],
)
def test_options_that_cannot_work_are_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_options_of_data_sets_with_labels_say_how_many_there_are():
    assert (LicensesOptions().label_count, EurlexOptions().label_count) == (10, 100)
    assert JsonlOptions(path="a").label_count == 0  # not known before the file is read
    assert not any(hasattr(options, "label_count") for options in (TextOptions, BinOptions, MarkovOptions))


def test_the_licenses_have_one_column_of_labels():
    registry = discover()
    options, problems = structure({"labels": "labels"}, LicensesOptions, registry)
    assert (options, problems) == (LicensesOptions(), [])
    _, (problem,) = structure({"labels": "license"}, LicensesOptions, registry)
    assert problem.message == "expected one of 'labels'; got 'license'"


def test_options_of_token_sources_have_a_vocab_size():
    assert (BinOptions(path="a").vocab_size, MarkovOptions().vocab_size) == (50257, 16)
