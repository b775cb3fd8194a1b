"""Groups of residual blocks, which share an activation under ARA.

Consecutive blocks with inputs of one shape form a stage: each block that changes the shape closes
one. (In a bottleneck network the very first block is such a stage of its own and always learns by
backpropagation.) Each stage is cut into groups of as many blocks as the user says, and the first
block of a group is exact.

Source: Woo and Jeon, ICLR 2023.
"""

from collections.abc import Sequence


def number_of_stages(changes_shape: Sequence[bool]) -> int:
    """How many stages the blocks form, apart from the first block of a bottleneck network."""
    return 1 + sum(changes_shape[1:])


def first_of_groups(changes_shape: Sequence[bool], stride: Sequence[int]) -> list[bool]:
    """Which blocks, in order, are the first of their group.

    Args:
        changes_shape: of each block, does its output have another shape than its input?
        stride: blocks per group in each stage; 1 is backpropagation.
    """
    changes, firsts = list(changes_shape), []
    if changes[0]:  # the first block of a bottleneck network, before the stages
        firsts, changes = [True], changes[1:]
    stage, place = 0, 0
    for closes_stage in changes:
        firsts.append(place % stride[stage] == 0)
        stage, place = (stage + 1, 0) if closes_stage else (stage, place + 1)
    return firsts
