"""Compiles every kernel of a worker into Numba's cache, so that no first start waits for it.

Run `python -m streams.warm` once after an installation: a minute or two the first time, seconds after. Knows which
modules have kernels; not what they do.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from models import fold
from streams import arena, codec, ingest, wire


def warm_stages(stages: Collection[str]) -> None:
    """The kernels of `ingest`, `score` or both, but the scorer's, which are its model's to warm. Without torch."""
    served = [codec, wire]
    served += [ingest] if "ingest" in stages else []
    served += [fold, arena] if "score" in stages else []
    for module in served:
        module.warm()


def warm() -> None:
    """All there are."""
    from models import warm as models_warm  # whose import takes torch's

    models_warm.warm()
    warm_stages(("ingest", "score"))


if __name__ == "__main__":
    started_s = time.monotonic()
    warm()
    print(f"kernels are compiled, {time.monotonic() - started_s:.1f} s")
