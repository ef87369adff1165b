"""Packages outside kvlab: what they bring by entry points is chosen, completed, checked, run and told like what is
kvlab's own, and nothing of them is imported before it is asked for."""

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from kvlab import cli, known_fields
from kvlab.choices import at_once
from kvlab.compose import RUN, compose, compose_capacity
from kvlab.compression import COMPRESSIONS
from kvlab.lab.provenance import outside
from kvlab.lab.report import render_page
from kvlab.lab.results import points, read_records
from kvlab.lab.schemas import all_schemas
from kvlab.ledger.replacement import POLICIES
from kvlab.mixers import MIXERS
from kvlab.schema import ConfigError
from kvlab.selection import SELECTIONS
from kvlab.tasks import TASKS
from kvlab.tasks.metrics import METRICS
from kvlab.weights import load_checkpoint
from kvlab.weights.architectures import read_architecture
from kvlab.weights.families import FAMILIES
from tests.engine.families import write_byte_folder
from tests.lab.test_results import record
from tests.plugins import EXAMPLE, declare, install_example

REGISTRIES = (MIXERS, TASKS, METRICS, COMPRESSIONS, SELECTIONS, POLICIES, FAMILIES)
SMALL = ["debug=tiny", "task=majority", "mixer=running_mean", "compression=alternate", "budget=16", "task.seq_len=24"]
SELECTED = ["selection=even_pages", "memory.selection.dense_layers=0", "memory.page_size=4"]
BROKEN = {
    "kvlab.mixers": {"missing": "kvlab_broken:Missing", "nobodys": "no_such_package_anywhere:Mixer"},
    "kvlab.compressions": {"missing": "kvlab_broken:Missing"},
    "kvlab.families": {"missing": "kvlab_broken:Missing"},
}


@pytest.fixture
def on_path(monkeypatch):
    """Puts a folder on the path as an installed package is; forgotten, modules too, when the test ends."""
    before = set(sys.modules)

    def put(folder: Path) -> None:
        monkeypatch.syspath_prepend(str(folder))

    yield put
    for name in set(sys.modules) - before:
        if name.startswith("kvlab_"):
            del sys.modules[name]


@pytest.fixture
def example(tmp_path, on_path):
    """The package of tests/plugin_package, installed."""
    on_path(install_example(tmp_path / "installed"))


@pytest.fixture
def broken(tmp_path, on_path):
    """A package of which nothing can be imported, beside that which is as it must be."""
    folder = declare(install_example(tmp_path / "installed"), "kvlab-broken", BROKEN)
    (folder / "kvlab_broken.py").write_text("raise RuntimeError('half of it\\nis not there')\n")
    on_path(folder)


def call(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["kvlab", *arguments])
    status = cli.main()
    return status, *capsys.readouterr()


def kvlab(folder, *arguments, **environment):
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "kvlab", *map(str, arguments)]
    given = os.environ | {"PYTHONPATH": paths} | environment
    return subprocess.run(command, capture_output=True, text=True, check=False, env=given)


@pytest.mark.usefixtures("example")
def test_every_registry_knows_the_names_of_a_package_and_imports_it_when_one_is_asked_for():
    groups = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["entry-points"]
    assert {registry.group for registry in REGISTRIES} == groups.keys() - {"kvlab.configs"}
    for registry in REGISTRIES:
        (name,) = groups[registry.group]
        assert name in registry
        assert list(registry)[-1] == name
        assert len(registry) == len(set(registry))
    assert not any(module.startswith("kvlab_example") for module in sys.modules)
    for registry in REGISTRIES:
        (name,) = groups[registry.group]
        found = registry[name]
        kind = found if isinstance(found, type) else type(found)
        ours = registry[next(iter(registry))]
        assert isinstance(found, type) == isinstance(ours, type)
        assert registry.package(name) == "kvlab-example 1.2"
        assert registry.package(next(iter(registry))) is None
        assert kind.__name__ in (
            "RunningMean",
            "Majority",
            "Metric",
            "Alternate",
            "EvenPages",
            "Newest",
            "ExampleLlama",
        )


def test_without_the_package_its_names_are_nobodys():
    assert "running_mean" not in MIXERS
    with pytest.raises(KeyError):
        MIXERS["running_mean"]
    with pytest.raises(ConfigError, match="mixer = 'running_mean': legal: based, "):
        compose(["mixer=running_mean"])


@pytest.mark.usefixtures("example")
def test_choices_of_a_package_compose_and_say_whose_they_are():
    config = compose([*SMALL, "selection=even_pages"][1:])
    assert [layer.mixer for layer in config.layers()] == ["running_mean", "attention"]
    assert (config.task_name, config.memory.compression.name, config.model.model_dim) == ("majority", "alternate", 32)
    of = "kvlab-example 1.2"
    assert outside(config) == {
        "kvlab.mixers: running_mean": of,
        "kvlab.tasks: majority": of,
        "kvlab.metrics: error_rate": of,
        "kvlab.compressions: alternate": of,
        "kvlab.selections: even_pages": of,
    }
    assert outside(compose(["mixer=mha"])) == {}
    assert compose_capacity(["model=example-8b"]).model.num_params == 8_000_000_000
    with pytest.raises(ConfigError, match="did you mean running_mean"):
        compose(["mixer=runing_mean"])
    with pytest.raises(ConfigError, match=r"channels = 0: must be an integer in \[1, 65536\]"):
        compose(["mixer=running_mean", "mixer.M.channels=0"])


