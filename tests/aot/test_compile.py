"""The compile report, on programs of a tiny model and eight simulated devices."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from support import runs

from deepgen_jax import settings
from deepgen_jax.aot import compile as compiling
from deepgen_jax.aot import search
from deepgen_jax.aot.estimate import Estimate
from deepgen_jax.aot.program_report import Report, shard_bytes
from deepgen_jax.aot.topology import parse_topology
from deepgen_jax.cli.main import main
from deepgen_jax.config import QuantizationConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.abstract import sequence_length
from deepgen_jax.models import flops
from deepgen_jax.parallel.chips import GIB
from deepgen_jax.training import config_files

PROGRAM = """
import json, sys
import jax
from deepgen_jax.aot import compile as compiling
from deepgen_jax.aot.program_report import Report
from deepgen_jax.aot.estimate import Estimate
from deepgen_jax.aot.topology import parse_topology
from deepgen_jax import settings
from deepgen_jax.training import config_files

found = {}
for line in json.loads(sys.argv[1]):
    config = settings.apply(config_files.load_config(line["config"]), [f"model={sys.argv[2]}", *line["words"]])
    shape = (line["mesh"], line["program"], line["batch"])
    request = compiling.Request(config, parse_topology("h100:8"), *shape)
    found[line["name"]] = compiling.Job(request, jax.devices()).compile({}).to_json()
