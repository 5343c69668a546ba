"""Ranks: who they are, and what each of them does."""

import os
import sys
import threading

import pytest
from filelock import FileLock

from wm import WMError
from wm.ranks import gather, leads, rank, rows, shares, world_size


def test_a_process_that_nobody_has_launched_leads_alone():
    assert (rank(), world_size(), leads()) == (0, 1, True)


@pytest.mark.parametrize(("job", "place"), [("train", (1, 4)), ("bash", (0, 1))])
def test_sruns_place_is_taken_but_not_that_of_an_interactive_shell(monkeypatch, job, place):
    for name, value in {"PROCID": 1, "NTASKS": 4, "JOB_NAME": job}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert (rank(), world_size()) == place


def test_ranks_rows_are_the_batch_in_order_and_equally_many(as_rank):
    seen = []
    for number in range(3):
        as_rank(number, 3)
        seen += range(12)[rows(12)]
    assert seen == list(range(12))
    with pytest.raises(WMError, match="a batch of 10 cannot be shared evenly by 3"):
        rows(10)


def test_shares_join_to_all_items_and_only_the_leader_sees_all(tmp_path, as_rank):
    as_rank(2, 3)
    assert [list(share) for _, share in shares(tmp_path, range(7))] == [[2, 5]]
    as_rank(0, 3)
    names, items = zip(*shares(tmp_path, range(7)), strict=True)
    assert [list(share) for share in items] == [[0, 3, 6], [1, 4], [2, 5]]
    assert len(set(names)) == 3


def test_the_leader_waits_for_a_share_that_another_works_on(tmp_path, as_rank):
    as_rank(0, 2)
    taken = shares(tmp_path, range(4))
    name, _ = next(taken)
    with FileLock(tmp_path / f"{name.replace('0', '1', 1)}.lock"):
        waiting = threading.Thread(target=next, args=(taken,))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
    waiting.join(10)
    assert not waiting.is_alive()


@pytest.mark.parametrize(
    ("ranks", "devices", "nodes"), [(1, 2, 2), (1, 1, 2), (2, 1, 1), (2, 2, 2), (4, 2, 1)]
)
def test_a_launcher_that_started_another_number_is_refused(as_rank, ranks, devices, nodes):
    as_rank(0, ranks)
    with pytest.raises(WMError, match=r"docs/cluster\.md"):
        gather(devices, nodes)


def test_only_the_leader_speaks(as_rank, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # given back at the end
    as_rank(0, 2)
    gather(2, 1)
    print("leader")
    as_rank(1, 2)
    gather(2, 1)
    print("other")
    assert sys.stdout.name == os.devnull
    assert capsys.readouterr().out == "leader\n"
