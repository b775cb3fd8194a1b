"""Cross entropy of scores that never exist all at once: PyTorch's numbers, and bytes as told."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    LOW_PRECISION,
    assert_no_worse,
    assert_same_bits,
    compiling,
    cotangent_of,
    run,
    under_autocast,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import aal.lean.cross_entropy as module
from aal.lean import linear_cross_entropy
from aal.memory import saved_bytes

ROWS, WIDTH, CLASSES = 10, 7, 11
SOME = 3 * CLASSES + 4  # scores in a chunk of three rows: the last chunk has one
both_ways = pytest.mark.parametrize("recompute", [False, True], ids=["keeps", "recomputes"])
smoothings = pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])


@pytest.fixture(params=[5, SOME, 2**22], ids=["row-by-row", "chunks", "at-once"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", request.param)


@pytest.fixture
def in_chunks(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", SOME)


def tensors(
    *leading: int, bias: bool = True, dtype: torch.dtype = torch.double, **options
) -> dict[str, Tensor | None]:
    options["dtype"] = dtype
    leading = leading or (ROWS,)
    return {
        "x": torch.randn(*leading, WIDTH, **options),
        "weight": torch.randn(CLASSES, WIDTH, **options),
        "bias": torch.randn(CLASSES, **options) if bias else None,
    }


def labels_of(x: Tensor, ignored: int | None = None) -> Tensor:
    """Random classes; about a third of them ``ignored``, if it is a number."""
    labels = torch.randint(CLASSES, x.shape[:-1], device=x.device)
    if ignored is None:
        return labels
    return labels.where(
        torch.arange(labels.numel(), device=x.device).view_as(labels) % 3 != 1, ignored
    )


def stock(labels: Tensor, **options):
    """PyTorch's loss of all the scores."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scores = F.linear(x, weight, bias).reshape(-1, len(weight))
        return F.cross_entropy(scores, labels.reshape(-1), **options)

    return forward


def ours(labels: Tensor, **options):
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_cross_entropy(x, weight, bias, labels, **options)

    return forward


@both_ways
@smoothings
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("ignored", [None, -100, 0, 4])
def test_loss_and_gradients_are_those_of_torch(
    ignored, bias, label_smoothing, recompute, chunk, device
):
    given = tensors(bias=bias, device=device)
    labels = labels_of(given["x"], ignored)
    options = {"label_smoothing": label_smoothing}
    options |= {} if ignored is None else {"ignore_index": ignored}
    found = run(ours(labels, recompute=recompute, **options), **given)
    torch.testing.assert_close(found, run(stock(labels, **options), **given))


@both_ways
@pytest.mark.parametrize("leading", [(1,), (2, 5), (2, 1, 3), ()], ids=str)
def test_leading_dimensions_are_rows(leading, recompute, in_chunks):
    given = tensors()
    given["x"] = torch.randn(*leading, WIDTH, dtype=torch.double)
    labels = labels_of(given["x"])
    found = run(ours(labels, recompute=recompute), **given)
    torch.testing.assert_close(found, run(stock(labels), **given))


FROZEN = [("x",), ("weight",), ("bias",), ("x", "weight"), ("x", "bias"), ("weight", "bias")]


@both_ways
@pytest.mark.parametrize("frozen", FROZEN, ids="-".join)
def test_what_is_frozen_gets_no_gradient(frozen, recompute, in_chunks):
    given = tensors()
    labels = labels_of(given["x"], -100)
    loss, grads = run(ours(labels, recompute=recompute), frozen=frozen, **given)
    assert {name for name, grad in grads.items() if grad is None} == set(frozen)
    torch.testing.assert_close((loss, grads), run(stock(labels), frozen=frozen, **given))


@both_ways
def test_nothing_learns_if_all_is_frozen(recompute):
    given = tensors()
    assert not ours(labels_of(given["x"]), recompute=recompute)(**given).requires_grad


@both_ways
def test_a_function_of_the_loss_has_its_gradients(recompute, in_chunks):
    """As a weighted sum of losses has, or the scale that keeps half precision from zero."""
    given = tensors()
    labels = labels_of(given["x"])
    forwards = ours(labels, recompute=recompute), stock(labels)
    found = [run(lambda f=f, **g: f(**g).square() * 3 + f(**g), **given) for f in forwards]
    torch.testing.assert_close(*found)


