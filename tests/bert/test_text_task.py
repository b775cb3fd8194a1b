"""The loss, the accuracy and F1 of classified texts."""

import pytest
import torch
from batches import Batch
from sklearn.metrics import f1_score as reference
from text_task import Scoring, TextClassification, f1_score
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput


class Counts(nn.Module):
    """Logits that are the numbers of masked tokens, of segments and of ids."""

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        segments = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        sums = [tensor.double().sum(1) for tensor in (attention_mask, segments, input_ids)]
        return SequenceClassifierOutput(logits=torch.stack(sums, 1))


def batch(count: int = 6) -> Batch:
    tensors = [torch.randint(3, (count, 4)) for _ in range(3)]
    return Batch(*tensors, torch.randint(3, (count,)))


@pytest.mark.parametrize("has_segments", [True, False])
def test_the_loss_is_cross_entropy_and_accuracy_a_share(has_segments: bool):
    some = batch()
    loss, (correct,) = TextClassification(has_segments).loss(Counts(), some)
    segments = some.segments * has_segments
    logits = torch.stack([t.double().sum(1) for t in (some.mask, segments, some.ids)], 1)
    log = logits - logits.exp().sum(1, keepdim=True).log()
    expected = -log[range(6), some.classes].mean()
    torch.testing.assert_close(loss, expected)
    assert correct.item() == 100 * (logits.argmax(1) == some.classes).sum().item()


def test_a_batch_is_split_and_shortened():
    task, some = TextClassification(True), batch(7)
    parts = task.split(some, 3)
    assert [task.weight(part) for part in parts] == [3, 2, 2]
    for name in Batch._fields:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(some, name))
        assert torch.equal(getattr(task.first(some, 2), name), getattr(some, name)[:2])


def test_texts_are_counted_by_class_and_by_what_is_found():
    task, whole = Scoring(True, torch.zeros(3, 3, dtype=torch.long)), batch(40)
    for part in task.split(whole, 5):
        task.loss(Counts(), part)
    logits = Counts()(whole.ids, whole.mask, whole.segments).logits
    expected = torch.zeros(3, 3, dtype=torch.long)
    for label, found in zip(whole.classes, logits.argmax(1), strict=True):
        expected[label, found] += 1
    assert torch.equal(task.confusion, expected)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_f1_is_that_of_class_1_of_two_or_else_the_mean(classes: int):
    random = torch.Generator().manual_seed(classes)
    labels, found = torch.randint(classes, (2, 50), generator=random)
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    confusion.index_put_((labels, found), torch.ones(50, dtype=torch.long), accumulate=True)
    average = "binary" if classes == 2 else "macro"
    assert f1_score(confusion) == pytest.approx(100 * reference(labels, found, average=average))


def test_f1_of_classes_that_do_not_occur():
    assert f1_score(torch.tensor([[5, 0], [0, 0]])) == 0.0
    assert f1_score(torch.tensor([[5, 0], [4, 0]])) == 0.0
    assert f1_score(torch.tensor([[5, 0, 0], [0, 5, 0], [0, 0, 0]])) == 100.0
    assert f1_score(torch.tensor([[1, 1], [1, 3]])) == pytest.approx(75.0)
