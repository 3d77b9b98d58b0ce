"""How many operations a step launches on a device: as many for twenty weights as for four.

Counted on `meta`, where the loops in C stand aside as they do on a GPU. A launch is an operation on tensors
of the device that neither is a view nor only allocates.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from altgrad_core.groups import param_groups
from altgrad_core.master_bound import MasterBound
from altgrad_core.rows import LONGEST
from altgrad_core.storage import store_on_grid
from altgrad_core.surgery import quantize_model
from altgrad_optim import GridOptim, Madam, ManifoldAdamW

ALLOCATIONS = {torch.ops.aten.empty_like, torch.ops.aten.empty, torch.ops.aten.new_empty}


class Launches(TorchDispatchMode):
    """Counts the operations on a device's tensors."""

    def __init__(self, device):
        super().__init__()
        self.device, self.count = device, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        on_device = any(one.device.type == self.device for one in tensors)
        launches = not function.is_view and function.overloadpacket not in ALLOCATIONS
        self.count += on_device and launches
        return function(*args, **kwargs or {})


def manifold(**options):
    return lambda groups: ManifoldAdamW(groups, lr=1e-2, weight_decay=0.1, **options)


def grid(**options):
    return lambda groups: GridOptim(groups, **{"weight_decay": 0.1, "bound": 4.0} | options)


def plain(groups):
    return torch.optim.SGD(groups, lr=1e-2, foreach=True)


def stored(rounding, **options):
    def made(groups):
        optimizer = plain(groups)
        optimizer.storage = store_on_grid(optimizer, rounding, bound=4.0, **options)
        return optimizer

    return made


def bounded(groups):
    optimizer = plain(groups)
    optimizer.bound = MasterBound(optimizer, groups[0]["params"], 3.0)
    return optimizer


ARMS = {
    "ManifoldAdamW": manifold(),
    "ManifoldAdamW gradient": manifold(placement="gradient", normalize="none"),
    "ManifoldAdamW both": manifold(placement="both", normalize="max"),
    "ManifoldAdamW half": manifold(placement=(0, 0.5), normalize="mean"),
    "ManifoldAdamW uniform": manifold(stiffness="uniform"),
    "ManifoldAdamW frozen": manifold(stiffness={"plugin": "grid", "refresh": "never"}),
    "ManifoldAdamW positions": manifold(track_position=True),
    "GridOptim": grid(),
    "GridOptim adam": grid(normalize="adam", storage_rounding="stochastic"),
    "GridOptim value": grid(rounding="value"),
    "GridOptim master": grid(storage="master", scale_mode="initial"),
    "Madam": lambda groups: Madam(groups, weight_decay=0.1),
    "nearest": stored("nearest_even"),
    "stochastic": stored("stochastic"),
    "error feedback": stored("error_feedback"),
    "error feedback in float32": stored("error_feedback", residual_format="FP32"),
    "bounded masters": bounded,
}


def launches(make, shapes, table):
    """Return what the second step launches."""
    model = nn.ModuleList(nn.Linear(columns, rows, bias=False, device="meta") for rows, columns in shapes)
    optimizer = make(param_groups(quantize_model(model, table("E4M3"))))
    for _ in range(2):
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        with Launches("meta") as counted:
            optimizer.step()
    return counted.count


@pytest.mark.parametrize("arm", ARMS)
def test_twenty_weights_take_as_many_launches_as_four(arm, table):
    assert launches(ARMS[arm], [(3, 4)] * 20, table) == launches(ARMS[arm], [(3, 4)] * 4, table) > 0


@pytest.mark.parametrize("arm", ["ManifoldAdamW", "GridOptim adam", "stochastic"])
def test_a_row_that_is_full_begins_another(arm, table):
    half = [(LONGEST // 1024, 512)]
    two, four = launches(ARMS[arm], half * 2, table), launches(ARMS[arm], half * 4, table)
    assert two < four <= 2 * two


@pytest.mark.parametrize(("arm", "most"), [("ManifoldAdamW", 60), ("GridOptim", 300), ("stochastic", 150)])
def test_a_step_takes_so_many_launches(arm, most, table):
    assert launches(ARMS[arm], [(3, 4)] * 4, table) <= most
