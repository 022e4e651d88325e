"""Codes of 1 to 8 bits, packed without gaps."""

import numpy as np


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs unsigned codes of any shape into bytes, the first code in the lowest bits.

    Returns uint8 [ceil(codes.size * bits / 8)]; the bits past the last code are 0. Raises
    ValueError for bits that are not 1 to 8, or a code that does not fit.
    """
    _check(bits)
    flat = np.asarray(codes).reshape(-1)
    if flat.size and (flat.min() < 0 or flat.max() >= 2**bits):
        raise ValueError(f"codes from {flat.min()} to {flat.max()} do not fit in {bits} bits")
    as_bits = np.unpackbits(flat.astype(np.uint8)[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(as_bits, bitorder="little")


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Returns the `count` codes that `pack` packed, uint8 [count]. Raises ValueError as it does,
    or for another number of bytes than so many codes take."""
    _check(bits)
    expected = packed_bytes(count, bits)
    if packed.dtype != np.uint8 or packed.shape != (expected,):
        raise ValueError(
            f"{count} codes of {bits} bits take uint8 [{expected}], "
            f"got {packed.dtype} {packed.shape}"
        )
    groups = -(-count // 8)  # eight codes begin and end with a byte
    padded = np.zeros(groups * bits, np.uint8)
    padded[:expected] = packed
    padded, codes = padded.reshape(groups, bits), np.empty((groups, 8), np.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = padded[:, byte] >> shift
        if shift + bits > 8:
            code |= padded[:, byte + 1] << (8 - shift)
        codes[:, i] = code & (2**bits - 1)
    return codes.reshape(-1)[:count]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: expected 1 to 8")
