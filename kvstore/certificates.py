"""Quality reports: what a sample of stored artifacts loses at each tier, measured at build. Torch-free; design sections 2 and 4.

`.kvstore/quality/<encoding id>/<number>.json`, made once and never changed. Several reports of one encoding are read together.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from kvstore.digest import digest
from kvstore.errors import IntegrityError, NotFoundError
from kvstore.manifest import FORMAT, Digest, Positive, Strict, Tier, parse
from kvstore.storage.local import LocalStorage

FOLDER = ".kvstore/quality"
INTERVAL = "t, one-sided, by document"
_FILE = re.compile(r"[0-9]{6}\.json")
_LAST = 999_999
Nats = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Name = Annotated[str, Meta(min_length=1)]
Source = Literal["exact", "artifact", "report"]


class TierScore(Strict, frozen=True):
    """One artifact at one tier. `kl`, `p99` and `max`: mean, 99th percentile and largest KL(live || stored) of its tokens, nats; `agreement`: share
    of tokens after which both hold the same token for the likeliest; `change`: mean log-likelihood of the text's own tokens, stored less live."""

    tier: Name
    kl: Nats
    p99: Nats
    max: Nats
    agreement: Share
    change: float


class ArtifactScore(Strict, frozen=True):
    """A sampled artifact, `document` being the digest of its document's text. `tokens` were scored; `noise` is KL(live || live in other pieces)."""

    artifact: Digest
    document: Digest
    tokens: Positive
    noise: Nats
    tiers: Annotated[tuple[TierScore, ...], Meta(min_length=1)]


class TierQuality(Strict, frozen=True):
    """A tier over all sampled artifacts, by token. `upper` is the upper end of a 95 % interval of `kl` by document, None for a single document."""

    tier: Name
    documents: Positive
    tokens: Positive
    kl: Nats
    p99: Nats
    max: Nats
    upper: Nats | None
    agreement: Share
    change: float
    noise: Nats


class QualityReport(Strict, frozen=True):
    """One file. Exact tiers are not in it: they lose nothing. `digest` covers all other fields."""

    format: int
    kind: Literal["quality"]
    model: Digest
    encoding: Digest
    created: str
    interval: str
    tiers: Annotated[tuple[TierQuality, ...], Meta(min_length=1)]
    artifacts: Annotated[tuple[ArtifactScore, ...], Meta(min_length=1)]
    provenance: dict[str, str]
    digest: Digest = ""

    def own_digest(self) -> str:
        body = {k: v for k, v in msgspec.to_builtins(self).items() if k != "digest"}
        return digest("kvstore/quality/1", msgspec.json.encode(body, order="deterministic"))


class Known(NamedTuple):
    """A KL in nats a token, and whether it holds by nature, was measured on the artifact, or is the upper bound of the encoding's reports."""

    kl: float | None
    source: Source | None


def worst(known: Sequence[Known]) -> Known:
    """What holds for all of them: unknown where one is."""
    return max(known, key=lambda k: math.inf if k.kl is None else k.kl, default=Known(None, None))


@dataclass(frozen=True)
class Certified:
    """All reports of one encoding: of an artifact that was sampled twice, the latest score counts. Empty where nothing was measured."""

    tiers: Mapping[str, TierQuality] = field(default_factory=dict)
    artifacts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def known(self, artifact: str, tier: Tier) -> Known:
        """What is known of an artifact (id) at a tier."""
        if tier.exact:
            return Known(0.0, "exact")
        if (own := self.artifacts.get(artifact, {}).get(tier.name)) is not None:
            return Known(own, "artifact")
        bound = self.tiers[tier.name].upper if tier.name in self.tiers else None
        return Known(bound, None if bound is None else "report")


def make_report(model: str, encoding: str, artifacts: Sequence[ArtifactScore], p99: Mapping[str, float], provenance: dict[str, str]) -> QualityReport:
    """A report with its aggregates; `p99` is by tier, over the tokens of all artifacts together."""
    tiers = tuple(aggregate(t.tier, artifacts, p99[t.tier]) for t in artifacts[0].tiers)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    draft = QualityReport(FORMAT, "quality", model, encoding, now, INTERVAL, tiers, tuple(artifacts), provenance)
    return msgspec.structs.replace(draft, digest=draft.own_digest())


