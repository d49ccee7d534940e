"""EM over rationales never lowers its bound; votes need a majority; new sets of concepts are new."""

import math
import random

import pytest
from datasets import Dataset

from kdlm.curation import Desk
from kdlm.curation.expectation import Expectation, bound, copied, posterior
from kdlm.curation.recombine import Recombine
from kdlm.curation.vote import Vote, majority

Z, X = "abc", "wxyz"


def normalised(values: dict) -> dict:
    return {key: value / sum(values.values()) for key, value in values.items()}


class Toy:
    """Tables p(z) and p(x|z) of one set of concepts, and how often each problem is seen."""

    def __init__(self, seed: int):
        draw = random.Random(seed)
        self.prior = normalised({z: draw.random() + 0.01 for z in Z})
        self.likelihood = {z: normalised({x: draw.random() + 0.01 for x in X}) for z in Z}
        self.seen = normalised({x: draw.random() for x in X})

    def rows(self) -> Dataset:
        """Every rationale of every problem, as `score` leaves them."""
        return Dataset.from_list(
            [
                {
                    "prompt_id": x,
                    "problem": x,
                    "completion": z,
                    "prior_log_prob": math.log(self.prior[z]),
                    "likelihood_log_prob": math.log(self.likelihood[z][x]),
                }
                for x in X
                for z in Z
            ]
        )

    def fit(self, q: dict[tuple[str, str], float]) -> None:
        """The exact M-step: cross-entropy on every row, each counted by q(z|x)."""
        mass = {pair: self.seen[pair[0]] * share for pair, share in q.items()}
        self.prior = {z: sum(mass[x, z] for x in X) for z in Z}
        self.likelihood = {z: normalised({x: mass[x, z] for x in X}) for z in Z}

    def bound(self, q: dict[tuple[str, str], float]) -> float:
        joint = {(x, z): math.log(self.prior[z] * self.likelihood[z][x]) for x in X for z in Z}
        return sum(self.seen[x] * bound([q[x, z] for z in Z], [joint[x, z] for z in Z]) for x in X)

    def evidence(self) -> float:
        return sum(self.seen[x] * math.log(sum(self.prior[z] * self.likelihood[z][x] for z in Z)) for x in X)


def step_of(toy: Toy) -> dict[tuple[str, str], float]:
    rows = Expectation()(toy.rows())
    return {(row["problem"], row["completion"]): row["posterior"] for row in rows}


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_does_not_fall_in_a_step_of_expectation_nor_of_maximisation(seed):
    toy = Toy(seed)
    q = {(x, z): 1 / len(Z) for x in X for z in Z}
    before = toy.bound(q)
    for _ in range(4):
        q = step_of(toy)
        expected = toy.bound(q)
        assert expected >= before - 1e-12
        assert expected == pytest.approx(toy.evidence())  # the exact posterior closes the gap
        toy.fit(q)
        before = toy.bound(q)
        assert before >= expected - 1e-12


def test_a_few_rationales_bound_the_evidence_from_below():
    toy = Toy(0)
    desk = Desk()
    some = toy.rows().filter(lambda row: row["completion"] != "b")
    Expectation().run(some, desk)
    of_each = [math.log(sum(toy.prior[z] * toy.likelihood[z][x] for z in "ac")) for x in X]
    assert desk.counts.figures["bound, nats a problem"] == pytest.approx(sum(of_each) / len(X))


def test_any_other_choice_of_rationales_has_a_lower_bound():
    rewards = [-1.0, -2.5, -0.3]
    best = bound(posterior(rewards), rewards)
    for seed in range(50):
        other = list(normalised({n: random.Random(seed * 3 + n).random() for n in range(3)}).values())
        assert bound(other, rewards) <= best


def test_a_rationale_that_copies_its_problem_does_not_win():
    problem = "What is the sum of 12 and 30?"
    assert copied(f"I say: {problem}", problem) == 1.0
    assert copied("add two numbers of two digits", problem) == 0.0
    assert 0 < copied("the sum of 12 and others", problem) < 1
    assert copied("anything", "") == 0.0
    common = {"prompt_id": "p", "problem": problem}
    rows = Dataset.from_list(
        [
            common | {"completion": f"So: {problem}", "prior_log_prob": -20.0, "likelihood_log_prob": -0.1},
            common | {"completion": "add two digits", "prior_log_prob": -8.0, "likelihood_log_prob": -15.0},
        ]
    )
    plain, penalised = Expectation()(rows), Expectation(copy_penalty=50)(rows)
    assert plain["reward"][0] > plain["reward"][1]
    assert penalised["reward"][0] < penalised["reward"][1]
    assert penalised["reward"][1] == plain["reward"][1]


def test_rationales_said_twice_or_not_scored_are_left_out_and_counted():
    desk = Desk()
    rows = Toy(0).rows().to_list()
    made = Expectation().run(Dataset.from_list([*rows, rows[0], rows[1] | {"prior_log_prob": None}]), desk)
    assert len(made) == len(rows)
    assert desk.counts.kinds["the same rationale again"].count == 1
    assert desk.counts.kinds["not scored"].count == 1


@pytest.mark.parametrize(
    "texts, expected",
    [
        (["Answer: 7", "so\nAnswer: 7.0", "Answer: 8"], ("7", 2)),
        (["Answer: 7", "Answer: 8"], (None, 1)),
        (["Answer: yes", r"\boxed{yes}", "no end\nnor answer", None], ("yes", 2)),
        (["no end\nnor answer", ""], (None, 0)),
    ],
)
def test_the_majority_goes_by_value_and_a_tie_is_none(texts, expected):
    assert majority(texts) == expected


def test_prompts_without_a_majority_are_left_out_and_those_without_answers_count():
    desk = Desk()
    texts = {
        "a": ["Answer: 1"] * 3 + ["Answer: 2"],
        "b": ["Answer: 1", "Answer: 1", "x\ny", "Answer: 3"],
        "c": ["x\ny"],
    }
    rows = Dataset.from_list([{"prompt_id": key, "completion": text} for key, some in texts.items() for text in some])
    made = Vote().run(rows, desk)
    assert made.to_list() == [
        {"prompt_id": "a", "completion": text, "answer": "1", "votes": 3, "vote_share": 0.75} for text in texts["a"]
    ]
    assert desk.counts.kinds["no majority"].count == 5
    assert len(Vote(above=0.4)(rows)) == 8
    assert Vote(above=0.9)(rows).column_names == made.column_names


def test_new_sets_of_concepts_are_new_different_and_the_seeds():
    rows = Dataset.from_list(
        [{"concepts": text} for text in ("add; carry", "carry; add", "borrow; minus", "times", None)]
    )
    desk = Desk(seed=3)
    made = Recombine(count=4).run(rows, desk)
    sets = [frozenset(text.split("; ")) for text in made["concepts"]]
    assert len(set(sets)) == 4 and all(len(one) == 2 for one in sets)
    assert not set(sets) & {frozenset(("add", "carry")), frozenset(("borrow", "minus"))}
    assert made["concepts"] == Recombine(count=4).run(rows, Desk(seed=3))["concepts"]
    assert made["concepts"] != Recombine(count=4).run(rows, Desk(seed=4))["concepts"]
    assert len(Recombine(count=100).run(rows, desk)) == 10 - 2  # of five concepts, less the two that there are
    assert desk.counts.kinds["no further set of concepts"].count == 92
