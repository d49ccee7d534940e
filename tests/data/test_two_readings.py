"""Rows read for a student and for a teacher with another tokenizer: encoded, packed, batched, and read on the fly."""

import pickle
from typing import Any

import numpy as np
import pytest
from alignment_laws import PARTS, SPECIAL
from chat_templates import CHATML, FORGETFUL
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import EXACT, fresh, reader
from tokenizers import AddedToken

from kdlm.data import DataSection, load_data
from kdlm.data.collate import Collator
from kdlm.data.encoding import leading_tokens
from kdlm.data.load import text_collator
from kdlm.data.share import Share
from kdlm.data.two_readings import COLUMNS, PairCollator, Reader
from kdlm.spelling import spelling_of

LLAMA = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' </s>' }}"
    "{% elif m.role == 'user' %}{{ '<s>[INST] ' + m.content.strip() + ' [/INST]' }}{% endif %}{% endfor %}"
)
SYSTEM = "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}" + CHATML
TURNS = [
    {"role": "user", "content": "How many are 2 + 2?"},
    {"role": "assistant", "content": "The answer is 4, naïvely."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "def f(x):\n    return x  # 6 👩‍🔬 and more than thirty-two bytes of it"},
]


def with_template(kind: str, template: str) -> Any:
    tokenizer = fresh(kind)
    tokenizer.chat_template = template
    return tokenizer


def load(tmp_path: Any, paths: Any, ours: Any, theirs: Any, **section: Any) -> Any:
    sources = [{"path": path} for path in ([paths] if isinstance(paths, str) else paths)]
    given = {"cache": str(tmp_path / "cache"), "train": sources, **section}
    return load_data(DataSection.model_validate(given), ours, theirs)


def sides(row: dict[str, Any], ours: Any, theirs: Any) -> list[tuple[bytes, bytes]]:
    """Return what each chunk spells for the student and for the teacher; the name of a control token."""
    found = []
    for chunk in range(int(max(row["chunks"], default=-1)) + 1):
        both = []
        for tokenizer, ids, numbers in ((ours, "input_ids", "chunks"), (theirs, "their_ids", "their_chunks")):
            some = [int(i) for i, c in zip(row[ids], row[numbers], strict=True) if c == chunk]
            both.append(spelling_of(tokenizer).text(some))
        found.append((both[0], both[1]))
    return found


def said_bytes(row: dict[str, Any], ours: Any, theirs: Any) -> bytes:
    """Return what the chunks say, after seeing that both sides say the same, but for a space before an answer."""
    texts = sides(row, ours, theirs)
    ends = {spelling_of(ours).pieces[i] for i in spelling_of(ours).control}
    parts = []
    for mine, other in texts:
        if mine in ends:
            parts.append(b"|")
            continue
        short, long = sorted((mine, other), key=len)
        assert short == long or (long == b" " + short and (not parts or parts[-1] == b"|")), (mine, other)
        parts.append(short)
    return b"".join(parts)


def said(row: dict[str, Any], ours: Any, theirs: Any) -> str:
    return said_bytes(row, ours, theirs).decode()


