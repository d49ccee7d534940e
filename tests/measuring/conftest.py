"""What the tests of this room share: two tiny models of one tokenizer, in float64, and rows of text."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdlm.data import DataSection, load_data
from kdlm.sandbox import build

SOURCE = {"path": "sandbox:code/eval", "limit": 6}


def opened(name: str):
    return AutoModelForCausalLM.from_pretrained(build(name), dtype=torch.float64).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(build("code-student-tiny"))


@pytest.fixture(scope="session")
def student():
    return opened("code-student-tiny")


@pytest.fixture(scope="session")
def teacher():
    return opened("code-teacher-tiny")


@pytest.fixture
def load(tokenizer):
    """Return a function that loads the text with other settings of the data section."""

    def load(**settings):
        section = DataSection.model_validate({"train": [SOURCE], "max_length": 40, **settings})
        return load_data(section, tokenizer)

    return load
