"""The callback for the Trainer of transformers, with a tiny BERT of random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import aal
from aal.indicator import IndicatorRecorder
from aal.memory import MIB

transformers = pytest.importorskip("transformers", minversion="5.0")
from aal.integrations.training import Choices, Passes  # noqa: E402
from aal.integrations.transformers import AALCallback  # noqa: E402

BATCH = 4
EXAMPLE = {"input_ids": torch.arange(1, 33), "labels": torch.tensor(1)}


def make_model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return transformers.BertForSequenceClassification(config)


def batch() -> dict[str, torch.Tensor]:
    return {name: value.expand(BATCH, *value.shape).clone() for name, value in EXAMPLE.items()}


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Any]:
    """Make a Trainer of three steps of SGD on batches that are all the same."""

    def make(*callbacks: Any, model: nn.Module | None = None, **options: Any) -> Any:
        names = ("model_init", "optimizers", "compute_loss_func")
        own = {name: options.pop(name) for name in names if name in options}
        settings = {
            "max_steps": 3,
            "per_device_train_batch_size": BATCH,
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        args = transformers.TrainingArguments(output_dir=str(tmp_path), **(settings | options))
        if "model_init" not in own:
            own["model"] = make_model() if model is None else model
        made = transformers.Trainer(
            args=args,
            train_dataset=[EXAMPLE] * 32,
            eval_dataset=[EXAMPLE] * 4,
            callbacks=list(callbacks),
            **own,
        )
        made.remove_callback(transformers.PrinterCallback)
        return made

    return make


def loss_of(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Which nobody divides by the number of batches in a step."""
    return nn.functional.cross_entropy(outputs.logits, labels)


def is_left_alone(model: nn.Module) -> bool:
    """Does nothing stand before the model, and is nothing compressed?"""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return "forward" not in vars(model) and hooks is None


def logged(made: Any, name: str) -> dict[int, float]:
    """Values by step."""
    return {row["step"]: row[name] for row in made.state.log_history if name in row}


def test_training_that_nothing_is_chosen_for_is_as_without_the_callback(trainer):
    weights = []
    for callbacks in ((), (AALCallback("bp", "off"),)):
        model = make_model(dropout=0.1)
        trainer(*callbacks, model=model, optim="adamw_torch").train()
        weights.append(model.state_dict())
    assert_same_bits(*weights)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", ["adaptive", "exact"])
