"""Mesa's policy files: what a policy sets, when, and how mistakes in it are reported."""

from dataclasses import FrozenInstanceError, replace

import pytest

from aal.compression.mesa_policy import DEFAULT_POLICY, TAGS, MesaPolicy, Settings

EXAMPLE = """
# compress the linear layers, but not the last one
on fc:                        # a comment after a section
    by_index: all
        enable: True
        level: 64
    by_index: 3, 11
        enable: False         # and after a value
on softmax: 2
    by_index: 0 2,4
    enable: True
    ema_decay: 0.5
"""


def test_settings_are_of_the_original_where_no_rule_applies():
    policy = MesaPolicy.parse(EXAMPLE)
    assert Settings() == Settings(enable=False, level=256, ema_decay=0.9)
    assert {policy.settings(tag, 0) for tag in TAGS if tag != "fc"} == {Settings()}


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n   # at all"])
def test_a_policy_may_say_nothing(text):
    policy = MesaPolicy.parse(text)
    assert {policy.settings(tag, 5, epoch=7) for tag in TAGS} == {Settings()}


def test_later_rules_override_what_they_set():
    policy = MesaPolicy.parse(EXAMPLE)
    for index in range(15):
        assert policy.settings("fc", index) == Settings(index not in (3, 11), level=64)


def test_the_last_value_of_a_key_in_a_rule_counts():
    policy = MesaPolicy.parse("on fc:\n by_index: all\n level: 4\n level: 16\n")
    assert policy.settings("fc", 0) == Settings(level=16)


def test_a_tag_may_have_several_sections():
    policy = MesaPolicy.parse(
        "on bn:\nby_index: all\nenable: True\non fc:\nby_index: all\nlevel: 8\n"
        "on bn:\nby_index: 1\nlevel: 16"
    )
    assert policy.settings("bn", 0) == Settings(True)
    assert policy.settings("bn", 1) == Settings(True, 16)
    assert policy.settings("fc", 1) == Settings(level=8)


@pytest.mark.parametrize("indices", ["1 4 30", "1,4,30", "1, 4, 30", " 30 ,4\t1 ", "4,4 1 30,"])
def test_indices_are_separated_by_spaces_or_commas(indices):
    policy = MesaPolicy.parse(f"on conv:\nby_index: {indices}\nenable: True")
    assert [i for i in range(40) if policy.settings("conv", i).enable] == [1, 4, 30]


def test_epochs_begin_when_they_come():
    policy = MesaPolicy.parse(EXAMPLE)
    expected = Settings(True, ema_decay=0.5)
    assert [policy.settings("softmax", 2, epoch) == expected for epoch in range(4)] == [
        False,
        False,
        True,
        True,
    ]
    assert policy.settings("softmax", 1, 2) == Settings()
    assert policy.settings("fc", 0, 3) == policy.settings("fc", 0, 0)


@pytest.mark.parametrize("epochs", ["0 20", "0, 20", "20,0"])
def test_a_section_takes_effect_again_at_each_of_its_epochs(epochs):
    policy = MesaPolicy.parse(
        f"on fc: {epochs}\nby_index: all\nlevel: 16\non fc: 10\nby_index: all\nlevel: 8\n"
    )
    levels = [policy.settings("fc", 0, epoch).level for epoch in (0, 9, 10, 19, 20, 99)]
    assert levels == [16, 16, 8, 8, 16, 16]


def test_a_section_with_epochs_overrides_one_without_that_follows():
    policy = MesaPolicy.parse("on fc: 0\nby_index: 0\nlevel: 8\non fc:\nby_index: all\nlevel: 16")
    assert policy.settings("fc", 0).level == 8
    assert policy.settings("fc", 1).level == 16


def test_of_sections_of_the_same_epoch_the_lower_one_counts():
    policy = MesaPolicy.parse(
        "on fc: 5\nby_index: 0\nlevel: 8\non fc: 3 5\nby_index: all\nlevel: 16"
    )
    assert [policy.settings("fc", 0, epoch).level for epoch in (2, 3, 5)] == [256, 16, 16]


@pytest.mark.parametrize("first_line", ["on fc", "on fc:", "on  fc :", "\ton fc:"])
def test_space_and_the_colon_after_a_tag_do_not_matter(first_line):
    policy = MesaPolicy.parse(f"{first_line}\r\n by_index :all \r\n\r\nenable:True\r\n")
    assert policy.settings("fc", 0) == Settings(True)


@pytest.mark.parametrize(("text", "value"), [("0", 0.0), ("0.99", 0.99), ("9e-1", 0.9)])
def test_ends_of_the_ranges_are_taken(text, value):
    policy = MesaPolicy.parse(f"on fc:\nby_index: all\nlevel: 2\nema_decay: {text}\n")
    settings = policy.settings("fc", 0)
    assert settings == Settings(level=2, ema_decay=value)
    assert [type(v) for v in (settings.level, settings.ema_decay)] == [int, float]


def test_everything_but_convolutions_is_compressed_by_default():
    for tag in TAGS:
        expected = Settings(enable=tag != "conv", level=256, ema_decay=0.9)
        assert {DEFAULT_POLICY.settings(tag, index) for index in (0, 1, 100)} == {expected}


def test_equal_texts_give_equal_policies_that_do_not_change():
    policy = MesaPolicy.parse(EXAMPLE)
    assert policy == MesaPolicy.parse(EXAMPLE + "# the end")
    assert hash(policy) == hash(MesaPolicy.parse(EXAMPLE))
    with pytest.raises(FrozenInstanceError):
        policy.sections = ()
    with pytest.raises(FrozenInstanceError):
        policy.settings("fc", 0).level = 2


