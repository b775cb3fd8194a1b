"""Entering and leaving a session, among everything else that hooks, compiles or runs beside it."""

import contextlib
import copy
import multiprocessing
import pickle
import random
import threading
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hazard_models import (
    EXACT,
    FORGETFUL,
    LOSSY,
    METHODS,
    OPTIONS,
    ROUNDING_RANDOMLY,
    TOLERANCE,
    Block,
    assert_right,
    gradients,
    resnet,
    run_all,
    session_of,
    vit,
    with_methods,
)
from helpers import assert_same_bits, compiling, cotangent_of
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import aal
from aal.compression.handle import Handle
from aal.compression.session import Session
from aal.memory import saved_bytes

every_method = pytest.mark.parametrize("method", METHODS)
both_checkpoints = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])


def plain(model: nn.Module, x: Tensor) -> list[Tensor]:
    return gradients(lambda: model(x), list(model.parameters()), aal.compress("none"))


def compressed(model: nn.Module, x: Tensor, session: Session) -> list[Tensor]:
    return gradients(lambda: model(x), list(model.parameters()), session)


def active_hooks() -> object:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


# --------------------------------------------------------------------------------------------------
# Other hooks


@every_method
def test_hooks_outside_see_what_is_kept_and_what_stands_in_for_the_rest(method):
    model, x, seen = vit(), torch.randn(2, 5, 16), []

    def pack(tensor: Tensor) -> np.ndarray | Tensor:
        assert not tensor.requires_grad
        seen.append(tensor.nbytes)
        return tensor.clone()

    expected = plain(model, x)
    with saved_tensors_hooks(pack, lambda packed: packed):
        session = session_of(method, model)
        found = compressed(model, x, session)
    assert_right(method, found, expected)
    rows = session.report().rows
    handed = [row for row in rows if method != "offload" or row.codec == "kept"]  # the rest it has
    assert sum(seen) >= sum(row.stored_bytes for row in handed) * 0.99


@every_method
def test_save_on_cpu_outside(method):
    model, x = vit(), torch.randn(2, 5, 16)
    expected = plain(model, x)
    with save_on_cpu():
        found = compressed(model, x, session_of(method, model))
    assert_right(method, found, expected)


@every_method
def test_save_on_cpu_inside(method):
    model, x = vit(), torch.randn(2, 5, 16)
    expected = plain(model, x)
    inner = model[0].forward

    def forward(x: Tensor) -> Tensor:
        with save_on_cpu():
            return inner(x)

    model[0].forward = forward
    session = session_of(method, model)
    assert_right(method, compressed(model, x, session), expected)
    sites = {row.site.split(".")[0].split("[")[0] for row in session.report().rows}
    assert "1" in sites and "0" not in sites


@every_method
def test_two_sessions_do_not_nest(method):
    model, x = vit(), torch.randn(2, 5, 16)
    outer, inner = session_of(method, model), session_of("adaptive", model)
    with outer:
        with pytest.raises(RuntimeError, match=f"do not nest: '{method}' is active"), inner:
            pass
        y = model(x)
    leaves = list(model.parameters())
    grads = torch.autograd.grad(y, leaves, cotangent_of(y))
    assert_right(method, [y.detach(), *grads], plain(model, x))
    assert active_hooks() is None


@every_method
def test_a_session_may_be_entered_within_itself(method):
    model, x = vit(), torch.randn(2, 5, 16)
    session = session_of(method, model)
    inner = model[1].forward

    def forward(x: Tensor) -> Tensor:
        with session:
            return inner(x)

    expected = plain(model, x)
    model[1].forward = forward
    assert_right(method, compressed(model, x, session), expected)
    assert active_hooks() is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_session_inside_other_hooks_inside_itself_is_refused():
    session = session_of("exact")
    with session, save_on_cpu(), pytest.raises(RuntimeError, match="innermost"), session:
        pass
    assert active_hooks() is None


@every_method
def test_a_region_without_hooks_says_so(method):
    model, x = vit(), torch.randn(2, 5, 16)
    session = session_of(method, model)
    message = "no hooks here"
    with torch.autograd.graph.disable_saved_tensors_hooks(message):
        with pytest.raises(RuntimeError, match=message), session:
            model(x)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with session, pytest.raises(RuntimeError, match=message):
        with torch.autograd.graph.disable_saved_tensors_hooks(message):
            model(x)
    assert active_hooks() is None
    assert_right(method, compressed(model, x, session), plain(model, x))


