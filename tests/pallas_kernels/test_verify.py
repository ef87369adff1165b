"""The cases that the bench runs on a chip, where nobody has seen them before."""

import pytest

from pallas_kernels.bench.verify import cases
from pallas_kernels.kv_write import proof as write_proof
from pallas_kernels.ops import OPS
from pallas_kernels.paged_attention import proof

REFERENCES = {
    module.__name__.split(".")[1]: module.by_api(implementation="reference") for module in (proof, write_proof)
}


def cases_of(platform: str) -> list:
    """Named cases, and generated ones marked as such."""
    return [
        pytest.param(
            op, case, id=f"{platform}, {op}, {name}", marks=pytest.mark.generated if "generated" in name else ()
        )
        for op, name, case in cases(platform, 40)
    ]


@pytest.mark.parametrize(("op", "case"), [*cases_of("gpu"), *cases_of("tpu")])
def test_every_case_of_a_chip_goes_through_the_reference(op, case):
    OPS[op].check(REFERENCES[op], **case)
