"""The checker of shapes and types while tests run: beartype, in a world where numbers may be tensors.

jaxtyping decorates methods and not classes, so what beartype knows of `Self` is not there: it is left unchecked.
"""

from typing import Any, Self

from beartype import BeartypeConf, FrozenDict, beartype
from torch import Tensor

check = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({Self: Any, float: float | int | Tensor})))
