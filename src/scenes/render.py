"""Draw a scene graph as an image: anti-aliased shapes on a flat background, sensor noise, small objects in front."""

from __future__ import annotations

import math
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from src.scenes.graph import Scene, SceneObject

PALETTE = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (35, 75, 210),
    "yellow": (245, 215, 45),
    "purple": (140, 50, 170),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
    "cyan": (60, 210, 225),
    "gray": (128, 128, 128),
    "brown": (112, 72, 42),
    "pink": (240, 170, 185),
    "beige": (224, 205, 170),
}
RADIUS = {"small": 0.27, "large": 0.52}  # in cells: a large object extends beyond its cell
SUPERSAMPLE = 4


def render(scene: Scene, rng: Random, *, size: int = 48, noise: float = 4.0) -> Image.Image:
    """An RGB image of `size` x `size` pixels; `noise`: standard deviation of the sensor noise, of 255 grey levels."""
    big = size * SUPERSAMPLE
    image = Image.new("RGB", (big, big), PALETTE[scene.background])
    draw = ImageDraw.Draw(image)
    for item in sorted(scene.objects, key=lambda o: o.size == "small"):  # small objects in front of large ones
        _draw_object(draw, item, big)
    small = np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float32)
    grain = np.random.default_rng(rng.getrandbits(64)).normal(0.0, noise, small.shape) if noise else 0.0
    return Image.fromarray(np.clip(small + grain, 0, 255).round().astype(np.uint8))


def _draw_object(draw: ImageDraw.ImageDraw, item: SceneObject, big: int) -> None:
    cell = big / 3
    row, column = item.cell
    x, y, r = (column + 0.5 + item.dx) * cell, (row + 0.5 + item.dy) * cell, RADIUS[item.size] * cell
    colour = PALETTE[item.colour]
    if item.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif item.shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=max(1, round(r * 0.42)))
    elif item.shape == "square":
        s = r * 0.86
        draw.rectangle((x - s, y - s, x + s, y + s), fill=colour)
    elif item.shape == "cross":
        w = r * 0.33
        draw.rectangle((x - r, y - w, x + r, y + w), fill=colour)
        draw.rectangle((x - w, y - r, x + w, y + r), fill=colour)
    elif item.shape == "diamond":
        draw.polygon([(x, y - r), (x + 0.72 * r, y), (x, y + r), (x - 0.72 * r, y)], fill=colour)
    else:  # triangle
        corners = [(x + r * math.sin(a), y - r * math.cos(a)) for a in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)]
        draw.polygon(corners, fill=colour)
