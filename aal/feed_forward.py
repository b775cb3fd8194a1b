"""The feed-forward part of a transformer or mixer block, under every rule and lean mode."""

from torch import Tensor, nn

from aal.lean import CodedActivation, PackedReLU, activation_coded, replay
from aal.method import Method
from aal.rules.asa import LinearASA
from aal.rules.signed import addition_of, in_turn

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class FeedForward(nn.Module):
    """``fc2(dropout(activation(fc1(x))))``, then dropout.

    What it keeps, in values per token and hidden unit (b is the bits of a value):

    ============  ===================================================================
    lean off      the inputs of fc1, of the activation (ReLU: its output) and of fc2,
                  each a full tensor, 1 bit or nothing for a layer under ASA or ABA
    lean exact    the input of the layers before fc1, and the input of the activation;
                  if fc2 has a rule and the activation is a ReLU, 1 bit instead
    exact, gcp    the input of the layers before fc1
    lean approx   the input of the layers before fc1, a code of 2 bits (ReLU: 1), which
                  is also all that fc2 under ASA keeps; fc2's input under bp
    ============  ===================================================================

    Each dropout adds its mask, 1 bit per value in the lean modes. A second activation function
    adds its input; 1 bit for ReLU in the lean modes, 2 for others under lean approx.

    Args:
        width, hidden: features of input and output, and between the layers.
        activation: "relu", "gelu" or "silu".
        method: rule and lean mode.
        levels: of fc1 and fc2, see ``aal.rules.placement``.
        dropout: probability.
        is_closed: a second activation function follows fc2.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: str,
        method: Method,
        *,
        levels: tuple[int, int] = (2, 1),
        dropout: float = 0.0,
        is_closed: bool = False,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"unknown activation {activation!r}; choose from {known}")
        self.method = method
        self.fc1 = method.linear(levels[0], width, hidden)
        self.act = ACTIVATIONS[activation]()
        self.drop1 = nn.Dropout(dropout)
        self.fc2 = method.linear(levels[1], hidden, width, after=self.act)
        self.act2 = self._closing(activation) if is_closed else nn.Identity()
        self.drop2 = method.dropout(dropout)

    def _closing(self, activation: str) -> nn.Module:
        if self.method.is_lean and activation == "relu":
            return PackedReLU()
        stock = ACTIVATIONS[activation]()
        if self.method.lean == "approx":
            return CodedActivation(stock, self.method.derivative)
        return stock

    def forward(self, x: Tensor, *before: nn.Module) -> Tensor:
        """Apply the layers ``before`` fc1 (a norm), whose output need not be kept, and the rest."""
        if not self.method.is_lean:
            y = in_turn(x, *before, self.fc1, self.act, self.drop1, self.fc2)
            return self.drop2(self.act2(y))
        if self.method.gcp and self.method.lean == "exact":
            y = replay(x, *before, self.fc1, self.act, self.drop1, self.fc2)
        else:
            # Alone, fc1 keeps less than a chain if it has a rule, and the same if not.
            y = self._second_half(replay(x, *before, self.fc1) if before else self.fc1(x))
        return self.drop2(self.act2(y))

    def stock_forward(self, x: Tensor, *before: nn.Module) -> Tensor:
        """Layer by layer; see ``aal.memory.report``."""
        for layer in before:
            x = layer(x)
        y = self.fc2(self.drop1(self.act(self.fc1(x))))
        return self.drop2(self.act2(y))

    def _second_half(self, x: Tensor) -> Tensor:
        reads_input = type(self.fc2) is nn.Linear
        one_bit_does = isinstance(self.act, nn.ReLU) and not reads_input
        if self.method.lean == "exact" and not one_bit_does:
            return replay(x, self.act, self.drop1, self.fc2)
        dropout = self.drop1.p if self.training else 0.0
        options = {"derivative": self.method.derivative, "dropout": dropout}
        if not isinstance(self.fc2, LinearASA):
            return self.fc2(activation_coded(x, self.act, **options)[0])
        return self.fc2(*activation_coded(x, self.act, addition=addition_of(self.fc2), **options))
