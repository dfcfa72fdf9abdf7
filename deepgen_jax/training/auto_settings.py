"""Settings that are left to "auto": mesh, rematerialisation and replication of frozen layers, the fastest that fit.

The choice depends on configuration, model, kind and number of devices alone, so that a training run and
``deepgen compile`` agree. Candidates are tried in order, those that recompute least first; the first whose memory by
`deepgen_jax.training.memory_model` fits is taken. More memory thus never means more recomputation.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax

from deepgen_jax.config import DeepGenConfig
from deepgen_jax.models.stack import Remat
from deepgen_jax.parallel.chips import GIB, GPUS_PER_HOST, Chip, device_memory, find_chip
from deepgen_jax.parallel.mesh import parse_mesh, slices_of, usual_mesh
from deepgen_jax.training.memory_model import MemoryModel, Workload, abstract_mesh
from deepgen_jax.training.run_config import RunConfig

#: Text that leaves a setting to :func:`choose`.
AUTO = "auto"
#: Share of the memory that a choice may take.
SHARE = 0.95
#: Allowance for prompts and references beyond the shapes of the memory model, as a factor on activations.
LONGER_SAMPLES = 1.4
#: Rematerialisation by platform, least recomputation first, by the estimates of ``deepgen compile``: on GPUs "flash" is
#: the same as "full", and "dots" no faster; on TPU v6e little memory is left beside "mlp", and less overlaps.
_REMAT: Mapping[str, tuple[Remat, ...]] = {"gpu": ("mlp", "full"), "tpu": ("flash", "full")}
# Rings that a gather passes through at once on a TPU: both directions of one dimension.
_TPU_RINGS = 2
# Frozen layers are replicated where gathering them takes at least this share of the time of computing with them: the
# layers that train are gathered over the same links.
_GATHER_SHARE = 0.6

_NAMES = ("mesh", "remat", "gather_frozen")

C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True)
class Devices:
    """The devices of a run.

    Attributes:
      kind: as ``jax.Device.device_kind``.
      platform: "cpu", "gpu" or "tpu".
      count: over all hosts.
      slices: TPU slices; 1 for other devices.
      memory: bytes that programs may use on each; 0 where it is not known.
    """

    kind: str
    platform: str
    count: int
    slices: int
    memory: float

    @classmethod
    def of(cls, devices: Sequence[jax.Device]) -> Devices:
        """Devices of all hosts."""
        first = devices[0]
        return cls(first.device_kind, first.platform, len(devices), slices_of(devices), device_memory(devices))

    @property
    def chip(self) -> Chip | None:
        return find_chip(self.kind)

    @property
    def gpu(self) -> bool:
        return self.platform == "gpu"

    def __str__(self) -> str:
        return f"{self.count} x {self.kind}"


@dataclass(frozen=True)
class Choice:
    """Settings of a run on its devices.

    Attributes:
      devices: as text.
      mesh, remat, gather_frozen: as in the configuration, without "auto"; None where it has no such setting.
      needed: bytes a device by the memory model, without allowance; 0 where nothing was modelled.
      memory: bytes a device.
      fits: with a margin.
    """

    devices: str
    mesh: str
    remat: Remat
    gather_frozen: bool | None
    needed: float = 0.0
    memory: float = 0.0
    fits: bool = True

    def applied(self, config: C) -> C:
        """The configuration with these settings."""
        values: dict[str, Any] = {"mesh": self.mesh, "remat": self.remat, "gather_frozen": self.gather_frozen}
        names = {field.name for field in dataclasses.fields(config)}
        return dataclasses.replace(config, **{name: value for name, value in values.items() if name in names})

    def to_json(self) -> dict[str, Any]:
        """What a resumed run needs to choose the same."""
        return {name: getattr(self, name) for name in ("devices", *_NAMES)}

    def __str__(self) -> str:
        text = f"mesh {self.mesh}, remat {self.remat}"
        if self.gather_frozen is not None:
            text += f", gather_frozen {str(self.gather_frozen).lower()}"
        if not self.memory:
            return text
        size = f"about {self.needed / GIB:.1f} of {self.memory / GIB:.1f} GiB a device"
        advice = "" if self.fits else ", which may not fit: use smaller micro-batches or more devices"
        return f"{text}: {size}{advice}"


class _Candidate(NamedTuple):
    mesh: str
    remat: Remat
    gather_frozen: bool | None


def choose(
    config: RunConfig,
    devices: Devices,
    model: Callable[[], DeepGenConfig],
    workload: Callable[[Any, DeepGenConfig], Workload] | None,
    recorded: Mapping[str, Any] | None = None,
) -> Choice:
    """The settings of a run. What the configuration gives is kept, whether it fits or not.

    On CPUs, on devices of unknown memory, and for stages without a model of memory: `usual_mesh`, "full", not gathered.

    Args:
      config: of the run.
      devices: of the run.
      model: gives its sizes.
      workload: (configuration, sizes) -> the stage's largest programs; None for a stage without a model of memory.
      recorded: :meth:`Choice.to_json` of the run so far; kept if the devices are the same and it still fits.
    """
    earlier = _given_in(recorded) if recorded and recorded["devices"] == str(devices) else {}
    given = _given_in({name: getattr(config, name, AUTO) for name in _NAMES})
    gathers = hasattr(config, "gather_frozen")
    if devices.platform == "cpu" or not devices.memory or workload is None:
        plain: dict[str, Any] = {"remat": "full", "gather_frozen": False if gathers else None, **earlier, **given}
        if "mesh" not in plain:
            plain["mesh"] = usual_mesh(devices.count, devices.slices, gpu=devices.gpu)
        return Choice(str(devices), **plain)
    sizes = model()
    work = workload(config, sizes)
    memory = MemoryModel(config, sizes, work, devices.platform, devices.slices)

    @functools.cache
    def needed(candidate: _Candidate) -> tuple[float, float]:
        """Bytes by the memory model, and with the allowance."""
        found = memory.bytes(abstract_mesh(parse_mesh(candidate.mesh)), candidate.remat, bool(candidate.gather_frozen))
        total = sum(found.values())
        return total, total + (LONGER_SAMPLES - 1) * found["activations and work space"]

    def chosen(candidate: _Candidate, fits: bool = True) -> Choice:
        return Choice(str(devices), *candidate, needed(candidate)[0], devices.memory, fits)

    first, others = _candidates(given, gathers, devices, sizes, work)
    limit = SHARE * devices.memory
    if earlier and needed(kept := first[0]._replace(**(earlier | given)))[0] <= limit:
        return chosen(kept)
    for candidate in first:
        if needed(candidate)[1] <= limit:
            return chosen(candidate)
    tightest = [first[-1], *others]  # rather no allowance than a slower mesh
    for candidate in tightest:
        if needed(candidate)[0] <= limit:
            return chosen(candidate)
    return chosen(min(tightest, key=lambda candidate: needed(candidate)[0]), fits=False)


def _given_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are not left open."""
    return {name: values[name] for name in _NAMES if values.get(name) not in (AUTO, "", None)}


