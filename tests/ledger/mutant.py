"""What a planted bug is."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """What is wrong, where, the text replaced, and the test that must notice."""

    bug: str
    owner: object
    method: str
    old: str
    new: str
    caught_by: object
    arguments: tuple = ()
