"""Small Python values from one rank to others: what rank 0 decides, or what only it can know.

The values come from processes of the same run, which is why they are unpickled as they are.
"""

import pickle
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ascendspeed_core.device import HOST

BUFFER_BYTES = 4096
"""Values that fit are sent by one broadcast, larger ones by two."""
HEADER_BYTES = 8
TIMEOUT = timedelta(days=365)
"""Followers wait as long as a user or a server has nothing to compute; a leader that dies ends the connection."""


class ControlChannel:
    """Broadcasts from the first rank of a group to the others, over gloo whatever the device.

    Args:
        group: of this rank.
        ranks: global ranks of the group, the leader first.
    """

    def __init__(self, group: dist.ProcessGroup, ranks: Sequence[int]) -> None:
        self._group, self._leader = group, ranks[0]
        self.is_leader = dist.get_rank() == ranks[0]

    def send(self, value: Any) -> None:
        """Send a value from the leader."""
        content = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        data = torch.frombuffer(
            bytearray(len(content).to_bytes(HEADER_BYTES, "little") + content), dtype=torch.uint8
        )
        first = torch.zeros(BUFFER_BYTES, dtype=torch.uint8)
        first[: len(data)] = data[:BUFFER_BYTES]
        dist.broadcast(first, self._leader, group=self._group)
        if len(data) > BUFFER_BYTES:
            dist.broadcast(data[BUFFER_BYTES:].clone(), self._leader, group=self._group)

    def receive(self) -> Any:
        """Wait for the leader's next value."""
        first = torch.empty(BUFFER_BYTES, dtype=torch.uint8)
        dist.broadcast(first, self._leader, group=self._group)
        content = first.numpy().tobytes()
        size = HEADER_BYTES + int.from_bytes(content[:HEADER_BYTES], "little")
        if size > BUFFER_BYTES:
            rest = torch.empty(size - BUFFER_BYTES, dtype=torch.uint8)
            dist.broadcast(rest, self._leader, group=self._group)
            content += rest.numpy().tobytes()
        return pickle.loads(content[HEADER_BYTES:size])


def open_channel(groups: Sequence[Sequence[int]]) -> ControlChannel | None:
    """Make the channel of each group of ranks; all ranks of the world call alike.

    Args:
        groups: global ranks of each, the leader first.

    Returns:
        This rank's channel; `None` when it is in none of the groups.
    """
    own = None
    for ranks in groups:
        group = dist.new_group(list(ranks), timeout=TIMEOUT, backend=HOST.backend)
        if dist.get_rank() in ranks:
            own = ControlChannel(group, ranks)
    return own
