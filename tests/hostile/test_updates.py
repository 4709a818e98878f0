"""What is no update, and what is no device's status, sent to a running aggregator by devices with good connections."""

import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding
from msgspec import structs

from aggregator import ca
from shared import identity, sealing, wire
from shared.messages import DeviceStatus, Outcome, Receipt, UpdateContext, UpdateHead
from tests.broker.broker import Peer
from tests.forgery import SERVER, forge
from tests.hostile import records
from tests.hostile.daemon import until
from tests.hostile.records import CLIP, DIMENSION, JUNK, Device, Update, body, edited, flip, update, values, without
from tests.hostile.site import Site, status

ZERO = "0" * 32
NAN, INF = float("nan"), float("inf")


class Attack:
    """What a case works with: the site, the open round of `main` and a device that never did anything."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.device = site.fresh()
        self.offer = site.offer("main")

    def update(self, **changes: Any) -> Update:
        """An update of this device for main's open round."""
        return update(self.device, self.offer, **changes)

    def forged(self, by: str = "own", name: str | None = None, **changes: Any) -> Update:
        """An update with a certificate and key of another making, under its own device's name."""
        authority = ca.open_authority(self.site.fleet.folder, None)
        if by != "own":
            # A CA of the same name and subject, with another key.
            there = self.site.fleet.folder.parent / by
            if not there.exists():
                ca.init_fleet(there, "test-fleet", ["localhost"], now=datetime.now(UTC).timestamp(), passphrase=None)
            authority = ca.open_authority(there, None)
        made = forge(authority, name or self.device.name, **changes)
        key = made.key if isinstance(made.key, ec.EllipticCurvePrivateKey) else self.device.key
        return update(Device(self.device.name, made.der, key), self.offer)


def signed_by(device: Device, head: bytes, sealed: bytes | None) -> Update:
    """An update with a head of any bytes."""
    return Update(head, identity.sign_head(device.key, head), sealed)


def truncated(attack: Attack, told: bool) -> Update:
    """An update that lost its end; `told`: its head says so."""
    made = attack.update()
    assert made.body is not None
    short = made.body[:-5]
    if not told:
        return replace(made, body=short)
    return replace(attack.update(head={"size": len(short), "sha256": sha256(short).digest()}), body=short)


def with_certificate(attack: Attack, certificate: bytes) -> Update:
    """An update signed by this device, with a certificate of somebody else."""
    return attack.update(head={"certificate": certificate})


def spoilt_header(attack: Attack, header: bytes, length: int | None = None) -> Update:
    """An update whose sealed header is any bytes, well sealed; `length` is what it claims to have."""
    head = wire.unpack(attack.update().head, UpdateHead)
    key = AESGCM.generate_key(256)
    public = X25519PublicKey.from_public_bytes(attack.offer.hpke_key)
    encapsulation = sealing._SUITE.encrypt(key, public, sealing._INFO + head.context)
    plain = struct.pack(">I", len(header) if length is None else length) + header + values()
    sealed = AESGCM(key).encrypt(sealing._nonce(0, 1), plain, sealing._aad(head.context, encapsulation))
    changed = structs.replace(head, encapsulation=encapsulation, size=len(sealed), sha256=sha256(sealed).digest())
    return signed_by(attack.device, wire.pack(changed), sealed)


def spike(value: float) -> bytes:
    """A delta with one odd value."""
    delta = np.zeros(DIMENSION, "<f4")
    delta[3] = value
    return delta.tobytes()


GOOD_HEADER = wire.pack(body())
YEAR = timedelta(days=365)

