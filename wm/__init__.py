"""World Models: a VAE sees a game, a mixture-density LSTM dreams it, a controller learns inside.

Importing this package registers the dreams with Gymnasium (by name only, nothing heavy is loaded):
`gym.make("wm/CarRacingDream-v0", run=...)` and `gym.make("wm/TakeCoverDream-v0", run=...)`.
"""

import os

# OpenMP threads that wait must sleep: spinning, two processes on the same cores slow each other
# down tenfold and more (measured). Read when torch is loaded, so it is set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import gymnasium

__version__ = "0.1.0"


class WMError(Exception):
    """A failure the user can mend; its message says what happened and what to do."""


for _game in ("CarRacing", "TakeCover"):
    gymnasium.register(
        id=f"wm/{_game}Dream-v0",
        entry_point="wm.worldmodels.agent:make_dream",
        vector_entry_point="wm.worldmodels.agent:make_dreams",
        kwargs={"game": _game.lower()},
    )
