"""One run of an image classifier from its command line: train, resume, score or try out."""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from aal.indicator import IndicatorRecorder
from aal.memory import MIB
from aal.training import data, devices
from aal.training.command_line import Parser, UserError, non_negative_int, positive_int
from aal.training.descriptions import DATASETS, Description, dataset_name
from aal.training.devices import Worker
from aal.training.files import read_checkpoint
from aal.training.loop import Trainer, evaluate
from aal.training.recipe import Recipe
from aal.training.run_folder import RunFolder, check_agrees

_MAX_NAME = 230  # bytes; 255 are possible, and files in the folder add some


def add_arguments(parser: Parser, test_batch_size: int) -> None:
    """Add the flags that all image scripts share, apart from those of recipes."""
    add, absent = parser.add_argument, argparse.SUPPRESS
    paths = ("--data-path", "--imagenet-data-path", "--tiny-imagenet-data-path")
    kind = {"type": dataset_name, "choices": DATASETS}
    add("--dataset", **kind, default="cifar10", help="images to learn; also c10 and c100")
    add(*paths, type=Path, default=Path("data"), help="folder that holds the data set")
    flags = ("--test-batch-size", "--eval-batch-size")
    add(*flags, type=positive_int, default=test_batch_size, help="images per batch when scoring")
    help = "GPU indices, one process each, or cpu; if not given, GPU 0 or else cpu"
    add("--device", nargs="+", metavar="DEVICE", default=absent, help=help)
    help = "data-loading processes per device; if not given, 4, for digits 0"
    add("--workers", "--num-workers", type=non_negative_int, default=absent, help=help)
    help = "parent of the run's own folder"
    add("--output", "--output-dir", type=Path, default=Path("results"), help=help)
    help = "checkpoint to score on the test images; trains nothing"
    add("--model-path", type=Path, default=absent, help=help)
    parser.add_switch("--get-li", help="record Learning Indicators")
    parser.add_switch("--resume", help="continue the run of the same settings")
    parser.add_switch("--checkpoint", help="the old name of --resume")
    parser.add_switch("--dry-run", help="two steps on random images; writes nothing")


