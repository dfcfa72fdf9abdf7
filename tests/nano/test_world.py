"""The procedural world: always the same, nothing held out in training, drawn as it is described, read by the loader."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.make_data import TOKENIZER, model

from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig
from deepgen_jax.data.loader import Loader
from deepgen_jax.data.sources import open_source, read_row
from deepgen_jax.errors import DeepGenError
from deepgen_jax.nano.samples import SPLITS, TASK_SKILLS, Only, make_sample, render
from deepgen_jax.nano.world.pictures import VARIED_PLACES, VARIED_SKILLS
from deepgen_jax.nano.world.scene import ARRANGEMENTS, HELD_OUT_SHARE, Scene, fits, held_out, relation_key
from deepgen_jax.nano.world.score import score
from deepgen_jax.nano.world.truth import SKILLS, Truth
from deepgen_jax.nano.world.vocabulary import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, WORDS


def world(task: str = "t2i", split: str = "train", path: str = "size=64,samples=50,seed=3") -> SourceConfig:
    return SourceConfig(f"world-{task}", "synthetic", path, task, split=split)


def test_samples_are_the_same_for_ever():
    texts = [make_sample(split, skill, seed=0, index=5).text for split in SPLITS for skill in SKILLS]
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    # A change of this is a change of `synthetic.VERSION`.
    assert digest[:16] == "5d00d45cce2570dc"
    assert make_sample("train", "two", seed=0, index=1) != make_sample("train", "two", seed=1, index=1)
    pixels = np.asarray(render(make_sample("train", "single", seed=0, index=0).scene, 64))
    assert pixels.shape == (64, 64, 3)
    again = np.asarray(render(make_sample("train", "single", seed=0, index=0).scene, 64))
    np.testing.assert_array_equal(pixels, again)


@pytest.mark.parametrize("skill", ["single", "two", "count", "reasoning"])
def test_things_without_a_named_place_have_one_arrangement(skill):
    for index in range(200):
        sample = make_sample("train", skill, seed=0, index=index)
        if not any(wanted.place for wanted in sample.truth.things):
            points = ARRANGEMENTS[len(sample.scene.things)]
            middles = [(thing.x, thing.y) for thing in sample.scene.things]
            np.testing.assert_allclose(middles, points, rtol=0, atol=0.0061)


@pytest.mark.parametrize("skill", ["single", "two", "relation", "count", "reasoning", "text"])
def test_unspecified_attributes_are_constant(skill):
    for index in range(200):
        sample = make_sample("train", skill, seed=0, index=index)
        assert sample.scene.background == (sample.truth.background or "white")
        if skill in ("single", "two", "relation"):
            assert [thing.size for thing in sample.scene.things] == [
                wanted.size or "large" for wanted in sample.truth.things
            ]


@pytest.mark.parametrize("skill", SKILLS)
def test_training_holds_nothing_that_is_held_out(skill):
    for index in range(100):
        sample = make_sample("train", skill, seed=0, index=index)
        assert not any(held_out(*combination) for combination in sample.combinations)
        for scene in (sample.scene, *sample.references):
            assert not any(held_out(*thing.look) for thing in scene.things)
        other = make_sample("held_out", skill, seed=0, index=index)
        assert any(held_out(*combination) for combination in other.combinations)


def test_a_fair_share_is_held_out_and_every_word_trains():
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    assert 2 <= sum(held_out(*pair) for pair in pairs) <= 2 * len(pairs) / HELD_OUT_SHARE
    # No colour, shape or word is unknown to training.
    assert {colour for colour, shape in pairs if not held_out(colour, shape)} == set(COLOURS)
    assert {shape for colour, shape in pairs if not held_out(colour, shape)} == set(SHAPES)
    words = [(word, background) for word in WORDS for background in BACKGROUNDS]
    assert {word for word, background in words if not held_out("word", word, background)} == set(WORDS)


def test_a_relation_is_held_out_in_both_wordings():
    first, second = make_sample("train", "relation", seed=0, index=0).scene.things
    assert relation_key(first, "left", second) == relation_key(second, "right", first)
    assert relation_key(first, "above", second) == relation_key(second, "below", first)
    assert relation_key(first, "left", second) != relation_key(second, "left", first)


@pytest.mark.parametrize("skill", SKILLS)
def test_scenes_are_tidy_and_truths_survive_json(skill):
    for index in range(40):
        sample = make_sample("train", skill, seed=1, index=index)
        for scene in (sample.scene, *sample.references):
            assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene
            for number, thing in enumerate(scene.things):
                assert fits(thing, scene.things[:number], scene.sign), sample
        assert Truth.from_json(json.loads(json.dumps(sample.truth.to_json()))) == sample.truth
        assert len(sample.references) == (0 if skill in TASK_SKILLS["t2i"] else 2 if skill == "reference" else 1)
        assert sample.scene not in sample.references


def test_colours_are_distinguishable():
    colours = np.array([*COLOURS.values(), *BACKGROUNDS.values()], float)
    apart = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    shapes = len(COLOURS)
    assert apart[:shapes][apart[:shapes] > 0].min() >= 85


def test_captions_say_what_is_there():
    number = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
    chinese = 0
    for index in range(60):
        sample = make_sample("train", "count", seed=2, index=index)
        things = sample.scene.things
        if not sample.text.isascii():
            chinese += 1
            continue
        words = sample.text.lower().replace(",", "").rstrip(".").split()
        told = [number.get(word, int(word) if word.isdecimal() else 0) for word in words]
        assert sum(told) == len(things), sample
        assert things[0].colour in words
    assert 1 <= chinese <= 25


def test_one_thing_is_said_in_many_ways():
    samples = [make_sample("train", skill, seed=4, index=index) for skill in SKILLS for index in range(200)]
    texts = [sample.text for sample in samples if sample.text.isascii()]
    assert 0.2 < sum(text.endswith(".") for text in texts) / len(texts) < 0.3
    assert 0.25 < sum(text[0].isupper() for text in texts) / len(texts) < 0.35
    assert {"colour", "color", "grey", "gray"} <= {word for text in texts for word in text.rstrip(".").split()}
    assert not any(word in text for text in texts for word in ("{", "}", "  "))


@pytest.mark.parametrize("skill", ["recolour", "remove"])
def test_an_instruction_names_exactly_one_thing(skill):
    left_out = 0
    for index in range(200):
        sample = make_sample("train", skill, seed=4, index=index)
        (gone,) = sample.truth.gone
        things, words = sample.references[0].things, sample.text.lower().rstrip(".").split()
        told = [word for word in (gone.colour, gone.shape) if word in words]
        assert sum(set(told) <= set(thing.look) for thing in things) == 1, sample
        left_out += len(told) == 1
    assert left_out >= 20


def test_the_source_reads_what_the_index_saw():
    for task in ("t2i", "edit"):
        source = open_source(world(task))
        (file,) = source.files()
        rows = list(source.scan(file.path))
        assert rows == list(range(50))
        for row in rows[:10]:
            record, seen = read_row(source, row), read_row(source, row, header_only=True)
            assert record.text == seen.text
            assert len(record.images) == len(seen.images)
            assert seen.images[0].size == (64, 64)


def test_the_loader_reads_the_world_and_resumes(tmp_path: Path):
    config = DataConfig(
        (world(), world("edit")), 4, mixture=MixtureConfig(cycle=("edit", "t2i")), image_size=64, min_side=16,
        cache_dir=str(tmp_path), token_multiple=32, threads=1, prefetch=1,
    )  # fmt: skip
    with Loader(config, model(), TOKENIZER) as loader:
        first = [next(loader) for _ in range(3)]
        state = loader.get_state()
        following = next(loader)
    kinds = Counter((batch["task"], len(batch["references"])) for batch in first)
    assert kinds["t2i", 0] == 1
    assert sum(kinds.values()) == 3
    with Loader(config, model(), TOKENIZER) as loader:
        loader.set_state(state)
        again = next(loader)
    np.testing.assert_array_equal(following["target"], again["target"])
    assert list(following["sample_ids"]) == list(again["sample_ids"])
    halves = []
    for host in range(2):
        with Loader(config, model(), TOKENIZER, process_index=host, process_count=2) as loader:
            halves.append(next(loader)["target"])
    np.testing.assert_array_equal(np.concatenate(halves), first[0]["target"])
    name, _, rest = str(first[1]["sample_ids"][0]).partition("/")
    sample = make_sample("train", "t2i", seed=3, index=int(rest.partition("@")[0]))
    assert name == "world-t2i"
    np.testing.assert_array_equal(first[1]["target"][0], np.asarray(render(sample.scene, 64)))


def test_skills_come_in_turn():
    source = open_source(world(path="size=64,seed=3,skills=single+count"))
    records = [source.read(row) for row in range(4)]
    wanted = [make_sample("train", skill, seed=3, index=i) for i in range(2) for skill in ("single", "count")]
    assert [record.text for record in records] == [sample.text for sample in wanted]


@pytest.mark.parametrize(("skill", "background"), [("recolour", "grey"), ("remove", ""), ("move", "")])
def test_hard_samples_can_be_selected(skill, background):
    for named, told, left_out in (("shape", "shape", "colour"), ("colour", "colour", "shape")):
        path = f"skills={skill},named={named}" + f",background={background}" * bool(background)
        source = open_source(world("edit", path=path))
        for row in range(8):
            sample = make_sample("train", skill, seed=0, index=row, only=Only(background, named))
            (gone,) = sample.truth.gone
            text = sample.text.lower()
            assert getattr(gone, told) in text
            # What a thing is turned into may be told by its shape, too, but no instruction tells its former colour.
            assert getattr(gone, left_out) not in text or (left_out == "shape" and f"{gone.colour} shape" in text)
            assert background in ("", sample.scene.background)
            assert source.read(row).text == sample.text


@pytest.mark.parametrize(("skill", "things"), [("recolour", 3), ("multi_step", 2), ("replace_word", 1), ("add", 1)])
def test_pictures_can_be_selected_by_number_of_things(skill, things):
    source = open_source(world("edit", path=f"skills={skill},things={things}"))
    for row in range(8):
        sample = make_sample("train", skill, seed=0, index=row, only=Only(things=things))
        assert len(sample.references[0].things) == things
        assert source.read(row).text == sample.text


@pytest.mark.parametrize("where", VARIED_PLACES)
@pytest.mark.parametrize("skill", VARIED_SKILLS)
def test_what_captions_leave_open_varies(skill, where):
    drawn = [make_sample("train", skill, seed=0, index=i, varied=where) for i in range(120)]
    for sample in drawn:
        result = score(np.asarray(render(sample.scene, 96)), sample.truth, lambda sign: [])
        assert result.done, (sample.text, sample.scene)
        for thing in sample.scene.things:
            assert fits(thing, [other for other in sample.scene.things if other is not thing])
    free = [sample for sample in drawn if sample.truth.background is None]
    assert {sample.scene.background for sample in free} == set(BACKGROUNDS)
    sizes = [t.size for s in drawn for t, w in zip(s.scene.things, s.truth.things, strict=True) if w.size is None]
    assert {0.3 < sizes.count(size) / len(sizes) < 0.7 for size in SIZES} == {True}
    places = [(t.x, t.y) for s in drawn for t, w in zip(s.scene.things, s.truth.things, strict=True) if not w.place]
    assert (np.std(places, axis=0) > 0.15).all()
    nearest = [min(np.hypot(x - px, y - py) for px, py in PLACES.values()) for x, y in places]
    assert (max(nearest) < 0.01) == (where == "places")
    # What is asked for is the same as with the defaults.
    assert [s.truth for s in drawn] == [make_sample("train", skill, seed=0, index=i).truth for i in range(len(drawn))]


def test_varied_scenes_are_read():
    source = open_source(world(path="size=64,seed=3,skills=two,varied=anywhere"))
    sample = make_sample("train", "two", seed=3, index=5, varied="anywhere")
    record = source.read(5)
    assert record.text == sample.text
    (drawn,) = record.images
    assert isinstance(drawn, bytes)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(drawn))), np.asarray(render(sample.scene, 64)))


def test_unselected_samples_stay_the_same():
    assert make_sample("train", "edit", seed=0, index=3, only=Only()) == make_sample("train", "edit", seed=0, index=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "background=gray"}, "world-t2i: background is 'gray'; use one of white, grey"),
        ({"path": "background="}, "'background='"),
        ({"path": "named=size"}, "named is 'size'; use one of shape, colour"),
        ({"path": "named=shape"}, "but single names nothing; use it with recolour, move, remove"),
        ({"path": "things=4"}, "things is 4; use 1 to 3"),
        ({"path": "things=2"}, "no single starts with that many; leave it out"),
        ({"path": "size=60"}, "size is 60"),
        ({"path": "varied=places"}, "count cannot be varied; use skills single, two, relation"),
        ({"path": "skills=single,varied=1"}, "varied is '1'; use one of anywhere, places"),
        ({"path": "pixels=64"}, "'pixels=64'"),
        ({"path": "samples=0"}, "samples 0"),
        ({"split": "test"}, "'test'; use train or held_out"),
        ({"path": "skills=single+recolour"}, "'recolour' is none of task t2i; use some of single, two"),
        ({"path": "skills=single+count+single"}, "names a skill twice; use a second source"),
    ],
)
def test_reports_bad_settings(change, message):
    with pytest.raises(DeepGenError, match=message):
        open_source(world(**change))


def test_reports_an_unknown_skill():
    with pytest.raises(DeepGenError, match="'recolor'"):
        make_sample("train", "recolor", seed=0, index=0)
