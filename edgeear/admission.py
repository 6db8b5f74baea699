"""Admission: the checks that every new or changed domain passes before it serves.

The encoder and the old heads are frozen, so the only way left to forget is that a new domain takes an old domain's
inputs at the router. So every old domain's stored codes are replayed through the new router, and the share that is
routed to another domain is bounded by `SystemPolicy.max_stolen_share`. A domain that absorbs another must also win its
inputs. The domain's detector is built and must judge the domain's own codes; proving.py asks the head as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from edgeear.system import Candidate, Domain, Rejected, System


def admit(system: System, domain: Domain, absorbed: str | None = None) -> Candidate | Rejected:
    """A system with `domain` grown, or every reason against it. It takes the place of the domain with its name, and of
    the one called `absorbed`, whose inputs become its own."""
    reasons = [*_misfits(system, domain)] or [*_undetectable(domain)]
    if reasons:
        return Rejected(domain.name, tuple(reasons))
    grown = system.grown(domain)
    if absorbed is not None:
        grown = replace(grown.without(absorbed), generation=grown.generation)
    lost = replay(system, grown, {} if absorbed is None else {absorbed: domain.name})
    policy = system.policy
    for name, share in lost.items():
        if share > policy.max_stolen_share:
            one = "merge the two domains" if domain.name in system.names else f"update {name!r} with these"
            reasons.append(
                f"takes {share:.1%} of the inputs of {name!r}, at most {policy.max_stolen_share:.1%} allowed: "
                f"collect more samples, or {one} if they are one domain"
            )
    won = np.bincount(grown.router.route(_codes(domain)), minlength=len(grown.domains)) / len(domain.codes)
    mine = _index(grown, domain.name)
    if won[mine] < policy.min_own_share:
        share, most = max(
            (share, name) for k, (share, name) in enumerate(zip(won, grown.names, strict=True)) if k != mine
        )
        reasons.append(
            f"wins only {won[mine]:.1%} of its own inputs, at least {policy.min_own_share:.1%} needed; {most!r} wins "
            f"{share:.1%}: it is not a new domain; update {most!r} with these samples"
        )
    if not reasons:
        return Candidate(system, grown, lost)
    shared = {n: lost.get(n, 0.0) + float(s) for n, s in zip(grown.names, won, strict=True) if n != domain.name}
    return Rejected(domain.name, tuple(reasons), max(shared, key=lambda n: shared[n], default=None))


def replay(old: System, new: System, heirs: Mapping[str, str] | None = None) -> dict[str, float]:
    """Per old domain: the share of its codes that the old route gave to it and the new route gives to another.

    `heirs` names the new domain that an old one became part of. Domains that are gone without an heir are left out."""
    lost, heirs = {}, heirs or {}
    for domain in old.domains:
        heir = heirs.get(domain.name, domain.name)
        if heir not in new.names:
            continue
        codes = _codes(domain)
        before = old.router.route(codes) == _index(old, domain.name)
        after = new.router.route(codes) == _index(new, heir)
        lost[domain.name] = float((before & ~after).mean())
    return lost


def _codes(domain: Domain) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return domain.codes.astype(np.float32)


def _index(system: System, name: str) -> int:
    return system.names.index(name)


def _misfits(system: System, domain: Domain) -> list[str]:
    reasons = []
    if domain.memory.dimensions != system.space.dimensions or domain.memory.m != system.policy.memory_dimensions:
        reasons.append(
            f"memory of (D, m) {(domain.memory.dimensions, domain.memory.m)} does not fit this system's "
            f"{(system.space.dimensions, system.policy.memory_dimensions)}"
        )
    if domain.memory.n == 0:
        reasons.append(f"memory of {domain.name!r} holds no sample, so nothing can be detected: learn it from samples")
    arrays = (("class sums", domain.memory.class_sums), ("gram", domain.memory.gram), ("codes", domain.codes))
    for what, array in arrays:
        if not np.isfinite(array).all():
            reasons.append(f"{what} of {domain.name!r} hold NaN or infinity")
    if domain.codes.shape[1:] != (domain.memory.m,):
        reasons.append(f"calibration codes of shape {domain.codes.shape}: expected (codes, {domain.memory.m})")
    if len(domain.codes) == 0:
        reasons.append("no calibration codes, so nothing can be replayed later: keep at least one")
    return reasons


def _undetectable(domain: Domain) -> list[str]:
    """Why the detector of a domain that fits gives no verdicts on its own codes."""
    codes = np.zeros((len(domain.codes), domain.memory.dimensions), np.float32)
    codes[:, : domain.memory.m] = _codes(domain)
    try:
        novelty = domain.calibration.novelty(domain.detector, codes)
    except np.linalg.LinAlgError as error:
        return [f"the sums of {domain.name!r} give no detector ({error}): learn it again"]
    if not np.isfinite(novelty).all():
        return [f"the detector of {domain.name!r} gives NaN or infinity for its own codes: learn it again"]
    return []
