"""Recognition: samples of a domain that returns are routed to its head, and no second head is grown.

Rules of this file:

1. The samples are judged together. One sample says little: a detector may find only one in eight drawings novel, while
   the novelties of a hundred drawings are clearly too high for its own domain.
2. The test is Mann and Whitney's (1947): novelties of the samples against the domain's calibration values, which a
   domain that is back draws from the same distribution. Both are scores of samples that the detector did not learn.
3. In doubt the answer is "new": that costs a search, and `admit` rejects a duplicate of a domain.
"""

from __future__ import annotations

import numpy as np

from edgeear.novelty import Calibration
from edgeear.system import Recognised, System
from edgeear.types import F32


def recognise(system: System, h: F32) -> Recognised | None:
    """The known domain that explains the hypervectors `h (samples, D)`, one or more; None when they are new.

    The router names the domain and must give it more than half of them, and their `excess` over its own novelties must
    not be above `SystemPolicy.recognise`.
    """
    if not system.domains:
        return None
    votes = np.bincount(system.router.route(h), minlength=len(system.domains))
    domain = system.domains[int(votes.argmax())]
    found = excess(domain.calibration, domain.calibration.novelty(domain.detector, h))
    routed = float(votes.max() / len(h))
    known = found <= system.policy.recognise and routed > 0.5
    return Recognised(domain.name, found, routed) if known else None


def excess(calibration: Calibration, novelty: F32) -> float:
    """By how many standard deviations the rank sum of `novelty (samples,)` among the calibration values is too high.

    About standard normal for samples of the domain, whatever the distribution; ties count half.
    """
    n, k = len(calibration.values), len(novelty)
    above = n - np.searchsorted(calibration.values, novelty, side="left")
    tied = above - (n - np.searchsorted(calibration.values, novelty, side="right"))
    wins = n * k - float((above - tied / 2).sum())
    return (wins - n * k / 2) / float(np.sqrt(n * k * (n + k + 1) / 12))
