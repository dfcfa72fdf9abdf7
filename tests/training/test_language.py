"""The vision-language model's own training: next-token loss, answers, and the stage over questions."""

from __future__ import annotations

import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.runs import write_model

from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig
from deepgen_jax.data.sources import open_source
from deepgen_jax.data.tokens import QUESTION_END
from deepgen_jax.errors import DeepGenError
from deepgen_jax.nano.samples import make_sample
from deepgen_jax.nano.world.questions import ask
from deepgen_jax.parallel.mesh import make_mesh
from deepgen_jax.training.accumulation import Sums
from deepgen_jax.training.inputs import Text
from deepgen_jax.training.language import _measure, update
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import LanguageConfig, SupervisedConfig
from deepgen_jax.training.stage import make_stage
from deepgen_jax.training.state import init_state

END, ASKED, IMAGE = 9, 7, 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> LanguageConfig:
    folder = tmp_path_factory.mktemp("language")
    world = "size=64,samples=40"
    sources = (SourceConfig("questions", "synthetic", f"{world},questions=1", task="edit"),)
    return LanguageConfig(
        model=str(write_model(folder)), out=str(folder / "run"), steps=8, dtype="float32", remat="none", accumulation=2,
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0),
        data=DataConfig(
            sources, 4, mixture=MixtureConfig(cycle=("edit",)), image_size=64, min_side=16, text_drop=0.0,
            token_multiple=144, cache_dir=str(folder / "index"), threads=1,
        ),
    )  # fmt: skip


def test_loss_and_answers_cover_only_the_text():
    # pad, image, image, a question, its mark, the answer, the end, the next turn.
    ids = np.array([[0, IMAGE, IMAGE, 1, ASKED, 2, 3, END, 4]], np.int32)
    real = np.array([[False, *[True] * 8, True]])
    index = np.where(ids == IMAGE, np.cumsum(ids == IMAGE, axis=1) - 1, -1)
    text = Text(ids, np.zeros((3, 1, 10), np.int32), real, real, index)
    likely = np.zeros((1, 8, 10), np.float32)
    for place, token in enumerate(ids[0, 1:]):
        likely[0, place, token] = 20
    found = _measure(jnp.asarray(likely), text, ASKED, END)
    # Not: the first image (behind a pad), the second (a picture). Counted: 1, the mark, 2, 3, the end, 4.
    assert float(found["tokens"][0]) == 6
    assert float(found["loss"][0]) < 1e-3
    assert (float(found["right"][0]), float(found["answers"][0])) == (1, 1)
    wrong_answer, wrong_question = likely.copy(), likely.copy()
    wrong_answer[0, 5] = np.roll(wrong_answer[0, 5], 1)
    wrong_question[0, 2] = np.roll(wrong_question[0, 2], 1)
    for logits, right in ((wrong_answer, 0), (wrong_question, 1)):
        found = _measure(jnp.asarray(logits), text, ASKED, END)
        assert float(found["right"][0]) == right
        np.testing.assert_allclose(found["loss"][0], 20, rtol=1e-3)
    silent = text._replace(input_ids=np.where(ids == ASKED, 5, ids))
    found = _measure(jnp.asarray(likely), silent, ASKED, END)
    assert (float(found["right"][0]), float(found["answers"][0])) == (0, 0)


def test_the_stage_learns_to_see_and_resumes(config: LanguageConfig):
    stage = make_stage(config, make_mesh("fsdp=1"))
    summary = stage.summary()
    assert summary[0].startswith("trains text ")
    before = jax.tree.map(np.asarray, stage.state.trainable["params"])
    losses = []
    for _ in range(4):
        report = stage.step()
        losses.append(float(report.metrics["loss"]))
        assert 0 <= float(report.metrics["answers_right"]) <= 1
    assert losses[-1] < losses[0] - 0.3
    assert report.samples == 8
    assert {"grad_norm/text", "grad_norm/vision", "update_norm", "skipped"} <= report.metrics.keys()
    changed = jax.tree.map(lambda x, y: bool((x != np.asarray(y)).any()), before, stage.state.trainable["params"])
    # The gradient reaches the first layer of the vision tower through the language model.
    assert changed["vision"]["patch_embed"]["kernel"]
    assert changed["text"]["embed_tokens"]["embedding"]
    position, state = stage.position(), jax.tree.map(jnp.copy, stage.state)
    following = float(stage.step().metrics["loss"])
    stage.resume(state, position)
    assert float(stage.step().metrics["loss"]) == following
    with pytest.raises(DeepGenError, match="seed=1"):
        stage.resume(state, {**position, "seed": 1})
    stage.close()


def test_questions_are_about_what_is_there():
    source = open_source(SourceConfig("q", "synthetic", "size=64,samples=60,questions=1", task="edit"))
    kinds = set()
    for row in source.scan("size=64,samples=60,questions=1"):
        record = source.read(row)
        assert len(record.images) == 2
        assert record.images[0] == record.images[1]
        question, _, answer = record.text.partition(QUESTION_END)
        things = make_sample("train", "t2i", seed=0, index=row).scene.things
        kinds.add(question.split()[1])
        if question.startswith("what colour"):
            assert answer.strip() in {thing.colour for thing in things if thing.shape in question}
        if question.startswith("which shape"):
            assert answer.strip() in {thing.shape for thing in things if thing.colour in question}
        if question.startswith("how many"):
            assert answer.strip() == ("one", "two", "three", "four", "five")[len(things) - 1]
    assert {"colour", "shape", "many", "is"} <= kinds
    sample = make_sample("train", "text", seed=0, index=0)
    asked = {ask(random.Random(i), sample) for i in range(40)}
    assert f"what does the sign say{QUESTION_END} {sample.truth.word}" in asked


def test_parts_belong_to_their_stages(config: LanguageConfig):
    with pytest.raises(DeepGenError, match="text and vision, both"):
        LanguageConfig(model="m", out="o", steps=1, trains=("text",), data=config.data)
    with pytest.raises(DeepGenError, match="set task=edit"):
        open_source(SourceConfig("q", "synthetic", "questions=1"))
    supervised = SupervisedConfig(
        model=config.model, out=config.out, steps=1, trains=("bridge", "vision"), data=config.data
    )
    with pytest.raises(DeepGenError, match="does not train the vision"):
        make_stage(supervised, make_mesh("fsdp=1"))


def test_losses_that_are_not_finite_change_nothing():
    optimizer = optax.adam(1e-3)
    params = {"text": {"kernel": jnp.ones(3)}}
    state = init_state(optimizer, params, None, ema=False)
    names = {"loss": jnp.nan, "tokens": 4.0, "right": 1.0, "answers": 2.0}
    gradients = {"params": {"text": {"kernel": jnp.ones(3)}}, "lora": {}}
    sums = Sums(gradients, {name: jnp.float32(value) for name, value in names.items()})
    after, metrics = update(optimizer, None, state, sums)
    assert metrics["skipped"] == 1
    assert metrics["answers_right"] == 0.5
    np.testing.assert_array_equal(after.trainable["params"]["text"]["kernel"], np.ones(3))