@pytest.mark.parametrize("kinds", [("1k", "spbpe-1k"), ("unigram-1k", "bytes"), ("byt5", "1k"), ("bytes", "byt5")])
@pytest.mark.parametrize("max_length", [8, 30, 1000])
def test_plain_text_is_split_where_both_have_a_border_and_nothing_of_it_is_lost(tmp_path, jsonl, kinds, max_length):
    ours, theirs = map(reader, kinds)
    text = "def f(x):\n    return x + 1  # naïve, ok?\n" * 3
    data = load(tmp_path, jsonl([{"text": text}]), ours, theirs, max_length=max_length)
    rows = list(data.train)
    assert all(len(row["input_ids"]) <= max_length and len(row["their_ids"]) <= max_length for row in rows)
    whole = b"".join(said_bytes(row, ours, theirs) for row in rows).decode()
    name = spelling_of(ours).text([ours.eos_token_id]).decode()
    assert (text + "|").endswith(whole) or (text + name).endswith(whole)
    assert len(whole) > len(text) - 8, "all but what begins with the first token of either"
    for row in rows:
        for labels, ids, chunks in (("labels", "input_ids", "chunks"), ("their_labels", "their_ids", "their_chunks")):
            trained = row[labels] != -100
            assert trained[row[chunks] >= 0].all() and (row[ids][trained] == row[labels][trained]).all()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (("1k", CHATML), ("spbpe-1k", LLAMA)),
        (("spbpe-1k", LLAMA), ("1k", FORGETFUL)),
        (("bytes", CHATML), ("4k", FORGETFUL)),
        (("unigram-1k", LLAMA), ("1k", SYSTEM)),
        (("1k", CHATML), ("bytes", CHATML)),
    ],
)
def test_answers_are_aligned_whatever_templates_write_around_them(tmp_path, jsonl, ours, theirs):
    ours, theirs = with_template(*ours), with_template(*theirs)
    (row,) = load(tmp_path, jsonl([{"messages": TURNS}]), ours, theirs).train
    closed = [token for token in row["labels"].tolist() if token in spelling_of(ours).control]
    assert len(closed) == 2
    words = said(row, ours, theirs)
    assert words.count("|") == 2, "the ends of both turns are paired"
    assert [answer.strip() for answer in words.split("|")[:-1]] == [turn["content"] for turn in TURNS[1::2]]


def test_tools_that_each_template_describes_in_its_own_way_leave_the_answers_aligned(tmp_path, jsonl):
    described = "{% for t in tools or [] %}{{ '<|im_start|>' + t | tojson + '<|im_end|>' }}{% endfor %}" + CHATML
    ours, theirs = with_template("1k", CHATML), with_template("bytes", described)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    data = load(tmp_path, jsonl([{"messages": TURNS, "tools": tools}]), ours, theirs)
    (row,) = data.train
    assert len(row["their_ids"]) > len(row["input_ids"])
    assert said(row, ours, theirs).split("|")[:2] == [turn["content"] for turn in TURNS[1::2]]


@pytest.mark.parametrize("kind", ["wordpiece-1k", "nfkc-1k"])
def test_a_tokenizer_that_loses_text_is_aligned_in_its_conversation(tmp_path, jsonl, kind):
    for ours, theirs in ((reader(kind), reader("4k")), (reader("spbpe-1k"), reader(kind))):
        (row,) = load(tmp_path, jsonl([{"messages": TURNS}]), ours, theirs).train
        assert (row["chunks"][row["labels"] != -100] >= 0).mean() > 0.9
        assert (row["their_chunks"][row["their_labels"] != -100] >= 0).mean() > 0.9


@pytest.mark.parametrize("template", [LLAMA, FORGETFUL])
@pytest.mark.parametrize(("mine", "other"), [(60, None), (None, 60), (58, 62)])
def test_a_conversation_that_was_cut_on_a_side_is_aligned_up_to_there(tmp_path, jsonl, template, mine, other):
    kind = "spbpe-1k" if template == LLAMA else "4k"
    ours, theirs = with_template("1k", CHATML), with_template(kind, template)
    limits = {"max_length": mine or 1000, "teacher_max_length": other or 1000}
    data = load(tmp_path, jsonl([{"messages": TURNS[2:]}]), ours, theirs, **limits)
    (row,) = data.train
    assert len(row["input_ids"]) <= limits["max_length"] and len(row["their_ids"]) <= limits["teacher_max_length"]
    words = said(row, ours, theirs)
    cut = words.removesuffix("|").strip()
    assert len(cut) > 20 and TURNS[3]["content"].startswith(cut)
    assert data.report.train[0].truncated == 1


def test_a_completion_is_aligned_from_its_prompt_on(tmp_path, jsonl):
    ours, theirs = reader("1k"), reader("spbpe-1k")
    rows = [
        {"prompt": "What is 2 + 2? ", "completion": "It is 4."},
        {"prompt": "d", "completion": "def f(x): return x"},
        {"prompt": "", "completion": "the answer is 4"},
    ]
    found = list(load(tmp_path, jsonl(rows), ours, theirs).train)
    words = [said(row, ours, theirs) for row in found]
    assert words[:2] == ["It is 4.|", "def f(x): return x|"]
    assert words[2].endswith("answer is 4|"), "the first token of a text is not predicted"


