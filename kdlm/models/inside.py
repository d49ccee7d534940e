"""The inside of a transformer: outputs of its layers, what the first of them reads, queries, keys and values.

All come from hooks on modules, so that any attention implementation will do, fused ones too. Queries and keys are those
of the projections, beside them turned as attention turns them where positions are rotary; both before the norm that
some models (Qwen3) put on each head.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from kdlm.signal import Rows

SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))
FUSED = ("qkv_proj", "Wqkv", "c_attn")
"""Linear maps whose output is all queries, then all keys, then all values."""
TURNS = "turns"
BODIES = ("language_model", "text_model", "encoder", "transformer")
STACKS = ("layers", "h", "blocks", "layer")


@dataclass(frozen=True)
class Ask:
    """What is wanted of the inside of a model; its layers count from 0.

    Attributes:
        layers: whose outputs.
        attention: whose queries, keys and values.
        embeddings: whether what the first layer reads.
    """

    layers: Sequence[int] = ()
    attention: Sequence[int] = ()
    embeddings: bool = False

    @property
    def depth(self) -> int:
        """How many layers have to run for it."""
        return max((*self.layers, *self.attention, 0)) + 1


@dataclass(frozen=True)
class Projections:
    """Queries, keys and values of one layer as they leave its projections, the heads of each side by side.

    With grouped queries there are fewer heads of keys and values than of queries.

    Attributes:
        turned: queries and keys as attention multiplies them, where positions are rotary; None where they are not.
    """

    q: Float[Tensor, "rows heads_size"]
    k: Float[Tensor, "rows kv_heads_size"]
    v: Float[Tensor, "rows kv_heads_size"]
    heads: int
    kv_heads: int
    turned: tuple[Tensor, Tensor] | None = None

    @property
    def scored(self) -> tuple[Tensor, Tensor]:
        """The queries and keys whose product, by the root of a head's size, is the score of the model itself."""
        return self.turned or (self.q, self.k)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Projections":
        """Return it with every tensor changed."""
        turned = self.turned and (change(self.turned[0]), change(self.turned[1]))
        return replace(self, q=change(self.q), k=change(self.k), v=change(self.v), turned=turned)


@dataclass(frozen=True)
class Inside:
    """What was asked, in its order, in the graph of the model's parameters.

    Attributes:
        hidden: outputs of layers, each `[rows, width]`.
        attention: of each asked layer.
        embeddings: `[rows, width]`, or None.
    """

    hidden: list[Float[Tensor, "rows width"]]
    attention: list[Projections]
    embeddings: Float[Tensor, "rows width"] | None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Inside":
        """Return it with every tensor changed."""
        attention = [one.each(change) for one in self.attention]
        embeddings = None if self.embeddings is None else change(self.embeddings)
        return Inside([change(one) for one in self.hidden], attention, embeddings)


def joined(parts: Sequence[Inside]) -> Inside:
    """Return what several readings gave to one question, one behind the other."""
    hidden = [torch.cat(same) for same in zip(*(one.hidden for one in parts), strict=True)]
    attention = [_joined(same) for same in zip(*(one.attention for one in parts), strict=True)]
    read = [one.embeddings for one in parts if one.embeddings is not None]
    return Inside(hidden, attention, torch.cat(read) if read else None)


def _joined(parts: Sequence[Projections]) -> Projections:
    q, k, v = (torch.cat(side) for side in zip(*((one.q, one.k, one.v) for one in parts), strict=True))
    turned = [one.turned for one in parts if one.turned is not None]
    both = (torch.cat([one[0] for one in turned]), torch.cat([one[1] for one in turned])) if turned else None
    return replace(parts[0], q=q, k=k, v=v, turned=both)


def stack_of(body: Any) -> tuple[nn.Module, str]:
    """Return the module that holds the layers of a transformer without its head, and their name in it.

    Raises ValueError when the model keeps them under an unknown name.
    """
    owner = body
    for part in BODIES:
        owner = getattr(owner, part, owner)
    for name in STACKS:
        if isinstance(getattr(owner, name, None), nn.ModuleList):
            return owner, name
    raise ValueError(f"{type(body).__name__}: no layers found under .layers, .h, .blocks or .layer")


def attends_backwards(body: Any) -> bool:
    """Whether a transformer's tokens see only what is before them: what the attention of its first layer with one says.

    Raises ValueError where no layer has attention.
    """
    owner, name = stack_of(body)
    layers = list(getattr(owner, name))
    for layer in layers[:-1]:
        with suppress(ValueError):  # another mixer stands for attention there
            return bool(_attention(layer)[0].is_causal)
    return bool(_attention(layers[-1])[0].is_causal)


