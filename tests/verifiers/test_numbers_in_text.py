"""Numbers are found and read by value, in time, and only where a text comes to one."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdlm.verifiers.numbers import given_number, only_number

DECIMALS = st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**15), max_value=10**15)
ENDLESS = 50_000


@given(DECIMALS, st.sampled_from(["{}", "${}$", "Answer: {}", "So **{}**.", "x = {} km", "\\boxed{{{}}}", "#### {}"]))
def test_a_number_is_read_by_its_value_whatever_stands_around_it(value, form):
    for text in (f"{value}", f"{value:,}", f"{value}".replace("-", "\u2212")):
        found = given_number(f"first 12 and 1/7,\nthen\n{form.format(text)}")
        assert found is not None and found.value == value and not found.percent


@given(st.integers(-999, 999), st.integers(1, 999))
def test_fractions_are_quotients(over, under):
    exact = Fraction(over, under)
    for text in (f"{over}/{under}", f"\\frac{{{over}}}{{{under}}}", f"{over} / {under}"):
        found = only_number(text)
        assert found is not None and abs(Fraction(found.value) - exact) <= abs(exact) / 10**99


@given(DECIMALS, st.integers(-99, 99))
def test_powers_of_ten_are_read(value, power):
    for form in ("{}e{}", "{}E{}", r"{} \times 10^{{{}}}", r"{} \cdot 10^{}", "{}x10^{}", "{} \u00d7 10^{{{}}}"):
        found = only_number(form.format(value, power))
        assert found is not None and found.value == value.scaleb(power)


@pytest.mark.parametrize(
    "text, value",
    [
        ("1{,}234", "1234"),
        (r"\$1\,234.50", "1234.50"),
        ("1\u202f234\u202f567", "1234567"),
        ("2 1/2 cups", "2.5"),
        (r"-\frac{3}{4}", "-0.75"),
        (r"\frac{-3}{4}", "-0.75"),
        ("- 5", "-5"),
        ("-$5", "-5"),
        ("$-5$", "-5"),
        (".5", "0.5"),
        ("5.", "5"),
        ("12 + 5 = 17", "17"),
        ("5 (since 2 + 3 = 5)", "5"),
        ("3/4 = 0.75", "0.75"),
        ("25 m^2", "25"),
        (r"25 \text{ m}^{2}", "25"),
        ("5 km/h", "5"),
        ("007", "7"),
        ("-0", "0"),
    ],
)
def test_these_are_one_number(text, value):
    found = only_number(text)
    assert found is not None and found.value == Decimal(value) and not found.percent


@pytest.mark.parametrize(
    "text",
    [
        *("", "none", "1.2.3", "734 or 735", "(1,2)", "3, 4", "10-5", "7:30", "x = 5 or x = -3"),
        *("H2O", "x_1", "x_{1}", "m^2", "2^10", "2^{10}", "210^2", "10^-3", "10^{-3}"),
        *(r"2\pi", "2\u03c0", r"\sqrt{2}", "\u221a2", "3/0", "0/0", "1e1000000", "1e" + "9" * ENDLESS, "\u0665"),
        *("nan", "NaN", "inf", "-inf", "Infinity", "\u221e", r"\infty"),
    ],
)
def test_these_are_no_number_or_several(text):
    assert only_number(text) is None


@pytest.mark.parametrize("text", ["50%", r"50\%", "50 %"])
def test_a_percent_sign_is_kept_beside_the_number(text):
    found = only_number(text)
    assert found is not None and (found.value, found.percent) == (50, True)


def test_without_a_marked_answer_the_last_number_counts():
    assert given_number("I have 3.\nThen 4 more, 7 in all.").value == 7
    assert given_number("pairs (1,2)").value == 2
    assert given_number("5 is what x^2 is") == given_number("5")
    assert given_number("many") is None
    assert given_number("7 of them.\nAnswer: many") is None, "what is marked counts, though it be no number"
    assert given_number("Answer: 7\nand 8 is not it").value == 7


@pytest.mark.parametrize(
    "text",
    [
        *("9", "1,", "- ", "1 ", "1/", "1 1/", "1e", "1^", "-1-", "=1", "1{,}", "\\frac{", "\\boxed{", "{", "answer:"),
        *("answer ", "final ", "#### 1", "####1\n", "*.*.", "<|a", "$", " ", "\n", "1.", "1.1.", "111,"),
    ],
)
@pytest.mark.timeout(20)  # a guard: what is quadratic takes minutes
def test_endless_text_is_read_in_time(text):
    for ending in ("", "1111", "1^", "}"):
        given_number(text * ENDLESS + ending)
    given_number("Answer: " + text * ENDLESS)


def test_endless_numbers_are_told_apart_by_their_last_digit():
    one, other = given_number("9" * ENDLESS), given_number("9" * (ENDLESS - 1) + "8")
    assert one is not None and other is not None and one.value != other.value


@given(st.text(alphabet="0123456789,./-+eE%$^_{}()=\\ xpi\n\u2212\u00d7", max_size=60))
def test_any_text_comes_to_a_finite_number_or_none(text):
    for found in (given_number(text), only_number(text)):
        assert found is None or found.value.is_finite()
