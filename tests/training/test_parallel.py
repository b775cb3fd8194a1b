"""One network in two processes, as copies (DDP) or shares (FSDP2), beside one process."""

import argparse
import copy
import itertools
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlp_mixer
import pytest
import resnet
import torch
import torch.distributed as dist
import transformers
import vit
from helpers import assert_same_bits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.nn.parallel import DistributedDataParallel

from aal.conversion.convert import convert
from aal.indicator import IndicatorRecorder
from aal.training.classification import Classification
from aal.training.command_line import UserError
from aal.training.compression_flags import Compression
from aal.training.devices import Worker
from aal.training.evaluation import evaluate
from aal.training.loop import Trainer
from aal.training.parallel import KINDS, blocks_of, check_parallel, parallelised, whole

ALONE = Worker(torch.device("cpu"))
STEPS, BATCH = 3, 8
SIZES = {"num_classes": 3, "image_size": 8, "patch_size": 4, "width": 8, "depth": 2}


def small_vit(**changes: Any) -> nn.Module:
    return vit.build("vit", heads=2, mlp_width=12, **SIZES, **changes)


def small_mixer(**changes: Any) -> nn.Module:
    widths = {"token_width": 6, "channel_width": 12}
    return mlp_mixer.build("mlp_mixer", **widths, **SIZES, **changes)


def small_resnet() -> nn.Module:
    method = {"rule": "ara", "lean": "exact", "gcp": True}
    return resnet.ResNet(resnet.BasicBlock, (2, 1, 1, 1), num_classes=3, stem="small", **method)


class SmallBert(nn.Module):
    """Reads the pixels of an image as tokens."""

    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"intermediate_size": 12, "vocab_size": 20, "num_labels": 3}
        config = transformers.BertConfig(**sizes)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        self.bert = transformers.BertForSequenceClassification(config)
        convert(self.bert, rule="asa1", lean="exact")

    def forward(self, images: Tensor) -> Tensor:
        return self.bert((images[:, 0, 0].sigmoid() * 20).long()).logits


# Networks that learn alike in any number of processes.
EVEN = {
    "vit-asa4": partial(small_vit, rule="asa4", lean="exact"),
    "vit-aba2-gcp": partial(small_vit, rule="aba2", lean="exact", gcp=True),
    "vit-asa1-approx": partial(small_vit, rule="asa1", lean="approx", activation="gelu"),
    "mixer-asa3": partial(small_mixer, rule="asa3", lean="exact"),
    "bert-asa1": SmallBert,
}
COMPRESSORS = ("exact", "actnn", "mesa")
OPTIMIZERS = {
    # Rounding errors alone move the biases of keys, and would far with a small epsilon.
    "adam": partial(torch.optim.Adam, lr=0.01, eps=0.01),
    "momentum": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "sgd": partial(torch.optim.SGD, lr=0.01),  # which keeps nothing
}
BEGUN = list(itertools.product(OPTIMIZERS, (0, 1)))  # by an optimiser, for so many epochs


