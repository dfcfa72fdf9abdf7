"""``deepgen generate`` and ``deepgen edit`` around a stand-in for the pipeline."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.fake_pipeline import FakePipeline, check_prompt

from deepgen_jax.cli import image_run, sampling
from deepgen_jax.cli.main import main
from deepgen_jax.config import DeepGenConfig, MMDiTConfig
from deepgen_jax.inference.batch import EDIT_NEGATIVE_PROMPT
from deepgen_jax.inference.outputs import read_metadata
from deepgen_jax.stores import model_folder

TESTS = Path(__file__).parents[1]
CONFIG = DeepGenConfig(mmdit=MMDiTConfig(sample_size=8))  # images of 64 pixels by default


@pytest.fixture
def pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    """The pipeline that the command line loads; the working folder is empty."""
    fake = FakePipeline()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sampling, "open_model", lambda folder: (CONFIG, check_prompt))
    monkeypatch.setattr(image_run, "load_pipeline", lambda *args: fake)
    return fake


def run(*words: str) -> int:
    return main([*words[:1], "model", *words[1:], "--dtype", "float32"])


def error(capsys: pytest.CaptureFixture) -> str:
    text = capsys.readouterr().err
    assert text.startswith("deepgen: error: ")
    assert text.count("\n") == 1
    return text.removeprefix("deepgen: error: ").rstrip("\n")


def files(folder: Path | str = ".") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_one_image(pipe: FakePipeline, capsys: pytest.CaptureFixture):
    assert run("generate", "a cat") == 0
    assert capsys.readouterr() == ("image.png\n", "")
    assert Image.open("image.png").size == (64, 64)
    (call,) = pipe.calls
    assert call == {
        "prompt": ["a cat"], "image": None, "negative_prompt": [""], "height": 64, "width": 64, "seed": [0],
        "steps": 50, "guidance": 4.0, "padding": "reference", "posterior": "mean",
        "sampler": "euler",
    }  # fmt: skip


def test_every_option_arrives(pipe: FakePipeline, capsys: pytest.CaptureFixture):
    numbers = {"num-images": 3, "seed": 7, "size": "96x32", "steps": 5, "guidance": 1.5, "batch-size": 2}
    words = [f"--{name}={value}" for name, value in numbers.items()]
    words += ["--out", "sub/cat.jpg", "--negative-prompt", "ugly", "--padding", "masked", "--sampler", "DPM++ 2M"]
    assert run("generate", "a cat", *words) == 0
    assert capsys.readouterr().out.split() == ["sub/cat_0.jpg", "sub/cat_1.jpg", "sub/cat_2.jpg"]
    assert [call["seed"] for call in pipe.calls] == [[7, 8], [9, 9]]
    assert (pipe.calls[0]["width"], pipe.calls[0]["height"], pipe.calls[0]["steps"]) == (96, 32, 5)
    assert (pipe.calls[0]["guidance"], pipe.calls[0]["padding"]) == (1.5, "masked")
    assert pipe.calls[0]["sampler"] == "dpmpp_2m"
    assert pipe.calls[0]["negative_prompt"] == ["ugly"] * 2
    assert files("sub") == ["cat_0.jpg", "cat_1.jpg", "cat_2.jpg"]


@pytest.fixture
def opened(pipe: FakePipeline, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The model folders that commands open; the package's nano is in "weights"."""
    folders: list[Path] = []
    monkeypatch.setattr(model_folder, "PACKAGED", Path("weights"))
    monkeypatch.setattr(sampling, "open_model", lambda folder: folders.append(folder) or (CONFIG, check_prompt))
    monkeypatch.setattr(image_run, "load_pipeline", lambda folder, *args: folders.append(folder) or pipe)
    Path("weights/nano").mkdir(parents=True)
    Path("model").mkdir()
    Path("p.txt").write_text("a cat\n")
    Image.new("RGB", (64, 64), "red").save("a.png")
    return folders


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["generate", "a cat"], "weights/nano"),
        (["generate", "cat"], "weights/nano"),
        (["generate", "nano", "a cat"], "weights/nano"),
        (["generate", "model", "a cat"], "model"),
        (["generate", "nowhere", "a cat"], "nowhere"),
        (["generate", "--prompts", "p.txt", "--out", "out"], "weights/nano"),
        (["generate", "model", "--prompts", "p.txt", "--out", "out"], "model"),
        (["edit", "a cat", "--image", "a.png"], "weights/nano"),
        (["edit", "--image", "a.png", "model", "a cat"], "model"),
        (["edit", "--prompts", "p.txt", "--out", "out", "--image", "a.png"], "weights/nano"),
    ],
)
def test_the_model_may_be_left_out(opened: list[Path], pipe: FakePipeline, words: list[str], folder: str):
    assert main([*words, "--dtype", "float32"]) == 0
    assert opened == [Path(folder)] * 2
    assert pipe.calls[0]["prompt"] == ["cat" if words[1] == "cat" else "a cat"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate"], "there is no prompt; write it after the command"),
        (["generate", "model"], "there is no prompt; write it after the model folder"),
        (["generate", "nano"], "there is no prompt; write it after the model folder"),
        (["generate", ""], "the prompt is empty"),
        (["edit", "model", "--image", "a.png"], "there is no prompt; write it after the model folder"),
        (["edit", "make it blue"], "there is no image to edit"),
    ],
)
def test_words_that_are_missing(opened: list[Path], capsys: pytest.CaptureFixture, words: list[str], message: str):
    before = files()
    assert main(words) == 2
    assert error(capsys).startswith(message)
    assert files() == before


