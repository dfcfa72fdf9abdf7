"""Text-rendering reward: how much of the text that a prompt asks for is recognised in its image."""

from __future__ import annotations

import importlib.util
import math
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards.base import LocalReward, Missing, RewardSample
from deepgen_jax.user_warnings import warn_user

#: The reward does not apply to a prompt that asks for no text.
NO_TEXT = Missing("the prompt quotes no text", permanent=True)


class OCRReward(LocalReward):
    """Text accuracy of the text that rapidocr recognises; its models are part of its package.

    Args:
      workers: images recognised at once, each on one core; 0 for the number of cores, at most 8.
      min_confidence: lines recognised with less are ignored.
      detection_side: images whose shorter side has fewer pixels are enlarged to it before lines are detected; time
        grows with its square.

    Raises:
      DeepGenError: rapidocr, onnxruntime or rapidfuzz is not installed.
    """

    def __init__(self, workers: int = 0, min_confidence: float = 0.5, detection_side: int = 736) -> None:
        if workers < 0:
            raise DeepGenError(f"workers is {workers}; it must be at least 0")
        if detection_side < 32:
            raise DeepGenError(f"detection_side is {detection_side}; it must be at least 32 pixels")
        workers = workers or min(os.cpu_count() or 1, 8)
        self.executor = self._pool = ThreadPoolExecutor(workers, thread_name_prefix="ocr")
        self.min_confidence, self.detection_side = min_confidence, detection_side
        self._local = threading.local()
        self._warned = threading.Lock()
        _require_packages()

    def score_one(self, sample: RewardSample) -> float | Missing:
        if target_text(sample.prompt) is None:
            # Warns once in the life of the reward: the lock is never released.
            if self._warned.acquire(blocking=False):
                warn_user(f"no OCR reward for prompts that quote no text, such as {sample.prompt[:80]!r}")
            return NO_TEXT
        return text_accuracy(self.recognise(sample.image), sample.prompt)

    def recognise(self, image: np.ndarray, *, upright: bool = False) -> list[tuple[str, float]]:
        """Lines of text in an image, uint8 [H, W, 3], with their confidence in 0..1, from top to bottom.

        ``upright`` text is not tried upside down, in which short words can be misread.
        """
        if not hasattr(self._local, "engine"):
            self._local.engine = _engine(self.min_confidence, self.detection_side)
        # An array is taken as blue, green, red.
        found = self._local.engine(np.ascontiguousarray(image[:, :, ::-1]), use_cls=not upright)
        return list(zip(found.txts or (), map(float, found.scores or ()), strict=True))

    async def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def target_text(prompt: str) -> str | None:
    """Text between the first two double quotes of a prompt; None if it quotes nothing or only white space."""
    pieces = prompt.split('"', 2)
    if len(pieces) < 3 or not pieces[1].strip():
        return None
    return pieces[1]


def text_accuracy(recognised: str | Iterable[tuple[str, float]], prompt: str) -> float:
    """1 - min(edit distance, len) / len of the quoted text; 1 if the recognised text contains it.

    Case and white space are ignored.

    Args:
      recognised: recognised text, or (text, confidence) lines; lines of confidence 0 are ignored, the others joined.
      prompt: the image's prompt; the text between its first two double quotes is wanted.

    Returns:
      0..1, or NaN (a missing reward) where the prompt quotes nothing.

    Raises:
      DeepGenError: rapidfuzz is not installed.
    """
    target = target_text(prompt)
    if target is None:
        return math.nan
    if not isinstance(recognised, str):
        recognised = "".join(text for text, confidence in recognised if confidence > 0)
    found, wanted = _normalised(recognised), _normalised(target)
    if wanted in found:
        return 1.0
    return 1.0 - min(_edit_distance(found, wanted), len(wanted)) / len(wanted)


def _normalised(text: str) -> str:
    return "".join(text.split()).lower()


def _edit_distance(first: str, second: str) -> int:
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise DeepGenError("the OCR reward needs rapidfuzz; run pip install 'deepgen-jax[rewards]'") from error
    return Levenshtein.distance(first, second)


def _require_packages() -> None:
    for package in ("rapidocr", "onnxruntime", "rapidfuzz"):
        if importlib.util.find_spec(package) is None:
            raise DeepGenError(f"the OCR reward needs {package}; run pip install 'deepgen-jax[rewards]'")


def _engine(min_confidence: float, detection_side: int) -> Any:
    from rapidocr import RapidOCR

    # One thread an engine: several images are read at once, and the loop that generates them needs cores, too.
    return RapidOCR(
        params={
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "Global.log_level": "error",
            "Global.text_score": min_confidence,
            "Det.limit_side_len": detection_side,
        }
    )
