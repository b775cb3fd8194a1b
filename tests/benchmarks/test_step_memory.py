"""Bytes of a step, and the search for the largest batch."""

import pytest
import torch
from memory import (
    bytes_of_graph,
    peak_mib,
    saved_mib,
)
from settings import PLAIN, Step, alternative, vision_transformer
from torch import nn

from aal.memory import MIB, saved_bytes


def vit_step(kind: str = "cpu") -> Step:
    """The plain step of a tiny ViT."""
    sizes = {"image_size": 8, "width": 64, "depth": 2, "heads": 2, "mlp_width": 128}
    network = vision_transformer("vit", batch=2, dtype=torch.float32, **sizes)
    batch = network.random_batch(2, torch.device(kind))
    return alternative(PLAIN).make(network, *batch)


def test_saved_mib_on_cpu_are_those_that_autograd_holds():
    step = vit_step()
    assert saved_mib(step) == saved_bytes(step.loss, step.images, step.labels) / MIB > 0


def test_nodes_of_a_graph_keep_what_autograd_holds():
    step = vit_step()
    loss = step.loss(step.images, step.labels)
    found = bytes_of_graph(loss, (*step.model.parameters(), step.images, step.labels))
    assert found == saved_bytes(step.loss, step.images, step.labels)


def test_compiled_steps_are_counted_by_their_graph():
    step = vit_step()
    expected = saved_mib(step)
    step.model.compile(backend="aot_eager")
    step.is_compiled = True
    assert 0.5 * expected < saved_mib(step) < 1.5 * expected
    torch.compiler.reset()


def test_a_storage_counts_once_and_parameters_do_not():
    weight = nn.Parameter(torch.randn(3, 3))
    x = torch.randn(5, 3)
    y = torch.mm(x, weight).exp() + torch.mm(x, weight.t()).exp()
    assert bytes_of_graph(y.sum(), (weight,)) == 4 * 3 * x.numel()  # x, and two results of exp


@pytest.mark.gpu
def test_on_a_gpu_the_peak_covers_what_is_saved():
    step = vit_step("cuda")
    step()
    saved = saved_mib(step)
    expected = saved_bytes(step.loss, step.images, step.labels) / MIB
    assert expected <= saved <= 1.2 * expected + 0.1  # storages are rounded up
    assert saved <= peak_mib(step)
    assert all(parameter.grad is None for parameter in step.model.parameters())
