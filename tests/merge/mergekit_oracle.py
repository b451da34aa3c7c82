"""Runs mergekit over a list of jobs in one process, because importing it takes seconds.

python mergekit_oracle.py JOBS.json, where JOBS.json is [[yaml file, output folder], ...]; run in the folder that the
relative model paths of the YAML files count from. A job may have a third entry, [[tensor, model], ...] in the order in
which mergekit draws masks: they are then steep's, which shows whether the rest of dare and della agrees. Else they
are mergekit's under the `random_seed` of the YAML, which mergekit itself takes from its command line. With a second
argument, a file, {method: {parameter: default, or null where it is required}} is written there.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import registered_methods
from mergekit.options import MergeOptions


def steeps_masks(order: Sequence[tuple[str, str]]) -> Callable[[torch.Tensor], torch.Tensor]:
    from steep.merge import Noise

    coming = iter(order)

    def bernoulli(probabilities: torch.Tensor) -> torch.Tensor:
        thresholds = (probabilities.double() * 2**32).round().long().flatten()
        mask = Noise.of(0, *next(coming)).below(0, thresholds, thresholds.numel())
        return mask.view(probabilities.shape).to(probabilities.dtype)

    return bernoulli


adapters = str(Path(sys.argv[1]).with_name("merged_adapters"))
options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, lora_merge_cache=adapters)
own_bernoulli = torch.bernoulli
for yaml_file, out, *masks in json.loads(Path(sys.argv[1]).read_text()):
    torch.bernoulli = steeps_masks(masks[0]) if masks else own_bernoulli
    written = yaml.safe_load(Path(yaml_file).read_text())
    options = options.model_copy(update={"random_seed": written.get("random_seed")})
    run_merge(MergeConfiguration.model_validate(written), out, options)

if len(sys.argv) > 2:
    described = {
        method.spec.name: {
            parameter.name: None if parameter.required else parameter.default for parameter in method.spec.parameters
        }
        for method in registered_methods()
    }
    Path(sys.argv[2]).write_text(json.dumps(described))
