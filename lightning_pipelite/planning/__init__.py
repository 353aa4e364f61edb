"""What a training will take, told before it is started: its memory, its split, its time."""
