"""What a terminal shows of an engine at work: its requests, where the memory's bytes are, and how fast it goes."""

from collections.abc import Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text as RichText

from kvlab.engine.engine import Engine
from kvlab.engine.requests import Answer
from kvlab.ledger.accounting import PARTS
from kvlab.units import counted, human_bytes


def status(engine: Engine, seconds: float, most: int = 12) -> Group:
    """The live table: requests that run and wait, where every byte of the memory is, and how fast it goes."""
    requests = Table("request", "state", "prompt", "answer", "text", title_justify="left")
    shown = [sample for request in engine.requests.values() for sample in request.samples]
    for sample in shown[:most]:
        text = sample.transcript.text[-60:] if sample.transcript else " ".join(map(str, sample.answer[-12:]))
        length = f"{len(sample.answer)}/{sample.request.sampling.max_tokens}"
        requests.add_row(
            RichText(str(sample.name)), sample.state, str(len(sample.request.prompt)), length, RichText(text)
        )
    if len(shown) > most:
        requests.add_row(f"and {len(shown) - most} more", "", "", "", "")
    accounts = engine.ledger.audit()
    memory = Table("memory", "pool", *(part for part in PARTS if any(getattr(account, part) for account in accounts)))
    for account in accounts:
        parts = (getattr(account, part) for part in PARTS if any(getattr(other, part) for other in accounts))
        memory.add_row(
            RichText(account.name), human_bytes(account.pool), *(f"{100 * part / account.pool:.1f}%" for part in parts)
        )
    return Group(requests, memory, RichText(summary(engine, seconds)))


def summary(engine: Engine, seconds: float) -> str:
    """One line about what was done; what is nothing, or rounds to it, is left out. Rates are of the time apart from
    the first call of each program, which compiles it."""
    stats, counters = engine.stats, engine.scheduler.counters
    running = max(seconds - stats.first_calls_s, 1e-9)
    rates = {"tok/s": f"{(stats.prefilled_tokens + stats.decoded_tokens) / running:,.0f}"}
    rates["GB/s read"] = f"{stats.read_bytes / running / 1e9:.1f}"
    words = [f"{counted(stats.told_tokens, 'token')} generated, {stats.prefilled_tokens:,} prefilled"]
    words += [f"{counters.hit_tokens:,} found in memory"] * (counters.hit_tokens > 0)
    words += [f"{counters.found_again_tokens:,} found again"] * (counters.found_again_tokens > 0)
    words += [f"{rate} {unit}" for unit, rate in rates.items() if float(rate.replace(",", ""))]
    if (compiling := f"{stats.first_calls_s:.1f}") != "0.0":
        words.append(f"{compiling} s of compiling not counted")
    words += [f"{counters.preempted} preempted"] * (counters.preempted > 0)
    if stats.compacted:
        dropped = counted(engine.ledger.counters.dropped_slots, "slot")
        words.append(f"{counted(stats.compacted, 'compaction')}, {dropped} dropped")
    if stats.sealed_pages:
        words.append(f"{counted(stats.sealed_pages, 'page')} sealed")
    if stats.drafted_tokens:
        words.append(f"{100 * stats.acceptance_rate:.0f}% of {counted(stats.drafted_tokens, 'draft')} accepted")
    return ", ".join(words)


def print_answers(answers: Sequence[Answer], console: Console) -> None:
    """Prompts and answers for reading. Texts are written as they are: nothing in them is markup, an emoji's name or a
    tab to be expanded."""
    for answer in answers:
        console.rule(RichText(answer.name), align="left")
        if answer.error:
            console.file.write(f"failed: {answer.error}\n")
        for completion in answer.completions:
            console.file.write(f"{completion.text or completion.tokens}\n")
