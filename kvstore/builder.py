"""Compile a corpus: read, plan, prefill what is missing, encode, pack, commit."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kvstore import documents as reading
from kvstore.build_job import Job
from kvstore.build_report import LIMITS, BuildReport, Limits, Progress
from kvstore.calibration.learn import Choices
from kvstore.calibration.record import Metric
from kvstore.calibrator import Corpus
from kvstore.certify import DOCUMENTS, Certifier, CertifyRule
from kvstore.chain_plan import Log, read_chains
from kvstore.errors import InputError
from kvstore.models import ModelSource
from kvstore.passages import LongRule
from kvstore.plan import RegimeChoice, Rules
from kvstore.policies import parse as parse_policy
from kvstore.records import create
from kvstore.store import Store


def build(
    documents: Any,
    store: str | Path = "kv.zarr",
    model: Any = None,
    tokenizer: Any = None,
    *,
    template: str = "auto",
    system: str | None = None,
    regime: RegimeChoice = "prefix",
    passage_tokens: int | None = None,
    long: LongRule = "split",
    codec: str = "transform",
    policy: str = "uniform",
    lossless: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    include: Sequence[str] | None = None,
    strict: bool = False,
    dry_run: bool = False,
    reserve: int | None = None,
    chains: Log | None = None,
    chain_budget: int | None = None,
    certify: CertifyRule = "sample",
    certify_documents: int = DOCUMENTS,
    recalibrate: bool = False,
    metric: Metric = "fisher",
    tiers: int = 3,
    target_kl: float | None = None,
    target_ratio: float | None = None,
    progress: Progress | None = None,
    limits: Limits = LIMITS,
    batch_tokens: int | None = None,
) -> BuildReport:
    """Compile `documents` into `store` and commit a snapshot; what is stored already is not computed again.

    `documents`: paths of folders and files, or any iterable of Document, dict, str or retriever objects. `model`: a path, a hub id or a loaded
    model with its `tokenizer`; None is the bundled model. `certify`: what each lossy tier loses is measured on a sample of `certify_documents` new
    documents, on `all`, or on `none`; documents that the codec was calibrated on are left out. `progress` is called with the report so far and
    the source at hand. The codec `transform` learns from the documents where the store has no calibration for the model, or anew with
    `recalibrate`: by `metric`, in `tiers`, so that the finest tier loses `target_kl` nats a token (4e-4 by default) or is `target_ratio` times
    smaller than 16 bits.
    `chains`: a query log (JSONL, or objects {"documents": [...], "count": 1}). The beginnings of its document lists that were asked for most, at
    least twice, are stored as chains: each document after those before it, in at most `chain_budget` tokens (by default as many as the documents
    have). They take the place of the chains of earlier logs; without a log those stay whose documents are as they were.
    `batch_tokens`: segments of like length are prefilled together, padding included in so many tokens, and on a GPU encoded while the next
    ones are prefilled; K and V then equal a live prefix up to rounding. 0: one by one, as a live prefix is. By default 16,384 on a GPU and 0 on
    the CPU.
    `policy`: which tokens get finer or coarser steps, or are dropped, such as `h2o` or `kvzip:budget=30,rest=drop` (kvstore.policies).
    Raises InputError for what cannot be read, IncompatibleError for a model whose cache kvstore cannot explain or whose identity clashes.
    """
    started = time.perf_counter()
    source = model if isinstance(model, ModelSource) else ModelSource(model, tokenizer, dtype=dtype, device=device)
    wanted = Choices(metric, tiers=tiers, target_kl=target_kl, target_ratio=target_ratio)
    wanted.check()
    if batch_tokens is not None and batch_tokens < 0:
        raise InputError(f"batches of {batch_tokens} tokens", remedy="give 0 (no batches) or more")
    chosen = parse_policy(policy)
    corpus = Corpus(documents, include, strict)
    log = None if chains is None else read_chains(chains, chain_budget)  # before anything is compiled
    with ExitStack() as scratch:
        job = Job(_opened(store, dry_run, scratch), source, progress, limits, dry_run)
        job.report.store, job.roots = str(store), reading.roots_of(documents)
        room = source.context_tokens
        rules = Rules(regime, passage_tokens, long, room, reserve if reserve is not None else min(512, room // 4))
        job.policy, job.batch_tokens = chosen, batch_tokens
        job.prepare(template, system, codec, lossless, rules, lambda renderer: job.calibrated(renderer, corpus, wanted, recalibrate))
        job.certifier = Certifier(source.identity, job.planner.layout, job.encoding, "none" if dry_run else certify, certify_documents)
        job.chains = log
        job.run(corpus, strict)
    job.report.seconds["total"] = time.perf_counter() - started
    return job.report


def _opened(store: str | Path, dry_run: bool, scratch: ExitStack) -> Store:
    """The store, made where it is missing; a dry run makes it elsewhere, so that nothing appears."""
    if dry_run and not Path(store).exists():
        store = Path(scratch.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-dry-run-"))) / Path(store).name
    create(store)
    return Store(store)