REJECTED: dict[str, tuple[Callable[[Attack], Update], str, Outcome]] = {
    # which round
    "no_such_task": (lambda a: a.update(context={"task": "nothing"}), "wrong_task", Outcome.UNKNOWN),
    "of_another_task": (lambda a: a.update(context={"task": "short"}), "wrong_manifest", Outcome.SUPERSEDED),
    "of_another_manifest": (lambda a: a.update(context={"manifest": bytes(32)}), "wrong_manifest", Outcome.SUPERSEDED),
    "of_another_release": (lambda a: a.update(context={"release": bytes(32)}), "wrong_digest", Outcome.REJECTED),
    "of_a_future_round": (lambda a: a.update(context={"round": 2}), "no_such_round", Outcome.UNKNOWN),
    "of_the_last_round_there_is": (
        lambda a: a.update(context={"round": 2**63 - 1}),
        "no_such_round",
        Outcome.UNKNOWN,
    ),
    # who
    "certificate_of_another_device": (
        lambda a: with_certificate(a, a.site.fresh().certificate),
        "wrong_device",
        Outcome.REJECTED,
    ),
    "certificate_of_the_aggregator": (
        lambda a: with_certificate(a, x509_der(a.site.fleet.aggregator.certificate.read_bytes())),
        "bad_certificate",
        Outcome.REJECTED,
    ),
    "certificate_of_the_broker": (
        lambda a: with_certificate(a, x509_der((a.site.fleet.folder / "broker" / "server.crt").read_bytes())),
        "bad_certificate",
        Outcome.REJECTED,
    ),
    "certificate_of_the_ca": (
        lambda a: with_certificate(a, x509_der(a.site.fleet.authority.read_bytes())),
        "bad_certificate",
        Outcome.REJECTED,
    ),
    "certificate_is_junk": (lambda a: with_certificate(a, b"junk" * 100), "bad_certificate", Outcome.REJECTED),
    "certificate_with_a_flipped_bit": (
        lambda a: with_certificate(a, flip(a.device.certificate, 200)),
        "bad_certificate",
        Outcome.REJECTED,
    ),
    "forged_ca_of_the_same_name": (lambda a: a.forged("twin"), "bad_certificate", Outcome.REJECTED),
    "certificate_that_ended_before_its_ca_began": (
        lambda a: a.forged(born=datetime.now(UTC) - YEAR, days=300),
        "bad_certificate",
        Outcome.REJECTED,
    ),
    "certificate_for_a_server": (lambda a: a.forged(usage=[SERVER]), "bad_certificate", Outcome.REJECTED),
    "certificate_without_a_use": (lambda a: a.forged(usage=[]), "bad_certificate", Outcome.REJECTED),
    "certificate_that_is_a_ca": (lambda a: a.forged(ca=True), "bad_certificate", Outcome.REJECTED),
    "certificate_with_two_names": (
        lambda a: a.forged(common_names=[a.device.name, "live-1"]),
        "bad_certificate",
        Outcome.REJECTED,
    ),
    "certificate_on_rsa": (
        lambda a: a.forged(key=rsa.generate_private_key(65537, 2048)),
        "bad_certificate",
        Outcome.REJECTED,
    ),
    "certificate_named_like_a_service": (lambda a: a.forged(name="_agg-0"), "bad_certificate", Outcome.REJECTED),
    **{
        f"certificate_of_the_name_{name}": (
            lambda a, name=name: a.forged(name=name),  # type: ignore[misc]
            "bad_certificate",
            Outcome.REJECTED,
        )
        for name in ("+", "#", "a/b", "Live-1", "live-1 ", "x" * 64)
    },
    "signed_with_another_key": (
        lambda a: update(replace(a.device, key=ec.generate_private_key(ec.SECP256R1())), a.offer),
        "bad_signature",
        Outcome.REJECTED,
    ),
    "flipped_signature": (
        lambda a: replace(made := a.update(), signature=flip(made.signature, -1)),
        "bad_signature",
        Outcome.REJECTED,
    ),
    "signature_is_junk": (lambda a: replace(a.update(), signature=bytes(70)), "bad_signature", Outcome.REJECTED),
    "flipped_head": (lambda a: flipped_head(a), "bad_signature", Outcome.REJECTED),
    # the sealed body
    "flipped_body": (
        lambda a: replace(made := a.update(), body=flip(made.body or b"", 9)),
        "wrong_digest",
        Outcome.REJECTED,
    ),
    "flipped_body_signed": (lambda a: a.update(spoil=("body", 9)), "sealed_badly", Outcome.REJECTED),
    "flipped_tag_signed": (lambda a: a.update(spoil=("body", -1)), "sealed_badly", Outcome.REJECTED),
    "flipped_encapsulation_signed": (
        lambda a: a.update(spoil=("encapsulation", 5)),
        "sealed_badly",
        Outcome.REJECTED,
    ),
    "encapsulation_of_zeros": (lambda a: a.update(head={"encapsulation": bytes(80)}), "sealed_badly", Outcome.REJECTED),
    "encapsulation_too_short": (
        lambda a: a.update(head={"encapsulation": bytes(32)}),
        "sealed_badly",
        Outcome.REJECTED,
    ),
    "sealed_to_another_key": (
        lambda a: a.update(hpke_key=sealing.generate()[1]),
        "sealed_badly",
        Outcome.REJECTED,
    ),
    "sealed_for_another_context": (lambda a: respliced(a), "sealed_badly", Outcome.REJECTED),
    "truncated_body": (lambda a: truncated(a, told=False), "wrong_digest", Outcome.REJECTED),
    "truncated_body_signed": (lambda a: truncated(a, told=True), "sealed_badly", Outcome.REJECTED),
    "no_bytes_of_body": (lambda a: replace(a.update(), body=b""), "wrong_digest", Outcome.REJECTED),
    "one_byte_of_body_signed": (
        lambda a: replace(a.update(head={"size": 1, "sha256": sha256(b"x").digest()}), body=b"x"),
        "sealed_badly",
        Outcome.REJECTED,
    ),
    "huge_body": (lambda a: a.update(delta=bytes(1 << 20)), "too_large", Outcome.REJECTED),
    "size_that_lies": (lambda a: a.update(head={"size": 2**40}), "too_large", Outcome.REJECTED),
    # the numbers
    "nan": (lambda a: a.update(delta=spike(NAN)), "not_finite", Outcome.REJECTED),
    "infinity": (lambda a: a.update(delta=spike(-INF)), "not_finite", Outcome.REJECTED),
    "1e38": (lambda a: a.update(delta=values(value=1e38)), "norm", Outcome.REJECTED),
    "norm_above_the_clip": (lambda a: a.update(delta=spike(CLIP * 1.01)), "norm", Outcome.REJECTED),
    "one_value_less": (lambda a: a.update(delta=values(DIMENSION - 1)), "wrong_dimension", Outcome.REJECTED),
    "one_value_more": (lambda a: a.update(delta=values(DIMENSION + 1)), "wrong_dimension", Outcome.REJECTED),
    "no_values": (lambda a: a.update(delta=b""), "wrong_dimension", Outcome.REJECTED),
    "dimension_that_lies": (lambda a: a.update(context={"dimension": 13}), "wrong_dimension", Outcome.REJECTED),
    "huge_dimension": (lambda a: a.update(context={"dimension": 2**62}), "wrong_dimension", Outcome.REJECTED),
    # the report
    "no_examples": (lambda a: a.update(report=body(examples=0)), "wrong_type", Outcome.REJECTED),
    "negative_examples": (lambda a: a.update(report=body(examples=-5)), "wrong_type", Outcome.REJECTED),
    "huge_examples": (lambda a: a.update(report=body(examples=2**63)), "wrong_type", Outcome.REJECTED),
    "examples_are_text": (lambda a: a.update(report=body(examples="12")), "wrong_type", Outcome.REJECTED),
    "metric_nan": (lambda a: a.update(report=body(metrics={"loss": NAN})), "metrics", Outcome.REJECTED),
    "metric_infinite": (lambda a: a.update(report=body(metrics={"loss": INF})), "metrics", Outcome.REJECTED),
    "metric_huge": (lambda a: a.update(report=body(metrics={"loss": 1.7e308})), "metrics", Outcome.REJECTED),
    "metric_nobody_asked_for": (lambda a: a.update(report=body(metrics={"fun": 1.0})), "metrics", Outcome.REJECTED),
    "metrics_of_no_example": (lambda a: a.update(report=body(holdout=0)), "metrics", Outcome.REJECTED),
    "too_many_metrics": (
        lambda a: a.update(report=body(metrics={f"m{n}": 1.0 for n in range(65)})),
        "wrong_type",
        Outcome.REJECTED,
    ),
    "header_of_junk": (lambda a: spoilt_header(a, b"\xc1\xc1"), "not_msgpack", Outcome.REJECTED),
    "header_that_is_deep": (lambda a: spoilt_header(a, b"\x91" * 200), "not_msgpack", Outcome.REJECTED),
    "header_with_a_trailing_byte": (
        lambda a: spoilt_header(a, GOOD_HEADER + b"\0"),
        "not_msgpack",
        Outcome.REJECTED,
    ),
    "header_with_an_unknown_field": (
        lambda a: spoilt_header(a, edited(GOOD_HEADER, extra=1)),
        "wrong_type",
        Outcome.REJECTED,
    ),
    "header_length_that_lies": (
        lambda a: spoilt_header(a, GOOD_HEADER, 2**32 - 1),
        "sealed_badly",
        Outcome.REJECTED,
    ),
    "header_of_no_length": (lambda a: spoilt_header(a, GOOD_HEADER, 0), "empty", Outcome.REJECTED),
}
"""Heads that decode: each gets a receipt."""

