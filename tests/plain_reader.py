"""A second reader of the format, written from `schemas/README.md` alone with nothing but the standard library, to prove that the page is enough.

Slow and without mercy for damaged input: `assert` stands for what a real reader refuses.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

from tests import plain_transform
from tests.plain_codecs import DECODERS, Header, Words, header

TAGS: dict[type, Callable[[Any], tuple[bytes, bytes]]] = {
    type(None): lambda v: (b"n", b""),
    bool: lambda v: (b"t", bytes([v])),
    int: lambda v: (b"i", b"%d" % v),
    str: lambda v: (b"s", v.encode()),
    bytes: lambda v: (b"b", v),
    list: lambda v: (b"l", b"".join(map(canonical, v))),
    dict: lambda v: (b"m", b"".join(canonical(k) + canonical(v[k]) for k in sorted(v))),
}


def canonical(value: Any) -> bytes:
    """Section 2."""
    tag, payload = TAGS[type(value)](value)
    return tag + struct.pack("<Q", len(payload)) + payload


def digest(domain: str, value: Any) -> str:
    return hashlib.sha256(canonical(domain) + canonical(value)).hexdigest()


def compact(value: Any) -> str:
    """Section 2, compact JSON."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{compact(k)}:{compact(value[k])}" for k in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(compact, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(ESCAPES.get(c) or (f"\\u{ord(c):04x}" if c < " " else c) for c in value) + '"'
    return compact_float(value) if isinstance(value, float) else json.dumps(value)


ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}


def compact_float(value: float) -> str:
    """The value is 0.d1d2... times ten to the k."""
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    text, minus = "".join(map(str, digits)), "-" * sign
    k = len(text) + int(exponent)
    if value == 0:
        return minus + "0.0"
    if not -5 < k <= 16:
        return minus + text[0] + ("." + text[1:] if text[1:] else "") + f"e{k - 1}"
    if k <= 0:
        return minus + "0." + "0" * -k + text
    return minus + text[:k].ljust(k, "0") + "." + (text[k:] or "0")


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@dataclass
class Row:
    """Section 5, `segments`."""

    key: str
    parent: str
    context: int
    position: int
    start: int
    tokens: int
    ranges: list[tuple[int, int, str]]


def parse_row(data: bytes, arrays: int) -> Row:
    """`arrays`: the tiers, and the recurrent state where there is one."""
    key, parent, context, position, start, tokens = struct.unpack_from("<32s32sIIQI", data)
    ranges = [struct.unpack_from("<QQ32s", data, 84 + 48 * t) for t in range(arrays)]
    assert len(data) == 84 + 48 * arrays
    return Row(key.hex(), parent.hex(), context, position, start, tokens, [(o, n, sha.hex()) for o, n, sha in ranges])


def state_values(tensors: list[Any], data: bytes) -> list[list[float]]:
    """Section 4, recurrent state."""
    found, at = [], 0
    for t in tensors:
        count, width = math.prod(t["shape"]), 4 if t["dtype"] == "float32" else 2
        part, at = data[at : at + count * width], at + count * width
        if t["dtype"] == "bfloat16":  # the upper half of a float32
            part = b"".join(b"\0\0" + part[i : i + 2] for i in range(0, len(part), 2))
        found.append(list(struct.unpack(f"<{count}{'e' if t['dtype'] == 'float16' else 'f'}", part)))
    assert at == len(data)
    return found


