"""Fake plugins: distributions written into a folder, a registry of fake components, formats as tables."""

import functools
import importlib.metadata
import io
import itertools
import sys
import textwrap
from typing import ClassVar, Literal

import attrs
import pytest
import torch
from torch import nn

from altgrad_core import registry as registry_module
from altgrad_core.experiment_file import ExperimentError, load_experiment
from altgrad_core.format import Format
from altgrad_core.hookspecs import Component, NoOptions
from altgrad_core.options import StiffnessChoice, above, at_least, between, option, within
from altgrad_core.quantizer import quantizer_of
from altgrad_core.registry import Registered, Registry

_numbers = itertools.count()

HEADER = """
import attrs
from altgrad_core.hookspecs import Component, hookimpl
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a fake distribution; no other plugin is seen while it is in use."""
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = functools.partial(importlib.metadata.distributions, path=[str(tmp_path)])
    monkeypatch.setattr(importlib.metadata, "distributions", seen)
    monkeypatch.delenv("ALTGRAD_WITHOUT", raising=False)
    registry_module._discover.cache_clear()

    def add(distribution, source, *, version="1.0", entry_points=None, metadata=True):
        """Install `source` as a module of a name of its own, and return that name."""
        module = f"fake_plugin_{next(_numbers)}"
        (tmp_path / f"{module}.py").write_text(HEADER + textwrap.dedent(source))
        info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        if metadata:
            lines = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
            (info / "METADATA").write_text(lines)
        written = entry_points or "[altgrad]\nplugin = {module}\n"
        (info / "entry_points.txt").write_text(written.format(module=module))
        registry_module._discover.cache_clear()
        return module

    yield add
    registry_module._discover.cache_clear()
    for module in [name for name in sys.modules if name.startswith("fake_plugin_")]:
        del sys.modules[module]


@attrs.frozen(kw_only=True)
class AdamWOptions:
    lr: float = option("learning rate", default=1e-3, validator=at_least(0))
    betas: tuple[float, float] = option("averages", default=(0.9, 0.95), validator=within(0, 1))


@attrs.frozen(kw_only=True)
class CappedOptions:
    lr: float = option("learning rate", default=0.2, validator=between(0, 1))


@attrs.frozen(kw_only=True)
class GridOptimOptions:
    step_size: ClassVar[str] = "step_scale"
    step_scale: float = option("rungs per step", default=6.0, validator=above(0))
    normalize: Literal["none", "adam"] = option("direction", default="none")
    stiffness: StiffnessChoice = option("formula", default=StiffnessChoice("grid"))


@attrs.frozen(kw_only=True)
class ScaledOptions:
    factor: float = option("multiplies the spacing", default=1.0)


@attrs.frozen(kw_only=True)
class MonitorOptions:
    every: int = option("interval", default=1, validator=at_least(1))
    layers: str = option("looked at", default=".*")


@attrs.frozen(kw_only=True)
class MarkovOptions:
    order: int = option("tokens back", default=2, validator=at_least(1))
    vocab_size: int = option("different tokens", default=16, validator=at_least(2))


@attrs.frozen(kw_only=True)
class TextOptions:
    path: str = option("a file", example="a.txt")


@attrs.frozen(kw_only=True)
class ExMyOptions:
    exponent_bits: int = option("exponent field", validator=at_least(0), example=4)
    mantissa_bits: int = option("mantissa field", validator=at_least(0), example=3)

    @property
    def bits(self):
        return 1 + self.exponent_bits + self.mantissa_bits


def _registered(kind, name, options=NoOptions, distribution="fake-plugins", bits=None):
    component = Component(name=name, summary="", options=options, target=f"nowhere:{name}", bits=bits)
    return Registered(kind=kind, component=component, distribution=distribution, version="1.0")


@pytest.fixture
def registered():
    """Return a function that makes an entry of a registry."""
    return _registered


@pytest.fixture(scope="session")
def registry():
    """A registry of fake components, under the names that experiment files take for granted."""
    entries = (
        _registered("format", "E5M2", bits=8),
        _registered("format", "E3M4", bits=8),
        _registered("format", "BF16", bits=16),
        _registered("format", "ExMy", ExMyOptions),
        _registered("stiffness", "grid"),
        _registered("stiffness", "scaled", ScaledOptions),
        _registered("optimizer", "AdamW", AdamWOptions),
        _registered("optimizer", "GridOptim", GridOptimOptions),
        _registered("optimizer", "Capped", CappedOptions),
        _registered("monitor", "flip", MonitorOptions),
        _registered("monitor", "stall", MonitorOptions),
        _registered("fallback", "nan_guard"),
        _registered("executor", "local"),
        _registered("dataset", "licenses"),
        _registered("dataset", "markov", MarkovOptions),
        _registered("dataset", "text", TextOptions),
    )
    return Registry(registered=entries)


