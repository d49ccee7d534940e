"""Function calls: which functions of the standard library are completed, and calls of them with drawn arguments."""

import random
import re
from collections.abc import Callable

WORDS = "a sky is the Blue over river and quietly it Turns to stone lamp 7 days x1 under_score naïve co-op".split()
TAGS = ["<b>", "</i>", "&", '"quoted"', "'s", "&amp;", "&lt;", "&#62;", "&copy", "5 > 3"]
GLOBS = ["*", "?a*", "*.py", "[a-c]*", "*[!x]", "data?", "*.[ch]", "**", "[]*", "a[*]"]


def _words(draw: random.Random, low: int = 1, high: int = 6) -> list[str]:
    return draw.choices(WORDS, k=draw.randint(low, high))


def _lines(draw: random.Random) -> list[str]:
    pad = draw.choice(["", "  ", "    ", "\t"])
    return [pad + draw.choice(["", "  "]) + " ".join(_words(draw)) for _ in range(draw.randint(1, 5))]


def _path(draw: random.Random, slash: str = "/") -> str:
    parts = draw.choices(["usr", "lib", "..", ".", "", "a.tar.gz", ".bashrc", "file.txt", "dir"], k=draw.randint(1, 5))
    return draw.choice(["", slash, slash * 2, "c:", "c:" + slash] if slash == "\\" else ["", "", slash]) + slash.join(
        parts
    )


def _url(draw: random.Random) -> str:
    host = draw.choice(["example.org", "user@www.example.com:8080", "[::1]:80", ""])
    path = draw.choice(["", "/", "/a/b/../c", "/a;x", "rel/path", "/a%20b"])
    rest = draw.choice(["", "?q=1&r=a+b", "#part", "?x=%7E#y", "?a=&a=2;b"])
    return draw.choice(["http:", "ftp:", "mailto:", ""]) + ("//" + host if host else "") + path + rest


def _int(draw: random.Random) -> int:
    return draw.choice([0, 1, -1, draw.randint(-9, 99), draw.randint(-9, 99), draw.randint(-(10**6), 10**6)])


def _ints(draw: random.Random) -> list[int]:
    return [draw.randint(0, 12) for _ in range(draw.randint(1, 8))]


def _floats(draw: random.Random) -> list[float]:
    return [round(draw.uniform(0.5, 20), 2) for _ in range(draw.randint(3, 8))]


def _dict(draw: random.Random) -> dict[str, str]:
    return {word: draw.choice([*WORDS, "a b", "x&y=z", "50%"]) for word in _words(draw)}


KINDS: dict[str, Callable[[random.Random], object]] = {
    "int": _int,
    "nat": lambda draw: draw.randint(0, 40),
    "digit": lambda draw: draw.randint(1, 9),
    "bool": lambda draw: draw.random() < 0.5,
    "ints": _ints,
    "sorted": lambda draw: sorted(_ints(draw)),
    "floats": _floats,
    "eight": lambda draw: [round(draw.uniform(0.5, 20), 2) for _ in range(8)],
    "word": lambda draw: draw.choice([*WORDS, "x" * draw.randint(1, 30), ""]),
    "words": _words,
    "sortedwords": lambda draw: sorted(set(_words(draw))),
    "text": lambda draw: draw.choice([" ", "  ", ", ", "\n"]).join(_words(draw, 1, 14)),
    "lines": lambda draw: "\n".join(_lines(draw)) + draw.choice(["", "\n"]),
    "line": lambda draw: draw.choice(["", " ", "\n", "#\n", " # \n", "  x\n", *_lines(draw)]),
    "markup": lambda draw: " ".join(draw.choices([*WORDS, *TAGS], k=draw.randint(1, 6))),
    "path": _path,
    "winpath": lambda draw: _path(draw, "\\"),
    "paths": lambda draw: ["/" + "/".join(["usr", "lib"][: draw.randint(0, 2)] + _words(draw)) for _ in range(3)],
    "file": lambda draw: draw.choice(["data1", "a.py", "abc", "x.c", "Xyz.PY", "", "c.h", "a*"]),
    "glob": lambda draw: draw.choice(GLOBS),
    "url": _url,
    "query": lambda draw: "&".join(f"{word}={draw.choice(['', '1', 'a+b', '%41', 'ü'])}" for word in _words(draw)),
    "dict": _dict,
    "bytes": lambda draw: bytes(draw.choices(b"ab \x00\xff=?_~0", k=draw.randint(0, 12))),
    "ascii": lambda draw: "".join(draw.choices("abcXYZ =?_~09\t.", k=draw.randint(0, 12))).encode(),
    "byte": lambda draw: draw.choice(b"ab \t\x00\xff=?_~0."),
    "year": lambda draw: draw.choice([1900, 2000, 2023, 2024, draw.randint(1, 3000)]),
    "month": lambda draw: draw.randint(1, 12),
    "day": lambda draw: draw.randint(1, 28),
    "host": lambda draw: draw.choice(["www.example.com", "example.com", "10.0.0.1", ".example.com", "local", "x.y"]),
    "name": lambda draw: draw.choice(["__init__", "_private_", "name", "____", "__x", "_", "__a__", "x__"]),
    "header": lambda draw: draw.choice(["Keep-Alive", "host", "TE", "Date", "upgrade", "age", "Trailers"]),
    "address": lambda draw: draw.choice(["a@b.org", "Ann <a@b.org>", '"Ann B." <a@b>', "<a@b>", "Ann", "", '"x\\"y"']),
}  # fmt: skip
"""Kinds of arguments by the word that stands for one in a call, in braces."""


