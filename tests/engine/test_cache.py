"""KVCache: reading in pieces, branching and dropping give what one pass over each whole sequence gives.

In float64, where another order of summation, which fp32 shows as 1e-6, cannot hide a wrong key.
"""

import pytest
import torch

from steep.engine.cache import KVCache
from tests.engine.parity import decoder_like, documents, packed, relative_error, tiny_transformers

CASES = ["llama", "mistral_window", "mixtral_window", "qwen2_window", "qwen3_bias_tied"]


def read(decoder, cache, pieces):
    with torch.inference_mode():
        return decoder(torch.cat(pieces), cache.positions, cache.cu_seqlens, cache.max_seqlen, cache)


def whole(decoder, doc):
    with torch.inference_mode():
        return decoder(*packed([doc]))


@pytest.mark.parametrize("case", CASES)
def test_reading_in_pieces_equals_reading_at_once(case):
    decoder = decoder_like(tiny_transformers(case)).double()
    docs = documents([20, 3, 13], 97)
    cuts = [(0, 7, 8, 9, 20), (0, 1, 2, 2, 3), (0, 5, 6, 12, 13)]
    cache = KVCache(decoder.config.num_hidden_layers)
    outputs = [[], [], []]
    for step in range(4):
        pieces = [doc[cut[step] : cut[step + 1]] for doc, cut in zip(docs, cuts)]
        cache.branch([None] * 3 if step == 0 else [0, 1, 2], [len(piece) for piece in pieces])
        for output, rows in zip(outputs, read(decoder, cache, pieces).split([len(piece) for piece in pieces])):
            output.append(rows)
    assert cache.lengths == [20, 3, 13]
    for doc, output in zip(docs, outputs):
        assert relative_error(torch.cat(output), whole(decoder, doc)) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_branches_equal_separate_sequences(case):
    """Two levels of branching, in any order, with new and dropped sequences in between."""
    decoder = decoder_like(tiny_transformers(case)).double()
    prompt_a, prompt_b, end_1, end_2, end_3, fresh, tail = documents([9, 6, 3, 1, 5, 8, 2], 97)
    cache = KVCache(decoder.config.num_hidden_layers)
    cache.branch([None, None], [9, 6])
    read(decoder, cache, [prompt_a, prompt_b])

    cache.branch([1, 0, None, 0], [3, 1, 8, 5])
    rows = read(decoder, cache, [end_1, end_2, fresh, end_3]).split([3, 1, 8, 5])
    expected = [
        torch.cat(parts) for parts in ([prompt_b, end_1], [prompt_a, end_2], [fresh], [prompt_a, end_3])
    ]
    for doc, output in zip(expected, rows):
        assert relative_error(output, whole(decoder, doc)[-len(output) :]) < 1e-12

    cache.branch([3, 1, 3], [2, 0, 0])  # 0 and 2 are dropped, 3 goes on twice
    read(decoder, cache, [tail])
    assert cache.lengths == [16, 10, 14]
    cache.branch([0, 2], [1, 2])
    rows = read(decoder, cache, [end_2, tail]).split([1, 2])
    for doc, output in zip([[prompt_a, end_3, tail, end_2], [prompt_a, end_3, tail]], rows):
        assert relative_error(output, whole(decoder, torch.cat(doc))[-len(output) :]) < 1e-12


def test_a_fork_leaves_the_original_as_it_is():
    decoder = decoder_like(tiny_transformers("qwen3")).double()
    prompt, end_1, end_2 = documents([9, 3, 4], 97)
    cache = KVCache(decoder.config.num_hidden_layers)
    cache.branch([None], [9])
    read(decoder, cache, [prompt])
    for end in (end_1, end_2, end_1):
        fork = cache.fork()
        fork.branch([0], [len(end)])
        output = read(decoder, fork, [end])
        assert relative_error(output, whole(decoder, torch.cat([prompt, end]))[9:]) < 1e-12
    assert cache.lengths == [9]


def test_the_next_pass_is_described():
    cache = KVCache(num_layers=0)
    cache.branch([None, None], [3, 2])
    cache.branch([1, 0, 1], [1, 0, 4])
    assert cache.lengths == [3, 3, 6]
    assert cache.positions.tolist() == [2, 2, 3, 4, 5]
    assert cache.cu_seqlens.tolist() == [0, 1, 1, 5]
    assert cache.cu_seqlens_k.tolist() == [0, 3, 6, 12]
    assert (cache.max_seqlen, cache.max_seqlen_k) == (4, 6)
    assert cache.positions.dtype == cache.cu_seqlens.dtype == cache.cu_seqlens_k.dtype == torch.int32


@pytest.mark.parametrize(
    ("parents", "lengths", "message"),
    [
        ([2], [1], "parent 2 of 2 cached sequences"),
        ([-1], [1], "parent -1 of 2 cached sequences"),
        ([0, 1], [1], "2 parents, lengths"),
        ([0], [-1], "allowed: one each, >= 0"),
        ([0, 1], [0, 0], "not all 0"),
        ([], [], "0 parents"),
    ],
)
def test_impossible_branches_are_refused(parents, lengths, message):
    cache = KVCache(num_layers=0)
    cache.branch([None, None], [3, 2])
    with pytest.raises(ValueError, match=message):
        cache.branch(parents, lengths)
