"""aggregator.registry: who is let in by which token, whose certificate is renewed, and what is answered again."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from aggregator import registry
from aggregator.registry import Issue, Repeat, Shown, StoredCertificate, StoredDevice, StoredToken, Times, key_id
from shared import enrolment
from shared.enrolment import EnrolRequest
from shared.errors import EnrolmentError, Refused

NOW = 1_800_000_000.0
DAY = 86_400
TIMES = Times(lifetime=30 * DAY, renewable=180 * DAY)
SECRET = bytes(range(32))
KEYS = [ec.generate_private_key(ec.SECP256R1()) for _ in range(3)]
NOBODY: frozenset[str] = frozenset()


@dataclass
class Ledger:
    """A registry in memory."""

    tokens: dict[str, StoredToken] = field(default_factory=dict)
    devices: dict[str, StoredDevice] = field(default_factory=dict)
    certificates: list[StoredCertificate] = field(default_factory=list)

    def token(self, token: str) -> StoredToken | None:
        """The token of this id."""
        return self.tokens.get(token)

    def device(self, name: str) -> StoredDevice | None:
        """The device of this name."""
        return self.devices.get(name)

    def certificate(self, serial: int) -> StoredCertificate | None:
        """By serial number."""
        return next((each for each in self.certificates if each.serial == serial), None)

    def of_key(self, key: bytes) -> StoredCertificate | None:
        """The newest one of a key."""
        return max((each for each in self.certificates if each.key == key), key=lambda one: one.issued, default=None)

    def issued_since(self, device: str, moment: int) -> int:
        """How many."""
        return sum(each.device == device and each.issued > moment for each in self.certificates)

    def issue(self, decision: Issue | Repeat, now: float) -> StoredCertificate:
        """What the shell does with a decision."""
        assert isinstance(decision, Issue)
        made = StoredCertificate(
            serial=len(self.certificates) + 1,
            device=decision.name,
            key=key_id(decision.key),
            issued=int(now),
            not_after=int(registry.end_of(TIMES, NOW * 2, now)),
            pem="",
        )
        self.certificates.append(made)
        self.devices.setdefault(made.device, StoredDevice(name=made.device, labels={}, enrolled=int(now), how="token"))
        if decision.token is not None:
            used = replace(decision.token, used_at=int(now), device=made.device, key=made.key)
            self.tokens[used.id] = used
        return made


def ledger(**changes: Any) -> Ledger:
    """A registry with one open token."""
    plain: Mapping[str, Any] = {"name": None, "again": False, "labels": {}, "created": int(NOW)}
    made = StoredToken(
        **{**plain, "id": "tokentoken", "digest": enrolment.secret_digest(SECRET), "expires": int(NOW) + DAY, **changes}
    )
    return Ledger({made.id: made})


def asks(name: str | None = "dev-1", key: int = 0, claimed: str | None = None, **changes: Any) -> EnrolRequest:
    """A device's request."""
    return EnrolRequest(
        **{
            "v": 1,
            "token": "tokentoken",
            "secret": SECRET,
            "name": name,
            "csr": enrolment.make_csr(KEYS[key], claimed),
            **changes,
        }
    )


def enrol(book: Ledger, request: EnrolRequest, now: float = NOW, denied: frozenset[str] = NOBODY) -> Issue | Repeat:
    """The decision."""
    return registry.enrol(book, TIMES, request, denied, now)


def refused(book: Ledger, request: EnrolRequest, now: float = NOW, denied: frozenset[str] = NOBODY) -> Refused:
    """The reason for which a request is refused."""
    with pytest.raises(EnrolmentError) as caught:
        enrol(book, request, now, denied)
    return caught.value.reason


def shown(name: str = "dev-1", key: int = 0, serial: int = 99, not_after: float = NOW + DAY) -> Shown:
    """A verified certificate of a device."""
    return Shown(name, KEYS[key].public_key(), serial, not_after)


def renew(
    book: Ledger,
    old: Shown,
    key: int = 1,
    signer: int = 0,
    now: float = NOW,
    denied: frozenset[str] = NOBODY,
    name: str | None = None,
) -> Issue | Repeat:
    """The decision on a renewal for KEYS[key], signed by KEYS[signer]."""
    csr = enrolment.make_csr(KEYS[key], name)
    proof = enrolment.sign_renewal(KEYS[signer], csr)
    return registry.renew(book, TIMES, old, enrolment.read_csr(csr), proof, denied, now)


def renewal_refused(book: Ledger, old: Shown, **changes: Any) -> Refused:
    """The reason for which a renewal is refused."""
    with pytest.raises(EnrolmentError) as caught:
        renew(book, old, **changes)
    return caught.value.reason


