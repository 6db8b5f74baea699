"""Systems as the generations of a store: what every change of a `System` does on disk.

Rules of this file:

1. A published generation is on probation: it serves at once, and the next start falls back to the confirmed one.
2. `confirm` and `roll_back` end probation, and old generations are removed then.
3. The generation of a system is its number in the store. Numbers only rise, so none is used again after a rollback.
4. What is forgotten is gone from every generation, older ones included: there is no way back. Files are unlinked, not
   overwritten; what a flash chip keeps of them is beyond a store.

Where the disk fails, all functions raise `DeviceError`, as the store does.
"""

from __future__ import annotations

from dataclasses import replace

from device.state.codec import from_files, to_files
from device.state.store import Store
from edgeear.errors import FormatError
from edgeear.system import System


def load(store: Store) -> System | None:
    """What serves at a start: the confirmed generation, None where there is none. One on probation is dropped.

    Raises `SystemFormatError` for files that this version cannot read."""
    number = store.recover()
    return None if number is None else replace(from_files(store.read(number)), generation=number)


def require_encoder(system: System, digest: str) -> None:
    """Raises `FormatError` where `system` was learned on another encoder than the one with this SHA-256."""
    if system.encoder_digest != digest:
        raise FormatError(
            f"the store was learned on encoder {system.encoder_digest[:12]}, this one is {digest[:12]}: give the "
            "encoder that it was learned on, or start with an empty folder"
        )


def publish(store: Store, system: System, now: float, note: str) -> System:
    """Store `system` and make it live, on probation. Returns it as the generation that it is in the store."""
    numbered = replace(system, generation=store.next_number)
    store.commit(store.write(to_files(numbered), created=now, note=note))
    return numbered


def publish_confirmed(store: Store, system: System, now: float, note: str) -> System:
    """Store `system` and make it live for good. Returns it as the generation that it is in the store."""
    numbered = publish(store, system, now, note)
    store.confirm(numbered.generation)
    return numbered


def confirm(store: Store) -> None:
    """Make the live generation permanent."""
    if store.live is not None:
        store.confirm(store.live)
    store.collect()


def roll_back(store: Store) -> None:
    """Make the confirmed generation live again."""
    store.rollback()
    store.collect()


def publish_alone(store: Store, system: System, now: float, note: str) -> tuple[System, tuple[int, ...]]:
    """Store `system`, make it live for good, and remove all generations before it.

    Returns it as the generation that it is in the store, and the numbers removed."""
    # Twice, because the store keeps one confirmed generation beside the newest: that one must not know it either.
    publish_confirmed(store, system, now, f"{note} (spare copy)")
    return publish_confirmed(store, system, now, note), store.collect(keep=1)
