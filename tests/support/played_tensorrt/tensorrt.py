"""For servers on the host in the part of a GPU: a ``tensorrt`` that computes with numpy."""

from fake_tensorrt import *  # noqa: F403
