"""What each command takes on the command line. Nothing is imported for it but argparse."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


class UsageError(Exception):
    """A command line that cannot be parsed."""


class Parser(argparse.ArgumentParser):
    """Answers in one sentence instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}; see {self.prog} --help")

    def options(self) -> list[str]:
        """Every option, as it is typed."""
        return [word for action in self._actions for word in action.option_strings]


def add_overrides(parser: Parser) -> None:
    """Words that Hydra composes."""
    parser.add_argument("-m", "--multirun", action="store_true", help="sweep over comma lists")
    parser.add_argument("overrides", nargs="*", metavar="group=choice | field=value")


def add_show(parser: Parser) -> None:
    """Of `kvlab show`."""
    add_results(parser)
    add_forms(parser, ("markdown", "latex"))


def add_eval(parser: Parser) -> None:
    """Of `kvlab eval`."""
    parser.add_argument("-m", "--multirun", action="store_true", help="sweep over comma lists")
    words = "RUN [group=choice] [field=value]"
    run = "a finished run's folder, such as results/default/1a2b3c4d5e; then what is scored otherwise"
    parser.add_argument("words", nargs="*", metavar=words, help=run)
    parser.add_argument("--cfg", choices=["job"], help="print the composed config, score nothing")


def add_results(parser: Parser, default: str | None = None) -> None:
    """A folder of results, and where what is made of it is written."""
    parser.add_argument("results", type=Path)
    if default:
        parser.add_argument("--output", type=Path, help=f"where to write; default: {default}")


def add_plot(parser: Parser) -> None:
    """Of `kvlab plot`."""
    parser.add_argument("results", type=Path, help="a folder of results")
    column = "a column of kvlab.load, or the end of its name"
    parser.add_argument("--x", default="per_sequence.allocated_bytes", help=f"{column}; per_sequence.allocated_bytes")
    parser.add_argument("--y", default="quality.value", help=f"{column}; quality.value")
    parser.add_argument("--color", help="what colours tell apart; the mixer, or the point where there is one mixer")
    parser.add_argument("--marker", help="what markers tell apart")
    parser.add_argument("--facet", help="one panel for each of its values")
    conditions = "conditions on runs, such as mixer=gqa,mha,seed=0; may be given again"
    parser.add_argument("--filter", action="append", default=[], metavar="FIELD=VALUE,...", help=conditions)
    parser.add_argument("--lines", action="store_true", help="join the marks of one colour and marker")
    parser.add_argument("--save", type=Path, help="a .png, .pdf or .svg, its data beside as .csv; RESULTS/plot.png")


def add_compare(parser: Parser) -> None:
    """Runs to compare."""
    which = "a run's folder, a run id or its beginning, or conditions such as mixer=gqa,format=int8,seed=0,1"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"{which}; each is compared with the first")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where runs are looked for; results")
    parser.add_argument("--floor", type=float, help="what a ceiling must reach for a difference to tell something")
    add_forms(parser, ("json", "markdown", "latex"))


def add_best(parser: Parser) -> None:
    """What is asked of results."""
    words = "budget=64KiB | floor=0.95 | axis=held|read|live | field=value | RESULTS"
    parser.add_argument("words", nargs="+", metavar=words, help="what is asked, and of which runs; RESULTS: results")
    add_forms(parser, ("json",))


def add_forms(parser: Parser, forms: Sequence[str]) -> None:
    """Other forms of a printed table; at most one."""
    group = parser.add_mutually_exclusive_group()
    for form in forms:
        group.add_argument(f"--{form}", dest="form", action="store_const", const=form, help=f"print {form}")


def add_capacity(parser: Parser) -> None:
    """Of `kvlab capacity`."""
    add_overrides(parser)
    parser.add_argument("--cfg", choices=["job"], help="print the composed config, answer nothing")
    parser.add_argument("--output", type=Path, help="a folder for a picture and a CSV; with -m results/capacity")


def add_generate(parser: Parser) -> None:
    """Of `kvlab generate`."""
    words = "FOLDER [group=choice] [field=value]"
    folder = "a run's directory, or a folder with config.json and safetensors; then fields"
    parser.add_argument("words", nargs="*", metavar=words, help=folder)
    parser.add_argument("--cfg", choices=["job"], help="print the composed config, answer nothing")
    parser.add_argument("--prompt", action="append", default=[], help="text, or token ids 1,2,3; may be given again")
    parser.add_argument("--input", type=Path, help='JSONL of {"prompt": ..., "sampling": {...}}; - is standard input')
    parser.add_argument("--output", type=Path, help="write the answers as JSONL")
    jsonl = "JSONL on standard input and output; answers come as they are done"
    parser.add_argument("--jsonl", action="store_true", help=jsonl)


def add_weights(parser: Parser) -> None:
    """Of `kvlab weights`."""
    parser.add_argument("source", metavar="smollm2 | PATH.gguf", help="a model by name, or a Llama GGUF")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write; default: models/ and its name")
    kinds = "float32 (exact) or bfloat16 (half the size), what matrices are stored and computed in; default: float32"
    parser.add_argument("--dtype", default="float32", help=kinds)
    parser.add_argument("--no-tokenizer", action="store_true", help="the weights alone; prompts are token ids then")


def add_reproduce(parser: Parser) -> None:
    """Of `kvlab reproduce`."""
    parser.add_argument("experiment", help="a folder of experiments/")
    parser.add_argument("--output", type=Path, help="where figures are written; default: the experiment's own folder")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where runs are kept; default: results")
