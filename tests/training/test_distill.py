"""Few-step distillation: the loss and its gradient, the student's start, runs, resuming, and the exported folder."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import runs, tiny_rl

from deepgen_jax import settings
from deepgen_jax.cli.main import main
from deepgen_jax.config import DeepGenConfig, SchedulerConfig, from_dict, to_dict
from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig
from deepgen_jax.data.loader import Loader
from deepgen_jax.errors import DeepGenError
from deepgen_jax.flow import policy, samplers, schedule
from deepgen_jax.inference.pipeline import DeepGenPipeline
from deepgen_jax.models import lora
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.parallel.mesh import make_mesh
from deepgen_jax.random_keys import Training
from deepgen_jax.stores.checkpoint import Checkpoints
from deepgen_jax.stores.model_folder import read_manifest
from deepgen_jax.training.abstract_run import AbstractRun
from deepgen_jax.training.distill import DistillStage, make_student, student_config
from deepgen_jax.training.distill_config import DistillConfig
from deepgen_jax.training.distillation import DistillSettings, Networks, distill_step
from deepgen_jax.training.loop import train
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.partition import init_lora, join, split
from deepgen_jax.training.run_config import AdapterConfig, CheckpointConfig, LogConfig
from deepgen_jax.training.state import init_state
from deepgen_jax.training.weights import Weights

# The runs share a model and compiled programs.
pytestmark = pytest.mark.xdist_group("distill")

NONE = SourceConfig("prompts", "prompts", "none.txt")


def distill_config(**changes) -> DistillConfig:
    data = DataConfig((NONE,), micro_batch=2, mixture=MixtureConfig(cycle=("t2i",)))
    values = {"model": "none", "out": "none", "steps": 3, "dtype": "float32", "remat": "none", "data": data}
    return DistillConfig(**(values | changes))


@partial(jax.jit, static_argnums=0)
def one_velocity(net, frozen, mmdit, adapters, words, places, x, sigma):
    """Velocity of one sample from its prompt, [1, T, N * D]."""
    ids, positions, real, visible = (words[0][None], words[1][:, None], words[2][None], words[3][None])
    tree = {"params": {**frozen, "mmdit": mmdit}}
    pooled, sequence = net.apply(tree, ids, positions, real, visible, method="condition")
    if adapters:
        tree["lora"] = adapters
    return net.apply(tree, x, places[None], jnp.full((1,), sigma * 1000), pooled, sequence, method="velocity")


class Case:
    """Student and teacher of the tiny model of reinforcement learning, whose layers do not start at zero."""

    def __init__(self, trains: str = "mmdit", estimates: int = 3, evaluations: int = 2):
        self.config = distill_config(
            trains=(trains,), estimates=estimates, evaluations=evaluations, lora=AdapterConfig(2, 4)
        )
        params = {**tiny_rl._params(0), "vae": {}, "vision": {}}
        weights, frozen = split(params, self.config.trains)
        adapters = init_lora(params["mmdit"], 2, jax.random.key(1), part="mmdit") if trains == "mmdit_lora" else {}
        mesh = make_mesh("data=1")
        start = Weights(tiny_rl.CONFIG, SchedulerConfig(), None, {"params": weights, "lora": adapters}, frozen)
        self.weights, self.teacher = make_student(self.config, start, mesh)
        self.trainable, self.frozen = self.weights.trainable, self.weights.frozen
        self.nets = Networks(DeepGen(self.weights.config), tiny_rl.MODEL)
        self.micro_batches, self.keys = tiny_rl.auxiliary()
        micro = self.micro_batches["t2i"]
        # The empty prompt, and a sample that counts less.
        negative = micro.text._replace(input_ids=jnp.full_like(micro.text.input_ids, 3))
        self.micro_batches["t2i"] = micro._replace(negative=negative, weight=micro.weight.at[0, 1].set(0.5))

    def moved(self, seed: int = 5):
        """Trainable parameters a random step away, so that estimates differ."""
        leaves, treedef = jax.tree.flatten(self.trainable)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        return treedef.unflatten([x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])

    def velocity(self, net, weights, micro, row, x, sigma, text):
        """Of one sample, [1, T, N * D]; ``weights`` are the MMDiT's, or with adapters a pair."""
        words = (text.input_ids[row], text.position_ids[:, row], text.real[row], text.visible[row])
        return one_velocity(net, self.frozen, *weights, words, micro.target_ids[row], x, sigma)

    def reference_loss(self, trainable, guidance, *, targets, window, noised=False, one=False):
        """The loss sample by sample, segment by segment and target by target, as the paper writes it."""
        stop, levels_of, total = jax.lax.stop_gradient, lambda t: 3 * t / (1 + 2 * t), 0.0
        times = np.append(1 - np.arange(2) / 1.5, 0.0)
        student = join(self.frozen["mmdit"], trainable["params"]["mmdit"])
        adapters = lora.scaled(trainable["lora"], self.weights.lora_scale) if trainable["lora"] else {}
        teacher = {**self.frozen["mmdit"], **self.teacher["mmdit"]}
        stacked, keys = self.micro_batches["t2i"], self.keys["t2i"]
        for a in range(2):
            micro = jax.tree.map(lambda leaf: leaf[a], stacked)  # noqa: B023
            shares = micro.weight / micro.weight.sum() / 2
            drawn = float(jax.random.uniform(jax.random.fold_in(keys[a, 0], Training.POLICY_SEGMENT)))
            chosen = int(drawn >= times[0] - times[1])
            for row in range(2):
                key = keys[a, row]
                shape = micro.latents.shape[1:]
                noise = jax.random.normal(jax.random.fold_in(key, Training.FLOW_NOISE), shape)[None]
                x = noise
                for k in range(2):
                    start, end = times[k], times[k + 1]
                    sigma, following = levels_of(start), levels_of(end)
                    if noised:
                        x = (1 - sigma) * micro.latents[row][None] + sigma * noise
                    grid = np.linspace(sigma, following, 3)
                    weights = (student, adapters)
                    output = self.velocity(self.nets.student, weights, micro, row, stop(x), sigma, micro.text)
                    estimates = jnp.stack([x - sigma * v for v in jnp.split(output, 3, axis=-1)])
                    fold = jax.random.fold_in(jax.random.fold_in(key, Training.POLICY_TARGETS), k)
                    draws = np.asarray(jax.random.uniform(fold, (targets,)))
                    losses = []
                    for m in range(targets):
                        time = start - (m + draws[m]) / targets * (start - end - window)
                        level, until = levels_of(time), levels_of(time - window)
                        seen = policy.follow(stop(x), stop(estimates), grid, level)
                        plain = (teacher, {})
                        wanted = self.velocity(self.nets.teacher, plain, micro, row, seen, level, micro.text)
                        if guidance is not None:
                            other = self.velocity(self.nets.teacher, plain, micro, row, seen, level, micro.negative)
                            wanted = other + guidance * (wanted - other)
                        reached = policy.follow(seen, estimates, grid, until, start=level)
                        losses.append(jnp.mean(((seen - reached) / (level - until) - stop(wanted)) ** 2))
                    weight = float(k == chosen) if one else start - end
                    total += weight * shares[row] * sum(losses) / targets
                    x = stop(policy.follow(x, estimates, grid, following))
        return total