@pytest.mark.parametrize(
    ("limit", "wanted", "claimed", "name"),
    [
        (None, "dev-1", None, "dev-1"),
        (None, None, "dev-1", "dev-1"),
        ("dev-1", None, None, "dev-1"),
        ("dev-1", "dev-1", "dev-1", "dev-1"),
        ("line3-*", "line3-a", None, "line3-a"),
    ],
)
def test_a_token_lets_one_device_in(limit: str | None, wanted: str | None, claimed: str | None, name: str) -> None:
    """The name is the token's, or the device's own within what the token allows."""
    decision = enrol(ledger(name=limit), asks(wanted, claimed=claimed))
    assert isinstance(decision, Issue) and (decision.name, decision.key) == (name, KEYS[0].public_key())


@pytest.mark.parametrize(
    ("limit", "wanted", "claimed", "reason"),
    [
        (None, None, None, Refused.NAME_NEEDED),
        ("line3-*", None, None, Refused.NAME_NEEDED),
        ("line3-*", "line4-a", None, Refused.WRONG_NAME),
        ("dev-1", "dev-2", None, Refused.WRONG_NAME),
        ("dev-1", None, "dev-2", Refused.WRONG_NAME),
        (None, "dev-1", "dev-2", Refused.WRONG_NAME),
        (None, "_operator", None, Refused.BAD_NAME),
        (None, None, "_agg-0", Refused.BAD_NAME),
        (None, "dev-1", "_agg-0", Refused.BAD_NAME),
        ("*", "dev-1/cmd", None, Refused.BAD_NAME),
        ("*", "+", None, Refused.BAD_NAME),
        ("*", "#", None, Refused.BAD_NAME),
        ("*", "Dev", None, Refused.BAD_NAME),
        ("*", "", None, Refused.BAD_NAME),
        ("*", "a" * 64, None, Refused.BAD_NAME),
        ("*", "dev\n", None, Refused.BAD_NAME),
    ],
)
def test_a_name_outside_the_token_is_refused(
    limit: str | None, wanted: str | None, claimed: str | None, reason: Refused
) -> None:
    """No service's name, no topic's letters, and no other name than the token's."""
    assert refused(ledger(name=limit), asks(wanted, claimed=claimed)) is reason


@pytest.mark.parametrize(
    ("changes", "request_changes", "reason"),
    [
        ({}, {"token": "anothertoken"}, Refused.BAD_TOKEN),
        ({}, {"secret": bytes(32)}, Refused.BAD_TOKEN),
        ({"revoked_at": 5}, {}, Refused.TOKEN_REVOKED),
        ({"revoked_at": 5}, {"secret": bytes(32)}, Refused.BAD_TOKEN),
        ({"expires": int(NOW)}, {}, Refused.TOKEN_EXPIRED),
        ({"expires": int(NOW)}, {"secret": bytes(32)}, Refused.BAD_TOKEN),
        ({}, {"csr": "junk"}, Refused.BAD_CSR),
    ],
)
def test_a_token_that_is_no_good_is_refused(
    changes: dict[str, Any], request_changes: dict[str, Any], reason: Refused
) -> None:
    """Who does not know the secret learns nothing of the token's state."""
    assert refused(ledger(**changes), asks(**request_changes)) is reason


def test_unknown_and_wrong_are_told_alike() -> None:
    """The whole answer is the same, so nobody can look for ids."""
    answers = []
    for change in ({"token": "anothertoken"}, {"secret": bytes(32)}):
        with pytest.raises(EnrolmentError) as caught:
            enrol(ledger(), asks(**change))
        answers.append(str(caught.value))
    assert answers[0] == answers[1]


def test_a_used_token_repeats_its_answer_to_the_same_key_alone() -> None:
    """A lost answer is given again, also after the token's end; another key, or another name, gets nothing."""
    book = ledger()
    made = book.issue(enrol(book, asks()), NOW)
    assert enrol(book, asks(), NOW + 2 * DAY) == Repeat(made)
    assert enrol(book, asks(None), NOW) == Repeat(made)
    assert refused(book, asks(key=1)) is Refused.TOKEN_USED
    assert refused(book, asks("dev-2")) is Refused.WRONG_NAME
    assert refused(book, asks(claimed="dev-2")) is Refused.WRONG_NAME
    assert refused(book, asks(), made.not_after) is Refused.TOKEN_USED
    assert refused(book, asks(), denied=frozenset({"dev-1"})) is Refused.DENIED
    book.certificates = [replace(made, revoked_at=1)]
    assert refused(book, asks()) is Refused.REVOKED


def test_a_used_token_is_nothing_to_another_device() -> None:
    """Not even to one that has a certificate of its own."""
    book = ledger()
    book.issue(enrol(book, asks()), NOW)
    book.issue(Issue("dev-2", KEYS[1].public_key(), None), NOW)
    assert refused(book, asks(None, key=1)) is Refused.TOKEN_USED


def test_a_name_belongs_to_who_took_it_first() -> None:
    """Only a token made for this one name, to replace it, gives it to another key."""
    for limit, again, allowed in (
        (None, False, False),
        ("dev-*", True, False),
        ("dev-1", False, False),
        ("dev-1", True, True),
    ):
        book = ledger(name=limit, again=again)
        book.devices["dev-1"] = StoredDevice(name="dev-1", labels={}, enrolled=1, how="bundle")
        if allowed:
            assert isinstance(enrol(book, asks()), Issue)
        else:
            assert refused(book, asks()) is Refused.NAME_TAKEN


