"""The door: the ``pipelite`` command, its configuration files, and what it says of mistakes."""
