"""How what flows through one Linear is quantized: its input activations, or its output gradients.

A flow is quantized once, on its way, so that a scale must be known before the next step's tensor is. The
*delayed* scale (NVIDIA's Transformer Engine; Micikevicius et al., arXiv 2209.05433) takes the largest amax
of the last steps. Its history advances after use, once per training step: the loop's `held_weights` keeps it
fixed over the micro-batches and enters their common amax at the end. Outside of that context each training
forward (or backward) pass is a step of its own. Evaluation never changes it. An amax of zero, or none that
is finite, enters no history.

Activation checkpointing runs a forward pass again during the backward pass. Such a replay takes the scale of
the Linear's latest training pass, and enters an amax only where that pass could not, for it ran without
gradients (`use_reentrant=True`). Where a Linear runs twice before its replays, or is compiled and replayed,
only `held_weights` around both passes keeps the scales alike.

All state is tensors on the device, written in place: nothing synchronizes, and a compiled model is not
compiled again when it changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad_core import scaling
from altgrad_core.quantizer import adjusted
from altgrad_core.random_bits import Key, mix_, stream_key_tensor
from altgrad_core.range_counts import RangeCounts
from altgrad_core.recipe import Recipe
from altgrad_core.straight_through import gradient_through, straight_through

_NO_BACKWARD = -1
"""The autograd engine's task outside of any backward pass."""