def test_a_drawn_seed_is_told(pipe: FakePipeline, capsys: pytest.CaptureFixture):
    seeds = []
    for _ in range(2):
        assert run("generate", "a cat", "--seed", "-1", "--overwrite") == 0
        (seed,) = pipe.calls[-1]["seed"]
        assert f"deepgen: note: the seed is {seed}\n" in capsys.readouterr().err
        told = read_metadata(Path("image.png"))
        assert told is not None
        assert told["seed"] == seed
        seeds.append(seed)
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["red", "circle"], "there is no model folder 'red'; put a prompt of several words in quotes, \"red circle\""),
        (["a", "red", "circle"], "Unrecognized options: circle; put a text of several words in quotes"),
        (["-red circle"], "Unrecognized options: -red circle; put a text that begins with - last, after --"),
        (["--", "-red circle", "--seed", "3"], "Unrecognized options: 3; put options before --"),
        (["a cat", "--steps", "x"], "--steps cannot be 'x'"),
        (["a cat", "--guidance", "much"], "--guidance cannot be 'much'"),
    ],
)
def test_words_that_are_not_understood(capsys: pytest.CaptureFixture, words: list[str], message: str):
    assert main(["generate", *words]) == 2
    assert error(capsys).startswith(message)


def test_a_prompt_that_begins_with_a_dash(opened: list[Path], pipe: FakePipeline):
    assert main(["generate", "--seed", "3", "--", "-red circle"]) == 0
    assert (pipe.calls[0]["prompt"], pipe.calls[0]["seed"]) == (["-red circle"], [3])


