"""Gradients by a CUDA graph: its bookkeeping, with a graph that computes again. tests/benchmarks/gpu.py has the real one."""

import copy

import pytest
import torch

import train as train_script
from models import GROUPS, METHODS
from models.base import Adaptor
from utils.cuda_graph import GraphedGradients
from utils.optimizer import make_optimizer

B = 32
D = 16


def run_steps(method, use_graph, sizes=(B, B, B - 3, B, B)):
    """The losses, terms and weights of a few steps on batches of these sizes."""
    torch.manual_seed(0)
    adaptor = METHODS[method](D)
    recipe = adaptor.recipes["small"]
    optimizer, schedule = make_optimizer(adaptor, recipe, 10)
    dtype = torch.float32
    graph = train_script.graph_of(adaptor, B, dtype, use_graph)
    assert (graph is None) == (not use_graph)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for size in sizes:
        pairs = torch.randn(2, size, D, generator=generator)
        this_graph = graph if size == B else None
        arguments = (adaptor, pairs, size, optimizer, schedule, dtype, 1.0, 1.0, this_graph)
        losses.append(train_script.step(*arguments))
    return losses, {name: weight.clone() for name, weight in adaptor.state_dict().items()}


class Recomputing:
    """Stands for torch.cuda.CUDAGraph; `owner` is the GraphedGradients that captures with it."""

    owner = None

    def replay(self):
        graphed = self.owner
        kept = [graphed.loss, *graphed.terms.values(), *graphed.gradients]
        loss, terms = graphed._compute_anew()
        new = [loss, *terms.values(), *(parameter.grad for parameter in graphed.parameters)]
        for old, value in zip(kept, new, strict=True):
            if old is not None:
                old.copy_(value)


class Nothing:
    """A context and a stream that do nothing."""

    def __init__(self, *arguments):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def wait_stream(self, stream):
        pass


@pytest.fixture
def no_gpu_needed(monkeypatch):
    for name in ("Stream", "current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recomputing)


@pytest.mark.parametrize("method", GROUPS["all"])
def test_steps_with_and_without_the_graph_can_alternate(method, no_gpu_needed, monkeypatch):
    def graph_of(adaptor, batch_size, precision, is_wanted):
        if not is_wanted:
            return None

        def compute(pairs):
            return train_script.backward(adaptor, pairs, batch_size, precision)

        graph = GraphedGradients(compute, adaptor.parameters())
        monkeypatch.setattr(Recomputing, "owner", graph)
        return graph

    monkeypatch.setattr(train_script, "graph_of", graph_of)
    torch.testing.assert_close(run_steps(method, True), run_steps(method, False), rtol=0, atol=0)


def test_what_a_step_returned_is_not_changed_by_the_next(no_gpu_needed, monkeypatch):
    adaptor = METHODS["prolip"](D)

    def compute(pairs):
        return train_script.backward(adaptor, pairs, B, torch.float32)

    graph = GraphedGradients(compute, adaptor.parameters())
    monkeypatch.setattr(Recomputing, "owner", graph)
    first_loss, first_terms = graph(torch.randn(2, B, D))
    kept = copy.deepcopy((first_loss, first_terms))
    second_loss, _ = graph(torch.randn(2, B, D))
    assert second_loss != first_loss
    assert (first_loss, first_terms) == kept


def test_there_is_no_graph_on_the_cpu_or_for_varying_kernels():
    assert train_script.graph_of(METHODS["pfe"](D), B, torch.float32, True) is None
    for method in GROUPS["originals"]:
        varies = method != "prolip-original"
        assert METHODS[method].has_fixed_kernels != varies
    assert not Adaptor.has_fixed_kernels  # so a new method has to ask for it
