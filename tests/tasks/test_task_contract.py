"""Every registered task meets the contract of tasks."""

import pytest

from kvlab.tasks import TASKS
from tests.tasks.contracts import CONTRACT, SMALL


@pytest.mark.parametrize("meets", CONTRACT, ids=lambda meets: meets.__name__.removeprefix("assert_"))
@pytest.mark.parametrize("name", TASKS)
def test_contract(name, meets):
    meets(name)


def test_every_task_has_a_row():
    assert set(SMALL) == set(TASKS)
