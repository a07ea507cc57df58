"""CRCs as the textbook has them: long division, most significant bit first, bits reversed."""

from __future__ import annotations

PARAMETERS = {  # width, polynomial
    "crc64nvme": (64, 0xAD93D23594C93659),
    "crc32c": (32, 0x1EDC6F41),
    "crc32": (32, 0x04C11DB7),
}


def crc(algorithm: str, data: bytes) -> bytes:
    width, polynomial = PARAMETERS[algorithm]
    bits = [(byte >> at) & 1 for byte in data for at in range(8)]  # each byte's lowest first
    ones = (1 << width) - 1
    register = ones
    for bit in bits:
        top = (register >> (width - 1)) & 1
        register = (register << 1) & ones
        if top ^ bit:
            register ^= polynomial
    mirrored = int(f"{register:0{width}b}"[::-1], 2)
    return (mirrored ^ ones).to_bytes(width // 8)