def aggregate(tier: str, artifacts: Iterable[ArtifactScore], p99: float) -> TierQuality:
    """One tier over artifacts, all weighted by their tokens."""
    scored = [(a, s) for a in artifacts for s in a.tiers if s.tier == tier]
    tokens = np.asarray([a.tokens for a, _ in scored], float)
    documents = [a.document for a, _ in scored]

    def mean(values: Iterable[float]) -> float:
        return float(np.dot(tokens, list(values)) / tokens.sum())

    kl = mean(s.kl for _, s in scored)
    return TierQuality(
        tier,
        len(set(documents)),
        int(tokens.sum()),
        kl,
        p99,
        max(s.max for _, s in scored),
        upper_bound(documents, tokens.tolist(), [s.kl for _, s in scored]),
        min(1.0, mean(s.agreement for _, s in scored)),
        mean(s.change for _, s in scored),
        mean(a.noise for a, _ in scored),
    )


def upper_bound(documents: Sequence[str], tokens: Sequence[float], kls: Sequence[float]) -> float | None:
    """Upper end of the one-sided 95 % t-interval of the mean by token, documents being what was drawn at random; None for one document."""
    weight, total = dict.fromkeys(documents, 0.0), dict.fromkeys(documents, 0.0)
    for name, n, kl in zip(documents, tokens, kls, strict=True):
        weight[name] += n
        total[name] += n * kl
    n, mean = len(weight), sum(total.values()) / sum(weight.values())
    if n < 2:
        return None
    squares = sum((total[d] - mean * weight[d]) ** 2 for d in weight)  # of the ratio estimator's residuals
    return mean + t95(n - 1) * math.sqrt(n / (n - 1) * squares) / sum(weight.values())


def t95(freedom: int) -> float:
    """95th percentile of Student's t. From 5 degrees of freedom on by its expansion in 1 / freedom (Abramowitz and Stegun 26.7.5), to 0.001."""
    if freedom < 5:
        return (6.3138, 2.9200, 2.3534, 2.1318)[freedom - 1]
    z = 1.6448536269514722
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


def merge(reports: Sequence[QualityReport]) -> Certified:
    """Reports of one encoding, oldest first. The 99th percentile of several is the largest one, which theirs together cannot exceed."""
    latest = {a.artifact: a for r in reports for a in r.artifacts}
    p99: dict[str, float] = {}
    for t in (t for r in reports for t in r.tiers):
        p99[t.tier] = max(t.p99, p99.get(t.tier, 0.0))
    named = {s.tier for a in latest.values() for s in a.tiers}
    tiers = {name: aggregate(name, latest.values(), p99.get(name, 0.0)) for name in sorted(named)}
    return Certified(tiers, {k: {s.tier: s.kl for s in a.tiers} for k, a in latest.items()})


def report_names(storage: LocalStorage, encoding: str) -> list[str]:
    """Files of one encoding's reports, oldest first."""
    folder = f"{FOLDER}/{encoding}"
    return [f"{folder}/{n}" for n in storage.names(folder) if _FILE.fullmatch(n)]


def read_report(storage: LocalStorage, name: str) -> QualityReport:
    """One file, compared with its digest and its folder's name. Raises NotFoundError, FormatError, IntegrityError."""
    report = parse(storage.read(name), QualityReport, name)
    if report.digest != report.own_digest() or report.encoding != name.split("/")[-2]:
        raise IntegrityError(f"{name} does not match its digest", remedy="remove it: what it measured counts as unmeasured then")
    return report


def read_reports(storage: LocalStorage, encoding: str) -> list[QualityReport]:
    """All that are there, oldest first. Raises FormatError, IntegrityError."""
    found = []
    for name in report_names(storage, encoding):
        try:
            found.append(read_report(storage, name))
        except NotFoundError:  # collected meanwhile
            continue
    return found


def add_report(storage: LocalStorage, report: QualityReport) -> str:
    """Keep a report under the next free number; durable when this returns. Its file's name."""
    data = msgspec.json.encode(report, order="deterministic")
    last = max((int(n[-11:-5]) for n in report_names(storage, report.encoding)), default=0)
    for number in range(last + 1, _LAST + 1):
        if storage.create(name := f"{FOLDER}/{report.encoding}/{number:06d}.json", data):
            return name
    raise IntegrityError(f"{FOLDER}/{report.encoding} is full", remedy="remove the files in it: artifacts count as unmeasured then")
