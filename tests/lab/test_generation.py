"""`kvlab generate` and runs over published weights, as a user would: folders in, text and records out."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from kvlab import blueprint
from kvlab.cli import main
from kvlab.compose import compose, compose_generate
from kvlab.engine.config import EngineConfig
from kvlab.engine.engine import Engine
from kvlab.engine.sampling import Sampling
from kvlab.lab.execute import execute
from kvlab.lab.laboratory import Laboratory
from kvlab.lab.live import summary
from kvlab.lab.request_lines import read_requests
from kvlab.lab.source import load_source
from kvlab.schema import ConfigError
from kvlab.weights import section
from tests.engine.families import golden, pretrained, write_folder
from tests.weights.random_checkpoint import prompt

ROOT = Path(__file__).parents[2]


def command(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["kvlab", *words])
    return main()


def word_tokenizer(path: Path, vocab_size: int = 320) -> Path:
    """A tokenizer.json whose words are w0, w1, ...: made by the library itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(path))
    return path


def test_answers_stop_at_the_checkpoints_own_end(tmp_path, monkeypatch, capsys):
    folder = write_folder("llama_gqa", tmp_path / "model")
    expected = golden("llama_gqa")["answers"]["17"]["tokens"]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": expected[9]}))
    words = ["generate", str(folder), "--prompt", ",".join(map(str, prompt(17, 320))), "sampling.max_tokens=40"]
    assert command(monkeypatch, *words) == 0
    stopped = expected[: expected.index(expected[9]) + 1]
    assert f"{stopped}\n" in capsys.readouterr().out
    assert command(monkeypatch, *words, "stop_at_end=false") == 0
    assert f"{expected}\n" in capsys.readouterr().out
    assert command(monkeypatch, *words, "--output", str(tmp_path)) == 2
    assert "--output" in capsys.readouterr().err


def test_a_checkpoint_answers_ids_text_and_jsonl(tmp_path, monkeypatch, capsys):
    folder = write_folder("llama_gqa", tmp_path / "model")
    ids, expected = prompt(17, 320), golden("llama_gqa")["answers"]["17"]["tokens"]
    assert (
        command(monkeypatch, "generate", str(folder), "--prompt", ",".join(map(str, ids)), "sampling.max_tokens=40")
        == 0
    )
    assert str(expected) in capsys.readouterr().out.replace("\n", "")
    lines = [{"prompt": ids, "name": "mine"}, {"prompt": ids, "sampling": {"max_tokens": 3, "num_logprobs": 2}}]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(request) for request in lines))
    out = tmp_path / "out.jsonl"
    words = [
        "generate",
        str(folder),
        "--input",
        str(tmp_path / "in.jsonl"),
        "--output",
        str(out),
        "sampling.max_tokens=40",
    ]
    assert command(monkeypatch, *words, "engine.max_batch=2", "memory.page_size=4") == 0
    answers = {answer["name"]: answer for answer in map(json.loads, out.read_text().splitlines())}
    assert answers["mine"]["completions"][0]["tokens"] == expected
    (short,) = [answer for name, answer in answers.items() if name != "mine"]
    assert short["completions"][0]["tokens"] == expected[:3]
    assert short["completions"][0]["alternatives"][1][0][0] == expected[1]

    word_tokenizer(folder / "tokenizer.json")
    capsys.readouterr()
    text = " ".join(f"w{i}" for i in ids)
    assert command(monkeypatch, "generate", str(folder), "--prompt", text, "sampling.max_tokens=40") == 0
    assert "".join(f"w{i}" for i in expected) in capsys.readouterr().out.replace("\n", "")


def test_a_draft_model_is_a_folder(tmp_path, monkeypatch, capsys):
    target, draft = (write_folder(name, tmp_path / name) for name in ("llama_gqa", "llama_mqa"))
    words = ["generate", str(target), "--prompt", "1 2 3", "--jsonl", "sampling.max_tokens=6"]
    assert command(monkeypatch, *words) == 0
    plain = json.loads(capsys.readouterr().out)
    assert command(monkeypatch, *words, f"draft={draft}", "engine.speculation=draft", "engine.num_drafts=2") == 0
    captured = capsys.readouterr()
    (drafted,), (expected,) = json.loads(captured.out)["completions"], plain["completions"]
    assert drafted.pop("logprobs") == pytest.approx(expected.pop("logprobs"), abs=1e-5)
    assert drafted == expected
    assert "drafts accepted" in captured.err