OPENED = {
    *("sealed_badly", "not_finite", "norm", "metrics"),
    *("wrong_type", "not_msgpack", "empty"),  # of what is sealed
}
"""Reasons that only the bytes inside a body give."""

REFUSED: dict[str, tuple[Callable[[Attack], Update | bytes], str]] = {
    "another_name_in_the_context": (lambda a: a.update(context={"device": "live-1"}), "wrong_device"),
    "a_service_in_the_context": (lambda a: a.update(context={"device": "_agg-0"}), "wrong_type"),
    "no_body": (lambda a: replace(a.update(), body=None), "missing_part"),
    "head_is_junk": (lambda a: signed_by(a.device, b"junk", b"x"), "not_msgpack"),
    "head_is_deep": (lambda a: signed_by(a.device, b"\x91" * 16_000, b"x"), "not_msgpack"),
    "head_with_an_unknown_field": (
        lambda a: signed_by(a.device, edited(a.update().head, extra=1), b"x"),
        "wrong_type",
    ),
    "head_without_a_size": (lambda a: signed_by(a.device, without(a.update().head, "size"), b"x"), "wrong_type"),
    "head_of_size_0": (lambda a: a.update(head={"size": 0}), "wrong_type"),
    "head_with_shares": (lambda a: a.update(head={"shares": [b"x"]}), "wrong_type"),
    "head_too_long": (lambda a: a.update(head={"certificate": bytes(20_000)}), "wrong_type"),
    "context_is_junk": (lambda a: a.update(context_bytes=b"junk"), "not_msgpack"),
    "context_of_a_secure_round": (lambda a: a.update(context={"mode": "masked"}), "wrong_type"),
    "context_of_another_codec": (lambda a: a.update(context={"codec": "top1"}), "wrong_type"),
    "context_of_round_0": (lambda a: a.update(context={"round": 0}), "wrong_type"),
    "context_of_round_minus_1": (lambda a: a.update(context={"round": -1}), "wrong_type"),
    "context_of_the_next_version": (lambda a: a.update(context={"v": 2}), "version"),
    "trailing_byte": (lambda a: a.update().payload + b"\0", "not_msgpack"),
    "unknown_field": (lambda a: edited(a.update().payload, extra=1), "wrong_type"),
    "signature_missing": (lambda a: without(a.update().payload, "sig"), "wrong_type"),
    "signature_too_short": (lambda a: replace(a.update(), signature=b"x"), "wrong_type"),
    "repeated_field": (lambda a: b"\x85" + a.update().payload[1:] + b"\xa1v\x01", "not_canonical"),
}
"""Messages that cannot be believed enough to be answered: refused without a receipt."""


