"""The table of dtypes: names, sizes and numpy's types belong together."""

import numpy as np
import pytest

from mfptq.dtypes import DTYPE_BITS, NUMPY_DTYPES, dtype_name


@pytest.mark.parametrize("name", NUMPY_DTYPES)
def test_numpy_holds_weights_in_their_size(name: str) -> None:
    array = np.zeros(3, NUMPY_DTYPES[name])
    assert 8 * array.itemsize == DTYPE_BITS[name]
    assert dtype_name(array) == name


def test_what_no_weights_come_in_has_no_name() -> None:
    with pytest.raises(KeyError):
        dtype_name(np.zeros(3, np.float64))
