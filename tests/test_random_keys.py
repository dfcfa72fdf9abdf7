"""The purposes of random keys: their values are part of every run and picture, and none is used twice."""

from __future__ import annotations

import inspect

import pytest

from deepgen_jax import random_keys

#: As drawn by all versions. Never change a value; add new ones.
VALUES = {
    "Inference": {"INITIAL_NOISE": 0, "REFERENCE_POSTERIOR": 1, "STEP_NOISE": 2**31},
    "Training": {
        "TARGET_POSTERIOR": 0,
        "FLOW_NOISE": 1,
        "NOISE_LEVEL": 2,
        "LORA_DROPOUT": 3,
        "REFERENCE_POSTERIOR": 4,
        "ADAPTERS": 2**32 - 1,
    },
    "Rollout": {"GROUP_NOISE": 0, "IMAGE_NOISE": 1, "STEP_NOISE": 2, "UPDATE": 3},
    "Update": {"PARTS": 0, "TIMESTEPS": 1},
    "ForwardProcess": {"DRAWS": 2**31, "NOISE_LEVEL": 0, "NOISE": 1},
    "Data": {"ORDER": "order", "SLOTS": "slots", "TEXT_DROP": "text", "PROMPTS": "prompts of {}"},
}


def schemes():
    classes = inspect.getmembers(random_keys, inspect.isclass)
    return {
        name: {key: value for key, value in vars(scheme).items() if not key.startswith("_")} for name, scheme in classes
    }


@pytest.mark.parametrize("name", VALUES)
def test_values_stay(name):
    found = schemes()[name]
    assert VALUES[name].items() <= found.items()


def test_no_purpose_is_used_twice():
    for name, purposes in schemes().items():
        assert len(set(purposes.values())) == len(purposes), name
    # What is counted up from a purpose has room before the next one.
    for name, first in (("Inference", "REFERENCE_POSTERIOR"), ("Training", "REFERENCE_POSTERIOR")):
        purposes = schemes()[name]
        assert not any(purposes[first] < value < purposes[first] + 1000 for value in purposes.values())
