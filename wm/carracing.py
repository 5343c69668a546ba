"""Gymnasium's CarRacing-v3 with the very same frames, drawn with less work.

For every frame the official code turns the map's 700 polygons corner by corner in Python, fills
pixels that no frame shows and loads a font. Here all corners are turned at once, in the same
arithmetic; only polygons that can have visible pixels are filled, by the same calls in the same
order; and the picture is narrowed before it is flipped, which are the same pixels because a row is
narrowed by itself. Other render modes are left to the official code.
"""

import math
from functools import lru_cache

import numpy as np
import pygame
from gymnasium.envs.box2d import car_racing as official
from gymnasium.envs.box2d.car_racing import GRASS_DIM, PLAYFIELD, SCALE, ZOOM
from pygame import gfxdraw, surfarray
from pygame.transform import smoothscale

WIDTH, HEIGHT = official.WINDOW_W, official.WINDOW_H
DASHBOARD = HEIGHT // 8  # rows
SCENE = HEIGHT - DASHBOARD  # rows above the dashboard
REACH = math.hypot(WIDTH / 2, HEIGHT * 3 / 4)  # pixels from the car to the window's farthest corner
FIELD = [(PLAYFIELD * x, PLAYFIELD * y) for x, y in [(1, 1), (1, -1), (-1, -1), (-1, 1)]]
GRASS = [
    [(x + GRASS_DIM, y), (x, y), (x, y + GRASS_DIM), (x + GRASS_DIM, y + GRASS_DIM)]
    for x in GRASS_DIM * np.arange(-20, 20, 2)
    for y in GRASS_DIM * np.arange(-20, 20, 2)
]


class CarRacing(official.CarRacing):
    """The official game in everything, but that it need not draw a frame that nobody sees."""

    drawing = True  # while it is false, steps give the frame that was drawn last
    watched = True  # while it is false, nothing is drawn at all
    state = np.zeros((official.STATE_H, official.STATE_W, 3), np.uint8)

    def draw(self) -> np.ndarray:
        """The frame of now; the score on its dashboard is newer than that of a step's frame."""
        self.state = self._render("state_pixels")
        return self.state

    def _render(self, mode: str):
        unseen = not (self.drawing and self.watched)
        return self.state if unseen and mode == "state_pixels" else super()._render(mode)


class FastCarRacing(CarRacing):
    """The game with our drawing."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.window = pygame.Surface((WIDTH, HEIGHT))
        self.narrow = pygame.Surface((official.STATE_W, HEIGHT))

    def _create_track(self):
        created = super()._create_track()
        field, grass = (FIELD, self.bg_color), [(patch, self.grass_color) for patch in GRASS]
        polygons, self.colors = zip(field, *grass, *self.road_poly, strict=True)
        self.corners = np.array(polygons).T.copy()  # [x or y, corner, polygon]
        return created

    def _render(self, mode: str):
        if mode != "state_pixels" or self.car is None or not (self.drawing and self.watched):
            return super()._render(mode)
        self.surf = self.window
        self._draw_scene()  # upside down: its first rows would end up behind the dashboard
        scene = surfarray.pixels2d(self._narrow(DASHBOARD, SCENE, to=0))
        scene[:] = scene[:, ::-1]
        self._draw_dashboard()  # over rows of the scene, which have been used
        self._narrow(SCENE, DASHBOARD, to=SCENE)
        return self._create_image_array(self.narrow, (official.STATE_W, official.STATE_H))

    def _draw_scene(self) -> None:
        (x, y), angle = self.car.hull.position, -self.car.hull.angle
        zoom = 0.1 * SCALE * max(1 - self.t, 0) + ZOOM * SCALE * min(self.t, 1)
        shift = pygame.Vector2(-x * zoom, -y * zoom).rotate_rad(angle)
        shift = (WIDTH / 2 + shift[0], HEIGHT / 4 + shift[1])
        inside = max(abs(x), abs(y)) + (REACH + 2) / zoom < PLAYFIELD  # all of the window
        color = self.window.map_rgb(_rgb(self.bg_color)) if inside else 0
        # Surface.fill would write past the cache, and all that follows would take twice as long.
        surfarray.pixels2d(self.window)[:, DASHBOARD:] = color
        self._draw_ground(zoom, shift, angle, first=1 if inside else 0)
        self.car.draw(self.window, zoom, shift, angle, draw_particles=False)

    def _draw_ground(self, zoom: float, shift: tuple[float, float], angle: float, first: int):
        x, y = self.corners[:, :, first:]
        cos, sin = pygame.Vector2(1, 0).rotate_rad(angle)  # with its special cases
        columns = ((cos * x - sin * y) * zoom + shift[0]).astype(int)  # cut, as gfxdraw does
        rows = ((sin * x + cos * y) * zoom + shift[1]).astype(int)
        seen = (columns.max(0) >= 0) & (columns.min(0) < WIDTH)  # no pixel lies beyond the corners
        seen &= (rows.max(0) >= DASHBOARD) & (rows.min(0) < HEIGHT)
        polygons = np.array([columns, rows]).T[seen].tolist()
        for index, polygon in zip(np.flatnonzero(seen), polygons, strict=True):
            color = _rgb(self.colors[first + index])  # a tile's changes when it is driven on
            gfxdraw.aapolygon(self.window, polygon, color)
            gfxdraw.filled_polygon(self.window, polygon, color)

    def _draw_dashboard(self) -> None:
        # No bar rises above it: that takes a speed of 200, where Box2D's limit is 100, or a wheel's
        # of 400, where grip keeps it below 370.
        self._render_indicators(WIDTH, HEIGHT)
        text = _text(f"{self.reward:04.0f}")
        self.window.blit(text, text.get_rect(center=(60, HEIGHT - HEIGHT * 2.5 / 40)))

    def _narrow(self, row: int, count: int, to: int) -> pygame.Surface:
        """Shrink rows of the window to the frame's width, into rows of `narrow`."""
        source = self.window.subsurface((0, row, WIDTH, count))
        target = self.narrow.subsurface((0, to, official.STATE_W, count))
        return smoothscale(source, target.get_size(), target)


def _rgb(color) -> list[int]:
    return [int(value) for value in color]


@lru_cache(maxsize=512)
def _text(text: str) -> pygame.Surface:
    pygame.font.init()
    font = pygame.font.Font(pygame.font.get_default_font(), 42)
    return font.render(text, True, (255, 255, 255), (0, 0, 0))
