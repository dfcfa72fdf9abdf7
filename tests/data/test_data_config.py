"""Errors in configurations are named, with suggestions."""

from __future__ import annotations

import subprocess
import sys

import pytest

from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig, from_mapping
from deepgen_jax.errors import DeepGenError

T2I = SourceConfig("pairs", "json", "list.json")
EDIT = SourceConfig("edits", "json", "edits.json", "edit")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SourceConfig("s", "web_dataset", "x"), r"'web_dataset' is unknown; did you mean webdataset\?"),
        (lambda: SourceConfig("s", "json", "x", "editing"), "did you mean edit"),
        (lambda: SourceConfig("s", "json", "x", fields={"reference": "y"}), "did you mean references"),
        (lambda: SourceConfig("s", "json", ""), "path is empty"),
        (lambda: SourceConfig("a/b", "json", "x"), "a word without"),
        (lambda: SourceConfig("s", "json", "x", weight=0.0), "weight is 0.0"),
        (lambda: MixtureConfig((), ()), "either cycle or weights"),
        (lambda: MixtureConfig(weights=(("edit", 1.0),)), "either cycle or weights"),
        (lambda: MixtureConfig(("t2i", "edits")), "did you mean edit"),
        (lambda: DataConfig((), 4), "no sources"),
        (lambda: DataConfig((T2I,), 4), "edit has 0 sources"),
        (lambda: DataConfig((T2I, EDIT), 4, MixtureConfig(("t2i",))), "leave its sources out"),
        (lambda: DataConfig((T2I, T2I, EDIT), 4), "two sources are called pairs"),
        (lambda: DataConfig((T2I, EDIT), 0), "micro_batch is 0; it must be at least 1"),
        (lambda: DataConfig((T2I, EDIT), 4, text_drop=1.5), "from 0 to 1"),
        (lambda: DataConfig((T2I, EDIT), 4, transform="fix_pixel"), "did you mean fix_pixels"),
        (lambda: DataConfig((T2I, EDIT), 4, transform="crop2square", image_size=500), "multiple of 32"),
        (
            lambda: DataConfig((T2I, SourceConfig("x", "json", "x", weight=2.0), EDIT), 4),
            "give a weight to all or to none",
        ),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(DeepGenError, match=message):
        make()


def test_from_mapping():
    values = {
        "sources": [{"name": "a", "kind": "parquet", "path": "p", "fields": {"text": "caption"}}],
        "micro_batch": 16,
        "mixture": {"cycle": ["t2i"]},
    }
    expected = SourceConfig("a", "parquet", "p", fields={"text": "caption"})
    assert from_mapping(DataConfig, values) == DataConfig((expected,), 16, MixtureConfig(("t2i",)))
    with pytest.raises(DeepGenError, match=r"sources\[0\]: 'knd' is unknown; did you mean kind"):
        from_mapping(DataConfig, {**values, "sources": [{"knd": "json"}]})
    with pytest.raises(DeepGenError, match="micro_batch must be given"):
        from_mapping(DataConfig, {"sources": values["sources"]})
    with pytest.raises(DeepGenError, match="did you mean micro_batch"):
        from_mapping(DataConfig, {**values, "microbatch": 3})


def test_the_data_modules_do_not_load_jax_grain_or_arrow():
    code = (
        "import sys, deepgen_jax.data.loader, deepgen_jax.data.inspect, deepgen_jax.data.sources.parquet\n"
        "sys.exit(any(name in sys.modules for name in ('jax', 'grain', 'pyarrow', 'fsspec', 'tensorflow_datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
