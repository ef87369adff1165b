"""A Llama GGUF becomes a folder of the hub: the same model as its dequantised weights, or a sentence that says why
not."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from kvlab import cli
from kvlab.compose import compose
from kvlab.engine.sampling import Sampling
from kvlab.files import locked
from kvlab.lab.source import load_source
from kvlab.schema import ConfigError
from kvlab.weights import WeightsError, load_checkpoint
from kvlab.weights.convert import Origin, convert
from kvlab.weights.gguf import read_gguf
from kvlab.weights.gguf_llama import read_llama, unpermuted
from kvlab.weights.published import make
from tests.engine.families import config_of, golden
from tests.weights.gguf_writer import gguf_bytes, metadata_of, side_by_side, write_pair
from tests.weights.random_checkpoint import draw, prompt

ROOT = Path(__file__).parents[2]
MIXED = {"2": "Q4_1", "1": "F32", "model.embed_tokens.weight": "Q8_0", "lm_head.weight": "F16"}
ORIGIN = Origin("0" * 64)


def pair(family: str, folder: Path, kinds=MIXED, **metadata) -> tuple[Path, Path]:
    """The family's model with weights from their names, as a GGUF and as the hub has it."""
    tensors = {name: draw(name, tuple(shape)) for name, shape in golden(family)["shapes"].items()}
    return write_pair(golden(family)["config"], tensors, folder, kinds, metadata)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", ["llama_gqa", "llama_mqa", "llama_mha"])
