import json
from dataclasses import replace

import pytest

from wm.worldmodels.bench import ranks as module
from wm.worldmodels.bench.ranks import bench_ranks, ranks


def test_bfloat16_moves_ranks_less_than_other_dreams_in_either_precision(make_agent, workers):
    agent = make_agent("carracing")
    tables = ranks(agent, workers, compiled=False)
    for first, second, chance in (table.values() for table in tables.values()):
        assert -1 <= chance < min(first, second) <= 1
    controller = replace(agent.config.controller, precision="bf16-true")
    rough = replace(agent, config=replace(agent.config, controller=controller))
    assert ranks(rough, workers, compiled=False) == tables  # its own precision does not matter


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_where_all_are_equally_fit_there_is_no_correlation(make_agent, workers):
    dull = make_agent("takecover", {"reward_head": False}, end="never", fitness="real")
    for table in ranks(dull, workers, compiled=False).values():
        assert all(value != value for value in table.values())


def test_the_table_is_kept_with_the_name_of_the_run(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "ranks", lambda agent, workers: {agent.config.env.name: {"a": 0.5}})
    run, path = str(saved("tiny")), tmp_path / "bench" / "ranks.json"
    table = {"run": run, "tiny": {"a": 0.5}}
    bench_ranks(run, tmp_path)
    assert json.loads(path.read_text()) == table
    assert '"a": 0.5' in capsys.readouterr().out
