"""The reference, its cases and the derived tolerance."""
