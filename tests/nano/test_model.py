"""DeepGen-nano: sizes within the promise, a tokenizer that knows the world, configurations that find each other."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from deepgen_jax import DeepGenPipeline
from deepgen_jax.cli.main import main
from deepgen_jax.data.prompt_encoder import PromptEncoder
from deepgen_jax.data.tokens import PromptTokenizer
from deepgen_jax.models.bridge import Bridge
from deepgen_jax.models.patches import sincos_table
from deepgen_jax.models.qwen_text import selected_layers
from deepgen_jax.nano.benchmark import evaluate, generated, held_out_samples
from deepgen_jax.nano.model import SIZE, learn_merges, nano_config
from deepgen_jax.nano.reward import WorldReward
from deepgen_jax.nano.samples import TASK_SKILLS, make_sample
from deepgen_jax.nano.world.find import look
from deepgen_jax.nano.world.vocabulary import BACKGROUNDS, COLOURS, PLACES
from deepgen_jax.parallel.mesh import make_mesh
from deepgen_jax.settings import apply
from deepgen_jax.stores import model_folder
from deepgen_jax.stores.lineage import starting_point_of
from deepgen_jax.stores.model_folder import NANO, PACKAGED, PARTS, load_params, locate, read_manifest
from deepgen_jax.training.config_files import load_config, packaged_configs
from deepgen_jax.training.weights import load_start

#: How many times the unit of their lengths the texts of a task take in a stage, at most.
UNITS = {("t2i", "pretrain"): 1, ("t2i", "sft"): 4, ("edit", "sft"): 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano") / "model"
    assert main(["nano", "init", "--out", str(folder)]) == 0
    return folder


def test_the_folder_holds_the_model_in_25_megabytes(model: Path):
    manifest = read_manifest(model)
    assert manifest.config == nano_config()
    config = manifest.config
    assert selected_layers(config.text.num_layers, config.bridge.selection_stride) == (6, 5, 4, 3, 2, 1)
    assert config.mmdit.dual_attention_layers
    assert config.vae.downscale == 8
    weights = 2 * sum(summary.count for summary in manifest.parameters.values())
    tokenizer = sum(file.stat().st_size for file in (model / "tokenizer").iterdir())
    assert weights + tokenizer <= 25_000_000


def test_the_tokenizer_is_always_the_same_and_positions_are_those_of_sd3(model: Path):
    merges = (model / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert merges == [" ".join(pair) for pair in learn_merges()]
    config = nano_config().mmdit
    wanted = sincos_table(config.pos_embed_max_size, config.sample_size // config.patch_size, config.hidden_size)
    np.testing.assert_array_equal(load_params(model, PARTS)["mmdit"]["pos_embed"], wanted)


def test_prompts_fit_and_signs_are_spelled(model: Path):
    prompts = PromptEncoder(model / "tokenizer", nano_config())
    queries, per_picture = nano_config().bridge.num_queries, (SIZE // 32) ** 2
    for task in TASK_SKILLS:
        samples = [make_sample("held_out", task, seed=7, index=index) for index in range(300)]
        lengths = [
            prompts.length(sample.text, len(sample.references) or None) + per_picture * len(sample.references)
            for sample in samples
        ]
        for name, units in ((name, units) for (of, name), units in UNITS.items() if of == task):
            assert max(lengths) + queries <= units * load_config(f"nano/{name}").data.token_multiple
    tokenizer = PromptTokenizer(model / "tokenizer", nano_config())
    assert len(tokenizer.encode(' "QUEEN"')) == len(' "QUEEN"')
    assert len(tokenizer.encode(" triangle")) == 1
    # Anything else goes byte by byte, and nothing is lost.
    assert len(tokenizer.encode("ÿ")) == len("ÿ".encode())


def test_stages_follow_each_other():
    stages = {name: load_config(name) for name in packaged_configs() if name.startswith("nano/")}
    trial = stages.pop("nano/bridge_trial")
    # The experiment on distillation starts from the finished model.
    pairs, singles, teacher, student = (
        stages.pop(f"nano/open_{name}") for name in ("pairs", "singles", "teacher", "student")
    )
    assert (pairs.model, pairs.start) == ("nano", "")
    assert not student.start
    assert (singles.start, teacher.start) == (pairs.out, singles.out)
    assert len({config.out for config in (pairs, singles, teacher, student)}) == 4
    assert not trial.start
    assert trial.model not in {config.model for config in stages.values()}
    assert {"nano/vae_small", "nano/vae", "nano/language", "nano/pretrain", "nano/sft", "nano/grpo"} <= set(stages)
    assert len({config.model for config in stages.values()}) == 1
    outs = {config.out for config in stages.values()}
    assert len(outs) == len(stages)
    assert all(config.start in outs for name, config in stages.items() if name != "nano/vae_small")


def test_reports_bad_options(model: Path, capsys):
    assert main(["nano", "init", "--out", str(model)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["nano", "init", "--seed", "-1"]) == 2
    assert "--seed is -1" in capsys.readouterr().err


def test_encoders_are_those_of_a_trained_nano_and_the_rest_is_random(tmp_path: Path, capsys):
    folder, trained = tmp_path / "model", PACKAGED / NANO
    words = ["nano", "init", "--encoders", "nano", "--seed", "1", "--without", "think_tokens", "--out", str(folder)]
    assert main(words) == 0
    assert "bridge and MMDiT are random" in capsys.readouterr().out
    wanted, found = load_params(trained, PARTS), load_params(folder, PARTS)
    for part in ("text", "vision", "vae"):
        for expected, leaf in zip(jax.tree.leaves(wanted[part]), jax.tree.leaves(found[part]), strict=True):
            np.testing.assert_array_equal(leaf, expected.astype(leaf.dtype))
    merges = [path / "tokenizer" / "merges.txt" for path in (folder, trained)]
    assert merges[0].read_text(encoding="utf-8") == merges[1].read_text(encoding="utf-8")
    block = [params["mmdit"]["proj_out"]["kernel"] for params in (found, wanted)]
    assert not np.array_equal(block[0], block[1])
    assert "meta_queries" not in found["bridge"]


def test_encoders_of_other_sizes_are_refused(folders, tmp_path: Path, capsys):
    assert main(["nano", "init", "--encoders", str(folders("sft")), "--out", str(tmp_path / "model")]) == 2
    assert "is not of nano's sizes" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_ablations_lack_the_ablated_part(tmp_path: Path):
    folder = tmp_path / "model"
    words = ["--without", "think_tokens", "--without", "stacked_channels"]
    assert main(["nano", "init", "--out", str(folder), *words]) == 0
    config = read_manifest(folder).config
    bridge = load_params(folder, ("bridge",))["bridge"]
    assert "meta_queries" not in bridge
    assert bridge["projector_in"]["kernel"].shape == (128, 128)
    assert selected_layers(config.text.num_layers, config.bridge.selection_stride) == (6,)
    # The rest is as it was, and the connector still sees whatever the prompt has.
    assert replace(config, bridge=nano_config().bridge) == nano_config()
    model = Bridge(config.bridge, text_dim=128, pooled_dim=128, sequence_dim=128)
    states = np.random.default_rng(0).normal(size=(1, 2, 5, 128)).astype(np.float32)
    assert model.apply({"params": bridge}, states[0], method=model.append_think_tokens).shape == (2, 5, 128)
    pooled, sequence = model.apply({"params": bridge}, states, np.ones((2, 5), bool))
    assert (pooled.shape, sequence.shape) == ((2, 128), (2, 5, 128))


@pytest.fixture
def packaged(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The untrained model in the place of the package's own; the working folder is empty."""
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / NANO).symlink_to(model)
    monkeypatch.setattr(model_folder, "PACKAGED", weights)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    return weights / NANO


