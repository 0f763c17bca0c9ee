"""Animated GIFs of a trained team."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from marlkit.errors import OptionError
from marlkit.run.files import write_whole

Frame = NDArray[np.uint8]
PALETTE_FRAMES = 8
COLOURS = 64
SLOWEST = 0.01
"""Frames per second: the longest time that a GIF can note is 655 seconds."""


def write_gif(frames: Sequence[Frame], path: str | os.PathLike[str], fps: float, *, longest_side: int = 400) -> None:
    """Write ``frames`` as a GIF that repeats endlessly.

    All frames share one palette of 64 colours without dithering, so that regions that do not change take almost no space.

    Args:
        frames: RGB pictures of one size, each ``[height, width, 3]`` uint8.
        path: the file to write; its folder is created if needed.
        fps: frames per second; a GIF counts in hundredths of a second, so the nearest of 100, 50, 33.3, 25, 20, … is kept.
        longest_side: larger pictures are shrunk to this many pixels.

    Raises:
        ValueError: there are no frames, or one of them is not such a picture.
        OptionError: ``fps`` is no speed that a GIF can have.
        WriteError: the file cannot be written.
    """
    refuse_unfit_speed(fps)
    pictures = [_picture(frame, index, longest_side) for index, frame in enumerate(frames)]
    if not pictures:
        raise ValueError("a video needs at least one frame")
    if any(picture.size != pictures[0].size for picture in pictures):
        raise ValueError(f"frames differ in size: {sorted({picture.size for picture in pictures})}")
    palette = _common_palette(pictures)
    indexed = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    centiseconds = max(1, round(100 / fps))
    content = io.BytesIO()
    indexed[0].save(
        content,
        format="GIF",
        save_all=True,
        append_images=indexed[1:],
        duration=10 * centiseconds,
        loop=0,
        optimize=True,
        disposal=1,
    )
    write_whole(path, content.getvalue())


def refuse_unfit_speed(fps: float) -> None:
    """Check that a GIF can show so many frames per second.

    Raises:
        OptionError: it cannot.
    """
    if not SLOWEST <= fps < math.inf:
        raise OptionError("fps", f"must be a number of pictures per second, {SLOWEST} or more, got {fps}")


def _picture(frame: Frame, index: int, longest_side: int) -> Image.Image:
    if frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8:
        raise ValueError(f"frame {index} must be [height, width, 3] uint8, got {list(frame.shape)} {frame.dtype}")
    picture = Image.fromarray(frame)
    scale = longest_side / max(picture.size)
    if scale >= 1:
        return picture
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)


def _common_palette(pictures: Sequence[Image.Image]) -> Image.Image:
    """A palette from a few frames side by side, spread over the whole video."""
    chosen = pictures[:: max(1, len(pictures) // PALETTE_FRAMES)]
    width, height = pictures[0].size
    strip = Image.new("RGB", (width, height * len(chosen)))
    for row, picture in enumerate(chosen):
        strip.paste(picture, (0, row * height))
    return strip.quantize(COLOURS, method=Image.Quantize.MEDIANCUT)
