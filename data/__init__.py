"""steep.data: text -> token store -> packing index -> order -> batches; tokenizers and chat templates.

Needs numpy and the libraries that read the formats, never torch. The format libraries are imported when first used,
and `steep.data.config` (pydantic) only by whoever reads a recipe: every tokenising process imports this package.
"""

from .batch import IGNORE, BatchLoader, PackedBatch, SequentialLoader, Source, prefetch, token_shares
from .order import Mixture, Order, Permutation, Phase
from .packing import PackingIndex, pack_best_fit, pack_concat
from .readers import Document, Reject, read_documents
from .store import TokenStore
from .tokenize import tokenize_files
from .tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "IGNORE",
    "BatchLoader",
    "Document",
    "Mixture",
    "Order",
    "PackedBatch",
    "PackingIndex",
    "Permutation",
    "Phase",
    "Reject",
    "SequentialLoader",
    "Source",
    "TokenStore",
    "Tokenizer",
    "load_tokenizer",
    "pack_best_fit",
    "pack_concat",
    "prefetch",
    "read_documents",
    "token_shares",
    "tokenize_files",
]
