"""8-bit model folders: what they hold, how they are written, and that they make the same pictures."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepgen_jax import DeepGenPipeline, settings
from deepgen_jax.cli.main import main
from deepgen_jax.config import QuantizationConfig
from deepgen_jax.convert import convert, lazy_params, quantize
from deepgen_jax.convert.stored_params import flatten
from deepgen_jax.errors import DeepGenError
from deepgen_jax.models import quantized
from deepgen_jax.models.deepgen import abstract_params
from deepgen_jax.parallel.mesh import make_mesh
from deepgen_jax.stores.model_folder import load_params, locate, read_manifest
from deepgen_jax.training.config_files import load_config
from deepgen_jax.training.weights import abstract_start, load_start

Flat = dict[str, np.ndarray]
Make = Callable[..., Path]
PROMPTS = ["a large red circle on a white background", "a small blue square left of a large green triangle"]


@pytest.fixture(scope="module")
def nano8(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``nano8("int8", products=True)`` -> the package's nano in 8 bits, made once."""

    @functools.cache
    def make(to: str, products: bool = False) -> Path:
        return quantize("nano", to, tmp_path_factory.mktemp("nano") / to, products=products).folder

    return make


@pytest.fixture(scope="module")
def images() -> Callable[[str | Path], np.ndarray]:
    """``images(folder)`` -> float32 [2, H, W, 3] in 0..1 of the same noise."""

    @functools.cache
    def draw(folder: str | Path) -> np.ndarray:
        made = DeepGenPipeline.from_pretrained(folder)(PROMPTS, num_inference_steps=8, seed=[1, 2], output_type="np")
        assert made.images is not None
        return np.asarray(made.images, np.float64) / 255

    return draw


@pytest.mark.parametrize(
    ("to", "products", "least"), [("int8", False, 50), ("int8", True, 48), ("fp8", False, 42), ("fp8", True, 38)]
)
def test_pictures_are_close(
    to: str, products: bool, least: float, nano8: Make, images: Callable[[str | Path], np.ndarray]
) -> None:
    wanted, found = images("nano"), images(nano8(to, products))
    error = np.mean((wanted - found) ** 2, axis=(1, 2, 3))
    assert (error > 0).all()
    assert (-10 * np.log10(error) >= least).all()