def test_the_last_line_counts_what_a_user_counts_and_times_no_compiling(tmp_path, monkeypatch, capsys):
    folder = write_folder("llama_gqa", tmp_path / "model")
    words = ["generate", str(folder), "--prompt", "1 2 3", "--prompt", "4 5 6 7", "sampling.max_tokens=8"]
    assert command(monkeypatch, *words) == 0
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("16 tokens generated, 7 prefilled, ")
    numbers = re.findall(r"[\d.,]*\d", line)
    assert all(float(number.replace(",", "")) for number in numbers), "what is nothing is not said"
    engine = Engine(load_source(folder).model, config=EngineConfig(prefix_cache=False, max_len=64))
    engine.generate([[1, 2, 3]], Sampling(max_tokens=8))
    stats = engine.stats
    compiling = stats.first_calls_s
    assert 0 < compiling <= stats.dispatch_s
    engine.generate([[1, 2, 3]], Sampling(max_tokens=8))
    assert stats.first_calls_s == compiling, "nothing is compiled again"
    assert stats.told_tokens == 16
    stats.first_calls_s, stats.read_bytes = 9.0, 4 * 10**9
    said = summary(engine, 10.0)
    assert f"{stats.prefilled_tokens + stats.decoded_tokens} tok/s, 4.0 GB/s read, 9.0 s of compiling" in said
    stats.read_bytes = 10**7
    assert "GB/s" not in summary(engine, 10.0)


def test_a_prompt_of_which_less_is_to_stay_than_is_protected_is_refused(tmp_path, monkeypatch, capsys):
    """As `kvlab run` refuses it, with what would fit; nothing of the others is computed."""
    folder = write_folder("llama_gqa", tmp_path / "model")
    short, long = (",".join(map(str, prompt(n, 320))) for n in (71, 200))
    words = ["generate", str(folder), "--prompt", long, "--prompt", short, "sampling.max_tokens=4"]
    assert command(monkeypatch, *words, "compression=snapkv", "budget=0.2") == 2
    said = capsys.readouterr()
    assert not said.out
    assert "request 2: memory.budget = 0.2: is 14 slots of the 71 tokens of this prompt, fewer than the 36 " in said.err
    given = said.err.strip().split("give ")[1]
    one, others = given.split(", or ")
    assert one == "budget=0.51"
    for fitting in (one.split(), ["budget=0.2", *others.split()]):
        assert command(monkeypatch, *words, "compression=snapkv", *fitting) == 0
        assert "2 compactions" in capsys.readouterr().err
    few = ",".join(map(str, prompt(20, 320)))
    words = ["generate", str(folder), "--prompt", few, "sampling.max_tokens=4", "compression=snapkv", "budget=0.2"]
    assert command(monkeypatch, *words) == 0, "all of it is protected, nothing is dropped"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "x"], "prompt = 'x': must be token ids"),
        (["--prompt", "999"], "token 999: must be in"),
        ([], "give --prompt"),
        (["--prompt", "1", "sampling.temprature=1"], "did you mean temperature"),
        (["--prompt", "1", "sampling.top_p=2"], "sampling.top_p = 2"),
        (["--prompt", "1", "engine.max_len=4"], "max_tokens = 64: must be in"),
        (["--prompt", "1", "page_size=4"], "page_size = 4: no such field"),
        (["--prompt", "1", "sampling"], "must be field=value"),
        (["--prompt", "1", "memory=pow2"], "memory = 'pow2': is for kvlab capacity only; legal: dense, paged"),
        (["--prompt", "1", "engine=8"], "engine = 8: must be a mapping of its fields: max_batch, "),
        (["--prompt", "1", "stop_at_end=maybe"], "stop_at_end = 'maybe': must be true or false"),
        (["--prompt", "1", "sampling.stop_tokens=[1,x]"], "sampling.stop_tokens = [1, 'x']: must be a list, each"),
        (["--prompt", "1", "engine.speculation=draft"], "speculation = 'draft'"),
    ],
)
def test_bad_commands_say_what_is_legal(words, message, tmp_path, monkeypatch, capsys):
    folder = write_folder("llama_gqa", tmp_path)
    assert command(monkeypatch, "generate", str(folder), *words) == 2
    assert message in capsys.readouterr().err


BAD_LINES = (
    ("{", ": "),
    ('{"prompt": [1], "sampler": 1}', ": sampler = 1: no such field; did you mean sampling"),
    ('{"prompt": [1], "sampling": {"top_k": -1}}', ": sampling.top_k = -1"),
    ('{"prompt": [1], "priority": "high"}', ": priority = 'high': must be an integer"),
    ('{"prompt": [1, 0.5]}', ": prompt = [1, 0.5]: must be a string or a list, each an integer"),
    ('{"prompt": [null]}', ": prompt = [None]: must be a string or a list, each an integer"),
    ('{"prompt": [1], "sampling": 3}', ": sampling = 3: must be a mapping or null"),
    ('{"prompt": [1], "name": 7}', ": name = 7: must be a string or null"),
    ('{"prompt": [1], "name": "\\u001b[31m"}', ": name = '\\x1b[31m': must be a string of 1 to 256 printable"),
    ('{"prompt": [1], "name": "twice"}', ": name = 'twice': is in use"),
    ('{"prompt": [1], "namespace": "\\ud800"}', ": namespace = '\\ud800': must be a string of at most 256 characters"),
    ('{"prompt": [999999]}', ": prompt: token 999999: must be in [0, 320)"),
    ('{"prompt": [1], "namespace": "\udcff"}', ": namespace = '\\udcff': must be"),
    ("[1]", ': must be an object with "prompt"'),
    ('{"prompt": "text"}', ": prompt: is text, and the engine has no tokenizer"),
)


