"""Losses, gradients and one AdamW step of the supervised objective against the PyTorch system's."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepgen_jax.convert import names, transforms
from deepgen_jax.data.tokens import PromptTokenizer, pad_prompts
from deepgen_jax.flow.schedule import sigma_from_u
from deepgen_jax.models import patches as grids
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.stores import model_folder
from deepgen_jax.training.inputs import MicroBatch, Moments, Text, TokenBudget, assemble, encode
from deepgen_jax.training.optimizer import OptimizerConfig, make_optimizer
from deepgen_jax.training.partition import join, split
from deepgen_jax.training.state import apply_gradients, init_state, parts
from deepgen_jax.training.supervised import (
    Draws,
    StepSettings,
    draw,
    merged,
    run_together,
    supervised_gradients,
    supervised_losses,
    train_step,
)

SFT = ("bridge", "mmdit", "lora")


class Setup:
    """A model folder opened for training."""

    def __init__(self, folder, trains):
        self.config = model_folder.read_manifest(folder).config
        self.scheduler = model_folder.read_scheduler(folder)
        self.model = DeepGen(self.config)
        self.tokenizer = PromptTokenizer(folder / "tokenizer", self.config)
        params = model_folder.load_params(folder, dtype="float32")
        adapters = (model_folder.load_lora(folder, dtype="float32") or {}) if "lora" in trains else {}
        if "vision" in adapters:  # the vision tower runs without gradients: its adapters are merged for good
            from deepgen_jax.models.lora import merged

            params["vision"] = merged(params["vision"], adapters.pop("vision"), self.config.lora.scale)
        weights, self.frozen = split(params, trains)
        self.trainable = {"params": weights, "lora": adapters}
        self.lora_scale = self.config.lora.scale if self.config.lora else 0.0

    def text(self, texts, image_sizes=None, max_tokens=None):
        prompts = [self.tokenizer(t, image_sizes and image_sizes[i]) for i, t in enumerate(texts)]
        longest = max(len(prompt.input_ids) for prompt in prompts)
        if max_tokens is not None:
            prompts = [prompt.last(max_tokens) for prompt in prompts]
            longest = min(longest, max_tokens)
        batch = pad_prompts(prompts, [longest] * len(prompts), self.config)
        fields = (batch.input_ids, batch.position_ids, batch.real, batch.visible, batch.image_slots)
        return Text(*map(jnp.asarray, fields))

    def pack(self, latents, references=None):
        sizes = {"patch_size": self.config.mmdit.patch_size, "max_size": self.config.mmdit.pos_embed_max_size}
        return grids.pack(latents, references or [[] for _ in latents], **sizes)

    def loss(self, trainable, micro, draws):
        losses = supervised_losses(self.model, trainable, self.frozen, micro, draws, self.lora_scale)
        return jnp.mean(losses)

    def value_and_grad(self, micro, draws):
        return jax.jit(jax.value_and_grad(self.loss))(self.trainable, micro, draws)


@pytest.fixture(scope="module")
def setups(folders):
    made = {}

    def make(stage):
        if stage not in made:
            pair = ("pretrain", ("bridge",)) if stage == "pretrain" else ("sft_adapters", SFT)
            made[stage] = Setup(folders(pair[0]), pair[1])
        return made[stage]

    return make


def t2i(setup, arrays, cases, max_tokens=None):
    latents, noise = ([arrays[f"t2i/{kind}/{i}"] for i in range(2)] for kind in ("latent", "noise"))
    packed, text = setup.pack(latents), setup.text(cases["train"]["t2i"]["texts"], max_tokens=max_tokens)
    empty = jnp.zeros((2, 0, packed.patches.shape[-1]))
    none = jnp.zeros((2, 0), jnp.int32)
    tokens = jnp.zeros((2, 0, setup.config.text.hidden_size))
    micro = MicroBatch(*map(jnp.asarray, packed[:3]), empty, none, none.astype(bool), tokens, jnp.ones(2), text)
    return micro, Draws(jnp.asarray(arrays["t2i/sigma"]), jnp.asarray(setup.pack(noise).patches), None)


def i2i(setup, arrays, cases, pictures, goldens, check_golden):
    """Samples differ in size, so each is assembled separately and the two are stacked."""
    case = cases["train"]["i2i"]
    refs = [[pictures[name] for name in row] for row in case["refs"]]
    text = setup.text(case["texts"], [[image.size for image in row] for row in refs])
    micros = []
    for i, target in enumerate(case["targets"]):
        images = [jnp.asarray(np.asarray(image))[None] for image in refs[i]]
        features = encode(setup.model, setup.frozen, jnp.asarray(np.asarray(pictures[target]))[None], images)
        noise = [jnp.moveaxis(jnp.asarray(arrays[f"i2i/eps_ref/{i}/{j}"]), 0, -1)[None] for j in range(len(images))]
        target_noise = jnp.moveaxis(jnp.asarray(arrays[f"i2i/eps_target/{i}"]), 0, -1)[None]
        micros.append(assemble(setup.model, features, text, jnp.ones(1), target_noise, noise, TokenBudget(64, 160, 16)))
        latent = grids.unpatchify(
            micros[-1].latents[0, : np.prod(arrays[f"i2i/latent/{i}"].shape[1:]) // 4],
            *arrays[f"i2i/latent/{i}"].shape[1:],
            2,
            16,
        )
        check_golden("train", f"i2i/latent/{i}", latent)
    fields = MicroBatch._fields[: MicroBatch._fields.index("text")]
    micro = MicroBatch(*(jnp.concatenate([getattr(m, f) for m in micros]) for f in fields), text)
    noise = setup.pack([arrays[f"i2i/noise/{i}"] for i in range(2)]).patches
    noise = jnp.pad(jnp.asarray(noise), ((0, 0), (0, 64 - noise.shape[1]), (0, 0)))
    return micro, noise


def source_tensor(config, trainable, key):
    """The leaf that a release calls ``key``, in the release's layout."""
    rows = names.weights(config)
    adapter = re.fullmatch(r"(.*)\.lora_(?:embedding_)?([AB])\.default(?:\.weight)?", key)
    row = rows[adapter[1] + ".weight" if adapter else key]
    path = [*row.path[:-1], adapter[2].lower()] if adapter else row.path
    leaf = trainable["lora" if adapter else "params"]
    for name in path:
        leaf = leaf[name]
    leaf = np.asarray(leaf)[row.index]
    return leaf.T if adapter else transforms.to_source(row.transform, leaf, row.shape)


