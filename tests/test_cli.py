"""The command line as a user types it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from kvlab import cli
from kvlab.capacity.config import CapacityConfig
from kvlab.compose import compose_capacity, compose_generate
from kvlab.config import GenerateConfig
from kvlab.lab.results import read_records
from tests.lab.test_results import record, write

TINY = ["debug=tiny", "model.model_dim=16", "task.vocab_size=32", "task.train=[16:2]", "task.train_weights=[1]",
        "task.test=[16:2]"]  # fmt: skip


def kvlab(*arguments, **environment):
    command = [sys.executable, "-m", "kvlab", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def call(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["kvlab", *arguments])
    status = cli.main()
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_version_and_unknown_commands(capsys, monkeypatch):
    assert call(capsys, monkeypatch, "--help")[0] == 0
    assert call(capsys, monkeypatch)[0] == 2
    assert call(capsys, monkeypatch, "--version")[1].startswith("kvlab 0.")
    status, _, errors = call(capsys, monkeypatch, "rnu")
    assert status == 2
    assert "did you mean run" in errors


def test_a_wrong_option_is_answered_in_one_line(capsys, monkeypatch):
    for words in (["plan", "--fast"], ["show"], ["capacity", "--cfg", "hydra"], ["generate"]):
        status, _, errors = call(capsys, monkeypatch, *words)
        assert status == 2
        assert errors.startswith(f"kvlab {words[0]}: ")
        assert errors.endswith(f"see kvlab {words[0]} --help\n")
        assert errors.count("\n") == 1


def test_a_choice_without_a_file_is_refused_before_hydra_passes_over_it(capsys, monkeypatch):
    for words in (["run", "--cfg", "job", "model=mqarr"], ["plan", "optimizer=mqarr"], ["run", "train=mqarr"]):
        status, _, errors = call(capsys, monkeypatch, *words)
        assert status == 2
        assert "'mqarr': did you mean mqar" in errors


def test_every_command_prints_its_composed_config(capsys, monkeypatch, tmp_path):
    status, out, _ = call(capsys, monkeypatch, "generate", "--cfg", "job", "memory=dense", "sampling.stop=[a,b]")
    assert status == 0
    assert GenerateConfig.build(yaml.safe_load(out)) == compose_generate(["memory=dense", "sampling.stop=[a,b]"])
    status, out, _ = call(capsys, monkeypatch, "capacity", "model=jamba", "--cfg", "job", "hardware=h200x5")
    assert status == 0
    assert CapacityConfig.build(yaml.safe_load(out)) == compose_capacity(["model=jamba", "hardware=h200x5"])
    status, out, _ = call(capsys, monkeypatch, "schema", "--out", str(tmp_path))
    assert status == 0
    assert str(tmp_path / "run.mixer.json") in out.split()


def test_short_names_of_fields_work_with_hydras_own_options(capsys, monkeypatch):
    words = ["compression=snapkv", "budget=0.75", "format=int8"]
    status, out, _ = call(capsys, monkeypatch, "run", "--cfg", "job", *words)
    assert status == 0
    memory = yaml.safe_load(out)["memory"]
    assert (memory["budget"], memory["format"], memory["compression"]["type"]) == (0.75, "int8", "snapkv")
    status, _, errors = call(capsys, monkeypatch, "run", "--cfg", "job", "compression=null")
    assert status == 2
    assert "compression = None: did you mean none" in errors
    status, out, _ = call(capsys, monkeypatch, "capacity", "--cfg", "job", "compression=h2o", "budget=0.5")
    assert yaml.safe_load(out)["memory"]["compression"]["type"] == "h2o"


@pytest.mark.parametrize(
    ("ended", "status"), [("done", 0), ("skipped", 0), ("failed", 1), ("locked", 1), ("interrupted", 130)]
)
def test_hydras_own_options_leave_the_exit_status_to_the_run(ended, status, capsys, monkeypatch, tmp_path):
    """Also of several runs, of which one is not done."""
    asked = []
    monkeypatch.setattr("kvlab.lab.launch.execute_one", lambda config: asked.append(config) or ended)
    monkeypatch.setattr("kvlab.lab.launch.stop_sweep", lambda: None)
    words = ["debug=tiny", f"results_dir={tmp_path}", f"--config-dir={tmp_path}"]
    assert call(capsys, monkeypatch, "run", *words)[0] == status
    assert call(capsys, monkeypatch, "run", "-m", "seed=1,2", *words)[0] == status
    assert [config.seed for config in asked] == [0, 1, 2]


def test_help_imports_nothing_heavy():
    code = "import sys; sys.argv = ['kvlab', '--help']; from kvlab.cli import main; main(); "
    code += "print(*sorted({'jax', 'pydantic', 'rich', 'hydra', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "\n"
    assert "reproduce" in done.stdout


def test_showing_results_imports_nothing_that_trains_or_draws(tmp_path):
    """A record is JSON; its schemas are jax's and flax's, which is all of theirs that it takes."""
    write(tmp_path, record(), record(seed=1))
    heavy = {"orbax", "tensorstore", "hydra", "matplotlib", "plotly", "tokenizers"}
    code = f"import sys; sys.argv = ['kvlab', 'show', {str(tmp_path)!r}]; from kvlab.cli import main; main(); "
    code += f"print(*sorted({heavy} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "\n"
    assert "mha" in done.stdout


def test_ctrl_c_before_a_run_begins_is_one_line(capsys, monkeypatch):
    def plan(options):
        """As if somebody pressed it."""
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "plan", plan)
    assert call(capsys, monkeypatch, "plan") == (130, "", "kvlab: interrupted\n")


@pytest.mark.parametrize("error", [MemoryError(), OSError()])
def test_an_error_without_words_is_named(capsys, monkeypatch, error):
    def plan(options):
        """As if there were no memory."""
        raise error

    monkeypatch.setattr(cli, "plan", plan)
    assert call(capsys, monkeypatch, "plan") == (2, "", f"kvlab: {type(error).__name__}\n")


@pytest.mark.parametrize("words", [["--cfg", "job"], ["seed=1"]])
def test_a_folder_of_configs_that_is_not_there(capsys, monkeypatch, words):
    status, out, errors = call(capsys, monkeypatch, "run", "--config-dir", "/nowhere", *words)
    assert (status, out) == (2, "")
    assert errors.startswith("kvlab: config = ['--config-dir', '/nowhere', ")
    assert errors.endswith("Additional config directory '/nowhere' not found\n")


def test_results_that_are_not_there(capsys, monkeypatch, tmp_path):
    for command in ("show", "report", "track"):
        status, _, errors = call(capsys, monkeypatch, command, str(tmp_path / "nowhere"))
        assert status == 2
        assert "no such folder of results" in errors


def test_plan_predicts_what_is_held(capsys, monkeypatch, config_of):
    from kvlab.lab.laboratory import Laboratory
    from kvlab.lab.plan import predict
    from kvlab.memory.pools import num_bytes

    config = config_of(*TINY, "mixer.A.head_dim=4", "hardware=v5e")
    plan = predict(Laboratory.of(config, abstract=True))
    real = Laboratory.of(config)
    assert plan.weights_bytes == num_bytes(real.model.params)
    assert plan.num_params == real.model.num_params
    assert plan.optimizer_bytes >= plan.weights_bytes  # Muon's moment of matrices, AdamW's two of the rest
    layout = real.layout(config.context_len, config.measure.batch_size)
    assert plan.state_bytes == num_bytes(layout.allocate())
    assert plan.hardware_bytes == 16_000_000_000
    assert plan.fits
    assert plan.train_flops > 0
    overrides = [*TINY, "mixer.A.head_dim=4"]
    status, out, _ = call(capsys, monkeypatch, "plan", "-m", *overrides, "seed=0,1", "results_dir=/nonexistent/never")
    assert status == 0
    assert "state: new" in out
    assert [out.count(f"mha/mqar/seed{seed}") for seed in (0, 1)] == [1, 1]
    assert not os.path.exists("/nonexistent/never")


def test_readmes_words_on_a_tiny_run_are_answered_with_what_fits(capsys, monkeypatch):
    """A task's prompts of 16 tokens have no room for what a method protects: either remedy may be typed as it is."""
    words = ["plan", "debug=tiny", "compression=h2o"]
    status, _, errors = call(capsys, monkeypatch, *words, "budget=0.5")
    assert status == 2
    remedies = errors.strip().rpartition("; give ")[2].split(", or ")
    assert remedies == ["budget=0.75", "memory.compression.sinks=2 memory.compression.recent=2"]
    status, out, _ = call(capsys, monkeypatch, *words, "budget=0.5", *remedies[1].split())
    assert status == 0
    assert "mha/mqar/seed0 h2o 0.5" in out


