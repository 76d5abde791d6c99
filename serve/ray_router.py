"""How Ray Serve chooses a replica for a request: one that has seen its beginning or its images, unless it is busy."""

import random
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .affinity import Affinity, Mark

DEFAULT_IMBALANCE = 4


class AffineRouter(RequestRouter):
    """A request router in Ray Serve's sense, inside the process that sends requests.

    The second argument of a call is the request's marks. imbalance: requests by which the replica that has seen the
    most may be ahead of the one with the fewest before that one is preferred.
    """

    def initialize_state(self, imbalance: int = DEFAULT_IMBALANCE, **_: Any) -> None:
        """Called by Ray Serve with the router's options."""
        self._affinity, self._imbalance = Affinity(), imbalance

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, the best first: the one with the beginning, then by how few requests they have."""
        by_load = sorted(random.sample(candidate_replicas, len(candidate_replicas)), key=self._load)
        if not by_load:
            return []
        known = self._affinity.best(_marks(pending_request))
        found = next((replica for replica in by_load if replica.replica_id.unique_id == known), None)
        if found is None or self._load(found) - self._load(by_load[0]) > self._imbalance:
            return [[replica] for replica in by_load]
        return [[found], *([replica] for replica in by_load if replica is not found)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Remember who was sent what."""
        self._affinity.note(_marks(pending_request), replica_id.unique_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget a replica that is gone."""
        self._affinity.forget(replica_id.unique_id)
        super().on_replica_actor_died(replica_id)

    def _load(self, replica: RunningReplica) -> int:
        """Requests that it has, as far as is known here."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def _marks(request: PendingRequest | None) -> list[Mark]:
    return request.args[1] if request is not None and len(request.args) > 1 else []
