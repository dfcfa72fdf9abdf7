"""Registry of the purposes of random numbers, by key scheme.

A key is derived from a seed, the number of a sample (or prompt, image, rollout) and a purpose, never from the number of
devices or the place in a batch; see "Randomness" in docs/training.md. The values are part of every run and picture that
was ever made: new purposes get new values, and none is changed.
"""

from __future__ import annotations


class Inference:
    """``fold_in(fold_in(key(seed), index of the sample), purpose)``; reference j takes REFERENCE_POSTERIOR + j."""

    INITIAL_NOISE = 0
    REFERENCE_POSTERIOR = 1
    STEP_NOISE = 2**31


class Training:
    """``fold_in(key of the sample, purpose)``; reference j takes REFERENCE_POSTERIOR + j.

    The key of a sample is ``fold_in(fold_in(key(seed), high half), low half)`` of its place in the data's sequence.
    """

    TARGET_POSTERIOR = 0
    FLOW_NOISE = 1
    NOISE_LEVEL = 2
    LORA_DROPOUT = 3
    REFERENCE_POSTERIOR = 4
    POLICY_TARGETS = 2**31
    POLICY_SEGMENT = 2**31 + 1

    #: High half of the "place" whose low half is the number of an adapted part: initial values of adapters.
    ADAPTERS = 2**32 - 1


class Rollout:
    """``fold_in(fold_in(key(seed), purpose), number of the prompt, image or rollout)``."""

    GROUP_NOISE = 0
    IMAGE_NOISE = 1
    STEP_NOISE = 2
    UPDATE = 3


class Update:
    """``fold_in(key of the rollout's update, purpose)``."""

    PARTS = 0
    TIMESTEPS = 1


class ForwardProcess:
    """``fold_in(fold_in(key of the image, DRAWS + number of the draw), purpose)``; below DRAWS are sampling steps."""

    DRAWS = 2**31

    NOISE_LEVEL = 0
    NOISE = 1


class Data:
    """Names of NumPy's streams of `deepgen_jax.data.shuffle`, each with further numbers."""

    ORDER = "order"
    SLOTS = "slots"
    TEXT_DROP = "text"
    PROMPTS = "prompts of {}"