VIEWS = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every-second": lambda t: t.repeat_interleave(2, 0)[::2],
    "inside-rows": lambda t: F.pad(t, (1, 2))[..., 1:-2],
}


@both_ways
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides_do_not_matter(view, recompute, in_chunks):
    given = tensors(2, 5)
    labels = labels_of(given["x"])
    strided = {"x": view(given["x"]), "weight": view(given["weight"])}
    strided["bias"] = given["bias"].repeat_interleave(2)[::2]
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    found = run(ours(view(labels), recompute=recompute), **strided)
    torch.testing.assert_close(found, run(stock(labels), **given))


@both_ways
def test_rows_may_repeat_in_memory(recompute, in_chunks):
    given = tensors()
    given["x"] = torch.randn(1, WIDTH, dtype=torch.double).expand(ROWS, WIDTH)
    labels = labels_of(given["x"])
    found = run(ours(labels, recompute=recompute), **given)
    torch.testing.assert_close(found, run(stock(labels), **given))


@both_ways
def test_large_scores_do_not_overflow(recompute, in_chunks):
    given = tensors(dtype=torch.float32)
    given["x"] = given["x"] * 1e4
    labels = labels_of(given["x"])
    found = run(ours(labels, recompute=recompute), **given)
    torch.testing.assert_close(found, run(stock(labels), **given))


def assert_rounds_no_worse(dtype: torch.dtype, autocast: bool, recompute: bool) -> None:
    """With all tensors, or autocast's products alone, in ``dtype``."""
    given = {
        "x": torch.randn(300, 33),
        "weight": torch.randn(101, 33),
        "bias": torch.randn(101),
    }
    if not autocast:
        given = {name: tensor.to(dtype) for name, tensor in given.items()}
    labels = torch.randint(101, (300,))
    forwards = (
        ours(labels, recompute=recompute, label_smoothing=0.1),
        stock(labels, label_smoothing=0.1),
    )
    exact_loss, exact = run(forwards[1], **{name: t.double() for name, t in given.items()})
    if autocast:
        forwards = [under_autocast(dtype, forward) for forward in forwards]
    (loss, grads), (stock_loss, stock_grads) = (run(forward, **given) for forward in forwards)
    assert_no_worse(loss, stock_loss, exact_loss)
    for name, tensor in given.items():
        assert grads[name].dtype == tensor.dtype
        # In half precision ours are rounded once more, when the scale of the loss is known.
        assert_no_worse(grads[name], stock_grads[name], exact[name], factor=3)