print(json.dumps(found))
"""
SIZES = ["data.micro_batch=8", "accumulation=1", "remat=full", "trains=mmdit"]
STEP = {"name": "step", "config": "tiny_sft", "words": SIZES, "program": "step"}
OTHERS = [
    {"name": "more", "config": "tiny_sft", "words": ["data.micro_batch=16", *SIZES[1:]], "program": "step"},
    {"name": "encoders", "config": "tiny_sft", "words": SIZES, "program": "encoders"},
    {"name": "inference", "config": "tiny_sft", "words": SIZES, "program": "inference", "batch": 16},
    {"name": "prompts", "config": "tiny_sft", "words": SIZES, "program": "prompts", "batch": 16},
    {"name": "decoder", "config": "tiny_sft", "words": SIZES, "program": "decoder", "batch": 16},
    {"name": "rollout", "config": "tiny_grpo", "words": ["rollout.micro_batch=8"], "program": "rollout"},
    {"name": "update", "config": "tiny_grpo", "words": ["data.micro_batch=8"], "program": "update"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return runs.write_model(tmp_path_factory.mktemp("model"))


def compiled(cases, model):
    lines = [{"mesh": "data=2,fsdp=4", "batch": None, **case} for case in cases]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(lines), str(model)],
        check=True, timeout=900, capture_output=True, text=True, env=runs.environment(8),
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def step(model):
    return compiled([STEP], model)["step"]


@pytest.fixture(scope="module")
def reports(model, step):
    return compiled(OTHERS, model) | {"step": step}


def assert_sound(report):
    assert report["fits"]
    kinds = [size for kind, size in report["memory"].items() if kind not in ("total", "limit")]
    assert report["memory"]["total"] == sum(kinds)
    # The model's operations, and recomputation.
    assert report["estimate"]["operations"] * 8 > 0.9 * report["model_flops"]
    assert 0 < report["mfu"] <= report["mfu_bound"] < 1


def test_report_of_a_step(step):
    assert_sound(step)
    assert step["estimate"]["collectives"]["all-gather"]["count"] > 0
    memory = step["memory"]
    assert set(memory) == {
        "trainable weights", "frozen weights", "optimiser", "batch", "gradients", "activations and work space",
        "total", "limit",
    }  # fmt: skip
    # Two moments and some counters for each float32 weight.
    assert memory["optimiser"] == pytest.approx(2 * memory["trainable weights"], abs=64)
    assert memory["gradients"] == memory["trainable weights"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [case["name"] for case in OTHERS])
def test_report_of_every_program(name, reports):
    assert_sound(reports[name])


@pytest.mark.slow
def test_memory_by_kind(reports):
    assert "optimiser" not in reports["inference"]["memory"]
    # What the others of a run use stays on the devices.
    for kind in ("trainable weights", "frozen weights", "optimiser"):
        assert reports["rollout"]["memory"][kind] == reports["update"]["memory"][kind]
        assert reports["encoders"]["memory"][kind] == reports["more"]["memory"][kind]


@pytest.mark.slow
def test_gathered_layers_are_not_communicated(model):
    words = ["data.micro_batch=8", "accumulation=3", "remat=full", "trains=mmdit"]
    settings = {"split": words, "whole": [*words, "gather_frozen=true"]}
    reports = compiled([{**STEP, "name": name, "words": words} for name, words in settings.items()], model)
    gathered = {name: report["estimate"]["collectives"]["all-gather"] for name, report in reports.items()}
    assert gathered["whole"]["bytes"] < gathered["split"]["bytes"]
    frozen = {name: report["memory"]["frozen weights"] for name, report in reports.items()}
    assert frozen["whole"] > frozen["split"]


@pytest.mark.slow
def test_twice_the_batch_is_twice_the_arithmetic_and_the_same_weights(reports):
    one, two = reports["step"], reports["more"]
    assert two["batch"]["size"] == 2 * one["batch"]["size"]
    assert two["model_flops"] == 2 * one["model_flops"]
    assert two["estimate"]["operations"] == pytest.approx(2 * one["estimate"]["operations"], rel=0.05)
    assert two["memory"]["trainable weights"] == one["memory"]["trainable weights"]
    assert two["memory"]["activations and work space"] > one["memory"]["activations and work space"]


def test_a_step_is_lowered_for_the_batches_of_a_run(tmp_path, model):
    from deepgen_jax.parallel.mesh import make_mesh
    from deepgen_jax.training.abstract_run import abstract_micro_batches
    from deepgen_jax.training.step_batches import token_budget
    from deepgen_jax.training.supervised_stage import SupervisedStage

    runs.write_data(tmp_path)
    path = runs.write_config(tmp_path, model, trains=("bridge",))
    config = config_files.load_config(str(path))
    mesh = make_mesh(None)
    stage = SupervisedStage(config, mesh)
    batch = next(stage._batches)
    stage.close()
    network = stage._program.model
    for task, real in batch.micro_batches.items():
        count, size, tokens = real.target_ids.shape
        budget = token_budget(network.config, tokens, real.reference_ids.shape[2])
        found = abstract_micro_batches(network, mesh, count, size, real.text.real.shape[-1], budget)
        expected = (real, batch.keys[task])
        assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)


class _EnoughSeen(Exception):
    pass


def test_rollout_and_update_are_lowered_for_what_a_run_passes(tmp_path, model, monkeypatch):
    from deepgen_jax.parallel.mesh import make_mesh
    from deepgen_jax.rl import experience
    from deepgen_jax.rl.grpo import GRPOStage
    from deepgen_jax.training.abstract_run import AbstractRun

    runs.write_data(tmp_path)
    path = runs.write_grpo_config(tmp_path, model, {"jpeg": 1.0}, 'RewardConfig("jpeg")')
    config, mesh = config_files.load_config(str(path)), make_mesh(None)
    stage = GRPOStage(config, mesh)
    passed = {}

    def shapes(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(lambda tree: tree, tree))

    def rollout(network, settings, variables, noise, condition, sigmas, eta, keys, scale, run=experience.rollout):
        passed["rollout"] = shapes((variables, noise, condition, sigmas, keys))
        passed["length"] = condition.sequence.shape[1]
        return run(network, settings, variables, noise, condition, sigmas, eta, keys, scale)

    def update(*arguments):
        passed["update"] = shapes(arguments)
        raise _EnoughSeen

    monkeypatch.setattr(experience, "rollout", rollout)
    stage._programs = stage._programs._replace(update=update)
    with pytest.raises(_EnoughSeen):
        stage.step()
    stage.close()
    sizes = stage._weights.config
    prompt_tokens = passed["length"] - sizes.bridge.num_queries
    run = AbstractRun(config, sizes, mesh, prompt_tokens)
    lowered = {name: GRPOStage.abstract_programs[name].make(run).arguments for name in ("rollout", "update")}
    assert shapes(lowered["rollout"]) == passed["rollout"]
    *before, auxiliary, keys, part = shapes(lowered["update"])
    *before_of_run, auxiliary_of_run, keys_of_run, part_of_run = passed["update"]
    assert (before, keys, part) == (before_of_run, keys_of_run, part_of_run)
    # Texts of the auxiliary batch are as long as its captions; all else is checked above for stage 2.
    assert {task: x._replace(text=None) for task, x in auxiliary.items()} == {
        task: x._replace(text=None) for task, x in auxiliary_of_run.items()
    }


def test_the_largest_that_fits_is_found_with_few_tries():
    for most in (0, 1, 2, 5, 8, 23, 256):
        tried = []
        assert compiling.bisect(lambda n, most=most, tried=tried: tried.append(n) or n <= most) == most
        assert len(tried) == len(set(tried)) <= 17


@pytest.mark.parametrize(
    ("config", "program", "mesh", "unit"),
    [
        ("sft", "", "", 3 * 8),
        ("sft", "inference", "fsdp=2,tensor=4", 2),
        ("grpo", "rollout", "", 8),
        ("grpo", "", "", 4 * 8),
    ],
)
def test_the_largest_batch_goes_up_by_a_sample_a_device(config, program, mesh, unit):
    """GRPO's published update takes 4 micro-batches; whole groups of 8 images."""
    topology, said = parse_topology("h100:8"), []

    def run(request):
        needed, batch = 10 * GIB * request.batch // unit, request.batch
        return Report("", program, "samples", batch, 8, (), topology, {}, {}, needed, 1.0, None, 1.0, advice=["x"])

    request = compiling.Request(config_files.load_config(config), topology, mesh, program)
    assert compiling.largest(request, run, said.append).batch == 7 * unit
    assert any("80.0 GiB, does not fit" in line for line in said)
    with pytest.raises(DeepGenError, match="not even one sample a device fits"):
        compiling.largest(request, lambda request: dataclasses.replace(run(request), needed=100 * GIB), said.append)


