"""State dicts that fit a network under every rule."""

from collections.abc import Mapping

from torch import Tensor, nn


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights of any rule into a network of any rule.

    The vectors that ABA adds to the published parameters are ignored by other rules, and keep
    their initial values where the state dict has none.

    Raises:
        ValueError: a parameter is missing, unknown or of another shape, or no tensor.
    """
    if not all(isinstance(n, str) and isinstance(v, Tensor) for n, v in state_dict.items()):
        raise ValueError("the weights do not fit: the file holds other things than named tensors")
    wanted = model.state_dict()
    given = {
        name: value for name, value in state_dict.items() if not _is_aux(name) or name in wanted
    }
    missing = [name for name in wanted if name not in given and not _is_aux(name)]
    unknown = [name for name in given if name not in wanted]
    reshaped = [
        name for name in given if name in wanted and given[name].shape != wanted[name].shape
    ]
    for problem, names in (
        ("lacks", missing),
        ("has unknown", unknown),
        ("has another shape of", reshaped),
    ):
        if names:
            raise ValueError(
                f"the weights do not fit: the file {problem} {names[0]} ({len(names)} in all)"
            )
    model.load_state_dict(given, strict=False)


def _is_aux(name: str) -> bool:
    return name.rpartition(".")[2] == "aux"
