"""Promotion: a new version becomes the champion only if its trade-off curve is better.

The measure is the area under the excess loss (acip.sizing.excess_loss_area), from the smallest size that both curves reach to 1.0;
a smaller area is better. It is over sizes of ranks. If one of the two artifacts has no ranks, it is over shares of the base model's bytes
for both. Curves are comparable only if they were measured on the same base model, held-out text, context and windows.
A version that is not comparable or not better becomes the candidate, and a person can promote it with `jobs/promote.py`.

Several fleets may promote at once, and MLflow moves an alias unconditionally. Each version is therefore tagged before it gets the
alias. Afterwards it is compared with every other tagged version that has no verdict yet, and the best of them gets the alias. The
last version to get the alias sees the tags of all others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from acip.artifact.artifact import Artifact
from acip.sizing.budget import COMPARABLE_FIELDS, is_coded
from acip.sizing.excess_loss_area import excess_loss_area, rows_of_area
from acip_platform.storage.store import Store
from acip_platform.tracking.registry import CANDIDATE, CHAMPION, ModelVersion, Registry

CurveRows = Sequence[Mapping[str, Any]]
COMPETES = "contends"  # tag of a version that is about to be the champion, or was; its verdict settles it


@dataclass(frozen=True)
class Verdict:
    """The result of a promotion: whether the new version is the champion now, and the reason."""

    leads: bool
    why: str  # one sentence; it holds the areas if two curves were compared

    def __str__(self) -> str:
        return f"{CHAMPION if self.leads else CANDIDATE}: {self.why}"


def promote_if_better(registry: Registry, store: Store, version: ModelVersion, artifact: Artifact, may_lead: bool = True) -> Verdict:
    """Compare a new `version` with the champion, set its alias, and store the verdict in its tags as the last step.

    With `may_lead` False it becomes the candidate without a comparison.
    """
    settled = {each.version for each in registry.versions(version.name, {}) if "verdict" in each.tags}
    settled.update(registry.champions(version.name))
    champion = registry.champion(version.name)  # read after `settled`: a settled version either had the alias by now or never gets it
    if champion is not None and champion.version == version.version:
        verdict = Verdict(True, version.tags.get("verdict", "it is the champion already").removeprefix(f"{CHAMPION}: "))
    elif not may_lead:
        verdict = Verdict(False, "registered as a candidate only; the champion is unchanged")
    elif champion is None:
        verdict = Verdict(True, f"the first of {version.name}")
    elif not store.exists(champion.uri):
        verdict = Verdict(True, f"the artifact of version {champion.version}, the previous champion, no longer exists")
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
    """Compare the new champion `version` with all versions that competed meanwhile, and give the alias to the best one.

    Returns the final verdict on `version`.
    """
    best, contenders = version, [version]
    while new := [
        each for each in registry.versions(version.name, {COMPETES: "true"})
        if each.version not in settled | {known.version for known in contenders} and store.exists(each.uri)
    ]:  # fmt: skip
        contenders = sorted([*contenders, *new], key=lambda contender: int(contender.version))
        best = contenders[0]
        for rival in contenders[1:]:  # in the order of their numbers, as if they had been promoted one after the other
            best = rival if _compare_versions(store, rival, best).leads else best
        registry.set_alias(best)
    return verdict if best is version else Verdict(False, _compare_versions(store, version, best).why)


def _compare_versions(store: Store, new: ModelVersion, old: ModelVersion) -> Verdict:
    return compare(store.open(new.uri).manifest, store.open(old.uri).manifest, f"version {old.version}, the champion")


def compare(new: Mapping[str, Any], old: Mapping[str, Any], rival: str) -> Verdict:
    """Return the verdict on `new` against `old`, two artifacts' manifests. `rival` names `old` in the reason."""
    (new_rows, old_rows), unit = _of_one_kind(new["curve"], old["curve"])
    if new["base"]["digest"] != old["base"]["digest"]:
        return Verdict(False, f"not comparable with {rival}: another base model")
    for rows, curve in ((new_rows, "its own curve"), (old_rows, f"the curve of {rival},")):
        if len(rows) < 2 or max(row.get("got", 0) for row in rows) != 1.0 or not all({"got", "loss"} <= row.keys() for row in rows):
            return Verdict(False, f"not comparable with {rival}: {curve} has no size 1.0, or none below it")
    for key, default in COMPARABLE_FIELDS.items():
        new_values, old_values = ({row.get(key, default) for row in rows} for rows in (new_rows, old_rows))
        if new_values != old_values or len(new_values) > 1:
            return Verdict(False, f"not comparable with {rival}: measured on {key} {_listed(new_values)}, not {_listed(old_values)}")
    for rows, leads in ((new_rows, False), (old_rows, True)):
        if sizes := [row["got"] for row in rows if not math.isfinite(row["loss"])]:
            subject = f"the loss of {rival}," if leads else "its loss"
            return Verdict(leads, f"{subject} is not a finite number at size {max(sizes):.2f}")
    least = max(min(row["got"] for row in rows) for rows in (new_rows, old_rows))
    new_area, old_area = excess_loss_area(new_rows, least), excess_loss_area(old_rows, least)
    change = f", {new_area / old_area - 1:+.1%}" if old_area > 0 else ""
    compared = f"area {new_area:.5g} against {old_area:.5g} of {rival} ({least:.2f} to 1.00{unit}{change})"
    return Verdict(True, f"better, {compared}") if new_area < old_area else Verdict(False, f"not better, {compared}")


def _of_one_kind(*curves: CurveRows) -> tuple[list[CurveRows], str]:
    """Return the rows of two curves that are compared, and the unit of their sizes."""
    chosen: list[CurveRows] = [rows_of_area(rows) for rows in curves]
    if not any(is_coded(row) for rows in chosen for row in rows):
        return chosen, ""
    return [[row for row in rows if is_coded(row) or row.get("got") == 1.0] for rows in curves], " of the bytes"


def _listed(values: set[Any]) -> str:
    return " and ".join(sorted(map(str, values)))