@pytest.mark.parametrize("to", ["int8", "fp8"])
@pytest.mark.parametrize("products", [False, True])
def test_a_folder_holds_8_bits_and_scales(to: str, products: bool, nano8: Make, read_flat: Callable[..., Flat]) -> None:
    folder = nano8(to, products)
    config = read_manifest(folder).config
    assert config.quantization == QuantizationConfig(to, products)
    found, source = read_flat(folder), read_flat(locate("nano"))
    computed = {path: leaf for path, leaf in found.items() if not path.startswith("unused/")}
    shapes = {"/".join(path): leaf for path, leaf in flatten(abstract_params(config)).items()}
    assert {path: leaf.shape for path, leaf in computed.items()} == {path: leaf.shape for path, leaf in shapes.items()}
    counts: dict[str, int] = {}
    for path, value in source.items():
        if path.startswith("unused/"):
            assert (path in found) == (not path.endswith(("kernel", "embedding")))
        elif quantized.treatment(path, products) == "kept":
            assert found[path].dtype == value.dtype
            assert found[path].tobytes() == value.tobytes()
        else:
            values, scale = quantized.quantize(path, value, to)
            kind = quantized.FORMATS[quantized.stored_format(path, to)].dtype
            assert found[path].dtype == kind
            counts[kind.name] = counts.get(kind.name, 0) + value.size
            assert found[path].tobytes() == values.tobytes(), path
            np.testing.assert_array_equal(found[quantized.scale_path(path, products)], scale)
            assert 2 * found[path].nbytes == value.nbytes
    halved = sum(counts.values())
    assert halved / sum(value.size for value in source.values()) > 0.8
    summaries = read_manifest(folder).parameters
    for name, count in counts.items():
        assert sum(part.dtypes.get(name, 0) for part in summaries.values()) == count
    assert sum(part.bytes for part in summaries.values()) == sum(value.nbytes for value in found.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_makes_no_wider_copy(dtype: str, nano8: Make) -> None:
    folder = nano8("int8", True)
    for params in (load_params(folder, dtype=dtype), DeepGenPipeline.from_pretrained(folder, dtype=dtype).params):
        stored = flatten(params)
        assert sum(leaf.dtype == jnp.int8 for leaf in stored.values()) > 20
        for path, leaf in stored.items():
            if quantized.treatment("/".join(path), products=True) != "kept":
                assert leaf.dtype == jnp.int8, path
            if path[-1].endswith("_scale"):
                assert leaf.dtype == jnp.float32, path


def test_rows_converted_one_by_one_are_the_same(
    nano8: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_flat: Callable[..., Flat],
    assert_same: Callable[[Flat, Flat], None],
) -> None:  # fmt: skip
    """Large tensors are read and written in blocks of rows, each with the scales of its channels."""
    monkeypatch.setattr(lazy_params, "BLOCK_BYTES", 2**12)
    quantize("nano", "int8", tmp_path / "m")
    assert_same(read_flat(tmp_path / "m"), read_flat(nano8("int8")))


def test_adapters_are_merged_first(
    folders: Callable[[str], Path], tmp_path: Path, read_flat: Callable[..., Flat],
    assert_same: Callable[[Flat, Flat], None],
) -> None:  # fmt: skip
    quantize(folders("sft_adapters"), "int8", tmp_path / "kept")
    quantize(folders("sft"), "int8", tmp_path / "merged")
    assert_same(read_flat(tmp_path / "kept"), read_flat(tmp_path / "merged"))
    manifest = read_manifest(tmp_path / "kept")
    assert manifest.config.lora is None
    assert manifest.provenance["merged_adapters"] > 0


def test_convert_quantises_as_it_goes(
    data_dir: Path, folders: Callable[[str], Path], tmp_path: Path, read_flat: Callable[..., Flat],
    assert_same: Callable[[Flat, Flat], None], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ["convert", "--diffusers", data_dir / "deepgen_diffusers", "--hparams", data_dir / "deepgen_config.json",
             "--quantize", "fp8", "--products", "--out", tmp_path / "direct"]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    assert "float8_e4m3fn" in capsys.readouterr().out
    quantize(folders("diffusers"), "fp8", tmp_path / "later", products=True)
    assert_same(read_flat(tmp_path / "direct"), read_flat(tmp_path / "later"))
    direct, later = read_manifest(tmp_path / "direct"), read_manifest(tmp_path / "later")
    assert direct.config == later.config
    options = direct.provenance["options"]
    assert (options["quantize"], options["products"]) == ("fp8", True)
    assert later.provenance["options"] == {"quantize": "fp8", "products": True}
    assert direct.checksums.keys() == {file for file in direct.files if file.startswith("params/")}


def test_the_command_and_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m"
    assert main(["quantize", "nano", "--to", "int8", "--products", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {out}: weights of 8.2 MB instead of 14.4 MB")
    assert main(["info", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "int8 weights, products in 8 bits" in shown
    assert main(["info", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["config"]["quantization"] == {"weights": "int8", "products": True}
    assert (out / "known_words.txt").read_bytes() == (locate("nano") / "known_words.txt").read_bytes()


def test_the_arrays_are_checked(nano8: Make, tmp_path: Path) -> None:
    shutil.copytree(nano8("int8"), tmp_path / "m")
    largest = max((tmp_path / "m/params").rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(DeepGenError, match="copy the model folder again"):
        load_params(tmp_path / "m")


def test_an_error_while_writing_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, calls = quantized.quantize, iter(range(5))

    def fail(path: str, value: np.ndarray, to: quantized.Format) -> tuple[np.ndarray, np.ndarray]:
        if next(calls, None) is None:
            raise MemoryError("too much")
        return real(path, value, to)

    monkeypatch.setattr(quantized, "quantize", fail)
    (tmp_path / "place").mkdir()
    with pytest.raises(MemoryError, match="too much"):
        quantize("nano", "int8", tmp_path / "place" / "m")
    assert list((tmp_path / "place").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantize", "/nowhere", "--to", "int8", "--out", "{out}"], "/nowhere is not a folder"),
        (["quantize", "{int8}", "--to", "fp8", "--out", "{out}"], "{int8} has int8 weights, which can be neither"),
        (["quantize", "nano", "--to", "int8", "--out", "{int8}"], "{int8} exists; choose another --out"),
        (["quantize", "nano", "--to", "int4", "--out", "{out}"], "invalid choice 'int4' for argument '--to'"),
        (["export", "{int8}", "--format", "diffusers", "--out", "{out}"], "{int8} has int8 weights, which can be"),
        (["export", "{int8}", "--format", "pth", "--out", "{out}"], "{int8} has int8 weights, which can be neither"),
        (
            ["convert", "--diffusers", "{release}", "--products", "--out", "{out}"],
            "--products is for --quantize; leave it out",
        ),
        (
            ["convert", "--diffusers", "{release}", "--quantize", "int8", "--keep-lora", "--out", "{out}"],
            "8-bit weights have adapters merged; leave out --keep-lora or --quantize",
        ),
    ],
)
def test_errors_are_one_line(
    words: list[str], message: str, nano8: Make, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"out": tmp_path / "m", "int8": nano8("int8"), "release": data_dir / "deepgen_diffusers"}
    assert main([word.format(**names) for word in words]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"deepgen: error: {message.format(**names)}")
    assert shown.err.count("\n") == 1
    assert not (tmp_path / "m").exists()


def test_training_is_refused(nano8: Make) -> None:
    folder = nano8("int8")
    run = settings.apply(load_config("tiny_pretrain"), [f"model={folder}"])
    with pytest.raises(DeepGenError, match=f"{folder} has int8 weights, which cannot be trained; name the model"):
        load_start(run, make_mesh(None))
    with pytest.raises(DeepGenError, match="which cannot be trained"):
        abstract_start(run, read_manifest(folder).config, make_mesh(None))


def test_not_finite_weights_are_refused(release: Path, tmp_path: Path, edit_safetensors: Callable[..., None]) -> None:
    def damage(tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
        name = next(name for name in tensors if name.endswith("attn.to_q.weight"))
        dtype, shape, values = tensors[name]
        nan = {"F32": np.float32(np.nan).tobytes(), "BF16": b"\xc0\x7f", "F16": b"\x00\x7e"}[dtype]
        tensors[name] = (dtype, shape, nan + values[len(nan) :])

    edit_safetensors(next((release / "transformer").glob("*.safetensors")), damage)
    with pytest.raises(DeepGenError, match="NaN or infinite weights in"):
        convert(out=tmp_path / "m", diffusers=release, quantize="int8")
    assert not (tmp_path / "m").exists()


def test_a_mesh_splits_8_bit_kernels(nano8: Make) -> None:
    from deepgen_jax.parallel import rules
    from deepgen_jax.stores.model_folder import stored_tree

    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))
    tree = {"mmdit": stored_tree(nano8("int8"))["mmdit"]}
    params = load_params(nano8("int8"), ("mmdit",), jnp.bfloat16, rules.shardings(tree, mesh))
    jax.tree.map(lambda leaf, sharding: np.testing.assert_equal(leaf.sharding, sharding), params,
                 rules.shardings(tree, mesh))  # fmt: skip
