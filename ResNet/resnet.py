"""ResNet-18, 34, 50, 101 and 152 under every learning rule.

One definition serves all rules. With ``rule="bp"`` and ``lean="off"`` it is torchvision's ResNet
(stride 2 in the 3x3 convolution of a bottleneck) with torchvision's parameter names, so its
ImageNet weights load:

    model = build("resnet50", rule="ara", lean="exact")
    load_weights(model, torchvision.models.ResNet50_Weights.DEFAULT.get_state_dict())

Groups. Consecutive blocks with inputs of one shape form a stage: each block that changes the shape
closes one. (In a bottleneck network the very first block is such a stage of its own and always
learns by backpropagation.) Of the four stages that remain, stage i is cut into groups of
``ara_stride[i]`` blocks. The first block of a group is exact; the others apply the rule to their
first convolution and their projection: ARA with the group's input as auxiliary activation, ASA
and ABA with their own. A stride of 1 is backpropagation.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; groups as in Woo and
Jeon, ICLR 2023.
"""

from collections.abc import Callable, Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from aal import Conv2dABA, Conv2dARA, Conv2dASA
from aal.lean import relu_packed, replay
from aal.rules.groups import first_of_groups
from aal.rules.weights import load_weights

__all__ = ["MODELS", "BasicBlock", "Bottleneck", "ResNet", "build", "load_weights"]

RULES = ("bp", "ara", "aba", "asa")
LEAN = ("off", "exact")
STEMS = ("small", "medium", "large")
DEFAULT_ARA_STRIDE = (2, 2, 2, 2)

