"""Deliberately planted bugs, each with the named test that catches it: proof that those tests can fail.

A mutant is one method with one piece of its source replaced. The classes are the ones the tests use, so the named test
simply runs again and must now fail.
"""

import inspect
import textwrap

import pytest

from tests.ledger.mutants import MUTANTS
from tests.ledger.sealing_mutants import SEALING

PLANTED = [*MUTANTS, *SEALING]


@pytest.mark.parametrize("mutant", PLANTED, ids=lambda mutant: mutant.bug)
def test_the_named_test_catches(mutant, monkeypatch, tmp_path):
    function = getattr(mutant.owner, mutant.method)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(mutant.old) >= 1, f"{mutant.method} no longer holds {mutant.old!r}: rewrite this mutant"
    namespace: dict = {}
    module = inspect.getmodule(function)
    exec(
        compile(source.replace(mutant.old, mutant.new), f"<mutant of {mutant.method}>", "exec"),
        vars(module) | namespace,
        namespace,
    )
    monkeypatch.setattr(mutant.owner, mutant.method, namespace[mutant.method])
    wanted = inspect.signature(mutant.caught_by).parameters
    fixtures = {"monkeypatch": monkeypatch, "tmp_path": tmp_path}
    arguments = [*mutant.arguments, *(fixtures[name] for name in wanted if name in fixtures)]
    with pytest.raises(
        (AssertionError, pytest.fail.Exception, KeyError, ValueError, MemoryError, IndexError, RuntimeError)
    ):
        mutant.caught_by(*arguments)


def test_the_tests_pass_without_mutants():
    """The same calls, on the code as it is: a named test that fails anyway proves nothing."""
    for mutant in {(mutant.caught_by, mutant.arguments): mutant for mutant in PLANTED}.values():
        if not {"monkeypatch", "tmp_path"} & set(inspect.signature(mutant.caught_by).parameters):
            mutant.caught_by(*mutant.arguments)