@pytest.fixture(params=[1, 37 * 101, 2**22], ids=["row-by-row", "chunks", "at-once"])
def large_chunk(request, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", request.param)


@both_ways
@pytest.mark.parametrize("autocast", [False, True], ids=["pure", "autocast"])
@LOW_PRECISION
def test_half_precision_rounds_no_worse_than_torch(dtype, autocast, recompute, large_chunk):
    assert_rounds_no_worse(dtype, autocast, recompute)


@both_ways
def test_single_precision_rounds_no_worse_than_torch(recompute, large_chunk):
    assert_rounds_no_worse(torch.float32, False, recompute)


def test_loss_of_half_precision_is_single_precision():
    given = tensors(dtype=torch.bfloat16)
    assert linear_cross_entropy(*given.values(), labels_of(given["x"])).dtype == torch.float32


@both_ways
def test_a_scale_keeps_gradients_of_many_rows_from_zero_in_half_precision(recompute):
    """Of a row, 1 / N times a probability; and the input's gradient in float16 is as small."""
    given = tensors(20_000, dtype=torch.float32)
    given["weight"] *= 0.1
    labels, scale = labels_of(given["x"]), 2.0**12

    def scaled(forward):
        return lambda **leaves: forward(**leaves) * scale

    exact = run(scaled(stock(labels)), **given)
    found = run(under_autocast(torch.float16, scaled(ours(labels, recompute=recompute))), **given)
    for name, grad in found[1].items():
        error = (grad - exact[1][name]).norm() / exact[1][name].norm()
        assert error < 2e-3, name
    rare = exact[1]["x"].abs() < 1e-3 * exact[1]["x"].abs().max()
    assert rare.any() and found[1]["x"][rare].count_nonzero() > 0.9 * rare.sum()


@both_ways
def test_a_scale_beyond_half_precision_is_no_infinity(recompute):
    """float16 ends at 65504, which a scale reaches before the gradients do."""
    given = {name: tensor * 0.01 for name, tensor in tensors(1, dtype=torch.float32).items()}
    labels = torch.tensor([1])

    def scaled(forward):
        return lambda **leaves: forward(**leaves) * 2.0**18

    exact = run(scaled(stock(labels)), **given)[1]
    half = {name: tensor.half() for name, tensor in given.items()}
    found = run(scaled(ours(labels, recompute=recompute)), **half)[1]
    torch.testing.assert_close(found["x"].float(), exact["x"], rtol=0.01, atol=20.0)


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


PRODUCT = 2 * ROWS * WIDTH * CLASSES  # floating-point operations of one


@both_ways
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_without_gradients_only_the_loss_is_computed(autocast, recompute, in_chunks):
    given = tensors(dtype=torch.float32)
    labels = labels_of(given["x"], -100)
    forward = ours(labels, recompute=recompute)
    if autocast:
        forward = under_autocast(torch.bfloat16, forward)
    leaves = {name: tensor.requires_grad_() for name, tensor in given.items()}
    expected = forward(**leaves)
    with torch.no_grad():
        assert flops(lambda: forward(**leaves)) == PRODUCT
        assert_same_bits(forward(**leaves), expected.detach())
        assert not forward(**leaves).requires_grad
        assert saved_bytes(lambda: forward(**leaves)) == 0
    with torch.inference_mode():
        assert_same_bits(forward(**leaves), expected.detach())


@pytest.mark.parametrize(
    ("frozen", "products"),
    [((), 3), (("bias",), 3), (("x",), 2), (("weight",), 2), (("x", "weight"), 1)],
    ids=str,
)
@both_ways
def test_computes_no_product_that_nobody_needs(frozen, products, recompute, in_chunks):
    given = tensors()
    forward = ours(labels_of(given["x"]), recompute=recompute)
    both = flops(lambda: run(forward, frozen=frozen, **given))
    assert both == PRODUCT * (products + recompute)


class Scores(TorchDispatchMode):
    """Notes how many rows of scores are in one tensor."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dim() == 2 and result.shape[1] == CLASSES:
            self.rows = max(self.rows, len(result))
        return result


@both_ways
@pytest.mark.parametrize(("size", "rows"), [(8 * CLASSES + 3, 8), (20 * CLASSES, 20)])
def test_scores_exist_for_the_rows_of_a_chunk_alone(rows, size, recompute, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", size)
    given = tensors(100)
    with Scores() as scores:
        run(ours(labels_of(given["x"]), recompute=recompute), **given)
    assert scores.rows == rows


def learning(dtype: torch.dtype = torch.float32, frozen: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """An input that somebody else made, and parameters."""
    given = tensors(2, 5, dtype=dtype)
    return {
        "x": given["x"].requires_grad_("x" not in frozen),
        "weight": nn.Parameter(given["weight"], "weight" not in frozen),
        "bias": nn.Parameter(given["bias"], "bias" not in frozen),
    }


def kept(forward, given: dict[str, Tensor]) -> int:
    """Saved bytes, those of the input and the labels among them."""
    return saved_bytes(lambda: forward(given["x"].clone(), given["weight"], given["bias"]))


COUNT = 8  # bytes of a whole number


@pytest.mark.parametrize("frozen", [(), *FROZEN], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.double], ids=str)
def test_keeps_its_gradients_and_a_count(dtype, frozen, chunk):
    given = learning(dtype, frozen)
    labels = labels_of(given["x"])
    expected = sum(given[name].nbytes for name in given.keys() - set(frozen)) + COUNT
    assert kept(lambda *own: linear_cross_entropy(*own, labels.clone()), given) == expected


@pytest.mark.parametrize("frozen", [(), *FROZEN], ids=str)
def test_keeps_input_and_labels_to_compute_again(frozen, chunk):
    given = learning(frozen=frozen)
    labels = labels_of(given["x"])
    held = kept(lambda *own: linear_cross_entropy(*own, labels.clone(), recompute=True), given)
    assert held == given["x"].nbytes + labels.nbytes


@both_ways
def test_keeps_half_of_the_inputs_bytes_under_autocast(recompute, chunk):
    given = learning()
    labels = labels_of(given["x"])
    forward = under_autocast(
        torch.bfloat16,
        lambda *own: linear_cross_entropy(*own, labels.clone(), recompute=recompute),
    )
    own = labels.nbytes if recompute else given["weight"].nbytes + given["bias"].nbytes + COUNT
    assert kept(forward, given) == given["x"].nbytes // 2 + own


@both_ways
@smoothings
@pytest.mark.parametrize("rows", [0, ROWS])
def test_without_a_row_that_counts_the_loss_is_nan_and_gradients_are_zero(
    rows, label_smoothing, recompute, in_chunks
):
    given = tensors()
    given["x"] = given["x"][:rows]
    labels = torch.full((rows,), -100)
    options = {"label_smoothing": label_smoothing}
    loss, grads = run(ours(labels, recompute=recompute, **options), **given)
    assert_same_bits((loss, grads), run(stock(labels, **options), **given))
    assert loss.isnan() and not any(grad.any() for grad in grads.values())


@both_ways
@pytest.mark.parametrize("ignored", [-100, 2, CLASSES + 3])
def test_ignored_rows_count_in_no_way(ignored, recompute, in_chunks):
    given = tensors()
    labels = labels_of(given["x"], ignored)
    counts = labels != ignored
    options = {"ignore_index": ignored, "label_smoothing": 0.1, "recompute": recompute}
    loss, grads = run(ours(labels, **options), **given)
    assert not grads["x"][~counts].any()
    alone = {**given, "x": given["x"][counts]}
    expected_loss, expected = run(ours(labels[counts], **options), **alone)
    grads["x"] = grads["x"][counts]
    torch.testing.assert_close((loss, grads), (expected_loss, expected))


@both_ways
def test_arguments_and_random_state_are_left_alone(recompute, in_chunks):
    given = tensors()
    labels = labels_of(given["x"], -100)
    before = {name: tensor.clone() for name, tensor in given.items()}, labels.clone()
    state = torch.get_rng_state()
    run(ours(labels, recompute=recompute, label_smoothing=0.1), **given)
    assert_same_bits((given, labels), before)
    assert_same_bits(torch.get_rng_state(), state)


@both_ways
def test_second_backward_gives_the_same_gradients(recompute, in_chunks):
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors().items()}
    loss = ours(labels_of(leaves["x"]), recompute=recompute)(**leaves)
    first = torch.autograd.grad(loss, leaves.values(), cotangent_of(loss), retain_graph=True)
    assert_same_bits(torch.autograd.grad(loss, leaves.values(), cotangent_of(loss)), first)


@both_ways
def test_double_backward_is_refused(recompute):
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors().items()}
    loss = ours(labels_of(leaves["x"]), recompute=recompute)(**leaves)
    (grad,) = torch.autograd.grad(loss.square(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["x", "weight", "bias", "labels"])
def test_change_before_scores_are_computed_again_is_noticed(name):
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors().items()}
    labels = labels_of(leaves["x"])
    loss = ours(labels, recompute=True)(**leaves)
    with torch.no_grad():
        {**leaves, "labels": labels}[name].add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@both_ways
@pytest.mark.parametrize("shape", [(9,), (10, 1), (2, 5), ()], ids=str)
def test_labels_of_another_shape_are_refused(shape, recompute):
    given = tensors()
    labels = torch.zeros(shape, dtype=torch.long)
    with pytest.raises(ValueError, match=r"labels must have shape \(10,\), got"):
        ours(labels, recompute=recompute)(**given)


def test_inputs_of_another_dtype_are_refused():
    given = tensors()
    given["x"] = given["x"].float()
    with pytest.raises(ValueError, match="input is torch.float32 but weight is torch.float64"):
        ours(labels_of(given["x"]))(**given)


@both_ways
@pytest.mark.parametrize("label", [CLASSES, -1])
def test_a_label_that_is_no_class_is_refused(label, recompute):
    given = tensors()
    labels = labels_of(given["x"])
    labels[4] = label
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        ours(labels, recompute=recompute)(**given)


@compiling
def test_compiles_as_one_graph(in_chunks):
    given = tensors()
    labels = labels_of(given["x"])
    forward = ours(labels, label_smoothing=0.1)
    torch.compiler.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, **given), run(forward, **given))
