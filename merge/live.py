"""A merge built straight into the weights of a Decoder: the search looks at many merges and writes none of them.

Tensors go through the executor's own code, tensor by tensor and piece by piece; only the writing differs: rounded
values go to their place in a parameter (`engine.weights.hf_tensors`). So a live merge holds the bits that the folder
holds that the executor writes, as `load_weights` would read them. Reads weight files, writes none.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from ..data.tokenizer import Tokenizer, load_tokenizer
from ..engine.config import ModelConfig
from ..engine.generate import stop_ids_of
from ..engine.model import Decoder
from ..engine.weights import Placement, hf_tensors
from .executor import chunk_size, tensor_inputs, tensor_method, torch_threads, worker_count, write_beside
from .plan import MergePlan, TensorPlan
from .stream import Target, merge_tensor

STACKED = ".mlp.experts.gate_up_proj"


def live_decoder(plan: MergePlan, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Decoder:
    """A Decoder in eval mode for the result of a merge, whose weights do not mean anything yet.

    Raises:
        ValueError: an architecture that the engine does not know, or tensors that do not fit it.
    """
    with torch.device("meta"):
        decoder = Decoder(ModelConfig.from_dict(plan.config_json, f"{plan.config_donor}: config.json"))
    placements(decoder, plan)
    return decoder.to(dtype).to_empty(device=device).eval()


def placements(decoder: Decoder, plan: MergePlan) -> Mapping[str, Placement]:
    """Where in the decoder each tensor of the merge lies.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape.
    """
    found = hf_tensors(decoder, stacked_experts=any(tensor.name.endswith(STACKED) for tensor in plan.tensors))
    held = {tensor.name for tensor in plan.tensors}
    for problem, names in (("missing", found.keys() - held), ("unexpected", held - found.keys())):
        if names:
            raise ValueError(f"{plan.config_donor}: {len(names)} {problem} tensors, for example {min(names)}")
    for tensor in plan.tensors:
        if tensor.shape != found[tensor.name].shape:
            wanted = list(found[tensor.name].shape)
            raise ValueError(f"{tensor.name}: shape {list(tensor.shape)}, by config.json it should be {wanted}")
    return found


@torch.no_grad()
def merge_live(
    plan: MergePlan, decoder: Decoder, *, workers: int | None = None, chunk_elements: int | None = None
) -> dict[str, str]:
    """Merge into a decoder that `live_decoder` made for this plan, or for another with the same config.json.

    Values are rounded as the merge says, then to the decoder's dtype, as if the written folder were loaded. The result
    depends on neither `workers` nor `chunk_elements`. After an error the weights do not mean anything.

    Returns:
        {tensor: sha256 of its values in the merge's dtype}, as in the `merge.json` of the same merge.

    Raises:
        ValueError: naming file and tensor, for NaN or infinite inputs, or a result that its dtype cannot hold.
    """
    if plan.config.compat:
        raise ValueError(f"compat: {plan.config.compat}: merges into live weights are exact ones; leave it out")
    places = placements(decoder, plan)
    parameters = dict(decoder.named_parameters())
    device = next(iter(parameters.values())).device
    chunk = chunk_size(chunk_elements, device)

    def merge_one(tensor: TensorPlan) -> str:
        place = places[tensor.name]
        values = parameters[place.parameter].detach().view(-1)[place.offset : place.offset + place.numel]

        def write(lo: int, rounded: Tensor) -> None:
            values[lo : lo + rounded.numel()].copy_(rounded)

        target = Target(tensor, tensor_method(plan, tensor, device), write)
        (merged,) = merge_tensor(tensor_inputs(plan, tensor), [target], device, chunk)
        return merged.sha256

    with torch_threads(1), ThreadPoolExecutor(worker_count(workers, device), "steep-live-merge") as pool:
        try:
            return dict(zip((tensor.name for tensor in plan.tensors), pool.map(merge_one, plan.tensors)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def live_tokenizer(plan: MergePlan) -> tuple[Tokenizer, tuple[int, ...]]:
    """The tokenizer that the written folder would have, and the ids at which its model would end a text."""
    with TemporaryDirectory(prefix="steep-") as folder:
        write_beside(plan, Path(folder))
        return load_tokenizer(folder), stop_ids_of(folder)
