"""What PyTorch's own means keep, in bytes, and that their gradients are PyTorch's."""

import copy

import pytest
import torch
from alternatives import (
    PRODUCTS,
    checkpoint_blocks,
    compile_modules,
    keeping,
    keeping_attention_and_every_second_product,
)
from helpers import assert_same_bits
from memory import bytes_of_graph
from torch import nn

from aal.memory import saved_bytes

B, C, H, DEPTH = 4, 8, 32, 3  # images, width, hidden width, blocks
INPUTS = (DEPTH - 1) * B * C  # of blocks: the first block's is the caller's
FIRST, SECOND = DEPTH * B * H, DEPTH * B * C  # results of the products
SELECTED = {  # numbers that are kept beside the inputs
    "nothing": ((), 0),
    "products": ((keeping(*PRODUCTS),), FIRST + SECOND),
    "every second": ((keeping_attention_and_every_second_product,), FIRST),
}
# Under a counter of saved bytes, whose hooks stand around the checkpoint.
AROUND_SELECTIVE = "ignore:A saved_tensors_hooks context"


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(C, H), nn.GELU(), nn.Linear(H, C)) for _ in range(DEPTH))
    )


@pytest.mark.filterwarnings(AROUND_SELECTIVE)
@pytest.mark.parametrize("selected", SELECTED)
def test_checkpoint_keeps_inputs_and_what_is_selected(selected):
    contexts, kept = SELECTED[selected]
    model, x = network(), torch.randn(B, C, requires_grad=True)
    checkpoint_blocks(model, *contexts)
    # The result of a block's last product is the next block's input; the last one is the output.
    shared = INPUTS if selected == "products" else 0
    assert saved_bytes(model, x) == 4 * (INPUTS + kept - shared)


@pytest.mark.parametrize("selected", SELECTED)
def test_gradients_are_those_without(selected):
    model, x = network(), torch.randn(B, C)
    other = copy.deepcopy(model)
    checkpoint_blocks(model, *SELECTED[selected][0])
    for each in (model, other):
        each(x).square().sum().backward()
    assert_same_bits([p.grad for p in model.parameters()], [p.grad for p in other.parameters()])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
def test_equal_blocks_with_other_budgets_have_graphs_of_their_own():
    x, held = torch.randn(B, C), {}
    for budget in (1.0, 0.0):
        model = network()
        compile_modules(model, budget)
        y = model(x)
        held[budget] = bytes_of_graph(y, (*model.parameters(), x))
        y.square().sum().backward()
    torch.compiler.reset()
    assert held[0.0] <= 4 * INPUTS < held[1.0]