def batches(worker: Worker = ALONE) -> list[tuple[Tensor, Tensor]]:
    """This process's share of every step."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(STEPS, BATCH, 3, 8, 8, generator=generator)
    labels = torch.randint(3, (STEPS, BATCH), generator=generator)
    size = BATCH // worker.world_size
    own = slice(worker.rank * size, (worker.rank + 1) * size)
    return [(x[own], y[own]) for x, y in zip(images, labels, strict=True)]


def trainer_of(
    build: Callable[[], nn.Module],
    kind: str = "ddp",
    worker: Worker = ALONE,
    compressor: str = "none",
    optimizer: str = "adam",
    **options: Any,
) -> Trainer:
    torch.manual_seed(0)
    model = build()
    compress = Compression(compressor).sessions_for(model, 0)
    recorder = IndicatorRecorder(model, worker.rank, worker.world_size)
    model = parallelised(model, kind, worker, frees_blocks=build is not SmallBert)
    options = {"recorder": recorder, "compress": compress, "max_grad_norm": 0.5} | options
    steps = OPTIMIZERS[optimizer](model.parameters())
    return Trainer(Classification(), model, steps, lambda step: 0.01, worker, **options)


def learned(trainer: Trainer) -> dict[str, Any]:
    """What comes of an epoch; complete in the first process."""
    worker, model = trainer.worker, trainer.model
    model = model.module if isinstance(model, DistributedDataParallel) else model
    loader = batches(worker)
    loss = trainer.train_epoch(loader, "")["loss"]
    trainer.end_epoch()
    worker.share_buffers(model)
    state = trainer.state()
    indicators = trainer.recorder.take(worker.gather_objects)
    uneven = loader[: STEPS - worker.rank]  # two processes have other numbers of batches
    if worker.world_size == 1:  # the same images
        uneven = [*loader[:-1], Classification().first(loader[-1], BATCH // 2)]
    with whole(model):
        scores = evaluate(Classification(), model, uneven, worker, "off", "")
    return {"state": state, "loss": loss, "indicators": indicators, "scores": scores}


def learn_together(rank: int, folder: Path) -> None:
    """All that two processes do in these tests; to start them takes longest."""
    torch.set_num_threads(1)
    place = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    worker = Worker(torch.device("cpu"), rank, 2)
    found: dict[Any, Any] = {}
    for kind in KINDS:
        trainers = {name: partial(trainer_of, build) for name, build in EVEN.items()}
        trainers["resnet-ara"] = partial(trainer_of, small_resnet)
        trainers["fp16"] = partial(trainer_of, small_vit, amp="fp16")
        trainers["accumulation"] = partial(trainer_of, small_vit, accumulation=2)
        for compressor in COMPRESSORS:
            trainers[compressor] = partial(trainer_of, EVEN["vit-asa4"], compressor=compressor)
        for name, make in trainers.items():
            found[kind, name] = learned(make(kind, worker))
        for begun, state in torch.load(folder / "begun.pth", weights_only=True).items():
            trainer = trainer_of(EVEN["vit-asa4"], kind, worker, optimizer=begun[0])
            trainer.load_state(state)
            found[kind, "loaded", *begun] = copy.deepcopy(trainer.state())
            found[kind, "continued", *begun] = learned(trainer)
        trainer = trainer_of(EVEN["vit-asa4"], kind, worker)
        found[kind, "saved"] = trainer.measure_saved_mib(batches(worker))
    if worker.is_main:
        torch.save(found, folder / "found.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What comes of two processes, by kind and name."""
    folder = tmp_path_factory.mktemp("together")
    begun = {}
    for optimizer, epochs in BEGUN:
        trainer = trainer_of(EVEN["vit-asa4"], optimizer=optimizer)
        for _ in range(epochs):
            learned(trainer)
        begun[optimizer, epochs] = trainer.state()
    torch.save(begun, folder / "begun.pth")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=learn_together, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return torch.load(folder / "found.pth", weights_only=True)


def tensors_of(state: dict[str, Any]) -> dict[str, Any]:
    """Of the model and of its optimiser, by name."""
    return {"model": dict(state["model"]), "optimizer": state["optimizer"].get("state", {})}


