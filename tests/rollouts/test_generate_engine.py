"""The engine `generate`: what it draws, and with which log-probabilities."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kdlm.rollouts import GenerateEngine, Sampling
from kdlm.rollouts.generate import drawn_from

VOCAB, END = 13, 2
PROMPTS = [[1, 5, 6], [1, 7], [1, 3, 4, 9, 8], [1]]


def model(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        **{"max_position_embeddings": 40, **options},
    )
    return LlamaForCausalLM(config).eval()


def engine(student: Any, **options: Any) -> GenerateEngine:
    made = GenerateEngine([END], 0, **options)
    made.take(student, 3)
    return made


@torch.no_grad()
def own_log_probs(student: Any, prompt: list[int], ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    logits = student(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7, 0.0])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_log_probs_are_those_of_the_distribution_that_was_drawn_from(temperature: float, batch_size: int) -> None:
    student = model()
    sampling = Sampling(temperature=temperature, max_new_tokens=9, samples_per_prompt=3)
    for one in engine(student, batch_size=batch_size).generate(PROMPTS, sampling, 7):
        expected = own_log_probs(student, PROMPTS[one.group], one.ids, temperature or 1.0)
        torch.testing.assert_close(torch.tensor(one.log_probs), expected, atol=1e-5, rtol=1e-5)
        assert one.version == 3
        assert END not in one.ids[:-1]
        assert one.stop == ("end" if one.ids[-1] == END else "length")
        assert one.stop == "end" or len(one.ids) == 9


def test_completions_come_in_the_order_of_their_prompts() -> None:
    drawn = engine(model(), batch_size=3).generate(PROMPTS, Sampling(max_new_tokens=2, samples_per_prompt=2), 0)
    assert [one.group for one in drawn] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_draws_follow_the_law_of_the_model() -> None:
    """A chi-square of the first token over 4,000 draws, at a temperature."""
    student, n = model(), 4000
    drawn = engine(student, batch_size=4000).generate(
        [[1, 5]], Sampling(temperature=0.7, max_new_tokens=1, samples_per_prompt=n), 11
    )
    with torch.no_grad():
        p = (student(input_ids=torch.tensor([[1, 5]])).logits[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(torch.tensor([one.ids[0] for one in drawn]), minlength=VOCAB)
    statistic = ((counts - n * p) ** 2 / (n * p)).sum().item()
    assert statistic < 32.9  # the 0.999 quantile with 12 degrees of freedom


def test_draws_follow_the_law_all_over_a_vocabulary_and_skip_what_has_no_mass() -> None:
    """A chi-square of 10,000 draws over 20 bins of 100 ids each, of which every third has no mass."""
    generator = torch.Generator().manual_seed(3)
    p = torch.rand(2000, generator=generator) * torch.linspace(0.1, 2.0, 2000)
    p[::3] = p[-1] = 0
    p /= p.sum()
    drawn = drawn_from(p.expand(10_000, -1), generator)[:, 0]
    assert (p[drawn] > 0).all()
    counts, expected = torch.bincount(drawn // 100, minlength=20), len(drawn) * p.view(20, 100).sum(-1)
    assert ((counts - expected) ** 2 / expected).sum().item() < 43.8  # the 0.999 quantile with 19 degrees of freedom


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.5}])
def test_cut_distributions_are_renormalised(options: dict[str, Any]) -> None:
    student = model()
    for one in engine(student).generate(PROMPTS, Sampling(max_new_tokens=6, **options), 5):
        whole = own_log_probs(student, PROMPTS[one.group], one.ids)
        assert (torch.tensor(one.log_probs) >= whole - 1e-5).all()
        assert (torch.tensor(one.log_probs) > whole + 1e-3).any()


def test_greedy_is_what_transformers_generates() -> None:
    student = model()
    for one in engine(student, batch_size=2).generate(PROMPTS, Sampling(temperature=0, max_new_tokens=8), 0):
        prompt = torch.tensor([PROMPTS[one.group]])
        whole = student.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=END, pad_token_id=0)
        assert whole[0, prompt.shape[1] :].tolist() == one.ids


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_text_mixed_with_the_teachers_has_the_mixtures_log_probs(batch_size: int, temperature: float) -> None:
    student, teacher = model(), model(1)
    drawing = engine(student, batch_size=batch_size)
    drawing.guide = teacher
    sampling = Sampling(max_new_tokens=7, teacher_share=0.3, temperature=temperature, samples_per_prompt=2)
    for one in drawing.generate(PROMPTS, sampling, 2):
        p, q = (own_log_probs(each, PROMPTS[one.group], one.ids, temperature).exp() for each in (teacher, student))
        torch.testing.assert_close(torch.tensor(one.log_probs), (0.3 * p + 0.7 * q).log(), atol=1e-5, rtol=1e-5)


def test_the_same_seed_draws_the_same_and_another_something_else() -> None:
    drawing, sampling = engine(model()), Sampling(max_new_tokens=8)
    first, again, other = (drawing.generate(PROMPTS, sampling, seed) for seed in (1, 1, 2))
    assert first == again != other


def test_it_draws_no_random_numbers_of_the_run_and_leaves_the_mode_of_the_model() -> None:
    student = model().train()
    before = torch.get_rng_state()
    config = student.generation_config
    engine(student).generate(PROMPTS, Sampling(max_new_tokens=3), 0)
    assert torch.equal(before, torch.get_rng_state())
    assert student.training and student.generation_config is config


def test_what_the_models_own_generation_config_asks_for_is_not_done() -> None:
    student = model()
    sampling = Sampling(max_new_tokens=6)
    plain = engine(student).generate(PROMPTS, sampling, 0)
    student.generation_config.repetition_penalty = 5.0
    student.generation_config.min_new_tokens = 6
    assert engine(student).generate(PROMPTS, sampling, 0) == plain


def test_a_completion_ends_where_the_context_does() -> None:
    student = model(max_position_embeddings=8)
    drawing = GenerateEngine([], 0)  # never ends by itself
    drawing.take(student, 0)
    drawn = drawing.generate([[1] * 7, [1] * 3], Sampling(max_new_tokens=50), 0)
    assert all(one.stop == "length" for one in drawn)
    assert len(drawn[0].ids) == 1
    for prompts, said in ([[1] * 8], "8 tokens, and the student reads 8"), ([[]], "has 0 tokens"):
        with pytest.raises(ValueError, match=said):
            drawing.generate(prompts, Sampling(), 0)


def test_a_copy_keeps_the_weights_it_took() -> None:
    student, sampling = model(), Sampling(max_new_tokens=8)
    copied = engine(student, copied=True)
    before = copied.generate(PROMPTS, sampling, 0)
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(1.5)
    assert copied.generate(PROMPTS, sampling, 0) == before
    copied.take(student, 4)
    after = copied.generate(PROMPTS, sampling, 0)
    assert [one.ids for one in after] == [one.ids for one in engine(student).generate(PROMPTS, sampling, 0)]
    assert after[0].version == 4
    assert not copied.lives and engine(student).lives


def test_an_engine_without_weights_says_so() -> None:
    with pytest.raises(RuntimeError, match="take"):
        GenerateEngine([END], 0).generate(PROMPTS, Sampling(), 0)
