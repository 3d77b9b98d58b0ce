"""The quantizers that AltGrad is compared with, each with its version, or the reason why it is missing."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import adapters
import attrs
import torch

from altgrad_formats.layout import Layout


@attrs.frozen(kw_only=True)
class Peer:
    """A quantizer to compare with: `module` is imported, `distribution` has the version."""

    name: str
    module: str
    adapter: adapters.Adapter
    settings: str
    distribution: str = attrs.field(default=attrs.Factory(lambda self: self.module, takes_self=True))
    install: str = attrs.field(
        default=attrs.Factory(lambda self: f"pip install {self.distribution}", takes_self=True)
    )
    devices: tuple[str, ...] = ("cpu", "cuda")


@attrs.frozen
class Found:
    """A peer as it is on this machine."""

    peer: Peer
    version: str | None
    missing: str | None = None
    """Why it cannot be used; None where it can."""

    @property
    def name(self) -> str:
        return self.peer.name

    def call(self, layout: Layout, mode: str, device: str = "cpu") -> adapters.Call | None:
        """Return the function of a tensor, or None where the peer has no such thing.

        Where a peer cannot be set up, as another version of it may be unlike the one known here, that is
        what the function raises.
        """
        if self.missing or device not in self.peer.devices:
            return None
        try:
            return self.peer.adapter(layout, mode, device)
        except Exception as error:  # noqa: BLE001 - a result like any other: it fills the peer's row
            return functools.partial(_raise, error)


def _raise(error: Exception, x: object) -> None:
    raise error


def find(peer: Peer) -> Found:
    """Import a peer and return its version, or the reason why it cannot be used."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the results
            module = importlib.import_module(peer.module)
    except Exception as error:  # noqa: BLE001 - whatever a peer's import raises is reported as its row
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Found(peer, None, f"{reason}: {peer.install}")
    try:
        return Found(peer, importlib.metadata.version(peer.distribution))
    except importlib.metadata.PackageNotFoundError:
        return Found(peer, getattr(module, "__version__", "without a version"))


def find_all(names: Sequence[str] | None) -> list[Found]:
    """Return AltGrad and the peers of these names, or all of them. Raises SystemExit for an unknown name."""
    known = [peer.name for peer in PEERS]
    for name in names or ():
        if name not in known:
            raise SystemExit(f"no peer {name!r}; there are: {', '.join(known)}")
    return [find(peer) for peer in PEERS if names is None or peer.name in ("altgrad", *names)]


def machine() -> dict[str, str]:
    """Return what the numbers depend on: versions, processor, accelerator, date."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": models[0] if models else platform.processor(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "date": datetime.date.today().isoformat(),
    }


_MICROXCALING = {
    "module": "mx.elemwise_ops",
    "distribution": "microxcaling",
    "install": "not on PyPI; put a checkout of github.com/microsoft/microxcaling on PYTHONPATH",
}

PEERS = (
    Peer(
        name="altgrad",
        module="altgrad_formats",
        distribution="altgrad-formats",
        install="pip install -r requirements.txt",
        adapter=adapters.altgrad_calls,
        settings="`quantize(x)`",
    ),
    Peer(
        name="torch casts",
        module="torch",
        adapter=adapters.torch_calls,
        settings="`x.to(dtype).float()`",
    ),
    Peer(
        name="torchao",
        module="torchao.prototype.mx_formats.kernels",
        distribution="torchao",
        adapter=adapters.torchao_calls,
        settings="8 bits: `to_fp8_saturated`; 4 and 6 bits: `f32_to_f4_unpacked`, ... and back",
    ),
    Peer(
        name="ml_dtypes",
        module="ml_dtypes",
        adapter=adapters.ml_dtypes_calls,
        settings="`x.astype(dtype).astype(float32)`; there is no saturation to choose",
        devices=("cpu",),
    ),
    Peer(
        name="gfloat",
        module="gfloat",
        adapter=adapters.gfloat_calls,
        settings="`round_ndarray(..., TiesToEven, sat=True)`",
        devices=("cpu",),
    ),
    Peer(
        name="brevitas",
        module="brevitas.core.quant.float",
        distribution="brevitas",
        adapter=adapters.brevitas_calls,
        settings="`FloatQuant` with `RoundSte`, `saturating=True`, `max_available_float` of the format",
    ),
    Peer(
        name="qtorch",
        module="qtorch.quant",
        distribution="qtorch",
        install="pip install qtorch ninja; importing it compiles C++",
        adapter=adapters.qtorch_calls,
        settings="`float_quantize(exp, man)`, uniform grids by a symmetric `fixed_point_quantize`;"
        " `rounding='nearest'`; it says of itself that it does not handle NaN and infinity",
    ),
    Peer(
        name="pychop",
        module="pychop",
        adapter=adapters.pychop_calls,
        settings="`Chop(exp_bits, sig_bits, rmode=1)`; there is no saturation to choose",
    ),
    Peer(
        name="pychop P3109",
        module="pychop",
        adapter=adapters.p3109_calls,
        settings="`P3109` with `domain='finite'`, `saturate=True`; P3109 has no -0, by design",
    ),
    Peer(
        name="microxcaling",
        **_MICROXCALING,
        adapter=adapters.microxcaling_calls("even"),
        settings="`_quantize_elemwise(round='even', saturate_normals=True)`; infinity stays, by design",
    ),
    Peer(
        name="microxcaling default",
        **_MICROXCALING,
        adapter=adapters.microxcaling_calls("nearest"),
        settings="the same with the default `round='nearest'`",
    ),
)
