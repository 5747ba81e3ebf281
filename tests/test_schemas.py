"""JSON Schemas, the types that parse, and the examples: three statements of one format that must agree."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from kvstore import manifest
from kvstore.calibration.record import CalibrationRecord
from kvstore.calibration.shelf import Current
from kvstore.certificates import QualityReport
from kvstore.errors import FormatError, IntegrityError
from kvstore.manifest import ModelRecord, PackManifest, Snapshot, StoreRecord, TemplateRecord, parse, parse_group
from kvstore.tags import Tag

FOLDER = Path(__file__).parents[1] / "schemas"
SCHEMAS = {p.name.removesuffix(".schema.json"): json.loads(p.read_text(encoding="utf-8")) for p in FOLDER.glob("*.schema.json")}
REGISTRY: Registry[Any] = Registry().with_resources([(s["$id"], Resource.from_contents(s)) for s in SCHEMAS.values()])
GROUPS: dict[str, type[msgspec.Struct]] = {"store": StoreRecord, "pack": PackManifest, "model": ModelRecord, "calibration": CalibrationRecord}
FILES: dict[str, type[msgspec.Struct]] = {"template": TemplateRecord, "snapshot": Snapshot, "tag": Tag, "quality": QualityReport, "current": Current}
VALID, INVALID = (sorted((FOLDER / "examples" / kind).glob("*.json")) for kind in ("valid", "invalid"))


def kind_of(path: Path) -> str:
    """`pack.wrong-format.json` is an example of `pack`."""
    return path.name.split(".")[0]


def accepts_schema(kind: str, value: Any) -> bool:
    return bool(Draft202012Validator(SCHEMAS[kind], registry=REGISTRY).is_valid(value))


def accepts_parser(kind: str, value: Any) -> bool:
    data = json.dumps(value).encode()
    try:
        if kind in GROUPS:
            parse_group(data, GROUPS[kind], kind)
        else:
            parse(data, FILES[kind], kind)
    except FormatError:
        return False
    return True


def types(found: type[msgspec.Struct]) -> dict[str, dict[str, Any]]:
    """Every struct in a record's type, by name, as msgspec describes it."""
    described: dict[str, dict[str, Any]] = msgspec.json.schema(found)["$defs"]
    return described


def definitions() -> dict[str, dict[str, Any]]:
    return {name: d for s in SCHEMAS.values() for name, d in s.get("$defs", {}).items()}


def test_there_are_examples_of_every_kind() -> None:
    kinds = {*GROUPS, *FILES, "tier"}
    assert {kind_of(p) for p in VALID} == {kind_of(p) for p in INVALID} == kinds == SCHEMAS.keys() - {"common"}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS.keys())
def test_schema_is_one(schema: dict[str, Any]) -> None:
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"].endswith("2020-12/schema")


@pytest.mark.parametrize("struct", [*GROUPS.values(), *FILES.values()], ids=lambda s: s.__name__)
def test_fields_and_required_fields_equal_the_types(struct: type[msgspec.Struct]) -> None:
    ours = definitions()
    for name, described in types(struct).items():
        assert set(ours[name]["properties"]) == set(described["properties"]), name
        assert set(ours[name]["required"]) == set(described["required"]), name
        assert ours[name]["additionalProperties"] is False is described["additionalProperties"], name


def test_every_object_is_closed() -> None:
    """Only maps whose keys are data take any key."""
    open_maps = {"config", "metadata", "params", "files", "provenance", "Provenance"}
    found = {name for s in SCHEMAS.values() for name, node in objects("", s) if node.get("additionalProperties") is not False}
    assert found <= open_maps


def objects(name: str, node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if node.get("type") == "object":
            yield name, node
        for key, child in node.items():
            if key != "const":
                yield from objects(key, child)
    elif isinstance(node, list):
        for child in node:
            yield from objects(name, child)


@pytest.mark.parametrize("path", VALID, ids=lambda p: p.name)
def test_valid_example(path: Path) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    Draft202012Validator(SCHEMAS[kind_of(path)], registry=REGISTRY).validate(value)
    assert kind_of(path) == "tier" or accepts_parser(kind_of(path), value)


@pytest.mark.parametrize("path", INVALID, ids=lambda p: p.name)
def test_invalid_example(path: Path) -> None:
    """Each has the one defect that its name says."""
    value = json.loads(path.read_text(encoding="utf-8"))
    errors = list(Draft202012Validator(SCHEMAS[kind_of(path)], registry=REGISTRY).iter_errors(value))
    assert len(errors) == 1, errors
    assert kind_of(path) == "tier" or not accepts_parser(kind_of(path), value)


def mutants(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(where, replacement) for every node: other types, signs, sizes and lengths."""
    if isinstance(value, dict):
        yield (*at, "unknown-field"), 1
        for key, child in value.items():
            yield (*at, key), ...
            yield from mutants(child, (*at, key))
    elif isinstance(value, list):
        for i, child in enumerate(value[:3]):
            yield from mutants(child, (*at, i))
    if at:
        others: tuple[Any, ...] = (None, True, "text", "", "0" * 64 + "\n", -1, 0, 2**53, 1.5, [], {}, [[]])
        yield from ((at, other) for other in others)
        if isinstance(value, str):
            yield from ((at, other) for other in (value + "\n", value.upper() + "G", value[:-1], f"../{value}"))


def mutated(value: Any, at: tuple[Any, ...], replacement: Any) -> Any:
    whole = copy.deepcopy(value)
    node = whole
    for step in at[:-1]:
        node = node[step]
    if replacement is ...:
        del node[at[-1]]
    else:
        node[at[-1]] = replacement
    return whole


@pytest.mark.parametrize("path", [p for p in VALID if kind_of(p) != "tier"], ids=lambda p: p.name)
def test_schema_and_parser_agree_on_every_small_change(path: Path) -> None:
    value, refused = json.loads(path.read_text(encoding="utf-8")), 0
    for at, replacement in mutants(value):
        changed = mutated(value, at, replacement)
        verdicts = accepts_schema(kind_of(path), changed), accepts_parser(kind_of(path), changed)
        assert verdicts[0] == verdicts[1], (at, replacement, verdicts)
        refused += not verdicts[0]
    assert refused > 10


def test_format_is_looked_at_first() -> None:
    with pytest.raises(FormatError, match="format 2, this kvstore reads format 1"):
        parse(b'{"format": 2, "anything": "else"}', Snapshot, "x")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b"null", b"[1]", b'"format"'])
def test_what_is_not_json_is_refused(data: bytes) -> None:
    with pytest.raises((FormatError, IntegrityError)):
        parse(data, Snapshot, "x")
    with pytest.raises(FormatError):
        parse_group(data, StoreRecord, "x")


def test_written_records_have_every_field() -> None:
    """Records omit no default, so that their digests cover all of them."""
    passage = msgspec.to_builtins(manifest.Passage(1))
    assert passage == {"tokens": 1, "prefix": None, "isolated": None}
