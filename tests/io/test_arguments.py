"""Numbers of every library become Python's own; what is none is refused by the argument's name."""

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from jaxmech.io.arguments import number, numbers_or_none, strings, whole_number, whole_numbers


@pytest.mark.parametrize(
    "given", [(1, 3), [1, 3], range(1, 4, 2), np.array([1, 3]), jnp.array([1, 3]), pd.Series([1, 3]), {1: "", 3: ""}]
)
def test_whole_numbers_of_anything_that_is_gone_through(given):
    got = whole_numbers("layers", given)
    assert got == (1, 3) and {type(value) for value in got} == {int}


@pytest.mark.parametrize(
    "given, said", [("13", "'13'"), (3, "3"), (np.int64(3), "3"), (["1"], "'1'"), ([1.0], "1.0"),
                    ([True], "bools; np.flatnonzero.mask. gives those of a mask"),
                    (np.array([1.5]), "1.5"), (None, "None"), ([None], "None")],
)  # fmt: skip
def test_what_are_no_whole_numbers(given, said):
    with pytest.raises(ValueError, match=f"layers: expected .*whole number.*, got {said}$"):
        whole_numbers("layers", given)


def test_one_number():
    for value in (4, np.int32(4), np.array(4), jnp.int32(4)):
        assert type(whole_number("steps", value)) is int and whole_number("steps", value) == 4
    for value in (0.5, np.float32(0.5), jnp.float32(0.5)):
        assert type(number("lr", value)) is float and number("lr", value) == 0.5
    assert type(number("lr", 1)) is int
    for value in (4.0, "4", True, None, np.array([4])):
        with pytest.raises(ValueError, match="steps: expected a whole number, got"):
            whole_number("steps", value)
    for value in ("1e-3", True, None, [1.0]):
        with pytest.raises(ValueError, match="lr: expected a number, got"):
            number("lr", value)
    with pytest.raises(ValueError, match="rows: expected a whole number of at least 1, got 0"):
        whole_number("rows", 0, 1)


def test_strings_one_by_one():
    for given in (["ab", "c"], iter(["ab", "c"]), np.array(["ab", "c"]), pd.Series(["ab", "c"])):
        assert list(strings("texts", given)) == ["ab", "c"]
    for given, said in (("some text", r"str; write \['some text'\]"), (b"abc", "bytes"), (3, "int"),
                        (np.array("abc"), "ndarray")):  # fmt: skip
        with pytest.raises(ValueError, match=f"texts: expected strings in a list, got one {said}"):
            strings("texts", given)
    with pytest.raises(ValueError, match="texts: expected strings, got 3 among them"):
        list(strings("texts", ["ab", 3]))


def test_numbers_some_of_which_are_not_known():
    assert numbers_or_none("l0", [12, None, np.float32(0.5)]) == (12, None, 0.5)
    for given, said in (("12", "numbers in a list, got '12'"), (12, "numbers in a list, got 12"), (["12"], "a number")):
        with pytest.raises(ValueError, match=f"l0: expected {said}"):
            numbers_or_none("l0", given)
