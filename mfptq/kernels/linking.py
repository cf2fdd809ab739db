"""Put the object code of a kernel into memory: what it needs of a linker, which is little, instead of all of LLVM.

Kernels are compiled for addresses of 64 bits, so that an ELF file for x86-64 asks for one thing only: that addresses of its
own constants and of functions of the C library be written into it (System V ABI, AMD64 supplement, R_X86_64_64). What asks
for more is left to LLVM, as are other machines.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_MAGIC = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian
_RELOCATABLE, _X86_64 = 1, 62
_BITS, _ADDENDS, _SYMBOLS = 1, 4, 2  # kinds of sections
_ALLOCATED = 2
_ADDRESS = 1  # R_X86_64_64
_EXTERNAL = ("memcpy", "memset", "pread")
_kept: list[mmap.mmap] = []  # functions stay for as long as the process


class CannotLinkError(Exception):
    """This object file, or this machine, needs a real linker."""


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry: int


class _Symbol(NamedTuple):
    name: str
    section: int
    value: int


def link(code: bytes, name: str) -> int:
    """Return the address of a function of an object file, which is put into memory for good, or raise CannotLinkError."""
    if not sys.platform.startswith("linux") or code[:7] != _MAGIC:
        raise CannotLinkError
    try:
        sections = _sections(code)
        places, size = _lay_out(sections)
        memory = mmap.mmap(-1, size)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for number, place in places.items():
            section = sections[number]
            memory[place : place + section.size] = code[section.offset : section.offset + section.size]
        addresses = [_address(symbol, places, base) for symbol in _symbols(code, sections)]
        for place, symbol, addend in _relocations(code, sections, places):
            struct.pack_into("<Q", memory, place, _known(addresses[symbol][1]) + addend)
        found = _known(dict(addresses)[name])
    except (struct.error, LookupError, ValueError, OSError):
        raise CannotLinkError from None
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(base), ctypes.c_size_t(size), mmap.PROT_READ | mmap.PROT_EXEC):
        raise CannotLinkError
    _kept.append(memory)
    return found


def _sections(code: bytes) -> list[_Section]:
    kind, machine = struct.unpack_from("<HH", code, 16)
    (table,) = struct.unpack_from("<Q", code, 40)
    size, count = struct.unpack_from("<HH", code, 58)
    if (kind, machine) != (_RELOCATABLE, _X86_64):
        raise CannotLinkError
    return [_Section(*struct.unpack_from("<IIQQQQIIQQ", code, table + number * size)) for number in range(count)]


def _lay_out(sections: list[_Section]) -> tuple[dict[int, int], int]:
    """Return where each section that is needed in memory begins, and how much they take together."""
    places, end = dict[int, int](), 0
    for number, section in enumerate(sections):
        if section.flags & _ALLOCATED and section.size:
            if section.kind != _BITS or section.align > mmap.PAGESIZE:
                raise CannotLinkError
            places[number] = -(-end // section.align) * section.align
            end = places[number] + section.size
    return places, end


def _symbols(code: bytes, sections: list[_Section]) -> Iterator[_Symbol]:
    table = [section for section in sections if section.kind == _SYMBOLS][0]  # noqa: RUF015 - LookupError where none is
    names = sections[table.link].offset
    for start in range(table.offset, table.offset + table.size, table.entry):
        text, _info, _other, section, value, _size = struct.unpack_from("<IBBHQQ", code, start)
        yield _Symbol(code[names + text : code.index(0, names + text)].decode(), section, value)


def _address(symbol: _Symbol, places: Mapping[int, int], base: int) -> tuple[str, int | None]:
    """Return a symbol's name and address; None for what stands for none."""
    if symbol.section in places:
        return symbol.name, base + places[symbol.section] + symbol.value
    if symbol.name in _EXTERNAL:
        return symbol.name, ctypes.cast(getattr(ctypes.CDLL(None), symbol.name), ctypes.c_void_p).value
    return symbol.name, None


def _known(address: int | None) -> int:
    if address is None:
        raise CannotLinkError
    return address


def _relocations(code: bytes, sections: list[_Section], places: Mapping[int, int]) -> Iterator[tuple[int, int, int]]:
    """Yield (place in memory, number of the symbol whose address goes there, what is added to it)."""
    for section in sections:
        if section.kind == _ADDENDS and section.info in places:
            for start in range(section.offset, section.offset + section.size, section.entry):
                offset, info, addend = struct.unpack_from("<QQq", code, start)
                if info & 0xFFFFFFFF != _ADDRESS:
                    raise CannotLinkError
                yield places[section.info] + offset, info >> 32, addend
