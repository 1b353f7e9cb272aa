"""The ledger: each paper's claims, one file a paper, held against measurements.

    from normlab import claims
    claims.ledger()                    # every claim, by id
    claims.ledger()["ic/correlation"].judge("cpu").verdict

A verdict is computed from records, never written by hand.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache

from normlab.claims.claim import SCALES as SCALES
from normlab.claims.claim import Claim as Claim
from normlab.claims.claim import Paper as Paper
from normlab.claims.claim import Scale as Scale
from normlab.claims.rules import Judgement as Judgement

_MACHINERY = {"claim", "experiments", "nets", "page", "places", "protocols", "rules"}


@lru_cache(maxsize=1)
def ledger() -> dict[str, Claim]:
    """Every claim by id, papers in order of year, claims in the order of their file.

    Returns:
        What the files of this package name ``CLAIMS``.

    Raises:
        ValueError: If two claims have one id.
    """
    found: list[Claim] = []
    for module in pkgutil.iter_modules(__path__):
        if module.name not in _MACHINERY:
            found += importlib.import_module(f"{__name__}.{module.name}").CLAIMS
    found.sort(key=lambda claim: (claim.paper.year, claim.paper.key))  # stable: order of the file
    by_id: dict[str, Claim] = {}
    for claim in found:
        if claim.id in by_id:
            raise ValueError(f"two claims are named {claim.id}")
        by_id[claim.id] = claim
    return by_id
