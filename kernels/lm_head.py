"""The output projection as a module that owns its weight: hidden states and labels in, loss out.

A loss function that is handed `lm_head.weight` reads it outside the module it belongs to, where FSDP2 has not gathered
it. FusedLMHead computes the loss in its own forward, so the hooks of fully_shard fire. May touch: torch.
"""

from __future__ import annotations

import torch
from torch import nn

from .linear import linear
from .linear_cross_entropy import linear_cross_entropy


class FusedLMHead(nn.Module):
    """Language-model head [V, H] with linear_cross_entropy as its forward.

    The parameter is named `weight`, as that of the nn.Linear(H, V, bias=False) which it replaces, and initialised
    alike: state dicts fit. For tied embeddings give the existing parameter: `FusedLMHead.of(embedding.weight)`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def of(cls, weight: nn.Parameter) -> FusedLMHead:
        """A head around `weight` [V, H] itself, shared with whoever else holds it.

        Raises:
            ValueError: weight is not a parameter with two dimensions.
        """
        if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
            raise ValueError(f"FusedLMHead.of: weight is a {type(weight).__name__}; expected an nn.Parameter [V, H]")
        head = cls(weight.shape[1], weight.shape[0], device="meta")
        head.weight = weight
        return head

    def reset_parameters(self) -> None:
        """Uniform in +-1 / sqrt(H), as nn.Linear."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, nll) of x [T, H] and labels [T]; options and errors are those of linear_cross_entropy.

        FSDP2 casts the fp32 `scale` to its parameters' dtype on the way in, which is refused: give the head a
        MixedPrecisionPolicy with cast_forward_inputs=False.
        """
        return linear_cross_entropy(x, self.weight, labels, **options)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] times the weight: [..., V].

        Under FSDP2 only `forward` gathers the weight by itself; say so of this method, once, after fully_shard:
        `torch.distributed.fsdp.register_fsdp_forward_method(head, "logits")`.
        """
        vocab, hidden = self.weight.shape
        return linear(x.reshape(-1, hidden), self.weight).view(*x.shape[:-1], vocab)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"
