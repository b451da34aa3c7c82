"""A tiny random model in a Hugging Face folder, for everything that evaluation does with a real one."""

from pathlib import Path

import pytest
import torch

TEXT = """Der Patient hat Fieber. Die Leber ist ein Organ. Das Herz pumpt Blut durch den Körper.
Was ist eine Hypertonie? Antwort: Bluthochdruck. Le patient présente une fièvre élevée.
The liver is an organ. Which of the following is true? Question: What does the heart pump? A. water B. blood C. air
Answer: B. The following are multiple choice questions (with answers) about anatomy and clinical knowledge.
Der Muskelschmerz ist stark; die Lunge ist entzündet.
"""
MAX_LENGTH = 64


def save_tokenizer(folder: Path, adds_bos: bool) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def save_model(folder: Path, adds_bos: bool = True) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    save_tokenizer(folder, adds_bos)
    config = LlamaConfig(
        vocab_size=424,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.3,  # spread-out logits: an error in a position or a row cannot hide
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer llama, context 64, whose tokenizer adds a BOS."""
    return save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_without_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights with a tokenizer that has a BOS but does not add it."""
    return save_model(tmp_path_factory.mktemp("tiny_without_bos") / "model", adds_bos=False)