@every_method
def test_transforms_of_functions_are_refused_by_pytorch(method):
    model, x = vit(), torch.randn(2, 5, 16)
    session = session_of(method, model)
    with pytest.raises(RuntimeError, match="saved tensor hooks"), session:
        torch.func.grad(lambda x: model(x).sum())(x)
    assert active_hooks() is None
    assert_right(method, compressed(model, x, session), plain(model, x))


@every_method
def test_vmap_inside_the_model(method):
    weights, x = torch.randn(4, 16, 3, requires_grad=True), torch.randn(5, 16, requires_grad=True)

    def forward() -> Tensor:
        return torch.vmap(lambda w: ((x * 2) @ w).sin())(weights).exp()

    expected = gradients(forward, [weights, x], aal.compress("none"))
    assert_right(method, gradients(forward, [weights, x], session_of(method)), expected)


# --------------------------------------------------------------------------------------------------
# Checkpoints


class Checkpointed(nn.Module):
    """A model of which some parts are checkpointed."""

    def __init__(self, parts: nn.Sequential, which: set[int], reentrant: bool):
        super().__init__()
        self.parts, self.which, self.reentrant = parts, which, reentrant

    def forward(self, x: Tensor) -> Tensor:
        self.boundaries = []
        for i, part in enumerate(self.parts):
            if i in self.which:
                self.boundaries.append(x.untyped_storage()._weak_ref())
                x = checkpoint(part, x, use_reentrant=self.reentrant)
            else:
                x = part(x)
        return x


def is_freed(boundary: int) -> bool:
    found = torch.UntypedStorage._new_with_weak_ptr(boundary)
    return found is None


CODECS = {
    "adaptive": "groups",
    "exact": "kept",
    "actnn": "rows",
    "mesa": "running",
    "gact": "ranges",
    "division": "ranges",
    "fp8": "e4m3",
    "offload": "raw",
}


@both_checkpoints
@every_method
def test_boundaries_of_checkpoints_are_compressed(method, reentrant):
    parts = nn.Sequential(nn.Linear(16, 16), Block(dropout=0.2), Block(dropout=0.2), nn.Tanh())
    model, x = Checkpointed(parts, {1, 2}, reentrant), torch.randn(2, 5, 16)
    expected = plain(model, x)
    session = session_of(method, model)
    assert_right(method, compressed(model, x, session), expected)
    rows = [row for row in session.report().rows if row.consumer == "checkpoint"]
    assert [row.codec for row in rows] == [CODECS[method]] * 2
    with session:
        y = model(x)
    freed = [is_freed(boundary) for boundary in model.boundaries]
    assert y.requires_grad and freed == [method in LOSSY] * 2


@both_checkpoints
@every_method
@pytest.mark.parametrize("backward", ["inside", "outside"])
def test_backward_through_checkpoints(method, backward, reentrant):
    parts = nn.Sequential(nn.Linear(16, 16), Block(dropout=0.2), Block(dropout=0.2), nn.Tanh())
    model, x = Checkpointed(parts, {1, 2}, reentrant), torch.randn(2, 5, 16)
    expected, leaves = plain(model, x), list(model.parameters())
    torch.manual_seed(3)
    with session_of(method, model):
        y = model(x)
        if backward == "inside":
            y.backward(cotangent_of(y))
    if backward == "outside":
        y.backward(cotangent_of(y))
    assert_right(method, [y.detach(), *(leaf.grad for leaf in leaves)], expected)


@both_checkpoints
@pytest.mark.parametrize(
    ("method", "region"),
    with_methods(
        [torch.relu, nn.MaxPool2d(2), nn.ReLU(), nn.AvgPool2d(2)], few=[nn.ReLU(), nn.MaxPool2d(2)]
    ),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("backward", ["inside", "outside"])
def test_a_boundary_is_no_mask_whatever_the_region_does_first(method, region, reentrant, backward):
    conv = nn.Conv2d(3, 4, 3)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.conv(x) * 1)
            return checkpoint(
                lambda h: region(h * 3).square() if backward == "outside" else region(h).square(),
                h,
                use_reentrant=reentrant,
            )

    model, x = Net(), torch.randn(2, 3, 8, 8)
    expected = plain(model, x)
    with session_of(method, model):
        y = model(x)
        if backward == "inside":
            y.backward(cotangent_of(y))
    if backward == "outside":
        y.backward(cotangent_of(y))
    assert_right(method, [y.detach(), *(p.grad for p in model.parameters())], expected)


