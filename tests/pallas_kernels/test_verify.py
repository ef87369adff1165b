"""The cases that the bench runs on a chip, where nobody has seen them before."""

from functools import partial

import pytest

from pallas_kernels.bench.verify import cases
from pallas_kernels.kv_write import kv_write
from pallas_kernels.kv_write import proof as write_proof
from pallas_kernels.paged_attention import paged_attention, proof
from pallas_kernels.paged_prefill import paged_prefill

REFERENCES = {
    "paged_attention": partial(proof.check, partial(paged_attention, implementation="reference")),
    "paged_prefill": partial(proof.check, partial(paged_prefill, implementation="reference"), prefill=True),
    "kv_write": partial(write_proof.check, partial(kv_write, implementation="reference")),
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
    REFERENCES[op](**case)
