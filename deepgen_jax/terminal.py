"""What long work shows on a terminal."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress_bar(total: int, done: int, unit: str) -> tqdm:
    """A bar on stderr, shown only where that is a terminal; its description says "compiling" until it is replaced.

    Args:
      total, done: how many there are in all, and how many there were before.
      unit: what is counted, in the plural.
    """
    return tqdm(
        total=total,
        initial=done,
        desc="compiling ",
        unit=f" {unit}",
        bar_format=f"{{desc}}{{percentage:3.0f}}%|{{bar}}| {{n_fmt}}/{{total_fmt}} {unit} "
        "[{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]",
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
    )
