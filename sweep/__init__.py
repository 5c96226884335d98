"""Which LoRA rank and alpha, for this model and this data, and what it gives up against full fine-tuning."""

__version__ = "0.1.0"
