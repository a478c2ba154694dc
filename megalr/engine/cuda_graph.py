"""The scaled loss of a micro-batch; its forward and backward pass as one CUDA graph.

A small model's kernels run faster than Python can launch them: at 60M parameters the GPU is idle
for a third of a step. A CUDA graph launches all kernels at once. The engine is unchanged: its hooks
see one autograd node that returns every parameter's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megalr.engine.skip_step import poison_nonfinite
from megalr.models.decoder import Decoder

WARMUP_RUNS = 3
"""Runs before the capture: they compile, choose kernels and fill the libraries' workspaces."""


class MicroBatchGraph:
    """Replays ``loss = scale * decoder(input_ids, labels, positions)`` and its gradients.

    Input ids, labels, positions (with document masks), scale, loss and gradients live in fixed
    buffers that a replay reads and writes; everything else stays in the graph's own memory pool, of
    the size of one eager run. A loss that is not finite is poisoned inside, because the gradients
    of a replay do not depend on operations on its loss.

    Args:
        decoder: in training mode, its parameters where they will stay (after the engine's start).
        shape: ``(B, S)`` of the micro-batches.
        document_mask: whether there are positions.
        share_gradients: return the buffers themselves, which the next replay overwrites. Correct
            if the engine has consumed ``.grad`` before the next micro-batch; else copies are made.
    """

    def __init__(
        self,
        decoder: Decoder,
        shape: tuple[int, int],
        share_gradients: bool,
        document_mask: bool = False,
    ) -> None:
        device = decoder.embedding.weight.device
        self.shape = shape
        self.share_gradients = share_gradients
        self.parameters = [p for p in decoder.parameters() if p.requires_grad]
        dtypes = (torch.int64, torch.int64, torch.int32)[: 3 if document_mask else 2]
        self.inputs = [torch.zeros(shape, dtype=dtype, device=device) for dtype in dtypes]
        self.scale = torch.ones((), dtype=torch.float32, device=device)

        def run() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            loss = poison_nonfinite(decoder.summed_loss(*self.inputs) * self.scale)
            return loss.detach(), torch.autograd.grad(loss, self.parameters)

        for _ in range(WARMUP_RUNS):
            run()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # the warm-up's activations make room for the graph's
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream(device)):
            self.loss, self.gradients = run()

    def __call__(self, inputs: Sequence[torch.Tensor], scale: float) -> torch.Tensor:
        """The scaled loss of a micro-batch; its ``backward()`` gives the parameters' gradients.

        ``backward`` must be called on it as it is (with gradient 1), before the next call.
        """
        for buffer, tensor in zip(self.inputs, inputs, strict=True):
            buffer.copy_(tensor)
        self.scale.fill_(scale)
        if self.share_gradients:
            for parameter in self.parameters:
                parameter.grad = None  # it may be a buffer that the replay is about to write
        return _Replay.apply(self, *self.parameters)


class ScaledLoss:
    """The decoder's forward pass as the engine calls it: ``(input_ids, labels, positions, scale)``.

    Assigned to ``decoder.forward``, as torch.cuda.make_graphed_callables does: names of parameters
    and the hooks of the module stay. Without ``labels`` or ``scale`` it is the decoder's own.

    Attributes:
        graph: computes the scaled loss where gradients are wanted; None: the decoder does.
    """

    def __init__(self, decoder: Decoder, graph: MicroBatchGraph | None = None) -> None:
        self.forward = decoder.forward
        self.graph = graph

    def __call__(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """The decoder's loss times ``scale``, float32 scalar; logits without ``labels``."""
        if labels is None or scale is None:
            return self.forward(input_ids, labels, positions)
        if self.graph is not None and torch.is_grad_enabled():
            inputs = (input_ids, labels) if positions is None else (input_ids, labels, positions)
            return self.graph(inputs, scale)
        return self.forward(input_ids, labels, positions) * scale


class _Replay(torch.autograd.Function):
    """One replay in forward; backward only hands out the gradients it has computed."""

    @staticmethod
    def forward(ctx: Any, graph: MicroBatchGraph, *parameters: torch.Tensor) -> torch.Tensor:
        graph.graph.replay()
        ctx.graph = graph
        return graph.loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_output: torch.Tensor) -> Any:
        graph = ctx.graph
        if graph.share_gradients:
            # New tensor objects over the buffers: autograd keeps them without copying.
            return None, *(gradient.detach() for gradient in graph.gradients)
        return None, *(gradient.clone() for gradient in graph.gradients)
