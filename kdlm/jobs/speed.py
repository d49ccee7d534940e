"""speed: tokens per second, first-token latency and memory of models beside each other."""

from pydantic import Field

from kdlm.section import Section


class Speed(Section):
    """How speed is measured: of the models of this process, in turns."""

    batch_sizes: list[int] = Field([1, 8], min_length=1)
    """Sequences read and written together; each is measured."""
    prompt_tokens: int = Field(128, ge=1)
    """Tokens of each prompt."""
    new_tokens: int = Field(32, ge=2)
    """Tokens written after it."""
    repeats: int = Field(5, ge=1)
    """Turns; what is told is their median."""
