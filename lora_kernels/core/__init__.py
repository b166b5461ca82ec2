"""Types and device facts that all other packages use. Imports torch alone."""
