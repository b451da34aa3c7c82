"""Runs mergekit over a list of jobs in one process, because importing it takes seconds.

python mergekit_oracle.py JOBS.json, where JOBS.json is [[yaml file, output folder], ...]; run in the folder that the
relative model paths of the YAML files count from.
"""

import json
import sys
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

adapters = str(Path(sys.argv[1]).with_name("merged_adapters"))
options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, lora_merge_cache=adapters)
for yaml_file, out in json.loads(Path(sys.argv[1]).read_text()):
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(Path(yaml_file).read_text())), out, options)