def test_a_bos_token_on_one_side_is_in_no_chunk(tmp_path, jsonl):
    ours, theirs = reader("spbpe-1k"), reader("bytes")
    assert leading_tokens(ours) and not leading_tokens(theirs)
    (row,) = load(tmp_path, jsonl([{"text": "the answer"}]), ours, theirs).train
    assert row["chunks"][0] == -1 and said(row, ours, theirs).endswith("answer|")


def test_rows_that_are_not_aligned_are_reported_with_what_either_side_reads(tmp_path, jsonl):
    shout = CHATML.replace("m.content +", "(m.content | upper) +")
    ours, theirs = with_template("1k", CHATML), with_template("bytes", shout)
    rows = [{"messages": [TURNS[0], {"role": "assistant", "content": text}]} for text in ("4 = 4", "Four")]
    data = load(tmp_path, jsonl(rows), ours, theirs)
    assert len(data.train) == 1
    assert "1 rows not used, not aligned" in str(data.report)
    assert "the student reads 'Four', the teacher 'FOUR'" in str(data.report)


def test_templates_that_disagree_on_the_number_of_answers_are_not_aligned(tmp_path, jsonl):
    twice = [TURNS[0], TURNS[1], TURNS[1], TURNS[2], TURNS[3]]
    joined = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    joined += "{% endgeneration %}{% else %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    ours, theirs = with_template("1k", CHATML), with_template("bytes", joined)
    with pytest.raises(ValueError, match=r"not aligned: .*3 answers by the student's template, 2 by the teacher's"):
        load(tmp_path, jsonl([{"messages": twice}]), ours, theirs)


def test_what_cannot_be_read_twice_is_refused(tmp_path, jsonl):
    chat, text = jsonl([{"messages": TURNS}], "chat.jsonl"), jsonl([{"text": "a"}], "text.jsonl")
    with pytest.raises(ValueError, match=r"the teacher's tokenizer: chat and completion data need a fast tokenizer"):
        load(tmp_path, chat, reader("1k"), with_template("byt5", CHATML))
    with pytest.raises(ValueError, match="loss_on: all trains on what chat templates write"):
        load(tmp_path, chat, reader("1k"), reader("bytes"), loss_on="all")
    with pytest.raises(ValueError, match=r"data source .*: neither the student's nor the teacher's tokenizer"):
        load(tmp_path, text, reader("nfkc-1k"), reader("wordpiece-1k"))


def test_only_what_a_second_reading_depends_on_changes_its_fingerprint(tmp_path, jsonl):
    path = jsonl([{"messages": TURNS}])

    def name(theirs: Any, **section: Any) -> str:
        return load(tmp_path, path, reader("1k"), theirs, **section).fingerprints["train"]

    alone, both = name(None), name(reader("bytes"))
    assert name(None, teacher_chat_template=LLAMA, teacher_max_length=512) == alone != both
    assert name(reader("bytes")) == both == name(reader("bytes"), teacher_max_length=1024)
    others = {name(reader("4k")), name(reader("bytes"), teacher_max_length=512)}
    others |= {name(reader("bytes"), teacher_chat_template=SYSTEM), name(with_template("bytes", SYSTEM))}
    assert len(others | {both, alone}) == 6


