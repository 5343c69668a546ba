"""The benchmark's own arithmetic."""

from wm.worldmodels.bench import compare as module
from wm.worldmodels.bench.compare import compare, timed


def test_a_comparison_takes_turns_and_reports_the_median_of_the_ratios(capsys):
    turns, ours, theirs = [], iter([10.0, 40.0, 30.0]), iter([10.0, 10.0, 10.0])

    def ask(name, rates):
        turns.append(name)
        return next(rates)

    result = compare("A", "B", "step", lambda: ask("A", ours), lambda: ask("B", theirs), target=2)
    assert turns == ["A", "B"] * 3
    assert result.ratios == [1.0, 4.0, 3.0]
    assert "3.00 [1.00, 4.00]" in capsys.readouterr().out


def test_a_rate_is_units_by_seconds(monkeypatch):
    clock = iter([100.0, 104.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    assert timed(20, lambda: None) == 5.0
