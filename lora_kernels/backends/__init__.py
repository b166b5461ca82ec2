"""Where the work is done: one module a backend, none of which imports another."""
