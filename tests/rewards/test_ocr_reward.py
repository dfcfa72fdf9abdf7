"""Text that is really recognised."""

from __future__ import annotations

import asyncio
import warnings

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards import RewardConfig, RewardSample, make
from deepgen_jax.user_warnings import DeepGenWarning

pytest.importorskip("rapidocr")


def picture(text, color=(20, 20, 80)):
    image = Image.new("RGB", (448, 192), (200, 220, 255))
    ImageDraw.Draw(image).text((40, 50), text, font=ImageFont.load_default(size=72), fill=color)
    return np.asarray(image)


def test_recognised_text_is_compared_with_the_quoted_one():
    reward = make(RewardConfig("ocr", options={"workers": 2}))
    samples = [
        RewardSample(picture("Open Late"), 'a neon sign "Open Late"'),
        RewardSample(picture("Open Late"), 'a neon sign "Open Gate"'),
        RewardSample(picture(""), 'a neon sign "Open Late"'),
        RewardSample(picture("Open Late"), "a neon sign"),
        RewardSample(picture("Open Late"), "another sign"),
        RewardSample(np.zeros((8, 8, 3), np.uint8), 'a tiny "sign"'),
    ]

    async def score():
        scores = await reward.score(samples)
        await reward.close()
        return scores

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        scores = asyncio.run(score())
    # Warns once about prompts without text.
    assert [str(w.message).startswith("no OCR reward") for w in told if w.category is DeepGenWarning] == [True]
    np.testing.assert_allclose(scores.values, [1, 7 / 8, 0, np.nan, np.nan, 0], atol=1e-6)
    assert scores.failures == {"the prompt quotes no text": 2}
    assert all(entry.permanent for entry in scores.missing.values())


def test_large_text_is_found_without_enlarging_the_image():
    reward = make(RewardConfig("ocr", options={"workers": 1, "detection_side": 192}))
    assert [text for text, _ in reward.recognise(picture("Open Late"))] == ["Open Late"]
    with pytest.raises(DeepGenError, match="detection_side is 8; it must be at least 32 pixels"):
        make(RewardConfig("ocr", options={"detection_side": 8}))
