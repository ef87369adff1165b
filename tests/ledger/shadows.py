"""A naive shadow of a sequence, and small ledgers over states of every kind."""

from dataclasses import dataclass, field

from kvlab.ledger.classes import StateClass
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.memory_states import SealedState
from kvlab.ledger.retention import Sealing
from kvlab.ledger.states import ArraySpec, LatentState, RecurrentState, TokenState
from pallas_kernels.visible import Visible

FULL = TokenState(2, 4, 4)
WINDOWED = TokenState(1, 4, 4, visible=Visible(window=5, num_sinks=2))
CHUNKED = TokenState(1, 2, 2, "float16", visible=Visible(chunk=6), scale_dtype="float16").stored("int8")
LATENT = LatentState(4, 2)
STATE = RecurrentState((ArraySpec("ssm", (3, 3), "float32"),))
SEALED = SealedState(2, 4, 4, group=2)
"""Takes the full pages of the first class."""
MODELS = {
    "full": (FULL,),
    "window": (WINDOWED,),
    "recurrent": (STATE,),
    "full_window": (FULL, WINDOWED),
    "latent_chunked": (LATENT, CHUNKED),
    "hybrid": (FULL, WINDOWED, STATE),
    "two_states": (CHUNKED, STATE, RecurrentState((ArraySpec("conv", (5,), "float32"),))),
    "sealed": (FULL, SEALED),
    "sealed_hybrid": (FULL, WINDOWED, STATE, SEALED),
}
MAX_LEN, CHUNK_LEN = 26, 6
HOST_PAGES = 9


def make_ledger(
    model: str, page_size: int, num_pages: int, num_slots: int, sealing: tuple[int, bool] = (0, True), **options
) -> Ledger:
    """A small ledger over the states of one of MODELS; `sealing` is the residual, and whether prompts are sealed at
    their end only."""
    classes = []
    if SEALED in MODELS[model]:
        return Ledger(sealing_classes(model, page_size, num_pages, num_slots, sealing), MAX_LEN, CHUNK_LEN, **options)
    for number, spec in enumerate(MODELS[model]):
        name = f"{number}.{type(spec).__name__}"
        if spec.per_token:
            whole = StateClass(name, spec, page_size, num_pages, 99, 1 + number, num_host_pages=HOST_PAGES)
            classes.append(
                StateClass(
                    name,
                    spec,
                    page_size,
                    num_pages,
                    whole.max_pages(MAX_LEN, CHUNK_LEN),
                    1 + number,
                    num_host_pages=HOST_PAGES,
                )
            )
        else:
            classes.append(StateClass(name, spec, 1, num_slots, 1, 2, num_host_pages=3))
    return Ledger(classes, MAX_LEN, CHUNK_LEN, page_size=page_size, **options)


def sealing_classes(
    model: str, page_size: int, num_pages: int, num_slots: int, sealing: tuple[int, bool]
) -> list[StateClass]:
    """Classes of which the first seals its pages into the last."""
    classes = []
    for number, spec in enumerate(MODELS[model]):
        if not spec.per_token:
            classes.append(StateClass("state", spec, 1, num_slots, 1, 2, num_host_pages=3))
            continue
        rule = Sealing(sealing[0], page_size, CHUNK_LEN, sealing[1]) if number == 0 else None
        count = 1 + MAX_LEN // page_size + num_pages // 4 if spec is SEALED else num_pages
        state = StateClass(
            f"{number}.{type(spec).__name__}",
            spec,
            page_size,
            count,
            99,
            1 + (number == 1),
            num_host_pages=HOST_PAGES,
            sealing=rule,
            sealed_name=f"{len(MODELS[model]) - 1}.SealedState" if rule else "",
        )
        classes.append(state)
    return classes


@dataclass
class Shadow:
    """What a sequence must remember: `ids` committed, `drafts` in flight, all of it, in plain lists.

    `kept` are the positions of the tokens that compaction or sealing left of a class, in the order of their slots, and
    of a class of sealed pages those that it has. `losses` says at which length something was dropped or rounded, and by
    which operation: from there on, what is computed is not what it would have been.
    """

    space: str | None
    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    lookahead: int = 0
    kept: dict[int, list[int]] = field(default_factory=dict)
    losses: list[tuple[int, int]] = field(default_factory=list)
    sealed: int | None = None
    """The class of sealed pages."""

    def tag(self, position: int) -> tuple:
        """What the content of a token's slot depends on; of a recurrent state, that of the last token it has seen."""
        history = (self.ids + self.drafts)[: position + 1]
        return (*history, *(("lossy", loss) for length, loss in self.losses if length <= position))

    def slots(self, number: int) -> list[int]:
        """The positions of the tokens that a class stores, in the order of their slots."""
        return self.kept.get(number, [] if number == self.sealed else list(range(len(self.ids))))

    def twin(self) -> "Shadow":
        """The same, in lists of its own."""
        kept = {number: list(positions) for number, positions in self.kept.items()}
        lists = list(self.prompt), list(self.ids)
        return Shadow(self.space, *lists, kept=kept, losses=list(self.losses), sealed=self.sealed)
