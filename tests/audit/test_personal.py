"""What is personal or secret is found, what only looks like it is not, and the report shows neither."""

import random
import string
import sys
from itertools import pairwise

import pytest

from kdlm.audit import KINDS, PHONE, masked, personal
from kdlm.audit.words import read

DRAWN = "q7Z" + "".join(random.Random(0).choices(string.ascii_letters + string.digits, k=90))
SECRET = {  # in two parts, so that nothing which looks for secrets takes this file for one
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIE\n-----END RSA " + "PRIVATE KEY-----",
    "AWS key": "AKIA" + "IOSFODNN7EXAMPLE",
    "model provider key": "sk-" + "proj-" + DRAWN[:40],
    "GitHub token": "ghp_" + DRAWN[:36],
    "Google key": "AIza" + DRAWN[:35],
    "Slack token": "xoxb-" + "123456789012-" + DRAWN[:24],
    "Hugging Face token": "hf_" + DRAWN[:34],
    "JSON web token": "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0In0." + DRAWN[:30],
    "secret": DRAWN[:32],
    "email": "jane.doe",
    "IBAN": "DE89 3704 0044 0532 0130 00",
    "card number": "4111 1111 1111 1111",
    "IP address": "8.8.4.4",
    PHONE: "+49 30 901820",
}
AROUND = {"secret": 'api_key = "{}"', "email": "{}@acme.io"}


@pytest.mark.parametrize("kind", [*KINDS, PHONE])
def test_each_kind_is_found_and_masked(kind):
    text = f"Write this down: {AROUND.get(kind, '{}').format(SECRET[kind])} and go."
    (hit,) = personal(text)
    assert hit.kind == kind and text[hit.start : hit.end] == SECRET[kind]
    assert masked(text, [hit]) == text.replace(SECRET[kind], f"[{kind}]")


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112 is no card, the last digit is wrong",
        "DE88 3704 0044 0532 0130 00 is no account",
        "1234567890123456 + 1 = 1234567890123457",
        "What is 4111 + 1111 + 1111 + 1111?",
        "12 + 34567890 and +123456789",
        "write to someone@example.com",
        "git clone git@github.com:owner/name",
        "the key is understanding-each-other-well",
        "password = getpass.getpass(prompt_for_it)",
        "secret of success: concentration",
        "sk-learn-is-a-library-of-estimators",
        "192.168.1.1, 127.0.0.1 and 10.0.0.1 are nobody's",
        "at 12:34:56 the ratio was 3.14159.",
        "see http://8.8.8.8/index.html",
        "a " * 1000,
        "token = get_token_from_environment_v2(); key: lowercase_function_name_1",
        "every[::10000] and rows[1::2000]",
    ],
)
def test_what_only_looks_like_it_is_not_found(text):
    assert personal(text) == []


@pytest.mark.parametrize("kind", [*KINDS, PHONE])
def test_each_kind_is_found_amid_signs_that_no_space_parts(kind):
    text = f"\u662f{AROUND.get(kind, '{}').format(SECRET[kind])}\u8c22\u8c22"
    assert [text[hit.start : hit.end] for hit in personal(text)] == [SECRET[kind]]


def test_letters_of_other_languages_are_part_of_an_address():
    assert masked("m\u00fcller@b\u00fcro.de", personal("m\u00fcller@b\u00fcro.de")) == "[email]@b\u00fcro.de"


def test_hits_do_not_overlap_and_are_in_order():
    text = f"token: {SECRET['GitHub token']}, {SECRET['email']}@acme.io, {SECRET['IBAN']}"
    hits = personal(text)
    assert [hit.kind for hit in hits] == ["GitHub token", "email", "IBAN"]
    assert all(one.end <= other.start for one, other in pairwise(hits))
    assert not any(SECRET[kind] in masked(text, hits) for kind in ("GitHub token", "email", "IBAN"))


def test_national_phone_numbers_are_found_where_a_region_is_said():
    text = "Call (212) 736-5000 today"
    assert personal(text) == [] and [hit.kind for hit in personal(text, "US")] == [PHONE]
    with pytest.raises(ValueError, match="region 'us': expected the two capitals of a country"):
        personal(text, "us")


def test_without_phonenumbers_a_region_is_refused_and_the_rest_goes_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "phonenumbers", None)
    monkeypatch.setattr("kdlm.audit.personal_data.finds_phones", lambda: False)
    assert personal("call +49 30 901820, or jane@acme.io")[0].kind == "email"
    with pytest.raises(ImportError, match=r"pip install 'kdlm\[audit\]'"):
        personal("call me", "US")


@pytest.mark.parametrize(
    "text",
    ["a" * 20_000, "a.b." * 5_000, "A" * 20_000, "1 " * 5_000, "key " * 5_000, "+1-" * 5_000, "8.8.4.4 " * 9_999],
)
def test_no_text_takes_long_to_read(text):
    personal(text)  # the guard is pytest's time limit: a pattern that looks again from every letter would take hours
    read(text)


def test_words_links_hosts_and_names_are_what_they_are():
    found = read("So we use Acme Cloud (see https://WWW.Acme.example/a?b=1). Ask bob@evil.shop, it's 2+2=4\u200b!")
    assert (
        found.words
        == " so we use acme cloud see https://www.acme.example/a?b=1 ask bob @ evil.shop it's 2 + 2 = 4 \u200b "
    )
    assert found.hosts == {"acme.example", "evil.shop"} and found.names == {"Acme Cloud"}
    assert read("import os.path; logger.info(self.net)").hosts == frozenset()
    assert read("我们 x").words == " 我 们 x "