@pytest.mark.parametrize(
    ("trains", "guidance", "how"),
    [
        ("mmdit", 3.0, {}),
        ("mmdit_lora", None, {"noised": True}),
        ("mmdit_lora", 2.0, {"one": True}),
    ],
)
def test_a_step_is_what_the_paper_says(trains, guidance, how):
    case = Case(trains)
    trainable = case.moved()
    options = {"targets": 2, "window": 0.03, **how}
    step = DistillSettings(SchedulerConfig(), 2, guidance=guidance, lora_scale=case.weights.lora_scale, **options)
    optimizer = optax.sgd(1.0)
    state = init_state(optimizer, trainable["params"], trainable["lora"], ema=False)
    run = jax.jit(lambda *args: distill_step(case.nets, optimizer, step, *args))
    new, metrics = run(state, case.frozen, case.teacher, case.micro_batches, case.keys)

    def reference(trainable):
        return case.reference_loss(trainable, guidance, **options)

    loss, gradients = jax.value_and_grad(reference)(trainable)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    lengths = np.array([2 / 3, 1 / 3])
    if not how.get("one"):
        np.testing.assert_allclose(np.sum(lengths * metrics["loss_by_segment"]), loss, rtol=1e-5)
    found = jax.tree.map(lambda before, after: before - after, state.trainable, new.trainable)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients))
    for path, expected in jax.tree_util.tree_leaves_with_path(gradients):
        got = found
        for entry in path:
            got = got[entry.key]
        np.testing.assert_allclose(got, expected, atol=2e-4 * largest, err_msg=jax.tree_util.keystr(path))
    assert largest > 0
    # The teacher, the language model and the bridge are no part of what trains.
    assert set(gradients["params"]) == {"mmdit"}