@pytest.mark.usefixtures("example")
def test_commands_and_editors_know_the_choices_of_a_package(capsys, monkeypatch, tmp_path):
    _, commands = cli.make_parsers()
    assert at_once("kvlab run mixer=run", commands) == ["mixer=running_mean"]
    assert at_once("kvlab capacity model=exa", commands) == ["model=example-8b"]
    assert at_once("kvlab generate F compression=none,alt", commands) == ["compression=none,alternate"]
    status, out, _ = call(capsys, monkeypatch, "run", "--cfg", "job", *SMALL)
    assert status == 0
    layer = yaml.safe_load(out)["mixer"]["M"]
    assert (layer["type"], layer["channels"]) == ("running_mean", 32)
    schemas = all_schemas()
    assert "running_mean" in json.dumps(schemas["run.mixer"])
    assert "stride" in json.dumps(schemas["run.compression"])


@pytest.mark.usefixtures("example")
def test_completed_fields_are_kept_for_as_long_as_a_package_is_as_it_was(tmp_path):
    asked = ("run", ["mixer=running_mean"])
    before = known_fields._path(*asked)
    assert known_fields._path(*asked) == before
    source = tmp_path / "installed" / "kvlab_example" / "running_mean.py"
    os.utime(source, (1e9, 1e9))  # older than any other file
    assert known_fields._path(*asked) != before


@pytest.mark.usefixtures("example")
def test_a_checkpoint_of_a_packages_family_is_read(tmp_path):
    folder = write_byte_folder(tmp_path / "model")
    values = json.loads((folder / "config.json").read_text()) | {"model_type": "example_llama"}
    (folder / "config.json").write_text(json.dumps(values))
    assert load_checkpoint(folder).architecture.family == "example_llama"
    config = compose(["task=text", f"weights.path={folder}", "train.num_steps=0"])
    assert outside(config) == {"kvlab.families: example_llama": "kvlab-example 1.2"}


@pytest.mark.usefixtures("broken")
def test_a_package_that_cannot_be_imported_stops_who_asks_for_it_and_nobody_else():
    said = (
        r"type = 'missing': cannot be imported from kvlab-broken 1\.0 "
        r"\(kvlab\.mixers: missing = kvlab_broken:Missing\): RuntimeError: half of it is not there$"
    )
    for words in (["+mixer/type@mixer.E=missing", "mixer.pattern=E"], ["mixer.A.type=missing"]):
        with pytest.raises(ConfigError, match=said):
            compose(words)
    with pytest.raises(ConfigError, match=r"type = 'nobodys': .*ModuleNotFoundError: No module named 'no_such"):
        compose(["mixer.A.type=nobodys"])
    with pytest.raises(ConfigError, match=r"memory\.compression\.type = 'missing': cannot be imported from kvlab-bro"):
        compose(["memory.compression=missing", "budget=16"])
    _, problems = read_architecture({"model_type": "missing"}, "float32")
    assert "model_type = 'missing': cannot be imported from kvlab-broken 1.0" in problems[0]
    assert compose(SMALL[1:]).task_name == "majority"
    assert MIXERS.get("missing") is None
    assert set(MIXERS.usable()) == set(MIXERS) - {"missing", "nobodys"}
    assert "stride" in json.dumps(all_schemas()["run.compression"])


def test_a_name_that_two_have_is_refused_with_both_and_others_are_not(tmp_path, on_path):
    on_path(install_example(tmp_path / "installed"))
    entries = {"kvlab.mixers": {"attention": "kvlab_example.running_mean:RunningMean"}, "kvlab.tasks": {}}
    entries["kvlab.tasks"]["majority"] = "kvlab_example.majority:Majority"
    on_path(declare(tmp_path / "rival", "kvlab-rival", entries, "2.0"))
    with pytest.raises(
        ConfigError, match=r"type = 'attention': is a name of kvlab and of kvlab-rival 2\.0 \(kvlab\.mix"
    ):
        compose(["mixer=mha"])
    with pytest.raises(
        ConfigError, match=r"type = 'majority': is a name of kvlab-example 1\.2 and of kvlab-rival 2\.0"
    ):
        compose(["mixer=mamba2", "task=majority"])
    assert compose(["mixer=mamba2"]).mixer.name == "mamba2"