@dataclass(frozen=True)
class Recorded:
    """What the hooks of `recording` kept, for all positions."""

    ask: Ask
    modules: list[nn.Module]
    kept: dict[Any, Any] = field(default_factory=dict)

    def at(self, rows: Rows) -> Inside:
        """Return what was asked at some rows."""
        embeddings = rows.select(self.kept["embeddings"]) if self.ask.embeddings else None
        attention = [self._projections(layer, rows) for layer in self.ask.attention]
        return Inside([rows.select(self.kept[layer]) for layer in self.ask.layers], attention, embeddings)

    def _projections(self, layer: int, rows: Rows) -> Projections:
        module, names = _attention(self.modules[layer])
        heads, kv_heads, size = _heads(module)
        found = [rows.select(self.kept[layer, name]) for name in names]
        if len(found) == 1:
            found = list(found[0].split([heads * size, kv_heads * size, kv_heads * size], -1))
        if found[0].shape[-1] != heads * size:
            raise ValueError(
                f"layer {layer}: its projection gives {found[0].shape[-1]} numbers for {heads} heads of {size}: there "
                "is more in it than queries (a gate), and attention cannot be compared"
            )
        if (turns := self.kept.get((layer, TURNS))) is None:
            return Projections(found[0], found[1], found[2], heads, kv_heads)
        cos, sin = (rows.select(x.expand(len(self.kept[layer, names[0]]), -1, -1)) for x in turns)
        q, k = (x.unflatten(-1, (-1, size)) for x in found[:2])
        q, k = _rotary(module)(q, k, cos, sin, unsqueeze_dim=1)  # a row of heads is a sequence of one
        return Projections(found[0], found[1], found[2], heads, kv_heads, (q.flatten(1), k.flatten(1)))


@contextmanager
def recording(body: Any, ask: Ask) -> Iterator[Recorded]:
    """Keep what is asked, and no more, of the forward passes in the context.

    Raises ValueError for a layer that there is not, for attention whose projections have unknown names, and for
    reentrant gradient checkpointing around it.
    """
    recorded = Recorded(ask, [])
    if not (ask.layers or ask.attention or ask.embeddings):
        yield recorded
        return
    owner, name = stack_of(body)
    modules, kept = recorded.modules, recorded.kept
    modules.extend(getattr(owner, name))
    if ask.depth > len(modules) or min((*ask.layers, *ask.attention, 0)) < 0:
        raise ValueError(f"the layers {[*ask.layers, *ask.attention]} were asked of a model of {len(modules)}")
    with ExitStack() as hooks:
        for layer in ask.layers:
            hooks.callback(modules[layer].register_forward_hook(_output(kept, layer)).remove)
        for layer in ask.attention:
            module, names = _attention(modules[layer])
            hooks.callback(module.register_forward_pre_hook(_turns(kept, layer), with_kwargs=True).remove)
            for part in names:
                hook = _output(kept, (layer, part))
                hooks.callback(getattr(module, part).register_forward_hook(hook).remove)
                if isinstance(modules[layer], FSDPModule):
                    gather = _gathering(modules[layer])
                    hooks.callback(getattr(module, part).register_forward_hook(gather).remove)
        if ask.embeddings:
            hooks.callback(modules[0].register_forward_pre_hook(_input(kept), with_kwargs=True).remove)
        yield recorded


@contextmanager
def shortened(body: Any, depth: int) -> Iterator[None]:
    """Leave out the layers above the first `depth` of them, for a forward whose last states nobody wants."""
    owner, name = stack_of(body)
    layers: Any = getattr(owner, name)
    setattr(owner, name, layers[:depth])
    try:
        yield
    finally:
        setattr(owner, name, layers)


def _attention(layer: nn.Module) -> tuple[Any, tuple[str, ...]]:
    """Return the module of a layer that holds its projections, and their names. Raises ValueError without any."""
    for module in layer.modules():
        for names in (*SEPARATE, *((name,) for name in FUSED)):
            if all(isinstance(getattr(module, name, None), nn.Module) for name in names) and hasattr(
                module, "is_causal"
            ):
                return module, names
    raise ValueError(
        f"{type(layer).__name__}: no projections of queries, keys and values found; known are "
        f"{', '.join('/'.join(names) for names in SEPARATE)} and, fused, {', '.join(FUSED)}"
    )


def _rotary(module: Any) -> Any:
    """Return the function by which an attention turns its queries and keys: that of the file its class is from.

    Raises ValueError where there is none of the usual name.
    """
    for one in type(module).__mro__:
        if found := getattr(sys.modules[one.__module__], "apply_rotary_pos_emb", None):
            return found
    raise ValueError(
        f"{type(module).__name__}: it is given rotary positions, but no apply_rotary_pos_emb is beside it: its scores "
        "cannot be compared"
    )


def _heads(module: Any) -> tuple[int, int, int]:
    """Return how many heads of queries and of keys an attention has, and their size."""
    config = module.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(module, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, kv_heads, size


def _output(kept: dict[Any, Any], key: Any) -> Any:
    graph = torch.is_grad_enabled()

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        if graph and not torch.is_grad_enabled():
            raise ValueError(
                "training.gradient_checkpointing_kwargs: use_reentrant: true runs layers without a graph, and what is "
                "read inside them would have no gradient: set it to false"
            )
        kept[key] = output[0] if isinstance(output, tuple) else output

    return hook


def _turns(kept: dict[Any, Any], layer: int) -> Any:
    """Keep the cosines and sines by which an attention turns its queries and keys, where it is given them."""

    def hook(module: nn.Module, args: tuple, options: dict[str, Any]) -> None:
        kept[layer, TURNS] = options.get("position_embeddings")

    return hook


def _gathering(layer: Any) -> Any:
    """Have a layer in shards (FSDP2) whole in the backward pass: it waits for a gradient of its output, and gets none
    where its projections alone are read."""

    def backward(gradient: Tensor) -> None:
        layer.unshard()

    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(backward)

    return hook


def _input(kept: dict[Any, Any]) -> Any:
    def hook(module: nn.Module, args: tuple, options: dict[str, Any]) -> None:
        kept["embeddings"] = args[0] if args else options["hidden_states"]

    return hook
