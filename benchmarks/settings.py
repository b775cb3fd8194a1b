"""The networks of the speed and memory benchmarks, and every setting that takes turns in them."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from alternatives import (
    ATTENTION,
    CONVOLUTIONS,
    checkpoint_blocks,
    compile_modules,
    keeping,
    keeping_attention_and_every_second_product,
)
from torch import Tensor, nn
from torchvision.models import resnet50

import aal

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "ViT"), str(ROOT / "ResNet")]

import resnet  # noqa: E402
import vit  # noqa: E402

OURS, ALTERNATIVE = "ours", "alternative"
PLAIN = "plain"  # PyTorch's layers and nothing else: what all settings are compared with


@dataclass
class Step:
    """Forward and backward pass of one setting; the optimiser is the same for everybody."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    after: Callable[[], None] = lambda: None  # called when a step is over
    is_compiled: bool = False

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The forward pass."""
        with self.around():
            return F.cross_entropy(self.model(images), labels)

    def __call__(self) -> None:
        self.loss(self.images, self.labels).backward()
        self.model.zero_grad()
        self.after()

    def seconds(self) -> float:
        """Time of one step, from when the device has nothing to do until it has nothing left."""
        self._wait()
        begin = time.perf_counter()
        self()
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self.images.is_cuda:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Network:
    """A network and how it is trained.

    Args:
        name: for people.
        build: this project's network, by the options of its method.
        stock: the network of PyTorch's layers that a user would train otherwise.
        blocks: of either, what is checkpointed.
        compiled: of either, what is compiled as one graph each.
        batch, image_size, classes: images per step, pixels per side, and outputs.
        dtype, memory_format: of parameters and images, in all settings.
    """

    name: str
    build: Callable[..., nn.Module]
    stock: Callable[[], nn.Module]
    blocks: Callable[[nn.Module], Sequence[nn.Module]]
    compiled: Callable[[nn.Module], Sequence[nn.Module]]
    batch: int
    image_size: int
    classes: int
    dtype: torch.dtype
    memory_format: torch.memory_format = torch.contiguous_format

    def random_batch(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        shape = (batch, 3, self.image_size, self.image_size)
        images = torch.randn(shape, dtype=self.dtype, device=device)
        labels = torch.randint(self.classes, (batch,), device=device)
        return images.contiguous(memory_format=self.memory_format), labels

    def prepared(self, make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
        """A new model on its device, in its dtype and memory format."""
        with device:
            model = make()
        return model.to(dtype=self.dtype, memory_format=self.memory_format)


Make = Callable[[Network, Tensor, Tensor], Step]


class Setting(NamedTuple):
    """One row of a table.

    Attributes:
        name: for people.
        group: ``OURS`` or ``ALTERNATIVE``.
        make: its step, for a network and a batch on the device.
    """

    name: str
    group: str
    make: Make


def ours(
    name: str,
    compressor: Mapping[str, Any] | None = None,
    is_compiled: bool = False,
    **options: Any,
) -> Setting:
    """A setting of this project: options of its networks, and arguments of ``aal.compress``."""

    def make(network: Network, images: Tensor, labels: Tensor) -> Step:
        model = network.prepared(functools.partial(network.build, **options), images.device)
        step = Step(model, images, labels, is_compiled=is_compiled)
        if compressor is not None:
            session = aal.compress(**compressor, model=model)
            step.around, step.after = lambda: session, session.step
        if is_compiled:
            compile_modules(network.compiled(model))
        return step

    return Setting(name, OURS, make)


def alternative(name: str, change: Callable[[Network, Step], None] = lambda *_: None) -> Setting:
    """A setting of PyTorch alone: ``change`` is done to the step of PyTorch's layers."""

    def make(network: Network, images: Tensor, labels: Tensor) -> Step:
        step = Step(network.prepared(network.stock, images.device), images, labels)
        change(network, step)
        return step

    return Setting(name, ALTERNATIVE, make)


def checkpointed(name: str, contexts: Callable[[], tuple[Any, Any]] | None = None) -> Setting:
    """Every block in a checkpoint, with or without operations that are kept."""

    def change(network: Network, step: Step) -> None:
        options = () if contexts is None else (contexts,)
        checkpoint_blocks(network.blocks(step.model), *options)

    return alternative(name, change)


def compiled(name: str, budget: float = 1.0) -> Setting:
    """``torch.compile`` with a budget."""

    def change(network: Network, step: Step) -> None:
        compile_modules(network.compiled(step.model), budget)
        step.is_compiled = True

    return alternative(name, change)


def _saves_on_cpu(network: Network, step: Step) -> None:
    step.around = functools.partial(torch.autograd.graph.save_on_cpu, pin_memory=True)


