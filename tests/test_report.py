"""What the report draws and says, read back from the figure's own objects."""

from __future__ import annotations

from matplotlib.figure import Figure

from raydiv.report import _name_estimate


def test_divergence_is_drawn_under_its_name_with_its_ceiling() -> None:
    axis = Figure().subplots()
    _name_estimate(axis, [{"step": 0}, {"step": 1, "divergence/name": "TV(D+ || D-)", "divergence/ceiling": 1.0}])
    assert axis.get_title() == "divergence: TV(D+ || D-)"
    (line,) = axis.get_lines()
    assert set(line.get_ydata()) == {1.0}
    assert line.get_label() == "ceiling 1"


def test_unbounded_divergence_has_no_line() -> None:
    axis = Figure().subplots()
    _name_estimate(axis, [{"step": 1, "divergence/name": "KL(D+ || D-)"}])
    assert axis.get_title() == "divergence: KL(D+ || D-)"
    assert not axis.get_lines()
