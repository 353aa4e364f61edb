"""What all rooms may use, one idea a file."""
