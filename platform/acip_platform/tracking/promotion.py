"""Who is served: a new version becomes the champion only where its curve is better, by one stated rule.

    area under the excess loss (acip.sizing.excess_loss_area), from the smallest size that both curves reach to 1.0; less is better

Only what was measured alike is compared: the same base model, held-out text, context and windows. What can't be compared, or
is not better, is a candidate, and `jobs/promote.py` lets a person decide.

Fleets may contend at once, and MLflow moves an alias without asking where it was. So who was crowned looks again afterwards: any
other that contends and is not settled is a rival it may not have met, and the best of them all gets the alias. A version is tagged
before it gets the alias, so the last one to get it sees all the others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from acip.artifact.artifact import Artifact
from acip.sizing.budget import COMPARABLE_FIELDS
from acip.sizing.excess_loss_area import excess_loss_area
from acip_platform.storage.store import Store
from acip_platform.tracking.registry import CANDIDATE, CHAMPION, ModelVersion, Registry

CurveRows = Sequence[Mapping[str, Any]]
COMPETES = "contends"  # tag of a version that is about to be the champion, or was; settled with its verdict


@dataclass(frozen=True)
class Verdict:
    leads: bool  # the new version is the champion now
    why: str  # a sentence, with the areas where there are two

    def __str__(self) -> str:
        return f"{CHAMPION if self.leads else CANDIDATE}: {self.why}"


def promote_if_better(registry: Registry, store: Store, version: ModelVersion, artifact: Artifact, may_lead: bool = True) -> Verdict:
    """Judge a new `version` against the champion, set the alias it earned, and write the verdict into its tags, last of all."""
    settled = {found.version for found in registry.versions(version.name, {}) if "verdict" in found.tags}
    settled.update(registry.champions(version.name))
    champion = registry.champion(version.name)  # read after that: who is settled had the alias by then, or never will
    if champion is not None and champion.version == version.version:
        verdict = Verdict(True, version.tags.get("verdict", "it is the champion already").removeprefix(f"{CHAMPION}: "))
    elif not may_lead:
        verdict = Verdict(False, "the champion stays what it is; nobody asked to replace it")
    elif champion is None:
        verdict = Verdict(True, f"the first of {version.name}")
    elif not store.exists(champion.uri):
        verdict = Verdict(True, f"the artifact of version {champion.version}, the champion before, is not there any more")
    else:
        verdict = compare(artifact.manifest, store.open(champion.uri).manifest, f"version {champion.version}, the champion")
    if verdict.leads:
        registry.tag(version, {COMPETES: "true"})
        registry.set_champion(version)
        verdict = _among_rivals(registry, store, version, settled, verdict)
    if not verdict.leads:
        registry.set_alias(version, CANDIDATE)
    registry.tag(version, {"verdict": str(verdict)})
    return verdict


def _among_rivals(registry: Registry, store: Store, version: ModelVersion, settled: set[str], verdict: Verdict) -> Verdict:
    """The verdict on the crowned `version` once it met all that contended meanwhile. The alias is with the best of them afterwards."""
    best, contenders = version, [version]
    while new := [
        found for found in registry.versions(version.name, {COMPETES: "true"})
        if found.version not in settled | {known.version for known in contenders} and store.exists(found.uri)
    ]:  # fmt: skip
        contenders = sorted([*contenders, *new], key=lambda known: int(known.version))
        best = contenders[0]
        for rival in contenders[1:]:  # as if one had come after the other
            best = rival if _judged(store, rival, best).leads else best
        registry.set_alias(best)
    return verdict if best is version else Verdict(False, _judged(store, version, best).why)


def _judged(store: Store, new: ModelVersion, old: ModelVersion) -> Verdict:
    return compare(store.open(new.uri).manifest, store.open(old.uri).manifest, f"version {old.version}, the champion")


def compare(new: Mapping[str, Any], old: Mapping[str, Any], rival: str) -> Verdict:
    """The rule, on two artifacts' manifests: their base models and their curves."""
    ours, theirs = new["curve"], old["curve"]
    if new["base"]["digest"] != old["base"]["digest"]:
        return Verdict(False, f"not comparable with {rival}: another base model")
    for rows, whose in ((ours, "its own curve"), (theirs, f"the curve of {rival},")):
        if len(rows) < 2 or max(row.get("got", 0) for row in rows) != 1.0 or not all({"got", "loss"} <= row.keys() for row in rows):
            return Verdict(False, f"not comparable with {rival}: {whose} has no size 1.0, or none below it")
    for key, usual in COMPARABLE_FIELDS.items():
        a, b = ({row.get(key, usual) for row in rows} for rows in (ours, theirs))
        if a != b or len(a) > 1:
            return Verdict(False, f"not comparable with {rival}: measured on {key} {_said(a)}, not {_said(b)}")
    for rows, leads in ((ours, False), (theirs, True)):
        if lost := [row["got"] for row in rows if not math.isfinite(row["loss"])]:
            whose = f"{rival}, loses" if leads else "it loses"
            return Verdict(leads, f"{whose} all it knows at size {max(lost):.2f}: the loss is not a number there")
    least = max(min(row["got"] for row in rows) for rows in (ours, theirs))
    mine, its = excess_loss_area(ours, least), excess_loss_area(theirs, least)
    change = f", {mine / its - 1:+.1%}" if its > 0 else ""
    compared = f"area {mine:.5g} against {its:.5g} of {rival} ({least:.2f} to 1.00{change})"
    return Verdict(True, f"better, {compared}") if mine < its else Verdict(False, f"not better, {compared}")


def _said(values: set[Any]) -> str:
    return " and ".join(sorted(map(str, values)))
