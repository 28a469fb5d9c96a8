"""Values that callers give: ids as data sets have them."""

import numpy as np
import pytest

from dti_dist.errors import UserError
from dti_dist.serving.texts import as_id


@pytest.mark.parametrize(
    ("given", "expected"),
    [("i1", "i1"), (7, "7"), (np.int64(7), "7"), (None, ""), (float("nan"), ""), (b"i1", "i1")],
)
def test_an_id_is_a_text_or_the_digits_of_an_integer(given, expected):
    assert as_id(given, "Item 0") == expected


@pytest.mark.parametrize("given", [True, 0.5, ["i1"]])
def test_what_is_no_id_is_refused(given):
    with pytest.raises(UserError, match="Item 0: expected a text, found"):
        as_id(given, "Item 0")
