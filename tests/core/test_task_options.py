"""`task` in an experiment file: what it needs of the data set, and what follows for the layers."""

import attrs
import pytest

from altgrad_core.options import at_least, option
from altgrad_core.registry import Registry
from altgrad_core.shapes import Architecture, linear_shapes

CLASSIFICATION = 'name = "e"\ntask = "classification"\n'


@attrs.frozen(kw_only=True)
class LabeledOptions:
    label_count: int = option("how many labels", default=4, validator=at_least(0))


@pytest.fixture
def registry(registry, registered):
    """The fake components, and a data set with labels."""
    return Registry(registered=(*registry.registered, registered("dataset", "labeled", LabeledOptions)))


def test_language_modelling_is_the_default_whatever_the_data_set_has(experiment):
    found = experiment('name = "e"\ndata.plugin = "labeled"')
    assert found.task == "language_modelling"
    assert found.architecture == Architecture(found.model, 256)


def test_the_head_of_a_classifier_has_an_output_for_each_label_and_is_never_tied(experiment):
    found = experiment(CLASSIFICATION + 'data.plugin = "labeled"\nquantize = {format = "E5M2"}')
    assert found.model.tie_weights
    *_, (head, shape) = linear_shapes(found.architecture).items()
    assert (head, shape) == ("classifier", (4, 384))
    assert not found.architecture.ties_head


def test_the_tokens_of_a_step_are_those_of_all_windows(experiment):
    text = "data = {plugin = 'labeled', windows = 3}\nmodel.block_size = 8\ntrain.batch_size = 5\n"
    found = experiment(CLASSIFICATION + text)
    assert (found.rows_per_step, found.tokens_per_step) == (5, 5 * 3 * 8)


def test_windows_stand_beside_the_options_of_the_data_set(experiment):
    found = experiment(CLASSIFICATION + "data = {plugin = 'labeled', windows = 3, label_count = 7}")
    assert found.plain()["data"] == {
        "plugin": "labeled",
        "label_count": 7,
        "tokenizer": "bytes",
        "windows": 3,
    }


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ('task = "translation"', "task: expected one of 'language_modelling', 'classification'; got"),
        (
            'task = "classification"',
            "task: the data set 'licenses' has no labels to classify by; name another",
        ),
        (
            'task = "classification"\ndata = {plugin = "text", path = "a"}',
            "task: the data set 'text' has no labels to classify by",
        ),
        (
            'task = "classification"\ndata.plugin = "markov"',
            "task: the data set 'markov' has no labels to classify by",
        ),
        (
            'task = "classification"\ndata = {plugin = "labeled", label_count = 0}',
            "data: classification needs to know how many labels there are; set label_count",
        ),
        (
            "data.windows = 2",
            'data.windows: says how a document is classified; leave it out, or set task = "',
        ),
        ('task = "classification"\ndata = {plugin = "labeled", windows = 0}', "data.windows: expected 1 or"),
    ],
)
def test_what_cannot_be_learnt_is_an_error_at_its_line(mistakes, text, mistake):
    (found,) = mistakes(f'name = "e"\n{text}')
    line = 3 if "data" in mistake.partition(":")[0] and "\n" in text else 2
    assert found.startswith(f"e.toml:{line}: {mistake}")


@pytest.mark.parametrize(
    ("task", "right"), [("language_modelling", "lm_head"), ("classification", "classifier")]
)
def test_a_rule_a_monitor_and_frozen_parameters_name_the_head_of_the_task(mistakes, experiment, task, right):
    text = (
        'name = "e"\ntask = "{task}"\ndata.plugin = "labeled"\nmodel.tie_weights = false\n'
        'train.freeze = ["{head}.weight"]\nquantize = {{format = "E5M2", rule = [{{layers = "{head}", '
        'format = "E3M4"}}]}}'
    )
    wrong = {"lm_head", "classifier"} - {right}
    experiment(text.format(task=task, head=right))
    assert len(mistakes(text.format(task=task, head=wrong.pop()))) == 2