def test_logits_are_those_of_the_dequantised_weights(family, tmp_path):
    """Grouped heads; a tied head; biases, which rotate with their rows. Every tensor, the architecture and logits."""
    path, hub = pair(family, tmp_path)
    assert convert(path, tmp_path / "out", ORIGIN)
    written, expected = load_file(tmp_path / "out" / "model.safetensors"), load_file(hub / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == np.float32
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    ours, theirs = load_checkpoint(tmp_path / "out"), load_checkpoint(hub)
    assert ours.architecture == theirs.architecture
    ids = jnp.asarray([prompt(33, 320)], jnp.int32)
    logits = [whole.logits(whole.parallel(ids)) for whole in (ours.model.merge(), theirs.model.merge())]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("family", ["llama_gqa", "llama_mha"])
def test_a_float32_gguf_says_what_transformers_said(family, tmp_path):
    path, _ = pair(family, tmp_path, {"1": "F32", "2": "F32"})
    convert(path, tmp_path / "out", ORIGIN)
    from kvlab.engine.engine import Engine
    from kvlab.memory.layout import MemoryConfig

    engine = Engine(load_checkpoint(tmp_path / "out").model, memory=MemoryConfig("paged", 16, 32), config=config_of(32))
    (answer,) = engine.generate([prompt(17, 320)], Sampling(max_tokens=40))
    assert list(answer.completions[0].tokens) == golden(family)["answers"]["17"]["tokens"]


def test_rotary_pairs_by_their_definition():
    """Scores under rotation of neighbours, the GGUF's way, equal those under rotation of halves, the hub's way."""
    rng, head_dim, heads = np.random.default_rng(0), 8, 3
    query, key = (rng.standard_normal((heads * head_dim, 16)) for _ in range(2))
    x, y = rng.standard_normal((2, 16))
    angles = 7 * 100.0 ** (-np.arange(head_dim // 2) / (head_dim // 2))
    turn = np.exp(1j * angles)

    def neighbours(vector):
        return (vector[..., 0::2] + 1j * vector[..., 1::2]) * turn

    def halves(vector):
        return (vector[..., : head_dim // 2] + 1j * vector[..., head_dim // 2 :]) * turn

    def scores(query, key, rotate):
        turned, still = rotate((query @ x).reshape(heads, -1)), rotate((key @ y).reshape(heads, -1)) / turn
        return (turned * still.conj()).real.sum(-1)

    expected = scores(query, key, neighbours)
    np.testing.assert_allclose(scores(unpermuted(query, heads), unpermuted(key, heads), halves), expected, rtol=1e-12)
    assert np.abs(scores(query, key, halves) - expected).max() > 0.1
    np.testing.assert_array_equal(unpermuted(side_by_side(query, head_dim), heads), query)


def test_what_the_metadata_says_is_in_the_config(tmp_path):
    """Base, epsilon, context, ends, linear scaling, and the lengths that may be left out."""
    path, _ = pair(
        "llama_gqa", tmp_path, **{
            "llama.rope.freq_base": 12345.0, "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0, "llama.attention.key_length": 16,
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 7,
        },
    )  # fmt: skip
    convert(path, tmp_path / "out", ORIGIN)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_theta": 12345.0, "rope_type": "linear", "factor": 4.0}
    assert (config["rms_norm_eps"], config["max_position_embeddings"]) == (1e-5, 512)
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, [2, 7])
    assert config["tie_word_embeddings"] is False
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.end_tokens == (2, 7)
    layer = loaded.architecture.layers[0].config
    assert (layer.rope_base, layer.rope_scaling, layer.norm_eps) == (12345.0, (4.0,), 1e-5)

    found = read_gguf(path)
    for key in ("llama.vocab_size", "llama.rope.dimension_count", "llama.rope.freq_base", "llama.attention.key_length"):
        del found.metadata[key]
    config = read_llama(found).config
    assert (config["vocab_size"], config["head_dim"]) == (320, 16)
    assert config["rope_parameters"]["rope_theta"] == 10_000.0


def test_bfloat16_rounds_matrices_and_nothing_else(tmp_path):
    path, hub = pair("llama_mha", tmp_path)
    convert(path, tmp_path / "out", Origin("0" * 64, "bfloat16"))
    written, expected = load_file(tmp_path / "out" / "model.safetensors"), load_file(hub / "model.safetensors")
    for name, tensor in expected.items():
        dtype = ml_dtypes.bfloat16 if tensor.ndim == 2 else np.float32
        assert written[name].dtype == dtype, name
        np.testing.assert_array_equal(written[name], tensor.astype(dtype), err_msg=name)
    assert load_checkpoint(tmp_path / "out").architecture.model.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture = 'qwen2': must be llama"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8: is not supported"),
        ({"llama.attention.sliding_window": 64}, "llama.attention.sliding_window = 64"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type = 'yarn': must be none or linear"),
        ({"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.factor = None"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count = 8: must be the keys' length, 16"),
        ({"llama.attention.value_length": 32}, "llama.attention.value_length = 32"),
        ({"llama.embedding_length": "64"}, "llama.embedding_length = '64': must be a positive integer"),
        ({"llama.block_count": 0}, "llama.block_count = 0"),
        ({"llama.block_count": 3}, "blk.2.attn_norm.weight: is missing"),
        ({"llama.block_count": 1}, "blk.1.attn_norm.weight: is unexpected"),
        ({"llama.attention.head_count": [4, 4]}, r"llama.attention.head_count = \[4, 4\]"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count = 0"),
        ({"llama.attention.head_count_kv": 3}, "num_kv_heads = 3: must divide"),
        ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "llama.attention.layer_norm_rms_epsilon = 0"),
        ({"llama.rope.freq_base": float("nan")}, "rope_theta = nan|llama.rope.freq_base = nan"),
        ({"llama.feed_forward_length": 128}, r"blk.0.ffn_gate.weight: shape \[96, 64\]: must be \[128, 64\]"),
        ({"llama.vocab_size": 319}, r"token_embd.weight: shape \[320, 64\]: must be \[319, 64\]"),
        ({"tokenizer.ggml.eos_token_id": 320}, "tokenizer.ggml.eos_token_id = 320"),
        ({"tokenizer.ggml.eot_token_id": "x"}, "tokenizer.ggml.eot_token_id = 'x'"),
    ],
)
def test_what_is_not_a_llama_that_is_built_is_refused_before_anything_is_written(metadata, message, tmp_path):
    path, _ = pair("llama_gqa", tmp_path, {"1": "F32", "2": "F32"}, **metadata)
    with pytest.raises(WeightsError, match=message):
        convert(path, tmp_path / "out", ORIGIN)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hub", "model.gguf"]


def test_every_missing_key_and_foreign_tensor_is_said_at_once(tmp_path):
    path = tmp_path / "model.gguf"
    metadata = metadata_of(golden("llama_gqa")["config"])
    path.write_bytes(gguf_bytes({"general.architecture": "llama", "llama.expert_count": 2}, {}))
    with pytest.raises(WeightsError) as error:
        convert(path, tmp_path / "out", ORIGIN)
    for words in ("llama.block_count: is missing", "llama.expert_count = 2", "token_embd.weight: is missing"):
        assert words in str(error.value)
    pair("llama_gqa", tmp_path / "whole", {"1": "F32", "2": "F32"})
    zeros = {"token_embd.weight": ((320, 64), 0, bytes(320 * 64 * 4))}
    strangers = ("rope_freqs.weight", "blk.0.ffn_gate_inp.weight", "blk.01.attn_q.weight", "output_norm.bias")
    path.write_bytes(gguf_bytes(metadata, zeros | {name: ((1,), 0, bytes(4)) for name in strangers}))
    with pytest.raises(WeightsError) as error:
        convert(path, tmp_path / "out", ORIGIN)
    for name in strangers[1:]:
        assert f"{name}: is no tensor of a Llama" in str(error.value)
    assert "rope_freqs.weight: rotary frequencies as a tensor" in str(error.value)
    assert "blk.1.ffn_down.weight: is missing; must be [64, 96]" in str(error.value)


def test_a_finished_folder_is_kept_and_another_ones_is_not_written_over(tmp_path):
    path, _ = pair("llama_gqa", tmp_path)
    out = tmp_path / "out"
    out.mkdir()  # empty: may be used
    assert make(str(path), out).is_new
    before = files(out)
    times = {entry.name: entry.stat().st_mtime_ns for entry in out.iterdir()}
    assert not make(str(path), out).is_new
    assert {entry.name: entry.stat().st_mtime_ns for entry in out.iterdir()} == times
    with pytest.raises(ConfigError, match=r"dtype 'float32' where 'bfloat16' is asked.*: remove it, or name another"):
        make(str(path), out, dtype="bfloat16")
    other, _ = pair("llama_mqa", tmp_path / "other")
    with pytest.raises(ConfigError, match="sha256"):
        make(str(other), out)
    assert files(out) == before
    (out / "model.safetensors").write_bytes(before["model.safetensors"][:-4])
    with pytest.raises(ConfigError, match=r"is damaged \(model.safetensors has"):
        make(str(path), out)
    for foreign in (tmp_path / "hub", path):
        with pytest.raises(ConfigError, match="must be a new or empty folder"):
            make(str(path), foreign)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_conversion_that_stops_leaves_nothing_and_what_a_killed_one_left_is_no_hindrance(stop, tmp_path, monkeypatch):
    path, hub = pair("llama_gqa", tmp_path / "in")
    out = tmp_path / "out"
    from kvlab.weights.gguf import GGUF

    read, count = GGUF.read, 0

    def fails(self, name):
        nonlocal count
        count += 1
        if count == 9:
            raise stop
        return read(self, name)

    monkeypatch.setattr(GGUF, "read", fails)
    with pytest.raises((KeyboardInterrupt, OSError)):
        convert(path, out, ORIGIN)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in"]
    monkeypatch.undo()
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "lock").write_text("1")
    (partial / "tokenizer.json").write_text("{}")
    assert convert(path, out, ORIGIN)
    assert sorted(files(out)) == ["config.json", "model.safetensors", "source.json"]
    assert load_checkpoint(out).architecture == load_checkpoint(hub).architecture
    assert not partial.exists()


def test_a_folder_that_another_process_makes_is_named(tmp_path):
    path, _ = pair("llama_gqa", tmp_path / "in")
    began, done = threading.Event(), threading.Event()

    def hold():
        with locked(tmp_path / ".out.partial" / "lock"):
            began.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    began.wait(60)
    try:
        with pytest.raises(ConfigError, match=r"is being made by another process \(pid \d+\)"):
            convert(path, tmp_path / "out", ORIGIN)
    finally:
        done.set()
        holder.join()
    assert convert(path, tmp_path / "out", ORIGIN)


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    path, _ = pair("llama_gqa", tmp_path / "in")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match=r"needs .* KiB, and 1000 B are free"):
        convert(path, tmp_path / "new" / "out", ORIGIN)
    assert not list((tmp_path / "new").iterdir())


def call(capsys, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["kvlab", *words])
    status = cli.main()
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command(capsys, monkeypatch, tmp_path):
    """Converts, says what to do next, and that works; a second call says that it is there."""
    path, _ = pair("llama_gqa", tmp_path, {"1": "F32", "2": "F32"})
    monkeypatch.chdir(tmp_path)
    status, out, _ = call(capsys, monkeypatch, "weights", str(path))
    assert status == 0
    assert out.startswith("models/model\n")
    assert "model.safetensors" in out
    assert "next: kvlab generate models/model --prompt 1,2,3 sampling.max_tokens=16\n" in out
    assert jax.tree.leaves(load_source(Path("models/model")).model.params)
    assert "models/model was there already" in call(capsys, monkeypatch, "weights", str(path))[1]

    def interrupted(self, name):
        raise KeyboardInterrupt

    monkeypatch.setattr("kvlab.weights.gguf.GGUF.read", interrupted)
    status, _, errors = call(capsys, monkeypatch, "weights", str(path), "--out", "other")
    assert (status, errors) == (130, "kvlab: interrupted; no folder was made\n")
    assert not Path("other").exists()


def test_wrong_commands_are_answered_in_a_sentence(capsys, monkeypatch, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGML")
    bad = str(tmp_path / "bad.gguf")
    for words, message in (
        (["smolm2"], "source = 'smolm2': must be a .gguf file or a published model; did you mean smollm2"),
        (["none.gguf"], "none.gguf: cannot be loaded:\n  there is no such file"),
        ([bad], "not a GGUF file: begins with b'GGML'"),
        ([bad, "--dtype", "int8"], "dtype = 'int8': must be one of float32, bfloat16"),
        ([], "see kvlab weights --help"),
    ):
        status, _, errors = call(capsys, monkeypatch, "weights", *words)
        assert status == 2
        assert message in errors
    for words in (["generate", bad, "--prompt", "1"], ["plan", "task=perplexity", f"weights.path={bad}"]):
        status, _, errors = call(capsys, monkeypatch, *words)
        assert status == 2
        assert f"a GGUF is converted first: kvlab weights {bad}" in errors


def test_runs_take_the_folder(tmp_path):
    path, _ = pair("llama_gqa", tmp_path)
    convert(path, tmp_path / "tiny", ORIGIN)
    config = compose(["task=mqar", f"weights.path={tmp_path / 'tiny'}"])
    assert (config.mixer.name, config.model.model_dim) == ("tiny", 64)


def test_converting_holds_a_tensor_at_a_time(tmp_path):
    """Peak resident memory of a fresh process, less what it had after converting a tiny file, below a third of what is
    written (190 MB). The largest tensor is a sixteenth."""
    layers = 4
    config = golden("llama_gqa")["config"] | {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": layers, "vocab_size": 320,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 256,
    }  # fmt: skip
    tensors: dict[str, tuple[int, ...]] = {"token_embd": (320, 1024), "output": (320, 1024), "output_norm": (1024,)}
    for index in range(layers):
        tensors |= {f"blk.{index}.{name}": dims for name, dims in {
            "attn_q": (1024, 1024), "attn_k": (512, 1024), "attn_v": (512, 1024), "attn_output": (1024, 1024),
            "ffn_gate": (2816, 1024), "ffn_up": (2816, 1024), "ffn_down": (1024, 2816),
            "attn_norm": (1024,), "ffn_norm": (1024,),
        }.items()}  # fmt: skip
    entries = {}
    for name, dims in tensors.items():
        kind, size = (0, 4) if len(dims) == 1 else (1, 2)
        entries[f"{name}.weight"] = (dims, kind, bytes(int(np.prod(dims)) * size))
    path = tmp_path / "big.gguf"
    path.write_bytes(gguf_bytes(metadata_of(config), entries))
    tiny, _ = pair("llama_gqa", tmp_path / "in")
    script = f"""
import re
from pathlib import Path
from kvlab.weights.convert import Origin, convert
def kib(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1))
convert(Path({str(tiny)!r}), Path({str(tmp_path / "tiny")!r}), Origin("0" * 64))
before = kib("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
convert(Path({str(path)!r}), Path({str(tmp_path / "big")!r}), Origin("0" * 64))
print((kib("VmHWM") - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    size = (tmp_path / "big" / "model.safetensors").stat().st_size
    assert int(done.stdout) < size / 3, f"{int(done.stdout) / size:.2f} of what is written"
