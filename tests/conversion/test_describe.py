import torch
from torch import nn

import aal
from aal.memory import saved_bytes


def model():
    block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    return nn.Sequential(block, nn.Sequential(*block), nn.Linear(16, 2))


PLACEMENT = {1: "*.3", 2: "*.1"}


def test_rows_say_what_became_what():
    description = aal.describe(aal.convert(model(), "asa1", placement={1: "[01].3"}, lean="exact"))
    rows = [(row.name, row.count, row.was, row.became) for row in description.rows]
    assert rows == [
        ("*.*", 1, "LayerNorm", "its result can be recomputed"),
        ("*.*", 1, "Linear", "keeps no input that can be recomputed"),
        ("*.*", 1, "ReLU", "keeps one bit"),
        ("*.*", 1, "Linear", "ASA: one bit, behind a ReLU"),
        ("*", 1, "Linear", "keeps no input that can be recomputed"),
    ]
    assert description.saved_bytes is None and description.stock_bytes is None


def test_bytes_are_those_of_the_model_before_and_after():
    x = torch.randn(8, 16)
    net = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    before = saved_bytes(net, x)
    aal.convert(net, "asa1", placement={1: "3", 2: "1"}, lean="exact")
    description = aal.describe(net, x)
    assert (description.saved_bytes, description.stock_bytes) == (saved_bytes(net, x), before)
    assert sum(row.saved_bytes for row in description.rows) == saved_bytes(net, x)


def test_named_inputs_and_state_are_respected():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.BatchNorm1d(4), nn.Linear(4, 4)

        def forward(self, *, left, right):
            return self.layer(self.norm(left + right))

    net = aal.convert(Named(), "asa")
    state = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    description = aal.describe(net, left=torch.randn(3, 4), right=torch.randn(3, 4))
    assert description.stock_bytes > 0
    torch.testing.assert_close(net.state_dict(), state)
    left = torch.get_rng_state()
    torch.set_rng_state(random)
    torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(torch.get_rng_state(), left)


def test_table_is_aligned_and_says_what_was_left_alone():
    net = model()
    net[2].weight.requires_grad_(False)
    text = str(aal.describe(aal.convert(net, "asa"), torch.randn(2, 16)))
    lines = text.splitlines()
    assert lines[0].split() == ["module", "was", "became", "saved", "MiB", "before"]
    assert any(line.startswith("total") for line in lines)
    assert lines[-1] == ("left alone: *: its weight is frozen, so that it keeps no input anyway")


def became_by_class(description):
    return {row.was: row.became for row in description.rows}


def test_no_saving_is_claimed_where_the_bytes_are_those_of_before():
    """Tanh keeps its result, and the last layer keeps the same; so does a ReLU before a layer."""
    x = torch.randn(8, 16)
    for act, is_changed in ((nn.Tanh(), False), (nn.ReLU(), True)):
        net = aal.convert(
            nn.Sequential(nn.Linear(16, 16), act, nn.Linear(16, 4)), "bp", lean="exact"
        )
        description = aal.describe(net, x)
        assert description.saved_bytes == description.stock_bytes
        words = {row.became for row in description.rows if row.was != "Tanh"}
        assert words == {"keeps what it kept"}
        assert ("ReLU" in became_by_class(description)) == is_changed


def test_a_relu_says_when_it_keeps_bits():
    layers = nn.Linear(16, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4)
    net = aal.convert(nn.Sequential(*layers), "bp", lean="exact")
    waits = "keeps one bit if its result is recomputed"
    assert became_by_class(aal.describe(net))["ReLU"] == waits
    description = aal.describe(net, torch.randn(8, 16))
    assert became_by_class(description)["ReLU"] == waits
    assert description.saved_bytes < description.stock_bytes
    net = aal.convert(nn.Sequential(*layers), "asa")
    assert became_by_class(aal.describe(net))["ReLU"] == "keeps one bit"


def test_a_parameter_of_the_users_called_aux_is_not_abas():
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].register_parameter("aux", nn.Parameter(torch.ones(4)))
    assert became_by_class(aal.describe(aal.convert(net, "asa")))["Linear"] == "ASA: one bit"


def test_reasons_of_parts_are_shown_with_the_whole():
    net = model()
    net[0][1].weight.requires_grad_(False)
    aal.convert(net[0], "asa", include=["1", "3"])
    reason = "its weight is frozen, so that it keeps no input anyway"
    assert aal.describe(net).left_alone == {"*.*": reason}
    assert aal.describe(net[0]).left_alone == {"*": reason}


def test_a_model_that_was_not_converted_has_no_rows():
    description = aal.describe(model())
    assert description.rows == [] and description.left_alone == {}
    assert str(description).split() == ["module", "was", "became"]