def draw_calls(name: str, template: str, count: int) -> list[str]:
    """Return so many different calls, always the same ones for a name; fewer where there are no more."""
    draw = random.Random(name)
    calls: dict[str, None] = {}
    for _ in range(20 * count):
        calls[re.sub(r"\{(\w+)\}", lambda found: repr(KINDS[found[1]](draw)), template)] = None
        if len(calls) == count:
            break
    return list(calls)


CALLS: dict[str, tuple[str, ...]] = {
    "bisect": (
        "bisect_left({sorted}, {digit})",
        "bisect_right({sorted}, {digit})",
        "(lambda a: (insort_left(a, {digit}), a))({sorted})",
        "(lambda a: (insort_right(a, {digit}), a))({sorted})",
    ),
    "heapq": (
        "(lambda a: (heappush(a, {digit}), a))({sorted})",
        "(lambda a: (heappop(a), a))({sorted})",
        "(lambda a: (heapreplace(a, {digit}), a))({sorted})",
        "(lambda a: (heappushpop(a, {digit}), a))({sorted})",
        "(lambda a: (heapify(a), a))({ints})",
        "nsmallest({digit}, {ints})",
        "nlargest({digit}, {ints})",
    ),
    "statistics": (
        "fmean({floats})",
        "geometric_mean({floats})",
        "median({ints})",
        "median_low({ints})",
        "median_high({ints})",
        "median_grouped({ints})",
        "mode({words})",
        "multimode({words})",
        "quantiles({floats}, n={digit})",
        "covariance({eight}, {eight})",
        "correlation({eight}, {eight})",
        "linear_regression({eight}, {eight})",
    ),
    "textwrap": (
        "dedent({lines})",
        "indent({lines}, '> ')",
    ),
    "string": ("capwords({text})",),
    "posixpath": (
        "normcase({path})",
        "isabs({path})",
        "join({path}, {path})",
        "split({path})",
        "splitdrive({path})",
        "splitroot({path})",
        "basename({path})",
        "dirname({path})",
        "commonpath({paths})",
    ),
    "ntpath": (
        "isabs({winpath})",
        "splitdrive({winpath})",
        "splitroot({winpath})",
        "split({winpath})",
        "basename({winpath})",
        "dirname({winpath})",
    ),
    "genericpath": ("commonprefix({paths})", "_splitext({path}, '/', None, '.')"),
    "shlex": ("quote({text})", "join({words})"),
    "difflib": (
        "IS_LINE_JUNK({line})",
        "_format_range_unified({nat}, {nat})",
        "_format_range_context({nat}, {nat})",
    ),
    "calendar": (
        "isleap({year})",
        "leapdays({year}, {year})",
        "weekday({year}, {month}, {day})",
        "timegm(({year}, {month}, {day}, {nat}, {nat}, {nat}))",
    ),
    "_pydatetime": (
        "_is_leap({year})",
        "_days_before_year({year})",
        "_days_in_month({year}, {month})",
        "_days_before_month({year}, {month})",
        "_ymd2ord({year}, {month}, {day})",
        "_ord2ymd({nat} * 1000 + 1)",
        "_divide_and_round({int}, {digit})",
    ),
    "fnmatch": (
        "translate({glob})",
    ),
    "glob": ("escape({file})",),
    "re": ("escape({markup})",),
    "html": ("escape({markup})",),
    "xml.sax.saxutils": (
        "__dict_replace({text}, {dict})",
        "escape({markup})",
        "unescape({markup})",
        "quoteattr({markup})",
    ),
    "urllib.parse": (
        "urlunsplit(('http', {host}, {path}, {query}, ''))",
        "urlunparse(('http', {host}, {path}, '', {query}, 'x'))",
        "quote({text})",
        "quote_from_bytes({bytes})",
        "unquote({query})",
        "unquote_plus({query})",
        "unquote_to_bytes({query})",
        "unwrap('<URL:' + {url} + '>')",
    ),
    "urllib.request": ("parse_http_list({text})",),
    "base64": (
        "b64encode({bytes})",
        "standard_b64encode({bytes})",
        "urlsafe_b64encode({bytes})",
        "b16encode({bytes})",
        "b85encode({bytes})",
        "a85encode({bytes})",
        "encodebytes({bytes})",
    ),
    "quopri": ("needsquoting(bytes([{byte}]), {bool}, {bool})", "quote(bytes([{byte}]))", "ishex(bytes([{byte}]))"),
    "email.quoprimime": (
        "header_check({byte})",
        "body_check({byte})",
        "body_length({ascii})",
        "unquote('=%02X' % {byte})",
        "body_encode({lines})",
        "decode({text})",
    ),
    "email.base64mime": ("header_length({ascii})", "header_encode({ascii})", "body_encode({ascii})"),
    "email.utils": ("unquote({address})", "decode_rfc2231({text})", "encode_rfc2231({text})"),
    "email._parseaddr": ("quote({markup})",),
    "http.cookiejar": (
        "is_HDN({host})",
        "liberal_is_HDN({host})",
        "escape_path({path})",
        "reach({host})",
        "join_header_words([[({word}, {word}), ('b', None)]])",
    ),
    "operator": (
        "concat({words}, {words})",
        "countOf({ints}, {digit})",
        "floordiv({int}, {digit})",
        "mod({int}, {digit})",
        "xor({int}, {nat})",
        "and_({int}, {nat})",
        "or_({int}, {nat})",
        "lshift({int}, {digit})",
        "rshift({int}, {digit})",
        "inv({int})",
        "neg({int})",
        "sub({int}, {int})",
        "mul({int}, {int})",
        "pow({int}, {digit})",
        "truediv({int}, {digit})",
        "getitem({ints}, 0)",
        "lt({int}, {int})",
        "ge({int}, {int})",
        "ne({digit}, {digit})",
        "length_hint({ints})",
    ),
    "inspect": ("cleandoc({lines})", "indentsize({line})"),
    "imaplib": ("Int2AP({nat} * {nat} * {nat})",),
    "ftplib": ("parse257('257 \"' + {path} + '\" created')", "parse150('150 data ({nat} bytes)')"),
    "smtplib": ("quoteaddr({address})", "quotedata({lines})"),
    "pydoc": (
        "splitdoc({lines})",
        "cram({text}, 5 + {digit})",
        "replace({text}, 'a', 'b', 'i', 'oo')",
        "stripid('<x at 0x7f{digit}a00>' + {word})",
    ),
    "doctest": ("_indent({lines})", "_comment_line({line})"),
    "json.encoder": ("py_encode_basestring({markup})", "py_encode_basestring_ascii({markup})"),
    "unittest.util": (
        "sorted_list_difference({sortedwords}, {sortedwords})",
        "unorderable_list_difference({words}, {words})",
        "three_way_cmp({digit}, {digit})",
        "_count_diff_all_purpose({words}, {words})",
        "_count_diff_hashable({words}, {words})",
    ),
    "enum": ("_is_dunder({name})", "_is_sunder({name})", "bin({int})"),
    "tarfile": ("nts({ascii} + b'\\0x', 'utf-8', 'strict')", "stn({word}, 12, 'utf-8', 'strict')", "itn({nat}, 8)"),
    "encodings": ("normalize_encoding({text})",),
    "ipaddress": ("_count_righthand_zero_bits({nat} * 8, 32)", "v4_int_to_packed({nat} * {nat} * 1000)"),
    "wsgiref.util": (
        "is_hop_by_hop({header})",
        "request_uri({'HTTP_HOST': {host}, 'wsgi.url_scheme': 'http', 'SCRIPT_NAME': {path}})",
    ),
    "wsgiref.headers": ("_formatparam({word}, {word})",),
    "gettext": ("c2py('n % 10 == 1 ? 0 : n > {digit} ? 1 : 2')({nat})",),
}  # fmt: skip
"""By module, calls in the module's names; each is of one function, the first of the module's that it names."""
