"""What a drafter that is a model of its own can learn from the target's last state, which its own few layers cannot know.

Behind the drafter's layers its own state h of the token at position t meets a state s of position t - 1: the target's, where the target has
run that position, and otherwise, in a chained adapter, the one that came out of here one position earlier. Then the head reads

    h + out(silu(own(h) + from_target(s)))      or, with its own earlier state,      h + out(silu(own(h) + from_drafter(s)))

As in EAGLE (Li et al. 2024, section 3.2) the target's state and the token that it led to are read together, and what is drafted feeds the
next draft; as in Hydra (Ankner et al. 2024) nothing of it enters the drafter's keys and values. So the same weights also draft from the
text alone, by leaving this step out, and nothing has to be run again once the target has spoken.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.errors import SourceError
from engine.model.linear import AS_THEY_ARE, UNKNOWN, LinearKind, joined_inputs
from engine.model.source import first_line

FILE = "state_adapter.safetensors"
_CHAIN = "from_drafter.weight"  # where it is chained


class AdapterWeights(nn.Module):
    """The adapter as it is trained. Fresh ones add nothing."""

    def __init__(self, hidden_size: int, width: int, target_hidden_size: int, is_chained: bool):
        """Chained: behind a row's first draft each reads the state of the one before. Else only the first draft reads any."""
        super().__init__()
        self.own = nn.Linear(hidden_size, width)
        self.from_target = nn.Linear(target_hidden_size, width, bias=False)
        self.from_drafter = nn.Linear(hidden_size, width, bias=False) if is_chained else None
        self.out = nn.Linear(width, hidden_size, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, states: Tensor, before: Tensor, is_targets: bool) -> Tensor:
        """[..., hidden] of the drafter's states and those one position before, which are the target's or came out of here."""
        reader = self.from_target if is_targets else self.from_drafter
        assert reader is not None, "it is not chained"
        read = reader(before)
        return states + self.out(nn.functional.silu(self.own(states) + read))  # type: ignore[no-any-return]  # nn.Module is untyped


class StateAdapter(nn.Module):
    """The adapter as it serves: one product reads both states."""

    def __init__(self, weights: AdapterWeights, kind: LinearKind = AS_THEY_ARE):
        super().__init__()
        self.target_hidden_size = weights.from_target.in_features
        self.shape = tuple(tuple(weight.shape) for weight in weights.parameters())
        self._from_target = kind.make(joined_inputs(weights.own, weights.from_target), UNKNOWN)
        chain = weights.from_drafter
        self._from_drafter = None if chain is None else kind.make(joined_inputs(weights.own, chain), UNKNOWN)
        self._out = kind.make(weights.out, UNKNOWN)

    @property
    def is_chained(self) -> bool:
        """Whether it reads its own states, too."""
        return self._from_drafter is not None

    @torch.inference_mode()
    def forward(self, states: Tensor, before: Tensor, is_targets: bool) -> Tensor:
        """[R, hidden] of the drafter's states [R, hidden] and those one position before, [R, hidden of whose they are]."""
        read = self._from_target if is_targets else self._from_drafter
        assert read is not None, "it is not chained"
        return states + self._out(nn.functional.silu(read(torch.cat((states, before), -1))))  # type: ignore[no-any-return]


def write_adapter(folder: Path, weights: AdapterWeights, dtype: torch.dtype) -> None:
    """Store an adapter beside its drafter."""
    save_file({name: weight.detach().to("cpu", dtype).contiguous() for name, weight in weights.state_dict().items()}, folder / FILE)


def read_adapter(folder: Path, hidden_size: int, dtype: torch.dtype, device: torch.device) -> AdapterWeights | None:
    """The adapter of the drafter in `folder`, which is so wide; None where it has none. Raises SourceError."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SourceError(f"{path} cannot be read: {first_line(error)}") from error
    shapes = {name: tuple(weight.shape) for name, weight in found.items()}
    width, of_target = (*shapes.get("from_target.weight", ()), 1, 1)[:2]  # whatever they are, they must go with the others
    with torch.device("meta"):
        weights = AdapterWeights(hidden_size, width, of_target, is_chained=_CHAIN in found)
    if shapes != {name: tuple(weight.shape) for name, weight in weights.state_dict().items()}:
        raise SourceError(f"{path} does not hold an adapter of a drafter of width {hidden_size}: its tensors are {shapes}.")
    weights.load_state_dict({name: weight.to(device, dtype) for name, weight in found.items()}, assign=True)
    return weights.requires_grad_(False)
