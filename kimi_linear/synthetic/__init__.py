"""The paper's synthetic tasks (section 5.1), trained on the ops of `impls`: forward, backward and all between them."""

from kimi_linear.synthetic.mixers import MIXERS, Mixer
from kimi_linear.synthetic.model import Toy, ToyConfig
from kimi_linear.synthetic.tasks import TASKS, Batch, Task, batch, check

__all__ = ["MIXERS", "TASKS", "Batch", "Mixer", "Task", "Toy", "ToyConfig", "batch", "check"]