class FlowQuantizer:
    """Quantizes one Linear's inputs (`quantized`) or output gradients (`through`).

    stream: names the random numbers of stochastic rounding; the quantization that n others came before
        draws its own under keys that are the stream's words 2n and 2n + 1.

    Attributes:
        recipe: how.
        history: (amax_history,) float32, the newest amax first; 0 where there is none yet.
        counter: 0-d int32, how many quantizations have counted.
        ranges: what counts overflow and underflow in training passes; None: nobody, as in a copy.
        adjustment: 0-d float32, a power of two that multiplies whatever scale the recipe's rule finds.

    Raises ValueError on a scale that stays as it was first seen: that is for weights.
    """

    def __init__(self, recipe: Recipe, device: torch.device, stream: Key = (0, 0, 0)) -> None:
        if recipe.scale_mode == "initial":
            raise ValueError(
                "scale_mode='initial' is for weights; activations and gradients take 'delayed', 'current' or "
                "'static'"
            )
        self.recipe = recipe
        self.ranges: RangeCounts | None = None
        self._counted = False  # whether the latest pass that replays nothing was one of training
        self._held = False
        self._stream = stream
        self._start(device)
        self._latest: tuple[Tensor, bool] | None = (
            None  # the scale of a training pass, and whether it counted
        )

    def _start(self, device: torch.device) -> None:
        """Make the state, with nothing seen yet."""
        self.history = torch.zeros(self.recipe.amax_history, dtype=torch.float32, device=device)
        self.counter = torch.zeros((), dtype=torch.int32, device=device)
        self.adjustment = torch.ones((), dtype=torch.float32, device=device)
        self._is_adjusted = False
        self._running = torch.zeros((), dtype=torch.float32, device=device)
        self._keys = stream_key_tensor(self._stream, device)

    def quantized(self, x: Tensor, training: bool, counts: bool = True) -> Tensor:
        """Return Q(x), the gradient passing straight through.

        training: whether this is a training pass; counts: whether histories advance in it.
        """

        def quantization(x: Tensor) -> tuple[Tensor, Tensor | None]:
            scale = self._replayable(x, counts) if training else self._scale(x, False)
            keys = self._draws(training and counts)
            found = self.recipe.quantize(x, scale, keys)
            if self.ranges is not None and training and not self._replays(counts):
                self.ranges.add(x, found, scale)
            return found, self.recipe.passes(x, scale, keys)

        return straight_through(x, quantization)

    def through(self, y: Tensor, counts: bool) -> Tensor:
        """Return y, nobody else's, whose gradient will come back quantized."""

        @torch.no_grad()
        def quantized(gradient: Tensor) -> Tensor:
            scale = self._scale(gradient, counts)
            found = self.recipe.quantize(gradient, scale, self._draws(counts))
            if self.ranges is not None and counts:
                self.ranges.add(gradient, found, scale)
            return found

        return gradient_through(y, quantized, owned=True)

    @torch.no_grad()
    def adjust(self, factor: float) -> None:
        """Multiply every scale from here on by a power of two."""
        self.adjustment.copy_(adjusted(self.adjustment, factor))
        self._is_adjusted = True

    def hold(self, counts: bool = False) -> bool:
        """Keep the history as it is until `release`; False where it is held already.

        counts: whether the passes until then are a step's, whose overflow is counted where somebody asks.
        """
        if self._held:
            return False
        self._held = True
        if counts and self.ranges is not None:
            self.ranges.begin(self.recipe.format, self.recipe.rounding)
        return True

    @torch.no_grad()
    def release(self, enter: bool = True) -> None:
        """End what `hold` began: the largest amax since then enters the history, if it is to `enter`."""
        self._held = False
        if enter:
            self._push(self._running)
        self._running.zero_()

    def _replayable(self, x: Tensor, counts: bool) -> Tensor:
        """Return the scale of a training pass; within a backward pass, that of the pass it replays."""
        if torch.compiler.is_compiling() or self.recipe.scale_mode != "delayed":
            return self._scale(x, counts)
        replayed = self._latest if torch._C._current_graph_task_id() != _NO_BACKWARD else None
        scale = self._scale(x, counts and not (replayed and replayed[1]))
        if replayed:
            scale, counted = replayed
            counts = counts or counted
        self._latest = scale, counts
        return scale

    def _replays(self, counts: bool) -> bool:
        """Whether a training pass is not to be counted: without gradients, or a replay of one that was."""
        if torch.compiler.is_compiling():
            return not counts
        if torch._C._current_graph_task_id() == _NO_BACKWARD:
            self._counted = counts
            return not counts
        return self._counted or not counts

    def _scale(self, x: Tensor, counts: bool) -> Tensor:
        found = self._found(x, counts)
        return adjusted(found, self.adjustment) if self._is_adjusted else found

    def _found(self, x: Tensor, counts: bool) -> Tensor:
        """Return the scale by the recipe's rule."""
        if self.recipe.scale_mode != "delayed" or not self.recipe.scaled or not x.numel():
            return self.recipe.scale_of(x)
        own = scaling.amax_per(x.detach(), "tensor", 0).to(torch.float32)
        seen = self.history.max()
        scale = self.recipe.scale_of(x, torch.where(seen > 0, seen, own))
        if counts and self._held:
            self._running.copy_(
                torch.where(scaling.usable(own), torch.maximum(self._running, own), self._running)
            )
        elif counts:
            self._push(own)
        return scale

    def _push(self, amax: Tensor) -> None:
        moved = torch.cat((amax.reshape(1), self.history[:-1]))
        self.history.copy_(torch.where(scaling.usable(amax), moved, self.history))

    def _draws(self, counts: bool) -> Tensor | None:
        """Return the keys of this quantization's random numbers; None where it needs none."""
        if self.recipe.rounding != "stochastic":
            return None
        words = 2 * self.counter + torch.arange(2, dtype=torch.int32, device=self.counter.device)
        keys = mix_(words, self._keys[0], self._keys[1])
        if counts:
            self.counter.add_(1)
        return keys

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resume needs; between steps, for what `hold` has gathered is not in it."""
        return {
            "history": self.history,
            "counter": self.counter,
            "keys": self._keys,
            "adjustment": self.adjustment,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up a saved state. Raises ValueError for a history of another length."""
        if state["history"].shape != self.history.shape:
            raise ValueError(
                f"the saved history is {len(state['history'])} long, amax_history is {len(self.history)}; "
                "quantize the model with the amax_history of then"
            )
        for key, mine in self.state_dict().items():
            mine.copy_(state[key])
        self._is_adjusted = float(self.adjustment) != 1

    def to(self, device: torch.device) -> None:
        """Move the state, when the model has moved; from `meta`, where there is none, it starts anew."""
        self._latest = None
        if self.history.is_meta and device.type != "meta":
            self._start(device)
        elif device != self.history.device:
            self.history, self.counter = self.history.to(device), self.counter.to(device)
            self._running, self._keys = self._running.to(device), self._keys.to(device)
            self.adjustment = self.adjustment.to(device)
