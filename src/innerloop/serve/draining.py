"""A uvicorn server that listens until what it has been asked is answered, and refuses what comes meanwhile."""

from __future__ import annotations

from types import FrameType

from uvicorn import Config, Server

from innerloop.serve.guard import Doors


class DrainingServer(Server):
    """Asked to end, it closes its doors, and ends once nobody is inside; asked again, it ends at once.

    Args:
        config: uvicorn's.
        doors: of the app.
        most: seconds after which it ends whoever is inside.
    """

    def __init__(self, config: Config, doors: Doors, most: float):
        super().__init__(config)
        self.doors, self.most = doors, most

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if self.doors.closed_at is None:
            self.doors.close()
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Tell whether to end; asked ten times a second."""
        if self.doors.closed_at is not None:
            is_late = self.doors.seconds_closed() >= self.most
            self.should_exit |= is_late or self.doors.n_inside == 0
            if is_late:  # they have had their time
                self.config.timeout_graceful_shutdown = 1
        return await super().on_tick(counter)
