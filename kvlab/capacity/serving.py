"""The classes that a deployment's memory is made of, compressed or sealed as in the laboratory, and what one sequence
stores and reads of them."""

from collections import Counter
from dataclasses import dataclass, replace

from kvlab.capacity.config import CapacityConfig, ServingMemory
from kvlab.capacity.presets import LayerGroup
from kvlab.compression.budget import Budget
from kvlab.ledger.classes import StateClass
from kvlab.ledger.growth import bytes_at, has_ended, pages_at, stored_at
from kvlab.ledger.states import QUANTISED, State, max_pages_for_step
from kvlab.memory.budgets import Context, EqualBudget, solve, unless_protected, whole_pages, with_slots
from kvlab.memory.config import MemoryConfig
from kvlab.memory.formats import skipped
from kvlab.memory.layout import with_targets
from kvlab.memory.parts import LayerParts, parts_of_stored, stored_states
from kvlab.schema import ConfigError

type Share = tuple[tuple[int, float], ...]
"""The classes of a layer's tokens, each with its share of the heads."""


@dataclass(frozen=True)
class Serving:
    """State classes of one deployment, without room yet; `layers` counts layers by their group and the classes of
    the tokens that they read; `budget` is what was solved, where bytes were asked for."""

    classes: tuple[StateClass, ...]
    layers: dict[tuple[LayerGroup, Share], int]
    memory: ServingMemory
    skipped: dict[str, str]
    """Kinds of states that the memory leaves as they are, and why."""
    token_bytes: int
    """Of one token of a sequence, as it is stored when it comes."""
    num_selecting: int
    """Layers of which a step reads some pages."""
    budget: EqualBudget | None = None

    @classmethod
    def of(cls, config: CapacityConfig, max_len: int, context: Context) -> "Serving":
        """The classes in which sequences of up to `max_len` tokens are served. Raises ConfigError for a memory that
        these states cannot be held in, and for a budget of bytes that cannot be solved at `context`."""
        try:
            return cls._solved(config, max_len, context)
        except ConfigError as error:
            if error.name == "memory.format" and config.memory.kv_dtype in QUANTISED:
                raise ConfigError("memory.kv_dtype", error.value, error.legal) from None
            raise

    @classmethod
    def _solved(cls, config: CapacityConfig, max_len: int, context: Context) -> "Serving":
        memory = config.memory.held
        budget = memory.budget if memory.compression is not None else None
        if budget is None or Budget.of(budget).num_bytes is None:
            return cls._of(config, memory, max_len)

        def size(slots: int) -> int:
            serving = cls._of(config, with_slots(memory, slots), max_len)
            return bytes_at(serving.classes, context.prompt_len, context.context_len)

        found = solve(memory, "memory.budget", whole_pages(memory, context), unless_protected(size), context)
        assert found.solved is not None
        return replace(cls._of(config, with_slots(memory, found.solved), max_len), budget=found)

    @classmethod
    def _of(cls, config: CapacityConfig, memory: MemoryConfig, max_len: int) -> "Serving":
        sources = config.model.sources()
        declared = [{_kind(spec): spec} if spec else {} for spec in config.model.states(config.memory.dtype)]
        stored = stored_states(declared, memory)
        chunk_len = min(config.memory.chunk_len, max_len)
        layers = parts_of_stored(stored, memory, max_len=max_len)
        counts = Counter(part for layer in layers for part in layer.held.values())
        order, classes = list(counts), list[StateClass]()
        for number, part in enumerate(order):
            name = next(name for layer in layers for name, held in layer.held.items() if held == part)
            paged = part.state.per_token and config.memory.reservation is None
            page_size = config.memory.page_size if paged else 1
            rules = {"retention": part.retention, "sealing": part.sealing}
            reservation = config.memory.reservation if part.state.per_token else None
            name = f"{number}.{name}" if len(order) > 1 else name
            state = StateClass(name, part.state, page_size, 2, 1, counts[part], reservation, **rules)
            classes.append(replace(state, table_len=max(1, state.max_pages(max_len, chunk_len)) if paged else 1))
        places = [{name: order.index(part) for name, part in layer.held.items()} for layer in layers]
        targeted = with_targets(tuple(classes), places)
        read = [place if source is None else source for place, (_, source) in enumerate(sources)]
        shares = [_share(layers[place], places[place]) for place in read]
        reasons = {name.partition(".")[2]: reason for name, reason in skipped(declared, memory).items()}
        tokens = [state for layer in stored for state in layer.values() if state.per_token]
        token_bytes = sum(state.unit_bytes for state in tokens)
        num_selecting = sum(state.num_readers for state in tokens if state.reading)
        counted = dict(Counter(zip((group for group, _ in sources), shares, strict=True)))
        return cls(targeted, counted, config.memory, reasons, token_bytes, num_selecting)

    def logical_bytes(self, context: Context) -> int:
        """Bytes of one sequence's tokens and states that stay."""
        return sum(
            state.spec.logical_bytes(count, state.page_size) * state.num_layers
            for state, count in zip(self.classes, self._lengths(context), strict=True)
            if count
        )

    def index_bytes(self, context: Context) -> int:
        """Bytes of what is noted of one sequence's pages, to choose which are read."""
        pages = pages_at(self.classes, context.prompt_len, context.context_len)
        each = zip(self.classes, pages, strict=True)
        return sum(state.spec.index_bytes * count * state.num_layers for state, count in each)

    def read_bytes(self, context: Context) -> int:
        """Bytes that decoding the next token reads."""
        return self._bytes_of_a_step(context, 1)

    def moved_bytes(self, context: Context) -> int:
        """The same, with states and statistics, which are written back as well."""
        return self._bytes_of_a_step(context, 2)

    def _bytes_of_a_step(self, context: Context, times: int) -> int:
        """What is read of tokens, and so many times what there is one of a sequence."""
        total, ended = 0, any(has_ended(state, self.classes, context.prompt_len) for state in self.classes)
        weighs = self.memory.compression is not None and self.memory.compression.weighs and not ended
        for state, count in zip(self.classes, self._lengths(context), strict=True):
            if not count:
                continue
            read = state.spec.read_bytes(count, state.page_size) * (1 if state.spec.per_token else times)
            if weighs and state.retention is not None:  # keys once more, for the weights of all slots
                read += state.spec.arrays[0].num_bytes * count * state.spec.num_readers
            total += read * state.num_layers
        return total

    def mixing_flops(self, context: Context) -> float:
        """FLOPs of mixing for the next token, over what is read; where pages are selected, with the scores by which
        they are: of the index, or of all keys."""
        lengths, total = self._lengths(context), 0.0
        for (group, share), count in self.layers.items():
            shortened = [(number, weight) for number, weight in share if self._is_changed(group, number)]
            seen = context.context_len
            if shortened:
                slots = stored_at(self.classes, context.prompt_len, context.context_len)
                seen = round(sum(slots[number] * weight for number, weight in share))
            elif share:
                seen = lengths[share[0][0]]
            read, choosing = self._selected(group, share, seen)
            total += count * (group.decode_flops(read) + choosing)
        return total

    def intensity(self, context: Context) -> float:
        """FLOPs of mixing for each byte of state that decoding the next token moves."""
        return self.mixing_flops(context) / max(1, self.moved_bytes(context))

    def _selected(self, group: LayerGroup, share: Share, stored: int) -> tuple[int, int]:
        """Of so many stored slots those that are read, and the FLOPs of choosing them."""
        spec = self.classes[share[0][0]].spec if share else None
        if spec is None or spec.reading is None:
            return stored, 0
        read, width = spec.reading.slots_read(stored), spec.arrays[0].shape[-1]
        keys_of_index = sum(array.shape[-1] for array in spec.arrays if array.is_statistics)
        num_pages = -(-stored // spec.reading.page_size)
        looked_at = (stored - read) * width * spec.reading.reads_keys + num_pages * keys_of_index
        return read, 2 * group.num_heads * looked_at

    def _is_changed(self, group: LayerGroup, number: int) -> bool:
        """Whether a sequence stores other tokens of a layer than the mixer sees, or parts its heads."""
        state = self.classes[number]
        if state.retention or state.sealing:
            return True
        return state.spec.visible != group.spec(self.memory.dtype).visible

    def _lengths(self, context: Context) -> list[int]:
        """What each class's state is asked at: stored slots, or, where a window forgets, the tokens."""
        slots = stored_at(self.classes, context.prompt_len, context.context_len)
        windowed = [state.spec.span is not None for state in self.classes]
        return [context.context_len if is_window else n for is_window, n in zip(windowed, slots, strict=True)]


def _share(layer: LayerParts, places: dict[str, int]) -> Share:
    """The token parts of a layer; open and sealed pages of the same heads are two of them."""
    (name, part), *_ = layer.held.items()
    if not layer.joined:
        return ((places[name], 1.0),) if part.state.per_token else ()
    (joined,) = layer.joined.values()
    whole = sum(len(heads) for _, heads in joined.heads)
    weights = {part: len(heads) / whole for part, heads in joined.heads}
    return tuple(
        (places[held], weights.get(part, 1.0)) for part, held in joined.names if part in weights or part == "sealed"
    )


def _kind(spec: State) -> str:
    if not spec.per_token:
        return "recurrent"
    return "full" if spec.span is None else f"local{spec.span + 1}"


def most_pages(state: StateClass, context: Context, chunk_len: int) -> int:
    """The most pages that one sequence ever holds of a class; a contiguous block is of the whole context."""
    if state.contiguous:
        return context.context_len
    if not state.paged or state.is_sealed or state.retention or state.sealing:
        return state.max_pages(context.context_len, chunk_len, context.prompt_len)
    return max_pages_for_step(state.spec, context.context_len, chunk_len, state.page_size)