def test_sizes(pipe: FakePipeline, capsys: pytest.CaptureFixture):
    for words, size in ((["--size", "96"], (96, 96)), (["--width", "32", "--height", "96"], (32, 96))):
        assert run("generate", "a cat", "--overwrite", *words) == 0
        assert (pipe.calls[-1]["width"], pipe.calls[-1]["height"]) == size
    assert not capsys.readouterr().err
    assert run("generate", "a cat", "--overwrite", "--size", "100x50") == 0
    assert (pipe.calls[-1]["width"], pipe.calls[-1]["height"]) == (96, 64)
    assert "deepgen: note: image size 100x50 is rounded to 96x64" in capsys.readouterr().err
    assert run("generate", "a cat", "--overwrite", "--size", "100x50", "--strict-size") == 2
    assert "nearest is 96x64" in error(capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([""], "the prompt is empty; write what to show"),
        (["  \n"], "the prompt is empty"),
        (["word " * 10_000], "the prompt is 10000 tokens long, the model reads 30; shorten it"),
        (["a cat", "--negative-prompt", "word " * 31], "negative prompt: the prompt is 31 tokens long"),
        (["caf\udce9"], "the prompt is not UTF-8 text"),
        (["a cat", "--seed", "-2"], "--seed is -2; use -1 to 4294967295"),
        (["a cat", "--seed", str(2**32)], "--seed is 4294967296; use -1 to 4294967295"),
        (["a cat", "--seed", "-1", "--coordinator", "auto"], "--seed -1 would draw another seed in each process"),
        (["a cat", "--steps", "0"], "--steps is 0; use 1 to 10000"),
        (["a cat", "--num-images", "10000000"], "--num-images is 10000000; use 1 to 100000"),
        (["a cat", "--out", "n" * 260 + ".png"], "the file name nnnnn"),
        (["a cat", "--num-images", "0"], "--num-images is 0"),
        (["a cat", "--batch-size", "-3"], "--batch-size is -3"),
        (["a cat", "--guidance", "nan"], "--guidance is nan"),
        (["a cat", "--guidance", "-1"], "--guidance is -1.0"),
        (["a cat", "--sampler", "eular"], "sampler: 'eular' is unknown; did you mean euler?"),
        (["a cat", "--size", "big"], "size 'big' is not understood"),
        (["a cat", "--size", "32", "--width", "32", "--height", "32"], "--size and --width are both given"),
        (["a cat", "--width", "32"], "--width and --height go together"),
        (["a cat", "--out", "cat.bmp"], "cat.bmp has the suffix '.bmp'; use one of .png"),
        (["a cat", "--max-image-megapixels", "0"], "--max-image-megapixels is 0.0"),
        (["a cat", "--prompts", "p.txt"], "a prompt and --prompts are both given"),
        (["--prompts", "p.txt"], "--prompts makes many images; give a folder"),
        (["--prompts", "p.txt", "--out", "x.png"], "--prompts makes many images; give a folder"),
        (["--prompts", "none.txt", "--out", "x"], "prompt file none.txt does not exist"),
        (["--prompts", "p.txt", "--out", "x", "--padding", "batch"], "--padding batch lets an image depend"),
        (["refused"], "this batch is refused"),
        (["a cat", "--grid"], "--grid shows several images of a prompt"),
        (["refused", "--grid", "--num-images", "2"], "this batch is refused"),
    ],
)
def test_refusals_leave_nothing_behind(
    pipe: FakePipeline, capsys: pytest.CaptureFixture, words: list[str], message: str
):
    Path("p.txt").write_text("a cat\n")
    assert run("generate", *words) == 2
    assert error(capsys).startswith(message)
    assert files() == ["p.txt"]


def test_files_are_not_overwritten_unasked(pipe: FakePipeline, capsys: pytest.CaptureFixture):
    Path("image.png").write_text("precious")
    assert run("generate", "a cat") == 2
    assert error(capsys) == "image.png exists; choose another --out or use --overwrite"
    assert Path("image.png").read_text() == "precious"
    assert not pipe.calls
    assert run("generate", "a cat", "--overwrite") == 0
    assert Image.open("image.png").size == (64, 64)


def test_a_folder_for_one_prompt(pipe: FakePipeline, capsys: pytest.CaptureFixture):
    assert run("generate", "a cat", "--out", "cats", "--num-images", "2") == 0
    assert capsys.readouterr().out == "2 images written to cats\n"
    assert files("cats") == ["00000_0.png", "00000_1.png", "metadata.jsonl"]
    assert run("generate", "word " * 31, "--out", "cats") == 2


def test_a_grid(pipe: FakePipeline, capsys: pytest.CaptureFixture):
    assert run("generate", "a cat", "--out", "sub/cat.png", "--num-images", "3", "--grid") == 0
    assert capsys.readouterr().out.split() == [f"sub/cat_{name}.png" for name in (0, 1, 2, "grid")]
    sheet = np.asarray(Image.open("sub/cat_grid.png"))
    singles = [np.asarray(Image.open(f"sub/cat_{k}.png")) for k in range(3)]
    assert sheet.shape == (128, 128, 3)
    for k, (row, column) in enumerate([(0, 0), (0, 64), (64, 0)]):
        np.testing.assert_array_equal(sheet[row : row + 64, column : column + 64], singles[k])
    assert not sheet[64:, 64:].any()
    metadata = read_metadata(Path("sub/cat_grid.png"))
    assert metadata is not None
    assert [image["seed"] for image in metadata["images"]] == [0, 1, 2]
    for k in range(3):
        Path(f"sub/cat_{k}.png").unlink()
    pipe.calls.clear()
    assert run("generate", "a cat", "--out", "sub/cat.png", "--num-images", "3", "--grid") == 2
    assert error(capsys) == "sub/cat_grid.png exists; choose another --out or use --overwrite"
    assert not pipe.calls


