"""Figures: pictures that open and show what they were given."""

import imageio.v3 as iio
import numpy as np
import pytest

from wm import figures

RED, BLUE = (np.full((64, 64, 3), colour, np.uint8) for colour in ((250, 10, 20), (20, 30, 240)))


def shows(picture, colour):
    """How many pixels of a picture have exactly a colour."""
    return (picture[..., :3] == colour).all(-1).sum()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.frame_rows({"real": [RED, BLUE], "seen": [BLUE]}, ["one", "two"]),
        lambda: figures.frame_rows({"only": np.stack([RED, BLUE, RED])}),
    ],
    ids=["rows", "one row"],
)
def test_a_picture_of_frames_shows_the_frames(draw, tmp_path):
    path = figures.save(draw(), tmp_path / "figure.png")
    picture = iio.imread(path)
    assert picture.ndim == 3 and min(picture.shape[:2]) > 50
    for frame in (RED, BLUE):
        assert shows(picture, frame[0, 0]) > 1000
    assert figures.plt.get_fignums() == []  # nothing piles up in memory


def test_curves_show_each_line_with_its_name(tmp_path):
    figure = figures.curves(
        {"up": ([0, 1, 2], [0, 1, 2]), "down": (range(50), range(50, 0, -1))}, "step", "return"
    )
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["up", "down"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("step", "return")
    np.testing.assert_array_equal(axis.lines[1].get_ydata(), np.arange(50, 0, -1))
    picture = iio.imread(figures.save(figure, tmp_path / "curves.png"))
    assert shows(picture, (255, 255, 255)) < picture[..., 0].size
    assert picture[..., :3].std() > 5  # not blank


@pytest.mark.parametrize("width", [64, 128])
def test_a_video_is_read_back_frame_by_frame(width, tmp_path):
    shades = np.linspace(20, 230, 9).astype(np.uint8)
    frames = np.broadcast_to(shades[:, None, None, None], (9, 64, width, 3))
    path = figures.video(frames, tmp_path / "video.mp4", fps=35, scale=2)
    read = iio.imread(path)
    assert read.shape == (9, 128, 2 * width, 3)
    np.testing.assert_allclose(read.mean((1, 2, 3)), shades, atol=4)
    assert iio.immeta(path)["fps"] == 35
    assert iio.immeta(path)["codec"] == "h264"  # what browsers play


def test_a_small_picture_looks_the_same_in_fewer_bytes(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    drawn = [figures.frame_rows({"noise": frames}) for _ in range(2)]
    full = figures.save(drawn[0], tmp_path / "full.png")
    small = figures.save_small(drawn[1], tmp_path / "small.png")
    assert small.stat().st_size < full.stat().st_size / 2
    before, after = (iio.imread(path)[..., :3].astype(float) for path in (full, small))
    assert np.abs(before - after).mean() < 20  # of noise, which has all colours


NOTHING = np.full(3, np.nan)


def series(*values, published=None, random=NOTHING):
    values = np.array(values, float)
    seeds = np.stack([values - 0.5, values + 0.5], axis=1)
    return figures.Series(values, values - 1, values + 1, seeds, published or {}, random)


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_series_alone_needs_no_name():
    alone = series(
        3, 4, 5, published={"them": np.array([5, np.nan, 6])}, random=np.array([2, 2, 1])
    )
    figure = figures.panels({"a": {"": alone}}, ["1", "2", "3"], "size")
    assert legend(figure) == ["random policy", "them", "ours"]


@pytest.mark.parametrize(
    "labels, scale, places",
    [(["0.1", "1", "10"], "log", [0.1, 1, 10]), (["1", "2", "10"], "linear", [1, 2, 10])],
)
def test_panels_place_numbers_from_left_to_right(labels, scale, places, tmp_path):
    theirs = series(*NOTHING, published={"them": np.array([5, np.nan, 6])})
    shown = {"a": {"ours": series(3, 4, 5), "theirs": theirs}, "b": {"ours": series(1, 40, 7)}}
    figure = figures.panels(shown, labels, "size", "three seeds")
    left, right = figure.axes[:2]
    assert (left.get_xscale(), left.get_yscale(), right.get_yscale()) == (scale, "linear", "log")
    assert list(left.get_xticks()) == places
    assert [text.get_text() for text in left.get_xticklabels()] == labels
    assert (left.get_title(), right.get_title(), left.get_xlabel()) == ("a", "b", "size")
    assert figure.get_suptitle() == "three seeds"
    assert legend(figure) == ["ours", "theirs, them", "theirs"]
    first, second, published = left.get_lines()[1:4]
    np.testing.assert_array_equal(
        [first.get_ydata(), second.get_ydata()], [[2.5, 3.5, 4.5], [3.5, 4.5, 5.5]]
    )
    assert (published.get_xdata() > places).all()  # aside, so that nothing is hidden
    (bars,) = (lines for lines in left.collections if len(lines.get_segments()) == 3)
    np.testing.assert_array_equal(bars.get_segments()[0], [[places[0], 2], [places[0], 4]])
    assert iio.imread(figures.save(figure, tmp_path / "panels.png"))[..., :3].std() > 5


def test_panels_place_names_below_each_other_and_like_metrics_on_one_scale():
    shown = {
        name: {"": series(*values)}
        for name, values in {"a": (3, 4, 5), "b": (30, 4e4, 7), "c": (9, 9, 9)}.items()
    }
    figure = figures.panels(shown, ["one", "2", "30"], "size", alike=["a", "c"])
    a, b, c = figure.axes[:3]
    assert [text.get_text() for text in a.get_yticklabels()] == ["one", "2", "30"]
    assert a.get_ylim()[0] > a.get_ylim()[1] and b.get_ylim() == a.get_ylim()
    assert (a.get_ylabel(), a.get_xlabel(), a.get_yscale(), b.get_xscale()) == (
        "size",
        "",
        "linear",
        "log",
    )
    assert a.get_xlim() == c.get_xlim() and a.get_xlim()[1] > 9
    np.testing.assert_array_equal(a.get_lines()[0].get_data(), [[3, 4, 5], [0, 1, 2]])


def test_stacked_pictures_are_shown_under_their_names(tmp_path):
    for name, picture in {"red": RED, "blue": BLUE}.items():
        iio.imwrite(tmp_path / f"{name}.png", picture)
    figure = figures.stacked({name: tmp_path / f"{name}.png" for name in ("red", "blue")})
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["red", "blue"]
    picture = iio.imread(figures.save(figure, tmp_path / "stacked.png"))
    assert shows(picture, RED[0, 0]) > 1000 and shows(picture, BLUE[0, 0]) > 1000
