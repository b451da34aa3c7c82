import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.kernels._triton import kernel, launch, tl
from steep.kernels.philox import philox_bits, philox_block, philox_words

WORD = 0xFFFFFFFF


@kernel
def _bits_kernel(OUT, seed, stream, start, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(OUT + index, philox_block(seed, stream, start.to(tl.int64), BLOCK).to(tl.int64))


# The published known-answer vectors of Philox4x32-10 (Random123, kat_vectors): counter, key, result.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_known_answers(counter, key, result):
    low = (counter[0] | counter[1] << 32) - (counter[1] >> 31 << 64)  # as a signed 64-bit number
    words = philox_words(key[0] | key[1] << 32, counter[2] | counter[3] << 32, torch.tensor([low]))
    assert [int(word) for word in words] == list(result)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1), stream=st.integers(0, 2**63 - 1), start=st.integers(0, 2**40).map(lambda n: 4 * n)
)
def test_triton_gives_the_same_bits(seed, stream, start):
    out = torch.empty(32, dtype=torch.int64)
    launch(_bits_kernel, (1,), out, seed, stream, start, BLOCK=32)
    assert torch.equal(out, philox_bits(seed, stream, start, 32))


@given(start=st.integers(0, 50), count=st.integers(0, 50))
def test_any_piece_of_the_sequence_is_the_same(start, count):
    assert torch.equal(philox_bits(3, 4, start, count), philox_bits(3, 4, 0, 100)[start : start + count])


def test_bits_are_uniform_and_streams_differ():
    bits = philox_bits(1, 2, 0, 1 << 16)
    ones = torch.stack([(bits >> shift & 1).float().mean() for shift in range(32)])
    assert (ones - 0.5).abs().max() < 5 * 0.5 / 256  # five standard deviations of 65,536 fair coins
    for other in (philox_bits(1, 3, 0, 1 << 16), philox_bits(2, 2, 0, 1 << 16)):
        assert (bits == other).sum() == 0
