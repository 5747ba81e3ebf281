"""Options that several commands share, spelt and explained once."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore.errors import InputError, NotFoundError

if TYPE_CHECKING:
    from kvstore.api import OpenStore
    from kvstore.models import ModelSource
    from kvstore.store import Store

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", metavar="DIR", help="the store (default: $KVSTORE_STORE, else kv.zarr)")
    add_json(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def add_model(parser: argparse.ArgumentParser) -> None:
    """For commands that run a model."""
    parser.add_argument("--model", metavar="ID|PATH", help="the model (default: the one the store was built by, else the bundled one)")
    parser.add_argument("--device", metavar="NAME", help="where it runs, such as cpu or cuda:1 (default: cuda where there is one)")


def add_versions(parser: argparse.ArgumentParser, *, model: bool = True) -> None:
    """For a store that holds several; `model` is left out where --model loads one."""
    if model:
        parser.add_argument("--model", metavar="KEY", help="the model's key, its beginning, or its name")
    parser.add_argument("--template", metavar="KEY", help="the template's key or its beginning")
    parser.add_argument("--encoding", metavar="KEY", help="the encoding's key or its beginning")


def add_quality(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--tier", metavar="NAME", help="load this tier (default: the finest stored)")
    group.add_argument("--max-kl", metavar="NATS", type=float, help="the cheapest tier whose measured KL divergence is at most this")
    group.add_argument("--max-bytes", metavar="N", type=nbytes, help="the finest tier that reads at most so much, such as 300000 or 4M")
    group.add_argument("--deadline", metavar="SECONDS", type=float, help="the finest tier that decodes in this time")


def add_reuse(parser: argparse.ArgumentParser, default: str | None, otherwise: str) -> None:
    """How documents that stand elsewhere than they were built are used. `otherwise` says what is done where nothing is given."""
    from kvstore.reuse import NAMES

    parser.add_argument(
        "--reuse",
        choices=NAMES,
        default=default,
        help="prefix: the longest stored beginning, exact; approximate are blocks: documents stored alone, side by side, and with some of their "
        "tokens computed anew: epic (the first ones), cacheblend (those that changed most), query (those that the question attends to) "
        f"(default: {otherwise})",
    )
    parser.add_argument(
        "--recompute",
        metavar="N|SHARE",
        type=budget,
        help="how many tokens the last three compute anew: 16 of each document, or 0.15 of them all (default: 16 for epic, else 0.15)",
    )


def budget(text: str) -> int | float:
    """`16`: tokens a document; `0.15`: a share of them all."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of tokens (16) nor a share (0.15)") from None


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """What the transform codec is to learn."""
    parser.add_argument(
        "--metric",
        choices=("fisher", "attention", "identity"),
        default="fisher",
        help="how the cost of an error is learnt; only fisher needs backward passes (default: fisher)",
    )
    parser.add_argument("--tiers", metavar="N", type=int, choices=(1, 2, 3), default=3, help="nested tiers of quality, 1 to 3 (default: 3)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--target-kl", metavar="NATS", type=float, help="what the finest tier may lose, in nats a token (default: 0.0004)")
    group.add_argument("--target-ratio", metavar="X", type=float, help="or how many times smaller than 16 bits it is to be")


def calibration_of(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `calibrate` and `build`."""
    return {"metric": args.metric, "tiers": args.tiers, "target_kl": args.target_kl, "target_ratio": args.target_ratio}


def model_to_build(args: argparse.Namespace) -> ModelSource:
    """--model, else the model of an existing store, else the bundled one."""
    from kvstore.models import model_for
    from kvstore.store import Store

    try:
        store = Store(store_path(args)) if args.model is None else None
    except NotFoundError:
        store = None
    return model_for(store, args.model, dtype=args.dtype, device=args.device)


def quality_of(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `load`, `read` and `compose`."""
    return {"tier": args.tier, "max_kl": args.max_kl, "max_bytes": args.max_bytes, "deadline": args.deadline}


def nbytes(text: str) -> int:
    """`4096`, `300K`, `4MiB`; K is 1,024."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def store_path(args: argparse.Namespace) -> str:
    return args.store or os.environ.get("KVSTORE_STORE") or "kv.zarr"


def open_store(args: argparse.Namespace) -> Store:
    """The store alone, without torch. Raises NotFoundError, FormatError."""
    from kvstore.store import Store

    return Store(store_path(args))


def open_with_model(args: argparse.Namespace) -> OpenStore:
    """The store and, once something is computed, its model."""
    import kvstore

    given: dict[str, Any] = {name: getattr(args, name, None) for name in ("template", "encoding", "dtype", "device")}
    return kvstore.open(store_path(args), args.model, **given)


def versions_of(args: argparse.Namespace, store: Store) -> dict[str, str | None]:
    """Filters for rows. Raises NotFoundError where a key begins nothing in the store."""
    wanted = {"model": model_key(store, args.model), "template": args.template, "encoding": args.encoding}
    for name, value in wanted.items():
        known = sorted({getattr(r, name) for r in store.rows()})
        if value is not None and not any(k.startswith(value) for k in known):
            raise NotFoundError(f"no {name} {value!r} in {store.path}", remedy=f"there is {', '.join(k[:12] for k in known) or 'none'}")
    return wanted


def model_key(store: Store, given: str | None) -> str | None:
    """A model by its name or by what it was loaded from, else `given` as the beginning of a key."""
    if given is None:
        return None
    return next((r.model.key for r in store.models() if given in (r.model.name, r.provenance.get("source"))), given)


def text_file(path: str) -> str:
    """A file's text. Raises InputError where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}", remedy="check the path") from error