def test_a_denied_name_does_not_come_back() -> None:
    """A token does not get a device past the deny list."""
    assert refused(ledger(), asks(), denied=frozenset({"dev-1"})) is Refused.DENIED


def test_one_key_is_one_device() -> None:
    """A key that has a certificate gets no second name."""
    book = ledger()
    book.issue(Issue("dev-9", KEYS[0].public_key(), None), NOW)
    assert refused(book, asks()) is Refused.BAD_CSR
    assert renewal_refused(book, shown(key=1), key=0, signer=1) is Refused.BAD_CSR


def test_the_old_key_renews() -> None:
    """The new key gets a certificate of the same name, and the same again when asked again."""
    book = ledger()
    decision = renew(book, shown())
    assert decision == Issue("dev-1", KEYS[1].public_key(), None)
    made = book.issue(decision, NOW)
    assert renew(book, shown(), now=NOW + 20 * DAY) == Repeat(made)
    assert isinstance(renew(book, shown(), now=NOW + 25 * DAY), Issue)
    book.certificates = [replace(made, revoked_at=1)]
    assert renewal_refused(book, shown()) is Refused.BAD_CSR


@pytest.mark.parametrize(("days", "good"), [(0, True), (179, True), (181, False)])
def test_an_expired_certificate_renews_for_a_while(days: int, good: bool) -> None:
    """180 days after its end, and no day longer."""
    old = shown(not_after=NOW - days * DAY)
    if good:
        assert isinstance(renew(ledger(), old), Issue)
    else:
        assert renewal_refused(ledger(), old) is Refused.TOO_LATE


def test_a_renewal_needs_the_old_key_and_the_same_name() -> None:
    """Who only has the certificate, or wants another name, gets none; and learns nothing of the deny list."""
    book, denied = ledger(), frozenset({"dev-1"})
    assert renewal_refused(book, shown(), signer=1) is Refused.BAD_SIGNATURE
    assert renewal_refused(book, shown(), signer=1, denied=denied) is Refused.BAD_SIGNATURE
    assert renewal_refused(book, shown(), name="dev-2") is Refused.WRONG_NAME
    assert renewal_refused(book, shown(), name="_agg-0") is Refused.BAD_NAME
    assert renewal_refused(book, shown(), denied=denied) is Refused.DENIED
    made = book.issue(renew(book, shown()), NOW)
    book.certificates = [replace(made, revoked_at=1)]
    assert renewal_refused(book, shown(key=1, serial=made.serial), key=2, signer=1) is Refused.REVOKED


def test_a_stolen_key_cannot_fill_the_disk() -> None:
    """So many certificates for a device within one lifetime, then no more until it has passed."""
    book = ledger()
    for _ in range(registry.ISSUES_MAX):
        book.issue(Issue("dev-1", KEYS[2].public_key(), None), NOW)
    assert renewal_refused(book, shown()) is Refused.TOO_MANY
    later = NOW + TIMES.lifetime + 1
    assert isinstance(renew(book, shown(not_after=later), now=later), Issue)


def test_nothing_outlives_the_ca() -> None:
    """A certificate ends with the CA at the latest, and is renewed at two thirds."""
    assert registry.end_of(TIMES, NOW + 5, NOW) == NOW + 5
    assert registry.renew_at(NOW, NOW + 30 * DAY) == NOW + 20 * DAY


@given(st.text("ab-*", min_size=1, max_size=8), st.text("ab-", max_size=10))
def test_patterns_match_as_a_shells_do(pattern: str, name: str) -> None:
    """* is for any characters, also none."""
    import fnmatch

    assert registry.matches(pattern, name) == fnmatch.fnmatchcase(name, pattern)


def test_patterns_and_labels_are_checked() -> None:
    """What can name no device is no pattern; what is not key=value is no label."""
    assert [registry.is_pattern(text) for text in ("line3-*", "*", "a", "_agg-0", "+", "a/b", "", "-a")] == [
        True,
        True,
        True,
        False,
        False,
        False,
        False,
        False,
    ]
    assert registry.labels_of(["site=graz", "line="]) == {"site": "graz", "line": ""}
    for wrong in (["site"], ["=x"], ["a=b c"], [f"k{number}=1" for number in range(17)]):
        with pytest.raises(ValueError, match=r"labels|key=value"):
            registry.labels_of(wrong)


def test_base64_of_the_wire_is_the_tokens_secret() -> None:
    """What a token's text carries is what the request's JSON carries, in the two alphabets."""
    token = enrolment.Token("tokentoken", SECRET, bytes(32))
    sent = enrolment.encode(asks())
    assert base64.b64encode(enrolment.Token.parse(str(token)).secret) in sent
