"""Other worlds of take-cover: either what is drawn changes or the game does, and never both."""

from pathlib import Path

import numpy as np
import pytest
import vizdoom

from wm.config import ConfigError, load
from wm.envs import ElsewhereConfig, EnvConfig, make_env
from wm.worldmodels.pipeline import Config
from wm.worlds import ORDINARY, World, read_lumps, require_world, write_scenario

SCENARIO = Path(vizdoom.scenarios_path, "take_cover.wad")


def lives(world, seeds=(1, 2, 3)):
    """Frames and rewards of episodes of a world, with the same actions in all."""
    env, frames, rewards = make_env(ElsewhereConfig("takecover", 2100, 4, world=world)), [], []
    for seed in seeds:
        frames.append(env.reset(seed=seed)[0])
        actions, over = np.random.default_rng(seed), False
        while not over:
            frame, reward, *flags, _ = env.step(actions.uniform(-1, 1, 1))
            frames.append(frame)
            rewards.append(reward)
            over = any(flags)
    env.close()
    return np.stack(frames), rewards


@pytest.fixture(scope="module")
def ordinary():
    return lives(World())


def test_a_copy_of_the_scenario_with_its_own_textures_is_the_scenario(tmp_path):
    write_scenario(World(), SCENARIO, tmp_path / "copy.wad")
    assert (tmp_path / "copy.wad").read_bytes() == SCENARIO.read_bytes()


def test_other_textures_change_the_map_alone(tmp_path):
    write_scenario(World(wall="STONE2", floor="GRASS1"), SCENARIO, tmp_path / "copy.wad")
    before, after = dict(read_lumps(SCENARIO)), dict(read_lumps(tmp_path / "copy.wad"))
    assert {name for name in before if before[name] != after[name]} == {"TEXTMAP"}
    assert list(before) == list(after)
    expected = before["TEXTMAP"].replace(b"BRICK12", b"STONE2")
    expected = expected.replace(b'texturefloor = "CRATOP1"', b'texturefloor = "GRASS1"')
    assert after["TEXTMAP"] == expected


@pytest.mark.parametrize(
    "world, changed, same",
    [
        (World(floor="GRASS1"), slice(45, 64), slice(0, 15)),  # rows of the frame
        (World(ceiling="CEIL5_1"), slice(0, 15), slice(45, 64)),
        (World(wall="COMPBLUE"), slice(25, 30), []),  # a near one fills the frame
    ],
    ids=["floor", "ceiling", "wall"],
)
def test_other_textures_are_seen_where_they_are_and_change_no_game(world, changed, same, ordinary):
    frames, rewards = lives(world)
    assert rewards == ordinary[1]
    levels = np.abs(frames.astype(int) - ordinary[0]).mean((2, 3))  # of all frames' rows
    assert levels[:, changed].mean() > 5
    assert (levels[:, same] == 0).all()


def test_skill_changes_how_hard_the_game_is_and_not_how_it_looks(ordinary):
    survived = {skill: len(lives(World(skill), range(6))[1]) for skill in (1, 4, 5)}
    assert survived[5] < survived[4] < survived[1]
    frames, rewards = lives(World(skill=5))
    assert (frames[0] == ordinary[0][0]).all()
    for same in (2, 3):  # as World says
        frames, rewards = lives(World(skill=same))
        assert rewards == ordinary[1] and (frames == ordinary[0]).all()


@pytest.mark.parametrize(
    "world, says",
    [
        (World(wall="STON2"), "evaluate.world.wall=STON2 .*did you mean STONE2"),
        (World(ceiling="grass1"), "evaluate.world.ceiling=grass1 .*did you mean GRASS1"),
    ],
)
def test_a_texture_that_is_not_there_is_refused_with_the_nearest(world, says):
    with pytest.raises(ConfigError, match=says):
        require_world("takecover", world)


def test_a_world_says_what_is_different():
    assert str(World(5, wall="STONE2")) == "skill 5, wall STONE2" and str(ORDINARY) == ""


def test_only_take_cover_has_other_worlds():
    words = ["env=takecover", "evaluate.world.skill=5", "evaluate.world.floor=GRASS1"]
    game = load(Config, words).evaluate.game(EnvConfig("takecover", 60, 4))
    assert game == ElsewhereConfig("takecover", 60, 4, world=World(5, floor="GRASS1"))
    with pytest.raises(ConfigError, match=r"evaluate\.world is for env=takecover"):
        load(Config, ["env=carracing", "evaluate.world.skill=5"])
