"""Draws confusion matrices."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

MAX_LABELLED = 60  # classes; more are drawn without names and numbers, because a thousand of them would be unreadable
CELL, TEXT, MARGIN = 44, 15, 12  # pixels
DARKEST = np.array([8, 48, 107])  # RGB; a blue that differs from white for any colour vision


def draw_confusion(counts: NDArray[np.int64], names: list[str]) -> Image.Image:
    """Draw a confusion matrix: a row per true class, a column per prediction; darker for a larger share of the row.

    Args:
        counts: [classes, classes], photos of class i that were predicted as class j.
        names: one per class.
    """
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    # The square root makes a share of one in a hundred visible.
    shades = (255 + (DARKEST - 255) * np.sqrt(shares)[:, :, None]).astype(np.uint8)  # [classes, classes, 3]
    squares = Image.fromarray(shades)
    if len(names) > MAX_LABELLED:
        return squares
    font = ImageFont.load_default(TEXT)
    left = MARGIN + TEXT + MARGIN + max(round(font.getlength(name)) for name in names) + MARGIN
    side = CELL * len(names)
    picture = Image.new("RGB", (left + side + MARGIN, left + side + MARGIN), "white")
    picture.paste(squares.resize((side, side), Image.Resampling.NEAREST), (left, left))
    draw = ImageDraw.Draw(picture)
    draw.text((left + side // 2, MARGIN), "predicted", "black", font, anchor="ma")
    for row, name in enumerate(names):
        middle = left + CELL * row + CELL // 2
        draw.text((left - MARGIN, middle), name, "black", font, anchor="rm")
        for column, count in enumerate(counts[row]):
            if count:
                ink = "white" if shares[row, column] > 0.3 else "black"
                draw.text((left + CELL * column + CELL // 2, middle), str(count), ink, font, anchor="mm")
    upright = picture.transpose(Image.Transpose.ROTATE_270)
    draw = ImageDraw.Draw(upright)  # it is turned back below, so that what is drawn here reads upwards
    draw.text((upright.width - left - side // 2, MARGIN), "true", "black", font, anchor="ma")
    for column, name in enumerate(names):
        draw.text((upright.width - left + MARGIN, left + CELL * column + CELL // 2), name, "black", font, anchor="lm")
    return upright.transpose(Image.Transpose.ROTATE_90)
