"""Configuration: which layer wins, what is refused and how, the paper's sizes."""

import dataclasses
from dataclasses import dataclass, field, replace

import pytest
from omegaconf import OmegaConf

from wm.config import (
    CONF,
    ConfigError,
    added,
    bounded,
    choices,
    covered,
    from_yaml,
    load,
    merge,
    plain,
    to_yaml,
)
from wm.worldmodels.pipeline import Config, stages

GAMES, SCALES = choices(CONF, "env"), choices(CONF, "scale")


@dataclass(frozen=True)
class Game:
    name: str = "left"


@dataclass(frozen=True)
class Part:
    size: int = bounded(1, 1, 100)
    depth: int = bounded(1, 1)


@dataclass(frozen=True)
class Tree:
    env: Game = field(default_factory=Game)
    part: Part = field(default_factory=Part)
    scale: str = "small"


@pytest.fixture
def conf(tmp_path):
    """Two games and two scales; each layer of the sizes has a value of its own."""
    files = {
        "config": {"env": {"name": "left"}, "scale": "small"},
        "env/left": {"part": {"size": 2, "depth": 2}},
        "env/right": {},
        "scale/small": {},
        "scale/big": {"part": {"size": 3, "depth": 3}, "left": {"part": {"size": 4}}},
    }
    for name, content in files.items():
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        OmegaConf.save(OmegaConf.create(content), path)
    return tmp_path


@pytest.mark.parametrize(
    "words, size, depth",
    [
        (["env=right"], 1, 1),  # the dataclass alone
        ([], 2, 2),  # env over defaults
        (["env=right", "scale=big"], 3, 3),  # scale over defaults, the other game's section unheard
        (["env=left", "scale=big"], 4, 3),  # scale over env, the game's own section over both
        (["scale=big", "part.size=5"], 5, 3),  # words over everything
        (["part.size=5", "part.size=6"], 6, 2),  # the last word wins
    ],
)
def test_overrides_win_over_scale_over_env_over_defaults(conf, words, size, depth):
    config = load(Tree, words, conf)
    assert config.part == Part(size, depth)


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_shipped_configuration_loads_and_survives_yaml(game, scale, tmp_path):
    config = load(Config, [f"env={game}", f"scale={scale}", "seed=7"])
    assert (config.env.name, config.scale, config.seed) == (game, scale, 7)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert from_yaml(Config, path) == config


@pytest.mark.parametrize(
    "words, says",
    [
        (["controller.temprature=1"], ["controller.temprature", "'controller.temperature'"]),
        (["temperature=1.15"], ["'temperature'", "'controller.temperature'"]),
        (["vizion.steps=3"], ["vizion", "'vision.steps'"]),
        (["nonsense.foo=1"], ["nonsense", "did you mean"]),
        (["vision.steps=many"], ["vision.steps", "many"]),
        (["vision.steps=1.5"], ["vision.steps", "1.5"]),
        (["vision=3"], ["'vision'", "did you mean 'vision."]),
        (["seed="], ["seed"]),
        (["controller.optimizer=cmaes"], ["controller.optimizer", "'cma'", "'es'"]),
        (["controller.temperature=0"], ["controller.temperature=0", "nearest valid value"]),
        (["controller.temperature=.nan"], ["controller.temperature"]),
        (["seed=2000"], ["seed=2000", "1999"]),
        (["controller.gas_limit=1.5"], ["controller.gas_limit=1.5", "1.0"]),
        (["env=takecovr"], ["env=takecovr", "takecover"]),
        (["scale=papr"], ["scale=papr", "paper"]),
        (["seed"], ["'seed'", "key=value"]),
        (["seed=[1"], ["seed=[1"]),
    ],
    ids=lambda value: value[0] if len(value) == 1 else "",
)
def test_what_cannot_be_meant_is_refused_in_one_line_with_the_nearest_valid(words, says):
    with pytest.raises(ConfigError) as refusal:
        load(Config, words)
    message = str(refusal.value)
    assert all(part in message for part in says), message
    assert len(message.splitlines()) == 1, message


def test_a_game_never_runs_with_the_settings_of_another():
    try:
        config = load(Config, ["env.name=carracing", "scale=paper"])
    except ConfigError:
        return  # as good: the user is told
    assert config == load(Config, ["env=carracing", "scale=paper"])


@pytest.mark.parametrize("game, latent, hidden", [("carracing", 32, 256), ("takecover", 64, 512)])
def test_scale_paper_has_the_papers_sizes(game, latent, hidden):
    config = load(Config, [f"env={game}", "scale=paper"])
    assert (config.vision.latent, config.memory.hidden, config.memory.mixtures) == (
        latent,
        hidden,
        5,
    )
    assert config.memory.cell == "lstm"
    assert config.collect.episodes == 10_000
    c = config.controller
    assert (c.population, c.episodes, c.generations, c.optimizer) == (64, 16, 1800, "cma")


@pytest.mark.parametrize(
    "game, max_steps, features, fitness",
    [("carracing", 1000, "zh", "real"), ("takecover", 2100, "zhc", "dream")],
)
def test_scale_paper_plays_the_official_game_as_the_paper_did(game, max_steps, features, fitness):
    config = load(Config, [f"env={game}", "scale=paper"])
    assert config.env.max_steps == max_steps
    assert (config.controller.features, config.controller.fitness) == (features, fitness)
    assert config.evaluate.episodes == 100


def test_the_agent_holds_its_actions_and_the_random_policy_does_not():
    made = {stage.name: stage for stage in stages(load(Config, ["env=takecover"]))}
    assert made["baseline"].config["env"]["repeat"] == 1
    assert made["evaluate"].config["env"]["repeat"] == 4


def test_nothing_can_change_a_configuration():
    config = load(Config, [])
    parts = [getattr(config, field.name) for field in dataclasses.fields(config)]
    for part in [config, *filter(dataclasses.is_dataclass, parts)]:
        name = dataclasses.fields(part)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, getattr(part, name))


def test_plain_values_survive_json_and_cover_every_field():
    tree = plain(load(Config, []))
    assert set(tree) == {field.name for field in dataclasses.fields(Config)}
    assert isinstance(tree["vision"], dict) and isinstance(tree["vision"]["latent"], int)


@dataclass(frozen=True)
class Grown(Part):
    width: int = added(3, 1)
    inner: Part = added(Part())


def test_a_field_that_came_later_is_covered_only_where_it_is_changed():
    before = covered(Part(size=2))
    assert covered(Grown(size=2)) == before == {"size": 2, "depth": 1}
    assert covered(Grown(size=2, width=4)) == {**before, "width": 4}
    assert covered(Grown(size=2, inner=Part(5)))["inner"] == {"size": 5, "depth": 1}
    assert covered(replace(Tree(), part=Grown(4)))["part"] == {"size": 4, "depth": 1}
    with pytest.raises(ConfigError, match="nearest valid value is 1"):
        merge(Grown, {"width": 0})
