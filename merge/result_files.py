"""What lies beside the weights of a merged model: which files are copied, which are written. Reads small files only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..data.files import read_json
from ..engine.model_files import carried_files
from .chat_templates import choose_template, read_template
from .findings import Findings
from .vocabulary import OTHER_VOCABULARIES, OutputVocabulary

LICENCES = ("LICEN", "NOTICE", "USE_POLICY")  # how the names of such files begin
_TOKENIZER_CONFIG = "tokenizer_config.json"


def result_files(
    config_donor: Path,
    tokenizer_donor: Path,
    vocabulary: OutputVocabulary | None,
    chat_template: str | None,
    models: Sequence[Path],
    findings: Findings,
) -> tuple[list[tuple[Path, Path]], dict[str, str], str]:
    """(donor, file) of what is copied, {name: text} of what is written, and where the chat template comes from.

    Licences go with the configuration; generation_config.json with the tokenizer, whose stop tokens it names.

    Args:
        chat_template: as configured.
        models: folders that `chat_template: auto` looks at.
    """
    written = vocabulary.tokenizer_files() if vocabulary else {}
    left_out = {"config.json"}
    if written and (beside := [name for name in OTHER_VOCABULARIES if (tokenizer_donor / name).is_file()]):
        left_out |= set(beside)
        findings.note(f"{', '.join(beside)} of {tokenizer_donor} left out: they lack the added tokens")
    template_donor = str(tokenizer_donor) if read_template(tokenizer_donor) else "none: the tokenizer has none"
    if chat_template is not None:
        try:
            template, template_donor = choose_template(chat_template, models)
        except ValueError as error:
            findings.error(str(error))
            template = None
        if template is not None:
            left_out.add("chat_template.json")
            written |= _with_template(template, tokenizer_donor, written.get(_TOKENIZER_CONFIG))
    carried = [(config_donor, file) for file in carried_files(config_donor) if file.name.startswith(LICENCES)]
    for file in carried_files(tokenizer_donor):
        if file.name not in left_out and file.name not in written and not file.name.startswith(LICENCES):
            carried.append((tokenizer_donor, file))
    return carried, written, template_donor


def _with_template(template: str, folder: Path, config: str | None) -> dict[str, str]:
    """The template in a file of its own, as transformers writes it; one in tokenizer_config.json goes.

    Args:
        config: the text of tokenizer_config.json, if it is no longer the folder's.
    """
    files = {"chat_template.jinja": template}
    if config is None and not (folder / _TOKENIZER_CONFIG).is_file():
        return files
    settings = json.loads(config) if config is not None else read_json(folder / _TOKENIZER_CONFIG)
    if settings.pop("chat_template", None) is not None:
        files[_TOKENIZER_CONFIG] = json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
    return files