def test_grids_in_a_folder(pipe: FakePipeline, capsys: pytest.CaptureFixture):
    lines = [{"prompt": "a cat", "id": "cat", "num_images": 2}, {"prompt": "one"}, {"prompt": "refused"}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, [*lines, {**lines[0], "id": "dog"}])))
    words = ["generate", "--prompts", "p.jsonl", "--out", "out", "--grid", "--batch-size", "1"]
    assert run(*words) == 1
    capsys.readouterr()
    assert [name for name in files("out") if "grid" in name] == ["cat_grid.png", "dog_grid.png"]
    assert Image.open("out/cat_grid.png").size == (128, 64)
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines[:2])))
    assert run(*words) == 0
    assert capsys.readouterr().out == "0 images written to out (3 there already), and 1 grid\n"
    Image.new("RGB", (9, 9)).save("out/cat_grid.png")
    assert run(*words) == 2
    assert error(capsys).startswith("out/cat_grid.png is in the way and is not from an earlier run")
    lines[1] = {"prompt": "one", "id": "cat_grid"}
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines[:2])))
    assert run(*words, "--overwrite") == 2
    assert error(capsys) == "the grid cat_grid.png has the name of an image; give that prompt another id"


@pytest.fixture
def pictures(pipe: FakePipeline) -> list[str]:
    for name, size in (("a.png", (64, 32)), ("b.png", (32, 64)), ("huge.png", (400, 300))):
        Image.new("RGB", size, "red").save(name)
    return ["a.png", "b.png", "huge.png"]


def test_editing(pipe: FakePipeline, pictures: list[str], capsys: pytest.CaptureFixture):
    assert run("edit", "make it blue", "--image", "a.png", "--image", "b.png") == 0
    (call,) = pipe.calls
    assert [[image.size for image in references] for references in call["image"]] == [[(64, 32), (32, 64)]]
    assert (call["width"], call["height"], call["negative_prompt"], call["posterior"]) == (64, 32, [""], "mean")
    assert not capsys.readouterr().err
    words = ["--negative-prompt-preset", "edit", "--reference-posterior", "sample", "--size", "96", "--out", "c.png"]
    assert run("edit", "make it blue", "--image", "huge.png", *words) == 0
    call = pipe.calls[-1]
    assert call["image"][0][0].size == (96, 64)  # about 64 x 64 pixels, the aspect kept
    assert (call["width"], call["height"], call["posterior"]) == (96, 96, "sample")
    assert call["negative_prompt"] == [EDIT_NEGATIVE_PROMPT]
    assert capsys.readouterr().err.startswith("deepgen: note: reference huge.png is resized from 400x300 to 96x64")
    words = ["--max-reference-pixels", "120000", "--out", "d.png"]
    assert run("edit", "make it blue", "--image", "huge.png", *words) == 0
    assert pipe.calls[-1]["image"][0][0].size == (416, 288)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no image to edit; give one with --image FILE"),
        (["--image", "none.png"], "image none.png does not exist"),
        (["--image", "empty.png"], "image empty.png is empty"),
        (["--image", "huge.png", "--max-image-megapixels", "0.1"], "huge.png is too large to decode safely (400x300"),
        (["--image", "a.png", "--max-reference-pixels", "9"], "--max-reference-pixels is 9; use at least 1024"),
        (
            ["--image", "a.png", "--negative-prompt", "x", "--negative-prompt-preset", "edit"],
            "--negative-prompt and --negative-prompt-preset are both given",
        ),
    ],
)
def test_refused_edits(pictures: list[str], capsys: pytest.CaptureFixture, words: list[str], message: str):
    Path("empty.png").touch()
    assert run("edit", "make it blue", *words) == 2
    assert error(capsys).startswith(message)
    assert "image.png" not in files()