def test_weights_are_those_of_a_loop_that_enters_the_compressor_itself(
    trainer, method: str, accumulation: int
):
    options = {"bits": 2, "seed": 3} if method == "adaptive" else {}
    made = trainer(
        AALCallback("asa1", "off", method, options | {"smallest": 256}),
        gradient_accumulation_steps=accumulation,
        compute_loss_func=loss_of,
    )
    made.train()

    model = aal.convert(make_model(), "asa1").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    act = aal.compress(method, model, smallest=256, **options)
    for _ in range(3):
        for _ in range(accumulation):
            with act:
                outputs = model(input_ids=batch()["input_ids"])
            loss_of(outputs, batch()["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        act.step()
    assert_same_bits(made.model.state_dict(), model.state_dict())
    assert is_left_alone(made.model)


def test_what_a_step_saves_is_logged_once_beside_what_it_would_save(trainer):
    made = trainer(AALCallback("asa1", "approx"))
    made.train()
    expected = aal.describe(made.model.train(), **batch())
    assert expected.saved_bytes < expected.stock_bytes
    assert logged(made, "aal/saved_mib") == {1: expected.saved_bytes / MIB}
    assert logged(made, "aal/stock_mib") == {1: expected.stock_bytes / MIB}


def test_what_a_compressor_keeps_is_measured_with_it(trainer):
    found = {}
    for bits in (2, 8):
        made = trainer(AALCallback("bp", "off", "adaptive", {"bits": bits, "smallest": 256}))
        made.train()
        found[bits] = logged(made, "aal/saved_mib")[1]
    assert found[2] < found[8] < logged(made, "aal/stock_mib")[1]


def test_indicators_are_those_of_the_steps_that_are_asked_for(trainer):
    made = trainer(AALCallback("asa1", "off", indicator_every=2))
    made.train()
    model = aal.convert(make_model(), "asa1").train()
    recorder = IndicatorRecorder(model)
    with recorder.sampling():
        model(**batch())
    (first, second) = recorder.summary(recorder.take()).values()
    medians, shares = logged(made, "aal/li_median"), logged(made, "aal/li_positive")
    assert medians.keys() == shares.keys() == {1, 3}
    assert medians[1] == pytest.approx((first["median"] + second["median"]) / 2)
    assert shares[1] == pytest.approx((first["positive"] + second["positive"]) / 2)


def vectors_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for name, p in model.named_parameters() if name.endswith("aux")]


def test_vectors_of_aba_learn(trainer):
    made = trainer(AALCallback("aba1"))
    drawn = vectors_of(made.model)
    made.train()
    learned = vectors_of(made.model)
    assert len(drawn) == len(learned) == 2
    assert not any(torch.equal(a, b) for a, b in zip(drawn, learned, strict=True))


def test_drawing_vectors_of_aba_takes_no_random_numbers_of_the_users(trainer):
    states = []
    for callbacks in ((), (AALCallback("aba1"),)):
        trainer(*callbacks).train()
        states.append(torch.get_rng_state())
    assert_same_bits(*states)


def test_an_optimiser_that_lacks_the_vectors_of_aba_is_refused(trainer):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    late = (
        trainer(AALCallback("aba1"), model=model, optimizers=(optimizer, None)),
        trainer(AALCallback("aba1"), model_init=lambda: make_model()),
    )
    for made in late:
        if made.model_init is not None:
            made.create_optimizer()
        with pytest.raises(ValueError, match="bert.encoder.layer.0.output.dense .* before"):
            made.train()


def test_a_model_that_is_made_for_the_training_is_converted(trainer):
    made = trainer(AALCallback("asa1"), model_init=lambda: make_model())
    made.train()
    assert "ASA: one bit" in str(aal.describe(made.model))
    assert logged(made, "aal/saved_mib")


def test_the_model_stays_converted_and_can_be_reverted(trainer):
    made = trainer(AALCallback("asa1"))
    made.train()
    converted = made.model.eval()(**batch()).logits
    reverted = aal.revert(made.model)(**batch()).logits
    plain = make_model().eval()
    plain.load_state_dict(made.model.state_dict())
    assert_same_bits(plain(**batch()).logits, reverted)
    assert not torch.equal(converted, reverted)


def test_only_passes_of_training_steps_are_followed(trainer):
    seen = {}

    class Spy(transformers.TrainerCallback):
        def __getattribute__(self, event):
            def note(*_, model, **__):
                seen[event] = is_left_alone(model)

            return note if event.startswith("on_") else super().__getattribute__(event)

    trainer(
        AALCallback("bp", "off", "adaptive"),
        Spy(),
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
    ).train()
    followed = {event for event, alone in seen.items() if not alone}
    assert followed == {"on_step_begin", "on_substep_end"}
    assert {"on_step_end", "on_prediction_step", "on_evaluate", "on_train_end"} < seen.keys()


class Failing(nn.Module):
    """Fails in the second forward, or backward, pass of a training."""

    def __init__(self, error: type[BaseException], in_backward: bool):
        super().__init__()
        self.error, self.in_backward = error, in_backward
        self.left = 1 if in_backward else 3  # the first batch is measured in two passes

    def fail(self, *_: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_backward:
            x = x * 1
            x.register_hook(self.fail)
        else:
            self.fail()
        return x


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
def test_nothing_stays_behind_when_training_breaks_off(trainer, error, in_backward: bool):
    model, callback = make_model(), AALCallback("bp", "off", "adaptive")
    model.dropout = Failing(error, in_backward)
    made = trainer(callback, model=model)
    with pytest.raises(error):
        made.train()
    assert made.state.global_step == 1
    if in_backward:  # of which nobody is told
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        callback.detach()
    assert is_left_alone(model)


def test_training_can_begin_again_after_it_broke_off(trainer):
    model = make_model()
    model.dropout = Failing(KeyboardInterrupt, in_backward=True)
    made = trainer(AALCallback("asa1", "off", "adaptive"), model=model)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    model.load_state_dict(make_model().state_dict())
    model.zero_grad()
    model.dropout = nn.Identity()
    made.train()
    again = trainer(AALCallback("asa1", "off", "adaptive"))
    again.train()
    assert_same_bits(model.state_dict(), again.model.state_dict())
    assert is_left_alone(model)


@pytest.mark.parametrize("lean", ["exact", "approx"])
def test_checkpointed_layers_train_under_a_compressor(trainer, lean: str):
    weights = []
    for is_checkpointed in (False, True):
        model = make_model()
        if is_checkpointed:
            old = model.gradient_checkpointing_enable
            getattr(model, "activation_checkpointing_enable", old)()
        made = trainer(AALCallback("asa1", lean, "exact"), model=model)
        made.train()
        weights.append(model.state_dict())
    torch.testing.assert_close(*weights)


def test_under_autocast_the_librarys_own_wrapper_stays(trainer):
    made = trainer(AALCallback("asa1", "off", "adaptive"), bf16=True)
    made.train()
    forward = vars(made.model)["forward"]
    assert forward.__func__.__module__.startswith("accelerate.")
    assert logged(made, "aal/saved_mib")[1] < logged(made, "aal/stock_mib")[1]


def test_a_wrapper_for_several_processes_goes_around(tmp_path: Path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = aal.convert(make_model(), "asa1")
        wrapped = DistributedDataParallel(model)
        passes = Passes(
            Choices("asa1", "off", "adaptive", None, None, {}), model, "forward", measures=True
        )
        passes.follow(0)
        wrapped(**batch()).loss.backward()
        passes.unfollow()
    finally:
        torch.distributed.destroy_process_group()
    assert passes.session.report().stored_bytes < passes.session.report().raw_bytes
    assert all(p.grad is not None for p in model.parameters())


def test_a_saved_model_is_loaded_and_converted(trainer, tmp_path: Path):
    made = trainer(AALCallback("asa1"))
    made.train()
    made.save_model(str(tmp_path / "saved"))
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    aal.convert(loaded, "asa1")
    assert_same_bits(loaded.eval()(**batch()).logits, made.model.eval()(**batch()).logits)


def test_training_resumes_with_the_vectors_of_aba(trainer):
    made = trainer(AALCallback("aba1"), save_strategy="steps", save_steps=2)
    made.train()
    resumed = trainer(AALCallback("aba1"))
    resumed.train(resume_from_checkpoint=f"{made.args.output_dir}/checkpoint-2")
    assert_same_bits(resumed.model.state_dict(), made.model.state_dict())


WRONG = {
    "rule": (("asa5",), {}, "unknown rule 'asa5'"),
    "lean": (("asa1", "lossy"), {}, "unknown lean mode"),
    "option": (("asa1",), {"epsilno": 1}, "unknown option 'epsilno'"),
    "placement": (("asa",), {"placement": {1: "*"}}, "placement is for rules with a level"),
    "method": (("asa1", "off", "zip"), {}, "unknown method 'zip'"),
    "bits": (("asa1", "off", "adaptive", {"bits": 40}), {}, "bits"),
    "options without method": (("asa1", "off", None, {"bits": 4}), {}, "change nothing"),
    "a method that probes": (("asa1", "off", "gact", {"level": "L2"}), {}, "passes of its own"),
    "interval": (("asa1",), {"indicator_every": 0}, "indicator_every is a number of steps"),
    "nothing to indicate": (("bp",), {"indicator_every": 5}, "are 1"),
}


@pytest.mark.parametrize("arguments, options, message", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused_at_once(arguments, options, message: str):
    with pytest.raises(ValueError, match=message) as error:
        AALCallback(*arguments, **options)
    assert "\n" not in str(error.value)


# The compiler of PyTorch 2.11 imports what it calls deprecated.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_compiled_model_takes_a_rule_only(trainer):
    made = trainer(AALCallback("asa1", "off", "adaptive"), torch_compile=True)
    with pytest.raises(ValueError, match="with torch_compile"):
        made.train()
