"""`kdlm mix`: the weights of a recipe's sources, found by merging models that learned from one source each."""

from kdlm.mix.mixing import mix
from kdlm.mix.sections import Mixture

__all__ = ["Mixture", "mix"]