@both_checkpoints
@pytest.mark.parametrize("region", [torch.relu, F.relu, nn.ReLU()], ids=["C", "Python", "module"])
def test_what_a_checkpoint_computes_again_is_no_boundary(region, reentrant):
    session, encoded, x = session_of("adaptive"), [], torch.randn(40, 9, requires_grad=True)
    with session, session.sampling(lambda site, *_: encoded.append(site)):
        checkpoint(region, x * 1, use_reentrant=reentrant).sum().backward()
    assert len(encoded) == 1


@both_checkpoints
@every_method
def test_a_session_inside_a_checkpoint(method, reentrant):
    block, x = Block(dropout=0.2), torch.randn(2, 5, 16, requires_grad=True)
    session, leaves = session_of(method, block), [x, *block.parameters()]

    def run(session) -> list[Tensor]:
        def region(x: Tensor) -> Tensor:
            with session:
                return block(x)

        torch.manual_seed(3)
        y = checkpoint(region, x * 1, use_reentrant=reentrant)
        y.backward(cotangent_of(y))
        found = [y.detach(), *(leaf.grad for leaf in leaves)]
        for leaf in leaves:
            leaf.grad = None
        return found

    assert_right(method, run(session), run(aal.compress("none")))
    assert active_hooks() is None


# --------------------------------------------------------------------------------------------------
# Random numbers


@pytest.mark.parametrize("method", ["none", *METHODS])
def test_nobodys_random_state_is_touched(method):
    model, x = vit(0.1), torch.randn(2, 5, 16)

    def state() -> tuple:
        numbers = np.random.get_state()
        return random.getstate(), numbers[1].tolist(), numbers[2:], torch.get_rng_state().tolist()

    def step(session) -> tuple:
        torch.manual_seed(5)
        with session:
            y = model(x)
        y.sum().backward()
        session.step()
        return state()

    class Plain(contextlib.nullcontext):
        def step(self) -> None: ...

    assert step(session_of(method, model)) == step(Plain())


@every_method
def test_the_same_seed_gives_the_same_gradients(method):
    model, xs = vit(0.1), torch.randn(3, 2, 5, 16)

    def steps(seed: int) -> list[Tensor]:
        session = session_of(method, model, seed=seed)
        found = []
        for x in xs:
            found += compressed(model, x, session)
            session.step()
        return found

    assert_same_bits(steps(0), steps(0))
    others = zip(steps(0), steps(1), strict=True)
    assert all(torch.equal(one, other) for one, other in others) == (
        method not in ROUNDING_RANDOMLY
    )


@pytest.mark.parametrize("method", ROUNDING_RANDOMLY)
def test_every_pass_rounds_anew(method):
    model, x = vit(), torch.randn(2, 5, 16)
    session = session_of(method, model)
    first, second = compressed(model, x, session), compressed(model, x, session)
    assert not all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@every_method
def test_rehearsals_round_alike_and_do_not_shift_what_comes(method):
    model, x = vit(0.1), torch.randn(2, 5, 16)
    options, leaves = FORGETFUL.get(method, {}), list(model.parameters())

    def rehearsed(session: Session) -> list[Tensor]:
        torch.manual_seed(3)
        with session.rehearsal():
            y = model(x)
        return list(torch.autograd.grad(y, leaves, cotangent_of(y)))

    session, other = (session_of(method, model, **options) for _ in range(2))
    assert_same_bits(compressed(model, x, session), compressed(model, x, other))
    assert_same_bits(rehearsed(session), rehearsed(session))
    assert_same_bits(compressed(model, x, session), compressed(model, x, other))


@pytest.mark.parametrize("build", [vit, resnet])
def test_the_off_switch_is_plain_pytorch(build):
    model = build()
    x = torch.randn(2, 5, 16) if build is vit else torch.randn(2, 3, 16, 16)
    other, session = copy.deepcopy(model), aal.compress("none", model=model)
    torch.manual_seed(3)
    y = other(x)
    expected = torch.autograd.grad(y, list(other.parameters()), cotangent_of(y))
    state = torch.get_rng_state()
    assert_same_bits(compressed(model, x, session), [y.detach(), *expected])
    assert_same_bits(torch.get_rng_state(), state)
    assert_same_bits(model.state_dict(), other.state_dict())
    with session:
        assert active_hooks() is None
    assert session.report().rows == []


# --------------------------------------------------------------------------------------------------
# Passes without gradients, copies, threads and processes