def check_gradients(setup, goldens, check_golden, case, loss, gradients):
    check_golden("train", f"{case}/loss", loss)
    groups = {name: optax_norm(tree) for name, tree in parts(gradients).items()}
    bridge = dict(gradients["params"]["bridge"])
    groups["meta_queries"] = optax_norm(bridge.pop("meta_queries"))
    groups["connector"] = optax_norm(bridge.pop("layers"))
    groups["projector"] = optax_norm(bridge)
    groups["transformer"] = groups.get("mmdit", 0.0)
    groups.setdefault("lora", 0.0)
    check_golden("train", f"{case}/grad_norm", optax_norm(gradients))
    for name in ("meta_queries", "projector", "connector", "transformer", "lora"):
        check_golden("train", f"{case}/grad_norm/{name}", groups[name])
    # The case that goes on to an optimiser step stores its single gradients as clipped to norm 1.
    scale = 1 / optax_norm(gradients) if case == "sft_t2i" else 1.0
    for key in goldens("train"):
        if key.startswith(f"{case}/grad/"):
            check_golden("train", key, scale * source_tensor(setup.config, gradients, key.split("/grad/")[1]))


def optax_norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(tree)))


def test_noise_level(setups, goldens):
    arrays = goldens("train")
    np.testing.assert_allclose(sigma_from_u(arrays["t2i/u"], setups("sft").scheduler), arrays["t2i/sigma"], atol=2e-5)


