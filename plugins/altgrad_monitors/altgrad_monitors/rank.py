"""`rank`: how many directions a weight matrix still uses.

With the singular values s_1 >= s_2 >= ... of a matrix W and their shares p_i = s_i / sum(s):

stable_rank      |W|_F^2 / |W|_2^2 = sum(s^2) / s_1^2 (Rudelson and Vershynin, 2007)
stable_rank_ema  its exponential moving average over the checks, alpha 0.1, begun at the first value
effective_rank   exp(-sum p ln p) (Roy and Vetterli, 2007)
rank_99          how many of the largest singular values hold 99 % of the energy sum(s^2)
spectral_norm    s_1
warning          1 where the average has fallen by more than 0.30, in the head (`lm_head`, tied or not, or
                 `classifier`) and the projections `c_proj` by more than 0.15,
                 relative to a reference; 0 elsewhere

The reference is the average of a baseline run at the same step (its last logged one that is not later),
or without a baseline the run's own average at the first check after `warmup` steps. Until there is one there
is no warning, neither 0 nor 1.

Every matrix that trains is observed: quantized or not, embeddings too, the values as they are stored (under
master storage the masters). Over layers, ranks are averaged, norms and warnings are the largest.

One decomposition serves a check: the eigenvalues of W W^T or W^T W, the smaller one, in float64, are s^2. For
384 x 1536 that takes a third of the time of svdvals in float32. Eigenvalues below n 2^-52 of the largest are
rounding and count as 0: singular values below sqrt(n) 1.5e-8 of the largest, 3e-7 for n = 384. Matrices whose
smaller side is the same are decomposed together. (On a GPU each such batch waits for the device once: torch
looks whether the decomposition has converged.)

A matrix with a NaN or an inf has NaN everywhere, its warning included, and its average and a reference taken
from it stay NaN. Beside a baseline whose average is NaN there is no warning, neither 0 nor 1. A matrix of
zeros has rank and norm 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from altgrad_core.hookspecs import Step, Weight
from altgrad_monitors import RankOptions
from altgrad_monitors.baseline import Baseline
from altgrad_monitors.reporting import averaged, largest, reported

EMA_ALPHA = 0.1
"""Weight of the newest check in the average."""

FALL, CRITICAL_FALL = 0.30, 0.15
"""Relative falls of the average above which a layer warns: any layer, and a critical one."""

CRITICAL = re.compile(r"(.*\.)?(lm_head|classifier|c_proj)")

ENERGY = 0.99
"""Share of sum(s^2) that `rank_99` asks for."""

_ROWS = 8192  # of a tall matrix that are widened to float64 at once

_QUANTITIES: Mapping[str, Callable[[list[Tensor]], Tensor]] = {
    "stable_rank": averaged,
    "stable_rank_ema": averaged,
    "effective_rank": averaged,
    "rank_99": averaged,
    "spectral_norm": largest,
    "warning": largest,
}
"""Quantity to how it is summed up over layers."""


class Rank:
    """Reports the ranks of the matrices and warns where they fall; see the module's text.

    Raises UsageError for a baseline that is no run which logged ranks.
    """

    needs = ()
    provides: Mapping[str, str] = {
        **dict.fromkeys(_QUANTITIES, "mean"),
        "stable_rank_ema": "",
        "warning": "sum",
    }
    undefined_is_nan = True  # beside a weight that is NaN it is logged as NaN, whoever says so

    def __init__(self, options: RankOptions) -> None:
        self.every = options.every
        self._options, self.layers = options, options.layers
        self._baseline = Baseline(options.baseline, "rank/stable_rank_ema") if options.baseline else None
        self._average: dict[str, Tensor] = {}
        self._reference: dict[str, Tensor] = {}

    def start(self, run: Any) -> None:
        """Refuse a baseline that does not have this run's layers."""
        if self._baseline is not None:
            self._baseline.check(one.layer for one in _matrices(self.layers, run.weights()).values())

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return the quantities of each matrix, and over all of them."""
        matrices = _matrices(self.layers, step.weights)
        found = spectra({name: weight.value for name, weight in matrices.items()})
        layers = {weight.layer: found[name] for name, weight in matrices.items()}
        for layer, quantities in layers.items():
            average = self._averaged(layer, quantities["stable_rank"])
            quantities["stable_rank_ema"] = average
            reference = self._reference_at(step.index, layer, average)
            if reference is not None:
                quantities["warning"] = warned(layer, average, reference)
        metrics: dict[str, Tensor | float] = {}
        for quantity, combine in _QUANTITIES.items():
            values = {layer: one[quantity] for layer, one in layers.items() if quantity in one}
            metrics |= reported(f"rank/{quantity}", values, combine, self._options.per)
        return metrics

    def _averaged(self, layer: str, now: Tensor) -> Tensor:
        """Return the layer's moving average with its newest value in it."""
        before = self._average.get(layer, now).to(now.device)
        self._average[layer] = before + EMA_ALPHA * (now - before)
        return self._average[layer]

    def _reference_at(self, index: int, layer: str, average: Tensor) -> Tensor | float | None:
        """Return what the average is held against; None where that is not known yet."""
        if self._baseline is not None:
            return self._baseline.at(index, layer)
        if index >= self._options.warmup:
            return self._reference.setdefault(layer, average).to(average.device)
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"average": dict(self._average), "reference": dict(self._reference)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._average, self._reference = dict(state["average"]), dict(state["reference"])