def test_plan_says_which_runs_share_a_training_and_which_repeat_another(capsys, monkeypatch):
    overrides = [*TINY, "mixer=mamba2", "memory.page_size=16,8", "memory.chunk_len=16,8"]
    status, out, _ = call(capsys, monkeypatch, "plan", "-m", *overrides)
    assert status == 0
    first, second = (line.split() for line in out.splitlines() if line[11:].lstrip().startswith("mamba2/mqar/seed0"))
    assert out.count("training: ") == 1  # above the table: they have it in common
    assert "e+" in first[-1]
    assert second[-1] == "shared"
    assert f"2 runs of 1 training, {first[-1]} FLOPs" in out
    assert "mamba2: memory.page_size = 8 changes nothing: no state of this model lies in pages" in out


def test_a_model_too_large_for_the_chip_says_no(config_of):
    from kvlab.hardware import CHIPS, HardwareConfig

    assert HardwareConfig("h100", 2).memory_bytes() == 160_000_000_000
    assert CHIPS["h200"].bandwidth_gb_s == 4800


def test_hydra_options_still_work():
    done = kvlab("run", "--cfg", "job", "mixer=gqa")
    assert done.returncode == 0
    assert "num_kv_heads: 2" in done.stdout


def test_tab_completion():
    done = kvlab("-sc", "query=bash", COMP_LINE="kvlab run mixer=mq")
    assert done.stdout.split() == ["mixer=mqa"]
    assert kvlab("-sc", "query=bash", COMP_LINE="kvlab pl").stdout.split() == ["plan", "plot"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("run compress", ["compression="]),
        ("run compression=sn", ["compression=snapkv"]),
        ("run selection=mean", ["selection=mean_key"]),
        ("plan format=kiv", ["format=kivi2", "format=kivi4"]),
        ("run bud", ["budget="]),
        ("run task=pass", ["task=passkey"]),
        ("run task=passkey task.sec", ["task.second_form="]),
        ("run budget=0.5 compression=snapkv memory.compression.win", ["memory.compression.window="]),
        ("run -m compression=none,str", ["compression=none,streaming"]),
        ("run -m compression=none,h2o memory.compression.by", ["memory.compression.by_readers="]),
        ("run hardware=h20", ["hardware=h200"]),
        ("capacity comp", ["compression="]),
        ("capacity compression=sn", ["compression=snapkv"]),
        ("capacity format=ki", ["format=kivi2", "format=kivi4"]),
        ("capacity format=rot", ["format=rotated4", "format=rotated8"]),
        ("capacity selection=q", ["selection=quest"]),
        ("capacity format=kivi4 bud", ["budget="]),
        ("generate FOLDER compression=tov", ["compression=tova"]),
        ("eval results/default/1a compression=tov", ["compression=tova"]),
        ("eval results/default/1a mix", []),
        ("eval results/default/1a memory.page", ["memory.page_size="]),
        ("eval results/default/1a train.num_s", []),
        ("compare compression=tov", ["compression=tova"]),
        ("best ax", ["axis="]),
        ("best axis=re", ["axis=read", "axis=read_bytes_per_token"]),
        ("best axis=he", ["axis=held", "axis=held_peak_bytes"]),
        ("best axis=held compression=tov", ["compression=tova"]),
    ],
)
def test_tab_completes_groups_their_choices_and_short_names(line, found, capsys, monkeypatch):
    monkeypatch.setenv("COMP_LINE", f"kvlab {line}")
    status, out, _ = call(capsys, monkeypatch, "-sc", "query=bash")
    assert (status, out.split()) == (0, found)


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_sweeps_through_every_local_launcher(launcher, tmp_path):
    sweep = ["mixer=mha,mqa", "memory=paged,dense"]
    arguments = ["run", "-m", *TINY, f"launcher={launcher}", *sweep, f"results_dir={tmp_path}"]
    first = kvlab(*arguments)
    assert first.returncode == 0, first.stderr
    assert "4 runs: 4 to run" in first.stderr
    records = read_records(tmp_path)
    assert sorted(record.config["mixer"]["name"] for record in records) == ["mha", "mha", "mqa", "mqa"]
    trainings = {(record.config["mixer"]["name"], record.training.trained_by) for record in records}
    assert len(trainings) == 2  # each variant was trained by one of its runs
    assert len(list(tmp_path.rglob("params"))) == 2
    again = kvlab(*arguments)
    assert "4 runs: 4 done already" in again.stderr
    assert again.stderr.count("skipped") >= (4 if launcher == "joblib" else 0)