@pytest.mark.parametrize(("stage", "case"), [("pretrain", "pretrain_t2i"), ("sft", "sft_t2i")])
def test_text_to_image(stage, case, setups, cases, goldens, check_golden):
    setup = setups(stage)
    loss, gradients = setup.value_and_grad(*t2i(setup, goldens("train"), cases))
    check_gradients(setup, goldens, check_golden, case, loss, gradients)


def test_truncated_prompts(setups, cases, goldens, check_golden):
    setup = setups("sft")
    loss = jax.jit(setup.loss)(setup.trainable, *t2i(setup, goldens("train"), cases, max_tokens=8))
    check_golden("train", "sft_t2i_trunc8/loss", loss)


def test_editing(setups, cases, pictures, goldens, check_golden):
    setup, arrays = setups("sft"), goldens("train")
    micro, noise = i2i(setup, arrays, cases, pictures, goldens, check_golden)
    sigma = sigma_from_u(arrays["t2i/u"], setup.scheduler)
    loss, gradients = setup.value_and_grad(micro, Draws(sigma, noise, None))
    check_gradients(setup, goldens, check_golden, "sft_i2i", loss, gradients)


def test_adamw_step(setups, cases, goldens, tolerance):
    """Elements with a tiny gradient are ill-conditioned at step one: they are held to 2e-4, as ``GOLDENS.md`` says."""
    setup, arrays = setups("sft"), goldens("train")
    loss, gradients = setup.value_and_grad(*t2i(setup, arrays, cases))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup=0), steps=1)
    state = init_state(optimizer, setup.trainable["params"], setup.trainable["lora"], ema=False)
    new, norms = jax.jit(partial(apply_gradients, optimizer, None))(state, gradients, loss)
    assert norms["skipped"] == 0
    for key in arrays:
        if key.startswith("sft_t2i/adamw/"):
            name = key.split("/adamw/")[1]
            got = source_tensor(setup.config, new.trainable, name)
            gradient = np.abs(source_tensor(setup.config, gradients, name))
            error = np.abs(got - arrays[key])
            assert error.max() <= 2e-4, key
            assert error[gradient > 1e-4 * gradient.max()].max() <= tolerance("train", key), key


def test_join_undoes_split(setups):
    setup = setups("sft")
    joined = join(setup.frozen, setup.trainable["params"])
    assert set(joined["mmdit"]) == set(setup.frozen["mmdit"]) | set(setup.trainable["params"]["mmdit"])
    assert "pos_embed" in setup.frozen["mmdit"]


def test_moments_are_of_the_documented_shape(setups, pictures):
    setup = setups("pretrain")
    features = encode(setup.model, setup.frozen, jnp.asarray(np.asarray(pictures["s"]))[None], [])
    assert isinstance(features.target, Moments)
    assert features.target.mean.shape == (1, 8, 12, 16)
    assert features.image_tokens.shape == (1, 0, 32)


