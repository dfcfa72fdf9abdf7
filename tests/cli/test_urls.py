"""A URL where a local path is expected is refused by name, in every option and setting, and makes no folder."""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepgen_jax import DeepGenPipeline
from deepgen_jax.cli.main import COMMANDS, Group, Subcommand, main
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.cache import enable_compilation_cache
from deepgen_jax.inference.prompts import parse_record
from deepgen_jax.local_paths import is_path_type, is_url, refuse_url
from deepgen_jax.rewards.cache import AnswerCache
from deepgen_jax.rl.rl_config import GRPOConfig, PromptsConfig
from deepgen_jax.training.run_config import RunConfig, SampleConfig

URLS = ["gs://bucket/x", "s3://bucket/x", "file:///tmp/x", "memory://x", "hf://user/x", "https://host/x.png"]
#: Values that let the parser get as far as the paths.
REQUIRED = {"--rewards": "jpeg", "--format": "model", "--topology": "h100:8", "--to": "int8"}


def subcommands() -> Iterator[tuple[list[str], Subcommand]]:
    for name, entry in COMMANDS.items():
        if isinstance(entry, Group):
            yield from (([name, inner], command) for inner, command in entry.commands.items())
        else:
            yield [name], entry


def path_options() -> list[tuple[list[str], str]]:
    """(words of the command, option) of every option of every command that is a path."""
    found = []
    for words, entry in subcommands():
        command = getattr(importlib.import_module(entry.module), entry.name)
        hints = typing.get_type_hints(command, include_extras=True)
        for field in dataclasses.fields(command):
            positional = "Positional" in str(hints[field.name]) or "_PositionalMarker" in repr(hints[field.name])
            if is_path_type(hints[field.name]) and not positional:
                found.append((words, f"--{field.name.replace('_', '-')}"))
    return found


OPTIONS = path_options()


def test_there_are_paths_to_check():
    names = {option for _, option in OPTIONS}
    assert {"--out", "--prompts", "--image", "--qwen", "--checkpoint", "--json", "--contact-sheet"} <= names
    assert len(OPTIONS) > 20


@pytest.mark.parametrize(("words", "option"), OPTIONS, ids=lambda value: value if isinstance(value, str) else None)
def test_every_path_option(
    words: list[str], option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    for url in URLS[:2] if option != "--out" else URLS:
        # Missing positionals and options are filled until the command complains of the URL.
        tried = [*words, option, url]
        for _ in range(4):
            assert main(tried) == 2
            message = capsys.readouterr().err
            if " missing" not in message:
                break
            lacking = message.split("error: ")[1].split(" missing")[0].split(" and ")
            tried += [word for name in lacking for word in ([name] if name.startswith("--") else [])
                      + ([REQUIRED.get(name, "x")])]  # fmt: skip
        assert f"deepgen: error: {option} is the URL {url}, but must be a local path" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", URLS)
def test_models_folders_and_runs(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.chdir(tmp_path)
    lines = [
        ["generate", url, "a cat"], ["generate", url], ["generate", url, "a cat", "--out", "o"],
        ["edit", url, "a cat", "--image", "a.png"], ["info", url], ["export", url, "--format", "model", "--out", "o"],
        ["plot", url], ["eval", "nano", url], ["train", "tiny_sft", f"out={url}"], ["train", "sft", f"model={url}"],
        ["train", "sft", f"start={url}"], ["data", "inspect", "sft", f"data.cache_dir={url}"],
        ["train", "grpo", f"prompts.path={url}"],
        ["train", "sft", 'samples.prompts=["a"]', f'samples.images=["{url}"]'],
    ]  # fmt: skip
    for words in lines:
        assert main(words) == 2, words
        message = capsys.readouterr().err
        assert f"the URL {url}, but must be a local path" in message, (words, message)
        assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPGEN_CACHE_DIR", "gs://bucket/cache")
    calls = [
        lambda: DeepGenPipeline.from_pretrained("gs://bucket/model"),
        lambda: enable_compilation_cache("s3://bucket/cache"),
        enable_compilation_cache,
        lambda: AnswerCache("gs://bucket/answers.jsonl"),
        lambda: parse_record({"prompt": "a cat", "image": "https://host/cat.png"}, 0, 1, Path()),
        lambda: RunConfig(model="m", out="gs://bucket/run", steps=1, trains=("vae",)),
        lambda: RunConfig(
            model="m", out="o", steps=1, trains=("vae",), samples=SampleConfig(prompts=("a",), images=("s3://b/a",))
        ),
        lambda: GRPOConfig(model="m", out="o", prompts=PromptsConfig("gs://b/p.txt"), rewards=(), steps=1),
    ]
    for call in calls:
        with pytest.raises(DeepGenError, match=r"is the URL .*, but must be a local path"):
            call()
    assert list(tmp_path.iterdir()) == []


SCHEMES = st.from_regex(r"[A-Za-z][A-Za-z0-9+.-]{1,8}", fullmatch=True)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scheme=SCHEMES, rest=st.text("abc/._-0", max_size=12))
def test_any_scheme_also_after_pathlib(scheme: str, rest: str):
    url = f"{scheme}://{rest}"
    assert is_url(url)
    assert is_url(f"simplecache::{url}")
    assert is_url(Path(f"{scheme}://x{rest}"))
    with pytest.raises(DeepGenError, match="--out is the URL"):
        refuse_url(Path(url + "x"), "--out")


@given(path=st.text("ab/._-0: é", max_size=20))
def test_local_paths_are_none(path: str):
    if not path.lstrip().split(":")[0].replace("-", "").replace(".", "").isalnum() or ":/" not in path:
        assert not is_url(path)
    assert not is_url(f"./{path}")
    assert not is_url(f"/{path}")
    assert not is_url("C:/folder")
