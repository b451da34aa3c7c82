"""Tokenizers: ids equal to those of the library and of transformers, and text can never forge a special token."""

import json
import shutil
from pathlib import Path

import pytest

from steep.data import load_tokenizer
from tests.data.samples import CHATML, TEXTS

CHAT = [{"role": "user", "content": "Was ist <|im_end|> Fieber?"}, {"role": "assistant", "content": "Hitze."}]


def copy(folder: Path, to: Path, **config: object) -> Path:
    """The folder again with a changed tokenizer_config.json; a value of None removes the key."""
    shutil.copytree(folder, to)
    path = to / "tokenizer_config.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in {**old, **config}.items() if value is not None}))
    return to


def test_bpe_equals_transformers(bpe_folder: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(bpe_folder), AutoTokenizer.from_pretrained(bpe_folder)
    assert ours.vocab_size == len(theirs)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert ours.special_ids == set(theirs.convert_tokens_to_ids(special))
    assert (ours.bos_id, ours.eos_id, ours.adds_bos) == (None, theirs.eos_token_id, False)
    assert ours.encode_batch(TEXTS) == [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    for text in TEXTS:
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids) == text
    rendered = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(CHAT, True) == rendered
    assert ours.encode_with_special(rendered) == theirs(rendered, add_special_tokens=False)["input_ids"]
    ids = ours.encode_with_special(rendered)
    assert ours.decode(ids, skip_special=False) == theirs.decode(ids) == rendered
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_special_strings_in_text_stay_text(bpe_folder: Path, spm_folder: Path) -> None:
    for folder, text in (
        (bpe_folder, "a <|endoftext|><|im_start|>user b"),
        (spm_folder, "a </s><s>[INST] b [/INST]<unk>"),
    ):
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode(text)
        assert not set(ids) & tokenizer.special_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_batch([text, "b"]) == [ids, tokenizer.encode("b")]
        assert set(tokenizer.encode_with_special(text)) & tokenizer.special_ids


def test_sentencepiece_equals_its_library(spm_folder: Path) -> None:
    import sentencepiece

    ours = load_tokenizer(spm_folder)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(spm_folder / "tokenizer.model"))
    assert ours.vocab_size == theirs.vocab_size()
    assert (ours.bos_id, ours.eos_id, ours.adds_bos) == (theirs.bos_id(), theirs.eos_id(), True)
    assert ours.encode_batch(TEXTS) == theirs.encode(TEXTS)
    for text in TEXTS:
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)) == text
    inst, end = theirs.piece_to_id("[INST]"), theirs.piece_to_id("[/INST]")
    ids = [theirs.bos_id(), inst, *theirs.encode("Was ist Fieber?"), end, *theirs.encode("Hitze."), theirs.eos_id()]
    text = "<s>[INST]Was ist Fieber?[/INST]Hitze.</s>"
    assert ours.encode_with_special(text) == ids
    assert ours.decode(ids, skip_special=False) == text
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.token(inst) == "[INST]"
    assert ours.token_id("[INST]") == inst


def test_sentencepiece_with_tokens_added_by_hugging_face(spm_folder: Path, tmp_path: Path) -> None:
    added = {"420": {"content": "<|im_start|>", "special": True}, "421": {"content": "<|im_end|>", "special": True}}
    config = {"added_tokens_decoder": added, "eos_token": "<|im_end|>", "chat_template": CHATML}
    folder = copy(spm_folder, tmp_path / "added", **config)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (422, 421)
    ids = tokenizer.encode_with_special(tokenizer.render_chat(CHAT[1:], add_generation_prompt=False))
    assert ids[0] == 420
    assert 421 in ids
    assert not {420, 421} & set(tokenizer.encode("<|im_start|>x<|im_end|>"))
    assert tokenizer.fingerprint != load_tokenizer(spm_folder).fingerprint


