"""One run of an image classifier from its command line."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from aal.training import data, loaders, run
from aal.training.classification import Classification
from aal.training.command_line import Parser, UserError, non_negative_int, positive_int
from aal.training.descriptions import DATASETS, Description, dataset_name
from aal.training.devices import Worker
from aal.training.evaluation import evaluate
from aal.training.image_recipe import ImageRecipe


def add_arguments(parser: Parser, test_batch_size: int) -> None:
    """Add the flags that all image scripts share, apart from those of recipes."""
    add = parser.add_argument
    paths = ("--data-path", "--imagenet-data-path", "--tiny-imagenet-data-path")
    kind = {"type": dataset_name, "choices": DATASETS}
    add("--dataset", **kind, default="cifar10", help="images to learn; also c10 and c100")
    add(*paths, type=Path, default=Path("data"), help="folder that holds the data set")
    flags = ("--test-batch-size", "--eval-batch-size")
    add(*flags, type=positive_int, default=test_batch_size, help="images per batch when scoring")
    help = "data-loading processes per device; if not given, 4, for digits 0"
    add("--workers", "--num-workers", type=non_negative_int, default=argparse.SUPPRESS, help=help)
    help = "end the run at an image that cannot be read, or name it and go on without it"
    add("--bad-images", choices=("stop", "skip"), default="stop", help=help)
    run.add_arguments(parser)


@dataclass
class ImageRun(run.Run):
    """A run of an image classifier.

    Args:
        build_for: makes the network for a data set, or raises ``ValueError``.
    """

    recipe: ImageRecipe
    build_for: Callable[[Description], nn.Module]

    metric = "accuracy"
    columns = ("train_accuracy", "val_accuracy", "train_loss", "val_loss")

    def __post_init__(self) -> None:
        args, self.images = self.args, DATASETS[self.args.dataset]
        self.options = {"dataset": args.dataset, **self.options}
        self.function = {"dataset": args.dataset, **self.function}
        self.title = f"{args.dataset}_{self.title}"
        super().__post_init__()
        self.workers = 0 if args.dry_run else vars(args).get("workers", self.images.workers)
        self.bad_images = loaders.BadImages(args.bad_images == "skip")
        batch_size, count = self.settings.batch_size, self.processes
        if batch_size % count:
            raise UserError(f"--batch-size {batch_size} does not divide by {count} processes")
        parts = self.settings.gradient_accumulation_steps
        if parts > batch_size // count:
            raise UserError(
                f"--gradient-accumulation-steps {parts} is more than the {batch_size // count} "
                "images per step and device"
            )
        self.make_model()
        if not args.find_batch_size:
            self.parts = self._open_data()

    def usual_settings(self) -> ImageRecipe:
        """As the recipe says for the given number of images, which is fewer for some data sets."""
        usual_size = self.images.batch_size or self.recipe.batch_size
        scaled = self.recipe.for_batch_size(vars(self.args).get("batch_size", usual_size))
        return replace(scaled, batch_size=usual_size)

    def build(self) -> nn.Module:
        size = self.settings.img_size or self.images.size
        return self.build_for(replace(self.images, size=size))

    def task(self) -> Classification:
        settings = self.settings
        mix = settings.mixing(self.images.num_classes)
        return Classification(settings.label_smoothing, mix)

    def train_loader(self, worker: Worker) -> tuple[loaders.TrainBatches, int]:
        settings, part = self.settings, self.parts.train
        shared = (part, settings.batch_size, self.workers, settings.seed, worker)
        if settings.num_steps is None or self.args.dry_run:
            loader = loaders.train_loader(*shared, self.bad_images)
            return loader, len(loader)
        length = settings.num_steps, settings.eval_every
        loader = loaders.step_loader(*shared, *length, self.bad_images)
        return loader, max(1, len(part) // settings.batch_size)

    def begin_epoch(self, loader: loaders.TrainBatches, epoch: int, done: int) -> None:
        loader.sampler.set_epoch(epoch, done)

    def validate(self, worker: Worker, title: str) -> dict[str, float]:
        return self._score(self.parts.validation, worker, title)

    def test(self, worker: Worker) -> dict[str, float]:
        return self._score(self.parts.test, worker, "test")

    def scores_text(self, row: Mapping[str, Any]) -> str:
        return (
            f"train loss {row['train_loss']:.4f}, {row['train_accuracy']:.2f} %  "
            f"validation loss {row['val_loss']:.4f}, {row['val_accuracy']:.2f} %"
        )

    def test_text(self, test: Mapping[str, Any]) -> str:
        return (
            f"test accuracy {test['accuracy']:.2f} %, loss {test['loss']:.4f} "
            f"({test['samples']:.0f} images)"
        )

    def _open_data(self) -> data.Parts:
        args, settings = self.args, self.settings
        if not args.dry_run:
            return data.load(
                args.dataset,
                args.data_path,
                img_size=settings.img_size,
                autoaugment=settings.autoaugment,
            )
        try:
            return data.synthetic(args.dataset, settings.batch_size, img_size=settings.img_size)
        except (RuntimeError, MemoryError) as error:
            raise UserError(
                f"cannot make the images, perhaps for want of memory: {error}"
            ) from error

    def _score(self, part: Dataset, worker: Worker, title: str) -> dict[str, float]:
        shared = (part, self.args.test_batch_size, self.workers, worker)
        loader = loaders.evaluation_loader(*shared, self.bad_images)
        return evaluate(Classification(), self.model, loader, worker, self.settings.amp, title)
