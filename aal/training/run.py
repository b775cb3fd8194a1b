"""One run from its command line, whatever it learns: train, resume, score or try out."""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from aal.indicator import IndicatorRecorder
from aal.memory import SavedTensor
from aal.training import devices
from aal.training.command_line import (
    Parser,
    ProcessLost,
    UserError,
    is_first,
    is_launched,
    print_line,
)
from aal.training.compression_flags import add_compression_flags, compression_of
from aal.training.course import Course
from aal.training.devices import Worker
from aal.training.files import read_checkpoint
from aal.training.launch import launch
from aal.training.loaders import failures_explained
from aal.training.loop import Trainer
from aal.training.parallel import add_parallel_flag, check_parallel, parallelised, whole
from aal.training.recipe import Recipe
from aal.training.run_folder import RunFolder, check_agrees
from aal.training.saving import add_saving_flags
from aal.training.task import Task
from aal.training.tensorboard import check_installed

_MAX_NAME = 230  # bytes; 255 are possible, and files in the folder add some


def add_arguments(parser: Parser) -> None:
    """Add the flags that all scripts share, apart from those of recipes."""
    add, absent = parser.add_argument, argparse.SUPPRESS
    help = "GPU indices, one process each, or cpu; if not given, GPU 0 or else cpu"
    add("--device", nargs="+", metavar="DEVICE", default=absent, help=help)
    add_parallel_flag(parser)
    help = "parent of the run's own folder"
    add("--output", "--output-dir", type=Path, default=Path("results"), help=help)
    help = "checkpoint to score on the test part; trains nothing"
    add("--model-path", type=Path, default=absent, help=help)
    add_compression_flags(parser)
    parser.add_switch("--get-li", help="record Learning Indicators")
    parser.add_switch("--tensorboard", help="write TensorBoard's event files into the run's folder")
    add_saving_flags(parser)
    help = "continue the run of the same settings; with auto, begin it where there is none"
    parser.add_switch("--resume", help=help, word="auto")
    parser.add_switch("--checkpoint", help="the old name of --resume", word="auto")
    parser.add_switch("--dry-run", help="two steps on random data; writes nothing")
    help = "print the largest --batch-size that fits in the device's memory; writes nothing"
    parser.add_switch("--find-batch-size", help=help)


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
    frees_blocks: ClassVar[bool] = True  # see ``aal.training.parallel.parallelised``

    def __post_init__(self) -> None:
        args = self.args
        self.usual = self.usual_settings()
        self.settings = self.usual.followed(args)
        self.devices = devices.parse_devices(vars(args).get("device"))
        self.processes = devices.num_processes(self.devices)
        self.compression = compression_of(args, self.devices[0])
        self.parallel = check_parallel(args, self.processes, self.devices[0], self.compression)
        self.config = {**self.options, **self.compression.config(), **asdict(self.settings)}
        self.config["get_li"] = args.get_li
        args.resume = args.resume or args.checkpoint
        if args.tensorboard:
            check_installed()
        refuse_together(args, "model_path", "dry_run", "resume")
        refuse_together(args, "dry_run", "resume")
        refuse_together(args, "find_batch_size", "dry_run", "resume", "model_path")
        if args.find_batch_size and self.processes > 1:
            raise UserError(
                "--find-batch-size tries one device; with several the batch can be as many times "
                "as large"
            )
        self.folder = None
        if not (args.dry_run or args.find_batch_size or "model_path" in args):
            place = args.output, self.name()
            self.folder = RunFolder(*place, self.metric, self.columns, args.keep)
            if args.resume == "auto":
                args.resume = self.folder.has_state
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

    def begin_epoch(self, loader: Any, epoch: int, done: int) -> None:
        """Make the loader yield the batches of an epoch, counted from 0, but the first ``done``.

        Its length stays that of the whole epoch.
        """
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

    def trial_flags(self) -> Sequence[object]:
        """Flags by which the network of a dry run is as large as this one."""
        return ()

    def data_size(self) -> Any:
        """What the memory of a step depends on beside the flags, for ``resemble``."""

    def resemble(self, size: Any) -> None:
        """Let a dry run have random data of another run's ``data_size``."""

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
            Course(self, worker, *self._trainer(worker)).follow()

    def _trainer(self, worker: Worker) -> tuple[Trainer, Any]:
        settings, model = self.settings, self.model
        if vars(self.args).get("sync_batchnorm") and worker.world_size > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # which is changed itself
        loader, steps_per_epoch = self.train_loader(worker)
        place = worker.rank, worker.world_size
        recorder = IndicatorRecorder(model, *place) if self.args.get_li else None
        compress = self.compression.sessions_for(model, settings.seed)
        model = parallelised(model, self.parallel, worker, self.frees_blocks)
        optimizer = settings.optimizer_of(model.parameters())  # which FSDP2 has exchanged
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
        with whole(self.model):
            validation = self.validate(worker, "dry run")
        if worker.is_main:
            print_line(
                f"dry run: {trainer.step} steps{self.trial_text()}, loss {train['loss']:.4f}, then "
                f"{validation['loss']:.4f}; saved {trainer.saved_mib:.1f} MiB, "
                f"{_rate(train)}; nothing was written"
            )

    def try_steps(self, worker: Worker) -> str:
        """Train two steps of a dry run; returns the speed, for people."""
        self.model.to(worker.device)
        trainer, loader = self._trainer(worker)
        return _rate(trainer.train_epoch(loader, "trial"))

    def saved_tensors(self, worker: Worker) -> list[SavedTensor]:
        """What autograd holds of a batch of a dry run, the largest first."""
        self.model.to(worker.device)
        trainer, loader = self._trainer(worker)
        return trainer.saved_tensors(loader)

    def epoch_text(self, row: Mapping[str, Any], title: str) -> str:
        """The metrics of an epoch, for people."""
        return (
            f"{title}  {self.scores_text(row)}  saved {row['saved_mib']:.1f} MiB  {_rate(row)}  "
            f"{row['seconds']:.1f} s"
        )

    def score_test(self, path: Path, worker: Worker) -> dict[str, Any]:
        """Score a checkpoint on the test part, and tell the user."""
        self._load_checkpoint(path)
        return self._test(worker)

    def _test(self, worker: Worker) -> dict[str, Any]:
        with whole(self.model):
            test = self.test(worker)
        if worker.is_main:
            print_line(self.test_text(test))
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
        if len(run.devices) > 1 and not is_launched():
            if run.folder is not None:
                run.folder.release()  # the first process takes it
            return launch(script, arguments, len(run.devices))
        with devices.joined(run.devices) as worker, failures_explained():
            run.execute(worker)
    except (KeyboardInterrupt, ProcessLost) as error:
        if run.folder is not None and run.folder.has_state:
            hint = "--resume continues from the last saved state"
            raise type(error)(*error.args, hint) from error
        raise
    finally:
        if run.folder is not None:
            run.folder.release()
    return 0


def refuse_together(args: argparse.Namespace, first: str, *others: str) -> None:
    """Raise ``UserError`` if the first flag, by its name, is given with one of the others."""
    if vars(args).get(first):
        for name in others:
            if vars(args).get(name):
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