@dataclass
class ImageRun:
    """A run whose settings have been checked; ``execute`` does it.

    Args:
        args: parsed flags, those of ``add_arguments`` among them.
        recipe: usual settings, which the name of a run need not mention.
        options: the script's own settings, to be recorded.
        function: what fixes the function that the network computes, by flag. A checkpoint can be
            scored only by a network that agrees in it.
        title: readable form of ``options``.
        build: makes the network for a data set.
        load_weights: loads a state dict into it, or raises ``ValueError``.

    Raises:
        UserError: anything that the user can put right.
    """

    args: argparse.Namespace
    recipe: Recipe
    options: Mapping[str, Any]
    function: Mapping[str, Any]
    title: str
    build: Callable[[Description], nn.Module]
    load_weights: Callable[[nn.Module, Mapping[str, Tensor]], None]
    recorder: IndicatorRecorder | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        args, images = self.args, DATASETS[self.args.dataset]
        usual_size = images.batch_size or self.recipe.batch_size
        batch_size = vars(args).get("batch_size", usual_size)
        scaled = self.recipe.for_batch_size(batch_size)
        self.usual, self.settings = replace(scaled, batch_size=usual_size), scaled.followed(args)
        self.workers = 0 if args.dry_run else vars(args).get("workers", images.workers)
        self.devices = devices.parse_devices(vars(args).get("device"))
        count = devices.num_processes(self.devices)
        if batch_size % count:
            raise UserError(f"--batch-size {batch_size} does not divide by {count} processes")
        parts = self.settings.gradient_accumulation_steps
        if parts > batch_size // count:
            raise UserError(
                f"--gradient-accumulation-steps {parts} is more than the {batch_size // count} "
                "images per step and device"
            )
        settings = asdict(self.settings)
        self.config = {"dataset": args.dataset, **self.options, **settings, "get_li": args.get_li}
        self.function = {"dataset": args.dataset, **self.function}
        args.resume = args.resume or args.checkpoint
        _refuse_together(args, "model_path", "dry_run", "resume")
        _refuse_together(args, "dry_run", "resume")
        devices.seed_everything(self.settings.seed)
        try:
            self.model = self.build(replace(images, size=self.settings.img_size or images.size))
        except ValueError as error:
            raise UserError(str(error)) from error
        except (RuntimeError, MemoryError) as error:  # PyTorch's allocator raises the former
            raise UserError(
                f"cannot build the network, perhaps for want of memory: {error}"
            ) from error
        if args.get_li:
            self.recorder = IndicatorRecorder(self.model)
        self.folder = None
        if "model_path" in args:
            self._load_weights(args.model_path)
        elif not args.dry_run:
            self.folder = RunFolder(args.output, self.name())
            if devices.is_first():
                self.folder.check(args.resume)
        if args.dry_run:
            try:
                size = self.settings.img_size
                self.parts = data.synthetic(args.dataset, batch_size, img_size=size)
            except (RuntimeError, MemoryError) as error:
                raise UserError(
                    f"cannot make the images, perhaps for want of memory: {error}"
                ) from error
        else:
            self.parts = data.load(
                args.dataset,
                args.data_path,
                img_size=self.settings.img_size,
                autoaugment=self.settings.autoaugment,
            )

    def name(self) -> str:
        """Readable, and different for runs of different settings, unless the user chose it."""
        settings = changes(asdict(self.settings), asdict(self.usual))
        derived = "_".join([self.args.dataset, self.title, *settings])
        name = vars(self.args).get("name", derived)
        if len(os.fsencode(name)) > _MAX_NAME:
            raise UserError(f"{name} is too long for a folder; choose another with --name")
        return name

    def execute(self, worker: Worker) -> None:
        """Score a checkpoint, try two steps, or train and then score the best epoch."""
        self.model.to(worker.device)
        devices.seed_everything(self.settings.seed + worker.rank)  # augmentation differs by process
        if "model_path" in self.args:
            self._print_test(self._score(self.parts.test, worker, "test"), worker)
        elif self.args.dry_run:
            self._try_out(worker)
        else:
            self._train(worker)

    def _trainer(self, worker: Worker) -> tuple[Trainer, Any]:
        settings, model, part = self.settings, self.model, self.parts.train
        shared = (part, settings.batch_size, self.workers, settings.seed, worker)
        if settings.num_steps is None or self.args.dry_run:
            loader = data.train_loader(*shared)
            steps_per_epoch = len(loader)
        else:
            loader = data.step_loader(*shared, settings.num_steps, settings.eval_every)
            steps_per_epoch = max(1, len(part) // settings.batch_size)
        optimizer = settings.optimizer_of(model.parameters())
        if worker.world_size > 1:
            index = [worker.device] if worker.device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=index)
        trainer = Trainer(
            model,
            optimizer,
            settings.learning_rate(steps_per_epoch),
            worker,
            settings.amp,
            self.recorder,
            mix=settings.mixing(DATASETS[self.args.dataset].num_classes),
            label_smoothing=settings.label_smoothing,
            max_grad_norm=settings.max_grad_norm,
            accumulation=settings.gradient_accumulation_steps,
        )
        return trainer, loader

    def _try_out(self, worker: Worker) -> None:
        trainer, loader = self._trainer(worker)
        trainer.measure_saved_mib(loader)
        train = trainer.train_epoch(loader, "dry run")
        validation = self._score(self.parts.validation, worker, "dry run")
        if worker.is_main:
            print(
                f"dry run: {trainer.step} steps, loss {train['loss']:.4f}, then "
                f"{validation['loss']:.4f}; saved {trainer.saved_mib:.1f} MiB, "
                f"{train['samples_per_s']:.1f} samples/s; nothing was written"
            )

    def _train(self, worker: Worker) -> None:
        trainer, loader = self._trainer(worker)
        first_epoch, best = 0, float("-inf")
        if self.args.resume:
            state = self.folder.resume(self.config)
            try:
                trainer.load_state(state)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"{self.folder.last} is damaged: {error}") from error
            first_epoch, best = state["epoch"], state["best_accuracy"]
        elif worker.is_main:
            self.folder.start(self.config)
        trainer.measure_saved_mib(loader)
        for epoch in range(first_epoch, self.settings.rounds):
            row, indicator = self._epoch(trainer, loader, epoch, worker)
            is_best = row["val_accuracy"] > best
            best = max(best, row["val_accuracy"])
            state = trainer.state()
            if worker.is_main:
                state |= {"config": self.config, "function": self.function}
                state |= {
                    "epoch": epoch + 1,
                    "val_accuracy": row["val_accuracy"],
                    "best_accuracy": best,
                }
                self.folder.finish_epoch(row, indicator, state, is_best)
                print(_line(row, self.settings.round_name(epoch + 1)), flush=True)
        worker.barrier()
        self._load_weights(self.folder.best)
        test = self._score(self.parts.test, worker, "test")
        if worker.is_main:
            self.folder.finish(test)
            self._print_test(test, worker)
            print(f"run folder: {self.folder.path}")

    def _epoch(self, trainer: Trainer, loader: Any, epoch: int, worker: Worker):
        """Train to the next validation; returns the row of metrics and the indicators, if any.

        In a run of ``num_steps`` what lies between two validations counts as an epoch.
        """
        if worker.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(worker.device)
        loader.sampler.set_epoch(epoch)
        title = self.settings.round_name(epoch + 1)
        train = trainer.train_epoch(loader, title)
        peak = None
        if worker.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(worker.device) / MIB
        worker.share_buffers(self.model)  # what is validated is what is saved
        validation = self._score(self.parts.validation, worker, title)
        row = {
            "epoch": epoch + 1,
            "step": trainer.step,
            "train_loss": train["loss"],
            "train_accuracy": train["accuracy"],
            "val_loss": validation["loss"],
            "val_accuracy": validation["accuracy"],
            "learning_rate": trainer.optimizer.param_groups[0]["lr"],
            "saved_mib": trainer.saved_mib,
            "peak_mib": peak,
            "samples_per_s": train["samples_per_s"],
            "seconds": train["seconds"],
        }
        if self.recorder is None:
            return row, None
        values = worker.gather(self.recorder.take().to(worker.device))
        row["indicator"] = self.recorder.summary(values)
        return row, values[0].cpu().numpy()

    def _score(self, part: Any, worker: Worker, title: str) -> dict[str, float]:
        loader = data.evaluation_loader(part, self.args.test_batch_size, self.workers, worker)
        return evaluate(self.model, loader, worker, self.settings.amp, title)

    def _load_weights(self, path: Path) -> None:
        """Load one of our checkpoints, or a bare state dict such as torchvision's."""
        state = read_checkpoint(path)
        check_agrees(path, state.get("function", {}), self.function)
        try:
            self.load_weights(self.model, state.get("model", state))
        except (ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"{path}: {error}") from error

    def _print_test(self, test: dict[str, float], worker: Worker) -> None:
        if worker.is_main:
            print(
                f"test accuracy {test['accuracy']:.2f} %, loss {test['loss']:.4f} "
                f"({test['samples']:.0f} images)"
            )


