"""The curve of what is known in memory and time, and the picture of it."""

import pytest
from frontier import curve_of, draw, lower_hull, time_at
from settings import ALTERNATIVE, OURS

CORNERS = [(1.0, 3.0), (2.0, 1.5), (4.0, 1.0)]


@pytest.mark.parametrize("other", [(3.0, 1.4), (1.5, 2.25), (5.0, 1.0), (6.0, 1.2), (1.0, 3.5)])
def test_hull_has_the_corners_below_all_points_up_to_the_fastest(other):
    assert lower_hull([CORNERS[2], other, *CORNERS[:2]]) == CORNERS


def test_hull_of_few_points_is_themselves():
    assert lower_hull([]) == []
    assert lower_hull(CORNERS[:1]) == CORNERS[:1]


@pytest.mark.parametrize(
    ("memory", "time"), [(0.9, None), (1.0, 3.0), (1.5, 2.25), (3.0, 1.25), (4.0, 1.0), (9.0, 1.0)]
)
def test_time_between_corners_lies_on_the_line(memory, time):
    assert time_at(CORNERS, memory) == time


def test_no_alternative_gives_no_time():
    assert time_at([], 1.0) is None


def rows() -> list[dict]:
    alternatives = [
        {"group": ALTERNATIVE, "setting": f"alternative {i}", "saved_mib": memory, "ratio": ratio}
        for i, (memory, ratio) in enumerate(CORNERS)
    ]
    own = {"group": OURS, "setting": "asa1", "saved_mib": 0.5, "ratio": 0.5}
    failed = {"group": ALTERNATIVE, "setting": "failed", "saved_mib": None, "ratio": None}
    return [{"network": "ViT", **row} for row in (*alternatives, own, failed)]


def test_curve_leaves_out_our_own_points_and_failures():
    assert curve_of(rows(), "saved_mib") == CORNERS


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_picture_is_written(tmp_path, ending):
    path = tmp_path / f"speed.{ending}"
    draw(rows(), "saved_mib", "saved MiB", path)
    content = path.read_bytes()
    assert len(content) > 5000
    if ending == "svg":
        assert all(text in content for text in (b"alternative 0 (3 x, not in view)", b"4  asa1"))
        assert b"failed" not in content