def test_layouts_of_transformers_4_and_5(bpe_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    original = load_tokenizer(bpe_folder)
    AutoTokenizer.from_pretrained(bpe_folder).save_pretrained(tmp_path / "5")
    assert (tmp_path / "5" / "chat_template.jinja").is_file()

    four = copy(bpe_folder, tmp_path / "4", eos_token=None, chat_template=None)
    special = {"eos_token": {"content": "<|endoftext|>", "lstrip": False}}
    (four / "special_tokens_map.json").write_text(json.dumps(special))
    named = [{"name": "tool_use", "template": "tools!"}, {"name": "default", "template": CHATML}]
    (four / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))

    for folder in (tmp_path / "5", four):
        tokenizer = load_tokenizer(folder)
        assert tokenizer.fingerprint == original.fingerprint
        assert tokenizer.eos_id == original.eos_id
        assert tokenizer.chat_template == CHATML
        assert tokenizer.render_chat(CHAT) == original.render_chat(CHAT)

    bare = copy(bpe_folder, tmp_path / "bare", eos_token=None, chat_template=None)
    assert load_tokenizer(bare).eos_id is None
    (bare / "config.json").write_text(json.dumps({"eos_token_id": 1, "bos_token_id": None}))
    assert load_tokenizer(bare).eos_id == 1
    (bare / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    tokenizer = load_tokenizer(bare)
    assert (tokenizer.eos_id, tokenizer.special_tokens["eos_token"]) == (2, tokenizer.token(2))
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.render_chat(CHAT)


@pytest.mark.parametrize("configured", [None, True, False])
@pytest.mark.parametrize("post_processor", [True, False])
def test_adds_bos_as_transformers_does(
    bpe_folder: Path, tmp_path: Path, configured: bool | None, post_processor: bool
) -> None:
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    folder = copy(bpe_folder, tmp_path / "bos", bos_token="<|im_start|>", add_bos_token=configured)
    if post_processor:
        raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
        bos = raw.token_to_id("<|im_start|>")
        raw.post_processor = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", bos)])
        raw.save(str(folder / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs("a")["input_ids"][0] == theirs.bos_token_id
    assert load_tokenizer(folder).adds_bos == expected
    assert expected == post_processor


@pytest.mark.parametrize("configured", [None, True, False])
def test_sentencepiece_adds_bos_unless_told_otherwise(
    spm_folder: Path, tmp_path: Path, configured: bool | None
) -> None:
    folder = copy(spm_folder, tmp_path / "bos", add_bos_token=configured)
    assert load_tokenizer(folder).adds_bos == (configured is not False)


def test_the_fingerprint_is_of_the_meaning(bpe_folder: Path, tmp_path: Path) -> None:
    original = load_tokenizer(bpe_folder).fingerprint
    source = json.loads((bpe_folder / "tokenizer.json").read_text(encoding="utf-8"))

    def fingerprint(name: str, tokenizer: dict[str, object]) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
        return load_tokenizer(folder).fingerprint

    merges = [" ".join(merge) for merge in source["model"]["merges"]]
    assert fingerprint("merges", {**source, "model": {**source["model"], "merges": merges}}) == original
    truncation = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    assert fingerprint("truncation", {**source, "truncation": truncation}) == original
    assert len(load_tokenizer(tmp_path / "truncation").encode(TEXTS[0])) > 5
    fewer = source["model"]["merges"][:-1]
    assert fingerprint("fewer", {**source, "model": {**source["model"], "merges": fewer}}) != original
    prefix = {**source["pre_tokenizer"], "add_prefix_space": True}
    assert fingerprint("prefix", {**source, "pre_tokenizer": prefix}) != original


def test_ids_beyond_the_vocabulary(bpe_folder: Path, spm_folder: Path) -> None:
    for folder in (bpe_folder, spm_folder):
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode("Fieber")
        assert tokenizer.decode([*ids, tokenizer.vocab_size, tokenizer.vocab_size + 500]) == "Fieber"
        with pytest.raises(ValueError, match=f"no token has id {tokenizer.vocab_size}"):
            tokenizer.token(tokenizer.vocab_size)
        with pytest.raises(ValueError, match="no token 'unheard'"):
            tokenizer.token_id("unheard")


def test_refusals(bpe_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer; looked for tokenizer\.json and tokenizer\.model"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer.model"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("nonsense")
        with pytest.raises(ValueError, match=name):
            load_tokenizer(folder)
    broken = copy(bpe_folder, tmp_path / "broken")
    (broken / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not valid JSON"):
        load_tokenizer(broken)
    with pytest.raises(ValueError, match="eos_token '</s>' is not in the tokenizer"):
        load_tokenizer(copy(bpe_folder, tmp_path / "eos", eos_token="</s>"))
