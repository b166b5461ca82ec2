"""Types and the reference that all other modules use. Imports torch alone."""
