"""One run from its command line, whatever it learns: train, resume, score or try out."""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from aal.indicator import IndicatorRecorder
from aal.memory import MIB
from aal.training import devices
from aal.training.command_line import Parser, UserError, is_first
from aal.training.compression_flags import add_compression_flags, compression_of
from aal.training.devices import Worker
from aal.training.files import read_checkpoint
from aal.training.loop import Task, Trainer
from aal.training.recipe import Recipe
from aal.training.run_folder import RunFolder, check_agrees
from aal.training.tensorboard import EventFile, check_installed

_MAX_NAME = 230  # bytes; 255 are possible, and files in the folder add some


def add_arguments(parser: Parser) -> None:
    """Add the flags that all scripts share, apart from those of recipes."""
    add, absent = parser.add_argument, argparse.SUPPRESS
    help = "GPU indices, one process each, or cpu; if not given, GPU 0 or else cpu"
    add("--device", nargs="+", metavar="DEVICE", default=absent, help=help)
    help = "parent of the run's own folder"
    add("--output", "--output-dir", type=Path, default=Path("results"), help=help)
    help = "checkpoint to score on the test part; trains nothing"
    add("--model-path", type=Path, default=absent, help=help)
    add_compression_flags(parser)
    parser.add_switch("--get-li", help="record Learning Indicators")
    parser.add_switch("--tensorboard", help="write TensorBoard's event files into the run's folder")
    parser.add_switch("--resume", help="continue the run of the same settings")
    parser.add_switch("--checkpoint", help="the old name of --resume")
    parser.add_switch("--dry-run", help="two steps on random data; writes nothing")


def add_name(parser: Parser) -> None:
    """Add the flag that names the run's folder."""
    help = "name of the run's own folder; if not given, it tells data, network and settings"
    parser.add_argument("--name", type=_folder_name, default=argparse.SUPPRESS, help=help)