def test_search_splits_weights_over_neighbours_and_hosts():
    assert list(search.meshes(parse_topology("v6e:8x8"))) == [
        "data=8,fsdp=8", "data=4,fsdp=16", "data=1,fsdp=64", "data=8,fsdp=2,tensor=4"
    ]  # fmt: skip
    assert next(search.meshes(parse_topology("v6e:16x16", 2))) == "data=64,fsdp=8"
    assert next(search.meshes(parse_topology("h100:8"))) == "data=1,fsdp=8"
    config = settings.apply(config_files.load_config("sft"), ["data.micro_batch=512"])
    assert compiling.Request(config, parse_topology("v6e:16x16", 2)).mesh_text == "data=32,fsdp=16"
    assert compiling.Request(config, parse_topology("h100:64")).mesh_text == "data=8,fsdp=8"


def test_search_ranks_what_fits_by_time_with_the_command_of_each(step):
    """Whole meshes need more; "dots" is faster and too large on the first."""
    topology = parse_topology("h100:8")
    config = config_files.load_config("tiny_sft")
    said = []

    def run(request):
        assert request.config.remat != "flash"  # the same as "full" on GPUs
        sizes = {"full": (3.0, 1), "mlp": (2.7, 1.5), "dots": (2.0, 2), "none": (1.0, 100)}
        seconds, needed = sizes[request.config.remat]
        if "tensor" in request.mesh:
            raise DeepGenError("no such mesh")
        if request.config.gather_frozen is True:
            assert request.config.remat == "dots"  # the best of the others
            seconds += 0.5
        return Report(
            request.command, "step", "samples", 8, 8, (), topology, {"fsdp": 8}, {}, needed * GIB, 1e12,
            Estimate(seconds=seconds, arithmetic_seconds=seconds), 1.0, trains=True,
        )  # fmt: skip

    request = compiling.Request(config, topology, command="deepgen compile tiny_sft --topology h100:8 --search")
    reports = search.search(request, run, said.append)
    assert [report.choice for report in reports] == [
        f"data=1,fsdp=8 remat={remat}" for remat in ("dots", "dots gather_frozen=true", "mlp", "full", "none")
    ]
    assert reports[0].command == "deepgen compile tiny_sft remat=dots --topology h100:8 --mesh data=1,fsdp=8"
    assert " remat=dots gather_frozen=true --topology" in reports[1].command
    assert len(said) == 6
    assert "data=1,fsdp=2,tensor=4: no such mesh" in said
    assert search.ranking(reports).splitlines()[5].split()[-3:] == ["no", "1.000", "0.000"]


def test_a_program_that_does_not_fit_comes_with_advice(model):
    words = [f"model={model}", *SIZES[:2], "remat=dots", "gather_frozen=true"]
    config = settings.apply(config_files.load_config("tiny_sft"), words)
    request = compiling.Request(config, parse_topology("h100:1"))
    report = compiling.Job(request, jax.devices()).report(None, 100 * GIB)
    assert not report.fits
    assert "DOES NOT FIT" in report.table()
    assert report.advice[1].startswith("remat=full")
    assert report.advice[2].startswith("gather_frozen=false")
    assert report.advice[3].startswith("accumulation=2 data.micro_batch=4, the same batch: 4 instead of 8")


FEW = ["samples.num_inference_steps=4", "samples.guidance_scale=1", "samples.sampler=pi_flow", "samples.size=64"]


