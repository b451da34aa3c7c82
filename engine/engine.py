"""Engine: a model, its optimizer and one training step, to be embedded in any loop.

It reads the model folder it is given and writes the folder it is asked to export; beyond that it touches no files, no
signals, no logging and no global state. Nothing in a step waits for the device: every figure is returned as a device
tensor, to be fetched when the caller likes.

    engine = Engine.load("SmolLM2-135M", dtype="bfloat16", device="cuda")
    num_valid = sum(batch.num_valid for batch in batches)
    for batch in batches:                                # gradient accumulation
        losses = engine.forward_backward(batch, num_valid)
    grad_norm, skipped = engine.step(lr=1e-5)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.batch import IGNORE, PackedBatch
from ..kernels import expert_load, load_balancing_loss
from .config import ModelConfig
from .lora import LoraConfig, add_adapters, export_adapters, merged_values
from .model import Decoder, Routing
from .optimizer import AdamW, AdamWConfig
from .parallel import ParallelConfig, reshard, set_last_micro_batch, shard_decoder
from .weights import export_model, load_weights

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class SourceLoss(NamedTuple):
    """Sums over one packed batch, by data source: `nll` fp32 [S] in nats and `tokens` int64 [S], both on the device.

    `expert_load` int64 [layers, experts], on the device: tokens that each expert read, padding not counted; None for a
    dense model.
    """

    nll: Tensor
    tokens: Tensor
    expert_load: Tensor | None = None


class Engine:
    """A decoder under training: `forward_backward` one or more packed batches, then `step`."""

    def __init__(
        self,
        decoder: Decoder,
        optimizer: AdamWConfig | None = None,
        *,
        accumulate_in_fp32: bool | None = None,
        parallel: ParallelConfig | None = None,
        source_folder: str | Path | None = None,
        lora: LoraConfig | None = None,
    ) -> None:
        """Train `decoder` in the dtype and on the device it has, sharded or not: those of its parameters that require a
        gradient.

        Args:
            decoder: trained parameters all fp32 or all bf16.
            optimizer: AdamW settings; the defaults of AdamWConfig if None.
            accumulate_in_fp32: hold the gradients of bf16 parameters in fp32. Needed for exact sums over several
                micro batches; costs 2 bytes per parameter more than bf16. None: unless the optimizer is `in_backward`.
            parallel: how a sharded decoder communicates; the defaults of ParallelConfig if None.
            source_folder: Hugging Face folder the decoder came from, whose config and tokenizer an export carries.
            lora: give the decoder low-rank adapters and train these alone.
        """
        if lora is not None:
            add_adapters(decoder, lora)
        self.decoder, self.lora = decoder, lora
        self.config: ModelConfig = decoder.config
        self.source_folder = source_folder
        # of the load-balancing loss, as transformers would train this model; set it for another
        self.router_aux_loss_coef = self.config.router_aux_loss_coef if self.config.output_router_logits else 0.0
        self.parallel = parallel or ParallelConfig()
        optimizer = optimizer or AdamWConfig()
        if accumulate_in_fp32 is None:
            accumulate_in_fp32 = not optimizer.in_backward
        trained = {name: each for name, each in decoder.named_parameters() if each.requires_grad}
        self.optimizer = AdamW(trained.items(), optimizer, accumulate_in_fp32=accumulate_in_fp32)
        self.device = self.optimizer.device

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str | torch.device = "cpu",
        optimizer: AdamWConfig | None = None,
        accumulate_in_fp32: bool | None = None,
        mesh: DeviceMesh | None = None,
        parallel: ParallelConfig | None = None,
        lora: LoraConfig | None = None,
    ) -> Engine:
        """Load a Hugging Face folder (config.json, safetensors), sharded over `mesh` if one is given
        (`parallel.make_mesh`): each rank reads the rows that it holds.

        Raises:
            FileNotFoundError, ValueError: what is missing, damaged or not supported, by name.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
        config = ModelConfig.from_folder(path)
        if lora is not None:
            if mesh is not None:
                raise ValueError("lora: works in one process only; give no mesh")
            lora.resolved().targets(config)
        with torch.device("meta"):
            decoder = Decoder(config)
        decoder.to(DTYPES[dtype])
        if mesh is not None:
            shard_decoder(decoder, mesh, parallel or ParallelConfig())
        load_weights(decoder, path, dtype=DTYPES[dtype], device=device)
        return cls(
            *(decoder, optimizer),
            accumulate_in_fp32=accumulate_in_fp32, parallel=parallel, source_folder=path, lora=lora,
        )  # fmt: skip

    def begin_step(self, lr: float) -> None:
        """Needed before the forward_backward of a step with `optimizer.in_backward`, which updates as it goes."""
        self.optimizer.begin(lr)

    def forward_backward(
        self, batch: PackedBatch, num_valid: int, num_sources: int = 1, *, last: bool = True
    ) -> SourceLoss:
        """Add the gradient of sum(nll) / num_valid over one packed batch, and of a mixture's load-balancing loss times
        `router_aux_loss_coef` and the batch's share of num_valid.

        Args:
            batch: packed documents, as numpy arrays on the host.
            num_valid: valid labels of the whole optimizer step, over all micro batches of all ranks: what makes the
                gradient that of the mean over tokens however the step is cut up.
            num_sources: S of the returned sums; source ids of the batch must be below it.
            last: this is the rank's last micro batch of the step (for `parallel.reduce_every: step`).
        """
        if self.parallel.reduce_every == "step":
            set_last_micro_batch(self.decoder, last)
        loss, sources = self._forward(batch, num_sources, num_valid)
        loss.backward()
        return sources

    @torch.no_grad()
    def eval_nll(self, batch: PackedBatch, num_sources: int = 1) -> SourceLoss:
        """The same sums without gradients. With several ranks all must call it, as often as each other."""
        sources = self._forward(batch, num_sources)[1]
        reshard(self.decoder)
        return sources

    def _forward(self, batch: PackedBatch, num_sources: int, num_valid: int = 1) -> tuple[Tensor, SourceLoss]:
        """The loss, sum(nll) / num_valid, and the sums by source."""
        if num_valid < 1:
            raise ValueError(f"num_valid is {num_valid}: a step needs at least one valid label")
        if batch.source_ids.max() >= num_sources:
            raise ValueError(f"batch: source id {batch.source_ids.max()}, but num_sources is {num_sources}")
        source_T = np.repeat(batch.source_ids, np.diff(batch.cu_seqlens))
        tokens_S = np.bincount(source_T[batch.labels != IGNORE], minlength=num_sources)

        routing: list[Routing] = []
        hidden_TD = self.decoder(
            *(self._to_device(array) for array in (batch.tokens, batch.positions, batch.cu_seqlens)),
            batch.max_seqlen,
            routing=routing,
        )
        scale = torch.full((), 1.0 / num_valid, dtype=torch.float32, device=self.device)
        head = self.decoder.head_weight
        main_grad = self.optimizer.main_grad(head) if torch.is_grad_enabled() and head.requires_grad else None
        loss, nll_T = self.decoder.loss(
            *(hidden_TD, self._to_device(batch.labels)),
            scale=scale, ignore_index=IGNORE, num_valid=batch.num_valid, main_grad=main_grad,
        )  # fmt: skip
        # A masked sum for each source, not index_add: on a GPU that adds in an order that changes from run to run.
        of_source_T = self._to_device(source_T)
        is_source_ST = of_source_T == torch.arange(num_sources, device=self.device)[:, None]
        nll_S = torch.where(is_source_ST, nll_T, 0.0).sum(dim=1)
        load_LE = None
        if self.config.num_local_experts is not None:
            aux_loss, load_LE = self._balance(routing, of_source_T >= 0)
            if batch.num_valid:
                loss = loss + aux_loss * (batch.num_valid / num_valid)
        return loss, SourceLoss(nll_S, self._to_device(tokens_S), load_LE)

    def _balance(self, routing: list[Routing], is_text_T: Tensor) -> tuple[Tensor | float, Tensor]:
        """(weighted load-balancing loss of a mixture of experts, tokens per layer and expert), without padding."""
        experts, active = self.config.num_local_experts, self.config.num_experts_per_tok
        assert experts is not None
        assert active is not None
        assert len(routing) == self.config.num_hidden_layers
        load_LE = torch.stack(
            [expert_load(torch.where(is_text_T[:, None], chosen_TA, experts), experts) for _, chosen_TA in routing]
        )
        coefficient = self.router_aux_loss_coef
        if coefficient == 0:
            return 0.0, load_LE.long()
        logits = [logits_TE for logits_TE, _ in routing]
        return coefficient * load_balancing_loss(logits, active, mask=is_text_T), load_LE.long()

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()  # else the copy would wait for the device
        return tensor.to(self.device, non_blocking=True)

    def step(self, lr: float, veto: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One optimizer step on the accumulated gradients, which it consumes.

        Args:
            veto: says of the gradient norm (fp32 0-dim, on the device) whether to skip the step: fp32 0-dim, 0 or 1.

        Returns:
            grad_norm, skipped: fp32 0-dim device tensors; `skipped` is 1 where the norm was not finite or vetoed and
            parameters, moments and step count were left as they were.
        """
        return self.optimizer.step(lr, veto)

    def export(
        self,
        path: str | Path,
        dtype: torch.dtype | None = None,
        provenance: Mapping[str, Any] | None = None,
        *,
        parallel_write: bool = True,
    ) -> None:
        """Publish a Hugging Face folder that transformers opens: see `weights.export_model`. Every rank calls it.
        Adapters are merged into the weights that are written, in fp32 and rounded once; the engine's stay apart.

        Raises:
            ValueError: the engine was not made from a folder.
            FileExistsError: `path` is not empty.
        """
        if self.source_folder is None:
            raise ValueError("export needs the folder whose config and tokenizer to carry: give Engine source_folder")
        change = None if self.lora is None else merged_values(self.decoder)
        export_model(
            *(self.decoder, self.source_folder, path, dtype, provenance), parallel_write=parallel_write, change=change
        )

    def export_adapter(self, path: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Publish the adapters alone, as a folder that PEFT opens: see `lora.export_adapters`.

        Raises:
            ValueError: the engine has none, or was not made from a folder.
            FileExistsError: `path` is not empty.
        """
        if self.lora is None or self.source_folder is None:
            raise ValueError("export_adapter needs adapters and the model's folder: give Engine lora and source_folder")
        export_adapters(self.decoder, self.lora, self.source_folder, path, provenance)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a step changes, flat: "model.NAME" and "optimizer.KIND.NAME". The tensors themselves. Frozen
        weights are not among them."""
        state = {f"model.{name}": parameter.detach() for name, parameter in self.optimizer.parameters.items()}
        state.update({f"optimizer.{name}": tensor for name, tensor in self.optimizer.state_dict().items()})
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state back in place. `state` may be lazy: each entry is read once.

        Raises:
            ValueError: an entry is missing or unexpected (nothing is changed then), or of another shape or dtype.
        """
        own = self.state_dict()
        for problem, names in (("missing", own.keys() - state.keys()), ("unexpected", state.keys() - own.keys())):
            if names:
                raise ValueError(f"state: {len(names)} {problem} entries, for example {min(names)!r}")
        for name, tensor in own.items():
            saved = state[name]
            if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                raise ValueError(
                    f"state: {name} is {saved.dtype} {list(saved.shape)}, expected {tensor.dtype} {list(tensor.shape)}"
                )
            tensor.copy_(saved)
