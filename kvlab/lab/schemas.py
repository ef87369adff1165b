"""JSON schemas for editors: one for each command's config, and one for each group of YAML files.

They are made from the dataclasses that validate a run. In VS Code with the YAML extension, `.vscode/settings.json`:

    "yaml.schemas": {"schemas/run.mixer.json": "configs/mixer/*.yaml", "schemas/run.json": "configs/experiment/*.yaml"}
"""

import json
from pathlib import Path
from typing import Any

from kvlab.capacity.config import CapacityConfig, ServingMemory
from kvlab.capacity.presets import Preset
from kvlab.capacity.workload import WorkloadConfig
from kvlab.compression import COMPRESSIONS
from kvlab.config import SECTIONS, TRACKERS, GenerateConfig
from kvlab.lab.evaluations import SCORED
from kvlab.memory.layout import MemoryConfig
from kvlab.mixers import MIXERS
from kvlab.mixers.attention import AttentionConfig
from kvlab.mixers.latent import LatentConfig
from kvlab.models.config import OwnMLP
from kvlab.models.experts import ExpertsConfig
from kvlab.registry import Registry
from kvlab.schema import json_schema
from kvlab.selection import SELECTIONS
from kvlab.tasks import TASKS

type Node = dict[str, Any]

HYDRA: Node = {"defaults": {"type": "array"}, "hydra": {"type": "object"}}
"""What Hydra reads of a file, and takes out of the config."""
REFERENCE: Node = {"type": "string", "pattern": r"^\$\{.+\}$"}
"""A value that is another's: ${mixer.A.num_heads}."""
FREE_GROUPS = ("launcher", "experiment", "debug", "tuned")
"""Groups of `kvlab run` whose files may set anything of the whole config."""


def all_schemas() -> dict[str, Node]:
    """Every schema by its name: a command's, such as "run", or a group's, such as "run.mixer". Any field may be left
    out: a file says what differs."""
    sections = {name: json_schema(kind) for name, kind in SECTIONS.items()}
    sections |= {"mixer": _mixer(), "task": {"anyOf": _by_type(TASKS)}}
    word: Node = {"type": "string"}
    top: Node = {"name": {"type": ["string", "null"]}, "experiment": word, "results_dir": word}
    top["track"] = {"enum": ["none", *TRACKERS], "type": "string"}
    top["seed"] = {"type": "integer", "minimum": 0}
    run: Node = {"type": "object", "properties": sections | top, "additionalProperties": False}
    schemas = {"run": run, "capacity": json_schema(CapacityConfig), "generate": json_schema(GenerateConfig)}
    scored = {name: sections[name] for name in SCORED if name in sections}
    schemas["eval"] = {"type": "object", "properties": scored, "additionalProperties": False}
    # A task's file may bring a model and a schedule: it is then a part of the whole.
    groups = sections | dict.fromkeys(FREE_GROUPS, run) | {"task": {"anyOf": [*_by_type(TASKS), run]}}
    schemas |= {f"run.{name}": node for name, node in groups.items()}
    for name, kind in (("model", Preset), ("memory", ServingMemory), ("workload", WorkloadConfig)):
        schemas[f"capacity.{name}"] = json_schema(kind)
    for name, kind in (("attention", AttentionConfig), ("latent", LatentConfig)):
        schemas[f"run.mixer.{name}"] = json_schema(kind)  # what a task brings for every layer of that type
    schemas["generate.memory"] = schemas["run.format"] = schemas["generate.format"] = json_schema(MemoryConfig)
    for name, registry in (("compression", COMPRESSIONS), ("selection", SELECTIONS)):
        schemas[f"run.{name}"] = schemas[f"generate.{name}"] = _method(name, registry)
    return {name: _whole(node) for name, node in schemas.items()}


def write_schemas(folder: Path) -> list[Path]:
    """Writes each as NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, schema in all_schemas().items():
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(schema, indent=2) + "\n")
    return paths


def _by_type(registry: Registry[Any]) -> list[Node]:
    """The section of each registered name, with its `type`, which a defaults list may bring as well."""
    found = []
    for name, kind in registry.usable().items():
        node = json_schema(kind.Config)
        found.append(node | {"properties": {"type": {"const": name}, **node["properties"]}})
    return found


def _method(name: str, registry: Registry[Any]) -> Node:
    """A choice of how a memory is kept: its fields, or null under the name of the group."""
    options = [json_schema(kind) for kind in registry.usable().values()]
    nothing: Node = {"type": "object", "properties": {name: {"type": "null"}}, "additionalProperties": False}
    return {"anyOf": [*options, nothing]}


def _mixer() -> Node:
    """A variant: layers have any name, and may take their fields from one another."""
    named: Node = {"name": {"type": "string"}, "pattern": {"type": "string"}, "knob": {"type": ["string", "null"]}}
    layers = _by_type(MIXERS)
    for layer in layers:
        layer["properties"] = {name: {"anyOf": [node, REFERENCE]} for name, node in layer["properties"].items()}
        layer["properties"] |= json_schema(OwnMLP)["properties"]
        layer["properties"]["mlp"] = {"anyOf": [json_schema(ExpertsConfig), {"type": "null"}]}
    return {"type": "object", "properties": named, "additionalProperties": {"anyOf": layers}}


def _whole(node: Node) -> Node:
    """A schema of a whole file: nothing is required, Hydra's own keys are legal, definitions are at the top."""
    definitions: Node = {}
    lifted = _without_definitions(node, definitions)
    opened = {"anyOf": [_opened(option) for option in lifted["anyOf"]]} if "anyOf" in lifted else _opened(lifted)
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, **opened, **({"$defs": definitions} if definitions else {})}


def _opened(node: Node) -> Node:
    if "properties" not in node:
        return node
    return {name: value for name, value in node.items() if name != "required"} | {
        "properties": node["properties"] | HYDRA
    }


def _without_definitions(node: Any, definitions: Node) -> Any:
    """The node with every "$defs" below it moved to `definitions`."""
    if isinstance(node, list):
        return [_without_definitions(inner, definitions) for inner in node]
    if not isinstance(node, dict):
        return node
    for name, inner in node.get("$defs", {}).items():
        definitions[name] = _without_definitions(inner, definitions)
    return {name: _without_definitions(inner, definitions) for name, inner in node.items() if name != "$defs"}
