"""Rows of arranged vocabularies, adapters and chat templates, against plain formulas and PEFT."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from steep.data.chat_template import render_chat_template
from steep.engine.safetensors_io import SafetensorsFolder
from steep.merge.adapters import AdaptedModel
from steep.merge.arranged import MEAN, PAD, ZERO, ArrangedModel, ArrangedTensor, RowMap
from steep.merge.chat_templates import NAMED, choose_template
from steep.merge.vocabulary import Tokens, build_vocabulary, own_rows, padding_rows, row_maps
from tests.merge.models import random_tensors, write_model

EMBED, Q_PROJ = "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    for number, name in enumerate(("a", "b")):
        write_model(folder / name, random_tensors(number), dtype=torch.bfloat16)
    return folder


@pytest.mark.parametrize("pieces", [1, 63, 64, 1000, 10**6])
def test_arranged_rows_do_not_depend_on_pieces(folder: Path, pieces: int) -> None:
    models = [SafetensorsFolder(folder / name) for name in ("a", "b")]
    numbers = np.array([0, 0, 1, ZERO, MEAN, 0, 1, 1, PAD, PAD])
    row_map = RowMap(numbers, np.array([4, 5, 9, 0, 0, 1, 2, 3, 0, 0]), (((0, 7), (1, 8)),))
    tensor = ArrangedTensor({0: EMBED, 1: EMBED}, row_map, (10, 64), torch.float32)
    arranged = ArrangedModel(models[0], models, {EMBED: tensor})
    a, b = (model.get(EMBED).float() for model in models)
    rows = [a[4], a[5], b[9], torch.zeros(64), (a[7] + b[8]) / 2, a[1], b[2], b[3]]
    padding = (torch.stack(rows).double().mean(dim=0)).float()
    expected = torch.stack([*rows, padding, padding]).view(-1)
    found = torch.cat([
        arranged.read_into(EMBED, lo, torch.empty(min(pieces, 640 - lo))) for lo in range(0, 640, pieces)
    ])  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert torch.equal(found[: 8 * 64], expected[: 8 * 64])
    assert arranged.shape(EMBED) == (10, 64)
    assert arranged.dtype(Q_PROJ) == torch.bfloat16


def tokens(words: dict[str, int]) -> Tokens:
    return Tokens(Path("somewhere"), words, {})


def test_row_maps_follow_the_rules() -> None:
    first = tokens({"x": 0, "y": 1, "z": 2})
    second = tokens({"y": 0, "x": 1, "new": 2, "beyond": 9})
    third = tokens({"x": 0, "new": 1, "y": 2})
    vocabulary = build_vocabulary(first, [(second, 4), (third, 3)], [], keep_rows=6)
    assert vocabulary.ids == {"x": 0, "y": 1, "z": 2, "new": 3}  # `beyond` has no row
    assert vocabulary.rows == 6
    rows = {0: 6, 1: 4, 2: 3}
    own = {model: own_rows(vocabulary, each, rows[model]) for model, each in enumerate((first, second, third))}
    padding = {model: padding_rows(vocabulary, each, rows[model]) for model, each in enumerate((first, second, third))}
    maps = row_maps(vocabulary, own, 0, {}, padding, 0)
    assert maps[0].models.tolist() == [0, 0, 0, MEAN, 0, 0]
    assert maps[0].means == (((1, 2), (2, 1)),)
    assert maps[0].rows.tolist() == [0, 1, 2, 0, 4, 5]
    assert maps[1].models.tolist() == [1, 1, 0, 1, 0, 0]  # z is the base's; the padding is the donor's
    assert maps[1].rows.tolist() == [1, 0, 2, 2, 4, 5]


def adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    written = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(written))
    return folder


def factors(rank: int = 2) -> dict[str, torch.Tensor]:
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    return {f"{prefix}.lora_A.weight": torch.randn(rank, 64), f"{prefix}.lora_B.weight": torch.randn(64, rank)}


@pytest.mark.parametrize(("pieces", "rslora"), [(1, False), (1000, False), (4096, True)])
def test_an_adapted_tensor_is_the_weight_and_the_scaled_product(
    folder: Path, tmp_path: Path, pieces: int, rslora: bool
) -> None:
    written = factors()
    base = SafetensorsFolder(folder / "a")
    model = AdaptedModel(base, adapter(tmp_path / "lora", written, use_rslora=rslora))
    a, b = written.values()
    scale = 4 / 2**0.5 if rslora else 2
    expected = base.get(Q_PROJ).double() + scale * b.double() @ a.double()
    found = torch.cat([
        model.read_into(Q_PROJ, lo, torch.empty(min(pieces, 4096 - lo))) for lo in range(0, 4096, pieces)
    ])  # fmt: skip
    torch.testing.assert_close(found.double().view(64, 64), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found, model.read_into(Q_PROJ, 0, torch.empty(4096)))
    assert model.adapted == [Q_PROJ]


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (factors(), {"peft_type": "IA3"}, "peft_type is 'IA3'; allowed: 'LORA'"),
        (factors(), {"use_dora": True}, "use_dora is True; only plain LoRA"),
        (factors(), {"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        (factors(), {"r": 0}, "r is 0; allowed: a number above 0"),
        (factors(3), {}, "rank 3, by adapter_config.json it should be 2"),
        (dict([next(iter(factors().items()))]), {}, "the other of lora_A and lora_B is missing"),
        ({name: x.flatten() for name, x in factors().items()}, {}, r"\[64, 64\] in the model, lora_A \[128"),
        ({"base_model.model.model.layers.9.mlp.weight": torch.ones(2)}, {}, "the model has no tensor model.layers.9"),
    ],
)  # fmt: skip
def test_adapters_that_cannot_be_merged(
    folder: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptedModel(SafetensorsFolder(folder / "a"), adapter(tmp_path / "lora", tensors, **config))


CHAT = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi there "},
    {"role": "user", "content": "Bye"},
]


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CHAT[1:2]])
@pytest.mark.parametrize("prompt", [True, False])
def test_named_templates_say_what_mergekits_say(name: str, messages: list[dict[str, str]], prompt: bool) -> None:
    pytest.importorskip("mergekit")
    theirs = (resources.files("mergekit._data.chat_templates") / f"{name}.jinja").read_text()
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    found, expected = (
        render_chat_template(template, messages, add_generation_prompt=prompt, special_tokens=special)
        for template in (NAMED[name], theirs)
    )
    if name in ("chatml", "mistral"):
        assert found == expected
    else:  # the other files leave line breaks and indents of their files in the text
        assert "".join(found.split()) == "".join(expected.split())


def test_the_most_common_template_is_chosen(tmp_path: Path) -> None:
    for name, text in (("a", "{{1}}"), ("b", "{{2}}"), ("c", "{{2}}\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))
    folders = [tmp_path / name for name in "abc"]
    assert choose_template("auto", folders) == ("{{2}}", str(tmp_path / "b"))
    assert choose_template("auto", folders[:2]) == ("{{1}}", str(tmp_path / "a"))
    with pytest.raises(ValueError, match="allowed: auto, chatml, .*; found 'chatlm'"):
        choose_template("chatlm", folders)
    with pytest.raises(ValueError, match="chat_template: chat template: "):
        choose_template("{% for %}", folders)
