"""aggregator.registry_store: what is written is read back, whole transactions only, and foreign files are refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from aggregator.registry import StoredCertificate, StoredDevice, StoredToken
from aggregator.registry_store import SCHEMA_VERSION, RegistryStore
from shared.errors import ConfigError

TOKEN = StoredToken(
    id="tokentoken", digest=bytes(32), name="line3-*", again=False, labels={"b": "2", "a": "1"}, created=5, expires=9
)
DEVICE = StoredDevice(name="dev-1", labels={"site": "graz"}, enrolled=7, how="token")
BIG = (1 << 159) + 1
CERTIFICATE = StoredCertificate(serial=BIG, device="dev-1", key=bytes(32), issued=7, not_after=100, pem="PEM")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RegistryStore]:
    """A new registry."""
    made = RegistryStore(tmp_path / "registry.db")
    yield made
    made.close()


def test_rows_read_back_after_a_restart(tmp_path: Path) -> None:
    """Tokens with their use, devices with labels, certificates with serial numbers of 160 bits."""
    store = RegistryStore(tmp_path / "registry.db")
    with store.transaction():
        store.add_token(TOKEN)
        store.put_device(DEVICE)
        store.add_certificate(CERTIFICATE)
        store.use_token(TOKEN.id, "dev-1", bytes(32), 8.5)
    store.close()
    store = RegistryStore(tmp_path / "registry.db")
    with store.transaction():
        found = store.token(TOKEN.id)
        assert found is not None and (found.used_at, found.device, found.key) == (8, "dev-1", bytes(32))
        assert (found.name, dict(found.labels), found.state(8)) == ("line3-*", {"a": "1", "b": "2"}, "used")
        assert store.device("dev-1") == DEVICE
        assert store.certificate(BIG) == store.of_key(bytes(32)) == CERTIFICATE
        assert store.certificates("dev-1", 9) == [CERTIFICATE]
    store.close()


def test_a_failed_transaction_leaves_nothing(store: RegistryStore) -> None:
    """A token is used up and its certificate kept, or neither."""

    def half() -> None:
        with store.transaction():
            store.add_token(TOKEN)
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        half()
    with store.transaction():
        assert store.token(TOKEN.id) is None


def test_the_newest_of_a_key_and_a_count(store: RegistryStore) -> None:
    """The rules ask for the newest certificate of a key, and how many a device got."""
    with store.transaction():
        for number in range(1, 5):
            store.add_certificate(
                StoredCertificate(serial=number, device="dev-1", key=b"k", issued=number, not_after=99, pem="")
            )
        newest = store.of_key(b"k")
        assert newest is not None and newest.serial == 4
        assert [store.issued_since("dev-1", moment) for moment in (0, 2, 4)] == [4, 2, 0]
        assert store.issued_since("dev-2", 0) == 0


def test_what_is_revoked_stays_on_the_list_until_it_ends(store: RegistryStore) -> None:
    """The broker's list has every revoked certificate that could still be shown, with its first moment."""
    with store.transaction():
        store.add_certificate(CERTIFICATE)
        assert store.revoke_certificates("dev-1", 50) == 1
        assert store.revoke_certificates("dev-1", 60) == 0
        assert store.revoked(99) == [(BIG, 50)]
        assert store.revoked(100) == []
        assert store.forget(100) == 0
        assert store.forget(101) == 1


def test_lists_come_in_pages(store: RegistryStore) -> None:
    """After a name, so many; labels are replaced."""
    with store.transaction():
        for name in ("c", "a", "b"):
            store.put_device(StoredDevice(name=name, labels={}, enrolled=1, how="bundle"))
        assert [each.name for each in store.devices("", 2)] == ["a", "b"]
        assert [each.name for each in store.devices("b", 2)] == ["c"]
        store.label("a", {"x": "y"})
        found = store.device("a")
        assert found is not None and found.labels == {"x": "y"}
        store.add_token(TOKEN)
        store.revoke_token(TOKEN.id, 6)
        assert [each.state(6) for each in store.tokens("", 9)] == ["revoked"]


@pytest.mark.parametrize("content", [b"x" * 5000, b"SQLite format 3\0" + bytes(4000)])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    """The registrar ends with what to do about it."""
    path = tmp_path / "registry.db"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"registry\.db.*move it away"):
        RegistryStore(path)


def test_a_foreign_or_later_database_is_refused(tmp_path: Path) -> None:
    """Neither another program's tables nor a later schema are touched."""
    for name, statement, words in (
        ("a", "CREATE TABLE other (x)", "another program"),
        ("b", f"UPDATE schema_version SET version = {SCHEMA_VERSION + 1}", "upgrade"),
    ):
        path = tmp_path / f"{name}.db"
        if name == "b":
            RegistryStore(path).close()
        engine = sa.create_engine(f"sqlite:///{path}")
        with engine.begin() as connection:
            connection.execute(sa.text(statement))
        engine.dispose()
        with pytest.raises(ConfigError, match=words):
            RegistryStore(path)
