"""How much noise is left in samples after stochastic steps, compared with what the schedule expects, as a picture.

    python benchmarks/noise_preservation.py --out docs/images/noise_preservation.png

The velocity is exact (that of a known clean image), so any excess over the schedule is caused by the sampler.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from measure import Parser

from deepgen_jax.config import SchedulerConfig
from deepgen_jax.flow.samplers import sde_step
from deepgen_jax.flow.schedule import make_sigmas

#: Samplers with usual strengths, and their looks.
SAMPLERS = (
    ("cps", 1.0, "CPS, eta = 1.0", "tab:green", "o"),
    ("flow", 0.7, "Flow-SDE, eta = 0.7", "tab:blue", "s"),
    ("dance", 0.3, "Dance-SDE, eta = 0.3", "tab:orange", "^"),
)


def noise_ratios(sampler: str, eta: float, steps: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise left after each step over the level expected there: of single steps, and along one trajectory, [steps - 1].

    The last step ends at noise level 0 and is left out.
    """
    sigmas = make_sigmas(SchedulerConfig(), steps)
    clean, noise = jax.random.normal(jax.random.key(0), (2, 1, size))
    trajectory = noise

    @jax.jit
    def moved(sample: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        s, following = jnp.asarray(sigmas)[index], jnp.asarray(sigmas)[index + 1]
        fresh = jax.random.normal(jax.random.fold_in(jax.random.key(1), index), clean.shape)
        velocity = (sample - clean) / s
        new, *_ = sde_step(sampler, velocity, sample, s, following, sigmas[1], eta, noise=fresh)
        return new, jnp.std(new - (1 - following) * clean) / following

    single, along = [], []
    for index in range(steps - 1):
        s = sigmas[index]
        single.append(moved((1 - s) * clean + s * noise, index)[1])
        trajectory, ratio = moved(trajectory, index)
        along.append(ratio)
    return np.asarray(single), np.asarray(along)


def main() -> None:
    """Draws the picture."""
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("docs/images/noise_preservation.png"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", type=int, default=1_000_000, help="elements")
    arguments = parser.parse_args()

    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for sampler, eta, label, colour, marker in SAMPLERS:
        curves = noise_ratios(sampler, eta, arguments.steps, arguments.size)
        for axis, curve in zip(axes, curves, strict=True):
            steps = np.arange(1, len(curve) + 1)
            axis.plot(steps, 100 * (curve - 1), color=colour, marker=marker, markersize=3, linewidth=1, label=label)
        print(f"{label}: after single steps at most {curves[0].max():.4f}, along a trajectory {curves[1].max():.4f}")
    for axis, title in zip(axes, ("after one step from the exact level", "along a trajectory"), strict=True):
        axis.set_title(f"Noise beyond the schedule's, {title}", fontsize=10)
        axis.set_xlabel(f"step of {arguments.steps}")
        axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(-1, 2000)
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_formatter("{x:g}%")
    axes[0].legend(frameon=False, loc="upper center")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    main()
