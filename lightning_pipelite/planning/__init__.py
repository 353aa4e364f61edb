"""Plans a training run before it starts: its memory, its split and its time."""
