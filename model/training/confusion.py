"""A picture of which classes are taken for which."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

MOST_NAMED = 60  # more classes get neither names nor numbers: a picture of a thousand would be of no use otherwise
CELL, TEXT, MARGIN = 44, 15, 12  # pixels
DARKEST = np.array([8, 48, 107])  # a blue that is told from white by everyone


def draw_confusion(counts: NDArray[np.int64], names: list[str]) -> Image.Image:
    """A row for each class, cut up by what its photos were taken for; the darker, the larger the share of the row.

    Args:
        counts: [classes, classes], photos of class i that were taken for class j.
        names: one for each class.
    """
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    # a square root, so that a share of one in a hundred can be seen
    shades = (255 + (DARKEST - 255) * np.sqrt(shares)[:, :, None]).astype(np.uint8)  # [classes, classes, 3]
    squares = Image.fromarray(shades)
    if len(names) > MOST_NAMED:
        return squares
    font = ImageFont.load_default(TEXT)
    left = MARGIN + max(round(font.getlength(name)) for name in names) + MARGIN
    side = CELL * len(names)
    picture = Image.new("RGB", (left + side + MARGIN, left + side + MARGIN), "white")
    picture.paste(squares.resize((side, side), Image.Resampling.NEAREST), (left, left))
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        middle = left + CELL * row + CELL // 2
        draw.text((left - MARGIN, middle), name, "black", font, anchor="rm")
        for column, count in enumerate(counts[row]):
            if count:
                ink = "white" if shares[row, column] > 0.3 else "black"
                draw.text((left + CELL * column + CELL // 2, middle), str(count), ink, font, anchor="mm")
    upright = picture.transpose(Image.Transpose.ROTATE_270)
    draw = ImageDraw.Draw(upright)
    for column, name in enumerate(names):  # turned back below: these names are read from bottom to top
        draw.text((upright.width - left + MARGIN, left + CELL * column + CELL // 2), name, "black", font, anchor="lm")
    return upright.transpose(Image.Transpose.ROTATE_90)
