"""The registry of samplers."""

from __future__ import annotations

from deepgen_jax.flow.samplers.sampler import Sampler
from deepgen_jax.registry import Registry

_HERE = "deepgen_jax.flow.samplers"

#: Samplers by name. Other packages add theirs with ``SAMPLERS.register(name, class)`` or in the entry point group
#: ``deepgen_jax.samplers``; ``module:Class`` and ``file.py:Class`` work wherever a name does.
SAMPLERS: Registry[Sampler] = Registry(
    "sampler",
    "deepgen_jax.samplers",
    {
        "euler": f"{_HERE}.euler:Euler",
        "heun": f"{_HERE}.heun:Heun",
        "dpmpp_2m": f"{_HERE}.dpmpp_2m:DPMpp2M",
        "pi_flow": f"{_HERE}.pi_flow:PiFlow",
        "cps": f"{_HERE}.cps:CPS",
        "flow": f"{_HERE}.flow_sde:FlowSDE",
        "dance": f"{_HERE}.dance_sde:DanceSDE",
    },
    base=f"{_HERE}.sampler:Sampler",
)


def get_sampler(name: str) -> Sampler:
    """The sampler of a name; "DPM++ 2M" and "dpm++2m" are read as "dpmpp_2m".

    Raises:
      DeepGenError: there is no such sampler.
    """
    return SAMPLERS.load(canonical_name(name))()


def canonical_name(name: str) -> str:
    """The registered name that ``name`` spells, apart from case, spaces, "-" and "_"; otherwise ``name`` itself."""
    if ":" in name or SAMPLERS.is_registered(name):
        return name
    return {_letters(known): known for known in SAMPLERS.names()}.get(_letters(name), name)


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower().replace("++", "pp")))
