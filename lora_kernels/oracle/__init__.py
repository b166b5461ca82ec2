"""What is right, and how far a result may be from it: equation, cases and tolerance."""
