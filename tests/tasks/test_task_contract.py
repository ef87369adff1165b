"""Every registered task meets the contract of tasks."""

import pytest

from kvlab.tasks import TASKS
from tests.tasks.contracts import CONTRACT


@pytest.mark.parametrize("meets", CONTRACT, ids=lambda meets: meets.__name__.removeprefix("assert_"))
@pytest.mark.parametrize("name", TASKS)
def test_contract(name, meets):
    meets(name)