def test_step_accumulates_a_cycle_and_skips_what_is_not_finite(setups, cases, goldens):
    """Two equal micro-batches in a scan give the update of their mean; a NaN changes only the counters."""
    setup = setups("pretrain")
    micro, _ = t2i(setup, goldens("train"), cases)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), micro)
    keys = jax.random.split(jax.random.key(0), 4).reshape(2, 2)
    settings = StepSettings(setup.scheduler, ema_decay=0.9)
    optimizer = make_optimizer(OptimizerConfig(schedule="constant", warmup=0), steps=1)
    state = init_state(optimizer, setup.trainable["params"], None, ema=True)
    step = jax.jit(partial(train_step, setup.model, optimizer, settings))
    new, metrics = step(state, setup.frozen, {"t2i": stacked}, {"t2i": keys})

    def mean_loss(trainable):
        pairs = [(micro, draw(keys[i], micro, settings)) for i in range(2)]
        return sum(setup.loss(trainable, *pair) for pair in pairs) / len(pairs)

    loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(state.trainable)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/t2i"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax_norm(gradients), rtol=1e-5)
    assert metrics["loss_bin_counts"].sum() == 4
    np.testing.assert_allclose(metrics["loss_bin_sums"].sum() / 4, loss, rtol=1e-5)
    assert (int(new.step), int(new.skipped)) == (1, 0)
    old_queries, queries, average = (
        tree["params"]["bridge"]["meta_queries"] for tree in (state.trainable, new.trainable, new.ema)
    )
    assert np.any(old_queries != queries)
    np.testing.assert_allclose(average, 0.9 * old_queries + 0.1 * queries, rtol=1e-6, atol=1e-8)

    halves = [stacked._replace(weight=jnp.asarray([row, row], jnp.float32)) for row in ([1, 0], [0, 1])]
    shares = [step(state, setup.frozen, {"t2i": half}, {"t2i": keys})[1]["loss"] for half in halves]
    np.testing.assert_allclose(sum(shares) / 2, loss, rtol=1e-6)  # each half counts only its samples

    # The same at once; samples of unequal weight keep the share they have in their own micro-batch.
    weighted = stacked._replace(weight=jnp.asarray([[1, 3], [1, 1]], jnp.float32))
    at_once = jax.jit(partial(train_step, setup.model, optimizer, replace(settings, merge=4)))
    for batch in (stacked, weighted):
        apart, together = (one(state, setup.frozen, {"t2i": batch}, {"t2i": keys}) for one in (step, at_once))
        for name in ("loss", "loss/t2i", "grad_norm", "loss_bin_sums", "loss_bin_counts"):
            np.testing.assert_allclose(together[1][name], apart[1][name], rtol=1e-5, err_msg=name)
        first, second = (jax.tree.leaves(new.opt_state) for new, _ in (apart, together))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), first, second)

    broken = stacked._replace(latents=stacked.latents.at[0, 0, 0, 0].set(jnp.nan))
    after, metrics = step(new, setup.frozen, {"t2i": broken}, {"t2i": keys})
    assert (int(after.step), int(after.skipped), float(metrics["skipped"])) == (2, 1, 1.0)
    jax.tree.map(np.testing.assert_array_equal, after.trainable, new.trainable)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, new.opt_state)


def test_tasks_run_together_as_one_after_another(setups, cases, goldens):
    """Layers that run on both tasks before the next give the loss and the gradient of one task after the other."""
    setup = setups("sft")
    micro, _ = t2i(setup, goldens("train"), cases)
    edit = micro._replace(
        latents=micro.latents[::-1], references=micro.latents, reference_ids=micro.target_ids,
        reference_mask=micro.target_mask, weight=jnp.asarray([1.0, 3.0]),
    )  # fmt: skip
    batches = {"edit": jax.tree.map(lambda x: x[None], edit), "t2i": jax.tree.map(lambda x: jnp.stack([x, x]), micro)}
    keys = {"edit": jax.random.split(jax.random.key(0), (1, 2)), "t2i": jax.random.split(jax.random.key(1), (2, 2))}

    def gradients(merge):
        settings = StepSettings(setup.scheduler, setup.lora_scale, merge=merge)
        compute = jax.jit(partial(supervised_gradients, setup.model, settings))
        return compute(setup.trainable, setup.frozen, batches, keys)

    def tasks(merge, batches):
        return run_together({task: merged(x, keys[task], keys[task], merge) for task, x in batches.items()}, merge)

    assert (tasks(1, batches), tasks(2, batches)) == ([["edit"], ["t2i"]], [["edit", "t2i"]])
    (apart, metrics), (together, metrics_together) = gradients(1), gradients(2)
    for name, value in metrics.items():
        np.testing.assert_allclose(metrics_together[name], value, rtol=1e-5, err_msg=name)
    assert metrics["loss/edit"] != metrics["loss/t2i"]
    scale = optax_norm(apart)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x / scale, y / scale, rtol=2e-4, atol=1e-7), together, apart)

    # Targets of other sizes run apart.
    smaller = batches["t2i"]._replace(latents=batches["t2i"].latents[:, :, 1:])
    assert tasks(2, batches | {"t2i": smaller}) == [["edit"], ["t2i"]]
