"""Grid files: what their axes come to, which words win, and what is refused."""

from pathlib import Path

import pytest

import wm
from wm.ablate import ablate
from wm.config import ConfigError, load
from wm.grid import (
    at_scale,
    base_words,
    cells,
    choose,
    common_words,
    matches,
    published,
    read_grid,
)
from wm.worldmodels import pipeline
from wm.worldmodels.pipeline import Config, stages

ABLATIONS = Path(wm.__file__).parent.parent / "ablations"
GRIDS = sorted(ABLATIONS.glob("*.yaml"))
HEAD = "# Question: does it?\n# Published: it does.\n"
FULL = """
base: {env: tiny, vision.latent: 4}
axes:
  memory.mixtures: [1, 2, {many: {memory.mixtures: 8, memory.moves: false}}]
  data: {little: {collect.episodes: 4}, much: {collect.episodes: {"1": 8, "2": 9, many: 10}}}
seeds: [0, 1]
metrics: [eval/mean, dream/mean]
published:
  - {by: them, at: {memory.mixtures: 2}, eval/mean: 5 ± 1}
  - {by: others, at: {memory.mixtures: 2, data: much}, eval/mean: 7 ± 2}
  - {at: {memory.mixtures: 1}, eval/mean: 3} # a bare number, by nobody
at: {smoke: {seeds: [7], base: {vision.latent: 3}, axes: {memory.mixtures: [2]}}}
"""


@pytest.fixture
def grid(tmp_path):
    """grid(text): a file `sizes.yaml` with the two headings and the text, read."""

    def read(text=FULL, head=HEAD):
        (tmp_path / "sizes.yaml").write_text(head + text)
        return read_grid(tmp_path / "sizes.yaml")

    return read


def test_cells_are_the_product_of_the_axes(grid):
    made = cells(grid())
    shown = [tuple(cell.values.values()) for cell in made]
    assert shown == [(m, d) for m in ("1", "2", "many") for d in ("little", "much")]
    assert made[0].words == (
        "env=tiny",
        "vision.latent=4",
        "memory.mixtures=1",
        "collect.episodes=4",
    )
    assert set(made[-1].words[2:]) == {
        "memory.mixtures=8",
        "memory.moves=false",
        "collect.episodes=10",  # that of its value on the other axis
    }
    assert [cell.name for cell in made][:2] == ["mixtures 1, little", "mixtures 1, much"]


def test_a_value_may_depend_on_the_game_of_the_base(grid):
    text = "base: {env: tiny}\naxes: {size: {a: {rounds: {tiny: 3, carracing: 4}}}}"
    assert cells(grid(text))[0].words == ("env=tiny", "rounds=3")
    assert cells(grid(text), ["env=carracing"])[0].words == ("env=carracing", "rounds=4")
    with pytest.raises(ConfigError, match="rounds has no value of its own for a, takecover"):
        cells(grid(text), ["env=takecover"])


def test_words_win_over_the_base_and_not_over_an_axis(grid):
    assert cells(grid(), ["vision.latent=5"])[0].words[:2] == ("env=tiny", "vision.latent=5")
    assert base_words(grid(), ["vision.latent=5"]) == ["env=tiny", "vision.latent=5"]
    with pytest.raises(ConfigError, match=r"memory\.moves is set by an axis of sizes"):
        cells(grid(), ["memory.moves=true"])


def test_a_word_chooses_points_of_an_axis(grid):
    whole = grid()
    alone = cells(choose(whole, whole, ["memory.mixtures=[many,1.0]", "data=much"]))
    assert [cell.name for cell in alone] == ["mixtures many, much", "mixtures 1, much"]
    by_name = {cell.name: cell.words for cell in cells(whole)}
    assert all(by_name[cell.name] == cell.words for cell in alone)  # the same cells
    for text in ("none", "[]", "[much,none]"):
        with pytest.raises(ConfigError, match=r"axis data has no point .*, but little, much"):
            choose(whole, whole, [f"data={text}"])


def test_a_chosen_point_is_that_of_the_scale_if_it_has_one(grid):
    small = "at: {smoke: {axes: {data: {little: {collect.episodes: 1}}}}}"
    whole = grid(FULL[: FULL.rindex("at:")] + small)
    chosen = choose(at_scale(whole, "smoke"), whole, ["data=[little,much]", "memory.mixtures=1"])
    little, much = cells(chosen)
    assert "collect.episodes=1" in little.words and "collect.episodes=8" in much.words