Convolution = Callable[..., nn.Module]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Args:
        in_channels: channels of the input.
        width: channels of both convolutions; the output has ``width * expansion``.
        stride: 1 or 2, of the first convolution.
        rule: ``nn.Conv2d`` or the layer of a rule, for the first convolution and the projection.
        lean: replay batch norm and ReLU in backward, and pack the last ReLU if ``packs_output``.
        gcp: replay 1x1 convolutions too.
        packs_output: nothing else keeps the output, so its ReLU had better keep bits.
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        rule: Convolution,
        lean: bool,
        gcp: bool,
        packs_output: bool,
    ):
        super().__init__()
        self.lean, self.gcp, self.packs_output = lean, gcp, packs_output
        self.exact, self.stride = rule is nn.Conv2d, stride
        self._add_layers(in_channels, width, stride, rule)
        out_channels = width * self.expansion
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            # An auxiliary projection gets an input that is cut down to the places that it reads.
            projection_stride = stride if self.exact else 1
            projection = rule(in_channels, out_channels, 1, projection_stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(out_channels))
        self.relu = nn.ReLU()

    def _add_layers(self, in_channels: int, width: int, stride: int, rule: Convolution) -> None:
        self.conv1 = rule(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor, aux: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: (N, C, H, W).
            aux: the group's activation, of the shape of ``x``; read by ARA only.
        """
        if not self.lean:
            return self.stock_forward(x, aux)
        branch = self._lean_branch(x, aux)
        branch += self._lean_shortcut(x, aux)
        return relu_packed(branch) if self.packs_output else F.relu(branch, inplace=True)

    def stock_forward(self, x: Tensor, aux: Tensor) -> Tensor:
        """The published block: PyTorch's layers, apart from the rule's convolutions."""
        branch = self._stock_branch(x, aux)
        if self.downsample is not None:
            projection, norm = self.downsample
            x = norm(_convolve(projection, *self._projection_inputs(x, aux)))
        branch += x
        return F.relu(branch, inplace=True)

    def _stock_branch(self, x: Tensor, aux: Tensor) -> Tensor:
        x = F.relu(self.bn1(_convolve(self.conv1, x, aux)), inplace=True)
        return self.bn2(self.conv2(x))

    def _lean_branch(self, x: Tensor, aux: Tensor) -> Tensor:
        return self.bn2(replay(_convolve(self.conv1, x, aux), self.bn1, self.relu, self.conv2))

    def _lean_shortcut(self, x: Tensor, aux: Tensor) -> Tensor:
        if self.downsample is None:
            return x
        projection, norm = self.downsample
        x, aux = self._projection_inputs(x, aux)
        if not self.gcp:
            return norm(_convolve(projection, x, aux))
        if not self.exact:
            x = x.clone()  # a view would keep the whole input; the copy is half of the output
        projected = _convolve(projection, x, aux)
        return replay(projected, norm, recompute=(projection, *_inputs(projection, x, x.detach())))

    def _projection_inputs(self, x: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
        if self.exact:
            return x, aux
        places = (..., slice(None, None, self.stride), slice(None, None, self.stride))
        return x[places], aux[places]


class Bottleneck(BasicBlock):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; arguments as ``BasicBlock``."""

    expansion = 4

    def _add_layers(self, in_channels: int, width: int, stride: int, rule: Convolution) -> None:
        self.conv1 = rule(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)

    def _stock_branch(self, x: Tensor, aux: Tensor) -> Tensor:
        x = F.relu(self.bn1(_convolve(self.conv1, x, aux)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return self.bn3(self.conv3(x))

    def _lean_branch(self, x: Tensor, aux: Tensor) -> Tensor:
        # An exact first convolution keeps x, from which its output can be had again.
        recompute = (self.conv1, x) if self.gcp and self.exact else None
        x = _convolve(self.conv1, x, aux)
        x = replay(x, self.bn1, self.relu, self.conv2, recompute=recompute)
        if self.gcp:
            return replay(x, self.bn2, self.relu, self.conv3, self.bn3)
        return self.bn3(replay(x, self.bn2, self.relu, self.conv3))


class ResNet(nn.Module):
    """A residual network; see the module's docstring.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        depths: number of blocks in layer1 to layer4.
        num_classes: outputs.
        in_channels: channels of the image.
        stem: "small" (3x3, stride 1), "medium" (3x3, stride 2) or "large" (7x7, stride 2, then a
            max pool of stride 2).
        rule: "bp", "ara", "aba" or "asa".
        ara_stride: blocks per group in each of the four stages.
        lean: "off", or "exact" to replay batch norm and ReLU in backward.
        gcp: replay the 1x1 convolutions and the stem too; needs ``lean="exact"``.

    Raises:
        ValueError: an argument that is not as described.
    """

    def __init__(
        self,
        block: type[BasicBlock],
        depths: Sequence[int],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        stem: str = "large",
        rule: str = "bp",
        ara_stride: Sequence[int] = DEFAULT_ARA_STRIDE,
        lean: str = "off",
        gcp: bool = False,
    ):
        super().__init__()
        for name, value, known in (
            ("stem", stem, STEMS),
            ("rule", rule, RULES),
            ("lean", lean, LEAN),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(known)}")
        if len(ara_stride) != 4 or min(ara_stride) < 1:
            raise ValueError(f"ara_stride needs four integers >= 1, got {list(ara_stride)}")
        if gcp and lean == "off":
            raise ValueError('gcp builds on lean="exact"; leave out lean="off"')
        self.lean, self.gcp = lean == "exact", gcp
        kernel, stride = {"small": (3, 1), "medium": (3, 2), "large": (7, 2)}[stem]
        self.conv1 = nn.Conv2d(in_channels, 64, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem == "large" else None
        self._add_blocks(block, depths, rule, ara_stride)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _add_blocks(
        self, block: type[BasicBlock], depths: Sequence[int], rule: str, ara_stride: Sequence[int]
    ) -> None:
        exact = _exact_blocks(block, depths, ara_stride if rule != "bp" else (1, 1, 1, 1))
        in_channels, number = 64, 0
        for i, depth in enumerate(depths):
            width = 64 * 2**i
            layer = nn.Sequential()
            for j in range(depth):
                followed_by_exact = number + 1 < len(exact) and exact[number + 1]
                layer.append(
                    block(
                        in_channels,
                        width,
                        stride=2 if i > 0 and j == 0 else 1,
                        rule=nn.Conv2d if exact[number] else _RULE_LAYERS[rule],
                        lean=self.lean,
                        gcp=self.gcp,
                        packs_output=not followed_by_exact,
                    )
                )
                in_channels, number = width * block.expansion, number + 1
            self.add_module(f"layer{i + 1}", layer)

    def blocks(self) -> Iterator[BasicBlock]:
        """All blocks in order."""
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            yield from layer

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_classes)."""
        return self._body(self._lean_stem(x) if self.lean else self._stock_stem(x))

    def stock_forward(self, x: Tensor) -> Tensor:
        """The published network, as far as its own layers go; see ``aal.memory.report``."""
        return self._body(self._stock_stem(x))

    def _stock_stem(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return x if self.maxpool is None else self.maxpool(x)

    def _lean_stem(self, x: Tensor) -> Tensor:
        recompute = (self.conv1, x) if self.gcp else None
        x = self.conv1(x)
        if self.maxpool is None:
            # The first block keeps the ReLU's output, so that a replay would save nothing.
            return F.relu(replay(x, self.bn1, recompute=recompute), inplace=True)
        return replay(x, self.bn1, self.relu, self.maxpool, recompute=recompute)

    def _body(self, x: Tensor) -> Tensor:
        for block in self.blocks():
            if block.exact:
                aux = x.detach()
            x = block(x, aux)
        return self.fc(x.mean((2, 3)))


MODELS: dict[str, tuple[type[BasicBlock], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


def build(name: str, **options) -> ResNet:
    """Make the network ``name``, a key of ``MODELS``; ``options`` are those of ``ResNet``."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(MODELS)}")
    return ResNet(*MODELS[name], **options)


def _asa(*args, **kwargs) -> Conv2dASA:
    return Conv2dASA(*args, relu=True, **kwargs)  # every input of a block comes from a ReLU


_RULE_LAYERS: dict[str, Convolution] = {"ara": Conv2dARA, "aba": Conv2dABA, "asa": _asa}


def _exact_blocks(
    block: type[BasicBlock], depths: Sequence[int], ara_stride: Sequence[int]
) -> list[bool]:
    """Which blocks, in order, are the first of their group."""
    changes_shape = [
        j == 0 and (i > 0 or block.expansion > 1) for i in range(4) for j in range(depths[i])
    ]
    return first_of_groups(changes_shape, ara_stride)


def _inputs(convolution: nn.Module, x: Tensor, aux: Tensor) -> tuple[Tensor, ...]:
    return (x, aux) if isinstance(convolution, Conv2dARA) else (x,)


def _convolve(convolution: nn.Module, x: Tensor, aux: Tensor) -> Tensor:
    return convolution(*_inputs(convolution, x, aux))
