"""How much memory a device has left."""

from __future__ import annotations

from lmjax.train import memory


class Device:
    """A device that says what it has, or does not."""

    def __init__(self, platform: str, statistics: dict[str, int] | None):
        self.platform, self._statistics = platform, statistics

    def memory_stats(self) -> dict[str, int] | None:
        return self._statistics


def test_free_memory_is_what_the_device_or_else_the_machine_has_left() -> None:
    statistics = {"bytes_limit": 80, "bytes_in_use": 30, "bytes_reserved": 1}
    assert memory.free_bytes(Device("gpu", statistics)) == 50
    assert memory.free_bytes(Device("gpu", None)) is None
    machine = memory.free_bytes(Device("cpu", None))
    assert machine is None or 2**20 < machine < 2**50
