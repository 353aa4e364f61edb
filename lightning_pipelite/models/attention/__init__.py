"""How packed documents are kept apart: by the kernel's own bounds, or by masks."""
