"""A student and a teacher as hidden states and heads, and how two ways to their loss are compared."""

import torch
from kdlm_kernels.row_part import keep_freed_memory
from torch.utils._python_dispatch import TorchDispatchMode

ROWS, VOCAB, STUDENT, TEACHER = 41, 1271, 6, 10


def logits(model):
    return model.head.logits(model.hidden)


def leaves(student):
    return [x for x in (student.hidden, student.head.weight, student.head.bias) if x is not None and x.requires_grad]


def assert_same(ours, expected, student, upstream=None):
    """Compare values, and gradients to everything that the student trains."""
    torch.testing.assert_close(ours, expected)
    factor = 1 if upstream is None else upstream
    found, plain = (
        torch.autograd.grad((rows * factor).sum(), leaves(student), retain_graph=True) for rows in (ours, expected)
    )
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b)


class Allocations(TorchDispatchMode):
    """Remembers the numbers of elements of the storages that operations made."""

    def __init__(self, *known):
        super().__init__()
        keep_freed_memory()  # once in a process, 16 MiB that nobody touches
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.sizes.append(x.untyped_storage().nbytes() // x.element_size())
        return result
