"""One live model and several packs: whichever is asked for is put on, and comes off without a trace."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdlm.packs.folder import Pack
from kdlm.packs.merging import require_same_names, summed
from kdlm.packs.model_folder import open_model


class Router:
    """A base model with several packs, of which any, or a weighted sum, is active.

    The base's weights are read again from its folder when a pack comes off, so that they return bit for bit and no
    second copy is in memory; packs are kept as factors. Only tensors that the old or the new choice changes are
    written, in place: optimisers, hooks and compiled graphs of the model stay valid.

        router = Router("base", {"sums": "packs/sums", "code": "packs/code"})
        router.use("sums").generate(**inputs)
        router.use({"sums": 0.5, "code": 0.5})
        router.use(None)  # the base

    Args:
        base: folder, hub id, or `sandbox:code-teacher`; opened with AutoModelForCausalLM.
        packs: folder of each pack by name.
        route: request -> what to `use` for it; by default a request is a pack's name.
        options: for `from_pretrained`, such as `dtype` and `device_map`.

    Raises ValueError where a pack was made for another base, or transformers gives a tensor that a pack changes another
    name or shape than its folder does.
    """

    def __init__(
        self,
        base: str | Path,
        packs: Mapping[str, str | Path],
        *,
        route: Callable[[Any], str | Mapping[str, float] | None] | None = None,
        **options: Any,
    ):
        from transformers import AutoModelForCausalLM

        self.base = open_model(base)
        self.packs = {name: Pack(folder) for name, folder in packs.items()}
        self.route = route
        for pack in self.packs.values():
            pack.require(self.base)
            require_same_names(pack, self.base)
        self.model: nn.Module = AutoModelForCausalLM.from_pretrained(self.base.folder, **options)
        self.active: dict[str, float] = {}
        self._weights = self._live()

    def _live(self) -> dict[str, Tensor]:
        weights = self.model.state_dict(keep_vars=True)
        changed = {name for pack in self.packs.values() for name in pack.changed}
        for name in sorted(changed):
            live = weights.get(name)
            if live is None or live.shape != self.base.kind(name)[1] or live.is_meta:
                raise ValueError(
                    f"{name}: transformers renames, joins, quantises or offloads this tensor when it opens "
                    f"{self.base.called}, so packs cannot be switched on it; write a model for each with `kdlm merge`"
                )
        return {name: weights[name] for name in changed}

    def use(self, chosen: str | Mapping[str, float] | None) -> Any:
        """Make a pack active, or several with weights, or none, and return the model.

        Raises ValueError for a name that there is not.
        """
        wanted = {} if chosen is None else {chosen: 1.0} if isinstance(chosen, str) else dict(chosen)
        for name in wanted:
            if name not in self.packs:
                raise ValueError(f"no pack {name!r}; there are: {', '.join(self.packs)}")
        if wanted != self.active:
            touched = {tensor for name in {*wanted, *self.active} for tensor in self.packs[name].changed}
            deltas = [self.packs[name] for name in wanted]
            with torch.no_grad():
                for tensor in touched:
                    self._weights[tensor].copy_(summed(self.base, tensor, deltas, list(wanted.values())))
            self.active = wanted
        return self.model

    def __call__(self, request: Any) -> Any:
        """Return the model with what the route gives for a request active."""
        return self.use(request if self.route is None else self.route(request))