def _candidates(
    given: Mapping[str, Any], gathers: bool, devices: Devices, model: DeepGenConfig, workload: Workload
) -> tuple[list[_Candidate], list[_Candidate]]:
    """Candidates on the fastest mesh, least recomputation first; and those that take least memory on other meshes."""
    remats = (given["remat"],) if "remat" in given else _REMAT[devices.platform]
    meshes = [given["mesh"]] if "mesh" in given else list(auto_meshes(devices, workload.micro_batches))

    def gathered(mesh: str) -> tuple[bool | None, ...]:
        if not gathers:
            return (None,)
        if "gather_frozen" in given:
            return (given["gather_frozen"],)
        pays = gathering_pays(devices, parse_mesh(mesh), model, workload)
        return (True, False) if pays else (False,)

    first = [_Candidate(meshes[0], *each) for each in itertools.product(remats, gathered(meshes[0]))]
    return first, [_Candidate(mesh, remats[-1], gathered(mesh)[-1]) for mesh in meshes[1:]]


def auto_meshes(devices: Devices, micro_batches: Sequence[int]) -> Iterator[str]:
    """Meshes in order of preference: `usual_mesh`, then weights split over more devices.

    Where micro-batches have fewer samples than there are devices, up to eight devices of a host share each sample.

    Args:
      devices: of the run.
      micro_batches: sizes that have to be split evenly.
    """
    tensor = devices.count // math.gcd(devices.count, *micro_batches)
    if devices.platform == "cpu" or GPUS_PER_HOST % tensor or devices.count // tensor % devices.slices:
        tensor = 1  # such a micro-batch is refused where it is split
    count = devices.count // devices.slices // tensor
    fsdp = math.gcd(count, max((GPUS_PER_HOST if devices.gpu else 16) // tensor, 1))
    while True:
        sizes = {"data": devices.count // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}
        yield ",".join(f"{axis}={size}" for axis, size in sizes.items() if axis != "tensor" or size > 1)
        larger = [size for size in range(fsdp + 1, count + 1) if count % size == 0 and size % fsdp == 0]
        if not larger or devices.platform == "cpu":
            return
        fsdp = larger[0]


def gathering_pays(devices: Devices, mesh: Mapping[str, int], model: DeepGenConfig, workload: Workload) -> bool:
    """Whether it pays to replicate the frozen layers of the language model, by peak rates of arithmetic and links.

    On GPUs gathers of stage 2 hide behind products.

    Args:
      devices: of the run.
      mesh: sizes of the axes.
      model: sizes.
      workload: of the run.
    """
    chip, runs = devices.chip, [each for each in workload.passes if each.runs_text]
    if devices.platform != "tpu" or chip is None or not chip.link_bandwidth or mesh["fsdp"] == 1 or not runs:
        return False
    text = model.text
    keys = text.num_kv_heads * text.head_dim
    weights = text.hidden_size * (2 * text.hidden_size + 2 * keys + 3 * text.intermediate_size)
    gather = sum(each.loops for each in runs) * 2 * weights / mesh["tensor"] / (_TPU_RINGS * chip.link_bandwidth)
    # A layer is gathered once for the forward pass and once for the backward pass, which is twice the arithmetic and
    # recomputes some of it.
    tokens = sum(each.loops * (2 if each.trains_text else 1) * each.samples * each.text for each in runs)
    compute = 2 * weights * tokens / math.prod(mesh.values()) / chip.peak_flops
    return gather >= _GATHER_SHARE * compute
