"""The one formatter of pydantic's errors, and the JSON schemas that editors read, against a validator written here."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import pytest
import yaml

from kvlab.capacity.config import CapacityConfig, ServingMemory
from kvlab.compose import CAPACITY, GENERATE, RUN, compose_capacity, configs_dir
from kvlab.compression import COMPRESSIONS
from kvlab.config import SECTIONS, GenerateConfig
from kvlab.lab.schemas import all_schemas, write_schemas
from kvlab.memory.layout import MemoryConfig
from kvlab.mixers import MIXERS
from kvlab.registry import Registry, registered
from kvlab.schema import (
    ConfigError,
    Schema,
    added,
    choice,
    identity,
    integer,
    real,
    reals,
    to_plain,
    validated,
    with_added,
)
from kvlab.selection import SELECTIONS
from kvlab.tasks import TASKS


@dataclass(frozen=True)
class Inner(Schema):
    """A section within one."""

    rate: float = real(0.5, 0.0, 1.0, open_low=True)
    kind: str = choice("a", ("a", "b"))


@dataclass(frozen=True)
class Outer(Schema):
    """A section with sections, one of which has any name."""

    count: int = integer(3, 1, 9)
    inner: Inner = dataclasses.field(default_factory=Inner)
    named: dict[str, Inner] = dataclasses.field(default_factory=dict)
    rates: tuple[float, ...] = reals((1, 2), 0.0, 5.0)

    def cross_check(self) -> None:
        if self.count == 7:
            raise ConfigError("count", 7, "must not be seven")


class Line(TypedDict):
    """What is read back from a file."""

    name: str
    size: int


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"count": 0}, "top.count = 0: must be an integer in [1, 9]"),
        ({"count": 7}, "top.count = 7: must not be seven"),
        ({"inner": {"rate": 0}}, "top.inner.rate = 0: must be a finite number in (0, 1]"),
        ({"inner": {"kind": "c"}}, "top.inner.kind = 'c': must be one of a, b"),
        ({"inner": {"kin": "a"}}, "top.inner.kin = 'a': no such field; did you mean kind? legal: kind, rate"),
        ({"inner": 3}, "top.inner = 3: must be a mapping of its fields: rate, kind"),
        ({"named": {"x": {"rate": 2}}}, "top.named.x.rate = 2: must be a finite number in (0, 1]"),
        ({"named": {"x": {"rat": 2}}}, "top.named.x.rat = 2: no such field; did you mean rate? legal: kind, rate"),
        ({"rates": [1, 9]}, "top.rates = [1, 9]: must be a list, each a finite number in [0, 5]"),
        ({"count": 0, "cuont": 1}, "top.cuont = 1: no such field; did you mean count?"),
        ([], "top = []: must be a mapping of its fields: count, inner, named, rates"),
    ],
)
def test_an_error_names_field_value_and_legal_range(values, sentence):
    with pytest.raises(ConfigError) as caught:
        Outer.build(values, "top")
    assert str(caught.value).startswith(sentence)


def test_rows_read_back_are_answered_alike():
    assert validated(Line, {"name": "a", "size": 3}) == {"name": "a", "size": 3}
    with pytest.raises(ConfigError, match=r"row\.size = None: is missing"):
        validated(Line, {"name": "a"}, "row")
    with pytest.raises(ConfigError, match=r"row\.size = 'x': must be an integer"):
        validated(Line, {"name": "a", "size": "x"}, "row")


def test_by_hand_positionally_and_by_replacement_the_same_checks_hold():
    assert Outer(4).count == 4
    assert dataclasses.replace(Outer(4), count=5) == Outer(count=5)
    assert Outer(rates=[1, 2]).rates == (1.0, 2.0)
    for make in (lambda: Outer(0), lambda: dataclasses.replace(Outer(), count=0), lambda: Outer(named={"x": 1})):
        with pytest.raises(ConfigError, match="must be"):
            make()
    with pytest.raises(TypeError, match="takes each of its fields once"):
        Outer(4, count=4)


def test_long_values_are_cut():
    with pytest.raises(ConfigError) as caught:
        Outer.build({"count": "x" * 10_000})
    assert len(str(caught.value)) < 300
    assert "xxx...: must be an integer" in str(caught.value)


@dataclass(frozen=True)
class Younger(Inner):
    """A section with fields that older runs did not know."""

    since: int | None = added(integer(None, 1, 9, optional=True))
    size: int = added(integer(4, 1, 9))


def test_an_added_field_is_part_of_an_identity_only_where_it_says_something():
    values = [1, Younger(), {"x": Younger(size=5), "y": [Younger(since=4, rate=0.1)]}]
    old = {"rate": 0.5, "kind": "a"}
    assert identity(values) == [1, old, {"x": {**old, "size": 5}, "y": [{"rate": 0.1, "kind": "a", "since": 4}]}]
    assert to_plain(values[1]) == {**old, "since": None, "size": 4}
    with pytest.raises(ConfigError, match=r"size = 10: must be an integer in \[1, 9\]"):
        Younger(size=10)


@dataclass(frozen=True)
class Beside(Inner):
    """A section with a field that changes no result."""

    threads: int = added(integer(4, 1, 9), aside=True)


def test_a_field_aside_is_never_part_of_an_identity_and_older_runs_lack_it():
    old = {"rate": 0.5, "kind": "a"}
    for threads in (4, 5):
        section = Beside(threads=threads)
        assert identity(section) == old
        assert to_plain(section) == {**old, "threads": threads}
    assert with_added(Beside, old) == {**old, "threads": 4}


YOUNG = Registry("kvlab.nothing", Younger, {"young": Younger})


@dataclass(frozen=True)
class Chooses(Schema):
    """A section with a choice of a registry."""

    rate: float = real(0.5, 0.0, 1.0)
    chosen: Younger | None = added(registered(YOUNG, "a kind"))  # noqa: RUF009


def test_a_section_from_before_a_field_was_added_gets_its_default():
    assert with_added(Chooses, {"rate": 0.1}) == {"rate": 0.1, "chosen": None}
    inner = {"type": "young", "rate": 0.2, "size": 5}
    assert with_added(Chooses, {"chosen": inner}) == {"chosen": {**inner, "since": None}}
    assert with_added(Chooses, {"chosen": {"type": "gone"}}) == {"chosen": {"type": "gone"}}


SECTION_KINDS = [
    *SECTIONS.values(),
    *(kind.Config for kind in {**MIXERS, **TASKS}.values()),
    GenerateConfig,
    MemoryConfig,
]


@pytest.mark.parametrize("kind", SECTION_KINDS, ids=lambda kind: kind.__name__)
def test_declared_defaults_are_those_of_a_section_made(kind):
    """Identities are hashes of plain values: 0 is not 0.0."""
    assert json.dumps(kind.defaults()) == json.dumps(to_plain(kind()))


def leaves(node, path=()):
    if isinstance(node, dict) and node:
        for name, inner in node.items():
            yield from leaves(inner, (*path, name))
    else:
        yield path


@pytest.mark.parametrize(
    "config", [compose_capacity(["workload=sharegpt"]), GenerateConfig()], ids=["capacity", "generate"]
)
def test_every_field_refuses_wrong_types(config):
    """No leaf takes a wrong type for another: each wrong value is refused by its name, or legal as it is."""
    refused = 0
    for path in leaves(to_plain(config)):
        for wrong in ("maybe", "yes", "1", ["x"], {"x": 1}, float("nan"), -(10**12), True):
            values = to_plain(config)
            node = values
            for name in path[:-1]:
                node = node[name]
            node[path[-1]] = wrong
            try:
                made = to_plain(type(config).build(values))
            except ConfigError as error:
                refused += error.name.startswith(path[0])
                continue
            for name in path:
                made = made[name]
            assert json.dumps(made) == json.dumps(wrong), f"{path} = {wrong!r} became {made!r}"
    assert refused > 60


def matches(node, value, whole):
    """Whether a JSON schema allows a value: the words of the standard that ours use."""
    if "$ref" in node:
        return matches(whole["$defs"][node["$ref"].rsplit("/", 1)[-1]], value, whole)
    if "anyOf" in node and not any(matches(option, value, whole) for option in node["anyOf"]):
        return False
    if value not in node.get("enum", [value]) or value != node.get("const", value):
        return False
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": int | float, "boolean": bool}
    kind = node.get("type")
    if isinstance(kind, list):
        return any(matches(node | {"type": each}, value, whole) for each in kind)
    if kind == "null":
        return value is None
    if kind and (not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return False
    if isinstance(value, dict):
        rest = node.get("additionalProperties", True)
        inner = {name: node.get("properties", {}).get(name, rest) for name in value}
        return all(
            matches(inner[name], value[name], whole) if inner[name] not in (True, False) else inner[name]
            for name in value
        )
    if isinstance(value, list):
        return len(value) >= node.get("minItems", 0) and all(
            matches(node.get("items", {}), part, whole) for part in value
        )
    if isinstance(value, str):
        return len(value) >= node.get("minLength", 0) and bool(re.search(node.get("pattern", ""), value))
    if isinstance(value, int | float):
        return (
            node.get("minimum", value) <= value <= node.get("maximum", value)
            and node.get("exclusiveMinimum", value - 1) < value
        )
    return True


def schema_of(path: Path) -> str:
    """The schema that an editor completes a file of `configs` with."""
    *folders, _ = path.relative_to(configs_dir()).parts
    if not folders:
        return {"config": "run"}.get(path.stem, path.stem)
    if folders == ["capacity"]:
        return "capacity"
    return ".".join(folders if folders[0] == "capacity" else ["run", *folders])


FILES = sorted(configs_dir().rglob("*.yaml"))


@pytest.fixture(scope="module")
def schemas():
    return all_schemas()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(configs_dir())))
def test_every_yaml_is_what_its_schema_allows_and_no_typo_is(path, schemas):
    schema = schemas[schema_of(path)]
    values = yaml.safe_load(path.read_text())
    assert matches(schema, values, schema)
    assert not matches(schema, values | {"nmae": "x"}, schema) or "run.mixer" in schema_of(path)
    for name in set(values) - {"defaults", "hydra"}:
        assert not matches(schema, values | {name: [{"no": "such"}]}, schema), name


@pytest.mark.parametrize("command", ["run", "generate", "capacity"])
def test_a_memorys_choices_are_completed_by_name(schemas, command):
    """Every method in a mapping with its fields, or as a word; every format; a budget in its three forms."""
    schema = schemas[command]
    defaults = to_plain({"run": MemoryConfig(), "generate": GenerateConfig().memory}.get(command, ServingMemory()))

    def allows(**memory):
        return matches(schema, {"memory": defaults | memory}, schema)

    registries = {"compression": COMPRESSIONS, "selection": SELECTIONS}
    for group, registry in registries.items():
        for name, kind in registry.items():
            assert allows(**{group: {"type": name, **kind.defaults()}})
            assert allows(**{group: name})
            assert not allows(**{group: {"type": name, "nmae": 1}})
        assert allows(**{group: None})
        assert allows(**{group: "none"})
        assert not allows(**{group: "nobody"})
        assert set(registry) <= {*RUN.options(group)}
    assert allows(selection="all")
    assert all(allows(format=name) for name in RUN.options("format"))
    assert not allows(format="int5")
    assert all(allows(budget=value) for value in (64, 0.25, "64KiB", None))
    assert not allows(budget=[64])
    assert matches(schemas["run.task"], {"type": "passkey", "second_form": "same"}, schemas["run.task"])
    assert not matches(schemas["run.task"], {"type": "passkey", "second_form": "third"}, schemas["run.task"])


def test_every_group_has_a_schema_and_configs_model_holds_models_only(schemas, tmp_path):
    named = {f"run.{group}" for group in RUN.groups} | {f"capacity.{group}" for group in CAPACITY.groups}
    named |= {f"generate.{group}" for group in GENERATE.groups}
    assert named <= schemas.keys()
    assert set(RUN.options("model")) <= set(TASKS)
    assert "llama3-8b" in CAPACITY.options("model")
    assert {path.stem for path in write_schemas(tmp_path)} == schemas.keys()
    assert json.loads((tmp_path / "run.json").read_text()) == schemas["run"]
    whole = to_plain(compose_capacity())
    assert matches(schemas["capacity"], whole, schemas["capacity"])
    assert CapacityConfig.build(whole) == compose_capacity()
