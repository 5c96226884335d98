"""The frozen trunk below the first adapted layer: rows with the same input go through it once, without gradient.

In the search all trials of a pack see the same rows, and K·b rows are b different ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sweep.lora.passes import ForwardPass


def share_trunk(model: nn.Module, adapted: Sequence[str], forward_pass: ForwardPass) -> list[RemovableHandle]:
    """Hooks on the model's blocks: those below the first adapted one see distinct rows, that one sees all again.

    Whole blocks only: what lies below the first adapted layer inside its block is computed for every row. Nothing is
    shared where an adapter sits before the blocks, or the model is not one list of blocks.
    """
    name = block_list(model)
    if name is None:
        return []
    order = [module for module, _ in model.named_modules()]
    ahead = order.index(name)
    inside = [m for m in adapted if m.startswith(f"{name}.")]
    if any(order.index(m) < ahead for m in adapted if m not in inside):
        return []
    blocks: Any = model.get_submodule(name)
    first = min((int(m[len(name) + 1 :].split(".")[0]) for m in inside), default=len(blocks))
    if first == 0 or first == len(blocks):
        return []

    def narrow(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if forward_pass.distinct_U is None or forward_pass.widened:
            return None
        return tuple(_select(value, forward_pass) for value in args), {
            k: _select(v, forward_pass) for k, v in kwargs.items()
        }

    def widen(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if forward_pass.distinct_U is None or forward_pass.widened:
            return None
        forward_pass.widened = True  # a block that comes round again (ALBERT's) sees rows that differ by trial
        if args:
            return (args[0].index_select(0, forward_pass.place_R), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].index_select(0, forward_pass.place_R)}

    hooks = [blocks[i].register_forward_pre_hook(narrow, with_kwargs=True) for i in range(first)]
    return [*hooks, blocks[first].register_forward_pre_hook(widen, with_kwargs=True)]


def block_list(model: nn.Module) -> str | None:
    """The name of the model's one outermost list of blocks."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return outermost[0] if len(outermost) == 1 else None


def _select(value: Any, forward_pass: ForwardPass) -> Any:
    """A tensor over all rows, or a tuple of such, at the distinct rows; anything else as it is.

    Of a block's inputs over rows, hidden states and masks have three dimensions or more, and only whole numbers
    (positions) have two: a vector, or a table of numbers, that happens to be as long is something else.
    """
    if isinstance(value, tuple):
        return tuple(_select(part, forward_pass) for part in value)
    if not isinstance(value, Tensor) or value.ndim < 2 or (value.ndim == 2 and value.is_floating_point()):
        return value
    if len(value) == forward_pass.rows:
        return value.index_select(0, forward_pass.distinct_U)  # type: ignore[arg-type]
    return value
