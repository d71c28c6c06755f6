from .defaults import *  # noqa: F403
from .hooks import *  # noqa: F403
from .launch import *  # noqa: F403
from .train_loop import *  # noqa: F403
