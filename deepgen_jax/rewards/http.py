"""Client of any scorer with the JSON protocol of `protocol`, such as ``deepgen reward-server`` on another machine."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards.base import Missing, Reward, RewardSample, Scores
from deepgen_jax.rewards.client import Client, ClientConfig, RequestFailed
from deepgen_jax.rewards.protocol import read_answer, write_answer, write_request


class HTTPReward(Reward):
    """Scores from a server.

    Args:
      url: the server, as http://HOST:PORT; requests go to /score.
      reward: the server's name of the reward.
      batch_size: most samples of a request; groups are not split if ``needs_group``.
      needs_group: the scorer compares the images of a group.
      client: limits, time-outs and retries.
    """

    def __init__(
        self,
        url: str,
        reward: str,
        batch_size: int = 16,
        needs_group: bool = False,
        client: ClientConfig | Mapping[str, Any] | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise DeepGenError(f"url {url!r} is not the address of a server; write http://HOST:PORT")
        if batch_size < 1:
            raise DeepGenError(f"batch_size is {batch_size}; it must be at least 1")
        self.url, self.reward = url.rstrip("/").removesuffix("/score") + "/score", reward
        self.batch_size, self.needs_group = batch_size, needs_group
        self._client = Client(client)

    async def score(self, samples: Sequence[RewardSample]) -> Scores:
        results: list[float | Missing] = [Missing("")] * len(samples)
        batches = list(self._batches(samples))
        scored = await asyncio.gather(*(self._ask([samples[i] for i in places]) for places in batches))
        for places, scores in zip(batches, scored, strict=True):
            for place, score in zip(places, scores, strict=True):
                results[place] = score
        return Scores.of(results)

    def counts(self) -> Counter[str]:
        return self._client.counts.copy()

    async def close(self) -> None:
        await self._client.close()

    def _batches(self, samples: Sequence[RewardSample]) -> Iterator[list[int]]:
        units: dict[int, list[int]] = {}
        for place, sample in enumerate(samples):
            units.setdefault(sample.group if self.needs_group else place, []).append(place)
        batch: list[int] = []
        for unit in units.values():
            if batch and len(batch) + len(unit) > self.batch_size:
                yield batch
                batch = []
            batch = batch + unit
        if batch:
            yield batch

    async def _ask(self, samples: Sequence[RewardSample]) -> list[float | Missing]:
        try:
            request = await asyncio.to_thread(write_request, self.reward, samples)
            parse = partial(_checked, count=len(samples))
            answer = await self._client.post(self.url, request, parse, _is_final)
            return read_answer(answer, len(samples))
        except RequestFailed as failure:
            return [Missing(str(failure))] * len(samples)
        except ValueError:
            return [Missing("unreadable answer in the cache")] * len(samples)


def _checked(answer: Any, count: int) -> dict[str, Any]:
    return write_answer(Scores.of(read_answer(answer, count)))


def _is_final(answer: dict[str, Any]) -> bool:
    """Whether another request cannot give more scores."""
    return all(failure["permanent"] for failure in answer["failures"].values())