def run(image_run: ImageRun, script: str, arguments: Sequence[str]) -> int:
    """Execute a run, in one process per device; returns the exit status."""
    if len(image_run.devices) > 1 and not devices.is_launched():
        return devices.launch(script, arguments, len(image_run.devices))
    with devices.joined(image_run.devices) as worker:
        image_run.execute(worker)
    return 0


def _refuse_together(args: argparse.Namespace, first: str, *others: str) -> None:
    if vars(args).get(first):
        for name in others:
            if getattr(args, name):
                flags = [f"--{word.replace('_', '-')}" for word in (first, name)]
                raise UserError(f"{flags[0]} and {flags[1]} exclude each other")


def changes(settings: Mapping[str, Any], usual: Mapping[str, Any]) -> list[str]:
    """Words for the settings that are not as usual, for a run's name."""
    words = []
    for name, value in settings.items():
        if value not in (None, usual[name]):
            flag = name.replace("_", "-")
            words.append(flag if value is True else f"{flag}-{value}")
    return words


def _line(row: Mapping[str, Any], title: str) -> str:
    return (
        f"{title}  "
        f"train loss {row['train_loss']:.4f}, {row['train_accuracy']:.2f} %  "
        f"validation loss {row['val_loss']:.4f}, {row['val_accuracy']:.2f} %  "
        f"saved {row['saved_mib']:.1f} MiB  {row['samples_per_s']:.1f} samples/s  "
        f"{row['seconds']:.1f} s"
    )