@dataclass
class Run:
    """A run whose settings have been checked; ``execute`` does it.

    What it learns is up to subclasses, which call ``make_model`` at their end of construction and
    define the methods that raise ``NotImplementedError`` here.

    Args:
        args: parsed flags, those of ``add_arguments`` among them.
        recipe: usual settings, which the name of a run need not mention.
        options: the script's own settings, to be recorded.
        function: what fixes the function that the network computes, by flag. A checkpoint can be
            scored only by a network that agrees in it.
        title: readable form of ``options``.
        load_weights: loads a state dict into the network, or raises ``ValueError``.

    Raises:
        UserError: anything that the user can put right.
    """

    args: argparse.Namespace
    recipe: Recipe
    options: Mapping[str, Any]
    function: Mapping[str, Any]
    title: str
    load_weights: Callable[[nn.Module, Mapping[str, Tensor]], None]

    metric: ClassVar[str]  # whose validation says which epoch is best
    columns: ClassVar[Sequence[str]]  # scores of an epoch that are recorded, "train_" and "val_"

    def __post_init__(self) -> None:
        args = self.args
        self.usual = self.usual_settings()
        self.settings = self.usual.followed(args)
        self.devices = devices.parse_devices(vars(args).get("device"))
        self.processes = devices.num_processes(self.devices)
        self.compression = compression_of(args, self.devices[0])
        self.config = {**self.options, **self.compression.config(), **asdict(self.settings)}
        self.config["get_li"] = args.get_li
        args.resume = args.resume or args.checkpoint
        if args.tensorboard:
            check_installed()
        refuse_together(args, "model_path", "dry_run", "resume")
        refuse_together(args, "dry_run", "resume")
        self.folder = None
        if not (args.dry_run or "model_path" in args):
            self.folder = RunFolder(args.output, self.name(), self.metric, self.columns)
            if is_first():
                self.folder.check(args.resume)

    def usual_settings(self) -> Recipe:
        """The recipe as it is when flags change nothing."""
        return self.recipe

    def build(self) -> nn.Module:
        """Make the network, or raise ``ValueError``."""
        raise NotImplementedError

    def task(self) -> Task:
        """What is learned."""
        raise NotImplementedError

    def train_loader(self, worker: Worker) -> tuple[Any, int]:
        """This process's batches, and how many steps an epoch has."""
        raise NotImplementedError

    def begin_epoch(self, loader: Any, epoch: int) -> None:
        """Make the loader yield the batches of an epoch, counted from 0."""
        raise NotImplementedError

    def validate(self, worker: Worker, title: str) -> dict[str, Any]:
        """Score the network on the validation part, all processes together."""
        raise NotImplementedError

    def test(self, worker: Worker) -> dict[str, Any]:
        """Score the network on the test part; what comes back is written as JSON."""
        raise NotImplementedError

    def scores_text(self, row: Mapping[str, Any]) -> str:
        """The scores of an epoch, for people."""
        raise NotImplementedError

    def test_text(self, test: Mapping[str, Any]) -> str:
        """What ``test`` returned, for people."""
        raise NotImplementedError

    def extras(self) -> dict[str, Any]:
        """Plain values that a checkpoint carries beside the weights."""
        return {}

    def check_extras(self, state: Mapping[str, Any]) -> None:
        """Raise ``UserError`` if a state to be resumed has other ``extras`` than this run."""

    def check_checkpoint(self, path: Path, state: Mapping[str, Any]) -> None:
        """Raise ``UserError`` if a checkpoint's network computes another function than ours."""
        check_agrees(path, state.get("function", {}), self.function)

    def trial_text(self) -> str:
        """What a dry run says of its data behind the number of steps."""
        return ""

    def make_model(self) -> None:
        """Build the network from the seed, and load ``--model-path`` into it."""
        devices.seed_everything(self.settings.seed)
        self.model = built(self.build)
        if "model_path" in self.args:
            self._load_checkpoint(self.args.model_path)

    def name(self) -> str:
        """Readable, and different for runs of different settings, unless the user chose it."""
        words = self.compression.words() + changes(asdict(self.settings), asdict(self.usual))
        name = vars(self.args).get("name", "_".join([self.title, *words]))
        if len(os.fsencode(name)) > _MAX_NAME:
            raise UserError(f"{name} is too long for a folder; choose another with --name")
        return name

    def execute(self, worker: Worker) -> None:
        """Score a checkpoint, try two steps, or train and then score the best epoch."""
        self.model.to(worker.device)
        devices.seed_everything(self.settings.seed + worker.rank)  # what is random differs
        if "model_path" in self.args:
            self._test(worker)
        elif self.args.dry_run:
            self._try_out(worker)
        else:
            self._train(worker)

    def _trainer(self, worker: Worker) -> tuple[Trainer, Any]:
        settings, model = self.settings, self.model
        loader, steps_per_epoch = self.train_loader(worker)
        optimizer = settings.optimizer_of(model.parameters())
        recorder = IndicatorRecorder(model) if self.args.get_li else None
        compress = self.compression.sessions_for(model, settings.seed)
        if worker.world_size > 1:
            index = [worker.device] if worker.device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=index)
        trainer = Trainer(
            self.task(),
            model,
            optimizer,
            settings.learning_rate(steps_per_epoch),
            worker,
            settings.amp,
            recorder,
            max_grad_norm=settings.max_grad_norm,
            accumulation=settings.gradient_accumulation_steps,
            compress=compress,
        )
        return trainer, loader

    def _try_out(self, worker: Worker) -> None:
        trainer, loader = self._trainer(worker)
        trainer.measure_saved_mib(loader)
        train = trainer.train_epoch(loader, "dry run")
        validation = self.validate(worker, "dry run")
        if worker.is_main:
            print(
                f"dry run: {trainer.step} steps{self.trial_text()}, loss {train['loss']:.4f}, then "
                f"{validation['loss']:.4f}; saved {trainer.saved_mib:.1f} MiB, "
                f"{_rate(train)}; nothing was written"
            )

    def _train(self, worker: Worker) -> None:
        trainer, loader = self._trainer(worker)
        first_epoch, best = 0, float("-inf")
        best_metric, val_metric = f"best_{self.metric}", f"val_{self.metric}"
        if self.args.resume:
            state = self.folder.resume(self.config)
            self.check_extras(state)
            try:
                trainer.load_state(state)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"{self.folder.last} is damaged: {error}") from error
            first_epoch, best = state["epoch"], state[best_metric]
            if trainer.recorder is not None:
                trainer.recorder.resume(self.folder.indicator_names)
        elif worker.is_main:
            self.folder.start(self.config)
        events = None
        if self.args.tensorboard and worker.is_main:
            events = EventFile(self.folder.path / "tensorboard", self.folder.metrics)
        trainer.measure_saved_mib(loader)
        for epoch in range(first_epoch, self.settings.rounds):
            if trainer.compression is not None:
                trainer.compression.method.epoch = epoch
            row, indicator = self._epoch(trainer, loader, epoch, worker)
            if worker.is_main and trainer.compression is not None and epoch == 0:
                self.folder.record_compression(str(trainer.compression_report))
            is_best = row[val_metric] > best
            best = max(best, row[val_metric])
            state = trainer.state()
            if worker.is_main:
                state |= {"config": self.config, "function": self.function, "epoch": epoch + 1}
                state |= {val_metric: row[val_metric], best_metric: best, **self.extras()}
                if events is not None:  # first, as an epoch that is not finished is done again
                    events.record(row)
                self.folder.finish_epoch(row, indicator, state, is_best)
                print(self._line(row, self.settings.round_name(epoch + 1)), flush=True)
        worker.barrier()
        self._load_checkpoint(self.folder.best)
        test = self._test(worker)
        if worker.is_main:
            self.folder.finish(test)
            print(f"run folder: {self.folder.path}")

    def _epoch(self, trainer: Trainer, loader: Any, epoch: int, worker: Worker):
        """Train to the next validation; returns the row of metrics and the indicators, if any.

        In a run of ``num_steps`` what lies between two validations counts as an epoch.
        """
        if worker.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(worker.device)
        self.begin_epoch(loader, epoch)
        title = self.settings.round_name(epoch + 1)
        train = trainer.train_epoch(loader, title)
        peak = None
        if worker.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(worker.device) / MIB
        worker.share_buffers(self.model)  # what is validated is what is saved
        validation = self.validate(worker, title)
        scores = {f"train_{name}": value for name, value in train.items()}
        scores |= {f"val_{name}": value for name, value in validation.items()}
        rate = f"{trainer.task.unit}_per_s"
        row = {
            "epoch": epoch + 1,
            "step": trainer.step,
            **{name: value for name, value in scores.items() if name in self.columns},
            "learning_rate": trainer.optimizer.param_groups[0]["lr"],
            "saved_mib": trainer.saved_mib,
            "peak_mib": peak,
            rate: train[rate],
            "seconds": train["seconds"],
        }
        if trainer.recorder is None:
            return row, None
        values = trainer.recorder.take(worker.gather_objects)
        row["indicator"] = trainer.recorder.summary(values)
        return row, values[0].numpy()

    def _line(self, row: Mapping[str, Any], title: str) -> str:
        return (
            f"{title}  {self.scores_text(row)}  saved {row['saved_mib']:.1f} MiB  {_rate(row)}  "
            f"{row['seconds']:.1f} s"
        )

    def _test(self, worker: Worker) -> dict[str, Any]:
        test = self.test(worker)
        if worker.is_main:
            print(self.test_text(test))
        return test

    def _load_checkpoint(self, path: Path) -> None:
        """Load one of our checkpoints, or a bare state dict such as torchvision's."""
        state = read_checkpoint(path)
        self.check_checkpoint(path, state)
        weights = state.get("model", state)
        if not isinstance(weights, dict):
            raise UserError(f"{path} holds {type(weights).__name__} instead of weights by name")
        try:
            self.load_weights(self.model, weights)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{path}: {error}") from error


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """What ``build`` makes; raises ``UserError`` if that is impossible."""
    try:
        return build()
    except ValueError as error:
        raise UserError(str(error)) from error
    except (RuntimeError, MemoryError) as error:  # PyTorch's allocator raises the former
        raise UserError(f"cannot build the network, perhaps for want of memory: {error}") from error


def execute(run: Run, script: str, arguments: Sequence[str]) -> int:
    """Execute a run, in one process per device; returns the exit status."""
    try:
        if len(run.devices) > 1 and not devices.is_launched():
            return devices.launch(script, arguments, len(run.devices))
        with devices.joined(run.devices) as worker:
            run.execute(worker)
    except KeyboardInterrupt as error:
        if run.folder is not None and run.folder.last.is_file():
            raise KeyboardInterrupt("--resume continues after the last validation") from error
        raise
    return 0


def refuse_together(args: argparse.Namespace, first: str, *others: str) -> None:
    """Raise ``UserError`` if the first flag, by its name, is given with one of the others."""
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


def _rate(values: Mapping[str, Any]) -> str:
    """The speed among some metrics, for people."""
    ((name, value),) = [item for item in values.items() if item[0].endswith("_per_s")]
    return f"{value:.1f} {name.removesuffix('_per_s')}/s"


def _folder_name(text: str) -> str:
    if text in ("", "..") or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"must name a folder without its parents, got {text!r}")
    return text
