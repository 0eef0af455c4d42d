"""What `restrain explain` draws in text."""

from itertools import pairwise

from restrain.cli import explain


def test_curves_as_text():
    history = [{"epoch": n, "loss": 2.0**-n, "odd": float("nan")} for n in range(100)]
    head, line = explain.curves(history).splitlines()
    assert "1 … 100" in head
    name, first, last, least, course = line.split()
    assert (name, first, last, least) == ("loss", "1", last, last)
    assert len(course) == 48
    assert all(a >= b for a, b in pairwise(course))
    assert explain.curves([]) == "no epochs"
    assert explain.curves([{"epoch": 1, "loss": 3.0}]).splitlines()[1].endswith("▁")