def test_the_words_of_all_cells_are_common(grid):
    assert common_words(grid(), ["rounds=2"]) == ["env=tiny", "vision.latent=4", "rounds=2"]
    alone = choose(grid(), grid(), ["memory.mixtures=2"])
    assert common_words(alone, [])[-1] == "memory.mixtures=2"


def test_a_cells_game_is_that_of_its_axis(grid):
    text = "base: {env: tiny}\naxes: {game: {T: {}, C: {env: carracing}}, size: {a: {rounds: "
    first, second = cells(grid(text + "{tiny: 3, carracing: 4}}}}"))
    assert first.words[-1] == "rounds=3" and second.words[-1] == "rounds=4"


def test_a_scale_changes_what_it_names_and_nothing_else(grid):
    small = at_scale(grid(), "smoke")
    assert small.seeds == [7]
    assert small.axes == {"memory.mixtures": [2], "data": grid().axes["data"]}
    assert small.base == {"env": "tiny", "vision.latent": 3}
    assert (small.metrics, small.published) == (grid().metrics, grid().published)
    assert at_scale(grid(), "demo").axes == grid().axes


def test_published_numbers_stand_beside_the_cells_that_they_name(grid):
    full = grid()
    by_name = {cell.name: cell for cell in cells(full)}
    both = {"them": "5 ± 1", "others": "7 ± 2"}
    assert published(full, by_name["mixtures 2, much"], "eval/mean") == both
    assert published(full, by_name["mixtures 2, little"], "eval/mean") == {"them": "5 ± 1"}
    assert published(full, by_name["mixtures 2, much"], "dream/mean") == {}
    assert published(full, by_name["mixtures 1, much"], "eval/mean") == {"published": "3"}
    assert not any(matches(row, by_name["mixtures many, much"]) for row in full.published)


@pytest.mark.parametrize(
    "text, head, says",
    [
        ("axis: {rounds: [1]}", HEAD, "unknown key 'axis'; did you mean 'axes'"),
        ("axes: {rounds: [1]}\nseeds: [a]", HEAD, "seeds"),
        ("", HEAD, "no axes"),
        ("axes: {rounds: [1]}", "# Question: does it?\n", "must begin with a line '# Published: "),
        ("axes: {rounds: [1]}", "", "must begin with a line '# Question: "),
        ("axes: {rounds: [1", HEAD, "cannot read"),
        ("axes: {rounds: 1}", HEAD, "axis rounds"),
        ("axes: {size: {a: 5}}", HEAD, "point 'a' of axis size sets no keys: 5"),
        ("env: {name: tiny}", HEAD, "sizes.yaml is no grid: unknown key 'env"),
        ("axes: {rounds: [1]}\nbase: {rounds: {a: 1}}", HEAD, "may stand on an axis only"),
        ("axes: {rounds: []}", HEAD, "no axes, or one without points"),
        ("axes: {rounds: [1]}\nseeds: []", HEAD, "no seeds"),
        ("axes: {seed: [1, 2]}", HEAD, "seeds of a grid are chosen together"),
        ("axes: {rounds: [1]}\nbase: {seed: 1}", HEAD, "seeds of a grid are chosen together"),
    ],
)
def test_a_wrong_file_is_refused_with_what_is_wrong(text, head, says, grid):
    with pytest.raises(ConfigError, match=says):
        cells(grid(text, head))


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"cannot read nowhere\.yaml"):
        read_grid(Path("nowhere.yaml"))


def test_there_are_grids():
    assert len(GRIDS) >= 10


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
@pytest.mark.parametrize("scale", ["smoke", "demo", "laptop", "paper"])
def test_every_cell_of_every_grid_is_a_pipeline_of_its_own(path, scale):
    grid = at_scale(read_grid(path), scale)
    graphs = [stages(load(Config, [*cell.words, f"scale={scale}"])) for cell in cells(grid)]
    assert len({graph[-1].fingerprint for graph in graphs}) == len(graphs)
    assert len(graphs) > 1 or path.stem.startswith("results-")
    assert scale == "smoke" or len(grid.seeds) >= 3
    if scale != "smoke":
        lonely = [row for row in grid.published if not any(matches(row, c) for c in cells(grid))]
        assert not lonely


@pytest.mark.slow
@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_grid_runs_at_its_smallest(path, runs):
    ablate(pipeline, [str(path), "scale=smoke", f"runs={runs}"])
    folder = runs / "ablations" / f"{path.stem}-smoke"
    assert "Not finished" not in (folder / "table.md").read_text()
    assert (folder / "figure.png").stat().st_size > 5000
