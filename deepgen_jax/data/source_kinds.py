"""Registry of data set formats; `deepgen_jax.data.sources` holds one file for each built-in one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepgen_jax.registry import Registry

if TYPE_CHECKING:
    from deepgen_jax.data.sources.base import Source

_HERE = "deepgen_jax.data.sources"
#: Kind -> class. Other packages add theirs with entry points of the group, or with `deepgen_jax.data.sources.register`.
SOURCE_KINDS: Registry[Source] = Registry(
    "data source",
    "deepgen_jax.data_sources",
    {
        "json": f"{_HERE}.json_list:JsonList",
        "captions": f"{_HERE}.captions:Captions",
        "webdataset": f"{_HERE}.webdataset:WebDataset",
        "parquet": f"{_HERE}.parquet:Parquet",
        "arrow": f"{_HERE}.arrow:Arrow",
        "array_record": f"{_HERE}.array_record:ArrayRecord",
        "tfds": f"{_HERE}.tfds:TensorFlowDataset",
        "image_folder": f"{_HERE}.image_folder:ImageFolder",
        "features": f"{_HERE}.features:Features",
        "prompts": f"{_HERE}.prompts:Prompts",
    },
    base=f"{_HERE}.base:Source",
)