def test_a_file_that_two_have_is_refused_with_both_and_others_are_not(tmp_path, on_path):
    on_path(install_example(tmp_path / "installed"))
    rival = tmp_path / "rival" / "kvlab_rival" / "configs"
    for name in ("mixer/mqa", "task/majority"):
        (rival / name).parent.mkdir(parents=True)
        (rival / f"{name}.yaml").write_text("{}")
    on_path(declare(tmp_path / "rival", "kvlab-rival", {"kvlab.configs": {"all": "kvlab_rival.configs"}}))
    with pytest.raises(ConfigError, match=r"mixer = 'mqa': is a file of kvlab and of kvlab-rival 1\.0; uninstall one"):
        compose(["mixer=mqa"])
    with pytest.raises(
        ConfigError, match=r"task = 'majority': is a file of kvlab-example 1\.2 and of kvlab-rival 1\.0"
    ):
        compose(["task=majority"])
    assert compose(["mixer=mha"]).mixer.name == "mha"


def test_a_folder_of_configurations_that_was_not_packed_is_told(tmp_path, on_path):
    on_path(declare(tmp_path, "kvlab-bare", {"kvlab.configs": {"all": "kvlab_bare.configs"}}))
    with pytest.raises(ConfigError, match=r"; kvlab-bare 1\.0 has none: its folder kvlab_bare/configs is not there"):
        compose(["mixer=bare"])
    assert compose(["mixer=mha"]).mixer.name == "mha"


def test_what_is_not_of_its_kind_or_is_called_otherwise_is_refused(tmp_path, on_path):
    folder = install_example(tmp_path / "installed")
    entries = {
        "kvlab.mixers": {"task": "kvlab_example.majority:Majority", "made": "kvlab_example.majority:ERROR_RATE"},
        "kvlab.metrics": {"kind": "kvlab.tasks.metrics:Metric"},
        "kvlab.compressions": {"every_other": "kvlab_example.alternate:Alternate"},
    }
    on_path(declare(folder, "kvlab-wrong", entries))
    for registry, name, said in (
        (MIXERS, "task", "is no class of Mixer: what kvlab-wrong 1.0"),
        (MIXERS, "made", "is no class of Mixer: what kvlab-wrong 1.0"),
        (METRICS, "kind", "is no Metric: what kvlab-wrong 1.0"),
        (COMPRESSIONS, "every_other", "must be called as its `name`, 'alternate', in kvlab-wrong 1.0"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            registry[name]


def test_a_package_is_run_from_the_command_line_and_its_results_say_so(tmp_path):
    """A sweep by workers, which find it as well."""
    folder = install_example(tmp_path / "installed")
    words = [*SMALL, *SELECTED, f"results_dir={tmp_path / 'results'}"]
    done = kvlab(folder, "run", "-m", "launcher=joblib", "seed=0,1", *words)
    assert done.returncode == 0, done.stderr
    records = read_records(tmp_path / "results")
    assert len(records) == 2
    for found in records:
        assert found.status == "done"
        assert (found.quality.metric, found.quality.higher_is_better) == ("error_rate", False)
        assert set(found.provenance.outside.values()) == {"kvlab-example 1.2"}
        assert len(found.provenance.outside) == 5
    shown = kvlab(folder, "show", tmp_path / "results")
    assert "error rate" in shown.stdout
    without = kvlab(tmp_path, "show", tmp_path / "results")  # they are read where the package is not, too
    assert (without.returncode, "running_mean" in without.stdout) == (0, True), without.stderr
    completed = kvlab(folder, "-sc", "query=bash", COMP_LINE="kvlab run mixer=runn")
    assert completed.stdout.split() == ["mixer=running_mean"]
    planned = kvlab(folder, "plan", *words)
    assert "running_mean" in planned.stdout, planned.stderr
    generate = kvlab(folder, "generate", "--cfg", "job", "engine.policy=newest")
    assert yaml.safe_load(generate.stdout)["engine"]["policy"] == "newest"


def test_completion_imports_neither_a_package_nor_jax(tmp_path):
    folder = install_example(tmp_path / "installed")
    code = "import os, sys; sys.argv = ['kvlab', '-sc', 'query=bash']; from kvlab.cli import main; main(); "
    code += "print(*sorted({'jax', 'pydantic', 'hydra', 'kvlab_example'} & set(sys.modules)), file=sys.stderr)"
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    given = os.environ | {"PYTHONPATH": paths, "COMP_LINE": "kvlab run mixer=runn"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=given)
    assert (done.stdout, done.stderr) == ("mixer=running_mean\n", "\n")


def test_a_report_says_whose_code_a_run_took():
    ours = record("mha")
    taken = replace(ours.provenance, outside={"kvlab.mixers: mean": "kvlab-example 1.2"})
    theirs = replace(record("mean"), provenance=taken)
    page = render_page("made", [ours, theirs], points([ours, theirs]), [{}, {}])
    assert "<td data-value='kvlab.mixers: mean of kvlab-example 1.2'>" in page
    assert "outside kvlab" not in render_page("made", [ours], points([ours]), [{}])


def test_options_are_the_folders_own_without_packages():
    assert RUN.options("mixer") == sorted(path.stem for path in (RUN.path / "mixer").glob("*.yaml"))
    assert RUN.file_of("experiment", "demo").name == "demo.yaml"
