"""Plain distillation on bytes: what a teacher of tokens says of the next byte, at every byte."""

from dataclasses import replace

import pytest
import torch
from paired_batches import STEP, Says, batch_of, introduced
from readers import reader

from kdlm.data.byte_order import ByteOrder
from kdlm.losses import JSD, CrossEntropy, ForwardKL, forward_kl
from kdlm.methods import ByteKD
from kdlm.signal import Dense, Head, Hidden
from kdlm.spelling import spelling_of

SIZES = {"bytes": 260, "tiny": 512, "unigram-tiny": 448}


def nets(theirs: str) -> dict:
    return {"student": Says(260, 1), "teacher": Says(SIZES[theirs] + 3, 2)}  # three rows of padding


def mean(method, networks, batch) -> torch.Tensor:
    terms, counts = method.losses(networks, batch, frozenset({"student"}), STEP), method.counts(batch)
    return sum(term.weight * term.sum / counts[term.unit] for term in terms.terms.values())


@pytest.mark.parametrize("theirs", ["tiny", "unigram-tiny"])
def test_the_law_of_a_byte_is_that_of_the_tokens_which_go_on_as_the_text_does(theirs: str) -> None:
    method, batch = introduced(ByteKD([ForwardKL()]), "bytes", theirs), batch_of("bytes", theirs)
    readings = method.read(nets(theirs), batch)
    rows, law = method.law(readings)
    spelling, ours = spelling_of(reader(theirs)), spelling_of(reader("bytes"))
    assert len(rows) > 0.9 * len(readings.rows)
    for row, said in list(zip(rows.tolist(), law.exp(), strict=True))[::7]:
        chunk = readings.chunks[row]
        begun = bytes(
            ours.text(readings.rows.labels[readings.chunks == chunk][: row - _first(readings, chunk)].tolist())
        )
        p = readings.teacher.logits[(readings.their_chunks == chunk).nonzero()[0, 0]].softmax(-1)
        want = torch.zeros(260, dtype=p.dtype)
        for token, piece in enumerate(spelling.pieces):
            if token in spelling.control:
                if not begun and token == reader(theirs).eos_token_id:
                    want[reader("bytes").eos_token_id] += p[token]
                elif not begun and reader(theirs).convert_ids_to_tokens(token) in reader("bytes").get_vocab():
                    name = reader(theirs).convert_ids_to_tokens(token)
                    want[reader("bytes").convert_tokens_to_ids(name)] += p[token]
            elif piece and piece.startswith(begun) and len(piece) > len(begun):
                want[reader("bytes").convert_tokens_to_ids(_letter(piece[len(begun)]))] += p[token]
        torch.testing.assert_close(said, (want / want.sum()).clamp(min=1e-300), rtol=1e-9, atol=1e-12)


def _letter(byte: int) -> str:
    ours = spelling_of(reader("bytes"))
    return reader("bytes").convert_ids_to_tokens(ours.pieces.index(bytes([byte])))


def _first(readings, chunk) -> int:
    return int((readings.chunks == chunk).nonzero()[0, 0])


@pytest.mark.parametrize("loss", [ForwardKL(), JSD(), ForwardKL(temperature=2.0)])
def test_with_one_tokenizer_of_bytes_it_is_plain_distillation(loss) -> None:
    method, batch = introduced(ByteKD([loss]), "bytes", "bytes"), batch_of("bytes", "bytes")
    networks = {"student": Says(260, 1), "teacher": Says(260, 2)}
    readings = method.read(networks, batch)
    want = loss(readings.student.logits, readings.teacher.logits, readings.rows.labels).mean()
    torch.testing.assert_close(mean(method, networks, batch), want, rtol=1e-9, atol=1e-9)


def test_a_student_that_says_the_law_has_no_loss_and_no_gradient() -> None:
    method, batch = introduced(ByteKD([ForwardKL()]), "bytes", "tiny"), batch_of("bytes", "tiny")
    readings = method.read(nets("tiny"), batch)
    rows, law = method.law(readings)
    logits = readings.student.logits.detach().clone()
    logits[rows] = law
    logits.requires_grad_()
    found = method.match(replace(readings, student=Dense(logits)), {}, batch, STEP)
    found.terms["byte_kd"].sum.backward()
    assert abs(found.terms["byte_kd"].sum.item()) < 1e-9
    assert logits.grad.abs().max() < 1e-12


def test_the_gradient_is_the_students_alone_and_right() -> None:
    method, batch, networks = (
        introduced(ByteKD([ForwardKL()]), "bytes", "tiny"),
        batch_of("bytes", "tiny"),
        nets("tiny"),
    )
    readings = method.read(networks, batch)
    rows, law = method.law(readings)
    mean(method, networks, batch).backward()
    grad = networks["student"].table.grad.clone()
    networks["student"].table.grad = None
    logits = method.read(networks, batch).student.logits[rows]
    (forward_kl(logits, law, temperature=1.0).sum() / method.counts(batch)["tokens"]).backward()
    torch.testing.assert_close(grad, networks["student"].table.grad)
    assert networks["teacher"].table.grad is None
    assert grad.isfinite().all() and grad.abs().sum() > 1e-3


def test_hidden_states_and_blocks_give_the_law_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = introduced(ByteKD([ForwardKL()]), "bytes", "tiny"), batch_of("bytes", "tiny")
    readings = method.read(nets("tiny"), batch)
    hidden = torch.randn(len(readings.their_rows), 8, dtype=torch.float64)
    head = Head(torch.randn(512, 8, dtype=torch.float64))
    want = method.law(replace(readings, teacher=Dense(head.logits(hidden))))[1]
    monkeypatch.setattr("kdlm.methods.cross_tokenizer.byte_kd.BLOCK", 512 * 5)
    torch.testing.assert_close(method.law(replace(readings, teacher=Hidden(hidden, head)))[1], want)


def test_cutting_a_batch_does_not_show() -> None:
    method = introduced(ByteKD([ForwardKL(), CrossEntropy(weight=0.1)]), "bytes", "tiny")
    padded, free = batch_of("bytes", "tiny"), batch_of("bytes", "tiny", layout="padding_free")
    networks, tables = nets("tiny"), {}

    def kept(role):
        def answer(batch, rows):
            tables.setdefault(role, networks[role](batch, rows))
            return tables[role]

        return answer

    both = {role: kept(role) for role in networks}
    torch.testing.assert_close(mean(method, both, padded), mean(method, both, free))


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="the 256 bytes: use alm or gold"):
        introduced(ByteKD([ForwardKL()]), "unigram-tiny", "tiny")
    with pytest.raises(ValueError, match="byte_kd needs one that compares with the teacher"):
        ByteKD([CrossEntropy()])


def test_tokens_that_begin_alike_stand_together() -> None:
    spelling = spelling_of(reader("tiny"))
    order = ByteOrder(spelling)
    for prefix in (b"", b"s", b"se", b" ", b"\xff", b"\xf0\x9f"):
        places = order.continuations(prefix)
        for byte in (0, 101, 115, 255):
            among = [spelling.pieces[i] for i in order.ids[places[byte] : places[byte + 1]]]
            begun = prefix + bytes([byte])
            all_of_them = [
                piece
                for i, piece in enumerate(spelling.pieces)
                if piece and i not in spelling.control and piece.startswith(begun)
            ]
            assert sorted(among) == sorted(all_of_them)
