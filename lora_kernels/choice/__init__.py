"""The choice of each call's backend and strategy: `choose`, and the `verdicts` that it follows."""
