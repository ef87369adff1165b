"""Published weights in a run: what may be laid over them, and that nothing else is passed over in silence."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.compose import compose, expand
from kvlab.config import Config
from kvlab.lab.laboratory import Laboratory
from kvlab.schema import ConfigError
from kvlab.weights import load_checkpoint
from tests.engine.families import WINDOW, golden, pretrained, write_folder
from tests.weights.random_checkpoint import prompt

MASKED = -1e30


@pytest.fixture
def words(tmp_path):
    folder = write_folder("llama_gqa", tmp_path / "llama")
    task = ["task=mqar", "task.vocab_size=320", "train.num_steps=0"]
    return [*task, f"weights.path={folder}", f"results_dir={tmp_path / 'r'}"]


def reference_logits(family: str, ids: list[int], window: int | None, num_sinks: int) -> np.ndarray:
    """A Llama in numpy, in float64, from config and tensors of the golden file alone."""
    from tests.weights.random_checkpoint import draw

    config, shapes = golden(family)["config"], golden(family)["shapes"]
    tensor = {name: draw(name, tuple(shape)).astype(np.float64) for name, shape in shapes.items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim, eps = config["head_dim"], config["rms_norm_eps"]
    length = len(ids)

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * tensor[name]

    def turned(x):
        angles = np.arange(length)[:, None] * config["rope_parameters"]["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
        cos, sin = (np.concatenate([f(angles)] * 2, -1)[:, None] for f in (np.cos, np.sin))
        first, second = np.split(x, 2, -1)
        return x * cos + np.concatenate([-second, first], -1) * sin

    rows, columns = np.arange(length)[:, None], np.arange(length)[None]
    seen = columns <= rows
    if window is not None:
        seen &= (columns > rows - window) | (columns < num_sinks)
    x = tensor["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        h = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = ((h @ tensor[f"{at}.self_attn.{n}_proj.weight"].T).reshape(length, -1, dim) for n in "qkv")
        k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (turned(k), v))
        scores = np.einsum("thd,shd->hts", turned(q), k) * dim**-0.5
        scores = np.where(seen, scores, MASKED)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        y = np.einsum("hts,shd->thd", p / p.sum(-1, keepdims=True), v).reshape(length, -1)
        x = x + y @ tensor[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, f"{at}.post_attention_layernorm.weight")
        gate, up = (h @ tensor[f"{at}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ tensor[f"{at}.mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ tensor["lm_head.weight"].T


@pytest.mark.parametrize(("window", "num_sinks"), [(None, 0), (7, 0), (7, 3)])
def test_a_window_over_given_weights_is_the_masked_definition(window, num_sinks, words):
    given = [] if window is None else [f"weights.window={window}", f"weights.num_sinks={num_sinks}"]
    lab = Laboratory.of(compose([*words, *given]))
    ids = prompt(33, 320)
    model = lab.model.merge()
    found = jax.jit(lambda tokens: model.logits(model.parallel(tokens)))(jnp.asarray([ids], jnp.int32))[0]
    np.testing.assert_allclose(found, reference_logits("llama_gqa", ids, window, num_sinks), atol=2e-3, rtol=1e-3)


def test_the_window_is_part_of_the_run_and_of_its_name(words):
    plain, narrow, sunk = (
        compose([*words, *more]) for more in ([], ["weights.window=8"], ["weights.window=8", "weights.num_sinks=2"])
    )
    assert len({config.run_id for config in (plain, narrow, sunk)}) == 3
    assert [config.mixer.name for config in (plain, narrow, sunk)] == ["llama", "llama-window8", "llama-window8-sinks2"]
    assert [layer.config.window for layer in narrow.layers()] == [8, 8]
    assert Config.build(sunk.as_dict()) == sunk, "a run's record is read back"
    configs, _ = expand([*words, "weights.window=4,8"], True)
    assert [config.layers()[0].config.window for config in configs] == [4, 8]


def test_a_run_over_weights_has_their_experts(tmp_path):
    folder = write_folder("gpt_oss", tmp_path / "oss")
    words = ["task=mqar", "task.vocab_size=320", "train.num_steps=0", f"weights.path={folder}", "weights.window=8"]
    config = compose(words)
    experts = pretrained("gpt_oss").architecture.layers[0].mlp
    assert [layer.mlp for layer in config.layers()] == [experts] * 2
    assert [layer.config.window for layer in config.layers()] == [8, 8]
    assert Config.build(config.as_dict()) == config, "a run's record is read back"
    shapes = jax.tree.map(lambda leaf: leaf.shape, Laboratory.of(config).model.params)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, pretrained("gpt_oss").model.params)


def test_a_run_over_weights_has_the_widths_and_the_sparsity_of_each_layer(tmp_path):
    folder = write_folder("gemma3n_text", tmp_path / "gemma")
    config = compose(["task=mqar", "task.vocab_size=256", "train.num_steps=0", f"weights.path={folder}"])
    architecture = pretrained("gemma3n_text").architecture
    assert len({layer.mlp_sparsity for layer in architecture.layers}) > 1
    assert tuple(config.layers()) == architecture.layers
    assert Config.build(config.as_dict()) == config, "a run's record is read back"


def test_a_window_narrows_and_never_widens(tmp_path):
    """Layers that have a narrower one keep it; sinks are put under any window."""
    folder = write_folder("gemma3_text", tmp_path / "gemma")
    windows = [layer.config.window for layer in load_checkpoint(folder, window=WINDOW + 1).architecture.layers]
    assert windows == [WINDOW, WINDOW + 1, WINDOW]
    layers = load_checkpoint(folder, num_sinks=2).architecture.layers
    assert [(layer.config.window, layer.config.num_sinks) for layer in layers] == [(WINDOW, 2), (None, 0), (WINDOW, 2)]
    same = load_checkpoint(folder)
    assert same.architecture == pretrained("gemma3_text").architecture


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("deepseek_v3", "weights.window=8", r"weights\.window = 8: .* layers of latent"),
        ("mamba2", "weights.window=8", r"weights\.window = 8: no layer .* attends"),
        ("llama_gqa", "weights.num_sinks=2", r"weights\.num_sinks = 2: must be 0 without a window"),
        ("llama_gqa", "weights.window=0", r"weights\.window = 0: must be an integer in \[1"),
    ],
)
def test_a_window_that_cannot_be_is_refused(family, given, message, tmp_path):
    folder = write_folder(family, tmp_path / "model")
    with pytest.raises(ConfigError, match=message):
        compose(["task=mqar", "task.vocab_size=320", f"weights.path={folder}", "train.num_steps=0", given])


@pytest.mark.parametrize("given", ["weights.window=8", "weights.num_sinks=2", "weights.dtype=bfloat16"])
def test_what_is_laid_over_weights_needs_weights(given):
    field, value = given.split("=")
    with pytest.raises(ConfigError, match=rf"{field} = '?{value}'?: .*weights\.path"):
        compose(["task=text", given])


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ("mixer=swa", "mixer"),
        ("mixer=mha", "mixer"),
        ("mixer.A.window=64", "mixer.A.window"),
        ("++mixer.A.num_heads=2", "mixer.A.num_heads"),
        ("mixer.pattern=A A", "mixer.pattern"),
        ("+mixer.knob=A.window", "mixer.knob"),
        ("model.dtype=bfloat16", "model.dtype"),
        ("model.num_layers=1", "model.num_layers"),
        ("model.norm_eps=1e-6", "model.norm_eps"),
        ("experiment=demo", "mixer"),
        ("model=text", "model"),
    ],
)
def test_what_weights_determine_is_refused_beside_them(given, field, words):
    """Nothing that is given is passed over in silence, not even what would change nothing."""
    with pytest.raises(ConfigError, match=rf"{field.replace('.', '[.]')}\S* = .*weights\.path says") as error:
        expand([*words, given], "experiment" in given)
    assert len(str(error.value)) < 600
    assert "weights." in str(error.value)


def test_an_experiment_of_another_model_is_refused_beside_weights(words):
    (weights,) = (word for word in words if word.startswith("weights.path"))
    with pytest.raises(ConfigError, match=r"mixer\.name = 'gated_deltanet_hybrid': an experiment chooses it"):
        compose([weights, "experiment=hybrid_ratio"])


def test_sections_beside_weights_in_a_mapping_must_agree_with_them(words):
    """In a notebook: a mapping without them is enough, and other ones are refused by field."""
    values = compose(words).as_dict()
    bare = {name: section for name, section in values.items() if name not in ("mixer", "model")}
    assert Config.build(bare) == Config.build(values)
    other = json.loads(json.dumps(values))
    other["mixer"]["L0"]["window"] = 64
    with pytest.raises(ConfigError, match=r"mixer\.L0\.window = 64: .*weights\.path says None"):
        Config.build(other)
    with pytest.raises(ConfigError, match=r"model\.dtype = 'bfloat16': .*weights\.path says 'float32'.*weights\.dtype"):
        Config.build({**values, "model": {**values["model"], "dtype": "bfloat16"}})


def bytes_words(tmp_path, family="llama_gqa", task="perplexity"):
    folder = write_folder(family, tmp_path / "model")
    book = tmp_path / "book.txt"
    book.write_text("w1 w2 w3 7 0 1 2 3 4 5 6 8 9 w5 " * 400)
    words = [f"task={task}", f"task.path={book}", "train.num_steps=0", f"weights.path={folder}"]
    return folder, [
        *words,
        *(["task.seq_len=32", "task.decode_len=4"] if task in ("text", "perplexity") else ["task.contexts=[300]"]),
    ]


@pytest.mark.parametrize("task", ["perplexity", "needle", "passkey"])
def test_a_folder_without_a_tokenizer_is_refused_where_text_is_asked_for(task, tmp_path):
    """Its bytes would be taken for token ids."""
    folder, words = bytes_words(tmp_path, task=task)
    with pytest.raises(ConfigError, match=rf"task\.tokenizer = None: .*{folder}.* has no tokenizer\.json") as error:
        compose(words)
    assert "320" in str(error.value), "what the vocabulary is"
    (folder / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"has tokenizer\.model"):
        compose(words)


def test_text_by_the_byte_needs_weights_of_bytes(tmp_path):
    folder, words = bytes_words(tmp_path, task="text")
    with pytest.raises(ConfigError, match=r"task\.type = 'text': .*by the byte.* 320 tokens.*perplexity"):
        compose(words)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 256}))
    assert compose(words).make_task().vocab_size == 256
    _, needle = bytes_words(tmp_path / "b", task="needle")
    assert compose([*needle[:-2], f"weights.path={folder}", needle[-1]]).task.tokenizer is None


def test_a_mapping_without_the_field_gets_the_folders_tokenizer(tmp_path):
    from tests.test_tokenizers import saved

    folder, words = bytes_words(tmp_path)
    saved(folder / "tokenizer.json")
    values = compose(words).as_dict()
    del values["task"]["tokenizer"]
    assert Config.build(values).task.tokenizer == str(folder / "tokenizer.json")


@pytest.mark.parametrize("task", ["perplexity", "needle", "passkey"])
def test_a_tokenizer_with_more_entries_than_the_model_is_refused_only_where_text_has_them(task, tmp_path):
    """As with transformers: published folders have a token more that no text contains."""
    from tests.test_tokenizers import saved

    folder, words = bytes_words(tmp_path, task=task)
    saved(folder / "tokenizer.json", added=("<extra>",))
    ((config,), _) = expand(words, False)
    assert config.make_task().vocab_size == 321
    (tmp_path / "book.txt").write_text("w1 w2 <extra> 7 0 1 2 3 4 5 6 8 9 w5 " * 400)
    from kvlab.tasks import corpus, perplexity

    for cached in (corpus.read_splits, corpus.read_whole, perplexity.token_splits, perplexity.whole_tokens):
        cached.cache_clear()
    with pytest.raises(ConfigError, match=r"weights\.path = .*vocabulary of 320 does not hold token 320"):
        expand(words, False)
