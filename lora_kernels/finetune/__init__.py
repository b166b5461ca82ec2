"""Fine-tune a causal language model on plain text with fused LoRA layers, stock PEFT beside it."""


class UsageError(ValueError):
    """What was asked for cannot be done; the message is one line that says what to do instead."""