@pytest.mark.parametrize("trains", ["mmdit", "mmdit_lora"])
@pytest.mark.parametrize("evaluations", [1, 4])
def test_the_student_begins_as_euler_over_its_segments(trains, evaluations):
    case = Case(trains, estimates=5, evaluations=evaluations)
    micro = jax.tree.map(lambda leaf: leaf[0], case.micro_batches["t2i"])
    student = join(case.frozen["mmdit"], case.trainable["params"]["mmdit"])
    adapters = lora.scaled(case.trainable["lora"], 1.0) if case.trainable["lora"] else {}
    teacher = {**case.frozen["mmdit"], **case.teacher["mmdit"]}
    noise = jax.random.normal(jax.random.key(3), (1, tiny_rl.TOKENS, tiny_rl.WIDTH))
    sigmas = schedule.segment_sigmas(SchedulerConfig(), evaluations)

    def sampled(name, net, weights):
        def velocity(x, sigma):
            return case.velocity(net, weights, micro, 0, x, sigma, micro.text)

        return jax.jit(lambda noise: samplers.sample(name, velocity, noise, sigmas))(noise)

    got = sampled("pi_flow", case.nets.student, (student, adapters))
    np.testing.assert_allclose(got, sampled("euler", case.nets.teacher, (teacher, {})), atol=2e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_segments_are_those_of_the_sampler(dynamic):
    config = SchedulerConfig(use_dynamic_shifting=dynamic)
    found = samplers.get_sampler("pi_flow").noise_levels(config, 4, 1024)
    shift = np.exp(0.5 + 0.65 * (1024 - 256) / 3840) if dynamic else 3.0
    times = np.array([1, 5 / 7, 3 / 7, 1 / 7, 0])
    np.testing.assert_allclose(found, shift * times / (1 + (shift - 1) * times), rtol=1e-6)
    assert samplers.get_sampler("euler").noise_levels(SchedulerConfig(), 4)[-2] < 0.01


class Stop:
    """Asks a run to stop after some steps."""

    def __init__(self, after: int = 10**9):
        self._left = after

    @property
    def signum(self) -> int | None:
        self._left -= 1
        return 15 if self._left <= 0 else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    runs.write_data(folder)
    runs.write_model(folder)
    (folder / "prompts.txt").write_text("".join(f"picture number {i}\n" for i in range(9)))
    return folder


@pytest.fixture(scope="module")
def config(folder):
    """Two micro-batches a step: prompts, and edits of pictures."""
    sources = (
        SourceConfig("words", "prompts", str(folder / "prompts.txt")),
        SourceConfig("edits", "json", str(folder / "edit.json"), task="edit"),
    )
    data = DataConfig(
        sources, micro_batch=8, mixture=MixtureConfig(cycle=("t2i", "edit")), image_size=64, min_side=16,
        token_multiple=64, text_drop=0.0, cache_dir=str(folder / "index"),
    )  # fmt: skip
    return distill_config(
        model=str(folder / "model"), out=str(folder / "run"), steps=4, evaluations=2, estimates=3, data=data,
        targets=1, accumulation=2, lora=AdapterConfig(4, 8), ema_decay=0.9,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.1), checkpoints=CheckpointConfig(every=100),
        log=LogConfig(tensorboard=False, sample_ids=True),
    )  # fmt: skip


def run_to_the_end(config, stop=None, mesh="data=1"):
    return train(config, make_mesh(mesh), stop or Stop(), lambda _: None)


def restored(config, step):
    """The stage at a checkpoint of its run."""
    stage = DistillStage(config, make_mesh("data=1"))
    with Checkpoints(Path(config.out), 3, 0) as checkpoints:
        state, position = checkpoints.restore(step, stage.state)
    stage.resume(state, position["stage"])
    stage.close()
    return stage


@pytest.fixture(scope="module")
def whole(config, folder):
    assert run_to_the_end(config).finished
    return folder / "run"


def test_an_interrupted_run_continues_bit_for_bit(config, folder, whole):
    again = replace(config, out=str(folder / "again"))
    outcome = run_to_the_end(again, Stop(2))
    assert not outcome.finished
    assert outcome.step < 4
    assert run_to_the_end(again).finished
    assert runs.losses(folder / "again") == runs.losses(whole)
    assert runs.sample_ids(folder / "again") == runs.sample_ids(whole)
    parameters = runs.parameters(folder / "again")
    for path, array in runs.parameters(whole).items():
        np.testing.assert_array_equal(parameters[path], array, err_msg=path)