@every_method
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_passes_without_gradients_change_nothing(method, mode):
    model, x = vit(), torch.randn(2, 5, 16)
    session = session_of(method, model)
    compressed(model, x, session)
    before, forwards = str(session.report()), session.forwards
    model.eval()
    with session, mode():
        assert_same_bits(model(torch.randn(3, 4, 16)).shape, (3, 4, 5))
    assert str(session.report()) == before
    assert session.forwards == forwards


@every_method
def test_no_hook_stays_on_the_model(method):
    model, x = vit(), torch.randn(2, 5, 16)
    compressed(model, x, session_of(method, model))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(plain(twin, x), plain(model, x))
        for module in twin.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks


@every_method
def test_a_copy_made_inside_a_session_does_without(method):
    model, x = vit(), torch.randn(2, 5, 16)
    session = session_of(method, model)
    with session:
        twin = copy.deepcopy(model)
        model(x)
        sites = {row.site for row in session.report().rows}
        with torch.no_grad():
            twin(x)  # an average of weights is evaluated, say
        twin(x)
    others = {row.site for row in session.report().rows} - sites
    assert session.forwards == 1
    assert others and all(site.startswith("(outside)") for site in others)
    assert_same_bits(plain(twin, x), plain(model, x))


@every_method
def test_a_model_that_is_stored_inside_a_session(method):
    model, x = vit(), torch.randn(2, 5, 16)
    with session_of(method, model):
        twin = pickle.loads(pickle.dumps(model))
        model(x)
    for copied in (twin, pickle.loads(pickle.dumps(copy.deepcopy(twin)))):
        assert_same_bits(plain(copied, x), plain(model, x))


@pytest.mark.parametrize("method", LOSSY)
def test_models_that_are_not_called_as_a_whole(method):
    """Every pass rounds anew, adapts and has its own report all the same."""
    model, x = vit(), torch.randn(2, 5, 16)
    session = session_of(method, model)
    found = []
    for _ in range(3):
        with session:
            y = model[2](model[1](model[0](x)))
        found.append(torch.autograd.grad(y.sum(), model[1].expand.weight)[0])
        rows = len(session.report().rows)
        session.step()
    assert session.forwards == 3
    assert method not in ROUNDING_RANDOMLY or not torch.equal(found[1], found[2])
    with session:
        model[1](model[0](x))
    assert len(session.report().rows) < rows


