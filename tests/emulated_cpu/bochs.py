"""Runs a static x86-64 Linux program on a processor with AVX-512 that Bochs emulates: python bochs.py PROGRAM [ARGUMENTS].

Bochs comes as a Python module, `pip install bochscpu-python`; it has the processor alone, so this file is the operating system,
as small as one process with one thread allows: program loader, page table, and the system calls of the C library. Addresses are
physical ones, and everything runs in the processor's most privileged mode; pages that are not allocated cannot be touched.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import sys

import bochscpu
import bochscpu.cpu
import bochscpu.memory

PAGE = 4096
MEMORY = 256 << 20
PAGE_TABLES = MEMORY - (1 << 20)  # the root; then one table of the third level, one of the second, and the entries of all pages
SYSTEM_CALL = PAGE_TABLES - PAGE  # where the processor jumps at a system call: an instruction that stops it
STACK, STACK_SIZE = SYSTEM_CALL - PAGE, 1 << 20  # grows down
PRESENT, WRITABLE = 1, 2


class Memory:
    """The emulated memory: which pages are there, and what they hold. `changed`: the processor must forget translations."""

    def __init__(self) -> None:
        self.bytes = memoryview(mmap.mmap(-1, MEMORY))
        self.allocated = bytearray(MEMORY // PAGE)
        self.changed = True
        host = ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))
        for address in range(0, MEMORY, PAGE):
            bochscpu.memory.page_insert(address, host + address)
        self.entries = PAGE_TABLES + 3 * PAGE
        self.store(PAGE_TABLES, (PAGE_TABLES + PAGE) | PRESENT | WRITABLE)
        self.store(PAGE_TABLES + PAGE, (PAGE_TABLES + 2 * PAGE) | PRESENT | WRITABLE)
        for i in range(MEMORY // (512 * PAGE)):
            self.store(PAGE_TABLES + 2 * PAGE + 8 * i, (self.entries + i * PAGE) | PRESENT | WRITABLE)

    def store(self, address: int, *words: int) -> None:
        self.bytes[address : address + 8 * len(words)] = struct.pack(f"<{len(words)}Q", *words)

    def touchable(self, begin: int, end: int, yes: bool) -> None:
        first, last = begin // PAGE, -(-end // PAGE)
        self.store(self.entries + 8 * first, *((page * PAGE | PRESENT | WRITABLE) * yes for page in range(first, last)))
        self.changed = True

    def allocate(self, begin: int, end: int) -> None:
        self.allocated[begin // PAGE : -(-end // PAGE)] = b"\1" * (-(-end // PAGE) - begin // PAGE)
        self.touchable(begin, end, True)

    def release(self, begin: int, end: int) -> None:
        self.allocated[begin // PAGE : -(-end // PAGE)] = bytes(-(-end // PAGE) - begin // PAGE)
        self.touchable(begin, end, False)

    def find_and_allocate(self, size: int) -> int:
        """Fresh pages of zeros, 0 when there are none."""
        pages = -(-size // PAGE)
        begin = self.allocated.find(bytes(pages), MEMORY // 4 // PAGE) * PAGE  # below that is the program and its heap
        if begin < 0 or begin + pages * PAGE > STACK - STACK_SIZE - PAGE:
            return 0
        self.bytes[begin : begin + pages * PAGE] = bytes(pages * PAGE)
        self.allocate(begin, begin + pages * PAGE)
        return begin


def load_program(memory: Memory, path: str, arguments: list[str]) -> tuple[int, int, int]:
    """Returns (entry, stack pointer, end of the program)."""
    image = open(path, "rb").read()
    entry, headers = struct.unpack_from("<QQ", image, 24)
    header_size, count = struct.unpack_from("<HH", image, 54)
    end = program_headers = 0
    for i in range(count):
        kind, _, offset, address, _, in_file, in_memory, _ = struct.unpack_from("<IIQQQQQQ", image, headers + i * header_size)
        if kind == 1:  # to be loaded
            memory.allocate(address // PAGE * PAGE, address + in_memory)
            memory.bytes[address : address + in_file] = image[offset : offset + in_file]
            end = max(end, -(-(address + in_memory) // PAGE) * PAGE)
            if offset <= headers < offset + in_file:
                program_headers = headers - offset + address
    memory.allocate(STACK - STACK_SIZE, STACK)
    top = STACK - PAGE
    memory.bytes[top : top + 16] = os.urandom(16)
    random, top = top, top + 16
    pointers = []
    for argument in (path, *arguments):
        text = argument.encode() + b"\0"
        memory.bytes[top : top + len(text)] = text
        pointers.append(top)
        top += len(text)
    # System V ABI for x86-64, section 3.4: program headers, page size, entry, user and group ids, no privileges, random bytes.
    auxiliary = [
        3,
        program_headers,
        4,
        header_size,
        5,
        count,
        6,
        PAGE,
        9,
        entry,
        11,
        0,
        12,
        0,
        13,
        0,
        14,
        0,
        23,
        0,
        25,
        random,
        0,
        0,
    ]
    words = [len(pointers), *pointers, 0, 0, *auxiliary]
    stack = (STACK - PAGE - 8 * len(words)) // 64 * 64
    memory.store(stack, *words)
    return entry, stack, end


class Machine:
    def __init__(self, path: str, arguments: list[str]) -> None:
        self.memory = Memory()
        entry, stack, self.heap_end = load_program(self.memory, path, arguments)
        self.memory.allocate(SYSTEM_CALL, SYSTEM_CALL + PAGE)
        self.memory.bytes[SYSTEM_CALL] = 0xF4  # hlt
        self.session = bochscpu.Session()
        self.session.cpu.set_state(self.first_state(entry, stack))
        self.hook = bochscpu.Hook()
        self.hook.hlt = lambda session, cpu: session.stop()
        self.hook.exception = self.exception

    def first_state(self, entry: int, stack: int) -> bochscpu.State:
        state = bochscpu.State()
        bochscpu.cpu.set_long_mode(state)
        state.cr3, state.rip, state.rsp, state.rflags = PAGE_TABLES, entry, stack, 2
        state.cr4 |= 1 << 9 | 1 << 10 | 1 << 18  # SSE and its exceptions, XSAVE
        state.xcr0 = 0xE7  # x87, SSE, AVX, AVX-512
        state.mxcsr, state.mxcsr_mask = 0x1F80, 0xFFFF
        state.star, state.lstar = 0x10 << 32, SYSTEM_CALL
        code, data = bochscpu.Segment(), bochscpu.Segment()
        for segment, selector, attributes in ((code, 0x10, 0x229B), (data, 0x18, 0xCF3)):
            segment.present, segment.selector, segment.attr, segment.limit = True, selector, attributes, 0xFFFFFFFF
        state.cs = code
        state.ss = state.ds = state.es = state.fs = state.gs = data
        return state

    def exception(self, session: bochscpu.Session, cpu: int, vector: int, error: int) -> None:
        sys.stderr.write(f"bochs: exception {vector} at {session.cpu.rip:#x}, address {session.cpu.cr2:#x}\n")
        sys.stderr.flush()
        os._exit(128 + vector)  # nothing handles it

    def run(self) -> None:
        cpu = self.session.cpu
        while True:
            self.session.run([self.hook])
            number, arguments = cpu.rax, (cpu.rdi, cpu.rsi, cpu.rdx, cpu.r10)
            call = SYSTEM_CALLS.get(number)
            result = -errno.ENOSYS if call is None else call(self, *arguments)
            cpu.rax, cpu.rip, cpu.rflags = result & (1 << 64) - 1, cpu.rcx, cpu.r11
            if self.memory.changed:
                cpu.set_state(cpu.state)
                self.memory.changed = False

    # --- system calls: arguments as Linux has them, a result or a negative error ---

    def read(self, file: int, address: int, size: int, *_) -> int:
        return os.readv(file, [self.memory.bytes[address : address + size]])

    def write(self, file: int, address: int, size: int, *_) -> int:
        return os.write(file, self.memory.bytes[address : address + size])

    def map(self, address: int, size: int, protection: int, flags: int) -> int:
        if address or not flags & mmap.MAP_ANONYMOUS:
            return -errno.EINVAL
        begin = self.memory.find_and_allocate(size)
        if begin and not protection:
            self.memory.touchable(begin, begin + size, False)
        return begin or -errno.ENOMEM

    def protect(self, address: int, size: int, protection: int, *_) -> int:
        self.memory.touchable(address, address + size, protection != 0)
        return 0

    def unmap(self, address: int, size: int, *_) -> int:
        self.memory.release(address, address + size)
        return 0

    def set_heap_end(self, address: int, *_) -> int:
        if self.heap_end < address < MEMORY // 4:
            self.memory.allocate(self.heap_end, address)
            self.heap_end = -(-address // PAGE) * PAGE
        return self.heap_end if not address else address

    def thread_storage(self, code: int, address: int, *_) -> int:
        if code != 0x1002:  # ARCH_SET_FS
            return -errno.EINVAL
        segment = self.session.cpu.fs
        segment.base = address
        self.session.cpu.fs = segment
        return 0

    def random(self, address: int, size: int, *_) -> int:
        self.memory.bytes[address : address + size] = os.urandom(size)
        return size

    def exit(self, status: int, *_) -> int:
        os._exit(status)

    def nothing(self, *_) -> int:
        return 0


SYSTEM_CALLS = {
    0: Machine.read,
    1: Machine.write,
    9: Machine.map,
    10: Machine.protect,
    11: Machine.unmap,
    12: Machine.set_heap_end,
    28: Machine.nothing,  # madvise
    60: Machine.exit,
    158: Machine.thread_storage,
    202: Machine.nothing,  # futex: one thread alone
    218: Machine.nothing,  # set_tid_address
    231: Machine.exit,
    318: Machine.random,
}


if __name__ == "__main__":
    Machine(sys.argv[1], sys.argv[2:]).run()