FOUR_BIT = {"method": "adaptive", "bits": 4}
SAVE_ON_CPU = alternative("save_on_cpu", _saves_on_cpu)
CHECKPOINT = checkpointed("checkpoint")
ASA1_APPROX_FOUR_BIT = ours(
    "asa1, lean approx + adaptive 4 bit", FOUR_BIT, rule="asa1", lean="approx"
)
# In the order of their importance, for a run whose time is short.
LARGE_VIT = (
    alternative(PLAIN),
    ours("bp, lean exact", lean="exact"),
    ours("asa1, lean approx", rule="asa1", lean="approx"),
    ASA1_APPROX_FOUR_BIT,
    ours("asa4", rule="asa4"),
    CHECKPOINT,
    checkpointed("selective checkpoint: attention", keeping(*ATTENTION)),
    checkpointed(
        "selective checkpoint: attention, every second product",
        keeping_attention_and_every_second_product,
    ),
    compiled("torch.compile"),
    compiled("torch.compile, budget 0.4", 0.4),
    ours("asa1, lean approx, compiled", is_compiled=True, rule="asa1", lean="approx"),
    SAVE_ON_CPU,
    compiled("torch.compile, budget 0.7", 0.7),
    ours("bp, lean exact, compiled", is_compiled=True, lean="exact"),
    compiled("torch.compile, budget 0.2", 0.2),
)
SMALL_VIT = (
    alternative(PLAIN),
    ours("asa4", rule="asa4"),
    ours("asa4, lean exact", rule="asa4", lean="exact"),
    ours("bp, lean exact", lean="exact"),
    ours("bp, lean exact + gcp", lean="exact", gcp=True),
    ours("asa1, lean approx", rule="asa1", lean="approx"),
    ASA1_APPROX_FOUR_BIT,
    CHECKPOINT,
    checkpointed("selective checkpoint: attention", keeping(*ATTENTION)),
    checkpointed(
        "selective checkpoint: attention, every second product",
        keeping_attention_and_every_second_product,
    ),
    compiled("torch.compile"),
    compiled("torch.compile, budget 0.4", 0.4),
)
_ARA = {"rule": "ara", "ara_stride": (3, 4, 6, 2), "lean": "exact"}
EAGER_RESNET = (
    alternative(PLAIN),
    ours("ara (3,4,6,2), lean exact", **_ARA),
    ours("ara (3,4,6,2), lean exact + gcp", gcp=True, **_ARA),
    ours(
        "ara (2,2,2,2), lean exact + adaptive 4 bit",
        FOUR_BIT,
        rule="ara",
        ara_stride=(2, 2, 2, 2),
        lean="exact",
    ),
    CHECKPOINT,
    checkpointed("selective checkpoint: convolutions", keeping(*CONVOLUTIONS)),
)
RESNET = (
    *EAGER_RESNET,
    compiled("torch.compile"),
    SAVE_ON_CPU,
    compiled("torch.compile, budget 0.5", 0.5),
    ours("ara (3,4,6,2), lean exact, compiled", is_compiled=True, **_ARA),
)


def vision_transformer(
    name: str, *, batch: int, dtype: torch.dtype, classes: int = 1000, **sizes: Any
) -> Network:
    """A ViT whose blocks are checkpointed, and compiled, one by one.

    Args:
        name: a key of ``vit.MODELS``.
        batch, dtype, classes: see ``Network``.
        sizes: fields of ``vit.Architecture`` that differ from the model's.
    """
    build = functools.partial(vit.build, name, num_classes=classes, dropout=0.0, **sizes)
    return Network(
        name,
        build=build,
        stock=build,
        blocks=lambda model: list(model.blocks),
        compiled=lambda model: list(model.blocks),
        batch=batch,
        image_size=sizes.get("image_size", vit.MODELS[name].image_size),
        classes=classes,
        dtype=dtype,
    )


def residual_network(
    *,
    batch: int,
    dtype: torch.dtype,
    image_size: int = 224,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Network:
    """ResNet-50, torchvision's as the alternative. Its blocks differ: it is compiled as a whole."""
    return Network(
        "ResNet-50",
        build=functools.partial(resnet.build, "resnet50"),
        stock=resnet50,
        blocks=lambda model: [
            block
            for layer in (model.layer1, model.layer2, model.layer3, model.layer4)
            for block in layer
        ],
        compiled=lambda model: [model],
        batch=batch,
        image_size=image_size,
        classes=1000,
        dtype=dtype,
        memory_format=memory_format,
    )


def comparisons(device: torch.device) -> list[tuple[Network, tuple[Setting, ...]]]:
    """The networks of a device, and the settings that take turns in each.

    On CPU they are small and in float32; compiling ResNet-50 there takes minutes, and moving
    tensors to the host's memory moves nothing.
    """
    if device.type == "cuda":
        large = vision_transformer("ViT-L_16", batch=128, dtype=torch.bfloat16)
        residual = residual_network(
            batch=256, dtype=torch.bfloat16, memory_format=torch.channels_last
        )
        return [(large, LARGE_VIT), (residual, RESNET)]
    small = vision_transformer("vit", batch=32, dtype=torch.float32, classes=10)
    return [(small, SMALL_VIT), (residual_network(batch=8, dtype=torch.float32), EAGER_RESNET)]
