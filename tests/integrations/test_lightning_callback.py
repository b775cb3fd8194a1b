"""The callback for the Trainer of Lightning, with a network of two layers."""

from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import aal
from aal.memory import MIB

pl = pytest.importorskip("lightning.pytorch")
from aal.integrations.lightning import AALCallback  # noqa: E402

pytestmark = [
    # Lightning names a class of PyTorch's that newer ones have another for.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    # It asks for more processes to load four small batches.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


class Module(pl.LightningModule):
    def __init__(self, dropout: float = 0.0, failing: type[BaseException] | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.failing = failing
        self.net = nn.Sequential(
            nn.Linear(32, 64), nn.GELU(), nn.Dropout(dropout), nn.Linear(64, 2)
        )

    def forward(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.failing is not None:
            raise self.failing
        return self.forward(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 32, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=64)


def fit(module: pl.LightningModule, *callbacks: Any, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, batches())
    return trainer


def is_left_alone(module: nn.Module) -> bool:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return "training_step" not in vars(module) and hooks is None


def test_training_that_nothing_is_chosen_for_is_as_without_the_callback():
    weights = []
    for callbacks in ((), (AALCallback("bp", "off"),)):
        module = Module(dropout=0.5)
        fit(module, *callbacks)
        weights.append(module.state_dict())
    assert_same_bits(*weights)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_weights_are_those_of_a_loop_that_enters_the_compressor_itself(accumulation: int):
    options = {"bits": 2, "smallest": 256}
    callback = AALCallback("asa", "off", "adaptive", options, indicator_every=1, include="*.3")
    module = Module()
    trainer = fit(module, callback, accumulate_grad_batches=accumulation)

    model = aal.convert(Module(), "asa", include="*.3")
    optimizer = model.configure_optimizers()
    act = aal.compress("adaptive", model, **options)
    for number, batch in enumerate(batches(), 1):
        with act:
            loss = model(batch) / accumulation
        loss.backward()
        if number % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
            act.step()
        if number == 2 * accumulation:
            break
    assert_same_bits(module.state_dict(), model.state_dict())
    logged = trainer.logged_metrics
    assert logged["aal/saved_mib"].item() == pytest.approx(act.report().stored_bytes / MIB)
    assert logged["aal/li_median"] <= 1 and 0 <= logged["aal/li_positive"] <= 1
    assert is_left_alone(module)


def test_vectors_of_aba_learn():
    module, drawn = Module(), []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            drawn.append(pl_module.net[3].aux.detach().clone())

    fit(module, AALCallback("aba", include="net.3"), Look())
    assert (module.net[3].aux != drawn[0]).any()


FAILURES: dict[type[BaseException], type[BaseException]] = {
    RuntimeError: RuntimeError,
    KeyboardInterrupt: SystemExit,  # Lightning ends the program
}


@pytest.mark.parametrize("error", FAILURES)
def test_nothing_stays_behind_when_training_breaks_off(error: type[BaseException]):
    module = Module(failing=error)
    with pytest.raises(FAILURES[error]):
        fit(module, AALCallback("bp", "off", "adaptive"))
    assert is_left_alone(module)


def test_wrong_arguments_are_refused_at_once():
    with pytest.raises(ValueError, match="unknown rule 'asa5'"):
        AALCallback("asa5")
