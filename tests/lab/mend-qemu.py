"""Mends one fault of QEMU's emulated SVM, in the copy that the lab uses.

VMRUN may inject an external interrupt into the guest (EVENTINJ, AMD64 APM volume 2, 15.20). For that helper_vmrun (QEMU's
target/i386/tcg/system/svm_helper.c) delivers it at once, but before that stores its vector in cs->exception_index as well,
as it does for exceptions, which are delivered from there later. Should anything ask the emulated CPU to leave its loop
before the guest ends or takes an exception, the vector is still there and the interrupt is delivered a second time,
whatever the guest is doing and also while it has interrupts switched off: it hangs on a lock that it holds, or enters
the kernel with the wrong GS base and ends in a triple fault. So the store goes: no-operations take its place.

The instruction is found by what is around it, in Debian's builds of 10.0 and of 11.1. In another QEMU it may not be: that is
told, and its guests fail from time to time.
"""

import re
import struct
import sys


def symbols(image):
    """Name to (address, size, offset in the file) of what the program exports."""
    (table,) = struct.unpack_from("<Q", image, 40)  # e_shoff
    size, count = struct.unpack_from("<HH", image, 58)  # e_shentsize, e_shnum
    sections = [struct.unpack_from("<IIQQQQIIQQ", image, table + size * number) for number in range(count)]
    found = {}
    for _, kind, _, _, start, length, link, _, _, _ in sections:
        if kind != 11:  # SHT_DYNSYM
            continue
        names = sections[link][4]
        for entry in range(start, start + length, 24):
            name, _, _, section, address, size = struct.unpack_from("<IBBHQQ", image, entry)
            if 0 < section < count:
                text = image[names + name : image.index(b"\0", names + name)].decode()
                found[text] = (address, size, sections[section][4] + address - sections[section][3])
    return found


def store_of_the_vector(image):
    """Where in the file the instruction is, and how long."""
    known = symbols(image)
    address, size, start = known["helper_vmrun"]
    deliver = known["do_interrupt_x86_hardirq"][0]
    matches = re.finditer(
        rb"(\x89[\x80-\xbf]..\xff\xff)"  # mov %esi, exception_index (before env, so at a negative offset)
        rb"\xc7[\x80-\xbf].{4}\0{4}"  # movl $0, exception_is_int
        rb"\x48\xc7[\x80-\xbf].{4}\xff{4}"  # movq $-1, exception_next_eip
        rb".{7,20}\xba\x01\0{3}\x48\x89.\xe8(.{4})",  # log it; call do_interrupt_x86_hardirq(env, vector, 1)
        image[start : start + size],
        re.DOTALL,
    )
    hits = [hit for hit in matches if address + hit.end() + struct.unpack("<i", hit[2])[0] == deliver]
    if len(hits) != 1:
        raise LookupError(f"{len(hits)} places instead of one")
    return start + hits[0].start(1), len(hits[0][1])


path = sys.argv[1]
with open(path, "rb") as file:
    program = bytearray(file.read())
try:
    at, length = store_of_the_vector(bytes(program))
except (KeyError, LookupError) as error:
    sys.exit(f"QEMU's VMRUN could not be mended, guests of the lab will fail from time to time: {error}")
program[at : at + length] = b"\x90" * length  # nop
with open(path, "wb") as file:
    file.write(program)
print(f"QEMU's VMRUN mended: {length} bytes at {at:#x}")
