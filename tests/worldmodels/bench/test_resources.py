import numpy as np

from wm.episodes import EpisodeStore
from wm.worldmodels.bench.resources import hollow_shard


def test_a_hollow_store_has_its_frames_and_takes_no_disk(tmp_path):
    hollow_shard(tmp_path / "shard-0", 5)
    store = EpisodeStore([tmp_path])
    assert (len(store), store.total_frames) == (5, 5 * 331)
    assert not store.frames(np.array([0, 1654])).any()
    blocks = (tmp_path / "shard-0" / "frames.npy").stat().st_blocks
    assert blocks * 512 < 0.1 * 5 * 331 * 64 * 64 * 3
