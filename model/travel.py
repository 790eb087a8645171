"""The way of vectors from the ranks that have their rows, while other work is done."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.phases import phase
from optim.update import Update
from ranks.collectives import Pending, begin_all_to_all
from ranks.process import Process


@dataclass(frozen=True)
class Types:
    """Types of vectors.

    Attributes:
        vectors: type of pooled vectors, float32 or that of --amp.
        wire: type of their numbers, and of their gradients', on their way between ranks; None:
            that of the vectors.
    """

    vectors: torch.dtype = torch.float32
    wire: torch.dtype | None = None

    @property
    def on_their_way(self) -> torch.dtype:
        """The type on their way."""
        return self.wire or self.vectors


class Travel:
    """Vectors of one forward pass that travel between ranks, and their gradients, which go back.

    `depart` returns at once, `arrive` waits. In the backward pass the gradients depart where the
    vectors have arrived, and are waited for where these have departed. Autograd runs what was
    called last first, so the backward pass of what was called in between is done on their way.

    Args:
        process: this rank.
        send: how many numbers of the vectors go to each rank.
        receive: how many come from each rank.
        types: of the vectors, and of their numbers on their way.
        update: what the backward pass does with the gradients; None: there is no such pass.
    """

    def __init__(
        self,
        process: Process,
        send: Sequence[int],
        receive: Sequence[int],
        types: Types,
        update: Update | None,
    ) -> None:
        self._process, self._send, self._receive = process, send, receive
        self._types, self._update = types, update
        # Gradients are of a mean over many rows: in float16 most of them would be 0, so they travel
        # times a power of two near that number. Where vectors are float16 the loss has a scale.
        self._factor = 1.0
        self._narrows = types.wire == torch.float16 != types.vectors
        if update is not None and self._narrows:
            self._factor = float(1 << (update.mean_over.bit_length() - 1))
        self._pending: Pending | None = None
        self._received, self._returned = torch.empty(0), torch.empty(0)

    def depart(self, vectors: Sequence[torch.Tensor]) -> None:
        """Send vectors, flat and rank by rank; a rank without parts of matrices has none."""
        # without vectors there is nothing that wants a gradient, but that rank takes part as well
        anchor = torch.empty(0, requires_grad=True)
        none = torch.empty(0, dtype=self._types.vectors, device=self._process.device)
        flat = vectors[0] if len(vectors) == 1 else torch.cat([none, *vectors])
        self._received = _Depart.apply(anchor, flat, self)

    def arrive(self) -> torch.Tensor:
        """Wait for the vectors, flat and rank by rank."""
        arrived: torch.Tensor = _Arrive.apply(self._received, self)
        self._received = torch.empty(0)
        return arrived

    def send_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
        """Begin to send the vectors; returns where those of other ranks will be."""
        return self._begin(vectors, self._send, self._receive)

    def wait(self) -> None:
        """Wait for what was begun last."""
        assert self._pending is not None, "nothing was sent"
        self._pending.wait()

    def take_vectors(self, received: torch.Tensor) -> torch.Tensor:
        """Wait for the vectors, which are `received` then."""
        self.wait()
        return received.to(self._types.vectors)

    def send_gradients(self, gradients: torch.Tensor) -> None:
        """Begin to send the gradients of what has arrived back."""
        if self._factor > 1:
            gradients = gradients * self._factor
        self._returned = self._begin(gradients, self._receive, self._send)

    def take_gradients(self) -> torch.Tensor:
        """Wait for the gradients of the vectors that were sent."""
        if self._update is not None and self._update.dense_is_ready is not None:
            self._update.dense_is_ready()
        with phase("exchange"):
            self.wait()
            returned = self._returned.to(self._types.vectors)
        return returned / self._factor if self._factor > 1 else returned

    def _begin(
        self, numbers: torch.Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> torch.Tensor:
        sent = numbers.to(self._types.on_their_way).contiguous()
        if self._narrows:
            sent = _finite_as_before(sent, numbers)
        received = sent.new_empty(sum(receive))
        self._pending = begin_all_to_all(self._process, received, sent, receive, send)
        return received


def _finite_as_before(rounded: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Numbers that only rounding has made infinite, as the type's largest one.

    Without a scale of the loss nobody would skip the step that one of them spoils. What was
    infinite or nan before is a divergence, and stays.
    """
    largest = torch.finfo(rounded.dtype).max
    return torch.where(numbers.isfinite(), rounded.clamp(-largest, largest), rounded)


class _Depart(torch.autograd.Function):
    """Vectors -> what will have arrived when `_Arrive` is done."""

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, vectors: torch.Tensor, travel: Travel
    ) -> torch.Tensor:
        ctx.travel = travel
        return travel.send_vectors(vectors)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[None, torch.Tensor, None]:  # type: ignore[override]
        return None, ctx.travel.take_gradients(), None


class _Arrive(torch.autograd.Function):
    """What `_Depart` has returned -> the vectors that have arrived there."""

    @staticmethod
    def forward(ctx: Any, received: torch.Tensor, travel: Travel) -> torch.Tensor:
        ctx.travel = travel
        ctx.stand_in = received.new_empty(1).expand(len(received))
        return travel.take_vectors(received)

    @staticmethod
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        with phase("exchange"):
            ctx.travel.send_gradients(gradients)
        return ctx.stand_in, None  # for the gradients, which `_Depart` waits for