def test_a_prompt_file(pipe: FakePipeline, pictures: list[str], capsys: pytest.CaptureFixture):
    Path("in").mkdir()
    os.replace("a.png", "in/a.png")
    lines = [
        {"prompt": "a cat", "id": "cat", "seed": 9},
        {"prompt": "refused"},
        {"promt": "a dog"},
        {"prompt": "make it blue", "image": "a.png"},
        {"prompt": "word " * 31, "num_images": 3},
        {"prompt": "two", "num_images": 2, "size": [32, 32], "steps": 4, "guidance": 2, "negative_prompt": "x"},
        {"prompt": "make it blue", "image": "none.png"},
    ]
    Path("in/p.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{\n")
    assert run("generate", "--prompts", "in/p.jsonl", "--out", "out", "--batch-size", "1") == 1
    captured = capsys.readouterr()
    assert captured.out == "4 images written to out\n"
    assert captured.err.splitlines() == [
        "deepgen: note: 4 lines cannot be used; the others continue and a list follows at the end",
        "deepgen: error: 5 prompts gave no image:",
        "  in/p.jsonl:3: unknown field 'promt'; did you mean 'prompt'?",
        "  in/p.jsonl:8: not JSON (Expecting property name enclosed in double quotes, column 2); "
        "write one object a line",
        "  in/p.jsonl:5: the prompt is 31 tokens long, the model reads 30; shorten it",
        "  in/p.jsonl:7: image in/none.png does not exist; check the path",
        "  in/p.jsonl:2: this batch is refused",
    ]
    assert files("out") == ["00003.png", "00005_0.png", "00005_1.png", "cat.png", "metadata.jsonl"]
    metadata = {line["file"]: line for line in map(json.loads, Path("out/metadata.jsonl").read_text().splitlines())}
    assert metadata["cat.png"]["seed"] == 9
    assert metadata["00003.png"]["images"] == [str(Path("in/a.png").absolute())]
    assert (metadata["00003.png"]["width"], metadata["00003.png"]["height"]) == (64, 32)
    asked = {"prompt": "two", "negative_prompt": "x", "seed": 1, "width": 32, "height": 32, "steps": 4, "guidance": 2.0}
    assert {name: metadata["00005_1.png"][name] for name in asked} == asked

    # The corrected file: only the missing images are made.
    lines[1], lines[2] = {"prompt": "fixed"}, {"prompt": "a dog"}
    Path("in/p.jsonl").write_text("\n".join(map(json.dumps, lines[:4])))
    pipe.calls.clear()
    assert run("generate", "--prompts", "in/p.jsonl", "--out", "out") == 0
    assert capsys.readouterr().out == "2 images written to out (2 there already)\n"
    assert [call["prompt"][:2] for call in pipe.calls] == [["fixed", "a dog"]]
    pipe.calls.clear()
    assert run("generate", "--prompts", "in/p.jsonl", "--out", "out") == 0
    assert capsys.readouterr().out == "0 images written to out (4 there already)\n"
    assert not pipe.calls


def test_editing_a_prompt_file(pipe: FakePipeline, pictures: list[str], capsys: pytest.CaptureFixture):
    Path("p.csv").write_text("prompt,images\nfirst,a.png;b.png\nsecond,\n")
    assert run("edit", "--prompts", "p.csv", "--out", "out") == 1
    assert "p.csv:3: there is no image to edit" in capsys.readouterr().err
    assert run("edit", "--prompts", "p.csv", "--out", "out", "--image", "b.png") == 0
    assert [image.size for image in pipe.calls[-1]["image"][0]] == [(32, 64)]


def test_nothing_usable_in_a_prompt_file(pipe: FakePipeline, capsys: pytest.CaptureFixture):
    Path("p.jsonl").write_text("{\n")
    assert run("generate", "--prompts", "p.jsonl", "--out", "out") == 1
    assert not pipe.calls