def test_a_corpus_that_is_too_short_is_answered_before_anything_is_written(tmp_path):
    (tmp_path / "book.txt").write_text("tiny")
    done = kvlab("run", "task=text", f"task.path={tmp_path / 'book.txt'}", f"results_dir={tmp_path / 'results'}")
    assert done.returncode == 2
    assert re.match(r"kvlab: task\.seq_len = 128: the \w+ split of", done.stderr)
    assert not (tmp_path / "results").exists()


def test_a_sweep_goes_on_after_a_failure_and_says_so(tmp_path):
    """One point diverges: that run is a failed row, the other is done, the exit status is 1."""
    arguments = ["-m", *TINY, "optimizer.clip_norm=null", "optimizer.warmup_fraction=0", "optimizer.eps=1e-30"]
    arguments += ["optimizer.weight_decay=10", "model.dtype=bfloat16", "train.num_steps=100", "train.eval_every=100"]
    done = kvlab("run", *arguments, "optimizer.learning_rate=10,0.001", f"results_dir={tmp_path}")
    assert done.returncode == 1, done.stderr
    assert sorted(record.status for record in read_records(tmp_path)) == ["done", "failed"]
    assert "failed: mha/mqar/seed0 optimizer.learning_rate=10.0 [" in done.stdout
    assert "is not finite" in done.stdout


