"""The Learning Indicator: how well an auxiliary activation stands in for the true one."""

from torch import Tensor


def learning_indicator(h: Tensor, r: Tensor, *, start_dim: int = 1) -> Tensor:
    """Return ``r . (2h - r) / |h|^2 = 1 - |h - r|^2 / |h|^2``.

    1 means ``r = h``; a positive value means that ``r`` is closer to ``h`` than zero is, the
    paper's condition for a step that lowers the loss; ``r = 0`` gives 0.

    Args:
        h: the activation that the weight multiplies, (N, ...).
        r: what stands in for it in the weight gradient; broadcast to the shape of ``h``.
        start_dim: first dimension that is summed over. 1 gives one value per sample (the paper's
            choice for convolutions), -1 one per row (its choice for linear layers).

    Returns:
        Tensor of the dimensions of ``h`` before ``start_dim``, at least float32.

    Source: Woo and Jeon, ICLR 2023, the Learning Indicator; as in their release, 1e-6 is added to
    the denominator, which makes the value of an all-zero ``h`` finite.
    """
    if h.dtype.itemsize < 4:
        h, r = h.float(), r.float()
    dims = tuple(range(start_dim % h.dim(), h.dim()))
    return (r * (2 * h - r)).sum(dims) / (h.square().sum(dims) + 1e-6)