def assert_like(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """All but the random state, to 1e-6."""
    ours, theirs = (run | {"state": tensors_of(run["state"])} for run in (actual, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EVEN)
def test_two_processes_learn_as_one(together: dict, kind: str, name: str):
    assert_like(together[kind, name], learned(trainer_of(EVEN[name])))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_weights_differ_by_rounding_errors(together: dict, kind: str, figures: dict):
    losses, weights = [], []
    for name, build in EVEN.items():
        ours, theirs = together[kind, name], learned(trainer_of(build))
        losses += [abs(ours["loss"] - theirs["loss"])]
        losses += [abs(ours["scores"]["loss"] - theirs["scores"]["loss"])]
        states = ours["state"]["model"], theirs["state"]["model"]
        pairs = zip(*(state.values() for state in states), strict=True)
        weights += [float((one - other).abs().max()) for one, other in pairs]
    assert max(losses) <= 1e-6 and max(weights) <= 1e-6
    figures.setdefault("two processes", {})[kind] = {
        "largest difference of losses": max(losses),
        "largest difference of weights": max(weights),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_batches_add_up_in_all_processes(together: dict, kind: str):
    assert_like(together[kind, "accumulation"], learned(trainer_of(small_vit, accumulation=2)))


@pytest.mark.parametrize("kind", KINDS)
def test_exact_compression_leaves_everything_as_it_is(together: dict, kind: str):
    assert_like(together[kind, "exact"], together[kind, "vit-asa4"])


@pytest.mark.parametrize("name", ["resnet-ara", "fp16", *COMPRESSORS])
def test_shares_learn_as_copies(together: dict, name: str):
    """Batch norms, noise and overflows differ between processes, but not between kinds."""
    assert_like(together["fsdp", name], together["ddp", name])


def test_shares_are_whole_where_memory_is_measured(together: dict):
    assert together["fsdp", "saved"] == together["ddp", "saved"] > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("begun", BEGUN, ids=str)
def test_a_state_goes_on_in_any_number_of_processes(together: dict, kind: str, begun: tuple):
    optimizer, epochs = begun
    alone = trainer_of(EVEN["vit-asa4"], optimizer=optimizer)
    for _ in range(epochs):
        learned(alone)
    state = together[kind, "loaded", *begun]  # from one to two, and back
    assert_same_bits(tensors_of(state), tensors_of(alone.state()))
    expected = learned(alone)
    assert_like(together[kind, "continued", *begun], expected)
    alone = trainer_of(EVEN["vit-asa4"], optimizer=optimizer)
    alone.load_state(copy.deepcopy(state))  # which an optimiser would change
    assert_like(learned(alone), expected)


def test_pytorch_reads_a_state():
    """With what it has for states of several processes, which names parameters as we do."""
    trainer, other = trainer_of(EVEN["vit-asa4"]), trainer_of(EVEN["vit-asa4"])
    learned(trainer)
    state = copy.deepcopy(trainer.state())
    set_state_dict(
        other.model,
        other.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    assert_same_bits(tensors_of(other.state()), tensors_of(trainer.state()))


def test_weights_of_another_shape_are_refused_by_shares(tmp_path: Path):
    place = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **place)
    try:
        worker = Worker(torch.device("cpu"), 0, 2)
        model = parallelised(small_vit(), "fsdp", worker)
        with pytest.raises(RuntimeError, match="size mismatch for head.weight"):
            model.load_state_dict(small_vit().state_dict() | {"head.weight": torch.zeros(2, 8)})
    finally:
        dist.destroy_process_group()


def test_blocks_are_found_by_structure():
    network = small_vit()
    assert blocks_of(network) == list(network.blocks)
    network = small_resnet()
    assert blocks_of(network) == list(network.blocks())
    network = SmallBert().bert
    assert blocks_of(network) == list(network.bert.encoder.layer)


REFUSED = {
    "batch norms on cpu": ({"sync_batchnorm": True}, "cpu", "none", "needs GPUs"),
    "lean": ({"sync_batchnorm": True, "lean": "exact"}, "cuda", "none", "--lean exact"),
    "probes": ({"parallel": "fsdp"}, "cpu", "gact", "--compress gact .* or --parallel ddp"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused(case: str):
    flags, device, compressor, message = REFUSED[case]
    args = argparse.Namespace(**flags)
    with pytest.raises(UserError, match=message):
        check_parallel(args, 2, torch.device(device), Compression(compressor))


def test_one_process_needs_no_kind(capsys: pytest.CaptureFixture):
    args = argparse.Namespace(parallel="fsdp", sync_batchnorm=True)
    assert check_parallel(args, 1, torch.device("cpu"), Compression("gact")) == "fsdp"
    lines = capsys.readouterr().err.splitlines()
    ending = "does nothing in one process"
    assert lines == [
        f"train.py: note: {flag} {ending}" for flag in ("--parallel", "--sync-batchnorm")
    ]