@pytest.mark.parametrize("kinds", [("1k", "spbpe-1k"), ("unigram-1k", "byt5")])
def test_packing_batching_and_streaming_keep_every_chunk(tmp_path, jsonl, kinds):
    ours, theirs = map(reader, kinds)
    path = jsonl([{"text": f"def f{n}(x):\n    return x + {n}"} for n in range(5)])
    plain = load(tmp_path, path, ours, theirs, max_length=64)
    rows = list(plain.train)
    texts = sorted(side for row in rows for side in sides(row, ours, theirs))
    packed = load(tmp_path, path, ours, theirs, max_length=64, packing="pack")
    stream = load(tmp_path, path, ours, theirs, max_length=64, streaming=True, shuffle_buffer=0)
    streamed = load(tmp_path, path, ours, theirs, max_length=64, streaming=True, packing="pack")
    free = load(tmp_path, path, ours, theirs, max_length=64, packing="padding_free")
    for data in (plain, packed, stream, streamed, free):
        some = list(data.train)
        batch = data.collator(some)
        theirs_of = batch["theirs"]
        flat = {
            "input_ids": batch["input_ids"].flatten(),
            "chunks": batch["chunks"].flatten(),
            "their_ids": theirs_of["input_ids"].flatten(),
            "their_chunks": theirs_of["chunks"].flatten(),
        }
        assert sorted(sides(flat, ours, theirs)) == texts
        assert (batch["labels"][batch["chunks"] >= 0] != -100).all()
        assert (theirs_of["labels"][theirs_of["chunks"] >= 0] != -100).all()
        padding = theirs_of.get("attention_mask")
        assert padding is None or (theirs_of["chunks"][padding == 0] == -1).all()
        spelling = spelling_of(ours)
        ids, labels = (np.concatenate([row[name] for row in some]) for name in ("input_ids", "labels"))
        sizes = [size for row in some for size in row.get("seq_lengths", [len(row["input_ids"])])]
        parts = [np.split(side, np.cumsum(sizes)[:-1]) for side in (ids, labels)]
        trained = [spelling.count(part[of != -100]) for part, of in zip(*parts, strict=True)]
        assert batch["bytes"].tolist() == trained


def test_a_rank_without_a_row_gets_one_that_trains_on_nothing(tmp_path, jsonl):
    data = load(tmp_path, jsonl([{"text": "the answer is 4"}]), reader("1k"), reader("bytes"))
    row = Share(data.train, 1, 2)[0]
    batch = data.collator([row])
    assert batch["bytes"].tolist() == [0]
    for side in (batch, batch["theirs"]):
        assert (side["labels"] == -100).all() and (side["chunks"] == -1).all()


def test_a_collator_that_goes_to_a_worker_carries_the_tokenizers_alone(tmp_path, jsonl):
    data = load(tmp_path, jsonl([{"text": "the answer is 4"}]), reader("4k"), reader("bytes"))
    bare = pickle.dumps((reader("4k"), reader("bytes")))
    before = data.collator(list(data.train))
    sent = pickle.dumps(data.collator)
    assert len(sent) < len(bare) + 2000
    after = pickle.loads(sent)(list(data.train))
    assert (after["chunks"] == before["chunks"]).all() and after["bytes"].tolist() == before["bytes"].tolist()


texts = st.lists(st.sampled_from(PARTS + SPECIAL) | st.text(max_size=3), max_size=8).map("".join)
exact_pairs = st.sampled_from([(a, b) for a in EXACT for b in [*EXACT, "wordpiece-1k"] if a != b])


def alike(mine: bytes, other: bytes) -> bool:
    short, long = sorted((side.replace("▁".encode(), b" ") for side in (mine, other)), key=len)
    return long in (short, b" " + short)


@settings(max_examples=150, deadline=None)
@given(exact_pairs, st.data(), st.booleans(), st.booleans())
def test_whatever_ids_a_student_samples_its_teacher_reads_the_same_text(kinds, data, prompted, ended):
    ours, theirs = map(reader, kinds)
    spelling = spelling_of(ours)
    size = len(spelling.pieces)
    drawn = data.draw(st.lists(st.integers(0, size + 5), max_size=10) | texts)
    ids = spelling.ids(drawn) if isinstance(drawn, str) else drawn
    prompt = spelling.ids("How? ") if prompted else []
    row: dict[str, Any] = {"input_ids": [*prompt, *ids, *([ours.eos_token_id] if ended else [])]}
    row["labels"] = [-100] * len(prompt) + row["input_ids"][len(prompt) :]
    row["labels"][:1] = [-100] * len(row["labels"][:1])
    if prompted and data.draw(st.booleans()):
        row["their_prompt"] = [*leading_tokens(theirs), *spelling_of(theirs).ids("How?\n")]
    read = Reader(ours, theirs)(row)
    assert len(read["their_ids"]) == len(read["their_labels"]) == len(read["their_chunks"])
    assert (np.asarray(row["labels"])[read["chunks"] >= 0] != -100).all()
    if kinds[1] != "wordpiece-1k":
        for mine, other in sides({**row, **read}, ours, theirs):
            if mine is not None and other is not None and b"<" not in mine:
                replaced = mine.decode(errors="replace").encode()  # what the teacher reads where there is no character
                assert alike(mine, other) or alike(replaced, other)
    if row["input_ids"] and read["their_ids"]:
        batch = PairCollator(Collator(0), Collator(0), ours, theirs)([row])
        assert batch["chunks"].max() == max(read["chunks"])