def test_generation_follows_the_sampling_of_the_configuration(model):
    """Guidance doubles the sequences, and each program has the operations of its part."""
    sizes, _ = compiling.model_sizes(settings.apply(config_files.load_config("tiny_sft"), [f"model={model}"]))
    guided = ["samples.num_inference_steps=4", "samples.guidance_scale=3", "samples.size=64"]
    for words, few in ((FEW, True), (guided, False)):
        length = sequence_length(sizes, compiling.PROMPT_TOKENS)
        count = flops.text_to_image(sizes, 64, 64, 4, length, guided=not few)
        for name, expected in (
            ("inference", count.sampler), ("prompts", count.condition), ("decoder", count.decoder)
        ):  # fmt: skip
            program = abstract(model, words, program=name, batch=3)
            assert program.flops == 3 * expected
    summary = abstract(model, FEW, program="inference").summary
    assert any("4 steps of pi_flow" in line for line in summary)


def test_generation_with_8_bit_weights_takes_half_the_memory(model):
    def held(**settings):
        program = abstract(model, FEW, program="inference", **settings)
        assert "mmdit" in program.memory["frozen weights"]
        return program, shard_bytes(program.memory["frozen weights"]["mmdit"])

    whole, before = held()
    weights, after = held(quantization=QuantizationConfig("int8"))
    products, same = held(quantization=QuantizationConfig("fp8", products=True))
    assert "int8 weights" in weights.summary[-1]
    assert "fp8 weights and products" in products.summary[-1]
    assert "int8" not in whole.summary[-1]
    # tiny_sft computes in float32: a quarter, and what stays, most of it the table of positions.
    assert 0.25 < after / before < 0.6
    assert same == after
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(products.arguments[0])}
    assert jnp.dtype(jnp.float8_e4m3fn) in dtypes


def abstract(model, words, **settings_of_request):
    """The program of a request for one device of this machine."""
    config = settings.apply(config_files.load_config("tiny_sft"), [f"model={model}", *words])
    request = compiling.Request(config, parse_topology("v6e:1x1"), "data=1", **settings_of_request)
    return compiling.Job(request, jax.devices()[:1])._program