def test_sigterm_to_a_sweep_stops_its_workers_and_saves(tmp_path):
    """Two workers side by side; the signal goes to the parent alone, every run is cut and can be resumed."""
    steps = ["train.num_steps=40000", "train.eval_every=40000", "train.checkpoint_every=40000"]
    command = [sys.executable, "-m", "kvlab", "run", "-m", *TINY, *steps, "launcher=joblib", "seed=0,1,2"]
    process = subprocess.Popen([*command, f"results_dir={tmp_path}"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 150
    while len(list(tmp_path.rglob("metrics.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    begun = [json.loads(path.read_text()) for path in tmp_path.rglob("status.json")]
    assert [status["status"] for status in begun] == ["interrupted"] * 4  # two runs, and the training of each
    assert not any(_alive(status["pid"]) for status in begun)


def test_a_killed_worker_leaves_no_run_untried(tmp_path):
    """Two workers side by side, four runs, one worker is killed: all runs are done."""
    steps = ["train.num_steps=2000", "train.eval_every=1000", "train.checkpoint_every=100"]
    command = [sys.executable, "-m", "kvlab", "run", "-m", *TINY, *steps, "launcher=joblib", "seed=0,1,2,3"]
    process = subprocess.Popen([*command, f"results_dir={tmp_path}"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 150
    while not (rows := list(tmp_path.rglob("metrics.jsonl"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(json.loads((rows[0].parent / "status.json").read_text())["pid"], signal.SIGKILL)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "the launcher gave up: TerminatedWorkerError" in errors
    assert [record.status for record in read_records(tmp_path)] == ["done"] * 4
    assert "Traceback" not in errors


def _alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().split()[2] != "Z"
    return False


def test_kernels_says_what_is_missing_and_what_failed(capsys, monkeypatch):
    from pallas_kernels import simulators, targets

    monkeypatch.setattr(simulators, "simulate", lambda backend: {"kv_write": "3 cases right, no race"})
    monkeypatch.setattr(targets, "missing", lambda target: "no compiler")
    status, out, _ = call(capsys, monkeypatch, "kernels", "H200", "v5e")
    assert status == 0
    assert "paged_attention: here blocked, then reference" in out
    assert "kv_write for gpus, simulated with race detection: 3 cases right" in out
    assert "flash_attention: here reference" in out
    assert "v5e: no compiler" in out
    monkeypatch.setattr(simulators, "simulate", lambda backend: {"kv_write": "FAILED: a race"})
    assert call(capsys, monkeypatch, "kernels", "H200")[0] == 1
    status, _, err = call(capsys, monkeypatch, "kernels", "H300")
    assert (status, err) == (2, "kvlab: target = 'H300': must be some of H100, H200, B200, v4, v5e, v5p, v6e, 7x\n")


def test_runs_need_none_of_what_only_pages_and_development_need():
    """What a machine with a GPU has, and the wheels of `make wheels` but plotly, suffice to train."""
    absent = ["plotly", "beartype", "hypothesis", "tokenizers", "tensorboardX", "submitit", "joblib", "selenium"]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import kvlab.lab.execute, kvlab.lab.report"
    code += ", kvlab.cli, kvlab.lab.launch"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_finished_run_says_what_comes_next(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("kvlab.lab.launch.execute_one", lambda config: "done")
    status, _, errors = call(capsys, monkeypatch, "run", *TINY, "name=my_first", f"results_dir={tmp_path}")
    assert status == 0
    assert f"next: kvlab report {tmp_path}/my_first" in errors


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("run mixer=mq", ["mixer=mqa"]),
        ("run -m mixer=mqa,mh", ["mixer=mqa,mha"]),
        ("capacity model=gpt", ["model=gpt-oss-120b", "model=gpt-oss-20b"]),
        ("eval results/default/1a memory=p", ["memory=paged"]),
        ("eval results/default/1a mixer=mq", []),
        ("plot results --fa", ["--facet"]),
        ("report results --o", ["--output"]),
        ("reproduce pag", ["paged_waste"]),
        ("weights smo", ["smollm2"]),
        ("show ", []),
    ],
)
def test_choices_and_options_complete_without_hydra_or_jax(line, found, monkeypatch, capsys):
    """What makes completion slow is never imported: these are answered in a tenth of a second."""
    monkeypatch.setitem(sys.modules, "kvlab.lab.completion", None)
    monkeypatch.setenv("COMP_LINE", f"kvlab {line}")
    status, out, _ = call(capsys, monkeypatch, "-sc", "query=bash")
    assert status == 0
    assert out.split() == found


def test_fields_that_were_completed_before_take_neither_hydra_nor_jax(monkeypatch, capsys, tmp_path):
    """Under the same choices, whatever part of their name is typed; other choices are composed first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def completed(line):
        monkeypatch.setenv("COMP_LINE", f"kvlab {line}")
        status, out, _ = call(capsys, monkeypatch, "-sc", "query=bash")
        assert status == 0
        return out.split()

    lines = ["run mixer=swa mixer.W.win", "run mixer=swa task.", "run mixer=swa mixer.", "run mixer=swa memory.comp"]
    slowly = {line: completed(line) for line in lines}
    assert slowly[lines[0]] == ["mixer.W.window="]
    monkeypatch.setitem(sys.modules, "kvlab.lab.completion", None)
    assert {line: completed(line) for line in lines} == slowly


def test_nothing_takes_scipys_distributions():
    """A second of every start."""
    code = "import sys; import kvlab.lab.results, kvlab.compose, kvlab.capacity.workload; "
    code += "assert 'scipy.stats' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