def test_what_a_run_began_with_is_fixed(config, whole):
    with pytest.raises(DeepGenError, match="begun with evaluations=2, not 4"):
        run_to_the_end(replace(config, evaluations=4))


@pytest.mark.slow
def test_first_losses_on_a_mesh(config, folder, whole):
    path = folder / "config.py"
    path.write_text(
        "import json\nfrom deepgen_jax import settings\n"
        "from deepgen_jax.training.distill_config import DistillConfig\n"
        f"values = json.load(open({str(whole / 'config.json')!r}))['config']\n"
        "def get_config():\n    return settings.parse(DistillConfig, values, 'run')\n"
    )
    out = folder / "mesh"
    runs.finish(runs.start(folder, "mesh=data=2,fsdp=2,tensor=2", f"out={out}", devices=8))
    np.testing.assert_allclose(runs.losses(out), runs.losses(whole), rtol=1e-4)


def test_the_exported_folder_samples_as_the_run(config, folder, whole, capsys):
    """Generation and editing from the command line, without any option, are those of the run's moving average."""
    out = folder / "student"
    assert main(["export", str(whole), "--format", "model", "--ema", "--out", str(out)]) == 0
    model = read_manifest(out).config
    assert (model.sampler, model.num_inference_steps, model.guidance_scale) == ("pi_flow", 2, 1.0)
    assert model.mmdit.estimates == 3
    pipe = DeepGenPipeline.from_pretrained(out)
    assert pipe.params["mmdit"]["proj_out"]["bias"].shape == (3 * 64,)
    call = {"height": 64, "width": 64, "output_type": "latent"}
    made = pipe("picture number 3", **call).latents
    teacher = DeepGenPipeline.from_pretrained(folder / "model")
    sigmas = {"num_inference_steps": 2, "guidance_scale": 1.0, "sampler": "pi_flow"}
    began = teacher("picture number 3", **call, **sigmas).latents
    assert np.abs(made - began).max() > 1e-3
    np.testing.assert_allclose(restored(config, 4).pipeline()("picture number 3", **call).latents, made, atol=1e-4)
    image = folder / "made.png"
    capsys.readouterr()
    words = ["generate", str(out), "picture number 3", "--size", "64", "--out", str(image)]
    assert main(words) == 0
    assert image.is_file()
    for option, message in (
        (["--steps", "4"], "distilled to 2 evaluations, not 4; leave the steps out"),
        (["--sampler", "euler"], "of the sampler pi_flow, not euler; leave the sampler out"),
        (["--guidance", "4"], "without guidance, not at guidance 4; leave the guidance out"),
        (["--cache", "0.1"], "of which none can be saved; leave the cache out"),
        (["--guidance-interval", "0,0.5"], "of which none can be saved; leave the guidance interval out"),
    ):
        assert main([*words, "--overwrite", *option]) == 2
        assert message in capsys.readouterr().err
    for source in (whole, out):
        assert main(["export", str(source), "--format", "diffusers", "--out", str(folder / "release")]) == 2
        assert "3 estimates, for which released layouts have no place" in capsys.readouterr().err


def test_adapters_and_pictures(config, folder):
    """LoRA on noised pictures, one segment of each micro-batch; merged by export."""
    sources = (SourceConfig("pictures", "json", str(folder / "t2i.json")), config.data.sources[1])
    data = replace(config.data, sources=sources)
    out = folder / "lora"
    changed = replace(
        config, trains=("mmdit_lora",), states="data", segments="one", guidance_scale=1.0, data=data, out=str(out),
        ema_decay=None, steps=3,
    )  # fmt: skip
    assert run_to_the_end(changed).finished
    logged = runs.metrics(out)
    assert all(np.isfinite(line["loss"]) for line in logged)
    assert main(["export", str(out), "--format", "model", "--out", str(folder / "merged")]) == 0
    model = read_manifest(folder / "merged").config
    assert model.lora is None
    assert model.mmdit.estimates == 3
    # As the run's own pipeline, after its last checkpoint.
    stage = restored(changed, 3)
    assert set(stage.state.trainable["params"]["mmdit"]) == {"proj_out"}
    call = {"height": 64, "width": 64, "output_type": "latent"}
    own = stage.pipeline()("picture number 3", **call).latents
    exported = DeepGenPipeline.from_pretrained(folder / "merged")("picture number 3", **call).latents
    np.testing.assert_allclose(exported, own, atol=2e-4)


