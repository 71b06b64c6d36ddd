"""The gradients of a training step as one CUDA graph.

A step of these small networks is a few hundred kernels of a few microseconds each, and the host
takes longer to launch them than the GPU to compute them. A CUDA graph launches all of them at once.
They are the same kernels in the same order, so the gradients are the same.
"""

import torch

from utils.cli import UserError


class GraphedGradients:
    """Computes gradients as a function does, by a CUDA graph that the first batch captures.

    Args:
        compute: function of a batch, a tuple of tensors on the GPU. It sets the gradients of the
            parameters and returns (loss, {name: term}), scalars. It launches the same kernels for
            every batch, and waits for none of them.
        parameters: those whose gradients `compute` sets.
    Raises: UserError at the first batch if `compute` waits for the GPU.
    """

    def __init__(self, compute, parameters):
        self.compute = compute
        self.parameters = list(parameters)
        self.graph = None

    def __call__(self, batch):
        """The loss and its terms; the gradients are set. Every batch has the size of the first."""
        if self.graph is None:
            self._capture(batch)
        for captured, tensor in zip(self.batch, batch, strict=True):
            captured.copy_(tensor)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient  # a step without the graph may have replaced it
        terms = {name: term.clone() for name, term in self.terms.items()}
        return self.loss.clone(), terms

    def _capture(self, batch):
        """Record the kernels of one call. The tensors that they read and write stay in place."""
        self.batch = [tensor.clone() for tensor in batch]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries allocate their workspaces in the first calls
                self._compute_anew()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.loss, self.terms = self._compute_anew()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"the step cannot be a CUDA graph ({reason}); give --no-cuda-graph, and set "
                "has_fixed_kernels = False in the method"
            ) from None
        self.gradients = [parameter.grad for parameter in self.parameters]
        self.graph = graph

    def _compute_anew(self):
        for parameter in self.parameters:
            parameter.grad = None
        return self.compute(self.batch)
