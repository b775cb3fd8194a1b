"""Weights that the authors of ViT and MLP-Mixer published as NumPy archives.

Each ``*_from`` takes the arrays of one layer out of an archive and returns them as PyTorch shapes
them; a layer that the archive lacks is a ``ValueError``.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read_archive(path: Path | str) -> dict[str, Tensor]:
    """Read the arrays of an ``.npz`` file as float32.

    Raises:
        ValueError: no such file, or not an archive of real numbers.
    """
    try:
        # np.load leaves a file open that it cannot read, if it opened the file itself
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: _float32(archive[name]) for name in archive.files}
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except Exception as error:  # zipfile, zlib and NumPy raise many types for damaged files
        # Their text is left out: NumPy's advises to load what may run code.
        raise ValueError(f"{path} is damaged or not an archive of real numbers (.npz)") from error


def _float32(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32, casting="same_kind"))


def linear_from(arrays: dict[str, Tensor], name: str, *, input_dims: int = 1) -> dict[str, Tensor]:
    """Weight (D, C) and bias of a dense layer.

    Its kernel there has ``input_dims`` dimensions of inputs, then those of outputs; attention has
    two where it counts heads and features of a head apart.
    """
    kernel = array_from(arrays, f"{name}/kernel").flatten(0, input_dims - 1).flatten(1)
    return {"weight": kernel.T, "bias": array_from(arrays, f"{name}/bias").flatten()}


def convolution_from(arrays: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Weight (D, C, K, L) and bias of a convolution, whose kernel is (K, L, C, D) there."""
    kernel = array_from(arrays, f"{name}/kernel").permute(3, 2, 0, 1)
    return {"weight": kernel, "bias": array_from(arrays, f"{name}/bias")}


def norm_from(arrays: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Weight and bias of a layer norm."""
    return {
        "weight": array_from(arrays, f"{name}/scale"),
        "bias": array_from(arrays, f"{name}/bias"),
    }


def prefixed(prefix: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a layer under its name in a network."""
    return {f"{prefix}.{name}": value for name, value in parameters.items()}


def array_from(arrays: dict[str, Tensor], name: str) -> Tensor:
    """One array by its name."""
    if name not in arrays:
        raise ValueError(f"the weights do not fit: the archive lacks {name}")
    return arrays.pop(name)


def refuse_rest(arrays: dict[str, Tensor]) -> None:
    """Raise ``ValueError`` if more than the head, which is not wanted, is left in an archive."""
    rest = sorted(n for n in arrays if not n.startswith(("head/", "pre_logits/")))
    if rest:
        raise ValueError(
            f"the weights do not fit: the archive has unknown {rest[0]} ({len(rest)} in all)"
        )