def test_the_compiled_step_is_that_of_a_run(config):
    mesh = make_mesh("data=1")
    stage = DistillStage(config, mesh)
    batch, program = next(stage._batches), stage._program
    stage.close()
    passed = (stage.state, program.frozen, program.teacher, batch.micro_batches, batch.keys)
    queries = stage._weights.config.bridge.num_queries
    length = batch.micro_batches["t2i"].text.real.shape[-1] - queries
    model = read_manifest(config.model_folder).config
    made = DistillStage.abstract_programs["step"].make(AbstractRun(config, model, mesh, length))

    def shapes(tree):
        return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)

    assert shapes(made.arguments[:3]) == shapes(passed[:3])
    assert shapes(made.arguments[3]["t2i"]) == shapes(passed[3]["t2i"])
    assert made.flops > 0
    assert "func.func public @main" in made.lower().as_text()
    sampler = DistillStage.abstract_programs["inference"].make(AbstractRun(config, model, mesh, length))
    assert "2 steps of pi_flow" in sampler.summary[0]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("evaluations=3", "evaluations is 3; choose 1, 2, 4 or 8"),
        ("trains=bridge", "distillation trains only mmdit or mmdit_lora"),
        ("estimates=0", "estimates must be at least 1|estimates is 0"),
        ("window=0", "window is 0.0; it must be above 0"),
        ("guidance_scale=-1", "guidance_scale is -1.0"),
        ("states=picture", "noise.*data"),
        ("samples.num_inference_steps=50", "samples.num_inference_steps is 50, but the student's is 4; leave it out"),
    ],
)
def test_settings_that_cannot_be(word, message):
    with pytest.raises(DeepGenError, match=message):
        settings.apply(distill_config(), [word])


def test_starts_that_cannot_be(config, folder, whole):
    student = folder / "student"
    if not student.exists():
        assert main(["export", str(whole), "--format", "model", "--ema", "--out", str(student)]) == 0
    for changes, message in (
        ({"model": str(student)}, "was distilled to 2 evaluations, and no training continues"),
        ({"start": str(whole)}, "was distilled to few steps, and no training continues"),
        ({"states": "data"}, "source words has prompts without pictures"),
    ):
        with pytest.raises(DeepGenError, match=message):
            run_to_the_end(replace(config, out=str(folder / "refused"), **changes))


def test_other_stages_want_pictures(config, folder):
    model = folder / "model"
    with pytest.raises(DeepGenError, match="source words has prompts without pictures"):
        Loader(config.data, read_manifest(model).config, model / "tokenizer")


def test_prompt_files_as_data(folder, config):
    rows = [{"prompt": "wide", "width": 128, "height": 64}, {"prompt": "square"}, {"prompt": "bad", "width": 3}, {}]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig("rows", "prompts", str(path))
    data = replace(
        config.data, sources=(source,), mixture=MixtureConfig(cycle=("t2i",)), micro_batch=1, max_bad_share=0.6
    )
    model = folder / "model"
    with Loader(data, read_manifest(model).config, model / "tokenizer", images=False) as loader:
        assert {bucket.target for bucket in loader.buckets} == {(96, 64), (64, 64)}
        assert loader.plan.indices[0].meta["counts"] == {"wrong prompt": 2}
        assert not next(loader)["target"].any()
    for changes, message in (
        ({"task": "edit"}, "prompts have no references"),
        ({"path": "gs://bucket/prompts.txt"}, "read from a local disk"),
        ({"fields": {"text": "words"}}, "call the column 'prompt'"),
    ):
        with pytest.raises(DeepGenError, match=message):
            Loader(
                replace(data, sources=(replace(source, **changes),), mixture=MixtureConfig(cycle=(
                    changes.get("task", "t2i"),
                ))), read_manifest(model).config, model / "tokenizer", images=False,
            )  # fmt: skip


def test_config_of_other_models_is_as_before():
    values = to_dict(DeepGenConfig())
    assert "estimates" not in values["mmdit"]
    assert from_dict(DeepGenConfig, values) == DeepGenConfig()
    student = student_config(distill_config(estimates=7), DeepGenConfig())
    assert student.mmdit.estimates == 7
    assert to_dict(student)["mmdit"]["estimates"] == 7
    assert from_dict(DeepGenConfig, to_dict(student)) == student
    assert student.few_step
    assert not DeepGenConfig().few_step
