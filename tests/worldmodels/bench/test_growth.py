import time
from functools import partial

import pytest

from wm.worldmodels.bench.growth import encode_seconds, growth, memory_seconds, vision_seconds


@pytest.mark.parametrize("stage", [vision_seconds, memory_seconds, encode_seconds])
def test_a_stages_work_takes_a_part_of_the_time_that_has_passed(stage, tmp_path):
    measure = partial(stage, tmp_path) if stage is encode_seconds else stage
    started = time.perf_counter()
    assert 0 < measure(3) < time.perf_counter() - started


def test_every_stage_is_measured_at_three_sizes_each_twice_the_one_before(monkeypatch, tmp_path):
    for name in ("collect", "encode", "vision", "memory", "dream"):
        monkeypatch.setattr(f"wm.worldmodels.bench.growth.{name}_seconds", lambda *size: size[-1])
    for table in growth(None, None, tmp_path).values():
        small, middle, large = table.values()
        assert (middle, large) == (2 * small, 4 * small)
