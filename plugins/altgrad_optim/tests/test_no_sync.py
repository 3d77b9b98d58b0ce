"""No optimizer step, and no storage behind one, makes the host wait for the device.

Three witnesses. On CUDA, torch's own debug mode raises wherever the host would wait. On `meta`, tensors have
no values, so that whatever would fetch one fails, while host tensors such as step counts are real; copies
between the two, which torch lets pass there, are refused here. On a CPU, where values are real and branches
are taken on them, every read of a value is refused but that of a step count. The loops in C, which may read
on the CPU that they run on, stand aside for the mode that watches.
"""

import contextlib

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from altgrad_core.groups import param_groups
from altgrad_core.storage import store_on_grid
from altgrad_core.surgery import quantize_model
from altgrad_optim import GridOptim, Madam, ManifoldAdamW

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.item, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero}
INDEXED = {aten.index, aten.index_put, aten.index_put_}
WARM_UP, STEPS = 2, 3


class Waits(AssertionError):
    """The host would wait for the device."""


class NoReads(TorchDispatchMode):
    """Refuses to read values of tensors, but of those at some addresses."""

    def __init__(self, readable):
        super().__init__()
        self.readable = readable

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = function.overloadpacket
        if packet in READS and args[0].data_ptr() not in self.readable:
            raise Waits(f"{function} of a tensor of shape {tuple(args[0].shape)}")
        if packet in INDEXED and any(one is not None and one.dtype == torch.bool for one in args[1]):
            raise Waits(f"{function} by a mask, whose size must be known")
        return function(*args, **kwargs or {})


class NoCopies(TorchDispatchMode):
    """Refuses copies between devices that wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        keywords = kwargs or {}
        moves = function.overloadpacket is aten._to_copy and keywords.get("device", args[0].device)
        moves = moves or (function.overloadpacket is aten.copy_ and args[1].device)
        if moves and moves != args[0].device and not keywords.get("non_blocking"):
            raise Waits(f"a copy from {args[0].device} to {moves}")
        return function(*args, **keywords)


class NothingMadeOnTheHost(TorchFunctionMode):
    """Refuses tensors of Python numbers on a device, which are copied from the host, and lists of values."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        device = (kwargs or {}).get("device")
        if function in (torch.tensor, torch.as_tensor) and torch.device(device or "cpu").type != "cpu":
            raise Waits(f"{function.__name__} on {device}")
        if function in (torch.Tensor.tolist, torch.Tensor.numpy) and args[0].numel():
            raise Waits(function.__name__)
        return function(*args, **kwargs or {})


@contextlib.contextmanager
def refused(device, readable=frozenset()):
    """Raise where the host would wait for the device."""
    if device != "cuda":
        with NoReads(readable) if device == "cpu" else NoCopies(), NothingMadeOnTheHost():
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=["cpu", "meta", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    return request.param


# --- the witnesses see what they are for ----------------------------------------------------------------

WAYS = {
    "a number": lambda x: float(x.sum()),
    "a truth": lambda x: bool((x > 0).any()),
    "a choice": lambda x: 1 if x[0] > 0 else 2,
    "a list": lambda x: x.tolist(),
    "the places that are not zero": lambda x: x.nonzero(),
    "elements by a mask": lambda x: x[x > 0],
    "equality": lambda x: torch.equal(x, x + 1),
}
ACROSS = {
    "to the host": lambda x: x.cpu(),
    "into the host": lambda x: torch.zeros(3).copy_(x),
    "from numbers": lambda x: torch.tensor([1.0], device=x.device),
    "from the host": lambda x: torch.zeros(3).to(x.device),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_to_fetch_a_value_is_seen(device, way):
    x = torch.ones(3, device=device)
    with refused(device), pytest.raises((Waits, RuntimeError, NotImplementedError)):
        way(x)


@pytest.mark.parametrize("way", ACROSS.values(), ids=ACROSS)
def test_every_waiting_copy_is_seen(way):
    with refused("meta"), pytest.raises((Waits, NotImplementedError)):
        way(torch.ones(3, device="meta"))


def test_what_does_not_wait_passes(device):
    x, count = torch.ones(3, device=device), torch.zeros(())
    with refused(device, {count.data_ptr()}):
        count += 1
        x.mul_(2 ** int(count)).add_(count)
        torch.where(x > 1, x, torch.full_like(x, 3.0)).sum()


# --- the optimizers -------------------------------------------------------------------------------------


def adamw(groups):
    fused = groups[0]["params"][0].device.type == "cuda"
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=fused, foreach=not fused)


def manifold(**options):
    return lambda groups: ManifoldAdamW(groups, lr=1e-2, weight_decay=0.1, **options)


def riemannian(groups):
    pytest.importorskip("geoopt", reason="altgrad-optim[geoopt] is not installed")
    from altgrad_optim import RiemannianAdam

    return RiemannianAdam(groups, weight_decay=0.1)


def grid(**options):
    return lambda groups: GridOptim(groups, **{"weight_decay": 0.1, "bound": 4.0} | options)


def stored(make, rounding, **options):
    def made(groups):
        optimizer = make(groups)
        optimizer.storage = store_on_grid(optimizer, rounding, bound=4.0, **options)
        return optimizer

    return made


ARMS = {
    "AdamW": adamw,
    "AdamW nearest": stored(adamw, "nearest_even"),
    "AdamW stochastic": stored(adamw, "stochastic"),
    "AdamW error feedback": stored(adamw, "error_feedback"),
    "AdamW error feedback in float32": stored(adamw, "error_feedback", residual_format="FP32"),
    "AdamW eco": stored(adamw, "eco"),
    "ManifoldAdamW": manifold(),
    "ManifoldAdamW gradient": manifold(placement="gradient", normalize="none"),
    "ManifoldAdamW both": manifold(placement="both", normalize="max"),
    "ManifoldAdamW half": manifold(placement=(0, 0.5), normalize="mean"),
    "ManifoldAdamW frozen": manifold(stiffness={"plugin": "grid", "refresh": "never"}),
    "ManifoldAdamW positions": manifold(track_position=True),
    "ManifoldAdamW stochastic": stored(manifold(), "stochastic"),
    "ManifoldAdamW eco": stored(manifold(), "eco"),
    "GridOptim": grid(),
    "GridOptim adam": grid(normalize="adam", storage_rounding="stochastic"),
    "GridOptim value": grid(rounding="value"),
    "GridOptim master": grid(storage="master", scale_mode="initial"),
    "Madam": lambda groups: Madam(groups, weight_decay=0.1),
    "RiemannianAdam": riemannian,
}


def gradients(model, step):
    draws = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draws).to(parameter.device)


@pytest.mark.parametrize("arm", ARMS)
def test_a_step_never_waits_for_the_device(device, arm, table):
    if (device, arm) == ("cpu", "AdamW error feedback"):
        pytest.skip("on a CPU residuals become codes by another way, which looks for NaN first")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)).to(device)
    optimizer = ARMS[arm](param_groups(quantize_model(model, table("E4M3"))))
    for step in range(WARM_UP):
        gradients(model, step)
        optimizer.step()
    counts = {state["step"].data_ptr() for state in optimizer.state.values() if state["step"].is_cpu}
    for step in range(WARM_UP, WARM_UP + STEPS):
        gradients(model, step)
        with refused(device, counts):
            optimizer.step()
