from wm.worldmodels.bench.compare import Comparison
from wm.worldmodels.bench.run import metric_name


def test_every_comparison_has_a_name_of_its_own_that_mlflow_takes():
    names = {
        metric_name(Comparison(name, against, "step", [1.0], [1.0]))
        for name in ("dream, carracing", "dream, takecover")
        for against in ("Gymnasium's, the same pixels", "one dream at a time")
    }
    assert len(names) == 4
    assert not set("".join(names)) & set(",':;")