def x509_der(pem: bytes) -> bytes:
    """A PEM certificate as a head carries it."""
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)


def flipped_head(attack: Attack) -> Update:
    """An update whose head was changed after signing, and sent under its new name."""
    made = attack.update()
    head = wire.unpack(made.head, UpdateHead)
    return replace(made, head=wire.pack(structs.replace(head, sha256=flip(head.sha256, 0))))


def respliced(attack: Attack) -> Update:
    """The body of one context under a head with another, honestly signed."""
    one, two = attack.update(), attack.update(context={"report": bytes(16)})
    first, second = (wire.unpack(each.head, UpdateHead) for each in (one, two))
    head = structs.replace(second, encapsulation=first.encapsulation, size=first.size, sha256=first.sha256)
    return signed_by(attack.device, wire.pack(head), one.body)


@pytest.mark.parametrize("case", REJECTED)
def test_rejected(site: Site, case: str) -> None:
    """An update that must not count gets one line and a signed receipt that says why; nothing changes."""
    make, reason, outcome = REJECTED[case]
    attack = Attack(site)
    rejects(site, attack.device, make(attack), reason, outcome)
    site.accepts()


def test_a_certificate_of_tomorrow(site: Site) -> None:
    """One line and no word to the device, which would take it for the last: our clock may be the one that is wrong."""
    attack = Attack(site)
    bad = attack.forged(born=datetime.now(UTC) + timedelta(days=1))
    before = site.snapshot()
    lines = site.provoke(lambda: silence(site, attack.device, bad))
    assert [(line["event"], line.get("device"), line["reason"]) for line in lines] == [
        ("update.rejected", attack.device.name, "bad_certificate")
    ]
    assert site.snapshot() == before
    site.accepts()