@pytest.mark.parametrize(
    "kinds", [("1k", "spbpe-1k"), ("spbpe-1k", "1k"), ("bytes", "unigram-1k"), ("unigram-1k", "4k")]
)
def test_a_students_own_text_is_read_as_the_data_would_be(tmp_path, jsonl, kinds):
    ours, theirs = map(reader, kinds)
    path = jsonl([{"text": "def f(x):\n    return x  # naïve 👩‍🔬"}])
    (row,) = load(tmp_path, path, ours, theirs).train
    read = Reader(ours, theirs)({name: row[name] for name in ("input_ids", "labels")})
    for name in COLUMNS:
        assert list(read[name]) == row[name].tolist(), name


def test_a_students_answer_follows_the_teachers_prompt_and_ends_as_the_teacher_ends():
    ours, theirs = reader("spbpe-1k"), reader("4k")
    start = theirs.convert_tokens_to_ids("<|im_start|>")
    prompt = [start, *theirs("user\nHi", add_special_tokens=False)["input_ids"]]
    asked = [*leading_tokens(ours), ours.convert_tokens_to_ids("[INST]"), *spelling_of(ours).ids("Hi")]
    asked.append(ours.convert_tokens_to_ids("[/INST]"))
    answer = spelling_of(ours).ids("def f")
    row = {"input_ids": [*asked, *answer, ours.eos_token_id], "their_prompt": prompt}
    row["labels"] = [-100] * len(asked) + row["input_ids"][len(asked) :]
    read = Reader(ours, theirs)(row)
    assert read["their_ids"] == [*prompt, *theirs("def f")["input_ids"], theirs.eos_token_id]
    assert said({**row, **read}, ours, theirs) == "def f|"
    end = theirs.convert_tokens_to_ids("<|im_end|>")
    assert Reader(ours, theirs)({**row, "their_closing": [end]})["their_ids"][-1] == end
    unfinished = {**row, "input_ids": row["input_ids"][:-1], "labels": row["labels"][:-1]}
    assert Reader(ours, theirs)(unfinished)["their_ids"] == [*prompt, *theirs("def f")["input_ids"]]


def test_a_sentencepiece_teacher_reads_an_answer_after_text_without_a_space_more():
    ours, theirs = reader("1k"), reader("unigram-1k")
    prompt = [theirs.convert_tokens_to_ids("<|assistant|>"), *spelling_of(theirs).ids("Answer:\n")]
    row = {"input_ids": [*ours("Q:")["input_ids"], *ours("four")["input_ids"]], "their_prompt": prompt}
    asked = len(ours("Q:")["input_ids"])
    row["labels"] = [-100] * asked + row["input_ids"][asked:]
    read = Reader(ours, theirs)(row)
    assert spelling_of(theirs).text(read["their_ids"][len(prompt) :]) == b"four"


def test_a_student_whose_tokens_do_not_say_its_text_cannot_be_read():
    with pytest.raises(ValueError, match="the student's tokenizer does not give back the text"):
        Reader(reader("wordpiece-1k"), reader("1k"))({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]})


def test_an_added_token_that_eats_the_space_around_it_misaligns_nothing(tmp_path, jsonl):
    ours = fresh("1k")
    ours.add_tokens([AddedToken("<tool>", lstrip=True, rstrip=True), AddedToken("<think>", normalized=True)])
    theirs = reader("bytes")
    (row,) = load(tmp_path, jsonl([{"text": "a <tool> b <think> c"}]), ours, theirs).train
    found = sides(row, ours, theirs)
    assert [mine for mine, other in found if mine != other and mine != b"<eos>"] == [b"<tool>"]
    assert b"".join(other for _, other in found).endswith(b" <tool> b <think> c<eos>")


def test_text_collator_reads_pairs_only_for_a_teacher_with_a_tokenizer():
    assert isinstance(text_collator("padded", reader("1k")), Collator)
    assert isinstance(text_collator("padded", reader("1k"), reader("bytes")), PairCollator)
