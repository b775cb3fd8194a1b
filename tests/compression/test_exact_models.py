"""The exact method on whole networks: gradients bit for bit, in less memory."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hazard_models import Residual, check_model, codecs, resnet, session_of, vit
from torch import Tensor, nn

from aal.memory import saved_bytes


class PreActivation(nn.Module):
    """Norm and ReLU come before each convolution (He et al., ECCV 2016)."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(y), inplace=True))


class Gated(nn.Module):
    """Inverted bottleneck of EfficientNet, with squeeze and excitation."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.expand = nn.Conv2d(channels, 2 * channels, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(2 * channels), nn.BatchNorm2d(channels)
        self.squeeze, self.excite = nn.Conv2d(2 * channels, 4, 1), nn.Conv2d(4, 2 * channels, 1)
        self.project = nn.Conv2d(2 * channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm1(self.expand(x)), inplace=True)
        gate = self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))).sigmoid()
        return x + self.norm2(self.project(y * gate))


class Simple(nn.Module):
    """Norm without weights, and an MLP with a given activation function."""

    def __init__(self, activation: nn.Module, norm: nn.Module):
        super().__init__()
        self.norm, self.activation = norm, activation
        self.layers = nn.Sequential(nn.Linear(16, 48), activation, nn.Linear(48, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(self.norm(x))


def with_stem(*blocks: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, nn.Conv2d(8, 5, 1))


def with_running_mean() -> nn.Sequential:
    """Batch norms that average over all batches alike."""
    model = resnet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    return model


def without_running_statistics() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.ReLU(),
        nn.Conv2d(8, 5, 1),
    )


def encoder(**options) -> nn.Sequential:
    layers = (
        nn.TransformerEncoderLayer(16, 2, 32, 0.2, batch_first=True, **options) for _ in range(2)
    )
    return nn.Sequential(*layers, nn.Linear(16, 5))


IMAGES = {
    "ResNet": resnet,
    "residual": lambda: with_stem(Residual(8), Residual(8, stride=2)),
    "running mean": with_running_mean,
    "no running statistics": without_running_statistics,
    "pre-activation": lambda: with_stem(PreActivation(), PreActivation()),
    "EfficientNet": lambda: with_stem(Gated(), Gated()),
}
TOKENS = {
    "ViT": vit,
    "ViT with dropout": lambda: vit(0.2),
    "encoder": lambda: encoder(activation=F.gelu),
    "encoder, norm first": lambda: encoder(activation=F.gelu, norm_first=True),
    "encoder with ReLU": encoder,
    "GELU by tanh": lambda: Simple(nn.GELU("tanh"), nn.LayerNorm(16)),
    "SiLU": lambda: Simple(nn.SiLU(), nn.LayerNorm(16)),
    "norm without bias": lambda: Simple(nn.GELU(), nn.LayerNorm(16, bias=False)),
    "norm without weights": lambda: Simple(nn.GELU(), nn.LayerNorm(16, elementwise_affine=False)),
    "norm of two dimensions": lambda: Simple(nn.GELU(), nn.LayerNorm((6, 16))),
    "root mean square": lambda: Simple(nn.GELU(), nn.RMSNorm(16)),
    "group norm": lambda: Simple(nn.GELU(), nn.GroupNorm(2, 6)),
}
# Nothing there can be computed again: dropout follows every activation function.
NO_RECIPE = ("encoder with ReLU",)
INPUTS = {name: (8, 3, 16, 16) for name in IMAGES} | {name: (8, 6, 16) for name in TOKENS}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", INPUTS)
def test_gradients_are_those_of_plain_training(name, dtype, mode, device):
    model = (IMAGES | TOKENS)[name]().to(device, dtype).train(mode == "train")
    for parameter in model.parameters():  # norms too: their initial weights would hide mistakes
        nn.init.uniform_(parameter, -0.5, 0.5)
    check_model("exact", model, torch.randn(INPUTS[name], dtype=dtype, device=device))


@pytest.mark.parametrize("name", [name for name in INPUTS if name not in NO_RECIPE])
def test_less_memory_is_held(name):
    model, x = (IMAGES | TOKENS)[name](), torch.randn(INPUTS[name])
    session = session_of("exact", model)

    def forward(x: Tensor) -> Tensor:
        with session:
            return model(x)

    assert saved_bytes(forward, x) < saved_bytes(model, x)
    assert "replay" in codecs(session)


def test_channels_last(device):
    model = resnet().to(device, memory_format=torch.channels_last)
    x = torch.randn(4, 3, 16, 16, device=device).to(memory_format=torch.channels_last)
    assert "replay" in codecs(check_model("exact", model, x))


def test_norms_in_evaluation_within_a_model_that_trains():
    model = resnet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    assert "replay" in codecs(check_model("exact", model, torch.randn(4, 3, 16, 16)))


def test_a_weight_that_two_layers_share():
    model = vit()
    model[1].expand.weight = model[0].expand.weight
    model[1].norm1 = model[0].norm1  # one module twice
    assert "replay" in codecs(check_model("exact", model, torch.randn(8, 6, 16)))


def test_a_copy_of_a_model_has_a_session_of_its_own():
    model, x = vit(), torch.randn(8, 6, 16)
    check_model("exact", model, x)
    assert "replay" in codecs(check_model("exact", copy.deepcopy(model), x))


def test_statistics_that_move_between_forward_and_backward():
    """A pass in training moves the statistics that one in evaluation was made with."""
    model, x = resnet(), torch.randn(2, 4, 3, 16, 16)
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def gradients_of(method: str) -> list[Tensor]:
        model.load_state_dict(state)
        with session_of(method, model):
            model.eval()
            y = model(x[0])
            model.train()
            model(5 * x[1] + 3)
        # The weights of the last layers, before which no norm has been gone through backward.
        return list(torch.autograd.grad(y.sum(), list(model[5].conv2.parameters())))

    expected = gradients_of("none")
    for one, other in zip(gradients_of("exact"), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["layer norm", "batch norm"])
def test_a_norms_weight_in_a_function_of_another_epsilon(kind):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(16) if kind == "layer norm" else nn.BatchNorm1d(16)
            self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x, norm = self.first(x), self.norm
            if kind == "layer norm":
                return self.last(F.layer_norm(x, (16,), norm.weight, norm.bias, eps=0.5))
            statistics = norm.running_mean, norm.running_var
            return self.last(F.batch_norm(x, *statistics, norm.weight, norm.bias, eps=0.5))

    check_model("exact", Other().eval(), torch.randn(40, 16))
