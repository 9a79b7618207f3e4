"""Which workers a client may ring itself at the moment. The connection's lock is held in every call."""

from __future__ import annotations

from forebay.client.opened import Grant, Opened
from forebay.client.pending import Pending, PendingParcel


class Grants:
    """The grants of one connection, by instance."""

    def __init__(self) -> None:
        self._by_instance: dict[int, Grant] = {}

    def __len__(self) -> int:
        return len(self._by_instance)

    def open(self, model: Opened, instance: int, ticket: int) -> None:
        """GRANT has come; without a ring to the worker it is of no use."""
        ring = model.rings.get(instance)
        if ring is not None:
            grant = Grant(model, instance, ticket, ring)
            self._by_instance[instance] = grant
            model.grants.append(grant)

    def close(self, instance: int, ticket: int, *, is_gone: bool) -> Pending | None:
        """REVOKE has come; return the request that the worker was rung for and has not answered.

        Args:
            is_gone: the worker is dead, whatever the ticket.
        """
        grant = self._by_instance.get(instance)
        if grant is None or (not is_gone and grant.ticket != ticket):
            return None
        self.drop(grant)
        pending, grant.outstanding = grant.outstanding, None
        return None if pending is None or pending.is_done else pending

    def set_idle(self, instance: int, token: int = 0) -> None:
        """The worker has answered: everything, or the parcel with this token."""
        grant = self._by_instance.get(instance)
        if grant is None:
            return
        running = grant.outstanding
        if not token or (isinstance(running, PendingParcel) and running.token == token):
            grant.outstanding = None

    def running(self, pending: Pending) -> Grant | None:
        """Return the grant under which a request was rung that is not answered; None: the scheduler has it."""
        return next((grant for grant in self._by_instance.values() if grant.outstanding is pending), None)

    def retire(self, grant: Grant) -> None:
        """Ring no more under it; what was rung is still to be answered, or lost."""
        if grant in grant.model.grants:
            grant.model.grants.remove(grant)

    def drop(self, grant: Grant) -> None:
        """Do not use it any more."""
        self._by_instance.pop(grant.instance, None)
        self.retire(grant)

    def drop_all(self, model: Opened) -> None:
        """Do not use any grant of the model any more."""
        for grant in [grant for grant in self._by_instance.values() if grant.model is model]:
            self.drop(grant)
