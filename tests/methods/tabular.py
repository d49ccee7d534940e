"""Language models that are a table, a row of logits per prefix, and all that they can write: means by enumeration."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdlm.methods import Method, Step, Terms
from kdlm.signal import IGNORE_INDEX, Dense, Rows

VOCAB, END, LONGEST = 4, 0, 3
"""Token 0 ends a completion; one that reaches three tokens without it is cut there. A prompt is token 4."""

Text = tuple[int, ...]


def _writings(ended: bool) -> list[Text]:
    words = [w for n in range(LONGEST) for w in itertools.product(range(1, VOCAB), repeat=n)]
    if not ended:
        return words
    return [(*w, END) for w in words] + list(itertools.product(range(1, VOCAB), repeat=LONGEST))


PREFIXES = {prefix: place for place, prefix in enumerate(_writings(ended=False))}
COMPLETIONS = _writings(ended=True)


class Table:
    """Answers a batch with the logits that follow each prefix."""

    def __init__(self, logits: Tensor, answer: Callable[[Tensor, Tensor], object] = lambda z, labels: Dense(z)):
        self.logits, self.answer = logits, answer

    def __call__(self, batch: dict[str, Tensor], rows: Rows):
        ids, sequence = batch["input_ids"].flatten().tolist(), batch["sequence"].flatten().tolist()
        places = []
        for at in rows.index.tolist():
            start = at
            while start and sequence[start - 1] == sequence[at]:
                start -= 1
            places.append(PREFIXES[tuple(ids[start + 1 : at + 1])])  # without the prompt
        return self.answer(self.logits[torch.tensor(places, dtype=torch.int64)], rows.labels)

    def log_probs(self, text: Text) -> Tensor:
        """Return the log-probability of each token of a completion."""
        logs = self.logits.log_softmax(-1)
        return torch.stack([logs[PREFIXES[text[:i]], token] for i, token in enumerate(text)])

    def probability(self, text: Text) -> Tensor:
        return self.log_probs(text).sum().exp()


def draw_table(seed: int, *, scale: float = 1.0) -> Table:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(len(PREFIXES), VOCAB, generator=generator, dtype=torch.float64)
    return Table(logits.requires_grad_())


def mixed(first: Table, second: Table, share: float) -> Table:
    """Return the model that gives each next token `share` of the first's probability and the rest of the second's."""
    p, q = (table.logits.detach().softmax(-1) for table in (first, second))
    return Table((share * p + (1 - share) * q).log())


def batch_of(texts: Sequence[Text], drawn_from: Table, *, packed: bool = False) -> dict[str, Tensor]:
    """Return completions as a batch of the student's own text, padded on the right or in one packed row."""
    rows = []
    for number, text in enumerate(texts):
        logs = [0.0, *drawn_from.log_probs(text).tolist()]
        ids = [VOCAB, *text]
        rows.append((ids, [IGNORE_INDEX, *text], [False] + [True] * len(text), logs, [number] * len(ids)))
    names = ("input_ids", "labels", "sampled", "log_probs", "sequence")
    kinds = (torch.int64, torch.int64, torch.bool, torch.float64, torch.int64)
    columns = list(zip(*rows, strict=True))
    if packed:
        return {
            name: torch.tensor([list(itertools.chain(*column))], dtype=kind)
            for name, kind, column in zip(names, kinds, columns, strict=True)
        }
    fills = (END, IGNORE_INDEX, False, 0.0, -1)
    width = max(len(ids) for ids, *_ in rows)
    return {
        name: torch.tensor([[*x, *[fill] * (width - len(x))] for x in column], dtype=kind)
        for name, kind, fill, column in zip(names, kinds, fills, columns, strict=True)
    }


def run(method: Method, student: Table, teacher: Table, batch: dict[str, Tensor]) -> Terms:
    found = method.losses({"student": student, "teacher": teacher}, batch, frozenset({"student"}), Step(0, 10))
    assert isinstance(found, Terms)
    return found


def gradient(terms: Terms, student: Table) -> Tensor:
    total = sum((term.weight * term.sum for term in terms.terms.values()), torch.zeros(()))
    return torch.autograd.grad(total, student.logits, retain_graph=True)[0]


def mean_gradient(method: Method, student: Table, teacher: Table, drawn_from: Table) -> Tensor:
    """Return the method's gradient on one completion, in mean over all completions as another model writes them."""
    total = torch.zeros_like(student.logits)
    for text in COMPLETIONS:
        weight = drawn_from.probability(text).detach()
        total += weight * gradient(run(method, student, teacher, batch_of([text], drawn_from)), student)
    return total


def gradient_on_states(divergence: Callable[..., Tensor], student: Table, teacher: Table, drawn_from: Table) -> Tensor:
    """Return the gradient of a divergence at every state, each as often as the writer comes to it."""
    visits = torch.zeros(len(PREFIXES), dtype=torch.float64)
    for text in COMPLETIONS:
        for i in range(len(text)):
            visits[PREFIXES[text[:i]]] += drawn_from.probability(text).detach()
    return torch.autograd.grad((visits * divergence(student.logits, teacher.logits)).sum(), student.logits)[0]