def test_8_bits_are_for_generation(model):
    config = settings.apply(config_files.load_config("tiny_sft"), [f"model={model}"])
    for option, values in (("--quantize", {"quantization": QuantizationConfig()}), ("--stacked", {"stacked": True})):
        request = compiling.Request(config, parse_topology("v6e:1x1"), "data=1", "step", **values)
        with pytest.raises(DeepGenError, match=f"{option} is for inference; add --program and one of inference"):
            compiling.Job(request, jax.devices()[:1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sft"], "--topology missing"),
        (["sft", "--topology", "v6e:1x1", "--products"], "add --quantize int8 or fp8"),
        (["sft", "--topology", "v9:8x8"], "'v9' is unknown; choose one of v5e"),
        (["sft", "--topology", "v6e:8"], "2 dimensions, as in v6e:4x4"),
        (["sft", "--topology", "v5p:4x4"], "3 dimensions"),
        (["sft", "--topology", "h100:12"], "multiple of 8"),
        (["sft", "--topology", "h100:8", "--slices", "2"], "name all GPUs at once, as in h100:16"),
        (["sft", "--topology", "v6e:8x8", "--slices", "0"], "it must be at least 1"),
        (["sft", "--topology", "v6e:8x8", "--largest-batch", "--search"], "leave --batch and --search out"),
        (["sft", "--topology", "v6e:8x8", "--json", "nowhere/x.json"], "there is no folder nowhere"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert main(["compile", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(("topology", "extra"), [("v6e:8x8", "[tpu]"), ("h100:8", "[cuda]")])
def test_a_missing_compiler_is_reported_with_what_to_install(topology, extra, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert main(["compile", "sft", "--topology", topology]) == 2
    assert f"run pip install 'deepgen-jax{extra}'" in capsys.readouterr().err


def test_a_program_with_less_arithmetic_than_its_model_is_refused(model):
    """For example if the parser does not know the syntax of its loops or products."""
    config = settings.apply(config_files.load_config("tiny_sft"), [f"model={model}", *SIZES])
    job = compiling.Job(compiling.Request(config, parse_topology("h100:1")), jax.devices())
    text = "ENTRY %main (x: f32[8,8]) -> f32[8,8] {\n  %x = f32[8,8] parameter(0)\n  ROOT %y = f32[8,8] negate(%x)\n}\n"
    with pytest.raises(DeepGenError, match=r"shows 0 TFLOP a device, but the model alone has .* jax \d"):
        job.report(text, GIB)
    with pytest.raises(DeepGenError, match=r"cannot be parsed .*no ENTRY"):
        job.report("HloModule empty", GIB)


def test_batches_that_do_not_divide_are_refused(model):
    config = settings.apply(config_files.load_config("tiny_sft"), [f"model={model}"])
    request = compiling.Request(config, parse_topology("h100:1"), "data=1", batch=7)
    with pytest.raises(DeepGenError, match="does not divide into accumulation=4"):
        compiling.Job(request, jax.devices())
    with pytest.raises(DeepGenError, match="choose one of step, encoders, inference"):
        compiling.Job(dataclasses.replace(request, batch=8, program="rollout"), jax.devices())


def test_memory_needed_is_read_from_the_compilers_error():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.25G of 31.24G hbm. Exceeded by 9.01G."
    assert compiling.needed_bytes(message, 2**30) == 40.25 * 2**30
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (75.75G) exceeds available HBM (31.24G). HLO module: jit_step."
    )
    assert compiling.needed_bytes(message, 2**30) == 76.75 * 2**30
    with pytest.raises(DeepGenError, match="the compiler failed: INTERNAL: no"):
        compiling.needed_bytes("INTERNAL: no", 0)


@pytest.mark.libtpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_tpu_slice_is_compiled_for(model, tmp_path, step):
    """The TPU's compiler and the CPU's write the same products in different ways; both are counted alike."""
    out = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "deepgen_jax.cli.main", "compile", "tiny_sft", f"model={model}", *SIZES,
         "--topology", "v6e:2x4", "--mesh", "data=2,fsdp=4", "--json", str(out)],
        check=True, timeout=600, capture_output=True, text=True,
    )  # fmt: skip
    assert ": fits" in done.stdout
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["estimate"]["collectives"]["reduce-scatter"]["count"] > 0
    assert report["estimate"]["operations"] == pytest.approx(step["estimate"]["operations"], rel=0.01)
    assert report["estimate"]["operations"] * 8 >= report["model_flops"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs jax[cuda12]")
def test_a_gpu_host_is_compiled_for(model):
    done = subprocess.run(
        [sys.executable, "-m", "deepgen_jax.cli.main", "compile", "tiny_sft", f"model={model}", *SIZES,
         "dtype=bfloat16", "--topology", "h100:8", "--mesh", "data=2,fsdp=4"],
        check=True, timeout=1800, capture_output=True, text=True,
    )  # fmt: skip
    assert ": fits" in done.stdout
    assert "nvlink" in done.stdout


LAYERS_PROGRAM = """
import dataclasses, json, sys
from deepgen_jax.aot.topology import describe, parse_topology, prepare

topology = parse_topology("h100:1")
prepare(topology)
import jax
from deepgen_jax.aot.estimate import estimate
from deepgen_jax.aot.program_report import shard_bytes
from deepgen_jax.config import DeepGenConfig
from deepgen_jax.inference.abstract import AbstractImages
from deepgen_jax.parallel.mesh import make_mesh

sizes = DeepGenConfig()
mmdit = dataclasses.replace(sizes.mmdit, num_layers=6, dual_attention_layers=(0, 1, 2))
devices = describe(topology)
found = {}
for stacked in (True, False):
    images = AbstractImages(
        dataclasses.replace(sizes, mmdit=mmdit), make_mesh("data=1", devices), "bfloat16", 1, 512, 4, 100,
        sampler="pi_flow", guided=False, stacked=stacked,
    )
    program = images.denoising()
    compiled = program.lower().compile(compiler_options=topology.compiler_options(False))
    result = estimate(compiled.as_text(), topology, devices)
    layers = {name: tree for name, tree in program.arguments[0]["mmdit"].items() if name in ("blocks_0", "blocks_1")}
    found[str(stacked)] = {**dataclasses.asdict(result), "layers": shard_bytes(layers)}
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs jax[cuda12]")
def test_a_gpu_does_not_copy_the_weights_of_split_layers():
    """The released MMDiT with 6 layers: out of a stack, weights are read and written once more in each of 4 steps."""
    done = subprocess.run(
        [sys.executable, "-c", LAYERS_PROGRAM], check=True, timeout=1800, capture_output=True, text=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    stacked, split = found["True"], found["False"]
    assert split["layers"] == stacked["layers"]
    assert split["operations"] == stacked["operations"]
    weights = 4 * 2 * split["layers"]
    assert stacked["moved"] > 0.9 * weights
    assert split["moved"] < 0.1 * weights
    assert stacked["memory"] - split["memory"] > 0.9 * weights
    assert split["seconds"] < 0.75 * stacked["seconds"]