def _matrices(pattern: str, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Return the 2-d weights of the layers that the pattern matches, by parameter name."""
    return {
        name: weight
        for name, weight in weights.items()
        if weight.value.dim() == 2 and weight.value.numel() and re.fullmatch(pattern, weight.layer)
    }


def warned(layer: str, average: Tensor, reference: Tensor | float) -> Tensor:
    """Return 1 where the average has fallen too far below the reference, else 0; NaN where one is NaN."""
    limit = CRITICAL_FALL if CRITICAL.fullmatch(layer) else FALL
    unknown = (average + reference).isnan()
    return torch.where(unknown, torch.nan, (average < (1 - limit) * reference).double())


@torch.no_grad()
def spectra(matrices: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return stable_rank, effective_rank, rank_99 and spectral_norm of each matrix, 0-d float64."""
    alike: dict[int, list[str]] = {}
    for name, matrix in matrices.items():
        alike.setdefault(min(matrix.shape), []).append(name)
    found: dict[str, dict[str, Tensor]] = {}
    for names in alike.values():
        squares = _squares(torch.stack([_gram(matrices[name]) for name in names]))
        quantities = {quantity: values.unbind() for quantity, values in _of_squares(squares).items()}
        found |= {name: {key: one[at] for key, one in quantities.items()} for at, name in enumerate(names)}
    return found


def _gram(matrix: Tensor) -> Tensor:  # (out, in) -> (n, n) float64, n the smaller of the two
    """Return the products of the rows, or of the columns where those are fewer."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=matrix.device)
    for rows in tall.split(_ROWS):
        wide = rows.double()
        gram.addmm_(wide.mT, wide)
    return gram


def _squares(gram: Tensor) -> Tensor:  # (matrices, n, n) -> (matrices, n)
    """Return the squares of the singular values, ascending; NaN for a matrix that is not finite."""
    finite = gram.isfinite().all(dim=(-2, -1), keepdim=True)
    squares = torch.linalg.eigvalsh(torch.where(finite, gram, 0.0))
    rounding = squares[:, -1:] * (gram.shape[-1] * torch.finfo(torch.float64).eps)
    return torch.where(finite[:, 0], torch.where(squares > rounding, squares, 0.0), torch.nan)


def _of_squares(squares: Tensor) -> dict[str, Tensor]:
    """Return each quantity of the matrices, (matrices,) float64, from the squared singular values."""
    largest_square, energy = squares[:, -1], squares.sum(dim=1)
    zero = energy == 0
    values = squares.sqrt()
    shares = values / torch.where(zero, 1.0, values.sum(dim=1))[:, None]
    effective = torch.special.entr(shares).sum(dim=1).exp()  # entr(p) is -p ln p, and 0 at 0
    missing = squares.flip(1).cumsum(dim=1) < (ENERGY * energy)[:, None]
    return {
        "stable_rank": energy / torch.where(zero, 1.0, largest_square),
        "effective_rank": torch.where(zero, 0.0, effective),
        "rank_99": torch.where(zero, 0.0, missing.sum(dim=1) + 1.0) + 0 * energy,  # NaN stays NaN
        "spectral_norm": values[:, -1],
    }
