"""The watchdog of a job: a rank that fails, dies or hangs ends it at once, and is named in the last line printed.

How a job ends: a rank that notices a failure reports it to rank 0, the first failure wins, and rank 0 tells all ranks.
Each rank says "done" once its own traceback, if any, has been printed; rank 0 then closes all connections, upon which
all ranks exit.

- :mod:`.watchdog`: what a rank holds, and the only part that others need,
- :mod:`.network`, :mod:`.coordinator`, :mod:`.client`, :mod:`.link`: one TCP connection from rank 0 to
  every other rank,
- :mod:`.failure`: what ended the job, and how the message words it,
- :mod:`.parent_death`: guards a launched rank until it has its watchdog,
- :mod:`.processes`: how processes end, and how their last output is written,
- :mod:`.timeouts`: how long each of these waits.
"""

from typing import TYPE_CHECKING

from lightning_pipelite.shared.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning_pipelite.strategy.watchdog.watchdog import Watchdog

__all__ = ["Watchdog"]
__getattr__ = lazy_names(__name__, {"Watchdog": "watchdog"})