def test_a_bad_line_is_refused_alone(tmp_path, monkeypatch, capsys):
    """Good lines stand between the bad ones: these are answered as if nothing had been, those say why they are not."""
    folder = write_folder("llama_gqa", tmp_path / "model")
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = ['{"prompt": [1, 2], "name": "twice"}', '{"prompt": [3], "name": "[/b] :x:"}']
    lines = [good[0], *(line for line, _ in BAD_LINES), good[1]]
    source.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
    words = ["generate", str(folder), "--input", str(source), "sampling.max_tokens=3"]
    assert command(monkeypatch, *words, "--output", str(output)) == 1
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    refused, answered = answers[: len(BAD_LINES)], answers[len(BAD_LINES) :]
    for number, (answer, (_, message)) in enumerate(zip(refused, BAD_LINES, strict=True), 2):
        assert f"line {number}{message}" in answer["error"]
        assert answer["name"] in (f"line-{number}", "twice")
    lengths = {answer["name"]: len(answer["completions"][0]["tokens"]) for answer in answered}
    assert lengths == {"twice": 3, "[/b] :x:": 3}
    assert command(monkeypatch, *words) == 1
    said = capsys.readouterr().out
    assert "failed: line 2: " in said
    assert "[/b] :x:" in said


def test_bad_folders_say_where(tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, "generate", str(tmp_path), "--prompt", "1") == 2
    assert "neither a run's directory" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="dtype"):
        compose_generate(["dtype=float64"])


def test_a_run_answers_text(tmp_path, monkeypatch, capsys):
    """Trained here for half a minute's worth of nothing, moved elsewhere, and asked: bytes in, text out."""
    config = compose(["task=text", "debug=tiny", f"results_dir={tmp_path}", "task.seq_len=64", "task.decode_len=8"])
    assert execute(config) == "done"
    moved = tmp_path / "elsewhere"
    config.run_dir.rename(moved)
    assert command(monkeypatch, "generate", str(moved), "--prompt", "def f(", "sampling.max_tokens=5", "--jsonl") == 0
    (completion,) = json.loads(capsys.readouterr().out)["completions"]
    assert completion["text"] == bytes(completion["tokens"]).decode(errors="replace")
    source = load_source(moved)
    whole = source.model.merge()
    ids = jnp.asarray([list(b"def f(")], jnp.int32)
    logits = whole.logits(whole.parallel(ids))
    assert int(logits[0, -1].argmax()) == completion["tokens"][0]


def test_perplexity_of_published_weights_is_that_of_the_definition(tmp_path):
    """Over a whole file of words, in windows, through pages: against a plain loop over the parallel form in float64."""
    folder = write_folder("mistral", tmp_path / "mistral-tiny")
    word_tokenizer(folder / "tokenizer.json")
    ids = np.random.default_rng(0).integers(0, 320, 400)
    book = tmp_path / "book.txt"
    book.write_text(" ".join(f"w{i}" for i in ids))
    words = [
        "task=perplexity", f"weights.path={folder}", f"task.path={book}", "task.seq_len=60", "task.decode_len=10",
        "measure.batch_size=3", "memory.page_size=8", f"results_dir={tmp_path / 'r'}",
    ]  # fmt: skip
    config = compose(words)
    assert config.mixer.name == "mistral-tiny"
    run_id = config.run_id
    assert execute(config) == "done"
    record = json.loads((config.run_dir / "record.json").read_text())
    model = pretrained("mistral")
    whole = model.model.merge()

    @jax.jit
    def forward(tokens):
        return whole.logits(whole.parallel(tokens))

    nats = []
    for start in range(0, 399 - 60, 60):
        logits = np.asarray(forward(jnp.asarray(ids[None, start : start + 60], jnp.int32)))[0].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats += [-logprobs[i, ids[start + i + 1]] for i in range(60)]
    assert len(nats) == 360
    assert record["quality"]["value"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    assert record["training"]["num_steps"] == 0
    assert execute(compose(words)) == "skipped"
    behind = [nat for place, nat in enumerate(nats) if place % 60 >= 35]
    for way in ("false", "true"):  # behind a prompt; its window makes chunks and single steps the same
        scored = compose([*words, "task.num_scored=25", f"task.scored_in_chunks={way}"])
        assert execute(scored) == "done"
        value = json.loads((scored.run_dir / "record.json").read_text())["quality"]["value"]
        assert value == pytest.approx(math.exp(np.mean(behind)), rel=1e-4)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, folder / "model.safetensors")
    assert compose(words).run_id != run_id, "other weights are another run"


