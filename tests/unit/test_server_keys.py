"""API keys and their quota, against a real SQLite file."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tuneloop.server.auth import Principal
from tuneloop.server.keys import Keys
from tuneloop.server.quota import RequestQuota
from tuneloop.storage import Database
from tuneloop.storage.errors import AuthenticationFailed, InvalidInput, NotFound, Overloaded, PermissionDenied


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/test.db")
    await database.migrate()
    yield database
    await database.close()


async def test_the_server_is_open_until_the_first_key(database: Database) -> None:
    keys = Keys(database)
    assert not await keys.required()
    _, key = await keys.create("first")
    assert await keys.required()
    await keys.revoke(key.id)
    assert await Keys(database).required()  # revoking the last key must not open the server again


async def test_a_key_from_outside_closes_it_too(database: Database) -> None:
    keys = Keys(database, admin_key="secret")
    assert await keys.required()
    assert keys.is_admin_key("secret")
    assert not keys.is_admin_key("other")
    assert not Keys(database).is_admin_key("")


async def test_only_the_hash_is_stored(database: Database, tmp_path: Path) -> None:
    secret, key = await Keys(database).create("laptop", scopes=["tune", "infer"])
    assert secret.startswith(key.prefix)
    assert key.scopes == ("infer", "tune")
    await database.close()
    files = [path.read_bytes() for path in tmp_path.iterdir()]  # noqa: ASYNC240
    assert files and not any(secret.encode() in content for content in files)


async def test_a_secret_is_known_to_every_process_until_it_is_revoked(database: Database) -> None:
    here, there = Keys(database), Keys(database)
    secret, key = await here.create("shared", allowed_models=["support"], rpm_limit=5)
    verified = await there.verify(secret)
    assert (verified.id, verified.allowed_models, verified.rpm_limit) == (key.id, ("support",), 5)
    assert (await here.list())[0].last_used_at is not None
    await there.revoke(key.id)
    with pytest.raises(AuthenticationFailed):
        await there.verify(secret)
    with pytest.raises(AuthenticationFailed):
        await here.verify(secret)


async def test_unknown_and_expired_keys_fail(database: Database) -> None:
    keys = Keys(database)
    secret, _ = await keys.create("old", expires_at=datetime.now(UTC) - timedelta(seconds=1))
    for wrong in (secret, "tl-nothing", ""):
        with pytest.raises(AuthenticationFailed):
            await keys.verify(wrong)


async def test_what_makes_no_sense_is_refused(database: Database) -> None:
    keys = Keys(database)
    for name, scopes, limit in (("", ["infer"], None), ("x", ["root"], None), ("x", [], None), ("x", ["infer"], 0)):
        with pytest.raises(InvalidInput):
            await keys.create(name, scopes=scopes, rpm_limit=limit)
    with pytest.raises(NotFound):
        await keys.revoke("key_none")


def test_a_quota_refills_evenly() -> None:
    now = 0.0
    quota = RequestQuota(lambda: now)
    for _ in range(6):
        quota.take("a", 6)
    with pytest.raises(Overloaded) as caught:
        quota.take("a", 6)
    assert caught.value.retry_after == pytest.approx(10)
    quota.take("b", 6)
    now = 10.0
    quota.take("a", 6)
    with pytest.raises(Overloaded):
        quota.take("a", 6)


def test_scopes_are_explicit_and_models_allowed_by_name() -> None:
    tuner = Principal(id="1", name="t", scopes=frozenset({"tune"}), allowed_models=frozenset({"support", "base"}))
    assert tuner.has("tune")
    assert not tuner.has("infer")
    assert not tuner.has("admin")
    assert Principal(id="2", name="a", scopes=frozenset({"admin"})).has("infer")
    tuner.check_model("support@prod")
    with pytest.raises(PermissionDenied):
        tuner.check_model("support2")
