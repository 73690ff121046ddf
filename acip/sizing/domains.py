"""The domains in a row of a trade-off curve: kinds of text on which its size was compared with the base model.

    row["domains"] = {"code": {"kl_nats": 0.31, "same_top_share": 0.81, "ppl": 6.2, "base_ppl": 5.1, "windows": 8, "tokens": 2048}, ...}

The text of the curve is one of them. Rows of artifacts from before this field do not have it.
"""

import math
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

DOMAINS = "domains"


class WorstDomain(NamedTuple):
    """The domain on which a size differs most from its base model."""

    name: str
    kl: float  # nats per token
    mean_kl: float  # over all domains
    own: str  # domain of the curve's text
    times: float | None  # kl relative to that on the curve's text; None if that is 0 or was not measured


def domain_name(source: str) -> str:
    """Return the name of the domain of a source of text: `code` of `package:code`, the last part of a path."""
    return re.sub(r"[^\w.-]+", "_", PurePath(source.removeprefix("package:")).name)  # a part of the names of metrics


def worst_domain(row: Mapping[str, Any]) -> WorstDomain | None:
    """Return the domain with the highest KL divergence in a row of a curve; None if none was measured, or all are 0."""
    domains = row.get(DOMAINS)
    kl = {name: values.get("kl_nats") for name, values in domains.items()} if isinstance(domains, dict) else {}
    kl = {name: value for name, value in kl.items() if isinstance(value, int | float) and math.isfinite(value)}
    if not kl or not any(kl.values()):
        return None
    name, own = max(kl, key=kl.__getitem__), domain_name(str(row.get("corpus", "")))
    return WorstDomain(name, kl[name], math.fsum(kl.values()) / len(kl), own, kl[name] / kl[own] if kl.get(own) else None)
