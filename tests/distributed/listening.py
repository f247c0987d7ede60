"""Addresses at which this process listens."""

import ipaddress
import os
import sys
from pathlib import Path

LISTENS = "0A"
"""The state of such a socket in Linux's table."""


def addresses():
    """Those of TCP, without their ports."""
    own = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/self/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTENS and f"socket:[{inode}]" in own:
                words = bytes.fromhex(local.partition(":")[0])  # Of four bytes in the machine's order.
                swapped = b"".join(
                    words[i : i + 4][:: -1 if sys.byteorder == "little" else 1] for i in range(0, len(words), 4)
                )
                address = ipaddress.ip_address(swapped)
                found.add(getattr(address, "ipv4_mapped", None) or address)
    return found


def only_loopback():
    """Whether it listens, and nowhere else."""
    return bool(found := addresses()) and all(address.is_loopback for address in found)
