"""CRC-32 of a whole from those of its parts, which several processes compute side by side. Knows numbers only.

The CRC of zlib (IEEE 802.3) is a remainder of polynomials over GF(2): that of A followed by B is
crc(A) * x^(8 |B|) + crc(B) modulo P. See Adler's crc32_combine in zlib. Bits are reflected: bit 31 is x^0.
"""

from __future__ import annotations

_P = 0xEDB88320
_ONE = 1 << 31


def crc32_concat(first: int, second: int, second_bytes: int) -> int:
    """`zlib.crc32(a + b)` from `zlib.crc32(a)`, `zlib.crc32(b)` and `len(b)`."""
    shift, power, exponent = _ONE, _ONE >> 8, second_bytes  # power: x^8, then its squares
    while exponent:
        if exponent & 1:
            shift = _multiply(shift, power)
        power = _multiply(power, power)
        exponent >>= 1
    return _multiply(first, shift) ^ second


def _multiply(a: int, b: int) -> int:
    """a * b mod P."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_P if b & 1 else 0)  # times x
    return product