@pytest.fixture
def experiment_at(tmp_path, registry):
    """Return a function that writes an experiment file and loads it with `--set` flags."""

    def load(text, *flags):
        path = tmp_path / "e.toml"
        path.write_text(textwrap.dedent(text))
        return load_experiment(path, flags, registry)

    return load


@pytest.fixture
def experiment(experiment_at):
    """Return a function that loads a file of one run and gives its options on the CPU."""

    def load(text, *flags):
        (cell,) = experiment_at(text, *flags).cells_on["cpu"]
        return cell.experiment

    return load


@pytest.fixture
def mistakes(experiment_at, tmp_path):
    """Return a function that gives the errors of a file, without the folder in front of `e.toml`."""

    def load(text, *flags):
        with pytest.raises(ExperimentError) as caught:
            experiment_at(text, *flags)
        return [line.removeprefix(f"{tmp_path}/") for line in caught.value.lines]

    return load


# --- the named formats as tables ----------------------------------------------------------------------

# name: exponent bits, mantissa bits, bias, specials
NAMED = {
    "E0M7": (0, 7, 0, "finite"),
    "E1M6": (1, 6, 0, "finite"),
    "E2M5": (2, 5, 1, "finite"),
    "E3M4": (3, 4, 1, "finite"),
    "E4M3": (4, 3, 7, "fn"),
    "E5M2": (5, 2, 15, "ieee"),
    "E6M1": (6, 1, 31, "finite"),
    "E7M0": (7, 0, 63, "finite"),
    "E2M1": (2, 1, 1, "finite"),
    "E2M3": (2, 3, 1, "finite"),
    "E3M2": (3, 2, 3, "finite"),
    "FP16": (5, 10, 15, "ieee"),
    "BF16": (8, 7, 127, "ieee"),
    "E0M15": (0, 15, 0, "finite"),
    "E1M14": (1, 14, 0, "finite"),
    "E2M13": (2, 13, 1, "finite"),
    "E3M12": (3, 12, 1, "finite"),
    "E4M11": (4, 11, 7, "finite"),
    "E6M9": (6, 9, 31, "finite"),
    "E7M8": (7, 8, 63, "finite"),
}


@functools.cache
def _table(name):
    exponent_bits, mantissa_bits, bias, specials = NAMED[name]
    magnitude = torch.arange(2 ** (exponent_bits + mantissa_bits))
    e, m = magnitude >> mantissa_bits, (magnitude & (2**mantissa_bits - 1)).double()
    fraction = m / 2**mantissa_bits
    if exponent_bits:
        power = torch.exp2((e.clamp(min=1) - bias).double())
        values = torch.where(e == 0, power * fraction, power * (1 + fraction))
    else:
        values = fraction * 2.0**-bias
    reserved = {"finite": 0, "fn": 1, "ieee": 2**mantissa_bits}[specials]
    values = values[: len(values) - reserved]
    both_signs = torch.cat((-values[1:].flip(0), values))
    return Format(name=name, bits=1 + exponent_bits + mantissa_bits, values=both_signs)


@pytest.fixture(scope="session")
def table():
    """Return a function from a named format to its table of values: the core's tests need no plugin."""
    return _table


@pytest.fixture(scope="session")
def named():
    """The names of all named formats."""
    return tuple(NAMED)


@pytest.fixture
def uniform(table):
    """The multiples of 1/128 up to 127/128."""
    return table("E0M7")


@pytest.fixture(scope="module")
def one_thread():
    """Small tensors are slower on two threads than on one, twenty times where the second core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def mlp():
    """Two Linears, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def x():
    """What `mlp` takes."""
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def train():
    """Return a function that fits a random map; it returns the loss of each step."""

    def fit(model, optimizer, steps, start=0):
        losses = []
        for step in range(start, start + steps):
            x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
            loss = (model(x) - x[:, :4].abs()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return fit


@pytest.fixture
def push():
    """Return a function by which SGD with lr 1 moves a weight by exactly so much."""

    def move(weight, optimizer, *by):
        weight.grad = -torch.tensor([by]).expand_as(weight).clone()
        optimizer.step()

    return move


@pytest.fixture
def is_on_grid():
    """Return a function that tells whether a quantized weight is on its grid."""

    def looked_at(weight):
        quantizer = quantizer_of(weight)
        return torch.isin(weight.detach() * quantizer.scale, quantizer.format.values).all()

    return looked_at


@pytest.fixture
def saved():
    """Return a function that gives states as torch reads them back from a file, without any class of ours."""

    def read_back(*states):
        file = io.BytesIO()
        torch.save(states, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    return read_back