@every_method
def test_what_is_saved_outside_of_the_model_has_sites_of_its_own(method):
    """A tensor of the model's own forward pass is another than one of the loss."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.layer(x) * 1)

    model, x = Model(), torch.randn(40, 16, requires_grad=True)
    session = session_of(method, model)
    for _ in range(2):
        with session:
            loss = F.gelu(model(F.gelu(x * 1)) * 1000).sin().sum()
        loss.backward()
    names = [row.site for row in session.report().rows]
    assert len(set(names)) == len(names)
    assert {name.partition("[")[0] for name in names} == {"(outside)", "(top)", "layer"}


@every_method
def test_a_session_entered_once_for_many_steps(method):
    layer = nn.Linear(16, 16)
    session, rows = session_of(method), []
    with session:
        for _ in range(4):
            layer(torch.randn(40, 16, requires_grad=True)).sin().sum().backward()
            session.step()
            rows.append(len(session.report().rows))
    assert session.forwards == 5 and max(rows) <= 4
    assert len(list(session.sites)) <= 4


@every_method
def test_other_threads_are_not_compressed(method):
    model, other, x = vit(), nn.Linear(16, 3), torch.randn(5, 16)
    session, found = session_of(method, model), {}

    def work() -> None:
        y = other(x)
        found["handles"] = isinstance(y.grad_fn._raw_saved_mat1.data, Handle)
        found["grads"] = torch.autograd.grad(y, list(other.parameters()), cotangent_of(y))

    with session:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    y = other(x)
    assert not found["handles"]
    assert_same_bits(
        found["grads"], torch.autograd.grad(y, list(other.parameters()), cotangent_of(y))
    )


@every_method
def test_threads_with_sessions_of_their_own(method):
    x, failures = torch.randn(2, 5, 16), []
    models = [vit() for _ in range(3)]
    expected = [plain(model, x) for model in models]

    def work(number: int) -> None:
        session, model = session_of(method, models[number]), models[number]
        for _ in range(5):
            with session:
                y = model(x)
            grads = torch.autograd.grad(y, list(model.parameters()), cotangent_of(y))
            try:
                assert_right(method, [y.detach(), *grads], expected[number])
            except AssertionError as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    run_all(threads)
    assert not failures


@every_method
def test_forward_in_one_thread_and_backward_in_another(method):
    model, x, found = vit(), torch.randn(2, 5, 16), []
    leaves = list(model.parameters())
    with session_of(method, model):
        y = model(x)

    def backward():
        torch.set_num_threads(1)  # a new thread has its own number, and sums in another order
        found.extend(torch.autograd.grad(y, leaves, cotangent_of(y)))

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert_right(method, [y.detach(), *found], plain(model, x))


def _train_as_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    model, x = nn.parallel.DistributedDataParallel(vit()), torch.randn(2, 4, 5, 16)[rank]
    for method in METHODS:
        session = session_of(method, model)
        for _ in range(2):
            model.zero_grad()
            with session:
                y = model(x)
            y.square().mean().backward()
            session.step()
        torch.save((session.seed, [p.grad for p in model.parameters()]), f"{folder}/{method}{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_train_as_rank, args=(rank, str(tmp_path))) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    torch.manual_seed(0)
    model = vit()
    y = model(torch.randn(2, 4, 5, 16).flatten(0, 1))
    y.square().mean().backward()
    expected = [p.grad for p in model.parameters()]
    for method in METHODS:
        (seed, found), (other_seed, others) = (
            torch.load(tmp_path / f"{method}{rank}", weights_only=True) for rank in range(2)
        )
        assert seed != other_seed
        assert_same_bits(found, others)
        if method in EXACT:
            torch.testing.assert_close(found, expected)
        else:
            assert_right(method, [y.detach(), *found], [y.detach(), *expected])


# --------------------------------------------------------------------------------------------------
# Compilers


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@compiling
@pytest.mark.parametrize(
    ("method", "case"),
    with_methods(
        [*product(["block", "model"], ["torch.compile", "in place"])], few=[("block", "in place")]
    ),
    ids=str,
)
def test_compiled_regions(method, case, fresh_compiler):
    region, how = case
    model, x = vit(), torch.randn(2, 5, 16)
    expected, leaves = plain(model, x), list(model.parameters())
    target = model[0] if region == "block" else model
    if how == "in place":
        target.compile(backend="aot_eager", fullgraph=True)
    elif region == "block":
        model[0] = torch.compile(model[0], backend="aot_eager", fullgraph=True)
    else:
        model = torch.compile(model, backend="aot_eager", fullgraph=True)
    session = session_of(method, model)
    for _ in range(3):
        found = gradients(lambda: model(x), leaves, session)
        for one, other in zip(found, expected, strict=True):
            tolerance = max(TOLERANCE[method], 1e-5)
            assert (one - other).norm() <= tolerance * other.norm() + tolerance
    assert session.report().rows
    assert session.forwards == 3


@compiling
@pytest.mark.parametrize("method", ["adaptive", "exact"])
def test_a_compiled_wrapper_of_the_model_that_is_given(method, fresh_compiler):
    model, x = vit(), torch.randn(2, 5, 16)
    expected, leaves = plain(model, x), list(model.parameters())
    wrapper, session = torch.compile(model, backend="aot_eager"), session_of(method, model)
    for _ in range(3):
        found = gradients(lambda: wrapper(x), leaves, session)
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() <= 0.1 * other.norm() + 0.1
    assert session.forwards == 3


@compiling
def test_a_session_cannot_be_entered_inside_a_compiled_function(fresh_compiler):
    model, session = vit(), session_of("adaptive")

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x: Tensor) -> Tensor:
        with session:
            return model(x)

    # Ours, or the compiler's own, which refuses before it comes to ours.
    refusals = "compile the model, or blocks of it|with.*context|enter a `Session` context manager"
    with pytest.raises(Exception, match=refusals):
        step(torch.randn(2, 5, 16))
    assert active_hooks() is None


# --------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize(("method", "build"), with_methods([vit, resnet], few=[resnet]))
def test_saved_memory_is_what_the_report_says(build, method):
    model = build()
    x = torch.randn(8, 16, 16) if build is vit else torch.randn(8, 3, 32, 32)
    session = session_of(method, model)

    def forward(x: Tensor) -> Tensor:
        with session:
            return model(x)

    before, after = saved_bytes(model, x), saved_bytes(forward, x)
    largest = {"exact": 0.9, "offload": 1.01}  # on CPU what is offloaded stays where it is
    assert after < before * largest.get(method, 0.5)
    report = session.report()
    assert after == pytest.approx(report.stored_bytes, rel=0.1)
    assert before == pytest.approx(report.raw_bytes, rel=0.1)


def test_options_of_this_file_are_methods():
    assert set(METHODS) == set(OPTIONS)