RULE = "on fc:\nby_index: all\n"
NUMBER = "a whole number from 0 up"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("by_index: all", "line 1: found 'by_index: all', expected 'on TAG: [epochs]'"),
        ("\n# x\nlevel: 8", "line 3: found 'level: 8', expected 'on TAG: [epochs]'"),
        ("on:\n", "line 1: found 'on:', expected 'on TAG: [epochs]'"),
        ("on fc bn:\n", "line 1: found 'on fc bn:', expected 'on TAG: [epochs]'"),
        (
            "on linear:\n",
            "line 1: tag is 'linear', expected one of fc, conv, gelu, bn, relu, softmax, matmul, "
            "layernorm",
        ),
        ("on fc: first\n", f"line 1: found 'first', expected {NUMBER}"),
        ("on fc: 1 -2\n", f"line 1: found '-2', expected {NUMBER}"),
        (
            "on fc:\nlevel: 8",
            "line 2: found 'level: 8', expected 'by_index: all' or 'by_index: INDICES'",
        ),
        (
            "on fc:\non bn:",
            "line 2: found 'on bn:', expected 'by_index: all' or 'by_index: INDICES'",
        ),
        ("on fc:\n\n", "line 2: found the end, expected 'by_index: all' or 'by_index: INDICES'"),
        ("on fc:\nby_index:\n", f"line 2: found no indices, expected 'all' or {NUMBER}"),
        ("on fc:\nby_index: ,\n", f"line 2: found no indices, expected 'all' or {NUMBER}"),
        ("on fc:\nby_index: all 3\n", f"line 2: found 'all', expected {NUMBER}"),
        ("on fc:\nby_index: 1-3\n", f"line 2: found '1-3', expected {NUMBER}"),
        ("on fc:\nby_index: -1\n", f"line 2: found '-1', expected {NUMBER}"),
        (
            RULE + "by_index: 3\n",
            "line 3: found 'by_index: 3', expected 'enable: VALUE', 'level: VALUE' or "
            "'ema_decay: VALUE'",
        ),
        (
            RULE,
            "line 2: found the end, expected 'enable: VALUE', 'level: VALUE' or 'ema_decay: VALUE'",
        ),
        (
            RULE + "enable: True\nlevel 8\n",
            "line 4: found 'level 8', expected 'enable: VALUE', 'level: VALUE' or "
            "'ema_decay: VALUE' or 'by_index: all' or 'by_index: INDICES' or 'on TAG: [epochs]'",
        ),
        (
            RULE + "bits: 8\n",
            "line 3: found 'bits: 8', expected 'enable: VALUE', 'level: VALUE' or "
            "'ema_decay: VALUE'",
        ),
        (
            RULE + "level\n",
            "line 3: found 'level', expected 'enable: VALUE', 'level: VALUE' or 'ema_decay: VALUE'",
        ),
        (
            RULE + "level of all: 8\n",
            "line 3: found 'level of all: 8', expected 'enable: VALUE', 'level: VALUE' or "
            "'ema_decay: VALUE'",
        ),
        (RULE + "enable: yes\n", "line 3: enable is 'yes', expected True or False"),
        (RULE + "enable:\n", "line 3: enable is '', expected True or False"),
        (RULE + "level: 8.5\n", "line 3: level is '8.5', expected a whole number"),
        (RULE + "level: 8: 9\n", "line 3: level is '8: 9', expected a whole number"),
        (RULE + "level: 1\n", "line 3: level is 1, expected 2 to 256"),
        (RULE + "level: 257\n", "line 3: level is 257, expected 2 to 256"),
        (RULE + "ema_decay: much\n", "line 3: ema_decay is 'much', expected a number"),
        (RULE + "ema_decay: 1\n", "line 3: ema_decay is 1.0, expected 0 or more and below 1"),
        (RULE + "ema_decay: -0.1\n", "line 3: ema_decay is -0.1, expected 0 or more and below 1"),
        (RULE + "ema_decay: nan\n", "line 3: ema_decay is nan, expected 0 or more and below 1"),
    ],
)
def test_what_is_not_understood_is_reported_with_its_line(text, message):
    with pytest.raises(ValueError) as raised:
        MesaPolicy.parse(text)
    assert str(raised.value) == message


@pytest.mark.parametrize("changes", [{"level": 1}, {"level": 257}, {"ema_decay": 1.0}], ids=str)
def test_settings_out_of_range_can_not_be_made(changes):
    with pytest.raises(ValueError, match="expected"):
        replace(Settings(), **changes)


def test_settings_are_asked_for_by_a_known_tag():
    with pytest.raises(ValueError, match="tag is 'linear', expected one of fc, conv"):
        DEFAULT_POLICY.settings("linear", 0)


def test_a_policy_is_read_from_a_file(tmp_path):
    path = tmp_path / "policy.txt"
    path.write_text(EXAMPLE, encoding="utf-8")
    assert MesaPolicy.read(path) == MesaPolicy.read(str(path)) == MesaPolicy.parse(EXAMPLE)


def test_mistakes_in_a_file_are_reported_with_its_path(tmp_path):
    path = tmp_path / "policy.txt"
    path.write_text("on fc:\nindex: all\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"policy\.txt: line 2: found 'index: all'"):
        MesaPolicy.read(path)
    path.write_bytes(b"on fc:\xff")
    with pytest.raises(ValueError, match=r"policy\.txt: .*can't decode"):
        MesaPolicy.read(path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        MesaPolicy.read(tmp_path / "policy.txt")