def test_nano_is_the_packaged_model_unless_there_is_a_folder_of_that_name(packaged: Path):
    assert locate("nano") == locate(Path("nano/")) == locate(None) == packaged
    for other in ("", ".", "model", "out/nano", "x" * 10_000):
        assert locate(other) == Path(other)
    Path("nano").mkdir()
    assert locate("nano") == Path("nano")
    assert locate(None) == packaged


def test_commands_and_runs_take_the_name(packaged: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    assert main(["info", "nano"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(packaged)
    assert main(["export", "nano", "--format", "model", "--out", "copy"]) == 2
    assert "is a model folder already" in capsys.readouterr().err
    config = apply(load_config("nano/vae_small"), ["model=nano", "out=run"])
    assert starting_point_of(config).model == packaged
    assert set(load_start(config, make_mesh(None)).trainable["params"]) == {"vae"}
    pipe = DeepGenPipeline.from_pretrained("nano")
    assert pipe.config == nano_config()
    monkeypatch.setattr(model_folder, "PACKAGED", Path("nowhere"))
    assert main(["info", "nano"]) == 2
    assert "there is no folder nano, and this package lacks its weights" in capsys.readouterr().err
    assert main(["generate", "a red circle"]) == 2
    assert "no model is named, and this package lacks its weights" in capsys.readouterr().err


def test_the_packages_model_is_of_the_promised_size():
    folder = PACKAGED / NANO
    assert read_manifest(folder).config == nano_config()
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 25_000_000


def test_the_packaged_model_draws_colours_in_the_named_place():
    """The colour at the place that is named, and the background far from it."""
    rng = random.Random(0)
    wanted = [(rng.choice(list(COLOURS)), rng.choice(list(PLACES)), rng.choice(list(BACKGROUNDS))) for _ in range(16)]
    prompts = [f"a large {colour} square in the {place} on a {ground} background" for colour, place, ground in wanted]
    pipe = DeepGenPipeline.from_pretrained("nano")
    pictures = pipe(prompts, height=SIZE, width=SIZE, num_inference_steps=20, seed=0).images
    names, palette = zip(*(COLOURS | BACKGROUNDS).items(), strict=True)
    right = []
    for picture, (colour, place, ground) in zip(pictures, wanted, strict=True):
        away = max(PLACES.values(), key=lambda other: math.dist(other, PLACES[place]))
        found = []
        for x, y in (PLACES[place], away):
            column, row = round(x * SIZE), round(y * SIZE)
            seen = np.median(np.asarray(picture)[row - 4 : row + 4, column - 4 : column + 4], axis=(0, 1))
            found.append(names[int(np.argmin([math.dist(seen, one) for one in palette]))])
        right.append(found == [colour, ground])
    assert sum(right) >= 14, right


def test_the_packaged_model_understands_other_wordings():
    """Words and marks that no caption has, and some that all have."""
    wordings = (
        "a red circle", "A red circle.", "a photo of a red circle", "could you draw a red circle",
        "I want a red circle", "just a red circle", "a circle that is red, please",
        "generate an image of a red circle",
    )  # fmt: skip
    pipe = DeepGenPipeline.from_pretrained("nano")
    pictures = pipe(list(wordings), height=SIZE, width=SIZE, num_inference_steps=3, seed=0, padding="masked").images
    views = [look(np.asarray(picture)) for picture in pictures]
    right = [[(thing.colour, thing.shape) for thing in view.things] == [("red", "circle")] for view in views]
    assert sum(right) >= 7, dict(zip(wordings, right, strict=True))


def test_the_packaged_model_generalises_to_held_out_samples():
    pipe = DeepGenPipeline.from_pretrained("nano")
    least = {
        "single": 15, "two": 15, "relation": 15, "count": 15, "reasoning": 15, "text": 13,
        "recolour": 13, "move": 12, "remove": 14, "add": 14, "multi_step": 11,
    }  # fmt: skip
    samples = held_out_samples(16, 1, tuple(least))
    guidance = pipe.config.guidance_scale
    # A quarter of what `deepgen eval nano` takes, which is as good (docs/nano.md) and faster.
    make = generated(pipe, SIZE, steps=5, guidance=guidance, seed=0, batch_size=16)
    rows = {row.skill: row.right for row in evaluate(samples, make, WorldReward(workers=1).read)}
    assert all(rows[skill] >= right for skill, right in least.items()), rows


def test_guidance_is_the_models_own_unless_a_call_says_otherwise():
    pipe = DeepGenPipeline.from_pretrained("nano")

    def picture(**guidance: float) -> np.ndarray:
        return np.asarray(pipe("a red circle", height=SIZE, width=SIZE, num_inference_steps=2, **guidance).images[0])

    assert pipe.config.guidance_scale == 1.0
    np.testing.assert_array_equal(picture(), picture(guidance_scale=1.0))
    assert np.any(picture() != picture(guidance_scale=4.0))