def test_the_printed_configuration_has_the_model_of_the_weights(tmp_path, monkeypatch, capsys):
    """Not the task's own, which is not run; it is what `compose` makes."""
    folder = write_folder("llama_gqa", tmp_path / "tiny-llama")
    word_tokenizer(folder / "tokenizer.json")
    words = ["task=perplexity", f"weights.path={folder}", "memory.page_size=8"]
    assert command(monkeypatch, "run", "--cfg", "job", *words) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["mixer"]["name"] == "tiny-llama"
    assert printed == compose(words).as_dict()


def test_weights_and_tasks_that_do_not_fit_are_refused(tmp_path):
    folder = write_folder("llama_gqa", tmp_path)
    word_tokenizer(folder / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"weights\.path"):
        compose(["task=perplexity", f"weights.path={tmp_path / 'none'}"])
    with pytest.raises(ConfigError, match=r"task\.whole = True: must be false to train"):
        compose(["task=perplexity", f"weights.path={folder}", "train.num_steps=8"])
    with pytest.raises(ConfigError, match=r"tune\.learning_rate"):
        compose(["task=perplexity", f"weights.path={folder}", "tune.learning_rate=[0.1]"])


@pytest.mark.parametrize("abstract", [True, False])
def test_weights_whose_states_no_memory_holds_are_refused_before_they_are_loaded(tmp_path, monkeypatch, abstract):
    words = ["task=mqar", "task.vocab_size=320", "train.num_steps=0"]
    config = compose([*words, f"weights.path={write_folder('llama_gqa', tmp_path)}"])

    def refuse(states, memory, **_):
        assert len(states) == 2
        raise ConfigError("memory.format", memory.format, "must be another")

    def load(*_, **_kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr(blueprint, "parts_of", refuse)
    monkeypatch.setattr(section, "load_checkpoint", load)
    with pytest.raises(ConfigError, match="must be another"):
        Laboratory.of(config, abstract=abstract)


def test_the_needle_grid_becomes_a_heat_map(tmp_path, monkeypatch):
    assert command(
        monkeypatch, "run", "task=needle", "mixer=mha", "debug=tiny", f"results_dir={tmp_path}",
        "task.contexts=[64,96]", "task.depths=[0,100]",
    ) == 0  # fmt: skip
    assert command(monkeypatch, "report", str(tmp_path / "tiny")) == 0
    assert (tmp_path / "tiny" / "needle.png").stat().st_size > 5_000
    assert (tmp_path / "tiny" / "needle.pdf").exists()


def test_the_command_works_as_installed(tmp_path):
    folder = write_folder("mamba2", tmp_path)
    program = [str(Path(sys.executable).parent / "kvlab"), "generate", str(folder), "--jsonl", "sampling.max_tokens=3"]
    done = subprocess.run(program, input='{"prompt": [1, 2]}\n', capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["completions"][0]["tokens"]) == 3


def test_a_line_may_have_a_name_a_priority_and_a_namespace():
    line = '{"prompt": [1, 2], "name": "a", "priority": 3, "namespace": "mine", "sampling": {"top_k": 4}}'
    (read,) = read_requests([line, "  "], Sampling(max_tokens=5))
    assert read.asked == ([1, 2], Sampling(max_tokens=5, top_k=4), {"name": "a", "priority": 3, "namespace": "mine"})


def test_printed_answers_are_the_text_byte_for_byte(capsys):
    """Tabs stay tabs, and neither :names: nor brackets are anything else than text, in names and reasons too."""
    import io

    from rich.console import Console

    from kvlab.engine.requests import Answer, Completion
    from kvlab.lab.live import print_answers

    text = "a\tb :warning: [red]x[/red] [bold] [/] \\[y] " + "long " * 60
    name = "[red]n[/red] :warning:"
    out = io.StringIO()
    answer = Answer(name, [1], [Completion([1], [0.0], "stop", text), Completion([7, 8], [0.0], "stop")], "[/] :x:")
    print_answers([answer], Console(file=out, highlight=False, width=80))
    assert f"failed: [/] :x:\n{text}\n[7, 8]\n" in out.getvalue()
    assert name in out.getvalue()
