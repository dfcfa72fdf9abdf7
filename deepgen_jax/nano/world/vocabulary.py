"""Colours, shapes, sizes, places, relations and words of the world, in English and Chinese."""

from __future__ import annotations

import math

import numpy as np

RGB = tuple[int, int, int]

#: Colours of shapes; any two, and any of them and a background, are at least 85 apart in RGB.
COLOURS: dict[str, RGB] = {
    "red": (220, 30, 30),
    "orange": (245, 125, 20),
    "yellow": (250, 230, 50),
    "green": (30, 160, 60),
    "blue": (40, 80, 220),
    "purple": (130, 40, 170),
    "pink": (250, 130, 190),
    "brown": (120, 70, 30),
}
BACKGROUNDS: dict[str, RGB] = {"white": (250, 250, 250), "grey": (150, 150, 150), "black": (20, 20, 20),
                               "navy": (20, 25, 80)}  # fmt: skip
#: Radius of a shape as a share of the picture's side.
SIZES = {"small": 0.11, "large": 0.18}
#: Greatest distance of an outline from the centre of its shape, in radii.
REACH = 1.25
#: Named places: the centre of a shape, as shares of the picture's sides.
PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
    "middle": (0.5, 0.5),
}
#: Relation of a first shape to a second, and its inverse.
RELATIONS = {"left": "right", "right": "left", "above": "below", "below": "above"}
#: Words on signs: capitals, at most five.
WORDS = (
    "OPEN", "EXIT", "STOP", "SALE", "CAFE", "BOOK", "TAXI", "HOTEL", "PIZZA", "MUSIC", "BANK", "PARK", "SHOP", "FARM",
    "FISH", "GOLF", "HOME", "JAZZ", "KIWI", "LUCK", "MILK", "NEWS", "PUSH", "PULL", "QUIZ", "RAIN", "SNOW", "TEA",
    "WATER", "ZOO", "BUS", "GYM", "ART", "BAKER", "CITY", "DANCE", "EAST", "FIRE", "GRAPE", "HELLO", "ICE", "JUICE",
    "KING", "LEMON", "MOON", "NORTH", "OCEAN", "PEACE", "QUEEN", "RIVER", "SOUTH", "TRAIN", "UNCLE", "VIDEO", "WEST",
    "YARD", "ZEBRA", "BEACH", "CLOUD", "DREAM",
)  # fmt: skip
NUMBERS = ("one", "two", "three", "four", "five")


def _regular(corners: int, radius: float, start: float = -90.0) -> list[tuple[float, float]]:
    angles = (math.radians(start + 360 * k / corners) for k in range(corners))
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _star() -> list[tuple[float, float]]:
    pairs = zip(_regular(5, 1.2), _regular(5, 0.5, -54.0), strict=True)
    return [point for pair in pairs for point in pair]


def _cross(long: float, wide: float) -> list[tuple[float, float]]:
    corner = [(wide, -long), (wide, -wide), (long, -wide)]
    turns = ((1, 0), (0, 1), (-1, 0), (0, -1))
    return [(x * c - y * s, x * s + y * c) for c, s in turns for x, y in corner]


#: Outlines around (0, 0), in radii, y downwards: float64 [corners, 2].
SHAPES: dict[str, np.ndarray] = {
    name: np.array(points)
    for name, points in {
        "circle": _regular(72, 1.0),
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": _regular(3, 1.2),
        "diamond": [(0, -1.2), (0.8, 0), (0, 1.2), (-0.8, 0)],
        "star": _star(),
        "cross": _cross(1.05, 0.36),
    }.items()
}

#: Descriptions of shapes in riddles.
SHAPE_RIDDLES = {
    "circle": ("the shape of a wheel", "the shape without any corner"),
    "square": ("the shape with four equal sides and four right angles", "the shape of a field on a chessboard"),
    "triangle": ("the shape with three sides", "the shape with three corners"),
    "diamond": ("the shape of a kite", "the shape of a square that stands on a corner"),
    "star": ("the shape that twinkles in the night sky", "the shape with five points"),
    "cross": ("the shape of a plus sign", "the shape on an ambulance"),
}
COLOUR_RIDDLES = {
    "red": ("the colour of blood", "the colour of a ripe tomato"),
    "orange": ("the colour of a carrot", "the colour between red and yellow in a rainbow"),
    "yellow": ("the colour of a lemon", "the colour of a ripe banana"),
    "green": ("the colour of grass", "the colour that blue and yellow paint make"),
    "blue": ("the colour of a clear sky", "the colour of the sea"),
    "purple": ("the colour of an aubergine", "the colour that red and blue paint make"),
    "pink": ("the colour of a flamingo", "the colour that red and white paint make"),
    "brown": ("the colour of chocolate", "the colour of coffee beans"),
}
NUMBER_RIDDLES = {
    1: ("as a face has noses", "as are left when one of two is taken away"),
    2: ("as a face has eyes", "as a bicycle has wheels"),
    3: ("as a triangle has corners", "as one and two make"),
    4: ("as a car has wheels", "as a cat has legs"),
    5: ("as a hand has fingers", "as two and three make"),
}

ZH = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色",
    "pink": "粉色", "brown": "棕色", "white": "白色", "grey": "灰色", "black": "黑色", "navy": "深蓝色",
    "small": "小", "large": "大", "circle": "圆形", "square": "正方形", "triangle": "三角形", "diamond": "菱形",
    "star": "五角星", "cross": "十字", "left": "左边", "right": "右边", "above": "上面", "below": "下面",
    "top left": "左上角", "top right": "右上角", "bottom left": "左下角", "bottom right": "右下角", "middle": "中间",
    "one": "一", "two": "两", "three": "三", "four": "四", "five": "五",
}  # fmt: skip
