"""Which texts of a task are learned, validated and tested."""

from pathlib import Path

import labelled
import pytest
from labelled import Source

from aal.training.command_line import UserError


def write_table(path: Path, labels: list[str], stem: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{label}\t{stem} {number}" for number, label in enumerate(labels)]
    path.write_text("\n".join(["label\tsentence", *rows]))
    return path


def source(folder: Path, train: list[str], test: list[str]) -> Source:
    files = write_table(folder / "train.tsv", train), write_table(folder / "dev.tsv", test, "other")
    return Source("tsv", files[0], {"": files[1]}, ("sentence",), "label")


def test_labels_are_those_of_the_training_table_in_order(tmp_path: Path):
    corpus = labelled.load(source(tmp_path, ["no", "yes", "maybe"] * 10, ["yes", "no"]))
    assert corpus.labels == ("maybe", "no", "yes")
    assert corpus.tests[""].classes.tolist() == [2, 1]
    assert corpus.tests[""].texts == [("other 0",), ("other 1",)]
    for part in (corpus.train, corpus.validation):
        for (text,), number in zip(part.texts, part.classes, strict=True):
            expected = ["no", "yes", "maybe"][int(text.split()[1]) % 3]
            assert corpus.labels[number] == expected


def test_a_tenth_of_the_training_table_validates(tmp_path: Path):
    """The same each time, and nothing of it is learned."""
    corpora = [labelled.load(source(tmp_path, ["a", "b"] * 25, ["a"])) for _ in range(2)]
    assert corpora[0].validation.texts == corpora[1].validation.texts
    assert (len(corpora[0].train), len(corpora[0].validation)) == (45, 5)
    both = corpora[0].train.texts + corpora[0].validation.texts
    assert sorted(both) == sorted((f"text {number}",) for number in range(50))


def test_labels_that_make_no_classes_are_refused(tmp_path: Path):
    for labels, words in (
        (["a"] * 9, "holds 1 different labels"),
        ([str(number) for number in range(1001)], "holds 1001 different labels"),
    ):
        with pytest.raises(UserError, match=f"column 'label' of .*train.tsv {words}"):
            labelled.load(source(tmp_path, labels, ["a"]))
    with pytest.raises(UserError, match="dev.tsv, line 3: column 'label' holds 'c', none of a, b"):
        labelled.load(source(tmp_path, ["a", "b"], ["a", "c"]))


def test_a_single_row_is_refused(tmp_path: Path):
    one = Source("tsv", source(tmp_path, ["a"], ["a"]).train, {}, ("sentence",), "label", ("a",))
    with pytest.raises(UserError, match="has one row, too few"):
        labelled.load(one)


HEADERS = {
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "MNLI": "index\tsentence1\tsentence2\tlabel1\tgold_label",
}
ROWS = {
    "MRPC": ["1\t7\t8\tone\tanother", "0\t7\t9\tone\tother"],
    "MNLI": ["0\tone\tanother\t-\tneutral", "1\tone\tother\t-\tcontradiction"],
}


def write_glue(folder: Path, task: str, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.tsv").write_text("\n".join([HEADERS[task], *ROWS[task]]))
    return folder


def test_mrpc_has_fixed_labels_and_scores_dev(tmp_path: Path):
    write_glue(tmp_path / "MRPC", "MRPC", "train", "dev")
    corpus = labelled.load(labelled.find("mrpc", tmp_path, learns=True))
    assert corpus.labels == ("0", "1") and list(corpus.tests) == [""]
    assert corpus.tests[""].texts == [("one", "another"), ("one", "other")]
    assert corpus.tests[""].classes.tolist() == [1, 0]
    assert len(corpus.train) == len(corpus.validation) == 1


def test_mnli_has_fixed_labels_and_scores_both_parts_of_dev(tmp_path: Path):
    write_glue(tmp_path, "MNLI", "train", "dev_matched", "dev_mismatched")
    corpus = labelled.load(labelled.find("mnli", tmp_path, learns=True))
    assert corpus.labels == ("contradiction", "entailment", "neutral")
    assert list(corpus.tests) == ["matched", "mismatched"]
    for part in corpus.tests.values():
        assert part.texts == [("one", "another"), ("one", "other")]
        assert part.classes.tolist() == [2, 0]


def test_only_the_tables_that_are_wanted_are_looked_for(tmp_path: Path):
    write_glue(tmp_path, "MRPC", "dev")
    found = labelled.find("mrpc", tmp_path, learns=False)
    assert found.train is None and len(labelled.load_tests(found, ("0", "1"))[""]) == 2
    with pytest.raises(UserError, match="there is no .*train.tsv; put GLUE's files of MRPC there"):
        labelled.find("mrpc", tmp_path, learns=True)