def silence(site: Site, device: Device, update: Update) -> None:
    """Send an update that the aggregator says nothing to."""
    with Peer(site.fleet, site.fleet.device(device.name)) as peer:
        assert peer.subscribe(f"fl/dev/{device.name}/cmd/receipt") < 128
        assert peer.publish(f"fl/up/0/{device.name}/{update.name}/head", update.payload) < 128
        site.fence()
        assert peer.fence() == []


def rejects(site: Site, device: Device, bad: Update, reason: str, outcome: Outcome) -> None:
    """Send a bad update and look at everything."""
    before = site.snapshot()
    receipts: list[Receipt] = []
    lines = site.provoke(lambda: receipts.extend(site.send(device, bad)))
    assert [(line["event"], line.get("device"), line["reason"], line["outcome"]) for line in lines] == [
        ("update.rejected", device.name, reason, outcome.value)
    ]
    (answer,) = receipts
    assert (answer.outcome, answer.reason, answer.device) == (outcome, reason, device.name)
    assert answer.head == sha256(bad.head).digest()
    after = site.snapshot()
    if outcome is Outcome.REJECTED and was_opened(bad, reason):
        # All that changes is that the device has had its say in this round: it hears the same again.
        (row,) = set(after.rows["contributions"]) - set(before.rows["contributions"])
        assert f"'{device.name}'" in row and "'rejected', 0, 0.0, 0, 0, b'\\x80', b'', b''" in row
        after.rows["contributions"].remove(row)
        again: list[Receipt] = []
        assert site.provoke(lambda: again.extend(site.send(device, bad)), silent=True) == []
        assert again == receipts
    assert after == before


def was_opened(bad: Update, reason: str) -> bool:
    """Whether an update was refused for what is sealed in it."""
    context = wire.unpack(wire.unpack(bad.head, UpdateHead).context, UpdateContext)
    return reason in OPENED or (reason == "wrong_dimension" and context.dimension == DIMENSION)


def test_a_certificate_that_makes_a_library_warn(site: Site) -> None:
    """A serial number below zero is worth a warning to a library: it is a line of the log like any other."""
    attack = Attack(site)
    at = attack.device.certificate.index(b"\xa0\x03\x02\x01\x02\x02") + 7  # behind the version and the length
    bad = with_certificate(attack, flip(attack.device.certificate, at, 0x80))
    lines = site.provoke(lambda: site.send(attack.device, bad))
    told = [(line["event"], line.get("reason")) for line in lines if line["event"] != "library.said"]
    assert told == [("update.rejected", "bad_certificate")]


@pytest.mark.parametrize("case", REFUSED)
def test_refused(site: Site, case: str) -> None:
    """What is no update at all gets one line; nothing changes."""
    make, reason = REFUSED[case]
    attack = Attack(site)
    made = make(attack)
    name, payload = (made.name, made.payload) if isinstance(made, Update) else (ZERO, made)
    refuses(site, attack.device.name, f"fl/up/0/{attack.device.name}/{name}/head", payload, reason)
    site.accepts()


@pytest.mark.parametrize("junk", JUNK)
def test_junk(site: Site, junk: str) -> None:
    """Junk where an update belongs is refused in the same way."""
    payload, reason = JUNK[junk]
    refuses(site, "junk", f"fl/up/0/junk/{ZERO}/head", payload, reason)


