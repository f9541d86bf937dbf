"""API keys: made once and shown once, kept in the store as digests, and known to a serving process by polling.

Below `access/` stand write-once records: `keys/NAME.json` says what a key may do, `revoked/NAME.json` that it may no more. A key is 256 random
bits, so its plain sha256 tells nothing of it. While the store has never held a key the service is open, to this machine alone.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from rag_serving.edge.caller import ANONYMOUS, SCOPES, Caller
from rag_serving.errors import AccessError, AlreadyExists, ConfigError, NotReady, StoreError
from rag_serving.seals import sealed, unsealed
from rag_serving.store import Store

KEYS = "access/keys"
REVOKED = "access/revoked"
PREFIX = "ragline_"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/-]{0,127}")
_NOBODY = "0" * 64

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Key:
    """What is kept of a key. Times are UTC in ISO 8601."""

    name: str
    sha256: str
    groups: tuple[str, ...]
    scopes: tuple[str, ...]
    created: str
    created_by: str
    expires: str | None = None

    @property
    def key_id(self) -> str:
        """Twelve hex digits that stand for the key in logs."""
        return self.sha256[:12]

    def expired(self, now: datetime) -> bool:
        return self.expires is not None and now >= datetime.fromisoformat(self.expires)

    @property
    def caller(self) -> Caller:
        return Caller(self.name, self.key_id, frozenset(self.groups), frozenset(self.scopes))


@dataclass(frozen=True, slots=True)
class Revocation:
    """The end of a key: when, by whom, why."""

    name: str
    at: str
    actor: str
    reason: str


def create_key(
    store: Store, name: str, *, scopes: Iterable[str], actor: str, groups: Iterable[str] = (), expires: datetime | None = None
) -> tuple[str, Key]:
    """A new key and its record; the key itself is kept nowhere. AccessError for a name that is or was in use, or a value that cannot be."""
    now = datetime.now(UTC)
    wanted = tuple(sorted(set(scopes)))
    belongs = tuple(sorted(set(groups)))
    if not _NAME.fullmatch(name):
        raise AccessError(f"{name!r} is no name for a key.", fix="Use 1 to 64 letters, digits, '.', '_' and '-'.")
    if not wanted or set(wanted) - set(SCOPES):
        raise AccessError(f"the scopes are {', '.join(wanted) or 'none'}.", fix=f"Choose among {', '.join(SCOPES)}.")
    for group in belongs:
        if not _GROUP.fullmatch(group):
            raise AccessError(f"{group!r} is no name for a group.", fix="Use 1 to 128 letters, digits and . _ : @ / - signs.")
    if expires is not None and expires <= now:
        raise AccessError(f"the key would expire at {expires.isoformat()}, which has passed.", fix="Give a later day.")
    token = PREFIX + secrets.token_hex(32)
    key = Key(name, _digest(token), belongs, wanted, _told(now), actor, _told(expires) if expires else None)
    try:
        store.create(f"{KEYS}/{name}.json", sealed(asdict(key)))
    except AlreadyExists:
        raise AccessError(f"a key named {name!r} exists or existed.", fix="Choose another name, so that logs name one key.") from None
    return token, key


def revoke_key(store: Store, name: str, *, actor: str, reason: str) -> Revocation:
    """End a key; ending it again is kept as it was the first time. AccessError when there is none of that name."""
    if not _NAME.fullmatch(name) or not store.exists(f"{KEYS}/{name}.json"):
        raise AccessError(f"there is no key named {name!r}.", fix="`ragline keys list` names them.")
    ended = Revocation(name, _told(datetime.now(UTC)), actor, reason)
    with suppress(AlreadyExists):
        store.create(f"{REVOKED}/{name}.json", sealed(asdict(ended)))
    return Revocation(**_record(store, f"{REVOKED}/{name}.json"))


def read_keys(store: Store) -> list[tuple[Key, Revocation | None]]:
    """Every key, with its end if it has one, oldest first. StoreError names a record that was damaged or edited."""
    ended = set(store.names(REVOKED))
    found = [
        (_key(store, name), Revocation(**_record(store, f"{REVOKED}/{name}")) if name in ended else None) for name in store.names(KEYS)
    ]
    return sorted(found, key=lambda each: (each[0].created, each[0].name))


def require_keys(store: Store, host: str) -> None:
    """ConfigError when other machines could reach a service at `host` that asks nobody for a key."""
    if not is_loopback(host) and not store.names(KEYS):
        raise ConfigError(
            f"{host} can be reached from other machines, and there are no API keys.",
            fix="Make one with `ragline keys create NAME --scope query`, or listen on 127.0.0.1.",
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class KeyRing:
    """The keys as one serving process knows them, at most `poll_seconds` and a read behind the store.

    A store that cannot be read changes nothing; a damaged record is as good as none. A process that has once seen keys never becomes open.
    """

    def __init__(self, store: Store, *, poll_seconds: float) -> None:
        self.open = False
        self._store = store
        self._poll_seconds = poll_seconds
        self._keys: dict[str, Key] = {}
        self._by_id: dict[str, Key] = {}
        self._damaged: set[str] = set()
        self._read_once = False
        self._ever_any = False
        self._readable = True
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the keys, and go on reading them in the background."""
        await asyncio.to_thread(self.refresh)
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def caller_of(self, token: str) -> Caller:
        """Whoever holds this key. AccessError `unauthorized`, the same for every key that is not good; NotReady before the first read."""
        if self.open:
            return ANONYMOUS
        if not self._read_once:
            raise NotReady("the API keys cannot be read yet.", fix="Try again in a moment; the service's log says why.")
        digest = _digest(token)
        key = self._by_id.get(digest[:12])
        known = hmac.compare_digest(digest, key.sha256 if key else _NOBODY)
        if key is None or not known or key.expired(datetime.now(UTC)):
            raise unauthorized()
        return key.caller

    def refresh(self) -> None:
        """Read what changed in the store."""
        try:
            names, revoked = self._store.names(KEYS), set(self._store.names(REVOKED))
            keys = {name: key for name in names if name not in revoked and (key := self._known(name)) is not None}
        except (StoreError, OSError) as error:
            if self._readable:
                log.error("the API keys cannot be read, those known before stay: %s", error)  # noqa: TRY400 - once, in one line
            self._readable = False
            return
        self._ever_any = self._ever_any or bool(names)
        self._keys, self._by_id = keys, {key.key_id: key for key in keys.values()}
        self.open = not self._ever_any
        self._read_once = self._readable = True

    def _known(self, name: str) -> Key | None:
        if name in self._keys:
            return self._keys[name]
        try:
            return _key(self._store, name)
        except StoreError as error:
            if name not in self._damaged:
                log.error("an API key is not accepted: %s", error)  # noqa: TRY400 - what is wrong stands in the message
            self._damaged.add(name)
            return None

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            await asyncio.to_thread(self.refresh)


def unauthorized() -> AccessError:
    """The one answer to every request without a good key."""
    return AccessError(
        "this needs an API key that is known, current and not revoked.",
        fix="Send the header Authorization: Bearer KEY, with a key made by `ragline keys create`.",
        code="unauthorized",
    )


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()


def _told(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def _key(store: Store, name: str) -> Key:
    fields = _record(store, f"{KEYS}/{name}")
    try:
        key = Key(**{**fields, "groups": tuple(fields["groups"]), "scopes": tuple(fields["scopes"])})
        key.expired(datetime.now(UTC))
    except (TypeError, ValueError, KeyError):
        raise StoreError(f"{KEYS}/{name} is no record of a key.", fix="Restore it from a backup, or revoke that key.") from None
    return key


def _record(store: Store, key: str) -> dict[str, Any]:
    try:
        return unsealed(store.read(key))
    except ValueError as error:
        raise StoreError(f"{key} cannot be trusted: {error}.", fix="Restore it from a backup, or revoke that key.") from None
