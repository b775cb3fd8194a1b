"""What happens to images and labels before they are learned."""

from pathlib import Path

import pytest
import torch

from aal.training import data
from aal.training.augmentation import Mixing, transforms
from aal.training.descriptions import DATASETS


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Eight images, each of one value, with labels of as many classes."""
    labels = torch.arange(8)
    return labels.float().view(8, 1, 1, 1).expand(8, 3, 10, 10), labels


def test_cutmix_labels_are_the_shares_of_the_area():
    for _ in range(20):
        images, labels = Mixing(8, cutmix=True, mixup=False, alpha=1.0, probability=1.0)(*_batch())
        for image, shares in zip(images, labels, strict=True):
            areas = torch.stack([(image == i).float().mean() for i in range(8)])
            torch.testing.assert_close(areas, shares)


def test_mixup_labels_are_the_weights_of_the_mean():
    images, labels = Mixing(8, cutmix=False, mixup=True, alpha=1.0, probability=1.0)(*_batch())
    for image, shares in zip(images, labels, strict=True):
        assert shares.count_nonzero() == 2 and shares.sum() == pytest.approx(1)
        torch.testing.assert_close(image.mean(), (shares * torch.arange(8)).sum())


def test_a_share_of_the_steps_is_mixed_and_both_kinds_take_turns():
    mixing = Mixing(8, cutmix=True, mixup=True, alpha=1.0, probability=0.8)
    kinds = {"none": 0, "cutmix": 0, "mixup": 0}
    for _ in range(400):
        images, labels = mixing(*_batch())
        whole = (images == images.round()).all()  # a mean of two numbers is between them
        kinds["none" if labels.dim() == 1 else "cutmix" if whole else "mixup"] += 1
    assert 50 < kinds["none"] < 110
    assert 120 < kinds["cutmix"] < 200 and 120 < kinds["mixup"] < 200


def test_mixing_draws_from_the_random_state_of_torch_alone():
    mixing = Mixing(8, cutmix=True, mixup=True, alpha=0.5, probability=0.8)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append([mixing(*_batch()) for _ in range(10)])
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(DATASETS))
@pytest.mark.parametrize("img_size", [None, 24])
def test_augmented_images_have_the_size_and_channels_of_the_others(name, img_size):
    what = DATASETS[name]
    train, score = transforms(name, img_size, autoaugment=True)
    image = torch.rand(what.channels, what.size, what.size)
    size = img_size or what.size
    for transform in (train, score):
        changed = transform(image)
        assert changed.shape == (what.channels, size, size) and changed.dtype == torch.float32
        assert type(changed) is torch.Tensor
    assert len({tuple(train(image).flatten().tolist()) for _ in range(8)}) > 1
    assert torch.equal(score(image), score(image))


def test_resized_images_lie_between_minus_1_and_1():
    train, score = transforms("cifar10", 48, autoaugment=False)
    image = torch.stack([torch.zeros(32, 32), torch.full((32, 32), 0.5), torch.ones(32, 32)])
    for changed in (train(image), score(image)):
        expected = torch.tensor([-1.0, 0.0, 1.0])
        torch.testing.assert_close(changed.mean((1, 2)), expected, atol=1e-5, rtol=0)


def test_digits_are_augmented_in_training_alone():
    torch.manual_seed(0)
    parts = data.load("digits", Path("unused"), img_size=16, autoaugment=True)
    assert parts.train[0][0].shape == parts.test[0][0].shape == (1, 16, 16)
    assert len({tuple(parts.train[0][0].flatten().tolist()) for _ in range(8)}) > 1
    assert torch.equal(parts.validation[0][0], parts.validation[0][0])