@pytest.mark.parametrize(
    "topic",
    [
        f"fl/up/0/junk/{ZERO}",
        f"fl/up/0/junk/{ZERO}/00",
        f"fl/up/0/junk/{ZERO}/-1",
        f"fl/up/0/junk/{ZERO}/{2**32}",
        f"fl/up/0/junk/{ZERO}/head/more",
        f"fl/up/0/junk/{'G' * 32}/head",
        "fl/up/0/junk/../head",
        f"fl/up/0/junk/{ZERO[1:]}/head",
        "fl/up/0/junk/\u00fcber/head",
    ],
)
def test_odd_topic(site: Site, topic: str) -> None:
    """A topic below a device's name that the protocol does not know is refused, whatever is on it."""
    refuses(site, "junk", topic, Attack(site).update().payload, "topic")


def test_an_update_under_another_name(site: Site) -> None:
    """An update is only taken under the name that its head has."""
    attack = Attack(site)
    topic = f"fl/up/0/{attack.device.name}/{ZERO}/head"
    refuses(site, attack.device.name, topic, attack.update().payload, "wrong_digest")


def refuses(site: Site, device: str, topic: str, payload: bytes, reason: str) -> None:
    """Publish something bad as a device and look at everything."""
    before = site.snapshot()
    lines = site.provoke(lambda: site.whisper(device, topic, payload))
    assert [(line["event"], line["topic"], line["reason"]) for line in lines] == [("message.refused", topic, reason)]
    assert site.snapshot() == before


# -- what depends on what came before ----------------------------------------------------------------------------


def test_the_same_update_twice(site: Site) -> None:
    """An identical update gets its original receipt, is counted once and is worth no line."""
    attack = Attack(site)
    good = attack.update()
    first = site.send(attack.device, good)
    before = site.snapshot()
    second: list[Receipt] = []
    assert site.provoke(lambda: second.extend(site.send(attack.device, good)), silent=True) == []
    assert second == first
    assert [each.outcome for each in first] == [Outcome.ACCEPTED]
    assert site.snapshot() == before


def test_the_same_update_twice_at_once(site: Site) -> None:
    """Two identical messages that wait together are one update, and both receipts say accepted."""
    attack = Attack(site)
    good = attack.update()
    with Peer(site.fleet, site.fleet.device(attack.device.name)) as peer:
        peer.subscribe(f"fl/dev/{attack.device.name}/cmd/receipt")

        def send() -> None:
            for _ in range(2):
                peer.publish(f"fl/up/0/{attack.device.name}/{good.name}/head", good.payload)

        lines = site.provoke(send)
        found: list[Outcome] = []

        def both() -> bool | None:
            found.extend(site.opened(data).outcome for _, data in peer.fence())
            return len(found) >= 2 or None

        until(both, "two receipts")
    assert [line["event"] for line in lines] == ["update.accepted"]
    assert found == [Outcome.ACCEPTED] * 2


def test_a_second_update(site: Site) -> None:
    """A device counts once a round: another update of it is a duplicate, also one with a bad body."""
    attack = Attack(site)
    site.send(attack.device, attack.update())
    rejects(site, attack.device, attack.update(delta=values(value=0.5)), "duplicate", Outcome.DUPLICATE)
    rejects(site, attack.device, attack.update(delta=spike(NAN)), "duplicate", Outcome.DUPLICATE)


def test_not_selected(site: Site) -> None:
    """A device that volunteers for a round that does not want it is told so; the one that was selected is taken."""
    name = site.not_selected("picky", "live-1", "live-2")
    device = records.load_device(site.fleet, name)
    rejects(site, device, update(device, site.offer("picky")), "not_selected", Outcome.NOT_SELECTED)
    chosen = records.load_device(site.fleet, "live-2" if name == "live-1" else "live-1")
    (answer,) = site.send(chosen, update(chosen, site.offer("picky")))
    assert answer.outcome is Outcome.ACCEPTED


@pytest.mark.parametrize("value", [1e-45, -1e-40, 1.1e-38])
def test_denormals(site: Site, value: float) -> None:
    """Numbers too small for their form are numbers: they count, and weigh what they are."""
    device = site.fresh()
    (answer,) = site.send(device, update(device, site.offer("main"), delta=values(value=value)))
    assert (answer.outcome, answer.reason) == (Outcome.ACCEPTED, "")


def test_denied(site: Site) -> None:
    """A device on the deny list is refused though its connection and its certificate are good."""
    device = records.load_device(site.fleet, "denied")
    rejects(site, device, update(device, site.offer("main")), "denied", Outcome.REJECTED)


