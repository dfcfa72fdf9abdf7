"""Exact reward of the procedural world: a program checks what the prompt asked for."""

from __future__ import annotations

import numpy as np

from deepgen_jax.nano.world.score import score
from deepgen_jax.nano.world.truth import Truth
from deepgen_jax.rewards.base import LocalReward, Missing, RewardSample
from deepgen_jax.rewards.ocr import OCRReward

#: Field of a prompt's record with its ground truth, see `deepgen_jax.nano.world.truth.Truth`.
TRUTH = "truth"
# Signs are enlarged already (`deepgen_jax.nano.world.find.sign_of`); enlarged further, blurred letters are not read.
_SIGN_SIDE = 192
_NO_TRUTH = Missing(f"the prompt's record has no {TRUTH}", permanent=True)


class WorldReward(LocalReward):
    """Share of the requirements of a prompt that the image meets; 1 only if it shows everything and nothing else.

    Prompts come from `deepgen data world`, which writes the truth into each record.

    Args:
      exact: 1 for an image that shows everything, 0 for any other.
      workers, min_confidence: of the recogniser of words, see `deepgen_jax.rewards.ocr.OCRReward`.
    """

    def __init__(self, exact: bool = False, workers: int = 0, min_confidence: float = 0.5) -> None:
        self._exact = exact
        self._words = OCRReward(workers, min_confidence, _SIGN_SIDE)
        self.executor = self._words.executor

    def score_one(self, sample: RewardSample) -> float | Missing:
        if TRUTH not in sample.metadata:
            return _NO_TRUTH
        result = score(sample.image, Truth.from_json(sample.metadata[TRUTH]), self.read)
        return float(result.share == 1) if self._exact else result.share

    def read(self, sign: np.ndarray) -> list[str]:
        """Lines of text on a sign, uint8 [h, w, 3]."""
        return [text for text, _ in self._words.recognise(sign, upright=True)]

    async def close(self) -> None:
        await self._words.close()