class PlainPack:
    """A pack folder."""

    def __init__(self, folder: Path):
        data = (folder / "zarr.json").read_bytes()
        assert hashlib.sha256(data).hexdigest() == folder.name
        self.folder, self.manifest = folder, json.loads(data)["attributes"]["kvstore"]
        self.layout, self.encoding = self.manifest["layout"], self.manifest["encoding"]
        self.tiers = self.encoding["tiers"]
        arrays = len(self.tiers) + bool(self.layout.get("state"))
        size = 84 + 48 * arrays
        table = (folder / "segments" / "c.0.0").read_bytes()
        self.rows = [parse_row(table[i : i + size], arrays) for i in range(0, len(table), size)]
        ids = gzip.decompress((folder / "tokens" / "c.0").read_bytes())
        self.slots = struct.unpack(f"<{len(ids) // 4}I", ids)
        self.channels = self.layout["kv_heads"] * self.layout["head_dim"]

    def ids(self, row: Row) -> list[int]:
        return list(self.slots[row.start : row.start + row.tokens])

    def records(self, row: Row, tier: int) -> list[list[bytes]]:
        """[group][block], every checksum compared."""
        shard = (self.folder / self.tiers[tier]["array"] / "c.0.0.0.0").read_bytes()
        offset, size, sha = row.ranges[tier]
        assert hashlib.sha256(shard[offset : offset + size]).hexdigest() == sha
        block, groups = self.encoding["block_tokens"], -(-self.layout["layers"] // self.encoding["group_layers"])
        blocks = self.manifest["slots"] // block
        index = shard[-(groups * blocks * 16 + 4) : -4]
        assert struct.pack("<I", crc32c(index)) == shard[-4:]
        mine = range(row.start // block, row.start // block + -(-row.tokens // block))
        places = [[struct.unpack_from("<QQ", index, 16 * (g * blocks + b)) for b in mine] for g in range(groups)]
        units = [[shard[o : o + n] for o, n in group] for group in places]
        assert all(struct.pack("<I", crc32c(u[:-4])) == u[-4:] for group in units for u in group)
        return [[u[:-4] for u in group] for group in units]

    def state(self, row: Row) -> list[list[float]]:
        """The recurrent tensors at a segment's end, each flat."""
        shard, (offset, size, sha) = (self.folder / "state" / "c.0.0").read_bytes(), row.ranges[-1]
        unit, index = shard[offset : offset + size], shard[-(16 * len(self.rows) + 4) : -4]
        assert hashlib.sha256(unit).hexdigest() == sha and struct.pack("<I", crc32c(unit[:-4])) == unit[-4:]
        assert struct.pack("<I", crc32c(index)) == shard[-4:]
        assert struct.unpack_from("<QQ", index, 16 * self.rows.index(row)) == (offset, size)
        return state_values(self.layout["state"], unit[:-4])

    def decode(self, row: Row, name: str) -> list[Any]:
        """Values [layers, 2, tokens, channels] in C order: whole numbers (bit patterns) or floats."""
        tier = next(t for t in self.tiers if t["name"] == name)
        chain = [i for i, t in enumerate(self.tiers) if t["name"] in (*tier["requires"], name)]
        codec = next(c for c in self.encoding["codecs"] if c["name"] == tier["codec"])
        learned = PlainCalibration.of(self, codec)
        stored = [self.records(row, i) for i in chain]
        out: list[Any] = [None] * (self.layout["layers"] * 2 * row.tokens * self.channels)
        for g in range(len(stored[0])):
            for b in range(len(stored[0][0])):
                unit, dropped = undropped([s[g][b] for s in stored], codec["params"])
                values = self._values(unit, codec, learned)
                for i, value in dropped:
                    values[i] = value
                self._place(values, header(unit[0]), row.tokens, g, b, out)
        return out

    def _values(self, unit: list[bytes], codec: Any, learned: list[plain_transform.Calibrated]) -> list[Any]:
        """[layers, 2, tokens, channels] of a unit."""
        if codec["name"] != "transform":
            return DECODERS[codec["name"]](unit, codec["params"], self.layout["dtype"])
        rows = plain_transform.values(unit, learned, self.layout["dtype"])
        return [v for first in range(0, len(rows[0]), self.channels) for row in rows for v in row[first : first + self.channels]]

    def _place(self, values: list[Any], head: Header, tokens: int, g: int, b: int, out: list[Any]) -> None:
        width, first = head.tokens * self.channels, b * self.encoding["block_tokens"]
        for plane in range(2 * head.layers):
            at = ((2 * g * self.encoding["group_layers"] + plane) * tokens + first) * self.channels
            out[at : at + width] = values[plane * width : (plane + 1) * width]


def undropped(unit: list[bytes], params: Any) -> tuple[list[bytes], list[tuple[int, float]]]:
    """Section 6.7: the codec's own records, and the places of dropped values with what stands there."""
    if "rest=drop" not in params.get("policy", "").replace(":", ",").split(","):
        return unit, []
    h, words = header(unit[0]), Words(unit[0])
    heads, per_head = words.take("<HH")
    words.take(f"<{h.layers * heads}B")
    each, width = -(-h.tokens // 32), h.channels // heads
    masks = [words.take(f"<{each}I") for _ in range(h.layers * heads if per_head else 1)]
    gone = [(plane, t, head) for plane in range(2 * h.layers) for t in range(h.tokens) for head in range(heads)
            if masks[plane // 2 * heads + head if per_head else 0][t // 32] >> t % 32 & 1]  # fmt: skip
    places = [((plane * h.tokens + t) * h.channels + head * width, (float("nan"), 0.0)[plane % 2]) for plane, t, head in gone]
    return [unit[0][:12] + unit[0][words.at :], *unit[1:]], [(first + c, value) for first, value in places for c in range(width)]


class PlainCalibration:
    """A calibration folder: section 7.1. Every array flat, in C order."""

    FORMATS: ClassVar[dict[str, str]] = {"float32": "f", "float16": "e", "uint16": "H", "uint8": "B"}

    def __init__(self, folder: Path):
        data = (folder / "zarr.json").read_bytes()
        assert hashlib.sha256(data).hexdigest() == folder.name
        self.folder, self.record = folder, json.loads(data)["attributes"]["kvstore"]
        for name, entry in self.record["files"].items():
            content = (folder / name).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])

    @classmethod
    def of(cls, pack: PlainPack, codec: Any) -> list[plain_transform.Calibrated]:
        """What a codec of a pack needs, group by group; nothing where it names no calibration."""
        if codec["calibration"] is None:
            return []
        mine = cls(pack.folder.parents[1] / "calibrations" / codec["calibration"])
        return [mine.calibrated(g) for g in range(len(mine.record["ranks"]))]

    def calibrated(self, group: int) -> plain_transform.Calibrated:
        r, weights, thirds = self.record, self.array("weights")[1], self.array("thirds")[1]
        tables = [weights[i : i + 128] for i in range(0, len(weights), 128)], [thirds[i : i + 3] for i in range(0, len(thirds), 3)]
        classes = self.array(f"g{group}/classes")[1]
        return plain_transform.Calibrated(classes, *tables, r["tiers"], r["least"], r["step"], r["shrink"], self.mean(group), self.synthesis(group))

    def array(self, name: str) -> tuple[list[int], list[Any]]:
        """Shape and values."""
        metadata = json.loads((self.folder / name / "zarr.json").read_text())
        shape, kind = metadata["shape"], self.FORMATS[metadata["data_type"]]
        data = (self.folder / name / ".".join(["c", *"0" * len(shape)])).read_bytes()
        return shape, list(struct.unpack(f"<{len(data) // struct.calcsize(kind)}{kind}", data))

    def synthesis(self, group: int) -> list[list[float]]:
        """Rows of B."""
        (rank, dim), rows = self.array(f"g{group}/rows")
        return [[rows[k * dim + i] * scale for i in range(dim)] for k, scale in zip(range(rank), self.array(f"g{group}/scale")[1], strict=True)]

    def mean(self, group: int) -> list[float]:
        size = 2 * self.record["kv_heads"] * self.record["head_dim"] * self.record["group_layers"]
        return self.array("mean")[1][group * size : (group + 1) * size]