def test_denied_at_once(site: Site) -> None:
    """A name that is added to the deny list is refused from then on, without a restart."""
    attack = Attack(site)
    deny = site.fleet.folder / "aggregator" / "deny.txt"
    deny.write_text(f"{deny.read_text()}{attack.device.name}\n")
    rejects(site, attack.device, attack.update(), "denied", Outcome.REJECTED)


def test_a_round_that_is_over(site: Site) -> None:
    """After a round's end its accepted head keeps its receipt; a second one is a duplicate and a new one late."""
    offered = site.offer("short")
    device = site.fresh()
    good = update(device, offered)
    number = site.newest("short").number
    (first,) = site.send(device, good)
    site.daemon.wait("round.opened", task="short", round=offered.round + 1)
    assert site.newest("short").number == number + 1
    again: list[Receipt] = []
    assert site.provoke(lambda: again.extend(site.send(device, good)), silent=True) == []
    assert again == [first]
    rejects(site, device, update(device, offered, delta=values(value=0.2)), "duplicate", Outcome.DUPLICATE)
    other = site.fresh()
    rejects(site, other, update(other, offered), "late", Outcome.LATE)


def test_weight_of_a_boast(site: Site) -> None:
    """The most examples that a device may claim count no more than the manifest's cap."""
    offered = site.offer("short")
    device = site.fresh()
    (answer,) = site.send(device, update(device, offered, report=body(examples=10**9)))
    assert answer.outcome is Outcome.ACCEPTED
    (row,) = [row for row in site.snapshot().rows["contributions"] if device.name in row]
    assert "10000.0, 1000000000" in row


# -- status ------------------------------------------------------------------------------------------------------

STATUS: Mapping[str, tuple[Callable[[DeviceStatus], bytes], str]] = {
    "unknown_field": (lambda s: edited(wire.pack(s), extra=1), "wrong_type"),
    "online_is_text": (lambda s: edited(wire.pack(s), online="yes"), "wrong_type"),
    "datasets_with_a_slash": (lambda s: edited(wire.pack(s), datasets=["a/b"]), "wrong_type"),
    "too_many_datasets": (lambda s: edited(wire.pack(s), datasets=["d"] * 257), "wrong_type"),
    "short_session": (lambda s: edited(wire.pack(s), session=b"1"), "wrong_type"),
    "sent_before_time": (lambda s: edited(wire.pack(s), sent=-1), "wrong_type"),
    "next_version": (lambda s: edited(wire.pack(s), v=3), "version"),
    "trailing_byte": (lambda s: wire.pack(s) + b"\0", "not_msgpack"),
    "too_long": (lambda s: edited(wire.pack(s), version="x" * 70_000), "too_large"),
}


@pytest.mark.parametrize("case", STATUS)
def test_bad_status(site: Site, case: str) -> None:
    """A device's word about itself that is none is refused; what was known of it stays."""
    make, reason = STATUS[case]
    refuses(site, "live-1", "fl/dev/live-1/status", make(status()), reason)


@pytest.mark.parametrize("junk", [name for name in JUNK if name not in ("empty",)])
def test_junk_as_status(site: Site, junk: str) -> None:
    """Junk where a status belongs is refused; what is longer than any status is not even decoded."""
    payload, reason = JUNK[junk]
    refuses(site, "junk", "fl/dev/junk/status", payload, "too_large" if len(payload) > 65_536 else reason)


def test_no_status(site: Site) -> None:
    """An empty payload is how a status is cleared: the device is no longer there, and that is all."""
    before = site.snapshot()
    assert site.provoke(lambda: site.whisper("junk", "fl/dev/junk/status", b""), silent=True) == []
    assert site.snapshot() == before


def test_a_status_of_next_year(site: Site) -> None:
    """A device whose clock is wrong harms nobody but itself."""
    said = structs.replace(status(), sent=2**62)
    assert site.provoke(lambda: site.whisper("junk", "fl/dev/junk/status", wire.pack(said)), silent=True) == []
    site.accepts()


def test_the_process_is_the_first(site: Site) -> None:
    """All of this was borne by one process."""
    assert [line["event"] for line in site.daemon.read()].count("daemon.started") == 1
