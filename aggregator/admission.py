"""Who may connect, how often, and how many at a time: so that a stranger cannot wear the registrar out. Pure.

Each network (an IPv4 address, or the /64 of an IPv6 one) has a bucket of connections that refills; who has emptied it
is answered "too many" for as many again, and after that dropped before TLS costs anything. Memory is bounded: a network
that is forgotten begins with a full bucket, and the total is bounded all the same.
"""

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["serve", "answer", "drop"]
"""answer: say that it was too often. drop: say nothing."""


class Pace:
    """So many at once, and so many a second after that."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst = rate, burst
        self._credit, self._at = float(burst), 0.0

    def allows(self, mono: float) -> bool:
        """Whether one more is within bounds at `mono`, monotonic seconds; it counts if so."""
        self._credit = min(float(self._burst), self._credit + self._rate * max(0.0, mono - self._at))
        self._at = mono
        if self._credit < 1:
            return False
        self._credit -= 1
        return True


@dataclass(slots=True)
class _Network:
    credit: float
    at: float
    open: int = 0


class Admission:
    """Counts connections; call `left` once for each that `came` did not drop."""

    def __init__(self, *, rate: float, burst: int, total: int, each: int, networks: int = 4096) -> None:
        """`rate` a second and `burst` at once for a network, `each` open at a time, `total` of all together."""
        self._rate, self._burst, self._total, self._each, self._max = rate, burst, total, each, networks
        self._networks: OrderedDict[str, _Network] = OrderedDict()
        self._open = 0

    def __len__(self) -> int:
        return len(self._networks)

    def came(self, network: str, mono: float) -> Verdict:
        """A connection of `network` was accepted at `mono`, monotonic seconds."""
        found = self._networks.get(network)
        if found is None:
            found = self._networks[network] = _Network(float(self._burst), mono)
            self._forget()
        self._networks.move_to_end(network)
        found.credit = min(float(self._burst), found.credit + self._rate * max(0.0, mono - found.at))
        found.at = mono
        if self._open >= self._total or found.open >= self._each or found.credit - 1 < -self._burst:
            return "drop"
        found.credit -= 1
        found.open += 1
        self._open += 1
        return "serve" if found.credit >= 0 else "answer"

    def left(self, network: str) -> None:
        """A connection that was not dropped has ended."""
        self._open -= 1
        found = self._networks.get(network)
        if found is not None:
            found.open -= 1

    def _forget(self) -> None:
        """Let go of those that were longest away; never of one with open connections, of which there are few."""
        while len(self._networks) > self._max:
            oldest = next((name for name, each in self._networks.items() if not each.open), None)
            if oldest is None:
                return
            del self._networks[oldest]


def network_of(address: str) -> str:
    """What shares a bucket with this address: who has one IPv6 address has 2^64 of them."""
    plain = address.partition("%")[0]
    try:
        found = ipaddress.ip_address(plain)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))
    return str(found)
