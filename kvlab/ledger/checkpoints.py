"""Which recurrent states are worth keeping."""

from dataclasses import dataclass

CHECKPOINTS = ("none", "every", "junctions", "all")


@dataclass(frozen=True)
class Checkpoints:
    """At which page boundaries a recurrent state is kept for later hits: each one costs a slot.

    "none"; "every" `interval` pages; "junctions" (after Marconi, arXiv 2411.19379): the last boundary of the prompt,
    the boundary where the prompt left what others had computed, and the newest boundary of the answer; "all".
    """

    name: str = "junctions"
    interval: int = 1

    def __post_init__(self) -> None:
        if self.name not in CHECKPOINTS:
            raise ValueError(f"checkpoints = {self.name!r}: must be one of {', '.join(CHECKPOINTS)}")
        if self.interval < 1:
            raise ValueError(f"checkpoint interval = {self.interval}: must be at least 1 page")

    def wants(self, boundary: int, prompt_pages: int, junction: int) -> bool:
        """Whether the state after `boundary` pages is kept; the prompt's last boundary is `prompt_pages`."""
        if self.name == "junctions":
            return boundary >= prompt_pages or boundary == junction
        return self.name == "all" or (self.name == "every" and boundary % self.interval == 0)
